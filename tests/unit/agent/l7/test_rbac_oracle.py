"""What the RBAC filters decide against `agent.policy.decide`, for any policies, callers and requests.

The filters are read here as Envoy reads them (config.rbac.v3, type.matcher.v3): that Envoy itself does so is for tests/unit/agent/l7/test_requests.py.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import itertools
import re
from collections.abc import Sequence
from typing import Any

from envoy.extensions.filters.http.rbac.v3 import rbac_pb2
from google.protobuf.any_pb2 import Any as AnyMessage
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.l7 import names, rbac
from agent.model import Action, Operation, Policy, PolicyRule, Snapshot, Workload
from agent.policy import Caller, Verdict, decide, matches, protecting
from tests.unit.agent import policies as drawn

REQUESTS = tuple(itertools.product(("GET", "POST", "DELETE"), ("/abc", "/xyz", "/b")))
TARGET = "shop/target"


@dataclasses.dataclass(frozen=True)
class Call:
    """One request as Envoy sees it."""

    state: dict[str, str]
    address: str
    port: int
    method: str
    path: str


def string_matches(matcher: Any, value: str) -> bool:
    kind = matcher.WhichOneof("match_pattern")
    if kind == "safe_regex":
        return bool(re.fullmatch(matcher.safe_regex.regex, value))
    wanted = getattr(matcher, kind)
    return bool({"exact": value == wanted, "prefix": value.startswith(wanted), "suffix": value.endswith(wanted)}[kind])


def principal_matches(principal: Any, call: Call) -> bool:
    kind = principal.WhichOneof("identifier")
    if kind == "any":
        return True
    if kind == "and_ids":
        return all(principal_matches(one, call) for one in principal.and_ids.ids)
    if kind == "or_ids":
        return any(principal_matches(one, call) for one in principal.or_ids.ids)
    if kind == "not_id":
        return not principal_matches(principal.not_id, call)
    if kind == "filter_state":
        value = call.state.get(principal.filter_state.key)
        return value is not None and string_matches(principal.filter_state.string_match, value)
    assert kind == "direct_remote_ip"
    block = ipaddress.ip_network(f"{principal.direct_remote_ip.address_prefix}/{principal.direct_remote_ip.prefix_len.value}")
    return ipaddress.ip_address(call.address) in block


def permission_matches(permission: Any, call: Call) -> bool:  # noqa: PLR0911 - one for each kind
    kind = permission.WhichOneof("rule")
    if kind == "any":
        return True
    if kind == "and_rules":
        return all(permission_matches(one, call) for one in permission.and_rules.rules)
    if kind == "or_rules":
        return any(permission_matches(one, call) for one in permission.or_rules.rules)
    if kind == "not_rule":
        return not permission_matches(permission.not_rule, call)
    if kind == "destination_port":
        return bool(permission.destination_port == call.port)
    if kind == "url_path":
        return string_matches(permission.url_path.path, call.path)
    assert (kind, permission.header.name) == ("header", ":method")
    return string_matches(permission.header.string_match, call.method)


def allowed(authorization: rbac.Authorization, call: Call) -> bool:
    """What the chain of both filters lets pass."""
    for name in (names.DENY_FILTER, names.ALLOW_FILTER):
        if name not in authorization.filters:
            continue
        per_route = rbac_pb2.RBACPerRoute()
        assert AnyMessage.FromString(authorization.filters[name]).Unpack(per_route)
        if not per_route.rbac.HasField("rules"):
            continue
        hit = any(
            any(principal_matches(p, call) for p in one.principals) and any(permission_matches(p, call) for p in one.permissions)
            for one in per_route.rbac.rules.policies.values()
        )
        if hit is (name == names.DENY_FILTER):
            return False
    return True


def without_requests(policies: Sequence[Policy], method: str, path: str) -> list[Policy]:
    """The policies as they are for one request: each HTTP condition is answered."""

    def answered(operation: Operation) -> Operation | None:
        for wanted, unwanted, value in ((operation.methods, operation.not_methods, method), (operation.paths, operation.not_paths, path)):
            if (wanted and not any(matches(p, value) for p in wanted)) or any(matches(p, value) for p in unwanted):
                return None
        return dataclasses.replace(operation, methods=(), not_methods=(), paths=(), not_paths=())

    found = []
    for policy in policies:
        rules = []
        for rule in policy.rules:
            operations = tuple(one for operation in rule.operations if (one := answered(operation)))
            if operations or not rule.operations:
                rules.append(PolicyRule(rule.sources, operations))
        found.append(Policy(policy.name, policy.action, tuple(rules)))
    return found


def says_yes(policies: Sequence[Policy], caller: Caller, call: Call) -> bool:
    verdict = decide(without_requests(policies, call.method, call.path), caller, call.port).verdict
    assert verdict is not Verdict.WAYPOINT
    return verdict is not Verdict.DENY


def workload(name: str, caller: Caller) -> Workload:
    """A workload that calls as `caller`; who has no service account is not enrolled."""
    namespace = caller.namespace or "outside"
    account = caller.service_account or "default"
    enrolled = bool(caller.service_account)
    return Workload(f"{namespace}/{name}", account, "node-1", dict(caller.labels), caller.addresses, name, enrolled, True)


def target(policies: Sequence[Policy]) -> tuple[Workload, Snapshot]:
    one = Workload(TARGET, "default", "node-1", {}, ("192.0.2.99",), "t", True, True, policies=tuple(p.name for p in policies))
    return one, Snapshot("1", {one.name: one}, policies={p.name: p for p in policies})


def state_of(caller: Caller, name: str) -> dict[str, str]:
    """What agent.l7.listeners.outbound notes about a connection."""
    return {
        names.PRINCIPAL_KEY: caller.principal,
        names.NAMESPACE_KEY: caller.namespace,
        names.SERVICE_ACCOUNT_KEY: f"{caller.namespace}/{caller.service_account}",
        names.WORKLOAD_KEY: name,
    }


@settings(max_examples=503, deadline=None)
@given(drawn.policy_sets(most=2), st.lists(drawn.enrolled, min_size=1, max_size=5), st.sampled_from((*drawn.PORTS, drawn.UNNAMED_PORT)))
def test_the_callers_side_decides_as_the_definition_does(policies: list[Policy], callers: list[Caller], port: int) -> None:
    one, snapshot = target(policies)
    workloads = [workload(f"w{number}", caller) for number, caller in enumerate(callers)]
    authorization = rbac.at_caller(protecting(one, snapshot), port, rbac.LocalCallers.of(workloads, drawn.TRUST_DOMAIN))
    for (found, caller), (method, path) in itertools.product(zip(workloads, callers, strict=True), REQUESTS):
        call = Call(state_of(caller, found.name), "127.0.0.1", port, method, path)
        assert allowed(authorization, call) is says_yes(policies, caller, call)


@settings(max_examples=503, deadline=None)
@given(drawn.policy_sets(most=2), st.lists(drawn.enrolled, max_size=3), drawn.enrolled)
def test_a_listener_that_is_newer_than_the_rules_is_never_allowed_more_than_it_will_be(
    policies: list[Policy], callers: list[Caller], late: Caller
) -> None:
    one, snapshot = target(policies)
    known = rbac.LocalCallers.of([workload(f"w{number}", caller) for number, caller in enumerate(callers)], drawn.TRUST_DOMAIN)
    authorization = rbac.at_caller(protecting(one, snapshot), 80, known)
    for method, path in REQUESTS:
        call = Call(state_of(late, "shop/late"), "127.0.0.1", 80, method, path)
        assert says_yes(policies, late, call) or not allowed(authorization, call)


@settings(max_examples=503, deadline=None)
@given(drawn.policy_sets(most=2), st.lists(drawn.callers, max_size=4), st.sampled_from((*drawn.PORTS, drawn.UNNAMED_PORT)))
def test_the_receivers_side_decides_as_the_definition_does_for_every_address(
    policies: list[Policy], callers: list[Caller], port: int
) -> None:
    one, snapshot = target(policies)
    workloads = [workload(f"w{number}", caller) for number, caller in enumerate(callers)]
    authorization = rbac.at_receiver(protecting(one, snapshot), rbac.Callers(workloads, drawn.TRUST_DOMAIN))
    for address, (method, path) in itertools.product(drawn.ADDRESSES, REQUESTS):
        owners = [caller for caller in callers if address in caller.addresses] or [Caller(addresses=(address,))]
        call = Call({}, address, port, method, path)
        answers = {says_yes(policies, owner, call) for owner in owners}
        if len(owners) == 1:
            assert {allowed(authorization, call)} == answers
        else:  # whoever it is of those that share the address, nobody is allowed what one of them is not
            assert not allowed(authorization, call) or answers == {True}


def test_the_requests_that_are_tried_meet_every_condition_that_is_drawn() -> None:
    policy = Policy("shop/p", Action.ALLOW, (PolicyRule(operations=(Operation(methods=("P*",), paths=("/a*", "*z")),)),))
    one, snapshot = target([policy])
    authorization = rbac.at_caller(protecting(one, snapshot), 80, rbac.LocalCallers.of([], drawn.TRUST_DOMAIN))
    passed = {request for request in REQUESTS if allowed(authorization, Call({}, "127.0.0.1", 80, *request))}
    assert passed == {("POST", "/abc"), ("POST", "/xyz")}
