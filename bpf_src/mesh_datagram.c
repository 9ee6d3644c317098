/* cgroup/sendmsg4 and sendmsg6: where a datagram of an unconnected socket goes; recvmsg4 and recvmsg6: whom an answer seems to come from.
 * A flow (socket, what it dialled) keeps its endpoint as long as the service has it. Policy is asked for each datagram. */

/* The endpoint of this flow: the one it had, or a new one. */
static __always_inline struct mesh_backend *mesh_peer_of(const struct mesh_known_service *service, u64 netns_cookie, u64 socket_cookie,
							 const struct mesh_addr *dialled, u16 port)
{
	struct mesh_peer_key key = { .socket_cookie = socket_cookie, .address = *dialled, .port = port };
	struct mesh_peer *kept = mesh_peer.lookup(&key), fresh = {};
	struct mesh_backend *backend;

	if (kept) {
		backend = mesh_member_of(service->list, &kept->address, kept->port);
		if (backend)
			return backend;
	}
	backend = mesh_choose(service, netns_cookie, mesh_addr_is4(dialled), bpf_ktime_get_ns());
	if (!backend)
		return NULL;
	fresh.address = backend->address;
	fresh.port = backend->port;
	fresh.workload = backend->workload;
	mesh_peer.update(&key, &fresh);
	return backend;
}

/* Remembers that answers from `remote` are to seem to come from what was dialled. */
static __always_inline void mesh_disguise(u64 socket_cookie, const struct mesh_sock *sock)
{
	struct mesh_peer_key key = { .socket_cookie = socket_cookie, .address = sock->remote, .port = sock->remote_port, .reverse = 1 };
	struct mesh_peer *known = mesh_peer.lookup(&key), fresh = {};

	if (known && known->port == sock->dialled_port && mesh_addr_equal(&known->address, &sock->dialled))
		return;
	fresh.address = sock->dialled;
	fresh.port = sock->dialled_port;
	if (mesh_peer.update(&key, &fresh))
		mesh_count(MESH_COUNT_REVERSE_FAILED);
}

static __always_inline int mesh_sendmsg(struct bpf_sock_addr *ctx, struct mesh_addr *destination, u16 *port)
{
	u64 netns_cookie = bpf_get_netns_cookie(ctx), socket_cookie;
	u32 zero = 0, epoch = mesh_current_epoch();
	struct mesh_known self, target = {};
	struct mesh_known_service service;
	struct mesh_decision decision = {};
	struct mesh_backend *backend;
	struct mesh_config *config;
	struct bpf_sock *sk = ctx->sk;
	struct mesh_sock sock = {};
	struct mesh_parties who;
	bool own, served = false;

	if (!mesh_know_namespace(netns_cookie, epoch, &self) || !sk)
		return MESH_PASS;
	config = mesh_config.lookup(&zero);
	own = mesh_is_waypoint(config);
	socket_cookie = bpf_get_socket_cookie(ctx);
	sock.dialled = *destination;
	sock.dialled_port = *port;
	if (!own && mesh_is_query(netns_cookie, destination, *port)) {
		mesh_addr_to_loopback(destination);
		*port = MESH_DNS_PORT;
		sock.remote = *destination;
		sock.remote_port = *port;
		mesh_disguise(socket_cookie, &sock);
		return MESH_REWRITE;
	}
	if (mesh_addr_is_loopback(destination))
		return MESH_PASS;
	sock.source = self.id;
	sock.protocol = IPPROTO_UDP;
	sock.direction = own ? MESH_FROM_WAYPOINT : MESH_OUTBOUND;
	if (!own && mesh_know_service(destination, *port, IPPROTO_UDP, &service)) {
		served = true;
		sock.service = service.id;
		backend = mesh_peer_of(&service, netns_cookie, socket_cookie, destination, *port);
		if (!backend)
			return mesh_refuse(&sock, MESH_REASON_NO_BACKEND);
		*destination = backend->address;
		*port = backend->port;
	}
	sock.remote = *destination;
	sock.remote_port = *port;
	if (mesh_know_address(destination, epoch, &target))
		sock.target = target.id;
	sock.traced = mesh_traced(config, sock.source, sock.target, sock.service);
	if (!served && mesh_is_answer(netns_cookie, sk->src_port, destination, &target, *port))
		return MESH_PASS; /* whoever was let in is answered */
	if (!sock.target && !served && !own && mesh_is_service(destination))
		return mesh_refuse(&sock, MESH_REASON_NO_PORT);
	if (!sock.target && !served && !own && mesh_is_shut_in(&self, netns_cookie, destination, *port)) {
		decision.verdict = MESH_VERDICT_DENY;
		decision.reason = MESH_REASON_EGRESS;
		mesh_account(&sock, &decision);
		return MESH_FORBID;
	}
	if (sock.target && !own && target.netns_cookie != netns_cookie) {
		decision = mesh_decide(target.policy, self.identity, *port, IPPROTO_UDP);
		if (decision.verdict == MESH_VERDICT_DENY && mesh_is_kernel()) {
			mesh_count(MESH_COUNT_KERNEL_SOCKET);
			decision.verdict = MESH_VERDICT_NONE;
		}
		if (decision.verdict == MESH_VERDICT_DENY) {
			mesh_account(&sock, &decision);
			return MESH_FORBID;
		}
	}
	if (mesh_flow_begin(&sock, netns_cookie, &target, sk->src_port)) {
		mesh_parties_of(&sock, &who);
		mesh_flow_count(&who);
		if (decision.verdict != MESH_VERDICT_NONE || decision.audit)
			mesh_account(&sock, &decision);
		if (sock.traced)
			mesh_report_call(MESH_EVENT_CONNECT, &sock, &decision, socket_cookie);
	}
	if (!served)
		return MESH_PASS;
	mesh_disguise(socket_cookie, &sock);
	return MESH_REWRITE;
}

int mesh_sendmsg4(struct bpf_sock_addr *ctx)
{
	struct mesh_addr destination;
	u16 port = mesh_take4(ctx, &destination);
	int outcome = mesh_sendmsg(ctx, &destination, &port);

	if (outcome >= MESH_FORBID)
		return mesh_refused(outcome);
	return outcome == MESH_REWRITE ? mesh_give4(ctx, &destination, port) : 1;
}

int mesh_sendmsg6(struct bpf_sock_addr *ctx)
{
	struct mesh_addr destination;
	u16 port = mesh_take6(ctx, &destination);
	int outcome = mesh_sendmsg(ctx, &destination, &port);

	if (outcome >= MESH_FORBID)
		return mesh_refused(outcome);
	return outcome == MESH_REWRITE ? mesh_give6(ctx, &destination, port) : 1;
}

/* Whom a received datagram seems to come from: what this socket dialled, if that is why it came. */
static __always_inline bool mesh_seen_source(struct bpf_sock_addr *ctx, struct mesh_addr *source, u16 *port)
{
	struct mesh_peer_key key = { .address = *source, .port = *port, .reverse = 1 };
	u64 netns_cookie = bpf_get_netns_cookie(ctx);
	struct mesh_peer *known;

	if (!mesh_workload.lookup(&netns_cookie))
		return false;
	if (mesh_seen_peer(ctx, source, port))
		return true;
	key.socket_cookie = bpf_get_socket_cookie(ctx);
	known = mesh_peer.lookup(&key);
	if (!known)
		return false;
	*source = known->address;
	*port = known->port;
	return true;
}

int mesh_recvmsg4(struct bpf_sock_addr *ctx)
{
	struct mesh_addr source;
	u16 port = mesh_take4(ctx, &source);

	return mesh_seen_source(ctx, &source, &port) ? mesh_give4(ctx, &source, port) : 1;
}

int mesh_recvmsg6(struct bpf_sock_addr *ctx)
{
	struct mesh_addr source;
	u16 port = mesh_take6(ctx, &source);

	return mesh_seen_source(ctx, &source, &port) ? mesh_give6(ctx, &source, port) : 1;
}
