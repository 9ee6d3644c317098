"""Ingress in a running shop: a machine outside the mesh calls a Gateway, over HTTP and HTTPS, and what it may reach is decided by the gateway's identity."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import paths
from lab.lab import Lab
from lab.topology import Pod
from tests.certificates import pair
from tests.kernel import gateway, shop
from tests.kernel.wire import listening
from tests.tokens import Issuer

pytestmark = pytest.mark.kernel

LABEL = "gateway.networking.k8s.io/gateway-name"
ADDRESS, ADDRESS6 = "10.77.1.90", "fd77:0:0:1::90"
EDGE = Pod("edge", "node-1", (ADDRESS, ADDRESS6), service_account="edge", labels={"app": "edge", LABEL: "web"})
CALLS, SPLIT_CALLS = 23, 307
HTTP, OPEN, HTTPS = f"http://{ADDRESS}", f"http://{ADDRESS}:8081", 443
PAIRS = {name: pair(f"{name}.example") for name in ("a", "b")}
WEB = f"""
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: web}}
spec:
  gatewayClassName: meshagent
  listeners:
    - {{name: shop, port: 80, protocol: HTTP, hostname: "*.shop.example"}}
    - {{name: open, port: 8081, protocol: HTTP}}
    - {{name: a, port: {HTTPS}, protocol: HTTPS, hostname: a.example, tls: {{certificateRefs: [{{name: a}}]}}}}
    - {{name: b, port: {HTTPS}, protocol: HTTPS, hostname: b.example, tls: {{certificateRefs: [{{name: b}}]}}}}
---"""
TO_V1, TO_V2 = "backendRefs: [{name: echo-v1, port: 80}]", "backendRefs: [{name: echo-v2, port: 80}]"
BOTH = "backendRefs: [{name: echo-v1, port: 80, weight: 70}, {name: echo-v2, port: 80, weight: 30}]"


def routed(name: str, section: str, rules: str, hosts: str = "", kind: str = "HTTPRoute") -> str:
    return f"""
apiVersion: gateway.networking.k8s.io/v1
kind: {kind}
metadata: {{name: {name}}}
spec: {{parentRefs: [{{name: web, sectionName: {section}}}], {f"hostnames: [{hosts}], " if hosts else ""}rules: {rules}}}
---"""


def path(value: str) -> str:
    return f"matches: [{{path: {{type: PathPrefix, value: {value}}}}}]"


ROUTES = (
    routed("v1", "shop", f"[{{{TO_V1}}}, {{{path('/two')}, {TO_V2}}}]", "v1.shop.example"),
    routed("split", "shop", f"[{{{BOTH}}}]", "split.shop.example"),
    routed("open", "open", f"[{{{TO_V1}}}, {{{path('/two')}, {TO_V2}}}]"),
    routed("a", "a", f"[{{{TO_V1}}}]"),
    routed("b", "b", f"[{{{TO_V2}}}]"),
    routed("calls", "open", "[{matches: [{method: {service: echo.Echo}}], backendRefs: [{name: echo, port: 7070}]}]", kind="GRPCRoute"),
)


def secret(name: str, held: tuple[bytes, bytes]) -> str:
    data = {"tls.crt": held[0].decode(), "tls.key": held[1].decode()}
    document = {"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls", "metadata": {"name": name}, "stringData": data}
    return f"\n{json.dumps(document)}\n---"


@pytest.fixture(scope="module")
def edge(lab: Lab) -> Iterator[Lab]:
    lab.add_pod(EDGE)
    for name, (chain, _) in PAIRS.items():
        (paths.RUN / f"{name}.pem").write_bytes(chain)
    secrets = [secret(name, held) for name, held in PAIRS.items()]
    with gateway.running(lab, {}, gateway.workload(EDGE), *secrets, WEB, *ROUTES):
        shop.takes(lambda: shop.codes(lab, "client", OPEN) == {"200": 1}, 20)
        shop.takes(lambda: over_tls(lab, "a") == Counter({"200": 1}), 20)
        yield lab


def host(name: str) -> tuple[str, str]:
    return ("-H", f"Host: {name}.shop.example")


def over_tls(lab: Lab, name: str, *more: str, authority: str = "") -> Counter[str]:
    """Ask for NAME.example, believing only the certificate of `authority`, which is NAME's if not given."""
    options = ("--resolve", f"{name}.example:{HTTPS}:{ADDRESS}", "--cacert", str(paths.RUN / f"{authority or name}.pem"))
    return shop.codes(lab, "client", f"https://{name}.example:{HTTPS}/", *options, *more)


def test_requests_from_outside_go_by_host_and_path(edge: Lab) -> None:
    seen = [gateway.pods(edge, "client", f"{HTTP}{where}?[1-{CALLS}]", *host("v1")) for where in ("/", "/two", "/two/x", "/twofold")]
    assert seen == [{"echo-v1": CALLS}, {"echo-v2": CALLS}, {"echo-v2": CALLS}, {"echo-v1": CALLS}]
    assert gateway.pods(edge, "client", f"http://[{ADDRESS6}]/", *host("v1")) == {"echo-v1": 1}
    for name in ("unknown.shop.example", "shop.example", "a.example"):
        answer = shop.get(edge, "client", HTTP, "-H", f"Host: {name}")
        assert (answer["status"], answer["headers"]["x-meshagent-reason"]) == (404, ["no-route"]), name


def test_weights_hold(edge: Lab) -> None:
    found = gateway.pods(edge, "client", f"{HTTP}/?[1-{SPLIT_CALLS}]", *host("split"))
    assert sum(found.values()) == SPLIT_CALLS
    assert 0.58 < found["echo-v1"] / SPLIT_CALLS < 0.82


def test_a_backend_on_the_other_node_is_reached_through_a_tunnel(edge: Lab) -> None:
    with listening(b"-") as wire:
        assert gateway.pods(edge, "client", f"{HTTP}/two?[1-{CALLS}]", *host("v1")) == {"echo-v2": CALLS}
    assert wire.tunnelled > CALLS
    assert not [ends for ends in wire.plain if "10.77.2.82" in ends]


def test_grpc_passes(edge: Lab) -> None:
    calls = gateway.call(edge, "client", f"{ADDRESS}:8081", "/echo.Echo/Any", CALLS)
    assert Counter(call["code"] for call in calls) == {"OK": CALLS}
    assert {call["pod"] for call in calls} == {"echo-v1", "echo-v2"}


def test_what_a_stranger_says_of_itself_is_not_believed(edge: Lab) -> None:
    forged = {
        "X-Forwarded-For": "10.77.1.10",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Client-Cert": "By=spiffe://mesh.local/ns/default/sa/edge;URI=spiffe://mesh.local/ns/default/sa/frontend",
        "X-Envoy-Original-Path": "/x",
        "X-Meshagent-Destination": "10.96.0.20:6379",
        "X-Real-Ip": "10.77.1.10",
        "Traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "Tracestate": "vendor=1",
    }
    for where in ("/", "/two"):
        options = [part for name, value in forged.items() for part in ("-H", f"{name}: {value}")]
        seen = shop.get(edge, "client", f"{OPEN}{where}", *options)["request"]
        assert (seen["x-forwarded-for"], seen["x-forwarded-proto"]) == ("10.77.255.200", "http")
        assert {name for name in seen if name.startswith(("x-", "trace"))} == {"x-forwarded-for", "x-forwarded-proto"}


def test_https_shows_the_certificate_of_the_name_and_a_new_one_at_once(edge: Lab) -> None:
    assert over_tls(edge, "a") == over_tls(edge, "b") == Counter({"200": 1})
    assert over_tls(edge, "a", "--http1.1") == Counter({"200": 1})
    assert over_tls(edge, "a", authority="b") == Counter({"curl 60": 1})  # it is not b's
    assert over_tls(edge, "c", authority="a") == Counter({"curl 35": 1})  # nobody's: the handshake ends
    assert over_tls(edge, "a", "-H", "Host: b.example") == Counter({"404": 1})
    renewed = pair("a.example")
    (paths.RUN / "renewed.pem").write_bytes(renewed[0])
    edge.apply(secret("a", renewed).removesuffix("---"))
    try:
        shop.takes(lambda: over_tls(edge, "a", authority="renewed") == Counter({"200": 1}), 5)
        assert over_tls(edge, "a") == Counter({"curl 60": 1})
        assert over_tls(edge, "b") == Counter({"200": 1})
    finally:
        edge.apply(secret("a", PAIRS["a"]).removesuffix("---"))
        shop.takes(lambda: over_tls(edge, "a") == Counter({"200": 1}), 5)
    shown = edge.meshagent("get", "secrets", "--controller", shop.CONTROLLER, "-o", "json", check=True).stdout
    lines = [key.decode().split("\n")[1].encode() for _, key in (*PAIRS.values(), renewed)]
    where = [*paths.AGENT_STATE.rglob("*"), *paths.LOGS.rglob("*"), *paths.AGENT_RUN.rglob("*.log")]
    texts = [shown.encode(), *(file.read_bytes() for file in where if file.is_file())]
    assert len(texts) > 4
    assert not [text[:80] for text in texts if any(line in text for line in lines)]


ONLY = """
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: only}}
spec:
  selector: {{matchLabels: {{app: echo}}}}
  action: ALLOW
  rules: [{{from: [{{source: {{principals: [mesh.local/ns/default/sa/{account}]}}}}], to: [{{operation: {{paths: ["/ok*", "/two/ok*"]}}}}]}}]
"""
NEVER = """
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: never}
spec:
  selector: {matchLabels: {app: echo}}
  action: DENY
  rules: [{from: [{source: {principals: [mesh.local/ns/default/sa/edge]}}], to: [{operation: {paths: ["/ok/never*", "/two/ok/never*"]}}]}]
"""


@pytest.mark.parametrize("where", ["", "/two"], ids=["same node", "other node"])
def test_backends_decide_by_the_gateways_identity(edge: Lab, where: str) -> None:
    with shop.applied(edge, ONLY.format(account="edge") + "---" + NEVER):
        shop.takes(lambda: shop.codes(edge, "client", f"{OPEN}{where}/no") == {"403": 1}, 5)
        assert shop.codes(edge, "client", f"{OPEN}{where}/ok?[1-{CALLS}]") == {"200": CALLS}
        assert shop.codes(edge, "client", f"{OPEN}{where}/no?[1-{CALLS}]") == {"403": CALLS}
        assert shop.codes(edge, "client", f"{OPEN}{where}/ok/never?[1-{CALLS}]") == {"403": CALLS}
        assert shop.codes(edge, "frontend", f"http://10.96.1.{12 if where else 11}{where}/ok") == {"403": 1}
    with shop.applied(edge, ONLY.format(account="frontend")):
        shop.takes(lambda: shop.codes(edge, "client", f"{OPEN}{where}/ok") == {"403": 1}, 5)
        assert shop.codes(edge, "client", f"{OPEN}{where}/ok?[1-{CALLS}]") == {"403": CALLS}
    shop.takes(lambda: shop.codes(edge, "client", f"{OPEN}{where}/no") == {"200": 1}, 5)


def test_tokens_are_looked_at_as_for_any_caller(edge: Lab) -> None:
    issuer, other = Issuer("https://one.test"), Issuer("https://one.test")
    rules = json.dumps([{"issuer": issuer.name, "jwks": issuer.jwks}])
    documents = f"""
apiVersion: meshagent.io/v1alpha1
kind: RequestAuthentication
metadata: {{name: tokens}}
spec: {{selector: {{matchLabels: {{app: echo}}}}, jwtRules: {rules}}}
---
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: must}}
spec:
  selector: {{matchLabels: {{app: echo}}}}
  rules: [{{from: [{{source: {{requestPrincipals: ["https://one.test/*"], principals: [mesh.local/ns/default/sa/edge]}}}}]}}]
"""
    with shop.applied(edge, documents):
        for where in ("", "/two"):
            url = f"{OPEN}{where}/"
            good = ("-H", f"authorization: Bearer {issuer.token()}")
            shop.takes(lambda url=url: shop.codes(edge, "client", url) == {"403": 1}, 10)  # type: ignore[misc]
            shop.takes(lambda url=url, good=good: shop.codes(edge, "client", url, *good) == {"200": 1}, 10)  # type: ignore[misc]
            assert shop.codes(edge, "client", f"{url}?[1-{CALLS}]", *good) == {"200": CALLS}
            assert shop.codes(edge, "client", f"{url}?[1-{CALLS}]") == {"403": CALLS}
            assert shop.codes(edge, "client", f"{url}?[1-{CALLS}]", "-H", f"authorization: Bearer {other.token()}") == {"401": CALLS}
    for where in ("", "/two"):
        shop.takes(lambda where=where: shop.codes(edge, "client", f"{OPEN}{where}/") == {"200": 1}, 5)  # type: ignore[misc]


def test_policies_of_the_gateway_itself_say_who_reaches_it(edge: Lab) -> None:
    def policy(rule: str) -> str:
        spec = f"{{selector: {{matchLabels: {{app: edge}}}}, action: DENY, rules: [{rule}]}}"
        return f"apiVersion: meshagent.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: gate}}\nspec: {spec}\n"

    with shop.applied(edge, policy("{from: [{source: {ipBlocks: [10.77.255.200/32]}}]}")):
        assert shop.codes(edge, "client", OPEN) == {"curl 7": 1}
        shop.takes(lambda: shop.codes(edge, "frontend", OPEN) == {"200": 1}, 5)
    with shop.applied(edge, policy("{to: [{operation: {paths: [/admin*]}}]}")):
        shop.takes(lambda: shop.codes(edge, "client", f"{OPEN}/admin") == {"403": 1}, 5)
        assert shop.codes(edge, "client", f"{OPEN}/two") == {"200": 1}
    shop.takes(lambda: shop.codes(edge, "client", OPEN) == {"200": 1}, 5)


SLOW = f"""
import socket, time
s = socket.create_connection(("{ADDRESS}", 8081), 30)
s.sendall(b"GET / HTTP/1.1\\r\\nHost: a\\r\\n")
began = time.monotonic()
print(s.recv(12).decode(), round(time.monotonic() - began))
"""


def test_slow_and_large_requests_are_sent_away_and_others_are_served(edge: Lab) -> None:
    slow = [edge.popen("client", [sys.executable, "-c", SLOW]) for _ in range(CALLS)]
    assert shop.codes(edge, "client", f"{OPEN}/?[1-{CALLS}]") == {"200": CALLS}
    assert shop.codes(edge, "client", OPEN, "-H", f"x: {'y' * (61 << 10)}") == {"431": 1}
    assert shop.codes(edge, "client", OPEN, *(part for n in range(120) for part in ("-H", f"h{n}: x"))) == {"431": 1}
    assert shop.codes(edge, "client", OPEN, "-H", "x_forwarded_for: 1") == {"400": 1}
    assert shop.codes(edge, "client", f"{OPEN}/a%2f..%2ftwo") == {"307": 1}
    for one in slow:
        status, seconds = one.communicate(timeout=30)[0].rsplit(maxsplit=1)
        assert status == "HTTP/1.1 408"
        assert int(seconds) <= 12


def test_conditions_say_what_is_served(edge: Lab) -> None:
    shown = edge.meshagent("get", "gateways", "web", "--controller", shop.CONTROLLER, "-o", "json", check=True).stdout
    document = json.loads(shown)
    (found,) = document if isinstance(document, list) else document.get("items", [document])
    assert {one["type"]: one["status"] for one in found["status"]["conditions"]} == {"Accepted": "True", "Programmed": "True"}
    assert {one["name"]: one["attachedRoutes"] for one in found["status"]["listeners"]} == {"shop": 2, "open": 2, "a": 1, "b": 1}
    assert [one["value"] for one in found["status"]["addresses"]] == [ADDRESS, ADDRESS6]


def test_an_agent_that_is_killed_and_starts_without_a_controller_loses_nothing(edge: Lab) -> None:
    with shop.loads(edge, ("client", OPEN), ("client", f"{OPEN}/two")) as found:
        time.sleep(0.5)  # ten calls before
        edge.controller_stop()
        try:
            killed = time.monotonic()
            edge.kill_agent("node-1")
            assert over_tls(edge, "a") == Counter({"200": 1})
            edge.start_agent("node-1")
            back = time.monotonic()
            assert over_tls(edge, "a") == over_tls(edge, "b") == Counter({"200": 1})
        finally:
            edge.controller_start()
    for calls in found:
        assert Counter((call.started > killed) + (call.started > back) for call in calls).keys() == {0, 1, 2}, "before, away and back"
        assert shop.outcomes(calls) == {"200": len(calls)}
    edge.settle()


def test_a_gateway_that_is_removed_closes_its_listeners(edge: Lab) -> None:
    with shop.changed(edge):
        shop.delete(edge, WEB.removesuffix("---"))
    try:
        shop.takes(lambda: shop.codes(edge, "client", OPEN) == {"curl 7": 1}, 10)
        assert over_tls(edge, "a") == Counter({"curl 7": 1})
        listening_on = subprocess.run(edge.command("edge", ["ss", "-Hltn"]), capture_output=True, text=True, check=True).stdout
        assert ":8081" not in listening_on
        assert not list(Path(paths.agent_run("node-1")).rglob("gateways.json"))
    finally:
        with shop.changed(edge):
            edge.apply(WEB.removesuffix("---"))
    shop.takes(lambda: shop.codes(edge, "client", OPEN) == {"200": 1}, 10)
    shop.takes(lambda: over_tls(edge, "b") == Counter({"200": 1}), 10)
