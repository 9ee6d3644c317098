/* sk_lookup, linked to each enrolled namespace: what may reach a pod. Runs for the first packet of a connection, before a listening socket
 * is chosen; holds for callers outside the mesh and for pod addresses dialled directly. A dropped SYN is answered with a reset. */

static __always_inline void mesh_report_inbound(struct mesh_flow_key *ends, struct mesh_parties *who, u8 kind, const struct mesh_decision *decision)
{
	struct mesh_event *event = mesh_event_new(kind);

	if (!event)
		return;
	event->source = who->source;
	event->target = who->target;
	event->service = who->service;
	event->protocol = who->protocol;
	event->direction = MESH_INBOUND;
	event->rule = kind == MESH_EVENT_AUDITED ? decision->audit : decision->rule;
	event->reason = kind == MESH_EVENT_AUDITED ? MESH_REASON_AUDIT : decision->reason;
	event->verdict = decision->verdict;
	event->local_address = ends->destination;
	event->local_port = ends->destination_port;
	event->dialled_address = ends->destination;
	event->dialled_port = ends->destination_port;
	event->remote_address = ends->source;
	event->remote_port = ends->source_port;
	mesh_event_send(event);
}

/* Counts a decision at the receiver, and reports one that denies or would deny. */
static __always_inline void mesh_account_inbound(struct mesh_flow_key *ends, struct mesh_parties *who, const struct mesh_decision *decision, bool traced)
{
	mesh_count_verdict(who, decision);
	if (decision->verdict == MESH_VERDICT_DENY && (traced || mesh_may_report()))
		mesh_report_inbound(ends, who, MESH_EVENT_DENIED, decision);
	if (decision->audit && (traced || mesh_may_report()))
		mesh_report_inbound(ends, who, MESH_EVENT_AUDITED, decision);
}

static __always_inline int mesh_refuse_inbound(struct mesh_flow_key *ends, struct mesh_parties *who, u8 reason)
{
	struct mesh_decision decision = { .verdict = MESH_VERDICT_DENY, .reason = reason };

	mesh_account_inbound(ends, who, &decision, false);
	return SK_DROP;
}

/* Hands the connection to the listener that the waypoint has on `port` of this namespace. */
static __always_inline int mesh_steer(struct bpf_sk_lookup *ctx, u64 netns_cookie, bool ipv4, u16 port)
{
	struct mesh_listener_key key = { .netns_cookie = netns_cookie, .ipv4 = ipv4, .port = port };
	struct bpf_sock *listener = mesh_listener.lookup(&key);
	int error;

	if (!listener)
		return -1;
	error = bpf_sk_assign(ctx, listener, 0);
	bpf_sk_release(listener);
	return error;
}

/* Does a datagram answer one that this namespace sent? */
static __always_inline bool mesh_was_asked(struct mesh_flow_key *ends, const struct mesh_known *self, const struct mesh_known *peer)
{
	struct mesh_flow_key key = {
		.source_port = ends->destination_port, .destination_port = ends->source_port, .protocol = IPPROTO_UDP,
	};

	mesh_addr_from_cookie(&key.source, self->netns_cookie);
	mesh_end_of(&ends->source, peer, &key.destination);
	return mesh_flow.lookup(&key) != NULL;
}

/* The flow that a datagram belongs to. */
static __always_inline struct mesh_flow *mesh_flow_of_datagram(struct mesh_flow_key *ends, const struct mesh_known *self, const struct mesh_known *peer)
{
	struct mesh_flow_key key = {
		.source_port = ends->source_port, .destination_port = ends->destination_port, .protocol = IPPROTO_UDP,
	};

	mesh_end_of(&ends->source, peer, &key.source);
	mesh_addr_from_cookie(&key.destination, self->netns_cookie);
	return mesh_flow.lookup(&key);
}

/* Remembers a caller outside this node, so that it gets its answer. */
static __always_inline void mesh_flow_from_outside(struct mesh_flow_key *ends, const struct mesh_known *self, u32 source)
{
	struct mesh_flow_key key = {
		.source = ends->source, .source_port = ends->source_port, .destination_port = ends->destination_port, .protocol = IPPROTO_UDP,
	};
	struct mesh_flow flow = { .workload = source, .flags = MESH_FLOW_ARRIVED };

	mesh_addr_from_cookie(&key.destination, self->netns_cookie);
	if (mesh_flow.update(&key, &flow))
		mesh_count(MESH_COUNT_FLOW_FAILED);
}

int mesh_sk_lookup(struct bpf_sk_lookup *ctx)
{
	struct mesh_decision decision = {};
	struct mesh_flow_key ends = {};
	struct mesh_parties who = { .direction = MESH_INBOUND };
	struct mesh_known self, peer, caller;
	struct mesh_flow *flow, seen = {};
	u32 epoch = mesh_current_epoch(), identity = MESH_IDENTITY_UNKNOWN;
	bool traced = false, from_waypoint = false, begins = true, within, strict;

	if (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP)
		return SK_PASS;
	if (ctx->family == AF_INET) {
		mesh_addr_from4(&ends.source, ctx->remote_ip4);
		mesh_addr_from4(&ends.destination, ctx->local_ip4);
		mesh_keep_branch();
	} else {
		mesh_addr_from6(&ends.source, ctx->remote_ip6);
		mesh_addr_from6(&ends.destination, ctx->local_ip6);
	}
	ends.source_port = bpf_ntohs((__be16)ctx->remote_port);
	ends.destination_port = ctx->local_port;
	ends.protocol = ctx->protocol;
	who.protocol = ends.protocol;
	who.port = ends.destination_port;

	within = mesh_addr_is_loopback(&ends.source);
	if (!within && mesh_addr_is_loopback(&ends.destination)) /* a socket that is bound to an address of the pod */
		within = mesh_know_address(&ends.source, epoch, &peer) && peer.netns_cookie;
	if (ends.protocol == IPPROTO_TCP &&
	    (ends.destination_port == MESH_INBOUND_PORT ||
	     ((ends.destination_port == MESH_OUTBOUND_PORT || ends.destination_port == MESH_TUNNEL_PORT || ends.destination_port == MESH_EGRESS_PORT) && !within)))
		return mesh_refuse_inbound(&ends, &who, MESH_REASON_WAYPOINT_PORT);
	if (within || mesh_addr_equal(&ends.source, &ends.destination))
		return SK_PASS; /* within the pod: the application's own, or the waypoint's last step */

	if (!mesh_know_address(&ends.destination, epoch, &self) || !self.netns_cookie) /* bpf_get_netns_cookie does not exist here */
		return mesh_refuse_inbound(&ends, &who, MESH_REASON_UNKNOWN_ADDRESS);
	who.target = self.id;
	mesh_know_address(&ends.source, epoch, &peer);
	if (ends.protocol == IPPROTO_TCP && ends.destination_port == MESH_HBONE_PORT) {
		who.source = peer.id;
		if (self.policy == MESH_POLICY_CLOSED) /* then the cookie may be another's */
			return mesh_refuse_inbound(&ends, &who, MESH_REASON_NO_ENTRY);
		if (mesh_steer(ctx, self.netns_cookie, ctx->family == AF_INET, MESH_HBONE_PORT))
			return mesh_refuse_inbound(&ends, &who, MESH_REASON_NO_LISTENER);
		return SK_PASS; /* the certificate says who calls, and the waypoint who may */
	}
	strict = mesh_mtls_of(&self, ends.destination_port) & MESH_WORKLOAD_STRICT;
	if (ends.protocol == IPPROTO_UDP) {
		if (mesh_was_asked(&ends, &self, &peer))
			return SK_PASS; /* an answer */
		flow = mesh_flow_of_datagram(&ends, &self, &peer);
	} else {
		flow = mesh_flow.lookup(&ends);
	}
	if (flow)
		seen = *flow; /* once: its memory may be another flow's a moment later */
	if (seen.flags & MESH_FLOW_PROBE && mesh_probed(&self, ends.destination_port)) {
		decision.verdict = MESH_VERDICT_ALLOW;
		decision.reason = MESH_REASON_PROBE;
		who.source = seen.workload;
		mesh_count_verdict(&who, &decision);
		return SK_PASS; /* to the application, whoever reads the requests of others */
	}
	if (seen.netns_cookie) {
		who.source = seen.workload;
		who.service = seen.service;
		traced = seen.flags & MESH_FLOW_TRACED;
		from_waypoint = seen.flags & MESH_FLOW_WAYPOINT;
		if (mesh_know_namespace(seen.netns_cookie, epoch, &caller))
			identity = caller.identity;
	} else if (peer.netns_cookie) {
		who.source = peer.id;
		return self.policy || strict ? mesh_refuse_inbound(&ends, &who, MESH_REASON_SPOOFED) : SK_PASS;
	} else if (strict) {
		who.source = peer.id;
		return mesh_refuse_inbound(&ends, &who, MESH_REASON_PLAINTEXT);
	} else if (peer.id) {
		who.source = peer.id;
		identity = peer.identity; /* on another node: its address is all there is without mTLS */
	} else {
		identity = mesh_stranger(&ends.source, epoch);
	}
	if (ends.protocol == IPPROTO_UDP && flow) {
		begins = !(seen.flags & MESH_FLOW_ARRIVED);
		flow->flags |= MESH_FLOW_ARRIVED;
	}
	decision = mesh_decide(self.policy, identity, ends.destination_port, ends.protocol);
	if (decision.verdict == MESH_VERDICT_WAYPOINT && (!from_waypoint || self.flags & MESH_WORKLOAD_ENFORCE_INBOUND)) {
		if (ends.protocol == IPPROTO_UDP || mesh_steer(ctx, self.netns_cookie, ctx->family == AF_INET, MESH_INBOUND_PORT)) {
			decision.verdict = MESH_VERDICT_DENY;
			decision.reason = MESH_REASON_NO_LISTENER;
		}
	}
	if (decision.verdict == MESH_VERDICT_DENY || (begins && (decision.verdict != MESH_VERDICT_NONE || decision.audit)))
		mesh_account_inbound(&ends, &who, &decision, traced);
	if (decision.verdict == MESH_VERDICT_DENY)
		return SK_DROP;
	if (ends.protocol == IPPROTO_UDP && begins) {
		if (!flow)
			mesh_flow_from_outside(&ends, &self, who.source);
		mesh_flow_count(&who);
	}
	return SK_PASS;
}
