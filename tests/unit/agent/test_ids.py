"""Numbers for names are never given twice."""

from __future__ import annotations

from pathlib import Path

from agent.ids import Ids


def test_a_name_keeps_its_number_across_restarts(tmp_path: Path) -> None:
    ids = Ids(tmp_path / "ids")
    first = ids.number("workload", "shop/a")
    ids.save()
    again = Ids(tmp_path / "ids")
    assert again.number("workload", "shop/a") == first
    assert again.name(first) == "shop/a"


def test_zero_is_nobody(tmp_path: Path) -> None:
    ids = Ids(tmp_path / "ids")
    assert ids.number("workload", "shop/a") > 0
    assert ids.name(0) == ""


def test_kinds_do_not_share_numbers(tmp_path: Path) -> None:
    ids = Ids(tmp_path / "ids")
    assert ids.number("workload", "shop/a") != ids.number("service", "shop/a")


def test_a_forgotten_names_number_is_not_used_again(tmp_path: Path) -> None:
    ids = Ids(tmp_path / "ids")
    gone = ids.number("list", "x")
    ids.keep("list", [])
    ids.save()
    assert Ids(tmp_path / "ids").number("list", "x") > gone
    assert ids.name(gone) == ""


def test_numbers_that_the_kernel_still_holds_are_not_given_again(tmp_path: Path) -> None:
    ids = Ids(tmp_path / "ids")
    ids.start_above(41)
    assert ids.number("workload", "shop/a") == 42
    ids.start_above(7)
    assert ids.number("workload", "shop/b") == 43
