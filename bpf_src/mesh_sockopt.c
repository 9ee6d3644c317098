/* cgroup/getsockopt, attached to the waypoint's cgroup: answers SO_ORIGINAL_DST for connections that mesh_connect redirected, so that stock
 * Envoy's original_dst listener filter works without iptables. Other options and other sockets pass untouched.
 * A tunnel is always entered by IPv4: an AF_INET socket is answered with a sockaddr_in6 if that is where its caller wanted to go. */

#define MESH_SO_ORIGINAL_DST 80 /* and IP6T_SO_ORIGINAL_DST: include/uapi/linux/netfilter_ipv4.h, netfilter_ipv6/ip6_tables.h */

int mesh_getsockopt(struct bpf_sockopt *ctx)
{
	/* Two plain stores to optlen and retval are merged into one that the verifier refuses: store through volatile. */
	volatile struct bpf_sockopt *out = ctx;
	struct mesh_origdst_key key = {};
	struct mesh_origdst *found;
	struct bpf_sock *sk;
	u8 *value, *end;
	bool in4;

	if (ctx->optname != MESH_SO_ORIGINAL_DST || (ctx->level != IPPROTO_IP && ctx->level != IPPROTO_IPV6))
		return 1;
	sk = ctx->sk;
	if (!sk)
		return 1;
	key.netns_cookie = bpf_get_netns_cookie(ctx);
	key.source_port = bpf_ntohs(sk->dst_port);
	key.port = sk->src_port;
	in4 = sk->family == AF_INET;
	if (in4) {
		key.loopback = sk->src_ip4;
		mesh_keep_branch();
	} else {
		key.loopback = sk->src_ip6[3];
	}
	found = mesh_accepted.sk_storage_get(sk, 0, 0);
	if (!found)
		found = mesh_origdst.lookup(&key);
	if (!found)
		return 1;
	value = ctx->optval;
	end = ctx->optval_end;
	if (in4 && mesh_addr_is4(&found->address)) {
		struct sockaddr_in *in = (void *)value;

		if ((void *)(in + 1) > (void *)end)
			return 1;
		in->sin_family = AF_INET;
		in->sin_port = bpf_htons(found->port);
		in->sin_addr.s_addr = found->address.word[3];
		out->optlen = sizeof(*in);
	} else {
		struct sockaddr_in6 *in6 = (void *)value;

		if ((void *)(in6 + 1) > (void *)end)
			return 1;
		in6->sin6_family = AF_INET6;
		in6->sin6_port = bpf_htons(found->port);
		in6->sin6_flowinfo = 0;
		in6->sin6_addr.in6_u.u6_addr32[0] = found->address.word[0];
		in6->sin6_addr.in6_u.u6_addr32[1] = found->address.word[1];
		in6->sin6_addr.in6_u.u6_addr32[2] = found->address.word[2];
		in6->sin6_addr.in6_u.u6_addr32[3] = found->address.word[3];
		in6->sin6_scope_id = 0;
		out->optlen = sizeof(*in6);
	}
	out->retval = 0;
	return 1;
}
