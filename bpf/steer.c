// SPDX-License-Identifier: GPL-2.0
/*
 * Chooses the worker for a new connection, by what each worker says of itself.
 *
 * Runs once per SYN (and per ACK that ends a SYN-cookie handshake) of one
 * reuseport group, and when a closing listener's connections migrate. Loaded
 * once per group, over the group's own maps.
 *
 * Workers that hang, drain, are dead or full are passed over; among the others
 * the policy decides. If all look hung, none is. It always selects: SK_PASS
 * without a selection hashes over all listeners of the group, those taken out
 * of the array included.
 *
 * Reads: the group, slots[], listeners. Writes: the group's verdicts and, when
 * a waiting connection migrates, slots[].arrived, slots[].migrated and moved.
 */
#include "common.h"

#define P2C_DRAWS 8 /* with half of the workers unfit, 1 in 256 finds none: then all are scanned */
#define NEVER_NS (1ull << 62)

#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86dd
#define IPV4_SOURCE 12 /* offsets of the source address */
#define IPV6_SOURCE 8

/* how fit a worker is, best first; the high bits of its score */
#define FIT 0
#define AT_CAPACITY 1	     /* accepts no more, but its backlog has room */
#define HUNG 2		     /* room, but no recent heartbeat */
#define BACKLOG_FULL 3	     /* a SYN would be dropped */
#define HUNG_AT_CAPACITY 4
#define HUNG_BACKLOG_FULL 5
#define DRAINING 6
#define DEAD 7
#define ABSENT 8
#define ALIVE (1u << FIT | 1u << AT_CAPACITY | 1u << BACKLOG_FULL)

/* four bits each: by slot.state, and by hung (1), backlog full (2), at capacity (4) added up */
#define CLASS_OF_STATE (ABSENT | DRAINING << 4 * SLOT_DRAINING | DEAD << 4 * SLOT_DEAD)
#define CLASS_OF_FULLNESS                                                                  \
	((__u64)FIT | HUNG << 4 * 1 | BACKLOG_FULL << 4 * 2 | HUNG_BACKLOG_FULL << 4 * 3 | \
	 AT_CAPACITY << 4 * 4 | HUNG_AT_CAPACITY << 4 * 5 | BACKLOG_FULL << 4 * 6 |        \
	 (__u64)HUNG_BACKLOG_FULL << 4 * 7)

#define POSITION_BITS 6
#define CLASS_SHIFT 56
#define LOAD_MASK ((1ull << CLASS_SHIFT) - 1)
#define NO_SCORE ((__s64)(~0ull >> 1))

struct view {
	struct steer_group *group;
	struct slot *slots;
	__u64 now;
	__s64 hang_after;
	__u64 random;
	__u32 hash;    /* of the client, for STEER_HASH */
	__u32 exclude; /* slot of the listener that closes, or NO_SLOT */
};

static __always_inline __u32 mix(__u32 h)
{
	h *= 0x9e3779b1u;
	h ^= h >> 15;
	h *= 0x85ebca77u;
	h ^= h >> 13;
	return h;
}

/*
 * The same value, of which the verifier knows nothing: what it knows differs
 * from path to path, and it would follow each of them through all iterations.
 */
static __always_inline __u64 opaque(const struct view *view, __u64 value)
{
	value ^= view->random;
	asm volatile("" : "+r"(value));
	return value ^ view->random;
}

/* the position, in bounds where the verifier sees it: clang would test one register and use another */
static __always_inline __u64 bounded(__u64 position)
{
	asm volatile("%0 &= 63" : "+r"(position));
	return position;
}
_Static_assert(MAX_WORKERS == 64, "bounded() masks with MAX_WORKERS - 1");

/* 1 if negative. Not a comparison: those are branches, and the verifier follows both sides of each */
static __always_inline __u64 negative(__s64 value)
{
	asm volatile("%0 >>= 63" : "+r"(value));
	return value;
}

/* may be -1 or so for a moment */
static __always_inline __s64 waiting_in(const struct slot *slot)
{
	return (__s64)(slot->arrived - slot->taken - slot->lost);
}

static __always_inline __u32 fitness(const struct view *view, const struct slot *slot)
{
	__s64 most_active = (slot->capacity - 1) & ~(1ull << 63); /* capacity 0: no limit */
	__u64 state = slot->state, fullness;

	if (state != SLOT_ACTIVE)
		return CLASS_OF_STATE >> (state & 3) * 4 & 0xf;
	/* signed: a heartbeat may be newer than now */
	fullness = negative(view->hang_after - (__s64)(view->now - slot->heartbeat_ns));
	fullness |= negative((__s64)slot->backlog - 1 - waiting_in(slot)) << 1;
	fullness |= negative(most_active - (__s64)slot->active) << 2;
	return CLASS_OF_FULLNESS >> fullness * 4 & 0xf;
}

/* load and chance, and whose: among equals the random bits decide; lowest is best */
static __always_inline __s64 load_score(const struct view *view, const struct slot *slot, __u64 position)
{
	__u64 load = waiting_in(slot) + slot->active;

	return load << POSITION_BITS | bounded(position ^ view->random);
}

static __always_inline __u64 position_of(const struct view *view, __s64 score)
{
	return bounded(score ^ view->random);
}

/* highest random weight: a worker that leaves moves its own clients only */
static __always_inline __s64 hash_score(const struct view *view, __u32 index, __u64 position)
{
	return (__u64)mix(view->hash ^ index * 0x9e3779b1u) << POSITION_BITS | bounded(position ^ view->random);
}

/* the fit worker of least load, or nearest to the client's hash */
static __always_inline __s64 best_fit(const struct view *view, bool by_hash)
{
	__s64 score, lowest = NO_SCORE;
	__u32 position, index;
	struct slot *slot;

#pragma clang loop unroll(disable)
	for (position = 0; position < MAX_WORKERS; position++) {
		if (position >= view->group->count)
			break;
		index = view->group->slots[bounded(position)];
		if (index >= MAX_SLOTS)
			continue;
		slot = slot_at(view->slots, index);
		score = by_hash ? hash_score(view, index, position) : load_score(view, slot, position);
		/* few get past this: the rest of the record is read for them only */
		if (score >= lowest)
			continue;
		if (fitness(view, slot) == FIT)
			lowest = score;
		lowest = opaque(view, lowest);
	}
	return lowest;
}

/* the lesser load of two fit workers drawn at random; NO_SCORE if chance found none */
static __always_inline __s64 two_choices(const struct view *view, __u32 count)
{
	__u32 draw, position, index, random = view->random >> 32;
	__s64 score, first = NO_SCORE;
	struct slot *slot;

#pragma clang loop unroll(disable)
	for (draw = 0; draw < P2C_DRAWS; draw++) {
		random = mix(random + 0x6d2b79f5u);
		position = ((__u64)random * count) >> 32;
		index = view->group->slots[bounded(position)];
		if (index >= MAX_SLOTS)
			continue;
		slot = slot_at(view->slots, index);
		score = opaque(view, load_score(view, slot, position));
		if (score == first || fitness(view, slot) != FIT)
			continue;
		if (first != NO_SCORE)
			return score < first ? score : first;
		first = score;
	}
	return first;
}

/* nobody is fit: the least bad, class first, then load; *alive tells whether any has a recent heartbeat */
static __always_inline __s64 least_bad(const struct view *view, bool *alive)
{
	__s64 load, score, lowest = NO_SCORE;
	__u32 position, index, class, seen = 0;
	struct slot *slot;

#pragma clang loop unroll(disable)
	for (position = 0; position < MAX_WORKERS; position++) {
		if (position >= view->group->count)
			break;
		index = view->group->slots[bounded(position)];
		if (index >= MAX_SLOTS || index == view->exclude)
			continue;
		slot = slot_at(view->slots, index);
		class = opaque(view, fitness(view, slot));
		seen |= 1u << (class & 0xf);
		load = waiting_in(slot) + slot->active;
		load = opaque(view, load * (1 - negative(load)));
		score = (__s64)class << CLASS_SHIFT | (load << POSITION_BITS & LOAD_MASK) |
			bounded(position ^ view->random);
		if (score < lowest)
			lowest = score;
		lowest = opaque(view, lowest);
	}
	*alive = seen & ALIVE;
	return lowest;
}

static __always_inline __u32 client_hash(struct sk_reuseport_md *ctx)
{
	__u32 address[4] = {};
	__u32 hash;
	long failed;

	if (ctx->eth_protocol == bpf_htons(ETHERTYPE_IPV6))
		failed = bpf_skb_load_bytes_relative(ctx, IPV6_SOURCE, address, 16, BPF_HDR_START_NET);
	else
		failed = bpf_skb_load_bytes_relative(ctx, IPV4_SOURCE, address, 4, BPF_HDR_START_NET);
	if (failed)
		return ctx->hash; /* a migrating connection comes without its packet */
	hash = mix(address[0]);
	hash = mix(hash ^ address[1]);
	hash = mix(hash ^ address[2]);
	return mix(hash ^ address[3]);
}

/* the slot whose listener is closing, when this is a migration */
static __always_inline __u32 slot_migrated_from(struct sk_reuseport_md *ctx)
{
	__u64 cookie;
	__u32 *slot;

	if (!ctx->migrating_sk)
		return NO_SLOT;
	cookie = bpf_get_socket_cookie(ctx->sk);
	slot = bpf_map_lookup_elem(MAP(MAP_LISTENERS), &cookie);
	return slot ? *slot : NO_SLOT;
}

/* a waiting connection takes its arrival along; one still in its handshake has not arrived */
static __always_inline void migrate(struct sk_reuseport_md *ctx, const struct view *view, __u32 to)
{
	__u32 from = view->exclude;
	struct bpf_sock *moving = ctx->migrating_sk;
	struct slot *old, *new;
	__u64 cookie;

	if (!moving)
		return;
	add(&view->group->verdicts[VERDICT_MIGRATED], 1);
	if (moving->state == TCP_NEW_SYN_RECV_STATE || from >= MAX_SLOTS || to >= MAX_SLOTS)
		return;
	old = slot_at(view->slots, from);
	new = slot_at(view->slots, to);
	cookie = bpf_get_socket_cookie(moving);
	if (bpf_map_update_elem(MAP(MAP_MOVED), &cookie, &to, BPF_ANY))
		return;
	add(&old->migrated, 1);
	add(&old->arrived, -1);
	add(&new->arrived, 1);
}

static __always_inline int select(struct sk_reuseport_md *ctx, struct view *view, __s64 score, __u32 verdict)
{
	struct steer_group *group = view->group;
	__u32 position = position_of(view, score);

	if (score == NO_SCORE || bpf_sk_select_reuseport(ctx, MAP(MAP_SOCKS), &position, 0)) {
		add(&group->verdicts[VERDICT_FALLBACK], 1);
		return SK_PASS;
	}
	add(&group->verdicts[verdict], 1);
	migrate(ctx, view, group->slots[bounded(position)]);
	return SK_PASS;
}

static __always_inline int steer(struct sk_reuseport_md *ctx)
{
	struct view view = {};
	__u32 zero = 0, count, index, class, verdict;
	__u64 policy, position;
	__s64 score = NO_SCORE;
	bool alive;

	view.group = bpf_map_lookup_elem(MAP(MAP_GROUP), &zero);
	view.slots = all_slots();
	if (!view.group || !view.slots)
		return SK_PASS;
	count = view.group->count;
	policy = view.group->policy;
	view.hang_after = view.group->hang_after_ns ?: NEVER_NS;
	view.now = bpf_ktime_get_coarse_ns();
	/* keyed with a secret of the kernel: as good as chance, and there already */
	view.random = (__u64)ctx->hash * 0x9e3779b97f4a7c15ull;
	view.hash = view.random;
	view.exclude = slot_migrated_from(ctx);

	if (view.exclude == NO_SLOT && count) {
		if (policy == STEER_P2C && count > 2) {
			score = two_choices(&view, count);
		} else if (policy == STEER_CPU) {
			position = bpf_get_smp_processor_id() % count;
			index = view.group->slots[bounded(position)];
			if (index < MAX_SLOTS && fitness(&view, slot_at(view.slots, index)) == FIT)
				score = bounded(position ^ view.random);
		} else if (policy == STEER_HASH) {
			view.hash = client_hash(ctx);
		}
		if (score == NO_SCORE)
			score = best_fit(&view, opaque(&view, policy == STEER_HASH));
		if (score != NO_SCORE)
			return select(ctx, &view, score, VERDICT_FIT);
	}

	score = least_bad(&view, &alive);
	class = score >> CLASS_SHIFT;
	if (class == FIT)
		verdict = VERDICT_FIT;
	else if (class >= DRAINING)
		verdict = VERDICT_FALLBACK;
	else if (class == HUNG && !alive)
		verdict = VERDICT_ALL_HUNG;
	else
		verdict = VERDICT_ALL_FULL;
	if (verdict == VERDICT_ALL_FULL && view.group->when_full == WHEN_FULL_REFUSE && !ctx->migrating_sk) {
		add(&view.group->verdicts[VERDICT_REFUSED], 1);
		return SK_DROP;
	}
	return select(ctx, &view, score, verdict);
}

int tidegate_steer(struct sk_reuseport_md *ctx)
{
	return steer(ctx);
}
