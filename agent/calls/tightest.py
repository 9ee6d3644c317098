"""Policies that allow what was called, and as little else as policies can say. Pure; used by `agent.cli.policy`.

Rows are those of `agent.report.CallRow`, of one node or of all of them. What is left out, and what the policies allow besides, is said in notes: a policy has
patterns with one "*" at an end, so a path with an identifier in its middle becomes everything that begins like it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent.calls import paths
from agent.calls.judge import Answer, Call, judge
from agent.model import Action, Operation, Policy, PolicyRule, Source
from agent.policy import Caller
from agent.report import CallRow

APP_LABELS = ("app.kubernetes.io/name", "app", "k8s-app")
"""A workload is known by the first one of these that it has, else by all of its labels."""
_LONGEST_NAME = 63
_SHOWN = 10

Selector = tuple[tuple[str, str], ...]
_What = tuple[int, str, str]
"""Port, protocol, method."""


@dataclass(frozen=True, slots=True)
class Proposed:
    """One policy and the labels that choose whom it protects."""

    name: str
    namespace: str
    selector: Selector
    rules: tuple[PolicyRule, ...]

    @property
    def policy(self) -> Policy:
        """As the agent has it."""
        return Policy(f"{self.namespace}/{self.name}", Action.ALLOW, self.rules)

    def resource(self) -> dict[str, Any]:
        """As people apply it."""
        return {
            "apiVersion": "meshagent.io/v1alpha1",
            "kind": "AuthorizationPolicy",
            "metadata": {"name": self.name, "namespace": self.namespace},
            "spec": {"selector": {"matchLabels": dict(self.selector)}, "action": "ALLOW", "rules": [_written(rule) for rule in self.rules]},
        }


def _written(rule: PolicyRule) -> dict[str, Any]:
    operations = []
    for one in rule.operations:
        fields = {"ports": [str(port) for port in one.ports], "protocols": one.protocols, "methods": one.methods, "paths": one.paths}
        operations.append({"operation": {name: list(values) for name, values in fields.items() if values}})
    return {"from": [{"source": {"serviceAccounts": list(rule.sources[0].service_accounts)}}], "to": operations}


@dataclass(frozen=True, slots=True)
class Result:
    """`notes` are lines for people."""

    policies: tuple[Proposed, ...]
    notes: tuple[str, ...]


def tightest(namespace: str, rows: Iterable[CallRow]) -> Result:
    """Policies for the workloads of a namespace that were called."""
    rows = list(rows)
    left_out: Counter[str] = Counter()
    wanted: dict[Selector, dict[_What, dict[str, set[str]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(set)))
    for row in rows:
        if why := _objection(row):
            left_out[why] += row.count
            continue
        for selector in {selector_of(labels) for labels in row.receivers.values()}:
            if selector:
                wanted[selector][row.port, row.protocol, row.method][row.path].add(row.service_account)
            else:
                left_out["calls to workloads without labels, which no selector can choose"] += row.count
    names = _names(wanted)
    policies = tuple(Proposed(names[s], namespace, s, _rules(what)) for s, what in sorted(wanted.items()))
    notes = [f"left out: {count} {why}" for why, count in sorted(left_out.items())]
    return Result(policies, (*notes, *_widened(rows), *_also_allowed(policies, rows)))


def _widened(rows: Iterable[CallRow]) -> list[str]:
    """What can only be allowed with more than it was."""
    found: set[str] = set()
    for row in rows:
        if not row.path or _objection(row):
            continue
        if not row.method:
            found.add(f"too wide: any method, because one was used that is not a word, for {row.source} -> {row.destination} {row.path}")
        if not paths.pattern_of(row.path):
            found.add(f"too wide: any path, because no pattern has them all, for {row.source} -> {row.destination}")
    return sorted(found)


_UNLIKELY = {
    "unanswered": "requests that nobody answered",
    "unauthorized": "requests that were answered with 401 or 403",
}


def _objection(row: CallRow) -> str:
    """Why a call is not what a policy should allow; "" if nothing speaks against it."""
    if row.answer == Answer.DENIED.value or row.outcome == "denied":
        return "calls that are denied now"
    if row.answer == Answer.UNDECIDED.value:
        return "calls that may be denied now: it depends on what is not recorded"
    if why := _UNLIKELY.get(row.outcome):
        return why
    if not row.service_account:
        return "calls of callers that nobody vouches for"
    if not row.port:
        return "calls to a port that is not known"
    return ""


def selector_of(labels: Mapping[str, str]) -> Selector:
    """Labels that choose a workload and those like it."""
    for name in APP_LABELS:
        if labels.get(name):
            return ((name, labels[name]),)
    return tuple(sorted(labels.items()))


def _names(selectors: Iterable[Selector]) -> dict[Selector, str]:
    found: dict[Selector, str] = {}
    for selector in sorted(selectors):
        text = "-".join(value for _, value in selector if value) or "labelled"
        stem = "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower())
        stem = f"from-traffic-{stem}"[: _LONGEST_NAME - 4].rstrip("-")
        name, number = stem, 1
        while name in found.values():
            number += 1
            name = f"{stem}-{number}"
        found[selector] = name
    return found


def _rules(what: Mapping[_What, Mapping[str, set[str]]]) -> tuple[PolicyRule, ...]:
    """One rule for all callers that do the same, of operations that differ in one thing alone joined into one."""
    by_caller: dict[str, dict[_What, set[str]]] = defaultdict(lambda: defaultdict(set))
    for key, templates in what.items():
        for path, accounts in templates.items():
            for account in accounts:
                by_caller[account][key].add(paths.pattern_of(path) if path else "")
    callers: dict[tuple[Operation, ...], list[str]] = defaultdict(list)
    for account, operations in sorted(by_caller.items()):
        callers[_operations(operations)].append(account)
    return tuple(PolicyRule((Source(service_accounts=tuple(accounts)),), operations) for operations, accounts in callers.items())


def _operations(asked: Mapping[_What, set[str]]) -> tuple[Operation, ...]:
    methods: dict[tuple[int, str, tuple[str, ...]], set[str]] = defaultdict(set)
    for (port, protocol, method), patterns in asked.items():
        methods[port, protocol, () if "" in patterns else _needed(patterns)].add(method)
    return tuple(
        Operation(
            ports=(port,),
            methods=() if "" in names else tuple(sorted(names)),
            paths=patterns,
            protocols=(protocol,) if "" in names and not patterns else (),  # what asks for a request is for TCP anyway
        )
        for (port, protocol, patterns), names in sorted(methods.items())
    )


def _needed(patterns: Iterable[str]) -> tuple[str, ...]:
    """Without those that another one covers."""
    kept: list[str] = []
    for pattern in sorted(patterns, key=lambda text: (not text.endswith("*"), len(text), text)):
        if not any(other.endswith("*") and pattern.startswith(other[:-1]) for other in kept):
            kept.append(pattern)
    return tuple(sorted(kept))


def _also_allowed(policies: Sequence[Proposed], rows: Iterable[CallRow]) -> list[str]:
    """What is denied now and the policies would allow, because they cannot be said more tightly."""
    found: Counter[str] = Counter()
    for row in rows:
        if row.answer != Answer.DENIED.value:
            continue
        namespace, _, account = row.service_account.partition("/")
        call = Call(Caller(namespace, account, "any"), row.port, row.protocol, row.method, row.path)
        selectors = {selector_of(labels) for labels in row.receivers.values()}
        own = [one.policy for one in policies if one.selector in selectors]
        if own and judge(own, call).answer is not Answer.DENIED:
            found[f"{row.source or 'unknown'} -> {row.destination} {row.method} {row.path}".rstrip()] += row.count
    most = [
        f"too wide: denied now, and allowed by these policies unless a DENY stays in force: {what} ({n} calls)"
        for what, n in found.most_common(_SHOWN)
    ]
    return [*most, *([f"... and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else [])]
