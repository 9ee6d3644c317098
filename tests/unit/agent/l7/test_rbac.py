"""Policies become RBAC filters that never allow more than the policies say."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2
from google.protobuf.any_pb2 import Any as AnyMessage

from agent.l7 import names, rbac
from agent.l7.snapshot import Builder
from agent.l7.view import View
from agent.model import Action, Operation, Policy, PolicyRule, Snapshot, Source, Workload
from agent.policy import protecting
from tests.unit.agent.l7 import harness

GET = Operation(methods=("GET",))


def filters(authorization: rbac.Authorization) -> dict[str, Any]:
    """The two filters' rules, unpacked."""
    result = {}
    for name, body in authorization.filters.items():
        per_route = rbac_pb2.RBACPerRoute()
        assert AnyMessage.FromString(body).Unpack(per_route)
        result[name] = per_route.rbac
    return result


def at_caller(policies: list[Policy], port: int = 8080, callers: Sequence[Workload] = ()) -> dict[str, Any]:
    one = harness.workload("b", "10.0.0.1", policies=tuple(p.name for p in policies))
    return filters(rbac.at_caller(protecting(one, harness.snapshot([one], policies=policies)), port, local(*callers)))


def local(*callers: Workload) -> rbac.LocalCallers:
    return rbac.LocalCallers.of(callers, harness.TRUST_DOMAIN)


def test_an_unprotected_workload_has_no_filters() -> None:
    assert at_caller([]) == {}


def test_an_allow_policy_without_rules_denies_everything() -> None:
    allow = at_caller([Policy("default/none", Action.ALLOW)])[names.ALLOW_FILTER]
    assert allow.HasField("rules")
    assert not allow.rules.policies


def test_a_policy_that_is_named_but_missing_denies_everything() -> None:
    one = harness.workload("b", "10.0.0.1", policies=("default/gone",))
    allow = filters(rbac.at_caller(protecting(one, harness.snapshot([one])), 80, local()))[names.ALLOW_FILTER]
    assert allow.HasField("rules")
    assert not allow.rules.policies


def test_deny_and_audit_share_a_filter_and_rules_carry_their_policy_and_index() -> None:
    policies = [
        Policy("default/deny", Action.DENY, (PolicyRule(), PolicyRule(operations=(GET,)))),
        Policy("default/audit", Action.AUDIT, (PolicyRule(),)),
        Policy("default/allow", Action.ALLOW, (PolicyRule(),)),
    ]
    found = at_caller(policies)
    assert sorted(found[names.DENY_FILTER].rules.policies) == ["default/deny[0]", "default/deny[1]"]
    assert sorted(found[names.DENY_FILTER].shadow_rules.policies) == ["default/audit[0]"]
    assert sorted(found[names.ALLOW_FILTER].rules.policies) == ["default/allow[0]"]


def test_an_audit_policy_alone_enforces_nothing() -> None:
    found = at_caller([Policy("default/audit", Action.AUDIT, (PolicyRule(),))])
    assert list(found) == [names.DENY_FILTER]
    assert not found[names.DENY_FILTER].HasField("rules")


@pytest.mark.parametrize(
    ("operation", "port", "matches"),
    [
        (Operation(ports=(8080,)), 8080, True),
        (Operation(ports=(8080,)), 8081, False),
        (Operation(not_ports=(8080,)), 8080, False),
        (Operation(not_ports=(8080,)), 8081, True),
        (Operation(protocols=("UDP",)), 8080, False),
        (Operation(protocols=("UDP", "TCP")), 8080, True),
    ],
)
def test_ports_and_protocols_are_decided_at_the_caller_for_the_target_port(operation: Operation, port: int, matches: bool) -> None:
    allow = at_caller([Policy("default/p", Action.ALLOW, (PolicyRule(operations=(operation,)),))], port)[names.ALLOW_FILTER]
    assert bool(allow.rules.policies) is matches


def receiver(policy: Policy, *others: Any) -> Any:
    target = harness.workload("b", "10.0.0.9", policies=(policy.name,))
    snapshot = harness.snapshot([target, *others], policies=[policy])
    return filters(rbac.at_receiver(protecting(target, snapshot), rbac.Callers(snapshot.workloads.values(), harness.TRUST_DOMAIN)))


def addresses(principal: Any) -> set[str]:
    ids = principal.or_ids.ids if principal.HasField("or_ids") else [principal]
    return {one.direct_remote_ip.address_prefix for one in ids}


def test_the_receiver_knows_callers_by_the_addresses_of_workloads_that_match() -> None:
    policy = Policy("default/p", Action.ALLOW, (PolicyRule((Source(principals=("mesh.test/ns/default/sa/a*",)),)),))
    found = receiver(policy, harness.workload("a1", "10.0.0.1", "fd00::1"), harness.workload("c", "10.0.0.2"))
    assert addresses(found[names.ALLOW_FILTER].rules.policies["default/p[0]"].principals[0]) == {"10.0.0.1", "fd00::1"}


def test_a_positive_list_that_no_workload_matches_matches_nobody() -> None:
    policy = Policy("default/p", Action.ALLOW, (PolicyRule((Source(namespaces=("elsewhere",)),)),))
    assert not receiver(policy)[names.ALLOW_FILTER].rules.policies


@pytest.mark.parametrize(("action", "expected"), [(Action.ALLOW, {"10.0.0.3"}), (Action.DENY, {"10.0.0.1", "10.0.0.3"})])
def test_a_shared_address_counts_for_deny_and_not_for_allow(action: Action, expected: set[str]) -> None:
    policy = Policy("default/p", action, (PolicyRule((Source(service_accounts=("default/a", "default/d")),)),))
    found = receiver(policy, harness.workload("a", "10.0.0.1"), harness.workload("c", "10.0.0.1"), harness.workload("d", "10.0.0.3"))
    rules = found[names.ALLOW_FILTER if action is Action.ALLOW else names.DENY_FILTER].rules
    assert addresses(rules.policies["default/p[0]"].principals[0]) == expected


def test_deny_with_only_negative_lists_reaches_strangers() -> None:
    policy = Policy("default/p", Action.DENY, (PolicyRule((Source(not_service_accounts=("default/a",)),)),))
    principal = receiver(policy, harness.workload("a", "10.0.0.1"))[names.DENY_FILTER].rules.policies["default/p[0]"].principals[0]
    assert principal.HasField("not_id"), "everyone but"
    assert addresses(principal.not_id) == {"10.0.0.1"}


def labelled(name: str, address: str, **labels: str) -> Workload:
    return dataclasses.replace(harness.workload(name, address), labels=labels)


WEB, JOB = labelled("web", "10.1.0.1", app="web", pod="1"), labelled("job", "10.2.0.1", app="job")


@pytest.mark.parametrize(
    "source", [Source(labels=(("app", "web"),)), Source(ip_blocks=("10.1.0.0/16",)), Source(not_ip_blocks=("10.2.0.0/16",))]
)
def test_labels_and_blocks_become_the_local_workloads_that_have_them(source: Source) -> None:
    def principal(action: Action, *callers: Workload) -> Any:
        found = at_caller([Policy("default/p", action, (PolicyRule((source,)),))], callers=callers)
        filter_ = found.get(names.ALLOW_FILTER if action is Action.ALLOW else names.DENY_FILTER)
        return filter_.rules.policies["default/p[0]"].principals[0] if filter_ and filter_.rules.policies else None

    allow = principal(Action.ALLOW, WEB, JOB)
    assert (allow.filter_state.key, allow.filter_state.string_match.exact) == (names.WORKLOAD_KEY, "default/web")
    deny = principal(Action.DENY, WEB, JOB)
    assert deny.not_id.filter_state.string_match.exact == "default/job", "a listener that is newer than the rules is denied"
    assert principal(Action.ALLOW, JOB) is None
    assert principal(Action.DENY, WEB).any


def test_a_rule_that_names_no_label_and_no_block_does_not_depend_on_who_is_here() -> None:
    policies = [Policy("default/p", Action.ALLOW, (PolicyRule((Source(namespaces=("shop",)),)),))]
    assert at_caller(policies, callers=[WEB, JOB]) == at_caller(policies)


def test_a_request_is_not_needed_for_what_holds_for_datagrams_alone() -> None:
    for protocols, needed in (((), True), (("TCP",), True), (("UDP",), False)):
        policy = Policy("default/p", Action.DENY, (PolicyRule(operations=(Operation(methods=("GET",), protocols=protocols),)),))
        assert rbac.needs_request(policy) is needed


def test_endpoints_are_alike_or_not_whoever_calls_from_this_node() -> None:
    rules = {f"default/{app}": PolicyRule((Source(labels=(("app", app),)),), (GET,)) for app in ("web", "job")}
    backing = {"default/web": {80: 8080}}
    endpoints = [harness.workload(f"b{i}", f"10.0.0.{i}", backing=backing, policies=(name,)) for i, name in enumerate(rules)]
    policies = [Policy(name, Action.ALLOW, (rule,)) for name, rule in rules.items()]
    snapshot = harness.snapshot(endpoints, [harness.service("web", "10.96.0.1", 80)], policies=policies)
    assert needs_inbound(snapshot) == {"default/b0", "default/b1"}, "no caller here matches either: still they differ"


def needs_inbound(snapshot: Snapshot) -> frozenset[str]:
    return Builder("node-1", harness.TRUST_DOMAIN).needs_inbound(snapshot)


def two_endpoints(*policies: tuple[str, ...]) -> Snapshot:
    backing = {"default/web": {80: 8080}}
    workloads = [harness.workload(f"b{i}", f"10.0.0.{i}", backing=backing, policies=p) for i, p in enumerate(policies)]
    known = [Policy("default/l7", Action.ALLOW, (PolicyRule(operations=(GET,)),)), Policy("default/l4", Action.ALLOW, (PolicyRule(),))]
    return harness.snapshot(workloads, [harness.service("web", "10.96.0.1", 80)], policies=known)


@pytest.mark.parametrize(
    ("policies", "undecided", "listening"),
    [
        pytest.param([("default/l7",)] * 2, set(), {"default/b0", "default/b1"}, id="alike"),
        pytest.param([("default/l7",), ()], {"default/b0"}, {"default/b0"}, id="one without"),
        pytest.param([("default/l7",), ("default/l4",)], {"default/b0", "default/b1"}, {"default/b0", "default/b1"}, id="l7 and l4"),
        pytest.param([("default/l4",)] * 2, set(), set(), id="l4 only"),
    ],
)
def test_only_where_endpoints_differ_the_receiver_decides(
    policies: list[tuple[str, ...]], undecided: set[str], listening: set[str]
) -> None:
    snapshot = two_endpoints(*policies)
    assert needs_inbound(snapshot) == undecided
    assert {name for name in snapshot.workloads if View.of(snapshot).receives(name)} == listening
