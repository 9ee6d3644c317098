"""AuthorizationPolicies as Envoy RBAC filters, for the caller's side and for the receiver's. Pure functions, called by the builders.

Semantics are those of Istio's AuthorizationPolicy (https://istio.io/latest/docs/reference/config/security/authorization-policy/): DENY
first, then, if any ALLOW policy protects the workload, one must match; AUDIT never decides. One Envoy RBAC filter has one action
(https://www.envoyproxy.io/docs/envoy/v1.37.0/api-v3/config/rbac/v3/rbac.proto), so there are two filters in the chain, `names.DENY_FILTER`
(which carries AUDIT as shadow rules) and `names.ALLOW_FILTER`, both empty in the listener and filled per route.

A policy's rule is one Envoy policy named "NS/NAME[rule]": what `%RESPONSE_CODE_DETAILS%` names. Nothing here may look at a header for who
calls: on the caller's side that is filter state set by the listener that accepted, on the receiver's side the peer's address. What `agent.policy.decide`
says of a TCP connection is what the filters say of its requests; Envoy sees no datagrams, so operations for UDP alone are left out.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from envoy.config.core.v3 import address_pb2
from envoy.config.rbac.v3 import rbac_pb2
from envoy.config.route.v3 import route_components_pb2
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2 as filter_pb2
from envoy.type.matcher.v3 import filter_state_pb2, string_pb2
from google.protobuf.any_pb2 import Any as AnyMessage

from agent.l7 import names, spelling, tokens
from agent.l7.resources import packed
from agent.model import Action, Operation, Policy, PolicyRule, Source, Workload
from agent.policy import TCP, Caller, block, source_matches

ANY_CALLER = rbac_pb2.Principal(any=True)
ANY_REQUEST = rbac_pb2.Permission(any=True)


@dataclass(frozen=True, slots=True)
class Authorization:
    """Per-route configuration of the two filters, by filter name; empty when nothing protects the target. Equal content is equal."""

    filters: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))
    asks: bool = False
    """Does any of it need the request? Then nothing may pass that is not one: what follows a CONNECT is not looked at."""

    def apply(self, target: Mapping[str, AnyMessage]) -> None:
        """Add to a `typed_per_filter_config` map of a route, virtual host or weighted cluster."""
        for name, body in self.filters.items():
            target[name].ParseFromString(body)


Principals = Callable[[Source, Action], "rbac_pb2.Principal | None"]
"""Turns a Source into a Principal; None = no caller can match."""
Ports = Callable[[int], rbac_pb2.Permission]
"""Turns a port that the workload listens on into a Permission."""


def needs_request(policy: Policy) -> bool:
    """Return True if this policy can only be decided with the request in hand (method, path, host, header or token)."""
    return any(_rule_ports(rule) != frozenset() for rule in policy.rules)


def request_ports(policies: Sequence[Policy]) -> tuple[int, ...] | None:
    """Ports of a workload with these policies where one of them needs the request; None = all of them."""
    found = [_rule_ports(rule) for policy in policies for rule in policy.rules]
    return None if None in found else tuple(sorted(frozenset[int]().union(*(ports for ports in found if ports))))


def _rule_ports(rule: PolicyRule) -> frozenset[int] | None:
    """Ports where a rule needs the request; None = all of them."""
    everywhere = any(source.l7 for source in (*rule.sources, *rule.also_sources)) or any(op.l7 for op in rule.also_operations)
    operations = [op for op in rule.operations if _over_tcp(op)]
    if rule.operations and not operations:
        return frozenset()
    asking = operations if everywhere else [op for op in operations if op.l7]
    if not everywhere and not asking:
        return frozenset()
    ports = None if any(not op.ports for op in asking) or not asking else frozenset(port for op in asking for port in op.ports)
    for op in rule.also_operations:
        if op.ports:
            ports = frozenset(op.ports) if ports is None else ports & frozenset(op.ports)
    return ports


def at_caller(policies: Sequence[Policy], port: int, callers: LocalCallers) -> Authorization:
    """Build what the outbound side enforces for an endpoint with these policies. `port` is the one it listens on: conditions on it are decided now."""
    return _authorization(policies, callers.principal, port)


def at_tunnel(policies: Sequence[Policy], principals: Principals, header: str) -> Authorization:
    """Build what the end of a tunnel enforces for a workload with these policies; `header` carries the ADDRESS:PORT that is reached through it."""
    return _authorization(policies, principals, functools.partial(_port_in_header, header))


def likeness(policies: Sequence[Policy], port: int) -> Authorization:
    """What tells endpoints apart that are protected differently, the same on every node: who matches a Source is left open. Not for Envoy."""
    return _authorization(policies, _principal_by_content, port)


def at_receiver(policies: Sequence[Policy], callers: Callers) -> Authorization:
    """Build what the inbound listener of a workload with these policies enforces; port conditions are left to Envoy (`destination_port`)."""
    return _authorization(policies, callers.principal, _port_of_socket)


@dataclass(frozen=True, slots=True)
class LocalCallers:
    """Who is behind an outbound listener: the one workload of this node whose it is.

    Names are compared by Envoy, with what the listener put into filter state. Labels and addresses are not in there, because they change and a changed
    listener drains its connections: a Source that asks for them becomes the list of the workloads that it matches. A listener whose workload is not in
    the list yet is nobody's for ALLOW, and everybody's for DENY and AUDIT: what is not known never widens access.
    """

    known: Mapping[str, Caller]

    @staticmethod
    def of(workloads: Iterable[Workload], trust_domain: str) -> LocalCallers:
        """`workloads` are the enrolled ones of this node."""
        return LocalCallers({workload.name: Caller.of(workload, trust_domain) for workload in workloads})

    def principal(self, source: Source, action: Action) -> rbac_pb2.Principal | None:
        """Turn a Source into conditions on filter state."""
        if not (source.labels or source.ip_blocks or source.not_ip_blocks):
            return _principal_by_filter_state(source)
        matching = {name for name, caller in self.known.items() if source_matches(source, caller)}
        if action is Action.ALLOW:
            return _any_workload(matching) if matching else None
        others = set(self.known) - matching
        return rbac_pb2.Principal(not_id=_any_workload(others)) if others else ANY_CALLER


class Callers:
    """Who is behind an address: how the receiver knows a caller until HBONE brings it the peer's certificate.

    An address that several workloads share (host network) is nobody's for ALLOW unless all of them match, and everybody's for DENY and
    AUDIT: ambiguity never widens access. An address that no workload has never satisfies a positive list of names or labels; a Source with only
    blocks and `not_*` lists matches it if the blocks do, as Istio does for a request without identity, which is what makes DENY + notPrincipals
    shut strangers out. What was asked once is brought from one snapshot to the next by what differs (`after`).
    """

    def __init__(self, workloads: Iterable[Workload], trust_domain: str) -> None:
        """`workloads` are those whose addresses can be believed (see `agent.l7.snapshot`)."""
        self._trust_domain = trust_domain
        self._owners: dict[str, dict[str, Workload]] = {}
        self._answers: dict[tuple[Source, bool], _Answer] = {}
        for workload in workloads:
            self._put(workload)

    def after(self, changes: Iterable[tuple[Workload | None, Workload | None]]) -> None:
        """Take changes of believable workloads, each as it was and as it is. Costs what differs."""
        touched: set[str] = set()
        for old, new in changes:
            if old is not None:
                for address in old.addresses:
                    self._owners[address].pop(old.name, None)
                touched.update(old.addresses)
            if new is not None:
                self._put(new)
                touched.update(new.addresses)
        gone = {address for address in touched if not self._owners[address]}
        for address in gone:
            del self._owners[address]
        revision = next(_revisions)
        memory: _Memory = {}
        for (source, every), answer in self._answers.items():
            answer.correct(
                touched,
                {address for address in touched - gone if self._matches(source, address, every, memory)},
                {address for address in touched - gone if answer.strangers is not None and _as_stranger(source, address)},
                revision,
            )

    def _put(self, workload: Workload) -> None:
        for address in workload.addresses:
            self._owners.setdefault(address, {})[workload.name] = workload

    def stamp(self, policies: Iterable[Policy]) -> int:
        """Another number if what `principal` says of any Source of these policies may differ."""
        found = (
            self._answer(source, policy.action).revision
            for policy in policies
            for rule in policy.rules
            for source in (*rule.sources, *rule.also_sources)
        )
        return max(found, default=0)

    def principal(self, source: Source, action: Action) -> rbac_pb2.Principal | None:
        """Expand a Source to the addresses of the workloads that match it."""
        answer = self._answer(source, action)
        if not answer.made:
            answer.principal, answer.made = self._principal(source, answer), True
        return answer.principal

    def _answer(self, source: Source, action: Action) -> _Answer:
        every = action is Action.ALLOW
        answer = self._answers.get((source, every))
        if answer is None:
            if len(self._answers) >= _MOST_ANSWERS:  # of policies that are gone, most of them
                self._answers.clear()
            memory: _Memory = {}
            matching = {address for address in self._owners if self._matches(source, address, every, memory)}
            strangers = None if _names_callers(source) else {address for address in self._owners if _as_stranger(source, address)}
            answer = self._answers[source, every] = _Answer(matching, strangers, next(_revisions))
        return answer

    def _matches(self, source: Source, address: str, every: bool, memory: _Memory) -> bool:
        """Do all, or any, of those who share an address match? `memory` is for one Source: workloads that it cannot tell apart are compared once."""
        owners = self._owners[address].values()
        return all(self._fits(source, one, memory) for one in owners) if every else any(self._fits(source, one, memory) for one in owners)

    def _fits(self, source: Source, owner: Workload, memory: _Memory) -> bool:
        if source.labels or source.ip_blocks or source.not_ip_blocks or not owner.enrolled:
            return source_matches(source, Caller.of(owner, self._trust_domain))
        key = (source, owner.namespace, owner.service_account)
        found = memory.get(key)
        if found is None:
            found = memory[key] = source_matches(source, Caller.of(owner, self._trust_domain))
        return found

    @staticmethod
    def _principal(source: Source, answer: _Answer) -> rbac_pb2.Principal | None:
        matching, as_strangers = answer.matching, answer.strangers
        if as_strangers is None:
            return _any_block(matching) if matching else None
        strangers = [_any_block(source.ip_blocks)] if source.ip_blocks else []
        excluded = {*source.not_ip_blocks, *(as_strangers - matching)}
        if excluded:
            strangers.append(rbac_pb2.Principal(not_id=_any_block(excluded)))
        if not strangers:
            return ANY_CALLER
        known = [_any_block(matching - as_strangers)] if matching - as_strangers else []
        return or_principals([*known, and_principals(strangers)])


_MOST_ANSWERS = 10_000
_revisions = itertools.count(1)  # of all objects together: stamps of one are never those of another
_Memory = dict[tuple[Source, str, str], bool]


@dataclass(slots=True)
class _Answer:
    """What a Source comes to: the addresses that match it, those that would as strangers (None: it names callers), and since when that is so."""

    matching: set[str]
    strangers: set[str] | None
    revision: int
    principal: rbac_pb2.Principal | None = None
    made: bool = False

    def correct(self, touched: set[str], matching: set[str], strangers: set[str], revision: int) -> None:
        """Of the addresses that were touched these match."""
        differs = self.matching & touched != matching
        if differs:
            self.matching = (self.matching - touched) | matching
        if self.strangers is not None and self.strangers & touched != strangers:
            self.strangers = (self.strangers - touched) | strangers
            differs = True
        if differs:
            self.principal, self.made, self.revision = None, False, revision


def _names_callers(source: Source) -> bool:
    return bool(source.principals or source.namespaces or source.service_accounts or source.labels)


def _as_stranger(source: Source, address: str) -> bool:
    return source_matches(source, Caller(addresses=(address,)))


def _any_block(blocks: Iterable[str]) -> rbac_pb2.Principal:
    """Match a peer by its address: addresses and CIDR blocks."""
    ranges = [
        address_pb2.CidrRange(address_prefix=str(network.network_address), prefix_len={"value": network.prefixlen})
        for network in map(block, sorted(blocks))
    ]
    return or_principals([rbac_pb2.Principal(direct_remote_ip=r) for r in ranges])


def _any_workload(workloads: Iterable[str]) -> rbac_pb2.Principal:
    found = [string_pb2.StringMatcher(exact=name) for name in sorted(workloads)]
    return or_principals(
        [rbac_pb2.Principal(filter_state=filter_state_pb2.FilterStateMatcher(key=names.WORKLOAD_KEY, string_match=one)) for one in found]
    )


def _principal_by_content(source: Source, _action: Action) -> rbac_pb2.Principal:
    return _filter_state("source", repr(source))


def _authorization(policies: Sequence[Policy], principals: Principals, port: int | Ports) -> Authorization:
    if not policies:
        return Authorization()
    by_action: dict[Action, dict[str, rbac_pb2.Policy]] = {action: {} for action in Action}
    for policy in policies:
        for index, rule in enumerate(policy.rules):
            if (found := _rule(rule, policy.action, principals, port)) is not None:
                by_action[policy.action][f"{policy.name}[{index}]"] = found
    filters: dict[str, bytes] = {}
    deny = filter_pb2.RBAC()
    if by_action[Action.DENY]:
        deny.rules.CopyFrom(rbac_pb2.RBAC(action=rbac_pb2.RBAC.DENY, policies=by_action[Action.DENY]))
    if by_action[Action.AUDIT]:  # action DENY in shadow rules: "shadow_denied" counts what matched, and its name is in the metadata
        deny.shadow_rules.CopyFrom(rbac_pb2.RBAC(action=rbac_pb2.RBAC.DENY, policies=by_action[Action.AUDIT]))
        deny.shadow_rules_stat_prefix = names.AUDIT_PREFIX
        deny.track_per_rule_stats = True  # agent.l7.audit
    if deny.ByteSize():
        filters[names.DENY_FILTER] = _per_route(deny)
    if any(policy.action is Action.ALLOW for policy in policies):  # present even without a rule: then nothing matches, all is denied
        filters[names.ALLOW_FILTER] = _per_route(
            filter_pb2.RBAC(rules=rbac_pb2.RBAC(action=rbac_pb2.RBAC.ALLOW, policies=by_action[Action.ALLOW]))
        )
    return Authorization(MappingProxyType(filters), any(map(needs_request, policies)))


def _rule(rule: PolicyRule, action: Action, principals: Principals, port: int | Ports) -> rbac_pb2.Policy | None:
    """Build one rule; None: no request can match it."""

    def caller(source: Source) -> rbac_pb2.Principal | None:
        found = principals(source, action)
        return found if found is None or not source.l7 else and_principals([found, *tokens.principals(source)])

    callers = [caller(source) for source in rule.sources] if rule.sources else [ANY_CALLER]
    requests = [_permission(operation, port, action) for operation in rule.operations] if rule.operations else [ANY_REQUEST]
    ids = [one for one in callers if one is not None]
    permissions = [one for one in requests if one is not None]
    also_ids = [caller(source) for source in rule.also_sources]
    also = [_permission(operation, port, action) for operation in rule.also_operations]
    if not ids or not permissions or None in also_ids or None in also:
        return None
    if also_ids:
        ids = [and_principals([or_principals(ids), *(one for one in also_ids if one is not None)])]
    if also:
        every = [_or_permissions(permissions), *(one for one in also if one is not None)]
        permissions = [rbac_pb2.Permission(and_rules=rbac_pb2.Permission.Set(rules=every))]
    return rbac_pb2.Policy(principals=ids, permissions=permissions)


def _per_route(rbac: filter_pb2.RBAC) -> bytes:
    body: bytes = packed(filter_pb2.RBACPerRoute(rbac=rbac)).SerializeToString(deterministic=True)
    return body


def _principal_by_filter_state(source: Source) -> rbac_pb2.Principal:
    fields = (
        (names.PRINCIPAL_KEY, source.principals, source.not_principals),
        (names.NAMESPACE_KEY, source.namespaces, source.not_namespaces),
        (names.SERVICE_ACCOUNT_KEY, source.service_accounts, source.not_service_accounts),
    )
    ids = []
    for key, wanted, unwanted in fields:
        if wanted:
            ids.append(or_principals([_filter_state(key, pattern) for pattern in wanted]))
        if unwanted:
            ids.append(rbac_pb2.Principal(not_id=or_principals([_filter_state(key, pattern) for pattern in unwanted])))
    return and_principals(ids) if ids else ANY_CALLER


def _filter_state(key: str, pattern: str) -> rbac_pb2.Principal:
    return rbac_pb2.Principal(filter_state=filter_state_pb2.FilterStateMatcher(key=key, string_match=spelling.string(pattern)))


def or_principals(ids: list[rbac_pb2.Principal]) -> rbac_pb2.Principal:
    """Any of at least one."""
    return ids[0] if len(ids) == 1 else rbac_pb2.Principal(or_ids=rbac_pb2.Principal.Set(ids=ids))


def and_principals(ids: list[rbac_pb2.Principal]) -> rbac_pb2.Principal:
    """All of at least one."""
    return ids[0] if len(ids) == 1 else rbac_pb2.Principal(and_ids=rbac_pb2.Principal.Set(ids=ids))


def _over_tcp(operation: Operation) -> bool:
    return not operation.protocols or TCP in operation.protocols


def _port_of_socket(port: int) -> rbac_pb2.Permission:
    return rbac_pb2.Permission(destination_port=port)


def _port_in_header(header: str, port: int) -> rbac_pb2.Permission:
    return rbac_pb2.Permission(
        header=route_components_pb2.HeaderMatcher(name=header, string_match=string_pb2.StringMatcher(suffix=f":{port}"))
    )


def _permission(operation: Operation, port: int | Ports, action: Action) -> rbac_pb2.Permission | None:
    if not _over_tcp(operation):
        return None
    rules = []
    if callable(port):
        if operation.ports:
            rules.append(_or_permissions([port(p) for p in operation.ports]))
        if operation.not_ports:
            rules.append(_not(_or_permissions([port(p) for p in operation.not_ports])))
    elif (operation.ports and port not in operation.ports) or port in operation.not_ports:
        return None
    conditions: list[tuple[_Match, Sequence[str], Sequence[str]]] = [
        (_method, operation.methods, operation.not_methods),
        (_path, operation.paths, operation.not_paths),
        (_host, operation.hosts, operation.not_hosts),
        *((functools.partial(_header, one.name), one.values, one.not_values) for one in operation.headers),
        *((functools.partial(_claim, one.path), one.values, one.not_values) for one in operation.claims),
    ]
    forbids = action is not Action.ALLOW
    for match, wanted, unwanted in conditions:
        if wanted:
            rules.append(_or_permissions([match(pattern, forbids) for pattern in wanted]))
        if unwanted:
            rules.append(_not(_or_permissions([match(pattern, not forbids) for pattern in unwanted])))
    if not rules:
        return ANY_REQUEST
    return rules[0] if len(rules) == 1 else rbac_pb2.Permission(and_rules=rbac_pb2.Permission.Set(rules=rules))


_Match = Callable[[str, bool], rbac_pb2.Permission]
"""Turns a pattern into a condition; True: the wide form (`agent.l7.spelling`)."""


def _or_permissions(rules: list[rbac_pb2.Permission]) -> rbac_pb2.Permission:
    return rules[0] if len(rules) == 1 else rbac_pb2.Permission(or_rules=rbac_pb2.Permission.Set(rules=rules))


def _not(rule: rbac_pb2.Permission) -> rbac_pb2.Permission:
    return rbac_pb2.Permission(not_rule=rule)


def _method(pattern: str, _wide: bool) -> rbac_pb2.Permission:
    return _headed(":method", spelling.string(pattern))


def _path(pattern: str, wide: bool) -> rbac_pb2.Permission:
    return spelling.path(pattern, wide=wide)


def _host(pattern: str, wide: bool) -> rbac_pb2.Permission:
    return _headed(":authority", spelling.host(pattern, wide=wide))


def _header(name: str, pattern: str, wide: bool) -> rbac_pb2.Permission:
    return _headed(name, spelling.header(pattern, wide=wide))


def _headed(name: str, matcher: string_pb2.StringMatcher) -> rbac_pb2.Permission:
    return rbac_pb2.Permission(header=route_components_pb2.HeaderMatcher(name=name, string_match=matcher))


def _claim(path: tuple[str, ...], pattern: str, _wide: bool) -> rbac_pb2.Permission:
    return rbac_pb2.Permission(sourced_metadata=rbac_pb2.SourcedMetadata(metadata_matcher=tokens.claim(path, pattern)))
