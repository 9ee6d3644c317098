"""The agent's socket for the command line: status, graph and traces, as JSON documents (agent.report, meshapi.graph.answer)."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Protocol

import grpc
import grpc.aio

from agent import tracing
from agent.config import Config
from agent.errors import NotFound
from agent.relay import Relay
from agent.report import CertificateStatus, IdentityStatus, Status, encode
from agent.tracing import NotWatched, Tracing
from meshapi import agent_pb2 as pb
from meshapi import agent_pb2_grpc
from meshapi.graph.answer import Answer


class Node(tracing.Node, Protocol):
    """What the API asks of the supervisor."""

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
