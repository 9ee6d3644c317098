"""The rendered manifest on a real API server: it is accepted, and a controller that has its rights, and no others, reads and writes all that it has to."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from controller.documents import parse
from controller.kubernetes.part import KubernetesPart
from controller.mesh import Mesh
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.test_source import namespace, policy, until
from tests.kubernetes.test_status import conditions

MANIFEST = Path(__file__).parents[2] / "deploy" / "kubernetes" / "meshagent.yaml"
OWN = "meshagent-system"
ACCOUNT = f"system:serviceaccount:{OWN}:meshagent-controller"


@pytest.fixture
def anyio_backend() -> str:
    """asyncio, as everywhere."""
    return "asyncio"


def objects(*kinds: str) -> list[dict[str, Any]]:
    """Those of the manifest, of these kinds or of all."""
    return [one.value for one in parse(MANIFEST.read_bytes(), str(MANIFEST)) if not kinds or one.value["kind"] in kinds]


def test_the_manifest_is_accepted(plane: ControlPlane) -> None:
    plane.apply(*objects("Namespace"))
    said = plane.kubectl(
        "apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "-f", str(MANIFEST), check=False
    )
    assert said.count("serverside-applied") == len(objects()), said
    assert "rror" not in said


@pytest.mark.anyio
async def test_its_rights_are_enough_for_the_controller_and_no_more(plane: ControlPlane) -> None:
    plane.apply(namespace(OWN), namespace("rights"), policy("rights", "p"))
    plane.apply(*objects("ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"))
    part = KubernetesPart(plane.kubeconfig(ACCOUNT), "", OWN)
    mesh = Mesh(part.source, authority=False)
    mesh.looked = part.looked
    await mesh.start()
    tasks = [asyncio.create_task(mesh.watch()), asyncio.create_task(part.run())]
    try:
        await until(lambda: part.source.ready)
        await until(lambda: conditions(plane, "authorizationpolicy", "rights", "p").get("Accepted") == ("True", "Accepted"))
        assert mesh.state.problems == ()
        assert part._writer.failed == 0
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await part.stop()
        await part.source.close()
    for verb, what in (
        ("list", "secrets"),
        ("get", "secrets"),
        ("update", "pods"),
        ("delete", "nodes"),
        ("patch", "authorizationpolicies.meshagent.io"),
    ):
        assert plane.kubectl("auth", "can-i", verb, what, "-A", f"--as={ACCOUNT}", check=False).startswith("no"), (verb, what)
