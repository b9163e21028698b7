/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Every structure that the kernel side and userspace share. kernel/records.py
 * mirrors it; the loader and a test compare sizes and offsets of the two.
 * A change of layout raises RECORDS_VERSION: an upgrade hands maps over and a
 * successor that reads them differently must refuse.
 *
 * All times are CLOCK_MONOTONIC nanoseconds.
 */
#ifndef TIDEGATE_RECORDS_H
#define TIDEGATE_RECORDS_H

#define RECORDS_VERSION 1

/* the socket option: level and name are ours, outside the kernel's ranges */
#define SOL_TIDEGATE 0x7467
#define QUEUE_AGE 1

/* stamp.flags */
#define STAMP_TAKEN (1u << 0)	    /* its age was read once: it left the queue */
#define STAMP_HALF_CLOSED (1u << 1) /* the client sent FIN (CLOSE_WAIT) */
#define STAMP_GONE (1u << 2)	    /* the socket reached CLOSE: reset */
#define STAMP_LISTENER (1u << 3)    /* this is a listener's own entry */

/* sk_storage of listeners and, cloned, of every connection they take in.
 * flags and slot share an aligned 64-bit word: BPF has atomic or on 64 bits only */
struct stamp {
	__u64 established_ns; /* 0 on the listener itself */
	__u64 cookie;	      /* of the connection */
	__u32 flags;	      /* STAMP_* */
	__u32 slot;	      /* index into slots[]: which (listener, worker) */
};

/* what getsockopt(SOL_TIDEGATE, QUEUE_AGE) answers */
struct queue_age {
	__u64 established_ns;
	__u64 cookie;
	__u64 age_ns; /* now - established_ns, by the kernel's clock */
	__u32 flags;  /* as before this read: TAKEN says somebody read it earlier */
	__u32 slot;
};

/* slot.state */
#define SLOT_FREE 0
#define SLOT_ACTIVE 1
#define SLOT_DRAINING 2
#define SLOT_DEAD 3

#define MAX_SLOTS 4096	  /* (listener, worker) pairs */
#define MAX_LISTENERS 256 /* reuseport groups */
#define MAX_WORKERS 64	  /* per listener */

/* one (listener, worker): a cache line that userspace writes by plain stores (the worker, but for
 * state, backlog and lost, which are the supervisor's), then one that the kernel side writes by
 * atomic adds. waiting = arrived - taken - lost, signed: it may be off by the few connections that
 * are between two of these steps */
struct slot {
	__u64 heartbeat_ns; /* last sign of life of the worker */
	__u64 active;	    /* connections accepted and not yet ended */
	__u64 capacity;	    /* active may not exceed it; 0: no limit */
	__u64 state;	    /* SLOT_* */
	__u64 backlog;	    /* min(backlog, somaxconn) of this listener */
	__u64 lost;	    /* arrivals whose age nobody will ever read: their worker died with them */
	__u64 user_pad[2];
	__u64 arrived;	   /* handshakes finished, less those migrated away, plus those migrated here */
	__u64 taken;	   /* ages read for the first time: accepted */
	__u64 half_closed; /* clients that sent FIN before their age was read */
	__u64 gone;	   /* connections that reached CLOSE before their age was read */
	__u64 migrated;	   /* waiting connections that went to another slot when this listener closed */
	__u64 kernel_pad[3];
};

/* log2 histogram of the ages at first read, one per slot: bucket b counts
 * ages in [2^b, 2^(b+1)) ns, the last one everything above */
#define AGE_BUCKETS 40
struct age_histogram {
	__u64 count;
	__u64 sum_ns;
	__u64 max_ns;
	__u64 buckets[AGE_BUCKETS];
	__u64 pad[5];
};

/* steer_group.policy */
#define STEER_P2C 0	    /* the lesser load of two random workers */
#define STEER_LEAST_QUEUE 1 /* the least load of all */
#define STEER_HASH 2	    /* by client address; a worker's leaving moves its own clients only */
#define STEER_CPU 3	    /* the worker of the CPU that handles the packet */

/* steer_group.when_full */
#define WHEN_FULL_QUEUE 0  /* the least bad worker gets it */
#define WHEN_FULL_REFUSE 1 /* SK_DROP: the client sees ECONNREFUSED at once */

/* steer_group.verdicts[] */
#define VERDICT_FIT 0	   /* a worker that is alive, active and has room */
#define VERDICT_ALL_HUNG 1 /* every candidate looked hung: heartbeats ignored */
#define VERDICT_ALL_FULL 2 /* every live worker was full: queued all the same */
#define VERDICT_REFUSED 3  /* every live worker was full: dropped */
#define VERDICT_FALLBACK 4 /* nothing to select, or the selection failed: the kernel's hash chose */
#define VERDICT_MIGRATED 5 /* of the above, those that moved a connection from a closed listener */
#define VERDICTS 8

#define NO_SLOT 0xffffffffu

/* one reuseport group: what steer.c reads for each selection, a map of one entry */
struct steer_group {
	__u64 policy;	     /* STEER_* */
	__u64 when_full;     /* WHEN_FULL_* */
	__u64 hang_after_ns; /* a heartbeat older than this: hung; 0: never */
	__u64 count;	     /* positions in use, the last one included: <= MAX_WORKERS */
	__u64 pad[4];
	__u32 slots[MAX_WORKERS]; /* position in the sockarray -> index into slots[], or NO_SLOT */
	__u64 verdicts[VERDICTS]; /* written by the kernel side */
};

#define NO_BUDGET 0xffffffffffffffffull

/* one direction of a spliced session: a cache line that its worker writes by plain stores, then one
 * that splice.c writes. Counts are bytes since the direction was made. The kernel redirects while
 * passed == consumed and redirected + consumed + base - (the target's bytes_acked) stays within limit
 * and the target's send buffer.
 * The next byte that the source owes is number begin + redirected + passed of all it ever received. */
struct splice_flow {
	__u64 consumed; /* of passed: written to the target by userspace */
	__u64 limit;	/* bytes that the target may hold unacknowledged; 0: pass everything */
	__u64 budget;	/* redirected may not exceed it */
	__u64 base;	/* what had been written to the target before, in its bytes_acked */
	__u64 target;	/* cookie of the socket that gets the bytes */
	__u64 begin;	/* bytes of the source that were read before the direction was made */
	__u64 user_pad[2];
	__u64 redirected;    /* moved to the target by the kernel */
	__u64 passed;	     /* left to userspace */
	__u64 held;	     /* what the target held when the kernel last looked */
	__u64 received_ns;   /* when the last bytes arrived, redirected or passed */
	__u64 redirected_ns; /* when the last of them were redirected */
	__u64 repeated;	     /* bytes that arrived a second time and were cut off */
	__u64 broken;	     /* bytes that could not be given to anybody: the session must be reset */
	__u64 kernel_pad;
};

#endif
