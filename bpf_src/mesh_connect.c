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

/* Is this a query to a resolver that the namespace's resolv.conf names, whoever answers it? */
static __always_inline bool mesh_is_resolver(u64 netns_cookie, const struct mesh_addr *destination, u16 port)
{
	struct mesh_resolver_key key = { .netns_cookie = netns_cookie | MESH_RESOLVER_ALLOWED, .address = *destination };

	return port == MESH_DNS_SERVICE_PORT && mesh_resolver.lookup(&key);
}

/* Is this an address of a service? Row 0 of its ports says so: what asks for another port gets an answer, not silence. */
static __always_inline bool mesh_is_service(const struct mesh_addr *address)
{
	struct mesh_service_key key = { .address = *address };

	return mesh_service.lookup(&key) != NULL;
}

/* May a caller not go to a destination that is no workload's and no service's? The unspecified address is the caller itself. */
static __always_inline bool mesh_is_shut_in(const struct mesh_known *self, u64 netns_cookie, const struct mesh_addr *destination, u16 port)
{
	if (!(self->flags & MESH_WORKLOAD_EGRESS_DENY) || mesh_addr_is_unspecified(destination) || mesh_is_resolver(netns_cookie, destination, port))
		return false;
	if (!mesh_is_kernel())
		return true;
	mesh_count(MESH_COUNT_KERNEL_SOCKET);
	return false;
}

/* Does a name from outside lead the waypoint into the mesh, or to the node? */
static __always_inline bool mesh_leads_inside(const struct mesh_addr *destination, u32 epoch)
{
	struct mesh_known known;

	return mesh_addr_is_loopback(destination) || mesh_addr_is_unspecified(destination) || mesh_addr_is_link_local(destination) ||
	       mesh_know_address(destination, epoch, &known) || mesh_is_service(destination);
}

/* Does the waypoint listen for this caller? Asked of the sockets themselves: no agent is needed to know that Envoy has gone. */
static __always_inline bool mesh_waypoint_listens(struct bpf_sock_addr *ctx)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;

	tuple.ipv4.saddr = bpf_htonl(0x7f000001);
	tuple.ipv4.daddr = bpf_htonl(0x7f000001);
	tuple.ipv4.dport = bpf_htons(MESH_OUTBOUND_PORT);
	sk = bpf_sk_lookup_tcp(ctx, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return false;
	bpf_sk_release(sk);
	return true;
}

/* The number of the tunnel that a call to a port of `target` takes; 0 = none. As long as nobody can prove who `target` is, denies a STRICT port. */
static __always_inline u32 mesh_tunnel_to(const struct mesh_known *target, u16 port, struct mesh_decision *decision)
{
	u32 number = target->tunnel & 0xffffff, mtls;

	if (target->netns_cookie)
		return 0;
	mtls = mesh_mtls_of(target, port);
	if (!(mtls & MESH_WORKLOAD_TUNNEL))
		return 0;
	if (!number && mtls & MESH_WORKLOAD_STRICT) {
		decision->verdict = MESH_VERDICT_DENY;
		decision->reason = MESH_REASON_NO_TUNNEL;
		decision->rule = 0;
	}
	return number;
}

/* Is this the kubelet? Only the kernel is asked: in which network namespace, cgroup and process connect() runs. Names and addresses are anybody's. */
static __always_inline bool mesh_is_kubelet(const struct mesh_kubelet *kubelet, u64 netns_cookie)
{
	if (!kubelet || kubelet->netns_cookie != netns_cookie || !kubelet->process || bpf_get_current_cgroup_id() != kubelet->cgroup)
		return false;
	return kubelet->process == MESH_KUBELET_ANY || bpf_get_current_pid_tgid() >> 32 == kubelet->process;
}

/* A call from a namespace that is not enrolled. Nothing is decided about it here; the receiver is told if it is a probe. */
static __always_inline int mesh_connect_outside(struct bpf_sock_addr *ctx, const struct mesh_addr *destination, u16 port, u64 netns_cookie, u32 epoch,
						struct mesh_known *target)
{
	struct mesh_decision decision = { .verdict = MESH_VERDICT_ALLOW, .reason = MESH_REASON_PROBE };
	u32 zero = 0;
	struct mesh_kubelet *kubelet = mesh_kubelet.lookup(&zero);
	struct bpf_sock *sk = ctx->sk;
	struct mesh_sock *sock;

	if (!mesh_is_kubelet(kubelet, netns_cookie) || !sk)
		return MESH_PASS;
	mesh_sock.sk_storage_delete(sk); /* of an earlier connect() of this socket */
	if (!mesh_know_address(destination, epoch, target) || !target->netns_cookie || !mesh_probed(target, port))
		return MESH_PASS;
	sock = mesh_sock.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!sock) {
		mesh_count(MESH_COUNT_STORAGE_FAILED); /* the receiver takes it for a stranger's */
		return MESH_PASS;
	}
	__builtin_memset(sock, 0, sizeof(*sock));
	sock->start_ns = bpf_ktime_get_ns();
	sock->source = kubelet->workload;
	sock->target = target->id;
	sock->protocol = IPPROTO_TCP;
	sock->dialled = *destination;
	sock->dialled_port = port;
	sock->remote = *destination;
	sock->remote_port = port;
	sock->direction = MESH_OUTBOUND;
	sock->verdict = MESH_VERDICT_ALLOW;
	sock->probe = 1;
	sock->traced = mesh_traced(mesh_config.lookup(&zero), sock->source, sock->target, 0);
	if (sock->traced)
		mesh_report_call(MESH_EVENT_CONNECT, sock, &decision, bpf_get_socket_cookie(ctx));
	return MESH_PASS;
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
	bool waypoint = false, served = false, open = false, stream = false;
	u32 tunnel = 0;

	if (!mesh_know_namespace(netns_cookie, epoch, &self))
		return protocol == IPPROTO_TCP ? mesh_connect_outside(ctx, destination, *port, netns_cookie, epoch, &target) : MESH_PASS;
	if (!sk)
		return MESH_REFUSE;
	config = mesh_config.lookup(&zero);
	waypoint = mesh_is_waypoint(config);
	if (waypoint && sk->mark == MESH_MARK_OUTSIDE && mesh_leads_inside(destination, epoch)) {
		struct mesh_parties who = { .source = self.id, .port = *port, .direction = MESH_FROM_WAYPOINT, .protocol = protocol };

		mesh_count_decision(&who, 0, MESH_VERDICT_DENY, MESH_REASON_EGRESS);
		return MESH_FORBID;
	}
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
	sock->logged = self.flags & MESH_WORKLOAD_LOGGED && !waypoint ? 1 : 0;

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
		stream = service.flags & MESH_SERVICE_STREAM;
		if (waypoint && service.flags & MESH_SERVICE_FAIL_OPEN && !mesh_waypoint_listens(ctx)) {
			waypoint = false;
			open = true;
		}
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
				if (protocol == IPPROTO_TCP && decision.verdict < MESH_VERDICT_DENY)
					tunnel = mesh_tunnel_to(&target, *port, &decision);
				sock->rule = decision.rule;
				sock->verdict = decision.verdict;
				if (decision.verdict == MESH_VERDICT_DENY && mesh_is_kernel()) {
					mesh_count(MESH_COUNT_KERNEL_SOCKET);
					decision.verdict = MESH_VERDICT_NONE; /* the receiver still decides */
				}
				if (decision.verdict != MESH_VERDICT_NONE || decision.audit)
					mesh_account(sock, &decision);
				if (decision.verdict == MESH_VERDICT_DENY)
					return decision.reason == MESH_REASON_NO_TUNNEL ? MESH_REFUSE : MESH_FORBID;
				waypoint = decision.verdict == MESH_VERDICT_WAYPOINT;
			}
		} else if (!served && mesh_is_service(destination)) {
			return mesh_refuse(sock, MESH_REASON_NO_PORT);
		} else if (sock->direction == MESH_OUTBOUND && mesh_is_shut_in(&self, netns_cookie, destination, *port)) {
			decision.verdict = MESH_VERDICT_DENY;
			decision.reason = MESH_REASON_EGRESS;
			mesh_account(sock, &decision);
			return MESH_FORBID;
		}
	}
	if (open && !waypoint) { /* no policy needs the request */
		mesh_count(MESH_COUNT_FAIL_OPEN);
		decision.reason = MESH_REASON_FAIL_OPEN;
	}
	if (waypoint || tunnel) {
		sock->origdst = *destination;
		sock->origdst_port = *port;
	}
	if (waypoint) {
		sock->redirected = MESH_REDIRECT_WAYPOINT;
		mesh_addr_to_loopback(destination);
		*port = stream ? MESH_EGRESS_PORT : MESH_OUTBOUND_PORT;
	} else if (tunnel) {
		/* IPv6 has one loopback address only, so an IPv6 socket goes to ::ffff:127.x.y.z. One that is IPV6_V6ONLY, which one bound to an IPv6
		 * address is too, gets ENETUNREACH there: closed. */
		sock->redirected = MESH_REDIRECT_TUNNEL;
		mesh_addr_from4(destination, bpf_htonl(0x7f000000 | tunnel));
		*port = MESH_TUNNEL_PORT;
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

/* A protocol that the mesh does not carry (SCTP, MPTCP, ping) is no way out for whoever may not go out. */
static __always_inline int mesh_connect_other(struct bpf_sock_addr *ctx, const struct mesh_addr *destination)
{
	u64 netns_cookie = bpf_get_netns_cookie(ctx);
	u32 zero = 0, epoch = mesh_current_epoch();
	struct mesh_known self, target;
	struct mesh_parties who = { .direction = MESH_OUTBOUND };

	if (!mesh_know_namespace(netns_cookie, epoch, &self) || mesh_is_waypoint(mesh_config.lookup(&zero)))
		return 1;
	if (mesh_addr_is_loopback(destination) || mesh_know_address(destination, epoch, &target) || !mesh_is_shut_in(&self, netns_cookie, destination, 0))
		return 1;
	who.source = self.id;
	mesh_count_decision(&who, 0, MESH_VERDICT_DENY, MESH_REASON_EGRESS);
	return 0;
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
		return mesh_connect_other(ctx, &destination);
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
		return mesh_connect_other(ctx, &destination);
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
