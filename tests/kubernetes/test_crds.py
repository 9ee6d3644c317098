"""The definitions on a real API server, which alone knows what their rules cost: what is good is accepted, what is bad is refused with the field named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from controller.documents import parse
from tests.kubernetes.controlplane import ControlPlane
from tests.unit.controller.test_crds import documents, root, with_defaults

RESOURCES = Path(__file__).parent / "resources"
ROUTES = Path(__file__).parents[2] / "lab/shop/mesh/routes.yaml"
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


def test_what_is_shown_as_an_example_is_accepted_and_filled_in_as_the_controller_does_it(plane: ControlPlane) -> None:
    shown = [one.value for one in documents()]
    for name in sorted({value["metadata"].get("namespace", "default") for value in shown}):
        plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    for value in shown:
        kind, name, space = value["kind"], value["metadata"]["name"], value["metadata"].get("namespace", "default")
        said = plane.kubectl("apply", "--server-side", "--validate=strict", "-n", space, "-f", "-", stdin=json.dumps(value), check=False)
        assert "serverside-applied" in said, (value, said)
        found = json.loads(plane.kubectl("get", f"{kind}.meshagent.io", name, "-n", space, "-o", "json"))
        assert found["spec"] == with_defaults(value, root(kind))["spec"], value
        plane.kubectl("delete", f"{kind}.meshagent.io", name, "-n", space)


def test_routes_of_the_lab_are_accepted(plane: ControlPlane) -> None:
    plane.install_gateway_api()
    said = plane.kubectl("apply", "--server-side", "--validate=strict", "-f", str(ROUTES), check=False)
    assert said.count("serverside-applied") == len(list(parse(ROUTES.read_bytes(), str(ROUTES)))), said


def test_kubectl_shows_the_columns_of_each_kind_by_its_short_name(plane: ControlPlane) -> None:
    plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shown"}})
    meta = {"apiVersion": "meshagent.io/v1alpha1", "metadata": {"name": "one", "namespace": "shown"}}
    target = {"group": "", "kind": "Service", "name": "cart"}
    plane.apply(
        {**meta, "kind": "AuthorizationPolicy", "spec": {"targetRefs": [target], "rules": [{}]}},
        {**meta, "kind": "PeerAuthentication", "spec": {"mtls": {"mode": "STRICT"}}},
        {**meta, "kind": "Telemetry", "spec": {"targetRefs": [target], "accessLogs": {"enabled": True}}},
    )
    plane.set_status(
        "authorizationpolicy.meshagent.io",
        "shown",
        "one",
        {
            "conditions": [
                {"type": "Accepted", "status": "True", "reason": "Accepted", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}
            ]
        },
    )

    def table(resource: str) -> dict[str, str]:
        heads, cells = plane.kubectl("get", resource, "-n", "shown").splitlines()
        starts = [found.start() for found in re.finditer(r"\S+( \S+)*", heads)]
        ends = [*starts[1:], None]
        return {heads[start:end].strip(): cells[start:end].strip() for start, end in zip(starts, ends, strict=True)}

    names = json.loads(plane.kubectl("get", "crd", "authorizationpolicies.meshagent.io", "-o", "json"))["spec"]["names"]
    for name in ("authorizationpolicies.meshagent.io", *names["shortNames"]):
        row = table(name)
        assert {column: row[column] for column in ("NAME", "ACTION", "TARGETS", "ACCEPTED")} == {
            "NAME": "one",
            "ACTION": "ALLOW",
            "TARGETS": "cart",
            "ACCEPTED": "True",
        }, "the action is the default"
    assert table("peerauthentications.meshagent.io")["MODE"] == "STRICT"
    assert table("telemetries.meshagent.io")["ACCESS LOGS"] == "true"
    assert re.fullmatch(r"\d+[smh]\d*[a-z]*", table("telemetries.meshagent.io")["AGE"])
