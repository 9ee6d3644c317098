"""Who may ask for what, at real waypoints: paths, hosts, headers and tokens, from the same node, through a tunnel and from outside the mesh."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lab import paths, resources
from lab.lab import Lab
from lab.topology import CONTROLLER_ADDRESSES, Pod
from tests import tokens
from tests.kernel import shop
from tests.tokens import Issuer

pytestmark = pytest.mark.kernel

CLIENT = Path(__file__).with_name("authz_client.py")
PORT = 8080
# Reads a path as servlets do: parameters off, unescaped, slashes merged, dots resolved. `secret` says that /admin was reached.
SERVER = """
import http.server, json, re, socket, urllib.parse
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        length = self.headers.get("Content-Length")
        if self.headers.get("Transfer-Encoding"):
            while (size := int(self.rfile.readline().partition(b";")[0], 16)):
                self.rfile.read(size + 2)
            self.rfile.readline()
        self.rfile.read(int(length or 0))
        path = urllib.parse.urlsplit(self.path).path if "://" in self.path else self.path.partition("?")[0]
        out = []
        for part in urllib.parse.unquote(re.sub(";[^/]*", "", path)).replace(chr(92), "/").split("/"):
            if part == "..":
                out = out[:-1]
            elif part not in {"", "."}:
                out.append(part)
        host = (self.headers.get("Host") or "").lower()
        said = json.dumps({"path": self.path, "secret": out[:1] == ["admin"], "host": host,
                           "headers": {k.lower(): v for k, v in self.headers.items()}}).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(said))); self.end_headers(); self.wfile.write(said)
    do_POST = do_PUT = do_DELETE = do_GET
    def log_message(self, *_): pass
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    request_queue_size = 256
Server(("::", 8080), Handler).serve_forever()
"""
PODS = tuple(
    Pod(f"api-{node}", f"node-{node}", (f"10.77.{node}.70", f"fd77:0:0:{node}::70"), command=("python3", "-c", SERVER), ports=(PORT,),
        labels={"app": "api", "node": str(node)})
    for node in (1, 2)
)  # fmt: skip
SERVICE = """
apiVersion: v1
kind: Service
metadata: {{name: api-{n}}}
spec: {{clusterIP: 10.96.0.{host}, selector: {{app: api, node: '{n}'}}, ports: [{{name: http, port: 80, targetPort: 8080, appProtocol: http}}]}}
"""
POLICY = """
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: {name}{more}}}
spec: {{selector: {{matchLabels: {{app: api}}}}, action: {action}, rules: [{rules}]}}
"""
TOKENS = """
apiVersion: meshagent.io/v1alpha1
kind: RequestAuthentication
metadata: {{name: tokens}}
spec: {{selector: {{matchLabels: {{app: api}}}}, jwtRules: {rules}}}
"""


REFUSED = (403, 0, -1)
"""By the waypoint; by the kernel, which refuses or drops what no request can make good."""


class Way(NamedTuple):
    """A caller and what it dials."""

    caller: str
    host: str
    port: int


WAYS = {
    "same node": Way("frontend", "10.96.0.71", 80),
    "other node": Way("frontend", "10.96.0.72", 80),
    "pod address": Way("frontend", "10.77.1.70", PORT),
    "outside": Way("client", "10.77.1.70", PORT),
}


def policy(name: str, action: str, *rules: str, annotations: str = "") -> str:
    return POLICY.format(name=name, action=action, rules=", ".join(rules), more=f", annotations: {{{annotations}}}" if annotations else "")


def raw(lab: Lab, way: Way, *requests: bytes) -> list[dict[str, Any]]:
    """Send each on a connection of its own."""
    asked = [{"host": way.host, "port": way.port, "hex": request.hex()} for request in requests]
    run = lab.exec(way.caller, ["python3", str(CLIENT)], input=json.dumps(asked), timeout=100)
    assert run.returncode == 0, run.stderr
    found: list[dict[str, Any]] = json.loads(run.stdout)
    return found


def get(target: str, **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in {"host": "api", **headers}.items())
    return f"GET {target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1")


def statuses(lab: Lab, way: Way, requests: Sequence[bytes]) -> list[int]:
    return [answer["status"] for answer in raw(lab, way, *requests)]


@pytest.fixture(scope="module", autouse=True)
def api(lab: Lab) -> Iterator[None]:
    """A service on each node that would serve anything."""
    documents = [SERVICE.format(n=n, host=70 + n) for n in (1, 2)]
    for pod in PODS:
        lab.add_pod(pod)
        documents.append(str(resources.workload(pod)))
    with shop.applied(lab, "\n---\n".join(documents)):
        shop.takes(lambda: all(statuses(lab, way, [get("/")]) == [200] for way in WAYS.values()))
        yield


@contextlib.contextmanager
def enforced(lab: Lab, *documents: str) -> Iterator[None]:
    """These are in force at every waypoint, which a last policy shows: nothing gets to /probe any more."""
    probe = policy("probe", "DENY", "{to: [{operation: {paths: [/probe]}}]}")
    with shop.applied(lab, "\n---\n".join([*documents, probe])):
        shop.takes(lambda: all(statuses(lab, way, [get("/probe")])[0] in REFUSED for way in WAYS.values()))
        yield


EVASIONS = (
    "/admin", "/admin/x", "//admin", "///admin//x", "/./admin", "/x/../admin", "/x/%2e%2e/admin", "/x/%2E%2e/admin", "/%2e/admin", "/%61dmin",
    "/%61%64%6D%69%6e",
    "/x%2fadmin", "/x%2F..%2fadmin", "/%2fadmin", "/..%5cadmin", "/%5Cadmin", "/\\admin", "/x\\..\\admin", "/admin;x", "/admin;x=1/y", "/;x/admin", "/;/admin",
    "/x/..;/admin", "/x/..;a=b/admin", "/x/..%3b/admin", "/x/y/..%3b/..%3b/admin", "/.%3bx/admin", "/.;/admin", "/x;a/../admin",
    "/admin%00", "/%00/admin", "/admin#x", "/admin?x",
    "/admin%3bx", "/admin%3Fx",
    "http://api/admin",
    "http://api//admin", "http://other/admin;x", "/%2561dmin", "/%252e%252e/admin", "/admin%20", "/admin%09", "/a/b/../../admin", "/../admin", "*",
)  # fmt: skip


def test_no_spelling_of_a_path_evades_a_deny_in_any_direction(lab: Lab) -> None:
    others = {"/admin%3Fx", "/%2561dmin", "/admin%20", "/admin%09", "/%252e%252e/admin"}
    with enforced(lab, policy("no-admin", "DENY", '{to: [{operation: {paths: [/admin, "/admin/*"]}}]}')):
        for way in WAYS.values():
            answers = raw(lab, way, *(get(target) for target in EVASIONS), get("/shop;x=1"), get("/ADMIN"))
            found = dict(zip(EVASIONS, answers, strict=False))
            assert {target for target, answer in found.items() if answer["body"].get("secret")} == set()
            assert {answer["status"] for answer in found.values()} <= {200, 307, 400, 403}
            assert {target for target, answer in found.items() if answer["status"] == 200} == others, "which are other paths"
            assert [answer["status"] for answer in answers[-2:]] == [200, 200]


KEPT = """
import http.client, sys
connections = [http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=10) for _ in range(8)]
for line in sys.stdin:
    for connection in connections:
        connection.request("GET", line.strip())
        answer = connection.getresponse()
        answer.read()
        print(answer.status, end=" ")
    print(flush=True)
"""


@pytest.mark.parametrize("way", ["outside"])
def test_connections_that_were_kept_from_a_policys_time_do_not_go_on_to_enforce_it(lab: Lab, way: str) -> None:
    """Neither the caller's nor those of the waypoint: the receiver's listener has gone and drains, whoever is connected to it."""

    def ask(target: str) -> list[str]:
        assert kept.stdin is not None
        assert kept.stdout is not None
        kept.stdin.write(f"{target}\n")
        kept.stdin.flush()
        return kept.stdout.readline().split()

    with contextlib.ExitStack() as stack:
        with enforced(lab, policy("no-admin", "DENY", "{to: [{operation: {paths: [/admin]}}]}")):
            argv = lab.command(WAYS[way].caller, ["python3", "-c", KEPT, WAYS[way].host, str(WAYS[way].port)])
            kept = stack.enter_context(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            stack.callback(kept.kill)
            assert ask("/") == ["200"] * 8
            assert ask("/admin") == ["403"] * 8
            assert ask("/") == ["200"] * 8
        shop.takes(lambda: statuses(lab, WAYS[way], [get("/admin")]) == [200])
        assert ask("/admin") == ["200"] * 8
        assert ask("/admin") == ["200"] * 8


def test_an_allow_is_not_stretched_by_parameters(lab: Lab) -> None:
    with enforced(lab, policy("only", "ALLOW", '{to: [{operation: {paths: ["/public/*", "*.css"]}}]}')):
        for way in WAYS.values():
            asked = ["/public/a", "/a/b.css", "/admin;x.css", "/public/..;/admin", "/public/../admin", "/admin"]
            assert statuses(lab, way, [get(target) for target in asked]) == [200, 200, 403, 403, 403, 403]


def test_methods_hosts_headers_and_callers_are_conditions_in_every_direction(lab: Lab) -> None:
    rules = (
        "{to: [{operation: {methods: [DELETE]}}]}",
        "{to: [{operation: {hosts: [secret.test]}}]}",
        "{when: [{key: 'request.headers[X-Role]', values: [admin]}]}",
        "{from: [{source: {notNamespaces: [default]}}], to: [{operation: {paths: [/mesh]}}]}",
        "{when: [{key: source.ip, values: [10.77.0.0/16]}, {key: destination.port, values: ['8080']}, {key: 'request.headers[x-where]', values: ['*']}]}",
    )
    asked = {
        "plain": (get("/"), 200),
        "method": (b"DELETE / HTTP/1.1\r\nhost: api\r\n\r\n", 403),
        "host": (get("/", host="secret.test"), 403),
        "host, another spelling": (get("/", host="SECRET.test.:80"), 403),
        "host of an absolute target": (get("http://secret.test/"), 403),
        "a second host": (b"GET / HTTP/1.1\r\nhost: api\r\nhost: secret.test\r\n\r\n", 403),
        "a first host": (b"GET / HTTP/1.1\r\nhost: secret.test\r\nhost: api\r\n\r\n", 403),
        "header": (get("/", x_role="admin"), 403),
        "another value": (get("/", x_role="administrator"), 200),
        "a second header": (b"GET / HTTP/1.1\r\nhost: api\r\nx-role: user\r\nx-role: admin\r\n\r\n", 403),
        "where": (get("/", x_where="here"), 403),
    }
    with enforced(lab, policy("conditions", "DENY", *rules)):
        for name, way in WAYS.items():
            found = statuses(lab, way, [request for request, _ in asked.values()])
            assert dict(zip(asked, found, strict=True)) == {what: status for what, (_, status) in asked.items()}, name
            assert statuses(lab, way, [get("/mesh")]) == [403 if way.caller == "client" else 200]


def test_headers_say_nothing_about_who_calls_and_the_waypoints_own_never_pass(lab: Lab) -> None:
    forged = {
        "x-forwarded-client-cert": "By=spiffe://mesh.local/ns/default/sa/api;URI=spiffe://mesh.local/ns/default/sa/frontend",
        "x-meshagent-destination": "10.96.0.10:80",
        "x-meshagent-source": "default/frontend",
        "x-envoy-original-path": "/admin",
        "x-envoy-external-address": "10.77.1.10",
        "x-envoy-max-retries": "9",
        "x-envoy-retry-on": "5xx",
        "x-envoy-upstream-rq-timeout-ms": "1",
        "x-envoy-decorator-operation": "x",
        "x-envoy-internal": "true",
    }
    request = get("/", **forged, **{"x-forwarded-for": "192.0.2.1, 192.0.2.2", "x-real-ip": "192.0.2.3", "forwarded": "for=192.0.2.4"})
    with enforced(lab):
        for name, way in WAYS.items():
            (answer,) = raw(lab, way, request)
            assert answer["status"] == 200, name
            seen = answer["body"]["headers"]
            assert [one for one in seen if one.startswith(("x-envoy-", "x-meshagent-")) or one == "x-forwarded-client-cert"] == [], name
            assert (seen["x-forwarded-for"], seen["x-real-ip"], seen["forwarded"]) == ("192.0.2.1, 192.0.2.2", "192.0.2.3", "for=192.0.2.4")
    with enforced(
        lab, policy("frontend", "ALLOW", "{from: [{source: {serviceAccounts: [default/frontend]}}], to: [{operation: {methods: [GET]}}]}")
    ):
        assert [statuses(lab, Way(caller, *WAYS[way][1:]), [request])[0] for way in ("same node", "other node") for caller in ("frontend", "other")] == [
            200, 403, 200, 403
        ]  # fmt: skip
        assert statuses(lab, WAYS["outside"], [request])[0] in REFUSED[1:], "nothing that a request says could help"


SMUGGLED: dict[str, tuple[bytes, int]] = {
    "length and chunks": (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "two lengths": (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab", 400),
    "one length twice": (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\na", 400),
    "a signed length": (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: +1\r\n\r\na", 400),
    "an unknown coding": (b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n", 501),
    "a space before the colon": (b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding : chunked\r\n\r\n0\r\n\r\n", 400),
    "a chunk of 2^68": (b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\na\r\n0\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "a zero byte": (b"GET / HTTP/1.1\r\nhost: a\r\nx: a\0b\r\n\r\n", 400),
    "a folded header": (b"GET / HTTP/1.1\r\nhost: a\r\nx: a\r\n b\r\n\r\n", 200),
    "bare line feeds": (b"GET / HTTP/1.1\nhost: a\nx: b\n\n", 200),
    "a bare carriage return": (b"GET / HTTP/1.1\r\nhost: a\r\nx: a\rx-role: admin\r\n\r\n", 200),
    "a large header": (b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 70000 + b"\r\n\r\n", 431),
    "many headers": (b"GET / HTTP/1.1\r\nhost: a\r\n" + b"".join(b"x%d: a\r\n" % n for n in range(150)) + b"\r\n", 431),
    "no HTTP": (b"\x16\x03\x01\x00\xa5\x01\r\n\r\n", 400),
    "half of a request": (b"GET / HTTP/1.1\r\nhost: a\r\n", -1),
}


def test_requests_that_could_be_read_in_two_ways_have_one_outcome(lab: Lab) -> None:
    with enforced(lab):
        for name, way in WAYS.items():
            answers = dict(zip(SMUGGLED, raw(lab, way, *(request for request, _ in SMUGGLED.values())), strict=True))
            assert {what: answer["status"] for what, answer in answers.items()} == {
                what: status for what, (_, status) in SMUGGLED.items()
            }, name
            assert answers["a folded header"]["body"]["headers"]["x"] == "a b"
            assert "x-role" not in answers["a bare carriage return"]["body"]["headers"]


ONE, TWO = Issuer("https://one.test"), Issuer("two@test", algorithm="RS256")
MUST = policy("must", "ALLOW", "{from: [{source: {requestPrincipals: ['*']}}]}")


def inline(*issuers: Issuer, **more: object) -> str:
    return TOKENS.format(rules=json.dumps([{"issuer": issuer.name, "jwks": issuer.jwks, **more} for issuer in issuers]))


def bearer(token: str) -> bytes:
    return get("/", authorization=f"Bearer {token}")


def test_tokens_are_verified_in_every_direction_and_policies_see_what_they_say(lab: Lab) -> None:
    good = ONE.token(aud="shop", groups=["staff"])
    cases = {
        "none": (get("/"), 403),
        "good": (bearer(good), 200),
        "the other issuer's": (bearer(TWO.token(aud="shop", groups=["staff"])), 200),
        "another group": (bearer(ONE.token(aud="shop", groups=["guest"])), 403),
        "expired": (bearer(ONE.token(aud="shop", lifetime_s=-120)), 401),
        "another audience": (bearer(ONE.token(aud="bank")), 403),
        "another issuer": (bearer(Issuer("https://evil.test").token(aud="shop")), 401),
        "another key": (bearer(Issuer(ONE.name).token(aud="shop")), 401),
        "no signature": (bearer(tokens.unsigned(good)), 401),
        "tampered": (bearer(tokens.tampered(good, groups=["root"])), 401),
        "garbage": (bearer("x.y.z"), 401),
        "oversized": (bearer("x" * 70000), 431),
    }
    staff = policy(
        "staff",
        "ALLOW",
        "{from: [{source: {requestPrincipals: ['https://one.test/*', 'two@test/tom']}}],"
        " when: [{key: 'request.auth.claims[groups]', values: [staff]}, {key: request.auth.audiences, values: [shop]}]}",
    )
    with enforced(lab, inline(ONE, TWO, audiences=["shop"], outputPayloadToHeader="x-payload"), staff):
        for name, way in WAYS.items():
            answers = raw(lab, way, *(request for request, _ in cases.values()))
            found = {what: answer["status"] for what, answer in zip(cases, answers, strict=True)}
            assert found == {what: status for what, (_, status) in cases.items()}, name
            seen = answers[1]["body"]["headers"]
            assert ("authorization" in seen, seen["x-payload"]) == (False, good.split(".")[1]), "the last waypoint takes the token away"
        assert {condition["status"] for condition in conditions(lab)} == {"True"}
    (answer,) = raw(lab, WAYS["same node"], get("/", authorization="Bearer x.y.z"))
    assert answer["status"] == 200, "gone"


def test_keys_are_rotated_while_requests_run(lab: Lab) -> None:
    old, new = Issuer("https://one.test", kid="old"), Issuer("https://one.test", kid="new")
    both = TOKENS.format(rules=json.dumps([{"issuer": old.name, "jwks": json.dumps({"keys": [old.jwk, new.jwk]})}]))
    with enforced(lab, inline(old), MUST):
        found: Counter[str] = Counter()
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                token = f"authorization: Bearer {current[0].token()}"
                found.update(shop.codes(lab, "frontend", "http://10.96.0.71/?[1-23]", "-H", token))
                found.update(shop.codes(lab, "frontend", "http://10.96.0.72/?[1-23]", "-H", token))
                rounds[0] += 1

        current, rounds = [old], [0]
        thread = threading.Thread(target=ask)
        thread.start()
        try:
            with shop.changed(lab):
                lab.apply(both)
            shop.takes(lambda: all(statuses(lab, way, [bearer(new.token())]) == [200] for way in WAYS.values()))
            current[0], seen = new, rounds[0]
            shop.takes(lambda: rounds[0] > seen + 1, 20)  # those with the old key have ended
            with shop.changed(lab):
                lab.apply(inline(new))
            shop.takes(lambda: all(statuses(lab, way, [bearer(old.token())]) == [401] for way in WAYS.values()))
        finally:
            stop.set()
            thread.join()
    assert set(found) == {"200"}, found
    assert found["200"] > 46


ISSUER_SERVER = """
import http.server, ssl, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content = open(sys.argv[1], "rb").read()
        if not content:
            self.send_response(302); self.send_header("Location", "file:///etc/passwd"); self.end_headers(); return
        self.send_response(200); self.send_header("Content-Length", str(len(content))); self.end_headers(); self.wfile.write(content)
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer((sys.argv[2], 8443), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); context.load_cert_chain(sys.argv[3], sys.argv[4])
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


def test_keys_come_from_the_issuers_server_and_the_last_good_ones_stay(lab: Lab, tmp_path: Path) -> None:
    issuer, published = Issuer("https://one.test", kid="a"), tmp_path / "jwks"
    published.write_text(issuer.jwks)
    address = CONTROLLER_ADDRESSES[0]
    uri = f"https://{address}:8443/keys"
    argv = ["ip", "netns", "exec", paths.CONTROLLER_NETNS, "python3", "-c", ISSUER_SERVER, str(published), address]
    with subprocess.Popen([*argv, str(paths.PKI / "controller.crt"), str(paths.PKI / "controller.key")]) as server:
        try:
            with enforced(lab, TOKENS.format(rules=json.dumps([{"issuer": issuer.name, "jwksUri": uri}])), MUST):
                shop.takes(lambda: statuses(lab, WAYS["other node"], [bearer(issuer.token())]) == [200], 15)
                before = issuer.token()
                issuer.rotate("b")
                published.write_text(issuer.jwks)
                shop.takes(lambda: statuses(lab, WAYS["other node"], [bearer(before), bearer(issuer.token())]) == [401, 200], 15)
                published.write_text("")
                shop.takes(lambda: "redirects are not followed" in authentication_problem(lab), 15)
                assert statuses(lab, WAYS["other node"], [bearer(issuer.token())]) == [200]
                server.kill()
                lab.controller_stop()
                lab.controller_start()
                shop.takes(lambda: "Connection refused" in authentication_problem(lab), 15)
                assert statuses(lab, WAYS["other node"], [bearer(issuer.token()), bearer(before)]) == [200, 401], "kept over a restart"
        finally:
            server.kill()


def conditions(lab: Lab) -> list[dict[str, str]]:
    """Of all RequestAuthentications; none as long as a controller that has just started does not answer yet."""
    run = lab.meshagent("get", "--controller", shop.CONTROLLER, "requestauthentication", "-o", "json")
    found = json.loads(run.stdout) if run.returncode == 0 else {"items": []}
    return [condition for item in found.get("items", [found]) for condition in item["status"]["conditions"]]


def authentication_problem(lab: Lab) -> str:
    return "; ".join(condition["message"] for condition in conditions(lab) if condition["type"] == "KeysCurrent")


def test_an_audit_counts_and_tells_and_never_denies(lab: Lab) -> None:
    rule = "{to: [{operation: {paths: [/audited]}}], when: [{key: 'request.headers[x-a]', values: ['1']}]}"
    dry = policy("dry", "DENY", "{to: [{operation: {paths: [/dry]}}]}", annotations='meshagent.io/dry-run: "true"')
    with enforced(lab, policy("watch", "AUDIT", rule), dry):
        before = audited(lab)
        for way in WAYS.values():
            asked = [get("/audited?token=secret", x_a="1"), get("/audited", x_a="1"), get("/audited"), get("/dry")]
            assert statuses(lab, way, asked) == [200] * len(asked)
        # At the caller's waypoint; through the tunnel again at the other node's; the caller from outside only at the receiver's.
        shop.takes(lambda: Counter(audited(lab)) - Counter(before) == {
            ("node-1", "default/watch[0]", "outbound"): 6, ("node-1", "default/watch[0]", "inbound"): 2, ("node-2", "default/watch[0]", "inbound"): 2,
            ("node-1", "default/dry[0]", "outbound"): 3, ("node-1", "default/dry[0]", "inbound"): 1, ("node-2", "default/dry[0]", "inbound"): 1,
        })  # fmt: skip
    log = paths.log("agent-node-1").read_text()
    lines = [json.loads(line) for line in log.splitlines() if "enforcing would deny" in line]
    assert {line["rule"] for line in lines} >= {"default/watch[0]", "default/dry[0]"}
    assert {line["path"] for line in lines} == {"/audited", "/dry"}, "without the query"


def audited(lab: Lab) -> dict[tuple[str, str, str], int]:
    """Requests by (node, rule, side)."""
    return {
        (node.name, sample.labels["rule"], sample.labels["side"]): int(sample.value)
        for node in lab.topology.nodes
        for family in text_string_to_metric_families(lab.metrics(node.name))
        for sample in family.samples
        if sample.name == "mesh_policy_audit_requests_total"
    }
