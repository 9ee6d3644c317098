"""TCP and UDP as applications use them, both ends: what the tests of tunnels run inside pods. Needs nothing but Python's standard library.

`streams.py serve` listens until it is killed, at the ports below. `streams.py CLIENT HOST PORT [NUMBER ...]` prints one JSON object. Data is the same
endless pattern everywhere, so that either end can check it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import select
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

ECHO, GREETER, SINK, SOURCE, LISTENER, DATAGRAMS = 9001, 9002, 9003, 9004, 9005, 9006
CHUNK = 1 << 16
TIMEOUT_S = 30.0
PATTERN = b"".join(hashlib.sha256(number.to_bytes(4, "big")).digest() for number in range(32768))  # 1 MiB


def pieces(length: int) -> Any:
    """The first `length` bytes of the pattern."""
    for start in range(0, length, len(PATTERN)):
        yield PATTERN[: min(len(PATTERN), length - start)]


def digest(length: int) -> str:
    """SHA-256 of the first `length` bytes of the pattern."""
    found = hashlib.sha256()
    for piece in pieces(length):
        found.update(piece)
    return found.hexdigest()


def consumed(connection: socket.socket, pause: float = 0.0, most: int = 1 << 60) -> dict[str, Any]:
    """Read to the end, or `most`: how much came, its digest, and how it ended: "end", "enough", or the name of an errno."""
    found, length, end = hashlib.sha256(), 0, "enough"
    try:
        while length < most:
            if not (data := connection.recv(CHUNK)):
                end = "end"
                break
            found.update(data)
            length += len(data)
            if pause:
                time.sleep(pause)
    except OSError as error:
        end = named(error)
    return {"length": length, "sha256": found.hexdigest(), "end": end}


def named(error: OSError) -> str:
    """The errno's name."""
    return errno.errorcode.get(error.errno or 0, "ETIMEDOUT" if isinstance(error, TimeoutError) else str(error))


class Server:
    """One handler a port, one thread a connection."""

    def __init__(self) -> None:
        self._last: dict[str, Any] = {}

    def echo(self, connection: socket.socket) -> None:
        """Give back what comes, end when the other end has."""
        while data := connection.recv(CHUNK):
            connection.sendall(data)

    def greeter(self, connection: socket.socket) -> None:
        """Speak first, as MySQL and SMTP do."""
        connection.sendall(b"220 welcome\r\n")
        line = connection.makefile("rb").readline()
        connection.sendall(b"250 " + line)

    def sink(self, connection: socket.socket) -> None:
        """Answer when the other end has ended."""
        connection.sendall(json.dumps(consumed(connection)).encode())

    def source(self, connection: socket.socket) -> None:
        """Send as much as a line asks for, and close; with "wait" in the line, after the other end has."""
        stream = connection.makefile("rb")
        length, *wait = stream.readline().split()
        for piece in pieces(int(length)):
            connection.sendall(piece)
        if wait:
            stream.read()

    def listener(self, connection: socket.socket) -> None:
        """End first, and go on to read. To a line "last" say what came the last time."""
        if connection.recv(5, socket.MSG_WAITALL) == b"last\n":
            connection.sendall(json.dumps(self._last).encode())
            return
        self._last = {}
        connection.sendall(b"bye")
        connection.shutdown(socket.SHUT_WR)
        self._last = consumed(connection)

    def run(self) -> None:
        """Serve for ever."""
        handlers: dict[int, Callable[[socket.socket], None]] = {
            ECHO: self.echo, GREETER: self.greeter, SINK: self.sink, SOURCE: self.source, LISTENER: self.listener,
        }  # fmt: skip
        listening = {}
        for port, handle in handlers.items():
            one = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
            one.setblocking(False)
            listening[one] = handle
        datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        datagrams.bind(("::", DATAGRAMS))
        while True:
            for ready in select.select([*listening, datagrams], [], [])[0]:
                if ready is datagrams:
                    data, peer = datagrams.recvfrom(CHUNK)
                    datagrams.sendto(data, peer)
                    continue
                with contextlib.suppress(BlockingIOError):
                    connection, _ = ready.accept()
                    connection.setblocking(True)
                    threading.Thread(target=self._serve, args=(listening[ready], connection), daemon=True).start()

    @staticmethod
    def _serve(handle: Callable[[socket.socket], None], connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, ValueError):
            handle(connection)


def dial(host: str, port: int) -> socket.socket:
    """Connect as the address is written: ::ffff:a.b.c.d through an IPv6 socket."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    connection = socket.socket(family)
    connection.settimeout(TIMEOUT_S)
    connection.connect((host, port))
    return connection


def peer(connection: socket.socket) -> list[Any]:
    """What getpeername() says."""
    return list(connection.getpeername()[:2])


def say(host: str, port: int, text: str = "hello") -> dict[str, Any]:
    """Send a text; what comes back, and how it ended."""
    with dial(host, port) as connection:
        dialled = peer(connection)
        connection.sendall(text.encode())
        connection.shutdown(socket.SHUT_WR)
        answer, end = b"", "end"
        try:
            while data := connection.recv(CHUNK):
                answer += data
        except OSError as error:
            end = named(error)
        return {"peer": dialled, "answer": answer.decode(errors="replace"), "end": end}


def greet(host: str, port: int) -> dict[str, Any]:
    """Wait for the server's first word."""
    with dial(host, port) as connection:
        stream = connection.makefile("rb")
        first = stream.readline().decode()
        connection.sendall(b"EHLO\r\n")
        return {"peer": peer(connection), "first": first, "second": stream.readline().decode()}


def upload(host: str, port: int, length: str) -> dict[str, Any]:
    """Send, end, and then receive."""
    with dial(host, port) as connection:
        for piece in pieces(int(length)):
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while data := connection.recv(CHUNK):
            answer += data
        return {**json.loads(answer), "ok": json.loads(answer)["sha256"] == digest(int(length))}


def download(host: str, port: int, length: str) -> dict[str, Any]:
    """Receive, and then end."""
    with dial(host, port) as connection:
        connection.sendall(f"{length} wait\n".encode())
        found = consumed(connection, most=int(length))
        connection.shutdown(socket.SHUT_WR)
        found["end"] = consumed(connection)["end"]
        return {**found, "ok": found["sha256"] == digest(int(length))}


def drain(host: str, port: int, length: str, pause: str = "0", nap: str = "0") -> dict[str, Any]:
    """Receive from a server that ends first, after a nap and with a pause after each read."""
    with dial(host, port) as connection:
        connection.sendall(f"{length}\n".encode())
        time.sleep(float(nap))
        found = consumed(connection, float(pause))
        return {**found, "ok": found["sha256"] == digest(int(length))}


def answers(host: str, port: int, length: str, count: str) -> dict[str, Any]:
    """Receive from a server that ends first, again and again."""
    outcomes: Counter[str] = Counter()
    wanted = digest(int(length))
    for _ in range(int(count)):
        with dial(host, port) as connection:
            connection.sendall(f"{length}\n".encode())
            found = consumed(connection)
            outcomes["ok" if found["sha256"] == wanted else "a part" if found["end"] == "end" else found["end"]] += 1
    return {"outcomes": outcomes}


def late(host: str, port: int, length: str) -> dict[str, Any]:
    """Send after the server has ended; what it says later of what it got."""
    with dial(host, port) as connection:
        connection.sendall(b"late\n")
        found: dict[str, Any] = {"heard": consumed(connection)["length"]}
        try:
            for piece in pieces(int(length)):
                connection.sendall(piece)
                time.sleep(0.1)  # a reset would be noticed by the next
            connection.shutdown(socket.SHUT_WR)
            found["sent"] = "all"
        except OSError as error:
            found["sent"] = named(error)
    end = time.monotonic() + TIMEOUT_S
    said: dict[str, Any] = {}
    while not said and time.monotonic() < end:
        said = json.loads(say(host, port, "last\n")["answer"])
    return {**found, **said, "ok": said.get("sha256") == digest(int(length))}


def many(host: str, port: int, count: str, at_once: str = "1") -> dict[str, Any]:
    """Short connections, one after the other in each of some threads; with several threads all are open before the first speaks."""
    outcomes: Counter[str] = Counter()
    width = int(at_once)
    barrier = threading.Barrier(width)

    def work() -> None:
        for number in range(int(count) // width):
            try:
                with dial(host, port) as connection:
                    if width > 1 and not number:
                        barrier.wait()
                    connection.sendall(b"%d" % number)
                    outcomes["ok" if connection.recv(64) == b"%d" % number else "wrong"] += 1
            except OSError as error:
                outcomes[named(error)] += 1

    started = time.monotonic()
    threads = [threading.Thread(target=work) for _ in range(width)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"outcomes": outcomes, "seconds": time.monotonic() - started}


def hold(host: str, port: int) -> dict[str, Any]:
    """Use one connection every 50 ms until SIGTERM: how often, and how it ended."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    count, end = 0, "open"
    with dial(host, port) as connection:
        print("running", flush=True)
        while not ended.wait(0.05):
            try:
                connection.sendall(b"still here")
                if connection.recv(64) != b"still here":
                    end = "end"
                    break
            except OSError as error:
                end = named(error)
                break
            count += 1
    return {"count": count, "end": end}


def datagram(host: str, port: int) -> dict[str, Any]:
    """Ask five times."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(0.3)
        asking.connect((host, port))
        outcomes: Counter[str] = Counter()
        for _ in range(5):
            try:
                asking.send(b"ping")
                outcomes[asking.recv(64).decode()] += 1
            except OSError as error:
                outcomes[named(error)] += 1
        return {"outcomes": outcomes}


CLIENTS: dict[str, Callable[..., dict[str, Any]]] = {
    one.__name__: one for one in (say, greet, upload, download, drain, answers, late, many, hold, datagram)
}


def main(what: str, *arguments: str) -> None:
    """Be a server, or a client once."""
    if what == "serve":
        Server().run()
    host, port, *more = arguments
    try:
        answer = CLIENTS[what](host, int(port), *more)
    except OSError as error:
        answer = {"error": named(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
