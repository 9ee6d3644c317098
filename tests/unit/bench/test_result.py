"""The arithmetic of a result, its JSON and the order of the rounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.result import Result, Target, pairs, rounds

PAIRS = ((10.0, 20.0), (30.0, 20.0), (8.0, 10.0), (9.0, 10.0), (11.0, 10.0))


def result(target: Target | None = None, values: tuple[tuple[float, float], ...] = PAIRS) -> Result:
    return Result("speed", "requests/s", "nothing", values, "closed loop", target)


def silent(_: str) -> None: ...


def test_the_ratio_is_the_median_of_the_pairs_ratios() -> None:
    assert result().ratios == [0.5, 1.5, 0.8, 0.9, 1.1]
    assert result().ratio == 0.9  # the ratio of the medians would be 1.0


def test_an_even_number_of_pairs_has_the_mean_of_the_middle_two() -> None:
    assert result(values=PAIRS[:2]).ratio == 1.0


def test_the_document_has_every_field_that_50_testing_names() -> None:
    document = result().document()
    assert set(document) == {
        *("name", "unit", "ours", "baseline", "baseline_name", "ratio", "runs", "spread", "kernel", "cpus", "setup"),
    }
    assert (document["ours"], document["baseline"], document["ratio"]) == (10.0, 10.0, 0.9)
    assert document["spread"] == {"min": 0.5, "max": 1.5}
    assert document["runs"][2] == {"ours": 8.0, "baseline": 10.0, "ratio": 0.8}
    assert len(document["runs"]) == 5


@pytest.mark.parametrize(
    ("target", "text", "met"),
    [
        pytest.param(Target(0.9, at_least=True), ">= 0.9", True, id="a rate on its bound"),
        pytest.param(Target(0.91, at_least=True), ">= 0.91", False, id="a rate below its bound"),
        pytest.param(Target(0.9, at_least=False), "<= 0.9", True, id="a time on its bound"),
        pytest.param(Target(0.89, at_least=False), "<= 0.89", False, id="a time above its bound"),
    ],
)
def test_a_target_says_whether_it_is_met(target: Target, text: str, met: bool) -> None:
    document = result(target).document()
    assert (document["target"], document["met"]) == (text, met)


def test_results_are_printed_and_appended_one_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench" / "results.jsonl"
    result().publish(path)
    result(Target(1, at_least=False)).publish(path)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    stored = [json.loads(line) for line in path.read_text().splitlines()]
    assert printed == [result().document(), result(Target(1, at_least=False)).document()]
    assert [{k: v for k, v in line.items() if k != "time"} for line in stored] == printed
    assert all(line["time"].endswith("Z") for line in stored)


def test_a_result_without_a_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="no measured pair"):
        result(values=())


def test_a_baseline_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="no ratio"):
        result(values=((1.0, 0.0),))


def test_modes_take_turns_and_the_order_turns_over_with_every_round() -> None:
    order = ""

    def mode(name: str) -> Callable[[], int]:
        def once() -> int:
            nonlocal order
            order += name
            return len(order)

        return once

    found = rounds({"a": mode("a"), "b": mode("b")}, 5, silent)
    assert order == "ba" + "ab" + "ba" + "ab" + "ba" + "ab"
    assert found == [
        {"a": 3, "b": 4},
        {"b": 5, "a": 6},
        {"a": 7, "b": 8},
        {"b": 9, "a": 10},
        {"a": 11, "b": 12},
    ]  # the first is thrown away


def test_fewer_than_five_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 5"):
        rounds({"a": int}, 4, silent)


def test_pairs_are_those_of_one_round() -> None:
    found = [{"ours": "123", "theirs": "1", "other": ""}, {"theirs": "12", "ours": "1", "other": ""}]
    assert pairs(found, "ours", "theirs", len) == ((3, 1), (1, 2))
