/* sockops: what becomes of a connection. Before the SYN leaves: who calls (for the receiver) or what was dialled (for the waypoint).
 * At the handshake and at the end: counters. Nothing runs per packet. */

/* The record that mesh_connect or mesh_on_accepted left on this socket. */
static __always_inline struct mesh_sock *mesh_sock_of(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	return sk ? mesh_sock.sk_storage_get(sk, 0, 0) : NULL;
}

/* Payload bytes both ways. The kernel counts each SYN and FIN of the sender as a byte (net/ipv4/tcp_input.c, tcp_snd_una_update and
 * tcp_rcv_nxt_update). `old` is the state before the close, 0 while the connection lives. What cannot be told is whether the peer's FIN came
 * to an end that had closed first: then received may be one too high. */
static __always_inline void mesh_payload(struct bpf_sock_ops *ctx, struct mesh_sock *sock, u32 old, u64 *sent, u64 *received)
{
	bool fin_acked = old == BPF_TCP_FIN_WAIT2 || old == BPF_TCP_LAST_ACK || old == BPF_TCP_CLOSING;
	bool fin_received = old == BPF_TCP_CLOSE_WAIT || old == BPF_TCP_LAST_ACK || old == BPF_TCP_CLOSING;
	u64 extra = (sock->direction != MESH_INBOUND) + fin_acked;

	*sent = ctx->bytes_acked;
	*received = ctx->bytes_received;
	*sent -= *sent < extra ? *sent : extra;
	*received -= fin_received && *received ? 1 : 0;
}

/* `redirected`: bytes both ways that went past TCP. */
static __always_inline void mesh_report_socket(struct bpf_sock_ops *ctx, struct mesh_sock *sock, u8 kind, u8 reason, u32 old, const u64 *redirected)
{
	struct mesh_event *event = mesh_event_about(kind, sock);
	struct mesh_ends ends;

	if (!event)
		return;
	mesh_ends_of(ctx, &ends);
	event->socket_cookie = bpf_get_socket_cookie(ctx);
	mesh_payload(ctx, sock, old, &event->sent_bytes, &event->received_bytes);
	event->sent_bytes += redirected ? redirected[0] : 0;
	event->received_bytes += redirected ? redirected[1] : 0;
	event->local_address = ends.local;
	event->local_port = ends.local_port;
	event->remote_address = ends.remote;
	event->remote_port = ends.remote_port;
	event->reason = reason;
	event->rtt_us = ctx->srtt_us >> 3; /* kept as eighths: include/linux/tcp.h */
	event->retransmits = ctx->total_retrans;
	mesh_event_send(event);
}

/* Asks for state changes of this socket, and keeps what other programs asked for. */
static __always_inline void mesh_watch(struct bpf_sock_ops *ctx)
{
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

/* Open connections to the endpoint of a service that asks for the less loaded one. */
static __always_inline void mesh_load_begin(struct mesh_sock *sock)
{
	struct mesh_load_key key = { .workload = sock->target, .port = sock->load_port };
	u64 *open, one = 1;

	if (!sock->load_port)
		return;
	open = mesh_load.lookup(&key);
	if (!open && mesh_load.insert(&key, &one)) {
		open = mesh_load.lookup(&key); /* somebody else was quicker, or the map is full */
		if (!open) {
			mesh_count(MESH_COUNT_LOAD_FAILED);
			return;
		}
	}
	if (open)
		mesh_add(*open, 1);
	sock->loaded = 1;
}

static __always_inline void mesh_load_end(struct mesh_sock *sock)
{
	struct mesh_load_key key = { .workload = sock->target, .port = sock->load_port };
	u64 *open;

	if (!sock->loaded)
		return;
	sock->loaded = 0;
	open = mesh_load.lookup(&key);
	if (open && *open)
		mesh_add(*open, -1);
}

/* How the receiver will find who calls. The same bytes from both ends: `caller` says whether this is the end that called. */
static __always_inline void mesh_flow_key_of(struct mesh_ends *ends, bool caller, struct mesh_flow_key *key)
{
	key->source = caller ? ends->local : ends->remote;
	key->destination = caller ? ends->remote : ends->local;
	key->source_port = caller ? ends->local_port : ends->remote_port;
	key->destination_port = caller ? ends->remote_port : ends->local_port;
	key->protocol = IPPROTO_TCP;
}

static __always_inline void mesh_origdst_key_of(struct bpf_sock_ops *ctx, struct mesh_ends *ends, struct mesh_origdst_key *key)
{
	key->netns_cookie = bpf_get_netns_cookie(ctx);
	key->source_port = ends->local_port;
	key->port = ends->remote_port;
	key->loopback = ends->remote.word[3];
}

/* The caller's end, before its SYN leaves. */
static __always_inline void mesh_on_connect(struct bpf_sock_ops *ctx)
{
	struct mesh_sock *sock = mesh_sock_of(ctx);
	struct mesh_origdst_key origdst_key = {};
	struct mesh_origdst origdst = {};
	struct mesh_flow_key flow_key = {};
	struct mesh_flow flow = {};
	struct mesh_ends ends;

	if (!sock)
		return;
	mesh_watch(ctx);
	mesh_ends_of(ctx, &ends);
	mesh_load_begin(sock);
	if (sock->redirected) {
		mesh_origdst_key_of(ctx, &ends, &origdst_key);
		origdst.address = sock->origdst;
		origdst.port = sock->origdst_port;
		if (mesh_origdst.update(&origdst_key, &origdst))
			mesh_count(MESH_COUNT_ORIGDST_FAILED);
		return;
	}
	mesh_flow_key_of(&ends, true, &flow_key);
	flow.netns_cookie = sock->probe ? 0 : bpf_get_netns_cookie(ctx);
	flow.workload = sock->source;
	flow.service = sock->service;
	flow.flags = (sock->direction == MESH_FROM_WAYPOINT ? MESH_FLOW_WAYPOINT : 0) | (sock->traced ? MESH_FLOW_TRACED : 0) |
		     (sock->probe ? MESH_FLOW_PROBE : 0);
	if (mesh_flow.update(&flow_key, &flow))
		mesh_count(MESH_COUNT_FLOW_FAILED);
}

static __always_inline void mesh_on_established(struct bpf_sock_ops *ctx)
{
	struct mesh_sock *sock = mesh_sock_of(ctx);
	struct mesh_stats *stats;
	struct mesh_ends ends;
	u64 took;

	if (!sock)
		return;
	sock->established_ns = bpf_ktime_get_ns();
	took = sock->established_ns - sock->start_ns;
	stats = mesh_stats_of(sock);
	if (stats) {
		mesh_add(stats->opened, 1);
		mesh_add(stats->connect_ns, took);
		mesh_add(stats->connect_bucket[mesh_bucket(took) & (MESH_BUCKETS - 1)], 1);
	}
	if (sock->accelerated) {
		mesh_ends_of(ctx, &ends);
		mesh_accelerate_caller(ctx, &ends);
	}
	if (sock->traced)
		mesh_report_socket(ctx, sock, MESH_EVENT_ESTABLISHED, 0, 0, NULL);
}

/* The receiver's end, when the handshake is done. mesh_sk_lookup has let it in. */
static __always_inline void mesh_on_accepted(struct bpf_sock_ops *ctx)
{
	u32 zero = 0, epoch = mesh_current_epoch();
	struct mesh_flow_key flow_key = {};
	struct mesh_known self, peer;
	struct mesh_stats *stats;
	struct mesh_sock *sock;
	struct bpf_sock *sk = ctx->sk;
	struct mesh_flow *flow;
	struct mesh_ends ends;

	if (!mesh_know_namespace(bpf_get_netns_cookie(ctx), epoch, &self) || !sk)
		return;
	mesh_ends_of(ctx, &ends);
	if (mesh_addr_is_loopback(&ends.remote) || mesh_addr_is_loopback(&ends.local) || mesh_addr_equal(&ends.remote, &ends.local))
		return; /* within the pod: the application's own, or the waypoint's last step */
	sock = mesh_sock.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!sock) {
		mesh_count(MESH_COUNT_STORAGE_FAILED);
		return;
	}
	__builtin_memset(sock, 0, sizeof(*sock));
	sock->start_ns = bpf_ktime_get_ns();
	sock->established_ns = sock->start_ns;
	sock->target = self.id;
	sock->dialled = ends.local;
	sock->dialled_port = ends.local_port;
	sock->direction = MESH_INBOUND;
	sock->protocol = IPPROTO_TCP;
	sock->logged = self.flags & MESH_WORKLOAD_LOGGED ? 1 : 0;
	mesh_flow_key_of(&ends, false, &flow_key);
	flow = mesh_flow.lookup(&flow_key);
	if (flow) {
		sock->source = flow->workload;
		sock->service = flow->service;
		sock->traced = flow->flags & MESH_FLOW_TRACED ? 1 : 0;
		sock->probe = flow->flags & MESH_FLOW_PROBE ? 1 : 0;
		sock->accelerated = self.flags & MESH_WORKLOAD_ACCELERATE && !(flow->flags & (MESH_FLOW_WAYPOINT | MESH_FLOW_PROBE));
		mesh_flow.delete(&flow_key); /* used up: nobody may live on it who takes these addresses later */
	} else if (mesh_know_address(&ends.remote, epoch, &peer) && !peer.netns_cookie) {
		sock->source = peer.id;
		sock->traced = mesh_traced(mesh_config.lookup(&zero), sock->source, sock->target, 0);
	}
	stats = mesh_stats_of(sock);
	if (stats)
		mesh_add(stats->opened, 1);
	mesh_watch(ctx);
	if (sock->accelerated)
		mesh_accelerate_receiver(ctx, &ends);
	if (sock->traced)
		mesh_report_socket(ctx, sock, MESH_EVENT_ESTABLISHED, 0, 0, NULL);
}

/* What was written for the other end goes with the socket, whether it was used or not. */
static __always_inline void mesh_forget(struct bpf_sock_ops *ctx, struct mesh_sock *sock)
{
	struct mesh_origdst_key origdst_key = {};
	struct mesh_flow_key flow_key = {};
	struct mesh_ends ends;

	if (sock->direction == MESH_INBOUND)
		return;
	mesh_ends_of(ctx, &ends);
	if (sock->redirected) {
		mesh_origdst_key_of(ctx, &ends, &origdst_key);
		mesh_origdst.delete(&origdst_key);
	} else {
		mesh_flow_key_of(&ends, true, &flow_key);
		mesh_flow.delete(&flow_key);
	}
}

static __always_inline void mesh_on_close(struct bpf_sock_ops *ctx)
{
	struct mesh_sock *sock = mesh_sock_of(ctx);
	u32 old = ctx->args[0];
	struct mesh_stats *stats;
	u64 rtt_ns, sent, received, redirected[2] = {};
	struct mesh_ends ends;
	u32 reason;

	if (!sock)
		return;
	if (!sock->established_ns && ctx->segs_in)
		reason = MESH_CLOSE_REFUSED; /* the only segment that ends a SYN_SENT is a reset */
	else if (!sock->established_ns)
		reason = ctx->total_retrans ? MESH_CLOSE_TIMED_OUT : MESH_CLOSE_FAILED;
	else if (old == BPF_TCP_ESTABLISHED || old == BPF_TCP_CLOSE_WAIT)
		reason = MESH_CLOSE_RESET;
	else
		reason = MESH_CLOSE_NORMAL;
	if (sock->accelerated) {
		mesh_ends_of(ctx, &ends);
		mesh_accelerate_end(ctx, &ends, &redirected[0], &redirected[1]);
	}
	rtt_ns = (u64)(ctx->srtt_us >> 3) * 1000;
	stats = mesh_stats_of(sock);
	if (stats) {
		mesh_add(stats->closed[reason], 1);
		mesh_add(stats->retransmits, ctx->total_retrans);
		if (sock->established_ns) {
			mesh_payload(ctx, sock, old, &sent, &received);
			sent += redirected[0];
			received += redirected[1];
			mesh_add(stats->sent_bytes, sent);
			mesh_add(stats->received_bytes, received);
			mesh_add(stats->rtt_ns, rtt_ns);
			mesh_add(stats->rtt_bucket[mesh_bucket(rtt_ns) & (MESH_BUCKETS - 1)], 1);
		}
	}
	if (mesh_end_wanted(sock))
		mesh_report_socket(ctx, sock, MESH_EVENT_CLOSED, reason, old, redirected);
	mesh_forget(ctx, sock);
	mesh_load_end(sock);
}

int mesh_sockops(struct bpf_sock_ops *ctx)
{
	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		mesh_on_connect(ctx);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		mesh_on_established(ctx);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		mesh_on_accepted(ctx);
		break;
	case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
		mesh_accelerate_transmit(ctx);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (ctx->args[1] == BPF_TCP_CLOSE)
			mesh_on_close(ctx);
		break;
	}
	return 1;
}

/* The waypoint's own listeners, for mesh_sk_lookup: only listen() puts a socket there. */
static __always_inline void mesh_on_listen(struct bpf_sock_ops *ctx)
{
	struct mesh_listener_key key = {};
	int error;

	key.port = ctx->local_port;
	if (key.port != MESH_INBOUND_PORT && key.port != MESH_HBONE_PORT)
		return;
	key.netns_cookie = bpf_get_netns_cookie(ctx);
	key.ipv4 = ctx->family == AF_INET;
	error = mesh_listener.sock_hash_update(ctx, &key, BPF_ANY); /* a statement of its own: bcc appends a semicolon */
	if (error)
		mesh_count(MESH_COUNT_LISTENER_FAILED);
}

/* The waypoint's end of a redirected connection. A caller that sends and closes at once takes its row along before the waypoint has accepted, so what
 * the row says moves to the socket that the waypoint will get: this runs before the caller's FIN can arrive. */
static __always_inline void mesh_on_handed_over(struct bpf_sock_ops *ctx)
{
	struct mesh_origdst_key key = {};
	struct bpf_sock *sk = ctx->sk;
	struct mesh_origdst *kept, *found;
	struct mesh_ends ends;

	if (!sk || (ctx->local_port != MESH_OUTBOUND_PORT && ctx->local_port != MESH_TUNNEL_PORT && ctx->local_port != MESH_EGRESS_PORT))
		return;
	mesh_ends_of(ctx, &ends);
	key.netns_cookie = bpf_get_netns_cookie(ctx);
	key.source_port = ends.remote_port;
	key.port = ends.local_port;
	key.loopback = ends.local.word[3];
	found = mesh_origdst.lookup(&key);
	if (!found)
		return;
	kept = mesh_accepted.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (kept)
		*kept = *found;
	else
		mesh_count(MESH_COUNT_STORAGE_FAILED); /* mesh_getsockopt asks the row */
}

/* Attached to the waypoint's cgroup only. */
int mesh_listen(struct bpf_sock_ops *ctx)
{
	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		mesh_on_listen(ctx);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		mesh_on_handed_over(ctx);
		break;
	}
	return 1;
}
