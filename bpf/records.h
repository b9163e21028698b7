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

/* sk_storage of listeners and, cloned, of every connection they take in */
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

/* one (listener, worker): a cache line that the worker writes by plain stores,
 * then one that the kernel side writes by atomic adds */
struct slot {
	__u64 heartbeat_ns; /* last sign of life of the worker */
	__u64 active;	    /* connections accepted and not yet ended */
	__u64 capacity;	    /* active may not exceed it; 0: no limit */
	__u64 state;	    /* SLOT_* */
	__u64 backlog;	    /* min(backlog, somaxconn) of this listener */
	__u64 worker_pad[3];
	__u64 arrived; /* handshakes finished */
	__u64 taken;   /* ages read for the first time: accepted */
	__u64 half_closed; /* clients that sent FIN before their age was read */
	__u64 gone;	   /* connections that reached CLOSE before their age was read */
	__u64 kernel_pad[4];
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

#endif
