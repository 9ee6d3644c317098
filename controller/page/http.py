"""A small HTTP/1.1 server for GET, on the controller's event loop: h11 parses, asyncio carries. It knows nothing of what it serves.

Everything a stranger can make long is bounded: connections, the head of a request and how long it may take, the time of an answer and of its way out. A body
is not read; whoever sends one, or anything but GET, gets an error and the end of the connection. https://www.rfc-editor.org/rfc/rfc9110, rfc9112.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl

import h11

_log = logging.getLogger(__name__)

MOST_CONNECTIONS: Final = 64
MOST_HEAD: Final = 8192
"""Bytes of a request's line and headers together."""
HEAD_S: Final = 10.0
"""For a request to arrive whole, since the connection or since the last answer; a page asks more often."""
ANSWER_S: Final = 40.0
WRITE_S: Final = 20.0
LINGER_S: Final = 1.0
"""A client that was refused has so long to read why, before what it still sends meets a closed socket and takes the answer with it."""
_MOST_PARAMETERS: Final = 8
_ERRORS: Final = (OSError, TimeoutError, asyncio.TimeoutError, h11.ProtocolError)


@dataclass(frozen=True, slots=True)
class Request:
    """A GET. `headers` by lower-case name; `parameters` of the query."""

    path: str
    parameters: Mapping[str, str]
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Response:
    """What is answered."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)


def refusal(status: int, why: str, **headers: str) -> Response:
    """An answer that is one sentence; names of headers with _ for -."""
    return Response(status, f"{why}\n".encode() if why else b"", headers={name.replace("_", "-"): value for name, value in headers.items()})


class _Refused(Exception):
    """The request gets no further."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status)
        self.response = response


class HttpServer:
    """Serves what `answer` says; every answer also has the headers in `common`."""

    def __init__(self, answer: Callable[[Request], Awaitable[Response]], common: Mapping[str, str]) -> None:
        self._answer = answer
        self._common = common
        self._listening: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.port = 0

    async def listen_tcp(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        """Listen. Raises OSError."""
        loop = asyncio.get_running_loop()
        (family, *_, address), *_ = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        listening = socket.create_server(address[:2], family=family)
        self.port = listening.getsockname()[1]
        self._begin(listening, tls)

    async def listen_unix(self, path: Path) -> None:
        """Listen, for this user alone. Raises OSError."""
        self._begin(_own(path), None)

    def _begin(self, listening: socket.socket, tls: ssl.SSLContext | None) -> None:
        listening.setblocking(False)
        self._listening = listening
        self._accepting = asyncio.create_task(self._accept(listening, tls), name="page accepts")

    async def stop(self) -> bool:
        """End it, with every connection; False if it did not listen."""
        if self._accepting is None or self._listening is None:
            return False
        ending = [self._accepting, *self._connections]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        self._listening.close()
        self._accepting = self._listening = None
        return True

    async def _accept(self, listening: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Not asyncio.start_server, which calls back after the handshake of TLS: until then nobody would count a connection."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listening)
            except OSError as error:
                _log.warning("the page cannot accept a connection", extra={"error": str(error)})
                await asyncio.sleep(1)
                continue
            if len(self._connections) >= MOST_CONNECTIONS:
                accepted.close()
                continue
            task = asyncio.create_task(self._connected(accepted, tls))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _connected(self, accepted: socket.socket, tls: ssl.SSLContext | None) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=MOST_HEAD)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport: asyncio.Transport | None = None
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol, accepted, ssl=tls, ssl_handshake_timeout=HEAD_S if tls else None
            )
            writer = asyncio.StreamWriter(transport, protocol, reader, loop)
            if await self._serve(reader, writer):
                await asyncio.wait_for(_drop(reader, writer), LINGER_S)
            writer.close()
            await asyncio.wait_for(writer.wait_closed(), WRITE_S)
        except _ERRORS as error:
            _log.debug("a connection to the page ended", extra={"reason": repr(error)})
        finally:
            if transport is None:
                accepted.close()
            else:
                transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer requests until the connection has to end; True if the client may still be sending."""
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MOST_HEAD)
        going_on = True
        while going_on:
            try:
                request = await asyncio.wait_for(_request(connection, reader), HEAD_S)
                if request is None:
                    return False
                response = await asyncio.wait_for(self._answer(request), ANSWER_S)
            except _Refused as refused:
                response, going_on = refused.response, False
            await self._send(connection, writer, response, last=not going_on)
            if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                break
            connection.start_next_cycle()
        return not going_on

    async def _send(self, connection: h11.Connection, writer: asyncio.StreamWriter, response: Response, *, last: bool) -> None:
        if connection.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            return
        headers = {
            "Content-Type": response.content_type,
            "Content-Length": str(len(response.body)),
            **self._common,
            **response.headers,
            **({"Connection": "close"} if last else {}),
        }
        head = h11.Response(status_code=response.status, reason=HTTPStatus(response.status).phrase.encode(), headers=list(headers.items()))
        for event in (head, h11.Data(data=response.body), h11.EndOfMessage()):
            writer.write(connection.send(event) or b"")
        await asyncio.wait_for(writer.drain(), WRITE_S)


def _own(path: Path) -> socket.socket:
    """A socket at `path` for this user alone, in the place of one that is there. Nothing else runs while the umask is another."""
    if path.is_socket():
        path.unlink()
    listening = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        listening.bind(str(path))
        listening.listen()
    except OSError:
        listening.close()
        raise
    finally:
        os.umask(before)
    return listening


async def _drop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say that nothing follows, and let pass what comes."""
    if writer.can_write_eof():
        writer.write_eof()
    while await reader.read(MOST_HEAD):
        pass


async def _request(connection: h11.Connection, reader: asyncio.StreamReader) -> Request | None:
    """The next request; None if the client has gone. Raises _Refused."""
    head: h11.Request | None = None
    try:
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(MOST_HEAD))
            elif isinstance(event, h11.Request):
                if event.method != b"GET":
                    sentence = "" if event.method == b"HEAD" else "only GET is served here"
                    raise _Refused(refusal(405, sentence, Allow="GET"))
                head = event
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                return _read(head)
            elif isinstance(event, h11.Data):
                raise _Refused(refusal(413, "no body is read here"))
            else:
                return None
    except h11.RemoteProtocolError as error:
        raise _Refused(refusal(error.error_status_hint, "this is no request that is understood here")) from error


def _read(head: h11.Request) -> Request:
    target = head.target.decode("ascii")  # h11 lets nothing else through
    path, _, query = target.partition("?")
    if not path.startswith("/"):
        raise _Refused(refusal(400, "a path begins with /"))
    try:
        parameters = dict(parse_qsl(query, max_num_fields=_MOST_PARAMETERS, errors="strict"))
    except ValueError as error:
        raise _Refused(refusal(400, "the query is not well-formed")) from error
    return Request(path, parameters, {name.decode("ascii"): value.decode("latin-1") for name, value in head.headers})
