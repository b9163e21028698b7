// SPDX-License-Identifier: GPL-2.0
/*
 * Moves the bytes of spliced sessions from one socket to the other, within a credit.
 *
 * Runs as stream verdict of the sockhash of sources, for each skb that a socket in it receives;
 * the calls for one socket are serialized by its lock. A socket's cookie leads to the record of
 * the direction that begins there, and the record names its target, in a sockhash of targets.
 *
 * First it looks where in the stream the skb begins. TCP keeps a segment that repeats bytes (sent
 * again with others behind them) whole in its receive queue, and so does it keep one that userspace
 * has read in part; recv() knows how to skip, the kernel's way to here does not. What was seen
 * before is cut off.
 *
 * Redirects while nothing that was passed to userspace still waits there and the target has
 * room; else passes: the data then fills the source's receive queue, its window closes and the
 * sender waits. Room is what fits both the credit and the target's send buffer: beyond that,
 * bytes would wait in the target's backlog, and what is passed of the other direction behind
 * them. What the target acknowledged is read from the target itself: no sample can be missing.
 *
 * Reads: the user half of struct splice_flow; tcp_sock.rcv_nxt and .bytes_received of the source,
 * .bytes_acked and sock.sk_sndbuf of the target. Writes: the kernel half, and the bell: the index of
 * a direction of which something was passed while userspace had nothing of it, or whose budget is used up.
 */
#include "common.h"

/* offsets in this kernel, from the kernel's own type information; 0: not known, do not load */
#ifndef TCP_BYTES_ACKED
#define TCP_BYTES_ACKED 0
#endif
#ifndef TCP_BYTES_RECEIVED
#define TCP_BYTES_RECEIVED 0
#endif
#ifndef TCP_RCV_NXT
#define TCP_RCV_NXT 0
#endif
#ifndef SK_SNDBUF
#define SK_SNDBUF 0
#endif

/* what bpf_skb_adjust_room() cuts off at most in one call, and so often is enough for any skb */
#define CUT_MOST 0xfff
#define CUTS 256

struct tcp_sock;

#define READ(word) (*(volatile __u64 *)&(word))
#define WRITE(word, value) (*(volatile __u64 *)&(word) = (value))

/* in assembly: BCC would rewrite a plain read of a kernel structure, and knows other offsets */
#define LOAD64(tp, offset)                                                                       \
	({                                                                                       \
		__u64 _v;                                                                        \
		asm volatile("%0 = *(u64 *)(%1 + %2)" : "=r"(_v) : "r"(tp), "i"(offset));        \
		_v;                                                                              \
	})
#define LOAD32(tp, offset)                                                                       \
	({                                                                                       \
		__u64 _v;                                                                        \
		asm volatile("%0 = *(u32 *)(%1 + %2)" : "=r"(_v) : "r"(tp), "i"(offset));        \
		_v;                                                                              \
	})

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
	acked = LOAD64(tp, TCP_BYTES_ACKED);
	*room = LOAD32(tp, SK_SNDBUF) * 3 / 4;
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

/*
 * How many bytes at the skb's beginning were seen before; negative: some are missing before it.
 * The first word of an skb's control block is its TCP sequence number.
 */
static __always_inline int repeated(struct __sk_buff *skb, struct splice_flow *flow, __s64 *count)
{
	struct bpf_sock *sk = skb->sk;
	struct tcp_sock *tp;
	__u64 at;

	if (!sk)
		return 0;
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return 0;
	at = LOAD64(tp, TCP_BYTES_RECEIVED) - (__u32)(LOAD32(tp, TCP_RCV_NXT) - skb->cb[0]);
	*count = READ(flow->begin) + flow->redirected + flow->passed - at;
	return 1;
}

static __always_inline int cut(struct __sk_buff *skb, __u32 count)
{
	__u32 piece;
	int i;

	for (i = 0; i < CUTS && count; i++) {
		piece = count < CUT_MOST ? count : CUT_MOST;
		if (bpf_skb_adjust_room(skb, -(__s32)piece, 0, 0))
			return 0;
		count -= piece;
	}
	return !count;
}

static __always_inline void ring(__u32 index)
{
	bpf_ringbuf_output(MAP(MAP_SPLICE_BELL), &index, sizeof(index), 0);
}

static __always_inline int broken(struct splice_flow *flow, __u32 index, __u32 len)
{
	WRITE(flow->broken, flow->broken + len);
	ring(index);
	return SK_DROP;
}

static __always_inline int verdict(struct __sk_buff *skb)
{
	__u32 len = skb->len, *found, index;
	struct splice_flow *flow;
	__u64 cookie, target, now;
	__s64 again;

	/* a bare FIN: redirected, it would break the other direction. TCP has taken note of it already */
	if (!len)
		return SK_DROP;
	cookie = bpf_get_socket_cookie(skb);
	found = bpf_map_lookup_elem(MAP(MAP_SPLICE_INDEX), &cookie);
	if (!found)
		return SK_PASS;
	index = *found;
	flow = bpf_map_lookup_elem(MAP(MAP_SPLICE_FLOWS), &index);
	if (!flow)
		return SK_PASS;
	if (!repeated(skb, flow, &again) || again < 0)
		return broken(flow, index, len);
	if (again) {
		if (again > len)
			again = len;
		WRITE(flow->repeated, flow->repeated + again);
		if (!cut(skb, again))
			return broken(flow, index, len);
		len -= again;
		if (!len)
			return SK_DROP;
	}
	now = bpf_ktime_get_ns();
	WRITE(flow->received_ns, now);
	if (may_redirect(flow, len)) {
		target = READ(flow->target);
		if (bpf_sk_redirect_hash(skb, MAP(MAP_SPLICED), &target, 0) == SK_PASS) {
			WRITE(flow->redirected, flow->redirected + len);
			WRITE(flow->held, flow->held + len);
			WRITE(flow->redirected_ns, now);
			if (flow->redirected == READ(flow->budget))
				ring(index);
			return SK_PASS;
		}
	}
	/* userspace looks for more by itself until it has consumed all and recv() found nothing else */
	if (flow->passed == READ(flow->consumed))
		ring(index);
	WRITE(flow->passed, flow->passed + len);
	return SK_PASS;
}

int tidegate_splice(struct __sk_buff *skb)
{
	return verdict(skb);
}
