"""Ways out of the mesh, through a real Envoy: by name, with TLS that is verified, by SNI, and by who calls. The kernel's part is in tests/kernel."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from envoy.config.cluster.v3 import cluster_pb2
from envoy.extensions.filters.network.set_filter_state.v3 import set_filter_state_pb2

from agent import egress
from agent.external import Endpoint, External, Origination
from agent.l7 import externals, names
from agent.l7.clusters import socket_address
from agent.l7.resources import Resources, pack
from agent.l7.snapshot import build
from agent.model import Action, Operation, Policy, PolicyRule, Service, ServicePort, Snapshot, Source
from agent.policy import Caller
from tests.ports import free_ports
from tests.unit.agent.identity.signer import Root
from tests.unit.agent.l7 import harness
from tests.unit.agent.l7.harness import TRUST_DOMAIN, Answer

ROOT, STRANGER = Root(), Root()
HOST = "api.example.com"
CALLER = Source(service_accounts=("default/caller",))


def certificate(directory: Path, *hosts: str, root: Root = ROOT) -> ssl.SSLContext:
    """A server's context with a certificate for these names."""
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = root.sign(key.public_key(), [x509.DNSName(host) for host in hosts])
    pem = directory / f"{hosts[0]}.pem"
    pem.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + leaf.public_bytes(Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context


def external(port: int, target: int, protocol: str = "http", *, endpoint: str = "127.0.0.1", **more: Any) -> Service:
    """The host HOST as a service at 127.0.0.1."""
    outside = External("api", (HOST,), False, True, (Endpoint(endpoint, 1, {port: target}),), **more)
    return Service(f"default/{HOST}", ("127.0.0.1",), (ServicePort(port, "", "TCP", protocol, True, "test"),), external=outside)


def model(service: Service, *policies: Policy) -> Snapshot:
    return harness.snapshot([harness.workload("caller", "10.0.0.1")], [service], policies=policies)


def here(snapshot: Snapshot, port: int) -> Resources:
    """What an agent would serve, for the caller's listeners without a namespace: both at `port` of 127.0.0.1, which nobody redirects to."""
    local = harness.local(snapshot.workloads["default/caller"])
    built = build(snapshot, [local], trust_domain=TRUST_DOMAIN)
    found: dict[str, Any] = {}
    streams = any(name.startswith(names.EGRESS) for name in built[names.LISTENER])
    for name in built[names.LISTENER]:
        listener = harness.decoded(built, names.LISTENER, name)
        if listener.HasField("internal_listener"):
            found[name] = pack(listener)
            continue
        if streams and name.startswith(names.OUTBOUND):
            continue
        listener.ClearField("additional_addresses")
        listener.address.CopyFrom(socket_address("127.0.0.1", port))
        state = set_filter_state_pb2.Config()
        assert listener.filter_chains[0].filters[0].typed_config.Unpack(state)
        kept = [one for one in state.on_new_connection if one.object_key != names.NETNS_KEY]
        del state.on_new_connection[:]
        state.on_new_connection.extend(kept)
        listener.filter_chains[0].filters[0].typed_config.Pack(state)
        found[name] = pack(listener)
    clusters = {}
    for name in built[names.CLUSTER]:
        cluster = harness.decoded(built, names.CLUSTER, name)
        del cluster.upstream_bind_config.socket_options[:]  # of root alone
        clusters[name] = pack(cluster)
    return {**built, names.LISTENER: found, names.CLUSTER: clusters}


@contextlib.asynccontextmanager
async def _running(directory: Path, snapshot: Snapshot, port: int) -> AsyncIterator[None]:
    async with harness.waypoint(harness.config(directory)) as (server, _):
        await harness.applied(server, here(snapshot, port))
        yield


def through(directory: Path, snapshot: Snapshot, port: int, work: Any) -> Any:
    """What `work` says while Envoy runs on a snapshot."""

    async def run() -> Any:
        async with _running(directory, snapshot, port):
            return await asyncio.to_thread(work)

    return asyncio.run(run())


def asks(port: int, host: str = HOST, path: str = "/") -> Answer:
    return harness.request(port, path, headers={"Host": host})


@contextlib.contextmanager
def tls_server(context: ssl.SSLContext) -> Iterator[int]:
    """HTTP over TLS on a port of 127.0.0.1."""
    with harness.http_server("outside", "127.0.0.1") as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        yield server.server_address[1]


def test_requests_for_the_host_go_out_and_for_others_do_not(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with harness.http_server("outside", "127.0.0.1") as server:
        snapshot = model(external(port, server.server_address[1]))
        good, other = through(tmp_path, snapshot, port, lambda: (asks(port), asks(port, "intruder.example.com")))
    assert (good.status, good.name, good.seen["headers"]["host"]) == (200, "outside", HOST)
    assert (other.status, other.headers["x-meshagent-reason"]) == (421, "host-not-declared")


@pytest.mark.parametrize(
    ("names_", "root", "status"),
    [
        pytest.param((HOST,), ROOT, 200, id="good"),
        pytest.param(("*.example.com",), ROOT, 200, id="wildcard-certificate"),
        pytest.param(("other.example.com",), ROOT, 503, id="another-name"),
        pytest.param((HOST,), STRANGER, 503, id="another-authority"),
    ],
)
def test_the_waypoint_speaks_tls_to_whom_it_can_verify_and_to_nobody_else(
    tmp_path: Path, names_: tuple[str, ...], root: Root, status: int
) -> None:
    (port,) = free_ports(1)
    with tls_server(certificate(tmp_path, *names_, root=root)) as target:
        snapshot = model(external(port, target, tls=Origination(HOST, (HOST,), ROOT.pem.decode())))
        assert through(tmp_path, snapshot, port, lambda: asks(port)).status == status


def test_the_systems_authorities_do_not_vouch_for_just_anybody(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with tls_server(certificate(tmp_path, HOST)) as target:
        snapshot = model(external(port, target, tls=Origination(HOST, (HOST,), "")))
        assert through(tmp_path, snapshot, port, lambda: asks(port)).status == 503


def test_without_authorities_there_is_no_way_out() -> None:
    service = external(80, 443, tls=Origination(HOST, (HOST,), ""))
    assert service.external is not None
    assert not externals.cluster(service.name, service.ports[0], service.external, "").load_assignment.endpoints
    assert externals.system_roots(("/nowhere",)) == ""
    (problem,) = externals.problems(model(service), "")
    assert HOST in problem
    assert externals.problems(model(service), "/etc/ssl/cert.pem") == []
    assert externals.problems(model(external(80, 443, tls=Origination(HOST, (HOST,), "PEM"))), "") == []


ALLOW = Policy("default/p", Action.ALLOW, (PolicyRule((CALLER,)),))
OTHERS = Policy("default/p", Action.ALLOW, (PolicyRule((Source(service_accounts=("default/other",)),)),))
DENY = Policy("default/p", Action.DENY, (PolicyRule((CALLER,)),))
READ = Policy("default/p", Action.ALLOW, (PolicyRule((CALLER,), (Operation(methods=("GET",), paths=("/v1/*",)),)),))
NOT_DELETE = Policy("default/p", Action.DENY, (PolicyRule((), (Operation(methods=("DELETE",)),)),))


@pytest.mark.parametrize(
    ("policy", "codes"),
    [
        pytest.param(None, (200, 200), id="none"),
        pytest.param(ALLOW, (200, 200), id="allow"),
        pytest.param(OTHERS, (403, 403), id="others-only"),
        pytest.param(DENY, (403, 403), id="deny"),
        pytest.param(READ, (403, 200), id="by-path"),
    ],
)
def test_policy_decides_each_request(tmp_path: Path, policy: Policy | None, codes: tuple[int, int]) -> None:
    (port,) = free_ports(1)
    with harness.http_server("outside", "127.0.0.1") as server:
        snapshot = model(external(port, server.server_address[1], policies=("default/p",) if policy else ()), *([policy] if policy else []))
        found = through(tmp_path, snapshot, port, lambda: (asks(port).status, asks(port, path="/v1/x").status))
    assert found == codes


def test_a_policy_that_is_named_but_missing_lets_nobody_out(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with harness.http_server("outside", "127.0.0.1") as server:
        snapshot = model(external(port, server.server_address[1], policies=("default/gone",)))
        assert through(tmp_path, snapshot, port, lambda: asks(port).status) == 403


def test_what_is_private_is_for_its_namespace_alone(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with harness.http_server("outside", "127.0.0.1") as server:
        service = external(port, server.server_address[1], private=True)
        assert through(tmp_path, model(service), port, lambda: asks(port).status) == 200
        elsewhere = replace(service, name=f"other/{HOST}")
        assert through(tmp_path, model(elsewhere), port, lambda: asks(port).status) == 403


@contextlib.contextmanager
def greeter() -> Iterator[int]:
    """A server that speaks first, then echoes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.sendall(b"hello ")
                        connection.sendall(connection.recv(100))

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


def talk(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(b"there")
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(100), b""))
        return b""


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        pytest.param(None, b"hello there", id="none"),
        pytest.param(ALLOW, b"hello there", id="allow"),
        pytest.param(OTHERS, b"", id="others-only"),
        pytest.param(DENY, b"", id="deny"),
        pytest.param(READ, b"", id="requests-are-never-allowed"),
        pytest.param(NOT_DELETE, b"", id="requests-are-always-denied"),
    ],
)
def test_policy_decides_a_connection_that_holds_no_requests(tmp_path: Path, policy: Policy | None, said: bytes) -> None:
    (port,) = free_ports(1)
    with greeter() as target:
        snapshot = model(external(port, target, "tcp", policies=("default/p",) if policy else ()), *([policy] if policy else []))
        assert through(tmp_path, snapshot, port, lambda: talk(port)) == said


def test_tcp_gets_tls_on_its_way_out(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with tls_server(certificate(tmp_path, HOST)) as target:
        snapshot = model(external(port, target, "tcp", tls=Origination(HOST, (HOST,), ROOT.pem.decode())))
        assert through(tmp_path, snapshot, port, lambda: asks(port)).name == "outside"


def handshake(port: int, name: str | None) -> str:
    """What the server's certificate says to a client that trusts ROOT, or "closed"."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=ROOT.pem.decode())
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as plain, context.wrap_socket(plain, server_hostname=name) as secure:
            found = secure.getpeercert() or {}
            return str(found["subjectAltName"][0][1])
    except (ssl.SSLError, OSError):
        return "closed"


def test_tls_goes_through_untouched_to_declared_hosts_only(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with tls_server(certificate(tmp_path, HOST)) as target:
        snapshot = model(external(port, target, "tls"))
        found = through(
            tmp_path, snapshot, port, lambda: [*(handshake(port, name) for name in (HOST, "intruder.example.com", None)), talk(port)]
        )
    assert found == [HOST, "closed", "closed", b""]


def test_a_name_is_resolved_by_envoy(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with harness.http_server("outside", "127.0.0.1") as server:
        service = external(port, server.server_address[1], endpoint="localhost")
        assert through(tmp_path, model(service), port, lambda: _eventually(lambda: asks(port).status, 200)) == 200


def _eventually(look: Any, wanted: object) -> object:
    for _ in range(100):
        if (found := look()) == wanted:
            break
        threading.Event().wait(0.05)
    return found


def test_one_name_is_a_logical_host_and_several_are_as_many_as_they_have_addresses() -> None:
    def kind(*addresses: str) -> cluster_pb2.Cluster.DiscoveryType:
        outside = External("api", (HOST,), False, True, tuple(Endpoint(a, 1, {}) for a in addresses))
        return externals.cluster("default/x", ServicePort(80, "", "TCP", "http", True, ""), outside, "").type

    assert kind("a.example.com") == cluster_pb2.Cluster.LOGICAL_DNS
    assert kind("a.example.com", "b.example.com") == cluster_pb2.Cluster.STRICT_DNS
    assert kind("192.0.2.1") == cluster_pb2.Cluster.STATIC


def test_a_mesh_without_streams_has_no_listener_for_them() -> None:
    local = harness.local(harness.workload("caller", "10.0.0.1"))
    for protocol, wanted in (("http", False), ("tcp", True)):
        built = build(model(external(80, 80, protocol)), [local], trust_domain=TRUST_DOMAIN)
        assert (f"{names.EGRESS}/default/caller" in built[names.LISTENER]) is wanted


def test_connections_to_the_outside_are_marked() -> None:
    service = external(80, 80)
    assert service.external is not None
    (option,) = externals.cluster(service.name, service.ports[0], service.external, "").upstream_bind_config.socket_options
    assert (option.level, option.name, option.int_value) == (socket.SOL_SOCKET, socket.SO_MARK, externals.MARK)


def test_rules_without_requests() -> None:
    def rules(policy: Policy) -> tuple[PolicyRule, ...]:
        return egress.without_requests([policy])[0].rules

    assert rules(READ) == ()
    mixed = replace(READ, rules=(PolicyRule((CALLER,), (Operation(paths=("/x",)), Operation(ports=(80,)))),))
    assert rules(mixed) == (PolicyRule((CALLER,), (Operation(ports=(80,)),)),)
    token = replace(READ, rules=(PolicyRule((Source(request_principals=("*",)),)),))
    assert rules(token) == ()
    assert rules(replace(token, action=Action.DENY)) == (PolicyRule((Source(),)),)
    assert rules(NOT_DELETE) == (PolicyRule((), (Operation(),)),)


def test_who_may_connect_is_a_list_of_known_workloads() -> None:
    pairs = (("default", "caller"), ("default", "other"), ("away", "caller"))
    known = {f"{namespace}/{account}": Caller(namespace, account, TRUST_DOMAIN) for namespace, account in pairs}

    def may(service: Service, *found: Policy) -> tuple[str, ...] | None:
        return egress.callers(egress.policies(service, model(service, *found)), known, 80)

    assert may(external(80, 80)) is None
    assert may(external(80, 80, policies=("default/p",)), ALLOW) == ("default/caller",)
    assert may(external(80, 80, policies=("default/p",)), DENY) == ("away/caller", "default/other")
    assert may(external(80, 80, policies=("default/p",)), replace(DENY, action=Action.AUDIT)) == tuple(sorted(known))
    assert may(external(80, 80, policies=("default/gone",))) == ()
    assert may(external(80, 80, private=True)) == ("default/caller", "default/other")
