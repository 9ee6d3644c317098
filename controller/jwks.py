"""Sets of public keys (JWK, RFC 7517) that tokens are verified with: what of them is of use, and getting them from their issuers.

Only the controller asks issuers, once for the whole mesh: Envoy would from every node, in the host's network. What it got it keeps, also on disk, until
there is something better. `controller.mesh` runs `Keys.follow`; `controller.compile` reads what there is.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import io
import ipaddress
import json
import logging
import os
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

_log = logging.getLogger(__name__)

MAX_BYTES: Final = 256 << 10
"""Of an answer; the largest public ones have about 20 KB."""
MAX_KEYS: Final = 64
REFRESH_S: Final = 300.0
"""Issuers publish a new key hours before they use it; Istio asks every 20 minutes."""
RETRY_S: Final = 5.0
MAX_RETRY_S: Final = 60.0
AT_ONCE: Final = 8
"""Issuers that are asked at the same time, each in a thread."""
_CURVES: Final[Mapping[str, tuple[str, ec.EllipticCurve]]] = {
    "P-256": ("ES256", ec.SECP256R1()),
    "P-384": ("ES384", ec.SECP384R1()),
    "P-521": ("ES512", ec.SECP521R1()),
}
_KEPT: Final = frozenset({"kty", "kid", "alg", "n", "e", "crv", "x", "y"})
_PRIVATE: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
_MIN_RSA_BITS: Final = 2048  # RFC 7518, 3.3


def public_keys(text: str, *, strict: bool = False) -> str:
    """Return what of a JWK set Envoy can verify signatures with, as a JWK set. Raises ValueError if that is nothing.

    `strict` also refuses a set that holds what nobody should write into a resource: private and symmetric keys.
    """
    try:
        found = json.loads(text)
        keys = found["keys"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError('is no JWK set: a JSON object with "keys"') from None
    if not isinstance(keys, list) or not all(isinstance(key, dict) for key in keys):
        raise ValueError('is no JWK set: "keys" must be a list of objects')
    if len(keys) > MAX_KEYS:
        raise ValueError(f"has {len(keys)} keys; at most {MAX_KEYS} are taken")
    kept, reasons = [], []
    for index, key in enumerate(keys):
        if strict and (secret := sorted(_PRIVATE & key.keys())):
            raise ValueError(f'keys[{index}] holds a secret ("{secret[0]}"): give the public key only, and make a new one')
        if reason := _unusable(key):
            reasons.append(f"keys[{index}] {reason}")
        else:
            kept.append({name: value for name, value in key.items() if name in _KEPT})
    if not kept:
        raise ValueError(f"has no key that can verify a signature{': ' if reasons else ''}{'; '.join(reasons[:5])}")
    return json.dumps({"keys": kept}, sort_keys=True, separators=(",", ":"))


def _unusable(key: Mapping[str, Any]) -> str:
    """Return why a key cannot verify tokens, or nothing."""
    if not all(isinstance(key.get(name, ""), str) for name in _KEPT | {"use"}):
        return "has a member that is no text"
    kind, algorithm = key.get("kty"), key.get("alg", "")
    if key.get("use", "sig") != "sig":
        return f"is not for signatures (use {key['use'][:20]})"
    try:
        if kind == "RSA":
            numbers = rsa.RSAPublicNumbers(_number(key["e"]), _number(key["n"]))
            numbers.public_key()
            if numbers.n.bit_length() < _MIN_RSA_BITS:
                return f"is an RSA key of {numbers.n.bit_length()} bits, less than {_MIN_RSA_BITS}"
            fitting = {f"{family}{size}" for family in ("RS", "PS") for size in (256, 384, 512)}
        elif kind == "EC" and key.get("crv") in _CURVES:
            name, curve = _CURVES[key["crv"]]
            ec.EllipticCurvePublicNumbers(_number(key["x"]), _number(key["y"]), curve).public_key()
            fitting = {name}
        elif kind == "OKP" and key.get("crv") == "Ed25519":
            ed25519.Ed25519PublicKey.from_public_bytes(_bytes(key["x"]))
            fitting = {"EdDSA"}
        else:
            return f"is of a kind that is not supported ({str(kind)[:20]} {str(key.get('crv', ''))[:20]}): RSA, EC and Ed25519 are"
    except (KeyError, ValueError):
        return "is damaged"
    return f"is for {algorithm[:20]}, which does not fit" if algorithm and algorithm not in fitting else ""


def _bytes(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


def _number(text: str) -> int:
    return int.from_bytes(_bytes(text), "big")


def bad_uri(uri: str) -> str:
    """Return why keys are not fetched from there, or nothing."""
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return f"is no URL: {error}"
    if parts.scheme != "https":
        return "must begin with https://: who can change the keys on their way can sign any token"
    if (
        not host
        or parts.username is not None
        or parts.fragment
        or any(ord(character) <= 0x20 or ord(character) > 0x7E for character in uri)
    ):
        return "must be https://HOST[:PORT]/PATH, without user, fragment, spaces"
    return ""


def shown(uri: str) -> str:
    """Where keys are, for logs and conditions: without the query, which may hold a secret."""
    return uri.partition("?")[0]


def fetch(uri: str, timeout: float, context: ssl.SSLContext) -> str:
    """Get a JWK set. Raises ValueError or OSError, with a reason for people.

    `timeout` is for connecting, TLS, head and body together, seconds; the resolver has its own before (resolv.conf(5)).
    What a resource can make the controller do is one GET over TLS to a server that proves its name; redirects are not followed, and no part of an answer that
    is no JWK set is shown. Link-local addresses are refused (metadata services of clouds).
    """
    if wrong := bad_uri(uri):
        raise ValueError(wrong)
    parts = urlsplit(uri)
    host, port = parts.hostname or "", parts.port or 443
    address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
    found = ipaddress.ip_address(str(address).partition("%")[0])
    if found.is_link_local or found.is_multicast or found.is_unspecified:
        raise ValueError(f"{host} is {found}, which is no address of an issuer")
    connection = http.client.HTTPSConnection(host, port, context=context)
    ends = time.monotonic() + timeout
    try:
        with socket.create_connection((str(address), port), timeout) as plain:
            plain.settimeout(_left(ends))  # of the whole handshake
            with context.wrap_socket(plain, server_hostname=host) as secure:
                secure.settimeout(_left(ends))
                connection.sock = secure
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET", target, headers={"Accept": "application/json", "Connection": "close"})
                with contextlib.closing(_Response(secure, ends)) as response:
                    response.begin()
                    body = _body(response)
    except TimeoutError:
        raise TimeoutError(f"took longer than {timeout:g} s") from None
    except http.client.HTTPException as error:
        raise ValueError(f"is no HTTP server: {type(error).__name__}") from error
    try:
        return public_keys(body.decode())
    except UnicodeDecodeError:
        raise ValueError("answered what is no text") from None


def _left(ends: float) -> float:
    """Seconds until then (monotonic). Raises TimeoutError if there are none."""
    left = ends - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Within(io.RawIOBase):
    """What a server sends until a point in time (monotonic), however little at once: a socket's own timeout begins anew with every byte."""

    def __init__(self, secure: ssl.SSLSocket, ends: float) -> None:
        self._secure, self._ends = secure, ends

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._secure.settimeout(_left(self._ends))
        return self._secure.recv_into(buffer)


class _Response(http.client.HTTPResponse):
    """An answer, head and body, that is complete by a point in time (monotonic) or raises TimeoutError."""

    def __init__(self, secure: ssl.SSLSocket, ends: float) -> None:
        super().__init__(secure, method="GET")
        self.fp.close()
        self.fp = io.BufferedReader(_Within(secure, ends))


def _body(response: http.client.HTTPResponse) -> bytes:
    if response.status != http.client.OK:
        raise ValueError(f"answered {response.status}{' (redirects are not followed)' if response.status // 100 == 3 else ''}")
    body = b""
    while chunk := response.read1(65536):
        body += chunk
        if len(body) > MAX_BYTES:
            raise ValueError(f"answered more than {MAX_BYTES} bytes")
    return body


@dataclass(frozen=True, slots=True)
class Fetched:
    """What is known of one URI: the last good set ("" = none yet), and why the last try failed ("" = it did not)."""

    keys: str = ""
    problem: str = ""
    due: float = field(default=0.0, compare=False)
    """When to ask again (monotonic)."""
    wait: float = field(default=RETRY_S, compare=False)


Fetch = Callable[[str, float, ssl.SSLContext], str]


class Keys:
    """The key sets of all URIs that are wanted. One event loop."""

    def __init__(self, cache: Path | None, ca: Path | None = None, refresh_s: float = REFRESH_S, get: Fetch = fetch) -> None:
        """`cache` keeps what was got over a restart; `ca` are authorities to believe besides the system's, PEM."""
        self._cache, self._ca, self._refresh, self._get = cache, ca, refresh_s, get
        self._wanted: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._found: dict[str, Fetched] = {}
        if cache is not None:
            self._found = _read(cache)

    @property
    def found(self) -> Mapping[str, Fetched]:
        """What is known, by URI."""
        return dict(self._found)

    def want(self, uris: Iterable[tuple[str, float]]) -> None:
        """Follow these URIs, each with its timeout in seconds, and no others."""
        wanted = dict(uris)
        if wanted != self._wanted:
            self._wanted = wanted
            self._found = {uri: found for uri, found in self._found.items() if uri in wanted}
            self._changed.set()

    async def follow(self, changed: Callable[[], Awaitable[None]]) -> None:
        """Fetch for ever; `changed` is called when something that is known differs.

        Each URI is a task of its own, and all share threads that nobody else needs: who waits for a slow issuer is that issuer's keys.
        """
        running: dict[str, asyncio.Task[bool]] = {}
        threads = ThreadPoolExecutor(AT_ONCE, "jwks")
        try:
            while True:
                self._changed.clear()
                if not self._wanted and self._cache is not None:
                    with contextlib.suppress(OSError):
                        self._cache.unlink()
                done = [uri for uri, task in running.items() if task.done()]
                news = [running.pop(uri).result() for uri in done]
                if any(news):
                    if self._cache is not None:
                        await asyncio.to_thread(_write, self._cache, dict(self._found))
                    await changed()
                self._start(running, threads)
                now = time.monotonic()
                pause = min((self._due(uri) for uri in self._wanted.keys() - running.keys()), default=now + 3600) - now
                timer = asyncio.get_running_loop().call_later(max(0.05, pause), self._changed.set)
                try:
                    await self._changed.wait()  # wait_for of Python 3.11 can lose a cancellation
                finally:
                    timer.cancel()
        finally:
            for task in running.values():
                task.cancel()
            threads.shutdown(wait=False, cancel_futures=True)

    def _start(self, running: dict[str, asyncio.Task[bool]], threads: Executor) -> None:
        """Ask for what is due and not being asked for."""
        now = time.monotonic()
        for uri in self._wanted:
            if uri not in running and self._due(uri) <= now:
                task = running[uri] = asyncio.create_task(self._one(uri, threads))
                task.add_done_callback(lambda _: self._changed.set())

    def _due(self, uri: str) -> float:
        return self._found[uri].due if uri in self._found else 0.0

    async def _one(self, uri: str, threads: Executor) -> bool:
        """Ask once. Returns whether something is known now that was not."""
        before = self._found.get(uri, Fetched())
        try:
            keys = await asyncio.get_running_loop().run_in_executor(threads, self._fetch, uri, self._wanted.get(uri, 5.0))
        except (OSError, ValueError) as error:
            problem = " ".join(str(error).split())[:300] or type(error).__name__
            if problem != before.problem:
                _log.error("keys of a token issuer not fetched, the last good ones stay", extra={"uri": shown(uri), "error": problem})
            found = replace(before, problem=problem, due=time.monotonic() + before.wait, wait=min(before.wait * 2, MAX_RETRY_S))
        else:
            if keys != before.keys:
                _log.info("keys of a token issuer fetched", extra={"uri": shown(uri)})
            found = Fetched(keys, "", time.monotonic() + self._refresh)
        if uri not in self._wanted:
            return False
        news = found != self._found.get(uri)
        self._found[uri] = found
        return news

    def _fetch(self, uri: str, timeout: float) -> str:
        context = ssl.create_default_context()
        if self._ca is not None:
            context.load_verify_locations(self._ca)
        return self._get(uri, timeout, context)


def _read(path: Path) -> dict[str, Fetched]:
    try:
        content = json.loads(path.read_text())
        return {uri: Fetched(public_keys(keys)) for uri, keys in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        _log.warning("kept keys of token issuers not readable, they are fetched again", extra={"path": str(path), "error": str(error)})
        return {}


def _write(path: Path, found: Mapping[str, Fetched]) -> None:
    content = json.dumps({uri: one.keys for uri, one in found.items() if one.keys})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch(0o600)
        temporary.write_text(content)
        temporary.replace(path)
    except OSError as error:
        _log.warning("keys of token issuers not kept, a restart fetches them again", extra={"path": str(path), "error": str(error)})
