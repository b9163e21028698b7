// SPDX-License-Identifier: GPL-2.0
/*
 * Moves the bytes of spliced sessions from one socket to the other, within a credit.
 *
 * Runs as stream verdict of the sockhash of sources, for each skb that a socket in it receives;
 * the calls for one socket are serialized by its lock. A socket's cookie leads to the record of
 * the direction that begins there, and the record names its target, in a sockhash of targets.
 *
 * Redirects while nothing that was passed to userspace still waits there and the target has
 * room; else passes: the data then fills the source's receive queue, its window closes and the
 * sender waits. Room is what fits both the credit and the target's send buffer: beyond that,
 * bytes would wait in the target's backlog, and what is passed of the other direction behind
 * them. What the target acknowledged is read from the target itself: no sample can be missing.
 *
 * Reads: the user half of struct splice_flow, tcp_sock.bytes_acked and sock.sk_sndbuf of the target.
 * Writes: the kernel half.
 */
#include "common.h"

/* offsets in this kernel, from the kernel's own type information; 0: not known, do not load */
#ifndef TCP_BYTES_ACKED
#define TCP_BYTES_ACKED 0
#endif
#ifndef SK_SNDBUF
#define SK_SNDBUF 0
#endif

struct tcp_sock;

#define READ(word) (*(volatile __u64 *)&(word))
#define WRITE(word, value) (*(volatile __u64 *)&(word) = (value))

/* in assembly: BCC would rewrite a plain read of a kernel structure, and knows other offsets */
static __always_inline __u64 bytes_acked(struct tcp_sock *tp)
{
	__u64 acked;

	asm volatile("%0 = *(u64 *)(%1 + %2)" : "=r"(acked) : "r"(tp), "i"(TCP_BYTES_ACKED));
	return acked;
}

static __always_inline __u32 send_buffer(struct tcp_sock *tp)
{
	__u32 size;

	asm volatile("%0 = *(u32 *)(%1 + %2)" : "=r"(size) : "r"(tp), "i"(SK_SNDBUF));
	return size;
}

/*
 * What the target holds unacknowledged, its send queue and what waits to get into it, and what
 * its send buffer holds when a quarter is left for what comes with the bytes.
 */
static __always_inline int in_flight(struct splice_flow *flow, __u64 *held, __u64 *room)
{
	__u64 key = READ(flow->target), acked;
	struct tcp_sock *tp;
	void *sk;

	sk = bpf_map_lookup_elem(MAP(MAP_SPLICED), &key);
	if (!sk)
		return 0;
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp) {
		bpf_sk_release(sk);
		return 0;
	}
	acked = bytes_acked(tp);
	*room = (__u64)send_buffer(tp) * 3 / 4;
	bpf_sk_release(sk);
	*held = flow->redirected + READ(flow->consumed) + READ(flow->base) - acked;
	return 1;
}

static __always_inline int may_redirect(struct splice_flow *flow, __u32 len)
{
	__u64 held = 0, room = 0;

	/* what was passed comes first: it may have to wait in userspace */
	if (flow->passed != READ(flow->consumed))
		return 0;
	if (flow->redirected + len > READ(flow->budget))
		return 0;
	if (!in_flight(flow, &held, &room))
		return 0;
	WRITE(flow->held, held);
	return held + len <= READ(flow->limit) && held + len <= room;
}

static __always_inline int verdict(struct __sk_buff *skb)
{
	__u32 len = skb->len, *index;
	struct splice_flow *flow;
	__u64 cookie, target, now;

	/* a bare FIN: redirected, it would break the other direction. TCP has taken note of it already */
	if (!len)
		return SK_DROP;
	cookie = bpf_get_socket_cookie(skb);
	index = bpf_map_lookup_elem(MAP(MAP_SPLICE_INDEX), &cookie);
	if (!index)
		return SK_PASS;
	flow = bpf_map_lookup_elem(MAP(MAP_SPLICE_FLOWS), index);
	if (!flow)
		return SK_PASS;
	now = bpf_ktime_get_ns();
	WRITE(flow->received_ns, now);
	if (may_redirect(flow, len)) {
		target = READ(flow->target);
		if (bpf_sk_redirect_hash(skb, MAP(MAP_SPLICED), &target, 0) == SK_PASS) {
			WRITE(flow->redirected, flow->redirected + len);
			WRITE(flow->redirected_ns, now);
			return SK_PASS;
		}
	}
	WRITE(flow->passed, flow->passed + len);
	return SK_PASS;
}

int tidegate_splice(struct __sk_buff *skb)
{
	return verdict(skb);
}
