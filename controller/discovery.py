"""The Discovery service: one stream per agent, differences only, one response outstanding. Served by `controller.main`.

Must not know what the entities mean. Every stream remembers which versions its agent holds; streams that hold the same version share one
mapping and get the same encoded bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

import grpc

from controller import metrics
from controller.errors import ControllerError
from controller.peers import NotAllowed, require
from controller.readiness import ReportService
from controller.snapshot import Publication, Snapshot, model_version
from controller.wireguard import BadKey, NodeKeys
from meshapi import discovery_pb2 as pb

_log = logging.getLogger(__name__)

SERVICE: Final = "meshagent.v1.Discovery"
Context = grpc.aio.ServicerContext[Any, Any]


class DiscoveryService:
    """Streams the newest snapshot to every agent."""

    def __init__(
        self, publication: Publication, trust_domain: str, reports: ReportService | None = None, keys: NodeKeys | None = None
    ) -> None:
        """`reports` takes what agents say of their ends of tunnels, `keys` those of nodes, in a mesh that encrypts with WireGuard."""
        self._publication = publication
        self._keys = keys
        self._trust_domain = trust_domain
        self._reports = reports
        self.nacks = 0

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the service for a server: responses pass as bytes, because they are encoded once for all agents."""
        method: grpc.RpcMethodHandler[Any, Any]
        method = grpc.stream_stream_rpc_method_handler(self._stream, request_deserializer=pb.DiscoveryRequest.FromString)
        if self._reports is None:
            return grpc.method_handlers_generic_handler(SERVICE, {"Stream": method})
        report = grpc.unary_unary_rpc_method_handler(
            self._reports.report, pb.TunnelReport.FromString, pb.TunnelReportAnswer.SerializeToString
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"Stream": method, "ReportTunnels": report})

    async def _stream(self, _requests: Any, context: Context) -> None:
        first = await context.read()
        if not isinstance(first, pb.DiscoveryRequest):
            return
        node = first.node
        if not node:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must name the node")
        try:
            require(context, f"spiffe://{self._trust_domain}/meshagent/node/{node}")
        except NotAllowed as error:
            _log.warning("agent refused", extra={"node": node, "peer": context.peer(), "error": str(error)})
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"node {node} is not yours: {error}")
        if self._keys is not None:
            try:
                await self._keys.announce(node, first.wireguard if first.HasField("wireguard") else None)
            except (BadKey, ControllerError) as error:
                _log.error("WireGuard key of a node refused", extra={"node": node, "error": str(error)})
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the WireGuard key of node {node} is refused: {error}")
        metrics.AGENTS.inc()
        _log.info("agent connected", extra={"node": node, "peer": context.peer(), "known": len(first.known)})
        try:
            await self._serve(context, node, dict(first.known))
        finally:
            metrics.AGENTS.dec()
            _log.info("agent disconnected", extra={"node": node})

    async def _serve(self, context: Context, node: str, held: Mapping[str, str]) -> None:
        held_version = model_version(held)
        serial = 0
        answered_once = False
        while True:
            snapshot = await self._publication.newer_than(serial)
            serial = snapshot.serial
            # The first response is sent even if nothing differs: it tells the agent that what it holds is current.
            if answered_once and snapshot.version == held_version:
                continue
            answer = await self._exchange(context, snapshot, held, held_version)
            if answer is None:
                return
            answered_once = True
            if answer.error:
                self.nacks += 1
                metrics.NACKS.labels(node).inc()
                _log.error("agent refused the model", extra={"node": node, "version": snapshot.version, "error": answer.error})
            else:
                metrics.ACKS.inc()
                held, held_version = snapshot.versions, snapshot.version

    async def _exchange(
        self, context: Context, snapshot: Snapshot, held: Mapping[str, str], held_version: str
    ) -> pb.DiscoveryRequest | None:
        """Send the difference and return the answer; None if the agent is gone."""
        await context.write(self._publication.response(held, held_version))
        metrics.RESPONSES.inc()
        answer = await context.read()
        if not isinstance(answer, pb.DiscoveryRequest):
            return None
        if answer.nonce != str(snapshot.serial):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"nonce {answer.nonce!r} answers nothing that is outstanding")
        return answer
