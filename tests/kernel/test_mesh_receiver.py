"""A pod's own address under an L7 policy: whoever dials it, the waypoint of the pod's node decides, and nobody gets round it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab.lab import Lab
from tests.kernel import shop

pytestmark = pytest.mark.kernel
IDENTITY = False  # what comes out of a tunnel takes another way: tests/unit/agent/l7/test_hbone.py

CALLS = 23
IPV4, IPV6 = "10.77.1.21", "[fd77:0:0:1::21]"
HOSTS = [pytest.param(IPV4, id="ipv4"), pytest.param(IPV6, id="ipv6")]
POLICY = """
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: {name}}}
spec:
  selector: {{matchLabels: {{app: cart}}}}
  action: ALLOW
  rules:
    - {sources}
      to: [{{operation: {{methods: [GET], paths: ["/items*"]}}}}]
"""
CARTS_MAY_READ = POLICY.format(name="carts-may-read", sources="from: [{source: {serviceAccounts: [default/cart]}}]")
ALL_MAY_READ = POLICY.format(name="all-may-read", sources="from: []")


@pytest.fixture
def carts_may_read(lab: Lab) -> Iterator[None]:
    with shop.applied(lab, CARTS_MAY_READ):
        shop.takes(lambda: shop.codes(lab, "cart-v1-2", f"http://{IPV4}:8080/items") == {"200": 1})
        yield


@pytest.fixture
def all_may_read(lab: Lab) -> Iterator[None]:
    with shop.applied(lab, ALL_MAY_READ.replace("- from: []\n      to", "- to")):
        shop.takes(lambda: shop.codes(lab, "client", f"http://{IPV4}:8080/items") == {"200": 1})
        yield


def arrived(lab: Lab) -> int:
    """Requests for the cart's content that the pod has answered."""
    return sum(count for name, count in shop.answered(lab, "cart-v1-1").items() if "/items" in name or "/flaky" in name)


def steered(lab: Lab, source: str) -> float:
    """Connections from a workload to cart-v1-1 that its node has handed to the waypoint."""
    return shop.samples(
        lab, "node-1", "mesh_policy_verdicts_total",
        source_workload=source, destination_workload="cart-v1-1", verdict="waypoint", direction="inbound",
    )  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.usefixtures("carts_may_read")
def test_a_caller_of_another_node_is_steered_and_its_request_decided(lab: Lab, host: str) -> None:
    """Its own node's waypoint decides first; what it lets through, the receiver's decides again: it has no reason to trust another node."""
    before, requests = arrived(lab), shop.requests(lab, "node-1", "inbound")
    assert shop.codes(lab, "cart-v1-2", f"http://{host}:8080/items?[1-{CALLS}]") == {"200": CALLS}
    assert shop.codes(lab, "cart-v1-2", f"http://{host}:8080/flaky") == {"403": 1}
    assert shop.codes(lab, "cart-v1-2", f"http://{host}:8080/items", "-X", "POST") == {"403": 1}
    assert arrived(lab) == before + CALLS
    assert shop.requests(lab, "node-1", "inbound") == requests + CALLS
    assert steered(lab, "cart-v1-2") > 0


@pytest.mark.parametrize("host", HOSTS)
def test_a_client_outside_the_mesh_is_refused_where_no_rule_allows_strangers(lab: Lab, host: str) -> None:
    before, requests = arrived(lab), shop.requests(lab, "node-1", "inbound")
    denied = {"destination_workload": "cart-v1-1", "verdict": "deny", "direction": "inbound", "rule": "default/cart-l7: no rule matches"}
    count = shop.samples(lab, "node-1", "mesh_policy_verdicts_total", **denied)
    assert shop.codes(lab, "client", f"http://{host}:8080/items") == {"curl 7": 1}
    assert shop.samples(lab, "node-1", "mesh_policy_verdicts_total", **denied) > count
    assert (arrived(lab), shop.requests(lab, "node-1", "inbound")) == (before, requests)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.usefixtures("all_may_read")
def test_a_rule_for_everybody_lets_a_client_outside_the_mesh_read_and_nothing_else(lab: Lab, host: str) -> None:
    before, requests, connections = arrived(lab), shop.requests(lab, "node-1", "inbound"), steered(lab, "unknown")
    assert shop.codes(lab, "client", f"http://{host}:8080/items?[1-{CALLS}]") == {"200": CALLS}
    for path, options in (
        ("/flaky", ()),
        ("/admin/counters", ()),
        ("/items/../admin/counters", ("--path-as-is",)),
        ("/items", ("-X", "POST")),
    ):
        assert shop.codes(lab, "client", f"http://{host}:8080{path}", *options) == {"403": 1}, path
    assert arrived(lab) == before + CALLS
    assert shop.requests(lab, "node-1", "inbound") == requests + CALLS + 4
    assert steered(lab, "unknown") == connections + 1 + 4, "curl keeps one connection for the allowed calls"


@pytest.mark.parametrize("host", HOSTS)
def test_a_pod_of_the_same_node_that_dials_the_pods_address_is_redirected_and_policed(lab: Lab, host: str) -> None:
    before, requests = arrived(lab), shop.requests(lab, "node-1", "outbound")
    assert shop.codes(lab, "frontend", f"http://{host}:8080/items?[1-{CALLS}]") == {"200": CALLS}
    assert shop.codes(lab, "frontend", f"http://{host}:8080/admin/counters") == {"403": 1}
    assert shop.codes(lab, "frontend", f"http://{host}:8080/items", "-X", "POST") == {"403": 1}
    assert arrived(lab) == before + CALLS
    assert shop.requests(lab, "node-1", "outbound") == requests + CALLS + 2


@pytest.mark.parametrize("host", HOSTS)
def test_a_pod_of_the_same_node_that_no_rule_allows_is_refused_by_the_kernel(lab: Lab, host: str) -> None:
    before, requests = arrived(lab), shop.requests(lab, "node-1", "outbound")
    assert shop.codes(lab, "other", f"http://{host}:8080/items") == {"curl 7": 1}
    assert (arrived(lab), shop.requests(lab, "node-1", "outbound")) == (before, requests)


@pytest.mark.parametrize("port", [15001, 15006])
@pytest.mark.parametrize("host", HOSTS)
def test_the_waypoints_own_ports_serve_nobody_from_elsewhere(lab: Lab, host: str, port: int) -> None:
    assert shop.codes(lab, "client", f"http://{host}:{port}/items") == {"curl 7": 1}
    assert shop.codes(lab, "other", f"http://{host}:{port}/items") == {"curl 7": 1}
