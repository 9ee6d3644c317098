"""The Gateways service: certificates and keys of gateways, to the nodes that serve them and to nobody else. Served by `controller.server`.

Filled by `controller.mesh` after every compilation. Not a part of the discovery stream, which is the same for every agent and which agents keep on disk.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc

from controller.peers import NotAllowed, require
from controller.secrets import Pair
from meshapi import gateway_pb2 as pb
from meshapi import gateway_pb2_grpc

_log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class Certificates:
    """What each node may have now. Belongs to one event loop."""

    def __init__(self) -> None:
        self._nodes: Mapping[str, pb.GatewayCertificates] | None = None
        self._changed = asyncio.Condition()

    async def set(self, nodes: Mapping[str, Mapping[str, Pair]]) -> None:
        """Replace everything, and wake those whose part differs."""
        made = {
            node: pb.GatewayCertificates(
                certificates=[pb.GatewayCertificate(name=name, chain=pair.chain, key=pair.key) for name, pair in sorted(held.items())]
            )
            for node, held in nodes.items()
        }
        async with self._changed:
            self._nodes = made
            self._changed.notify_all()

    async def other_than(self, node: str, known: pb.GatewayCertificates | None) -> pb.GatewayCertificates:
        """Wait until a node's part is known, and is not `known`."""
        async with self._changed:
            while (found := self._of(node)) is None or found == known:
                await self._changed.wait()
            return found

    def _of(self, node: str) -> pb.GatewayCertificates | None:
        return self._nodes.get(node, pb.GatewayCertificates()) if self._nodes is not None else None


class GatewayService(gateway_pb2_grpc.GatewaysServicer):
    """See the module."""

    def __init__(self, certificates: Certificates, trust_domain: str) -> None:
        self._certificates = certificates
        self._trust_domain = trust_domain

    async def Certificates(self, request: pb.CertificatesRequest, context: Context) -> AsyncIterator[pb.GatewayCertificates]:  # noqa: N802
        """Send a node's certificates, and again whenever they differ."""
        try:
            require(context, f"spiffe://{self._trust_domain}/meshagent/node/{request.node}")
        except NotAllowed as error:
            _log.warning("certificates of gateways refused", extra={"node": request.node, "peer": context.peer(), "error": str(error)})
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"node {request.node} is not yours: {error}")
        known: pb.GatewayCertificates | None = None
        while True:
            known = await self._certificates.other_than(request.node, known)
            yield known
