"""Runs in the machine, with Debian's Python alone. `serve`: HTTP on 8080 and an echo on 9000. `hold`: one connection to each for ever, which must not end.

Usage: traffic.py serve | hold HTTP-HOST ECHO-HOST FILE
"""

from __future__ import annotations

import http.client
import http.server
import socket
import socketserver
import sys
import threading
import time
from pathlib import Path


class Page(http.server.BaseHTTPRequestHandler):
    """Answers everything, and keeps connections."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "3")
        self.end_headers()
        self.wfile.write(b"yes")


class Echo(socketserver.BaseRequestHandler):
    """Sends back what comes."""

    def handle(self) -> None:
        while data := self.request.recv(4096):
            self.request.sendall(data)


def serve() -> None:
    socketserver.ThreadingTCPServer.allow_reuse_address = True
    echo = socketserver.ThreadingTCPServer(("", 9000), Echo)
    threading.Thread(target=echo.serve_forever, daemon=True).start()
    http.server.ThreadingHTTPServer(("", 8080), Page).serve_forever()


def hold(page: str, echo: str, file: Path) -> None:
    """One exchange on each connection every 50 ms; anything else than an answer ends it with an error."""
    requests = http.client.HTTPConnection(page, 80, timeout=10)
    requests.connect()
    requests.auto_open = 0  # never anew
    with socket.create_connection((echo, 9000), timeout=10) as raw:
        for number in range(1 << 30):
            requests.request("GET", "/")
            answer = requests.getresponse()
            assert (answer.status, answer.read()) == (200, b"yes")
            raw.sendall(b"hello")
            assert raw.recv(64) == b"hello"
            file.write_text(str(number))
            time.sleep(0.05)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        hold(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
