"""How a node proves which node it is when it joins: one interface, and join tokens behind it. Kubernetes is in `controller.identity.kubernetes`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Protocol

from controller.errors import ControllerError
from controller.identity.ca import CertificateAuthority
from controller.identity.ledger import Taken
from controller.identity.proof import Proof
from controller.identity.refusals import Refused
from controller.identity.tokens import Record

_log = logging.getLogger(__name__)


class Attestor(Protocol):
    """Believes one kind of proof."""

    def proven(self, node: str, proof: str) -> AbstractAsyncContextManager[Proof]:
        """Enter if `proof` shows that the caller is `node`; raise Refused or Unavailable otherwise.

        Then this controller knows of every revocation that there was before. What the proof is good for is done inside; if that fails, a proof that can be
        used once is given back.
        """


class TokenAttestor:
    """Believes join tokens. A token for any node gives no name that another node has: otherwise its holder could become every node."""

    def __init__(self, ca: CertificateAuthority) -> None:
        self._ca = ca
        self._joining: set[str] = set()

    @asynccontextmanager
    async def proven(self, node: str, proof: str) -> AsyncIterator[Proof]:
        """Use the token up, and give it back if nothing was given for it."""
        record = await self._ca.in_thread(self._ca.tokens.reserve, proof, node)
        try:
            with self._alone(node):  # after the token: who has none keeps nobody else from joining
                await self._ca.in_thread(self._check, node, record)
                try:
                    yield Proof(f"join token {record.id}", alone=not record.node)
                except Taken as error:
                    raise _taken(node, record) from error
        except BaseException:
            await self._give_back(record)
            raise

    @contextmanager
    def _alone(self, node: str) -> Iterator[None]:
        if node in self._joining:
            raise Refused("join-concurrent", f"node {node} is joining at this moment, with another call: wait for that one")
        self._joining.add(node)
        try:
            yield
        finally:
            self._joining.discard(node)

    def _check(self, node: str, record: Record) -> None:
        """Refuse what would be refused when it is recorded, before it is signed."""
        if not record.node and self._ca.holds(node):
            raise _taken(node, record)

    async def _give_back(self, record: Record) -> None:
        try:
            await asyncio.shield(self._ca.in_thread(self._ca.tokens.release, record))
        except ControllerError as error:
            _log.error("join token could not be given back", extra={"token": record.id, "error": str(error)})


def _taken(node: str, record: Record) -> Refused:
    return Refused(
        "token-node-taken",
        f"node {node} has a valid certificate, and join token {record.id} is for any node: to join it anew make a token for it "
        f"(mesh-controller token create --node {node}), or revoke its certificate",
    )
