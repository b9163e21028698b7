/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the programs of `tidegate trace` share. They are attached to the cgroup
 * of some other service, and their maps live as long as that command.
 */
#ifndef TIDEGATE_TRACE_H
#define TIDEGATE_TRACE_H

#include "common.h"

/*
 * The roles that maps have elsewhere, with maps of their own: MAP_STAMPS,
 * MAP_SLOTS with a single slot, of which arrived, taken, half_closed and gone
 * are used, and MAP_AGES with a single histogram.
 */
static __always_inline struct slot *trace_counts(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(MAP(MAP_SLOTS), &zero);
}

#endif
