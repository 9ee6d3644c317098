"""Compiles the model to kernel rows and brings the kernel's tables to that state, so that every moment in between is safe.

Called by the supervisor with each new snapshot and each workload that comes or goes. Policy sets and backend lists are named by their content and
never change in place: new ones are written first, then whoever points to them is switched, one atomic row each, then the old ones go.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from agent import addresses
from agent.bpf import manifest as m
from agent.bpf.maps import Map, Mirror
from agent.ids import Ids
from agent.model import LocalWorkload, Snapshot, Workload
from agent.policy import Caller, Decision, Verdict, compile_rows, protecting

TCP = 6  # IPPROTO_TCP
_VERDICTS = {
    Verdict.NONE: m.Verdict.NONE,
    Verdict.ALLOW: m.Verdict.ALLOW,
    Verdict.DENY: m.Verdict.DENY,
    Verdict.WAYPOINT: m.Verdict.WAYPOINT,
}
Rows = dict[bytes, bytes]
_NUMBERED = frozenset({"id", "identity", "policy", "rule", "list", "workload"})
"""Members of rows that hold a number given by `agent.ids`."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """A local workload with every address found in its namespace, declared or not."""

    local: LocalWorkload
    addresses: tuple[str, ...]


@dataclass(slots=True)
class _Desired:
    backend: Rows
    policy: Rows
    address: Rows
    workload: Rows
    service: Rows


class Tables:
    """The maps that hold configuration. Not thread-safe: called from one task."""

    ORDER = ("mesh_backend", "mesh_policy", "mesh_address", "mesh_workload", "mesh_service")

    def __init__(self, maps: Mapping[str, Map], ids: Ids, trust_domain: str, node: str) -> None:
        """Take over what the kernel holds. `node` is this one."""
        self._ids = ids
        self._trust_domain = trust_domain
        self._node = node
        self._codec = {name: maps[name].layout for name in self.ORDER}
        self.mirrors = {name: Mirror(maps[name]) for name in self.ORDER}
        ids.start_above(max((n for name in self.ORDER for n in self._numbers(name)), default=0))

    def _numbers(self, name: str) -> Iterator[int]:
        """Every number that rows of an earlier run carry: none of them may come to mean something else while the kernel holds it."""
        codec = self._codec[name]
        for key, value in self.mirrors[name].rows.items():
            for member, number in (*codec.key.unpack(key).items(), *codec.value.unpack(value).items()):
                if member in _NUMBERED and number != m.IDENTITY_ANY:
                    yield number

    def sync(self, snapshot: Snapshot, local: Sequence[Namespace], enforce_inbound: frozenset[str]) -> int:
        """Make the kernel decide by `snapshot`; returns the number of rows written or removed.

        `enforce_inbound` names workloads whose L7 policy holds at the receiver even for this node's waypoint. Raises KernelRefused, before any row is
        switched, if a map is too small.
        """
        desired = self._compile(snapshot, local, enforce_inbound)
        rows = dict(zip(self.ORDER, (desired.backend, desired.policy, desired.address, desired.workload, desired.service), strict=True))
        for name, wanted in rows.items():
            self.mirrors[name].check(wanted)
        self._ids.save()
        changed = sum(self.mirrors[name].put(wanted) for name, wanted in rows.items())
        # Pointers first, then what they pointed to.
        return changed + sum(self.mirrors[name].prune(rows[name]) for name in reversed(self.ORDER))

    def _compile(self, snapshot: Snapshot, local: Sequence[Namespace], enforce_inbound: frozenset[str]) -> _Desired:
        desired = _Desired({}, {}, {}, {}, {})
        callers = sorted(
            {c for w in snapshot.workloads.values() if (c := Caller.of(w, self._trust_domain))},
            key=lambda c: c.principal,
        )
        sets = self._policy_sets(snapshot, callers, desired.policy)
        here = {n.local.workload.name: n for n in local}
        found: dict[bytes, set[bytes]] = {}
        for workload in snapshot.workloads.values():
            namespace = here.get(workload.name)
            cookie = namespace.local.netns_cookie if namespace else 0
            # Of a workload of this node that is in no namespace nobody can vouch: whoever uses its address now came after it.
            caller = Caller.of(workload, self._trust_domain) if namespace or workload.node != self._node else None
            members = {
                "netns_cookie": cookie,
                "id": self._ids.number("workload", workload.name),
                "identity": self._ids.number("identity", caller.principal) if caller else m.IDENTITY_UNKNOWN,
                "policy": sets[workload.policies],
                "flags": m.WORKLOAD_ENFORCE_INBOUND if workload.name in enforce_inbound else 0,
            }
            row = self._codec["mesh_address"].value.pack(**members)
            for address in workload.addresses:
                desired.address[addresses.packed(address)] = row
            for address in namespace.addresses if namespace else ():
                found.setdefault(addresses.packed(address), set()).add(row)
            if namespace:
                key = self._codec["mesh_workload"].key.pack(**{"": cookie})
                desired.workload[key] = self._codec["mesh_workload"].value.pack(**members)
        for raw, rows in found.items():
            # What a pod gave itself never takes the place of a declared address; one that two pods have (docker0, say) is nobody's: closed.
            if len(rows) == 1:
                desired.address.setdefault(raw, *rows)
        self._services(snapshot, desired)
        return desired

    def _policy_sets(self, snapshot: Snapshot, callers: Iterable[Caller], rows: Rows) -> dict[tuple[str, ...], int]:
        """Write the rows of every distinct set of policies; returns the number of each set, 0 where nothing is enforced."""
        callers = list(callers)
        numbers: dict[tuple[str, ...], int] = {}
        names = set()
        for names_of_set, workload in {w.policies: w for w in snapshot.workloads.values()}.items():
            compiled = compile_rows(protecting(workload, snapshot), callers)
            if not compiled:
                numbers[names_of_set] = 0
                continue
            name = _digest(f"{caller.principal if caller else '*'} {port} {decision}" for (caller, port), decision in compiled.items())
            names.add(name)
            numbers[names_of_set] = self._ids.number("policy-set", name)
            for (caller, port), decision in compiled.items():
                identity = self._ids.number("identity", caller.principal) if caller else m.IDENTITY_ANY
                key = self._codec["mesh_policy"].key.pack(policy=numbers[names_of_set], identity=identity, port=port)
                rows[key] = self._row(decision)
        self._ids.keep("policy-set", names)
        return numbers

    def _row(self, decision: Decision) -> bytes:
        rule = self._ids.number("rule", decision.rule)
        return self._codec["mesh_policy"].value.pack(rule=rule, verdict=int(_VERDICTS[decision.verdict]))

    def _services(self, snapshot: Snapshot, desired: _Desired) -> None:
        endpoints = _endpoints(snapshot)
        lists = set()
        for service in snapshot.services.values():
            for port in service.ports:
                if port.protocol != "TCP":
                    continue
                number = self._ids.number("service", f"{service.name}:{port.port}")
                for address in service.addresses:
                    raw = addresses.packed(address)
                    backends = self._backends(endpoints.get((service.name, port.port), ()), ipv4=addresses.is_ipv4(raw))
                    name = _digest(b.hex() for b in backends)
                    lists.add(name)
                    listing = self._ids.number("list", name)
                    for slot, backend in enumerate(backends):
                        desired.backend[self._codec["mesh_backend"].key.pack(list=listing, slot=slot)] = backend
                    key = self._codec["mesh_service"].key.pack(address=raw, port=port.port, protocol=TCP)
                    desired.service[key] = self._codec["mesh_service"].value.pack(
                        id=number, list=listing, count=len(backends), flags=m.SERVICE_WAYPOINT if port.waypoint else 0
                    )
        self._ids.keep("list", lists)

    def _backends(self, endpoints: Iterable[tuple[Workload, int]], *, ipv4: bool) -> list[bytes]:
        """One row for each endpoint that has an address of the family, in a stable order."""
        found = []
        for workload, port in endpoints:
            for raw in map(addresses.packed, workload.addresses):
                if addresses.is_ipv4(raw) == ipv4:
                    number = self._ids.number("workload", workload.name)
                    found.append(self._codec["mesh_backend"].value.pack(address=raw, workload=number, port=port))
                    break
        return found


def _endpoints(snapshot: Snapshot) -> dict[tuple[str, int], list[tuple[Workload, int]]]:
    """Ready endpoints of every service port, in one pass."""
    found: dict[tuple[str, int], list[tuple[Workload, int]]] = defaultdict(list)
    for name in sorted(snapshot.workloads):
        workload = snapshot.workloads[name]
        if workload.ready:
            for backing in workload.backing:
                for port, target in backing.ports.items():
                    found[backing.service, port].append((workload, target))
    return found


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
