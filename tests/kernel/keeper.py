"""HTTP clients that keep their connections, run by the tests inside pods until SIGTERM. Needs nothing but Python's standard library.

`keeper.py get CONNECTIONS CALLS_PER_SECOND URL`: that many connections share that many GETs a second; one that ends is made anew and nothing is retried.
`keeper.py put CONNECTIONS URL`: one POST on each connection, whose body goes on byte by byte until SIGTERM and is then completed.
Prints "running" when each connection has been used, and at the end one JSON line: a list of [time (CLOCK_MONOTONIC) at which it was over, number of the
connection, outcome, pod]; the outcome is an HTTP status or the name of an errno or exception, the pod who answered, if any.
"""

from __future__ import annotations

import errno
import http.client
import json
import signal
import sys
import threading
import time
import urllib.parse
from typing import Any

TIMEOUT_S = 10.0
LENGTH = 10_000
EVERY_S = 0.1

ended = threading.Event()
found: list[tuple[float, int, str, str]] = []
numbers = iter(range(1 << 30))


def connected(target: urllib.parse.SplitResult) -> http.client.HTTPConnection:
    """A connection that exists."""
    connection = http.client.HTTPConnection(target.hostname or "", target.port or 80, timeout=TIMEOUT_S)
    connection.connect()
    return connection


def outcome(connection: http.client.HTTPConnection, number: int) -> bool:
    """Take the answer; False if the connection ends with it."""
    answer = connection.getresponse()
    content = answer.read()
    body: dict[str, Any] = json.loads(content) if content.startswith(b"{") else {}
    found.append((time.monotonic(), number, str(answer.status), str(body.get("pod", ""))))
    return not answer.will_close


def failed(error: Exception, number: int) -> None:
    """Note how it ended."""
    name = errno.errorcode.get(error.errno or 0, type(error).__name__) if isinstance(error, OSError) else type(error).__name__
    found.append((time.monotonic(), number, name, ""))


def get(target: urllib.parse.SplitResult, pause: float, used: threading.Barrier) -> None:
    """Ask until the end."""
    connection, number, first = None, -1, True
    due = time.monotonic()
    while not ended.is_set():
        try:
            if connection is None:
                number = next(numbers)
                connection = connected(target)
            connection.request("GET", target.path or "/")
            if not outcome(connection, number):
                connection = None
        except (OSError, http.client.HTTPException) as error:
            failed(error, number)
            connection = None
        if first:
            used.wait()
            first, due = False, time.monotonic()
        due += pause
        ended.wait(max(0.0, due - time.monotonic()))


def put(target: urllib.parse.SplitResult, used: threading.Barrier) -> None:
    """Send a little, and the rest at the end."""
    number = next(numbers)
    connection = connected(target)
    connection.putrequest("POST", target.path or "/")
    connection.putheader("Content-Length", str(LENGTH))
    connection.endheaders()
    used.wait()
    sent = 0
    try:
        while not ended.wait(EVERY_S) and sent < LENGTH - 1:
            connection.send(b"x")
            sent += 1
        connection.send(b"x" * (LENGTH - sent))
        outcome(connection, number)
    except (OSError, http.client.HTTPException) as error:
        try:
            outcome(connection, number)  # a refusal that came before all was sent
        except (OSError, http.client.HTTPException):
            failed(error, number)


def main(what: str, connections: int, *rest: str) -> None:
    """Run until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    used = threading.Barrier(connections + 1)
    target = urllib.parse.urlsplit(rest[-1])
    if what == "get":
        threads = [threading.Thread(target=get, args=(target, connections / float(rest[0]), used)) for _ in range(connections)]
    else:
        threads = [threading.Thread(target=put, args=(target, used)) for _ in range(connections)]
    for thread in threads:
        thread.start()
    used.wait()
    print("running", flush=True)
    for thread in threads:
        thread.join()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
