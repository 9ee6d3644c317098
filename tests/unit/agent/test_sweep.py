"""Counters of what is gone are removed, after a while, and the names with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from agent.ids import Ids
from agent.model import Action, Policy, Service, Snapshot, Workload
from agent.sweep import KEPT_S, Sweep
from tests.unit.agent import tables


def workload(name: str) -> Workload:
    return Workload(name, "sa", "n", {}, (), "", enrolled=True, ready=True)


ALL = Snapshot(
    "1",
    {n: workload(n) for n in ("d/a", "d/b")},
    {"d/s": Service("d/s", (), ())},
    policies={"d/p": Policy("d/p", Action.ALLOW)},
)


class Node:
    def __init__(self, tmp_path: Path) -> None:
        self.now = 0.0
        self.ids = Ids(tmp_path / "ids")
        self.maps = {"mesh_stats": tables.stats(), "mesh_verdicts": tables.verdicts(), "mesh_load": tables.load()}
        self.sweep = Sweep(cast("Any", self.maps), self.ids, lambda: self.now)
        self.a, self.b = self.ids.number("workload", "d/a"), self.ids.number("workload", "d/b")
        self.service = self.ids.number("service", "d/s:80")
        self.rule = self.ids.number("rule", "d/p: no rule matches")
        self.maps["mesh_stats"].add({"source": self.a, "target": self.b, "service": self.service})
        self.maps["mesh_stats"].add({})
        self.maps["mesh_verdicts"].add({"target": self.b, "rule": self.rule})
        self.maps["mesh_load"].add({"workload": self.b})

    def rows(self) -> dict[str, int]:
        return {name.removeprefix("mesh_"): len(table.rows) for name, table in self.maps.items()}


def without(*names: str) -> Snapshot:
    def rest(kind: Any) -> Any:
        return {name: entity for name, entity in kind.items() if name not in names}

    return Snapshot("2", rest(ALL.workloads), rest(ALL.services), policies=rest(ALL.policies))


@pytest.mark.parametrize(
    ("gone", "left"),
    [
        pytest.param("d/a", {"stats": 1, "verdicts": 1, "load": 1}, id="caller"),
        pytest.param("d/b", {"stats": 1, "verdicts": 0, "load": 0}, id="target"),
        pytest.param("d/s", {"stats": 1, "verdicts": 1, "load": 1}, id="service"),
        pytest.param("d/p", {"stats": 2, "verdicts": 0, "load": 1}, id="policy"),
    ],
)
def test_rows_of_what_has_been_gone_for_ten_minutes_are_removed(tmp_path: Path, gone: str, left: dict[str, int]) -> None:
    node = Node(tmp_path)
    before = node.rows()
    assert node.sweep.run(without(gone)) == 0
    node.now = KEPT_S - 1
    assert node.sweep.run(without(gone)) == 0
    assert node.rows() == before
    node.now = KEPT_S
    assert node.sweep.run(without(gone)) > 0
    assert node.rows() == left
    assert ("d/a" in node.ids.names("workload"), "d/b" in node.ids.names("workload")) == (gone != "d/a", gone != "d/b")


def test_what_comes_back_in_time_keeps_its_rows_and_its_number(tmp_path: Path) -> None:
    node = Node(tmp_path)
    before = node.rows()
    for now, model in ((0, without("d/a")), (KEPT_S - 1, ALL), (KEPT_S, without("d/a")), (2 * KEPT_S - 1, without("d/a"))):
        node.now = now
        assert node.sweep.run(model) == 0
    assert node.rows() == before
    assert node.ids.number("workload", "d/a") == node.a


def test_the_row_of_what_found_no_room_stays(tmp_path: Path) -> None:
    node = Node(tmp_path)
    for now in (0, KEPT_S):
        node.now = now
        node.sweep.run(Snapshot())
    assert list(node.maps["mesh_stats"].rows) == [bytes(node.maps["mesh_stats"].layout.key.size)]


def test_a_row_that_a_last_connection_leaves_behind_goes_too(tmp_path: Path) -> None:
    """It was closed after its workload's name was forgotten."""
    node = Node(tmp_path)
    for now in (0, KEPT_S):
        node.now = now
        node.sweep.run(without("d/a"))
    node.maps["mesh_stats"].add({"source": node.a})
    for now in (KEPT_S + 60, 2 * KEPT_S + 60):
        node.now = now
        node.sweep.run(without("d/a"))
    assert node.rows()["stats"] == 1


def test_a_name_without_rows_is_forgotten_too(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.ids.number("workload", "d/short-lived")
    for now in (0, KEPT_S):
        node.now = now
        node.sweep.run(ALL)
    assert set(node.ids.names("workload")) == {"d/a", "d/b"}


def test_a_caller_that_is_in_no_snapshot_and_is_to_stay_keeps_its_counters_and_its_name(tmp_path: Path) -> None:
    node = Node(tmp_path)
    number = node.ids.number("workload", "(kubelet)/n")
    sweep = Sweep(cast("Any", node.maps), node.ids, lambda: node.now, frozenset({"(kubelet)/n"}))
    node.maps["mesh_stats"].add({"source": number, "target": node.a})
    sweep.run(ALL)
    node.now += 2 * KEPT_S
    assert sweep.run(ALL) == 0
    assert node.ids.name(number) == "(kubelet)/n"
    assert node.sweep.run(ALL) == 0  # another sweep sees it for the first time
    node.now += KEPT_S
    assert node.sweep.run(ALL) == 1
