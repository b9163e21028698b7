// SPDX-License-Identifier: GPL-2.0
/*
 * Times accept() without tracing: the kernel fills in the peer's address for
 * accept(fd, &address, ...) by the same function as for getpeername(), and so
 * runs the cgroup's getpeername program, from within accept. How long the
 * connection has waited by then its socket tells by itself (trace.h).
 *
 * Runs on sockets of the traced cgroup, once per family, at accept() with an
 * address and whenever somebody asks for the peer later. Those calls are told
 * apart by the number of the system call; but it lies on a cold cache line, so
 * once the service is known never to ask again at once, only connections are
 * looked at that have waited long enough for a later call to be possible.
 * Writes: what it saw.
 */
#include "trace.h"

/* somebody who asks for the peer of a fresh connection does so sooner than this, or much later */
#define SURELY_ACCEPT_NS 1000000

static void *(*const current_task)(void) = (void *)BPF_FUNC_get_current_task_btf;
static void *(*const registers_of)(void *task) = (void *)BPF_FUNC_task_pt_regs;

/* branches here would be mispredicted more often than not: ages are of all sizes */
static __always_inline __u32 log2_of(__u64 value)
{
	__u32 bucket, shift;

	shift = (__u32)(((value >> 32) + 0xffffffff) >> 32) << 5;
	value >>= shift;
	bucket = shift;
	shift = (__u32)(((value >> 16) + 0xffff) >> 16) << 4;
	value >>= shift;
	bucket += shift;
	shift = (__u32)(((value >> 8) + 0xff) >> 8) << 3;
	value >>= shift;
	bucket += shift;
	shift = (__u32)(((value >> 4) + 0xf) >> 4) << 2;
	value >>= shift;
	bucket += shift;
	shift = (__u32)(((value >> 2) + 0x3) >> 2) << 1;
	value >>= shift;
	return bucket + shift + (__u32)(value >> 1);
}

/* whether the task is in one of the calls that ask for the peer of a socket it has */
static __always_inline int asks_again(void)
{
	__u64 call;

	READ_KERNEL(call, CALL_NUMBER_TYPE, registers_of(current_task()), CALL_NUMBER_AT);
	return call == CALL_GETPEERNAME || call == CALL_GETSOCKOPT || call == CALL_GETPEERNAME_32 ||
	       call == CALL_GETSOCKOPT_32;
}

int tidegate_trace_accept(struct bpf_sock_addr *ctx)
{
	struct trace_accepts *accepts;
	struct bpf_sock *sk = ctx->sk;
	struct trace_state *state;
	__u32 zero = 0, bucket;
	__u64 age, acked;
	void *tcp;

	if (!sk)
		return 1;
	tcp = as_tcp_sock(sk);
	if (!tcp)
		return 1;
	READ_KERNEL(acked, "u64", tcp, TCP_BYTES_ACKED);
	if (acked)
		return 1;
	accepts = bpf_map_lookup_elem(MAP(MAP_TRACE_ACCEPTS), &zero);
	state = trace_state();
	if (!accepts || !state)
		return 1;
	age = bpf_ktime_get_ns() - established_us(tcp) * 1000;
	if ((state->check_all || age > SURELY_ACCEPT_NS) && asks_again()) {
		accepts->asked_again++;
		return 1;
	}
	accepts->sum_ns += age;
	if (age > accepts->max_ns)
		accepts->max_ns = age;
	if (sk->state == TCP_CLOSE_STATE)
		accepts->gone++;
	else if (sk->state == TCP_CLOSE_WAIT_STATE)
		accepts->half_closed++;
	bucket = log2_of(age) & 63;
	if (bucket >= AGE_BUCKETS)
		bucket = AGE_BUCKETS - 1;
	accepts->buckets[bucket]++;
	return 1;
}
