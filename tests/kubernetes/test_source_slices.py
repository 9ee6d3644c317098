"""Services without a selector on a real API server: their EndpointSlices, which somebody writes by hand, say where they lead."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from controller.mesh import Mesh
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.following import following, found
from tests.kubernetes.samples import namespace, pod, running
from tests.tasks import until

pytestmark = pytest.mark.anyio
OUTSIDE = "203.0.113.7"
OTHER = "203.0.113.8"


def service(**more: Any) -> dict[str, Any]:
    spec = {"ports": [{"name": "sql", "port": 5432}], **more}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "db", "namespace": "sliced"}, "spec": spec}


def piece(*addresses: str, port: int = 15432, name: str = "db-1", ready: bool = True, manager: str = "staff") -> dict[str, Any]:
    labels = {"kubernetes.io/service-name": "db", "endpointslice.kubernetes.io/managed-by": manager}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": "sliced", "labels": labels},
        "addressType": "IPv4",
        "ports": [{"name": "sql", "port": port}],
        "endpoints": [{"addresses": [address], "conditions": {"ready": ready}} for address in addresses],
    }


def leads(mesh: Mesh) -> dict[str, list[int]]:
    """Where the Service leads: ports by workload."""
    return {
        name.removeprefix("workload/"): [port.target_port for port in backing.ports]
        for name, entity in mesh.compiled.entities.items()
        if name.startswith("workload/")
        for backing in entity.workload.backing
        if backing.service == "sliced/db"
    }


async def test_a_slice_is_in_force_when_it_is_made_changed_and_deleted(plane: ControlPlane) -> None:
    plane.apply(namespace("sliced"), pod("sliced", "inside", app="other"), service())
    running(plane, "sliced", "inside", "10.1.0.5")
    async with following(plane) as mesh:
        await until(lambda: (inside := found(mesh, "sliced/inside")) and inside.ready and "service/sliced/db" in mesh.compiled.entities)
        assert leads(mesh) == {}
        await asyncio.to_thread(plane.apply, piece(OUTSIDE, "10.1.0.5"))
        await until(lambda: leads(mesh) == {f"(address)/{OUTSIDE}": [15432], "sliced/inside": [15432]})
        stranger = found(mesh, f"(address)/{OUTSIDE}")
        assert stranger is not None
        assert (stranger.enrolled, list(stranger.addresses)) == (False, [OUTSIDE]), "it is nobody for policies"
        await asyncio.to_thread(plane.apply, piece(OTHER, port=25432))
        await until(lambda: leads(mesh) == {f"(address)/{OTHER}": [25432]})
        assert found(mesh, f"(address)/{OUTSIDE}") is None
        await asyncio.to_thread(plane.apply, piece("10.1.0.5", name="db-2"))
        await until(lambda: leads(mesh) == {f"(address)/{OTHER}": [25432], "sliced/inside": [15432]})
        await asyncio.to_thread(plane.apply, piece(OTHER, ready=False))
        await until(lambda: leads(mesh) == {"sliced/inside": [15432]})
        await asyncio.to_thread(plane.kubectl, "delete", "endpointslice", "db-2", "-n", "sliced")
        await until(lambda: leads(mesh) == {})
        assert "service/sliced/db" in mesh.compiled.entities
        assert mesh.state.problems == ()


async def test_a_slice_that_kubernetes_makes_of_pods_is_not_read_and_a_selector_goes_first(plane: ControlPlane) -> None:
    plane.apply(namespace("sliced"), pod("sliced", "inside", app="db"), service(selector={"app": "db"}))
    running(plane, "sliced", "inside", "10.1.0.5")
    plane.apply(piece("10.1.0.5", manager="endpointslice-controller.k8s.io"), piece(OUTSIDE, name="db-2"))
    async with following(plane) as mesh:
        await until(lambda: leads(mesh))
        assert leads(mesh) == {"sliced/inside": [5432]}
        slices = {key.name for key in mesh.state.objects if key.kind == "EndpointSlice"}
        assert slices == {"db-2"}
