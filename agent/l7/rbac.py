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

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from envoy.config.core.v3 import address_pb2
from envoy.config.rbac.v3 import rbac_pb2
from envoy.config.route.v3 import route_components_pb2
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2 as filter_pb2
from envoy.type.matcher.v3 import filter_state_pb2, path_pb2, regex_pb2, string_pb2
from google.protobuf.any_pb2 import Any as AnyMessage

from agent.l7 import names
from agent.l7.resources import packed
from agent.model import Action, Operation, Policy, Source, Workload
from agent.policy import TCP, Caller, block, source_matches

ANY_CALLER = rbac_pb2.Principal(any=True)
ANY_REQUEST = rbac_pb2.Permission(any=True)


@dataclass(frozen=True, slots=True)
class Authorization:
    """Per-route configuration of the two filters, by filter name; empty when nothing protects the target. Equal content is equal."""

    filters: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))

    def apply(self, target: Mapping[str, AnyMessage]) -> None:
        """Add to a `typed_per_filter_config` map of a route, virtual host or weighted cluster."""
        for name, body in self.filters.items():
            target[name].ParseFromString(body)


Principals = Callable[[Source, Action], "rbac_pb2.Principal | None"]
"""Turns a Source into a Principal; None = no caller can match."""


def needs_request(policy: Policy) -> bool:
    """Return True if this policy can only be decided with the request in hand (method, path or host)."""
    return any(op.l7 and _over_tcp(op) for rule in policy.rules for op in rule.operations)


def at_caller(policies: Sequence[Policy], port: int, callers: LocalCallers) -> Authorization:
    """Build what the outbound side enforces for an endpoint with these policies. `port` is the one it listens on: conditions on it are decided now."""
    return _authorization(policies, callers.principal, port)


def likeness(policies: Sequence[Policy], port: int) -> Authorization:
    """What tells endpoints apart that are protected differently, the same on every node: who matches a Source is left open. Not for Envoy."""
    return _authorization(policies, _principal_by_content, port)


def at_receiver(policies: Sequence[Policy], callers: Callers) -> Authorization:
    """Build what the inbound listener of a workload with these policies enforces; port conditions are left to Envoy (`destination_port`)."""
    return _authorization(policies, callers.principal, None)


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
    shut strangers out.
    """

    def __init__(self, workloads: Iterable[Workload], trust_domain: str) -> None:
        """`workloads` are those whose addresses can be believed (see `agent.l7.snapshot`)."""
        self._trust_domain = trust_domain
        self._owners: dict[str, list[Workload]] = defaultdict(list)
        for workload in workloads:
            for address in workload.addresses:
                self._owners[address].append(workload)

    def principal(self, source: Source, action: Action) -> rbac_pb2.Principal | None:
        """Expand a Source to the addresses of the workloads that match it."""
        quantifier = all if action is Action.ALLOW else any
        matching = {
            address
            for address, owners in self._owners.items()
            if quantifier(source_matches(source, Caller.of(owner, self._trust_domain)) for owner in owners)
        }
        if source.principals or source.namespaces or source.service_accounts or source.labels:
            return _any_block(matching) if matching else None
        as_strangers = {address for address in self._owners if source_matches(source, Caller(addresses=(address,)))}
        strangers = [_any_block(source.ip_blocks)] if source.ip_blocks else []
        excluded = {*source.not_ip_blocks, *(as_strangers - matching)}
        if excluded:
            strangers.append(rbac_pb2.Principal(not_id=_any_block(excluded)))
        if not strangers:
            return ANY_CALLER
        known = [_any_block(matching - as_strangers)] if matching - as_strangers else []
        return _or_principals([*known, _and_principals(strangers)])


def _any_block(blocks: Iterable[str]) -> rbac_pb2.Principal:
    """Match a peer by its address: addresses and CIDR blocks."""
    ranges = [
        address_pb2.CidrRange(address_prefix=str(network.network_address), prefix_len={"value": network.prefixlen})
        for network in map(block, sorted(blocks))
    ]
    return _or_principals([rbac_pb2.Principal(direct_remote_ip=r) for r in ranges])


def _any_workload(workloads: Iterable[str]) -> rbac_pb2.Principal:
    found = [string_pb2.StringMatcher(exact=name) for name in sorted(workloads)]
    return _or_principals(
        [rbac_pb2.Principal(filter_state=filter_state_pb2.FilterStateMatcher(key=names.WORKLOAD_KEY, string_match=one)) for one in found]
    )


def _principal_by_content(source: Source, _action: Action) -> rbac_pb2.Principal:
    return _filter_state("source", repr(source))


def _authorization(policies: Sequence[Policy], principals: Principals, port: int | None) -> Authorization:
    if not policies:
        return Authorization()
    by_action: dict[Action, dict[str, rbac_pb2.Policy]] = {action: {} for action in Action}
    for policy in policies:
        for index, rule in enumerate(policy.rules):
            callers = [principals(source, policy.action) for source in rule.sources] if rule.sources else [ANY_CALLER]
            requests = [_permission(operation, port) for operation in rule.operations] if rule.operations else [ANY_REQUEST]
            ids = [caller for caller in callers if caller is not None]
            permissions = [request for request in requests if request is not None]
            if ids and permissions:
                by_action[policy.action][f"{policy.name}[{index}]"] = rbac_pb2.Policy(principals=ids, permissions=permissions)
    filters: dict[str, bytes] = {}
    deny = filter_pb2.RBAC()
    if by_action[Action.DENY]:
        deny.rules.CopyFrom(rbac_pb2.RBAC(action=rbac_pb2.RBAC.DENY, policies=by_action[Action.DENY]))
    if by_action[Action.AUDIT]:  # action DENY in shadow rules: "shadow_denied" counts what matched, and its name is in the metadata
        deny.shadow_rules.CopyFrom(rbac_pb2.RBAC(action=rbac_pb2.RBAC.DENY, policies=by_action[Action.AUDIT]))
        deny.shadow_rules_stat_prefix = "audit_"
    if deny.ByteSize():
        filters[names.DENY_FILTER] = _per_route(deny)
    if any(policy.action is Action.ALLOW for policy in policies):  # present even without a rule: then nothing matches, all is denied
        filters[names.ALLOW_FILTER] = _per_route(
            filter_pb2.RBAC(rules=rbac_pb2.RBAC(action=rbac_pb2.RBAC.ALLOW, policies=by_action[Action.ALLOW]))
        )
    return Authorization(MappingProxyType(filters))


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
            ids.append(_or_principals([_filter_state(key, pattern) for pattern in wanted]))
        if unwanted:
            ids.append(rbac_pb2.Principal(not_id=_or_principals([_filter_state(key, pattern) for pattern in unwanted])))
    return _and_principals(ids) if ids else ANY_CALLER


def _filter_state(key: str, pattern: str) -> rbac_pb2.Principal:
    return rbac_pb2.Principal(filter_state=filter_state_pb2.FilterStateMatcher(key=key, string_match=_string(pattern)))


def _or_principals(ids: list[rbac_pb2.Principal]) -> rbac_pb2.Principal:
    return ids[0] if len(ids) == 1 else rbac_pb2.Principal(or_ids=rbac_pb2.Principal.Set(ids=ids))


def _and_principals(ids: list[rbac_pb2.Principal]) -> rbac_pb2.Principal:
    return ids[0] if len(ids) == 1 else rbac_pb2.Principal(and_ids=rbac_pb2.Principal.Set(ids=ids))


def _over_tcp(operation: Operation) -> bool:
    return not operation.protocols or TCP in operation.protocols


def _permission(operation: Operation, port: int | None) -> rbac_pb2.Permission | None:
    if not _over_tcp(operation):
        return None
    rules = []
    if port is None:
        if operation.ports:
            rules.append(_or_permissions([rbac_pb2.Permission(destination_port=p) for p in operation.ports]))
        if operation.not_ports:
            rules.append(_not(_or_permissions([rbac_pb2.Permission(destination_port=p) for p in operation.not_ports])))
    elif (operation.ports and port not in operation.ports) or port in operation.not_ports:
        return None
    fields: tuple[tuple[Callable[[str], rbac_pb2.Permission], Sequence[str], Sequence[str]], ...] = (
        (_method, operation.methods, operation.not_methods),
        (_path, operation.paths, operation.not_paths),
        (_host, operation.hosts, operation.not_hosts),
    )
    for match, wanted, unwanted in fields:
        if wanted:
            rules.append(_or_permissions([match(pattern) for pattern in wanted]))
        if unwanted:
            rules.append(_not(_or_permissions([match(pattern) for pattern in unwanted])))
    if not rules:
        return ANY_REQUEST
    return rules[0] if len(rules) == 1 else rbac_pb2.Permission(and_rules=rbac_pb2.Permission.Set(rules=rules))


def _or_permissions(rules: list[rbac_pb2.Permission]) -> rbac_pb2.Permission:
    return rules[0] if len(rules) == 1 else rbac_pb2.Permission(or_rules=rbac_pb2.Permission.Set(rules=rules))


def _not(rule: rbac_pb2.Permission) -> rbac_pb2.Permission:
    return rbac_pb2.Permission(not_rule=rule)


def _method(pattern: str) -> rbac_pb2.Permission:
    return rbac_pb2.Permission(header=route_components_pb2.HeaderMatcher(name=":method", string_match=_string(pattern)))


def _path(pattern: str) -> rbac_pb2.Permission:
    """Match the normalized path without its query (Envoy, PathMatcher)."""
    return rbac_pb2.Permission(url_path=path_pb2.PathMatcher(path=_string(pattern)))


def _host(pattern: str) -> rbac_pb2.Permission:
    """Match :authority whatever its case, port or final dot: a DENY for a host must not be evaded by spelling it differently."""
    if pattern == "*":
        regex = ".+"
    elif pattern.endswith("*"):
        regex = re.escape(pattern[:-1]) + ".*"
    elif pattern.startswith("*"):
        regex = ".*" + re.escape(pattern[1:]) + r"\.?(:[0-9]+)?"
    else:
        regex = re.escape(pattern) + r"\.?(:[0-9]+)?"
    matcher = string_pb2.StringMatcher(safe_regex=regex_pb2.RegexMatcher(regex="(?i)" + regex))
    return rbac_pb2.Permission(header=route_components_pb2.HeaderMatcher(name=":authority", string_match=matcher))


def _string(pattern: str) -> string_pb2.StringMatcher:
    if pattern == "*":
        return string_pb2.StringMatcher(safe_regex=regex_pb2.RegexMatcher(regex=".+"))
    if pattern.endswith("*"):
        return string_pb2.StringMatcher(prefix=pattern[:-1])
    if pattern.startswith("*"):
        return string_pb2.StringMatcher(suffix=pattern[1:])
    return string_pb2.StringMatcher(exact=pattern)
