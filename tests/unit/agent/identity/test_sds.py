"""Certificates and trust in the real Envoy: mutual TLS between two secrets, a certificate that is replaced, a peer that is revoked."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import socketserver
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.listener.v3 import listener_pb2
from envoy.extensions.filters.network.tcp_proxy.v3 import tcp_proxy_pb2
from envoy.extensions.transport_sockets.tls.v3 import tls_pb2
from google.protobuf.message import Message

from agent.identity.service import Identity
from agent.l7 import names, secrets
from agent.l7.clusters import socket_address
from agent.l7.envoy import _get
from agent.l7.resources import Resources, pack, packed
from agent.l7.xds import XdsServer
from tests.ports import free_ports
from tests.tasks import until
from tests.unit.agent.identity.signer import TRUST_DOMAIN, Signer, local, spiffe_id
from tests.unit.agent.l7.harness import config, waypoint

TRUSTED = f"spiffe://{TRUST_DOMAIN}"


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while content := self.request.recv(4096):
            self.request.sendall(content)


@contextlib.contextmanager
def echo() -> Iterator[int]:
    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def tls(common: tls_pb2.CommonTlsContext, name: str) -> None:
    common.tls_certificate_sds_secret_configs.append(secrets.reference(name))
    common.validation_context_sds_secret_config.CopyFrom(secrets.reference(TRUSTED))


def cluster(name: str, port: int, transport: Message | None = None) -> cluster_pb2.Cluster:
    found = cluster_pb2.Cluster(name=name)
    found.connect_timeout.seconds = 2
    found.load_assignment.cluster_name = name
    found.load_assignment.endpoints.add().lb_endpoints.add().endpoint.address.CopyFrom(socket_address("127.0.0.1", port))
    if transport is not None:
        found.transport_socket.name = "envoy.transport_sockets.tls"
        found.transport_socket.typed_config.CopyFrom(packed(transport))
    return found


def listener(name: str, port: int, to: str, transport: Message | None = None) -> listener_pb2.Listener:
    found = listener_pb2.Listener(name=name, address=socket_address("127.0.0.1", port))
    chain = found.filter_chains.add()
    filter_ = chain.filters.add(name="envoy.filters.network.tcp_proxy")
    filter_.typed_config.CopyFrom(packed(tcp_proxy_pb2.TcpProxy(stat_prefix=name, cluster=to)))
    if transport is not None:
        chain.transport_socket.name = "envoy.transport_sockets.tls"
        chain.transport_socket.typed_config.CopyFrom(packed(transport))
    return found


def resources(plain: int, secure: int, backend: int) -> Resources:
    """plain -> (mutual TLS as `client`) -> secure, as `server` -> backend."""
    upstream, downstream = tls_pb2.UpstreamTlsContext(), tls_pb2.DownstreamTlsContext()
    tls(upstream.common_tls_context, spiffe_id("client"))
    tls(downstream.common_tls_context, spiffe_id("server"))
    downstream.require_client_certificate.value = True
    clusters = [cluster("secure", secure, upstream), cluster("backend", backend)]
    listeners = [listener("plain", plain, "secure"), listener("secure", secure, "backend", downstream)]
    return {names.CLUSTER: {c.name: pack(c) for c in clusters}, names.LISTENER: {one.name: pack(one) for one in listeners}}


def feed(identity: Identity, server: XdsServer) -> None:
    """What the supervisor does."""
    trust = identity.trust
    if trust is not None:
        name, roots = secrets.trust(trust.trust_domain, trust.pem, trust.crl)
        held = {name: secrets.certificate(name, svid.chain.pem, svid.key.pem())[name] for name, svid in identity.svids().items()}
        server.set_secrets({name: roots, **held})


class Mesh:
    def __init__(self, signer: Signer, identity: Identity, server: XdsServer, plain: int, secure: int) -> None:
        self.signer, self.identity, self.server, self.plain, self.secure = signer, identity, server, plain, secure

    def serial(self, account: str) -> int:
        return self.identity.svids()[spiffe_id(account)].chain.serial

    async def shown(self, directory: Path, account: str = "client") -> int:
        """The serial number of the certificate that the secure listener shows to somebody with an identity of this node."""
        svid, trust = self.identity.svids()[spiffe_id(account)], self.identity.trust
        assert trust is not None
        (directory / "pair.pem").write_bytes(svid.key.pem() + svid.chain.pem)

        def connect() -> int:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.load_verify_locations(cadata=trust.pem.decode())
            context.load_cert_chain(directory / "pair.pem")
            with socket.create_connection(("127.0.0.1", self.secure), 5) as raw, context.wrap_socket(raw) as secured:
                secured.sendall(b"ping")
                assert secured.recv(4) == b"ping"
                der = secured.getpeercert(binary_form=True)
                assert der is not None
                return x509.load_der_x509_certificate(der).serial_number

        return await asyncio.to_thread(connect)


@contextlib.asynccontextmanager
async def mesh(run_dir: Path, **changes: Any) -> AsyncIterator[Mesh]:
    plain, secure = free_ports(2)
    await asyncio.to_thread(run_dir.mkdir)
    async with Signer().serving() as signer:
        identity = Identity(signer.joining(run_dir))
        identity.load()
        task = asyncio.create_task(identity.run())
        try:
            with echo() as backend:
                async with waypoint(config(run_dir), **changes) as (server, envoy):
                    identity.subscribe(lambda: feed(identity, server))
                    identity.update([local("client", 1), local("server", 2)])
                    await until(lambda: len(identity.svids()) == 2)
                    server.set(resources(plain, secure, backend))
                    assert await server.wait_acked(20), server.state
                    await until(lambda: envoy.state.ready)
                    yield Mesh(signer, identity, server, plain, secure)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def said_by_envoy(run_dir: Path) -> bytes:
    """Its logs, its bootstrap, and its configuration as the admin socket shows it."""
    shown = _get(run_dir / "envoy-admin.sock", "/config_dump?include_eds")
    assert spiffe_id("server").encode() in shown
    return b"".join([shown, *(path.read_bytes() for path in run_dir.glob("envoy*") if path.is_file())])


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: bytes) -> bytes:
    writer.write(text)
    await writer.drain()
    return await asyncio.wait_for(reader.read(len(text)), 5)


def test_two_identities_speak_mutual_tls_and_a_replaced_certificate_costs_no_connection(
    run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "agent")

    async def scenario() -> None:
        async with mesh(run_dir) as m:
            reader, writer = await asyncio.open_connection("127.0.0.1", m.plain)
            assert await talk(reader, writer, b"before") == b"before"
            old = m.serial("server")
            assert await m.shown(tmp_path) == old
            keys = [svid.key.pem().splitlines()[1] for svid in m.identity.svids().values()]
            m.signer.revoked.append(old)  # the agent gives it up and gets another
            await m.signer.announce()
            await until(lambda: m.identity.svids().get(spiffe_id("server")) is not None and m.serial("server") != old)
            assert await m.server.wait_acked(10)
            new = m.serial("server")
            for _ in range(50):
                if await m.shown(tmp_path) == new:
                    break
                await asyncio.sleep(0.05)
            assert await m.shown(tmp_path) == new
            assert await talk(reader, writer, b"after") == b"after"
            writer.close()
            assert m.server.state.nacks == 0
            text = caplog.text.encode() + repr(m.server._resources).encode()
            assert not any(key in text for key in keys)
            assert b"PRIVATE" not in text
            # Envoy's own log and what it shows of its configuration
            dump = await asyncio.to_thread(said_by_envoy, run_dir)
            assert not any(key in dump for key in keys)

    asyncio.run(scenario())


def test_a_revoked_peer_makes_no_new_connection(run_dir: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with mesh(run_dir) as m:
            m.identity.update([local("client", 1), local("server", 2), local("thief", 3)])
            await until(lambda: spiffe_id("thief") in m.identity.svids())
            assert await m.shown(tmp_path, "thief") == m.serial("server")
            stolen = m.identity.svids()[spiffe_id("thief")]
            m.signer.refuse["default/thief"] = "revoked"
            m.signer.revoked.append(stolen.chain.serial)
            await m.signer.announce()
            await until(lambda: m.identity.trust is not None and m.identity.trust.revoked)
            assert await m.server.wait_acked(10)
            m.identity.svids = lambda: {spiffe_id("thief"): stolen, spiffe_id("client"): stolen}  # type: ignore[method-assign]
            for _ in range(50):
                try:
                    await m.shown(tmp_path, "thief")
                except (OSError, AssertionError):
                    break
                await asyncio.sleep(0.05)
            with pytest.raises((OSError, AssertionError)):
                await m.shown(tmp_path, "thief")
            reader, writer = await asyncio.open_connection("127.0.0.1", m.plain)
            assert await talk(reader, writer, b"others") == b"others"
            writer.close()

    asyncio.run(scenario())


def test_what_envoy_says_of_a_secret_that_it_refused_does_not_quote_it(run_dir: Path) -> None:
    async def scenario() -> None:
        async with mesh(run_dir) as m:
            client, server = (m.identity.svids()[spiffe_id(name)] for name in ("client", "server"))
            key = client.key.pem()
            wrong = secrets.certificate(spiffe_id("server"), client.chain.pem, server.key.pem())[
                spiffe_id("server")
            ]  # a key that does not fit
            m.server.set_secrets({**m.server._secrets, spiffe_id("server"): wrong})
            await until(lambda: m.server.state.nacks, 10)
            assert "PRIVATE KEY-----" not in m.server.state.last_nack
            assert key.splitlines()[1].decode() not in m.server.state.last_nack
            reader, writer = await asyncio.open_connection("127.0.0.1", m.plain)
            assert await talk(reader, writer, b"the last good one") == b"the last good one"
            writer.close()

    asyncio.run(scenario())
