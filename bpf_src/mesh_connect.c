/* cgroup/connect4 and connect6: where a connection goes. Runs in the caller's context, once per connection, before anything is sent.
 * Order: who calls, which service, which endpoint, which policy. Processes that are not enrolled leave after one lookup. */

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

static __always_inline void mesh_report_call(u8 kind, const struct mesh_sock *sock, const struct mesh_decision *decision, u64 socket_cookie)
{
	struct mesh_event *event = mesh_event_about(kind, sock);

	if (!event)
		return;
	event->socket_cookie = socket_cookie;
	event->rule = decision->rule;
	event->verdict = decision->verdict;
	event->reason = decision->reason;
	event->remote_address = sock->remote;
	event->remote_port = sock->remote_port;
	mesh_event_send_from_caller(event);
}

/* Counts a decision at the caller, and reports one that denies or would deny. */
static __always_inline void mesh_account(struct mesh_sock *sock, const struct mesh_decision *decision)
{
	struct mesh_decision audited = *decision;
	struct mesh_parties who;

	mesh_parties_of(sock, &who);
	mesh_count_verdict(&who, decision);
	if (decision->verdict == MESH_VERDICT_DENY && (sock->traced || mesh_may_report()))
		mesh_report_call(MESH_EVENT_DENIED, sock, decision, 0);
	if (decision->audit && (sock->traced || mesh_may_report())) {
		audited.rule = decision->audit;
		audited.reason = MESH_REASON_AUDIT;
		mesh_report_call(MESH_EVENT_AUDITED, sock, &audited, 0);
	}
}

/* Refuses a call that nobody could answer. */
static __always_inline int mesh_refuse(struct mesh_sock *sock, u8 reason)
{
	struct mesh_decision decision = { .verdict = MESH_VERDICT_DENY, .reason = reason };

	mesh_account(sock, &decision);
	return MESH_REFUSE;
}

/* Is this the kernel itself, which uses the network of an enrolled namespace (a network file system, say)? Worker threads live in the root cgroup,
 * where nobody inside a container can go. Denying them has frozen nodes. */
static __always_inline bool mesh_is_kernel(void)
{
	char comm[16] = {};

	if (bpf_get_current_cgroup_id() != 1) /* the root's (kernel/cgroup/cgroup.c, cgroup_id) */
		return false;
	bpf_get_current_comm(comm, sizeof(comm));
	return comm[0] == 'k' && comm[1] == 'w' && comm[2] == 'o' && comm[3] == 'r' && comm[4] == 'k' && comm[5] == 'e' && comm[6] == 'r' && comm[7] == '/';
}

static __always_inline bool mesh_is_waypoint(struct mesh_config *config)
{
	return config && config->waypoint_cgroup && bpf_get_current_cgroup_id() == config->waypoint_cgroup;
}

/* Is this a query to a resolver whose place the mesh's name server in this namespace takes? */
static __always_inline bool mesh_is_query(u64 netns_cookie, const struct mesh_addr *destination, u16 port)
{
	struct mesh_resolver_key key = { .netns_cookie = netns_cookie, .address = *destination };

	return port == MESH_DNS_SERVICE_PORT && mesh_resolver.lookup(&key);
}

/* Is this an address of a service? Row 0 of its ports says so: what asks for another port gets an answer, not silence. */
static __always_inline bool mesh_is_service(const struct mesh_addr *address)
{
	struct mesh_service_key key = { .address = *address };

	return mesh_service.lookup(&key) != NULL;
}

/* Decides for the call described by `destination` and `port`, and may change both. */
static __always_inline int mesh_connect(struct bpf_sock_addr *ctx, struct mesh_addr *destination, u16 *port, u8 protocol)
{
	u64 netns_cookie = bpf_get_netns_cookie(ctx), now;
	u32 zero = 0, epoch = mesh_current_epoch();
	struct mesh_known self, target = {};
	struct mesh_known_service service;
	struct mesh_decision decision = {};
	struct mesh_backend *backend;
	struct mesh_config *config;
	struct bpf_sock *sk = ctx->sk;
	struct mesh_sock *sock;
	bool waypoint = false, served = false;

	if (!mesh_know_namespace(netns_cookie, epoch, &self))
		return MESH_PASS;
	if (!sk)
		return MESH_REFUSE;
	config = mesh_config.lookup(&zero);
	waypoint = mesh_is_waypoint(config);
	if (mesh_addr_is_loopback(destination) && (waypoint || !mesh_is_query(netns_cookie, destination, *port))) {
		mesh_sock.sk_storage_delete(sk); /* of an earlier connect() of this socket */
		return MESH_PASS;
	}
	sock = mesh_sock.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!sock) {
		/* Without its record the connection would reach the waypoint nameless, or the receiver as a stranger: refuse it here. */
		mesh_count(MESH_COUNT_STORAGE_FAILED);
		return MESH_REFUSE;
	}
	__builtin_memset(sock, 0, sizeof(*sock)); /* a socket may be connected again after it failed: what it dialled before must not stay */
	now = bpf_ktime_get_ns();
	sock->start_ns = now;
	sock->source = self.id;
	sock->protocol = protocol;
	sock->dialled = *destination;
	sock->dialled_port = *port;
	sock->direction = MESH_OUTBOUND;

	if (waypoint) {
		sock->direction = MESH_FROM_WAYPOINT; /* already decided: by the waypoint's RBAC here, by mesh_sk_lookup there */
		waypoint = false;
	} else if (mesh_is_query(netns_cookie, destination, *port)) {
		mesh_addr_to_loopback(destination);
		*port = MESH_DNS_PORT;
		sock->remote = *destination;
		sock->remote_port = *port;
		return MESH_REWRITE;
	} else if (mesh_know_service(destination, *port, protocol, &service)) {
		served = true;
		sock->service = service.id;
		sock->traced = mesh_traced(config, sock->source, 0, sock->service);
		waypoint = service.flags & MESH_SERVICE_WAYPOINT;
		if (!waypoint) {
			backend = mesh_choose(&service, netns_cookie, mesh_addr_is4(destination), now);
			if (!backend)
				return mesh_refuse(sock, MESH_REASON_NO_BACKEND);
			*destination = backend->address;
			*port = backend->port;
			if (service.flags & MESH_SERVICE_LEAST)
				sock->load_port = *port;
		}
	}

	if (!waypoint) {
		if (mesh_know_address(destination, epoch, &target)) {
			sock->target = target.id;
			if (!served)
				sock->traced = mesh_traced(config, sock->source, sock->target, 0);
			if (sock->direction == MESH_OUTBOUND && target.netns_cookie != netns_cookie) { /* a pod may reach itself */
				decision = mesh_decide(target.policy, self.identity, *port, protocol);
				sock->rule = decision.rule;
				sock->verdict = decision.verdict;
				if (decision.verdict == MESH_VERDICT_DENY && mesh_is_kernel()) {
					mesh_count(MESH_COUNT_KERNEL_SOCKET);
					decision.verdict = MESH_VERDICT_NONE; /* the receiver still decides */
				}
				if (decision.verdict != MESH_VERDICT_NONE || decision.audit)
					mesh_account(sock, &decision);
				if (decision.verdict == MESH_VERDICT_DENY)
					return MESH_FORBID;
				waypoint = decision.verdict == MESH_VERDICT_WAYPOINT;
			}
		} else if (!served && mesh_is_service(destination)) {
			return mesh_refuse(sock, MESH_REASON_NO_PORT);
		}
	}
	if (waypoint) {
		sock->origdst = *destination;
		sock->origdst_port = *port;
		sock->redirected = 1;
		mesh_addr_to_loopback(destination);
		*port = MESH_OUTBOUND_PORT;
	}
	sock->remote = *destination;
	sock->remote_port = *port;
	if (target.netns_cookie && !sock->redirected && sock->direction == MESH_OUTBOUND && protocol == IPPROTO_TCP)
		sock->accelerated = self.flags & target.flags & MESH_WORKLOAD_ACCELERATE ? 1 : 0;
	if (protocol == IPPROTO_UDP)
		mesh_datagrams_begin(ctx, sock, netns_cookie, &target);
	if (sock->traced)
		mesh_report_call(MESH_EVENT_CONNECT, sock, &decision, bpf_get_socket_cookie(ctx));
	return sock->redirected || served ? MESH_REWRITE : MESH_PASS;
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

/* The protocols that the mesh carries; 0 for others, which are left as they are. */
static __always_inline u8 mesh_protocol_of(struct bpf_sock_addr *ctx)
{
	u32 protocol = ctx->protocol, type = ctx->type;

	if (type == SOCK_STREAM && protocol == IPPROTO_TCP)
		return IPPROTO_TCP;
	return type == SOCK_DGRAM && protocol == IPPROTO_UDP ? IPPROTO_UDP : 0;
}

/* Address and port in a context, and what becomes of them. One of each for a family: the fields differ. */
static __always_inline u16 mesh_take4(struct bpf_sock_addr *ctx, struct mesh_addr *address)
{
	mesh_addr_from4(address, ctx->user_ip4);
	return bpf_ntohs((__be16)ctx->user_port);
}

static __always_inline u16 mesh_take6(struct bpf_sock_addr *ctx, struct mesh_addr *address)
{
	mesh_addr_from6(address, ctx->user_ip6);
	return bpf_ntohs((__be16)ctx->user_port);
}

static __always_inline int mesh_give4(struct bpf_sock_addr *ctx, const struct mesh_addr *address, u16 port)
{
	ctx->user_ip4 = address->word[3];
	ctx->user_port = bpf_htons(port);
	return 1;
}

static __always_inline int mesh_give6(struct bpf_sock_addr *ctx, const struct mesh_addr *address, u16 port)
{
	ctx->user_ip6[0] = address->word[0];
	ctx->user_ip6[1] = address->word[1];
	ctx->user_ip6[2] = address->word[2];
	ctx->user_ip6[3] = address->word[3];
	ctx->user_port = bpf_htons(port);
	return 1;
}

int mesh_connect4(struct bpf_sock_addr *ctx)
{
	struct mesh_addr destination;
	u16 port = mesh_take4(ctx, &destination);
	u8 protocol = mesh_protocol_of(ctx);
	int outcome;

	if (!protocol)
		return 1;
	outcome = mesh_connect(ctx, &destination, &port, protocol);
	if (outcome >= MESH_FORBID)
		return mesh_refused(outcome);
	return outcome == MESH_REWRITE ? mesh_give4(ctx, &destination, port) : 1;
}

/* Also sees IPv4 destinations of IPv6 sockets, as ::ffff:a.b.c.d. */
int mesh_connect6(struct bpf_sock_addr *ctx)
{
	struct mesh_addr destination;
	u16 port = mesh_take6(ctx, &destination);
	u8 protocol = mesh_protocol_of(ctx);
	int outcome;

	if (!protocol)
		return 1;
	outcome = mesh_connect(ctx, &destination, &port, protocol);
	if (outcome >= MESH_FORBID)
		return mesh_refused(outcome);
	return outcome == MESH_REWRITE ? mesh_give6(ctx, &destination, port) : 1;
}

/* getpeername(): the application sees what it dialled, not where the mesh sent it. */
static __always_inline bool mesh_seen_peer(struct bpf_sock_addr *ctx, struct mesh_addr *peer, u16 *port)
{
	struct bpf_sock *sk = ctx->sk;
	struct mesh_sock *sock = sk ? mesh_sock.sk_storage_get(sk, 0, 0) : NULL;

	if (!sock || sock->remote_port != *port || !mesh_addr_equal(&sock->remote, peer))
		return false;
	*peer = sock->dialled;
	*port = sock->dialled_port;
	return true;
}

int mesh_getpeername4(struct bpf_sock_addr *ctx)
{
	struct mesh_addr peer;
	u16 port = mesh_take4(ctx, &peer);

	return mesh_seen_peer(ctx, &peer, &port) ? mesh_give4(ctx, &peer, port) : 1;
}

int mesh_getpeername6(struct bpf_sock_addr *ctx)
{
	struct mesh_addr peer;
	u16 port = mesh_take6(ctx, &peer);

	return mesh_seen_peer(ctx, &peer, &port) ? mesh_give6(ctx, &peer, port) : 1;
}
