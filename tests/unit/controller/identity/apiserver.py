"""A server that answers TokenReviews over HTTPS as a Kubernetes API server does: same path, same JSON, its own bearer token checked first.

https://kubernetes.io/docs/reference/kubernetes-api/authentication-resources/token-review-v1/
"""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from controller.identity.kubernetes import ApiServer
from tests.unit.controller.harness import Authority

OWN_TOKEN = "controller-token"  # noqa: S105 - of a server that lives for one test
AGENT = "mesh-system/mesh-agent"


def user(
    node: str | None = "n1", pod: str | None = "agent-x7k2p", name: str = "system:serviceaccount:mesh-system:mesh-agent"
) -> dict[str, Any]:
    """Return what an API server says of a projected token's user."""
    extra = {"authentication.kubernetes.io/credential-id": ["JTI=7ee52be0-9045-4653-aa5e-0da57b8dccdc"]}
    extra |= {"authentication.kubernetes.io/node-name": [node]} if node else {}
    extra |= {"authentication.kubernetes.io/pod-name": [pod]} if pod else {}
    return {"username": name, "uid": "f8b4161b", "groups": ["system:serviceaccounts", "system:authenticated"], "extra": extra}


@dataclass
class Api:
    """What the server knows: tokens with their audiences and users."""

    tokens: dict[str, tuple[list[str], dict[str, Any]]] = field(default_factory=dict)
    status: int = 201
    raw: bytes | None = None
    """Answer this instead."""
    asked: list[dict[str, Any]] = field(default_factory=list)

    def review(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Fill in the status of a TokenReview."""
        spec = asked["spec"]
        audiences, known = self.tokens.get(spec["token"], ([], None))
        common = [name for name in spec.get("audiences", []) if name in audiences]
        if known is None or not common:
            return {**asked, "status": {"user": {}, "error": "[invalid bearer token, service account token has expired]"}}
        return {**asked, "status": {"authenticated": True, "user": known, "audiences": common}}


@contextmanager
def serve(tmp_path: Path, api: Api) -> Iterator[ApiServer]:
    """Serve on an ephemeral port; give what a controller has to know."""
    tmp_path.mkdir(exist_ok=True)
    authority = Authority(tmp_path, "kubernetes")
    pair = authority.issue("apiserver")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            api.asked.append(body)
            answer, status = json.dumps(api.review(body)).encode(), api.status
            if self.headers["Authorization"] != f"Bearer {OWN_TOKEN}":
                status = 401
            elif self.path != "/apis/authentication.k8s.io/v1/tokenreviews" or body["kind"] != "TokenReview":
                status = 404
            self.send_response(status)
            answer = answer if api.raw is None else api.raw
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Say nothing of clients that do not believe our certificate."""

    server = Server(("127.0.0.1", 0), Handler)
    # The handshake belongs to the thread of the connection: one that fails must not end the listener.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    token = tmp_path / "token"
    token.write_text(OWN_TOKEN + "\n")
    try:
        yield ApiServer(f"https://127.0.0.1:{server.server_port}", authority.ca, token, AGENT)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
