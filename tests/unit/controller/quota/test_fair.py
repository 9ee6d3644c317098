"""Shares of a limit: what holds whatever callers want."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.quota.fair import UNKNOWN, Want, left, shares, steady

LIMITS = st.floats(0.01, 1e6)
WANTS = st.dictionaries(
    st.integers(0, 30),
    st.builds(Want, st.one_of(st.floats(0, 1e6), st.just(UNKNOWN)), st.integers(1, 1000).map(float), st.one_of(st.floats(0, 1e6), st.just(math.inf))),
    max_size=13,
)  # fmt: skip


def close(limit: float) -> float:
    return limit * 1e-9 + 1e-9


@given(LIMITS, WANTS)
def test_never_more_than_the_limit_is_given_and_all_of_it_if_it_may_be(limit: float, wants: dict[int, Want]) -> None:
    total = math.fsum(shares(limit, wants).values())
    assert total <= limit + close(limit)
    assert total >= min(limit, math.fsum(want.most for want in wants.values())) - close(limit)


@given(LIMITS, WANTS)
def test_everybody_gets_what_he_wants_or_his_part_by_weight(limit: float, wants: dict[int, Want]) -> None:
    weights = math.fsum(want.weight for want in wants.values())
    for key, share in shares(limit, wants).items():
        want = wants[key]
        assert share >= min(want.demand, want.most, limit * want.weight / weights) - close(limit)
        assert share <= want.most + close(limit)


@given(LIMITS, WANTS)
def test_who_lacks_something_has_by_weight_no_less_than_anybody_else(limit: float, wants: dict[int, Want]) -> None:
    found = shares(limit, wants)
    for key, share in found.items():
        if share < min(wants[key].demand, wants[key].most) - close(limit):
            level = share / wants[key].weight
            assert all(other / wants[name].weight <= level + close(limit) for name, other in found.items())


@given(LIMITS, WANTS, st.floats(1, 10))
def test_wanting_more_takes_from_nobody_what_he_has_a_right_to(limit: float, wants: dict[int, Want], more: float) -> None:
    if not wants:
        return
    greedy = min(wants)
    asked = {**wants, greedy: Want(wants[greedy].demand * more + 1, wants[greedy].weight, wants[greedy].most)}
    weights = math.fsum(want.weight for want in wants.values())
    for key, share in shares(limit, asked).items():
        assert share >= min(wants[key].demand, wants[key].most, limit * wants[key].weight / weights) - close(limit)


@pytest.mark.parametrize(
    ("wants", "expected"),
    [
        pytest.param({"flood": Want(1000), "modest": Want(13)}, {"flood": 87, "modest": 13}, id="unused goes to who wants more"),
        pytest.param({"a": Want(1000, 3), "b": Want(1000, 1)}, {"a": 75, "b": 25}, id="by weight"),
        pytest.param({"a": Want(10), "b": Want(20)}, {"a": 45, "b": 55}, id="what nobody wants is room for all"),
        pytest.param(
            {"a": Want(UNKNOWN), "b": Want(UNKNOWN), "c": Want(3)}, {"a": 48.5, "b": 48.5, "c": 3}, id="newcomers want everything"
        ),
        pytest.param({"a": Want(1000, most=7), "b": Want(20)}, {"a": 7, "b": 93}, id="nobody above his most"),
        pytest.param({}, {}, id="nobody"),
    ],
)
def test_shares_are(wants: dict[str, Want], expected: dict[str, float]) -> None:
    assert shares(100, wants) == pytest.approx(expected)


USED = st.dictionaries(st.integers(0, 30), st.integers(0, 10**8), min_size=1, max_size=13)


@given(st.integers(1, 10**9), USED, st.floats(0, 1), st.data())
def test_of_a_counted_limit_everybody_may_have_his_part_until_it_is_used_up(
    requests: int, used: dict[int, int], elapsed: float, data: st.DataObject
) -> None:
    weights = {key: float(data.draw(st.integers(1, 100))) for key in used}
    rest = max(0, requests - sum(used.values()))
    total = math.fsum(weights.values())
    for key, count in left(requests, used, weights, elapsed).items():
        assert 0 <= count <= rest
        assert count >= min(rest, requests * weights[key] / total - used[key]) - 1e-6 * requests


def test_who_has_used_his_part_up_gets_what_others_have_not_used_by_now() -> None:
    used, weights = {"flood": 50, "modest": 5}, {"flood": 1.0, "modest": 1.0}
    assert left(100, used, weights, 0.0)["flood"] == 0
    assert left(100, used, weights, 0.5)["flood"] == pytest.approx(20)
    assert left(100, {"flood": 70, "modest": 5}, weights, 0.5) == pytest.approx({"flood": 0, "modest": 25})


def test_a_demand_that_varies_a_little_does_not_change_shares() -> None:
    demand = steady(100, UNKNOWN)
    assert demand > 110
    for measured in (100, 103, 97, 105, 100, 95):
        assert steady(measured, demand) == demand
    assert steady(200, demand) > 200
    assert steady(20, demand) < 40
