"""What becomes of maps when their layouts change, and how records are rewritten."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from agent.bpf import bridge, source
from agent.bpf.manifest import Codec, MapLayout
from agent.bpf.migrate import Converter, Fate, Migration, differences, fates
from agent.errors import EnvironmentUnfit

KEY = [["source", 0, "16s"], ["port", 16, "H"]]
FLOW = [["cookie", 0, "Q"], ["workload", 8, "I"], ["pad", 12, "I"]]
LRU, PERCPU, STORAGE, HASH = 9, 5, 24, 1


def document(kind: int, value: list[Any] = FLOW, size: int = 16, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "capacity": 64, "flags": 0, "key": KEY, "key_size": 20, "value": value, "value_size": size, **more}


OLD = {
    "mesh_flow": document(LRU),
    "mesh_stats": document(PERCPU),
    "mesh_sock": document(STORAGE),
    "mesh_policy": document(HASH),
    "mesh_workload": document(HASH),
    "mesh_pair": document(HASH),
    "mesh_offer": document(HASH),
}
LONGER = [["cookie", 0, "Q"], ["workload", 8, "Q"], ["pad", 16, "Q"]]


def test_maps_that_are_the_same_are_kept() -> None:
    assert set(fates(OLD, copy.deepcopy(OLD)).values()) == {Fate.KEPT}


def test_maps_that_are_the_same_but_two_are_brought_together() -> None:
    found = fates(OLD, copy.deepcopy(OLD), frozenset({"mesh_sock"}))
    assert {n: f for n, f in found.items() if n in {"mesh_sock", "mesh_flow", "mesh_stats", "mesh_policy"}} == {
        "mesh_sock": Fate.KEPT,
        "mesh_flow": Fate.CARRIED,
        "mesh_stats": Fate.ADDED,
        "mesh_policy": Fate.REFILLED,
    }


def test_tables_that_a_snapshot_fills_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "mesh_policy").touch()  # no pin: who opens it fails
    layout = MapLayout(Codec(KEY, 20), Codec(FLOW, 16))
    Migration(tmp_path, {"mesh_policy": layout}, {}, {"mesh_policy": Fate.REFILLED}).close()


@pytest.mark.parametrize(("name", "fate"), [("mesh_flow", Fate.CARRIED), ("mesh_stats", Fate.ADDED), ("mesh_sock", Fate.ANEW)])
def test_a_changed_map_touches_no_other(name: str, fate: Fate) -> None:
    new = {**OLD, name: document(OLD[name]["kind"], LONGER, 24)}
    assert {n: f for n, f in fates(OLD, new).items() if f is not Fate.KEPT} == {name: fate}


def test_another_capacity_is_another_map() -> None:
    assert fates(OLD, {**OLD, "mesh_flow": document(LRU, capacity=128)})["mesh_flow"] is Fate.CARRIED
    assert differences(OLD["mesh_flow"], document(LRU, capacity=128)) == ["capacity 64 -> 128"]


def test_tables_that_refer_to_each_other_change_together() -> None:
    found = fates(OLD, {**OLD, "mesh_workload": document(HASH, LONGER, 24), "mesh_offer": document(HASH, LONGER, 24)})
    assert (found["mesh_policy"], found["mesh_workload"]) == (Fate.REFILLED, Fate.REFILLED)
    assert (found["mesh_pair"], found["mesh_offer"]) == (Fate.ANEW, Fate.ANEW)
    assert (found["mesh_flow"], found["mesh_sock"]) == (Fate.KEPT, Fate.KEPT)


def test_a_table_that_the_old_programs_did_not_have_changes_all_of_them() -> None:
    new = {**OLD, "mesh_block": document(HASH)}
    assert {n: f for n, f in fates(OLD, new).items() if f is not Fate.KEPT} == {
        "mesh_block": Fate.NEW,
        "mesh_policy": Fate.REFILLED,
        "mesh_workload": Fate.REFILLED,
    }


def test_members_that_take_room_meant_for_them_change_no_layout_in_either_direction() -> None:
    taken = document(STORAGE, [["cookie", 0, "Q"], ["workload", 8, "I"], ["added", 12, "H"], ["pad", 14, "H"]])
    assert differences(OLD["mesh_sock"], taken) == differences(taken, OLD["mesh_sock"]) == []
    moved = document(STORAGE, [["cookie", 0, "Q"], ["added", 8, "I"], ["workload", 12, "I"]])
    assert differences(OLD["mesh_sock"], moved) == ["value: new added; without pad; moved workload"]


def test_a_manifest_without_capacities_has_nothing_to_keep() -> None:
    old = {name: {k: v for k, v in found.items() if k not in {"kind", "capacity", "flags"}} for name, found in OLD.items()}
    assert Fate.KEPT not in fates(old, OLD).values()


def test_records_are_rewritten_member_by_member() -> None:
    old = Codec([["gone", 0, "I"], ["wide", 4, "I"], ["list", 8, "2Q"], ["where", 24, "16s"]], 40)
    new = Codec([["list", 0, "3Q"], ["where", 24, "16s"], ["wide", 40, "Q"], ["fresh", 48, "Q"]], 56)
    address = bytes(range(16))
    record = Converter(old, new)(old.pack(gone=1, wide=2, list=(3, 4), where=address))
    assert record == new.pack(list=(3, 4, 0), where=address, wide=2, fresh=0)


def test_a_number_that_does_not_fit_makes_no_record() -> None:
    old, new = Codec([["n", 0, "Q"]], 8), Codec([["n", 0, "H"]], 2)
    assert Converter(old, new)(old.pack(n=65535)) == new.pack(n=65535)
    assert Converter(old, new)(old.pack(n=65536)) is None


def test_programs_between_look_into_both_maps_wherever_the_text_looks_into_one() -> None:
    code = source.read()
    old = {"mesh_flow": {**document(LRU, [["netns_cookie", 0, "Q"], ["flags", 8, "I"], ["service", 12, "Q"]], 24)}}
    new = {"mesh_flow": document(LRU, [["netns_cookie", 0, "Q"], ["workload", 8, "I"], ["flags", 12, "I"], ["service", 16, "I"]], 24)}
    text = bridge.weave(code.text, ["mesh_flow"], old, new, code.records)
    woven, programs = text.split('#line 1 "bridge"')[1].split("#line", 1)
    assert "mesh_flow.lookup(" not in programs
    assert programs.count("mesh_flow_find(") == code.text.count("mesh_flow.lookup(")
    assert programs.count("mesh_flow_drop(") == code.text.count("mesh_flow.delete(")
    assert "fresh.workload" not in woven
    assert "if (fresh.service != before->service)" in woven


def test_capacities_are_those_of_the_header_unless_others_are_wanted() -> None:
    usual, larger = source.read(), source.read(capacities={"mesh_flow": 131072, "mesh_listener": 23})
    assert "struct mesh_flow, mesh_flow, 131072, 0)" in larger.text
    assert "mesh_listener = { .max_entries = 23 }" in larger.text
    assert larger.layout != usual.layout
    assert larger.programs != usual.programs
    assert source.default_capacities()["mesh_events"] == 1 << 20
    assert "mesh_config" not in source.default_capacities()


@pytest.mark.parametrize(
    ("name", "rows"), [("mesh_nothing", 5), ("mesh_flow", 0), ("mesh_flow", 1 << 25), ("mesh_events", 5000), ("mesh_config", 2)]
)
def test_a_capacity_that_cannot_be_is_refused(name: str, rows: int) -> None:
    with pytest.raises(EnvironmentUnfit, match=f"--map-capacity {name}={rows}: "):
        source.read(capacities={name: rows})
