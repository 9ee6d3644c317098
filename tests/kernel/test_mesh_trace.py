"""`meshagent trace` in a running mesh: hops of both nodes, and what it says of every failure that a test can cause."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from lab import resources
from lab.lab import Lab
from lab.topology import Pod
from tests.kernel import shop
from tests.tokens import Issuer

pytestmark = pytest.mark.kernel

FRONTEND = "spiffe://mesh.local/ns/default/sa/frontend"
MAX_CLOCK_ERROR_NS = 1_000_000_000
# On 8080 HTTP, always with the status of its path's last part; on 9998 something that greets whoever comes; on 9999 nobody is let in any more: the queue of
# its listener is full.
FAR = """
import http.server, socket, socketserver, threading
class Greeter(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"220 at your service\\r\\n"); self.request.recv(1000)
threading.Thread(target=socketserver.ThreadingTCPServer(("", 9998), Greeter).serve_forever, daemon=True).start()
full = socket.socket(); full.bind(("0.0.0.0", 9999)); full.listen(0)
others = [socket.socket() for _ in range(4)]
for one in others:
    one.setblocking(False)
    one.connect_ex(("127.0.0.1", 9999))
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(int(self.path.rpartition("/")[2] or 200)); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("", 8080), Handler).serve_forever()
"""
PODS = (
    Pod("far", "node-2", ("10.77.2.80",), command=("python3", "-c", FAR), ports=(8080,), labels={"app": "far"}, service_account="far"),
    Pod("plain", "node-1", ("10.77.1.81",), labels={"app": "plain", "meshagent.io/mode": "none"}, service_account="plain"),
)
SERVICES = """
apiVersion: v1
kind: Service
metadata: {name: far}
spec: {clusterIP: 10.96.0.80, selector: {app: far}, ports: [{name: http, port: 80, targetPort: 8080, appProtocol: http},
  {name: tcp-raw, port: 81, targetPort: 8080},
  {name: tcp-none, port: 82, targetPort: 8082}, {name: http-none, port: 83, targetPort: 8082, appProtocol: http}, {name: tcp-full, port: 84, targetPort: 9999},
  {name: http-full, port: 85, targetPort: 9999, appProtocol: http}, {name: http-greeter, port: 86, targetPort: 9998, appProtocol: http}]}
---
apiVersion: v1
kind: Service
metadata: {name: nobody}
spec: {clusterIP: 10.96.0.82, selector: {app: nobody}, ports: [{name: http, port: 80, appProtocol: http}, {name: tcp-raw, port: 81}]}
"""


L7 = """
apiVersion: meshagent.io/v1alpha1
kind: TrafficPolicy
metadata: {{name: traced}}
spec:
  targetRefs: [{{group: "", kind: Service, name: {service}, sectionName: {port}}}]
{spec}
"""
"""Makes one port of a service L7."""


@pytest.fixture(scope="module", autouse=True)
def pods(lab: Lab) -> Iterator[None]:
    """A service on the other node that does what is asked of it, and a workload that is not in the mesh."""
    for pod in PODS:
        lab.add_pod(pod)
    document = "\n---\n".join([SERVICES, *(json.dumps(resources.workload(pod)) for pod in PODS)])
    with shop.changed(lab):
        lab.apply(document)
    shop.takes(in_force, 30)
    yield
    shop.delete(lab, document)
    for pod in PODS:
        lab.remove_pod(pod.name)


def in_force() -> bool:
    """Are both nodes ready, with all pods but the one that is not to be in the mesh?"""
    found = [shop.status(node) for node in ("node-1", "node-2")]
    missing = {w["name"] for status in found for w in status["workloads"] if not w["redirected"]}
    return all(status["ready"] for status in found) and missing == {"plain"}


def hop(connection: dict[str, Any], at: str, node: str = "") -> dict[str, Any]:
    """The one hop of this name (on this node)."""
    (found,) = (one for one in connection["hops"] if one["at"] == at and node in {"", one["node"]})
    assert isinstance(found, dict)
    return found


def one(
    lab: Lab, source: str, destination: str, url: str, *options: str, trace: tuple[str, ...] = (), status: str | None = None
) -> dict[str, Any]:
    """What a trace says of one call with curl."""
    node = lab.topology.pod(source).node
    with shop.tracing(node, source, destination, "--count", "1", "--duration", "20", *trace) as running:
        (answer,) = shop.codes(lab, source, url, *options)
        assert status in {None, answer}
        (seen,) = shop.connections(running)
    print(json.dumps(seen, indent=1))
    return seen


def test_a_request_to_another_node_shows_the_receivers_end(lab: Lab) -> None:
    seen = one(lab, "frontend", "cart-v2:80", "http://cart-v2/items?7", status="200")
    assert seen["outcome"] == "200"
    inbound = hop(seen, "inbound", "node-2")
    assert (inbound["workload"], inbound["port"], inbound["verdict"], inbound["status"]) == ("default/cart-v2-1", 15008, "allow", 200)
    assert (inbound["peer"], inbound["tls"]) == (FRONTEND, "TLSv1.3")
    assert hop(seen, "app", "node-2")["address"] == "10.77.2.23:8080"
    assert 0 < seen["clockErrorNs"] < MAX_CLOCK_ERROR_NS


def test_an_l4_connection_in_a_tunnel_shows_both_of_its_ends(lab: Lab) -> None:
    seen = one(lab, "frontend", "far:81", "http://10.96.0.80:81/200", status="200")
    assert [(each["at"], each["node"]) for each in seen["hops"]] == [
        ("connect", "node-1"), ("handshake", "node-1"), ("tunnel", "node-1"), ("inbound", "node-2"), ("close", "node-1"),
    ]  # fmt: skip
    assert (hop(seen, "tunnel")["peer"], hop(seen, "tunnel")["tls"]) == ("spiffe://mesh.local/ns/default/sa/far", "TLSv1.3")
    inbound = hop(seen, "inbound")
    assert (inbound["peer"], inbound["port"], inbound["verdict"]) == (FRONTEND, 15008, "allow")
    assert inbound["receivedBytes"] == hop(seen, "close")["sentBytes"] > 0
    assert seen["outcome"] == "closed"


def test_a_connection_in_plaintext_shows_the_receivers_kernel(lab: Lab) -> None:
    with shop.applied(lab, mtls("DISABLE")):
        seen = one(lab, "frontend", "far:81", "http://10.96.0.80:81/200", status="200")
    inbound, end = hop(seen, "inbound", "node-2"), hop(seen, "end", "node-2")
    assert (inbound["workload"], inbound["port"], inbound["verdict"]) == ("default/far", 8080, "allow")
    assert abs(end["sentBytes"] - hop(seen, "close")["receivedBytes"]) <= 1, (
        "the kernel cannot always tell whether a FIN came (mesh_payload)"
    )
    assert abs(end["receivedBytes"] - hop(seen, "close")["sentBytes"]) <= 1


def test_an_application_that_does_not_listen_is_named_by_the_receivers_node(lab: Lab) -> None:
    seen = one(lab, "frontend", "far:82", "http://10.96.0.80:82/")
    assert (seen["outcome"], hop(seen, "inbound", "node-2")["status"]) == ("failed", 503)
    assert "does it listen there" in seen["nextStep"]


def mtls(mode: str) -> str:
    return f"""
apiVersion: meshagent.io/v1alpha1
kind: PeerAuthentication
metadata: {{name: far-mode}}
spec: {{selector: {{matchLabels: {{app: far}}}}, mtls: {{mode: {mode}}}}}
"""


def test_without_endpoints_a_connection_is_refused_and_a_request_gets_503(lab: Lab) -> None:
    with shop.applied(lab, L7.format(service="nobody", port="http", spec="  loadBalancing: {type: Random}")):
        for port, outcome, at in ((81, "refused", "connect"), (80, "503", "waypoint")):
            seen = one(lab, "frontend", f"nobody:{port}", f"http://10.96.0.82:{port}/")
            assert (seen["outcome"], hop(seen, at)["node"]) == (outcome, "node-1")
            assert seen["nextStep"] == "no endpoint is ready: see the Workloads that the service selects"


def test_a_request_that_no_rule_allows_names_the_policy(lab: Lab) -> None:
    seen = one(lab, "frontend", "cart", "http://cart/items", "-X", "POST", status="403")
    assert (seen["outcome"], seen["rule"]) == ("403", "default/cart-l7: no rule matches")
    assert "allow the request" in seen["nextStep"]
    assert "rbac_access_denied" in hop(seen, "waypoint")["details"]


def test_plaintext_to_a_strict_port_of_a_caller_that_is_not_enrolled_is_told_by_the_receiver(lab: Lab) -> None:
    with shop.applied(lab, mtls("STRICT")):
        with shop.tracing("node-1", "plain", "far:81", "--count", "1", "--duration", "20") as running:
            assert shop.codes(lab, "plain", "http://10.77.2.80:8080/", "--max-time", "3").keys() <= {"curl 7", "curl 28"}
            seen = shop.connections(running)[0]
        run = lab.ask("node-1", "trace", "plain", "far:81", "--duration", "0", "-o", "json")
    assert (seen["outcome"], hop(seen, "inbound", "node-2")["reason"]) == ("denied", "plaintext")
    assert "enrol the caller, or make the port PERMISSIVE" in seen["nextStep"]
    problems = json.loads(run.stdout)["problems"]
    assert any("default/plain is not enrolled" in problem for problem in problems)
    assert any("refuses plaintext" in problem for problem in problems)


def test_a_waypoint_that_is_away_is_named(lab: Lab) -> None:
    pid = shop.status("node-1")["waypoint"]["pid"]
    with shop.tracing("node-1", "frontend", "cart", "--count", "1", "--duration", "20") as running:
        os.kill(pid, signal.SIGKILL)
        assert shop.codes(lab, "frontend", "http://cart/items").keys() == {"curl 7"}
        (seen,) = shop.connections(running)
    assert (seen["outcome"], seen["hops"][0]["to"]) == ("failed", "waypoint")
    assert seen["nextStep"] == "the waypoint does not listen: see 'meshagent status'"
    shop.takes(in_force, 30)
    shop.takes(lambda: shop.codes(lab, "frontend", "http://cart/items") == {"200": 1}, 10)


def test_a_waypoint_that_takes_nothing_is_a_problem_of_the_plan(lab: Lab) -> None:
    pid = shop.status("node-1")["waypoint"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        run = lab.ask("node-1", "trace", "frontend", "cart", "-o", "json", "--duration", "0.1", "--probe")
    finally:
        os.kill(pid, signal.SIGCONT)
    (problem,) = json.loads(run.stdout.splitlines()[0])["problems"]
    assert "the waypoint of node node-1 does not take what it is told" in problem
    assert (run.returncode, "nothing answered the probe" in run.stderr) == (1, True)
    shop.takes(in_force, 30)


def test_a_backend_that_does_not_speak_http_is_named(lab: Lab) -> None:
    with shop.applied(lab, L7.format(service="far", port="http-greeter", spec="  loadBalancing: {type: Random}")):
        seen = one(lab, "frontend", "far:86", "http://10.96.0.80:86/", status="502")
    assert seen["nextStep"] == "what the backend said is not HTTP: see targetPort, appProtocol and name of the service's port"


def test_a_caller_that_does_not_speak_http_is_named(lab: Lab) -> None:
    say = 'import socket; s = socket.create_connection(("10.96.0.10", 80)); s.sendall(b"PING\\r\\n"); print(s.recv(12))'
    with shop.tracing("node-1", "frontend", "cart", "--count", "1", "--duration", "20") as running:
        assert lab.exec("frontend", ["python3", "-c", say]).stdout == "b'HTTP/1.1 400'\n"
        (seen,) = shop.connections(running)
    assert (seen["outcome"], hop(seen, "waypoint")["details"]) == ("400", "http1.codec_error")
    assert "what the caller said is not HTTP" in seen["nextStep"]


def test_a_backend_that_lets_nobody_in_is_a_time_out_that_says_so(lab: Lab) -> None:
    random = L7.format(service="far", port="http-full", spec="  loadBalancing: {type: Random}")
    with shop.applied(lab, random):
        seen = one(lab, "frontend", "far:85", "http://10.96.0.80:85/", "--max-time", "8", status="503")
        assert (hop(seen, "inbound", "node-2")["status"], seen["nextStep"]) == (
            503,
            "the application does not accept connections on this port: is it running, and does it listen there?",
        )
    with shop.applied(lab, f"{mtls('DISABLE')}\n---\n{random}"):
        seen = one(lab, "frontend", "far:84", "http://10.96.0.80:84/", "--max-time", "3")
        assert (seen["outcome"], hop(seen, "close")["retransmits"] > 0) == ("timed out", True)
        assert "nothing answered" in seen["nextStep"]
        seen = one(lab, "frontend", "far:85", "http://10.96.0.80:85/", "--max-time", "8")
        assert "did not accept a connection in time" in seen["nextStep"]


def test_an_endpoint_that_was_ejected_is_told_from_one_that_does_not_exist(lab: Lab) -> None:
    spec = "  outlierEjection: {consecutive5xx: 2, interval: 200ms, baseEjectionTime: 5s, maxEjectionPercent: 100}\n  loadBalancing: {panicPercent: 0}"
    with shop.applied(lab, L7.format(service="far", port="http", spec=spec)):
        shop.takes(
            lambda: shop.get(lab, "frontend", "http://10.96.0.80/500")["headers"].get("x-meshagent-reason") == ["no-ready-backend"], 10
        )
        seen = one(lab, "frontend", "far", "http://10.96.0.80/200", status="503")
    assert "ready endpoints are ejected" in seen["nextStep"]
    assert "no healthy upstream" in hop(seen, "waypoint")["flags"]


def test_a_rate_limit_is_named(lab: Lab) -> None:
    with shop.applied(lab, L7.format(service="far", port="http", spec="  rateLimits: [{requests: 3, interval: 100s}]")):
        shop.takes(lambda: shop.codes(lab, "frontend", "http://10.96.0.80/200").get("429", 0) > 0)
        seen = one(lab, "frontend", "far", "http://10.96.0.80/200", status="429")
    assert seen["outcome"] == "429"
    assert "rateLimits" in seen["nextStep"]


TOKENS = """
apiVersion: meshagent.io/v1alpha1
kind: RequestAuthentication
metadata: {{name: tokens}}
spec: {{selector: {{matchLabels: {{app: far}}}}, jwtRules: [{{issuer: "https://issuer.example", jwks: '{jwks}'}}]}}
---
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: far-tokens}}
spec: {{selector: {{matchLabels: {{app: far}}}}, action: ALLOW, rules: [{{from: [{{source: {{requestPrincipals: ["*"]}}}}]}}]}}
"""


def test_a_token_that_is_missing_or_not_accepted_is_named(lab: Lab) -> None:
    with shop.applied(lab, TOKENS.format(jwks=Issuer("https://issuer.example").jwks)):
        shop.takes(lambda: shop.codes(lab, "frontend", "http://10.96.0.80/200") != {"200": 1})
        seen = one(lab, "frontend", "far", "http://10.96.0.80/200")
        assert seen["outcome"] in {"401", "403"}
        assert "token" in seen["nextStep"]
        seen = one(lab, "frontend", "far", "http://10.96.0.80/200", "-H", "authorization: Bearer none", status="401")
        assert "token was not accepted" in seen["nextStep"]


def test_only_what_was_asked_for_is_shown(lab: Lab) -> None:
    wanted: dict[tuple[str, ...], list[tuple[str, str]]] = {
        ("--method", "get"): [("GET", "200"), ("GET", "503"), ("GET", "404")],
        ("--path", "/a/*"): [("GET", "200"), ("GET", "503"), ("POST", "501")],
        ("--status", "5xx", "--status", "404"): [("GET", "503"), ("POST", "501"), ("GET", "404")],
        ("--errors-only",): [("GET", "503"), ("POST", "501"), ("GET", "404")],
        ("--slow", "30000"): [],
    }
    with shop.applied(lab, L7.format(service="far", port="http", spec="  loadBalancing: {type: Random}")):
        for options, expected in wanted.items():
            with shop.tracing("node-1", "frontend", "far", "--duration", "3", *options) as running:
                for method, path in (("GET", "/a/200"), ("GET", "/a/503"), ("POST", "/a/200"), ("GET", "/b/404")):
                    shop.codes(lab, "frontend", f"http://10.96.0.80{path}", "-X", method)
                seen = shop.connections(running)
            assert [(hop(each, "waypoint")["method"], each["outcome"]) for each in seen] == expected, options


def test_errors_only_shows_connections_that_failed(lab: Lab) -> None:
    with shop.tracing("node-1", "frontend", "far:82", "--duration", "3", "--errors-only") as running:
        shop.codes(lab, "frontend", "http://10.96.0.80:82/")
        assert [each["outcome"] for each in shop.connections(running)] == ["failed"]
    with shop.tracing("node-1", "frontend", "far:81", "--duration", "2", "--errors-only") as running:
        shop.codes(lab, "frontend", "http://10.96.0.80:81/")
        assert shop.connections(running) == []


def test_a_node_that_is_down_is_named_and_the_rest_is_shown(lab: Lab) -> None:
    assert lab.stop_agent("node-2")
    try:
        shop.takes(lambda: "node-2" not in nodes_told(lab), 15)
        run = lab.ask("node-1", "trace", "frontend", "far:81", "--probe", "-o", "json")
        plan, seen = map(json.loads, run.stdout.splitlines())
        (problem,) = plan["problems"]
        assert problem.startswith(
            "node node-2 does not tell what it sees, its hops are missing: node node-2 is not connected to the controller"
        )
        assert (seen["outcome"], {each["node"] for each in seen["hops"]}) == ("closed", {"node-1"})
        run = lab.ask("node-1", "trace", "far", "redis", "-o", "json")
        assert (run.returncode, json.loads(run.stdout)["source"]) == (1, "default/far")
        assert "connections of default/far cannot be watched: node node-2 is not connected to the controller" in run.stderr
    finally:
        lab.start_agent("node-2")
        shop.takes(in_force, 30)


def nodes_told(lab: Lab) -> set[str]:
    """Who answers through the controller."""
    run: subprocess.CompletedProcess[str] = lab.meshagent("status", "-o", "json", "--controller", shop.CONTROLLER)
    return {json.loads(line)["node"] for line in run.stdout.splitlines()}


def test_the_end_of_a_trace_leaves_no_filter_on_either_node(lab: Lab) -> None:
    with (
        shop.tracing("node-1", "frontend", "far", "--duration", "60") as one_user,
        shop.tracing("node-1", "frontend", "far", "--duration", "60") as another,
    ):
        assert all(shop.filters(node)[1] > 0 for node in ("node-1", "node-2"))
        one_user.send_signal(signal.SIGINT)
        assert one_user.wait(5) == 0
        shop.codes(lab, "frontend", "http://10.96.0.80/200")
        assert another.stdout is not None
        assert "inbound" in [each["at"] for each in json.loads(another.stdout.readline())["hops"]]
        another.kill()
        another.wait(5)
    shop.takes(lambda: [shop.filters(node) for node in ("node-1", "node-2")] == [(0, 0), (0, 0)], 3)
