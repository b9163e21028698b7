// SPDX-License-Identifier: GPL-2.0
/*
 * Times accept() without tracing: the kernel fills in the peer's address for
 * accept(fd, &address, ...) by the same function as for getpeername(), and so
 * runs the cgroup's getpeername program, from within accept.
 *
 * Runs on sockets of the traced cgroup, once per family, at accept() with an
 * address and at getpeername(). Acts on the first run for each stamped
 * connection. Writes: TAKEN in the stamp, the age histogram, and the counts
 * .taken and, of those, .gone (reset meanwhile) and .half_closed (FIN seen).
 */
#include "trace.h"

static __always_inline __u32 log2_of(__u64 value)
{
	__u32 bucket = 0;

	if (value >> 32) {
		value >>= 32;
		bucket += 32;
	}
	if (value >> 16) {
		value >>= 16;
		bucket += 16;
	}
	if (value >> 8) {
		value >>= 8;
		bucket += 8;
	}
	if (value >> 4) {
		value >>= 4;
		bucket += 4;
	}
	if (value >> 2) {
		value >>= 2;
		bucket += 2;
	}
	if (value >> 1)
		bucket += 1;
	return bucket;
}

int tidegate_trace_accept(struct bpf_sock_addr *ctx)
{
	struct age_histogram *ages;
	struct slot *counts;
	struct stamp *stamp;
	struct bpf_sock *sk = ctx->sk;
	__u32 zero = 0, bucket;
	__u64 age;

	if (!sk)
		return 1;
	stamp = bpf_sk_storage_get(MAP(MAP_STAMPS), sk, 0, 0);
	if (!stamp || stamp->flags & STAMP_TAKEN)
		return 1;
	if (stamp_set(stamp, STAMP_TAKEN) & STAMP_TAKEN)
		return 1;
	age = bpf_ktime_get_ns() - stamp->established_ns;
	counts = trace_counts();
	ages = bpf_map_lookup_elem(MAP(MAP_AGES), &zero);
	if (!counts || !ages)
		return 1;
	add(&counts->taken, 1);
	if (sk->state == TCP_CLOSE_STATE)
		add(&counts->gone, 1);
	else if (sk->state == TCP_CLOSE_WAIT_STATE)
		add(&counts->half_closed, 1);
	add(&ages->count, 1);
	add(&ages->sum_ns, age);
	/* two accepts at the same moment: the smaller may win, by as much as they differ */
	if (age > ages->max_ns)
		ages->max_ns = age;
	bucket = log2_of(age);
	if (bucket >= AGE_BUCKETS)
		bucket = AGE_BUCKETS - 1;
	add(&ages->buckets[bucket], 1);
	return 1;
}
