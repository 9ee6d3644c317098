"""The agent's socket for the command line: status, graph and traces, as JSON documents (agent.report, meshapi.graph.answer)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Protocol

import grpc
import grpc.aio

from agent import tracing
from agent.calls import compare
from agent.calls.part import Calls
from agent.calls.ring import MINUTES, Recorded
from agent.config import Config
from agent.errors import NotFound
from agent.model import Snapshot
from agent.relay import Relay
from agent.report import CallRows, CallSummary, CertificateStatus, IdentityStatus, Status, encode
from agent.tracing import NotWatched, Tracing
from meshapi import agent_pb2 as pb
from meshapi import agent_pb2_grpc, proposal_pb2
from meshapi.graph.answer import Answer

_AT_ONCE = 200
"""Rows in one message: at most some 200 KB."""


class Node(tracing.Node, Protocol):
    """What the API asks of the supervisor."""

    @property
    def calls(self) -> Calls:
        """What was called lately."""

    def status(self) -> Status:
        """The state of the node."""

    async def graph(self, window_s: float) -> Answer:
        """Who talks to whom, as this node sees it."""

    def identity(self, workload: str) -> IdentityStatus | CertificateStatus:
        """The certificates of this node, or one workload's with its chain. Raises NotFound."""


class Api(agent_pb2_grpc.AgentServicer):
    """Serves on `config.api_socket`, mode 0600: root only."""

    def __init__(self, config: Config, node: Node, relay: Relay) -> None:
        """`node` is asked for everything, `relay` for what other nodes know."""
        self._config = config
        self._node = node
        self._relay = relay
        self._tracing = Tracing(config, node, relay)

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

    async def Graph(self, request: pb.GraphRequest, context: object) -> pb.Json:  # noqa: ARG002, N802
        """`meshagent graph`."""
        return pb.Json(document=(await self._node.graph(request.window_s)).encode())

    async def Trace(self, request: pb.TraceRequest, context: grpc.aio.ServicerContext[pb.TraceRequest, pb.Json]) -> AsyncIterator[pb.Json]:  # noqa: N802
        """`meshagent trace`: the plan, then connections until a limit is reached."""
        try:
            async with aclosing(self._tracing.answer(request)) as documents:
                async for document in documents:
                    yield pb.Json(document=document)
        except NotFound as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except NotWatched as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))

    async def Calls(self, request: pb.CallsRequest, context: grpc.aio.ServicerContext[pb.CallsRequest, pb.Json]) -> AsyncIterator[pb.Json]:  # noqa: N802
        """`meshagent policy try`: calls of this node that other policies decide otherwise, or all to a namespace; then a summary."""
        calls, snapshot, trust_domain = self._node.calls, self._node.snapshot, self._config.trust_domain
        if not calls.on:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"node {self._config.node} remembers no calls: --no-record-flows")
        proposal = await self._proposed(request, context)
        recorded = await calls.read(min(request.since_s or MINUTES * 60, MINUTES * 60))
        if proposal is None:
            found = await asyncio.to_thread(compare.listed, recorded, snapshot, trust_domain, request.namespace)
        else:
            found = await asyncio.to_thread(_compared, recorded, snapshot, proposal, trust_domain)
        for begin in range(0, len(found.rows), _AT_ONCE):
            yield pb.Json(document=encode(CallRows(node=self._config.node, calls=found.rows[begin : begin + _AT_ONCE])))
        summary = CallSummary(
            node=self._config.node,
            since=calls.since,
            unchanged=found.unchanged,
            gone=found.gone,
            forgotten=calls.ring.forgotten,
        )
        yield pb.Json(document=encode(summary))

    async def _proposed(
        self, request: pb.CallsRequest, context: grpc.aio.ServicerContext[pb.CallsRequest, pb.Json]
    ) -> proposal_pb2.Proposal | None:
        """The policies that are tried; None: only the calls are asked for."""
        if request.HasField("proposal"):
            return request.proposal
        if not request.HasField("files"):
            return None
        try:
            compiled = await self._relay.compiled(request.files)
        except NotFound as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        if compiled.problems:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "\n".join(compiled.problems))
        return compiled.proposal


def _compared(recorded: list[Recorded], snapshot: Snapshot, proposal: proposal_pb2.Proposal, trust_domain: str) -> compare.Found:
    return compare.compare(recorded, snapshot, compare.proposed(snapshot, proposal), trust_domain)
