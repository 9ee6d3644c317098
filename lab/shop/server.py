"""The shop's HTTP programs in one file: cart and frontend. Run by lab.yaml inside pods; needs nothing but Python's standard library.

The environment says who it is: APP (cart or frontend), VERSION, POD_NAME, PORT (8080). The cart answers /flaky with 503 in the pod that
FAIL_POD names and with 200 in every other. The frontend calls CART_URL and counts its visits in REDIS (HOST:PORT). Each program counts
what it answered, at /admin/counters.
"""

from __future__ import annotations

import collections
import contextlib
import http.server
import json
import os
import signal
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable
from typing import Any

Answer = tuple[int, dict[str, Any]]


class Redis:
    """One connection to redis that is made when first needed and kept (https://redis.io/docs/latest/develop/reference/protocol-spec/)."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._address = (host, int(port))
        self._lock = threading.Lock()
        self._stream: Any = None

    def increment(self, key: str) -> int:
        """Return the new value of a counter."""
        with self._lock:
            try:
                if self._stream is None:
                    with socket.create_connection(self._address, timeout=2) as connection:
                        self._stream = connection.makefile("rwb")  # keeps the socket open
                self._stream.write(f"*2\r\n$4\r\nINCR\r\n${len(key)}\r\n{key}\r\n".encode())
                self._stream.flush()
                line = self._stream.readline()
                if not line.startswith(b":"):
                    raise ConnectionError(f"redis said {line.decode(errors='replace').strip() or 'nothing'}")
                return int(line[1:])
            except OSError:
                stream, self._stream = self._stream, None
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
                raise


class Shop:
    """What one pod knows of itself, and the answers it gives: (status, JSON) by method and path."""

    def __init__(self, env: dict[str, str]) -> None:
        self.pod = env.get("POD_NAME", socket.gethostname())
        self.version = env.get("VERSION", "v1")
        self.fails = env.get("FAIL_POD") == self.pod
        self.cart_url = env.get("CART_URL", "http://cart")
        self.redis = Redis(env.get("REDIS", "redis:6379"))
        self.counters: collections.Counter[str] = collections.Counter()
        self.lock = threading.Lock()
        routes: dict[str, dict[str, Callable[[], Answer]]] = {
            "cart": {"GET /": self.items, "GET /items": self.items, "POST /items": self.items, "GET /flaky": self.flaky},
            "frontend": {"GET /": self.front_page},
        }
        self.routes: dict[str, Callable[[], Answer]] = {
            **routes[env.get("APP", "cart")],
            "GET /healthz": lambda: (200, {"pod": self.pod}),
            "GET /admin/counters": lambda: (200, dict(self.counters)),
        }

    def answer(self, method: str, path: str) -> Answer:
        """Return what to say, and count it."""
        name = f"{method} {path.partition('?')[0]}"
        route = self.routes.get(name)
        status, body = route() if route else (404, {"pod": self.pod, "error": f"{name} is not here"})
        with self.lock:
            self.counters[f"{name} {status}"] += 1
        return status, body

    def items(self) -> Answer:
        """The cart's content."""
        return 200, {"pod": self.pod, "version": self.version, "items": ["tea", "biscuits"]}

    def flaky(self) -> Answer:
        """An answer that one pod always fails to give."""
        return (503, {"pod": self.pod, "error": "this pod fails"}) if self.fails else (200, {"pod": self.pod, "version": self.version})

    def front_page(self) -> Answer:
        """What the cart says and how often this was asked."""
        try:
            with urllib.request.urlopen(f"{self.cart_url}/items", timeout=5) as answer:  # noqa: S310 - the scheme is the operator's
                cart = json.load(answer)
            return 200, {"pod": self.pod, "visits": self.redis.increment("visits"), "cart": cart}
        except (OSError, ValueError) as error:
            return 502, {"pod": self.pod, "error": str(error)}


def handler(shop: Shop) -> type[http.server.BaseHTTPRequestHandler]:
    """Return the request handler of one shop."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keep-alive
        server_version = f"shop/{shop.version}"
        wbufsize = -1  # one write per answer
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            self.rfile.read(length)
            status, body = shop.answer(self.command, self.path)
            content = (json.dumps(body) + "\n").encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self) -> None:
            self.do_GET()

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Say nothing: /admin/counters has it."""

    return Handler


class Server(http.server.ThreadingHTTPServer):
    """Serves IPv4 and IPv6 on one socket."""

    address_family = socket.AF_INET6
    daemon_threads = True
    request_queue_size = 512

    def server_bind(self) -> None:
        """Bind to both families."""
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def main() -> int:
    """Serve until SIGTERM."""
    shop = Shop(dict(os.environ))
    server = Server(("::", int(os.environ.get("PORT", "8080"))), handler(shop))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
