"""Compiles the model to kernel rows and brings the kernel's tables to that state, so that every moment in between is safe.

Called by the supervisor with each new snapshot and each workload that comes or goes. Two ways lead to the same rows: `_everything` compares all of them
with what the kernel holds; `_difference` touches only what a snapshot's delta names, as long as policies and classes of callers stay as they are.

Policy sets and backend lists are named by their content and never change in place: new ones are written first, then whoever points to them is switched,
one atomic row each, and the old ones are retired: they stay until no program can be on its way to them. Who is who to the policies has two slots in
each row, and all rows change over at once (bpf_src/mesh_types.h).
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType

from agent import addresses
from agent.balancing import preferred
from agent.bpf import libbpf
from agent.bpf import manifest as m
from agent.bpf.epoch import Epoch
from agent.bpf.maps import Map, Mirror
from agent.bpf.rows import Known, Layouts, Rows
from agent.ids import Ids
from agent.model import NO_DIRECT, Delta, Direct, LocalWorkload, Mtls, Service, Snapshot, Workload, port_name
from agent.observability import Observability
from agent.policy import TCP, UDP, Caller, Classes, Verdict, block, compile_rows, protecting

_PROTOCOLS = {TCP: 6, UDP: 17}  # IPPROTO_TCP, IPPROTO_UDP
_VERDICTS = {
    Verdict.NONE: m.Verdict.NONE,
    Verdict.ALLOW: m.Verdict.ALLOW,
    Verdict.DENY: m.Verdict.DENY,
    Verdict.WAYPOINT: m.Verdict.WAYPOINT,
}
_ALWAYS = 0xFFFFFFFF
_RETIREMENT_S = 1.0
"""A program cannot sleep: by then it has ended."""
Endpoint = tuple[Workload, int]
NO_TUNNELS: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Namespace:
    """A local workload with every address found in its namespace, declared or not. A pod that declares none has those that were found (`agent.enrolment`)."""

    local: LocalWorkload
    addresses: tuple[str, ...]


@dataclass(slots=True)
class _Policies:
    """The compiled policies of one snapshot."""

    classes: Classes
    sets: dict[tuple[str, ...], int]
    identities: dict[frozenset[int], int]
    """Of every class that callers have."""


class Tables:
    """The maps that hold configuration. Not thread-safe: called from one task."""

    ORDER = ("mesh_backend", "mesh_member", "mesh_policy", "mesh_mtls", "mesh_block", "mesh_address", "mesh_workload", "mesh_service")

    def __init__(self, maps: Mapping[str, Map], ids: Ids, trust_domain: str, node: str) -> None:
        """Take over what the kernel holds. `node` is this one."""
        self._ids = ids
        self._trust_domain = trust_domain
        self._node = node
        self.mirrors = {name: Mirror(maps[name]) for name in self.ORDER}
        self._rows = Layouts(maps)
        self._epoch = Epoch(maps["mesh_epoch"], self.mirrors, self._rows)
        self._resolver = Mirror(maps["mesh_resolver"])
        self._redirected: frozenset[tuple[int, str]] | None = None
        self._askable: frozenset[tuple[int, str]] | None = None
        """None: nobody has said, what the kernel holds stays."""
        ids.start_above(max((n for name in self.ORDER for n in self._rows.numbers(name)), default=0))
        self._retired: deque[tuple[float, str, Sequence[bytes]]] = deque()
        """When (monotonic), and which rows of which map."""
        # What is in force, for `_difference`.
        self._snapshot: Snapshot | None = None
        self._policies: _Policies
        self._local: dict[str, Namespace] = {}
        self._flags: Mapping[str, int] = {}
        self._tunnels: Mapping[str, int] = NO_TUNNELS
        self._direct = NO_DIRECT
        self._zones: Counter[str] = Counter()
        self._endpoints: dict[tuple[str, int, str], dict[str, int]] = {}
        """Target port of each ready endpoint by its name; by service, port and protocol."""
        self._claims: dict[bytes, str | tuple[str, ...]] = {}
        self._held: dict[str, dict[bytes, tuple[int, int]]] = {}
        """Number and length of the list of each row of a service."""
        self._list_users: Counter[int] = Counter()
        self._members: dict[int, tuple[bytes, ...]] = {}

    def sync(
        self,
        snapshot: Snapshot,
        local: Sequence[Namespace],
        enforce_inbound: frozenset[str],
        accelerated: frozenset[str] = frozenset(),
        tunnels: Mapping[str, int] = NO_TUNNELS,
        direct: Direct = NO_DIRECT,
        switching: Callable[[], None] = lambda: None,
    ) -> int:
        """Make the kernel decide by `snapshot`; returns the number of rows written or removed.

        `enforce_inbound` names workloads whose L7 policy holds at the receiver even for this node's waypoint, `accelerated` those whose connections
        within the node may bypass TCP; `tunnels` numbers the SPIFFE IDs to which the waypoint has a tunnel now (`agent.tunnels`), `direct` says
        who needs none. Raises KernelRefused, before any row is switched, if a map is too small. `switching` is called once, when everything has been found
        to fit: right before the first row says something else about an address, a namespace or a service.
        """
        here = {n.local.workload.name: n for n in local}
        flags = dict.fromkeys(enforce_inbound, m.WORKLOAD_ENFORCE_INBOUND)
        for name in accelerated:
            flags[name] = flags.get(name, 0) | m.WORKLOAD_ACCELERATE
        observability = Observability(snapshot.telemetry)
        for name, namespace in here.items():
            if observability.logs_connections(namespace.local.workload.namespace):
                flags[name] = flags.get(name, 0) | m.WORKLOAD_LOGGED
        renumbered = frozenset(identity for identity, _ in self._tunnels.items() ^ tunnels.items())
        self._tunnels = dict(tunnels)
        turned, self._direct = direct != self._direct, direct
        before, self._snapshot = self._snapshot, None  # until it is done nothing is known about the kernel's state
        changed = None
        delta = Delta(snapshot.version) if snapshot is before else snapshot.delta
        if before is not None and delta is not None and delta.base == before.version and not turned:
            changed = self._difference(delta, before, snapshot, here, flags, renumbered, switching)
        if changed is None:
            changed = self._everything(snapshot, here, flags, switching)
        self._snapshot, self._local, self._flags = snapshot, here, flags
        return changed

    def remove_retired(self, *, now: bool = True) -> None:
        """Remove rows that nothing points to any more; `now`: also those that a program may still be on its way to, after waiting for it."""
        if now and self._retired:
            libbpf.wait_for_programs()
        while self._retired and (now or self._retired[0][0] + _RETIREMENT_S < time.monotonic()):
            _, name, keys = self._retired.popleft()
            self.mirrors[name].remove(keys)

    def _retire(self, name: str, keys: Sequence[bytes]) -> None:
        if keys:
            self._retired.append((time.monotonic(), name, keys))

    def set_resolvers(self, wanted: Iterable[tuple[int, str]]) -> None:
        """Redirect queries from namespaces (by cookie) to resolvers (by address) to the mesh's name server there, and no others."""
        self._redirected = frozenset(wanted)
        self._write_resolvers()

    def allow_resolvers(self, wanted: Iterable[tuple[int, str]]) -> None:
        """Let namespaces (by cookie) ask resolvers (by address) on port 53 whatever their egress is, and no others."""
        self._askable = frozenset(wanted)
        self._write_resolvers()

    def _write_resolvers(self) -> None:
        held = self._resolver.read()
        pairs = {*(self._redirected or ()), *((cookie | m.RESOLVER_ALLOWED, address) for cookie, address in self._askable or ())}
        rows = {self._rows.resolver_key(cookie, addresses.packed(address)): self._rows.resolver(1) for cookie, address in pairs}
        for key in held:
            allows = bool(self._resolver.map.layout.key.unpack(key)["netns_cookie"] & m.RESOLVER_ALLOWED)
            if (self._askable if allows else self._redirected) is None:
                rows[key] = self._rows.resolver(1)
        self._resolver.check(len(rows))
        self._resolver.remove(held.keys() - rows.keys())
        self._resolver.write({key: row for key, row in rows.items() if held.get(key) != row})

    # Everything.

    def _everything(
        self, snapshot: Snapshot, here: Mapping[str, Namespace], flags: Mapping[str, int], switching: Callable[[], None]
    ) -> int:
        self.remove_retired()
        self._index(snapshot, here)
        policies, policy_rows, blocks = self._compile_policies(snapshot, here)
        backend: Rows = {}
        member: Rows = {}
        service: Rows = {}
        self._held, self._list_users, self._members = {}, Counter(), {}
        for item in snapshot.services.values():
            self._service(item, snapshot.workloads, service, backend, member)
        address: dict[bytes, Known] = {}
        for raw in self._claims:
            row = self._address(raw, snapshot, here, policies, flags)
            if row:
                address[raw] = row
        namespaces = {self._rows.cookie(n.local.netns_cookie): self._known(n.local.workload, n, policies, flags) for n in here.values()}
        mtls: Rows = {}
        for workload in snapshot.workloads.values():
            mtls |= self._mtls(workload)
        mirrors = self.mirrors
        plain = {"mesh_backend": backend, "mesh_member": member, "mesh_policy": policy_rows, "mesh_mtls": mtls, "mesh_service": service}
        needed = {name: len(rows) for name, rows in plain.items()}
        needed |= {"mesh_block": len(blocks), "mesh_address": len(address), "mesh_workload": len(namespaces)}
        for name, number in needed.items():
            mirrors[name].check(number)
        self._ids.save()
        stale = {}
        changed = 0
        for name in ("mesh_backend", "mesh_member", "mesh_policy", "mesh_mtls"):
            stale[name], fresh = self._compare(mirrors[name], plain[name])
            changed += mirrors[name].write(fresh)
        stale["mesh_service"], fresh = self._compare(mirrors["mesh_service"], service)
        standing, number = self._epoch.bring(blocks, address, namespaces, switching)
        changed += number + mirrors["mesh_service"].write(fresh)
        stale |= standing
        for name, keys in stale.items():
            mirrors[name].count = needed[name] + len(keys)
        for name in ("mesh_service", "mesh_workload", "mesh_address", "mesh_block"):
            changed += mirrors[name].remove(stale[name])
        for name in ("mesh_policy", "mesh_mtls", "mesh_member", "mesh_backend"):  # what those point to
            self._retire(name, list(stale[name]))
            changed += len(stale[name])
        self._policies = policies
        self._ids.keep("policy-set", map(self._ids.name, policies.sets.values()))
        self._ids.keep("list", map(self._ids.name, self._list_users))
        return changed

    @staticmethod
    def _compare(mirror: Mirror, wanted: Rows) -> tuple[set[bytes], Rows]:
        """The keys that are not wanted any more, and the rows to write. Raises KernelRefused if there is no room for both."""
        held = mirror.read()
        stale = held.keys() - wanted.keys()
        fresh = {key: row for key, row in wanted.items() if held.get(key) != row}
        mirror.check(len(held.keys() | wanted.keys()))
        return stale, fresh

    # What is known of the model, kept for the next difference.

    def _index(self, snapshot: Snapshot, here: Mapping[str, Namespace]) -> None:
        self._endpoints, self._claims, self._zones = {}, {}, Counter()
        for workload in snapshot.workloads.values():
            self._add(workload, here.get(workload.name))

    def _add(self, workload: Workload, namespace: Namespace | None) -> None:
        if workload.zone and workload.node == self._node:
            self._zones[workload.zone] += 1
        # Now, before any row: what stays must not lie between what goes again, or the memory of that could not be given back.
        self._ids.number("workload", workload.name)
        for raw in _addresses(workload, namespace):
            claimed = self._claims.get(raw)
            if claimed is None:
                self._claims[raw] = workload.name
            elif claimed != workload.name:
                self._claims[raw] = (*((claimed,) if isinstance(claimed, str) else claimed), workload.name)
        if workload.ready:
            for backing in workload.backing:
                for protocol in (TCP, UDP):
                    for port, target in backing.targets(protocol).items():
                        self._endpoints.setdefault((backing.service, port, protocol), {})[workload.name] = target

    @property
    def _zone(self) -> str:
        """As `agent.balancing.node_zone`."""
        found = [zone for zone, number in self._zones.items() if number > 0]
        return found[0] if len(found) == 1 else ""

    def _drop(self, workload: Workload, namespace: Namespace | None) -> None:
        if workload.zone and workload.node == self._node:
            self._zones[workload.zone] -= 1
        for raw in _addresses(workload, namespace):
            claimed = self._claims.get(raw)
            rest = tuple(n for n in ((claimed,) if isinstance(claimed, str) else claimed or ()) if n != workload.name)
            if not rest:
                self._claims.pop(raw, None)
            else:
                self._claims[raw] = rest[0] if len(rest) == 1 else rest
        for backing in workload.backing:
            for protocol in (TCP, UDP):
                for port in backing.targets(protocol):
                    found = self._endpoints.get((backing.service, port, protocol))
                    if found is not None:
                        found.pop(workload.name, None)
                        if not found:
                            del self._endpoints[backing.service, port, protocol]

    # Rows.

    def _identity(self, classes: Classes, members: frozenset[int]) -> int:
        if members == classes.stranger:
            return m.IDENTITY_UNKNOWN
        return self._ids.number("class", _digest(repr(classes.sources[i]) for i in sorted(members)))

    def _compile_policies(self, snapshot: Snapshot, here: Mapping[str, Namespace]) -> tuple[_Policies, Rows, dict[bytes, int]]:
        """The policies, the rows of every distinct set of them, and the identity of each block of addresses. A set without policies has number 0."""
        classes = Classes(snapshot.policies.values())
        blocks = classes.blocks()
        present = {classes.stranger, *blocks.values()}
        for workload in chain(snapshot.workloads.values(), (n.local.workload for n in here.values())):
            present.add(classes.of_workload(workload, self._trust_domain))
            if workload.node == self._node:
                present.add(classes.of(Caller(addresses=workload.addresses)))
        identities = {members: self._identity(classes, members) for members in present}
        known = present - {classes.stranger}
        numbers: dict[tuple[str, ...], int] = {}
        rows: Rows = {}
        for names, workload in {w.policies: w for w in snapshot.workloads.values()}.items():
            compiled = compile_rows(protecting(workload, snapshot), classes, known)
            if not compiled:
                numbers[names] = 0
                continue
            name = _digest(
                f"{m.IDENTITY_ANY if members is None else identities[members]} {protocol} {port} {decision}"
                for (members, protocol, port), decision in compiled.items()
            )
            number = numbers[names] = self._ids.number("policy-set", name)
            for (members, protocol, port), decision in compiled.items():
                identity = m.IDENTITY_ANY if members is None else identities[members]
                rows[self._rows.policy_key(number, identity, port, _PROTOCOLS[protocol])] = self._rows.policy(
                    self._ids.number("rule", decision.rule) if decision.rule else 0,
                    self._ids.number("rule", decision.audit) if decision.audit else 0,
                    _VERDICTS[decision.verdict],
                )
        blocks_rows = {
            self._rows.block_key(_bits(text), addresses.packed(str(block(text).network_address))): identities[members]
            for text, members in blocks.items()
        }
        return _Policies(classes, numbers, identities), rows, blocks_rows

    def _known(self, workload: Workload, namespace: Namespace | None, policies: _Policies, flags: Mapping[str, int]) -> Known:
        """What everybody may know about a workload."""
        # Of a workload of this node that is in no namespace nobody can vouch: whoever uses its address now came after it.
        vouched = namespace is not None or workload.node != self._node
        classes = policies.classes
        members = classes.of_workload(workload, self._trust_domain) if vouched else classes.of(Caller(addresses=workload.addresses))
        return Known(
            namespace.local.netns_cookie if namespace else 0,
            self._ids.number("workload", workload.name),
            flags.get(workload.name, 0)
            | self._modes(workload, workload.mtls)
            | (m.WORKLOAD_MTLS_PORTS if workload.mtls_ports else 0)
            | (m.WORKLOAD_EGRESS_DENY if workload.egress_deny else 0)
            | (m.WORKLOAD_PROBED if self._probed(workload) else 0),
            self._tunnels.get(workload.identity(self._trust_domain), 0) if self._tunnelled(workload) else 0,
            policies.identities[members],
            policies.sets[workload.policies],
        )

    def _tunnelled(self, workload: Workload) -> bool:
        """Can callers of this node have to take a tunnel to it?"""
        return workload.node != self._node and (workload.mtls is not Mtls.DISABLE or bool(workload.mtls_ports))

    def _modes(self, workload: Workload, mode: Mtls) -> int:
        """What a mode says to the kernel of this node. As long as the workload has no tunnel STRICT is refused, PERMISSIVE goes on in plaintext."""
        tunnel = m.WORKLOAD_TUNNEL if workload.node != self._node and self._direct.tunnels(workload, mode) else 0
        return tunnel | (m.WORKLOAD_STRICT if mode is Mtls.STRICT else 0)

    def _probed(self, workload: Workload) -> tuple[int, ...]:
        """The ports that this node's kubelet calls."""
        return workload.probe_ports if workload.node == self._node and workload.enrolled else ()

    def _mtls(self, workload: Workload) -> Rows:
        """Rows of the ports that have a mode of their own, or that the kubelet calls."""
        probed = self._probed(workload)
        if not workload.mtls_ports and not probed:
            return {}
        number = self._ids.number("workload", workload.name)
        words = {port: self._modes(workload, mode) for port, mode in workload.mtls_ports}
        words |= {port: self._modes(workload, workload.mtls_of(port)) | m.WORKLOAD_PROBED for port in probed}
        return {self._rows.mtls_key(number, port): self._rows.mtls(number, port, word) for port, word in words.items()}

    def _address(
        self, raw: bytes, snapshot: Snapshot, here: Mapping[str, Namespace], policies: _Policies, flags: Mapping[str, int]
    ) -> Known | None:
        """What is known of an address. One that two workloads claim is that one's whose namespace really has it, otherwise nobody's: closed."""
        claimed = self._claims.get(raw)
        if claimed is None:
            return None
        names = (claimed,) if isinstance(claimed, str) else claimed
        if len(names) > 1:
            text = addresses.text(raw)
            having = [n for n in names if n in here and text in here[n].addresses]
            # What a pod gave itself never takes the place of another's declared address.
            declared = [n for n in having if text in snapshot.workloads[n].addresses]
            names = tuple(declared or (having if not any(text in snapshot.workloads[n].addresses for n in names) else ()))
        if len(names) != 1:
            return None
        return self._known(snapshot.workloads[names[0]], here.get(names[0]), policies, flags)

    def _service(self, service: Service, workloads: Mapping[str, Workload], rows: Rows, backend: Rows, member: Rows) -> None:
        """Rows of a service; its lists are remembered."""
        held = self._held[service.name] = {}
        for address in service.addresses:
            raw = addresses.packed(address)
            if (
                service.external is None or not service.external.fixed
            ):  # at an outside host's own address there may be more than is declared
                key = self._rows.service_key(raw, 0, 0)
                rows[key] = self._rows.service(key, 0, 0, 0, 0, 0)  # "there is a service here"
                held[key] = (0, 0)
            for port in service.ports:
                key = self._rows.service_key(raw, port.port, _PROTOCOLS[port.protocol])
                found = self._endpoints.get((service.name, port.port, port.protocol), {})
                endpoints = [(workloads[name], found[name]) for name in sorted(found)]
                chosen = preferred(endpoints, service.traffic_distribution, self._node, self._zone)
                ways = self._ways(chosen, ipv4=addresses.is_ipv4(raw))
                keeps = bool(service.affinity_s) or port.protocol == UDP
                flags = (
                    (m.SERVICE_WAYPOINT if port.waypoint else 0)
                    | (m.SERVICE_LEAST if service.load_balancing == "least-connections" and port.protocol == TCP else 0)
                    | (m.SERVICE_STICKY if service.affinity_s else 0)
                    | (m.SERVICE_FAIL_OPEN if service.fail_open and service.external is None else 0)
                    | (m.SERVICE_STREAM if service.external is not None and service.external.is_stream(port) else 0)
                )
                listing, count = self._list(ways, backend, member if keeps else None)
                held[key] = (listing, count)
                self._list_users[listing] += 1
                number = self._ids.number("service", f"{service.name}:{port_name(port.port, port.protocol)}")
                rows[key] = self._rows.service(key, number, listing, count, flags, service.affinity_s * 1_000_000_000)

    def _ways(self, endpoints: Iterable[Endpoint], *, ipv4: bool) -> list[tuple[bytes, int, int, int]]:
        """(address, workload, port, weight) of each endpoint that has an address of the family, in a stable order."""
        found = []
        for workload, port in endpoints:
            for raw in map(addresses.packed, workload.addresses):
                if addresses.is_ipv4(raw) == ipv4:
                    found.append((raw, self._ids.number("workload", workload.name), port, workload.weight))
                    break
        return found

    def _list(self, ways: list[tuple[bytes, int, int, int]], backend: Rows, member: Rows | None) -> tuple[int, int]:
        """Number and length of the list of these endpoints; its rows are added."""
        name = _digest([f"{'' if member is None else 'm'}", *map(repr, ways)])
        listing = self._ids.number("list", name)
        if self._list_users[listing] > 0:
            return listing, len(ways)
        for slot, ((raw, workload, port, _), (threshold, alias)) in enumerate(zip(ways, _aliases([w[3] for w in ways]), strict=True)):
            backend[self._rows.backend_key(listing, slot)] = self._rows.backend(raw, workload, port, threshold, alias)
            if member is not None:
                member[self._rows.member_key(listing, port, raw)] = self._rows.member(slot)
        if member is not None:
            self._members[listing] = tuple(self._rows.member_key(listing, port, raw) for raw, _, port, _ in ways)
        return listing, len(ways)

    # The difference.

    def _difference(
        self,
        delta: Delta,
        before: Snapshot,
        snapshot: Snapshot,
        here: Mapping[str, Namespace],
        flags: Mapping[str, int],
        renumbered: frozenset[str],
        switching: Callable[[], None],
    ) -> int | None:
        """Touch only what differs. None, and nothing done in the kernel, if the policies or the classes of callers change."""
        policies = self._policies
        if delta.policies:
            return None
        moved = {name for name in self._local.keys() | here.keys() if self._local.get(name) != here.get(name)}
        flagged = {name for name in self._flags.keys() | flags.keys() if self._flags.get(name) != flags.get(name)}
        names = delta.workloads | moved | flagged
        touched = [(before.workloads.get(name), snapshot.workloads.get(name)) for name in names]
        for workload in chain(
            (new for _, new in touched if new is not None), (here[name].local.workload for name in names if name in here)
        ):
            if not self._classed(workload, policies):
                return None
        zone = self._zone
        raws, services = self._reindex(touched, here)
        if zone != self._zone:
            return None
        modes = self._mtls_difference(touched)
        for workload in snapshot.workloads.values() if renumbered else ():
            if self._tunnelled(workload) and workload.identity(self._trust_domain) in renumbered:
                raws |= _addresses(workload, None)
        address, closed = {}, []
        for raw in raws:
            if row := self._address(raw, snapshot, here, policies, flags):
                address[raw] = self._rows.known(raw, row)
            else:
                closed.append(raw)
        workload_rows = {
            key: self._rows.known(key, self._known(n.local.workload, n, policies, flags))
            for key, n in ((self._rows.cookie(n.local.netns_cookie), n) for n in (here[name] for name in names if name in here))
        }
        cookies = {n.local.netns_cookie for n in here.values()}
        left = [self._rows.cookie(n.local.netns_cookie) for n in self._local.values() if n.local.netns_cookie not in cookies]
        return self._write_difference(snapshot, delta.services | services, address, closed, workload_rows, left, modes, switching)

    def _mtls_difference(self, touched: Iterable[tuple[Workload | None, Workload | None]]) -> tuple[Rows, list[bytes]]:
        """Rows of ports to write, and keys of those to remove, if workloads are replaced, each (old, new)."""
        fresh: Rows = {}
        gone: list[bytes] = []
        for old, new in touched:
            before, after = (self._mtls(workload) if workload is not None else {} for workload in (old, new))
            fresh |= {key: row for key, row in after.items() if before.get(key) != row}
            gone += [key for key in before if key not in after]
        return fresh, gone

    def _reindex(
        self, touched: Iterable[tuple[Workload | None, Workload | None]], here: Mapping[str, Namespace]
    ) -> tuple[set[bytes], set[str]]:
        """Replace workloads, each (old, new), in what is known of the model; returns the addresses and the services that this concerns."""
        services: set[str] = set()
        raws: set[bytes] = set()
        for old, new in touched:
            for workload, namespaces in ((old, self._local), (new, here)):
                if workload is not None:
                    services.update(b.service for b in workload.backing)
                    raws.update(_addresses(workload, namespaces.get(workload.name)))
            if old is not None:
                self._drop(old, self._local.get(old.name))
            if new is not None:
                self._add(new, here.get(new.name))
        return raws, services

    def _classed(self, workload: Workload, policies: _Policies) -> bool:
        """Do the policy rows in force know this workload, as a caller and as a target?"""
        classes = policies.classes
        callers = (Caller.of(workload, self._trust_domain), Caller(addresses=workload.addresses))
        return workload.policies in policies.sets and all(classes.of(c) in policies.identities for c in callers)

    def _write_difference(
        self,
        snapshot: Snapshot,
        affected: Iterable[str],
        address: Rows,
        closed: list[bytes],
        workload: Rows,
        left: list[bytes],
        modes: tuple[Rows, list[bytes]],
        switching: Callable[[], None],
    ) -> int:
        mirrors = self.mirrors
        mtls, old_mtls = modes
        service: Rows = {}
        backend: Rows = {}
        member: Rows = {}
        # Unlike sets and lists a port may come back with the same key: what is to go must not take it along.
        self.remove_retired(now=any(name == "mesh_mtls" and not mtls.keys().isdisjoint(keys) for _, name, keys in self._retired))
        replaced = {name: self._held.pop(name, {}) for name in affected}
        for name in replaced:
            if name in snapshot.services:
                self._service(snapshot.services[name], snapshot.workloads, service, backend, member)
        for listing, _ in (
            pair for held in replaced.values() for pair in held.values()
        ):  # only now: a list that stays is not written again
            self._list_users[listing] -= 1
        gone = [key for held in replaced.values() for key in held if key not in service]
        unused = {listing: count for held in replaced.values() for listing, count in held.values() if self._list_users[listing] <= 0}
        old_members = [key for listing in unused for key in self._members.pop(listing, ())]
        old_backends = [self._rows.backend_key(listing, slot) for listing, count in unused.items() for slot in range(count)]
        lists = {"mesh_backend": backend, "mesh_member": member}
        pointing = {"mesh_mtls": mtls, "mesh_address": address, "mesh_workload": workload, "mesh_service": service}
        if any(mirrors[name].count + len(rows) > mirrors[name].map.capacity for name, rows in (lists | {"mesh_mtls": mtls}).items()):
            self.remove_retired()
        for name, rows in lists.items():
            mirrors[name].check(mirrors[name].count + len(rows))
        fresh = {name: mirrors[name].room_for(rows) for name, rows in pointing.items()}
        fresh |= {name: len(rows) for name, rows in lists.items()}
        self._ids.save()
        switching()
        changed = 0
        for name, rows in (lists | pointing).items():  # a port's mode before the row that says that there is one
            changed += mirrors[name].write(rows)
            mirrors[name].count += fresh[name]
        for name, keys in (("mesh_service", gone), ("mesh_workload", left), ("mesh_address", closed)):
            changed += mirrors[name].remove(keys)
        for name, keys in (("mesh_mtls", old_mtls), ("mesh_member", old_members), ("mesh_backend", old_backends)):
            self._retire(name, keys)
            changed += len(keys)
        for listing in unused:
            self._ids.forget("list", [self._ids.name(listing)])
            del self._list_users[listing]
        return changed


def _addresses(workload: Workload, namespace: Namespace | None) -> set[bytes]:
    """Every address that is this workload's, declared or found in its namespace."""
    return {addresses.packed(a) for a in (*workload.addresses, *(namespace.addresses if namespace else ()))}


def _bits(text: str) -> int:
    """Length of a block's prefix in the 16-byte form."""
    parsed = block(text)
    return parsed.prefixlen + (96 if parsed.version == 4 else 0)


def _aliases(weights: Sequence[int]) -> list[tuple[int, int]]:
    """(threshold, alias) of each slot: Vose's form of Walker's alias method. A slot is kept if a 32-bit random number is at most its threshold."""
    total, number = sum(weights), len(weights)
    if len(set(weights)) <= 1:
        return [(_ALWAYS, 0)] * number
    parts = [w * number for w in weights]  # in units of total: `total` is a full slot
    small = [i for i, part in enumerate(parts) if part < total]
    large = [i for i, part in enumerate(parts) if part >= total]
    found = [(_ALWAYS, 0)] * number
    while small and large:
        low, high = small.pop(), large[-1]
        found[low] = (max(0, (parts[low] << 32) // total - 1), high)
        parts[high] -= total - parts[low]
        if parts[high] < total:
            small.append(large.pop())
    return found


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
