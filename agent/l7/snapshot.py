"""From the workload model to everything that Envoy on this node should have. Pure functions, called by the supervisor on every change.

`build` makes all resources of the xDS server; `needs_inbound` tells the kernel side whose policies only the receiver can decide. Must
not touch Envoy, files or the kernel. Only what a local workload can reach over L7 costs anything: an L4 service has no resources here, and
a node without enrolled workloads has none at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from envoy.config.listener.v3 import listener_pb2
from envoy.service.runtime.v3 import rtds_pb2

from agent.balancing import node_zone, preferred
from agent.l7 import clusters, listeners, names, rbac, routes
from agent.l7.rbac import Authorization
from agent.l7.resources import Resource, Resources, pack
from agent.model import LocalWorkload, Route, ServicePort, Snapshot, Workload
from agent.policy import UDP


def build(snapshot: Snapshot, local: Sequence[LocalWorkload], *, trust_domain: str, traced: frozenset[str] = frozenset()) -> Resources:
    """Build all resources, by type URL and name.

    `local` are the enrolled workloads of this node; each one's `netns_path` must name one namespace for ever (put the cookie into it):
    Envoy keeps the sockets of a listener whose address did not change, so a reused path would leave it listening in the old namespace.
    `traced` names local workloads whose requests are streamed to the agent.
    """
    view = View(snapshot)
    inbound = receivers(snapshot, view)
    result: dict[str, dict[str, Resource]] = {
        kind: {} for kind in (names.CLUSTER, names.ENDPOINTS, names.LISTENER, names.SCOPE, names.ROUTES, names.RUNTIME)
    }
    result[names.RUNTIME][names.RUNTIME_LAYER] = pack(_runtime(traced))
    if not local:
        return result
    outbound = _Outbound(view, rbac.LocalCallers([one.workload for one in local], trust_domain))
    _services(view, outbound, _near(view, local[0].workload.node), result)
    _workload_addresses(view, outbound.callers, result)
    callers = rbac.Callers(_believable(snapshot, local), trust_domain) if any(one.workload.name in inbound for one in local) else None
    for one in sorted(local, key=lambda entry: entry.workload.name):
        _listener(result, listeners.outbound(one, trust_domain))
        if callers is not None and one.workload.name in inbound:
            _listener(result, listeners.inbound(one))
            name = names.listener(names.INBOUND, one.workload.name)
            authorization = rbac.at_receiver(one.workload, snapshot, callers)
            configuration = routes.direct(name, names.ORIGINAL_DESTINATION_CLUSTER, f"{one.workload.name} inbound", authorization)
            result[names.ROUTES][name] = pack(configuration)
    if any(one.workload.name in inbound for one in local):
        result[names.CLUSTER][names.ORIGINAL_DESTINATION_CLUSTER] = pack(clusters.original_destination_cluster())
    return result


def _believable(snapshot: Snapshot, local: Sequence[LocalWorkload]) -> list[Workload]:
    """Workloads that an address may stand for: those of other nodes, and those of this node that are bound to a namespace.

    Whoever uses the address of another workload of this node came after it (the kernel's table says the same: agent.bpf.tables).
    """
    bound = {one.workload.name for one in local}
    here = {one.workload.node for one in local}
    return [w for _, w in sorted(snapshot.workloads.items()) if w.node not in here or w.name in bound]


def needs_inbound(snapshot: Snapshot) -> frozenset[str]:
    """Names of workloads whose policies the caller's side can not decide, also for flows that come through a trusted local waypoint.

    That is so where the endpoints of one L7 service port are not protected alike: the load balancer picks the endpoint after
    authorization, so only the receiver knows which policies count. Every protected workload among them is named, whether its own policies
    need the request or not.
    """
    return _undecided(View(snapshot))


def receivers(snapshot: Snapshot, view: View | None = None) -> frozenset[str]:
    """Names of all workloads that have an inbound listener on their node: an L7 policy, or `needs_inbound`."""
    view = view or View(snapshot)
    return frozenset(w.name for w in snapshot.workloads.values() if view.needs_request(w)) | _undecided(view)


@dataclass(slots=True)
class View:
    """Indexes over one snapshot that the builders share: made once per build, in one pass over the workloads. Endpoints are those of `used`."""

    snapshot: Snapshot
    ports: dict[tuple[str, int], ServicePort] = field(init=False)
    endpoints: dict[tuple[str, int], list[tuple[Workload, int]]] = field(init=False)
    attached: dict[tuple[str, int], list[Route]] = field(init=False)
    used: frozenset[tuple[str, int]] = field(init=False)
    """Service ports that need a cluster: those with a waypoint and every backend of a route attached to one."""
    _alike: dict[tuple[str, int], bool] = field(init=False, default_factory=dict)
    _asking: dict[tuple[str, ...], bool] = field(init=False, default_factory=dict)
    _likeness: dict[tuple[tuple[str, ...], int], Authorization] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Index ports, endpoints and routes."""
        snapshot = self.snapshot
        self.ports = {
            (name, port.port): port for name, service in snapshot.services.items() for port in service.ports if port.protocol != UDP
        }
        self.attached = {}
        for route in snapshot.routes.values():
            for parent, port in route.parents:
                known = snapshot.services.get(parent)
                for one in known.ports if known else ():
                    if one.protocol == UDP:
                        continue
                    attached = self.attached.setdefault((parent, one.port), [])
                    if port in {0, one.port} and route not in attached:
                        attached.append(route)
        waypoints = {key for key, port in self.ports.items() if port.waypoint}
        backends = {
            (backend.service, backend.port)
            for key in waypoints
            for route in self.attached.get(key, ())
            for rule in route.rules
            for backend in rule.backends
            if not backend.invalid
        }
        self.used = frozenset(waypoints | (backends & self.ports.keys()))
        self.endpoints = {}
        if self.used:  # a mesh without L7 is spared the pass over all workloads
            self._index_endpoints()

    def _index_endpoints(self) -> None:
        for workload in self.snapshot.workloads.values():
            if workload.ready and workload.addresses:
                for backing in workload.backing:
                    for port, target in backing.ports.items():
                        if (backing.service, port) in self.used:
                            self.endpoints.setdefault((backing.service, port), []).append((workload, target))
        for found in self.endpoints.values():
            found.sort(key=lambda pair: pair[0].name)

    def needs_request(self, workload: Workload) -> bool:
        """The same as `rbac.needs_request`, asked once for each set of policies."""
        if workload.policies not in self._asking:
            self._asking[workload.policies] = rbac.needs_request(workload, self.snapshot)
        return self._asking[workload.policies]

    def known(self, service: str, port: int) -> bool:
        """Return True if this service port has a cluster."""
        return (service, port) in self.used

    def alike(self, service: str, port: int) -> bool:
        """Return True if all endpoints of a service port are protected alike; otherwise only the receiver can decide. The same on every node."""
        key = (service, port)
        if key not in self._alike:
            found = self.endpoints.get(key, [])
            self._alike[key] = all(self._protection(*one) == self._protection(*found[0]) for one in found)
        return self._alike[key]

    def _protection(self, workload: Workload, target: int) -> Authorization:
        key = (workload.policies, target)
        if key not in self._likeness:
            self._likeness[key] = rbac.likeness(workload, target, self.snapshot)
        return self._likeness[key]


@dataclass(slots=True)
class _Outbound:
    """What the callers' side of this node enforces."""

    view: View
    callers: rbac.LocalCallers

    def authorize(self, service: str, port: int) -> Authorization:
        """Return what routes to a service port enforce; nothing where it is the receiver's to decide."""
        endpoints = self.view.endpoints.get((service, port))
        if not endpoints or not self.view.alike(service, port):
            return Authorization()
        return rbac.at_caller(*endpoints[0], self.view.snapshot, self.callers)


def _undecided(view: View) -> frozenset[str]:
    found = set()
    for key in view.used:
        if not view.alike(*key):
            found |= {workload.name for workload, _ in view.endpoints[key] if workload.policies}
    return frozenset(found)


Endpoints = Mapping["tuple[str, int]", "list[tuple[Workload, int]]"]


def _near(view: View, node: str) -> Endpoints:
    """The endpoints of each service port that callers of this node prefer."""
    zone = node_zone(view.snapshot.workloads.values(), node)
    services = view.snapshot.services
    return {key: preferred(view.endpoints.get(key, ()), services[key[0]].traffic_distribution, node, zone) for key in view.used}


def _services(view: View, outbound: _Outbound, near: Endpoints, result: dict[str, dict[str, Resource]]) -> None:
    for name, port in sorted(view.used):
        cluster = names.service(name, port)
        service_port = view.ports[name, port]
        result[names.CLUSTER][cluster] = pack(clusters.service_cluster(name, service_port))
        endpoints = [(workload.addresses[0], target, workload.weight) for workload, target in near[name, port]]
        result[names.ENDPOINTS][cluster] = pack(clusters.service_endpoints(name, port, endpoints))
        if not service_port.waypoint:
            continue
        attached = view.attached.get((name, port))
        if attached:
            configuration = routes.service(cluster, attached, view.known, outbound.authorize)
        else:
            configuration = routes.direct(cluster, cluster, f"{name} default", outbound.authorize(name, port))
        result[names.ROUTES][cluster] = pack(configuration)
        for address in view.snapshot.services[name].addresses:
            _scope(result, address, port, cluster)


def _workload_addresses(view: View, callers: rbac.LocalCallers, result: dict[str, dict[str, Resource]]) -> None:
    """Give every address of a workload with an L7 policy its own scope. Two workloads on one address and port: the first by name."""
    asking = [workload for workload in view.snapshot.workloads.values() if workload.addresses and view.needs_request(workload)]
    for workload in sorted(asking, key=lambda one: one.name):
        for target, app_protocol in _targets(view, workload):
            name = names.workload(workload.name, target)
            result[names.CLUSTER][name] = pack(clusters.workload_cluster(workload.name, target, app_protocol, workload.addresses[0]))
            authorization = rbac.at_caller(workload, target, view.snapshot, callers)
            result[names.ROUTES][name] = pack(routes.direct(name, name, f"{workload.name} address", authorization))
            for address in workload.addresses:
                _scope(result, address, target, name)


def _targets(view: View, workload: Workload) -> Iterable[tuple[int, str]]:
    found: dict[int, str] = {}
    for backing in workload.backing:
        for port, target in backing.ports.items():
            service_port = view.ports.get((backing.service, port))
            found[target] = found.get(target) or (service_port.app_protocol if service_port else "")
    return sorted(found.items())


def _scope(result: dict[str, dict[str, Resource]], address: str, port: int, configuration: str) -> None:
    """Add a scope unless the destination is taken: Envoy refuses two scopes with one key."""
    scope = routes.scope(address, port, configuration)
    result[names.SCOPE].setdefault(scope.name, pack(scope))


def _listener(result: dict[str, dict[str, Resource]], listener: listener_pb2.Listener) -> None:
    result[names.LISTENER][listener.name] = pack(listener)


def _runtime(traced: frozenset[str]) -> rtds_pb2.Runtime:
    runtime = rtds_pb2.Runtime(name=names.RUNTIME_LAYER)
    runtime.layer.update({names.trace_key(workload): 100 for workload in sorted(traced)})
    return runtime
