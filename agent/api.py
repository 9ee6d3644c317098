"""The agent's socket for the command line: status and traces, as JSON documents (agent.report)."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import NamedTuple, Protocol

import grpc
import grpc.aio

from agent import netns, plan
from agent.config import Config
from agent.enrolment import Enrolled
from agent.errors import NotFound
from agent.model import NO_DIRECT, Direct, Snapshot, Workload
from agent.policy import UDP
from agent.relay import Relay
from agent.report import CertificateStatus, IdentityStatus, Plan, Status, encode
from agent.trace import Pair, Tracer, Watch
from meshapi import agent_pb2 as pb
from meshapi import agent_pb2_grpc

PROBE_TIMEOUT_S = 3.0
SETTLE_S = 0.4  # after the last connection: Envoy flushes its records within 0.1 s


class Node(Protocol):
    """What the API asks of the supervisor."""

    @property
    def snapshot(self) -> Snapshot:
        """What is in force."""

    @property
    def enrolled(self) -> Enrolled:
        """The workloads in the data path."""

    @property
    def tracer(self) -> Tracer:
        """The running traces."""

    @property
    def direct(self) -> Direct:
        """Who is reached without a tunnel, over WireGuard."""

    def status(self) -> Status:
        """The state of the node."""

    def identity(self, workload: str) -> IdentityStatus | CertificateStatus:
        """The certificates of this node, or one workload's with its chain. Raises NotFound."""

    async def tracing_armed(self) -> bool:
        """Wait until Envoy reports what the tracer asked for."""


class Api(agent_pb2_grpc.AgentServicer):
    """Serves on `config.api_socket`, mode 0600: root only."""

    def __init__(self, config: Config, node: Node, relay: Relay) -> None:
        """`node` is asked for everything, `relay` for what other nodes know."""
        self._config = config
        self._node = node
        self._relay = relay

    async def run(self) -> None:
        """Serve until cancelled."""
        self._config.api_socket.unlink(missing_ok=True)
        server = grpc.aio.server()
        agent_pb2_grpc.add_AgentServicer_to_server(self, server)
        before = os.umask(0o177)  # the socket is made when the port is added
        try:
            server.add_insecure_port(f"unix:{self._config.api_socket}")
        finally:
            os.umask(before)  # before anybody else may run: it is the whole process's
        await server.start()
        try:
            await server.wait_for_termination()
        finally:
            await server.stop(0)

    async def Status(self, request: pb.StatusRequest, context: object) -> pb.Json:  # noqa: ARG002, N802  gRPC's names
        """`meshagent status`."""
        return pb.Json(document=encode(self._node.status()))

    async def Identity(self, request: pb.IdentityRequest, context: grpc.aio.ServicerContext[pb.IdentityRequest, pb.Json]) -> pb.Json:  # noqa: N802
        """`meshagent identity`."""
        try:
            return pb.Json(document=encode(self._node.identity(request.workload)))
        except NotFound as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))

    async def Trace(self, request: pb.TraceRequest, context: grpc.aio.ServicerContext[pb.TraceRequest, pb.Json]) -> AsyncIterator[pb.Json]:  # noqa: N802
        """`meshagent trace`: the plan, then connections until a limit is reached. What leaves another node is asked there."""
        snapshot = self._node.snapshot
        try:
            source = plan.find_workload(snapshot, request.source)
            planned = plan.plan(
                snapshot,
                source,
                request.destination,
                self._config.trust_domain,
                self._node.direct if source.node == self._config.node else NO_DIRECT,
            )
            service, behind = plan.targets(snapshot, request.destination)
        except NotFound as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        local = next((w for w in self._node.enrolled.local if w.workload.name == source.name), None)
        live = bool(request.duration_s or request.probe)
        if live and source.node != self._config.node and not request.relayed:
            async with aclosing(self._elsewhere(request, source, planned, context)) as found:
                async for document in found:
                    yield document
            return
        if local is None or not live:
            yield pb.Json(document=encode(planned))
            if live:
                why = (
                    f"it runs on node {source.node}, this is {self._config.node}"
                    if source.node != self._config.node
                    else "it is not enrolled"
                )
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"connections of {source.name} cannot be watched here: {why}")
            return
        watch = self._node.tracer.begin(Pair(source.name, service, behind, plan.allowing(snapshot, behind)))
        try:
            await self._node.tracing_armed()
            yield pb.Json(document=encode(planned))
            if request.probe:
                await asyncio.to_thread(_probe, Path(local.netns_path), self._dialled(planned))
            async for document in _connections(watch, request):
                yield document
        finally:
            self._node.tracer.end(watch)

    async def _elsewhere(
        self, request: pb.TraceRequest, source: Workload, planned: Plan, context: grpc.aio.ServicerContext[pb.TraceRequest, pb.Json]
    ) -> AsyncGenerator[pb.Json, None]:
        """What the source's own node says; if that is away, at least the plan, which any node can make."""
        told = False
        try:
            async with aclosing(self._relay.trace(request, source.node)) as found:
                async for document in found:
                    told = True
                    yield document
        except NotFound as error:
            if not told:
                yield pb.Json(document=encode(planned))
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"connections of {source.name} cannot be watched: {error}")

    def _dialled(self, planned: Plan) -> _Call:
        """The call that a plan is about."""
        found = plan.find_destination(self._node.snapshot, planned.destination)
        address = found.entity.addresses[0] if found.entity.addresses else ""
        return _Call(address, found.port, "HTTP" if planned.level == "L7" else found.protocol)


async def _connections(watch: Watch, request: pb.TraceRequest) -> AsyncIterator[pb.Json]:
    loop = asyncio.get_running_loop()
    end = loop.time() + (request.duration_s or PROBE_TIMEOUT_S)
    limit = request.count or (1 if request.probe else 0)
    seen = 0
    while not limit or seen < limit:
        remaining = end - loop.time()
        if remaining <= 0 and (watch.found.empty() or remaining <= -SETTLE_S):
            return
        try:
            connection = await asyncio.wait_for(watch.found.get(), max(remaining, SETTLE_S))
        except asyncio.TimeoutError:
            return
        seen += 1
        yield pb.Json(document=encode(connection))


class _Call(NamedTuple):
    address: str
    port: int
    protocol: str
    """TCP, UDP or HTTP."""


def _probe(namespace: Path, to: _Call) -> None:
    """One connection from inside the source's namespace; for HTTP one GET / over it. Its failure is what the trace then shows.

    Over UDP it is one empty datagram, which no protocol mistakes for a request (RFC 768 allows it), and nobody waits for an answer.
    """

    def call() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if to.protocol == "HTTP":
                connection = http.client.HTTPConnection(to.address, to.port, timeout=PROBE_TIMEOUT_S)
                connection.request("GET", "/", headers={"User-Agent": "meshagent-probe", "Connection": "close"})
                connection.getresponse().read()
                connection.close()
            elif to.protocol == UDP:
                with socket.socket(socket.AF_INET6 if ":" in to.address else socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
                    datagrams.connect((to.address, to.port))
                    datagrams.send(b"")
            else:
                socket.create_connection((to.address, to.port), timeout=PROBE_TIMEOUT_S).close()

    netns.run_in(namespace, call)
