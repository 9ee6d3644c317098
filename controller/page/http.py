"""A small HTTP/1.1 server for GET, on the controller's event loop: h11 parses, asyncio carries. It knows nothing of what it serves.

Everything a stranger can make long is bounded: connections, the head of a request and how long it may take, the time of an answer and of its way out. A body
is not read; whoever sends one, or anything but GET, gets an error and the end of the connection. https://www.rfc-editor.org/rfc/rfc9110, rfc9112.
"""

from __future__ import annotations

import asyncio
import logging
import os
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
_ERRORS: Final = (ConnectionError, ssl.SSLError, TimeoutError, asyncio.TimeoutError)


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
    return Response(status, f"{why}\n".encode(), headers={name.replace("_", "-"): value for name, value in headers.items()})


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
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], asyncio.WriteTransport] = {}
        self.port = 0

    async def listen_tcp(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        """Listen. Raises OSError."""
        self._server = await asyncio.start_server(
            self._connected, host, port, limit=MOST_HEAD, ssl=tls, ssl_handshake_timeout=HEAD_S if tls else None
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def listen_unix(self, path: Path) -> None:
        """Listen, for this user alone. Raises OSError."""
        before = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._connected, path, limit=MOST_HEAD)
        finally:
            os.umask(before)

    async def stop(self) -> bool:
        """End it, with every connection; False if it did not listen."""
        if (server := self._server) is None:
            return False
        server.close()
        connections = dict(self._connections)
        for task, transport in connections.items():
            transport.abort()
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await server.wait_closed()
        self._server = None
        return True

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if len(self._connections) >= MOST_CONNECTIONS or task is None:
            writer.transport.abort()
            return
        self._connections[task] = writer.transport
        try:
            if await self._serve(reader, writer):
                await asyncio.wait_for(_drop(reader, writer), LINGER_S)
            writer.close()
            await asyncio.wait_for(writer.wait_closed(), WRITE_S)
        except _ERRORS as error:
            _log.debug("a connection to the page ended", extra={"reason": repr(error)})
        finally:
            del self._connections[task]
            writer.transport.abort()

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
                    raise _Refused(refusal(405, "only GET is served here", Allow="GET"))
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
