"""HTTP through the waypoint of the caller's node: retries, weights, authorization, what routing goes by, what the backend sees."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import resources
from lab.lab import Lab
from lab.topology import Pod
from tests.kernel import shop

pytestmark = pytest.mark.kernel

CALLS = 23
SPLIT_CALLS = 307
FAMILIES = [pytest.param("10.96.0.10", id="ipv4"), pytest.param("[fd96::10]", id="ipv6"), pytest.param("[::ffff:10.96.0.10]", id="mapped")]
# Says who called and what came; a POST answers the digest of the body.
MIRROR = """
import hashlib, http.server, json, socket
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        peer = self.client_address[0].removeprefix("::ffff:")
        said = json.dumps({"peer": peer, "sha256": hashlib.sha256(body).hexdigest(), "names": sorted(map(str.lower, self.headers))}).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(said))); self.end_headers(); self.wfile.write(said)
    do_POST = do_GET
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
Server(("::", 8080), Handler).serve_forever()
"""
MIRRORS = tuple(
    Pod(f"mirror-{node}", f"node-{node}", (f"10.77.{node}.60", f"fd77:0:0:{node}::60"), command=("python3", "-c", MIRROR), ports=(8080,),
        labels={"app": "mirror", "node": str(node)})
    for node in (1, 2)
)  # fmt: skip
SERVICE = """
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  clusterIPs: ["10.96.0.{host}", "fd96::{host}"]
  ipFamilyPolicy: RequireDualStack
  selector: {selector}
  ports: [{{name: http, port: 80, targetPort: 8080, appProtocol: http}}]
"""
ROUTE = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: {name}}}
spec:
  parentRefs: [{{group: "", kind: Service, name: {name}}}]
  rules: [{{backendRefs: [{{name: {name}, port: 80}}]}}]
"""
ONE_PATH = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: one-path}
spec:
  parentRefs: [{group: "", kind: Service, name: cart-v2, port: 80}]
  rules:
    - matches: [{path: {type: Exact, value: /items}}]
      backendRefs: [{name: cart-v2, port: 80}]
"""


@pytest.fixture(scope="module")
def mirrors(lab: Lab) -> Iterator[None]:
    """Two services with one pod each, near and far from the frontend."""
    documents = [SERVICE.format(name=f"mirror-{n}", host=60 + n, selector=f"{{node: '{n}'}}") for n in (1, 2)]
    documents += [ROUTE.format(name=f"mirror-{n}") for n in (1, 2)]
    for pod in MIRRORS:
        lab.add_pod(pod)
        documents.append(str(resources.workload(pod)))
    with shop.applied(lab, "\n---\n".join(documents)):
        shop.takes(lambda: shop.codes(lab, "frontend", "http://mirror-2/") == {"200": 1})
        yield


def test_a_503_of_one_backend_is_tried_again_at_another(lab: Lab) -> None:
    before = shop.answered(lab, "cart-v1-1")["GET /flaky 503"]
    retries = _retries(lab)
    assert shop.codes(lab, "frontend", f"http://cart/flaky?[1-{CALLS}]") == {"200": CALLS}
    failed = shop.answered(lab, "cart-v1-1")["GET /flaky 503"] - before
    assert failed > 0
    assert _retries(lab) - retries == failed


def _retries(lab: Lab) -> int:
    return sum(v for k, v in lab.envoy_stats("node-1").items() if re.fullmatch(r"cluster\.service.*\.upstream_rq_retry", k))


def test_the_weights_of_a_route_hold(lab: Lab) -> None:
    before = {pod: shop.answered(lab, pod)["GET /items 200"] for pod in ("cart-v1-1", "cart-v1-2", "cart-v2-1")}
    retries = _retries(lab)
    assert shop.codes(lab, "frontend", f"http://cart/items?[1-{SPLIT_CALLS}]") == {"200": SPLIT_CALLS}
    seen = {pod: shop.answered(lab, pod)["GET /items 200"] - count for pod, count in before.items()}
    # A try that took longer than its second (on a machine that stood still) was answered too, to nobody.
    assert SPLIT_CALLS <= sum(seen.values()) <= SPLIT_CALLS + _retries(lab) - retries
    assert abs(seen["cart-v2-1"] - 0.2 * SPLIT_CALLS) <= 4 * math.sqrt(SPLIT_CALLS * 0.2 * 0.8)
    assert abs(seen["cart-v1-1"] - 0.4 * SPLIT_CALLS) <= 4 * math.sqrt(SPLIT_CALLS * 0.4 * 0.6)


@pytest.mark.parametrize(
    ("path", "options", "rule"),
    [
        pytest.param("/admin/x", (), "default/cart-no-admin[0]", id="a-deny-rule"),
        pytest.param("/items", ("-X", "POST"), "default/cart-l7: no rule matches", id="no-allow-rule"),
    ],
)
def test_a_request_that_policy_forbids_is_a_403_and_the_trace_names_the_rule(
    lab: Lab, path: str, options: tuple[str, ...], rule: str
) -> None:
    arrived = {pod: sum(shop.answered(lab, pod).values()) for pod in ("cart-v1-1", "cart-v1-2", "cart-v2-1")}
    with shop.tracing("node-1", "frontend", "cart", "--count", "1") as trace:
        answer = shop.get(lab, "frontend", f"http://cart{path}", *options)
        (seen,) = shop.connections(trace)
    assert (answer["status"], answer["headers"]["x-meshagent-reason"]) == (403, ["authorization-policy"])
    assert trace.returncode == 1
    assert (seen["outcome"], seen["rule"]) == ("403", rule)
    assert [hop["at"] for hop in seen["hops"]] == ["connect", "handshake", "waypoint", "response"], "no backend was asked"
    # Each question for the counters is itself counted after it is answered.
    assert {pod: sum(shop.answered(lab, pod).values()) - count for pod, count in arrived.items()} == dict.fromkeys(arrived, 1)


def test_an_enrolled_caller_that_no_rule_allows_gets_no_request_through(lab: Lab) -> None:
    before = {pod: shop.answered(lab, pod)["GET /items 200"] for pod in ("cart-v1-1", "cart-v1-2", "cart-v2-1")}
    assert shop.codes(lab, "other", f"http://cart/items?[1-{CALLS}]") == {"403": CALLS}
    assert {pod: shop.answered(lab, pod)["GET /items 200"] for pod in before} == before


def test_a_request_without_a_matching_route_is_a_404(lab: Lab) -> None:
    with shop.applied(lab, ONE_PATH):
        shop.takes(lambda: shop.codes(lab, "frontend", "http://cart-v2/flaky") == {"404": 1})
        assert shop.get(lab, "frontend", "http://cart-v2/flaky")["headers"]["x-meshagent-reason"] == ["no-route"]
        assert shop.codes(lab, "frontend", "http://cart-v2/items") == {"200": 1}


def test_a_service_without_a_ready_endpoint_is_a_503(lab: Lab) -> None:
    with shop.applied(lab, SERVICE.format(name="empty", host=77, selector="{app: nobody}") + "---" + ROUTE.format(name="empty")):
        shop.takes(lambda: shop.codes(lab, "frontend", "http://10.96.0.77/") == {"503": 1}, 2)
        assert shop.get(lab, "frontend", "http://10.96.0.77/")["headers"]["x-meshagent-reason"] == ["no-ready-backend"]


@pytest.mark.parametrize("host", FAMILIES)
@pytest.mark.parametrize("header", ["cart", "redis", "frontend", "no-such-name.example:99"])
def test_the_address_that_was_dialled_is_what_routing_goes_by(lab: Lab, host: str, header: str) -> None:
    accepted = shop.requests(lab, "node-1", "outbound")
    answer = shop.get(lab, "frontend", f"http://{host}/items", "-H", f"Host: {header}")
    assert answer["status"] == 200
    assert answer["pod"].startswith("cart-")
    assert shop.requests(lab, "node-1", "outbound") == accepted + 1


@pytest.mark.parametrize("forged", ["10.96.0.12:80", "[fd96::12]:80"])
def test_a_forged_internal_header_does_not_win(lab: Lab, forged: str) -> None:
    before = shop.answered(lab, "cart-v2-1")["GET /items 200"]
    assert shop.codes(lab, "frontend", f"http://cart-v1/items?[1-{CALLS}]", "-H", f"x-meshagent-destination: {forged}") == {"200": CALLS}
    assert shop.answered(lab, "cart-v2-1")["GET /items 200"] == before


@pytest.mark.usefixtures("mirrors")
@pytest.mark.parametrize("caller", ["frontend", "other", "cart-v1-2"])
@pytest.mark.parametrize("service", [1, 2])
def test_the_backend_sees_the_calling_pods_own_address_and_its_own_behind_a_tunnel(lab: Lab, caller: str, service: int) -> None:
    node, backend = lab.topology.pod(caller).node, MIRRORS[service - 1]
    before = shop.requests(lab, node, "outbound")
    peers = [shop.get(lab, caller, f"http://{host}/")["peer"] for host in (f"10.96.0.{60 + service}", f"[fd96::{60 + service}]")]
    assert set(peers) <= set(lab.topology.pod(caller).addresses if backend.node == node else backend.addresses)
    assert shop.requests(lab, node, "outbound") == before + 2, "through the waypoint"


@pytest.mark.usefixtures("mirrors")
def test_the_backend_sees_no_header_of_the_waypoints(lab: Lab) -> None:
    before = shop.requests(lab, "node-1", "outbound")
    names = shop.get(lab, "frontend", "http://mirror-2/", "-H", "x-meshagent-destination: 1.2.3.4:5")["names"]
    assert [name for name in names if name.startswith(("x-meshagent", "x-envoy"))] == []
    assert shop.requests(lab, "node-1", "outbound") == before + 1


@pytest.mark.usefixtures("mirrors")
def test_a_large_body_arrives_whole(lab: Lab, tmp_path: Path) -> None:
    body = bytes(range(251)) * 40_009
    (tmp_path / "body").write_bytes(body)
    before = shop.requests(lab, "node-1", "outbound")
    answer = shop.get(lab, "frontend", "http://mirror-2/", "--data-binary", f"@{tmp_path}/body", "-H", "Expect:")
    assert (answer["status"], answer["sha256"]) == (200, hashlib.sha256(body).hexdigest())
    assert shop.requests(lab, "node-1", "outbound") == before + 1
