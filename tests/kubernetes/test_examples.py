"""Every object of every example, of whatever kind, on a real API server; and each kind of ours as kubectl shows it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from controller.documents import parse
from tests.kubernetes.controlplane import CRDS, ControlPlane
from tests.unit.controller.test_crds import documents

ROOT = Path(__file__).parents[2]
KINDS = {file.stem.partition("_")[2]: parse(file.read_bytes(), str(file))[0].value["spec"] for file in sorted(CRDS.iterdir())}
"""Our definitions by their plural names."""


def shown() -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of the lab, the quick start and the blocks of README.md and docs, with where they stand."""
    for file in [*sorted((ROOT / "lab/shop/mesh").glob("*.yaml")), *sorted((ROOT / "docs/quickstart").glob("*.yaml"))]:
        yield from ((file.name, one.value) for one in parse(file.read_bytes(), file.name))
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            yield from ((page.name, one.value) for one in parse(block, page.name) if "apiVersion" in one.value)


def test_every_example_of_whatever_kind_is_accepted_by_the_api_server(plane: ControlPlane) -> None:
    plane.install_gateway_api()
    examples = list(shown())
    places = {where for where, _ in examples}
    assert places >= {
        "services.yaml",
        "routes.yaml",
        "policies.yaml",
        "workloads.yaml",
        "app.yaml",
        "who.yaml",
        "what.yaml",
        "README.md",
        "vm.md",
    }
    for space in sorted({value["metadata"].get("namespace", "default") for _, value in examples if value["kind"] != "Namespace"}):
        plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": space}})
    for where in sorted(places):
        objects = [value for place, value in examples if place == where]
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
        options = ("--server-side", "--force-conflicts", "--validate=strict", "--dry-run=server")
        said = plane.kubectl("apply", *options, "-f", "-", stdin=text, check=False)
        assert said.count("serverside-applied") == len(objects), (where, said)


@pytest.mark.parametrize("plural", KINDS)
def test_kubectl_shows_every_column_of_a_kind_by_each_of_its_names(plane: ControlPlane, plural: str) -> None:
    spec = KINDS[plural]
    kind, (version,) = spec["names"]["kind"], spec["versions"]
    example = next(
        (one.value for one in documents() if one.value["kind"] == kind),
        {"apiVersion": "meshagent.io/v1alpha1", "kind": kind, "documents": {"one": "1"}},
    )
    space, name = f"columns-{kind.lower()}", "shown"
    plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": space}})
    plane.apply({**example, "metadata": {"name": name, "namespace": space}})
    columns = version["additionalPrinterColumns"]
    for word in (spec["names"]["plural"], spec["names"]["singular"], *spec["names"].get("shortNames", ())):
        wide = plane.kubectl("get", f"{word}.meshagent.io" if word == plural else word, "-n", space, "-o", "wide").splitlines()
        heads = re.split(r"\s{2,}", wide[0].strip())
        assert heads == ["NAME", *(column["name"].upper() for column in columns)], word
        assert wide[1].split()[0] == name
        plain = re.split(r"\s{2,}", plane.kubectl("get", word, "-n", space).splitlines()[0].strip())
        assert plain == ["NAME", *(column["name"].upper() for column in columns if not column.get("priority"))], word
