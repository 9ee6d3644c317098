"""What of a snapshot the waypoint is built from, indexed; brought from one snapshot to the next by what differs. Pure, used by `agent.l7.snapshot`.

Only L7 costs anything: a mesh without L7 services and policies is spared every pass over its workloads, and a change of one endpoint looks at that endpoint
and at those of its L7 services. `after` gives what `of` gives; parts that do not differ are the same objects, which is how the builder knows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from agent.compact import differing
from agent.l7 import gateways, jwt, rbac
from agent.l7.parting import NOTHING, Dialled
from agent.l7.rbac import Authorization
from agent.model import Delta, HeaderEdit, Policy, Route, RouteRule, Service, ServicePort, Snapshot, Workload
from agent.observability import Observability
from agent.policy import UDP, protecting

Key = tuple[str, int]
"""A service and one of its ports."""
Endpoint = tuple[Workload, int]
"""With the port that it listens on."""
Account = tuple[str, str]
"""A namespace and a service account of it."""
Endpoints = Mapping[Key, tuple[Endpoint, ...]]


class _Policies:
    """What follows from the policies alone, found out once for each set of them that protects a workload."""

    def __init__(self, whole: Snapshot) -> None:
        policies = whole.policies
        # Only these: a whole one would keep the workloads of its time.
        self._snapshot = Snapshot(policies=policies, authentications=whole.authentications)
        self.l7 = frozenset(name for name, policy in policies.items() if rbac.needs_request(policy))
        self.labels = any(source.labels for policy in policies.values() for rule in policy.rules for source in rule.sources)
        self.by_caller = frozenset(name for name, policy in policies.items() if _asks_who_is_here(policy))
        """Those whose conditions at the caller's side name workloads of the node (`agent.l7.rbac.LocalCallers`)."""
        self._likeness: dict[tuple[tuple[str, ...], int], Authorization] = {}
        self._ports: dict[tuple[str, ...], tuple[int, ...] | None] = {}
        """What `ports` says, by policies."""

    def after(self, whole: Snapshot) -> tuple[_Policies, Callable[[Workload], bool]]:
        """Those of another snapshot, and whether a workload has one that differs."""
        policies = differing(self._snapshot.policies, whole.policies)
        authentications = differing(self._snapshot.authentications, whole.authentications)
        result = _Policies(whole)
        result._likeness = {key: found for key, found in self._likeness.items() if policies.isdisjoint(key[0])}
        return result, lambda one: not (policies.isdisjoint(one.policies) and authentications.isdisjoint(one.authentications))

    def asks(self, workload: Workload) -> bool:
        """Can a policy of this workload only be decided with the request in hand?"""
        return not self.l7.isdisjoint(workload.policies)

    def ports(self, workload: Workload) -> tuple[int, ...] | None:
        """Where that is so; None: all of its ports."""
        if not self.asks(workload):
            return ()
        if workload.policies not in self._ports:
            self._ports[workload.policies] = rbac.request_ports(protecting(workload, self._snapshot))
        return self._ports[workload.policies]

    def undecided(self, endpoints: tuple[Endpoint, ...], changed: bool) -> frozenset[str]:
        """Those that have policies, if not all endpoints are protected alike, or requests arrive changed: see `View.undecided`."""
        first = endpoints[0][0]
        alike = all(self._protection(*one) == self._protection(*endpoints[0]) for one in endpoints)
        same = alike and not (changed and any(self.asks(workload) for workload, _ in endpoints))
        if same and all(one.authentications == first.authentications for one, _ in endpoints):
            # Tokens that the application must not see are taken away by its own node; the caller's cannot know which one that will be.
            nodes = {one.node for one, _ in endpoints} if first.authentications else set()
            if len(nodes) < 2 or not jwt.strips(jwt.selecting(first, self._snapshot)):
                return frozenset()
        return frozenset(workload.name for workload, _ in endpoints if workload.policies)

    def _protection(self, workload: Workload, target: int) -> Authorization:
        key = (workload.policies, target)
        if key not in self._likeness:
            self._likeness[key] = rbac.likeness(protecting(workload, self._snapshot), target)
        return self._likeness[key]


def _asks_who_is_here(policy: Policy) -> bool:
    sources = (source for rule in policy.rules for source in (*rule.sources, *rule.also_sources))
    return any(source.labels or source.ip_blocks or source.not_ip_blocks for source in sources)


@dataclass(frozen=True, slots=True)
class View:
    """See the module."""

    snapshot: Snapshot
    attached: Mapping[Key, tuple[Route, ...]]
    """Routes of each service port with a waypoint that has any."""
    consumers: Mapping[Key, tuple[tuple[str, tuple[Route, ...]], ...]]
    """Consumer routes of each service port with a waypoint that has any, by the namespace of the callers that they are for."""
    used: frozenset[Key]
    """Service ports that need a cluster: those with a waypoint, every backend, or mirror, of a route attached to one, collectors of spans, and `former`."""
    waypoints: frozenset[Key]
    """Of those, the ones with a waypoint."""
    former: frozenset[Key]
    """Those that had one, and may still be called through it: see `agent.l7.parting`."""
    changed: frozenset[Key]
    """Service ports that get requests with another path or other headers than the caller sent, or copies of requests: what the caller's side decides with the
    original in hand does not hold for them."""
    senders: Mapping[Key, frozenset[Key]]
    """Service ports whose routes send requests, or copies of them, to a service port; only where there are any."""
    by_caller: frozenset[Key]
    """Service ports with routes for some callers only."""
    mirrors: bool
    """Does any route make copies of requests?"""
    endpoints: Endpoints
    """Of `used`, as far as there are any, sorted by name."""
    undecided: Mapping[Key, frozenset[str]]
    """Service ports whose endpoints are not protected alike, or that are `changed` and need the request, and which endpoints have policies: only the
    receiver can decide. The same on every node, but for `former`."""
    asking: Mapping[str, Workload]
    """Workloads with a policy that needs the request, as they are to who dials their own addresses: in all else they may be as they were once."""
    dialled: Mapping[str, Workload]
    """`asking`, and those that did ask and may still be called through the waypoint: see `agent.l7.parting`."""
    accounts: Mapping[Account, int] | None
    """Service accounts of workloads that are reached through tunnels from other nodes, and how many there are of each; None: not asked for."""
    standings: object
    """Another one if what the receiver asks about a caller differs for any workload."""
    _policies: _Policies = field(repr=False)
    _index: _Index = field(repr=False)

    @staticmethod
    def of(snapshot: Snapshot, *, tunnels: bool = False, called: Dialled = NOTHING) -> View:
        """Look at all of it; with `tunnels`, also at `accounts`. `called` is what may be called through the waypoint, whether it needs that or not."""
        workloads = snapshot.workloads.values()
        policies, index = _Policies(snapshot), _Index()
        routed = index.attachments(snapshot, called.services)
        endpoints = {key: _sorted(found) for key, found in _behind(workloads, routed.used).items()} if routed.used else {}
        asking = {workload.name: workload for workload in workloads if policies.asks(workload)} if policies.l7 else {}
        return View(
            snapshot=snapshot,
            **routed._asdict(),
            endpoints=endpoints,
            undecided={key: names for key, found in endpoints.items() if (names := policies.undecided(found, key in routed.changed))},
            asking=asking,
            dialled=_with(asking, called.workloads, snapshot),
            accounts=Counter(_account(workload) for workload in workloads if workload.tunnelled) if tunnels else None,
            standings=object(),
            _policies=policies,
            _index=index,
        )

    def after(self, snapshot: Snapshot) -> View:
        """The view of another snapshot. Costs what differs; service ports that become L7 cost one pass over the workloads."""
        if snapshot is self.snapshot:
            return self
        before = self.snapshot
        if not before.workloads:
            return View.of(snapshot, tunnels=self.accounts is not None, called=self.called)
        delta, view = snapshot.since(before), self
        if snapshot.policies is not before.policies or snapshot.authentications is not before.authentications:
            view = view.protected_as(snapshot)
        if any(getattr(snapshot, name) is not getattr(before, name) for name in ("services", "routes", "telemetry")):
            view = view.routed_as(self._index.attachments(snapshot, self.called.services))
        view = view.moved_as(delta, snapshot)
        dialled = self.dialled
        if view.asking is not self.asking or (len(dialled) > len(self.asking) and not delta.workloads.isdisjoint(dialled)):
            dialled = _with(view.asking, dialled.keys() - view.asking.keys(), snapshot)
        return replace(view, snapshot=snapshot, dialled=dialled)

    def called_as(self, called: Dialled) -> View:
        """This one with something else that may be called through the waypoint."""
        routed = self._index.attachments(self.snapshot, called.services)
        return replace(self.routed_as(routed), dialled=_with(self.asking, called.workloads - self.asking.keys(), self.snapshot))

    def protected_as(self, snapshot: Snapshot) -> View:
        """This one with the policies of a snapshot."""
        policies, differs = self._policies.after(snapshot)
        asking = self.asking
        if policies.l7 != self._policies.l7:
            found = (one for one in self.snapshot.workloads.values() if policies.asks(one)) if policies.l7 else ()
            asking = {one.name: self.asking.get(one.name, one) for one in found}
        undecided = dict(self.undecided)
        for key, endpoints in self.endpoints.items():
            if any(differs(workload) for workload, _ in endpoints):
                undecided.pop(key, None)
                if names := policies.undecided(endpoints, key in self.changed):
                    undecided[key] = names
        return replace(self, _policies=policies, asking=asking, undecided=undecided)

    def routed_as(self, routed: _Routed) -> View:
        """This one with other routes and services."""
        endpoints, undecided = dict(self.endpoints), dict(self.undecided)
        for key in self.used - routed.used:
            endpoints.pop(key, None)
            undecided.pop(key, None)
        more = routed.used - self.used
        if more:
            endpoints.update((key, _sorted(found)) for key, found in _behind(self.snapshot.workloads.values(), more).items())
        for key in (more | (routed.changed ^ self.changed)) & endpoints.keys():
            undecided.pop(key, None)
            if names := self._policies.undecided(endpoints[key], key in routed.changed):
                undecided[key] = names
        return replace(self, endpoints=endpoints, undecided=undecided, **routed._asdict())

    def moved_as(self, delta: Delta, snapshot: Snapshot) -> View:
        """This one with other workloads."""
        old = [workload for name in delta.workloads if (workload := self.snapshot.workloads.get(name))]
        new = [workload for name in delta.workloads if (workload := snapshot.workloads.get(name))]
        result = self
        fresh = _behind(new, self.used)
        touched = fresh.keys() | _behind(old, self.used).keys()
        if touched:
            endpoints, undecided = dict(self.endpoints), dict(self.undecided)
            for key in touched:
                found = [one for one in endpoints.pop(key, ()) if one[0].name not in delta.workloads] + fresh.get(key, [])
                undecided.pop(key, None)
                if found:
                    endpoints[key] = _sorted(found)
                    if names := self._policies.undecided(endpoints[key], key in self.changed):
                        undecided[key] = names
            result = replace(result, endpoints=endpoints, undecided=undecided)
        asked = [workload for workload in old if workload.name in self.asking]
        asks = [workload for workload in new if self._policies.asks(workload)]
        if _dialled(asked) != _dialled(asks):
            asking = {name: workload for name, workload in self.asking.items() if name not in delta.workloads}
            asking.update((workload.name, workload) for workload in asks)
            result = replace(result, asking=asking)
        gone, come = (Counter(_account(one) for one in some if one.tunnelled) for some in (old, new))
        if gone != come and self.accounts is not None:
            accounts = Counter(self.accounts)
            accounts.update(come)
            accounts.subtract(gone)
            result = replace(result, accounts=+accounts)
        if set(map(_standing, old)) != set(map(_standing, new)):
            result = replace(result, standings=object())
        return result

    @property
    def called(self) -> Dialled:
        """What may be called through the waypoint."""
        return Dialled(self.waypoints | self.former, frozenset(self.dialled))

    @property
    def parting(self) -> Dialled:
        """What of that does not need it."""
        return Dialled(self.former, frozenset(() if self.dialled is self.asking else self.dialled.keys() - self.asking.keys()))

    def request_ports(self, workload: Workload) -> tuple[int, ...] | None:
        """Ports of a workload where a policy can only be decided with the request in hand; None: all."""
        return self._policies.ports(workload)

    def receives(self, workload: str) -> bool:
        """Does a workload have an inbound listener on its node? If it has an L7 policy, or if only the receiver can decide."""
        return workload in self.asking or workload in self.left_to_receivers

    @property
    def left_to_receivers(self) -> frozenset[str]:
        """Workloads whose receiver decides, whichever service was dialled: those of all `undecided` service ports."""
        return frozenset[str]().union(*self.undecided.values())

    @property
    def who_is_here(self) -> frozenset[str]:
        """Policies whose conditions at the caller's side name workloads of the node."""
        return self._policies.by_caller

    @property
    def asks_labels(self) -> bool:
        """Does a policy ask for a caller's labels?"""
        return self._policies.labels

    @property
    def outside(self) -> frozenset[Key]:
        """The ports of external services, whose names are those of hosts."""
        return frozenset(key for key in self.used if "." in key[0] and self.snapshot.services[key[0]].external is not None)

    @property
    def streams(self) -> bool:
        """Has an external service a port that is not HTTP?"""
        found = (self.snapshot.services[name] for name, _ in self.outside)
        return any(one.external is not None and any(map(one.external.is_stream, one.ports)) for one in found)

    def port(self, service: str, port: int) -> ServicePort | None:
        """A service port of TCP, if there is one."""
        found = self.snapshot.services.get(service)
        return _ports(found).get(port) if found else None


def _ports(service: Service) -> dict[int, ServicePort]:
    return {port.port: port for port in service.ports if port.protocol != UDP}


class _Routed(NamedTuple):
    """What the routes of a snapshot lead to: the fields of `View` of these names."""

    attached: Mapping[Key, tuple[Route, ...]]
    consumers: Mapping[Key, tuple[tuple[str, tuple[Route, ...]], ...]]
    used: frozenset[Key]
    waypoints: frozenset[Key]
    former: frozenset[Key]
    changed: frozenset[Key]
    senders: Mapping[Key, frozenset[Key]]
    by_caller: frozenset[Key]
    mirrors: bool


class _Facts(NamedTuple):
    """What a route says, whatever it is attached to."""

    route: Route
    backends: frozenset[Key]
    changed: frozenset[Key]
    by_caller: bool
    mirrors: bool


class _Index:
    """Turns services and routes into what they lead to. What was found out about a service or a route is kept as long as it is the same object."""

    def __init__(self) -> None:
        self._ports: dict[str, tuple[Service, dict[int, ServicePort]]] = {}
        self._facts: dict[str, _Facts] = {}

    def attachments(self, snapshot: Snapshot, called: frozenset[Key]) -> _Routed:
        """Look at all services and routes; `called` may be called through the waypoint."""
        services, known = snapshot.services, self._ports
        self._ports = {
            name: found if (found := known.get(name)) is not None and found[0] is service else (service, _ports(service))
            for name, service in services.items()
        }
        ports = self._ports
        waypoints = frozenset((name, port) for name, (_, found) in ports.items() for port, one in found.items() if one.waypoint)
        former = frozenset((name, port) for name, port in called - waypoints if name in ports and port in ports[name][1])
        attached: dict[Key, dict[str, Route]] = {}
        consumers: dict[Key, dict[str, dict[str, Route]]] = {}
        for route in snapshot.routes.values() if waypoints else ():
            for parent, port in route.parents:
                for number in ports[parent][1] if parent in ports else ():
                    if port in {0, number} and (parent, number) in waypoints:
                        if route.consumes(parent):
                            consumers.setdefault((parent, number), {}).setdefault(route.namespace, {})[route.name] = route
                        else:
                            attached.setdefault((parent, number), {})[route.name] = route
        groups = [*attached.items(), *((key, group) for key, found in consumers.items() for group in found.values())]
        facts = {name: self._about(route) for _, group in groups for name, route in group.items()}
        self._facts = facts
        of_gateways = gateways.rules(snapshot)
        behind_gateways, changed_there = targets(of_gateways)
        collectors = Observability(snapshot.telemetry).collectors()
        backends = collectors.union(behind_gateways, *(one.backends for one in facts.values()))
        changed = frozenset(changed_there).union(*(one.changed for one in facts.values()))
        existing = {(name, port) for name, port in backends if name in ports and port in ports[name][1]}
        senders: dict[Key, set[Key]] = {}
        for key, group in groups:
            for name in group:
                for backend in facts[name].backends:
                    senders.setdefault(backend, set()).add(key)
        return _Routed(
            {key: tuple(routes.values()) for key, routes in attached.items()},
            {key: tuple((name, tuple(group.values())) for name, group in sorted(found.items())) for key, found in consumers.items()},
            waypoints | existing | former,
            waypoints,
            former,
            frozenset(changed & existing),
            {key: frozenset(found) for key, found in senders.items()},
            frozenset(key for key, group in groups if any(facts[name].by_caller for name in group)),
            any(one.mirrors for one in facts.values()) or any(rule.mirrors for rule in of_gateways),
        )

    def _about(self, route: Route) -> _Facts:
        known = self._facts.get(route.name)
        if known is not None and known.route is route:
            return known
        backends, changed = targets(route.rules)
        by_caller, mirrors = any(rule.callers or rule.claims for rule in route.rules), any(rule.mirrors for rule in route.rules)
        return _Facts(route, frozenset(backends), frozenset(changed), by_caller, mirrors)


def targets(rules: Iterable[RouteRule]) -> tuple[set[Key], set[Key]]:
    """Return the service ports that rules send requests or copies to, and those of them where what arrives is not what was sent."""
    found: set[Key] = set()
    changed: set[Key] = set()
    for rule in rules:
        rewritten = rule.rewrite is not None or _edits(rule.request_headers)
        for backend in rule.backends:
            if not backend.invalid:
                found.add((backend.service, backend.port))
                if rewritten or backend.hostname or _edits(backend.request_headers):
                    changed.add((backend.service, backend.port))
        changed.update((mirror.service, mirror.port) for mirror in rule.mirrors)
    return found | changed, changed


def _edits(edit: HeaderEdit) -> bool:
    return bool(edit.set or edit.add or edit.remove)


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


def _with(asking: Mapping[str, Workload], more: Iterable[str], snapshot: Snapshot) -> Mapping[str, Workload]:
    """Those who ask, and the others of these names that there are."""
    found = {name: workload for name in more if name not in asking and (workload := snapshot.workloads.get(name))}
    return {**asking, **found} if found else asking


def _sorted(endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    return tuple(sorted(endpoints, key=lambda one: one[0].name))


def _account(workload: Workload) -> Account:
    return workload.namespace, workload.service_account


def _dialled(workloads: Iterable[Workload]) -> dict[str, tuple[object, ...]]:
    """What decides about requests to a workload's own addresses, and how they get there."""
    return {
        one.name: (
            *(one.addresses, one.backing, one.policies, one.authentications, one.node, one.service_account),
            *(one.mtls, one.mtls_ports, one.awaits_tunnels),
        )
        for one in workloads
    }


def _standing(workload: Workload) -> tuple[object, ...]:
    """What `agent.l7.rbac.Callers` and the choice of those that it knows ask about a workload."""
    labels = tuple(sorted(workload.labels.items()))
    return workload.name, workload.node, workload.enrolled, workload.service_account, workload.addresses, labels
