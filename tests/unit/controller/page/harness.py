"""A page that is served for real, with a stand-in for the relay: it knows nodes, what they say of the graph, and plans."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from controller.page.page import Page
from controller.page.settings import PageSettings
from meshapi import discovery_pb2 as pb
from meshapi import relay_pb2
from meshapi.graph.answer import Answer, Backend
from tests.unit.controller.harness import Pair
from tests.unit.meshapi.graph import made

TOKEN = "0123456789abcdef" * 4
MARKUP = '<img src=x onerror="document.title=1">'
CART = made.edge(
    "default/frontend", "default/cart", rate=8.6, errors=0.5, p50=0.0016, p99=0.021, mtls="all", bytes=3800.0, active=1,
    backends=(Backend("default/cart-1", 8.6, mtls=True),),
)  # fmt: skip
REDIS = made.edge("default/other", "default/redis", protocol="tcp", port=6379, denied=4.0, rules=(f"default/{MARKUP}: no rule matches",))
STRANGER = made.edge("", "default/cart-1", "workload", protocol="tcp", port=8080, rate=1.0)
PLAN = {
    "kind": "plan", "source": "default/other", "destination": "default/redis:6379", "verdict": "DENY", "rule": f"default/{MARKUP}", "level": "L4",
    "reason": "no L7 feature is used", "backends": [{"workload": "default/redis-0", "address": "10.0.0.1:6379", "node": "node-1", "share": 1.0}],
    "encryption": "none: both ends are on one node", "failMode": "closed", "problems": [f"a problem with {MARKUP}"], "audit": None,
}  # fmt: skip


def model(**nodes: str) -> dict[str, pb.Entity]:
    """Workloads of the namespace default by node, and the services cart and redis."""
    found = {
        f"workload/default/{name.replace('_', '-')}": pb.Entity(workload=pb.Workload(namespace="default", name=name, node=node))
        for name, node in nodes.items()
    }
    return {
        **found,
        **{
            f"service/default/{name}": pb.Entity(service=pb.Service(name=name, ports=[pb.ServicePort(port=port)]))
            for name, port in (("cart", 80), ("redis", 6379))
        },
    }


MODEL = model(frontend="node-1", other="node-1", cart_1="node-2", redis_0="node-1")


class Relay:
    """Nodes that answer at once."""

    def __init__(self, *answers: Answer, plan: Mapping[str, Any] | str = PLAN) -> None:
        self.documents = {answer.node: answer.encode() for answer in answers}
        self.errors: dict[str, str] = {}
        self.silent: set[str] = set()
        self.plan = plan
        self.asked: list[relay_pb2.AskRequest] = []

    @property
    def nodes(self) -> frozenset[str]:
        return frozenset(self.documents | self.errors) | self.silent

    async def ask(self, request: relay_pb2.AskRequest) -> AsyncGenerator[relay_pb2.Told, None]:
        self.asked.append(request)
        if request.HasField("trace"):
            yield self._planned()
        elif request.node in self.silent:
            await asyncio.Event().wait()
        elif request.node in self.errors:
            yield relay_pb2.Told(node=request.node, error=self.errors[request.node])
        else:
            yield relay_pb2.Told(node=request.node, document=self.documents[request.node])

    def _planned(self) -> relay_pb2.Told:
        if isinstance(self.plan, str):
            return relay_pb2.Told(node="node-1", error=self.plan)
        return relay_pb2.Told(node="node-1", document=json.dumps(self.plan).encode())


def usual() -> Relay:
    return Relay(Answer("node-1", 5.0, (CART, REDIS), problems=(f"a node's {MARKUP}",)), Answer("node-2", 5.0, (STRANGER,)))


@contextlib.asynccontextmanager
async def serving(
    relay: Relay | None = None, listen: str = "127.0.0.1:0", token: Path | None = None, tls: Pair | None = None
) -> AsyncIterator[Page]:
    """A page of MODEL."""
    settings = PageSettings(listen, token, tls.certificate if tls else None, tls.key if tls else None)
    page = Page(settings, relay or usual(), lambda: MODEL)
    await page.start()
    try:
        yield page
    finally:
        await page.stop()


async def raw(page: Page, request: bytes, tls: ssl.SSLContext | None = None) -> bytes:
    """All that the page sends for these bytes, until it ends the connection or 20 s have passed."""
    if page.place.socket is not None:
        reader, writer = await asyncio.open_unix_connection(page.place.socket)
    else:
        reader, writer = await asyncio.open_connection(page.place.host, page.port, ssl=tls)
    try:
        writer.write(request)
        return await asyncio.wait_for(reader.read(-1), 20)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()


async def get(
    page: Page, path: str, *headers: str, host: str = "localhost", tls: ssl.SSLContext | None = None
) -> tuple[int, dict[str, str], bytes]:
    """The status, headers by lower-case name, and body of one GET."""
    lines = [f"GET {path} HTTP/1.1", f"Host: {host}", "Connection: close", *headers, "", ""]
    answer = await raw(page, "\r\n".join(lines).encode(), tls)
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *fields = head.decode().split("\r\n")
    return int(status.split()[1]), {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}, body


def token_file(directory: Path, token: str = TOKEN, mode: int = 0o600) -> Path:
    path = directory / "token"
    path.write_text(token + "\n")
    path.chmod(mode)
    return path
