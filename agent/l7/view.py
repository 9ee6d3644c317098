"""What of a snapshot the waypoint is built from, indexed; brought from one snapshot to the next by what differs. Pure, used by `agent.l7.snapshot`.

Only L7 costs anything: a mesh without L7 services and policies is spared every pass over its workloads, and a change of one endpoint looks at that endpoint
and at those of its L7 services. `after` gives what `of` gives; parts that do not differ are the same objects, which is how the builder knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from agent.l7 import rbac
from agent.l7.rbac import Authorization
from agent.model import Delta, Policy, Route, Service, ServicePort, Snapshot, Workload
from agent.policy import UDP, protecting

Key = tuple[str, int]
"""A service and one of its ports."""
Endpoint = tuple[Workload, int]
"""With the port that it listens on."""
Endpoints = Mapping[Key, tuple[Endpoint, ...]]


class _Policies:
    """What follows from the policies alone, found out once for each set of them that protects a workload."""

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        self._snapshot = Snapshot(policies=policies)  # only these: a whole one would keep the workloads of its time
        self.l7 = frozenset(name for name, policy in policies.items() if rbac.needs_request(policy))
        self._likeness: dict[tuple[tuple[str, ...], int], Authorization] = {}

    def asks(self, workload: Workload) -> bool:
        """Can a policy of this workload only be decided with the request in hand?"""
        return not self.l7.isdisjoint(workload.policies)

    def undecided(self, endpoints: tuple[Endpoint, ...]) -> frozenset[str]:
        """Those that have policies, if not all endpoints are protected alike: see `View.undecided`."""
        if all(self._protection(*one) == self._protection(*endpoints[0]) for one in endpoints):
            return frozenset()
        return frozenset(workload.name for workload, _ in endpoints if workload.policies)

    def _protection(self, workload: Workload, target: int) -> Authorization:
        key = (workload.policies, target)
        if key not in self._likeness:
            self._likeness[key] = rbac.likeness(protecting(workload, self._snapshot), target)
        return self._likeness[key]


@dataclass(frozen=True, slots=True)
class View:
    """See the module."""

    snapshot: Snapshot
    attached: Mapping[Key, tuple[Route, ...]]
    """Routes of each service port with a waypoint that has any."""
    used: frozenset[Key]
    """Service ports that need a cluster: those with a waypoint and every backend of a route attached to one."""
    endpoints: Endpoints
    """Of `used`, as far as there are any, sorted by name."""
    undecided: Mapping[Key, frozenset[str]]
    """Service ports whose endpoints are not protected alike, and which of these have policies: only the receiver can decide. The same on every node."""
    asking: Mapping[str, Workload]
    """Workloads with a policy that needs the request, as they are to who dials their own addresses: in all else they may be as they were once."""
    standings: object
    """Another one if what the receiver asks about a caller differs for any workload."""
    _policies: _Policies = field(repr=False)

    @staticmethod
    def of(snapshot: Snapshot) -> View:
        """Look at all of it."""
        return View._indexed(snapshot, _Policies(snapshot.policies), *_attachments(snapshot))

    @staticmethod
    def _indexed(snapshot: Snapshot, policies: _Policies, attached: Mapping[Key, tuple[Route, ...]], used: frozenset[Key]) -> View:
        workloads = snapshot.workloads.values()
        endpoints = {key: _sorted(found) for key, found in _behind(workloads, used).items()} if used else {}
        return View(
            snapshot,
            attached,
            used,
            endpoints,
            {key: names for key, found in endpoints.items() if (names := policies.undecided(found))},
            {workload.name: workload for workload in workloads if policies.asks(workload)} if policies.l7 else {},
            object(),
            policies,
        )

    def after(self, snapshot: Snapshot) -> View:
        """The view of another snapshot. Costs what differs, if that is known and neither policies nor the number of L7 services grow."""
        if snapshot is self.snapshot:
            return self
        before = self.snapshot
        delta = snapshot.since(before)
        if delta is None or snapshot.policies is not before.policies:
            return View.of(snapshot)
        attached, used = self.attached, self.used
        if snapshot.services is not before.services or snapshot.routes is not before.routes:
            attached, used = _attachments(snapshot)
            if not used <= self.used:
                return View._indexed(snapshot, self._policies, attached, used)
        return replace(self._moved(delta, snapshot, used), snapshot=snapshot, attached=attached, used=used)

    def _moved(self, delta: Delta, snapshot: Snapshot, used: frozenset[Key]) -> View:
        """This one with other workloads, and `used` or fewer of its service ports."""
        old = [workload for name in delta.workloads if (workload := self.snapshot.workloads.get(name))]
        new = [workload for name in delta.workloads if (workload := snapshot.workloads.get(name))]
        result = self
        fresh = _behind(new, used)
        touched = fresh.keys() | _behind(old, used).keys()
        if touched or used != self.used:
            endpoints = {key: found for key, found in self.endpoints.items() if key in used}
            undecided = {key: found for key, found in self.undecided.items() if key in used}
            for key in touched:
                found = [one for one in endpoints.pop(key, ()) if one[0].name not in delta.workloads] + fresh.get(key, [])
                undecided.pop(key, None)
                if found:
                    endpoints[key] = _sorted(found)
                    if names := self._policies.undecided(endpoints[key]):
                        undecided[key] = names
            result = replace(result, endpoints=endpoints, undecided=undecided)
        asked = [workload for workload in old if workload.name in self.asking]
        asks = [workload for workload in new if self._policies.asks(workload)]
        if _dialled(asked) != _dialled(asks):
            asking = {name: workload for name, workload in self.asking.items() if name not in delta.workloads}
            asking.update((workload.name, workload) for workload in asks)
            result = replace(result, asking=asking)
        if set(map(_standing, old)) != set(map(_standing, new)):
            result = replace(result, standings=object())
        return result

    def receives(self, workload: str) -> bool:
        """Does a workload have an inbound listener on its node? If it has an L7 policy, or if only the receiver can decide."""
        return workload in self.asking or any(workload in names for names in self.undecided.values())

    def port(self, service: str, port: int) -> ServicePort | None:
        """A service port of TCP, if there is one."""
        found = self.snapshot.services.get(service)
        return _ports(found).get(port) if found else None


def _ports(service: Service) -> dict[int, ServicePort]:
    return {port.port: port for port in service.ports if port.protocol != UDP}


def _attachments(snapshot: Snapshot) -> tuple[Mapping[Key, tuple[Route, ...]], frozenset[Key]]:
    """`View.attached` and `View.used`."""
    services = snapshot.services
    waypoints = {(name, port) for name, service in services.items() for port, one in _ports(service).items() if one.waypoint}
    attached: dict[Key, dict[str, Route]] = {}
    for route in snapshot.routes.values() if waypoints else ():
        for parent, port in route.parents:
            for known in _ports(services[parent]) if parent in services else ():
                if port in {0, known} and (parent, known) in waypoints:
                    attached.setdefault((parent, known), {})[route.name] = route
    backends = {
        (backend.service, backend.port)
        for routes in attached.values()
        for route in routes.values()
        for rule in route.rules
        for backend in rule.backends
        if not backend.invalid
    }
    used = waypoints | {(name, port) for name, port in backends if name in services and port in _ports(services[name])}
    return {key: tuple(routes.values()) for key, routes in attached.items()}, frozenset(used)


def _behind(workloads: Iterable[Workload], used: frozenset[Key]) -> dict[Key, list[Endpoint]]:
    """The ready ones of these workloads, by the service ports that they are endpoints of."""
    found: dict[Key, list[Endpoint]] = {}
    for workload in workloads:
        if workload.ready and workload.addresses:
            for backing in workload.backing:
                for port, target in backing.ports.items():
                    if (backing.service, port) in used:
                        found.setdefault((backing.service, port), []).append((workload, target))
    return found


def _sorted(endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    return tuple(sorted(endpoints, key=lambda one: one[0].name))


def _dialled(workloads: Iterable[Workload]) -> dict[str, tuple[object, ...]]:
    """What decides about requests to a workload's own addresses."""
    return {workload.name: (workload.addresses, workload.backing, workload.policies) for workload in workloads}


def _standing(workload: Workload) -> tuple[object, ...]:
    """What `agent.l7.rbac.Callers` and the choice of those that it knows ask about a workload."""
    labels = tuple(sorted(workload.labels.items()))
    return workload.name, workload.node, workload.enrolled, workload.service_account, workload.addresses, labels
