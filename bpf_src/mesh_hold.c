/* A pod of Kubernetes has no socket of the Internet before the agent has it in the mesh.
 *
 * Who is to be in the mesh says so in its own net.ipv4.ip_local_reserved_ports, which the API server adds (deploy/helm/meshagent/templates/hold.yaml): the value
 * begins with MESH_HOLD_MARK. The container runtime writes that from inside the pod's cgroup, before the sandbox runs (runc, libcontainer/standard_init_linux.go).
 * So the kernel knows of the pod before anything can happen in it, whatever the agent is doing:
 * - mesh_sysctl takes the pod into mesh_held. If the agent is away it refuses to write: then there is no sandbox, and the kubelet tries again;
 * - mesh_socket refuses sockets to all processes of the pod while it is there. The agent takes it out.
 * A privileged container can write that, too. It holds nobody but its own pod.
 *
 * Where no pods are, as on a virtual machine, the agent says so by a row 0 of mesh_kubepods, and the setting is anybody's.
 *
 * A pod's cgroup is the first one below those of mesh_kubepods. Kernels before 6.4 cannot tell where a process that writes is
 * (bpf_get_current_ancestor_cgroup_id is not for cgroup/sysctl there): they refuse while the agent is away, and hold nobody. */

#define MESH_HOLD_NAME "net/ipv4/ip_local_reserved_ports"
#define MESH_HOLD_MARK "15001-15008" /* every port of the mesh in a pod: worth reserving in any case */
#define MESH_LEVELS 12               /* of cgroups; kind has pods on the sixth */
#define MESH_AWAY_NS (5ull * 1000000000)

/* The agent says so each second, once it knows where pods are. */
static __always_inline bool mesh_agent_is_here(void)
{
	u32 zero = 0;
	u64 *last = mesh_alive.lookup(&zero);

	return last && *last && bpf_ktime_get_ns() - *last < MESH_AWAY_NS;
}

/* Takes the pod of the running process into mesh_held; true also if there is none. False if there is no room, or the pod too deep to be found. */
static __always_inline bool mesh_hold(void)
{
	bool below = false;
#ifdef MESH_HAVE_SYSCTL_ANCESTOR
	u64 id, now = bpf_ktime_get_ns();
	struct mesh_event *event;
	bool news;
	u32 level;

	for (level = 1; level < MESH_LEVELS; level++) {
		id = bpf_get_current_ancestor_cgroup_id(level);
		if (!id)
			break;
		if (mesh_kubepods.lookup(&id)) {
			below = true;
			mesh_keep_branch(); /* or clang makes it an OR of pointers */
		} else if (below) {
			news = !mesh_held.lookup(&id);
			if (mesh_held.update(&id, &now))
				return false;
			if (!news) /* so that nobody who writes again and again fills the ring */
				return true;
			event = mesh_event_new(MESH_EVENT_HELD);
			if (event)
				mesh_event_send(event);
			return true;
		}
	}
#endif
	return !below;
}

static __always_inline bool mesh_pods_are_elsewhere(void)
{
	u64 none = 0;

	return mesh_kubepods.lookup(&none);
}

int mesh_sysctl(struct bpf_sysctl *ctx)
{
	char name[40] = {}, value[16] = {}, want[] = MESH_HOLD_NAME, mark[] = MESH_HOLD_MARK;
	u8 differ = 0;
	u32 i;

	if (!ctx->write || bpf_sysctl_get_name(ctx, name, sizeof(name), 0) != sizeof(want) - 1)
		return 1;
	bpf_sysctl_get_new_value(ctx, value, sizeof(value)); /* -E2BIG says that there is more: the beginning is here */
	/* All are looked at: of a loop that ends early clang makes a call of memcmp(), which programs do not have. */
#pragma unroll
	for (i = 0; i < sizeof(want) - 1; i++)
		differ |= name[i] ^ want[i];
#pragma unroll
	for (i = 0; i < sizeof(mark) - 1; i++)
		differ |= value[i] ^ mark[i];
	if (differ)
		return 1;
	if (mesh_pods_are_elsewhere())
		return 1;
	if (mesh_agent_is_here() && mesh_hold())
		return 1;
	mesh_count(MESH_COUNT_SANDBOX_REFUSED);
	return 0;
}

int mesh_socket(struct bpf_sock *ctx)
{
	u32 level;
	u64 id;

	for (level = 1; level < MESH_LEVELS; level++) {
		id = bpf_get_current_ancestor_cgroup_id(level);
		if (!id)
			break;
		if (mesh_held.lookup(&id)) {
			mesh_count(MESH_COUNT_SOCKET_HELD);
			return 0;
		}
	}
	return 1;
}
