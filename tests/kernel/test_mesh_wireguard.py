"""A mesh whose controller wants WireGuard between nodes: where the kernel has it, it encrypts; elsewhere that is said, and HBONE does."""

from __future__ import annotations

import time

import pytest

from agent.wireguard import device
from lab.lab import Lab
from tests.kernel import shop
from tests.kernel.wire import listening

WIREGUARD = True
MISSING = device.unavailable()
NODES = ("node-1", "node-2")
CART = "http://cart/items?word=swordfish"
STRICT = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default}\nspec: {mtls: {mode: STRICT}}\n"
STRICT = STRICT.replace("security.istio.io/v1", "meshagent.io/v1alpha1")
without = pytest.mark.skipif(not MISSING, reason="this kernel has WireGuard")
with_it = pytest.mark.skipif(bool(MISSING), reason=MISSING or "-")


@without
@pytest.mark.parametrize("node", NODES)
def test_a_kernel_without_wireguard_is_told_to_the_operator(lab: Lab, node: str) -> None:
    shop.takes(lambda: shop.status(node)["wireguard"]["mode"] == "unavailable")
    status = shop.status(node)
    assert "has no WireGuard: it is built without CONFIG_WIREGUARD, or the module is not installed" in status["wireguard"]["reason"]
    (found,) = (text for text in status["problems"] if "WireGuard" in text)
    assert found == (
        f"WireGuard, with which this mesh encrypts between nodes, is not available here: {MISSING}; "
        "TCP from and to other nodes goes through HBONE instead, UDP between nodes is not encrypted"
    )
    assert status["ready"]
    assert "not available: HBONE is used instead" in lab.ask(node, "status").stdout
    assert shop.samples(lab, node, "mesh_wireguard_available") == 0
    assert "mesh_wireguard_available 0" in lab.metrics(node)


@without
def test_hbone_encrypts_where_wireguard_cannot(lab: Lab) -> None:
    shop.takes(lambda: shop.plan(lab, "node-1", "frontend", "cart")["encryption"] == "mTLS between nodes (HBONE)", 30)
    with listening(b"swordfish") as wire:
        assert shop.codes(lab, "frontend", f"{CART}&n=[1-23]") == {"200": 23}
    assert (wire.marked, dict(wire.plain), wire.tunnelled > 0) == (0, {}, True)


@with_it
def test_wireguard_encrypts_and_nothing_goes_through_tunnels(lab: Lab) -> None:
    for node, source, to in (("node-1", "frontend", "cart-v2-1:8080"), ("node-2", "cart-v2-1", "redis:6379")):
        shop.takes(lambda n=node, s=source, t=to: shop.plan(lab, n, s, t)["encryption"] == "WireGuard between nodes", 60)  # type: ignore[misc]
    time.sleep(1)
    with listening(b"swordfish") as wire:
        assert shop.codes(lab, "frontend", f"{CART}&n=[1-23]") == {"200": 23}
    assert (wire.marked, dict(wire.plain), wire.tunnelled) == (0, {}, 0)
    assert shop.samples(lab, "node-1", "mesh_wireguard_peers", state="encrypted") == 1
    assert 'mesh_wireguard_sent_bytes_total{node="node-2"}' in lab.metrics("node-1")
    assert not [text for text in shop.status("node-1")["problems"] if "WireGuard" in text]


@with_it
def test_strict_wants_the_callers_certificate_all_the_same(lab: Lab) -> None:
    with shop.applied(lab, STRICT):
        shop.takes(lambda: "HBONE" in shop.plan(lab, "node-1", "frontend", "cart-v2-1:8080")["encryption"], 30)
        time.sleep(1)
        with listening(b"swordfish") as wire:
            assert shop.codes(lab, "frontend", f"{CART}&n=[1-23]") == {"200": 23}
        assert (wire.marked, dict(wire.plain), wire.tunnelled > 0) == (0, {}, True)


@with_it
def test_a_node_whose_agent_starts_anew_goes_on_with_wireguard(lab: Lab) -> None:
    shop.takes(lambda: shop.plan(lab, "node-1", "frontend", "cart-v2-1:8080")["encryption"] == "WireGuard between nodes", 60)
    key = shop.status("node-1")["wireguard"]["publicKey"]
    with listening(b"swordfish") as wire:
        lab.kill_agent("node-1")
        assert shop.codes(lab, "frontend", f"{CART}&n=[1-23]") == {"200": 23}
        lab.start_agent("node-1")
        assert shop.codes(lab, "frontend", f"{CART}&n=[1-23]") == {"200": 23}
    assert (wire.marked, dict(wire.plain), wire.tunnelled) == (0, {}, 0)
    assert shop.status("node-1")["wireguard"]["publicKey"] == key
