"""GRPCRoute in a running shop: real gRPC calls, over both nodes; and that no filter of a route leads past a policy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from lab.lab import Lab
from tests.kernel import gateway, shop
from tests.kernel.gateway import V1, V2

pytestmark = pytest.mark.kernel

CALLS = 307
TO_V1, TO_V2 = "backendRefs: [{name: echo-v1, port: 7070}]", "backendRefs: [{name: echo-v2, port: 7070}]"
EDIT = "set: [{name: x-header-set, value: set-overwrites-values}], add: [{name: x-header-add, value: added}], remove: [x-header-remove]"
RULES = {
    "weights": "[{backendRefs: [{name: echo-v1, port: 7070, weight: 70}, {name: echo-v2, port: 7070, weight: 30}, {name: echo, port: 7070, weight: 0}]}]",
    "methods": f"[{{matches: [{{method: {{service: shop.Cart}}}}], {TO_V1}}}, {{matches: [{{method: {{service: shop.Cart, method: Pay}}}}], {TO_V2}}}, "
    f"{{matches: [{{method: {{method: Everywhere}}}}], {TO_V2}}}, "
    f"{{matches: [{{method: {{type: RegularExpression, service: 'shop[.](A|B)', method: 'Get.*'}}}}], {TO_V2}}}, "
    f"{{matches: [{{method: {{service: shop.Cart, method: Pay}}, headers: [{{name: version, value: one}}]}}], {TO_V1}}}]",
    "edits": f"[{{filters: [{{type: RequestHeaderModifier, requestHeaderModifier: {{{EDIT}}}}}, "
    f"{{type: ResponseHeaderModifier, responseHeaderModifier: {{set: [{{name: x-out, value: y}}]}}}}], {TO_V1}}}]",
    "invalid": "[{backendRefs: [{name: nobody, port: 7070}]}]",
    "session": "[{sessionPersistence: {type: Header, header: {name: x-stay}}, backendRefs: [{name: echo-v1, port: 7070}, {name: echo-v2, port: 7070}]}]",
    "copies": f"[{{filters: [{{type: RequestMirror, requestMirror: {{backendRef: {{name: echo-v2, port: 7070}}}}}}], {TO_V1}}}]",
}
GUARDED = """
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: no-secrets}
spec:
  selector: {matchLabels: {app: echo}}
  action: DENY
  rules: [{to: [{operation: {paths: ["/secret*"]}}, {operation: {hosts: [secret.example]}}]}]
---
"""
AROUND = {
    "path": "[{matches: [{path: {value: /open}}], filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /secret}}}], "
    "backendRefs: [{name: echo-vN, namespace: default, port: 80}]}]",
    "host": "[{filters: [{type: URLRewrite, urlRewrite: {hostname: secret.example}}], backendRefs: [{name: echo-vN, namespace: default, port: 80}]}]",
    "one-host": "[{backendRefs: [{name: echo-vN, namespace: default, port: 80, filters: [{type: URLRewrite, urlRewrite: {hostname: secret.example}}]}]}]",
}


@pytest.fixture(scope="module")
def at(lab: Lab) -> Iterator[dict[str, str]]:
    """The address of each Service by its name."""
    more = [gateway.route(name, rules, f"name: {name}, port: 7070", "GRPCRoute") for name, rules in RULES.items()]
    around = {f"around-{name}-{n}": rules.replace("echo-vN", f"echo-v{n}") for name, rules in AROUND.items() for n in (1, 2)}
    more += [
        gateway.route(name, rules, f"name: {name}, namespace: default, port: 80", namespace=gateway.CONSUMER)
        for name, rules in around.items()
    ]
    copied = "[{filters: [{type: RequestMirror, requestMirror: {backendRef: {name: echo-v2, port: 80}}}], backendRefs: [{name: cart-v1, port: 80}]}]"
    more.append(gateway.route("conflict", "[{}]", "name: weights, port: 7070"))
    with gateway.running(
        lab, {**dict.fromkeys(RULES, ""), **dict.fromkeys(around, ""), "copied": copied}, *more, "\n", GUARDED
    ) as addresses:
        yield addresses


def test_the_weights_of_a_grpc_route_hold(lab: Lab, at: dict[str, str]) -> None:
    found = Counter(one.get("pod", one["code"]) for one in gateway.call(lab, "frontend", f"{at['weights']}:7070", "/shop.Cart/Get", CALLS))
    assert set(found) == {"echo-v1", "echo-v2"}
    assert abs(found["echo-v2"] - 0.3 * CALLS) <= 4.5 * math.sqrt(CALLS * 0.3 * 0.7)


@pytest.mark.parametrize(
    ("method", "version", "expected"),
    [
        ("/shop.Cart/Get", "", "echo-v1"),
        ("/shop.Cart/Pay", "", "echo-v2"),
        ("/shop.Cart/Pay", "one", "echo-v1"),
        ("/any.Thing/Everywhere", "", "echo-v2"),
        ("/shop.B/GetIt", "", "echo-v2"),
        ("/shop.C/GetIt", "", "UNIMPLEMENTED"),
    ],
)
def test_services_methods_and_headers_match(lab: Lab, at: dict[str, str], method: str, version: str, expected: str) -> None:
    metadata: dict[str, Any] = {"version": version} if version else {}
    (answer,) = gateway.call(lab, "frontend", f"{at['methods']}:7070", method, **metadata)
    assert answer.get("pod", answer["code"]) == expected


def test_what_is_no_grpc_matches_no_grpc_route(lab: Lab, at: dict[str, str]) -> None:
    assert shop.codes(lab, "frontend", f"http://{at['weights']}:7070/shop.Cart/Get", "--http2-prior-knowledge") == {"404": 1}


def test_metadata_is_changed(lab: Lab, at: dict[str, str]) -> None:
    (answer,) = gateway.call(lab, "frontend", f"{at['edits']}:7070", "/a.B/C", x_header_set="x", x_header_remove="x")
    got = answer["body"]["request"]
    assert (got["x-header-set"], got["x-header-add"], answer["headers"]["x-out"]) == ("set-overwrites-values", "added", "y")
    assert "x-header-remove" not in got


def test_a_missing_backend_is_unavailable(lab: Lab, at: dict[str, str]) -> None:
    (answer,) = gateway.call(lab, "frontend", f"{at['invalid']}:7070", "/a.B/C")
    assert (answer["code"], answer["headers"]["x-meshagent-reason"]) == ("UNAVAILABLE", "invalid-backend")


def test_calls_are_mirrored(lab: Lab, at: dict[str, str]) -> None:
    before = gateway.seen(lab, "echo-v2").get("/copy.Me/Now", 0)
    assert {one["pod"] for one in gateway.call(lab, "frontend", f"{at['copies']}:7070", "/copy.Me/Now", 23)} == {"echo-v1"}
    shop.takes(lambda: gateway.seen(lab, "echo-v2").get("/copy.Me/Now", 0) - before == 23)


def test_calls_with_a_sessions_metadata_stay_with_its_backend(lab: Lab, at: dict[str, str]) -> None:
    target = f"{at['session']}:7070"
    sessions = {one["pod"]: one["headers"]["x-stay"] for one in gateway.call(lab, "frontend", target, "/a.B/C", 23)}
    assert sessions.keys() == {"echo-v1", "echo-v2"}
    for pod, value in sessions.items():
        assert {one["pod"] for one in gateway.call(lab, "frontend", target, "/a.B/C", 23, x_stay=value)} == {pod}


def test_an_http_route_for_the_port_of_a_grpc_route_says_that_it_lost(lab: Lab, at: dict[str, str]) -> None:
    assert at
    said = lab.meshagent("get", "--controller", shop.CONTROLLER, "httproute", "conflict", "-o", "json").stdout
    assert '"reason": "Conflicted"' in said
    assert "GRPCRoute default/weights holds for default/weights:7070" in said


@pytest.mark.parametrize("caller", [V1, V2])
@pytest.mark.parametrize("pod", [1, 2])
def test_no_route_of_a_caller_leads_past_a_policy(lab: Lab, at: dict[str, str], caller: str, pod: int) -> None:
    assert shop.codes(lab, caller, f"http://{at[f'echo-v{pod}']}/secret") == {"403": 1}
    for name, path in (("path", "/open"), ("host", "/"), ("one-host", "/")):
        assert shop.codes(lab, caller, f"http://{at[f'around-{name}-{pod}']}{path}") == {"403": 1}, name
    assert "/secret" not in gateway.seen(lab, f"echo-v{pod}")


def test_no_copy_of_a_request_leads_past_a_policy(lab: Lab, at: dict[str, str]) -> None:
    shop.codes(lab, "frontend", f"http://{at['copied']}/items")
    shop.takes(lambda: gateway.seen(lab, "echo-v2").get("/items", 0) > 0)
    shop.codes(lab, "frontend", f"http://{at['copied']}/secret?[1-23]")
    shop.codes(lab, "frontend", f"http://{at['copied']}/items/last")
    shop.takes(lambda: gateway.seen(lab, "echo-v2").get("/items/last", 0) > 0)
    assert "/secret" not in gateway.seen(lab, "echo-v2")
