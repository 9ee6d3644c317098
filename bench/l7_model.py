"""A large L7 model, encoded as a controller sends it: 250 workloads of one node, 2,000 services, 500 routes. Called by `bench.scale` and by its test.

Every service is L7. Each workload of the node is the last endpoint of one service, all other endpoints are on other nodes. A quarter of the services has a
route with three rules: by path and by header to the next service, and a split between both. Each namespace has an AuthorizationPolicy; that of every tenth
needs the request. Every twentieth service has a TrafficPolicy: limits and ejection, half of them health checks too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from agent.compact import Table
from agent.model import Delta, Snapshot, decode
from bench.model import resource
from meshapi import discovery_pb2 as pb

PORT, TARGET_PORT = 80, 8080
NODE = "node-1"
KINDS = {
    "workload": "workloads",
    "service": "services",
    "route": "routes",
    "policy": "policies",
    "traffic": "traffic",
}
"""First part of a resource's name, and the field of a Snapshot that it stands in."""


@dataclass(frozen=True, slots=True)
class L7Size:
    """How much there is of everything."""

    local: int = 250
    services: int = 2000
    routes: int = 500
    endpoints: int = 5
    """Of each service on other nodes; together fewer than 2^16."""
    namespaces: int = 100
    nodes: int = 40

    def __str__(self) -> str:
        remote = self.services * self.endpoints
        return f"{self.local} local workloads, {self.services} L7 services, {self.routes} routes, {remote} endpoints on {self.nodes} other nodes"


@dataclass(frozen=True, slots=True)
class L7Model:
    """Everything of one size."""

    size: L7Size = L7Size()

    def resources(self) -> Iterator[pb.Resource]:
        """Every resource, encoded."""
        for number in range(self.size.namespaces):
            yield self.policy(number)
        for number in range(self.size.services):
            yield self.service(number)
            for endpoint in range(self.size.endpoints):
                yield self.endpoint(number, endpoint)
            if number % 20 == 0:
                yield self.traffic(number)
        for number in range(self.size.routes):
            yield self.route(number)
        for number in range(self.size.local):
            yield self.local(number)

    def namespace(self, number: int) -> str:
        """Namespace of a service."""
        return f"team-{number % self.size.namespaces}"

    def service_name(self, number: int) -> str:
        """Full name of a service."""
        return f"{self.namespace(number)}/service-{number}"

    def address(self, number: int) -> str:
        """Address of a service."""
        return f"10.96.{number >> 8}.{number & 255}"

    def service(self, number: int) -> pb.Resource:
        """A service of one HTTP port at the waypoint."""
        namespace, _, name = self.service_name(number).partition("/")
        port = pb.ServicePort(port=PORT, name="http", protocol="TCP", app_protocol="http", waypoint=True, reason="the benchmark's")
        message = pb.Service(namespace=namespace, name=name, addresses=[self.address(number)], ports=[port])
        return resource("service", namespace, name, pb.Entity(service=message))

    def endpoint(self, number: int, endpoint: int, *, ready: bool = True) -> pb.Resource:
        """An endpoint of a service on another node."""
        node = f"remote-{(number * self.size.endpoints + endpoint) % self.size.nodes}"
        return self._workload(number, f"service-{number}-{endpoint:05d}", node, self.endpoint_address(number, endpoint), ready=ready)

    def endpoint_address(self, number: int, endpoint: int) -> str:
        """Address of an endpoint on another node."""
        index = number * self.size.endpoints + endpoint
        return f"10.{100 + (index >> 16)}.{index >> 8 & 255}.{index & 255}"

    def local(self, number: int, *, ready: bool = True, version: str = "v1") -> pb.Resource:
        """A workload of the node; it backs the service of the same number."""
        name = f"service-{number}-here"
        return self._workload(number, name, NODE, f"10.77.{number >> 8}.{number & 255}", ready=ready, version=version)

    def _workload(self, number: int, name: str, node: str, address: str, *, ready: bool = True, version: str = "v1") -> pb.Resource:
        namespace = self.namespace(number)
        workload = pb.Workload(
            namespace=namespace,
            name=name,
            service_account=f"service-{number}",
            node=node,
            labels={"app": f"service-{number}", "version": version},
            addresses=[address],
            network_namespace=name,
            enrolled=True,
            ready=ready,
            backing=[pb.Backing(service=self.service_name(number), ports=[pb.PortMapping(service_port=PORT, target_port=TARGET_PORT)])],
            policies=[f"{namespace}/callers"],
        )
        return resource("workload", namespace, name, pb.Entity(workload=workload))

    def policy(self, number: int, *, method: str = "GET") -> pb.Resource:
        """The policy of a namespace: everybody of two namespaces, in every tenth for reading only."""
        namespace = self.namespace(number)
        sources = [pb.Source(namespaces=[namespace]), pb.Source(namespaces=[self.namespace(number + 1)])]
        operation = pb.Operation(ports=[TARGET_PORT], methods=[method, "HEAD"] if number % 10 == 0 else [])
        rules = [pb.PolicyRule(sources=sources, operations=[operation])]
        return resource("policy", namespace, "callers", pb.Entity(policy=pb.Policy(namespace=namespace, name="callers", rules=rules)))

    def route(self, number: int, *, weight: int = 10, header: str = "1", bad: str = "") -> pb.Resource:
        """The route of a service; `bad`: a regular expression that its first rule asks of the path."""
        namespace, _, name = self.service_name(number).partition("/")
        here, there = self.service_name(number), self.service_name((number + 1) % self.size.services)
        path = pb.StringMatch(kind=pb.StringMatch.REGEX, value=bad) if bad else pb.StringMatch(kind=pb.StringMatch.PREFIX, value="/v2")
        beta = pb.NamedMatch(name="x-beta", value=pb.StringMatch(kind=pb.StringMatch.EXACT, value=header))
        own, other = ([pb.Backend(service=one, port=PORT, weight=1)] for one in (here, there))
        limits: dict[str, Any] = {"request_timeout_ms": 5000, "retry": pb.Retry(attempts=2, codes=[503])}
        rules = [
            pb.RouteRule(matches=[pb.RouteMatch(path=path)], backends=other, **limits),
            pb.RouteRule(matches=[pb.RouteMatch(headers=[beta])], backends=own, **limits),
            pb.RouteRule(
                backends=[pb.Backend(service=here, port=PORT, weight=90), pb.Backend(service=there, port=PORT, weight=weight)], **limits
            ),
        ]
        message = pb.Route(namespace=namespace, name=name, parents=[pb.Parent(service=here, port=PORT)], rules=rules)
        return resource("route", namespace, name, pb.Entity(route=message))

    def traffic(self, number: int, *, requests: int = 1000) -> pb.Resource:
        """The TrafficPolicy of a service."""
        namespace, _, name = self.service_name(number).partition("/")
        message = pb.TrafficPolicy(namespace=namespace, name=name, targets=[pb.Parent(service=self.service_name(number), port=PORT)])
        message.limits.requests = requests
        outliers = message.outliers
        outliers.errors, outliers.interval_ms, outliers.ejection_ms, outliers.max_ejection_ms, outliers.max_percent = (
            5,
            10_000,
            30_000,
            300_000,
            50,
        )
        if number % 40 == 0:
            check = message.health_check
            check.path, check.interval_ms, check.timeout_ms, check.unhealthy, check.healthy = "/healthz", 3_600_000, 1000, 3, 1
            check.kind = pb.HealthCheck.HTTP
        return resource("traffic", namespace, name, pb.Entity(traffic=message))


@dataclass(slots=True)
class History:
    """Snapshots one after the other, as `agent.discovery` makes them."""

    model: L7Model
    snapshot: Snapshot = field(default_factory=Snapshot)
    _serial: int = 0

    def take(self, resources: Iterable[pb.Resource], removed: Iterable[str] = ()) -> Snapshot:
        """The next one: with these resources, and without those of the names in `removed`."""
        changes: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
        for one in resources:
            kind, _, name = one.name.partition("/")
            changes[kind][name] = decode(one.entity, NODE)
        for full in removed:
            kind, _, name = full.partition("/")
            changes[kind][name] = None
        before, self._serial = self.snapshot, self._serial + 1
        tables: dict[str, Any] = {}
        for kind, place in KINDS.items():
            table = getattr(before, place)
            tables[place] = (table if isinstance(table, Table) else Table()).changed(changes[kind])
        delta = Delta(before.version, **{place: frozenset(changes[kind]) for kind, place in KINDS.items()}) if before.version else None
        self.snapshot = Snapshot(version=str(self._serial), delta=delta, **tables)
        return self.snapshot
