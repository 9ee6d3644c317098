"""Run in pods of tests: `serve` answers what it was asked, `ask HOST PORT NAME...` sends what no client should, over HTTP/1.1 and HTTP/2, and says what came.

The server says, as JSON, what it saw of a request: line, headers, body; at /lines what it has seen of all. `ask` prints {NAME: [outcome, ...]};
an outcome is [status, what the server said] for each answer, or "closed", "reset" (of the stream), "goaway", "silent".
"""

from __future__ import annotations

import itertools
import json
import select
import socket
import socketserver
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import hpack
from hyperframe import frame as frames

WAIT_S = 3.0
Outcome = Any
LINES: list[str] = []
"""First lines of all requests that reached the server."""
GET = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a")]
POST = [(":method", "POST"), *GET[1:]]
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Handler(socketserver.StreamRequestHandler):
    """A server that takes every byte as it comes, and so would be fooled by what is passed on."""

    def handle(self) -> None:
        """Answer until the caller closes."""
        while line := self.rfile.readline(1 << 20):
            headers = []
            while (field := self.rfile.readline(1 << 20)) not in {b"\r\n", b"\n", b""}:
                headers.append(field.decode("latin-1").rstrip("\r\n"))
            body = self._body({name.lower(): value.strip() for name, _, value in (field.partition(":") for field in headers)})
            LINES.append(line.decode("latin-1").strip()[:80])
            seen = {"line": LINES[-1], "headers": headers, "body": body.decode("latin-1")}
            said = json.dumps({"lines": LINES} if "/lines" in LINES[-1] else seen).encode()
            self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(said) + said)

    def _body(self, headers: dict[str, str]) -> bytes:
        if "transfer-encoding" not in headers:
            return self.rfile.read(int(headers.get("content-length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline() not in {b"\r\n", b"\n", b""}:
            pass
        return body


class Server(socketserver.ThreadingTCPServer):
    """On both families."""

    address_family = socket.AF_INET6
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024


def post(*headers: str, body: str = "", line: str = "POST / HTTP/1.1") -> bytes:
    """One request whose host is "a"."""
    return ("\r\n".join([line, "host: a", *headers]) + "\r\n\r\n" + body).encode("latin-1")


HIDDEN = "GET /admin HTTP/1.1\r\nhost: a\r\n\r\n"
CHUNKS = "5\r\nhello\r\n0\r\n\r\n"
HTTP1: dict[str, bytes] = {
    # Two lengths (RFC 9112, 6.3 and 11.2)
    "length then chunks": post("content-length: 4", "transfer-encoding: chunked", body="0\r\n\r\n" + HIDDEN),
    "chunks then length": post("transfer-encoding: chunked", "content-length: 4", body="0\r\n\r\n" + HIDDEN),
    "two codings": post("transfer-encoding: chunked", "transfer-encoding: cow", body=CHUNKS + HIDDEN),
    "chunked twice": post("transfer-encoding: chunked", "transfer-encoding: chunked", body=CHUNKS),
    "identity, chunked": post("transfer-encoding: identity, chunked", body=CHUNKS),
    "chunked, identity": post("transfer-encoding: chunked, identity", body=CHUNKS),
    "gzip, chunked": post("transfer-encoding: gzip, chunked", body=CHUNKS),
    "a coding after a vertical tab": post("transfer-encoding: \x0bchunked", body=CHUNKS + HIDDEN),
    "a coding in quotation marks": post('transfer-encoding: "chunked"', body=CHUNKS + HIDDEN),
    "a folded coding": post("transfer-encoding:\r\n chunked", body=CHUNKS),
    "a coding in capitals": post("Transfer-Encoding: CHUNKED", body=CHUNKS),
    "chunks in HTTP/1.0": post("transfer-encoding: chunked", body=CHUNKS, line="POST / HTTP/1.0"),
    "an underscore for a dash": post("transfer_encoding: chunked", "content-length: 0"),
    # Lengths
    "a list of lengths": post("content-length: 5, 5", body="hello"),
    "a length in hexadecimal": post("content-length: 0x5", body="hello"),
    "a length with a plus": post("content-length: +5", body="hello"),
    "a length with zeros": post("content-length: 0005", body="hello"),
    "an empty length": post("content-length:", body="hello"),
    "a length of 2^64+5": post("content-length: 18446744073709551621", body="hello"),
    "a negative length": post("content-length: -5", body="hello"),
    "a length of a GET hides a request": post(f"content-length: {len(HIDDEN)}", body=HIDDEN, line="GET / HTTP/1.1"),
    # Chunks (RFC 9112, 7.1)
    "a chunk extension": post("transfer-encoding: chunked", body='5;a="b;c"\r\nhello\r\n0;d\r\n\r\n'),
    "a chunk extension with a line feed": post("transfer-encoding: chunked", body="5;a\nb\r\nhello\r\n0\r\n\r\n" + HIDDEN),
    "a long chunk extension": post("transfer-encoding: chunked", body=f"5;{'a' * 100_000}\r\nhello\r\n0\r\n\r\n"),
    "chunks with bare line feeds": post("transfer-encoding: chunked", body="5\nhello\n0\n\n"),
    "a chunk that is longer than it says": post("transfer-encoding: chunked", body="5\r\nhello!\r\n0\r\n\r\n"),
    "a chunk size in hexadecimal with 0x": post("transfer-encoding: chunked", body="0x5\r\nhello\r\n0\r\n\r\n"),
    "a chunk size with a sign": post("transfer-encoding: chunked", body="+5\r\nhello\r\n0\r\n\r\n"),
    "an empty chunk size": post("transfer-encoding: chunked", body="\r\nhello\r\n0\r\n\r\n"),
    "a length as a trailer": post("transfer-encoding: chunked", body="5\r\nhello\r\n0\r\ncontent-length: 99\r\n\r\n"),
    "a host as a trailer": post("transfer-encoding: chunked", body="5\r\nhello\r\n0\r\nhost: b\r\n\r\n"),
    # The first line and the names of headers (RFC 9112, 3 and 5.1)
    "a line before the request": b"\r\n" + post("content-length: 0"),
    "two spaces": post(line="GET  / HTTP/1.1"),
    "a tab": post(line="GET\t/ HTTP/1.1"),
    "a space in the path": post(line="GET /a b HTTP/1.1"),
    "a carriage return in the path": post(line="GET /a\rb HTTP/1.1"),
    "no path": post(line="GET HTTP/1.1"),
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/1.2": post(line="GET / HTTP/1.2"),
    "HTTP/2.0 in a line": post(line="GET / HTTP/2.0"),
    "a method of signs": post(line="G[T / HTTP/1.1"),
    "a fragment": post(line="GET /a#b HTTP/1.1"),
    "another host in the target": post(line="GET http://b/ HTTP/1.1"),
    "a user in the target": post(line="GET http://b@c/ HTTP/1.1"),
    "no name": post(": x"),
    "a space in a name": post("x y: z"),
    "a control character in a value": post("x: a\x01b"),
    "a delete character in a value": post("x: a\x7fb"),
    "two hosts": post("host: b"),
    "a host with a path": b"GET / HTTP/1.1\r\nhost: a/../b\r\n\r\n",
    "a host with a space": b"GET / HTTP/1.1\r\nhost: a b\r\n\r\n",
    "an upgrade to HTTP/2": post(
        "connection: upgrade, http2-settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQAAP__", line="GET / HTTP/1.1"
    ),
    "an unknown upgrade": post("connection: upgrade", "upgrade: foo", line="GET / HTTP/1.1"),
    "headers named as hop by hop": post("connection: close, host, x-role", "x-role: user", line="GET / HTTP/1.1"),
    # Sizes
    "100 headers": post(*(f"x{n}: a" for n in range(97)), line="GET / HTTP/1.1"),
    "1,000 headers": post(*(f"x{n}: a" for n in range(1000)), line="GET / HTTP/1.1"),
    "59 KiB of headers": post(f"x: {'a' * (59 << 10)}", line="GET / HTTP/1.1"),
    "61 KiB of headers": post(f"x: {'a' * (61 << 10)}", line="GET / HTTP/1.1"),
    "61 KiB of path": post(line=f"GET /{'a' * (61 << 10)} HTTP/1.1"),
    "200 KiB of trailers": post("transfer-encoding: chunked", body=f"0\r\nx: {'a' * 200_000}\r\n\r\n"),
}


def http1(host: str, port: int, data: bytes) -> Outcome:
    """Send, and read every answer until the connection ends or nothing comes any more."""
    received = b""
    with socket.create_connection((host, port), timeout=WAIT_S) as stream:
        stream.settimeout(0.5)
        end = "silent"
        try:
            stream.sendall(data)
            until = time.monotonic() + WAIT_S
            while time.monotonic() < until:
                try:
                    piece = stream.recv(1 << 20)
                except TimeoutError:
                    if received:
                        break
                    continue
                if not piece:
                    end = "closed"
                    break
                received += piece
        except OSError:
            end = "closed"
    answers = list(_answers(received))
    return answers or end


def _answers(received: bytes) -> Iterator[list[Any]]:
    while received.startswith(b"HTTP/"):
        head, _, received = received.partition(b"\r\n\r\n")
        lines = [line.partition(b":") for line in head.split(b"\r\n")[1:]]
        length = next((int(value) for name, _, value in lines if name.lower() == b"content-length"), 0)
        body, received = received[:length], received[length:]
        yield [int(head.split(b" ")[1]), json.loads(body) if body.startswith(b"{") else {}]


def headers(stream: int, fields: list[tuple[str, str]], *flags: str, encoder: hpack.Encoder | None = None) -> bytes:
    """A HEADERS frame; names and values as they are."""
    block = (encoder or hpack.Encoder()).encode(fields)
    return bytes(frames.HeadersFrame(stream, block, flags=["END_HEADERS", *flags]).serialize())


def one(fields: list[tuple[str, str]], *after: bytes) -> bytes:
    """One request, alone or with something after its headers."""
    return headers(1, fields, *([] if after else ["END_STREAM"])) + b"".join(after)


def data(body: bytes, *flags: str) -> bytes:
    """A DATA frame of the first stream."""
    return bytes(frames.DataFrame(1, body, flags=list(flags)).serialize())


def put(fields: list[tuple[str, str]], **changed: str) -> list[tuple[str, str]]:
    """The same with other pseudo headers."""
    return [(name, changed.get(name.removeprefix(":"), value)) for name, value in fields]


HTTP2: dict[str, bytes] = {
    "plain": one(GET),
    "a line break in a value": one([*GET, ("x", "a\r\nx-role: admin")]),
    "a line feed in a value": one([*GET, ("x", "a\nb")]),
    "a zero byte in a value": one([*GET, ("x", "a\0b")]),
    "a line break in a name": one([*GET, ("x\r\ny", "a")]),
    "a colon in a name": one([*GET, ("x:y", "a")]),
    "a space in a name": one([*GET, ("x y", "a")]),
    "capitals in a name": one([*GET, ("X-Role", "a")]),
    "a line break in the path": one(put(GET, path="/ HTTP/1.1\r\nhost: b\r\n\r\nGET /admin")),
    "a space in the path": one(put(GET, path="/a b")),
    "a path and a version": one(put(GET, path="/ HTTP/1.1")),
    "an empty path": one(put(GET, path="")),
    "a path without a slash": one(put(GET, path="admin")),
    "a space in the method": one(put(GET, method="GET /admin HTTP/1.1\r\n")),
    "a line break in the authority": one(put(GET, authority="a\r\nx-role: admin")),
    "a space in the authority": one(put(GET, authority="a b")),
    "a line break in the scheme": one(put(GET, scheme="http\r\n")),
    "another host": one([*GET, ("host", "b")]),
    "two paths": one([*GET, (":path", "/admin")]),
    "no path": one([field for field in GET if field[0] != ":path"]),
    "an unknown pseudo header": one([*GET, (":role", "admin")]),
    "a pseudo header at the end": one([GET[0], ("x", "a"), *GET[1:]]),
    "a coding": one([*POST, ("transfer-encoding", "chunked")], data(CHUNKS.encode(), "END_STREAM")),
    "a connection header": one([*GET, ("connection", "x-role")]),
    "an upgrade": one([*GET, ("upgrade", "websocket"), ("connection", "upgrade")]),
    "te": one([*GET, ("te", "gzip")]),
    "a length that is too short": one([*POST, ("content-length", "3")], data(b"hello" + HIDDEN.encode(), "END_STREAM")),
    "a length that is too long": one([*POST, ("content-length", "9")], data(b"hello", "END_STREAM")),
    "two lengths": one([*POST, ("content-length", "5"), ("content-length", "6")], data(b"hello", "END_STREAM")),
    "a length without a body": one([*GET, ("content-length", "5")]),
    "1,000 headers": one([*GET, *((f"x{n}", "a") for n in range(1000))]),
    "data before headers": data(b"x", "END_STREAM"),
}


def http2(host: str, port: int, sent: bytes) -> Outcome:
    """Send on a new connection; what became of the first stream, and whether the connection lives on ("goaway" if not)."""
    with socket.create_connection((host, port), timeout=WAIT_S) as stream:
        stream.settimeout(WAIT_S)
        decoder, body, status = hpack.Decoder(), b"", 0
        try:
            stream.sendall(PREFACE + frames.SettingsFrame().serialize() + sent)
            with stream.makefile("rb") as reader:
                for found in _frames(reader):
                    if isinstance(found, frames.GoAwayFrame):
                        return "goaway"
                    if isinstance(found, frames.RstStreamFrame):
                        return "reset"
                    if isinstance(found, frames.HeadersFrame):
                        fields: dict[Any, Any] = dict(decoder.decode(found.data))
                        status = int(fields[":status"])
                    if isinstance(found, frames.DataFrame):
                        body += found.data
                    if "END_STREAM" in getattr(found, "flags", ()):
                        return [[status, json.loads(body) if body.startswith(b"{") else {}]]
        except TimeoutError:
            return "silent"
        except OSError:
            pass
        return "closed"


def _frames(reader: Any) -> Iterator[Any]:
    while len(start := reader.read(9)) == 9:
        found, length = frames.Frame.parse_frame_header(memoryview(start))
        found.parse_body(memoryview(reader.read(length)))
        yield found


def _rapid_resets() -> Iterator[bytes]:
    """CVE-2023-44487."""
    encoder = hpack.Encoder()
    for n in range(20_000):
        number = 1 + 2 * n
        yield headers(number, GET, "END_STREAM", encoder=encoder) + frames.RstStreamFrame(number, 8).serialize()


def _continuations() -> Iterator[bytes]:
    """CVE-2024-30255: headers that never end."""
    encoder = hpack.Encoder()
    yield bytes(frames.HeadersFrame(1, encoder.encode(GET), flags=["END_STREAM"]).serialize())
    for n in range(20_000):
        yield bytes(frames.ContinuationFrame(1, encoder.encode([(f"x{n}", "a" * 64)])).serialize())


def _same(one_of_them: bytes, count: int, before: bytes = b"") -> Callable[[], Iterator[bytes]]:
    def every() -> Iterator[bytes]:
        yield before
        yield from itertools.repeat(one_of_them * 100, count // 100)

    return every


FLOODS: dict[str, Callable[[], Iterator[bytes]]] = {
    "rapid resets": _rapid_resets,
    "continuations": _continuations,
    "settings": _same(frames.SettingsFrame(settings={4: 65535}).serialize(), 300_000),
    "pings": _same(frames.PingFrame(0, b"12345678").serialize(), 300_000),
    "empty data": _same(data(b""), 100_000, headers(1, POST)),
    "priorities": _same(frames.PriorityFrame(1, stream_weight=1).serialize(), 300_000, headers(1, POST)),
    "window updates": _same(frames.WindowUpdateFrame(1, 1).serialize(), 300_000, headers(1, POST)),
}


def flood(host: str, port: int, pieces: Iterator[bytes]) -> Outcome:
    """Send as fast as it goes and read nothing: "closed" if the other side had enough, "taken" if it took all of it."""
    with socket.socket() as stream:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stream.settimeout(WAIT_S)
        stream.connect((host, port))
        try:
            stream.sendall(PREFACE + frames.SettingsFrame().serialize())
            for piece in pieces:
                stream.sendall(piece)
        except TimeoutError:
            return "stalled"
        except OSError:
            return "closed"
        watch = select.poll()
        watch.register(stream, select.POLLRDHUP)  # and, whatever is asked, POLLHUP and POLLERR
        return "closed" if watch.poll(WAIT_S * 1000) else "taken"


def hold(host: str, port: int, count: int, begun: bytes) -> None:
    """Open connections, send the beginning of a request on each, print how many there are, and stay until standard input ends."""
    held = []
    for _ in range(count):
        stream = socket.create_connection((host, port), timeout=WAIT_S)
        stream.sendall(begun)
        held.append(stream)
    print(len(held), flush=True)
    sys.stdin.read()


def main() -> None:
    """Serve, ask or hold."""
    if sys.argv[1] == "serve":
        Server(("::", 8080), Handler).serve_forever()
        return
    host, port, *names = sys.argv[2], int(sys.argv[3]), *sys.argv[4:]
    if sys.argv[1] == "hold":
        hold(host, port, int(names[0]), names[1].encode().decode("unicode_escape").encode("latin-1"))
        return
    found: dict[str, Outcome] = {}
    for name in names or [*(f"1 {one}" for one in HTTP1), *(f"2 {one}" for one in HTTP2), *(f"flood {one}" for one in FLOODS)]:
        kind, _, what = name.partition(" ")
        if kind == "1":
            found[name] = http1(host, port, HTTP1[what])
        elif kind == "2":
            found[name] = http2(host, port, HTTP2[what])
        else:
            found[name] = flood(host, port, FLOODS[what]())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
