"""Recorded calls under the policies in force and under proposed ones. Pure; used by `agent.api`.

A call is decided by what protects the workload that it went to. Where none was chosen (it was denied, or the connection led to the waypoint) every endpoint
of the service counts, and they must agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from agent import egress, plan
from agent.calls.judge import Answer, Call, Judgement, judge
from agent.calls.ring import Outcome, Recorded, Seen
from agent.calls.tightest import selector_of
from agent.errors import NotFound
from agent.external import External
from agent.model import Policy, Service, Snapshot, policy, port_name
from agent.policy import STRANGER, Caller, protecting
from agent.report import CallRow, Change
from meshapi import proposal_pb2 as pb


class Receiver(NamedTuple):
    """Who may have been called: a workload, or an ExternalService, the port that counts for its policies (0 = not known), and these."""

    name: str
    port: int
    policies: tuple[Policy, ...]


def proposed(snapshot: Snapshot, proposal: pb.Proposal) -> Snapshot:
    """The model with other policies."""
    changed = {f"{p.namespace}/{p.name}": policy(p) for p in proposal.policies}
    policies = {name: policy for name, policy in snapshot.policies.items() if name not in set(proposal.removed)} | changed
    workloads, services = dict(snapshot.workloads), dict(snapshot.services)
    for one in proposal.workloads:
        if one.name in workloads:
            workloads[one.name] = replace(workloads[one.name], policies=tuple(one.policies))
    for one in proposal.services:
        if (service := services.get(one.name)) is not None and service.external is not None:
            services[one.name] = replace(service, external=replace(service.external, policies=tuple(one.policies)))
    return replace(snapshot, version="", delta=None, policies=policies, workloads=workloads, services=services)


def receivers(seen: Seen, snapshot: Snapshot) -> list[Receiver]:
    """Who decides about a call; nobody if it is not in the model any more."""
    service = snapshot.services.get(seen.service)
    if service is not None and service.external is not None:
        return [_outside(service, seen, snapshot)]
    if (target := snapshot.workloads.get(seen.target)) is not None:
        port = seen.port
        if seen.service:
            ports = [backing.targets(seen.protocol).get(seen.port, 0) for backing in target.backing if backing.service == seen.service]
            port = ports[0] if ports else 0
        return [Receiver(target.name, port, protecting(target, snapshot))]
    if seen.target or service is None:
        return []
    try:
        answering = plan.answering(snapshot, f"{seen.service}:{port_name(seen.port, seen.protocol)}")
    except NotFound:
        return []  # it has no such port any more
    return [Receiver(w.name, port, protecting(w, snapshot)) for w, port in answering]


def _finder(snapshot: Snapshot) -> Callable[[Seen], list[Receiver]]:
    """`receivers`, asked once for each destination: a service may have the whole mesh behind it."""
    known: dict[tuple[object, ...], list[Receiver]] = {}

    def find(seen: Seen) -> list[Receiver]:
        key = (seen.service, seen.target, seen.port, seen.protocol)
        if key not in known:
            known[key] = receivers(seen, snapshot)
        return known[key]

    return find


def _outside(service: Service, seen: Seen, snapshot: Snapshot) -> Receiver:
    policies: Sequence[Policy] = egress.policies(service, snapshot)
    port = next((port for port in service.ports if (port.port, port.protocol) == (seen.port, seen.protocol)), None)
    if port is not None and External.is_stream(port):
        policies = egress.without_requests(policies)
    return Receiver(service.name, seen.port, tuple(policies))


def caller(seen: Seen, snapshot: Snapshot, trust_domain: str) -> Caller | None:
    """Who called; None if it is in the model no more."""
    if not seen.source:
        return STRANGER
    workload = snapshot.workloads.get(seen.source)
    return Caller.of(workload, trust_domain) if workload else None


def decided(seen: Seen, who: Caller, found: Iterable[Receiver]) -> Judgement:
    """What the policies of those who may have been called say; UNDECIDED if they do not agree."""
    call = Call(who, 0, seen.protocol, seen.method, seen.path)
    judged = [judge(one.policies, replace(call, port=one.port)) for one in found]
    if len({one.answer for one in judged}) == 1:
        return judged[0]
    return Judgement(Answer.UNDECIDED, ", ".join(sorted({one.rule for one in judged if one.rule})))


def destination(seen: Seen) -> str:
    """What was dialled, as a plan writes it."""
    name = seen.service or seen.target
    return seen.dialled or (f"{name}:{port_name(seen.port, seen.protocol)}" if seen.port else name)


def today(seen: Seen, who: Caller, found: Iterable[Receiver]) -> Answer:
    """What the policies in force say; where that depends on what is not recorded, what became of the call tells.

    Not of a connection that was made: it reached who decides about its requests, and of those nothing is known. They may be older than the record, or beyond
    its rate.
    """
    answer = decided(seen, who, found).answer
    if answer is not Answer.UNDECIDED or (seen.outcome is Outcome.SERVED and not seen.path and seen.source):
        return answer
    return _OBSERVED.get(seen.outcome, answer)


_OBSERVED = {Outcome.SERVED: Answer.ALLOWED, Outcome.DENIED: Answer.DENIED}


class Found(NamedTuple):
    """`unchanged` counts calls that are in no row; `gone` those whose caller or receiver is in the model no more."""

    rows: tuple[Change, ...] | tuple[CallRow, ...]
    unchanged: int
    gone: int


def plain_calls(recorded: Iterable[Recorded]) -> Iterator[Recorded]:
    """Leave out connections that only led to the waypoint, if their requests are recorded."""
    rows = list(recorded)
    asked = {_led(one.seen) for one in rows if one.seen.path}
    for one in rows:
        seen = one.seen
        led = not seen.path and seen.outcome is Outcome.SERVED and (seen.inbound or not seen.target)
        if not (led and _led(seen) in asked):
            yield one


def _led(seen: Seen) -> tuple[str, str]:
    """Who called, and what was dialled: connections and requests that have this in common are the same calls."""
    if seen.inbound:
        return "", f"{seen.target} {seen.port}"
    return seen.source, seen.dialled or ("" if seen.target else f"{seen.service}:{seen.port}")


def compare(recorded: Iterable[Recorded], now: Snapshot, then: Snapshot, trust_domain: str) -> Found:
    """Hold every recorded call against both sets of policies."""
    changes: dict[Change, tuple[int, float]] = {}
    counts: Counter[str] = Counter()
    find_now, find_then = _finder(now), _finder(then)
    for seen, count, last_seen in plain_calls(recorded):
        who = caller(seen, now, trust_domain)
        before, after = find_now(seen), find_then(seen)
        if who is None or not before:
            counts["gone"] += count
        elif (found := _change(seen, who, before, after)) is None:
            counts["unchanged"] += count
        else:
            word, rule = found
            change = Change(
                change=word,
                owner=seen.owner,
                source=seen.source or "unknown",
                destination=destination(seen),
                method=seen.method,
                path=seen.path,
                count=0,
                last_seen=0.0,
                rule=rule,
            )
            total, latest = changes.get(change, (0, 0.0))
            changes[change] = (total + count, max(latest, last_seen))
    listed = [replace(change, count=count, last_seen=latest) for change, (count, latest) in changes.items()]
    return Found(tuple(listed), counts["unchanged"], counts["gone"])


def _change(seen: Seen, who: Caller, before: list[Receiver], after: list[Receiver]) -> tuple[str, str] | None:
    if before == after:
        return None
    then = decided(seen, who, after)
    now = today(seen, who, before)
    if then.answer is now and now is not Answer.UNDECIDED:
        return None
    if Answer.UNDECIDED in {then.answer, now}:
        return "undecided", then.rule
    return ("newly denied" if then.answer is Answer.DENIED else "newly allowed"), then.rule


def listed(recorded: Iterable[Recorded], snapshot: Snapshot, trust_domain: str, namespace: str) -> Found:
    """Every recorded call to workloads of a namespace; of receivers that one selector chooses one is named."""
    rows: list[CallRow] = []
    gone = 0
    find = _finder(snapshot)
    for seen, count, _ in plain_calls(recorded):
        if (seen.target or seen.service).partition("/")[0] != namespace:
            continue
        if (service := snapshot.services.get(seen.service)) is not None and service.external is not None:
            continue
        who, found = caller(seen, snapshot, trust_domain), find(seen)
        alike = {selector_of(labels): (one.name, dict(labels)) for one in found for labels in (snapshot.workloads[one.name].labels,)}
        workloads = dict(alike.values())
        if who is None or not workloads:
            gone += count
            continue
        ports = {one.port for one in found}
        rows.append(
            CallRow(
                owner=seen.owner,
                source=seen.source,
                service_account=f"{who.namespace}/{who.service_account}" if who.service_account else "",
                receivers=workloads,
                destination=destination(seen),
                port=ports.pop() if len(ports) == 1 else 0,
                protocol=seen.protocol,
                method=seen.method,
                path=seen.path,
                outcome=seen.outcome.value,
                answer=today(seen, who, found).value,
                count=count,
            )
        )
    return Found(tuple(rows), 0, gone)
