/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What every program here uses.
 *
 * Maps are made by userspace before a program is loaded. The C names them by
 * number, and the loader writes the real file descriptor in place of the
 * number: one compiled object serves any set of maps, those inherited from a
 * predecessor included.
 */
#ifndef TIDEGATE_COMMON_H
#define TIDEGATE_COMMON_H

#include <uapi/linux/bpf.h>
#include "records.h"

#define MAP(number) ((void *)bpf_pseudo_fd(1, number))

/* kept in step with loader.py, which names them alike */
#define MAP_STAMPS 1	/* sk_storage: struct stamp */
#define MAP_SLOTS 2	/* array of one: struct slot[MAX_SLOTS] */
#define MAP_AGES 3	/* array: struct age_histogram */
#define MAP_LISTENERS 4 /* hash: cookie of a listener -> its slot (u32) */
#define MAP_MOVED 5	/* LRU hash: cookie of a migrated connection -> its new slot (u32) */
#define MAP_GROUP 6	/* array of one: struct steer_group */
#define MAP_SOCKS 7	/* reuseport sockarray: position -> listener */
#define MAP_SPLICED 8	/* sockhash: cookie -> a socket of a spliced session, as a target */
#define MAP_SPLICE_INDEX 9	/* hash: cookie -> index of the direction that begins there (u32) */
#define MAP_SPLICE_FLOWS 10	/* array: struct splice_flow */
#define MAP_SPLICE_SOURCES 11	/* sockhash that splice.c is attached to */
#define MAP_SPLICE_BELL 12	/* ring buffer: index of a direction (u32) that userspace is to look at */

#define TCP_CLOSE_STATE 7
#define TCP_CLOSE_WAIT_STATE 8
#define TCP_NEW_SYN_RECV_STATE 12

/*
 * All slots are one map value: a selection reads many of them, and an addition
 * is cheaper than a lookup.
 */
static __always_inline struct slot *all_slots(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(MAP(MAP_SLOTS), &zero);
}

/* one of them. Masked in assembly: clang would check one register and use another */
static __always_inline struct slot *slot_at(struct slot *slots, __u64 index)
{
	asm volatile("%0 &= 4095" : "+r"(index));
	return slots + index;
}
_Static_assert(MAX_SLOTS == 4096, "slot_at() masks with MAX_SLOTS - 1");

static __always_inline struct slot *slot_of(__u32 index)
{
	struct slot *slots = all_slots();

	return slots && index < MAX_SLOTS ? slot_at(slots, index) : 0;
}

static __always_inline void add(__u64 *word, __s64 n)
{
	__sync_fetch_and_add(word, n);
}

/* sets flags in a stamp; returns those it had before */
static __always_inline __u32 stamp_set(struct stamp *stamp, __u32 flags)
{
	/* little-endian: flags is the low half of the word it shares with slot */
	return (__u32)__sync_fetch_and_or((__u64 *)&stamp->flags, (__u64)flags);
}

#endif
