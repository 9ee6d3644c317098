"""Keys of token issuers: what is fetched from real HTTPS servers, what is not, and what stays when a server fails."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID

from controller import jwks
from controller.jwks import Keys
from lab import pki
from tests.tasks import beside
from tests.tokens import Issuer

ONE = Issuer("https://one.test")
Answer = Callable[[BaseHTTPRequestHandler], None]


def say(body: bytes, status: int = 200, **headers: str) -> Answer:
    """Answer with a body."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"content_length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, *_: object) -> None:
        """A client that does not believe the certificate goes away: that is wanted."""


class Site:
    """A server whose answer can be changed; `uri` is where."""

    def __init__(self, directory: Path, name: str = "127.0.0.1") -> None:
        self.answer: Answer = say(ONE.jwks.encode())
        self.asked = 0
        authority = pki.authority()
        leaf = pki.issue(authority, "site", [x509.IPAddress(ipaddress.ip_address(name))], ExtendedKeyUsageOID.SERVER_AUTH)
        pem = serialization.Encoding.PEM
        self.ca = directory / "ca.crt"
        self.ca.write_bytes(authority.certificate.public_bytes(pem))
        chain = directory / "site.pem"
        key = leaf.key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        chain.write_bytes(leaf.certificate.public_bytes(pem) + key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain)
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked += 1
                with contextlib.suppress(OSError):
                    site.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True, do_handshake_on_connect=False)
        self.uri = f"https://127.0.0.1:{self.server.server_address[1]}/keys?a=b"
        self.context = ssl.create_default_context(cafile=str(self.ca))


@contextlib.contextmanager
def serving(directory: Path, name: str = "127.0.0.1") -> Iterator[Site]:
    site = Site(directory, name)
    thread = threading.Thread(target=site.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield site
    finally:
        site.server.shutdown()
        site.server.server_close()
        thread.join()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with serving(tmp_path) as running:
        yield running


def drip(handler: BaseHTTPRequestHandler) -> None:
    """Answer for ever, a little at a time."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.05)


def drip_head(handler: BaseHTTPRequestHandler) -> None:
    """Never end the head of the answer, a byte at a time."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.05)


def go_on(handler: BaseHTTPRequestHandler) -> None:
    """Say for ever that the answer comes later."""
    while True:
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.05)


def drip_trailers(handler: BaseHTTPRequestHandler) -> None:
    """Never end what comes behind the body."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
    while True:
        handler.wfile.write(b"a: b\r\n")
        time.sleep(0.05)


def test_a_set_is_fetched_over_verified_tls(site: Site) -> None:
    found = json.loads(jwks.fetch(site.uri, 5, site.context))
    assert [key["kid"] for key in found["keys"]] == ["k1"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        pytest.param(say(b"", 302, location="file:///etc/passwd"), "answered 302 (redirects are not followed)", id="redirect"),
        pytest.param(say(b"", 301, location="https://169.254.169.254/"), "redirects are not followed", id="redirect-elsewhere"),
        pytest.param(say(b"no", 500), "answered 500", id="error"),
        pytest.param(say(b"<html>secret</html>"), "is no JWK set", id="page"),
        pytest.param(say(b"\xff\xfe"), "no text", id="bytes"),
        pytest.param(say(b" " * (jwks.MAX_BYTES + 1)), f"more than {jwks.MAX_BYTES} bytes", id="large"),
        pytest.param(say(json.dumps({"keys": [ONE.jwk] * (jwks.MAX_KEYS + 1)}).encode()), "at most 64", id="many"),
        pytest.param(drip, "took longer than 0.5 s", id="slow"),
        pytest.param(drip_head, "took longer than 0.5 s", id="slow-head"),
        pytest.param(go_on, "took longer than 0.5 s", id="head-that-never-comes"),
        pytest.param(drip_trailers, "took longer than 0.5 s", id="slow-trailers"),
    ],
)
def test_an_answer_that_is_no_small_and_quick_set_is_refused_and_not_quoted(site: Site, answer: Answer, words: str) -> None:
    site.answer = answer
    began = time.monotonic()
    with pytest.raises((ValueError, OSError)) as error:
        jwks.fetch(site.uri, 0.5 if "longer" in words else 5, site.context)
    assert words in str(error.value)
    assert "secret" not in str(error.value)
    assert time.monotonic() - began < 4


def test_a_handshake_that_never_ends_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def trickle() -> None:
            client, _ = listening.accept()
            with client, contextlib.suppress(OSError):
                client.sendall(b"\x16\x03\x03\x3f\xff")  # a record of 16383 bytes (RFC 8446, 5.1)
                for _ in range(200):
                    client.sendall(b"\x02")
                    time.sleep(0.05)

        thread = threading.Thread(target=trickle)
        thread.start()
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"took longer than 0\.5 s"):
            jwks.fetch(f"https://127.0.0.1:{listening.getsockname()[1]}/", 0.5, ssl.create_default_context())
        assert time.monotonic() - began < 4
        thread.join()


def test_slow_issuers_delay_neither_others_nor_who_else_needs_threads(caplog: pytest.LogCaptureFixture) -> None:
    release, asked = threading.Event(), {"slow": 0, "quick": 0}

    def get(uri: str, _timeout: float, _context: ssl.SSLContext) -> str:
        kind = "slow" if "slow" in uri else "quick"
        asked[kind] += 1
        if kind == "slow":
            release.wait(30)
            raise TimeoutError("took longer than 30 s")
        return jwks.public_keys(ONE.jwks)

    slow = [f"https://slow.test/{number}?key=secret" for number in range(jwks.AT_ONCE - 1)]

    async def scenario() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        keys, calls = Keys(None, refresh_s=0.05, get=get), asyncio.Event()

        async def changed() -> None:
            calls.set()

        keys.want([(uri, 30.0) for uri in slow] + [("https://quick.test/?key=secret", 5.0)])
        async with beside(keys.follow(changed)):
            try:
                await asyncio.wait_for(calls.wait(), 10)
                assert list(keys.found) == ["https://quick.test/?key=secret"]
                for _ in range(200):
                    if asked["quick"] >= 3:
                        break
                    await asyncio.sleep(0.05)
                assert asked == {"slow": len(slow), "quick": asked["quick"]}, "nobody is asked twice at a time"
                assert asked["quick"] >= 3, "and it goes on"
                assert await asyncio.wait_for(asyncio.to_thread(lambda: 1), 5) == 1
            finally:
                release.set()
            for _ in range(200):
                if len(keys.found) > len(slow):
                    break
                await asyncio.sleep(0.02)
            assert {keys.found[uri].problem for uri in slow} == {"took longer than 30 s"}

    with caplog.at_level(logging.INFO, "controller.jwks"):
        asyncio.run(asyncio.wait_for(scenario(), 60))
    assert {vars(record)["uri"].partition("/0")[0] for record in caplog.records} >= {"https://quick.test/", "https://slow.test"}
    assert not any("secret" in str(vars(record)) for record in caplog.records)


def test_a_server_that_proves_no_name_or_another_is_refused(site: Site, tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        jwks.fetch(site.uri, 5, ssl.create_default_context())
    (tmp_path / "other").mkdir()
    with serving(tmp_path / "other", "192.0.2.1") as other, pytest.raises(ssl.SSLCertVerificationError):
        jwks.fetch(other.uri, 5, other.context)
    assert site.asked == 0


@pytest.mark.parametrize("uri", ["https://169.254.169.254/", "https://[fe80::1]/", "https://0.0.0.0/", "https://224.0.0.1/"])
def test_addresses_that_no_issuer_has_are_not_asked(uri: str) -> None:
    with pytest.raises(ValueError, match="which is no address of an issuer"):
        jwks.fetch(uri, 0.5, ssl.create_default_context())


def test_the_last_good_set_stays_and_outlives_a_restart(site: Site, tmp_path: Path) -> None:
    cache = tmp_path / "kept.json"

    async def scenario() -> None:
        news = asyncio.Event()

        async def changed() -> None:
            news.set()

        keys = Keys(cache, site.ca, refresh_s=0.05)
        keys.want([(site.uri, 2.0)])
        async with beside(keys.follow(changed)):
            await asyncio.wait_for(news.wait(), 10)
            assert keys.found[site.uri].keys
            news.clear()
            good, site.answer = keys.found[site.uri].keys, say(b"", 503)
            await asyncio.wait_for(news.wait(), 10)
            assert (keys.found[site.uri].keys, keys.found[site.uri].problem) == (good, "answered 503")
        assert Keys(cache).found[site.uri].keys == good, "after a restart"
        assert cache.stat().st_mode & 0o777 == 0o600
        keys.want([])
        assert keys.found == {}

    asyncio.run(scenario())


def test_kept_keys_that_are_damaged_are_fetched_again(tmp_path: Path) -> None:
    cache = tmp_path / "kept.json"
    for content in ("", "[]", '{"https://a/": 1}', '{"https://a/": "{}"}', "{"):
        cache.write_text(content)
        assert Keys(cache).found == {}
