"""The plan of a trace."""

from __future__ import annotations

import dataclasses

import pytest

from agent.errors import NotFound
from agent.model import (
    Action,
    Backend,
    Backing,
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
from agent.plan import find_destination, find_workload, plan, targets


def workload(name: str, node: str = "node-1", backing: tuple[Backing, ...] = (), policies: tuple[str, ...] = ()) -> Workload:
    return Workload(
        f"default/{name}", name, node, {}, (f"10.0.0.{sum(map(ord, name)) % 250}",), f"ns-{name}", True, True, backing, policies
    )


def service(name: str, port: int, waypoint: bool = False) -> Service:
    return Service(
        f"default/{name}",
        ("10.96.0.1",),
        (ServicePort(port, "", "TCP", "", waypoint, "HTTPRoute default/r" if waypoint else "no L7 feature is used"),),
    )


def snapshot(
    *workloads: Workload, services: tuple[Service, ...] = (), routes: tuple[Route, ...] = (), policies: tuple[Policy, ...] = ()
) -> Snapshot:
    return Snapshot(
        "v", {w.name: w for w in workloads}, {s.name: s for s in services}, {r.name: r for r in routes}, {p.name: p for p in policies}
    )


ALLOW_FRONTEND = Policy("default/redis-clients", Action.ALLOW, (PolicyRule((Source(service_accounts=("default/frontend",)),)),))
REDIS = workload("redis", backing=(Backing("default/redis", {6379: 6379}),), policies=("default/redis-clients",))
MODEL = snapshot(workload("frontend"), workload("other"), REDIS, services=(service("redis", 6379),), policies=(ALLOW_FRONTEND,))


def test_an_allowed_l4_call_names_rule_backend_and_level() -> None:
    planned = plan(MODEL, MODEL.workloads["default/frontend"], "redis", "mesh.local")
    assert (planned.verdict, planned.rule, planned.level) == ("ALLOW", "default/redis-clients[0]", "L4")
    assert [(b.workload, b.share) for b in planned.backends] == [("default/redis", 1.0)]
    assert not planned.problems


def test_a_denied_call_names_the_policy() -> None:
    planned = plan(MODEL, MODEL.workloads["default/other"], "redis", "mesh.local")
    assert (planned.verdict, planned.rule) == ("DENY", "default/redis-clients: no rule matches")


def test_a_caller_that_is_not_enrolled_is_a_stranger() -> None:
    stranger = dataclasses.replace(MODEL.workloads["default/frontend"], enrolled=False)
    planned = plan(MODEL, stranger, "redis", "mesh.local")
    assert planned.verdict == "DENY"
    assert "not enrolled" in planned.problems[0]


def test_a_service_without_endpoints_is_a_problem() -> None:
    away = dataclasses.replace(REDIS, ready=False)
    model = snapshot(workload("frontend"), away, services=(service("redis", 6379),))
    assert "no ready endpoint" in plan(model, model.workloads["default/frontend"], "redis", "mesh.local").problems[0]


def test_weights_and_endpoints_share_an_l7_service() -> None:
    v1 = [workload(f"cart-v1-{n}", backing=(Backing("default/cart-v1", {80: 8080}),)) for n in (1, 2)]
    v2 = workload("cart-v2", "node-2", backing=(Backing("default/cart-v2", {80: 8080}),))
    backends = (Backend("default/cart-v1", 80, 3), Backend("default/cart-v2", 80, 1))
    rule = RouteRule("", (), backends, None, 0, 0, HeaderEdit(), HeaderEdit())
    model = snapshot(
        workload("frontend"),
        *v1,
        v2,
        services=(service("cart", 80, waypoint=True), service("cart-v1", 80), service("cart-v2", 80)),
        routes=(Route("default/r", (("default/cart", 0),), (), (rule,), 0),),
    )
    planned = plan(model, model.workloads["default/frontend"], "cart", "mesh.local")
    assert planned.level == "L7"
    assert {b.workload: b.share for b in planned.backends} == {
        "default/cart-v1-1": 0.375,
        "default/cart-v1-2": 0.375,
        "default/cart-v2": 0.25,
    }
    assert targets(model, "cart") == ("default/cart:80", frozenset({"default/cart-v1-1", "default/cart-v1-2", "default/cart-v2"}))
    assert planned.encryption.startswith("none: plaintext to other nodes")


def test_l7_rules_leave_the_verdict_to_each_request() -> None:
    l7 = Policy("default/l7", Action.DENY, (PolicyRule(operations=(Operation(paths=("/admin*",)),)),))
    cart = workload("cart", backing=(Backing("default/cart", {80: 8080}),), policies=("default/l7",))
    model = snapshot(workload("frontend"), cart, services=(service("cart", 80, waypoint=True),), policies=(l7,))
    planned = plan(model, model.workloads["default/frontend"], "cart", "mesh.local")
    assert planned.verdict == "ALLOW"
    assert "each request is decided by default/l7" in planned.reason


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("rediss", "did you mean default/redis", id="suggestion"),
        pytest.param("redis:80", "has no TCP port 80; it has 6379", id="port"),
        pytest.param("redis:x", "x is no port number", id="not-a-number"),
    ],
)
def test_an_unknown_name_says_what_exists(name: str, message: str) -> None:
    with pytest.raises(NotFound, match=message):
        find_destination(MODEL, name)


def test_a_service_name_stands_for_a_workload_behind_it() -> None:
    model = snapshot(workload("redis-0", backing=(Backing("default/redis", {6379: 6379}),)), services=(service("redis", 6379),))
    assert find_workload(model, "redis").name == "default/redis-0"
