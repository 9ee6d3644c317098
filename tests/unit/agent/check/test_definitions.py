"""Definitions of this version against those that a server may have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from agent.check import definitions
from deploy import definitions as written

CRDS = Path(__file__).parents[4] / "deploy" / "crds"
NAME = "trafficpolicies.meshagent.io"


def definition() -> dict[str, Any]:
    found: dict[str, Any] = YAML(typ="safe", pure=True).load((CRDS / "meshagent.io_trafficpolicies.yaml").read_text())
    return copy.deepcopy(found)


def spec(found: dict[str, Any]) -> dict[str, Any]:
    below: dict[str, Any] = found["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    return below


def compared(change: Callable[[dict[str, Any]], object]) -> tuple[str, list[str]]:
    found = definition()
    change(found)
    return definitions.compare(definitions.own()[NAME]["v1alpha1"], definitions.described(found)["v1alpha1"])


def test_what_is_committed_is_what_the_definitions_say() -> None:
    assert written.main(["--check"]) == 0
    assert len(definitions.own()) == len(list(CRDS.glob("*.yaml")))


def test_the_same_definition_is_the_same_whatever_its_descriptions_are() -> None:
    assert compared(lambda _: None) == ("same", [])
    assert compared(lambda found: spec(found)["targetRefs"].update(description="other words")) == ("same", [])


def test_one_without_a_field_is_older_and_names_it() -> None:
    assert compared(lambda found: spec(found).pop("outlierEjection")) == ("older", ["spec.outlierEjection"])


def test_one_with_another_field_is_newer_and_names_it() -> None:
    assert compared(lambda found: spec(found)["timeouts"]["properties"].update(idle2={"type": "string"})) == (
        "newer",
        ["spec.timeouts.idle2"],
    )


def test_one_with_other_rules_only_is_another_version() -> None:
    assert compared(lambda found: spec(found)["targetRefs"].update(maxItems=23)) == ("other", [])


def test_a_version_that_is_not_served_is_not_there() -> None:
    found = definition()
    found["spec"]["versions"][0]["served"] = False
    assert definitions.described(found) == {}


@pytest.mark.parametrize("empty", [{"properties": {}}, {"required": []}], ids=str)
def test_what_is_empty_does_not_count_because_a_server_drops_it(empty: dict[str, object]) -> None:
    assert compared(lambda found: spec(found)["targetRefs"].update(empty)) == ("same", [])
