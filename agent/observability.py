"""Telemetry as the agent sees it, and what follows from it for a service, a workload or a namespace. Part of the model (`agent.model`); pure.

The field meanings are those of meshapi/discovery.proto; shares of requests are millionths. The most specific Telemetry that says a part decides about it: that
of the service that is called, of its namespace, of the mesh. Where spans go, and what is told of connections, is a matter of namespaces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from meshapi import discovery_pb2 as pb

ALL = 1_000_000
"""Every request."""
DEFAULT_SAMPLING = ALL // 100
"""Of services of which traces are wanted and nobody says how many."""
MESH = "mesh"


@dataclass(frozen=True, slots=True)
class Tracing:
    """`collector` is a service and one of its ports. What is None is as less specific ones say."""

    collector: tuple[str, int] | None = None
    sampling: int | None = None
    accept_from_outside: bool | None = None


@dataclass(frozen=True, slots=True)
class AccessLogs:
    """`errors`: failed requests are logged whatever `sampling` says."""

    enabled: bool
    sampling: int = ALL
    errors: bool = True


@dataclass(frozen=True, slots=True)
class Telemetry:
    """One resource; a part that is None says nothing."""

    name: str
    scopes: tuple[str, ...]
    tracing: Tracing | None = None
    access: AccessLogs | None = None
    connections: bool | None = None


def decode(m: pb.Telemetry) -> Telemetry:
    """Turn the message into its dataclass. Raises ValueError for a share that is more than all, or a collector without a port."""
    tracing = access = None
    if m.HasField("tracing"):
        t = m.tracing
        sampling = t.sampling if t.HasField("sampling") else None
        if t.collector and not 1 <= t.port <= 65535:
            raise ValueError(f"telemetry {m.namespace}/{m.name} has a collector without a port")
        accept = t.accept_from_outside if t.HasField("accept_from_outside") else None
        tracing = Tracing((t.collector, t.port) if t.collector else None, sampling, accept)
    if m.HasField("access_logs"):
        access = AccessLogs(m.access_logs.enabled, m.access_logs.sampling, m.access_logs.errors_always)
    if max(tracing.sampling or 0 if tracing else 0, access.sampling if access else 0) > ALL:
        raise ValueError(f"telemetry {m.namespace}/{m.name} samples more than all requests")
    connections = m.connection_logs if m.HasField("connection_logs") else None
    return Telemetry(f"{m.namespace}/{m.name}", tuple(m.scopes), tracing, access, connections)


@dataclass(frozen=True, slots=True)
class Marks:
    """What is told of requests to one service: traces begun, lines written, of all requests and of those that failed."""

    service: str = ""
    traced: int = 0
    logged: int = 0
    errors: bool = False

    def __bool__(self) -> bool:
        return bool(self.traced or self.logged or self.errors)


class Observability:
    """Answers what all Telemetries together say."""

    def __init__(self, telemetry: Mapping[str, Telemetry]) -> None:
        """`telemetry` is by name; of one scope at most one decides."""
        self._by_scope = {scope: one for one in telemetry.values() for scope in one.scopes}

    @property
    def logs_requests(self) -> bool:
        """Does anybody want lines about requests?"""
        return any(one.access and one.access.enabled for one in self._by_scope.values())

    def collector(self, namespace: str) -> tuple[str, int] | None:
        """Where spans go from waypoints of this namespace's workloads, a service and one of its ports; None: nowhere."""
        return next((one.tracing.collector for one in self._said(namespace) if one.tracing and one.tracing.collector), None)

    def accepts_from_outside(self, namespace: str) -> bool:
        """Do gateways of this namespace believe trace context of strangers?"""
        said = (one.tracing.accept_from_outside for one in self._said(namespace) if one.tracing)
        return next((accept for accept in said if accept is not None), False)

    def collectors(self) -> frozenset[tuple[str, int]]:
        """All that are named."""
        return frozenset(one.tracing.collector for one in self._by_scope.values() if one.tracing and one.tracing.collector)

    def marks(self, service: str, port: int) -> Marks:
        """What is told of requests to a port of a service, which is NAMESPACE/NAME."""
        return self._marks(service.partition("/")[0], (service,), f"{service}:{port}")

    def received(self, namespace: str, services: Iterable[str]) -> Marks:
        """What is told of requests that a workload of this namespace, an endpoint of these services, receives."""
        return self._marks(namespace, sorted(services), "")

    def of_namespace(self, namespace: str) -> Marks:
        """What is told of requests that no service decides about."""
        return self._marks(namespace, (), "")

    def logs_connections(self, namespace: str) -> bool:
        """Are connections of this namespace's workloads logged?"""
        return next((one.connections for one in self._said(namespace) if one.connections is not None), False)

    def _marks(self, namespace: str, services: Iterable[str], words: str) -> Marks:
        said = list(self._said(namespace, services))
        access = next((one.access for one in said if one.access), None)
        sampling = next((one.tracing.sampling for one in said if one.tracing and one.tracing.sampling is not None), None)
        if sampling is None:
            sampling = DEFAULT_SAMPLING if any(one.tracing for one in said) else 0
        if access is None or not access.enabled:
            return Marks(words, sampling)
        return Marks(words, sampling, access.sampling, access.errors)

    def _said(self, namespace: str, services: Iterable[str] = ()) -> Iterator[Telemetry]:
        """Those that may speak, the most specific first."""
        for scope in (*(f"service/{one}" for one in services), f"namespace/{namespace}", MESH):
            if (found := self._by_scope.get(scope)) is not None:
                yield found
