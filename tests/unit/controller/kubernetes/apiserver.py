"""An API server that says what a test wants said, also what no real one would: lists, and watches whose lines come when the test sends them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from controller.kubernetes import definition
from controller.kubernetes.api import Api

_DEFINITION = {"metadata": {"uid": "definition"}}


@dataclass(slots=True)
class Scripted:
    """What it answers, by path. An int is an error's status."""

    pages: dict[str, list[Any]] = field(default_factory=dict)
    """Answers to lists, in order; the last one is repeated."""
    silent: set[str] = field(default_factory=set)
    """Paths that get no answer."""
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    """Who has asked that, in the same order."""
    watches: asyncio.Queue[Watch] = field(default_factory=asyncio.Queue)
    port: int = 0
    serving: set[asyncio.Task[Any]] = field(default_factory=set)

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer on one connection, and remember who does."""
        if (task := asyncio.current_task()) is not None:
            self.serving.add(task)
        try:
            await self.serve(reader, writer)
        finally:
            writer.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer on one connection, to one request."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            target = urlsplit(head.split(" ")[1])
            params = {name: values[0] for name, values in parse_qs(target.query).items()}
            self.asked.append((target.path, params))
            self.tokens += re.findall(r"(?im)^authorization: Bearer (\S+)", head)
            if target.path in self.silent:
                await asyncio.Event().wait()
            if "watch" in params:
                watch = Watch(writer, params["resourceVersion"], target.path)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n")
                await writer.drain()
                await self.watches.put(watch)
                await watch.over.wait()
                return
            answers = self.pages.get(target.path, [_DEFINITION if target.path.startswith(definition.PATH) else 404])
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            code = answer if isinstance(answer, int) else 200
            body = _status(code) if isinstance(answer, int) else answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            writer.write(f"HTTP/1.1 {code} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass


@dataclass(slots=True, eq=False)
class Watch:
    """One watch that somebody has open."""

    writer: asyncio.StreamWriter
    version: str
    path: str
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def send(self, kind: str, item: Any) -> None:
        """Send one event."""
        self.writer.write(json.dumps({"type": kind, "object": item}).encode() + b"\n")
        await self.writer.drain()

    async def raw(self, data: bytes) -> None:
        """Send bytes."""
        self.writer.write(data)
        await self.writer.drain()

    def end(self) -> None:
        """End it, as the server does after timeoutSeconds."""
        self.over.set()


def _status(code: int) -> bytes:
    return json.dumps({"kind": "Status", "code": code, "reason": f"Reason{code}", "message": f"message {code}"}).encode()


def write_kubeconfig(file: Path, port: int, user: str = "t", scheme: str = "http") -> None:
    """Say in a kubeconfig file where a server is, and who asks."""
    config = {
        "clusters": [{"name": "c", "cluster": {"server": f"{scheme}://127.0.0.1:{port}"}}],
        "users": [{"name": "u", "user": {"token": user}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    file.write_text(json.dumps(config))


@asynccontextmanager
async def scripted(tmp_path: Path) -> AsyncIterator[tuple[Scripted, Api]]:
    """A server, and a connection to it."""
    server = Scripted()
    listening = await asyncio.start_server(server.accept, "127.0.0.1", 0)
    server.port = listening.sockets[0].getsockname()[1]
    kubeconfig = tmp_path / "kubeconfig"
    write_kubeconfig(kubeconfig, server.port)
    api = Api.connect(kubeconfig)
    try:
        yield server, api
    finally:
        await api.close()
        listening.close()
        for task in server.serving:
            task.cancel()
        await asyncio.gather(*server.serving, return_exceptions=True)


def listed(version: str, *items: Any, more: str = "", kind: str = "Namespace") -> dict[str, Any]:
    """A page of a list."""
    return {"kind": f"{kind}List", "metadata": {"resourceVersion": version, "continue": more}, "items": list(items)}


def namespace(name: str, version: str, uid: str = "u", **labels: str) -> dict[str, Any]:
    """The smallest object that is followed."""
    return {"metadata": {"name": name, "uid": uid, "resourceVersion": version, "labels": labels}}
