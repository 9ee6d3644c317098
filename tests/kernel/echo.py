"""Run in pods of tests: answers what it was asked, over HTTP/1.1 on port 8080 and over gRPC on port 7070; or, with `call`, asks over gRPC.

HTTP: JSON with the pod (environment POD), method, path and headers of the request. /flaky/NAME answers 503 the first time that NAME comes; /slow waits a
second; /admin/seen says how often each path came. gRPC: any method; the answer's metadata `pod`, and JSON as for HTTP. `call TARGET METHOD COUNT
[NAME=VALUE ...]` prints a JSON list of {"code", "pod", "body", "headers"}.
"""

from __future__ import annotations

import collections
import http.server
import json
import os
import socket
import sys
import time
from concurrent import futures
from typing import Any

import grpc

POD = os.environ.get("POD", "")
SEEN: collections.Counter[str] = collections.Counter()


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection of HTTP/1.1."""

    protocol_version = "HTTP/1.1"
    wbufsize = 65536

    def answer(self) -> None:
        """Answer any method."""
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        if path == "/admin/seen":
            self._say(200, SEEN)
            return
        SEEN[path] += 1
        if path.startswith("/slow"):
            time.sleep(1)
        status = 503 if path.startswith("/flaky/") and SEEN[path] == 1 else 200
        request = {name.lower(): ",".join(self.headers.get_all(name, [])) for name in self.headers}
        self._say(status, {"pod": POD, "method": self.command, "path": self.path, "request": request})

    do_GET = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_PATCH = answer  # noqa: N815  # the names are http.server's

    def _say(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.send_header("x-from-backend", POD)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Server(http.server.ThreadingHTTPServer):
    """On both families."""

    address_family = socket.AF_INET6
    daemon_threads = True


class Anything(grpc.GenericRpcHandler):
    """Every method of every service."""

    def service(self, details: Any) -> Any:
        """Answer with what came."""

        def answer(request: bytes, context: Any) -> bytes:
            SEEN[details.method] += 1
            context.send_initial_metadata((("pod", POD),))
            return json.dumps({"method": details.method, "request": dict(context.invocation_metadata()), "bytes": len(request)}).encode()

        return grpc.unary_unary_rpc_method_handler(answer)


def call(target: str, method: str, count: int, metadata: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Call a method `count` times on one connection."""
    found = []
    with grpc.insecure_channel(target) as channel:
        ask: Any = channel.unary_unary(method)
        for _ in range(count):
            try:
                body, rpc = ask.with_call(b"x", timeout=5, metadata=tuple(metadata))
                said = {**dict(rpc.initial_metadata()), **dict(rpc.trailing_metadata() or ())}
                found.append({"code": "OK", "pod": said.get("pod", ""), "body": json.loads(body), "headers": said})
            except grpc.RpcError as raised:
                failed: Any = raised  # also a grpc.Call
                said = {**dict(failed.initial_metadata() or ()), **dict(failed.trailing_metadata() or ())}
                found.append({"code": failed.code().name, "headers": {k: v for k, v in said.items() if isinstance(v, str)}})
    return found


def main() -> None:
    """Serve, or call."""
    if sys.argv[1:2] == ["call"]:
        target, method, count, *pairs = sys.argv[2:]
        print(json.dumps(call(target, method, int(count), [(name, value) for name, _, value in (p.partition("=") for p in pairs)])))
        return
    server = grpc.server(futures.ThreadPoolExecutor(8), handlers=[Anything()])
    server.add_insecure_port("[::]:7070")
    server.start()
    Server(("::", 8080), Handler).serve_forever()


if __name__ == "__main__":
    main()
