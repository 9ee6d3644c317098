"""What policies say of a call of which not everything is known. Pure.

The definition is `agent.policy.decide` for connections, and Envoy's filters (`agent.l7.rbac`) for requests; this says the same where the record of a call has
what they ask for, and UNDECIDED where it has not: logic of three values, with None for "not known" (https://en.wikipedia.org/wiki/Three-valued_logic, Kleene).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from agent.calls import paths
from agent.model import Action, Operation, Policy, PolicyRule, Source
from agent.policy import TCP, UDP, Caller, matches, source_matches

Known = bool | None


class Answer(enum.Enum):
    """What becomes of a call."""

    ALLOWED = "allowed"
    DENIED = "denied"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class Call:
    """A call, as far as it is known. A `caller` without addresses that is a stranger may have any address."""

    caller: Caller
    port: int
    """That the receiver listens on; 0 = not known."""
    protocol: str = TCP
    method: str = ""
    """"" with `path` "": nothing is known of a request, if there is one. "" alone: it is one that has no well-known name."""
    path: str = ""
    """A template (`agent.calls.paths`)."""

    @property
    def is_request(self) -> bool:
        """Is it known what was asked for?"""
        return bool(self.path)


@dataclass(frozen=True, slots=True)
class Judgement:
    """`rule` names what decided, as `agent.policy.Decision` does; of an undecided call the rule that asks for what is not known."""

    answer: Answer
    rule: str


def judge(policies: Sequence[Policy], call: Call) -> Judgement:
    """What these policies, which are all that protect the receiver, say of a call."""
    allow = [policy for policy in policies if policy.action is Action.ALLOW]
    denying = list(_rules([policy for policy in policies if policy.action is Action.DENY], call))
    allowing = list(_rules(allow, call))
    for name, found in denying:
        if found:
            return Judgement(Answer.DENIED, name)
    permitted = _any(found for _, found in allowing) if allow else True
    if permitted is False:
        return Judgement(Answer.DENIED, f"{', '.join(policy.name for policy in allow)}: no rule matches")
    unknown = [name for name, found in denying if found is None]
    if permitted and not unknown:
        return Judgement(Answer.ALLOWED, next((name for name, found in allowing if found), ""))
    return Judgement(Answer.UNDECIDED, (unknown or [name for name, found in allowing if found is None])[0])


def _rules(policies: Iterable[Policy], call: Call) -> Iterator[tuple[str, Known]]:
    for policy in policies:
        for index, rule in enumerate(policy.rules):
            yield f"{policy.name}[{index}]", _rule(rule, call, forbids=policy.action is not Action.ALLOW)


def _rule(rule: PolicyRule, call: Call, *, forbids: bool) -> Known:
    return _all(
        (
            _any(_source(one, call, forbids=forbids) for one in rule.sources) if rule.sources else True,
            _any(_operation(one, call, forbids=forbids) for one in rule.operations) if rule.operations else True,
            *(_source(one, call, forbids=forbids) for one in rule.also_sources),
            *(_operation(one, call, forbids=forbids) for one in rule.also_operations),
        )
    )


def _source(source: Source, call: Call, *, forbids: bool) -> Known:
    caller = call.caller
    by_address = bool(source.ip_blocks or source.not_ip_blocks)
    anonymous = not caller.service_account and not caller.addresses
    if by_address and anonymous:
        found: Known = None if source_matches(replace(source, ip_blocks=(), not_ip_blocks=()), caller) else False
    else:
        found = source_matches(source, caller)
    return _all((found, _of_request(call, forbids=forbids))) if source.l7 else found


def _of_request(call: Call, *, forbids: bool) -> Known:
    """What nobody recorded of a request. Datagrams have none: see `agent.policy.decide`."""
    return forbids if call.protocol == UDP else None


def _operation(operation: Operation, call: Call, *, forbids: bool) -> Known:
    if operation.protocols and call.protocol not in operation.protocols:
        return False
    port = _all((not operation.ports or _port(operation.ports, call), not operation.not_ports or _not(_port(operation.not_ports, call))))
    if not operation.l7:
        return port
    if not call.is_request:
        return _all((port, _of_request(call, forbids=forbids)))
    return _all((port, *_asked(operation, call)))


def _asked(operation: Operation, call: Call) -> Iterator[Known]:
    """Conditions on a request."""
    method = [matches(pattern, call.method) if call.method else None for pattern in operation.methods]
    not_method = [matches(pattern, call.method) if call.method else None for pattern in operation.not_methods]
    yield _any(method) if operation.methods else True
    yield _not(_any(not_method))
    yield _any(paths.fits(pattern, call.path) for pattern in operation.paths) if operation.paths else True
    yield _not(_any(paths.fits(pattern, call.path) for pattern in operation.not_paths))
    if operation.hosts or operation.not_hosts or operation.headers or operation.claims:
        yield None


def _port(ports: Sequence[int], call: Call) -> Known:
    return call.port in ports if call.port else None


def _any(found: Iterable[Known]) -> Known:
    known = set(found)
    return True if True in known else None if None in known else False


def _all(found: Iterable[Known]) -> Known:
    known = set(found)
    return False if False in known else None if None in known else True


def _not(found: Known) -> Known:
    return None if found is None else not found
