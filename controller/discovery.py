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
from controller.peers import NotAllowed, require
from controller.snapshot import Publication, Snapshot, model_version
from meshapi import discovery_pb2 as pb

_log = logging.getLogger(__name__)

SERVICE: Final = "meshagent.v1.Discovery"
Context = grpc.aio.ServicerContext[Any, Any]


class DiscoveryService:
    """Streams the newest snapshot to every agent."""

    def __init__(self, publication: Publication, trust_domain: str) -> None:
        self._publication = publication
        self._trust_domain = trust_domain
        self.nacks = 0

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the service for a server: responses pass as bytes, because they are encoded once for all agents."""
        method: grpc.RpcMethodHandler[pb.DiscoveryRequest, bytes]
        method = grpc.stream_stream_rpc_method_handler(self._stream, request_deserializer=pb.DiscoveryRequest.FromString)
        return grpc.method_handlers_generic_handler(SERVICE, {"Stream": method})

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
