"""Resources that are huge, circular, half valid or meant to do harm: bounded in time and memory, refused with the field named, others in force."""

from __future__ import annotations

import copy
import resource
import time

import pytest

from agent.model import Policy, decode
from controller.compile import compile_model
from controller.documents import BadDocument, parse
from controller.objects import Key
from controller.schema import read, read_or_problems
from tests.unit.controller.test_compile import SHOP, compiled, route

SOON_S = 60
"""Far more than it takes (a few seconds), far less than anything that is not linear would."""
POLICY = """
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: p}
spec:
  selector: {matchLabels: {app: cart}}
  action: DENY
  rules: [{from: [{source: {serviceAccounts: [default/x]}}], to: [{operation: {methods: [GET], paths: [/secret]}}]}]
"""
ROUTE = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: {name}}}
spec:
  parentRefs: [{{group: "", kind: Service, name: {service}}}]
  rules: [{rule}]
---
"""


def test_ten_thousand_policies_of_one_workload_are_compiled_in_bounded_time_and_memory() -> None:
    objects = {item.object.key: item.object for item in read(SHOP + POLICY, "f") if item.object}
    template = objects.pop(Key("AuthorizationPolicy", "default", "p"))
    for n in range(10_000):
        data = copy.deepcopy(dict(template.data))
        data["spec"]["rules"][0]["to"][0]["operation"]["paths"] = [f"/secret-{n}"]
        key = Key("AuthorizationPolicy", "default", f"p{n:05}")
        objects[key] = type(template)(key, data, "f", 1)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    model = compile_model(objects)
    assert time.process_time() - started < SOON_S
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10, "KiB"
    policies = [name for name in model.entities if name.startswith("policy/")]
    assert len(policies) == 10_000
    protected = decode(model.entities["workload/default/cart-1"].SerializeToString())
    assert len(protected.policies) == 10_000  # type: ignore[union-attr]
    first = decode(model.entities["policy/default/p00000"].SerializeToString())
    assert isinstance(first, Policy)


def test_one_policy_with_ten_thousand_rules_is_refused_and_its_neighbour_is_not() -> None:
    rule = "{to: [{operation: {ports: ['1']}}]}"
    big = POLICY[: POLICY.index("rules:")] + f"rules: [{', '.join([rule] * 10_000)}]\n"
    started = time.process_time()
    checked = read(SHOP + big + "---\n" + POLICY.replace("name: p}", "name: good}"), "f")
    assert time.process_time() - started < SOON_S
    assert [problem.message for item in checked for problem in item.problems] == ["must have at most 512 items, not 10000"]
    assert Key("AuthorizationPolicy", "default", "good") in {item.object.key for item in checked if item.object}


def lists(depth: int) -> str:
    return "a: " + "[" * depth + "]" * depth


BOMBS = {
    "ten MiB": ("a: " + "x" * (10 << 20), "f:1: larger than 4 MiB: split the file"),
    "ten MiB of documents": ("---\na: 1\n" * (10 << 17), "f:1: larger than 4 MiB: split the file"),
    "levels of lists": (lists(500_000), "f:1: nested deeper than 64 levels"),
    "levels of mappings": ("{a: " * 250_000, "f:1: nested deeper than 64 levels"),
    "block sequences": ("a:\n" + "- " * 500_000, "f:2: nested deeper than 64 levels"),
    "an open quotation": ("a: '" + "x" * (3 << 20), "f:1: document larger than 1 MiB"),
    "a second document": ("a: 1\n--- |\n " + "x" * (3 << 20), "f:2: document larger than 1 MiB"),
    "values": ("a: [" + "1," * 100_001 + "]", "f:1: more than 100000 values in one document"),
    "quadratic anchors": (
        "\n".join(f"a{n}: &a{n} [{', '.join(f'*a{m}' for m in range(n))}]" for n in range(40)),
        "more than 100000 values",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_it_costs_anything(name: str) -> None:
    text, expected = BOMBS[name]
    started = time.process_time()
    with pytest.raises(BadDocument) as caught:
        parse(text, "f")
    assert time.process_time() - started < SOON_S
    assert expected in str(caught.value.problem)


def service(name: str, host: int) -> str:
    return (
        f"apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\n"
        f"spec: {{clusterIP: 10.96.1.{host}, selector: {{app: cart}}, ports: [{{name: http, port: 80, appProtocol: http}}]}}\n---\n"
    )


def test_routes_in_a_circle_are_routes_to_endpoints_and_not_to_each_other() -> None:
    """A backend is a set of endpoints (GEP-1426): the route of the Service that it names does not apply to it, so there is no second turn."""
    text = SHOP + service("a", 1) + service("b", 2)
    there = ROUTE.format(name="a-to-b", service="a", rule="{backendRefs: [{name: b, port: 80}]}")
    back = ROUTE.format(name="b-to-a", service="b", rule="{backendRefs: [{name: a, port: 80}]}")
    model = compiled(text + there + back)
    assert [
        [backend.service for rule in route(model, f"default/{name}").rules for backend in rule.backends] for name in ("a-to-b", "b-to-a")
    ] == [
        ["default/b"],
        ["default/a"],
    ]


def test_a_broken_object_among_good_ones_takes_nothing_with_it() -> None:
    good = ROUTE.format(name="good", service="cart", rule="{backendRefs: [{name: cart, port: 80}]}")
    bad = ROUTE.format(name="bad", service="cart", rule="{matches: [{path: {type: RegularExpression, value: '(a{1000}){1000}'}}]}")
    checked, unreadable = read_or_problems(SHOP + good + bad + "kind: [\n", "f")
    assert unreadable is not None
    checked = read(SHOP + good + bad, "f")
    problems = [str(problem) for item in checked for problem in item.problems]
    assert len(problems) == 1
    assert "HTTPRoute/bad spec.rules[0].matches[0].path.value: repeats more than 1000 times" in problems[0]
    assert {item.object.key.name for item in checked if item.object} >= {"cart", "cart-1", "good"}
