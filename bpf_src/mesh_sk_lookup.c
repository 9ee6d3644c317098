/* sk_lookup, linked to each enrolled namespace: what may reach a pod. Runs for the first packet of a connection, before a listening socket
 * is chosen; holds for callers outside the mesh and for pod addresses dialled directly. A dropped SYN is answered with a reset. */

static __always_inline void mesh_report_inbound(struct mesh_flow_key *ends, u32 source, u32 target, u32 service,
						struct mesh_decision decision, bool traced)
{
	struct mesh_event *event;

	mesh_count_verdict(source, target, service, decision, MESH_INBOUND);
	if (decision.verdict != MESH_VERDICT_DENY || (!traced && !mesh_may_report()))
		return;
	event = mesh_event_new(MESH_EVENT_DENIED);
	if (!event)
		return;
	event->source = source;
	event->target = target;
	event->service = service;
	event->rule = decision.rule;
	event->verdict = decision.verdict;
	event->reason = decision.reason;
	event->direction = MESH_INBOUND;
	event->local_address = ends->destination;
	event->local_port = ends->destination_port;
	event->dialled_address = ends->destination;
	event->dialled_port = ends->destination_port;
	event->remote_address = ends->source;
	event->remote_port = ends->source_port;
	mesh_event_send(event);
}

/* Hands the connection to the waypoint's inbound listener of this namespace. */
static __always_inline int mesh_steer(struct bpf_sk_lookup *ctx, u64 netns_cookie, bool ipv4)
{
	struct mesh_listener_key key = { .netns_cookie = netns_cookie, .ipv4 = ipv4 };
	struct bpf_sock *listener = mesh_listener.lookup(&key);
	int error;

	if (!listener)
		return -1;
	error = bpf_sk_assign(ctx, listener, 0);
	bpf_sk_release(listener);
	return error;
}

int mesh_sk_lookup(struct bpf_sk_lookup *ctx)
{
	struct mesh_decision decision = {};
	struct mesh_flow_key ends = {};
	struct mesh_workload *self, *peer;
	struct mesh_flow *flow;
	u32 source = 0, identity = MESH_IDENTITY_UNKNOWN, service = 0;
	bool traced = false, from_waypoint = false;

	if (ctx->protocol != IPPROTO_TCP)
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

	if (ends.destination_port == MESH_INBOUND_PORT ||
	    (ends.destination_port == MESH_OUTBOUND_PORT && !mesh_addr_is_loopback(&ends.source))) {
		decision.verdict = MESH_VERDICT_DENY;
		decision.reason = MESH_REASON_WAYPOINT_PORT;
		mesh_report_inbound(&ends, 0, 0, 0, decision, false);
		return SK_DROP;
	}
	if (mesh_addr_is_loopback(&ends.source) || mesh_addr_equal(&ends.source, &ends.destination))
		return SK_PASS; /* within the pod: the application's own, or the waypoint's last step */

	self = mesh_address.lookup(&ends.destination); /* bpf_get_netns_cookie does not exist here */
	if (!self || !self->netns_cookie) {
		decision.verdict = MESH_VERDICT_DENY;
		decision.reason = MESH_REASON_UNKNOWN_ADDRESS;
		mesh_report_inbound(&ends, 0, 0, 0, decision, false);
		return SK_DROP;
	}
	flow = mesh_flow.lookup(&ends);
	if (flow) {
		source = flow->workload;
		identity = flow->identity;
		service = flow->service;
		traced = flow->flags & MESH_FLOW_TRACED;
		from_waypoint = flow->flags & MESH_FLOW_WAYPOINT;
	} else {
		peer = mesh_address.lookup(&ends.source);
		if (peer) {
			source = peer->id;
			if (peer->netns_cookie) {
				if (!self->policy)
					return SK_PASS;
				decision.verdict = MESH_VERDICT_DENY;
				decision.reason = MESH_REASON_SPOOFED;
				mesh_report_inbound(&ends, source, self->id, 0, decision, false);
				return SK_DROP;
			}
			identity = peer->identity; /* on another node: its address is all there is without mTLS */
		}
	}
	decision = mesh_decide(self->policy, identity, ends.destination_port);
	if (decision.verdict == MESH_VERDICT_NONE)
		return SK_PASS;
	if (decision.verdict == MESH_VERDICT_WAYPOINT && (!from_waypoint || self->flags & MESH_WORKLOAD_ENFORCE_INBOUND)) {
		if (mesh_steer(ctx, self->netns_cookie, ctx->family == AF_INET)) {
			decision.verdict = MESH_VERDICT_DENY;
			decision.reason = MESH_REASON_NO_LISTENER;
		}
	}
	mesh_report_inbound(&ends, source, self->id, service, decision, traced);
	return decision.verdict == MESH_VERDICT_DENY ? SK_DROP : SK_PASS;
}
