/* Shared structs and enums: the only definition of every layout. The loader reads sizes and offsets from here (agent/bpf/manifest.py). */
#pragma once

/* Ports of the waypoint inside a pod's namespace; host order. */
#define MESH_OUTBOUND_PORT 15001
#define MESH_TUNNEL_PORT 15002
#define MESH_EGRESS_PORT 15003
#define MESH_INBOUND_PORT 15006
#define MESH_HBONE_PORT 15008
/* Port of the mesh's name server inside a pod's namespace, on loopback; host order. */
#define MESH_DNS_PORT 15053
#define MESH_DNS_SERVICE_PORT 53

/* IPv6 address, or an IPv4 address mapped to ::ffff:a.b.c.d (RFC 4291, 2.5.5.2). One key form serves both families. */
struct mesh_addr {
	__be32 word[4];
};

/* Numbers are never reused: they stand in logs and dashboards. */
enum mesh_verdict {
	MESH_VERDICT_NONE = 0,     /* no policy protects the destination */
	MESH_VERDICT_ALLOW = 1,
	MESH_VERDICT_DENY = 2,
	MESH_VERDICT_WAYPOINT = 3, /* only the request can decide: L7 */
};

enum mesh_reason {
	MESH_REASON_NONE = 0,
	MESH_REASON_POLICY = 1,       /* a rule said so */
	MESH_REASON_NO_ENTRY = 2,     /* the destination is protected, but the table has no row: closed */
	MESH_REASON_NO_BACKEND = 3,   /* the service has no ready endpoint */
	MESH_REASON_SPOOFED = 4,      /* source address of a local workload, but not its socket */
	MESH_REASON_NO_LISTENER = 5,  /* the waypoint's inbound listener is not there */
	MESH_REASON_WAYPOINT_PORT = 6, /* direct connection to a port that only redirection may use */
	MESH_REASON_UNKNOWN_ADDRESS = 7, /* an enrolled namespace was reached at an address that its workload does not declare */
	MESH_REASON_NO_PORT = 8,         /* the service has no such port */
	MESH_REASON_AUDIT = 9,           /* let through, but a rule that is only audited would deny */
	MESH_REASON_PLAINTEXT = 10,      /* the port is STRICT, and nobody on this node opened the connection */
	MESH_REASON_NO_TUNNEL = 11,      /* the destination is STRICT, and the waypoint is not ready to prove who it is */
	MESH_REASON_FAIL_OPEN = 12,      /* let through: the waypoint is away, and the service's fail mode is open */
	MESH_REASON_EGRESS = 13,         /* nobody declared the destination, and the caller may go nowhere else; or a name from outside led into the mesh */
	MESH_REASON_PROBE = 14,          /* let in whatever the policies say: the kubelet asks a pod of its node how it is */
};

enum mesh_direction {
	MESH_OUTBOUND = 0,      /* seen at the caller */
	MESH_INBOUND = 1,       /* seen at the receiver */
	MESH_FROM_WAYPOINT = 2, /* seen at the caller's waypoint, on its way to the backend */
};

enum mesh_event_kind {
	MESH_EVENT_DENIED = 0,      /* connect() or an incoming SYN was refused by the mesh */
	MESH_EVENT_CONNECT = 1,     /* connect() was decided */
	MESH_EVENT_ESTABLISHED = 2, /* handshake done; duration_ns since connect() */
	MESH_EVENT_CLOSED = 3,      /* duration_ns since connect(), or since accept at the receiver */
	MESH_EVENT_AUDITED = 4,     /* let through, but an audited rule would deny */
	MESH_EVENT_HELD = 5,        /* a pod is held back: the agent may have it in the mesh already */
};

enum mesh_close {
	MESH_CLOSE_NORMAL = 0,
	MESH_CLOSE_RESET = 1,  /* ended without the FIN handshake: reset or timed out */
	MESH_CLOSE_FAILED = 2, /* never established: given up before an answer came (ECANCELED) */
	MESH_CLOSE_REFUSED = 3,   /* never established: answered with a reset (ECONNREFUSED) */
	MESH_CLOSE_TIMED_OUT = 4, /* never established: no answer to more than one SYN (ETIMEDOUT) */
	MESH_CLOSE_MAX = 5,
};

enum mesh_counter {
	MESH_COUNT_EVENT_DROPPED = 0,     /* ring buffer full */
	MESH_COUNT_EVENT_SUPPRESSED = 1,  /* more denials than MESH_DENIALS_PER_SECOND on one CPU */
	MESH_COUNT_STATS_FOLDED = 2,      /* mesh_stats full: counted under the all-zero key */
	MESH_COUNT_STORAGE_FAILED = 3,    /* no socket storage: refused where policy or redirection needs it */
	MESH_COUNT_FLOW_FAILED = 4,       /* mesh_flow refused an entry: the receiver will not know the caller */
	MESH_COUNT_ORIGDST_FAILED = 5,    /* mesh_origdst refused an entry */
	MESH_COUNT_LISTENER_FAILED = 6,   /* mesh_listener refused a socket */
	MESH_COUNT_VERDICT_FOLDED = 7,    /* mesh_verdicts full */
	MESH_COUNT_REVERSE_FAILED = 8,    /* mesh_peer refused an entry: a datagram socket sees the endpoint instead of the service */
	MESH_COUNT_LOAD_FAILED = 9,       /* mesh_load full: the endpoint is chosen as if it were idle */
	MESH_COUNT_KERNEL_SOCKET = 10,    /* a kernel thread's connection inside an enrolled namespace, left alone */
	MESH_COUNT_FAIL_OPEN = 11,        /* a connection that went past an absent waypoint: MESH_SERVICE_FAIL_OPEN */
	MESH_COUNT_EVENT_UNLOGGED = 12,   /* more ends of logged connections than MESH_LOGGED_PER_SECOND on one CPU */
	MESH_COUNT_SOCKET_HELD = 13,      /* a socket refused to a pod that waits for the agent: mesh_hold.c */
	MESH_COUNT_SANDBOX_REFUSED = 14,  /* a pod that could not be held: the agent is away, or mesh_held full */
	MESH_COUNT_MAX = 15,
};

#define MESH_WORKLOAD_ENFORCE_INBOUND 1u /* L7 policy is enforced at the receiver even for connections from a local waypoint */
#define MESH_WORKLOAD_ACCELERATE 2u /* its connections to workloads of this node that have it too bypass TCP: mesh_accelerate.c */
#define MESH_WORKLOAD_TUNNEL 4u      /* on another node: reached through the waypoint's tunnel (HBONE), if there is one or the port is STRICT */
#define MESH_WORKLOAD_STRICT 8u      /* what comes from outside this node in plaintext is refused */
#define MESH_WORKLOAD_MTLS_PORTS 16u /* some of its ports have a row in mesh_mtls, which says both of the above in place of its own flags */
#define MESH_WORKLOAD_EGRESS_DENY 32u /* it may go to services and workloads, and nowhere else */
#define MESH_WORKLOAD_LOGGED 64u     /* the ends of its connections are reported */
#define MESH_WORKLOAD_PROBED 128u    /* the kubelet calls some of its ports: those with this bit in their row of mesh_mtls */
#define MESH_WORKLOAD_MTLS (MESH_WORKLOAD_TUNNEL | MESH_WORKLOAD_STRICT)

#define MESH_SERVICE_WAYPOINT 1u /* L7 */
#define MESH_SERVICE_LEAST 2u    /* the less loaded of two endpoints */
#define MESH_SERVICE_STICKY 4u   /* session affinity: mesh_affinity, mesh_member */
#define MESH_SERVICE_FAIL_OPEN 8u /* L4 will do as long as the waypoint is away */
#define MESH_SERVICE_STREAM 16u /* with MESH_SERVICE_WAYPOINT: not HTTP, to MESH_EGRESS_PORT */

/* SO_MARK of the waypoint's sockets to destinations outside the mesh: what a name resolves to is not ours to say, and must not lead inside. */
#define MESH_MARK_OUTSIDE 0x6d736865u

#define MESH_FLOW_WAYPOINT 1u /* opened by this node's waypoint */
#define MESH_FLOW_TRACED 2u
#define MESH_FLOW_ARRIVED 4u /* UDP: counted at the receiver */
#define MESH_FLOW_PROBE 8u   /* opened by this node's kubelet: of nobody in the mesh, so without a cookie */

/* Times and sizes that the agent may change while programs run. One element. */
struct mesh_config {
	__u64 waypoint_cgroup; /* cgroup2 id of Envoy; 0 = no waypoint */
	__u32 tracing;         /* number of rows in mesh_trace; 0 = do not look */
	__u32 pad;
};

/* The kubelet of this node. One element; all of it must fit. The agent writes a zero `process` before another kubelet, so that no moment mixes two. */
#define MESH_KUBELET_ANY 0xffffffffu
struct mesh_kubelet {
	__u32 process;  /* as the kernel counts them (init's PID namespace); 0 = there is none, MESH_KUBELET_ANY = whoever is in the cgroup */
	__u32 workload; /* stands for it in counters and events */
	__u64 cgroup;   /* cgroup2 id of its own cgroup; those below it do not count */
	__u64 netns_cookie; /* the node's own namespace */
};

/* Who somebody is to the policies, and what protects it, has two slots: a change of policies fills the slot that is not in force and then turns
 * mesh_epoch, so that the new policies hold everywhere at once and no moment mixes old and new.
 *
 * The kernel gives the memory of a row to the next one as soon as the row is replaced or removed (kernel/bpf/hashtab.c, htab_elem_free), while a
 * program that has found it is still reading. So what decides stands in one word with its owner, a digest of the row's key (mesh_owner), and a
 * program that reads somebody else's looks again. The words come first and are read last: they are the first that the kernel overwrites.
 *
 * A workload by netns cookie (enrolled on this node), or by address (on any node: an address is all that mesh_sk_lookup can see). */
struct mesh_workload {
	__u64 identity[2]; /* by epoch: owner << 32 | class of callers that no policy tells apart; 0 = like a stranger */
	__u64 policy[2];   /* by epoch: owner << 32 | policy set; 0 = none */
	__u64 netns_cookie; /* 0 = not enrolled on this node */
	__u32 id;    /* of the workload, for metrics; never 0 */
	__u32 flags; /* MESH_WORKLOAD_* */
	__u32 tunnel; /* lower 24 bits of the loopback address that stands for its SPIFFE ID at the tunnel listener; 0 = none, nobody can prove it yet */
	__u32 pad;
};

/* A port whose mode is not its workload's, or which the kubelet calls. The value is one word, as above: owner (mesh_mtls_owner) << 32 |
 * MESH_WORKLOAD_MTLS | MESH_WORKLOAD_PROBED. */
struct mesh_mtls_key {
	__u32 workload;
	__u16 port; /* host order */
	__u16 pad;
};

/* A stranger by CIDR block: the longest prefix that holds its address. */
struct mesh_block_key {
	__u32 prefix_length; /* in bits, of the 16-byte form */
	struct mesh_addr address;
};

struct mesh_block {
	__u32 identity[2]; /* by epoch */
};

struct mesh_service_key {
	struct mesh_addr address;
	__u16 port; /* host order */
	__u8 protocol;
	__u8 pad;
};

struct mesh_service {
	__u64 list;  /* owner << 32 | list of backends */
	__u32 id;    /* service port, for metrics; never 0 */
	__u32 count; /* rows in that list */
	__u32 flags; /* MESH_SERVICE_* */
	__u32 pad;
	__u64 affinity_ns; /* how long a caller stays with its endpoint after its last new connection; 0 = none */
};

struct mesh_backend_key {
	__u32 list;
	__u32 slot;
};

struct mesh_backend {
	struct mesh_addr address;
	__u32 workload;
	__u16 port; /* host order */
	__u16 pad;
	/* Weighted choice in constant time (Walker's alias method): of a slot drawn evenly, itself if a random number is at most `threshold`, else `alias`. */
	__u32 threshold;
	__u32 alias;
};

/* Is an endpoint still in a list? Only for lists that remember who went where. */
struct mesh_member_key {
	__u32 list;
	__u16 port; /* host order */
	__u16 pad;
	struct mesh_addr address;
};

struct mesh_affinity_key {
	__u64 netns_cookie; /* of the caller */
	__u32 service;
	__u32 ipv4;
};

struct mesh_affinity {
	__u64 used_ns; /* bpf_ktime_get_ns() of the last new connection */
	struct mesh_addr address;
	__u32 workload;
	__u16 port; /* host order */
	__u16 pad;
};

/* Open connections of this node to an endpoint, for MESH_SERVICE_LEAST. */
struct mesh_load_key {
	__u32 workload;
	__u16 port; /* host order */
	__u16 pad;
};

/* Looked up as (policy, identity, port), (policy, identity, 0), (policy, ANY, port), (policy, ANY, 0). */
#define MESH_IDENTITY_UNKNOWN 0u
#define MESH_IDENTITY_ANY 0xffffffffu
#define MESH_IDENTITY_NOBODY 0xfffffffeu /* of whom nothing can be said: let in nowhere that is protected */
#define MESH_POLICY_CLOSED 0xffffffffu /* the set without rows */
struct mesh_policy_key {
	__u32 policy;
	__u32 identity;
	__u16 port; /* host order; 0 = every port without a row of its own */
	__u8 protocol;
	__u8 pad;
};

struct mesh_policy {
	__u32 rule;    /* index of the rule that decided, for people */
	__u32 audit;   /* index of an audited rule that would deny; 0 = none */
	__u32 verdict; /* enum mesh_verdict */
};

/* Who opened a connection on this node: written before the SYN leaves, read where it arrives. Over UDP the place of an address of an enrolled
 * namespace is taken by its cookie (mesh_addr_from_cookie): a socket that is bound to no address does not know its own. */
struct mesh_flow_key {
	struct mesh_addr source;
	struct mesh_addr destination;
	__u16 source_port;      /* host order */
	__u16 destination_port; /* host order */
	__u32 protocol;
};

struct mesh_flow {
	__u64 netns_cookie; /* of the caller: its identity is looked up where the flow arrives, in the epoch that is in force there */
	__u32 workload;
	__u32 flags; /* MESH_FLOW_* */
	__u32 service;
	__u32 pad;
};

/* A datagram socket's correspondents by what it dialled, so that a flow keeps its endpoint, and by where the datagrams went, so that answers
 * seem to come from what was dialled. */
struct mesh_peer_key {
	__u64 socket_cookie;
	struct mesh_addr address;
	__u16 port; /* host order */
	__u16 reverse; /* 1: address and port are those of the endpoint */
	__u32 pad;
};

struct mesh_peer {
	struct mesh_addr address;
	__u32 workload;
	__u16 port; /* host order */
	__u16 pad;
};

/* A resolver that an enrolled namespace uses: its queries go to the mesh's name server in that namespace. With MESH_RESOLVER_ALLOWED in the cookie, which
 * only counts up from 1, the row says that it may be asked, also where MESH_WORKLOAD_EGRESS_DENY forbids all else. */
#define MESH_RESOLVER_ALLOWED (1ull << 63)
struct mesh_resolver_key {
	__u64 netns_cookie;
	struct mesh_addr address;
};

/* A redirected connection, by what the waypoint can see of it. Where it was redirected to is part of that: a caller's port may have connections to
 * several loopback addresses at a time. */
struct mesh_origdst_key {
	__u64 netns_cookie;
	__u16 source_port; /* host order */
	__u16 port;        /* of the listener, host order */
	__be32 loopback;   /* address of the listener, its last word: 127.x.y.z (also as ::ffff:127.x.y.z), or 1 of ::1 */
};

struct mesh_origdst {
	struct mesh_addr address;
	__u16 port; /* host order */
	__u16 pad;
};

struct mesh_listener_key {
	__u64 netns_cookie;
	__u32 ipv4;
	__u32 port; /* host order */
};

enum mesh_redirect {
	MESH_REDIRECT_NONE = 0,
	MESH_REDIRECT_WAYPOINT = 1, /* to the waypoint's outbound listener */
	MESH_REDIRECT_TUNNEL = 2,   /* to its tunnel listener */
};

/* Kept on the socket from connect() or accept to close. */
struct mesh_sock {
	__u64 start_ns;       /* bpf_ktime_get_ns() at connect() or at accept */
	__u64 established_ns; /* 0 = not yet */
	struct mesh_addr dialled; /* what the application asked for, and what it sees as its peer */
	struct mesh_addr remote;  /* where the call was sent */
	struct mesh_addr origdst; /* what the waypoint is told: as dialled, or the endpoint if only its policy asks for the waypoint */
	__u32 source;   /* workload id */
	__u32 target;   /* workload id; 0 = not known here */
	__u32 service;
	__u32 rule;
	__u16 dialled_port; /* host order, as all ports here */
	__u16 remote_port;
	__u16 origdst_port;
	__u16 load_port; /* of struct mesh_load_key; 0 = not counted there */
	__u8 direction; /* enum mesh_direction */
	__u8 verdict;   /* enum mesh_verdict */
	__u8 redirected; /* enum mesh_redirect */
	__u8 traced;
	__u8 protocol;
	__u8 loaded; /* 1: counted in mesh_load */
	__u8 accelerated; /* 1: both ends want it, this end is asked; what became of it is in mesh_joined */
	__u8 logged; /* 1: its end is reported */
	__u8 probe;  /* 1: the kubelet's, which no policy decides about */
	__u8 spare_bytes[7];
	__u64 spare[3]; /* socket storage cannot move to a map of another layout: room for what comes */
};

struct mesh_stats_key {
	__u32 source;
	__u32 target;
	__u32 service;
	__u16 port; /* host order, as dialled (outbound) or listened on (inbound) */
	__u8 direction; /* enum mesh_direction, and MESH_STATS_TUNNELLED */
	__u8 protocol;
};
#define MESH_STATS_TUNNELLED 128u /* through a tunnel to another node */

#define MESH_BUCKETS 16
/* Upper bounds are 2^(slot + MESH_BUCKET_SHIFT) ns: 16.4 us, 32.8 us, ... 0.27 s, 0.54 s; the last slot has no bound. */
#define MESH_BUCKET_SHIFT 14
struct mesh_stats {
	__u64 opened; /* connections; over UDP flows: a socket and whom it talks to */
	__u64 closed[MESH_CLOSE_MAX]; /* by enum mesh_close; never over UDP, which has no end */
	__u64 sent_bytes;             /* payload acknowledged by the peer */
	__u64 received_bytes;
	__u64 retransmits; /* segments */
	__u64 connect_ns;  /* sum over opened */
	__u64 rtt_ns;      /* sum over closed of the smoothed RTT */
	__u64 connect_bucket[MESH_BUCKETS];
	__u64 rtt_bucket[MESH_BUCKETS];
};

struct mesh_verdict_key {
	__u32 source;
	__u32 target;
	__u32 service;
	__u32 rule;
	__u8 verdict;
	__u8 direction;
	__u8 reason;
	__u8 protocol;
};

/* A pair that somebody traces: `target` and `service` are each 0 or set, never both. */
struct mesh_trace_key {
	__u32 source;
	__u32 target;
	__u32 service;
};

struct mesh_event {
	__u64 time_ns; /* bpf_ktime_get_ns(): CLOCK_MONOTONIC */
	__u64 socket_cookie;
	__u64 duration_ns;
	__u64 sent_bytes;
	__u64 received_bytes;
	struct mesh_addr local_address;
	struct mesh_addr dialled_address;
	struct mesh_addr remote_address; /* where the connection really went */
	__u32 source;
	__u32 target;
	__u32 service;
	__u32 rule;
	__u32 pid;
	__u32 rtt_us;
	__u32 retransmits;
	__u16 local_port;
	__u16 dialled_port;
	__u16 remote_port;
	__u8 kind;      /* enum mesh_event_kind */
	__u8 verdict;   /* enum mesh_verdict */
	__u8 direction; /* enum mesh_direction */
	__u8 reason;    /* enum mesh_reason, or enum mesh_close in MESH_EVENT_CLOSED */
	__u8 redirected; /* enum mesh_redirect */
	__u8 protocol;
	char comm[16];
};

/* Per-CPU budgets for events that nobody traces, so that a flood of connections costs no user-space time. */
#define MESH_DENIALS_PER_SECOND 50
#define MESH_LOGGED_PER_SECOND 500
#define MESH_BUDGET_DENIALS 0
#define MESH_BUDGET_LOGGED 1
#define MESH_BUDGETS 2
struct mesh_budget {
	__u64 window_ns;
	__u64 used;
};
