"""From the workload model to everything that Envoy on this node should have. Called by the supervisor on every change.

`Builder` makes all resources of the xDS server and tells the kernel side whose policies only the receiver can decide; `build` is the same, once. Must
not touch Envoy, files or the kernel. Only what a local workload can reach over L7 costs anything: an L4 service has no resources here, and
a node without enrolled workloads has none at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from envoy.service.runtime.v3 import rtds_pb2
from google.protobuf.message import Message

from agent.balancing import node_zone, preferred
from agent.l7 import clusters, listeners, names, rbac, routes
from agent.l7.kept import Kept
from agent.l7.rbac import Authorization
from agent.l7.resources import Resource, Resources, pack
from agent.l7.view import Key, View
from agent.model import LocalWorkload, Route, Snapshot, Workload
from agent.policy import protecting

_KINDS = (names.CLUSTER, names.ENDPOINTS, names.LISTENER, names.SCOPE, names.ROUTES)


def build(snapshot: Snapshot, local: Sequence[LocalWorkload], *, trust_domain: str, traced: frozenset[str] = frozenset()) -> Resources:
    """Build all resources, by type URL and name. See `Builder.build` and `tracing`."""
    node = local[0].workload.node if local else ""
    zone = node_zone(snapshot.workloads.values(), node)
    return {**Builder(node, trust_domain).build(snapshot, local, zone), **tracing(traced)}


def tracing(traced: frozenset[str]) -> Resources:
    """The runtime layer. `traced` names local workloads whose requests are streamed to the agent."""
    runtime = rtds_pb2.Runtime(name=names.RUNTIME_LAYER)
    runtime.layer.update({names.trace_key(workload): 100 for workload in sorted(traced)})
    return {names.RUNTIME: {names.RUNTIME_LAYER: pack(runtime)}}


class Builder:
    """Builds for one snapshot after the other: what does not differ from the one before is not made again. One thread at a time."""

    def __init__(self, node: str, trust_domain: str) -> None:
        """For the agent of `node`."""
        self._node = node
        self._trust_domain = trust_domain
        self._view = View.of(Snapshot())
        self._kept = Kept()
        self._callers = rbac.LocalCallers({})
        self._shown: View | None = None
        """What `_result` was built from, with `_asked`."""
        self._asked: tuple[object, ...] = ()
        self._result: dict[str, dict[str, Resource]] = {}

    def needs_inbound(self, snapshot: Snapshot) -> frozenset[str]:
        """Names of workloads whose policies the caller's side can not decide, also for flows that come through a trusted local waypoint.

        That is so where the endpoints of one L7 service port are not protected alike: the load balancer picks the endpoint after
        authorization, so only the receiver knows which policies count. Every protected workload among them is named, whether its own policies
        need the request or not.
        """
        self._view = self._view.after(snapshot)
        return frozenset[str]().union(*self._view.undecided.values())

    def build(self, snapshot: Snapshot, local: Sequence[LocalWorkload], zone: str) -> Resources:
        """Build all resources but those of `tracing`, by type URL and name; the same object as before if nothing differs.

        `local` are the enrolled workloads of this node; each one's `netns_path` must name one namespace for ever (put the cookie into it):
        Envoy keeps the sockets of a listener whose address did not change, so a reused path would leave it listening in the old namespace.
        `zone` is the node's, as its workloads say.
        """
        view = self._view = self._view.after(snapshot)
        inbound = tuple(one for one in local if view.receives(one.workload.name))
        asked = (tuple(local), zone, inbound)
        before, self._shown = self._shown, None  # until it is done
        if before is None or asked != self._asked or not _differ_in_endpoints_alone(before, view):
            self._asked = asked
            self._all(tuple(local), zone, inbound)
        else:
            touched = _touched(before, view) if local else frozenset()
            news = view.standings is not before.standings and inbound
            if touched or news:
                self._result = {kind: dict(found) for kind, found in self._result.items()}
                self._services(touched, zone)
                self._listeners(local, inbound)
        self._shown = view
        return self._result

    def _all(self, local: tuple[LocalWorkload, ...], zone: str, inbound: tuple[LocalWorkload, ...]) -> None:
        self._result = {kind: {} for kind in _KINDS}
        if local:
            callers = rbac.LocalCallers.of([one.workload for one in local], self._trust_domain)
            if callers != self._callers:  # the same object as long as it can be: it is compared often
                self._callers = callers
            self._services(self._view.used, zone)
            self._workload_addresses()
            self._listeners(local, inbound)
        self._kept.turn()

    def _services(self, keys: Iterable[Key], zone: str) -> None:
        view = self._view
        for key in sorted(keys):
            name, port = key
            service, service_port = view.snapshot.services[name], view.port(name, port)
            assert service_port is not None  # noqa: S101 - for mypy: what is used exists
            cluster = names.service(name, port)
            self._add(names.CLUSTER, cluster, clusters.service_cluster, name, service_port)
            near = preferred(view.endpoints.get(key, ()), service.traffic_distribution, self._node, zone)
            endpoints = tuple((workload.addresses[0], target, workload.weight) for workload, target in near)
            self._add(names.ENDPOINTS, cluster, clusters.service_endpoints, name, port, endpoints)
            if not service_port.waypoint:
                continue
            if attached := view.attached.get(key):
                backends = {backend: self._authorization(*backend) for backend in _backends(attached) if backend in view.used}
                self._add(names.ROUTES, cluster, routes.service, cluster, attached, backends)
            else:
                self._add(names.ROUTES, cluster, routes.direct, cluster, cluster, f"{name} default", self._authorization(name, port))
            for address in service.addresses:
                self._scope(address, port, cluster)

    def _authorization(self, service: str, port: int) -> Authorization:
        """What routes to a service port enforce; nothing where it is the receiver's to decide."""
        endpoints = self._view.endpoints.get((service, port))
        if not endpoints or (service, port) in self._view.undecided:
            return Authorization()
        return self._at_caller(*endpoints[0])

    def _at_caller(self, workload: Workload, target: int) -> Authorization:
        policies = protecting(workload, self._view.snapshot)
        return self._kept((rbac.at_caller, workload.policies, target), rbac.at_caller, policies, target, self._callers)

    def _workload_addresses(self) -> None:
        """Give every address of a workload with an L7 policy its own scope. Two workloads on one address and port: the first by name."""
        for _, workload in sorted(self._view.asking.items()):
            for target, app_protocol in _targets(self._view, workload) if workload.addresses else ():
                name = names.workload(workload.name, target)
                self._add(names.CLUSTER, name, clusters.workload_cluster, workload.name, target, app_protocol, workload.addresses[0])
                self._add(names.ROUTES, name, routes.direct, name, name, f"{workload.name} address", self._at_caller(workload, target))
                for address in workload.addresses:
                    self._scope(address, target, name)

    def _listeners(self, local: Iterable[LocalWorkload], inbound: Sequence[LocalWorkload]) -> None:
        for one in local:
            name = names.listener(names.OUTBOUND, one.workload.name)
            self._add(names.LISTENER, name, listeners.outbound, one, self._trust_domain)
        if not inbound:
            return
        callers = self._kept(rbac.Callers, self._believable, self._view.standings, frozenset(self._callers.known))
        for one in inbound:
            name = names.listener(names.INBOUND, one.workload.name)
            self._add(names.LISTENER, name, listeners.inbound, one)
            policies = protecting(one.workload, self._view.snapshot)
            authorization = self._kept((rbac.at_receiver, name), rbac.at_receiver, policies, callers)
            text = f"{one.workload.name} inbound"
            self._add(names.ROUTES, name, routes.direct, name, names.ORIGINAL_DESTINATION_CLUSTER, text, authorization)
        self._add(names.CLUSTER, names.ORIGINAL_DESTINATION_CLUSTER, clusters.original_destination_cluster)

    def _believable(self, _standings: object, bound: frozenset[str]) -> rbac.Callers:
        """Workloads that an address may stand for: those of other nodes, and those of this node that are `bound` to a namespace.

        Whoever uses the address of another workload of this node came after it (the kernel's table says the same: agent.bpf.tables).
        """
        workloads = sorted(self._view.snapshot.workloads.items())
        return rbac.Callers([w for _, w in workloads if w.node != self._node or w.name in bound], self._trust_domain)

    def _scope(self, address: str, port: int, configuration: str) -> None:
        """Add a scope unless the destination is taken: Envoy refuses two scopes with one key."""
        name = names.destination(address, port)
        if name not in self._result[names.SCOPE]:
            self._add(names.SCOPE, name, routes.scope, name, configuration)

    def _add(self, kind: str, name: str, make: Callable[..., Message], *inputs: Any) -> None:
        self._result[kind][name] = self._kept((kind, name), _packed, make, *inputs)


def _differ_in_endpoints_alone(before: View, after: View) -> bool:
    """In nothing but the endpoints of service ports, and what the receiver asks about callers. What is the same is the same object."""
    one, other = before.snapshot, after.snapshot
    same = one.services is other.services and one.routes is other.routes and one.policies is other.policies
    return same and before.asking is after.asking and before.used is after.used


def _touched(before: View, after: View) -> frozenset[Key]:
    """Service ports that have other endpoints, or send requests to one that has."""
    if before.endpoints is after.endpoints:
        return frozenset()
    touched = frozenset(key for key in after.used if before.endpoints.get(key) is not after.endpoints.get(key))
    return touched.union(key for key, attached in after.attached.items() if not touched.isdisjoint(_backends(attached)))


def _backends(attached: Iterable[Route]) -> set[Key]:
    return {(backend.service, backend.port) for route in attached for rule in route.rules for backend in rule.backends}


def _packed(make: Callable[..., Message], *inputs: Any) -> Resource:
    return pack(make(*inputs))


def _targets(view: View, workload: Workload) -> Iterable[tuple[int, str]]:
    found: dict[int, str] = {}
    for backing in workload.backing:
        for port, target in backing.ports.items():
            service_port = view.port(backing.service, port)
            found[target] = found.get(target) or (service_port.app_protocol if service_port else "")
    return sorted(found.items())
