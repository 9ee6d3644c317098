"""Out of the mesh, with everything real: names, the waypoint, TLS, policy, and who may not go out at all. The outside is the lab's host `client`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from agent.names.records import nameservers
from lab.lab import Lab
from tests.kernel import shop
from tests.unit.agent.identity.signer import Root

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("names")]

OUT4, OUT6 = "10.77.255.200", "fd77:0:0:ff::200"
FRONTEND, OTHER, CART = "10.77.1.10", "10.77.1.50", "10.77.1.21"
NODE = "node-1"
# HTTP on 8080, HTTPS on 8443 (certificate of api and secure) and on 8444 (of somebody else), a server that speaks first on 9000, echo over UDP on 9001.
SERVER = """
import http.server, json, socket, ssl, sys, threading
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        said = json.dumps({"peer": self.client_address[0].removeprefix("::ffff:"), "host": self.headers["Host"]}).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(said))); self.end_headers(); self.wfile.write(said)
    do_POST = do_GET
    def log_message(self, *_): pass
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    def server_bind(self): self.socket.bind(self.server_address); self.server_name = "x"; self.server_port = 1
def run(port, pem=""):
    server = Server(("::", port), Handler)
    if pem:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); context.load_cert_chain(pem)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
run(8080); run(8443, sys.argv[1]); run(8444, sys.argv[2])
def greet():
    server = socket.create_server(("::", 9000), family=socket.AF_INET6, dualstack_ipv6=True)
    while True:
        with server.accept()[0] as c: c.sendall(b"hello\\n")
threading.Thread(target=greet, daemon=True).start()
echo = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); echo.bind(("", 9001))
print("ready", flush=True)
while True:
    data, peer = echo.recvfrom(100); echo.sendto(data, peer)
"""
# Answers A by a file of names, which is read anew for each question.
RESOLVER = """
import json, socket, struct, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind((sys.argv[1], 53)); print("ready", flush=True)
while True:
    query, client = s.recvfrom(4096)
    end, labels = 12, []
    while query[end]:
        labels.append(query[end + 1 : end + 1 + query[end]].decode()); end += 1 + query[end]
    kind, = struct.unpack("!H", query[end + 1 : end + 3])
    known = json.load(open(sys.argv[2]))
    address = known.get(".".join(labels).lower())
    record = b"\\xc0\\x0c" + struct.pack("!HHIH", 1, 1, 1, 4) + socket.inet_aton(address) if address and kind == 1 else b""
    s.sendto(query[:2] + struct.pack("!HHHHH", 0x8180 | (0 if address else 3), 1, 1 if record else 0, 0, 0) + query[12 : end + 5] + record, client)
"""
EXTERNALS = """
apiVersion: meshagent.io/v1alpha1
kind: ExternalService
metadata: {{name: api}}
spec:
  hosts: [api.example.com]
  ports:
    - {{port: 80, name: http, protocol: HTTP, targetPort: 8080}}
    - {{port: 443, name: tls, protocol: TLS, targetPort: 8443}}
    - {{port: 9000, name: tcp, protocol: TCP}}
---
apiVersion: meshagent.io/v1alpha1
kind: ExternalService
metadata: {{name: secure}}
spec:
  hosts: [secure.example.com]
  ports: [{{port: 80, protocol: HTTP, targetPort: 8443}}]
  tls: {{caCertificates: {roots}}}
---
apiVersion: meshagent.io/v1alpha1
kind: ExternalService
metadata: {{name: wrong}}
spec:
  hosts: [wrong.example.com, unknown.example.com]
  ports: [{{port: 80, protocol: HTTP, targetPort: 8444}}]
  tls: {{caCertificates: {roots}}}
---
apiVersion: meshagent.io/v1alpha1
kind: ExternalService
metadata: {{name: system}}
spec:
  hosts: [system.example.com]
  ports: [{{port: 80, protocol: HTTP, targetPort: 8443}}]
  tls: {{}}
---
apiVersion: meshagent.io/v1alpha1
kind: ExternalService
metadata: {{name: turncoat}}
spec:
  hosts: [turncoat.example.com]
  ports: [{{port: 80, protocol: HTTP, targetPort: 8080}}, {{port: 9000, protocol: TCP, targetPort: 8080}}]
---
apiVersion: meshagent.io/v1alpha1
kind: ExternalService
metadata: {{name: fixed}}
spec:
  hosts: [fixed.example.com]
  addresses: ["{out4}", "{out6}"]
  resolution: STATIC
  ports: [{{port: 9000, protocol: TCP}}]
"""
POLICY = """
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: out}}
spec:
  targetRefs: [{{group: meshagent.io, kind: ExternalService, name: {name}}}]
  rules: [{{from: [{{source: {{serviceAccounts: [frontend]}}}}]{to}}}]
"""
DENY = "apiVersion: v1\nkind: Namespace\nmetadata: {name: default, annotations: {meshagent.io/egress: deny}}\n"
HOSTS = ("api", "secure", "wrong", "system", "turncoat", "undeclared")


@pytest.fixture(scope="module")
def names(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The outside, a resolver on the node that knows it, and the ExternalServices; the resolver's file of names."""
    directory = tmp_path_factory.mktemp("egress")
    known = directory / "names.json"
    known.write_text(json.dumps({f"{host}.example.com": OUT4 for host in HOSTS}))
    root = Root()
    (directory / "root.pem").write_bytes(root.pem)
    for name, hosts in (("good", ("api", "secure", "system")), ("bad", ("somebody-else",))):
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = root.sign(key.public_key(), [x509.DNSName(f"{host}.example.com") for host in hosts])
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + leaf.public_bytes(Encoding.PEM)
        (directory / f"{name}.pem").write_bytes(pem)
    resolver = nameservers(Path("/etc/resolv.conf").read_text())[0]
    lab.exec(NODE, ["ip", "address", "add", f"{resolver}/32", "dev", "lo"])
    running = [
        lab.popen("client", [sys.executable, "-c", SERVER, str(directory / "good.pem"), str(directory / "bad.pem")]),
        lab.popen(NODE, [sys.executable, "-c", RESOLVER, resolver, str(known)]),
    ]
    try:
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", process.stderr and process.stderr.read()
        document = EXTERNALS.format(roots=json.dumps(root.pem.decode()), out4=OUT4, out6=OUT6)
        with shop.applied(lab, document):
            shop.takes(lambda: shop.codes(lab, "frontend", "http://api.example.com/") == {"200": 1}, 20)
            shop.takes(lambda: shop.codes(lab, "frontend", "http://secure.example.com/") == {"200": 1}, 20)
            yield known
    finally:
        for process in running:
            process.kill()
            process.communicate()
        lab.exec(NODE, ["ip", "address", "del", f"{resolver}/32", "dev", "lo"])


def says(lab: Lab, place: str, host: str, port: int = 9000) -> str:
    """What a server says to whoever connects: "hello", "" (closed), or why not."""
    code = (
        "import socket,sys,errno\n"
        "try:\n s=socket.create_connection((sys.argv[1],int(sys.argv[2])),5); print(s.recv(9).decode().strip())\n"
        "except OSError as e: print('' if e.errno==104 else errno.errorcode.get(e.errno,e))"
    )
    return lab.exec(place, ["python3", "-c", code, host, str(port)]).stdout.strip()


def test_a_workload_gets_out_by_name_under_its_own_address(lab: Lab) -> None:
    found = shop.get(lab, "frontend", "http://api.example.com/")
    assert (found["status"], found["peer"], found["host"]) == (200, FRONTEND, "api.example.com")
    address = lab.exec("frontend", ["getent", "ahostsv4", "api.example.com"]).stdout.split()[0]
    assert address.startswith("240.240.")
    assert shop.codes(lab, "frontend", f"http://{address}/") == {"421": 1}
    assert says(lab, "frontend", "api.example.com") == "hello"
    assert says(lab, "frontend", "api.example.com", 9001) == "ECONNREFUSED"


def test_an_ipv6_socket_gets_out_as_well(lab: Lab) -> None:
    assert shop.codes(lab, "frontend", "http://api.example.com/", "-6") == {"200": 1}


def test_the_waypoint_speaks_tls_and_takes_no_other_certificate(lab: Lab) -> None:
    found = shop.get(lab, "frontend", "http://secure.example.com/")
    assert (found["status"], found["host"]) == (200, "secure.example.com")
    assert shop.codes(lab, "frontend", "http://wrong.example.com/") == {"503": 1}
    assert shop.codes(lab, "frontend", "http://system.example.com/") == {"503": 1}, "the system does not trust this authority"


def test_tls_goes_through_for_the_declared_name_only(lab: Lab, names: Path) -> None:
    roots = str(names.parent / "root.pem")
    assert shop.codes(lab, "frontend", "https://api.example.com/", "--cacert", roots) == {"200": 1}
    address = lab.exec("frontend", ["getent", "ahostsv4", "api.example.com"]).stdout.split()[0]
    for host in ("secure.example.com", address):
        (outcome,) = shop.codes(lab, "frontend", f"https://{host}/", "-k", "--resolve", f"{host}:443:{address}")
        assert outcome == "curl 35", "closed in the handshake"


def test_policy_says_who_may_go_out(lab: Lab, names: Path) -> None:
    roots = str(names.parent / "root.pem")
    assert shop.codes(lab, "other", "http://api.example.com/") == {"200": 1}
    with shop.applied(lab, POLICY.format(name="api", to="")):
        shop.takes(lambda: shop.codes(lab, "other", "http://api.example.com/") == {"403": 1})
        shop.takes(lambda: says(lab, "other", "api.example.com") == "")
        assert shop.codes(lab, "other", "https://api.example.com/", "--cacert", roots) == {"curl 35": 1}
        assert shop.codes(lab, "frontend", "http://api.example.com/") == {"200": 1}
        assert shop.codes(lab, "frontend", "https://api.example.com/", "--cacert", roots) == {"200": 1}
        assert says(lab, "frontend", "api.example.com") == "hello"
        assert shop.plan(lab, NODE, "other", "api.example.com:80")["verdict"] == "DENY"
    shop.takes(lambda: shop.codes(lab, "other", "http://api.example.com/") == {"200": 1})


def test_policy_decides_requests(lab: Lab) -> None:
    with shop.applied(lab, POLICY.format(name="secure", to=", to: [{operation: {methods: [GET], paths: [/v1/*]}}]")):
        shop.takes(lambda: shop.codes(lab, "frontend", "http://secure.example.com/") == {"403": 1})
        assert shop.codes(lab, "frontend", "http://secure.example.com/v1/x") == {"200": 1}
        assert shop.codes(lab, "frontend", "http://secure.example.com/v1/x", "-d", "x") == {"403": 1}
        assert shop.codes(lab, "other", "http://secure.example.com/v1/x") == {"403": 1}


def test_a_fixed_address_is_recognised_by_whoever_dials_it(lab: Lab) -> None:
    with shop.applied(lab, POLICY.format(name="fixed", to="")):
        for address in (OUT4, OUT6):
            shop.takes(lambda address=address: says(lab, "other", address) == "")  # type: ignore[misc]
            assert says(lab, "frontend", address) == "hello"


def test_who_may_not_go_out_reaches_what_is_declared_and_nothing_else(lab: Lab) -> None:
    direct = f"http://{OUT4}:8080/"
    datagram = (
        f"import socket; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.settimeout(2); s.sendto(b'x',('{OUT4}',9001)); s.recv(9)"
    )
    assert shop.codes(lab, "frontend", direct) == {"200": 1}
    assert lab.exec("frontend", ["python3", "-c", datagram]).returncode == 0
    before = shop.samples(lab, NODE, "mesh_policy_verdicts_total", reason="egress")
    with shop.applied(lab, DENY):
        shop.takes(lambda: shop.codes(lab, "frontend", direct) == {"curl 7": 1})
        assert "PermissionError" in lab.exec("frontend", ["python3", "-c", datagram]).stderr
        found = lab.exec("frontend", ["getent", "ahostsv4", "undeclared.example.com"]).stdout.split()
        assert found[0] == OUT4, "names are still found"
        assert shop.codes(lab, "frontend", "http://undeclared.example.com:8080/") == {"curl 7": 1}
        assert shop.codes(lab, "frontend", "http://api.example.com/") == {"200": 1}
        assert says(lab, "frontend", "api.example.com") == "hello"
        assert shop.codes(lab, "frontend", "http://cart/items") == {"200": 1}
        assert shop.ping(lab, "frontend") == "PONG"
        assert shop.samples(lab, NODE, "mesh_policy_verdicts_total", reason="egress") > before
    shop.takes(lambda: shop.codes(lab, "frontend", direct) == {"200": 1})


@pytest.mark.parametrize("address", [CART, "127.0.0.1", "10.96.0.10", "169.254.169.254"], ids=["pod", "loopback", "service", "link-local"])
def test_a_name_that_begins_to_lead_inside_leads_nowhere(lab: Lab, names: Path, address: str) -> None:
    before = shop.answered(lab, "cart-v1-1")
    known = json.loads(names.read_text())
    try:
        names.write_text(json.dumps({**known, "turncoat.example.com": OUT4}))
        shop.takes(lambda: shop.codes(lab, "other", "http://turncoat.example.com/") == {"200": 1}, 15)
        denied = shop.samples(lab, NODE, "mesh_policy_verdicts_total", reason="egress")
        names.write_text(json.dumps({**known, "turncoat.example.com": address}))
        shop.takes(lambda: shop.codes(lab, "other", "http://turncoat.example.com/items") == {"503": 1}, 15)
        assert says(lab, "other", "turncoat.example.com") == ""
        assert shop.samples(lab, NODE, "mesh_policy_verdicts_total", reason="egress") > denied
        assert shop.answered(lab, "cart-v1-1")["GET /items 200"] == before["GET /items 200"]
    finally:
        names.write_text(json.dumps(known))


def test_without_envoy_nobody_gets_out_by_another_way(lab: Lab) -> None:
    with shop.applied(lab, POLICY.format(name="api", to="")):
        shop.takes(lambda: shop.codes(lab, "other", "http://api.example.com/") == {"403": 1})
        pid = shop.status(NODE)["waypoint"]["pid"]
        os.kill(pid, signal.SIGKILL)
        seen: Counter[str] = Counter()
        streams: Counter[str] = Counter()
        end = time.monotonic() + 20
        while time.monotonic() < end:
            seen += shop.codes(lab, "other", "http://api.example.com/")
            streams[says(lab, "other", "api.example.com")] += 1
            if shop.codes(lab, "frontend", "http://api.example.com/") == {"200": 1}:
                break
        else:
            pytest.fail("nobody gets out any more")
        assert "200" not in seen
        assert "hello" not in streams


def test_people_see_what_there_is(lab: Lab) -> None:
    run = lab.meshagent("get", "--controller", shop.CONTROLLER, "externalservices", check=True)
    assert "api" in run.stdout
    run = lab.meshagent("get", "--controller", shop.CONTROLLER, "externalservice", "api", "-o", "json", check=True)
    found = json.loads(run.stdout)
    (condition,) = found["status"]["conditions"]
    assert condition["message"].startswith("in force: api.example.com = 240.240.")
    plan = shop.plan(lab, NODE, "frontend", "api.example.com")
    assert (plan["verdict"], plan["level"], plan["reason"]) == ("ALLOW", "L7", "ExternalService default/api")
