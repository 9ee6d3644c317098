/* Flows of datagrams: UDP has no handshake, so who talks to whom is remembered here, from the first datagram on. */
#pragma once

/* How one end of a flow is named: an enrolled namespace by its cookie, anything else by its address. Of a stranger nothing is known: all zero. */
static __always_inline void mesh_end_of(const struct mesh_addr *address, const struct mesh_known *known, struct mesh_addr *end)
{
	if (known->netns_cookie)
		mesh_addr_from_cookie(end, known->netns_cookie);
	else
		*end = *address;
}

/* Remembers that a socket of this namespace talks to `remote`. True if that is new. */
static __always_inline bool mesh_flow_begin(const struct mesh_sock *sock, u64 netns_cookie, const struct mesh_known *target, u16 source_port)
{
	struct mesh_flow_key key = { .source_port = source_port, .destination_port = sock->remote_port, .protocol = IPPROTO_UDP };
	struct mesh_flow flow = {};

	mesh_addr_from_cookie(&key.source, netns_cookie);
	mesh_end_of(&sock->remote, target, &key.destination);
	if (mesh_flow.lookup(&key))
		return false;
	flow.netns_cookie = netns_cookie;
	flow.workload = sock->source;
	flow.service = sock->service;
	flow.flags = sock->traced ? MESH_FLOW_TRACED : 0;
	if (mesh_flow.update(&key, &flow))
		mesh_count(MESH_COUNT_FLOW_FAILED);
	return true;
}

/* Counts a flow that begins. */
static __always_inline void mesh_flow_count(const struct mesh_parties *who)
{
	struct mesh_stats *stats = mesh_stats_for(who);

	if (stats)
		mesh_add(stats->opened, 1);
}

#define MESH_EPHEMERAL_FIRST 32768 /* the default of net.ipv4.ip_local_port_range */
#define MESH_EPHEMERAL_COUNT 28232
#define MESH_BIND_TRIES 4

/* The port of a socket that connects. If it has none yet the kernel would choose one after this hook, too late to tell the receiver: choose it
 * here. 0 if no port was free. */
static __always_inline u16 mesh_bind(struct bpf_sock_addr *ctx)
{
	struct sockaddr_in6 any6 = { .sin6_family = AF_INET6 };
	struct sockaddr_in any4 = { .sin_family = AF_INET };
	struct bpf_sock *sk = ctx->sk;
	u16 port, i;
	int error;

	if (!sk)
		return 0;
	if (sk->src_port)
		return sk->src_port;
#pragma unroll
	for (i = 0; i < MESH_BIND_TRIES; i++) {
		port = MESH_EPHEMERAL_FIRST + (((u64)bpf_get_prandom_u32() * MESH_EPHEMERAL_COUNT) >> 32);
		if (sk->family == AF_INET) {
			any4.sin_port = bpf_htons(port);
			error = bpf_bind(ctx, (struct sockaddr *)&any4, sizeof(any4));
		} else {
			any6.sin6_port = bpf_htons(port);
			error = bpf_bind(ctx, (struct sockaddr *)&any6, sizeof(any6));
		}
		if (!error)
			return port;
	}
	return 0;
}

/* A connected socket's flow. */
static __always_inline void mesh_datagrams_begin(struct bpf_sock_addr *ctx, const struct mesh_sock *sock, u64 netns_cookie, const struct mesh_known *target)
{
	u16 port = mesh_bind(ctx);
	struct mesh_parties who;

	if (port)
		mesh_flow_begin(sock, netns_cookie, target, port);
	else
		mesh_count(MESH_COUNT_FLOW_FAILED); /* a protected receiver will refuse it */
	mesh_parties_of(sock, &who);
	mesh_flow_count(&who);
}

/* Does a datagram to `remote` answer one that came from there? `self` is the cookie of the namespace that sends it. */
static __always_inline bool mesh_is_answer(u64 self, u16 own_port, const struct mesh_addr *remote, const struct mesh_known *target, u16 port)
{
	struct mesh_flow_key key = { .source_port = port, .destination_port = own_port, .protocol = IPPROTO_UDP };

	mesh_end_of(remote, target, &key.source);
	mesh_addr_from_cookie(&key.destination, self);
	return mesh_flow.lookup(&key) != NULL;
}
