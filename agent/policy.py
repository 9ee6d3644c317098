"""L4 authorization: what the policies that protect a workload say about a caller and a port.

`decide` is the definition, in plain Python; `compile_rows` turns it into the rows that the kernel looks up. Both are pure. Used by `agent.bpf.tables`
and by the plan of `meshagent trace`, so that what is explained is what is enforced.

The words and the order are those of Istio's AuthorizationPolicy (https://istio.io/latest/docs/reference/config/security/authorization-policy/).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from agent.model import Action, Operation, Policy, PolicyRule, Snapshot, Source, Workload

OTHER_PORT = 0
"""Stands for every port that no rule names."""


class Verdict(enum.Enum):
    """What the connection alone allows to say."""

    NONE = "none"  # nothing protects the workload
    ALLOW = "allow"
    DENY = "deny"
    WAYPOINT = "waypoint"  # only the request can decide


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller: the service account of an enrolled workload."""

    namespace: str
    service_account: str
    trust_domain: str

    @property
    def principal(self) -> str:
        """SPIFFE ID without its scheme, as Istio's `principals` are written."""
        return f"{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"

    @staticmethod
    def of(workload: Workload, trust_domain: str) -> Caller | None:
        """None for a workload that is not enrolled: nobody vouches for it."""
        return Caller(workload.namespace, workload.service_account, trust_domain) if workload.enrolled else None


@dataclass(frozen=True, slots=True)
class Decision:
    """`rule` names what decided, for people: "NAMESPACE/POLICY[0]", or "NAMESPACE/POLICY: no rule matches"; "" if nothing protects."""

    verdict: Verdict
    rule: str


def matches(pattern: str, value: str) -> bool:
    """Exact, or one "*" at the start or the end; "*" alone is any value that is not empty. No other character is special."""
    if pattern == "*":
        return bool(value)
    if pattern.startswith("*"):
        return value.endswith(pattern[1:])
    if pattern.endswith("*"):
        return value.startswith(pattern[:-1])
    return pattern == value


def source_matches(source: Source, caller: Caller | None) -> bool:
    """True if the caller fits. An unknown caller fits no positive list, and fits every negative one, as in Istio."""
    lists = (
        (source.principals, source.not_principals, caller.principal if caller else ""),
        (source.namespaces, source.not_namespaces, caller.namespace if caller else ""),
        (
            source.service_accounts,
            source.not_service_accounts,
            f"{caller.namespace}/{caller.service_account}" if caller else "",
        ),
    )
    for wanted, unwanted, value in lists:
        if wanted and not (value and any(matches(p, value) for p in wanted)):
            return False
        if value and any(matches(p, value) for p in unwanted):
            return False
    return True


def _port_matches(operation: Operation, port: int) -> bool:
    return (not operation.ports or port in operation.ports) and port not in operation.not_ports


def _rule_matches(rule: PolicyRule, caller: Caller | None, port: int) -> Verdict | None:
    """None: no. ALLOW: yes, whatever the request. WAYPOINT: it depends on the request."""
    if rule.sources and not any(source_matches(s, caller) for s in rule.sources):
        return None
    if not rule.operations:
        return Verdict.ALLOW
    fitting = [o for o in rule.operations if _port_matches(o, port)]
    if not fitting:
        return None
    return Verdict.WAYPOINT if all(o.l7 for o in fitting) else Verdict.ALLOW


def protecting(workload: Workload, snapshot: Snapshot) -> tuple[Policy, ...]:
    """Policies that protect a workload, by name. One that is named but missing counts as an ALLOW without rules: it denies everything."""
    return tuple(snapshot.policies.get(name) or Policy(name, Action.ALLOW) for name in sorted(workload.policies))


def decide(policies: Sequence[Policy], caller: Caller | None, port: int) -> Decision:
    """The verdict for a connection from `caller` (None = unknown) to target port `port`. AUDIT policies decide nothing."""
    enforced = [p for p in policies if p.action is not Action.AUDIT]
    if not enforced:
        return Decision(Verdict.NONE, "")
    undecided = ""
    for policy, index, found in _matching(enforced, Action.DENY, caller, port):
        name = f"{policy.name}[{index}]"
        if found is Verdict.ALLOW:
            return Decision(Verdict.DENY, name)
        undecided = undecided or name
    allow = [p for p in enforced if p.action is Action.ALLOW]
    if not allow:
        return Decision(Verdict.WAYPOINT, undecided) if undecided else Decision(Verdict.ALLOW, "no DENY rule matches")
    hits = list(_matching(allow, Action.ALLOW, caller, port))
    if not hits:
        return Decision(Verdict.DENY, f"{', '.join(p.name for p in allow)}: no rule matches")
    for policy, index, found in hits:
        if found is Verdict.ALLOW:
            return Decision(Verdict.WAYPOINT, undecided) if undecided else Decision(Verdict.ALLOW, f"{policy.name}[{index}]")
    return Decision(Verdict.WAYPOINT, undecided or f"{hits[0][0].name}[{hits[0][1]}]")


def _matching(policies: Iterable[Policy], action: Action, caller: Caller | None, port: int) -> Iterable[tuple[Policy, int, Verdict]]:
    for policy in policies:
        if policy.action is action:
            for index, rule in enumerate(policy.rules):
                found = _rule_matches(rule, caller, port)
                if found is not None:
                    yield policy, index, found


def compile_rows(policies: Sequence[Policy], callers: Iterable[Caller]) -> Mapping[tuple[Caller | None, int], Decision]:
    """Rows for a lookup of (caller, port), (caller, OTHER_PORT), (None, port), (None, OTHER_PORT), in this order, that gives what `decide` gives.

    None stands for every caller without rows of its own, the unknown one included: a caller that is not known yet is treated as a stranger.
    Empty if no policy is enforced.
    """
    if all(p.action is Action.AUDIT for p in policies):
        return {}
    ports = {OTHER_PORT}
    for policy in policies:
        for rule in policy.rules:
            for operation in rule.operations:
                ports.update(operation.ports, operation.not_ports)
    stranger = {port: decide(policies, None, port) for port in ports}
    rows: dict[tuple[Caller | None, int], Decision] = {(None, port): decision for port, decision in stranger.items()}
    for caller in callers:
        own = {port: decide(policies, caller, port) for port in ports}
        if own != stranger:
            rows.update({(caller, port): decision for port, decision in own.items()})
    return rows
