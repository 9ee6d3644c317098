"""Policy: the definition by example, and the compiled rows against the definition for any policies and any connection."""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import Action, Operation, Policy, PolicyRule, Source, Workload
from agent.policy import (
    OTHER_PORT,
    PROTOCOLS,
    STRANGER,
    TCP,
    UDP,
    Caller,
    Classes,
    Decision,
    Row,
    Verdict,
    compile_rows,
    decide,
    matches,
    source_matches,
)
from tests.unit.agent import policies as drawn

FRONTEND = Caller("shop", "frontend", "mesh.local", (("app", "web"), ("tier", "front")), ("10.1.0.1", "fd00::1"))
REDIS = Caller("shop", "redis", "mesh.local")
FROM_FRONTEND = PolicyRule(sources=(Source(service_accounts=("shop/frontend",)),))


def policy(action: Action, *rules: PolicyRule, name: str = "shop/p") -> Policy:
    return Policy(name, action, rules)


def workload(*, enrolled: bool) -> Workload:
    return Workload("shop/w", "frontend", "node-1", {"tier": "front", "app": "web"}, ("10.1.0.1", "fd00::1"), "w", enrolled, True)


@pytest.mark.parametrize(
    ("pattern", "value", "expected"),
    [
        pytest.param("shop/frontend", "shop/frontend", True, id="exact"),
        pytest.param("shop/front", "shop/frontend", False, id="exact-is-not-a-prefix"),
        pytest.param("shop/*", "shop/frontend", True, id="prefix"),
        pytest.param("*/frontend", "shop/frontend", True, id="suffix"),
        pytest.param("*", "anything", True, id="any"),
        pytest.param("*", "", False, id="any-needs-a-value"),
        pytest.param("shop.frontend", "shopxfrontend", False, id="a-dot-is-a-dot"),
    ],
)
def test_a_pattern_knows_no_other_wildcard_than_one_star(pattern: str, value: str, expected: bool) -> None:
    assert matches(pattern, value) is expected


def test_the_mesh_vouches_for_enrolled_workloads_and_knows_others_by_address_alone() -> None:
    assert Caller.of(workload(enrolled=True), "mesh.local") == FRONTEND
    outsider = Caller.of(workload(enrolled=False), "mesh.local")
    assert outsider == Caller(addresses=("10.1.0.1", "fd00::1"))
    assert (outsider.principal, STRANGER.principal) == ("", "")


@pytest.mark.parametrize("stranger", [STRANGER, Caller(addresses=("10.1.0.1",))], ids=["unknown", "address"])
def test_a_stranger_fits_no_positive_list_of_names_or_labels_and_every_negative_one(stranger: Caller) -> None:
    for source in (Source(principals=("*",)), Source(namespaces=("*",)), Source(service_accounts=("*",)), Source(labels=(("app", "web"),))):
        assert not source_matches(source, stranger)
    for source in (Source(not_principals=("*",)), Source(not_namespaces=("*",)), Source(not_service_accounts=("*",))):
        assert source_matches(source, stranger)
        assert not source_matches(source, REDIS)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param(Source(labels=(("app", "web"),)), True, id="one-label-of-several"),
        pytest.param(Source(labels=(("app", "web"), ("tier", "front"))), True, id="all-labels"),
        pytest.param(Source(labels=(("app", "web"), ("tier", "back"))), False, id="one-label-differs"),
        pytest.param(Source(ip_blocks=("192.0.2.0/24", "fd00::/8")), True, id="any-address-in-any-block"),
        pytest.param(Source(ip_blocks=("192.0.2.0/24",)), False, id="no-address-in-a-block"),
        pytest.param(Source(not_ip_blocks=("fd00::/8",)), False, id="any-address-in-an-excluded-block"),
        pytest.param(Source(not_ip_blocks=("192.0.2.0/24",)), True, id="no-address-in-an-excluded-block"),
        pytest.param(Source(ip_blocks=("10.0.0.0/8",), not_ip_blocks=("10.1.0.0/16",)), False, id="a-block-without-a-part-of-it"),
        pytest.param(Source(namespaces=("shop",), ip_blocks=("192.0.2.0/24",)), False, id="all-lists-must-match"),
    ],
)
def test_labels_and_blocks_are_conditions_beside_names(source: Source, expected: bool) -> None:
    assert source_matches(source, FRONTEND) is expected


def test_who_has_no_address_is_in_no_block() -> None:
    assert not source_matches(Source(ip_blocks=("0.0.0.0/0", "::/0")), STRANGER)
    assert source_matches(Source(not_ip_blocks=("0.0.0.0/0", "::/0")), STRANGER)


def test_a_block_tells_strangers_apart() -> None:
    office = policy(Action.ALLOW, PolicyRule(sources=(Source(ip_blocks=("192.0.2.0/24",)),)))
    assert decide([office], Caller(addresses=("192.0.2.7",)), 80).verdict is Verdict.ALLOW
    assert decide([office], Caller(addresses=("198.51.100.7",)), 80).verdict is Verdict.DENY


def test_nothing_protects_a_workload_without_enforced_policies() -> None:
    assert decide([], STRANGER, 80) == Decision(Verdict.NONE, "")
    assert decide([policy(Action.AUDIT, PolicyRule())], STRANGER, 80).verdict is Verdict.NONE


def test_an_allow_policy_without_rules_denies_everything_over_both_protocols() -> None:
    for protocol in PROTOCOLS:
        assert decide([policy(Action.ALLOW)], FRONTEND, 80, protocol).verdict is Verdict.DENY


def test_the_rule_that_decided_is_named() -> None:
    allow = policy(Action.ALLOW, PolicyRule(sources=(Source(namespaces=("other",)),)), FROM_FRONTEND)
    assert decide([allow], FRONTEND, 80).rule == "shop/p[1]"
    assert decide([allow], REDIS, 80).rule == "shop/p: no rule matches"


def test_deny_wins_over_allow() -> None:
    policies = [policy(Action.ALLOW, PolicyRule(), name="shop/a"), policy(Action.DENY, FROM_FRONTEND, name="shop/d")]
    assert decide(policies, FRONTEND, 80) == decide(policies[::-1], FRONTEND, 80)
    assert decide(policies, FRONTEND, 80).rule == "shop/d[0]"
    assert decide(policies, REDIS, 80).verdict is Verdict.ALLOW


def test_a_default_deny_beside_deny_policies_denies_what_nothing_allows() -> None:
    default, deny = policy(Action.ALLOW, name="shop/(default-deny)"), policy(Action.DENY, FROM_FRONTEND, name="shop/d")
    assert decide([default, deny], REDIS, 80) == Decision(Verdict.DENY, "shop/(default-deny): no rule matches")
    assert decide([default, deny, policy(Action.ALLOW, PolicyRule(), name="shop/z")], REDIS, 80) == Decision(Verdict.ALLOW, "shop/z[0]")


def test_an_audited_rule_is_named_beside_the_verdict_and_changes_nothing() -> None:
    audit = policy(Action.AUDIT, PolicyRule(sources=(Source(namespaces=("bank",)),)), FROM_FRONTEND, name="shop/dry-run")
    allow = policy(Action.ALLOW, PolicyRule(), name="shop/a")
    assert decide([audit], FRONTEND, 80) == Decision(Verdict.NONE, "", "shop/dry-run[1]")
    assert decide([audit, allow], FRONTEND, 80) == Decision(Verdict.ALLOW, "shop/a[0]", "shop/dry-run[1]")
    assert decide([audit, allow], REDIS, 80) == Decision(Verdict.ALLOW, "shop/a[0]")
    assert decide([audit, policy(Action.ALLOW)], FRONTEND, 80).audit == "shop/dry-run[1]"


def test_an_audited_rule_that_needs_the_request_is_not_said_to_deny_the_connection() -> None:
    audit = policy(Action.AUDIT, PolicyRule(operations=(Operation(paths=("/admin*",)),)))
    assert decide([audit], FRONTEND, 80, TCP).audit == ""
    assert decide([audit], FRONTEND, 80, UDP).audit == "shop/p[0]"


def test_an_l7_rule_leaves_the_connection_to_the_waypoint_only_on_its_ports() -> None:
    rule = PolicyRule(operations=(Operation(ports=(8080,), paths=("/admin*",)),))
    assert decide([policy(Action.DENY, rule)], FRONTEND, 8080).verdict is Verdict.WAYPOINT
    assert decide([policy(Action.DENY, rule)], FRONTEND, 6379).verdict is Verdict.ALLOW
    assert decide([policy(Action.ALLOW, rule)], FRONTEND, 6379).verdict is Verdict.DENY


def test_an_l4_deny_is_final_even_beside_l7_rules() -> None:
    l7 = policy(Action.DENY, PolicyRule(operations=(Operation(methods=("DELETE",)),)), name="shop/l7")
    l4 = policy(Action.DENY, FROM_FRONTEND, name="shop/l4")
    assert decide([l7, l4], FRONTEND, 80).rule == "shop/l4[0]"
    assert decide([l7, l4], REDIS, 80).verdict is Verdict.WAYPOINT


def test_an_operation_holds_for_its_protocols_and_without_any_for_both() -> None:
    def verdicts(operation: Operation) -> list[Verdict]:
        rule = PolicyRule(operations=(operation,))
        return [decide([policy(Action.ALLOW, rule)], FRONTEND, 53, protocol).verdict for protocol in (TCP, UDP)]

    assert verdicts(Operation(ports=(53,))) == [Verdict.ALLOW, Verdict.ALLOW]
    assert verdicts(Operation(ports=(53,), protocols=(UDP,))) == [Verdict.DENY, Verdict.ALLOW]
    assert verdicts(Operation(protocols=(TCP,))) == [Verdict.ALLOW, Verdict.DENY]


def test_datagrams_never_go_to_the_waypoint_and_an_http_rule_never_widens_what_they_may() -> None:
    rule = PolicyRule(operations=(Operation(methods=("GET",)),))
    assert decide([policy(Action.ALLOW, rule)], FRONTEND, 53, UDP).verdict is Verdict.DENY
    assert decide([policy(Action.DENY, rule)], FRONTEND, 53, UDP) == Decision(Verdict.DENY, "shop/p[0]")


def test_callers_that_no_policy_tells_apart_share_a_class() -> None:
    classes = Classes([policy(Action.ALLOW, PolicyRule(sources=(Source(labels=(("app", "web"),)), Source(namespaces=("bank",)))))])
    one = Caller("shop", "a", "mesh.local", (("app", "web"), ("pod", "1")), ("10.0.0.1",))
    other = Caller("shop", "b", "mesh.local", (("app", "web"), ("pod", "2")), ("10.0.0.2",))
    assert classes.of(one) is classes.of(other)
    assert classes.of(REDIS) == classes.stranger
    assert len({classes.of(one), classes.of(REDIS), classes.of(Caller("bank", "a", "mesh.local"))}) == 3


def lookup(rows: Mapping[Row, Decision], members: frozenset[int], port: int, protocol: str) -> Decision:
    """What the kernel does (bpf_src/mesh_helpers.h, mesh_decide); no rows at all means that nothing protects."""
    if not rows:
        return Decision(Verdict.NONE, "")
    order: list[Row] = [(members, protocol, port), (members, protocol, OTHER_PORT), (None, protocol, port), (None, protocol, OTHER_PORT)]
    return next(rows[key] for key in order if key in rows)


def class_at(classes: Classes, address: str) -> frozenset[int]:
    """The class of an address that no workload has: that of the longest block that holds it."""
    known = {ipaddress.ip_network(text): members for text, members in classes.blocks().items()}
    holding = [block for block in known if ipaddress.ip_address(address) in block]
    return known[max(holding, key=lambda block: block.prefixlen)] if holding else classes.stranger


CONNECTIONS = tuple(itertools.product((*drawn.PORTS, drawn.UNNAMED_PORT), PROTOCOLS))


@settings(max_examples=503, deadline=None)
@given(drawn.policy_sets(), st.data())
def test_compiled_rows_say_what_the_definition_says(mesh: list[Policy], data: st.DataObject) -> None:
    """8 connections of at least 11 callers for each drawn mesh: more than 44,000 decisions."""
    protecting = data.draw(st.lists(st.sampled_from(mesh), unique=True)) if mesh else []
    known = data.draw(st.lists(drawn.callers, min_size=2, max_size=6))
    classes = Classes(mesh)
    present = {classes.of(caller) for caller in known} | set(classes.blocks().values())
    rows = compile_rows(protecting, classes, present)
    callers = [(caller, classes.of(caller)) for caller in known]
    callers += [(Caller(addresses=(address,)), class_at(classes, address)) for address in drawn.ADDRESSES]
    for (caller, members), (port, protocol) in itertools.product(callers, CONNECTIONS):
        assert lookup(rows, members, port, protocol) == decide(protecting, caller, port, protocol)


@settings(max_examples=101, deadline=None)
@given(drawn.policy_sets(), drawn.enrolled)
def test_a_caller_whose_class_has_no_rows_yet_is_treated_as_a_stranger(mesh: list[Policy], late: Caller) -> None:
    classes = Classes(mesh)
    rows = compile_rows(mesh, classes, [])
    for port, protocol in CONNECTIONS:
        assert lookup(rows, classes.of(late), port, protocol) == decide(mesh, STRANGER, port, protocol)


@settings(max_examples=101, deadline=None)
@given(drawn.policy_sets(), st.data())
def test_a_class_has_rows_only_if_it_is_treated_differently_from_a_stranger(mesh: list[Policy], data: st.DataObject) -> None:
    classes = Classes(mesh)
    caller = data.draw(drawn.callers)
    members = classes.of(caller)
    rows = compile_rows(mesh, classes, [members])
    differs = any(decide(mesh, caller, *connection) != decide(mesh, STRANGER, *connection) for connection in CONNECTIONS)
    assert any(key[0] == members for key in rows) is differs
