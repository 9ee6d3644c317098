/* Which endpoint a new connection goes to. */
#pragma once

/* What a row says of a service port. */
struct mesh_known_service {
	u32 id;
	u32 list;
	u32 count;
	u32 flags;
	u64 affinity_ns;
};

/* False if the row has become another's while it was read: then it has no endpoint. */
static __always_inline bool mesh_read_service(const struct mesh_service *row, u32 owner, struct mesh_known_service *known)
{
	u64 list;

	known->id = *(volatile const u32 *)&row->id;
	known->count = *(volatile const u32 *)&row->count;
	known->flags = *(volatile const u32 *)&row->flags;
	known->affinity_ns = *(volatile const u64 *)&row->affinity_ns;
	list = *(volatile const u64 *)&row->list;
	known->list = list;
	if (list >> 32 == owner)
		return true;
	known->count = 0;
	return false;
}

/* The service at an address and port; false if there is none. */
static __always_inline bool mesh_know_service(const struct mesh_addr *address, u16 port, u8 protocol, struct mesh_known_service *known)
{
	struct mesh_service_key key = { .address = *address, .port = port, .protocol = protocol };
	u32 owner = mesh_owner(address) ^ (port | (u32)protocol << 16) * 0x27d4eb2fu;
	struct mesh_service *row = mesh_service.lookup(&key);

	if (row && mesh_read_service(row, owner, known))
		return true;
	if (row)
		row = mesh_service.lookup(&key);
	if (row)
		mesh_read_service(row, owner, known);
	return row != NULL;
}

/* One endpoint at random, each by its weight: an even draw of a slot, then that slot or its alias. */
static __always_inline struct mesh_backend *mesh_draw(u32 list, u32 count)
{
	struct mesh_backend_key key = { .list = list, .slot = ((u64)bpf_get_prandom_u32() * count) >> 32 };
	struct mesh_backend *backend = mesh_backend.lookup(&key);

	if (!backend || backend->threshold == 0xffffffff || bpf_get_prandom_u32() <= backend->threshold)
		return backend;
	key.slot = backend->alias;
	return mesh_backend.lookup(&key);
}

static __always_inline u64 mesh_load_of(struct mesh_backend *backend)
{
	struct mesh_load_key key = { .workload = backend->workload, .port = backend->port };
	u64 *open = mesh_load.lookup(&key);

	return open ? *open : 0;
}

/* The endpoint at an address, if it is still in the list. */
static __always_inline struct mesh_backend *mesh_member_of(u32 list, const struct mesh_addr *address, u16 port)
{
	struct mesh_member_key key = { .list = list, .port = port, .address = *address };
	u32 *slot = mesh_member.lookup(&key);
	struct mesh_backend_key place = { .list = list };

	if (!slot)
		return NULL;
	place.slot = *slot;
	return mesh_backend.lookup(&place);
}

/* An endpoint for a new connection of the caller with this cookie, or NULL if the service has none. */
static __always_inline struct mesh_backend *mesh_choose(const struct mesh_known_service *service, u64 netns_cookie, bool ipv4, u64 now)
{
	struct mesh_affinity_key client = { .netns_cookie = netns_cookie, .service = service->id, .ipv4 = ipv4 };
	struct mesh_backend *backend, *other;
	struct mesh_affinity *kept;

	if (!service->count)
		return NULL;
	if (service->flags & MESH_SERVICE_STICKY) {
		kept = mesh_affinity.lookup(&client);
		if (kept && now - kept->used_ns < service->affinity_ns) {
			backend = mesh_member_of(service->list, &kept->address, kept->port);
			if (backend) {
				kept->used_ns = now;
				return backend;
			}
		}
	}
	backend = mesh_draw(service->list, service->count);
	if (backend && service->flags & MESH_SERVICE_LEAST) { /* the power of two choices: Mitzenmacher, 2001 */
		other = mesh_draw(service->list, service->count);
		if (other && mesh_load_of(other) < mesh_load_of(backend))
			backend = other;
	}
	if (backend && service->flags & MESH_SERVICE_STICKY) {
		struct mesh_affinity fresh = { .used_ns = now, .address = backend->address, .workload = backend->workload, .port = backend->port };

		mesh_affinity.update(&client, &fresh);
	}
	return backend;
}
