"""A connection to every replica of the controller, beside the one that discovery has: so whichever is asked about this node can ask its agent.

The name of a headless Service says where they are
(https://kubernetes.io/docs/concepts/services-networking/service/#headless-services). One that leaves the name keeps its connection until that ends: it may be
answering somebody. Controllers need no way to each other for it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

import grpc.aio

from agent.dialling import dial
from agent.patience import Backoff, until_one_ends

if TYPE_CHECKING:
    from agent.config import Config

_log = logging.getLogger(__name__)

LOOK_S: Final = 5.0
"""How often the name is looked up."""
MOST: Final = 16
"""Connections; the chart allows 9 replicas."""
FIRST_BACKOFF_S: Final = 0.5
MAX_BACKOFF_S: Final = 5.0
_LOST = (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError, OSError)
Resolve = Callable[[str, int], Awaitable[list[str]]]


async def resolved(host: str, port: int) -> list[str]:
    """Return the addresses of a name, HOST:PORT. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family = found[0][0]  # a replica with an address of each family is one replica
    addresses = (str(address[0]) for kind, *_, address in found if kind == family)
    return sorted({f"[{address}]:{port}" if ":" in address else f"{address}:{port}" for address in addresses})


class Replicas:
    """See the module."""

    def __init__(self, config: Config, offer: Callable[[grpc.aio.Channel], Coroutine[Any, Any, None]], resolve: Resolve = resolved) -> None:
        """`offer` answers what is asked over a connection until that ends."""
        self._config, self._offer, self._resolve = config, offer, resolve
        self._known: frozenset[str] = frozenset()
        self._kept: dict[str, asyncio.Task[None]] = {}
        self._problem = ""

    async def run(self) -> None:
        """Keep a connection to each, for ever."""
        host, _, port = self._config.replicas.rpartition(":")
        if not host:
            await asyncio.Event().wait()  # there is one controller, which discovery is connected to
        try:
            while True:
                await self._look(host.strip("[]"), int(port))
                for address in [address for address, task in self._kept.items() if task.done()]:
                    if not (ended := self._kept.pop(address)).cancelled():
                        ended.result()
                for address in sorted(self._known - self._kept.keys())[: MOST - len(self._kept)]:
                    self._kept[address] = asyncio.create_task(self._keep(address, host.strip("[]")), name=f"replica {address}")
                await asyncio.sleep(LOOK_S)
        finally:
            self._known = frozenset()
            for task in self._kept.values():
                task.cancel()
            await asyncio.gather(*self._kept.values(), return_exceptions=True)

    async def _look(self, host: str, port: int) -> None:
        try:
            self._known, problem = frozenset(await self._resolve(host, port)), ""
        except (OSError, UnicodeError) as error:
            problem = str(error)  # those that are known stay
        if problem != self._problem:
            self._problem = problem
            if problem:
                _log.warning("replicas of the controller cannot be looked up", extra={"host": host, "error": problem})

    async def _keep(self, address: str, name: str) -> None:
        """Be connected to one as long as the name leads there."""
        backoff, last = Backoff(FIRST_BACKOFF_S, MAX_BACKOFF_S), ""
        while address in self._known:
            began = asyncio.get_running_loop().time()
            try:
                async with await dial(self._config, address, name) as channel:
                    await until_one_ends(self._offer(channel))
                last = ""
            except _LOST as error:
                reason = str(error.details() if isinstance(error, grpc.aio.AioRpcError) else error)
                if reason != last:
                    _log.info("a replica of the controller cannot ask this node", extra={"replica": address, "error": reason})
                last = reason
            if asyncio.get_running_loop().time() - began > MAX_BACKOFF_S:
                backoff.reset()
            await asyncio.sleep(backoff.pause())
