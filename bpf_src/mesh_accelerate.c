/* Socket acceleration: what one socket of this node writes goes straight into the other's receive queue. Off unless both ends opted in.
 *
 * Both sockets are put into mesh_peers when the handshake ends, the caller's first: its ACK has not left yet. What the caller writes next may
 * still come before the receiver has joined, and TCP data must not be overtaken by redirected data. So there is one agreement for each
 * connection, a row in mesh_pair, and whoever makes it first wins (BPF_NOEXIST is atomic):
 *   the receiver joins in time   -> REDIRECT: both ends redirect from their first byte on
 *   the caller writes before     -> TCP: both ends leave mesh_peers and are plain TCP sockets again
 * Leaving matters: on kernels with FIONREAD for sockmap (6.18.14) a member's FIONREAD is 0 for data that arrives over TCP.
 *
 * A write that began before the socket joined (TCP Fast Open; a thread that waits in send() for the handshake) goes past mesh_sk_msg. It is
 * noticed before its first segment leaves (BPF_SOCK_OPS_HDR_OPT_LEN_CB), and makes that direction TCP. A caller whose SYN was sent twice is often
 * taken for one: the kernel computes the MSS once more then, without a write, and which of the two it is cannot be told here.
 *
 * Sequence numbers prove that both ends see one and the same TCP connection: no NAT, no proxy and no namesake in between. */

#define MESH_SOL_TCP 6
#define MESH_TCP_ULP 31 /* include/uapi/linux/tcp.h */

static __always_inline void mesh_offer_key_of(struct mesh_ends *ends, bool caller, struct mesh_offer_key *key)
{
	key->caller = caller ? ends->local : ends->remote;
	key->receiver = caller ? ends->remote : ends->local;
	key->caller_port = caller ? ends->local_port : ends->remote_port;
	key->receiver_port = caller ? ends->remote_port : ends->local_port;
}

static __always_inline struct mesh_joined *mesh_joined_of(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	return sk ? mesh_joined.sk_storage_get(sk, 0, 0) : NULL;
}

/* Puts the socket into mesh_peers as this end. False if it is not there. */
static __always_inline bool mesh_join(struct bpf_sock_ops *ctx, struct mesh_joined *joined)
{
	struct bpf_sock *sk = ctx->sk;
	struct mesh_joined *kept;
	int error;

	if (!sk)
		return false;
	kept = mesh_joined.sk_storage_get(sk, joined, BPF_SK_STORAGE_GET_F_CREATE);
	if (!kept)
		return false;
	*kept = *joined;
	error = mesh_peers.sock_hash_update(ctx, &joined->key, BPF_NOEXIST); /* a statement of its own: bcc appends a semicolon */
	if (error) {
		mesh_joined.sk_storage_delete(sk);
		return false;
	}
	kept->watches = !(ctx->bpf_sock_ops_cb_flags & BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
	return true;
}

/* Stops asking for BPF_SOCK_OPS_HDR_OPT_LEN_CB, unless another program asked before. */
static __always_inline void mesh_unwatch(struct bpf_sock_ops *ctx, struct mesh_joined *joined)
{
	if (!joined->watches)
		return;
	joined->watches = 0;
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags & ~BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
}

/* Undoes mesh_join. Only for a socket that nobody redirects to: what waits in its queue would be lost. */
static __always_inline void mesh_part(struct bpf_sock_ops *ctx, struct mesh_pair_key *key)
{
	struct mesh_joined *joined = mesh_joined_of(ctx);
	struct bpf_sock *sk = ctx->sk;

	mesh_peers.delete(key);
	if (joined)
		mesh_unwatch(ctx, joined);
	if (sk)
		mesh_joined.sk_storage_delete(sk);
}

/* The caller's end, at BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, when both ends opted in and neither is a waypoint's. */
static __always_inline void mesh_accelerate_caller(struct bpf_sock_ops *ctx, struct mesh_ends *ends)
{
	struct mesh_joined joined = { .key = { .caller = bpf_get_socket_cookie(ctx), .sequence = ctx->snd_nxt, .end = MESH_CALLER } };
	struct mesh_offer offer = { .key = joined.key, .receiver_sequence = ctx->rcv_nxt };
	struct mesh_offer_key key;

	if (!mesh_join(ctx, &joined))
		return;
	mesh_offer_key_of(ends, true, &key);
	if (mesh_offer.update(&key, &offer))
		mesh_part(ctx, &joined.key);
}

/* The receiver's end, at BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, when it opted in. Takes the caller's offer, if there is one. */
static __always_inline void mesh_accelerate_receiver(struct bpf_sock_ops *ctx, struct mesh_ends *ends)
{
	struct mesh_pair pair = { .way = MESH_WAY_REDIRECT };
	struct mesh_joined joined = {};
	struct mesh_offer_key key;
	struct mesh_offer *offer;
	struct mesh_pair_key agreed;

	mesh_offer_key_of(ends, false, &key);
	offer = mesh_offer.lookup(&key);
	if (!offer || offer->key.sequence != ctx->rcv_nxt || offer->receiver_sequence != ctx->snd_nxt)
		return;
	agreed = offer->key;
	joined.key = agreed;
	joined.key.end = MESH_RECEIVER;
	if (!mesh_join(ctx, &joined))
		return;
	if (mesh_pair.insert(&agreed, &pair)) {
		mesh_offer.delete(&key); /* the caller was first */
	} else {
		if (!mesh_offer.delete(&key))
			return;
		mesh_pair.delete(&agreed); /* the caller has closed meanwhile, and nobody else would remove the row */
	}
	mesh_part(ctx, &joined.key);
}

/* Decides how an end sends that has sent nothing yet. `over_tcp`: its first bytes are on their way over TCP. */
static __always_inline void mesh_way_choose(struct mesh_joined *joined, bool over_tcp)
{
	struct mesh_pair tcp = { .way = MESH_WAY_TCP };
	struct mesh_pair_key key = joined->key;
	struct mesh_pair *pair;

	if (key.end == MESH_CALLER && !mesh_pair.insert(&key, &tcp)) {
		joined->way = MESH_WAY_TCP; /* before the receiver joined: now it will not */
		return;
	}
	key.end = MESH_CALLER;
	pair = mesh_pair.lookup(&key);
	joined->way = pair && pair->way == MESH_WAY_REDIRECT && !over_tcp ? MESH_WAY_REDIRECT : MESH_WAY_TCP;
}

/* At BPF_SOCK_OPS_HDR_OPT_LEN_CB: before a segment leaves, and before a write over TCP begins (net/ipv4/tcp.c, tcp_send_mss). */
static __always_inline void mesh_accelerate_transmit(struct bpf_sock_ops *ctx)
{
	struct mesh_joined *joined = mesh_joined_of(ctx);
	struct mesh_pair_key key;
	struct mesh_pair *pair;

	if (!joined)
		return;
	if (joined->way == MESH_WAY_OPEN) {
		if (ctx->args[0] != BPF_WRITE_HDR_TCP_CURRENT_MSS && !ctx->skb_len)
			return; /* an ACK without data */
		mesh_way_choose(joined, true);
	}
	mesh_unwatch(ctx, joined);
	if (joined->way != MESH_WAY_TCP || joined->key.end != MESH_CALLER)
		return;
	key = joined->key;
	pair = mesh_pair.lookup(&key);
	if (pair && pair->way == MESH_WAY_TCP)
		mesh_peers.delete(&key); /* the receiver never joined and never will: a plain TCP socket again */
}

/* At BPF_SOCK_OPS_STATE_CB to BPF_TCP_CLOSE: adds the redirected bytes, which TCP's own counters do not hold. Call it once for a socket. */
static __always_inline void mesh_accelerate_end(struct bpf_sock_ops *ctx, struct mesh_ends *ends, u64 *sent, u64 *received)
{
	struct mesh_joined *joined = mesh_joined_of(ctx);
	struct mesh_offer_key offer_key;
	struct mesh_offer *offer;
	struct mesh_pair_key key;
	struct mesh_pair *pair;
	struct bpf_sock *sk;
	u32 end;

	if (!joined)
		return;
	key = joined->key;
	end = key.end;
	if (end == MESH_CALLER) { /* the offer first: mesh_accelerate_receiver relies on it */
		mesh_offer_key_of(ends, true, &offer_key);
		offer = mesh_offer.lookup(&offer_key);
		if (offer && offer->key.caller == key.caller && offer->key.sequence == key.sequence)
			mesh_offer.delete(&offer_key);
	}
	key.end = MESH_CALLER;
	pair = mesh_pair.lookup(&key);
	if (pair) {
		*sent += end == MESH_CALLER ? pair->bytes[MESH_CALLER] : pair->bytes[MESH_RECEIVER];
		*received += end == MESH_CALLER ? pair->bytes[MESH_RECEIVER] : pair->bytes[MESH_CALLER];
		mesh_add(pair->ended, 1);
		if (pair->ended >= 2 || pair->way == MESH_WAY_TCP)
			mesh_pair.delete(&key);
	}
	sk = ctx->sk;
	if (sk)
		mesh_joined.sk_storage_delete(sk);
}

/* sk_msg, attached to mesh_peers: for each write of an accelerated socket. Never refuses: what it does not redirect goes over TCP. */
int mesh_sk_msg(struct sk_msg_md *ctx)
{
	struct mesh_joined *joined;
	struct bpf_sock *sk = ctx->sk;
	struct mesh_pair_key key;
	struct mesh_pair *pair;
	u32 end;
	int verdict;

	joined = mesh_joined.sk_storage_get(sk, 0, 0);
	if (!joined)
		return SK_PASS;
	if (joined->way == MESH_WAY_OPEN)
		mesh_way_choose(joined, false);
	if (joined->way != MESH_WAY_REDIRECT)
		return SK_PASS;
	key = joined->key;
	end = key.end;
	key.end = end == MESH_CALLER ? MESH_RECEIVER : MESH_CALLER;
	verdict = mesh_peers.msg_redirect_hash(ctx, &key, BPF_F_INGRESS);
	if (verdict != SK_PASS)
		return SK_PASS; /* the other end has closed: TCP answers with a reset, as ever */
	key.end = MESH_CALLER;
	pair = mesh_pair.lookup(&key);
	if (pair) {
		if (end == MESH_CALLER)
			mesh_add(pair->bytes[MESH_CALLER], ctx->size);
		else
			mesh_add(pair->bytes[MESH_RECEIVER], ctx->size);
	}
	return SK_PASS;
}

/* cgroup/setsockopt: no ULP (kernel TLS) on an accelerated socket, whose plaintext would reach the other end as it is. The application sees
 * EPERM and goes on without, as on a kernel that has no such ULP. */
int mesh_setsockopt(struct bpf_sockopt *ctx)
{
	struct bpf_sock *sk;
	struct mesh_joined *joined;

	if (ctx->level != MESH_SOL_TCP || ctx->optname != MESH_TCP_ULP)
		return 1;
	sk = ctx->sk;
	if (!sk)
		return 1;
	joined = mesh_joined.sk_storage_get(sk, 0, 0);
	return joined && joined->way != MESH_WAY_TCP ? 0 : 1;
}

/* sockops, attached to the cgroup of the self-test only (agent/bpf/acceleration.py): every connection that has both ends in it is accelerated. */
int mesh_selftest(struct bpf_sock_ops *ctx)
{
	struct mesh_ends ends;
	u64 sent = 0, received = 0;

	switch (ctx->op) {
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		mesh_ends_of(ctx, &ends);
		mesh_accelerate_caller(ctx, &ends);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		mesh_ends_of(ctx, &ends);
		mesh_accelerate_receiver(ctx, &ends);
		break;
	case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
		mesh_accelerate_transmit(ctx);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (ctx->args[1] != BPF_TCP_CLOSE)
			break;
		mesh_ends_of(ctx, &ends);
		mesh_accelerate_end(ctx, &ends, &sent, &received);
		break;
	}
	return 1;
}
