"""The way from the server into this package: the source, and what writes back to it. Meshes without Kubernetes import nothing of it, which saves 20 MB."""

from __future__ import annotations

import asyncio
import functools
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from controller.compile import Compiled
from controller.errors import ControllerError
from controller.kubernetes import version
from controller.kubernetes.api import Api
from controller.kubernetes.lease import Lease
from controller.kubernetes.source import KubernetesSource
from controller.kubernetes.status import StatusWriter
from controller.kubernetes.store import ClusterStore
from controller.source import State

LEASE: Final = "meshagent-controller"
OPEN_S: Final = 10.0


@contextmanager
def opened(kubeconfig: Path | None, context: str, namespace: str) -> Iterator[ClusterStore]:
    """What controllers remember together, read once, for a command. Raises ControllerError if it cannot be read soon."""
    store, news = ClusterStore(functools.partial(Api.connect, kubeconfig, context), namespace), threading.Event()
    store.listen(news.set)
    store.start()
    try:
        deadline = time.monotonic() + OPEN_S
        while not store.synced:
            told = news.wait(max(0.0, deadline - time.monotonic()))
            if store.problem or not told:
                why = store.problem or f"the API server has not answered within {OPEN_S:.0f} s"
                raise ControllerError(f"nothing was read, and nothing was changed: {why}")
            news.clear()
        yield store
    finally:
        store.close()


class KubernetesPart:
    """See the module. `source` is for the mesh; `looked` is to be called whenever there may be something new to write back."""

    def __init__(self, kubeconfig: Path | None, context: str, namespace: str) -> None:
        """`namespace` is the controller's own. Raises ControllerError."""
        self._connect = functools.partial(Api.connect, kubeconfig, context)
        self._namespace = namespace
        self._api = api = self._connect()
        self.source = KubernetesSource(api, namespace)
        identity = f"{socket.gethostname()}_{uuid.uuid4()}"  # of two controllers on one host, too
        self._lease = Lease(api, namespace, LEASE, identity, self._turn)
        self._writer = StatusWriter(api, self.source, self._lease)

    def looked(self, state: State, compiled: Compiled) -> None:
        """Take what is in force, and what is to be said of it; right after `source.load` and before the next."""
        if self.source.ready:
            self._writer.take(state, compiled, self.source.basis)

    def store(self) -> ClusterStore:
        """Where the authorities of several controllers remember together; over a connection of its own."""
        return ClusterStore(self._connect, self._namespace)

    def _turn(self) -> None:
        self._writer.changed()
        if self.source.last_good is not None:
            self.source.last_good.turn()

    async def run(self) -> None:
        """Write back for ever; at first, say whether the API server is too old."""
        keep = [self.source.last_good.write(lambda: self._lease.held)] if self.source.last_good is not None else []
        await asyncio.gather(self._lease.run(), self._writer.run(), version.tell(self._api), *keep)

    async def stop(self) -> None:
        """Let another controller write at once."""
        await self._lease.release()
