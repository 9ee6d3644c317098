"""Recorded calls under other policies: what differs, by whose word, and how often."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.calls import compare, paths
from agent.calls.ring import Outcome, Recorded, Seen
from agent.external import Endpoint, External
from agent.model import (
    Action,
    Backend,
    Backing,
    HeaderCondition,
    HeaderEdit,
    Operation,
    Policy,
    PolicyRule,
    Route,
    RouteRule,
    Service,
    ServicePort,
    Snapshot,
    Source,
    Workload,
)
from agent.policy import Caller
from agent.report import CallRow, Change
from meshapi import discovery_pb2
from meshapi import proposal_pb2 as pb
from tests.unit.agent import policies as drawn
from tests.unit.agent.l7.test_rbac_oracle import REQUESTS, says_yes
from tests.unit.agent.l7.test_rbac_oracle import Call as Whole

CALLS = 7
WEB, CART, OTHER = "shop/web", "shop/cart-1", "shop/cart-2"
DENY_WEB = Policy("shop/deny-web", Action.DENY, (PolicyRule(sources=(Source(service_accounts=("shop/web",)),)),))


def workload(name: str, account: str, port: int = 0) -> Workload:
    backing = (Backing("shop/cart", {80: port}),) if port else ()
    return Workload(name, account, "node-1", {}, (), name, True, True, backing)


def mesh(*policies: Policy, protects: tuple[str, ...] = (CART, OTHER), account: str = "web") -> Snapshot:
    names = tuple(policy.name for policy in policies)
    every = [workload(WEB, account), workload(CART, "cart", 8080), workload(OTHER, "cart", 8080)]
    workloads = {one.name: replace(one, policies=names) if one.name in protects else one for one in every}
    port = ServicePort(80, "http", "TCP", "http", True, "")
    services = {"shop/cart": Service("shop/cart", ("10.96.0.1",), (port,))}
    return Snapshot("1", workloads, services, policies={policy.name: policy for policy in policies})


def seen(target: str = CART, outcome: Outcome = Outcome.SERVED, method: str = "", path: str = "", source: str = WEB) -> Recorded:
    return Recorded(
        Seen(not source, source, target, "shop/cart" if source else "", 80 if source else 8080, "TCP", outcome, method, path), CALLS, 1000.0
    )


def found(recorded: list[Recorded], now: Snapshot, then: Snapshot) -> list[tuple[str, str, int]]:
    rows = compare.compare(recorded, now, then, drawn.TRUST_DOMAIN).rows
    return [(row.change, row.rule, row.count) for row in rows if isinstance(row, Change)]


def test_a_deny_ends_what_was_allowed_and_without_it_all_is_allowed_again() -> None:
    rows = [seen(), seen(OTHER), seen(method="GET", path="/items"), seen(source="")]
    assert found(rows, mesh(), mesh(DENY_WEB)) == [
        ("newly denied", "shop/deny-web[0]", 2 * CALLS),
        ("newly denied", "shop/deny-web[0]", CALLS),
    ]
    assert {change for change, _, _ in found(rows, mesh(DENY_WEB), mesh())} == {"newly allowed"}


def test_policies_that_do_not_differ_change_nothing_whatever_they_ask_for() -> None:
    rule = PolicyRule(also_operations=(Operation(headers=(HeaderCondition("x-role", ("admin",)),)),))
    now = mesh(Policy("shop/p", Action.ALLOW, (rule,)))
    result = compare.compare([seen(method="GET", path="/items")], now, replace(now), drawn.TRUST_DOMAIN)
    assert (result.rows, result.unchanged, result.gone) == ((), CALLS, 0)


def test_what_became_of_a_call_tells_where_todays_policies_ask_for_more_than_is_recorded() -> None:
    rule = PolicyRule(also_operations=(Operation(headers=(HeaderCondition("x-role", ("admin",)),)),))
    asks = mesh(Policy("shop/p", Action.ALLOW, (rule,)))
    assert found([seen(method="GET", path="/items")], asks, mesh(DENY_WEB)) == [("newly denied", "shop/deny-web[0]", CALLS)]
    assert found([seen(outcome=Outcome.DENIED, method="GET", path="/items")], asks, mesh(DENY_WEB)) == []
    assert found([seen(outcome=Outcome.UNAUTHORIZED, method="GET", path="/items")], asks, mesh(DENY_WEB)) == [
        ("undecided", "shop/deny-web[0]", CALLS)
    ]
    assert found([seen(method="GET", path="/items")], mesh(), asks) == [("undecided", "shop/p[0]", CALLS)]


def test_a_connection_that_was_made_does_not_tell_what_became_of_its_requests() -> None:
    asks = mesh(Policy("shop/p", Action.DENY, (PolicyRule(also_operations=(Operation(paths=("/admin*",)),)),)))
    assert found([seen()], asks, mesh()) == [("undecided", "", CALLS)]
    assert found([seen(outcome=Outcome.DENIED)], asks, mesh()) == [("newly allowed", "", CALLS)]
    (row,) = compare.listed([seen()], asks, drawn.TRUST_DOMAIN, "shop").rows
    assert isinstance(row, CallRow)
    assert row.answer == "undecided"


def test_endpoints_that_are_protected_differently_leave_a_call_to_any_of_them_undecided() -> None:
    assert found([seen("")], mesh(), mesh(DENY_WEB, protects=(CART,))) == [("undecided", "shop/deny-web[0]", CALLS)]
    assert found([seen("")], mesh(), mesh(DENY_WEB)) == [("newly denied", "shop/deny-web[0]", CALLS)]


def test_a_request_without_an_endpoint_is_one_to_whatever_its_routes_lead_to() -> None:
    rule = RouteRule("", (), (Backend("shop/far", 81, 1),), None, 0, 0, HeaderEdit(), HeaderEdit())
    route = Route("shop/r", (("shop/cart", 80),), (), (rule,), 0)
    far = replace(workload("shop/far-1", "far"), backing=(Backing("shop/far", {81: 9090}),), policies=("shop/p",))
    at_9090 = Policy("shop/p", Action.DENY, (PolicyRule(operations=(Operation(ports=(9090,)),)),))
    now = replace(mesh(), routes={"shop/r": route})
    now = replace(now, workloads={**now.workloads, far.name: far}, policies={"shop/p": Policy("shop/p", Action.DENY)})
    row = seen("", method="GET", path="/items")
    assert found([row], now, replace(now, policies={"shop/p": at_9090})) == [("newly denied", "shop/p[0]", CALLS)]


def test_a_policy_is_about_the_port_that_the_workload_listens_on() -> None:
    at_8080 = Policy("shop/p", Action.DENY, (PolicyRule(operations=(Operation(ports=(8080,)),)),))
    assert found([seen()], mesh(), mesh(at_8080)) == [("newly denied", "shop/p[0]", CALLS)]


def test_calls_of_those_who_are_gone_are_left_out_and_counted() -> None:
    rows = [seen(source="shop/old"), seen(target="shop/old")]
    result = compare.compare(rows, mesh(), mesh(DENY_WEB), drawn.TRUST_DOMAIN)
    assert (result.rows, result.unchanged, result.gone) == ((), 0, 2 * CALLS)


def test_a_connection_that_led_to_the_waypoint_is_told_by_its_requests() -> None:
    request = seen(method="GET", path="/items")
    asked = request._replace(seen=request.seen._replace(dialled="shop/cart:80"))
    assert list(compare.plain_calls([seen(""), asked])) == [asked]
    assert list(compare.plain_calls([seen(""), seen()])) == [seen(""), seen()]
    assert len(list(compare.plain_calls([seen("", Outcome.DENIED), asked]))) == 2


def test_policies_of_external_services_are_compared_too() -> None:
    external = External("api", ("api.example.com",), True, False, (Endpoint("192.0.2.1", 1, {443: 443}),), policies=("shop/deny-web",))
    port = ServicePort(443, "tls", "TCP", "tls", True, "")
    now = replace(
        mesh(), services={"shop/api.example.com": Service("shop/api.example.com", (), (port,), external=replace(external, policies=()))}
    )
    proposal = pb.Proposal(services=[pb.Protected(name="shop/api.example.com", policies=["shop/deny-web"])], policies=[message(DENY_WEB)])
    row = Recorded(Seen(False, WEB, "", "shop/api.example.com", 443, "TCP", Outcome.SERVED), CALLS, 0.0)
    assert found([row], now, compare.proposed(now, proposal)) == [("newly denied", "shop/deny-web[0]", CALLS)]


def message(policy: Policy) -> discovery_pb2.Policy:
    """A policy of callers alone, as the controller sends it."""
    namespace, _, name = policy.name.partition("/")
    sources = [discovery_pb2.Source(service_accounts=source.service_accounts) for rule in policy.rules for source in rule.sources]
    return discovery_pb2.Policy(
        namespace=namespace, name=name, action=discovery_pb2.Policy.DENY, rules=[discovery_pb2.PolicyRule(sources=sources)]
    )


def test_a_proposal_adds_replaces_and_removes() -> None:
    now = mesh(Policy("shop/old", Action.ALLOW))
    proposal = pb.Proposal(
        policies=[message(DENY_WEB)], removed=["shop/old"], workloads=[pb.Protected(name=CART, policies=["shop/deny-web"])]
    )
    then = compare.proposed(now, proposal)
    assert then.policies == {"shop/deny-web": DENY_WEB}
    assert then.workloads[CART].policies == ("shop/deny-web",)
    assert now.policies.keys() == {"shop/old"}


@settings(max_examples=700, deadline=None)
@given(drawn.policy_sets(most=3), drawn.policy_sets(most=3), st.sampled_from(drawn.ACCOUNTS), st.sampled_from(REQUESTS))
def test_what_is_newly_denied_or_allowed_is_so_by_the_definition(
    now: list[Policy], then: list[Policy], account: str, request: object
) -> None:
    assert isinstance(request, type(REQUESTS[0]))
    who, whole = Caller("shop", account, drawn.TRUST_DOMAIN), Whole({}, "", 8080, request)
    before, after = (says_yes(policies, who, whole) for policies in (now, then))
    outcome = Outcome.SERVED if before else Outcome.DENIED
    row = seen(outcome=outcome, method=request.method, path=paths.template(request.path))
    result = found([row], mesh(*now, account=account), mesh(*then, account=account))
    expected = "newly denied" if before and not after else "newly allowed" if after and not before else ""
    assert [change for change, _, _ in result] in (["undecided"], [expected] if expected else [])
