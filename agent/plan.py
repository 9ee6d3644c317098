"""What would happen to a call, known from the model alone: the first part of `meshagent trace`. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from agent import egress, kubelet
from agent.balancing import node_zone, preferred, shares
from agent.errors import NotFound
from agent.external import External
from agent.model import NO_DIRECT, Action, Direct, Mtls, RouteRule, Service, ServicePort, Snapshot, Workload, port_name
from agent.policy import PROTOCOLS, STRANGER, TCP, Caller, Decision, Verdict, decide, protecting, source_matches
from agent.report import BackendPlan, Plan

_MOST_CANDIDATES = 7
_KUBELET = "kubelet"
PROBE = "a probe of the kubelet, which no policy decides about"
NO_ROUTE = "{} is L7 and its routes have no usable backend: see 'meshagent get httproute -o json' (or grpcroute) for the reason"


def qualified(name: str) -> str:
    """`NAME` is short for `default/NAME`."""
    return name if "/" in name else f"default/{name}"


def find_workload(snapshot: Snapshot, name: str) -> Workload:
    """A workload, or a ready one of the service of that name. NotFound suggests names that exist."""
    full = qualified(name)
    if full in snapshot.workloads:
        return snapshot.workloads[full]
    if full in snapshot.services:
        behind = [w for w in snapshot.workloads.values() if any(b.service == full for b in w.backing)]
        if behind:
            return min(behind, key=lambda w: (not w.ready, w.name))
    raise NotFound(_unknown("workload", full, {**snapshot.workloads, **snapshot.services}))


def find_caller(snapshot: Snapshot, name: str, destination: str, node: str) -> Workload:
    """As `find_workload`; `kubelet`, if nobody else is called so, is that of the node of the destination, a workload, or else of `node`."""
    if name != _KUBELET or qualified(name) in {**snapshot.workloads, **snapshot.services}:
        return find_workload(snapshot, name)
    called = find_destination(snapshot, destination).entity
    place = called.node if isinstance(called, Workload) else node
    return Workload(kubelet.caller(place), "", place, {}, (), "", enrolled=False, ready=True)


def is_kubelet(source: Workload) -> bool:
    """Is it what `find_caller` makes of a kubelet?"""
    return source.namespace == kubelet.NAMESPACE


@dataclass(frozen=True, slots=True)
class Destination:
    """What a call goes to: the port is a service's own, or one that the workload listens on (0 = not known)."""

    entity: Service | Workload
    port: int
    protocol: str

    def __str__(self) -> str:
        return f"{self.entity.name}:{port_name(self.port, self.protocol)}" if self.port else self.entity.name

    @property
    def service_port(self) -> ServicePort | None:
        """The port of a service; None for a workload."""
        if isinstance(self.entity, Workload):
            return None
        return next(p for p in self.entity.ports if (p.port, p.protocol) == (self.port, self.protocol))


def find_destination(snapshot: Snapshot, name: str) -> Destination:
    """`SERVICE`, as a resource or by its DNS name, or `WORKLOAD`, then perhaps `:PORT`, and behind it perhaps `/tcp` or `/udp`.

    Without a protocol TCP is tried before UDP. Without a port it is the first one of TCP, or else of UDP; 0 for a workload that backs no service.
    """
    stem, _, port = name.partition(":")
    number, protocols = _port(name, port) if port else (0, PROTOCOLS)
    full = _by_dns_name(snapshot, stem) or qualified(stem)
    if full in snapshot.services:
        service = snapshot.services[full]
        for protocol in protocols:
            for candidate in service.ports:
                if candidate.protocol == protocol and number in {0, candidate.port}:
                    return Destination(service, candidate.port, protocol)
        ports = ", ".join(port_name(p.port, p.protocol) for p in service.ports)
        raise NotFound(f"service {full} has no port {port}; it has {ports}")
    if full in snapshot.workloads:
        workload = snapshot.workloads[full]
        for protocol in protocols:
            for target in (t for backing in workload.backing for t in backing.targets(protocol).values()):
                if number in {0, target}:
                    return Destination(workload, target, protocol)
        return Destination(workload, number, protocols[0])
    raise NotFound(_unknown("service or workload", full, {**snapshot.workloads, **snapshot.services}))


def _by_dns_name(snapshot: Snapshot, name: str) -> str:
    """The service that pods know by this name with a namespace in it; "" if it is no such name."""
    if "." not in name or "/" in name or qualified(name) in snapshot.services:
        return ""
    service, namespace, *rest = name.removesuffix(".").split(".")
    full = f"{namespace}/{service}"
    if full in snapshot.services and (not rest or rest[0] == "svc"):
        return full
    hint = _hint(full, snapshot.services)
    raise NotFound(
        f"no service has the DNS name {name}: pods that look it up get what the resolver outside of the mesh says, mostly NXDOMAIN; {hint}"
    )


def _port(name: str, text: str) -> tuple[int, tuple[str, ...]]:
    """The number and the protocols to try. NotFound if it is neither a port nor a port with its protocol."""
    port, _, protocol = text.partition("/")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise NotFound(f"{name}: {port} is no port number")
    if "/" not in text:
        return int(port), PROTOCOLS
    if protocol.upper() not in PROTOCOLS:
        raise NotFound(f"{name}: {protocol} is no protocol of a service port: write {port}/tcp or {port}/udp")
    return int(port), (protocol.upper(),)


def _unknown(what: str, name: str, known: Mapping[str, object]) -> str:
    return f"no {what} is called {name}: {_hint(name, known)}"


def _hint(name: str, known: Mapping[str, object]) -> str:
    """What may have been meant: the same name in another namespace, or names that are nearly so."""
    same = [full for full in sorted(known) if _leaf(full) == _leaf(name)]
    if len(same) > 1:
        return f"the name is ambiguous, say which: {', '.join(same[:_MOST_CANDIDATES])}{', ...' if len(same) > _MOST_CANDIDATES else ''}"
    # Without the namespace, which would make all names alike.
    close = difflib.get_close_matches(_leaf(name), {_leaf(full) for full in known}, n=3)
    found = [full for leaf in close for full in sorted(known) if _leaf(full) == leaf]
    return f"did you mean {' or '.join(found[:3])}?" if found else "'meshagent get all' lists what exists"


def _leaf(name: str) -> str:
    return name.partition("/")[2]


def plan(snapshot: Snapshot, source: Workload, destination: str, trust_domain: str, direct: Direct = NO_DIRECT) -> Plan:
    """Explain a call from `source` to `destination` (see `find_destination`); `direct` is what WireGuard encrypts on the source's node."""
    found = find_destination(snapshot, destination)
    if is_kubelet(source):
        return _plan_of_probe(snapshot, source, found, named=":" in destination)
    problems = []
    if not source.enrolled:
        problems.append(f"{source.name} is not enrolled: its connections are not redirected and it has no identity")
    caller = Caller.of(source, trust_domain)
    service_port = found.service_port
    level = "L7" if service_port and service_port.waypoint else "L4"
    if service_port:
        backends = _shares(snapshot, found, source, caller)
        reason = service_port.reason
        if not backends and not _is_external(found):
            problems.append(
                NO_ROUTE.format(found) if service_port.waypoint else f"{found} has no ready endpoint: connections are refused at once"
            )
    elif isinstance(found.entity, Workload):
        backends = [(found.entity, found.port, 1.0)]
        reason = "a workload's own address is dialled"
    decisions = {w.name: decide(protecting(w, snapshot), caller, target, found.protocol) for w, target, _ in backends}
    if isinstance(found.entity, Workload) and any(d.verdict is Verdict.WAYPOINT for d in decisions.values()):
        level, reason = "L7", "its AuthorizationPolicy has HTTP rules"
    decision = _to_outside(found, snapshot, caller) if _is_external(found) else _combined(decisions.values())
    plaintext = not source.enrolled or found.protocol != TCP
    problems += [
        f"{w.name} refuses plaintext from another node on port {target} (PeerAuthentication STRICT), and this call is not tunnelled"
        for w, target, _ in backends
        if plaintext and w.node != source.node and w.mtls_of(target) is Mtls.STRICT
    ]
    if decision.verdict is not Verdict.DENY:
        problems += [f"{n} refuses {source.name}: {d.rule}" for n, d in sorted(decisions.items()) if d.verdict is Verdict.DENY]
    if decision.verdict is Verdict.WAYPOINT and not _is_external(found):
        reason += f"; each request is decided by {', '.join(sorted({p.name for w, _, _ in backends for p in protecting(w, snapshot)}))}"
    return Plan(
        source=source.name,
        destination=str(found),
        verdict="DENY" if decision.verdict is Verdict.DENY else "ALLOW",
        rule=(decision.rule or None) if decision.verdict is not Verdict.WAYPOINT else None,
        audit=", ".join(sorted({d.audit for d in decisions.values() if d.audit})) or None,
        level=level,
        reason=reason,
        backends=tuple(
            BackendPlan(w.name, f"{w.addresses[0]}:{target}" if w.addresses else "", w.node, round(share, 4))
            for w, target, share in backends
        ),
        encryption=_to_host(found) or _encryption(source, found.protocol, [(w, target) for w, target, _ in backends], direct),
        fail_mode=_fail_mode(found, decision),
        problems=tuple(problems),
    )


def _plan_of_probe(snapshot: Snapshot, source: Workload, found: Destination, *, named: bool) -> Plan:
    """Explain a call of the kubelet: of its probes, if no port is `named`, that to the first port."""
    called = found.entity
    if isinstance(called, Service):
        raise NotFound(f"{called.name} is a service, and the kubelet calls pods: name a workload")
    if not named and called.probe_ports:
        found = replace(found, port=called.probe_ports[0], protocol=TCP)
    probe = found.protocol == TCP and found.port in called.probe_ports
    decision = Decision(Verdict.ALLOW, PROBE) if probe else decide(protecting(called, snapshot), STRANGER, found.port, found.protocol)
    problems = []
    if not probe:
        problems.append(f"no probe of {called.name} is declared for port {found.port}: there the kubelet is a stranger like any other")
        if called.mtls_of(found.port) is Mtls.STRICT:
            problems.append(f"{called.name} refuses plaintext from outside the mesh on port {found.port} (PeerAuthentication STRICT)")
    return Plan(
        source=source.name,
        destination=str(found),
        verdict="DENY" if decision.verdict is Verdict.DENY else "ALLOW",
        rule=(decision.rule or None) if decision.verdict is not Verdict.WAYPOINT else None,
        audit=decision.audit or None,
        level="L4",
        reason="the kubelet calls the application itself, past any waypoint" if probe else "a workload's own address is dialled",
        backends=(BackendPlan(called.name, f"{called.addresses[0]}:{found.port}" if called.addresses else "", called.node, 1.0),),
        encryption="none: both ends are on one node",
        fail_mode="closed",
        problems=tuple(problems),
    )


def _is_external(found: Destination) -> bool:
    return isinstance(found.entity, Service) and found.entity.external is not None


def _to_outside(found: Destination, snapshot: Snapshot, caller: Caller) -> Decision:
    """What the waypoint of the caller's node says of a call to an ExternalService."""
    if isinstance(found.entity, Workload) or found.service_port is None:
        return Decision(Verdict.NONE, "")
    policies = egress.policies(found.entity, snapshot)
    if External.is_stream(found.service_port):
        policies = egress.without_requests(policies)
    return decide(policies, caller, found.port)


def _fail_mode(found: Destination, decision: Decision) -> str:
    """What becomes of the call while the waypoint is away."""
    if isinstance(found.entity, Workload) or not (found.service_port and found.service_port.waypoint) or not found.entity.fail_open:
        return "closed"
    return "closed: a policy needs the request" if decision.verdict is Verdict.WAYPOINT else "open: without a waypoint it is L4"


def targets(snapshot: Snapshot, destination: str) -> tuple[str, frozenset[str]]:
    """What a trace of `destination` watches: "SERVICE:PORT" or "", and every workload that may answer, from whichever node."""
    found = find_destination(snapshot, destination)
    if isinstance(found.entity, Workload):
        return "", frozenset({found.entity.name})
    behind = {w.name for service, port in _behind(snapshot, found) for w, _ in snapshot.endpoints(service, port, found.protocol)}
    return str(found), frozenset(behind | {w.name for w, _ in snapshot.endpoints(found.entity.name, found.port, found.protocol)})


def answering(snapshot: Snapshot, destination: str) -> list[tuple[Workload, int]]:
    """Every ready workload that may answer a call to a service, by whichever route, with the port that it listens on. Raises NotFound."""
    found = find_destination(snapshot, destination)
    return [one for service, port in _behind(snapshot, found) for one in snapshot.endpoints(service, port, found.protocol)]


def allowing(snapshot: Snapshot, workloads: Iterable[str]) -> str:
    """The ALLOW policies that protect any of the workloads, for people."""
    found = {p.name for name in workloads for p in protecting(snapshot.workloads[name], snapshot) if p.action is Action.ALLOW}
    return ", ".join(sorted(found))


def demands_tokens(snapshot: Snapshot, workloads: Iterable[str]) -> bool:
    """Does a policy that protects any of the workloads ask for a token?"""
    rules = (rule for name in workloads for p in protecting(snapshot.workloads[name], snapshot) for rule in p.rules)
    return any(
        any(source.l7 for source in (*rule.sources, *rule.also_sources))
        or any(one.claims for one in (*rule.operations, *rule.also_operations))
        for rule in rules
    )


def _shares(snapshot: Snapshot, found: Destination, source: Workload, caller: Caller) -> list[tuple[Workload, int, float]]:
    """(workload, target port, share) of everything that may answer `source`; several rules of a route share alike."""
    node = source.node
    zone = node_zone(snapshot.workloads.values(), node)
    answers: dict[tuple[str, int], tuple[Workload, int, float]] = {}
    for (service, port), part in _behind(snapshot, found, caller).items():
        wished = (one.balancing.prefer for one in snapshot.traffic.values() if (service, port) in one.targets)
        distribution = next(wished, "") or (snapshot.services[service].traffic_distribution if service in snapshot.services else "")
        near = preferred(snapshot.endpoints(service, port, found.protocol), distribution, node, zone)
        for workload, target, share in shares(near):
            before = answers.get((workload.name, target), (workload, target, 0.0))[2]
            answers[workload.name, target] = (workload, target, before + share * part)
    return sorted(answers.values(), key=lambda item: (item[0].name, item[1]))


def _behind(snapshot: Snapshot, found: Destination, caller: Caller | None = None) -> dict[tuple[str, int], float]:
    """The service ports that stand behind a service port for a caller (None: for any), each with its share: those of its routes, or itself."""
    own = (found.entity.name, found.port)
    port = found.service_port
    routes = [r for r in snapshot.routes.values() if any(s == own[0] and p in (0, own[1]) for s, p in r.parents)]
    if caller:  # routes of the caller's namespace are instead of the service's own
        consumers = [route for route in routes if route.consumes(own[0])]
        routes = [r for r in consumers if r.namespace == caller.namespace] or [r for r in routes if r not in consumers]
    rules = [rule for route in routes for rule in route.rules if caller is None or _is_for(rule, caller)]
    if not rules or not port or not port.waypoint:
        return {own: 1.0}
    behind: dict[tuple[str, int], float] = {}
    for rule in rules:
        total = sum(b.weight for b in rule.backends)
        for b in rule.backends:
            if total and b.weight and not b.invalid:
                behind[b.service, b.port] = behind.get((b.service, b.port), 0.0) + b.weight / total / len(rules)
    return behind


def _is_for(rule: RouteRule, caller: Caller) -> bool:
    return all(any(source_matches(source, caller) for source in sources) for sources in rule.callers)


def _combined(decisions: Iterable[Decision]) -> Decision:
    """DENY only if every backend denies; WAYPOINT if any needs the request."""
    found = list(decisions)
    for verdict in (Verdict.WAYPOINT, Verdict.ALLOW, Verdict.NONE, Verdict.DENY):
        for decision in found:
            if decision.verdict is verdict:
                return decision
    return Decision(Verdict.NONE, "")


def _to_host(found: Destination) -> str:
    """How a call to an ExternalService is encrypted on its way out of the mesh; "" of any other call."""
    if isinstance(found.entity, Workload) or found.entity.external is None or found.service_port is None:
        return ""
    if found.service_port.app_protocol == "tls":
        return "TLS between the application and the host outside"
    if found.entity.external.tls:
        return "TLS between the waypoint and the host outside"
    return "none: plaintext to the host outside"


def _encryption(source: Workload, protocol: str, backends: Sequence[tuple[Workload, int]], direct: Direct) -> str:
    if not backends:
        return "none: there is nowhere to go"
    far = [(w, target) for w, target in backends if w.node != source.node]
    if not far:
        return "none: both ends are on one node"
    if not source.enrolled:
        return "none: plaintext between nodes"
    ways: dict[str, set[str]] = {}
    for w, target in far:
        tunnel = protocol == TCP and direct.tunnels(w, w.mtls_of(target))
        ways.setdefault(_MTLS if tunnel else _WIREGUARD if direct(w) else _PLAINTEXT, set()).add(w.name)
    plain = sorted(ways.pop(_PLAINTEXT, ()))
    if not ways:
        return f"none: {_PLAINTEXT}"
    words = [f"{way}{' to ' + ', '.join(sorted(names)) if len(ways) > 1 else ''}" for way, names in sorted(ways.items(), reverse=True)]
    return f"{', '.join(words)}{', but plaintext to ' if plain else ''}{', '.join(plain)}"


_MTLS = "mTLS between nodes (HBONE)"
_WIREGUARD = "WireGuard between nodes"
_PLAINTEXT = "plaintext between nodes"
