"""Raw HTTP over TCP, run inside a pod: what no client library would send. Reads a list of {"host", "port", "hex"} from standard input.

Prints for each what came back: the status (0: the connection ended without one, -1: nothing within the time) and the body.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from typing import Any

WAIT_S = 2.0


def ask(host: str, port: int, data: bytes) -> dict[str, Any]:
    """Send and read one answer."""
    received, silent = b"", False
    try:
        with socket.create_connection((host, port), timeout=WAIT_S) as stream:
            stream.settimeout(WAIT_S)
            stream.sendall(data)
            until = time.monotonic() + WAIT_S
            while not _complete(received) and time.monotonic() < until:
                piece = stream.recv(65536)
                if not piece:
                    break
                received += piece
            else:
                silent = not received
    except TimeoutError:
        silent = not received
    except OSError as error:
        if not received:
            return {"status": 0, "body": {}, "error": str(error)}
    head, _, body = received.partition(b"\r\n\r\n")
    parts = head.split(b" ", 2)
    status = int(parts[1]) if head.startswith(b"HTTP/") and len(parts) > 1 else -1 if silent else 0
    try:
        content = json.loads(body)
    except ValueError:
        content = {}
    lines = [line.decode("latin-1").partition(": ") for line in head.split(b"\r\n")[1:]]
    return {"status": status, "body": content, "headers": {name.lower(): value for name, _, value in lines}}


def _complete(received: bytes) -> bool:
    head, found, body = received.partition(b"\r\n\r\n")
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return len(body) >= int(value)
    return bool(found)


if __name__ == "__main__":
    print(json.dumps([ask(one["host"], one["port"], bytes.fromhex(one["hex"])) for one in json.load(sys.stdin)]))
