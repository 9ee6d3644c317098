"""Controllers that follow a real API server inside of the test, with or without what writes back; and what they have in force."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from controller.kubernetes import lastgood
from controller.kubernetes.api import Api
from controller.kubernetes.part import KubernetesPart
from controller.kubernetes.source import KubernetesSource
from controller.mesh import Mesh
from meshapi import discovery_pb2 as pb
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.manifest import OWN
from tests.tasks import until


@asynccontextmanager
async def reading(api: Api, namespace: str = "") -> AsyncIterator[Mesh]:
    """The mesh of a controller that reads the API server over this connection; `namespace`: its own, where it reads last good versions."""
    source = KubernetesSource(api, namespace)
    mesh = Mesh(source, authority=False)
    await mesh.start()
    task = asyncio.create_task(mesh.watch())
    try:
        yield mesh
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await source.close()


@asynccontextmanager
async def following(plane: ControlPlane, user: str = "admin") -> AsyncIterator[Mesh]:
    """The mesh of a controller that reads the API server as a user."""
    async with reading(Api.connect(plane.kubeconfig(user))) as mesh:
        yield mesh


def found(mesh: Mesh, name: str) -> pb.Workload | None:
    entity = mesh.compiled.entities.get(f"workload/{name}")
    return entity.workload if entity is not None else None


def told(mesh: Mesh) -> str:
    return "\n".join(map(str, mesh.state.problems))


def action(mesh: Mesh, name: str) -> int | None:
    """What a policy does, if it is in force."""
    entity = mesh.compiled.entities.get(f"policy/defined/{name}")
    return entity.policy.action if entity is not None else None


def kept(plane: ControlPlane) -> dict[str, Any]:
    """What is written of policies, by name."""
    said = plane.kubectl("get", "controllerstate", lastgood.NAME, "-n", OWN, "-o", "json", "--ignore-not-found")
    documents = json.loads(said).get("documents", {}) if said.strip() else {}
    return {row["object"]["metadata"]["name"]: row for row in json.loads(documents.get("AuthorizationPolicy.json", "[]"))}


def written(one: Writing, name: str) -> bool:
    """Is it written, as far as the controller knows?"""
    last_good = one.part.source.last_good
    return last_good is not None and name in {key.name for key in last_good.kept}


async def started(mesh: Mesh) -> None:
    await until(lambda: mesh.publication.current.serial)


class Writing:
    """One controller's mesh with what writes back."""

    def __init__(self, plane: ControlPlane, user: str = "admin") -> None:
        self.part = KubernetesPart(plane.kubeconfig(user), "", OWN)
        self.mesh = Mesh(self.part.source, authority=False)
        self.mesh.looked = self.part.looked
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self.mesh.start()
        self.tasks = [asyncio.create_task(self.mesh.watch()), asyncio.create_task(self.part.run())]

    async def stop(self) -> None:
        """As the server does it."""
        await self._end()
        await self.part.stop()
        await self.part.source.close()

    async def kill(self) -> None:
        """As a process that ends without a word."""
        await self._end()
        await self.part.source.close()

    async def _end(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    @property
    def holds(self) -> bool:
        return self.part._lease.held

    @property
    def written(self) -> int:
        return self.part._writer.written


@asynccontextmanager
async def writing(plane: ControlPlane, user: str = "admin") -> AsyncIterator[Writing]:
    one = Writing(plane, user)
    await one.start()
    try:
        yield one
    finally:
        await one.stop()


def got(plane: ControlPlane, kind: str, space: str, name: str) -> Any:
    return json.loads(plane.kubectl("get", kind, name, "-n", space, "-o", "json"))


def conditions(plane: ControlPlane, kind: str, space: str, name: str) -> dict[str, tuple[str, str]]:
    found = got(plane, kind, space, name).get("status", {}).get("conditions", [])
    return {one["type"]: (one["status"], one["reason"]) for one in found}
