"""HBONE as Istio's ztunnel speaks it, and a peer that plays ztunnel: as a client (`Tunnel`) and as a server (`Server`). Shares no code with the agent's HBONE.

Sources, by the letters below: Z = github.com/istio/ztunnel at 62d82653 (2026-08-20), files below src/; H = the crate h2 that it uses (0.4.14); R = rustls
(0.23.40); A = github.com/istio/istio, architecture/ambient/ztunnel.md; RFC 9113 (HTTP/2; CONNECT is section 8.5); RFC 8441 (extended CONNECT).
C is ztunnel as client (of the caller's node), S as server (of the callee's node).

TRANSPORT
port            C connects to POD:15008, never to the node, so that S knows from the address which workload is meant and which certificate to show;
                to a waypoint's address and the port configured for it. S listens on [::]:15008 in the pod's namespace. Z config.rs, proxy/outbound.rs, A
source address  C: of its pod (it runs in the pod's namespace), not bound to the application's. S takes the TCP source for policies and statistics and
                binds the connection to the application to it (transparent); not `forwarded`, whatever A says. Z proxy/pool.rs, proxy/inbound.rs
connect         C and S give up after 10 s. TCP_NODELAY; keepalive 180 s, every 180 s, 9 times. Z proxy.rs, config.rs
PROXY protocol  Never on the tunnel. S may start its connection to the application with v2 (TLV 0xD0: the caller's SPIFFE ID), if that asks for it by
                an application tunnel, as waypoints do. Z proxy/inbound.rs, proxy.rs

TLS
version         1.3 only (1.2 too with TLS12_ENABLED=true); AES-256-GCM and AES-128-GCM, no ChaCha20. Z tls/lib.rs
ALPN            Both offer h2 alone and look no further: a peer without ALPN is served; a client that offers others only gets the alert
                no_application_protocol (120). Z tls/certificate.rs, R server/hs.rs
SNI             C sends none (and gives 0.0.0.0 as the name); S ignores it. Z tls/certificate.rs, tls/workload.rs
resumption      C: off. S: as R does by default. Z tls/certificate.rs
certificates    Both send leaf and intermediates. S demands one: else certificate_required (116). Z tls/certificate.rs, R server/tls13.rs
chain           Up to a root of the bundle, in time; extended key usage, if there is any, must name the peer's role. Else unknown_ca (48),
                certificate_expired (45), unsupported_certificate (43). Revoked by a CRL, if one is configured: certificate_revoked (44); open streams are cut
                off at once when a list comes that names the peer's. Z tls/workload.rs, tls/revocation.rs, R error.rs
identity        URIs among the subject alternative names, of exactly this form: spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT; others are passed over.
                Z identity/manager.rs, tls/certificate.rs
C verifies S    One of them is one of those it expects: that of the workload, or one of the service's `subject_alt_names`. No name or address is compared.
                Else certificate_unknown (46) and the application's connection is closed. Z tls/workload.rs, state.rs, proxy/outbound.rs
S verifies C    One of them has the trust domain of S's own certificate, else certificate_unknown (46). The first is the caller in policies. Z tls/workload.rs
slow handshake  S has no limit of time, neither for TLS nor for the preface of HTTP/2. A wrong preface ends the
                connection without GOAWAY. Z proxy/inbound.rs, H server.rs

HTTP/2
C's settings    ENABLE_PUSH 0, INITIAL_WINDOW_SIZE 4 MiB, MAX_FRAME_SIZE 1 MiB, MAX_HEADER_LIST_SIZE 16 KiB; connection window 16 MiB by WINDOW_UPDATE.
                Z proxy/h2/client.rs, config.rs (HTTP2_STREAM_WINDOW_SIZE, HTTP2_CONNECTION_WINDOW_SIZE, HTTP2_FRAME_SIZE)
S's settings    the same windows and frames; MAX_CONCURRENT_STREAMS 200, MAX_HEADER_LIST_SIZE 64 KiB; no ENABLE_CONNECT_PROTOCOL. Z proxy/h2/server.rs
streams         C: at most 100 (POOL_MAX_STREAMS_PER_CONNECTION) or what S allows; a connection that is nearly there leaves the pool for good and another
                one is opened. Z proxy/h2/client.rs, proxy/pool.rs
pooling         One pool per pod. Key: the caller's identity, the identities expected, address and port connected to (not :authority), source address.
                Z proxy/h2/client.rs (WorkloadKey)
idle            C: 5 minutes after the last request the pool lets go (POOL_UNUSED_RELEASE_TIMEOUT); the connection ends once it has no stream.
                S: none. A stream has no time limit on either side. Z proxy/pool.rs, config.rs
PING            Both: the first after 10 s, the next 10 s after each answer; 20 s without answer: C drops the connection, S sends GOAWAY NO_ERROR and drops it.
                Traffic does not count. Z proxy/h2.rs
drain           S: GOAWAY NO_ERROR with last stream 2^31-1, PING, after its answer GOAWAY with the real one; streams may go on for 5 s
                (CONNECTION_TERMINATION_DEADLINE), then they are cut off. C sends no new stream on a connection with GOAWAY. Z proxy/h2/server.rs, drain.rs, H

REQUEST (C sends, S demands)
:method         CONNECT. S: anything else is 400. Z proxy/inbound.rs
:scheme, :path  C: absent (RFC 9113, 8.5). S: RST_STREAM PROTOCOL_ERROR if a CONNECT has one, if anything else lacks :scheme, if there is :protocol.
                H server.rs, recv.rs
:authority      C: ADDRESS:PORT of the pod; of the service if a waypoint is next; IPv6 in brackets; HOSTNAME:PORT of the service only through an
                east-west gateway, there as authority of both tunnels. Z proxy/outbound.rs (build_request)
                S: without a port or missing 400, empty or unreadable RST_STREAM PROTOCOL_ERROR. An address must be the one connected to, else 400 (but for a
                waypoint of it); only the port counts then. A hostname must be a service of this workload, the port one of it, else 503. Ports 15001, 15006,
                15008: 503. Z proxy/inbound.rs (validate_destination, find_inbound_upstream), proxy.rs (HboneAddress), config.rs
baggage         C: always. k8s.cluster.name, k8s.namespace.name, k8s.TYPE.name (TYPE: deployment, pod ...), service.name, service.version, cloud.region,
                cloud.availability_zone, those known, of the CALLER, by "," and "=". S: statistics alone, and needs none. Z baggage.rs
forwarded       C: always. for="ADDRESS:PORT" of the application's socket; with ;host=SERVICE if a service was addressed. S: host= picks the service for
                statistics. Needs none. Z proxy/outbound.rs (build_forwarded)
traceparent     C: always. 00-TRACE-SPAN-00, new for each connection. S: logs it; makes one if it is missing or bad. Z proxy.rs
x-forwarded-network  C: its own network, only on the inner request through an east-west gateway. S: if other than its own, does not look the caller up
                by address. Z proxy.rs, proxy/outbound.rs. x-istio-source and the like are sent by no ztunnel
END_STREAM      C: never on the request, even if the application has sent FIN. No data before the answer. Z proxy/h2/client.rs
too large       S: 431 with END_STREAM and RST_STREAM PROTOCOL_ERROR above 64 KiB (name + value + 32 each, RFC 9113, 6.5.2). H streams.rs

ANSWER (S sends, C demands)
200             Once S is connected to the application; header baggage of the CALLEE (ENABLE_RESPONSE_BAGGAGE, on by default). C takes 200 alone, not 2xx;
                with anything else it closes the application's connection and cancels the stream. Z proxy/inbound.rs, proxy/h2/client.rs
400             not CONNECT; :authority without a port; address not the one connected to
401             denied by policy (not 403). A policy that comes later: RST_STREAM, see below
503             no such service or port; forbidden port; application refused or did not answer within 10 s; the workload is unknown
431             too large. All of these with END_STREAM and without body, then RST_STREAM NO_ERROR (431: PROTOCOL_ERROR), as C's side is open.
                Z proxy/inbound.rs, H streams.rs (maybe_cancel)

DATA
FIN             becomes END_STREAM (an empty DATA), END_STREAM becomes FIN; the other direction goes on until it ends too. Z copy.rs, proxy/h2.rs
TCP RST         becomes END_STREAM, too: S and C hide it. Z copy.rs (ignore_io_errors)
RST_STREAM      received, with any code, becomes FIN; NO_ERROR and CANCEL count as orderly. Sent: CANCEL when a side gives up a stream that is not over
                (policy change, revocation, drain; C after an answer other than 200), NO_ERROR by S if it had sent END_STREAM and C had not.
                Z proxy/h2.rs, H streams.rs

WHERE THIS PEER IS NOT ZTUNNEL. It closes where ztunnel sends certificate_unknown, and demands h2 of ALPN (Python's ssl can do neither alert); it sends no PINGs
of its own accord, has no pool, and connects from its own address. HTTP/2 is hyper-h2's: one more SETTINGS value or two, at their defaults.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import json
import os
import secrets
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cryptography import x509
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    PingAckReceived,
    RemoteSettingsChanged,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)
from h2.exceptions import H2Error
from h2.settings import SettingCodes, Settings
from hyperframe.frame import GoAwayFrame

from agent import netns

PORT = 15008
FORBIDDEN_PORTS = frozenset({15001, 15006, 15008})
STREAM_WINDOW, CONNECTION_WINDOW, FRAME = 4 << 20, 16 << 20, 1 << 20
HEADERS_OF_CLIENT, HEADERS_OF_SERVER = 16 << 10, 64 << 10
STREAMS = 200
CONNECT_S = 10.0
_CHUNK = 1 << 18
_SETTINGS = {int(code) for code in SettingCodes}
_WAITING = 1 << 20  # bytes that may wait for the socket before writers are held up

Headers = Sequence[tuple[str, str]]
T = TypeVar("T")


class Lost(Exception):
    """The connection ended: by the peer's alert, its GOAWAY, its FIN or RST, or because it broke the protocol."""


class Refused(Lost):
    """TLS did not come about, or the peer is somebody else."""


class Reset(Exception):
    """The peer ended one stream with RST_STREAM."""

    def __init__(self, code: int) -> None:
        super().__init__(name_of(code))
        self.code = code


def name_of(code: int) -> str:
    """Name of an HTTP/2 error code (RFC 9113, section 7)."""
    try:
        return ErrorCodes(code).name
    except ValueError:
        return str(code)


@dataclass(frozen=True)
class Identity:
    """PEM: a leaf with its intermediates (none: no certificate is shown), its key, and the roots that the peer's chain must lead to."""

    chain: bytes
    key: bytes
    roots: bytes

    def context(self, *, server: bool) -> ssl.SSLContext:
        """TLS 1.3 with ALPN h2; the peer's chain is verified, a name is not. The key passes through memory alone: OpenSSL wants files (memfd_create(2))."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as rustls: whatever is in the bundle is trusted, self-signed or not
        context.load_verify_locations(cadata=self.roots.decode())
        context.set_alpn_protocols(["h2"])
        if self.chain:
            descriptor = os.memfd_create("identity", os.MFD_CLOEXEC)
            with open(descriptor, "wb") as memory:  # noqa: PTH123  a descriptor has no path
                memory.write(self.chain + b"\n" + self.key)
                memory.flush()
                context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        return context

    @property
    def trust_domain(self) -> str:
        """That of the leaf."""
        return next(iter(spiffe_ids(x509.load_pem_x509_certificate(self.chain)))).split("/")[2]


def spiffe_ids(leaf: x509.Certificate) -> list[str]:
    """The identities of a certificate that ztunnel would see, in their order."""
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    uris = [uri for uri in names.get_values_for_type(x509.UniformResourceIdentifier) if uri.startswith("spiffe://")]
    return [uri for uri in uris if len(parts := uri.split("/")) == 7 and (parts[3], parts[5]) == ("ns", "sa")]


def peer_spiffe_id(tls: ssl.SSLObject) -> str:
    """The first identity of the certificate that the peer has shown, or ""."""
    return next(iter(_peer_ids(tls)), "")


def _peer_ids(tls: ssl.SSLObject) -> list[str]:
    der = tls.getpeercert(binary_form=True)
    return spiffe_ids(x509.load_der_x509_certificate(der)) if der else []


def request_headers(
    source: str, service: str = "", *, namespace: str = "default", name: str = "caller", kind: str = "deployment"
) -> Headers:
    """What ztunnel adds to a CONNECT for an application at `source` (ADDRESS:PORT) that has addressed a service, if any."""
    return [
        (
            "baggage",
            f"k8s.cluster.name=Kubernetes,k8s.namespace.name={namespace},k8s.{kind}.name={name},service.name={name},service.version=v1",
        ),
        ("forwarded", f'for="{source}"' + (f";host={service}" if service else "")),
        ("traceparent", f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"),
    ]


class _Tls:
    """TLS over a socket. asyncio's own loses an alert of the peer's that comes while something is sent, and tells nobody why a handshake failed."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server: bool) -> None:
        self._socket = sock
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.object = context.wrap_bio(self._in, self._out, server_side=server)

    async def handshake(self) -> None:
        """Raises Refused with OpenSSL's words."""
        while True:
            try:
                self.object.do_handshake()
            except ssl.SSLWantReadError:
                await self._send_out()
                await self._receive()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                raise Refused("closed") from None
            except ssl.SSLError as error:
                with contextlib.suppress(OSError):
                    await self._send_out()  # our alert
                raise Refused(error.reason or str(error)) from None
            else:
                return await self._send_out()

    async def read(self) -> bytes:
        """Whatever is there; b"" at the end, be it orderly or not. Raises Lost with the name of the peer's alert."""
        while True:
            try:
                return self.object.read(_CHUNK)
            except ssl.SSLWantReadError:
                await self._receive()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b""
            except ssl.SSLError as error:
                raise Lost(error.reason or str(error)) from None

    async def write(self, data: bytes) -> None:
        self.object.write(data)
        await self._send_out()

    def close(self, last: bytes = b"") -> None:
        """Sends some last bytes and close_notify if that can be done at once."""
        with contextlib.suppress(ssl.SSLError):
            if last:
                self.object.write(last)
            self.object.unwrap()
        with contextlib.suppress(OSError):
            self._socket.send(self._out.read())
        self._socket.close()

    def abort(self) -> None:
        """In the middle of a record."""
        self._socket.close()

    async def _send_out(self) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, self._out.read())

    async def _receive(self) -> None:
        try:
            data = await asyncio.get_running_loop().sock_recv(self._socket, _CHUNK)
        except OSError:
            data = b""
        if data:
            self._in.write(data)
        else:
            self._in.write_eof()


class _H2(H2Connection):
    """hyper-h2, but streams may go on after GOAWAY, as RFC 9113, section 6.8, has it."""

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Any], list[Event]]:
        event = ConnectionTerminated()
        event.error_code, event.last_stream_id = frame.error_code, frame.last_stream_id
        return [], [event]


class Stream:
    """One tunnelled connection. `status` and `headers` are those of the answer; on a server, `request` is what was asked for."""

    def __init__(self, link: _Link, number: int, request: Headers = ()) -> None:
        self.number = number
        self.request = request
        self.status = 0
        self.headers: Headers = []
        self.ended = False  # the peer has sent END_STREAM
        self.reset_code: int | None = None
        self._link = link
        self._chunks: list[DataReceived] = []

    async def read(self) -> bytes:
        """What has come, at least a byte; b"" after END_STREAM. Raises Reset or Lost."""
        await self._link.until(lambda: self._chunks or self.ended or self.reset_code is not None)
        if self._chunks:
            chunk = self._chunks.pop(0)
            self._link.consumed(chunk)
            return chunk.data
        if self.reset_code is not None and not self.ended:
            raise Reset(self.reset_code)
        return b""

    async def read_all(self) -> bytes:
        """Everything until END_STREAM."""
        found = bytearray()
        while data := await self.read():
            found += data
        return bytes(found)

    async def write(self, data: bytes) -> None:
        """Returns when all is on its way; waits for the peer's windows. Raises Reset or Lost."""
        rest = memoryview(data)
        while rest:
            room = await self._link.until(lambda: self.reset_code is not None or self._link.room(self.number))
            if self.reset_code is not None:
                raise Reset(self.reset_code)
            self._link.http.send_data(self.number, bytes(rest[:room]))
            self._link.send()
            rest = rest[room:]

    async def half_close(self) -> None:
        """Send END_STREAM; reading goes on."""
        if self.reset_code is None:
            self._link.http.end_stream(self.number)
            self._link.send()

    async def reset(self, code: int = ErrorCodes.CANCEL) -> None:
        """Send RST_STREAM."""
        if self.reset_code is None:
            self.reset_code = code
            self._link.http.reset_stream(self.number, code)
            self._drop()

    def _drop(self) -> None:
        """Nobody will read the rest, but its share of the connection's window must be given back."""
        for chunk in self._chunks:
            self._link.consumed(chunk)
        self._chunks.clear()
        self._link.send()

    def take(self, event: Event) -> None:
        """One event of this stream."""
        if isinstance(event, DataReceived):
            self._chunks.append(event)
            if self.reset_code is not None:
                self._drop()
        elif isinstance(event, ResponseReceived):
            found = [(_text(name), _text(value)) for name, value in event.headers]
            self.status = int(dict(found)[":status"])
            self.headers = [pair for pair in found if pair[0] != ":status"]
        elif isinstance(event, StreamEnded):
            self.ended = True
        elif isinstance(event, StreamReset):
            self.reset_code = int(event.error_code)


class _Link:
    """One HTTP/2 connection: a task that receives, a task that sends, and whoever waits for what they change."""

    def __init__(self, tls: _Tls, *, client: bool, accept: Callable[[Stream], Awaitable[None]] | None = None) -> None:
        self.http = _H2(
            H2Configuration(client, validate_outbound_headers=False, normalize_outbound_headers=False, validate_inbound_headers=client)
        )
        values = {SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW, SettingCodes.MAX_FRAME_SIZE: FRAME}
        if client:
            values |= {SettingCodes.ENABLE_PUSH: 0, SettingCodes.MAX_HEADER_LIST_SIZE: HEADERS_OF_CLIENT}
        else:
            values |= {SettingCodes.MAX_CONCURRENT_STREAMS: STREAMS, SettingCodes.MAX_HEADER_LIST_SIZE: HEADERS_OF_SERVER}
            self.http.decoder.max_header_list_size = 1 << 20  # Server judges the size: 431 is kinder than hyper-h2's GOAWAY
        self.http.local_settings = Settings(client=client, initial_values=values)
        self.http.max_inbound_frame_size = FRAME
        self.settings: dict[str, int] = {}
        self.goaway: tuple[int, int] | None = None  # (code, last stream)
        self.lost: Lost | None = None
        self.pongs = 0
        self._accept = accept
        self._streams: dict[int, Stream] = {}
        self._waiters: list[asyncio.Future[None]] = []
        self._raw = bytearray()
        self._sending = asyncio.Event()
        self._busy = False
        self._tls = tls
        self._tasks: set[asyncio.Future[None]] = set()

    def start(self) -> None:
        self.http.initiate_connection()
        self.http.increment_flow_control_window(CONNECTION_WINDOW - 65535)
        self.run(self._receive())
        self.run(self._send())
        self.send()

    def run(self, work: Awaitable[None]) -> None:
        """A task that ends with the connection."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        for task in (tasks := list(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._busy:
            self._tls.abort()
        else:
            self._tls.close(bytes(self._raw))

    def open(self, headers: Headers) -> Stream:
        number = self.http.get_next_available_stream_id()
        stream = self._streams[number] = Stream(self, number)
        self.http.send_headers(number, list(headers))
        self.send()
        return stream

    def answer(self, stream: Stream, status: int, *, end: bool) -> None:
        """Send the answer's headers, if the stream still wants them."""
        if stream.reset_code is None:
            self.http.send_headers(stream.number, [(":status", str(status))], end_stream=end)
            self.send()

    def goodbye(self, last: int, code: int = ErrorCodes.NO_ERROR) -> None:
        self._raw += GoAwayFrame(0, last_stream_id=last, error_code=code).serialize()
        self.send()

    async def drain(self) -> None:
        """GOAWAY in two steps (RFC 9113, section 6.8)."""
        self.goodbye(2**31 - 1)
        await self.ping()
        self.goodbye(self.http.highest_inbound_stream_id)

    async def ping(self) -> None:
        """Returns when the peer has answered."""
        before = self.pongs
        self.http.ping(secrets.token_bytes(8))
        self.send()
        await self.until(lambda: self.pongs > before)

    def room(self, number: int) -> int:
        """How much may be sent now."""
        if len(self._raw) > _WAITING:
            return 0
        return min(self.http.local_flow_control_window(number), self.http.max_outbound_frame_size)

    def consumed(self, chunk: DataReceived) -> None:
        self.http.acknowledge_received_data(chunk.flow_controlled_length, chunk.stream_id)
        self.send()

    def send(self) -> None:
        """Wake the task that sends."""
        self._raw += self.http.data_to_send()
        self._sending.set()

    async def until(self, condition: Callable[[], T]) -> T:
        """The condition's value once that is true. Raises what ended the connection if that comes first."""
        while not (value := condition()):
            if self.lost is not None:
                raise self.lost
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        return value

    def _changed(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def _send(self) -> None:
        while True:
            await self._sending.wait()
            self._sending.clear()
            data, self._raw = bytes(self._raw), bytearray()
            self._busy = True
            try:
                await self._tls.write(data)
            except (OSError, ssl.SSLError):
                return  # the receiving task learns why
            self._busy = False
            self._changed()

    async def _receive(self) -> None:
        try:
            while data := await self._tls.read():
                for event in self.http.receive_data(data):
                    self._take(event)
                self.send()
                self._changed()
            self.lost = Lost(f"GOAWAY {name_of(self.goaway[0])}" if self.goaway else "closed")
        except H2Error as error:
            self.send()  # hyper-h2's GOAWAY
            self.lost = Lost(str(error))
        except Lost as error:
            self.lost = error
        self._changed()

    def _take(self, event: Event) -> None:
        if isinstance(event, RequestReceived):
            headers = [(_text(name), _text(value)) for name, value in event.headers]
            stream = self._streams[event.stream_id] = Stream(self, event.stream_id, headers)
            if self._accept is not None:
                self.run(self._accept(stream))
        elif isinstance(event, RemoteSettingsChanged):
            self.settings |= {
                SettingCodes(code).name: change.new_value for code, change in event.changed_settings.items() if code in _SETTINGS
            }
        elif isinstance(event, ConnectionTerminated):
            self.goaway = int(event.error_code or 0), event.last_stream_id or 0
        elif isinstance(event, PingAckReceived):
            self.pongs += 1
        elif (number := getattr(event, "stream_id", None) or 0) in self._streams:
            self._streams[number].take(event)


def _text(value: bytes | str) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _socket(namespace: Path | None, address: str) -> socket.socket:
    """A TCP socket of a network namespace, this one if None."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET

    def make() -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    return make() if namespace is None else netns.run_in(namespace, make)


async def _dial(namespace: Path | None, address: tuple[str, int]) -> socket.socket:
    sock = _socket(namespace, address[0])
    try:
        await asyncio.wait_for(asyncio.get_running_loop().sock_connect(sock, address), CONNECT_S)
    except BaseException:
        sock.close()
        raise
    return sock


class Tunnel:
    """A connection of ztunnel's to a workload's port 15008."""

    def __init__(self, link: _Link, tls: ssl.SSLObject) -> None:
        self.peer = peer_spiffe_id(tls)
        self.alpn = tls.selected_alpn_protocol()
        self.version = tls.version()
        self._link = link

    @staticmethod
    @contextlib.asynccontextmanager
    async def connect(
        address: tuple[str, int], identity: Identity, expect: str | Iterable[str] = (), namespace: Path | None = None
    ) -> AsyncIterator[Tunnel]:
        """A tunnel whose peer has one of the expected identities (any, if none is given) and has sent its SETTINGS. Raises Refused, Lost or OSError."""
        tls = _Tls(await _dial(namespace, address), identity.context(server=False), server=False)
        link = _Link(tls, client=True)
        try:
            await tls.handshake()
            expected, found = {expect} if isinstance(expect, str) else set(expect), _peer_ids(tls.object)
            if expected and not expected & set(found):
                raise Refused(f"the peer is {' '.join(found) or 'nobody'}, not {' '.join(sorted(expected))}")
            link.start()
            tunnel = Tunnel(link, tls.object)
            await link.until(lambda: link.settings)
            yield tunnel
        finally:
            await link.stop()

    async def open(self, authority: str, headers: Headers = (), *, pseudo: Headers | None = None) -> Stream:
        """CONNECT to `authority`; returns with the answer, whatever its status. `pseudo` sends other pseudo-headers. Raises Reset or Lost."""
        stream = self._link.open([*([(":method", "CONNECT"), (":authority", authority)] if pseudo is None else pseudo), *headers])
        await self._link.until(lambda: stream.status or stream.reset_code is not None)
        if not stream.status:
            raise Reset(stream.reset_code or 0)
        return stream

    async def ping(self) -> None:
        """Returns when the peer has answered everything before this."""
        await self._link.ping()

    async def ended(self) -> str:
        """Wait until the peer ends the connection; how it did."""
        await self._link.until(lambda: self._link.lost)
        return str(self._link.lost)

    async def goaway(self) -> tuple[str, int]:
        """Wait for a GOAWAY: its code and last stream, the newest if there are several."""
        await self._link.until(lambda: self._link.goaway)
        code, last = self._link.goaway or (0, 0)
        return name_of(code), last

    @property
    def settings(self) -> Mapping[str, int]:
        """What the peer has set, by name."""
        return self._link.settings


@dataclass
class Request:
    """A request as it came and what was answered: a status, or 0 and the name of an error code."""

    pseudo: Headers
    headers: Headers
    status: int = 0
    reset: str = ""


@dataclass
class Seen:
    """A tunnel as its server saw it. `ended` is empty while it lasts."""

    peer: str
    alpn: str | None
    sni: str | None
    tls: str | None
    source: str
    requests: list[Request] = field(default_factory=list)
    settings: Mapping[str, int] = field(default_factory=dict)
    ended: str = ""


@dataclass
class Server:
    """ztunnel for one workload. `allow` is its policy; `services` gives the workload's port for each HOSTNAME:PORT; with `anywhere`, a target's address counts.

    `address` has port 0 for any; afterwards it is the real one. `tunnels` and `failures` (of TLS, in OpenSSL's words) are what it has seen.
    """

    identity: Identity
    address: tuple[str, int]
    allow: Callable[[str, Request], bool] = lambda _peer, _request: True
    services: Mapping[str, int] = field(default_factory=dict)
    anywhere: bool = False
    namespace: Path | None = None
    tunnels: list[Seen] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _tasks: set[asyncio.Future[None]] = field(default_factory=set)
    _links: list[_Link] = field(default_factory=list)

    async def __aenter__(self) -> Server:  # noqa: PYI034  Self is of Python 3.11
        listener = _socket(self.namespace, self.address[0])
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(self.address)
            listener.listen(128)
        except OSError:
            listener.close()
            raise
        self.address = listener.getsockname()[:2]
        self._spawn(self._listen(listener))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in (tasks := list(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def drain(self) -> None:
        """Ask every client to open no more streams, in two steps; streams go on."""
        for link in list(self._links):
            with contextlib.suppress(Lost):
                await link.drain()

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _listen(self, listener: socket.socket) -> None:
        with listener:
            while True:
                sock, source = await asyncio.get_running_loop().sock_accept(listener)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._spawn(self._tunnel(sock, source))

    async def _tunnel(self, sock: socket.socket, source: tuple[str, int]) -> None:
        context = self.identity.context(server=True)
        sni: list[str | None] = []
        context.sni_callback = lambda _tls, name, _context: sni.append(name)
        local = sock.getsockname()[0]
        tls = _Tls(sock, context, server=True)
        try:
            await tls.handshake()
            self._verify(tls.object)
        except (Refused, OSError) as error:
            self.failures.append(str(error))
            tls.close()
            return
        except asyncio.CancelledError:
            sock.close()
            raise
        seen = Seen(
            peer_spiffe_id(tls.object),
            tls.object.selected_alpn_protocol(),
            next(iter(sni), None),
            tls.object.version(),
            f"{source[0]}:{source[1]}",
        )
        self.tunnels.append(seen)
        link = _Link(tls, client=False, accept=lambda stream: self._serve(link, stream, seen, local))
        self._links.append(link)
        seen.settings = link.settings
        link.start()
        try:
            await link.until(lambda: link.lost)
        finally:
            seen.ended = str(link.lost or "stopped")
            self._links.remove(link)
            await link.stop()

    def _verify(self, tls: ssl.SSLObject) -> None:
        if tls.selected_alpn_protocol() != "h2":
            raise Refused("no h2 in ALPN")
        if not any(peer.split("/")[2] == self.identity.trust_domain for peer in _peer_ids(tls)):
            raise Refused(f"the peer is {peer_spiffe_id(tls) or 'nobody'}, of another trust domain")

    async def _serve(self, link: _Link, stream: Stream, seen: Seen, local: str) -> None:
        pseudo = [pair for pair in stream.request if pair[0].startswith(":")]
        request = Request(pseudo, [pair for pair in stream.request if pair not in pseudo])
        seen.requests.append(request)
        if malformed(pseudo):
            await self._reset(stream, request)
            return
        request.status, target = self._judge(request, seen.peer, local, sum(len(name) + len(value) + 32 for name, value in stream.request))
        sock = None
        if request.status == 200:
            try:
                sock = await _dial(self.namespace, target)
            except (OSError, asyncio.TimeoutError):
                request.status = 503
        link.answer(stream, request.status, end=sock is None)
        if sock is not None:
            with sock:
                await asyncio.gather(_to_socket(stream, sock), _to_stream(sock, stream))
        elif request.status == 431:
            await self._reset(stream, request)
        elif not stream.ended:
            await stream.reset(ErrorCodes.NO_ERROR)

    @staticmethod
    async def _reset(stream: Stream, request: Request) -> None:
        request.reset = ErrorCodes.PROTOCOL_ERROR.name
        await stream.reset(ErrorCodes.PROTOCOL_ERROR)

    def _judge(self, request: Request, peer: str, local: str, size: int) -> tuple[int, tuple[str, int]]:
        """Status and target, in ztunnel's order of checks."""
        fields = dict(request.pseudo)
        host, port = split_authority(fields.get(":authority", "")) or ("", 0)
        address = _address(host)
        known = self.services.get(f"{host}:{port}", 0)
        checks: list[tuple[int, bool]] = [
            (431, size <= HEADERS_OF_SERVER),
            (400, fields[":method"] == "CONNECT"),
            (400, bool(host)),
            (400, address is None or self.anywhere or address == ipaddress.ip_address(local)),
            (503, address is not None or known > 0),
            (503, (port if address else known) not in FORBIDDEN_PORTS),
            (401, self.allow(peer, request)),
        ]
        target = (str(address) if address and self.anywhere else local, port if address else known)
        return next((status for status, passed in checks if not passed), 200), target


def malformed(pseudo: Headers) -> bool:
    """Would the crate h2 reset this stream before ztunnel sees it?"""
    fields = dict(pseudo)
    connect = fields.get(":method") == "CONNECT"
    if ":method" not in fields or ":protocol" in fields or ":status" in fields or connect == (":scheme" in fields):
        return True
    authority = fields.get(":authority", "missing")
    return (connect and ":path" in fields) or not authority or any(character in authority for character in ' "<>\\^`{|}/?#')


def split_authority(authority: str) -> tuple[str, int] | None:
    """Host, without brackets, and port; None if either is missing."""
    host, colon, port = authority.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 0xFFFF:
        return None
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        return None
    return (host, int(port)) if host else None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


async def _to_socket(stream: Stream, sock: socket.socket) -> None:
    """Until END_STREAM, which becomes FIN, as does RST_STREAM."""
    with contextlib.suppress(OSError):
        with contextlib.suppress(Reset, Lost):
            while data := await stream.read():
                await asyncio.get_running_loop().sock_sendall(sock, data)
        sock.shutdown(socket.SHUT_WR)


async def _to_stream(sock: socket.socket, stream: Stream) -> None:
    """Until FIN, which becomes END_STREAM, as does RST."""
    with contextlib.suppress(Reset, Lost):
        with contextlib.suppress(OSError):
            while data := await asyncio.get_running_loop().sock_recv(sock, _CHUNK):
                await stream.write(data)
        await stream.half_close()


async def _client(options: argparse.Namespace, identity: Identity) -> dict[str, Any]:
    """One tunnel, one stream: send, half-close, read to the end."""
    result: dict[str, Any] = {"ended": "END_STREAM"}
    headers = [tuple(header.split("=", 1)) for header in options.header] or request_headers("127.0.0.1:40000")
    started = time.monotonic()
    try:
        async with Tunnel.connect((options.address, options.port), identity, options.expect, options.namespace) as tunnel:
            result |= {"peer": tunnel.peer, "alpn": tunnel.alpn, "tls": tunnel.version, "settings": dict(tunnel.settings)}
            stream = await tunnel.open(options.target, headers)
            result |= {"status": stream.status, "headers": list(stream.headers)}
            if stream.status == 200:
                await stream.write(options.send.encode())
                await stream.half_close()
            result["received"] = (await stream.read_all()).decode("latin-1")
    except (Reset, Lost, OSError, asyncio.TimeoutError) as error:
        result["ended"] = f"{type(error).__name__}: {error}"
    return result | {"seconds": round(time.monotonic() - started, 3)}


async def _server(options: argparse.Namespace, identity: Identity) -> dict[str, Any]:
    """Serve until standard input ends."""
    denied = set(options.deny)
    server = Server(
        identity,
        (options.address, options.port),
        allow=lambda peer, _: peer not in denied,
        anywhere=options.anywhere,
        namespace=options.namespace,
    )
    async with server:
        sys.stdout.write(json.dumps({"listening": list(server.address)}) + "\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)
    return {"tunnels": [asdict(seen) for seen in server.tunnels], "failures": server.failures}


def main() -> None:
    """`python -m tests.hbone client|server`: a JSON object on standard output, for use inside namespaces."""
    parser = argparse.ArgumentParser(prog="python -m tests.hbone", description=main.__doc__)
    parser.add_argument("--chain", type=Path, required=True, help="PEM: leaf, then intermediates")
    parser.add_argument("--key", type=Path, required=True)
    parser.add_argument("--roots", type=Path, required=True)
    parser.add_argument("--namespace", type=Path, help="file of the network namespace to work in")
    roles = parser.add_subparsers(dest="role", required=True)
    for role in ("client", "server"):
        options = roles.add_parser(role)
        options.add_argument("--address", required=True)
        options.add_argument("--port", type=int, default=PORT)
        if role == "client":
            options.add_argument("--target", required=True, help=":authority")
            options.add_argument("--expect", action="append", default=[], help="SPIFFE ID")
            options.add_argument("--header", action="append", default=[], help="NAME=VALUE, instead of ztunnel's")
            options.add_argument("--send", default="", help="text to send before the half-close")
        else:
            options.add_argument("--deny", action="append", default=[], help="SPIFFE ID")
            options.add_argument("--anywhere", action="store_true", help="targets at other addresses than the one connected to")
    chosen = parser.parse_args()
    identity = Identity(chosen.chain.read_bytes(), chosen.key.read_bytes(), chosen.roots.read_bytes())
    sys.stdout.write(json.dumps(asyncio.run((_client if chosen.role == "client" else _server)(chosen, identity))) + "\n")


if __name__ == "__main__":
    main()
