/* Records and maps of socket acceleration (mesh_accelerate.c). Part of the layout, as mesh_types.h and mesh_maps.h are. */
#pragma once

enum mesh_end {
	MESH_CALLER = 0,
	MESH_RECEIVER = 1,
};

/* How one end sends. Chosen before its first byte, never changed after it. */
enum mesh_way {
	MESH_WAY_OPEN = 0,     /* nothing sent yet */
	MESH_WAY_REDIRECT = 1, /* into the other end's socket */
	MESH_WAY_TCP = 2,
};

/* One end of one connection. A socket cookie is not used again within a boot; the sequence number tells connections apart that one socket made
 * one after the other (connect, AF_UNSPEC, connect). No address is part of it, so that namespaces may have addresses in common. */
struct mesh_pair_key {
	__u64 caller;   /* cookie of the caller's socket */
	__u32 sequence; /* the caller's first */
	__u32 end;      /* enum mesh_end; MESH_CALLER in mesh_pair */
};

/* What both ends agreed on. */
struct mesh_pair {
	__u32 way;      /* enum mesh_way, never OPEN: no row means open */
	__u32 ended;    /* ends that are closed */
	__u64 bytes[2]; /* redirected, by enum mesh_end of the sender */
};

/* A connection as both ends see it. */
struct mesh_offer_key {
	struct mesh_addr caller;
	struct mesh_addr receiver;
	__u16 caller_port;   /* host order */
	__u16 receiver_port; /* host order */
};

/* Left by the caller before its ACK leaves, taken by the receiver when that ACK arrives. */
struct mesh_offer {
	struct mesh_pair_key key;
	__u32 receiver_sequence; /* the receiver's first */
	__u32 pad;
};

/* On each socket that is in mesh_peers. */
struct mesh_joined {
	struct mesh_pair_key key; /* its own */
	__u32 way;                /* enum mesh_way of this end */
	__u32 watches;            /* 1: this socket's BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG is ours to clear */
};

/* Not LRU: a row that vanished would change an agreement. When one is full, new connections are not accelerated. */
MESH_MAP("hash", struct mesh_offer_key, struct mesh_offer, mesh_offer, 65536, BPF_F_NO_PREALLOC);
MESH_MAP("hash", struct mesh_pair_key, struct mesh_pair, mesh_pair, 65536, BPF_F_NO_PREALLOC);
MESH_MAP("sk_storage", int, struct mesh_joined, mesh_joined, 0, BPF_F_NO_PREALLOC);

/* The accelerated sockets. mesh_sk_msg is attached to this map (BPF_SK_MSG_VERDICT), and runs for each sendmsg of a socket in it. */
struct mesh_peers_table_t {
	struct mesh_pair_key key;
	u64 leaf;
	int (*sock_hash_update)(void *, void *, u64);
	int (*msg_redirect_hash)(void *, void *, u64);
	int (*delete)(struct mesh_pair_key *);
	u32 max_entries;
	int flags;
};
__attribute__((section("maps/sockhash:" MESH_PIN "/mesh_peers")))
struct mesh_peers_table_t mesh_peers = { .max_entries = 131072 };
