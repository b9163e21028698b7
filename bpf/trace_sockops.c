// SPDX-License-Identifier: GPL-2.0
/*
 * Stamps the connections of a service that knows nothing of it.
 *
 * Runs on TCP sockets of the traced cgroup, at PASSIVE_ESTABLISHED. What was
 * established before it was attached has no stamp and is left alone. Changes
 * of state are not asked for: they would be four more runs per connection.
 *
 * Writes: the stamp (but for its cookie, which costs as much as all the rest),
 * and the count .arrived.
 */
#include "trace.h"

int tidegate_trace_sockops(struct bpf_sock_ops *ctx)
{
	struct stamp *stamp;
	struct slot *counts;
	struct bpf_sock *sk;

	if (ctx->op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		return 1;
	sk = ctx->sk;
	if (!sk)
		return 1;
	stamp = bpf_sk_storage_get(MAP(MAP_STAMPS), sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!stamp)
		return 1;
	stamp->established_ns = bpf_ktime_get_ns();
	counts = trace_counts();
	if (counts)
		add(&counts->arrived, 1);
	return 1;
}
