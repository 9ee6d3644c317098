"""A CallerMatch that asks for claims of a token: what it becomes, and what of it is refused."""

from __future__ import annotations

import pytest

from agent.model import ClaimCondition, Source
from controller.schema import read
from tests.unit.controller.test_compile import compiled
from tests.unit.controller.test_routes import SHOP, document, found_route, rules

REFERENCE = "filters: [{type: ExtensionRef, extensionRef: {group: meshagent.io, kind: CallerMatch, name: m}}], backendRefs: [{name: cart, port: 80}]"


@pytest.mark.parametrize("kind", ["HTTPRoute", "GRPCRoute"])
def test_claims_and_callers_arrive_at_the_agent_as_they_were_written(kind: str) -> None:
    spec = "{from: [{source: {namespaces: [a]}}], claims: [{path: [realm, roles], values: [beta, 'x*'], notValues: ['*']}, {path: [sub], values: [tom]}]}"
    model = compiled(SHOP + document(spec, "CallerMatch", name="m") + rules(f"{{{REFERENCE}}}", kind))
    (rule,) = found_route(model, "default/r" if kind == "HTTPRoute" else "default/r:grpc").rules
    assert rule.claims == (ClaimCondition(("realm", "roles"), ("beta", "x*"), ("*",)), ClaimCondition(("sub",), ("tom",)))
    assert rule.callers == ((Source(namespaces=("a",)),),)


def test_claims_alone_are_for_every_caller() -> None:
    model = compiled(SHOP + document("{claims: [{path: [sub], values: [tom]}]}", "CallerMatch", name="m") + rules(f"{{{REFERENCE}}}"))
    (rule,) = found_route(model, "default/r").rules
    assert (rule.callers, rule.claims) == ((), (ClaimCondition(("sub",), ("tom",)),))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        pytest.param("{}", "spec: must not be empty", id="nothing"),
        pytest.param("{claims: []}", "spec.claims: must not be empty", id="none"),
        pytest.param("{claims: [{values: [x]}]}", "spec.claims[0].path: is required", id="no-path"),
        pytest.param("{claims: [{path: [a]}]}", "spec.claims[0]: needs values, notValues or both", id="no-value"),
        pytest.param("{claims: [{path: [a], values: ['a*b']}]}", 'spec.claims[0].values[0]: "a*b": one "*" is allowed', id="inner"),
        pytest.param("{claims: [{path: [a], notValues: ['*b*']}]}", 'spec.claims[0].notValues[0]: "*b*": one "*" is allowed', id="two"),
        pytest.param(f"{{claims: [{', '.join(['{path: [a], values: [x]}'] * 10_000)}]}}", "spec.claims: must have at most 16 items", id="huge"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused_with_its_field(spec: str, expected: str) -> None:
    found = [f"{problem.field}: {problem.message}" for item in read(document(spec, "CallerMatch"), "f") for problem in item.problems]
    assert any(message.startswith(expected) for message in found), found
