"""What the probe adds to a model, and how it reports; that the kernel refuses it is in tests/kernel/test_enrolment.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import probe
from agent.compact import Table
from agent.config import Config
from agent.model import Snapshot, Workload


@pytest.fixture
def made(tmp_path: Path) -> probe.Probe:
    return probe.Probe(Config(node="node-1", controller="unix:x", cgroup=tmp_path, run_dir=tmp_path))


@pytest.mark.parametrize("plain", [True, False])
def test_the_probe_is_one_workload_one_service_and_one_policy_more(made: probe.Probe, *, plain: bool) -> None:
    other = Workload("default/a", "a", "node-2", {}, (), "", enrolled=True, ready=True)
    model = Snapshot("v", {other.name: other} if plain else Table[Workload]().changed({other.name: other}))
    extended = made.extend(model)
    assert set(extended.workloads) == {"default/a", probe.NAME}
    assert set(extended.services) == set(extended.policies) == {probe.NAME}
    assert (extended.version, extended.workloads[probe.NAME].node) == ("v", "node-1")
    assert set(model.workloads) == {"default/a"}


def test_the_same_model_is_extended_to_the_same_object(made: probe.Probe) -> None:
    model = Snapshot("v")
    assert made.extend(model) is made.extend(model)
    assert made.extend(Snapshot("v")) is not made.extend(model)


def test_a_probe_that_is_not_enrolled_says_so_and_proves_nothing(made: probe.Probe) -> None:
    outcome = made.run(())
    assert outcome.works is None
    assert "is not enrolled" in outcome.problem
