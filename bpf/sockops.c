// SPDX-License-Identifier: GPL-2.0
/*
 * Stamps connections with the moment their handshake ended, and counts them.
 *
 * Runs on TCP sockets of our cgroup: at PASSIVE_ESTABLISHED (IPv4, IPv6, SYN
 * cookies alike) and, for those, at changes of state. Acts only on sockets
 * whose storage was cloned from a listener that userspace marked.
 *
 * Reads: the socket's stamp. Writes: the stamp, slots[].arrived, .half_closed
 * and .gone. Attached by a BPF link, beside whatever else is attached.
 */
#include "common.h"

static __always_inline void established(struct bpf_sock_ops *ctx, struct stamp *stamp)
{
	struct slot *slot;

	stamp->cookie = bpf_get_socket_cookie(ctx);
	stamp->flags = 0;
	stamp->established_ns = bpf_ktime_get_ns();
	slot = slot_of(stamp->slot);
	if (slot)
		add(&slot->arrived, 1);
	/* keep the flags of other programs on this socket */
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

static __always_inline void state_changed(struct stamp *stamp, __u32 state)
{
	struct slot *slot;
	__u32 flag, before;

	if (state == TCP_CLOSE_WAIT_STATE)
		flag = STAMP_HALF_CLOSED;
	else if (state == TCP_CLOSE_STATE)
		flag = STAMP_GONE;
	else
		return;
	before = stamp_set(stamp, flag);
	if (before & (STAMP_TAKEN | flag))
		return;
	slot = slot_of(stamp->slot);
	if (!slot)
		return;
	if (flag == STAMP_GONE)
		add(&slot->gone, 1);
	else
		add(&slot->half_closed, 1);
}

static __always_inline int sockops(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk;
	struct stamp *stamp;
	__u32 op = ctx->op;

	if (op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB && op != BPF_SOCK_OPS_STATE_CB)
		return 1;
	sk = ctx->sk;
	if (!sk)
		return 1;
	stamp = bpf_sk_storage_get(MAP(MAP_STAMPS), sk, 0, 0);
	if (!stamp)
		return 1;
	if (op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		established(ctx, stamp);
	else if (!(stamp->flags & STAMP_LISTENER))
		state_changed(stamp, ctx->args[1]);
	return 1;
}

int tidegate_sockops(struct bpf_sock_ops *ctx)
{
	return sockops(ctx);
}
