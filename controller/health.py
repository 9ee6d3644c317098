"""/metrics, /healthz and /readyz of the controller, on threads of their own. Started by `controller.server` if a port is given."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from controller import metrics


class _Quiet(WSGIRequestHandler):
    timeout = 10  # a client that says nothing keeps no thread

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
        """Scrapes and probes are not news."""


class _Server(ThreadingWSGIServer):
    pass


class _Server6(ThreadingWSGIServer):
    address_family = socket.AF_INET6


class HealthServer:
    """See the module. Raises OSError at once if it cannot listen."""

    def __init__(self, address: str, port: int, waiting: Callable[[], str]) -> None:
        """`waiting` says why this controller has nothing to serve yet, "" if it has."""
        exposition = make_wsgi_app(metrics.REGISTRY)

        def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            path = environ["PATH_INFO"]
            if path == "/metrics":
                page: Iterable[bytes] = exposition(environ, start_response)
                return page
            code, text = "200 OK", "ok"
            if path == "/readyz" and (why := waiting()):
                code, text = "503 Service Unavailable", why
            elif path not in {"/healthz", "/readyz"}:
                code, text = "404 Not Found", "there are /metrics, /healthz and /readyz"
            start_response(code, [("Content-Type", "text/plain; charset=utf-8")])
            return [f"{text}\n".encode()]

        server = _Server6 if ":" in address else _Server
        self._http = make_server(address, port, application, server_class=server, handler_class=_Quiet)
        self.port = self._http.server_port
        self._thread = threading.Thread(target=self._http.serve_forever, name="health", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
