"""L4 authorization: what the policies that protect a workload say about a caller, a port and a protocol.

`decide` is the definition, in plain Python. `Classes` and `compile_rows` turn it into the rows that the kernel looks up: callers that no policy can tell
apart share a class, and a set of policies has rows only for classes that it treats differently from a stranger. All of it is pure. Used by
`agent.bpf.tables`, by the plan of `meshagent trace` and by the check of live connections, so that what is explained is what is enforced.

The words and the order are those of Istio's AuthorizationPolicy (https://istio.io/latest/docs/reference/config/security/authorization-policy/).
"""

from __future__ import annotations

import enum
import functools
import ipaddress
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from agent.model import Action, Operation, Policy, PolicyRule, Snapshot, Source, Workload

OTHER_PORT = 0
"""Stands for every port that no rule names."""
TCP, UDP = "TCP", "UDP"
PROTOCOLS = (TCP, UDP)


class Verdict(enum.Enum):
    """What the connection alone allows to say."""

    NONE = "none"  # nothing protects the workload
    ALLOW = "allow"
    DENY = "deny"
    WAYPOINT = "waypoint"  # only the request can decide


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, as far as it is known. Without a service account it is a stranger: an address, or nothing at all.

    `labels` are sorted (name, value) pairs; `addresses` are those that the caller may send from.
    """

    namespace: str = ""
    service_account: str = ""
    trust_domain: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    addresses: tuple[str, ...] = ()

    @property
    def principal(self) -> str:
        """SPIFFE ID without its scheme, as Istio's `principals` are written; "" for a stranger."""
        return f"{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}" if self.service_account else ""

    @staticmethod
    def of(workload: Workload, trust_domain: str) -> Caller:
        """A workload that is not enrolled is a stranger with addresses: nobody vouches for more."""
        if not workload.enrolled:
            return Caller(addresses=workload.addresses)
        return Caller(
            workload.namespace, workload.service_account, trust_domain, tuple(sorted(workload.labels.items())), workload.addresses
        )


STRANGER = Caller()


@dataclass(frozen=True, slots=True)
class Decision:
    """`rule` names what decided, for people: "NAMESPACE/POLICY[0]", or "NAMESPACE/POLICY: no rule matches"; "" if nothing protects.

    `audit` names the rule of an AUDIT policy that matches whatever the request: enforcing it would deny; "" if none does. One that needs the
    request is counted by the waypoint.
    """

    verdict: Verdict
    rule: str
    audit: str = ""


def matches(pattern: str, value: str) -> bool:
    """Exact, or one "*" at the start or the end; "*" alone is any value that is not empty. No other character is special."""
    if pattern == "*":
        return bool(value)
    if pattern.startswith("*"):
        return value.endswith(pattern[1:])
    if pattern.endswith("*"):
        return value.startswith(pattern[:-1])
    return pattern == value


@functools.lru_cache(maxsize=65536)
def block(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """A CIDR block, host bits ignored. Raises ValueError."""
    return ipaddress.ip_network(text, strict=False)


@functools.lru_cache(maxsize=65536)
def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(text)


def _within(caller: Caller, blocks: tuple[str, ...]) -> bool:
    found = [block(b) for b in blocks]
    return any(_address(a) in b for a in caller.addresses for b in found)


def source_matches(source: Source, caller: Caller) -> bool:
    """True if the caller fits. A stranger fits no positive list of names or labels, and every negative one, as in Istio.

    Tokens come with the request and are left out: see `Source.l7`.
    """
    lists = (
        (source.principals, source.not_principals, caller.principal),
        (source.namespaces, source.not_namespaces, caller.namespace),
        (
            source.service_accounts,
            source.not_service_accounts,
            f"{caller.namespace}/{caller.service_account}" if caller.service_account else "",
        ),
    )
    for wanted, unwanted, value in lists:
        if wanted and not (value and any(matches(p, value) for p in wanted)):
            return False
        if value and any(matches(p, value) for p in unwanted):
            return False
    if source.labels and not set(source.labels) <= set(caller.labels):
        return False
    if source.ip_blocks and not _within(caller, source.ip_blocks):
        return False
    return not (source.not_ip_blocks and _within(caller, source.not_ip_blocks))


Matcher = Callable[[Source], bool]


def _fits(operation: Operation, port: int, protocol: str) -> bool:
    if operation.protocols and protocol not in operation.protocols:
        return False
    return (not operation.ports or port in operation.ports) and port not in operation.not_ports


def _rule_matches(rule: PolicyRule, is_source: Matcher, port: int, protocol: str) -> Verdict | None:
    """None: no. ALLOW: yes, whatever the request. WAYPOINT: it depends on the request."""
    sources = [s for s in rule.sources if is_source(s)]
    operations = [o for o in rule.operations if _fits(o, port, protocol)]
    if (rule.sources and not sources) or (rule.operations and not operations):
        return None
    if not all(map(is_source, rule.also_sources)) or not all(_fits(o, port, protocol) for o in rule.also_operations):
        return None
    # Of alternatives one that does not ask is enough; of what must hold besides, everything counts.
    asks = (bool(sources) and all(s.l7 for s in sources)) or (bool(operations) and all(o.l7 for o in operations))
    asks = asks or any(s.l7 for s in rule.also_sources) or any(o.l7 for o in rule.also_operations)
    return Verdict.WAYPOINT if asks else Verdict.ALLOW


def protecting(workload: Workload, snapshot: Snapshot) -> tuple[Policy, ...]:
    """Policies that protect a workload, by name. One that is named but missing counts as an ALLOW without rules: it denies everything."""
    return named(workload.policies, snapshot)


def named(policies: Iterable[str], snapshot: Snapshot) -> tuple[Policy, ...]:
    """The policies of these names, sorted; one that is missing is as in `protecting`."""
    return tuple(snapshot.policies.get(name) or Policy(name, Action.ALLOW) for name in sorted(policies))


def decide(policies: Sequence[Policy], caller: Caller, port: int, protocol: str = TCP) -> Decision:
    """The verdict for a connection from `caller` to target port `port`.

    Datagrams have no requests: over UDP an HTTP operation of an ALLOW rule never matches, one of a DENY rule always does.
    """
    return _decide(policies, lambda source: source_matches(source, caller), port, protocol)


def _decide(policies: Sequence[Policy], is_source: Matcher, port: int, protocol: str) -> Decision:
    audit = next((name for name, found in _hits(policies, Action.AUDIT, is_source, port, protocol) if found is Verdict.ALLOW), "")
    enforced = [p for p in policies if p.action is not Action.AUDIT]
    if not enforced:
        return Decision(Verdict.NONE, "", audit)
    undecided = ""
    for name, found in _hits(enforced, Action.DENY, is_source, port, protocol):
        if found is Verdict.ALLOW:
            return Decision(Verdict.DENY, name, audit)
        undecided = undecided or name
    allow = [p for p in enforced if p.action is Action.ALLOW]
    if not allow:
        return Decision(Verdict.WAYPOINT, undecided, audit) if undecided else Decision(Verdict.ALLOW, "no DENY rule matches", audit)
    hits = _hits(allow, Action.ALLOW, is_source, port, protocol)
    if not hits:
        return Decision(Verdict.DENY, f"{', '.join(p.name for p in allow)}: no rule matches", audit)
    for name, found in hits:
        if found is Verdict.ALLOW:
            return Decision(Verdict.WAYPOINT, undecided, audit) if undecided else Decision(Verdict.ALLOW, name, audit)
    return Decision(Verdict.WAYPOINT, undecided or hits[0][0], audit)


def _hits(policies: Iterable[Policy], action: Action, is_source: Matcher, port: int, protocol: str) -> list[tuple[str, Verdict]]:
    """(name of the rule, ALLOW or WAYPOINT) of every rule of that action that matches."""
    found = []
    for policy in policies:
        if policy.action is action:
            for index, rule in enumerate(policy.rules):
                verdict = _rule_matches(rule, is_source, port, protocol)
                if verdict is Verdict.WAYPOINT and protocol == UDP:
                    verdict = None if action is Action.ALLOW else Verdict.ALLOW
                if verdict is not None:
                    found.append((f"{policy.name}[{index}]", verdict))
    return found


class Classes:
    """Sorts callers by the sources that match them: callers of one class are the same to every policy of a snapshot.

    A class is the set of indexes of its matching sources; that of STRANGER is the class of everybody who is not known.
    """

    def __init__(self, policies: Iterable[Policy]) -> None:
        """Collect the distinct sources of all policies."""
        self.sources = tuple(dict.fromkeys(s for p in policies for rule in p.rules for s in (*rule.sources, *rule.also_sources)))
        self._index = {source: number for number, source in enumerate(self.sources)}
        self._labels = frozenset(name for s in self.sources for name, _ in s.labels)
        self._names = tuple(self._labels)
        self._asking: dict[tuple[int, str], list[int]] = {}
        """Sources that ask for exact names, by each of them: nobody else need be compared with those."""
        self._open: list[int] = []
        for number, source in enumerate(self.sources):
            for name in _exact_names(source):
                self._asking.setdefault(name, []).append(number)
            if not _exact_names(source):
                self._open.append(number)
        self._by_blocks = any(s.ip_blocks or s.not_ip_blocks for s in self.sources)
        self._known: dict[Caller, frozenset[int]] = {}
        self._by_workload: dict[tuple[object, ...], frozenset[int]] = {}
        self._interned: dict[frozenset[int], frozenset[int]] = {}
        self.stranger = self.of(STRANGER)

    def of(self, caller: Caller) -> frozenset[int]:
        """The caller's class. What no policy asks for is left out first, so that a thousand replicas are looked at once."""
        plain = Caller(
            caller.namespace,
            caller.service_account,
            caller.trust_domain,
            tuple(pair for pair in caller.labels if pair[0] in self._labels),
            caller.addresses if self._by_blocks else (),
        )
        found = self._known.get(plain)
        if found is None:
            names = enumerate((plain.principal, f"{plain.namespace}/{plain.service_account}", plain.namespace))
            likely = {*self._open, *(i for name in names for i in self._asking.get(name, ()))}
            matching = frozenset(i for i in likely if source_matches(self.sources[i], plain))
            found = self._interned.setdefault(matching, matching)
            self._known[plain] = found
        return found

    def of_workload(self, workload: Workload, trust_domain: str) -> frozenset[int]:
        """The same as `of(Caller.of(workload, trust_domain))`, quicker for the thousands of workloads that look alike."""
        labels = tuple(workload.labels.get(name) for name in self._names) if workload.enrolled else ()
        addresses = workload.addresses if self._by_blocks else ()
        key = (workload.enrolled, workload.namespace, workload.service_account, labels, addresses, trust_domain)
        found = self._by_workload.get(key)
        if found is None:
            found = self._by_workload[key] = self.of(Caller.of(workload, trust_domain))
        return found

    def number(self, source: Source) -> int:
        """Index of a source of the policies."""
        return self._index[source]

    def matcher(self, members: frozenset[int]) -> Matcher:
        """Does a source match the callers of this class?"""
        return lambda source: self.number(source) in members

    def blocks(self) -> dict[str, frozenset[int]]:
        """The class of a stranger at an address, by CIDR block: the longest block that holds the address tells.

        All of IPv4 is among them, because the kernel's table holds it inside ::/0, as ::ffff:0:0/96 (RFC 4291, 2.5.5.2), which no policy means.
        """
        named = {str(block(b)) for s in self.sources for b in (*s.ip_blocks, *s.not_ip_blocks)}
        blocks = sorted(named | {"0.0.0.0/0"} if named else named)
        found = {}
        for text in blocks:
            inside = [other for other in blocks if block(other).version == block(text).version and _covers(other, text)]
            found[text] = frozenset(
                i
                for i, s in enumerate(self.sources)
                if source_matches(_without_blocks(s), STRANGER)
                and (not s.ip_blocks or any(str(block(b)) in inside for b in s.ip_blocks))
                and not any(str(block(b)) in inside for b in s.not_ip_blocks)
            )
        return found


def _exact_names(source: Source) -> list[tuple[int, str]]:
    """(kind, name) of which a caller must have one to match: principals, service accounts or namespaces; none if patterns may match."""
    for kind, wanted in enumerate((source.principals, source.service_accounts, source.namespaces)):
        if wanted and not any("*" in name for name in wanted):
            return [(kind, name) for name in wanted]
    return []


def _covers(outer: str, inner: str) -> bool:
    wide, narrow = block(outer), block(inner)
    return wide.prefixlen <= narrow.prefixlen and narrow.network_address in wide


def _without_blocks(source: Source) -> Source:
    return Source(
        source.principals,
        source.not_principals,
        source.namespaces,
        source.not_namespaces,
        source.service_accounts,
        source.not_service_accounts,
        labels=source.labels,
    )


Row = tuple["frozenset[int] | None", str, int]
"""(class, or None for every class without rows of its own; protocol; port or OTHER_PORT)."""


def compile_rows(policies: Sequence[Policy], classes: Classes, present: Iterable[frozenset[int]]) -> Mapping[Row, Decision]:
    """Rows for a lookup of (class, port), (class, OTHER_PORT), (None, port), (None, OTHER_PORT), in this order, that gives what `decide` gives.

    `present` are the classes that callers have. None also stands for a class that is not listed: a caller that is not known yet is treated as a stranger.
    Empty if there is no policy.
    """
    if not policies:
        return {}
    ports = {OTHER_PORT}
    sources: set[int] = set()
    for policy in policies:
        for rule in policy.rules:
            sources.update(classes.number(s) for s in (*rule.sources, *rule.also_sources))
            for operation in (*rule.operations, *rule.also_operations):
                ports.update(operation.ports, operation.not_ports)
    rows: dict[Row, Decision] = {}
    seen: dict[frozenset[int], dict[tuple[str, int], Decision]] = {}
    stranger = _column(policies, classes, classes.stranger, ports)
    seen[classes.stranger & sources] = stranger
    rows.update({(None, protocol, port): decision for (protocol, port), decision in stranger.items()})
    for members in present:
        relevant = members & sources  # what these policies ask for: few classes differ in it
        column = seen.get(relevant)
        if column is None:
            column = seen[relevant] = _column(policies, classes, members, ports)
        if column != stranger:
            rows.update({(members, protocol, port): decision for (protocol, port), decision in column.items()})
    return rows


def _column(policies: Sequence[Policy], classes: Classes, members: frozenset[int], ports: Iterable[int]) -> dict[tuple[str, int], Decision]:
    return {(protocol, port): _decide(policies, classes.matcher(members), port, protocol) for protocol in PROTOCOLS for port in ports}
