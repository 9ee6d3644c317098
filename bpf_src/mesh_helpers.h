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

/* 0.0.0.0 and ::, which connect() takes for the caller itself (net/ipv4/af_inet.c, net/ipv6/tcp_ipv6.c). */
static __always_inline bool mesh_addr_is_unspecified(const struct mesh_addr *address)
{
	return !address->word[0] && !address->word[1] && !address->word[3] && (!address->word[2] || address->word[2] == bpf_htonl(0xffff));
}

/* 169.254.0.0/16 and fe80::/10. */
static __always_inline bool mesh_addr_is_link_local(const struct mesh_addr *address)
{
	if (mesh_addr_is4(address))
		return (address->word[3] & bpf_htonl(0xffff0000)) == bpf_htonl(0xa9fe0000);
	return (address->word[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

/* Both ends of the connection, local first. Ports in host order: remote_port is a __be32 with the port in its upper half
 * (net/core/filter.c, sock_ops_convert_ctx_access). */
struct mesh_ends {
	struct mesh_addr local;
	struct mesh_addr remote;
	u16 local_port;
	u16 remote_port;
};

static __always_inline void mesh_ends_of(struct bpf_sock_ops *ctx, struct mesh_ends *ends)
{
	if (ctx->family == AF_INET) {
		mesh_addr_from4(&ends->local, ctx->local_ip4);
		mesh_addr_from4(&ends->remote, ctx->remote_ip4);
		mesh_keep_branch();
	} else {
		mesh_addr_from6(&ends->local, ctx->local_ip6);
		mesh_addr_from6(&ends->remote, ctx->remote_ip6);
	}
	ends->local_port = ctx->local_port;
	ends->remote_port = bpf_ntohl(ctx->remote_port);
}

/* What stands for an enrolled namespace in the flows of datagrams: no IPv6 address begins with 32 zero bits and then this word. */
static __always_inline void mesh_addr_from_cookie(struct mesh_addr *address, u64 netns_cookie)
{
	address->word[0] = 0;
	address->word[1] = 0xffffffff;
	address->word[2] = netns_cookie >> 32;
	address->word[3] = netns_cookie;
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

/* The slot that is in force. Read it once per decision, and before any row that has slots: then all of them have what belongs to it. */
static __always_inline u32 mesh_current_epoch(void)
{
	u32 zero = 0, *epoch = mesh_epoch.lookup(&zero);

	return epoch ? *epoch & 1 : 0;
}

/* Whose row this is, in 32 bits: the owner in struct mesh_workload and struct mesh_service. Maps with the same members are used again by later
 * programs: another digest needs another member name. */
static __always_inline u32 mesh_owner(const struct mesh_addr *address)
{
	return address->word[3] ^ address->word[2] * 0x9e3779b1u ^ address->word[1] * 0x85ebca77u ^ address->word[0] * 0xc2b2ae3du;
}

/* What a row says of a workload in one epoch. */
struct mesh_known {
	u64 netns_cookie; /* 0 = not enrolled on this node */
	u32 id;
	u32 flags;
	u32 tunnel;
	u32 identity;
	u32 policy;
};

/* False if the row has become another's while it was read: then it is nobody's, and closed. */
static __always_inline bool mesh_know(const struct mesh_workload *row, u32 owner, u32 epoch, struct mesh_known *known)
{
	u64 identity, policy;

	known->netns_cookie = *(volatile const u64 *)&row->netns_cookie;
	known->id = *(volatile const u32 *)&row->id;
	known->flags = *(volatile const u32 *)&row->flags;
	known->tunnel = *(volatile const u32 *)&row->tunnel;
	identity = *(volatile const u64 *)&row->identity[epoch];
	policy = *(volatile const u64 *)&row->policy[epoch];
	known->identity = identity;
	known->policy = policy;
	if (identity >> 32 == owner && policy >> 32 == owner)
		return true;
	known->identity = MESH_IDENTITY_NOBODY;
	known->policy = MESH_POLICY_CLOSED;
	return false;
}

/* Who is in a namespace; false, and all zero, if it is not enrolled. */
static __always_inline bool mesh_know_namespace(u64 netns_cookie, u32 epoch, struct mesh_known *known)
{
	struct mesh_workload *row = mesh_workload.lookup(&netns_cookie);

	if (row && mesh_know(row, netns_cookie, epoch, known))
		return true;
	if (row)
		row = mesh_workload.lookup(&netns_cookie);
	if (row)
		mesh_know(row, netns_cookie, epoch, known);
	else
		__builtin_memset(known, 0, sizeof(*known));
	return row != NULL;
}

/* Who has an address; false, and all zero, if it is no workload's. */
static __always_inline bool mesh_know_address(const struct mesh_addr *address, u32 epoch, struct mesh_known *known)
{
	struct mesh_addr key = *address;
	struct mesh_workload *row = mesh_address.lookup(&key);

	if (row && mesh_know(row, mesh_owner(&key), epoch, known))
		return true;
	if (row)
		row = mesh_address.lookup(&key);
	if (row)
		mesh_know(row, mesh_owner(&key), epoch, known);
	else
		__builtin_memset(known, 0, sizeof(*known));
	return row != NULL;
}

/* Whose row of mesh_mtls it is: what mesh_owner is for the other tables. */
static __always_inline u32 mesh_mtls_owner(const struct mesh_mtls_key *key)
{
	return key->workload ^ key->port * 0x27d4eb2fu;
}

/* MESH_WORKLOAD_MTLS of a port. A row that has become another's twice while it was read counts as both: closed. */
static __always_inline u32 mesh_mtls_of(const struct mesh_known *known, u16 port)
{
	struct mesh_mtls_key key = { .workload = known->id, .port = port };
	u64 *row, word;

	if (!(known->flags & MESH_WORKLOAD_MTLS_PORTS))
		return known->flags & MESH_WORKLOAD_MTLS;
	row = mesh_mtls.lookup(&key);
	if (!row)
		return known->flags & MESH_WORKLOAD_MTLS;
	word = *(volatile u64 *)row;
	if (word >> 32 != mesh_mtls_owner(&key)) {
		row = mesh_mtls.lookup(&key);
		if (!row)
			return known->flags & MESH_WORKLOAD_MTLS;
		word = *(volatile u64 *)row;
		if (word >> 32 != mesh_mtls_owner(&key))
			return MESH_WORKLOAD_MTLS;
	}
	return word & MESH_WORKLOAD_MTLS;
}

/* Does the kubelet call this port, by what the workload's pod declares? */
static __always_inline bool mesh_probed(const struct mesh_known *known, u16 port)
{
	struct mesh_mtls_key key = { .workload = known->id, .port = port };
	u64 *row, word;

	if (!(known->flags & MESH_WORKLOAD_PROBED) || known->policy == MESH_POLICY_CLOSED)
		return false;
	row = mesh_mtls.lookup(&key);
	if (!row)
		return false;
	word = *(volatile u64 *)row;
	return word >> 32 == mesh_mtls_owner(&key) && word & MESH_WORKLOAD_PROBED; /* that of another port by now: refused, and tried again soon */
}

/* The identity of somebody who is known by an address only. */
static __always_inline u32 mesh_stranger(const struct mesh_addr *address, u32 epoch)
{
	struct mesh_block_key key = { .prefix_length = 128, .address = *address };
	struct mesh_block *block = mesh_block.lookup(&key);

	return block ? block->identity[epoch] : MESH_IDENTITY_UNKNOWN;
}

struct mesh_decision {
	u32 rule;
	u32 audit; /* rule that would deny if it were enforced; 0 = none */
	u8 verdict; /* enum mesh_verdict */
	u8 reason;  /* enum mesh_reason */
};

/* The verdict of policy set `policy` for a caller and a target port. A protected destination without a row is closed. */
static __always_inline struct mesh_decision mesh_decide(u32 policy, u32 identity, u16 port, u8 protocol)
{
	struct mesh_decision decision = { .verdict = MESH_VERDICT_NONE };
	struct mesh_policy_key key = { .identity = identity, .port = port, .protocol = protocol };
	struct mesh_policy *row;

	if (!policy)
		return decision;
	if (identity == MESH_IDENTITY_NOBODY)
		policy = MESH_POLICY_CLOSED;
	key.policy = policy;
	row = NULL;
	if (identity != MESH_IDENTITY_UNKNOWN) { /* strangers have no rows of their own */
		row = mesh_policy.lookup(&key);
		if (!row) {
			key.port = 0;
			row = mesh_policy.lookup(&key);
		}
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
	decision.audit = row->audit;
	decision.reason = MESH_REASON_POLICY;
	return decision;
}

/* Whom a decision is about, for counters and events. */
struct mesh_parties {
	u32 source;
	u32 target;
	u32 service;
	u16 port; /* host order, as dialled (outbound) or listened on (inbound) */
	u8 direction;
	u8 protocol;
};

static __always_inline void mesh_count_decision(const struct mesh_parties *who, u32 rule, u8 verdict, u8 reason)
{
	struct mesh_verdict_key key = {
		.source = who->source, .target = who->target, .service = who->service, .rule = rule,
		.verdict = verdict, .direction = who->direction, .reason = reason, .protocol = who->protocol,
	};
	u64 *counter = mesh_verdicts.lookup(&key), one = 1;

	if (!counter) {
		if (!mesh_verdicts.insert(&key, &one))
			return;
		counter = mesh_verdicts.lookup(&key); /* unless another processor was first, it is full */
	}
	if (counter)
		mesh_add(*counter, 1);
	else
		mesh_count(MESH_COUNT_VERDICT_FOLDED);
}

static __always_inline void mesh_count_verdict(const struct mesh_parties *who, const struct mesh_decision *decision)
{
	if (decision->verdict != MESH_VERDICT_NONE)
		mesh_count_decision(who, decision->rule, decision->verdict, decision->reason);
	if (decision->audit)
		mesh_count_decision(who, decision->audit, decision->verdict, MESH_REASON_AUDIT);
}

/* The counters of a pair. When the map is full, those of the all-zero key, which the agent makes first. */
static __always_inline struct mesh_stats *mesh_stats_for(const struct mesh_parties *who)
{
	u32 zero = 0;
	struct mesh_stats_key key = {
		.source = who->source, .target = who->target, .service = who->service,
		.port = who->port, .direction = who->direction, .protocol = who->protocol,
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

static __always_inline void mesh_parties_of(const struct mesh_sock *sock, struct mesh_parties *who)
{
	who->source = sock->source;
	who->target = sock->target;
	who->service = sock->service;
	who->port = sock->dialled_port;
	who->direction = sock->direction;
	who->protocol = sock->protocol;
}

static __always_inline struct mesh_stats *mesh_stats_of(const struct mesh_sock *sock)
{
	struct mesh_parties who;

	mesh_parties_of(sock, &who);
	if (sock->redirected == MESH_REDIRECT_TUNNEL)
		who.direction |= MESH_STATS_TUNNELLED;
	return mesh_stats_for(&who);
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
	event->dialled_address = sock->dialled;
	event->dialled_port = sock->dialled_port;
	event->protocol = sock->protocol;
	event->duration_ns = event->time_ns - sock->start_ns;
	return event;
}

static __always_inline void mesh_event_send(struct mesh_event *event)
{
	mesh_events.ringbuf_submit(event, 0);
}

/* True while this CPU has used less than `most` of a budget in this second; otherwise that is counted. */
static __always_inline bool mesh_within_budget(u32 slot, u64 most, u32 counter)
{
	struct mesh_budget *budget = mesh_budget.lookup(&slot);
	u64 now = bpf_ktime_get_ns();

	if (!budget)
		return false;
	if (now - budget->window_ns > 1000000000ull) {
		budget->window_ns = now;
		budget->used = 0;
	}
	if (budget->used >= most) {
		mesh_count(counter);
		return false;
	}
	budget->used += 1;
	return true;
}

/* May a denial be reported? Traced pairs are always reported. */
static __always_inline bool mesh_may_report(void)
{
	return mesh_within_budget(MESH_BUDGET_DENIALS, MESH_DENIALS_PER_SECOND, MESH_COUNT_EVENT_SUPPRESSED);
}

/* Does somebody want to know that this connection has ended? */
static __always_inline bool mesh_end_wanted(const struct mesh_sock *sock)
{
	return sock->traced || (sock->logged && mesh_within_budget(MESH_BUDGET_LOGGED, MESH_LOGGED_PER_SECOND, MESH_COUNT_EVENT_UNLOGGED));
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
