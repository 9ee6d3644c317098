"""The rendered manifest on a real API server: it is accepted, and a controller that has its rights, and no others, reads and writes all that it has to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from controller.documents import parse
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.test_source import namespace, policy, until
from tests.kubernetes.test_status import OWN, conditions, writing

MANIFEST = Path(__file__).parents[2] / "deploy" / "kubernetes" / "meshagent.yaml"
ACCOUNT = f"system:serviceaccount:{OWN}:meshagent-controller"


def objects(*kinds: str) -> list[dict[str, Any]]:
    """Those of the manifest, of these kinds or of all."""
    return [one.value for one in parse(MANIFEST.read_bytes(), str(MANIFEST)) if not kinds or one.value["kind"] in kinds]


def grant(plane: ControlPlane) -> None:
    """Give the controller's service account the rights of the manifest, and no others."""
    plane.apply(*objects("ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"))


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
    grant(plane)
    async with writing(plane, ACCOUNT) as one:
        await until(lambda: one.part.source.ready)
        await until(lambda: conditions(plane, "authorizationpolicy", "rights", "p").get("Accepted") == ("True", "Accepted"))
        await until(lambda: one.mesh.state.problems == ())  # 429 for a moment: the definitions are new
        assert one.part._writer.failed == 0
    for verb, what in (
        ("list", "secrets"),
        ("get", "secrets"),
        ("update", "pods"),
        ("delete", "nodes"),
        ("patch", "authorizationpolicies.meshagent.io"),
    ):
        assert plane.kubectl("auth", "can-i", verb, what, "-A", f"--as={ACCOUNT}", check=False).startswith("no"), (verb, what)
