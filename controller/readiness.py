"""Which workloads tunnels between nodes have reached the ends of: what agents report, kept for ever. Served beside discovery, used by `controller.mesh`.

Callers use plaintext to a PERMISSIVE workload until its own node's agent has said that tunnels end there, and never again after that: neither an agent that
is away, nor a controller that starts anew, nor a lost file takes it back. A workload is forgotten when it leaves the model or its node.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import grpc

from controller.files import write_atomically
from controller.peers import NotAllowed, require
from meshapi import discovery_pb2 as pb

_log = logging.getLogger(__name__)

FILE: Final = "tunnels.json"
SETTLE_S: Final = 0.1
"""Reports that come within this time are one change of the model."""
RETRY_S: Final = 10.0
_TUNNEL_LABEL: Final = "networking.istio.io/tunnel"
_HTTP: Final = "http"
"""Says of a workload whose node has another implementation of HBONE, ztunnel, that it has it (https://istio.io/latest/docs/reference/config/labels/)."""
Nodes = Mapping[str, str]
"""Node by workload, "NAMESPACE/NAME"."""


class Readiness:
    """See the module. Belongs to the event loop, but for `marked`."""

    def __init__(self, directory: Path | None) -> None:
        """`directory` of the certificate authority; None: there is none, and so there are no tunnels."""
        self._path = None if directory is None else directory / FILE
        self._ready: dict[str, str] = {}
        self._stored: Mapping[str, str] = {}
        """What a restart begins with: nothing else is published."""
        self._everybody = False
        self._news = asyncio.Event()

    def load(self) -> None:
        """Read the file. If it is lost, or of an authority older than it, every workload of the model is taken to have tunnels."""
        if self._path is None:
            return
        try:
            content = json.loads(self._path.read_bytes())
            self._ready = {str(name): str(node) for name, node in content["ready"].items()}
            self._stored = dict(self._ready)
        except FileNotFoundError:
            self._everybody = self._path.parent.is_dir() and any(self._path.parent.iterdir())
            self._news.set()  # from now on there is one
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._everybody = True
            _log.error(
                "who has tunnels cannot be read: all workloads are taken to have some", extra={"path": str(self._path), "error": str(error)}
            )

    def marked(self, entities: Mapping[str, pb.Entity]) -> dict[str, pb.Entity]:
        """Return the model with `awaits_tunnels` where it is so. The entities are not changed."""
        if self._path is None:
            return dict(entities)
        found = dict(entities)
        for name, entity in entities.items():
            if entity.WhichOneof("kind") == "workload" and self._awaits(entity.workload):
                marked = found[name] = pb.Entity()
                marked.CopyFrom(entity)
                marked.workload.awaits_tunnels = True
        return found

    def _awaits(self, workload: pb.Workload) -> bool:
        if _HTTP in workload.labels.get(_TUNNEL_LABEL, "").split(","):
            return False
        return workload.enrolled and self._stored.get(f"{workload.namespace}/{workload.name}") != workload.node

    def follow(self, nodes: Nodes) -> None:
        """Forget who is not where it was: `nodes` is of the whole model."""
        if self._everybody:
            self._everybody, self._ready = False, dict(nodes)
            self._stored = dict(nodes)
            self._news.set()
        elif gone := [name for name, node in self._ready.items() if nodes.get(name) != node]:
            for name in gone:
                del self._ready[name]
            self._news.set()

    def report(self, node: str, workloads: Iterable[str], nodes: Nodes) -> int:
        """Take what the agent of `node` says, of its own workloads; returns how many are news."""
        own = {name for name in workloads if nodes.get(name) == node and self._ready.get(name) != node}
        self._ready.update(dict.fromkeys(own, node))
        if own:
            self._news.set()
        return len(own)

    async def run(self, changed: Callable[[], Awaitable[None]]) -> None:
        """Store what is reported, then have it published by `changed`, for ever."""
        while True:
            await self._news.wait()
            await asyncio.sleep(SETTLE_S)
            self._news.clear()
            ready = dict(self._ready)
            try:
                await asyncio.to_thread(self._store, ready)
            except OSError as error:
                # Not published: after a restart nobody would know, and callers that knew would fall back to plaintext.
                _log.error("who has tunnels cannot be stored; trying again", extra={"path": str(self._path), "error": str(error)})
                await asyncio.sleep(RETRY_S)
                self._news.set()
            else:
                self._stored = ready
                await changed()

    def _store(self, ready: Mapping[str, str]) -> None:
        if self._path is not None:
            write_atomically(self._path, json.dumps({"ready": dict(sorted(ready.items()))}, indent=1) + "\n")


class ReportService:
    """Takes agents' reports."""

    def __init__(self, readiness: Readiness, nodes: Callable[[Collection[str]], Nodes], trust_domain: str) -> None:
        """`nodes` tells on which nodes these workloads are, as far as they are in the model."""
        self._readiness = readiness
        self._nodes = nodes
        self._trust_domain = trust_domain

    async def report(self, request: pb.TunnelReport, context: grpc.aio.ServicerContext[Any, Any]) -> pb.TunnelReportAnswer:
        """Take one report; refuse one in another node's name."""
        try:
            require(context, f"spiffe://{self._trust_domain}/meshagent/node/{request.node}")
        except NotAllowed as error:
            _log.warning("report refused", extra={"node": request.node, "peer": context.peer(), "error": str(error)})
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"node {request.node} is not yours: {error}")
        self._readiness.report(request.node, request.workloads, self._nodes(request.workloads))
        return pb.TunnelReportAnswer()
