"""Resources that come, change and go while traffic flows: how fast they hold, and that a bad one changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab import paths
from lab.cli import SHOP
from lab.lab import Lab
from tests.kernel import shop

pytestmark = pytest.mark.kernel

AT_ONCE_S = 1.0
"""What a change may take until it holds everywhere, counted from the moment that `apply` returns."""
CALLS = 101
WEIGHTS = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: cart-split}}
spec:
  parentRefs: [{{group: "", kind: Service, name: cart, port: 80}}]
  rules:
    - backendRefs:
        - {{name: cart-v1, port: 80, weight: {v1}}}
        - {{name: cart-v2, port: 80, weight: {v2}}}
      retry: {{codes: [503], attempts: 3, backoff: 10ms}}
"""
CART_V1_1 = """
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {{name: cart-v1-1, namespace: default, labels: {{app: cart, version: v1}}}}
spec:
  node: node-1
  addresses: ["10.77.1.21", "fd77:0:0:1::21"]
  serviceAccount: cart
  networkNamespace: meshlab-default_cart-v1-1
  ready: {ready}
"""
REDIS = """
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {{name: redis, namespace: default, labels: {{app: redis}}}}
spec:
  node: node-1
  addresses: ["10.77.1.40", "fd77:0:0:1::40"]
  serviceAccount: redis
  networkNamespace: meshlab-default_redis
  ready: {ready}
"""


@contextmanager
def restored(lab: Lab) -> Iterator[None]:
    """The shop's own resources are in force again after the block."""
    try:
        yield
    finally:
        lab.apply(SHOP / "mesh")
        shop.takes(lambda: shop.ping(lab, "frontend") == "PONG")
        shop.takes(lambda: shop.codes(lab, "frontend", "http://cart/items") == {"200": 1})


def versions(lab: Lab) -> dict[str, str]:
    return {node.name: shop.status(node.name)["controller"]["version"] for node in lab.topology.nodes}


def test_an_l4_policy_holds_and_ceases_within_a_second(lab: Lab) -> None:
    document = shop.DENY_FRONTEND.format(app="redis")
    for _ in range(3):
        lab.apply(document)
        assert shop.takes(lambda: "Operation not permitted" in shop.ping(lab, "frontend"), AT_ONCE_S)
        denied = {"source_workload": "frontend", "destination_workload": "redis", "verdict": "deny", "rule": "default/deny-frontend[0]"}
        assert shop.samples(lab, "node-1", "mesh_policy_verdicts_total", **denied) > 0
        shop.delete(lab, document)
        assert shop.takes(lambda: shop.ping(lab, "frontend") == "PONG", AT_ONCE_S)


def test_an_l7_policy_holds_and_ceases_within_a_second(lab: Lab) -> None:
    document = shop.DENY_FRONTEND.format(app="cart")
    for _ in range(3):
        lab.apply(document)
        assert shop.takes(lambda: shop.codes(lab, "frontend", "http://cart/items") == {"403": 1}, AT_ONCE_S)
        assert shop.codes(lab, "frontend", f"http://cart/items?[1-{CALLS}]") == {"403": CALLS}
        shop.delete(lab, document)
        assert shop.takes(lambda: shop.codes(lab, "frontend", "http://cart/items") == {"200": 1}, AT_ONCE_S)


def test_the_status_says_how_long_a_change_took(lab: Lab) -> None:
    with restored(lab):
        before = versions(lab)
        lab.apply(shop.DENY_FRONTEND.format(app="nobody"))
        shop.takes(lambda: all(version != before[node] for node, version in versions(lab).items()), AT_ONCE_S)
        for node in lab.topology.nodes:
            report = shop.status(node.name)
            assert 0 < report["controller"]["lagSeconds"] < AT_ONCE_S
            assert shop.samples(lab, node.name, "mesh_config_lag_seconds") == report["controller"]["lagSeconds"]
        shop.delete(lab, shop.DENY_FRONTEND.format(app="nobody"))


def test_changed_weights_hold_within_a_second_and_no_call_fails(lab: Lab) -> None:
    with restored(lab), shop.loads(lab, ("frontend", "http://cart/items")) as calls:
        for v1, v2 in ((0, 1), (1, 0)):
            lab.apply(WEIGHTS.format(v1=v1, v2=v2))
            wanted, other = ("v2", "v1") if v2 else ("v1", "v2")

            def only(version: str = wanted) -> bool:
                return all(shop.get(lab, "frontend", "http://cart/items")["version"] == version for _ in range(3))

            shop.takes(only, AT_ONCE_S)
            pods = [name for name in ("cart-v1-1", "cart-v1-2", "cart-v2-1") if f"-{other}-" in name]
            before = [shop.answered(lab, pod)["GET /items 200"] for pod in pods]
            assert shop.codes(lab, "frontend", f"http://cart/items?[1-{CALLS}]") == {"200": CALLS}
            assert [shop.answered(lab, pod)["GET /items 200"] for pod in pods] == before
    assert shop.outcomes(calls[0]).keys() == {"200"}


def test_an_l7_endpoint_that_is_not_ready_gets_no_request_within_a_second_and_no_call_fails(lab: Lab) -> None:
    with restored(lab), shop.loads(lab, ("frontend", "http://cart/items")) as calls:
        lab.apply(CART_V1_1.format(ready="false"))

        def quiet() -> bool:
            before = shop.answered(lab, "cart-v1-1")["GET /items 200"]
            shop.codes(lab, "frontend", "http://cart-v1/items?[1-11]")
            return shop.answered(lab, "cart-v1-1")["GET /items 200"] == before

        shop.takes(quiet, AT_ONCE_S)
        before = shop.answered(lab, "cart-v1-1")["GET /items 200"]
        backends = [b["workload"] for b in shop.plan(lab, "node-1", "frontend", "cart")["backends"]]
        assert backends == ["default/cart-v1-2", "default/cart-v2-1"]
        assert shop.codes(lab, "frontend", f"http://cart/items?[1-{CALLS}]") == {"200": CALLS}
        assert shop.answered(lab, "cart-v1-1")["GET /items 200"] == before
        lab.apply(CART_V1_1.format(ready="true"))

        def back() -> bool:
            shop.codes(lab, "frontend", "http://cart-v1/items?[1-11]")
            return shop.answered(lab, "cart-v1-1")["GET /items 200"] > before

        shop.takes(back, AT_ONCE_S)
    assert shop.outcomes(calls[0]).keys() == {"200"}


def test_an_l4_endpoint_that_is_not_ready_is_refused_within_a_second(lab: Lab) -> None:
    refused = {"source_workload": "frontend", "destination_service": "default/redis", "verdict": "deny", "reason": "no_backend"}
    with restored(lab):
        lab.apply(REDIS.format(ready="false"))
        shop.takes(lambda: "Connection refused" in shop.ping(lab, "frontend"), AT_ONCE_S)
        assert shop.samples(lab, "node-1", "mesh_policy_verdicts_total", **refused) > 0
        lab.apply(REDIS.format(ready="true"))
        shop.takes(lambda: shop.ping(lab, "frontend") == "PONG", AT_ONCE_S)


BAD = """apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: redis-clients}
spec:
  selector: {matchLabels: {app: redis}}
  actoin: ALLOW
---
apiVersion: meshagent.io/v1alpha1
kind: AuthorisationPolicy
metadata: {name: typo}
---
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: deny-nobody}
spec:
  selector: {matchLabels: {app: nobody}}
  action: DENY
  rules: [{}]
"""


def test_a_resource_that_does_not_validate_is_refused_by_name_and_the_rest_applies(lab: Lab) -> None:
    before = versions(lab)
    with shop.changed(lab):
        run = lab.apply(BAD, check=False)
    try:
        assert run.returncode == 1
        lines = run.stderr.splitlines()
        file = paths.RUN / "apply-0.yaml"
        assert [line.partition(": ")[0] for line in lines] == [
            f"{file}:6 AuthorizationPolicy/redis-clients spec.actoin",
            f"{file}:9 AuthorisationPolicy/typo kind",
        ]
        assert 'did you mean "action"' in lines[0]
        assert "AuthorizationPolicy" in lines[1].partition("kind: ")[2]
        assert run.stdout == "authorizationpolicy/deny-nobody created\n"
        assert versions(lab) != before, "the rest of the file is in force"
        assert "Operation not permitted" in shop.ping(lab, "other"), "the previous version of the refused policy still decides"
        assert shop.plan(lab, "node-1", "other", "redis")["rule"] == "default/redis-clients: no rule matches"
        assert shop.ping(lab, "frontend") == "PONG"
    finally:
        shop.delete(lab, BAD.split("---\n")[2])


def test_a_file_that_is_broken_on_disk_leaves_its_last_good_state_in_force(lab: Lab) -> None:
    """The directory that the controller watches: an editor saves half a file."""
    stored = next(path for path in paths.RESOURCES.rglob("*") if path.is_file() and "redis-clients" in path.read_text())
    good = stored.read_text()
    try:
        stored.write_text("apiVersion: meshagent.io/v1alpha1\nkind: [AuthorizationPol")
        with shop.changed(lab):
            lab.apply(shop.DENY_FRONTEND.format(app="nobody"))  # what comes later still gets through
        assert "Operation not permitted" in shop.ping(lab, "other")
        assert shop.ping(lab, "frontend") == "PONG"
    finally:
        stored.write_text(good)
        shop.delete(lab, shop.DENY_FRONTEND.format(app="nobody"))
