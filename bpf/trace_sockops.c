// SPDX-License-Identifier: GPL-2.0
/*
 * Counts the connections of a service that knows nothing of it.
 *
 * Runs on TCP sockets of the traced cgroup, four times for each connection that
 * comes in; acts at PASSIVE_ESTABLISHED. Attached only until it is known that
 * the service accepts with the peer's address, for then trace_accept.c counts as
 * well, in a single run. Writes: the count.
 */
#include "trace.h"

int tidegate_trace_sockops(struct bpf_sock_ops *ctx)
{
	__u32 zero = 0;
	__u64 *arrived;

	if (ctx->op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		return 1;
	arrived = bpf_map_lookup_elem(MAP(MAP_TRACE_ARRIVED), &zero);
	if (arrived)
		*arrived += 1;
	return 1;
}
