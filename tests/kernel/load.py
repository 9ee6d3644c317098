"""A client that calls the shop until SIGTERM: a new connection for every call, no retry, nothing hidden. Run by the tests inside pods.

Usage: load.py CALLS_PER_SECOND TARGET, where TARGET is redis://HOST:PORT (PING) or an http:// URL (GET). Needs nothing but Python's standard library.
Prints "running", and at the end one JSON line: a list of [start (CLOCK_MONOTONIC), seconds, outcome]; the outcome is an HTTP status,
"PONG", or the name of an errno.
"""

from __future__ import annotations

import errno
import http.client
import json
import signal
import socket
import sys
import time
import urllib.parse

TIMEOUT_S = 5.0


def ping(target: urllib.parse.SplitResult) -> str:
    """PING over a connection of its own."""
    with socket.create_connection((target.hostname or "", target.port or 6379), timeout=TIMEOUT_S) as connection:
        connection.sendall(b"PING\r\n")
        return connection.recv(64).decode().strip().removeprefix("+")


def get(target: urllib.parse.SplitResult) -> str:
    """GET over a connection of its own."""
    connection = http.client.HTTPConnection(target.hostname or "", target.port or 80, timeout=TIMEOUT_S)
    try:
        connection.request("GET", target.path or "/", headers={"Connection": "close"})
        answer = connection.getresponse()
        answer.read()
        return str(answer.status)
    finally:
        connection.close()


def main(rate: float, url: str) -> None:
    """Call until SIGTERM."""
    ended = False

    def end(*_: object) -> None:
        nonlocal ended
        ended = True

    signal.signal(signal.SIGTERM, end)
    target = urllib.parse.urlsplit(url)
    call = ping if target.scheme == "redis" else get
    calls = []
    print("running", flush=True)
    due = time.monotonic()
    while not ended:
        started = time.monotonic()
        try:
            outcome = call(target)
        except TimeoutError:
            outcome = "ETIMEDOUT"
        except http.client.HTTPException as error:
            outcome = type(error).__name__
        except OSError as error:
            outcome = errno.errorcode.get(error.errno or 0, str(error))
        calls.append((started, time.monotonic() - started, outcome))
        due += 1 / rate
        time.sleep(max(0.0, due - time.monotonic()))
    print(json.dumps(calls))


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2])
