"""What is said of a recorded call never contradicts what is decided about the call itself, and is said wherever the record has what policies ask for."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.calls import paths
from agent.calls.judge import Answer, Call, judge
from agent.model import Action, HeaderCondition, Operation, Policy, PolicyRule, Source
from agent.policy import PROTOCOLS, STRANGER, TCP, UDP, Caller, Verdict, decide
from tests.unit.agent import policies as drawn
from tests.unit.agent.l7.test_rbac_oracle import REQUESTS, says_yes
from tests.unit.agent.l7.test_rbac_oracle import Call as Whole

PORTS = st.sampled_from((*drawn.PORTS, drawn.UNNAMED_PORT))
FRONTEND = Caller("shop", "frontend", drawn.TRUST_DOMAIN)
_PERMITS = {Answer.ALLOWED: True, Answer.DENIED: False}


@settings(max_examples=1500, deadline=None)
@given(drawn.policy_sets(), drawn.callers, PORTS, st.sampled_from(PROTOCOLS))
def test_of_a_connection_exactly_what_the_kernel_decides_is_said(policies: list[Policy], caller: Caller, port: int, protocol: str) -> None:
    verdict = decide(policies, caller, port, protocol).verdict
    answer = judge(policies, Call(caller, port, protocol)).answer
    anonymous = not caller.service_account and not caller.addresses
    if not anonymous:
        expected = {Verdict.WAYPOINT: Answer.UNDECIDED, Verdict.DENY: Answer.DENIED}.get(verdict, Answer.ALLOWED)
        assert answer is expected
    elif answer is not Answer.UNDECIDED:
        assert (verdict is Verdict.DENY) is (answer is Answer.DENIED)


@settings(max_examples=1000, deadline=None)
@given(drawn.policy_sets(), drawn.callers, PORTS, st.sampled_from(REQUESTS), st.sampled_from(("whole", "hole", "folded", "nothing")))
def test_of_a_request_nothing_is_said_that_the_request_itself_would_not_be_answered(
    policies: list[Policy], caller: Caller, port: int, request: object, known: str
) -> None:
    assert isinstance(request, type(REQUESTS[0]))
    path = {"whole": request.path, "hole": "/{}", "folded": paths.ROOTED, "nothing": ""}[known]
    method = "" if known == "nothing" else request.method
    answer = judge(policies, Call(caller, port, TCP, method, path)).answer
    if answer is not Answer.UNDECIDED:
        assert says_yes(policies, caller, Whole({}, "", port, request)) is _PERMITS[answer]


@settings(max_examples=500, deadline=None)
@given(
    st.lists(drawn.plain_rules, max_size=3), st.sampled_from((Action.ALLOW, Action.DENY)), drawn.enrolled, PORTS, st.sampled_from(REQUESTS)
)
def test_rules_about_callers_ports_methods_and_paths_are_always_decided(
    rules: list[PolicyRule], action: Action, caller: Caller, port: int, request: object
) -> None:
    assert isinstance(request, type(REQUESTS[0]))
    answer = judge([Policy("shop/p", action, tuple(rules))], Call(caller, port, TCP, request.method, request.path)).answer
    assert answer is not Answer.UNDECIDED


@settings(max_examples=500, deadline=None)
@given(drawn.policy_sets(), drawn.enrolled, PORTS, st.sampled_from(PROTOCOLS))
def test_of_a_call_to_an_unknown_port_nothing_is_said_that_differs_between_ports(
    policies: list[Policy], caller: Caller, port: int, protocol: str
) -> None:
    answer = judge(policies, Call(caller, 0, protocol)).answer
    if answer is not Answer.UNDECIDED:
        assert judge(policies, Call(caller, port, protocol)).answer is answer


def test_a_header_is_not_recorded() -> None:
    rule = PolicyRule(also_operations=(Operation(headers=(HeaderCondition("x-role", ("admin",)),)),))
    call = Call(FRONTEND, 80, TCP, "GET", "/items")
    found = judge([Policy("shop/admins", Action.DENY, (rule,))], call)
    assert (found.answer, found.rule) == (Answer.UNDECIDED, "shop/admins[0]")
    assert judge([Policy("shop/admins", Action.DENY, (rule,)), Policy("shop/none", Action.ALLOW)], call).answer is Answer.DENIED
    assert judge([Policy("shop/admins", Action.AUDIT, (rule,))], call).answer is Answer.ALLOWED


def test_a_stranger_may_have_any_address() -> None:
    blocks = PolicyRule(sources=(Source(ip_blocks=("10.0.0.0/8",)),))
    assert judge([Policy("shop/p", Action.DENY, (blocks,))], Call(STRANGER, 80)).answer is Answer.UNDECIDED
    assert judge([Policy("shop/p", Action.DENY, (blocks,))], Call(Caller(addresses=("192.0.2.1",)), 80)).answer is Answer.ALLOWED


def test_datagrams_have_no_requests() -> None:
    rule = PolicyRule(operations=(Operation(methods=("GET",)),))
    assert judge([Policy("shop/p", Action.ALLOW, (rule,))], Call(FRONTEND, 53, UDP)).answer is Answer.DENIED
    assert judge([Policy("shop/p", Action.DENY, (rule,))], Call(FRONTEND, 53, UDP)).answer is Answer.DENIED
