// SPDX-License-Identifier: GPL-2.0
/*
 * Answers getsockopt(SOL_TIDEGATE, QUEUE_AGE) with a connection's queue_age.
 *
 * Runs on every getsockopt of sockets of our cgroup; all but ours pass as the
 * kernel answered them. The first read of a connection is its acceptance: it
 * sets TAKEN, counts slots[].taken and adds the age to the slot's histogram.
 * A read of a listener answers its own entry and counts nothing.
 *
 * Reads: the socket's stamp, moved (connections whose listener closed).
 * Writes: the stamp, slots[].taken, ages[].
 */
#include "common.h"

static __always_inline __u32 log2_u64(__u64 v)
{
	__u32 r = 0;

	if (v >> 32) { v >>= 32; r += 32; }
	if (v >> 16) { v >>= 16; r += 16; }
	if (v >> 8) { v >>= 8; r += 8; }
	if (v >> 4) { v >>= 4; r += 4; }
	if (v >> 2) { v >>= 2; r += 2; }
	if (v >> 1) { r += 1; }
	return r;
}

static __always_inline void count_age(__u32 index, __u64 age)
{
	struct age_histogram *ages = bpf_map_lookup_elem(MAP(MAP_AGES), &index);
	__u32 bucket = log2_u64(age);

	if (!ages)
		return;
	if (bucket >= AGE_BUCKETS)
		bucket = AGE_BUCKETS - 1;
	add(&ages->count, 1);
	add(&ages->sum_ns, age);
	add(&ages->buckets[bucket], 1);
	/* one worker reads a slot's ages at a time but for thefts: a race can only
	 * keep the smaller of two maxima of the same moment */
	if (age > ages->max_ns)
		ages->max_ns = age;
}

static __always_inline void taken(struct stamp *stamp, __u64 age)
{
	struct slot *slot = slot_of(stamp->slot);
	__u32 *moved;

	if (!slot)
		return;
	if (slot->migrated) {
		/* its arrival is on the books of another slot now */
		__u64 cookie = stamp->cookie;

		moved = bpf_map_lookup_elem(MAP(MAP_MOVED), &cookie);
		if (moved) {
			stamp->slot = *moved;
			bpf_map_delete_elem(MAP(MAP_MOVED), &cookie);
			slot = slot_of(stamp->slot);
			if (!slot)
				return;
		}
	}
	add(&slot->taken, 1);
	count_age(stamp->slot, age);
}

static __always_inline int getsockopt(struct bpf_sockopt *ctx)
{
	struct queue_age *answer = ctx->optval;
	struct bpf_sock *sk = ctx->sk;
	struct stamp *stamp;
	__u64 now, age = 0;
	__u32 before;

	if (ctx->level != SOL_TIDEGATE || ctx->optname != QUEUE_AGE)
		return 1;
	if (!sk || (void *)(answer + 1) > ctx->optval_end)
		return 1;
	stamp = bpf_sk_storage_get(MAP(MAP_STAMPS), sk, 0, 0);
	if (!stamp)
		return 1;
	before = stamp->flags;
	if (!(before & STAMP_LISTENER) && stamp->established_ns) {
		now = bpf_ktime_get_ns();
		age = now - stamp->established_ns;
		before = stamp_set(stamp, STAMP_TAKEN);
		if (!(before & STAMP_TAKEN))
			taken(stamp, age);
	}
	answer->established_ns = stamp->established_ns;
	answer->cookie = stamp->cookie;
	answer->age_ns = age;
	answer->flags = before;
	answer->slot = stamp->slot;
	/* two stores of 32 bits: merged into one of 64 the verifier refuses them */
	*(volatile __s32 *)&ctx->optlen = sizeof(*answer);
	*(volatile __s32 *)&ctx->retval = 0;
	return 1;
}

int tidegate_getsockopt(struct bpf_sockopt *ctx)
{
	return getsockopt(ctx);
}
