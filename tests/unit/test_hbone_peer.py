"""The peer that plays ztunnel, as client against itself as server, and against peers that are not ztunnel at all."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from h2.errors import ErrorCodes

from tests import hbone
from tests.hbone import Identity, Lost, Refused, Reset, Server, Tunnel
from tests.tasks import until
from tests.unit.agent.identity.signer import Root, spiffe_id

ROOT, STRANGER = Root(), Root(name="another root")
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def identity(*names: str, signer: Root = ROOT, trusted: Root = ROOT) -> Identity:
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = signer.sign(key.public_key(), [x509.UniformResourceIdentifier(name) for name in names])
    return Identity(leaf.public_bytes(Encoding.PEM), key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), trusted.pem)


CALLER, CALLEE = identity(spiffe_id("caller")), identity(spiffe_id("callee"))


@contextlib.asynccontextmanager
async def application(handler: Handler) -> AsyncIterator[int]:
    """The port of a TCP server on 127.0.0.1."""
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 18):
        writer.write(data)
        await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def meeting(handler: Handler = echo, **more: object) -> AsyncIterator[tuple[Server, Tunnel, str]]:
    """A server, a tunnel to it and the authority of an application behind it."""
    async with (
        application(handler) as port,
        Server(CALLEE, ("127.0.0.1", 0), **more) as server,  # type: ignore[arg-type]
        Tunnel.connect(server.address, CALLER, spiffe_id("callee")) as tunnel,
    ):
        yield server, tunnel, f"127.0.0.1:{port}"


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]


def test_both_sides_know_each_other_and_the_server_records_what_came() -> None:
    async def scenario() -> None:
        async with meeting() as (server, tunnel, target):
            sent = hbone.request_headers("10.0.0.5:40000", "shop.default.svc")
            stream = await tunnel.open(target, sent)
            await stream.write(b"hello")
            await stream.half_close()
            assert (stream.status, await stream.read_all()) == (200, b"hello")
            assert (tunnel.peer, tunnel.alpn, tunnel.version) == (spiffe_id("callee"), "h2", "TLSv1.3")
            (seen,) = server.tunnels
            assert (seen.peer, seen.alpn, seen.sni, seen.tls) == (spiffe_id("caller"), "h2", None, "TLSv1.3")
            (request,) = seen.requests
            assert request.pseudo == [(":method", "CONNECT"), (":authority", target)]
            assert request.headers == sent
            assert [name for name, _ in sent] == ["baggage", "forwarded", "traceparent"]

    run(scenario)


def test_settings_are_those_of_ztunnel() -> None:
    async def scenario() -> None:
        async with meeting() as (server, tunnel, _):
            await tunnel.ping()
            both = {"INITIAL_WINDOW_SIZE": 4 << 20, "MAX_FRAME_SIZE": 1 << 20}
            assert tunnel.settings.items() >= (both | {"MAX_CONCURRENT_STREAMS": 200, "MAX_HEADER_LIST_SIZE": 65536}).items()
            assert server.tunnels[0].settings.items() >= (both | {"ENABLE_PUSH": 0, "MAX_HEADER_LIST_SIZE": 16384}).items()

    run(scenario)


def test_the_client_may_end_first_and_still_receives() -> None:
    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        everything = await reader.read()  # to FIN
        writer.write(b"got " + everything)
        writer.close()

    async def scenario() -> None:
        async with meeting(late) as (_, tunnel, target):
            stream = await tunnel.open(target)
            await stream.write(b"all")
            await stream.half_close()
            assert await stream.read_all() == b"got all"

    run(scenario)


def test_the_application_may_end_first_and_still_receives() -> None:
    received: asyncio.Future[bytes]

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"bye")
        writer.write_eof()
        received.set_result(await reader.read())
        writer.close()

    async def scenario() -> None:
        nonlocal received
        received = asyncio.get_running_loop().create_future()
        async with meeting(early) as (_, tunnel, target):
            stream = await tunnel.open(target)
            assert await stream.read_all() == b"bye"
            await stream.write(b"one more")
            await stream.half_close()
            assert await received == b"one more"

    run(scenario)


def test_fifty_megabytes_pass_each_way_at_once_unchanged() -> None:
    chunk = bytes(range(256)) * 4096  # 1 MiB
    count = 50

    async def scenario() -> None:
        async with meeting() as (_, tunnel, target):
            stream = await tunnel.open(target)

            async def send() -> None:
                for _ in range(count):
                    await stream.write(chunk)
                await stream.half_close()

            sending = asyncio.create_task(send())
            digest, size = hashlib.sha256(), 0
            while data := await stream.read():
                digest.update(data)
                size += len(data)
            await sending
            assert (size, digest.digest()) == (count * len(chunk), hashlib.sha256(chunk * count).digest())

    run(scenario)


def test_a_stream_that_nobody_reads_does_not_hold_up_another() -> None:
    async def flood(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(bytes(8 << 20))  # twice a stream's window, half the connection's
            await writer.drain()
            writer.close()

    async def scenario() -> None:
        async with application(flood) as flooding, meeting() as (_, tunnel, target):
            idle = await tunnel.open(f"127.0.0.1:{flooding}")
            busy = await tunnel.open(target)
            for _ in range(20):
                await busy.write(bytes(1 << 20))
                received = 0
                while received < 1 << 20:
                    received += len(await busy.read())
            assert len(await idle.read_all()) == 8 << 20

    run(scenario)


def test_a_hundred_streams_share_one_tunnel() -> None:
    async def scenario() -> None:
        async with meeting() as (server, tunnel, target):

            async def one(number: int) -> bytes:
                stream = await tunnel.open(target)
                await everyone.wait()
                await stream.write(b"%d" % number * 1000)
                await stream.half_close()
                return await stream.read_all()

            everyone = asyncio.Event()
            tasks = [asyncio.create_task(one(number)) for number in range(100)]
            await asyncio.sleep(0)
            while len(server.tunnels[0].requests) < 100:
                await tunnel.ping()
            everyone.set()
            assert await asyncio.gather(*tasks) == [b"%d" % number * 1000 for number in range(100)]
            assert [len(seen.requests) for seen in server.tunnels] == [100]

    run(scenario)


def test_a_reset_of_the_application_is_an_orderly_end_to_the_client() -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.transport.abort()

    async def scenario() -> None:
        async with meeting(reset) as (_, tunnel, target):
            stream = await tunnel.open(target)
            await stream.write(b"x" * 10)
            assert await stream.read_all() == b""

    run(scenario)


def test_a_reset_of_the_client_is_an_orderly_end_to_the_application() -> None:
    async def scenario() -> None:
        end: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            end.set_result(await reader.read())
            writer.close()

        async with meeting(listen) as (_, tunnel, target):
            stream = await tunnel.open(target)
            await stream.write(b"x")
            await tunnel.ping()  # RST_STREAM may overtake what its receiver has not read
            await stream.reset()
            assert await end in {b"x", b""}
            with pytest.raises(Reset, match="CANCEL"):
                await stream.read()

    run(scenario)


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("127.0.0.2:80", 400),  # not the address connected to
        ("[::1]:80", 400),
        ("127.0.0.1", 400),
        ("127.0.0.1:", 400),
        ("127.0.0.1:70000", 400),
        ("127.0.0.1:15008", 503),
        ("unknown.default.svc:80", 503),
        ("shop.default.svc:81", 503),
        ("127.0.0.1:1", 503),  # refused
    ],
)
def test_a_bad_target_has_the_status_of_ztunnel(target: str, status: int) -> None:
    async def scenario() -> None:
        async with meeting(services={"shop.default.svc:80": 8080}) as (server, tunnel, _):
            stream = await tunnel.open(target)
            assert (stream.status, await stream.read_all()) == (status, b"")
            assert server.tunnels[0].requests[0].status == status

    run(scenario)


def test_a_hostname_leads_to_the_port_of_its_workload() -> None:
    async def scenario() -> None:
        services: dict[str, int] = {}
        async with meeting(services=services) as (_, tunnel, target):
            services["shop.default.svc:80"] = int(target.rpartition(":")[2])
            stream = await tunnel.open("shop.default.svc:80")
            await stream.half_close()
            assert (stream.status, await stream.read_all()) == (200, b"")

    run(scenario)


def test_ipv6_targets_have_brackets() -> None:
    async def scenario() -> None:
        server = await asyncio.start_server(echo, "::1", 0)
        async with server, Server(CALLEE, ("::1", 0)) as peer, Tunnel.connect(peer.address, CALLER) as tunnel:
            stream = await tunnel.open(f"[::1]:{server.sockets[0].getsockname()[1]}")
            await stream.half_close()
            assert (stream.status, await stream.read_all()) == (200, b"")

    run(scenario)


def test_a_policy_denies_with_401() -> None:
    async def scenario() -> None:
        async with meeting(allow=lambda peer, _: peer != spiffe_id("caller")) as (_, tunnel, target):
            assert (await tunnel.open(target)).status == 401

    run(scenario)


def test_a_missing_authority_is_400() -> None:
    async def scenario() -> None:
        async with meeting() as (_, tunnel, _target):
            assert (await tunnel.open("", pseudo=[(":method", "CONNECT")])).status == 400

    run(scenario)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_another_method_is_400(method: str) -> None:
    async def scenario() -> None:
        async with meeting() as (_, tunnel, target):
            pseudo = [(":method", method), (":scheme", "https"), (":authority", target), (":path", "/")]
            assert (await tunnel.open(target, pseudo=pseudo)).status == 400

    run(scenario)


@pytest.mark.parametrize(
    "pseudo",
    [
        [(":authority", "127.0.0.1:80")],
        [(":method", "GET"), (":authority", "127.0.0.1:80"), (":path", "/")],
        [(":method", "CONNECT"), (":scheme", "https"), (":authority", "127.0.0.1:80"), (":path", "/")],
        [(":method", "CONNECT"), (":authority", "127.0.0.1:80"), (":path", "/")],
        [(":method", "CONNECT"), (":authority", "127.0.0.1:80 ")],
        [(":method", "CONNECT"), (":authority", "")],
        [(":method", "CONNECT"), (":protocol", "websocket"), (":scheme", "https"), (":authority", "127.0.0.1:80"), (":path", "/")],
    ],
)
def test_a_malformed_request_costs_its_stream_and_no_other(pseudo: list[tuple[str, str]]) -> None:
    async def scenario() -> None:
        async with meeting() as (server, tunnel, target):
            with pytest.raises(Reset, match="PROTOCOL_ERROR"):
                await tunnel.open("", pseudo=pseudo)
            assert (await tunnel.open(target)).status == 200
            assert [(request.status, request.reset) for request in server.tunnels[0].requests] == [(0, "PROTOCOL_ERROR"), (200, "")]

    run(scenario)


def test_oversize_headers_are_431_and_cost_no_other_stream() -> None:
    async def scenario() -> None:
        async with meeting() as (server, tunnel, target):
            stream = await tunnel.open(target, [("baggage", "x" * 65536)])
            assert stream.status == 431
            await tunnel.ping()
            with pytest.raises(Reset, match="PROTOCOL_ERROR"):
                await stream.write(b"x")
            assert (await tunnel.open(target, [("baggage", "x" * 60000)])).status == 200
            assert [request.status for request in server.tunnels[0].requests] == [431, 200]

    run(scenario)


@pytest.mark.parametrize(
    ("who", "complaint"),
    [
        (Identity(b"", b"", ROOT.pem), "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
        (identity(spiffe_id("caller"), signer=STRANGER), "CERTIFICATE_VERIFY_FAILED"),
        (
            identity("spiffe://else.where/ns/default/sa/caller"),
            "the peer is spiffe://else.where/ns/default/sa/caller, of another trust domain",
        ),
        (identity("spiffe://mesh.test/meshagent/node/one"), "the peer is nobody, of another trust domain"),
    ],
)
def test_a_client_without_an_identity_of_the_mesh_is_refused(who: Identity, complaint: str) -> None:
    alerts = {
        "PEER_DID_NOT_RETURN_A_CERTIFICATE": "TLSV13_ALERT_CERTIFICATE_REQUIRED",
        "CERTIFICATE_VERIFY_FAILED": "TLSV1_ALERT_UNKNOWN_CA",
    }

    async def scenario() -> None:
        async with Server(CALLEE, ("127.0.0.1", 0)) as server:
            with pytest.raises(Lost, match=alerts.get(complaint, "closed")):
                async with Tunnel.connect(server.address, who):
                    pass
            await until(lambda: server.failures == [complaint])
            assert server.tunnels == []

    run(scenario)


def test_a_client_refuses_a_server_that_is_not_the_one_it_expects() -> None:
    async def scenario() -> None:
        async with Server(CALLEE, ("127.0.0.1", 0)) as server:
            with pytest.raises(Refused, match=f"the peer is {spiffe_id('callee')}, not {spiffe_id('other')}"):
                async with Tunnel.connect(server.address, CALLER, spiffe_id("other")):
                    pass
            async with Tunnel.connect(server.address, CALLER, [spiffe_id("other"), spiffe_id("callee")]) as tunnel:
                assert tunnel.peer == spiffe_id("callee")

    run(scenario)


def test_a_client_refuses_a_server_of_another_authority() -> None:
    async def scenario() -> None:
        async with Server(identity(spiffe_id("callee"), signer=STRANGER), ("127.0.0.1", 0)) as server:
            with pytest.raises(Refused, match="CERTIFICATE_VERIFY_FAILED"):
                async with Tunnel.connect(server.address, CALLER, spiffe_id("callee")):
                    pass
            await until(lambda: server.failures == ["TLSV1_ALERT_UNKNOWN_CA"])

    run(scenario)


async def raw(server: Server, context: ssl.SSLContext | None, data: bytes) -> bytes:
    """Everything that the server has to say to somebody who speaks no HBONE."""
    reader, writer = await asyncio.open_connection(*server.address, ssl=context, server_hostname="shop.test" if context else None)
    writer.write(data)
    found = bytearray()
    with contextlib.suppress(OSError):
        while chunk := await reader.read(65536):
            found += chunk
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return bytes(found)


def test_garbage_instead_of_tls_is_answered_with_an_alert() -> None:
    async def scenario() -> None:
        async with Server(CALLEE, ("127.0.0.1", 0)) as server:
            assert (await raw(server, None, b"GET / HTTP/1.1\r\n\r\n"))[:1] in {b"\x15", b""}  # alert, RFC 8446, section 5.1
            await until(lambda: server.failures == ["HTTP_REQUEST"])
            assert (await raw(server, None, bytes(64)))[:1] in {b"\x15", b""}
            await until(lambda: server.failures == ["HTTP_REQUEST", "WRONG_VERSION_NUMBER"])
            assert server.tunnels == []

    run(scenario)


def test_garbage_instead_of_http2_ends_the_connection() -> None:
    async def scenario() -> None:
        async with Server(CALLEE, ("127.0.0.1", 0)) as server:
            answer = await raw(server, CALLER.context(server=False), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
            assert (answer[3:4], b"\x00\x00\x08\x07" in answer) == (
                b"\x04",
                False,
            )  # SETTINGS, but no GOAWAY: RFC 9113, sections 6.5 and 6.8
            await until(lambda: server.tunnels[0].ended)
            assert (server.tunnels[0].ended, server.tunnels[0].sni) == ("Invalid HTTP/2 preamble.", "shop.test")

    run(scenario)


def test_a_client_that_offers_another_protocol_is_refused() -> None:
    async def scenario() -> None:
        async with Server(CALLEE, ("127.0.0.1", 0)) as server:
            context = CALLER.context(server=False)
            context.set_alpn_protocols(["http/1.1"])
            assert await raw(server, context, b"") == b""
            assert server.failures == ["no h2 in ALPN"]

    run(scenario)


def test_a_server_that_speaks_no_tls_is_refused() -> None:
    async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async def scenario() -> None:
        async with application(http) as port:
            with pytest.raises(Refused, match="WRONG_VERSION_NUMBER"):
                async with Tunnel.connect(("127.0.0.1", port), CALLER):
                    pass

    run(scenario)


def test_a_server_that_closes_in_the_handshake_is_refused() -> None:
    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        writer.close()

    async def scenario() -> None:
        async with application(close) as port:
            with pytest.raises(Refused, match="closed"):
                async with Tunnel.connect(("127.0.0.1", port), CALLER):
                    pass

    run(scenario)


def test_a_slow_handshake_holds_up_nobody_and_succeeds() -> None:
    async def scenario() -> None:
        async with meeting() as (server, _, target):
            with socket.create_connection(server.address) as slow:
                slow.setblocking(False)
                context = CALLER.context(server=False)
                incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
                tls = context.wrap_bio(incoming, outgoing)
                with contextlib.suppress(ssl.SSLWantReadError):
                    tls.do_handshake()
                hello = outgoing.read()
                for part in (hello[:1], hello[1:100]):
                    slow.send(part)
                    async with Tunnel.connect(server.address, CALLER) as other:
                        assert (await other.open(target)).status == 200
                slow.send(hello[100:])
                loop = asyncio.get_running_loop()
                while True:
                    incoming.write(await loop.sock_recv(slow, 65536))
                    try:
                        tls.do_handshake()
                    except ssl.SSLWantReadError:
                        continue
                    break
                slow.send(outgoing.read())
                await until(lambda: len([seen for seen in server.tunnels if not seen.ended]) == 2)
                assert server.failures == []

    run(scenario)


def test_a_drain_lets_streams_go_on_and_names_the_last() -> None:
    async def scenario() -> None:
        async with meeting() as (server, tunnel, target):
            stream = await tunnel.open(target)
            await server.drain()
            await tunnel.ping()
            assert await tunnel.goaway() == ("NO_ERROR", stream.number)
            await stream.write(b"still here")
            await stream.half_close()
            assert await stream.read_all() == b"still here"

    run(scenario)


def test_a_lost_connection_ends_its_streams() -> None:
    async def scenario() -> None:
        server = Server(CALLEE, ("127.0.0.1", 0))
        async with application(echo) as port:
            await server.__aenter__()
            async with Tunnel.connect(server.address, CALLER) as tunnel:
                stream = await tunnel.open(f"127.0.0.1:{port}")
                await server.__aexit__()
                with pytest.raises(Lost, match="closed"):
                    await stream.read()
                assert await tunnel.ended() == "closed"
                assert server.tunnels[0].ended == "stopped"

    run(scenario)


def test_the_command_line_says_what_happened(tmp_path: Path) -> None:
    for name, who in (("caller", CALLER), ("callee", CALLEE)):
        for part in ("chain", "key", "roots"):
            (tmp_path / f"{name}.{part}").write_bytes(getattr(who, part))

    def argv(name: str, *more: str) -> list[str]:
        files = [word for part in ("chain", "key", "roots") for word in (f"--{part}", str(tmp_path / f"{name}.{part}"))]
        return [sys.executable, "-m", "tests.hbone", *files, *more]

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        port = listener.getsockname()[1]
        command = argv("callee", "server", "--address", "127.0.0.1", "--port", "0")
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            _, there = json.loads(server.stdout.readline())["listening"]
            command = argv(
                "caller", "client", "--address", "127.0.0.1", "--port", str(there), "--target", f"127.0.0.1:{port}", "--send", "hi"
            )
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
                with listener.accept()[0] as accepted:
                    assert accepted.makefile("rb").read() == b"hi"
                    accepted.sendall(b"ho")
                assert client.stdout is not None
                result = json.loads(client.stdout.read())
            record = json.loads(server.communicate()[0])
    assert (result["status"], result["received"], result["ended"], result["peer"]) == (200, "ho", "END_STREAM", spiffe_id("callee"))
    assert record["tunnels"][0]["requests"][0]["status"] == 200


def test_codes_have_names() -> None:
    assert [hbone.name_of(code) for code in (int(ErrorCodes.REFUSED_STREAM), 999)] == ["REFUSED_STREAM", "999"]
