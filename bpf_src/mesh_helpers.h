/* What more than one hook needs: addresses, policy, counting, events. Helpers return values; only the hooks turn them into kernel verdicts. */
#pragma once

/* Stands at the end of one branch of two that load different context fields. Without it clang merges both loads into one through a computed
 * pointer, which the verifier refuses ("dereference of modified ctx ptr"). */
#define mesh_keep_branch() asm volatile("" ::: "memory")

/* Copies an IPv6 address out of a context, word by word: the verifier refuses the 8-byte loads that clang would make of plain assignments. */
#define mesh_addr_from6(_address, _words) \
	do { \
		volatile u32 *words = (volatile u32 *)(_words); \
		(_address)->word[0] = words[0]; \
		(_address)->word[1] = words[1]; \
		(_address)->word[2] = words[2]; \
		(_address)->word[3] = words[3]; \
	} while (0)

/* Atomic even on per-CPU values: a program in process context may be interrupted by one in a softirq on the same CPU. */
#define mesh_add(_target, _amount) ((void)__sync_fetch_and_add(&(_target), (_amount)))

static __always_inline void mesh_count(u32 what)
{
	u64 *counter = mesh_counter.lookup(&what);

	if (counter)
		mesh_add(*counter, 1);
}

static __always_inline void mesh_addr_from4(struct mesh_addr *address, __be32 ip)
{
	address->word[0] = 0;
	address->word[1] = 0;
	address->word[2] = bpf_htonl(0xffff);
	address->word[3] = ip;
}

static __always_inline bool mesh_addr_is4(const struct mesh_addr *address)
{
	return !address->word[0] && !address->word[1] && address->word[2] == bpf_htonl(0xffff);
}

static __always_inline bool mesh_addr_equal(const struct mesh_addr *a, const struct mesh_addr *b)
{
	return a->word[0] == b->word[0] && a->word[1] == b->word[1] && a->word[2] == b->word[2] && a->word[3] == b->word[3];
}

/* 127.0.0.0/8 and ::1. */
static __always_inline bool mesh_addr_is_loopback(const struct mesh_addr *address)
{
	if (mesh_addr_is4(address))
		return (address->word[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return !address->word[0] && !address->word[1] && !address->word[2] && address->word[3] == bpf_htonl(1);
}

/* Loopback address of the same family as `address`. */
static __always_inline void mesh_addr_to_loopback(struct mesh_addr *address)
{
	if (mesh_addr_is4(address)) {
		address->word[3] = bpf_htonl(0x7f000001);
	} else {
		address->word[0] = 0;
		address->word[1] = 0;
		address->word[2] = 0;
		address->word[3] = bpf_htonl(1);
	}
}

struct mesh_decision {
	u32 rule;
	u8 verdict; /* enum mesh_verdict */
	u8 reason;  /* enum mesh_reason */
};

/* The verdict of policy set `policy` for a caller and a target port. A protected destination without a row is closed. */
static __always_inline struct mesh_decision mesh_decide(u32 policy, u32 identity, u16 port)
{
	struct mesh_decision decision = { .verdict = MESH_VERDICT_NONE };
	struct mesh_policy_key key = { .policy = policy, .identity = identity, .port = port };
	struct mesh_policy *row;

	if (!policy)
		return decision;
	row = mesh_policy.lookup(&key);
	if (!row) {
		key.port = 0;
		row = mesh_policy.lookup(&key);
	}
	if (!row) {
		key.identity = MESH_IDENTITY_ANY;
		key.port = port;
		row = mesh_policy.lookup(&key);
	}
	if (!row) {
		key.port = 0;
		row = mesh_policy.lookup(&key);
	}
	if (!row) {
		decision.verdict = MESH_VERDICT_DENY;
		decision.reason = MESH_REASON_NO_ENTRY;
		return decision;
	}
	decision.verdict = row->verdict;
	decision.rule = row->rule;
	decision.reason = MESH_REASON_POLICY;
	return decision;
}

static __always_inline void mesh_count_verdict(u32 source, u32 target, u32 service, struct mesh_decision decision, u8 direction)
{
	struct mesh_verdict_key key = {
		.source = source, .target = target, .service = service, .rule = decision.rule,
		.verdict = decision.verdict, .direction = direction, .reason = decision.reason,
	};
	u64 *counter = mesh_verdicts.lookup(&key), one = 1;

	if (counter)
		mesh_add(*counter, 1);
	else if (mesh_verdicts.insert(&key, &one))
		mesh_count(MESH_COUNT_VERDICT_FOLDED);
}

/* The counters of a connection's pair. When the map is full, those of the all-zero key, which the agent makes first. */
static __always_inline struct mesh_stats *mesh_stats_of(struct mesh_sock *sock)
{
	u32 zero = 0;
	struct mesh_stats_key key = {
		.source = sock->source, .target = sock->target, .service = sock->service,
		.port = sock->destination_port, .direction = sock->direction,
	};
	struct mesh_stats *stats = mesh_stats.lookup(&key);
	struct mesh_stats *blank;

	if (stats)
		return stats;
	blank = mesh_blank.lookup(&zero); /* too large for the 512 bytes of stack */
	if (blank)
		mesh_stats.insert(&key, blank);
	stats = mesh_stats.lookup(&key);
	if (stats)
		return stats;
	mesh_count(MESH_COUNT_STATS_FOLDED);
	__builtin_memset(&key, 0, sizeof(key));
	return mesh_stats.lookup(&key);
}

/* Slot of a duration: the number of doublings above 2^MESH_BUCKET_SHIFT ns. */
static __always_inline u32 mesh_bucket(u64 ns)
{
	u64 rest = ns >> MESH_BUCKET_SHIFT;
	u32 slot = 0;

	if (rest >= 1 << 8) {
		slot += 8;
		rest >>= 8;
	}
	if (rest >= 1 << 4) {
		slot += 4;
		rest >>= 4;
	}
	if (rest >= 1 << 2) {
		slot += 2;
		rest >>= 2;
	}
	if (rest >= 1 << 1) {
		slot += 1;
		rest >>= 1;
	}
	slot += rest ? 1 : 0;
	return slot < MESH_BUCKETS ? slot : MESH_BUCKETS - 1;
}

/* An empty event in the ring buffer, or NULL if that is full. Must be sent. */
static __always_inline struct mesh_event *mesh_event_new(u8 kind)
{
	struct mesh_event *event = mesh_events.ringbuf_reserve(sizeof(struct mesh_event));

	if (!event) {
		mesh_count(MESH_COUNT_EVENT_DROPPED);
		return NULL;
	}
	__builtin_memset(event, 0, sizeof(*event));
	event->time_ns = bpf_ktime_get_ns();
	event->kind = kind;
	return event;
}

/* An event about a connection, with what its record knows. */
static __always_inline struct mesh_event *mesh_event_about(u8 kind, const struct mesh_sock *sock)
{
	struct mesh_event *event = mesh_event_new(kind);

	if (!event)
		return NULL;
	event->source = sock->source;
	event->target = sock->target;
	event->service = sock->service;
	event->rule = sock->rule;
	event->verdict = sock->verdict;
	event->direction = sock->direction;
	event->redirected = sock->redirected;
	event->dialled_address = sock->destination;
	event->dialled_port = sock->destination_port;
	event->duration_ns = event->time_ns - sock->start_ns;
	return event;
}

static __always_inline void mesh_event_send(struct mesh_event *event)
{
	mesh_events.ringbuf_submit(event, 0);
}

/* True while this CPU may still report a denial in this second. Traced pairs are always reported. */
static __always_inline bool mesh_may_report(void)
{
	u32 zero = 0;
	struct mesh_budget *budget = mesh_budget.lookup(&zero);
	u64 now = bpf_ktime_get_ns();

	if (!budget)
		return false;
	if (now - budget->window_ns > 1000000000ull) {
		budget->window_ns = now;
		budget->used = 0;
	}
	if (budget->used >= MESH_DENIALS_PER_SECOND) {
		mesh_count(MESH_COUNT_EVENT_SUPPRESSED);
		return false;
	}
	budget->used += 1;
	return true;
}

/* Does somebody trace this pair? */
static __always_inline bool mesh_traced(struct mesh_config *config, u32 source, u32 target, u32 service)
{
	struct mesh_trace_key key = { .source = source };

	if (!config || !config->tracing)
		return false;
	if (service) {
		key.service = service;
		return mesh_trace.lookup(&key) != NULL;
	}
	key.target = target;
	return mesh_trace.lookup(&key) != NULL;
}
