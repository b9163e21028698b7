/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the programs of `tidegate trace` share. They are attached to the cgroup
 * of some other service, and their maps live as long as that command.
 */
#ifndef TIDEGATE_TRACE_H
#define TIDEGATE_TRACE_H

#include "common.h"

/*
 * Where the running kernel has it, from its own type information:
 *
 * RCVQ_TIME	   tcp_sock.rcvq_space.time, us: set when the handshake ends, and
 *		   next when the owner of the socket reads from it. So it is the
 *		   moment a connection that nobody accepted was established.
 * TCP_BYTES_ACKED tcp_sock.bytes_acked: 0 for a socket that came in and was never
 *		   written to; the SYN of an outgoing one counts 1.
 */
static void *(*const as_tcp_sock)(void *sk) = (void *)BPF_FUNC_skc_to_tcp_sock;

/* in assembly: BCC would rewrite a plain read of a kernel structure */
#define READ_KERNEL(into, type, base, offset)                                                      \
	asm volatile("%0 = *(" type " *)(%1 + %2)" : "=r"(into) : "r"(base), "i"(offset))

static __always_inline __u64 established_us(void *tcp)
{
	__u64 us;

	READ_KERNEL(us, "u64", tcp, RCVQ_TIME);
	return us;
}

static __always_inline struct trace_state *trace_state(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(MAP(MAP_TRACE_STATE), &zero);
}

#endif
