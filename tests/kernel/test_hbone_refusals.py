"""Tunnels and a peer that is not ours: whoever dials a workload's port 15008, whoever answers our callers there, and where private keys are.

The peer is `tests.hbone`, which speaks as ztunnel does, on the host outside of the mesh. Its certificates are signed with the key of the mesh's own authority,
which no attacker has: what they prove is what the receiver makes of them. Each refusal has its exact form; no application hears of one, and after each
the node is as it was.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import datetime as dt
import functools
import json
import os
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier

from agent import netns
from agent.config import HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT, TUNNEL_PORT
from agent.l7.hbone import HANDSHAKE_S
from controller.identity import keys
from controller.identity.directory import Directory
from lab import mesh, paths
from lab.lab import Lab
from tests import hbone
from tests.kernel import shop

pytestmark = pytest.mark.kernel

T = TypeVar("T")
ACCOUNT = "spiffe://mesh.local/ns/default/sa/"
OTHER, OTHER6, REDIS, CART = "10.77.1.50", "fd77:0:0:1::50", "10.77.1.40", "10.77.2.23"
FAR, FAR6 = "10.77.255.200", "fd77:0:0:ff::200"
BOTH = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
ECHO, LATE, FIRST, OVER = PORTS = (9000, 9001, 9002, 9003)
"""Ports of an application that echoes, answers after FIN, speaks first and then echoes, or speaks first, sends FIN and goes on to listen."""
GREETING = b"220 ready\r\n"
SLOW = 200
NOT_HERE = (400, "not-this-workload", b"")
RESET = (0, "Reset PROTOCOL_ERROR", b"")

FAR_WORKLOAD = f"""
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {{name: far, namespace: default, labels: {{app: far, networking.istio.io/tunnel: http}}}}
spec: {{node: node-3, addresses: ["{FAR}", "{FAR6}"], serviceAccount: far, networkNamespace: nowhere}}
"""
"""Of a node that has no agent: there the peer plays the receiver."""
FAR_WITHOUT = FAR_WORKLOAD.replace(", networking.istio.io/tunnel: http", "")
FAR_STRICT = """
apiVersion: meshagent.io/v1alpha1
kind: PeerAuthentication
metadata: {name: far}
spec: {selector: {matchLabels: {app: far}}, mtls: {mode: STRICT}}
"""
NOBODY_ON_ECHO = f"""
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: nobody-on-echo}}
spec:
  selector: {{matchLabels: {{app: other}}}}
  action: DENY
  rules: [{{to: [{{operation: {{ports: ["{ECHO}"]}}}}]}}]
"""
FRONTEND_NOT_ON_ECHO = f"""
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: frontend-not-on-echo}}
spec:
  selector: {{matchLabels: {{app: other}}}}
  action: DENY
  rules: [{{from: [{{source: {{serviceAccounts: [default/frontend]}}}}], to: [{{operation: {{ports: ["{ECHO}"]}}}}]}}]
"""
NO_SECRETS_ON_ECHO = f"""
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: no-secrets-on-echo}}
spec:
  selector: {{matchLabels: {{app: other}}}}
  action: DENY
  rules: [{{to: [{{operation: {{ports: ["{ECHO}"], paths: ["/secret*"]}}}}]}}]
"""
CALLS = f"""
import json, socket, sys
address, port, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
held, found = [], []
for i in range(number):
    call = socket.create_connection((address, port), 10)
    held.append(call)
    text, heard = b"%d" % i * 1000, b""
    try:
        if port == {OVER}:
            while data := call.recv(65536):
                heard += data
        call.sendall(text)
        if port == {ECHO}:
            while len(heard) < len(text) and (data := call.recv(65536)):
                heard += data
        call.shutdown(socket.SHUT_WR)
        while data := call.recv(65536):
            heard += data
    except OSError:
        if heard:
            raise
    found.append("echo" if heard == text else heard.decode() or "closed")  # by FIN or RST, or one after the other
print(json.dumps(found))
"""
HOLDS = """
import socket, sys
held = []
for i in range(int(sys.argv[3])):
    call = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
    held.append(call)
    call.sendall(b"x")
    assert call.recv(1) == b"x"
print("held", flush=True)
sys.stdin.read()
"""
DIALS = """
import socket, ssl, sys
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
context.set_alpn_protocols(["h2"])
try:
    with socket.create_connection((sys.argv[1], 15008), 10) as sock, context.wrap_socket(sock) as tls:
        print("bytes" if tls.recv(1) else "closed")
except ssl.SSLError as error:
    print((error.reason or "").partition("ALERT_")[2] or "closed")
except ConnectionError:
    print("closed")
"""
TALKS = """
import socket, sys, threading
call = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
call.settimeout(None)
def hear():
    try:
        while data := call.recv(65536):
            print(data.decode(), flush=True)
    except OSError:
        pass
    print("closed", flush=True)
threading.Thread(target=hear, daemon=True).start()
call.sendall(b"x")
for line in sys.stdin:
    call.sendall(line.strip().encode())
"""
OWN_KEY = """
import sys
sys.path = [path for path in sys.path if "dist-packages" not in path]
from spiffe import WorkloadApiClient
with WorkloadApiClient("unix:" + sys.argv[1]) as client:
    print(client.fetch_x509_svid(timeout=20).private_key.private_numbers().private_value)
"""


@dataclasses.dataclass(frozen=True)
class Authority:
    """Signs anything. `roots`: what its clients believe."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    roots: bytes

    def leaf(
        self,
        *uris: str,
        begins: float = -300,
        ends: float = 3600,
        purposes: Sequence[ObjectIdentifier] = BOTH,
        below: bytes = b"",
        own: ec.EllipticCurvePrivateKey | None = None,
    ) -> hbone.Identity:
        """A certificate with these names; times are seconds from now; `below` is what follows it in the chain."""
        own, now = own or ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.timezone.utc)
        builder = (
            x509.CertificateBuilder(self.certificate.subject, x509.Name([]), own.public_key(), x509.random_serial_number())
            .not_valid_before(now + dt.timedelta(seconds=begins))
            .not_valid_after(now + dt.timedelta(seconds=ends))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(True, *[False] * 8), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if purposes:
            builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        if uris:
            names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
            builder = builder.add_extension(names, critical=True)
        pem = builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)
        return hbone.Identity(pem + below, own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), self.roots)

    def svid(self, account: str) -> hbone.Identity:
        """What the mesh gives a workload."""
        return self.leaf(ACCOUNT + account)

    def double(self) -> Authority:
        """Another authority under the same name."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = x509.CertificateBuilder(
            self.certificate.issuer, self.certificate.subject, key.public_key(), x509.random_serial_number(),
            self.certificate.not_valid_before_utc, self.certificate.not_valid_after_utc,
        )  # fmt: skip
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        return Authority(builder.sign(key, hashes.SHA256()), key, self.roots)

    def below(self, identity: hbone.Identity) -> Authority:
        """A workload that signs for others."""
        key = ec.generate_private_key(ec.SECP256R1())
        return Authority(x509.load_pem_x509_certificate(self.leaf(*names_of(identity), own=key).chain), key, self.roots)


def names_of(identity: hbone.Identity) -> list[str]:
    return hbone.spiffe_ids(x509.load_pem_x509_certificate(identity.chain))


class Application(socketserver.ThreadingTCPServer):
    """A program of a pod, in a thread of this process: what it does depends on its port."""

    address_family = socket.AF_INET6  # and IPv4
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int) -> None:
        super().__init__(("::", port), _Conversation)
        self.callers: list[str] = []
        self.heard: list[bytes] = []
        """What came on connections that are over."""


class _Conversation(socketserver.BaseRequestHandler):
    server: Application

    def handle(self) -> None:
        port, heard = self.server.server_address[1], b""
        self.server.callers.append(str(self.client_address[0]).removeprefix("::ffff:"))
        with contextlib.suppress(OSError):
            if port in {FIRST, OVER}:
                self.request.sendall(GREETING)
            if port == OVER:
                self.request.shutdown(socket.SHUT_WR)
            while data := self.request.recv(65536):
                heard += data
                if port in {ECHO, FIRST}:
                    self.request.sendall(data)
            if port == LATE:
                self.request.sendall(heard)
        self.server.heard.append(heard)


@contextlib.contextmanager
def applications(namespace: Path) -> Iterator[dict[int, Application]]:
    """One for each of `PORTS` in a namespace."""
    with contextlib.ExitStack() as stack:
        found = {}
        for port in PORTS:
            found[port] = application = stack.enter_context(netns.run_in(namespace, functools.partial(Application, port)))
            thread = threading.Thread(target=application.serve_forever, args=(0.05,), name=f"application-{port}")
            thread.start()
            stack.callback(thread.join)
            stack.callback(application.shutdown)
        yield found


@dataclasses.dataclass(frozen=True)
class Peer:
    """ztunnel on the host outside."""

    lab: Lab
    authority: Authority
    pod: dict[int, Application]
    """The applications of the pod `other`."""

    @property
    def place(self) -> Path:
        """The namespace that it dials from."""
        return self.lab.netns("client")

    def svid(self, account: str) -> hbone.Identity:
        """A good certificate."""
        return self.authority.svid(account)

    def run(self, work: Callable[[hbone.Tunnel], Awaitable[T]], to: str = OTHER, identity: hbone.Identity | None = None) -> T:
        """Do something with a tunnel."""

        async def scenario() -> T:
            async with hbone.Tunnel.connect((to, HBONE_PORT), identity or self.svid("frontend"), (), self.place) as tunnel:
                return await asyncio.wait_for(work(tunnel), 20)

        return asyncio.run(scenario())

    def ask(
        self,
        target: str,
        send: bytes = b"ping",
        *,
        to: str = OTHER,
        identity: hbone.Identity | None = None,
        headers: hbone.Headers = (),
        pseudo: hbone.Headers | None = None,
    ) -> tuple[int, str, bytes]:
        """One tunnelled connection, FIN after what is sent: status (0: none), reason if it is not 200, and all that was received."""

        async def work(tunnel: hbone.Tunnel) -> tuple[int, str, bytes]:
            stream = await tunnel.open(target, headers, pseudo=pseudo)
            if stream.status == 200:
                await stream.write(send)
                await stream.half_close()
            received = await stream.read_all()
            return stream.status, dict(stream.headers).get("x-meshagent-reason", ""), received if stream.status == 200 else b""

        try:
            return self.run(work, to, identity)
        except (hbone.Reset, hbone.Lost) as error:
            return 0, f"{type(error).__name__} {error}", b""

    def request(self, method: str, path: str, identity: hbone.Identity, *headers: str) -> str:
        """The status line of an HTTP request to cart-v2-1 through a tunnel."""
        text = "\r\n".join([f"{method} {path} HTTP/1.1", "Host: cart", "Content-Length: 0", *headers, "", ""])

        async def work(tunnel: hbone.Tunnel) -> str:
            stream = await tunnel.open(f"{CART}:8080")
            assert stream.status == 200
            await stream.write(text.encode())  # without FIN, which Envoy takes for the end of whoever asks
            return (await stream.read()).decode().partition("\r\n")[0]

        return self.run(work, CART, identity)

    def dial(self, address: str = OTHER, port: int = HBONE_PORT, place: str = "client") -> socket.socket:
        """A bare connection."""
        return netns.run_in(self.lab.netns(place), lambda: socket.create_connection((address, port), 10))

    def handshake(self, identity: hbone.Identity, *, context: ssl.SSLContext | None = None) -> str:
        """The alert that ends a TLS handshake, which nothing follows: RST, for what was not read, would overtake the alert."""
        try:
            with self.dial() as sock, (context or identity.context(server=False)).wrap_socket(sock) as tls:
                return "bytes" if tls.recv(1) else "closed"
        except TimeoutError:
            return "accepted"
        except ssl.SSLError as error:
            return (error.reason or "").partition("ALERT_")[2] or str(error)

    def raw(self, data: bytes, identity: hbone.Identity | None = None) -> bytes:
        """What comes back, until the other side closes, to bytes that are sent as they are, or inside TLS."""
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(self.dial())
            if identity is not None:
                sock = stack.enter_context(identity.context(server=False).wrap_socket(sock))
            sock.settimeout(HANDSHAKE_S + 20)
            found = b""
            with contextlib.suppress(ConnectionError):
                sock.sendall(data)
                while received := sock.recv(65536):
                    found += received
            return found

    def calls(self) -> int:
        """How many connections the pod's applications have had."""
        return sum(len(application.callers) for application in self.pod.values())

    def works(self) -> bool:
        """Does a good client get its echo?"""
        return self.ask(f"{OTHER}:{ECHO}") == (200, "", b"ping")


@pytest.fixture(scope="module")
def peer(lab: Lab) -> Iterator[Peer]:
    held = keys.load(Directory(paths.CA))
    assert held is not None
    root = held.root("signing")
    assert root is not None
    authority = Authority(root.certificate, root.key, root.certificate.public_bytes(Encoding.PEM))
    with applications(lab.netns("other")) as pod:
        found = Peer(lab, authority, pod)

        def served() -> bool:
            with contextlib.suppress(OSError, hbone.Lost):
                return found.works()
            return False

        shop.takes(served, 20)
        yield found


def health(lab: Lab) -> dict[str, tuple[int, int]]:
    """The agent and the Envoy of each node, which have no problem: what must be the same afterwards."""
    found = {}
    for node in lab.topology.nodes:
        status = shop.status(node.name)
        assert (status["ready"], status["problems"]) == (True, [])
        found[node.name] = lab.agent_pid(node.name), int(status["waypoint"]["pid"])
    return found


@pytest.fixture(autouse=True)
def unharmed(peer: Peer) -> Iterator[None]:
    """After whatever a test does the node serves a good client and is as it was."""
    before = health(peer.lab)
    yield
    assert peer.works()
    assert health(peer.lab) == before


# A client of another implementation: what it gets.


@pytest.mark.parametrize("address", [OTHER, OTHER6])
def test_a_ztunnel_with_a_certificate_of_the_mesh_is_served(peer: Peer, address: str) -> None:
    async def work(tunnel: hbone.Tunnel) -> None:
        assert (tunnel.peer, tunnel.alpn, tunnel.version) == (f"{ACCOUNT}other", "h2", "TLSv1.3")
        streams = [await tunnel.open(hbone_authority(address, ECHO), hbone.request_headers("10.0.0.1:4")) for _ in range(20)]
        await streams[7].reset()
        for number, stream in enumerate(streams):
            if stream is streams[7]:
                continue
            await stream.write(b"%d" % number * 100_000)
            await stream.half_close()
        found = await asyncio.gather(*[stream.read_all() for stream in streams if stream is not streams[7]])
        assert found == [b"%d" % number * 100_000 for number in range(20) if number != 7]

    peer.run(work, address)
    assert set(peer.pod[ECHO].callers) <= {OTHER, OTHER6}, "the application sees its own pod"


def test_the_client_may_close_its_half_first_and_the_application_may_speak_first(peer: Peer) -> None:
    assert peer.ask(f"{OTHER}:{LATE}", b"late" * 1000) == (200, "", b"late" * 1000)

    async def work(tunnel: hbone.Tunnel) -> tuple[bytes, bytes]:
        stream = await tunnel.open(f"{OTHER}:{FIRST}")
        greeting = await stream.read()
        await stream.write(b"EHLO")
        await stream.half_close()
        return greeting, await stream.read_all()

    assert peer.run(work) == (GREETING, b"EHLO")


def test_when_the_application_closes_its_half_all_that_it_sent_arrives_and_the_other_half_ends_too(peer: Peer) -> None:
    """ztunnel would go on. Envoy cannot: what ends a response before its request resets it, and what CONNECT leads to does so by itself
    (source/extensions/upstreams/http/tcp/upstream_request.cc, force_reset_on_upstream_half_close_).
    """

    async def work(tunnel: hbone.Tunnel) -> tuple[bytes, bool]:
        stream = await tunnel.open(f"{OTHER}:{OVER}")
        greeting = await stream.read_all()
        await tunnel.ping()
        return greeting, stream.reset_code == 0

    before = len(peer.pod[OVER].heard)
    assert peer.run(work) == (GREETING, True)
    shop.takes(lambda: peer.pod[OVER].heard[before:] == [b""])


def test_an_application_that_is_not_there_is_503(peer: Peer) -> None:
    assert peer.ask(f"{OTHER}:1") == (503, "backend-connection-failed", b"")


# Certificates.


def strangers(authority: Authority) -> dict[str, tuple[hbone.Identity, str]]:
    """Identities that nobody may have, and the alert for each."""
    name, good = f"{ACCOUNT}frontend", authority.svid("frontend")
    key = ec.generate_private_key(ec.SECP256R1())
    alone = Authority(authority.certificate, key, authority.roots)
    workload = authority.below(good)
    return {
        "none": (dataclasses.replace(good, chain=b""), "CERTIFICATE_REQUIRED"),
        "self-signed": (alone.leaf(name, own=key), "UNKNOWN_CA"),
        "another authority of the same name": (authority.double().svid("frontend"), "UNKNOWN_CA"),
        "signed by a workload": (workload.leaf(name, below=workload.certificate.public_bytes(Encoding.PEM)), "UNKNOWN_CA"),
        "expired": (authority.leaf(name, begins=-7200, ends=-3600), "CERTIFICATE_EXPIRED"),
        "not yet valid": (authority.leaf(name, begins=3600, ends=7200), "CERTIFICATE_EXPIRED"),
        "for servers only": (authority.leaf(name, purposes=BOTH[:1]), "UNSUPPORTED_CERTIFICATE"),
        "another trust domain": (authority.leaf("spiffe://mesh.evil/ns/default/sa/frontend"), "CERTIFICATE_UNKNOWN"),
        "a trust domain that begins alike": (authority.leaf("spiffe://mesh.local.evil/ns/default/sa/frontend"), "CERTIFICATE_UNKNOWN"),
        "a trust domain that fits as a pattern": (authority.leaf("spiffe://mesh-local/ns/default/sa/frontend"), "CERTIFICATE_UNKNOWN"),
        "no name": (authority.leaf(), "CERTIFICATE_UNKNOWN"),
        "no SPIFFE ID": (authority.leaf("https://mesh.local/ns/default/sa/frontend"), "CERTIFICATE_UNKNOWN"),
        "a node": (authority.leaf("spiffe://mesh.local/meshagent/node/node-1"), "CERTIFICATE_UNKNOWN"),
        "the trust domain itself": (authority.leaf("spiffe://mesh.local"), "CERTIFICATE_UNKNOWN"),
        "no service account": (authority.leaf("spiffe://mesh.local/ns/default"), "CERTIFICATE_UNKNOWN"),
        "another form": (authority.leaf("spiffe://mesh.local/ns/default/frontend"), "CERTIFICATE_UNKNOWN"),
        "more than a service account": (authority.leaf(f"{name}/x"), "CERTIFICATE_UNKNOWN"),
        "empty parts": (authority.leaf("spiffe://mesh.local/ns//sa/"), "CERTIFICATE_UNKNOWN"),
        "two names in one": (authority.leaf(f"{ACCOUNT}other,{name}"), "CERTIFICATE_UNKNOWN"),
    }


def test_whoever_cannot_prove_to_be_a_workload_of_the_mesh_gets_the_alert_that_says_why(peer: Peer) -> None:
    before = peer.calls()
    cases = strangers(peer.authority)
    assert {name: peer.handshake(identity) for name, (identity, _) in cases.items()} == {name: alert for name, (_, alert) in cases.items()}
    for identity, _ in cases.values():
        with pytest.raises((hbone.Lost, OSError)):
            peer.run(lambda tunnel: tunnel.open(f"{OTHER}:{ECHO}"), identity=identity)
    assert peer.calls() == before


def test_an_older_tls_is_refused(peer: Peer) -> None:
    good = peer.svid("frontend")
    context = good.context(server=False)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert peer.handshake(good, context=context) == "PROTOCOL_VERSION"


def test_a_valid_certificate_opens_what_a_policy_allows_its_owner_and_nothing_else(peer: Peer) -> None:
    ping = b"PING\r\nQUIT\r\n"
    target = f"{REDIS}:6379"
    for account, answer in (("frontend", (200, "", b"+PONG\r\n+OK\r\n")), ("other", (403, "authorization-policy", b""))):
        assert peer.ask(target, ping, to=REDIS, identity=peer.svid(account)) == answer
    assert peer.ask(f"{REDIS}:6380", ping, to=REDIS) == (403, "authorization-policy", b"")
    elsewhere = peer.authority.leaf("spiffe://mesh.local/ns/shop/sa/frontend")
    assert peer.ask(target, ping, to=REDIS, identity=elsewhere) == (403, "authorization-policy", b"")


def test_a_policy_of_requests_holds_inside_of_the_tunnel(peer: Peer) -> None:
    before = shop.answered(peer.lab, "cart-v2-1")
    frontend, other = peer.svid("frontend"), peer.svid("other")
    assert peer.request("GET", "/items", frontend) == "HTTP/1.1 200 OK"
    for method, path, identity in (("POST", "/items", frontend), ("GET", "/admin/counters", frontend), ("GET", "/items", other)):
        assert peer.request(method, path, identity) == "HTTP/1.1 403 Forbidden"
    assert shop.answered(peer.lab, "cart-v2-1") - before == Counter(
        {"GET /items 200": 1, "GET /admin/counters 200": 1}
    )  # the latter is `answered`


def test_what_a_client_says_of_itself_changes_nothing(peer: Peer) -> None:
    lies = [
        *hbone.request_headers("10.77.1.10:40000", "redis.default.svc.cluster.local", name="frontend"),
        ("x-forwarded-client-cert", f"By={ACCOUNT}redis;URI={ACCOUNT}frontend"),
        ("x-forwarded-for", "10.77.1.10"),
        ("x-meshagent-destination", f"{REDIS}:6379"),
        ("x-envoy-original-dst-host", f"{REDIS}:6379"),
        ("x-istio-source", "frontend"),
    ]
    target = f"{REDIS}:6379"
    other = peer.svid("other")
    assert peer.ask(target, b"PING\r\n", to=REDIS, identity=other, headers=lies) == (403, "authorization-policy", b"")
    assert peer.ask(f"{OTHER}:{ECHO}", identity=other, headers=lies) == (200, "", b"ping")
    inside = [f"{name}: {value}" for name, value in lies]
    assert peer.request("GET", "/items", other, *inside) == "HTTP/1.1 403 Forbidden"
    assert peer.request("GET", "/items", peer.svid("frontend"), *inside) == "HTTP/1.1 200 OK"


# Targets.


@pytest.mark.parametrize(
    ("target", "answer"),
    [
        *(
            (target, NOT_HERE)
            for target in (
                "10.77.1.51:9000", f"{REDIS}:6379", "127.0.0.1:9000", "0.0.0.0:9000", "[::1]:9000", f"[::ffff:{OTHER}]:9000", "localhost:9000",
                "other:9000", "other.default.svc.cluster.local:9000", f"{OTHER}.evil:9000", "010.77.1.50:9000", OTHER, f"{OTHER}:", f"{OTHER}:0",
                f"{OTHER}:x", f"{OTHER}:0x2328", f"{OTHER}:9000:80", f"{OTHER}:09000", f"{OTHER}:+9000", f"{OTHER}:-9000", f"{OTHER6}:9000",
                "[fd77::1:0:0:0:50]:9000", f"{'a' * 300}:9000",
            )
        ),
        *((target, RESET) for target in ("", f"{OTHER}:9000/x", f"{OTHER}:9000@{OTHER}:9000", f"{OTHER}: 9000", f"{OTHER}:9000 ")),
        (f"{OTHER}:99999", (503, "no-ready-backend", b"")),
    ],
)  # fmt: skip
def test_a_tunnel_ends_at_an_address_of_its_workload_and_a_port_in_plain_digits(
    peer: Peer, target: str, answer: tuple[int, str, bytes]
) -> None:
    before = peer.calls()
    assert peer.ask(target) == answer
    assert peer.calls() == before


@pytest.mark.parametrize("port", [HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT, TUNNEL_PORT])
def test_a_tunnel_leads_to_no_port_of_the_waypoint_itself(peer: Peer, port: int) -> None:
    """To 15008 it would be a tunnel in a tunnel, whose caller has the workload's own address."""
    for to in (OTHER, CART, REDIS):
        assert peer.ask(f"{to}:{port}", to=to) == NOT_HERE
        assert peer.ask(f"{to}:0{port}", to=to) == NOT_HERE
    assert peer.ask(f"[{OTHER6}]:{port}", to=OTHER6) == NOT_HERE


def test_a_port_that_is_spelled_otherwise_evades_no_policy(peer: Peer) -> None:
    secret = b"GET /secret HTTP/1.1\r\nHost: other\r\n\r\n"

    async def inside(tunnel: hbone.Tunnel) -> bytes:
        stream = await tunnel.open(f"{OTHER}:{ECHO}")
        await stream.write(secret)
        return await stream.read()

    for policy in (NOBODY_ON_ECHO, NO_SECRETS_ON_ECHO):
        with shop.applied(peer.lab, policy):
            if policy is NOBODY_ON_ECHO:
                shop.takes(lambda: peer.ask(f"{OTHER}:{ECHO}")[0] == 403)
            else:
                shop.takes(lambda: peer.run(inside).startswith(b"HTTP/1.1 403"))
            before = len(peer.pod[ECHO].callers)
            for spelled in ("09000", "+9000", "0009000"):
                assert peer.ask(f"{OTHER}:{spelled}", secret) == NOT_HERE
            assert len(peer.pod[ECHO].callers) == before
    shop.takes(peer.works)


# HTTP/2 and TLS.


PLAIN = [(":scheme", "http"), (":authority", f"{OTHER}:{ECHO}"), (":path", "/")]


@pytest.mark.parametrize(
    ("pseudo", "answer"),
    [
        ([(":method", "GET"), *PLAIN], NOT_HERE),
        ([(":method", "POST"), *PLAIN], NOT_HERE),
        ([(":method", "CONNECT"), *PLAIN], RESET),
        ([(":method", "CONNECT")], RESET),
        ([(":method", "CONNECT"), (":protocol", "websocket"), *PLAIN], (403, "authorization-policy", b"")),
        ([(":method", "CONNECT"), (":protocol", "connect-udp"), *PLAIN], (404, "", b"")),
    ],
)
def test_what_is_no_connect_reaches_nothing(peer: Peer, pseudo: hbone.Headers, answer: tuple[int, str, bytes]) -> None:
    before = peer.calls()
    assert peer.ask("", pseudo=pseudo) == answer
    assert peer.calls() == before


def test_nonsense_in_one_stream_leaves_the_others_alone(peer: Peer) -> None:
    async def work(tunnel: hbone.Tunnel) -> bytes:
        stream = await tunnel.open(f"{OTHER}:{ECHO}")
        for headers, target in (([("x-large", "x" * 1000)] * 100, f"{OTHER}:{ECHO}"), ([], ""), ([], f"{OTHER}:9000/x")):
            with pytest.raises(hbone.Reset):
                await tunnel.open(target, headers)
        await stream.write(b"unharmed")
        await stream.half_close()
        return await stream.read_all()

    assert peer.run(work) == b"unharmed"


def test_headers_of_100_kilobytes_are_refused(peer: Peer) -> None:
    before = peer.calls()
    assert peer.ask(f"{OTHER}:{ECHO}", headers=[(f"x-{number}", "x" * 1000) for number in range(100)]) == (0, "Reset INTERNAL_ERROR", b"")
    status, how, _ = peer.ask(f"{OTHER}:{ECHO}", headers=[("x-large", "x" * 100_000)])
    assert (status, how in {"Lost GOAWAY COMPRESSION_ERROR", "Lost closed"}) == (0, True)  # RST may overtake the GOAWAY
    assert peer.calls() == before
    assert peer.ask(f"{OTHER}:{ECHO}", headers=[(f"x-{number}", "x" * 1000) for number in range(50)]) == (200, "", b"ping")


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"\x00\xffgarbage" * 100, b"\x15\x03\x01\x00\x02\x02\x46"),  # alert protocol_version
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), b"\x15\x03\x01\x00\x02\x02\x46"),
        (b"GET / HTTP/1.1\r\nHost: other\r\n\r\n", b""),
        (b"CONNECT 10.77.1.50:9000 HTTP/1.1\r\nHost: 10.77.1.50:9000\r\n\r\n", b""),
    ],
)
def test_what_is_no_tls_is_closed(peer: Peer, sent: bytes, answer: bytes) -> None:
    before = peer.calls()
    assert answer.startswith(peer.raw(sent))  # RST may overtake the alert: what was sent has not been read
    assert peer.calls() == before


@pytest.mark.parametrize("sent", [b"\x00\xffgarbage" * 100, b"CONNECT 10.77.1.50:9000 HTTP/1.1\r\nHost: 10.77.1.50:9000\r\n\r\n"])
def test_what_is_no_http2_inside_of_tls_is_closed_without_a_byte(peer: Peer, sent: bytes) -> None:
    before = peer.calls()
    assert peer.raw(sent, peer.svid("frontend")) == b""
    assert peer.calls() == before


def test_slow_handshakes_keep_nobody_waiting_and_are_closed(peer: Peer) -> None:
    good = peer.svid("frontend")
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    half = good.context(server=False).wrap_bio(incoming, outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        half.do_handshake()
    hello = outgoing.read()
    with contextlib.ExitStack() as stack:
        begun = time.monotonic()
        slow = [stack.enter_context(peer.dial()) for _ in range(SLOW)]
        for number, sock in enumerate(slow):
            sock.sendall([b"", hello[:10], hello][number % 3])
            sock.settimeout(HANDSHAKE_S + 20)
        asked = time.monotonic()
        assert peer.works()
        assert time.monotonic() - asked < 2
        for sock in slow:
            while sock.recv(65536):
                pass
        assert time.monotonic() - begun > HANDSHAKE_S - 1


@pytest.mark.parametrize("port", [TUNNEL_PORT, OUTBOUND_PORT, INBOUND_PORT])
def test_the_waypoints_other_ports_are_open_to_nobody(peer: Peer, port: int) -> None:
    for place in ("client", "node-1", "frontend", "other"):
        for address in (OTHER, OTHER6, CART):
            with pytest.raises(ConnectionRefusedError), peer.dial(address, port, place):
                pass


def test_a_process_of_the_mesh_gets_no_further_by_dialling_the_port_itself(peer: Peer) -> None:
    """From the same node it meets the listener; from another one a tunnel takes it there, which leads to no port of the waypoint."""
    before = peer.calls()
    for pod, outcome in (("frontend", "CERTIFICATE_REQUIRED"), ("cart-v2-1", "closed")):
        assert peer.lab.exec(pod, ["python3", "-c", DIALS, OTHER], check=True).stdout.strip() == outcome
    assert peer.calls() == before


# A receiver of another implementation: what our callers make of it.


async def call(peer: Peer, pod: str, address: str, port: int, number: int = 1) -> list[str]:
    """What became of a pod's connections, one after the other: "echo" if all went well, what was heard, or "closed"."""
    command = ["python3", "-c", CALLS, address, str(port), str(number)]
    run = await asyncio.to_thread(lambda: peer.lab.exec(pod, command, check=True, timeout=60))
    found: list[str] = json.loads(run.stdout)
    return found


@pytest.fixture(scope="module")
def far(peer: Peer) -> Iterator[dict[int, Application]]:
    """A workload of a node without an agent: its applications. Returns when the mesh knows it."""
    with applications(peer.place) as found:
        with shop.changed(peer.lab):
            peer.lab.apply(FAR_WORKLOAD)

        async def tunnelled() -> None:
            async with receiver(peer) as server:
                while {seen.peer for seen in server.tunnels} < {f"{ACCOUNT}frontend", f"{ACCOUNT}other"}:
                    for pod in ("frontend", "other"):
                        await call(peer, pod, FAR, ECHO)

        asyncio.run(asyncio.wait_for(tunnelled(), 30))
        yield found
        with shop.changed(peer.lab):
            shop.delete(peer.lab, FAR_WORKLOAD)


def receiver(peer: Peer, identity: hbone.Identity | None = None, **options: Any) -> hbone.Server:
    """ztunnel of that node."""
    return hbone.Server(identity or peer.svid("far"), (FAR, HBONE_PORT), namespace=peer.place, **options)


def hbone_authority(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@pytest.mark.parametrize("pod", ["frontend", "other"])
def test_a_tunnel_of_ours_reaches_a_ztunnel_as_its_caller(peer: Peer, far: dict[int, Application], pod: str) -> None:
    before = {port: len(application.callers) for port, application in far.items()}
    heard = len(far[OVER].heard)

    async def scenario() -> hbone.Server:
        async with receiver(peer) as server:
            assert await call(peer, pod, FAR, ECHO) == ["echo"]
            assert await call(peer, pod, FAR, LATE) == ["echo"]
            assert await call(peer, pod, FAR, OVER) == [GREETING.decode()], "it listens on, to what is sent then"
            # The caller is gone once its bytes are in its own socket: the tunnel must last until they are at the other end.
            await asyncio.to_thread(shop.takes, lambda: far[OVER].heard[heard:])
        return server

    server = asyncio.run(scenario())
    assert server.failures == []
    assert {(seen.peer, seen.alpn, seen.tls, seen.sni) for seen in server.tunnels} == {(f"{ACCOUNT}{pod}", "h2", "TLSv1.3", None)}
    assert {seen.source.partition(":")[0] for seen in server.tunnels} == {peer.lab.topology.pod(pod).addresses[0]}
    asked = [request for seen in server.tunnels for request in seen.requests]
    assert all(request.pseudo[0] == (":method", "CONNECT") and len(request.pseudo) == 2 for request in asked)
    assert sorted(request.pseudo[1] for request in asked) == [(":authority", f"{FAR}:{port}") for port in (ECHO, LATE, OVER)]
    for port in (ECHO, LATE, OVER):
        assert far[port].callers[before[port] :] == [FAR], "from the receiver, and nothing beside the tunnel"
    assert far[OVER].heard[heard:] == [b"0" * 1000]


def test_connections_of_one_caller_share_tunnels_and_those_of_two_do_not(peer: Peer, far: dict[int, Application]) -> None:
    assert far

    async def scenario() -> hbone.Server:
        async with receiver(peer) as server:
            held = []
            for pod in ("frontend", "other"):
                process = await asyncio.create_subprocess_exec(
                    *peer.lab.command(pod, ["python3", "-c", HOLDS, FAR, str(ECHO), "20"]),
                    stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                )  # fmt: skip
                held.append(process)
                assert process.stdout is not None
                assert await asyncio.wait_for(process.stdout.readline(), 20) == b"held\n"
            for process in held:
                await process.communicate(b"")
        return server

    server = asyncio.run(scenario())
    for pod in ("frontend", "other"):
        tunnels = [len(seen.requests) for seen in server.tunnels if seen.peer == f"{ACCOUNT}{pod}"]
        assert sum(tunnels) == 20
        assert len(tunnels) <= 4, "one for each worker of Envoy, and another one if two come at once"


def test_who_is_not_the_workload_that_was_dialled_gets_no_byte(peer: Peer, far: dict[int, Application]) -> None:
    cases = {name: case for name, case in strangers(peer.authority).items() if name not in {"none", "for servers only"}}
    cases["another workload"] = (peer.svid("other"), "CERTIFICATE_UNKNOWN")
    cases["for clients only"] = (peer.authority.leaf(f"{ACCOUNT}far", purposes=BOTH[1:]), "UNSUPPORTED_CERTIFICATE")
    before = len(far[ECHO].callers)

    async def scenario() -> dict[str, tuple[list[str], set[str], int]]:
        found = {}
        for name, (identity, _) in cases.items():
            async with receiver(peer, identity) as server:
                outcome = await call(peer, "frontend", FAR, ECHO)
            found[name] = outcome, {failure.partition("ALERT_")[2] for failure in server.failures}, len(server.tunnels)
        return found

    assert asyncio.run(scenario()) == {name: (["closed"], {alert}, 0) for name, (_, alert) in cases.items()}
    assert len(far[ECHO].callers) == before


def test_what_the_receiver_refuses_is_closed(peer: Peer, far: dict[int, Application]) -> None:
    before = len(far[ECHO].callers)

    async def scenario() -> list[int]:
        async with receiver(peer, allow=lambda caller, _: caller != f"{ACCOUNT}other") as server:
            assert await call(peer, "other", FAR, ECHO) == ["closed"]
            assert await call(peer, "frontend", FAR, ECHO) == ["echo"]
            assert await call(peer, "frontend", FAR, 1) == ["closed"]
        assert await call(peer, "frontend", FAR, ECHO) == ["closed"], "nobody there: not in plaintext instead"
        return [request.status for seen in server.tunnels for request in seen.requests]

    assert set(asyncio.run(scenario())) == {401, 200, 503}
    assert len(far[ECHO].callers) == before + 1


def test_a_node_without_tunnels_is_called_in_plaintext_unless_its_workload_is_strict(peer: Peer, far: dict[int, Application]) -> None:
    def reached() -> tuple[list[str], list[str]]:
        before = len(far[ECHO].callers)
        found = asyncio.run(call(peer, "frontend", FAR, ECHO))
        return found, far[ECHO].callers[before:]

    assert reached() == (["closed"], []), "its label says that it has tunnels, and nobody is there"
    with shop.changed(peer.lab):
        peer.lab.apply(FAR_WITHOUT)
    try:
        shop.takes(lambda: reached() == (["echo"], [peer.lab.topology.pod("frontend").addresses[0]]))
        with shop.applied(peer.lab, FAR_STRICT):
            shop.takes(lambda: reached() == (["closed"], []))
        shop.takes(lambda: reached()[0] == ["echo"])
    finally:
        with shop.changed(peer.lab):
            peer.lab.apply(FAR_WORKLOAD)
    shop.takes(lambda: reached() == (["closed"], []))


# Private keys, and certificates that are believed no more.


def test_private_keys_are_in_no_file_log_or_answer(peer: Peer) -> None:
    secrets = []
    for pod in ("frontend", "other", "cart-v2-1"):
        agent_socket = paths.AGENT_RUN / f"{peer.lab.topology.pod(pod).node}-workload" / "workload.sock"
        said = peer.lab.exec(pod, [sys.executable, "-c", OWN_KEY, str(agent_socket)], check=True, timeout=60).stdout
        secrets.append(int(said).to_bytes(32, "big"))
    # Base64 of the number inside of PKCS #8, in one line or in PEM's: where both have the same characters together.
    forms = {form for secret in secrets for form in (secret, secret.hex().encode(), base64.b64encode(secret)[16:42])}
    texts: dict[str, bytes] = {}
    for directory in (paths.AGENT_RUN, paths.RUN):
        for path in directory.rglob("*"):
            kept = path.name == "svids.json" and path.parent.name == "identity"  # in memory, see test_identity_agent
            if path.is_file() and "netns" not in path.parts and not kept:
                texts[str(path)] = path.read_bytes()
    assert any(path.endswith("envoy.log") for path in texts)
    assert any(path.endswith("agent-node-1.log") for path in texts)
    for node in ("node-1", "node-2"):
        texts[f"status {node}"] = peer.lab.ask(node, "status", "-o", "json").stdout.encode()
        texts[f"identity {node}"] = peer.lab.meshagent(
            "identity", "list", "-o", "json", "--run-dir", str(paths.agent_run(node)), check=True
        ).stdout.encode()
        texts[f"metrics {node}"] = peer.lab.metrics(node).encode()
        for page in ("config_dump?include_eds", "certs", "clusters", "listeners", "stats"):
            texts[f"{page} {node}"] = mesh.envoy_get(node, f"/{page}")[1].encode()
        dump = json.loads(texts[f"config_dump?include_eds {node}"])
        shown = set(private_keys(dump))
        assert f"{ACCOUNT}cart" in {name for name, _ in shown}
        assert {held for _, held in shown} == {base64.b64encode(b"[redacted]").decode()}
        assert ACCOUNT in texts[f"identity {node}"].decode()
    own = (str(paths.PKI), str(paths.CA))  # of the connections to the controller, and of the authority itself
    assert [name for name, text in texts.items() if any(form in text for form in forms)] == []
    assert [name for name, text in texts.items() if b"PRIVATE KEY" in text and not name.startswith(own)] == []


def private_keys(tree: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(name of the secret, what it holds) of everything that is called private_key."""
    if isinstance(tree, dict):
        name = str(tree.get("name", name))
        for key, value in tree.items():
            if key == "private_key":
                yield from ((name, str(held)) for held in value.values())
            else:
                yield from private_keys(value, name)
    elif isinstance(tree, list):
        for value in tree:
            yield from private_keys(value, name)


def test_a_certificate_that_runs_out_opens_no_tunnel_and_ends_no_connection(peer: Peer) -> None:
    """Whoever is in a tunnel then goes on, and it takes new connections for the rest of its ten minutes."""
    brief = peer.authority.leaf(f"{ACCOUNT}frontend", ends=4)
    ends = x509.load_pem_x509_certificate(brief.chain).not_valid_after_utc.timestamp()

    async def work(tunnel: hbone.Tunnel) -> None:
        stream = await tunnel.open(f"{OTHER}:{ECHO}")
        await asyncio.sleep(max(0.0, ends - time.time()) + 1.5)
        assert await asyncio.to_thread(peer.handshake, brief) == "CERTIFICATE_EXPIRED"
        await stream.write(b"from before")
        assert await stream.read() == b"from before"
        assert (await tunnel.open(f"{OTHER}:{ECHO}")).status == 200

    peer.run(work, identity=brief)


def revoke(identity: hbone.Identity) -> float:
    """Take a certificate out, as an operator does; returns when."""
    serial = x509.load_pem_x509_certificate(identity.chain).serial_number
    command = [mesh.program("mesh-controller"), "ca", "revoke", "--ca-directory", str(paths.CA), "--unknown", f"{serial:x}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    return time.monotonic()


def known(node: str, number: int) -> bool:
    """Has an agent heard that so many certificates are revoked?"""
    return bool(shop.status(node)["identity"]["revoked"] >= number)


def test_a_revoked_peer_loses_its_tunnels_with_their_streams_and_nobody_else(peer: Peer) -> None:
    revoked, silent, other = peer.svid("frontend"), peer.svid("frontend"), peer.svid("frontend")
    before = shop.status("node-1")["identity"]["revoked"]

    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            bad, idle, good = [
                await stack.enter_async_context(hbone.Tunnel.connect((OTHER, HBONE_PORT), one, (), peer.place))
                for one in (revoked, silent, other)
            ]
            streams = [await bad.open(f"{OTHER}:{ECHO}") for _ in range(3)]
            spared = await good.open(f"{OTHER}:{ECHO}")
            for stream in (*streams, spared):
                await stream.write(b"before")
                assert await stream.read() == b"before"
            for identity in (silent, revoked):
                await asyncio.to_thread(revoke, identity)
            await asyncio.to_thread(shop.takes, lambda: known("node-1", before + 2))
            began = time.monotonic()
            assert await asyncio.wait_for(bad.ended(), 5)
            assert time.monotonic() - began < 1.5
            for stream in streams:
                with pytest.raises(hbone.Lost):
                    await stream.read_all()
            await asyncio.sleep(max(0.0, began + 1 - time.monotonic()))
            assert (await idle.open(f"{OTHER}:{ECHO}")).status == 403, "what was silent opens no stream any more"
            await asyncio.sleep(max(0.0, began + 5 - time.monotonic()))
            await spared.write(b"after")
            assert await spared.read() == b"after"
            assert (await good.open(f"{OTHER}:{ECHO}")).status == 200

    asyncio.run(scenario())
    calls = peer.calls()
    assert peer.handshake(revoked) == "CERTIFICATE_REVOKED"
    assert peer.calls() == calls


def test_a_new_denial_ends_the_streams_that_it_forbids_whatever_the_callers_node_does_and_no_others(peer: Peer) -> None:
    """The peer is the caller's node, and does nothing. Its tunnel, and a stream of it to another port, go on."""

    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            denied, other = [
                await stack.enter_async_context(hbone.Tunnel.connect((OTHER, HBONE_PORT), peer.svid(name), (), peer.place))
                for name in ("frontend", "other")
            ]
            streams = [await denied.open(f"{OTHER}:{ECHO}") for _ in range(3)]
            elsewhere, spared = await denied.open(f"{OTHER}:{FIRST}"), await other.open(f"{OTHER}:{ECHO}")
            assert await elsewhere.read() == GREETING
            for stream in (*streams, elsewhere, spared):
                await stream.write(b"before")
                assert await stream.read() == b"before"
            calls = peer.calls()
            peer.lab.apply(FRONTEND_NOT_ON_ECHO)
            try:
                began = time.monotonic()
                for stream in streams:
                    with contextlib.suppress(hbone.Reset):
                        assert await asyncio.wait_for(stream.read_all(), 5) == b""
                assert time.monotonic() - began < 4
                assert (await denied.open(f"{OTHER}:{ECHO}")).status == 403
                await asyncio.sleep(5)
                for stream in (elsewhere, spared):
                    await stream.write(b"after")
                    assert await stream.read() == b"after"
                assert peer.calls() == calls
            finally:
                shop.delete(peer.lab, FRONTEND_NOT_ON_ECHO)

    asyncio.run(scenario())


def test_a_caller_loses_its_connections_to_a_revoked_peer_and_no_others(peer: Peer, far: dict[int, Application]) -> None:
    """Both are reached by one caller, through tunnels to one identity; the application that listens is in neither's way."""
    assert far
    revoked, other = peer.svid("far"), peer.svid("far")

    async def said(process: asyncio.subprocess.Process, timeout: float = 20) -> str:
        assert process.stdout is not None
        return (await asyncio.wait_for(process.stdout.readline(), timeout)).decode().strip()

    async def scenario() -> None:
        async with receiver(peer, revoked), hbone.Server(other, (FAR6, HBONE_PORT), namespace=peer.place) as second:
            talks = []
            for address in (FAR, FAR6):
                command = peer.lab.command("frontend", ["python3", "-c", TALKS, address, str(ECHO)])
                talks.append(await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE))
                assert await said(talks[-1]) == "x"
            before = shop.status("node-1")["identity"]["revoked"]
            await asyncio.to_thread(revoke, revoked)
            await asyncio.to_thread(shop.takes, lambda: known("node-1", before + 1))
            began = time.monotonic()
            assert await said(talks[0], 5) == "closed"
            assert time.monotonic() - began < 1.5
            assert await call(peer, "frontend", FAR, ECHO) == ["closed"], "and opens no other one"
            await asyncio.sleep(max(0.0, began + 5 - time.monotonic()))
            assert talks[1].stdin is not None
            talks[1].stdin.write(b"y\n")
            assert await said(talks[1]) == "y"
            assert await call(peer, "frontend", FAR6, ECHO) == ["echo"]
            assert len(second.tunnels) <= 2 + 2 * (os.cpu_count() or 1)
            for process in talks:
                await process.communicate(b"")

    asyncio.run(scenario())
