"""The workload model as the agent sees it: frozen dataclasses, decoded once from what the controller sends.

Owned by the discovery client (`agent.discovery`), read by everything else. Names are always "NAMESPACE/NAME". Ports and integers
are host order, addresses are text. The field meanings are those of meshapi/discovery.proto.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from agent.compact import Labels, Shared
from meshapi import discovery_pb2 as pb


class Action(enum.Enum):
    """What a policy does with what it matches."""

    ALLOW = 0
    DENY = 1
    AUDIT = 2


class MatchKind(enum.Enum):
    """How a string is compared. PREFIX in a path means whole path elements (Gateway API, HTTPPathMatch)."""

    EXACT = 0
    PREFIX = 1
    REGEX = 2
    SUFFIX = 3
    PRESENT = 4


@dataclass(frozen=True, slots=True)
class Backing:
    """A service that a workload is an endpoint of; `ports` (TCP) and `udp` map service port to target port."""

    service: str
    ports: Mapping[int, int]
    udp: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))

    def targets(self, protocol: str) -> Mapping[int, int]:
        """Service port to target port of "TCP" or "UDP"."""
        return self.udp if protocol == "UDP" else self.ports


@dataclass(frozen=True, slots=True)
class Workload:
    """A pod or process that sends or receives traffic."""

    name: str
    service_account: str
    node: str
    labels: Mapping[str, str]
    addresses: tuple[str, ...]
    network_namespace: str
    enrolled: bool
    ready: bool
    backing: tuple[Backing, ...] = ()
    policies: tuple[str, ...] = ()
    zone: str = ""
    weight: int = 1
    acceleration: str = ""
    """"", "enabled" or "force"."""

    @property
    def namespace(self) -> str:
        """The part of the name before the slash."""
        return self.name.partition("/")[0]

    def identity(self, trust_domain: str) -> str:
        """SPIFFE ID of this workload's service account (https://spiffe.io/docs/latest/spiffe-about/spiffe-concepts/)."""
        return f"spiffe://{trust_domain}/ns/{self.namespace}/sa/{self.service_account}"


@dataclass(frozen=True, slots=True)
class ServicePort:
    """One port of a service; `waypoint` says that it is L7, `reason` says why or why not."""

    port: int
    name: str
    protocol: str
    app_protocol: str
    waypoint: bool
    reason: str


def port_name(port: int, protocol: str) -> str:
    """`53` over TCP, `53/udp` over UDP: behind "NAMESPACE/SERVICE:" the name of a service port on the command line, in events and in metrics."""
    return f"{port}/udp" if protocol == "UDP" else str(port)


@dataclass(frozen=True, slots=True)
class Service:
    """A name with virtual addresses that stands for a set of workloads."""

    name: str
    addresses: tuple[str, ...]
    ports: tuple[ServicePort, ...]
    traffic_distribution: str = ""
    """"", "PreferSameZone" or "PreferSameNode"."""
    affinity_s: int = 0
    """Seconds for which a caller stays with its endpoint after its last new connection; 0 = no affinity."""
    load_balancing: str = ""
    """"" (weighted random) or "least-connections"."""


@dataclass(frozen=True, slots=True)
class StringMatch:
    """One comparison."""

    kind: MatchKind
    value: str


@dataclass(frozen=True, slots=True)
class RouteMatch:
    """All parts must match. `path` None and `method` "" match everything; headers and query are (name, match) pairs."""

    path: StringMatch | None = None
    method: str = ""
    headers: tuple[tuple[str, StringMatch], ...] = ()
    query: tuple[tuple[str, StringMatch], ...] = ()


@dataclass(frozen=True, slots=True)
class HeaderEdit:
    """Changes to a header map, in the order set, add, remove."""

    set: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    add: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    remove: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Backend:
    """A weighted target of a rule. `invalid` not empty: it cannot be resolved, and its share of requests answers 500."""

    service: str
    port: int
    weight: int
    invalid: str = ""
    request_headers: HeaderEdit = HeaderEdit()
    response_headers: HeaderEdit = HeaderEdit()


@dataclass(frozen=True, slots=True)
class Retry:
    """`attempts` retries after the first try, on `codes` and on connection failures; `backoff_ms` 0 = Envoy's default."""

    attempts: int
    codes: tuple[int, ...]
    backoff_ms: int


@dataclass(frozen=True, slots=True)
class RouteRule:
    """Any of `matches` selects it (none: every request). Timeouts in milliseconds, 0 = none."""

    name: str
    matches: tuple[RouteMatch, ...]
    backends: tuple[Backend, ...]
    retry: Retry | None
    request_timeout_ms: int
    backend_request_timeout_ms: int
    request_headers: HeaderEdit
    response_headers: HeaderEdit


@dataclass(frozen=True, slots=True)
class Route:
    """An HTTPRoute, resolved. `parents` are (service, port) with port 0 for every port; `created` is Unix seconds."""

    name: str
    parents: tuple[tuple[str, int], ...]
    hostnames: tuple[str, ...]
    rules: tuple[RouteRule, ...]
    created: int


@dataclass(frozen=True, slots=True)
class Source:
    """Who calls: all non-empty lists must match, each by any of its values; `labels` are (name, value) pairs, all of which the caller must have."""

    principals: tuple[str, ...] = ()
    not_principals: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    not_namespaces: tuple[str, ...] = ()
    service_accounts: tuple[str, ...] = ()
    not_service_accounts: tuple[str, ...] = ()
    ip_blocks: tuple[str, ...] = ()
    not_ip_blocks: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Operation:
    """What is called: all non-empty lists must match, each by any of its values."""

    ports: tuple[int, ...] = ()
    not_ports: tuple[int, ...] = ()
    methods: tuple[str, ...] = ()
    not_methods: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    not_paths: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    not_hosts: tuple[str, ...] = ()
    protocols: tuple[str, ...] = ()

    @property
    def l7(self) -> bool:
        """True if deciding this needs the request, not only the connection."""
        return any((self.methods, self.not_methods, self.paths, self.not_paths, self.hosts, self.not_hosts))


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """Any of `sources` (none: every caller) and any of `operations` (none: every operation)."""

    sources: tuple[Source, ...] = ()
    operations: tuple[Operation, ...] = ()


@dataclass(frozen=True, slots=True)
class Policy:
    """An AuthorizationPolicy. DENY is evaluated before ALLOW; an ALLOW policy without rules denies everything; AUDIT is a DENY that only counts."""

    name: str
    action: Action
    rules: tuple[PolicyRule, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """How a snapshot differs from the one of version `base`: names that were added, changed or removed."""

    base: str
    workloads: frozenset[str] = frozenset()
    services: frozenset[str] = frozenset()
    routes: frozenset[str] = frozenset()
    policies: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole model at one version; every mapping is keyed by "NAMESPACE/NAME"."""

    version: str = ""
    workloads: Mapping[str, Workload] = field(default_factory=lambda: MappingProxyType({}))
    services: Mapping[str, Service] = field(default_factory=lambda: MappingProxyType({}))
    routes: Mapping[str, Route] = field(default_factory=lambda: MappingProxyType({}))
    policies: Mapping[str, Policy] = field(default_factory=lambda: MappingProxyType({}))
    delta: Delta | None = None
    """None: not known, compare."""

    def since(self, before: Snapshot) -> Delta | None:
        """What differs from `before`; None: not known, compare."""
        if self is before:
            return Delta(before.version)
        return self.delta if self.delta is not None and self.delta.base == before.version else None

    def endpoints(self, service: str, port: int, protocol: str = "TCP") -> list[tuple[Workload, int]]:
        """Ready workloads behind a service port with the port each listens on, sorted by name; not-ready ones are left out."""
        found = []
        for workload in self.workloads.values():
            if workload.ready:
                targets = (b.targets(protocol) for b in workload.backing if b.service == service)
                found += [(workload, ports[port]) for ports in targets if port in ports]
        return sorted(found, key=lambda pair: pair[0].name)


@dataclass(frozen=True, slots=True)
class LocalWorkload:
    """An enrolled workload of this node, bound to the network namespace that exists now.

    `netns_cookie` is never reused within one boot (net/core/net_namespace.c, net_cookie). `netns_path` is a mount of exactly that
    namespace, owned by the agent.
    """

    workload: Workload
    netns_cookie: int
    netns_path: str


Entity = Workload | Service | Route | Policy


def decode(entity: bytes, node: str | None = None) -> Entity:
    """Turn an encoded meshapi `Entity` into its dataclass.

    If `node` is given, workloads of other nodes have no network namespace: only their own agent enters it, and 100,000 paths are 7 MB.
    Raises ValueError for bytes that are no Entity, or one of a kind that this version does not know: what a newer controller says must
    not be dropped silently.
    """
    message = pb.Entity()
    try:
        message.ParseFromString(entity)
    except Exception as error:
        raise ValueError(f"not an encoded Entity: {error}") from error
    kind = message.WhichOneof("kind")
    if kind == "workload":
        return _workload(message.workload, node)
    if kind == "service":
        return _service(message.service)
    if kind == "route":
        return _route(message.route)
    if kind == "policy":
        return _policy(message.policy)
    raise ValueError("an Entity of a kind that this agent does not know: upgrade the agent before the controller sends it")


# What repeats among workloads is one object: a name of a node, of a label, the ports of a service. Only addresses, names and the values
# of labels are each workload's own (agent.compact says what that saves).
_text: Shared[str, str] = Shared(str, 16384)
_texts: Shared[tuple[str, ...], tuple[str, ...]] = Shared(tuple)


def _workload(m: pb.Workload, node: str | None) -> Workload:
    return Workload(
        name=f"{m.namespace}/{m.name}",
        service_account=_text(m.service_account),
        node=_text(m.node),
        labels=_labels(m.labels),
        addresses=tuple(m.addresses),
        network_namespace=m.network_namespace if node in {None, m.node} else "",
        enrolled=m.enrolled,
        ready=m.ready,
        backing=_backings(tuple((b.service, tuple((p.service_port, p.target_port, p.protocol) for p in b.ports)) for b in m.backing)),
        policies=_texts(tuple(m.policies)),
        zone=_text(m.zone),
        weight=m.weight or 1,
        acceleration=_text(m.acceleration),
    )


def _labels(m: Mapping[str, str]) -> Mapping[str, str]:
    pairs = sorted(m.items())
    values = Labels.SEPARATOR.join(value for _, value in pairs)
    if values.count(Labels.SEPARATOR) > max(0, len(pairs) - 1):  # no Kubernetes label has one, but protobuf strings may
        return MappingProxyType(dict(pairs))
    return _same_labels((_texts(tuple(name for name, _ in pairs)), values))


_same_labels: Shared[tuple[tuple[str, ...], str], Labels] = Shared(lambda key: Labels(*key))

_Ports = tuple[tuple[int, int, str], ...]


def _make_targets(ports: tuple[tuple[int, int], ...]) -> Mapping[int, int]:
    return MappingProxyType(dict(ports))


_targets: Shared[tuple[tuple[int, int], ...], Mapping[int, int]] = Shared(_make_targets)


def _make_backing(key: tuple[str, _Ports]) -> Backing:
    service, ports = key
    tcp, udp = (tuple((port, to) for port, to, spoken in ports if (spoken or "TCP") == protocol) for protocol in ("TCP", "UDP"))
    return Backing(service, _targets(tcp), _targets(udp))


_backing: Shared[tuple[str, _Ports], Backing] = Shared(_make_backing)


def _make_backings(keys: tuple[tuple[str, _Ports], ...]) -> tuple[Backing, ...]:
    return tuple(_backing(key) for key in keys)


_backings: Shared[tuple[tuple[str, _Ports], ...], tuple[Backing, ...]] = Shared(_make_backings)


def _service(m: pb.Service) -> Service:
    ports = (ServicePort(p.port, p.name, p.protocol, p.app_protocol, p.waypoint, p.reason) for p in m.ports)
    return Service(
        name=f"{m.namespace}/{m.name}",
        addresses=tuple(m.addresses),
        ports=tuple(ports),
        traffic_distribution=m.traffic_distribution,
        affinity_s=m.affinity_s,
        load_balancing=m.load_balancing,
    )


def _string(m: pb.StringMatch) -> StringMatch:
    return StringMatch(MatchKind(m.kind), m.value)


def _edit(m: pb.HeaderEdit) -> HeaderEdit:
    return HeaderEdit(MappingProxyType(dict(m.set)), MappingProxyType(dict(m.add)), tuple(m.remove))


def _match(m: pb.RouteMatch) -> RouteMatch:
    return RouteMatch(
        path=_string(m.path) if m.HasField("path") else None,
        method=m.method,
        headers=tuple((h.name, _string(h.value)) for h in m.headers),
        query=tuple((q.name, _string(q.value)) for q in m.query),
    )


def _rule(m: pb.RouteRule) -> RouteRule:
    return RouteRule(
        name=m.name,
        matches=tuple(_match(match) for match in m.matches),
        backends=tuple(
            Backend(b.service, b.port, b.weight, b.invalid, _edit(b.request_headers), _edit(b.response_headers)) for b in m.backends
        ),
        retry=Retry(m.retry.attempts, tuple(m.retry.codes), m.retry.backoff_ms) if m.HasField("retry") else None,
        request_timeout_ms=m.request_timeout_ms,
        backend_request_timeout_ms=m.backend_request_timeout_ms,
        request_headers=_edit(m.request_headers),
        response_headers=_edit(m.response_headers),
    )


def _route(m: pb.Route) -> Route:
    return Route(
        name=f"{m.namespace}/{m.name}",
        parents=tuple((p.service, p.port) for p in m.parents),
        hostnames=tuple(m.hostnames),
        rules=tuple(_rule(rule) for rule in m.rules),
        created=m.created,
    )


def _blocks(texts: Iterable[str]) -> tuple[str, ...]:
    """CIDR blocks as they are; ValueError for what is none: a block that cannot be compared must not be taken for one that does not match."""
    for text in texts:
        ipaddress.ip_network(text, strict=False)
    return tuple(texts)


def _policy(m: pb.Policy) -> Policy:
    return Policy(
        name=f"{m.namespace}/{m.name}",
        action=Action(m.action),
        rules=tuple(
            PolicyRule(
                sources=tuple(
                    Source(
                        tuple(s.principals),
                        tuple(s.not_principals),
                        tuple(s.namespaces),
                        tuple(s.not_namespaces),
                        tuple(s.service_accounts),
                        tuple(s.not_service_accounts),
                        _blocks(s.ip_blocks),
                        _blocks(s.not_ip_blocks),
                        tuple(sorted(s.labels.items())),
                    )
                    for s in rule.sources
                ),
                operations=tuple(
                    Operation(
                        tuple(o.ports),
                        tuple(o.not_ports),
                        tuple(o.methods),
                        tuple(o.not_methods),
                        tuple(o.paths),
                        tuple(o.not_paths),
                        tuple(o.hosts),
                        tuple(o.not_hosts),
                        tuple(o.protocols),
                    )
                    for o in rule.operations
                ),
            )
            for rule in m.rules
        ),
    )
