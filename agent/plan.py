"""What would happen to a call, known from the model alone: the first part of `meshagent trace`. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from agent.errors import NotFound
from agent.model import Action, Service, ServicePort, Snapshot, Workload
from agent.policy import Caller, Decision, Verdict, decide, protecting
from agent.report import BackendPlan, Plan

FAIL_MODE = "closed"
NO_ROUTE = "{} is L7 and its HTTPRoutes have no usable backend: see 'meshagent get httproute -o json' for the reason"


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


def find_destination(snapshot: Snapshot, name: str) -> tuple[Service | Workload, int]:
    """`SERVICE`, `SERVICE:PORT`, `WORKLOAD` or `WORKLOAD:PORT`: what it names and the port; if not said, the first TCP one, or 0 if there is none."""
    stem, _, port = name.partition(":")
    full = qualified(stem)
    if port and not port.isdigit():
        raise NotFound(f"{name}: {port} is no port number")
    number = int(port or 0)
    if full in snapshot.services:
        service = snapshot.services[full]
        for candidate in service.ports:
            if candidate.port == number or (not number and candidate.protocol == "TCP"):
                return service, candidate.port
        raise NotFound(f"service {full} has no TCP port {port}; it has {', '.join(str(p.port) for p in service.ports)}")
    if full in snapshot.workloads:
        workload = snapshot.workloads[full]
        known = [target for backing in workload.backing for target in backing.ports.values()]
        return workload, number or (known[0] if known else 0)
    raise NotFound(_unknown("service or workload", full, {**snapshot.workloads, **snapshot.services}))


def _unknown(what: str, name: str, known: Mapping[str, object]) -> str:
    # Without the namespace, which would make all names alike.
    close = difflib.get_close_matches(_leaf(name), {_leaf(full) for full in known}, n=3)
    found = [full for leaf in close for full in sorted(known) if _leaf(full) == leaf]
    hint = f"did you mean {' or '.join(found[:3])}?" if found else "'meshagent get all' lists what exists"
    return f"no {what} is called {name}: {hint}"


def _leaf(name: str) -> str:
    return name.partition("/")[2]


def plan(snapshot: Snapshot, source: Workload, destination: str, trust_domain: str) -> Plan:
    """Explain a call from `source` to `destination` (see `find_destination`)."""
    found, port = find_destination(snapshot, destination)
    problems = []
    if not source.enrolled:
        problems.append(f"{source.name} is not enrolled: its connections are not redirected and it has no identity")
    caller = Caller.of(source, trust_domain)
    if isinstance(found, Service):
        service_port = next(p for p in found.ports if p.port == port)
        shares = _shares(snapshot, found, service_port)
        name = f"{found.name}:{port}"
        level, reason = ("L7", service_port.reason) if service_port.waypoint else ("L4", service_port.reason)
        if not shares:
            problems.append(
                NO_ROUTE.format(name) if service_port.waypoint else f"{name} has no ready endpoint: connections are refused at once"
            )
    else:
        shares = [(found, port, 1.0)]
        name, level, reason = f"{found.name}:{port}", "L4", "a workload's own address is dialled"
    decisions = {w.name: decide(protecting(w, snapshot), caller, target) for w, target, _ in shares}
    if isinstance(found, Workload) and any(d.verdict is Verdict.WAYPOINT for d in decisions.values()):
        level, reason = "L7", "its AuthorizationPolicy has HTTP rules"
    decision = _combined(decisions.values())
    if decision.verdict is not Verdict.DENY:
        problems += [f"{n} refuses {source.name}: {d.rule}" for n, d in sorted(decisions.items()) if d.verdict is Verdict.DENY]
    if decision.verdict is Verdict.WAYPOINT:
        reason += f"; each request is decided by {', '.join(sorted({p.name for w, _, _ in shares for p in protecting(w, snapshot)}))}"
    return Plan(
        source=source.name,
        destination=name,
        verdict="DENY" if decision.verdict is Verdict.DENY else "ALLOW",
        rule=(decision.rule or None) if decision.verdict is not Verdict.WAYPOINT else None,
        level=level,
        reason=reason,
        backends=tuple(
            BackendPlan(w.name, f"{w.addresses[0]}:{target}" if w.addresses else "", w.node, round(share, 4)) for w, target, share in shares
        ),
        encryption=_encryption(source, [w for w, _, _ in shares]),
        fail_mode=FAIL_MODE,
        problems=tuple(problems),
    )


def targets(snapshot: Snapshot, destination: str) -> tuple[str, frozenset[str]]:
    """What a trace of `destination` watches: "SERVICE:PORT" or "", and every workload that may answer."""
    found, port = find_destination(snapshot, destination)
    if isinstance(found, Workload):
        return "", frozenset({found.name})
    service_port = next(p for p in found.ports if p.port == port)
    behind = {w.name for w, _, _ in _shares(snapshot, found, service_port)} | {w.name for w, _ in snapshot.endpoints(found.name, port)}
    return f"{found.name}:{port}", frozenset(behind)


def allowing(snapshot: Snapshot, workloads: Iterable[str]) -> str:
    """The ALLOW policies that protect any of the workloads, for people."""
    found = {p.name for name in workloads for p in protecting(snapshot.workloads[name], snapshot) if p.action is Action.ALLOW}
    return ", ".join(sorted(found))


def _shares(snapshot: Snapshot, service: Service, port: ServicePort) -> list[tuple[Workload, int, float]]:
    """(workload, target port, share) of everything that may answer; several rules of a route share alike."""
    routes = [r for r in snapshot.routes.values() if any(s == service.name and p in (0, port.port) for s, p in r.parents)]
    rules = [rule for route in routes for rule in route.rules]
    if not rules or not port.waypoint:
        return _spread(snapshot, service.name, port.port, 1.0)
    found: dict[tuple[str, int], tuple[Workload, int, float]] = {}
    for rule in rules:
        total = sum(b.weight for b in rule.backends)
        for backend in rule.backends:
            if total and backend.weight and not backend.invalid:
                for workload, target, share in _spread(snapshot, backend.service, backend.port, backend.weight / total / len(rules)):
                    before = found.get((workload.name, target), (workload, target, 0.0))[2]
                    found[workload.name, target] = (workload, target, before + share)
    return sorted(found.values(), key=lambda item: item[0].name)


def _spread(snapshot: Snapshot, service: str, port: int, share: float) -> list[tuple[Workload, int, float]]:
    endpoints = snapshot.endpoints(service, port)
    return [(workload, target, share / len(endpoints)) for workload, target in endpoints]


def _combined(decisions: Iterable[Decision]) -> Decision:
    """DENY only if every backend denies; WAYPOINT if any needs the request."""
    found = list(decisions)
    for verdict in (Verdict.WAYPOINT, Verdict.ALLOW, Verdict.NONE, Verdict.DENY):
        for decision in found:
            if decision.verdict is verdict:
                return decision
    return Decision(Verdict.NONE, "")


def _encryption(source: Workload, backends: list[Workload]) -> str:
    nodes = {w.node for w in backends}
    if nodes <= {source.node}:
        return "none: both ends are on one node"
    return (
        "none: plaintext between nodes" if source.node not in nodes else "none: plaintext to other nodes, never leaves the node otherwise"
    )
