// SPDX-License-Identifier: GPL-2.0
/*
 * Reads when connections were established that nobody accepted yet.
 *
 * Attached to nothing: userspace runs it (BPF_PROG_TEST_RUN) in the network
 * namespace of the connections, on a packet that holds them, one struct
 * queued_ask each behind an Ethernet header. The answers are written into it.
 */
#include "trace.h"

#define AF_INET_FAMILY 2
#define ETHERNET_HEADER 14

static __always_inline struct queued_ask *ask_at(struct __sk_buff *skb, int index)
{
	void *end = (void *)(long)skb->data_end;
	struct queued_ask *ask = (void *)(long)skb->data + ETHERNET_HEADER + index * sizeof(*ask);

	return (void *)(ask + 1) <= end ? ask : 0;
}

int tidegate_trace_read(struct __sk_buff *skb)
{
	int i;

	for (i = 0; i < MAX_QUEUED_ASKS; i++) {
		struct queued_ask *ask = ask_at(skb, i);
		struct bpf_sock_tuple tuple = {};
		struct bpf_sock *sk;
		void *tcp;
		__u64 us;

		if (!ask)
			break;
		/* as a packet of the client's has it */
		if (ask->family == AF_INET_FAMILY) {
			tuple.ipv4.saddr = ask->peer_host[0];
			tuple.ipv4.daddr = ask->local_host[0];
			tuple.ipv4.sport = ask->peer_port;
			tuple.ipv4.dport = ask->local_port;
			sk = bpf_sk_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
		} else {
			__builtin_memcpy(tuple.ipv6.saddr, ask->peer_host, sizeof(tuple.ipv6.saddr));
			__builtin_memcpy(tuple.ipv6.daddr, ask->local_host, sizeof(tuple.ipv6.daddr));
			tuple.ipv6.sport = ask->peer_port;
			tuple.ipv6.dport = ask->local_port;
			sk = bpf_sk_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
		}
		if (!sk)
			continue;
		/* a listener: the connection itself is gone */
		tcp = sk->state == TCP_LISTEN_STATE ? 0 : as_tcp_sock(sk);
		us = tcp ? established_us(tcp) : 0;
		bpf_sk_release(sk);
		ask = ask_at(skb, i);
		if (!ask)
			break;
		ask->established_us = us;
	}
	return 0;
}
