"""Who may call an ExternalService: its policies, which the caller's side enforces, as nobody outside does. Pure; used by `agent.l7` and by the plan of a trace.

Ports of operations are those that the caller dials: there is no workload that listens on others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from agent.model import Action, Operation, Policy, PolicyRule, Service, Snapshot, Source
from agent.policy import Caller, Verdict, decide


def policies(service: Service, snapshot: Snapshot) -> tuple[Policy, ...]:
    """Policies that hold for calls to an external service. One that is named but missing denies everything, as elsewhere (`agent.policy.protecting`)."""
    external = service.external
    assert external is not None  # noqa: S101 - for mypy: callers ask for external ones only
    found = [snapshot.policies.get(name) or Policy(name, Action.ALLOW) for name in external.policies]
    if external.private:
        namespace = service.name.partition("/")[0]
        others = PolicyRule(sources=(Source(not_namespaces=(namespace,)),))
        found.append(Policy(f"{namespace}/{external.resource} exportTo", Action.DENY, (others,)))
    return tuple(found)


def callers(found: Sequence[Policy], known: Mapping[str, Caller], port: int) -> tuple[str, ...] | None:
    """Those of the known workloads, sorted, that these policies let connect to a port that holds no requests; None: there is no policy."""
    if not found:
        return None
    plain = without_requests(found)
    return tuple(name for name, caller in sorted(known.items()) if decide(plain, caller, port).verdict in {Verdict.ALLOW, Verdict.NONE})


def without_requests(found: Iterable[Policy]) -> tuple[Policy, ...]:
    """The same policies for connections that hold no requests: a rule of ALLOW that asks for one matches nothing, one of DENY or AUDIT everything."""
    return tuple(replace(policy, rules=tuple(_plain_rules(policy))) for policy in found)


def _plain_rules(policy: Policy) -> Iterator[PolicyRule]:
    for rule in policy.rules:
        if policy.action is Action.ALLOW:
            sources = tuple(one for one in rule.sources if not one.l7)
            operations = tuple(one for one in rule.operations if not one.l7)
            lost = (rule.sources and not sources) or (rule.operations and not operations)
            asks = any(one.l7 for one in rule.also_sources) or any(one.l7 for one in rule.also_operations)
            if not lost and not asks:
                yield replace(rule, sources=sources, operations=operations)
        else:
            yield PolicyRule(
                tuple(map(_plain_source, rule.sources)),
                tuple(map(_plain_operation, rule.operations)),
                tuple(map(_plain_source, rule.also_sources)),
                tuple(map(_plain_operation, rule.also_operations)),
            )


def _plain_source(source: Source) -> Source:
    return replace(source, request_principals=(), not_request_principals=())


def _plain_operation(operation: Operation) -> Operation:
    return Operation(ports=operation.ports, not_ports=operation.not_ports, protocols=operation.protocols)
