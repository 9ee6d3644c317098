"""What people speak over HTTP, through the waypoint and as if it were not there: to a pod of the caller's node, and through a tunnel to another's."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lab import resources
from lab.lab import Lab
from lab.topology import Pod
from tests.kernel import shop, speaker
from tests.kernel.test_hbone import GRPC_CLIENT, GRPC_SERVER

pytestmark = pytest.mark.kernel

SPEAKER = Path(speaker.__file__)
NODES = (1, 2)
UNARY = """
import grpc, sys
with grpc.insecure_channel(sys.argv[1]) as channel:
    print(b"".join(channel.stream_stream("/any/Echo")(iter([b"one", b"two"]), timeout=10)).decode(), end="")
"""
EXTENDED = """
import socket, sys
import hpack, hyperframe.frame as frames
method = (sys.argv[3:] or ["CONNECT"])[0]
head = [(":method", method), (":scheme", "http"), (":path", sys.argv[2]), (":authority", "cart")]
if method == "CONNECT":
    head.insert(1, (":protocol", "bytestream"))
request = frames.HeadersFrame(1, hpack.Encoder().encode(head), flags=["END_HEADERS"] + ["END_STREAM"] * (method == "GET"))
with socket.create_connection((sys.argv[1], 80), timeout=10) as connection, connection.makefile("rb") as reader:
    connection.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + frames.SettingsFrame().serialize() + request.serialize())
    while start := reader.read(9):
        frame, length = frames.Frame.parse_frame_header(memoryview(start))
        frame.parse_body(memoryview(reader.read(length)))
        if isinstance(frame, frames.HeadersFrame):
            sys.exit(print(dict(hpack.Decoder().decode(frame.data))[":status"]))
        if isinstance(frame, frames.RstStreamFrame):
            sys.exit(print("reset"))
print("closed")
"""
TLS = """
import http.server, socket, ssl, sys
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
server = Server(("::", 8443), http.server.SimpleHTTPRequestHandler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1])
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""
SERVICE = """
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  clusterIPs: ["10.96.0.{host}", "fd96::{host}"]
  ipFamilyPolicy: RequireDualStack
  selector: {{app: {name}}}
  ports: {ports}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: {name}}}
spec:
  parentRefs: [{{group: "", kind: Service, name: {name}}}]
  rules: [{{backendRefs: [{{name: {name}, port: {first}}}]}}]
"""
SPEAKER_PORTS = "[{name: main, port: 80, targetPort: 8080, appProtocol: http}, {name: other, port: 81, targetPort: 8080}]"
GRPC_PORTS = (
    "[{name: grpc-main, port: 50051, targetPort: 50051}, {name: other, port: 50052, targetPort: 50051}, "
    "{name: third, port: 50053, targetPort: 50051, appProtocol: kubernetes.io/h2c}]"
)


def pod(name: str, node: int, host: int, *command: str, port: int) -> Pod:
    return Pod(
        name, f"node-{node}", (f"10.77.{node}.{host}", f"fd77:0:0:{node}::{host}"), command=command, ports=(port,), labels={"app": name}
    )


@pytest.fixture(scope="module", autouse=True)
def _speakers(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Services with one pod each, near and far from the frontend, all with a route for every port."""
    certificate = tmp_path_factory.mktemp("tls") / "cert.pem"
    lab_certificate(certificate)
    documents, pods = [], []
    for node in NODES:
        pods += [
            pod(f"speaker-{node}", node, 80, "python3", str(SPEAKER), "serve", port=speaker.PORT),
            pod(f"grpc-{node}", node, 81, sys.executable, "-c", GRPC_SERVER, port=50051),
        ]
        documents.append(SERVICE.format(name=f"speaker-{node}", host=80 + node, ports=SPEAKER_PORTS, first=80))
        documents.append(SERVICE.format(name=f"grpc-{node}", host=84 + node, ports=GRPC_PORTS, first=50051))
    pods.append(pod("tls", 2, 82, "python3", "-c", TLS, str(certificate), port=8443))
    documents.append(SERVICE.format(name="tls", host=88, ports="[{name: https, port: 443, targetPort: 8443}]", first=443))
    for one in pods:
        lab.add_pod(one)
        documents.append(str(resources.workload(one)))
    with shop.applied(lab, "\n---\n".join(documents)):
        for node in NODES:
            shop.takes(lambda node=node: shop.codes(lab, "frontend", f"http://speaker-{node}/plain") == {"200": 1})  # type: ignore[misc]
        yield


def lab_certificate(path: Path) -> None:
    """A certificate that nobody vouches for, with its key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.timezone.utc)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tls")])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - dt.timedelta(hours=1), now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))


def said(lab: Lab, node: int, client: str, *more: str, port: int = 80) -> dict[str, Any]:
    """What a client of `speaker` saw, in the frontend's pod."""
    run = lab.exec("frontend", ["python3", str(SPEAKER), client, f"10.96.0.{80 + node}", str(port), *more], timeout=60)
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout))


@pytest.mark.parametrize("node", NODES)
def test_events_of_a_server_come_one_by_one(lab: Lab, node: int) -> None:
    seen = said(lab, node, "events")
    assert (seen["status"], seen["type"]) == ("HTTP/1.1 200 OK", "text/event-stream")
    assert seen["at"][-1] >= (speaker.EVENTS - 1) * speaker.PAUSE_S * 0.8, "not all at once at the end"


def test_an_answer_may_take_longer_than_envoys_defaults(lab: Lab) -> None:
    seen = said(lab, 2, "poll")
    assert (seen["status"], seen["seconds"] > speaker.POLL_S) == ("HTTP/1.1 200 OK", True)


@pytest.mark.parametrize("client", ["upload", "download"])
@pytest.mark.parametrize("node", NODES)
def test_64_mebibytes_arrive_whole(lab: Lab, node: int, client: str) -> None:
    whole = hashlib.sha256(speaker.PIECE * (speaker.SIZE // len(speaker.PIECE))).hexdigest()
    seen = said(lab, node, client)
    assert (seen["length"], seen["sha256"]) == (speaker.SIZE, whole)


@pytest.mark.parametrize("node", NODES)
def test_trailers_go_both_ways(lab: Lab, node: int) -> None:
    seen = said(lab, node, "chunks")
    assert (seen["length"], seen["trailers"]) == (5, {"x-sum": "23"})
    assert "x-digest: abc" in said(lab, node, "trailers")["rest"]


@pytest.mark.parametrize("node", NODES)
def test_the_application_says_whether_it_wants_a_body(lab: Lab, node: int) -> None:
    seen = said(lab, node, "expect")
    assert (seen["first"], seen["then"]) == ("HTTP/1.1 100 Continue", "HTTP/1.1 200 OK")
    assert seen["held"] >= speaker.HELD_S * 0.9, "its own answer, not the waypoint's"
    assert said(lab, node, "refused")["first"] == "HTTP/1.1 417 Expectation Failed"


@pytest.mark.parametrize("node", NODES)
def test_a_websocket_carries_bytes_both_ways_at_a_time(lab: Lab, node: int) -> None:
    seen = said(lab, node, "upgrade")
    assert seen == {"status": "HTTP/1.1 101 Switching Protocols", "upgrade": "websocket", "same": True}


@pytest.mark.parametrize("port", [80, 81])
@pytest.mark.parametrize("node", NODES)
def test_a_proxy_may_be_a_backend(lab: Lab, node: int, port: int) -> None:
    seen = said(lab, node, "connect", port=port)
    assert seen == {"status": "HTTP/1.1 200 OK", "asked": "example.test:443", "same": True}


def test_connect_leads_past_no_policy(lab: Lab) -> None:
    """The cart's rules are about paths. Also as HTTP/2 spells it, with a path that is allowed (RFC 8441, 4)."""
    run = lab.exec("frontend", ["python3", str(SPEAKER), "refusal", "10.96.0.10", "80"], timeout=20)
    assert json.loads(run.stdout)["status"].split()[1] in {"403", "404"}, run
    stream = lab.exec("frontend", [sys.executable, "-c", EXTENDED, "10.96.0.10", "/items"], timeout=20)
    assert stream.stdout.strip() in {"403", "404", "reset", "closed"}, stream
    plain = lab.exec("frontend", [sys.executable, "-c", EXTENDED, "10.96.0.10", "/items", "GET"], timeout=20)
    assert plain.stdout.strip() == "200", "the client works"


@pytest.mark.parametrize("port", [80, 81])
def test_http_1_0_without_a_host_is_answered(lab: Lab, port: int) -> None:
    seen = said(lab, 1, "old", port=port)
    assert (seen["status"].split()[1], json.loads(seen["body"])["version"]) == ("200", "HTTP/1.1")


@pytest.mark.parametrize("port", [50051, 50052, 50053], ids=["by-name", "not-declared", "by-appprotocol"])
@pytest.mark.parametrize("node", NODES)
def test_grpc_is_understood_whether_it_is_declared_or_not(lab: Lab, node: int, port: int) -> None:
    address = f"10.96.0.{84 + node}:{port}"
    short = lab.exec("frontend", [sys.executable, "-c", UNARY, address], timeout=20)
    assert short.stdout == "onetwo", short.stderr
    stream = lab.exec("frontend", [sys.executable, "-c", GRPC_CLIENT, address], timeout=20)
    assert stream.stdout.strip() == "all StatusCode.OK", stream.stderr


def test_tls_of_the_application_passes_untouched(lab: Lab) -> None:
    """A route for every port leaves a port alone whose name says that it speaks TLS."""
    seen = lab.exec(
        "frontend", ["curl", "-sSko", "/dev/null", "-w", "%{http_code} %{ssl_verify_result} %{errormsg}", "https://10.96.0.88/"]
    )
    assert seen.stdout.split()[0] == "200", seen
    ask = "import ssl; print(ssl.get_server_certificate(('10.96.0.88', 443)))"
    given = lab.exec("frontend", ["python3", "-c", ask]).stdout
    assert b"tls" in ssl.PEM_cert_to_DER_cert(given)
