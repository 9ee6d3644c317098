"""What Envoy tells of a request, as it is remembered."""

from __future__ import annotations

import pytest

from agent.calls import paths
from agent.calls.part import Addresses
from agent.calls.ring import Outcome, Seen
from agent.l7.call_log import Asked
from agent.model import Service, ServicePort, Snapshot, Workload

WEB = Workload("shop/web", "web", "node-1", {}, ("10.0.0.1",), "web", True, True)
OUTSIDE = Workload("shop/vm", "vm", "node-1", {}, ("10.0.0.9",), "", False, True)
CART = Service("shop/cart", ("10.96.0.1", "fd00::1"), (ServicePort(80, "", "TCP", "http", True, ""),))
SNAPSHOT = Snapshot("1", {one.name: one for one in (WEB, OUTSIDE)}, {CART.name: CART})
ASKED = Asked(
    "outbound", "shop/web", "10.0.0.1", "10.96.0.1:80", "service/shop/cart-v1/81", "shop/cart-1", "GET", "/items/7", 200, "", "via_upstream"
)
SEEN = Seen(False, "shop/web", "shop/cart-1", "shop/cart-v1", 81, "TCP", Outcome.SERVED, "GET", "/items/{}", "shop/cart:80")


@pytest.mark.parametrize(
    ("asked", "seen"),
    [
        pytest.param(ASKED, SEEN, id="the-service-that-the-route-chose-and-the-one-that-was-dialled"),
        pytest.param(ASKED._replace(dialled="[fd00::1]:80"), SEEN, id="over-ipv6"),
        pytest.param(ASKED._replace(cluster="service/shop/cart-v1/81@shop/web"), SEEN, id="a-callers-own-share"),
        pytest.param(ASKED._replace(cluster="", target=""), SEEN._replace(service="shop/cart", port=80, target=""), id="no-cluster"),
        pytest.param(ASKED._replace(cluster="workload/shop/cart-1/8080"), SEEN._replace(service="", port=8080), id="a-workload"),
        pytest.param(ASKED._replace(path=""), SEEN._replace(path=paths.ANY), id="a-route-changed-the-path"),
        pytest.param(ASKED._replace(side="gateway", dialled="192.0.2.1:80"), SEEN._replace(dialled=""), id="by-a-gateway"),
        pytest.param(
            ASKED._replace(code=403, details="rbac_access_denied_matched_policy[shop/p[0]]"),
            SEEN._replace(outcome=Outcome.DENIED),
            id="denied",
        ),
        pytest.param(ASKED._replace(code=403), SEEN._replace(outcome=Outcome.UNAUTHORIZED), id="refused-by-the-application"),
        pytest.param(
            ASKED._replace(code=401, details="jwt_authn_access_denied{Jwt_is_expired}"),
            SEEN._replace(outcome=Outcome.UNAUTHORIZED),
            id="bad-token",
        ),
        pytest.param(ASKED._replace(code=503, details="no_healthy_upstream"), SEEN._replace(outcome=Outcome.UNANSWERED), id="unanswered"),
        pytest.param(ASKED._replace(cluster="", dialled="192.0.2.1:80", target=""), None, id="it-led-nowhere"),
        pytest.param(ASKED._replace(side="inbound", owner="shop/cart-1", dialled="10.0.0.2:8080"), None, id="its-caller-tells-of-it"),
        pytest.param(
            ASKED._replace(side="inbound", owner="shop/cart-1", caller_address="10.0.0.9", dialled="10.0.0.2:8080"),
            Seen(True, "", "shop/cart-1", "", 8080, "TCP", Outcome.SERVED, "GET", "/items/{}"),
            id="a-stranger",
        ),
    ],
)
def test_a_request_is_remembered_by_its_ends(asked: Asked, seen: Seen | None) -> None:
    assert Addresses().seen(asked, SNAPSHOT) == seen
