/* cgroup/connect4 and connect6: where a connection goes. Runs in the caller's context, once per connection, before anything is sent.
 * Order: who calls, which service, which backend, which policy. Processes that are not enrolled leave after one lookup. */

/* What a hook does with the call. */
enum mesh_outcome {
	MESH_PASS = 0,    /* as dialled */
	MESH_REWRITE = 1, /* to `destination` and `port` */
	MESH_FORBID = 2,  /* EPERM: a rule says no */
	MESH_REFUSE = 3,  /* ECONNREFUSED: nobody could answer */
};

/* Adds who called: connect() runs in the caller's context. */
static __always_inline void mesh_event_send_from_caller(struct mesh_event *event)
{
	event->pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(event->comm, sizeof(event->comm));
	mesh_event_send(event);
}

static __always_inline void mesh_report_refusal(struct mesh_sock *sock, struct mesh_decision decision)
{
	struct mesh_event *event;

	if (!sock->traced && !mesh_may_report())
		return;
	event = mesh_event_about(MESH_EVENT_DENIED, sock);
	if (!event)
		return;
	event->rule = decision.rule;
	event->verdict = decision.verdict;
	event->reason = decision.reason;
	mesh_event_send_from_caller(event);
}

static __always_inline void mesh_report_connect(struct mesh_sock *sock, struct mesh_addr *remote, u16 port, u64 cookie)
{
	struct mesh_event *event = mesh_event_about(MESH_EVENT_CONNECT, sock);

	if (!event)
		return;
	event->socket_cookie = cookie;
	event->remote_address = *remote;
	event->remote_port = port;
	mesh_event_send_from_caller(event);
}

/* Decides for the call described by `destination` and `port`, and may change both. */
static __always_inline int mesh_connect(struct bpf_sock_addr *ctx, struct mesh_addr *destination, u16 *port)
{
	u64 netns_cookie = bpf_get_netns_cookie(ctx);
	struct mesh_workload *self = mesh_workload.lookup(&netns_cookie);
	struct mesh_decision decision = {};
	struct mesh_service_key service_key = {};
	struct mesh_backend_key backend_key = {};
	struct mesh_workload *target;
	struct mesh_service *service;
	struct mesh_backend *backend;
	struct mesh_config *config;
	struct bpf_sock *sk = ctx->sk;
	struct mesh_sock sock = {}, *record;
	bool waypoint = false;
	u32 zero = 0;

	if (!self || mesh_addr_is_loopback(destination))
		return MESH_PASS;
	sock.start_ns = bpf_ktime_get_ns();
	sock.source = self->id;
	sock.identity = self->identity;
	sock.destination = *destination;
	sock.destination_port = *port;
	sock.direction = MESH_OUTBOUND;
	config = mesh_config.lookup(&zero);

	if (config && config->waypoint_cgroup && bpf_get_current_cgroup_id() == config->waypoint_cgroup) {
		sock.direction = MESH_FROM_WAYPOINT; /* already decided: by the waypoint's RBAC here, by mesh_sk_lookup there */
	} else {
		service_key.address = *destination;
		service_key.port = *port;
		service_key.protocol = IPPROTO_TCP;
		service = mesh_service.lookup(&service_key);
		if (service) {
			sock.service = service->id;
			sock.traced = mesh_traced(config, sock.source, 0, sock.service);
			if (service->flags & MESH_SERVICE_WAYPOINT) {
				waypoint = true;
			} else {
				backend_key.list = service->list;
				backend_key.slot = service->count ? bpf_get_prandom_u32() % service->count : 0;
				backend = service->count ? mesh_backend.lookup(&backend_key) : NULL;
				if (!backend) {
					decision.reason = MESH_REASON_NO_BACKEND;
					decision.verdict = MESH_VERDICT_DENY;
					mesh_count_verdict(sock.source, 0, sock.service, decision, MESH_OUTBOUND);
					mesh_report_refusal(&sock, decision);
					return MESH_REFUSE;
				}
				*destination = backend->address;
				*port = backend->port;
			}
		}
	}

	if (!waypoint) {
		target = mesh_address.lookup(destination);
		if (target) {
			sock.target = target->id;
			if (!sock.service)
				sock.traced = mesh_traced(config, sock.source, sock.target, 0);
			if (sock.direction == MESH_OUTBOUND && target->netns_cookie != netns_cookie) { /* a pod may reach itself */
				decision = mesh_decide(target->policy, sock.identity, *port);
				sock.rule = decision.rule;
				sock.verdict = decision.verdict;
				if (decision.verdict != MESH_VERDICT_NONE)
					mesh_count_verdict(sock.source, sock.target, sock.service, decision, MESH_OUTBOUND);
				if (decision.verdict == MESH_VERDICT_DENY) {
					mesh_report_refusal(&sock, decision);
					return MESH_FORBID;
				}
				waypoint = decision.verdict == MESH_VERDICT_WAYPOINT;
			}
		}
	}
	if (waypoint) {
		/* The waypoint learns the address that was dialled, or the backend if only the backend's policy asks for it. */
		sock.destination = *destination;
		sock.destination_port = *port;
		sock.redirected = 1;
		mesh_addr_to_loopback(destination);
		*port = MESH_OUTBOUND_PORT;
	}
	record = sk ? mesh_sock.sk_storage_get(sk, &sock, BPF_SK_STORAGE_GET_F_CREATE) : NULL;
	if (!record) {
		/* Without its record the connection would reach the waypoint nameless, or the receiver as a stranger: refuse it here. */
		mesh_count(MESH_COUNT_STORAGE_FAILED);
		return MESH_REFUSE;
	}
	*record = sock; /* a socket may be connected again after it failed: what it dialled before must not stay */
	if (sock.traced)
		mesh_report_connect(&sock, destination, *port, bpf_get_socket_cookie(ctx));
	return sock.redirected || sock.service ? MESH_REWRITE : MESH_PASS;
}

/* 1 lets the call go on, 0 makes it fail: with EPERM unless another errno is set (kernel/bpf/cgroup.c, bpf_prog_run_array_cg). */
static __always_inline int mesh_refused(int outcome)
{
#ifdef MESH_HAVE_SET_RETVAL
	if (outcome == MESH_REFUSE)
		bpf_set_retval(-111); /* ECONNREFUSED; since Linux 5.18 */
#endif
	return 0;
}

/* TCP only: the receiver's checks and the counters rest on TCP's handshake. Other protocols are left as they are. */
static __always_inline bool mesh_is_tcp(struct bpf_sock_addr *ctx)
{
	return ctx->type == SOCK_STREAM && ctx->protocol == IPPROTO_TCP;
}

int mesh_connect4(struct bpf_sock_addr *ctx)
{
	struct mesh_addr destination;
	u16 port = bpf_ntohs((__be16)ctx->user_port);
	int outcome;

	if (!mesh_is_tcp(ctx))
		return 1;
	mesh_addr_from4(&destination, ctx->user_ip4);
	outcome = mesh_connect(ctx, &destination, &port);
	if (outcome >= MESH_FORBID)
		return mesh_refused(outcome);
	if (outcome == MESH_REWRITE) {
		ctx->user_ip4 = destination.word[3];
		ctx->user_port = bpf_htons(port);
	}
	return 1;
}

/* Also sees IPv4 destinations of IPv6 sockets, as ::ffff:a.b.c.d. */
int mesh_connect6(struct bpf_sock_addr *ctx)
{
	struct mesh_addr destination;
	u16 port = bpf_ntohs((__be16)ctx->user_port);
	int outcome;

	if (!mesh_is_tcp(ctx))
		return 1;
	mesh_addr_from6(&destination, ctx->user_ip6);
	outcome = mesh_connect(ctx, &destination, &port);
	if (outcome >= MESH_FORBID)
		return mesh_refused(outcome);
	if (outcome == MESH_REWRITE) {
		ctx->user_ip6[0] = destination.word[0];
		ctx->user_ip6[1] = destination.word[1];
		ctx->user_ip6[2] = destination.word[2];
		ctx->user_ip6[3] = destination.word[3];
		ctx->user_port = bpf_htons(port);
	}
	return 1;
}
