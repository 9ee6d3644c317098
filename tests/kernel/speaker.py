"""What applications do with HTTP/1.1, both ends, byte by byte: what the tests of protocols run inside pods. Needs nothing but Python's standard library.

`speaker.py serve` listens on PORT until it is killed. `speaker.py CLIENT HOST PORT` prints one JSON object about what it saw.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import http.server
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

PORT = 8080
SIZE = 64 << 20
PIECE = hashlib.sha256(b"piece").digest() * 2048
EVENTS, PAUSE_S = 5, 0.2
POLL_S = 16.0  # longer than any default of Envoy: its routes give up after 15 s unless told not to
HELD_S = 0.5


class Handler(http.server.BaseHTTPRequestHandler):
    """A method for each way to speak."""

    protocol_version = "HTTP/1.1"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing."""

    def handle_expect_100(self) -> bool:
        """Refuse a body of /refuse before it is sent; let others come after a while."""
        if self.path == "/refuse":
            self._say(417, {})
            self.close_connection = True
            return False
        time.sleep(HELD_S)
        return super().handle_expect_100()

    def do_GET(self) -> None:
        """/events, /poll, /download, /trailers, /upgrade."""
        getattr(self, f"_{self.path.strip('/')}")()

    def do_PUT(self) -> None:
        """Read it all and say what came."""
        found, length, trailers = hashlib.sha256(), 0, {}
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline(), 16):
                data = self.rfile.read(size)
                found.update(data)
                length += size
                self.rfile.readline()
            while (line := self.rfile.readline().strip()) != b"":
                name, _, value = line.decode().partition(":")
                trailers[name.lower()] = value.strip()
        else:
            left = int(self.headers["Content-Length"])
            while left and (data := self.rfile.read(min(left, 1 << 16))):
                found.update(data)
                length += len(data)
                left -= len(data)
        self._say(200, {"length": length, "sha256": found.hexdigest(), "trailers": trailers})

    def do_CONNECT(self) -> None:
        """Be a proxy that echoes."""
        self.send_response(200)
        self.end_headers()
        self._echo(f"{self.path}\n".encode())

    def _say(self, status: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _events(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(EVENTS):
            self._chunk(f"data: {number}\n\n".encode())
            time.sleep(PAUSE_S)
        self.wfile.write(b"0\r\n\r\n")

    def _poll(self) -> None:
        time.sleep(POLL_S)
        self._say(200, {"peer": "late"})

    def _download(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(SIZE))
        self.end_headers()
        for _ in range(SIZE // len(PIECE)):
            self.wfile.write(PIECE)

    def _trailers(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Trailer", "x-digest")
        self.end_headers()
        self._chunk(b"body")
        self.wfile.write(b"0\r\nx-digest: abc\r\n\r\n")

    def _upgrade(self) -> None:
        self.send_response(101)
        self.send_header("Connection", "Upgrade")
        self.send_header("Upgrade", self.headers["Upgrade"])
        self.end_headers()
        self._echo(b"")

    def _echo(self, greeting: bytes) -> None:
        self.close_connection = True
        self.wfile.write(greeting)
        while data := self.connection.recv(1 << 16):
            self.wfile.write(data)

    def _plain(self) -> None:
        self._say(200, {"version": self.request_version, "host": self.headers.get("Host")})


class Server(http.server.ThreadingHTTPServer):
    """IPv4 and IPv6."""

    address_family = socket.AF_INET6
    daemon_threads = True


@contextlib.contextmanager
def sent(host: str, port: int, head: str) -> Iterator[tuple[socket.socket, Any]]:
    """A connection on which a request's head was sent, and its reading end."""
    with socket.create_connection((host, port), timeout=POLL_S * 2) as connection, connection.makefile("rb") as reader:
        connection.sendall(head.replace("\n", "\r\n").encode())
        yield connection, reader


def head_of(reader: Any) -> tuple[str, dict[str, str]]:
    """Status line and headers, names in lower case."""
    status = reader.readline().decode().strip()
    headers = {}
    while line := reader.readline().decode().strip():
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return status, headers


def events(host: str, port: int) -> dict[str, Any]:
    """When each event came, in seconds after the first."""
    with sent(host, port, "GET /events HTTP/1.1\nHost: x\n\n") as (_, reader):
        status, headers = head_of(reader)
        times: list[float] = []
        while len(times) < EVENTS:
            if reader.readline().startswith(b"data: "):
                times.append(time.monotonic())
    return {"status": status, "type": headers.get("content-type"), "at": [round(t - times[0], 3) for t in times]}


def poll(host: str, port: int) -> dict[str, Any]:
    """An answer that takes long."""
    started = time.monotonic()
    with sent(host, port, "GET /poll HTTP/1.1\nHost: x\n\n") as (_, reader):
        status, _headers = head_of(reader)
    return {"status": status, "seconds": time.monotonic() - started}


def download(host: str, port: int) -> dict[str, Any]:
    """A large answer, and how much of it was right."""
    connection = http.client.HTTPConnection(host, port, timeout=60)
    connection.request("GET", "/download")
    answer = connection.getresponse()
    found, length = hashlib.sha256(), 0
    while data := answer.read(1 << 16):
        found.update(data)
        length += len(data)
    return {"status": answer.status, "length": length, "sha256": found.hexdigest()}


def upload(host: str, port: int) -> dict[str, Any]:
    """A large request, of known length."""
    connection = http.client.HTTPConnection(host, port, timeout=60)
    connection.request("PUT", "/", body=(PIECE for _ in range(SIZE // len(PIECE))), headers={"Content-Length": str(SIZE)})
    return dict(json.loads(connection.getresponse().read()))


def chunks(host: str, port: int) -> dict[str, Any]:
    """A request in chunks, with a trailer behind it."""
    head = "PUT / HTTP/1.1\nHost: x\nTransfer-Encoding: chunked\nTrailer: x-sum\n\n5\nhello\n0\nx-sum: 23\n\n"
    with sent(host, port, head) as (_, reader):
        status, headers = head_of(reader)
        return {"status": status, **json.loads(reader.read(int(headers["content-length"])))}


def trailers(host: str, port: int) -> dict[str, Any]:
    """An answer with a trailer: its bytes from the body on."""
    with sent(host, port, "GET /trailers HTTP/1.1\nHost: x\nTE: trailers\nConnection: close, TE\n\n") as (_, reader):
        status, _headers = head_of(reader)
        return {"status": status, "rest": reader.read().decode().lower()}


def expect(host: str, port: int) -> dict[str, Any]:
    """Ask before a body is sent: the first line that comes, when, and what comes in the end."""
    started = time.monotonic()
    with sent(host, port, "PUT / HTTP/1.1\nHost: x\nContent-Length: 5\nExpect: 100-continue\n\n") as (connection, reader):
        first, _headers = head_of(reader)
        held = time.monotonic() - started
        connection.sendall(b"hello")
        return {"first": first, "held": held, "then": head_of(reader)[0]}


def refused(host: str, port: int) -> dict[str, Any]:
    """The same, of a server that does not want it."""
    with sent(host, port, "PUT /refuse HTTP/1.1\nHost: x\nContent-Length: 5\nExpect: 100-continue\n\n") as (_, reader):
        return {"first": head_of(reader)[0]}


def upgrade(host: str, port: int, protocol: str = "websocket") -> dict[str, Any]:
    """Another protocol on the connection, as WebSocket does it; what came back of binary data, both ways at a time."""
    request = f"GET /upgrade HTTP/1.1\nHost: x\nConnection: Upgrade\nUpgrade: {protocol}\nSec-WebSocket-Key: {'A' * 22}==\nSec-WebSocket-Version: 13\n\n"
    with sent(host, port, request) as (connection, reader):
        status, headers = head_of(reader)
        return {"status": status, "upgrade": headers.get("upgrade"), **echoed(connection, reader)}


def connect(host: str, port: int) -> dict[str, Any]:
    """Through a proxy in the mesh."""
    with sent(host, port, "CONNECT example.test:443 HTTP/1.1\nHost: example.test:443\n\n") as (connection, reader):
        status, _headers = head_of(reader)
        return {"status": status, "asked": reader.readline().decode().strip(), **echoed(connection, reader)}


def refusal(host: str, port: int) -> dict[str, Any]:
    """What a proxy answers that is none."""
    with sent(host, port, "CONNECT example.test:443 HTTP/1.1\nHost: example.test:443\n\n") as (_, reader):
        return {"status": head_of(reader)[0]}


def old(host: str, port: int) -> dict[str, Any]:
    """HTTP/1.0 without a Host, as old health checks speak."""
    with sent(host, port, "GET /plain HTTP/1.0\n\n") as (_, reader):
        status, _headers = head_of(reader)
        return {"status": status, "body": reader.read().decode()}


def echoed(connection: socket.socket, reader: Any) -> dict[str, Any]:
    """Send a megabyte while it comes back."""
    data = PIECE * 16
    sender = threading.Thread(target=connection.sendall, args=(data,))
    sender.start()
    back = reader.read(len(data))
    sender.join()
    return {"same": back == data}


CLIENTS: dict[str, Callable[..., dict[str, Any]]] = {
    f.__name__: f for f in (events, poll, download, upload, chunks, trailers, expect, refused, upgrade, connect, refusal, old)
}


def main(arguments: list[str]) -> None:
    """See the module."""
    if arguments == ["serve"]:
        with Server(("::", PORT), Handler) as server:
            print("ready", flush=True)
            server.serve_forever()
    name, host, port, *more = arguments
    print(json.dumps(CLIENTS[name](host, int(port), *more)))


if __name__ == "__main__":
    main(sys.argv[1:])
