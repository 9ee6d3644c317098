"""The definitions on a real API server, which alone knows what their rules cost: what is good is accepted, what is bad is refused with the field named."""

from __future__ import annotations

from pathlib import Path

import pytest

from controller.documents import parse
from tests.kubernetes.controlplane import ControlPlane

RESOURCES = Path(__file__).parent / "resources"
BAD = sorted((RESOURCES / "bad").glob("*.yaml"))


@pytest.mark.parametrize("path", sorted((RESOURCES / "good").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_good_resource_is_accepted(plane: ControlPlane, path: Path) -> None:
    for name in {document.value["metadata"].get("namespace", "default") for document in parse(path.read_bytes(), str(path))}:
        plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    said = plane.kubectl("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", str(path), check=False)
    assert "serverside-applied" in said
    assert "rror" not in said


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_a_bad_resource_is_refused_with_its_field(plane: ControlPlane, path: Path) -> None:
    field = path.read_text().partition("\n")[0].removeprefix("# refused: ").strip()
    said = plane.kubectl("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", str(path), check=False)
    assert "serverside-applied" not in said
    assert field.removesuffix(".value") in said, said
