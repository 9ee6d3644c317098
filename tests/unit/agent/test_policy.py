"""Policy: the definition by example, and the compiled rows against the definition for any policies and any connection."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import Action, Operation, Policy, PolicyRule, Source
from agent.policy import OTHER_PORT, Caller, Verdict, compile_rows, decide, matches, source_matches

FRONTEND = Caller("shop", "frontend", "mesh.local")
REDIS = Caller("shop", "redis", "mesh.local")
FROM_FRONTEND = PolicyRule(sources=(Source(service_accounts=("shop/frontend",)),))


def policy(action: Action, *rules: PolicyRule, name: str = "shop/p") -> Policy:
    return Policy(name, action, rules)


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


def test_an_unknown_caller_fits_no_positive_list() -> None:
    for source in (Source(principals=("*",)), Source(namespaces=("*",)), Source(service_accounts=("*",))):
        assert not source_matches(source, None)


def test_nothing_protects_a_workload_without_enforced_policies() -> None:
    assert decide([], None, 80).verdict is Verdict.NONE
    assert decide([policy(Action.AUDIT, PolicyRule())], None, 80).verdict is Verdict.NONE


def test_an_allow_policy_without_rules_denies_everything() -> None:
    assert decide([policy(Action.ALLOW)], FRONTEND, 80).verdict is Verdict.DENY


def test_the_rule_that_decided_is_named() -> None:
    allow = policy(Action.ALLOW, PolicyRule(sources=(Source(namespaces=("other",)),)), FROM_FRONTEND)
    assert decide([allow], FRONTEND, 80).rule == "shop/p[1]"
    assert decide([allow], REDIS, 80).rule == "shop/p: no rule matches"


def test_deny_wins_over_allow() -> None:
    policies = [policy(Action.ALLOW, PolicyRule(), name="shop/a"), policy(Action.DENY, FROM_FRONTEND, name="shop/d")]
    assert decide(policies, FRONTEND, 80) == decide(policies[::-1], FRONTEND, 80)
    assert decide(policies, FRONTEND, 80).rule == "shop/d[0]"
    assert decide(policies, REDIS, 80).verdict is Verdict.ALLOW


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


NAMESPACES = ("shop", "bank")
ACCOUNTS = ("frontend", "redis", "default")
PORTS = (80, 443, 6379)
callers = st.builds(Caller, st.sampled_from(NAMESPACES), st.sampled_from(ACCOUNTS), st.just("mesh.local"))
accounts = st.lists(st.sampled_from(["shop/frontend", "shop/*", "*/redis", "*", "bank/default"]), max_size=2).map(tuple)
names = st.lists(st.sampled_from(["shop", "bank", "b*", "*"]), max_size=2).map(tuple)
principals = st.lists(st.sampled_from(["mesh.local/ns/shop/sa/frontend", "mesh.local/*", "*"]), max_size=1).map(tuple)
ports = st.lists(st.sampled_from(PORTS), max_size=2).map(tuple)
sources = st.builds(Source, principals, principals, names, names, accounts, accounts)
operations = st.builds(Operation, ports, ports, st.sampled_from([(), ("GET",)]), paths=st.sampled_from([(), ("/a",)]))
rules = st.builds(PolicyRule, st.lists(sources, max_size=2).map(tuple), st.lists(operations, max_size=2).map(tuple))
policies = st.lists(
    st.builds(Policy, st.sampled_from(["shop/a", "shop/b"]), st.sampled_from(Action), st.lists(rules, max_size=3).map(tuple)), max_size=4
)


@settings(max_examples=1009, deadline=None)
@given(policies, st.lists(callers, max_size=5), st.one_of(st.none(), callers), st.sampled_from((*PORTS, 9)))
def test_compiled_rows_say_what_the_definition_says(
    protecting: list[Policy], known: list[Caller], caller: Caller | None, port: int
) -> None:
    rows = compile_rows(protecting, known)
    expected = decide(protecting, caller, port)
    if not rows:
        assert expected.verdict is Verdict.NONE
        return
    # What the kernel does (bpf_src/mesh_helpers.h, mesh_decide), with an identity that has rows only if it is known.
    seen = caller if caller in known else None
    found = next(rows[key] for key in ((seen, port), (seen, OTHER_PORT), (None, port), (None, OTHER_PORT)) if key in rows)
    assert found == (expected if caller is None or caller in known else decide(protecting, None, port))
