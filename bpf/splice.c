// SPDX-License-Identifier: GPL-2.0
/*
 * Moves the bytes of spliced sessions from one socket to the other, within a credit.
 *
 * Runs as stream verdict of the sockhash of sources, for each skb that a socket in it receives;
 * the calls for one socket are serialized by its lock. Targets are in a sockhash of their own. A socket's cookie leads to the record of the
 * direction that begins there, and the record names the socket it leads to.
 *
 * Redirects while nothing that was passed to userspace still waits there and the target holds
 * less than the credit; else passes: the data then fills the source's receive queue, its
 * window closes and the sender waits. Long before that it raises an alarm, upon which userspace
 * takes the source out of the map for a while: what comes then waits in the ordinary receive
 * queue, and goes through here when the source is put back. What comes while it is being taken
 * out is parked in a socket of userspace's own. What the target acknowledged is read from the target
 * itself, so that no sample of it can be missing.
 *
 * Reads: the user half of struct splice_flow, tcp_sock.bytes_acked of the target.
 * Writes: the kernel half.
 */
#include "common.h"

/* its offset in this kernel, from the kernel's own type information; 0: not known, do not load */
#ifndef TCP_BYTES_ACKED
#define TCP_BYTES_ACKED 0
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

/* what the target holds unacknowledged: its send queue and what waits to get into it */
static __always_inline int in_flight(struct splice_flow *flow, __u64 *held)
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
	bpf_sk_release(sk);
	*held = flow->redirected + READ(flow->consumed) + READ(flow->base) - acked;
	return 1;
}

static __always_inline void alarm(struct splice_flow *flow, __u32 index)
{
	__u64 record = index;

	if (!bpf_ringbuf_output(MAP(MAP_SPLICE_ALARMS), &record, sizeof(record), 0))
		WRITE(flow->alarmed, READ(flow->armed));
}

static __always_inline int may_redirect(struct splice_flow *flow, __u32 index, __u32 len)
{
	__u64 held = 0;

	/* what was passed comes first: it may have to wait in userspace */
	if (flow->passed != READ(flow->consumed))
		return 0;
	if (flow->redirected + len > READ(flow->budget))
		return 0;
	if (!in_flight(flow, &held))
		return 0;
	WRITE(flow->held, held);
	if (held + len > READ(flow->alarm_at) && flow->alarmed != READ(flow->armed))
		alarm(flow, index);
	return held + len <= READ(flow->limit);
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
	/* its source is being taken out of the map: nothing may be passed any more, for that would be lost */
	target = READ(flow->park);
	if (target) {
		if (bpf_sk_redirect_hash(skb, MAP(MAP_SPLICED), &target, 0) == SK_PASS) {
			WRITE(flow->parked, flow->parked + len);
			return SK_PASS;
		}
	} else if (may_redirect(flow, *index, len)) {
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
