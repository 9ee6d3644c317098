/* Every map, with its capacity. All are pinned below MESH_PIN, a directory named after the layout (agent/bpf/loader.py). */
#pragma once

/* bcc turns member calls into helper calls; this is its table shape with the members that these programs use.
 * https://github.com/iovisor/bcc/blob/master/docs/reference_guide.md#maps */
#define MESH_MAP(_type, _key, _leaf, _name, _entries, _flags) \
struct _name##_table_t { \
	_key key; \
	_leaf leaf; \
	_leaf *(*lookup)(_key *); \
	int (*update)(_key *, _leaf *); \
	int (*insert)(_key *, _leaf *); \
	int (*delete)(_key *); \
	void *(*sk_storage_get)(void *, void *, int); \
	int (*sk_storage_delete)(void *); \
	int (*sock_hash_update)(void *, void *, u64); \
	u32 max_entries; \
	int flags; \
}; \
__attribute__((section("maps/" _type ":" MESH_PIN "/" #_name))) \
struct _name##_table_t _name = { .max_entries = (_entries), .flags = (_flags) }; \
BPF_ANNOTATE_KV_PAIR(_name, _key, _leaf)

/* Configuration, written by the agent, read here. */
MESH_MAP("array", u32, struct mesh_config, mesh_config, 1, 0);
MESH_MAP("array", u32, u32, mesh_epoch, 1, 0); /* 0 or 1 */
MESH_MAP("array", u32, struct mesh_kubelet, mesh_kubelet, 1, 0);
MESH_MAP("hash", u64, struct mesh_workload, mesh_workload, 4096, BPF_F_NO_PREALLOC);
MESH_MAP("hash", struct mesh_addr, struct mesh_workload, mesh_address, 262144, BPF_F_NO_PREALLOC);
MESH_MAP("hash", struct mesh_mtls_key, u64, mesh_mtls, 65536, BPF_F_NO_PREALLOC);
MESH_MAP("hash", struct mesh_service_key, struct mesh_service, mesh_service, 65536, BPF_F_NO_PREALLOC);
MESH_MAP("hash", struct mesh_backend_key, struct mesh_backend, mesh_backend, 524288, BPF_F_NO_PREALLOC);
MESH_MAP("hash", struct mesh_member_key, u32, mesh_member, 131072, BPF_F_NO_PREALLOC);
MESH_MAP("lpm_trie", struct mesh_block_key, struct mesh_block, mesh_block, 65536, BPF_F_NO_PREALLOC);
MESH_MAP("hash", struct mesh_resolver_key, u32, mesh_resolver, 16384, BPF_F_NO_PREALLOC);
MESH_MAP("hash", struct mesh_policy_key, struct mesh_policy, mesh_policy, 524288, BPF_F_NO_PREALLOC);
MESH_MAP("hash", struct mesh_trace_key, u32, mesh_trace, 1024, BPF_F_NO_PREALLOC);

MESH_MAP("hash", u64, u32, mesh_kubepods, 64, BPF_F_NO_PREALLOC); /* ids of the cgroups that have pods' cgroups in them; 0: there are none on this machine */
MESH_MAP("array", u32, u64, mesh_alive, 1, 0);                    /* bpf_ktime_get_ns() of the agent's last sign of life; 0: it has ended */

/* Ids of the cgroups of pods that wait to be in the mesh, and since when: written here, taken out by the agent. */
MESH_MAP("hash", u64, u64, mesh_held, 4096, BPF_F_NO_PREALLOC);

/* State of connections, written here. LRU: an entry matters only during a handshake; one that is evicted too early fails closed. */
MESH_MAP("lru_hash", struct mesh_flow_key, struct mesh_flow, mesh_flow, 65536, 0);
MESH_MAP("lru_hash", struct mesh_origdst_key, struct mesh_origdst, mesh_origdst, 65536, 0);
MESH_MAP("lru_hash", struct mesh_peer_key, struct mesh_peer, mesh_peer, 65536, 0);
MESH_MAP("lru_hash", struct mesh_affinity_key, struct mesh_affinity, mesh_affinity, 65536, 0);
MESH_MAP("hash", struct mesh_load_key, u64, mesh_load, 65536, BPF_F_NO_PREALLOC);
MESH_MAP("sk_storage", int, struct mesh_sock, mesh_sock, 0, BPF_F_NO_PREALLOC);
MESH_MAP("sk_storage", int, struct mesh_origdst, mesh_accepted, 0, BPF_F_NO_PREALLOC); /* on the waypoint's end of a redirected connection */

/* Results, written here, read by the agent. */
MESH_MAP("percpu_hash", struct mesh_stats_key, struct mesh_stats, mesh_stats, 16384, BPF_F_NO_PREALLOC);
MESH_MAP("percpu_hash", struct mesh_verdict_key, u64, mesh_verdicts, 16384, BPF_F_NO_PREALLOC);
MESH_MAP("percpu_array", u32, u64, mesh_counter, MESH_COUNT_MAX, 0);
MESH_MAP("percpu_array", u32, struct mesh_budget, mesh_budget, MESH_BUDGETS, 0);
MESH_MAP("array", u32, struct mesh_stats, mesh_blank, 1, 0); /* never written: all zero */

/* The waypoint's listening sockets for what comes in: mesh_sk_lookup hands connections to them. */
struct mesh_listener_table_t {
	struct mesh_listener_key key;
	u64 leaf;
	struct bpf_sock *(*lookup)(struct mesh_listener_key *);
	int (*sock_hash_update)(void *, void *, u64);
	u32 max_entries;
	int flags;
};
__attribute__((section("maps/sockhash:" MESH_PIN "/mesh_listener")))
struct mesh_listener_table_t mesh_listener = { .max_entries = 8192 };

/* Records are struct mesh_event. */
struct mesh_events_table_t {
	int key;
	struct mesh_event leaf;
	void *(*ringbuf_reserve)(u64);
	void (*ringbuf_submit)(void *, u64);
	u32 max_entries;
};
__attribute__((section("maps/ringbuf:" MESH_PIN "/mesh_events")))
struct mesh_events_table_t mesh_events = { .max_entries = 1 << 20 };
