"""The workload model as the agent sees it: frozen dataclasses, decoded once from what the controller sends.

Owned by the discovery client (`agent.discovery`), read by everything else. Names are always "NAMESPACE/NAME". Ports and integers
are host order, addresses are text. The field meanings are those of meshapi/discovery.proto.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from agent import observability, traffic
from agent.compact import Labels, Shared, differing
from agent.external import External
from agent.observability import Telemetry
from agent.routing import Cors, Mirror, Redirect, Rewrite, Session
from agent.traffic import TrafficPolicy
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


class Mtls(enum.Enum):
    """Mutual TLS between nodes, in the words of Istio's PeerAuthentication: off, accepted besides plaintext, required."""

    DISABLE = 0
    PERMISSIVE = 1
    STRICT = 2


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
    mtls: Mtls = Mtls.DISABLE
    """What it accepts from other nodes, and whether callers there use HBONE."""
    mtls_ports: tuple[tuple[int, Mtls], ...] = ()
    """Ports it listens on that differ, sorted."""
    awaits_tunnels: bool = False
    """Nobody has said yet that tunnels end at it: see `tunnelled_at`."""
    authentications: tuple[str, ...] = ()
    """RequestAuthentications that select it, sorted."""
    egress_deny: bool = False
    """It may go to services and workloads of the mesh, and nowhere else."""
    pod_uid: str = ""
    """Of a pod of Kubernetes: its node's agent finds the network namespace by this (`agent.pods`), and `network_namespace` is empty."""
    probe_ports: tuple[int, ...] = ()
    """TCP ports that its node's kubelet calls, whatever policies say: those of its probes and lifecycle handlers, sorted."""

    def mtls_of(self, port: int) -> Mtls:
        """The mode of a port that it listens on."""
        return next((mode for number, mode in self.mtls_ports if number == port), self.mtls)

    def tunnelled_at(self, port: int) -> bool:
        """Do callers on other nodes need a tunnel to a port that it listens on? To a PERMISSIVE one not before there can be any."""
        return self.needs_tunnel(self.mtls_of(port))

    def needs_tunnel(self, mode: Mtls) -> bool:
        """The same by the mode of a port."""
        return mode is Mtls.STRICT or (mode is Mtls.PERMISSIVE and not self.awaits_tunnels)

    @property
    def tunnelled(self) -> bool:
        """Is any of its ports reached through HBONE by callers on other nodes, now or soon?"""
        return self.mtls is not Mtls.DISABLE or any(mode is not Mtls.DISABLE for _, mode in self.mtls_ports)

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
    fail_open: bool = False
    """Do connections to its L7 ports go past a waypoint that is away?"""
    external: External | None = None
    """Set: it stands for hosts outside the mesh."""


@dataclass(frozen=True, slots=True)
class StringMatch:
    """One comparison."""

    kind: MatchKind
    value: str


@dataclass(frozen=True, slots=True)
class GrpcMethod:
    """A method of gRPC; None matches every one."""

    service: StringMatch | None = None
    method: StringMatch | None = None


@dataclass(frozen=True, slots=True)
class RouteMatch:
    """All parts must match. `path` None and `method` "" match everything; headers and query are (name, match) pairs."""

    path: StringMatch | None = None
    method: str = ""
    headers: tuple[tuple[str, StringMatch], ...] = ()
    query: tuple[tuple[str, StringMatch], ...] = ()
    grpc: GrpcMethod | None = None


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
    hostname: str = ""


@dataclass(frozen=True, slots=True)
class Retry:
    """`attempts` retries after the first try, on `codes` and on connection failures; `backoff_ms` 0 = Envoy's default."""

    attempts: int
    codes: tuple[int, ...]
    backoff_ms: int


@dataclass(frozen=True, slots=True)
class RouteRule:
    """Any of `matches` selects it (none: every request), for callers that are in all of `callers`. Timeouts in milliseconds, 0 = none.

    `invalid` not empty: it has a filter that cannot be resolved, and what it matches answers 500.
    """

    name: str
    matches: tuple[RouteMatch, ...]
    backends: tuple[Backend, ...]
    retry: Retry | None
    request_timeout_ms: int
    backend_request_timeout_ms: int
    request_headers: HeaderEdit
    response_headers: HeaderEdit
    redirect: Redirect | None = None
    rewrite: Rewrite | None = None
    mirrors: tuple[Mirror, ...] = ()
    cors: Cors | None = None
    session: Session | None = None
    callers: tuple[tuple[Source, ...], ...] = ()
    invalid: str = ""
    claims: tuple[ClaimCondition, ...] = ()
    """All of them, of a verified token (`agent.l7.claims`)."""


@dataclass(frozen=True, slots=True)
class AtGateway:
    """A listener of a gateway that a route holds for; `hostnames` are what both have in common, () is every host."""

    gateway: str
    listener: str
    hostnames: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GatewayListener:
    """One listener of a gateway. `hostname` "" is every host; without `certificates`, which are names of Secrets, it is plain HTTP."""

    name: str
    port: int
    hostname: str = ""
    certificates: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Gateway:
    """What listens in the namespace of each enrolled workload that has the label of `agent.l7.gateways` with its name."""

    name: str
    listeners: tuple[GatewayListener, ...] = ()


@dataclass(frozen=True, slots=True)
class Route:
    """An HTTPRoute or, if `grpc`, a GRPCRoute, resolved. `parents` are (service, port) with port 0 for every port; `created` is Unix seconds."""

    name: str
    parents: tuple[tuple[str, int], ...]
    hostnames: tuple[str, ...]
    rules: tuple[RouteRule, ...]
    created: int
    grpc: bool = False
    gateways: tuple[AtGateway, ...] = ()
    not_from_gateways: tuple[str, ...] = ()
    """Services that gateways do not send requests to."""

    @property
    def namespace(self) -> str:
        """The part of the name before the slash."""
        return self.name.partition("/")[0]

    def consumes(self, service: str) -> bool:
        """Is it for callers of its own namespace alone? So it is for a service of another (GEP-1294)."""
        return service.partition("/")[0] != self.namespace


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
    request_principals: tuple[str, ...] = ()
    not_request_principals: tuple[str, ...] = ()

    @property
    def l7(self) -> bool:
        """True if deciding this needs the request's token, not only the caller."""
        return bool(self.request_principals or self.not_request_principals)


@dataclass(frozen=True, slots=True)
class HeaderCondition:
    """Any of `values` (none: no demand) and none of `not_values`; a header that is not there has no value. `name` is in lower case."""

    name: str
    values: tuple[str, ...] = ()
    not_values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ClaimCondition:
    """The same of a claim of a verified token; `path` leads to it from the payload."""

    path: tuple[str, ...]
    values: tuple[str, ...] = ()
    not_values: tuple[str, ...] = ()


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
    headers: tuple[HeaderCondition, ...] = ()
    claims: tuple[ClaimCondition, ...] = ()

    @property
    def l7(self) -> bool:
        """True if deciding this needs the request, not only the connection."""
        return any((self.methods, self.not_methods, self.paths, self.not_paths, self.hosts, self.not_hosts, self.headers, self.claims))


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """Any of `sources` (none: every caller) and any of `operations` (none: every operation), and all of `also_sources` and `also_operations`."""

    sources: tuple[Source, ...] = ()
    operations: tuple[Operation, ...] = ()
    also_sources: tuple[Source, ...] = ()
    also_operations: tuple[Operation, ...] = ()


@dataclass(frozen=True, slots=True)
class Policy:
    """An AuthorizationPolicy. DENY is evaluated before ALLOW; an ALLOW policy without rules denies everything; AUDIT is a DENY that only counts."""

    name: str
    action: Action
    rules: tuple[PolicyRule, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenIssuer:
    """Who signs tokens, with which keys (a JWK set; "" = not known yet), where requests carry them and what becomes of them."""

    issuer: str
    audiences: tuple[str, ...] = ()
    keys: str = field(default="", repr=False)
    headers: tuple[tuple[str, str], ...] = ()
    """(name, prefix); if there are neither headers, parameters nor cookies, Envoy's defaults."""
    parameters: tuple[str, ...] = ()
    cookies: tuple[str, ...] = ()
    forward: bool = False
    payload_header: str = ""
    claim_headers: tuple[tuple[str, str], ...] = ()
    """(header, claim)."""


@dataclass(frozen=True, slots=True)
class Authentication:
    """A RequestAuthentication: tokens of these issuers are believed, a request with any other is answered with 401."""

    name: str
    issuers: tuple[TokenIssuer, ...] = ()


_NO_AUTHENTICATIONS: Mapping[str, Authentication] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class WireGuardEnd:
    """How a node is reached over WireGuard: its Curve25519 key (32 bytes), UDP port and addresses, at most one of each family."""

    public_key: bytes
    port: int
    endpoints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a mesh that encrypts with WireGuard between nodes; `wireguard` None: this one cannot."""

    name: str
    wireguard: WireGuardEnd | None = None


@dataclass(frozen=True, slots=True)
class Direct:
    """Which workloads are reached without a tunnel, because WireGuard encrypts the way to their node: all on `nodes` but those called `without`."""

    nodes: frozenset[str] = frozenset()
    without: frozenset[str] = frozenset()

    def __call__(self, workload: Workload) -> bool:
        """Is it one of them?"""
        return workload.node in self.nodes and workload.name not in self.without

    def tunnels(self, workload: Workload, mode: Mtls) -> bool:
        """Does a caller on another node take a tunnel to a port with this mode? STRICT wants the caller's own certificate, which WireGuard cannot show."""
        return workload.needs_tunnel(mode) and (mode is Mtls.STRICT or not self(workload))


NO_DIRECT = Direct()


@dataclass(frozen=True, slots=True)
class Delta:
    """How a snapshot differs from the one of version `base`: names that were added, changed or removed."""

    base: str
    workloads: frozenset[str] = frozenset()
    services: frozenset[str] = frozenset()
    routes: frozenset[str] = frozenset()
    policies: frozenset[str] = frozenset()
    traffic: frozenset[str] = frozenset()
    authentications: frozenset[str] = frozenset()
    nodes: frozenset[str] = frozenset()
    gateways: frozenset[str] = frozenset()
    telemetry: frozenset[str] = frozenset()


_KINDS = tuple(field.name for field in fields(Delta) if field.name != "base")


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
    traffic: Mapping[str, TrafficPolicy] = field(default_factory=lambda: MappingProxyType({}))
    authentications: Mapping[str, Authentication] = field(default_factory=lambda: _NO_AUTHENTICATIONS)
    nodes: Mapping[str, Node] = field(default_factory=lambda: MappingProxyType({}))
    """By the node's name; empty unless the mesh encrypts with WireGuard."""
    gateways: Mapping[str, Gateway] = field(default_factory=lambda: MappingProxyType({}))
    telemetry: Mapping[str, Telemetry] = field(default_factory=lambda: MappingProxyType({}))

    def since(self, before: Snapshot) -> Delta:
        """What differs from `before`, and perhaps more: if nobody has said, what is not the same object. Of tables that costs what differs."""
        if self is before:
            return Delta(before.version)
        if self.delta is not None and self.delta.base == before.version:
            return self.delta
        return Delta(
            before.version,
            **{kind: frozenset(differing(getattr(before, kind), getattr(self, kind))) for kind in _KINDS},
        )

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


Entity = Workload | Service | Route | Policy | TrafficPolicy | Authentication | Node | Gateway | Telemetry


def decode(entity: bytes, node: str | None = None) -> Entity:
    """Turn an encoded meshapi `Entity` into its dataclass.

    If `node` is given, workloads of other nodes have no network namespace and no UID: only their own agent looks there, and 100,000 paths are 7 MB.
    Raises ValueError for bytes that are no Entity, or one of a kind that this version does not know: what a newer controller says must
    not be dropped silently.
    """
    message = pb.Entity()
    try:
        message.ParseFromString(entity)
    except Exception as error:
        raise ValueError(f"not an encoded Entity: {error}") from error
    kind: str = message.WhichOneof("kind") or ""
    if kind == "workload":
        return _workload(message.workload, node)
    if kind in _DECODERS:
        return _DECODERS[kind](getattr(message, kind))
    raise ValueError("an Entity of a kind that this agent does not know: upgrade the agent before the controller sends it")


# What repeats among workloads is one object: a name of a node, of a label, the ports of a service. Only addresses, names and the values
# of labels are each workload's own (agent.compact says what that saves).
_text: Shared[str, str] = Shared(str, 16384)
_texts: Shared[tuple[str, ...], tuple[str, ...]] = Shared(tuple)


def _workload(m: pb.Workload, node: str | None) -> Workload:
    pod_uid, probe_ports = _pod_uid(m), _probe_ports(m)
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
        mtls=Mtls(m.mtls),
        mtls_ports=_mtls_ports(tuple((p.port, p.mode) for p in m.mtls_ports)),
        awaits_tunnels=m.awaits_tunnels,
        authentications=_texts(tuple(m.authentications)),
        egress_deny=m.egress_deny,
        pod_uid=pod_uid if node in {None, m.node} else "",
        probe_ports=probe_ports if node in {None, m.node} else (),
    )


_POD_UID = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32}")
"""RFC 4122, section 3, in lower case as the API server makes them; of static pods the kubelet makes an MD5 (pkg/kubelet/config/common.go, applyDefaults)."""


def _pod_uid(m: pb.Workload) -> str:
    """A UID becomes part of a path below the cgroup mount: nothing else may."""
    if m.pod_uid and not _POD_UID.fullmatch(m.pod_uid):
        raise ValueError(f"workload {m.namespace}/{m.name} has a pod UID {m.pod_uid[:300]!r} that is none")
    return m.pod_uid


def _probe_ports(m: pb.Workload) -> tuple[int, ...]:
    """A port that is none is refused: what is wrong here must not let the kubelet in somewhere else."""
    if wrong := [port for port in m.probe_ports if not 0 < port < 65536]:
        raise ValueError(f"workload {m.namespace}/{m.name} has a probe port {wrong[0]} that is none")
    return _ports(tuple(sorted(set(m.probe_ports))))


_ports: Shared[tuple[int, ...], tuple[int, ...]] = Shared(tuple)


def _make_mtls_ports(ports: tuple[tuple[int, int], ...]) -> tuple[tuple[int, Mtls], ...]:
    return tuple((port, Mtls(mode)) for port, mode in ports)


_mtls_ports: Shared[tuple[tuple[int, int], ...], tuple[tuple[int, Mtls], ...]] = Shared(_make_mtls_ports)


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
        fail_open=m.fail_open,
        external=External.of(m.external) if m.HasField("external") else None,
    )


def _node(m: pb.Node) -> Node:
    if not m.HasField("wireguard"):
        return Node(m.name)
    end = m.wireguard
    if len(end.public_key) != 32 or not any(end.public_key) or not 1 <= end.port <= 65535 or not end.endpoints:
        raise ValueError(f"node {m.name} has no usable WireGuard key, port or address")
    return Node(m.name, WireGuardEnd(end.public_key, end.port, tuple(str(ipaddress.ip_address(text)) for text in end.endpoints)))


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
        grpc=_grpc(m.grpc) if m.HasField("grpc") else None,
    )


def _grpc(m: pb.GrpcMethod) -> GrpcMethod:
    return GrpcMethod(_string(m.service) if m.HasField("service") else None, _string(m.method) if m.HasField("method") else None)


def _caller(s: pb.Source) -> Source:
    return Source(
        principals=tuple(s.principals),
        not_principals=tuple(s.not_principals),
        namespaces=tuple(s.namespaces),
        not_namespaces=tuple(s.not_namespaces),
        service_accounts=tuple(s.service_accounts),
        not_service_accounts=tuple(s.not_service_accounts),
        ip_blocks=_blocks(s.ip_blocks),
        not_ip_blocks=_blocks(s.not_ip_blocks),
        labels=tuple(sorted(s.labels.items())),
    )


def _claim(m: pb.ClaimCondition) -> ClaimCondition:
    return ClaimCondition(tuple(m.path), tuple(m.values), tuple(m.not_values))


def _rule(m: pb.RouteRule) -> RouteRule:
    return RouteRule(
        name=m.name,
        matches=tuple(_match(match) for match in m.matches),
        backends=tuple(
            Backend(b.service, b.port, b.weight, b.invalid, _edit(b.request_headers), _edit(b.response_headers), b.hostname)
            for b in m.backends
        ),
        retry=Retry(m.retry.attempts, tuple(m.retry.codes), m.retry.backoff_ms) if m.HasField("retry") else None,
        request_timeout_ms=m.request_timeout_ms,
        backend_request_timeout_ms=m.backend_request_timeout_ms,
        request_headers=_edit(m.request_headers),
        response_headers=_edit(m.response_headers),
        redirect=Redirect.of(m.redirect) if m.HasField("redirect") else None,
        rewrite=Rewrite.of(m.rewrite) if m.HasField("rewrite") else None,
        mirrors=tuple(Mirror(one.service, one.port, one.parts, one.whole) for one in m.mirrors),
        cors=_cors(m.cors) if m.HasField("cors") else None,
        session=Session(m.session.cookie, m.session.path, m.session.lifetime_ms, m.session.header) if m.HasField("session") else None,
        callers=tuple(tuple(_caller(source) for source in one.sources) for one in m.callers if one.sources or not one.claims),
        invalid=m.invalid,
        claims=tuple(_claim(condition) for one in m.callers for condition in one.claims),
    )


def _cors(m: pb.Cors) -> Cors:
    # (is it a regular expression?, text): what a StringMatch of an origin can be
    origins = tuple((origin.kind == pb.StringMatch.REGEX, origin.value) for origin in m.origins)
    return Cors(origins, m.methods, m.headers, m.expose, m.max_age_s, m.credentials)


def _route(m: pb.Route) -> Route:
    return Route(
        name=f"{m.namespace}/{m.name}",
        parents=tuple((p.service, p.port) for p in m.parents if p.service),
        hostnames=tuple(m.hostnames),
        rules=tuple(_rule(rule) for rule in m.rules),
        created=m.created,
        grpc=m.grpc,
        gateways=tuple(AtGateway(p.gateway, p.listener, tuple(p.hostnames)) for p in m.parents if p.gateway),
        not_from_gateways=tuple(m.not_from_gateways),
    )


def _gateway(m: pb.Gateway) -> Gateway:
    listeners = tuple(GatewayListener(one.name, one.port, one.hostname, tuple(one.certificates)) for one in m.listeners)
    for one in listeners:
        secured = {bool(other.certificates) for other in listeners if other.port == one.port}
        if not one.name or not 1 <= one.port <= 65535 or len(secured) > 1:
            raise ValueError(f"gateway {m.namespace}/{m.name} has a listener {one.name[:300]!r} that cannot be served on port {one.port}")
    return Gateway(f"{m.namespace}/{m.name}", listeners)


def _blocks(texts: Iterable[str]) -> tuple[str, ...]:
    """CIDR blocks as they are; ValueError for what is none: a block that cannot be compared must not be taken for one that does not match."""
    for text in texts:
        ipaddress.ip_network(text, strict=False)
    return tuple(texts)


def policy(m: pb.Policy) -> Policy:
    """Decode a policy."""
    return Policy(
        name=f"{m.namespace}/{m.name}",
        action=Action(m.action),
        rules=tuple(
            PolicyRule(
                sources=tuple(map(_source, rule.sources)),
                operations=tuple(map(_operation, rule.operations)),
                also_sources=tuple(map(_source, rule.also_sources)),
                also_operations=tuple(map(_operation, rule.also_operations)),
            )
            for rule in m.rules
        ),
    )


def _source(m: pb.Source) -> Source:
    return Source(
        tuple(m.principals),
        tuple(m.not_principals),
        tuple(m.namespaces),
        tuple(m.not_namespaces),
        tuple(m.service_accounts),
        tuple(m.not_service_accounts),
        _blocks(m.ip_blocks),
        _blocks(m.not_ip_blocks),
        tuple(sorted(m.labels.items())),
        tuple(m.request_principals),
        tuple(m.not_request_principals),
    )


def _operation(m: pb.Operation) -> Operation:
    return Operation(
        tuple(m.ports),
        tuple(m.not_ports),
        tuple(m.methods),
        tuple(m.not_methods),
        tuple(m.paths),
        tuple(m.not_paths),
        tuple(m.hosts),
        tuple(m.not_hosts),
        tuple(m.protocols),
        tuple(HeaderCondition(h.name, tuple(h.values), tuple(h.not_values)) for h in m.headers),
        tuple(_claim(condition) for condition in m.claims),
    )


def _authentication(m: pb.Authentication) -> Authentication:
    return Authentication(
        name=f"{m.namespace}/{m.name}",
        issuers=tuple(
            TokenIssuer(
                issuer=i.issuer,
                audiences=tuple(i.audiences),
                keys=i.keys,
                headers=tuple((h.name, h.prefix) for h in i.headers),
                parameters=tuple(i.parameters),
                cookies=tuple(i.cookies),
                forward=i.forward,
                payload_header=i.payload_header,
                claim_headers=tuple((h.header, h.claim) for h in i.claim_headers),
            )
            for i in m.issuers
        ),
    )


_DECODERS: Mapping[str, Callable[[Any], Entity]] = {
    "service": _service,
    "route": _route,
    "policy": policy,
    "traffic": traffic.decode,
    "authentication": _authentication,
    "node": _node,
    "gateway": _gateway,
    "telemetry": observability.decode,
}
