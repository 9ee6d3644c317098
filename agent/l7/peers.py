"""Who is at the other end of a tunnel, as conditions of Envoy's RBAC filter: by the SPIFFE ID that its certificate proved. Pure, used by the builder.

The listener of tunnels writes the ID and the peer's address into filter state (`agent.l7.hbone`), from where both the filters at the end of the tunnel and
those behind it read them. Semantics are those of `agent.policy.source_matches`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from envoy.config.rbac.v3 import rbac_pb2
from envoy.type.matcher.v3 import address_pb2, filter_state_pb2, regex_pb2, string_pb2
from xds.core.v3 import cidr_pb2

from agent.l7 import names
from agent.l7.rbac import ANY_CALLER, and_principals, or_principals
from agent.model import Action, Source, Workload
from agent.policy import block

Labels = frozenset[tuple[str, str]]
_Asked = tuple[Labels, Action]
_Known = tuple[dict[str, dict[str, Labels]], dict[_Asked, frozenset[str]], dict[_Asked, "rbac_pb2.Principal | None"]]
"""Labels by address and workload; what was asked so far: addresses that match, for ALLOW, and otherwise those that do not; what became of it."""


class Peers:
    """Turns Sources into conditions on who holds the certificate.

    Labels are no part of a certificate: a Source that asks for them becomes the addresses of the workloads that have them. A peer whose address is no
    workload's has no labels for ALLOW, and every label for DENY and AUDIT: what is not known never widens access. `ip_blocks` are compared with the
    address that the tunnel comes from. What was asked once is brought from one snapshot to the next by what differs (`after`).
    """

    def __init__(self, workloads: Iterable[Workload], trust_domain: str, known: _Known | None = None) -> None:
        """`workloads` are those whose addresses can be believed (see `agent.l7.snapshot`); `known` is for `after`."""
        self._trust_domain = trust_domain
        self._begin = f"spiffe://{trust_domain}/ns/"
        self._labels, self._answers, self._principals = known or ({}, {}, {})
        for workload in workloads:
            self._put(workload)

    def after(self, changes: Iterable[tuple[Workload | None, Workload | None]]) -> Peers:
        """Those after changes of believable workloads, each as it was and as it is; the same object if they matter to nothing that was asked.

        Costs what differs, and uses this object up: it is not to be asked any more if it is not what is returned.
        """
        touched: set[str] = set()
        for old, new in changes:
            if old is not None:
                for address in old.addresses:
                    self._labels[address].pop(old.name, None)
                touched.update(old.addresses)
            if new is not None:
                self._put(new)
                touched.update(new.addresses)
        answers = {key: self._again(key, known, touched) for key, known in self._answers.items()}
        for address in touched:
            if not self._labels[address]:
                del self._labels[address]
        if all(answers[key] is known for key, known in self._answers.items()):
            return self
        principals = {key: found for key, found in self._principals.items() if answers[key] is self._answers[key]}
        return Peers((), self._trust_domain, (self._labels, answers, principals))

    def _put(self, workload: Workload) -> None:
        labels = frozenset(workload.labels.items())
        for address in workload.addresses:
            self._labels.setdefault(address, {})[workload.name] = labels

    def _again(self, key: _Asked, known: frozenset[str], touched: set[str]) -> frozenset[str]:
        now = {address for address in touched if self._counts(key, address)}
        return known if now == known & touched else (known - touched) | now

    def _counts(self, key: _Asked, address: str) -> bool:
        """Does an address belong into the answer?"""
        wanted, action = key
        owners = self._labels[address].values()
        if action is Action.ALLOW:
            return bool(owners) and all(wanted <= labels for labels in owners)
        return bool(owners) and not any(wanted <= labels for labels in owners)

    def principal(self, source: Source, action: Action) -> rbac_pb2.Principal | None:
        """All parts of a Source; None = nobody."""
        ids = []
        fields = (
            (_principal, source.principals, source.not_principals),
            (self._namespace, source.namespaces, source.not_namespaces),
            (self._service_account, source.service_accounts, source.not_service_accounts),
        )
        for match, wanted, unwanted in fields:
            if wanted:
                ids.append(_any(map(match, wanted)))
            if unwanted:
                ids.append(rbac_pb2.Principal(not_id=_any(map(match, unwanted))))
        if source.ip_blocks:
            ids.append(_within(source.ip_blocks))
        if source.not_ip_blocks:
            ids.append(rbac_pb2.Principal(not_id=_within(source.not_ip_blocks)))
        if source.labels:
            labelled = self._labelled(frozenset(source.labels), action)
            if labelled is None:
                return None
            ids.append(labelled)
        return and_principals(ids) if ids else ANY_CALLER

    def _labelled(self, wanted: Labels, action: Action) -> rbac_pb2.Principal | None:
        key = (wanted, action)
        if key not in self._answers:
            self._answers[key] = frozenset(address for address in self._labels if self._counts(key, address))
        if key not in self._principals:
            self._principals[key] = self._condition(self._answers[key], action)
        return self._principals[key]

    @staticmethod
    def _condition(answer: frozenset[str], action: Action) -> rbac_pb2.Principal | None:
        if action is Action.ALLOW:
            return _within(tuple(answer)) if answer else None
        return rbac_pb2.Principal(not_id=_within(tuple(answer))) if answer else ANY_CALLER

    def _namespace(self, pattern: str) -> string_pb2.StringMatcher:
        if "*" not in pattern:
            return string_pb2.StringMatcher(prefix=f"{self._begin}{pattern}/")
        return _regex(f"{re.escape(self._begin)}{_glob(pattern)}/sa/[^/]+")

    def _service_account(self, pattern: str) -> string_pb2.StringMatcher:
        """Patterns are of NAMESPACE/NAME; of one without a slash the "*" stands for the other half too, and without either it fits nobody."""
        namespace, slash, name = pattern.partition("/")
        if "*" not in pattern:
            return string_pb2.StringMatcher(exact=f"{self._begin}{namespace}/sa/{name}" if slash else pattern)
        if not slash:
            namespace, name = (pattern, "*") if pattern.endswith("*") else ("*", pattern)
        return _regex(f"{re.escape(self._begin)}{_glob(namespace)}/sa/{_glob(name)}")


def _principal(pattern: str) -> string_pb2.StringMatcher:
    """Patterns are of the SPIFFE ID without its scheme."""
    if pattern == "*" or pattern.endswith("*"):
        return string_pb2.StringMatcher(prefix=f"spiffe://{pattern[:-1]}")
    if pattern.startswith("*"):
        return string_pb2.StringMatcher(suffix=pattern[1:])
    return string_pb2.StringMatcher(exact=f"spiffe://{pattern}")


def _glob(pattern: str) -> str:
    """A regular expression of a part of a SPIFFE ID that may begin or end with "*"; "*" alone is at least one character."""
    if pattern == "*":
        return "[^/]+"
    start, end = pattern.startswith("*"), pattern.endswith("*")
    return ("[^/]*" if start else "") + re.escape(pattern[start : len(pattern) - end]) + ("[^/]*" if end else "")


def _regex(expression: str) -> string_pb2.StringMatcher:
    return string_pb2.StringMatcher(safe_regex=regex_pb2.RegexMatcher(regex=expression))


def _any(matchers: Iterable[string_pb2.StringMatcher]) -> rbac_pb2.Principal:
    found = [filter_state_pb2.FilterStateMatcher(key=names.PEER_KEY, string_match=match) for match in matchers]
    return or_principals([rbac_pb2.Principal(filter_state=one) for one in found])


def _within(blocks: Sequence[str]) -> rbac_pb2.Principal:
    ranges = [
        cidr_pb2.CidrRange(address_prefix=str(network.network_address), prefix_len={"value": network.prefixlen})
        for network in map(block, sorted(blocks))
    ]
    match = address_pb2.AddressMatcher(ranges=ranges)
    return or_principals(
        [rbac_pb2.Principal(filter_state=filter_state_pb2.FilterStateMatcher(key=names.PEER_ADDRESS_KEY, address_match=match))]
    )
