"""The way from the server into this package: the source, and what writes back to it. Meshes without Kubernetes import nothing of it, which saves 20 MB."""

from __future__ import annotations

import asyncio
import socket
import uuid
from pathlib import Path
from typing import Final

from controller.compile import Compiled
from controller.kubernetes.api import Api
from controller.kubernetes.lease import Lease
from controller.kubernetes.source import KubernetesSource
from controller.kubernetes.status import StatusWriter
from controller.source import State

LEASE: Final = "meshagent-controller"


class KubernetesPart:
    """See the module. `source` is for the mesh; `looked` is to be called whenever there may be something new to write back."""

    def __init__(self, kubeconfig: Path | None, context: str, namespace: str) -> None:
        """`namespace` is the controller's own. Raises ControllerError."""
        api = Api.connect(kubeconfig, context)
        self.source = KubernetesSource(api)
        identity = f"{socket.gethostname()}_{uuid.uuid4()}"  # of two controllers on one host, too
        self._lease = Lease(api, namespace, LEASE, identity, self._turn)
        self._writer = StatusWriter(api, self.source, self._lease)

    def looked(self, state: State, compiled: Compiled) -> None:
        """Take what is in force, and what is to be said of it; right after `source.load` and before the next."""
        if self.source.ready:
            self._writer.take(state, compiled, self.source.basis)

    def _turn(self) -> None:
        self._writer.changed()

    async def run(self) -> None:
        """Write back for ever."""
        await asyncio.gather(self._lease.run(), self._writer.run())

    async def stop(self) -> None:
        """Let another controller write at once."""
        await self._lease.release()
