"""Which endpoints a node's callers prefer, and in which shares."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.balancing import node_zone, preferred, shares
from agent.model import Workload


def endpoint(name: str, node: str, zone: str = "", weight: int = 1) -> tuple[Workload, int]:
    return Workload(f"shop/{name}", name, node, {}, ("10.0.0.1",), "", True, True, zone=zone, weight=weight), 8080


HERE, NEAR, FAR = endpoint("here", "n1", "a"), endpoint("near", "n2", "a"), endpoint("far", "n3", "b")
UNKNOWN = endpoint("unknown", "n4")


@pytest.mark.parametrize(
    ("distribution", "endpoints", "expected"),
    [
        pytest.param("", [HERE, NEAR, FAR], [HERE, NEAR, FAR], id="no-preference"),
        pytest.param("PreferSameZone", [HERE, NEAR, FAR], [HERE, NEAR], id="zone"),
        pytest.param("PreferSameZone", [FAR, UNKNOWN], [FAR, UNKNOWN], id="zone-without-endpoints"),
        pytest.param("PreferSameNode", [NEAR, HERE, FAR], [HERE], id="node"),
        pytest.param("PreferSameNode", [FAR, NEAR], [NEAR], id="node-without-endpoints-falls-back-to-the-zone"),
        pytest.param("PreferSameNode", [FAR, UNKNOWN], [FAR, UNKNOWN], id="node-and-zone-without-endpoints"),
        pytest.param("PreferSameNode", [], [], id="none"),
        pytest.param("OfANewerController", [FAR, HERE], [FAR, HERE], id="unknown-distribution"),
    ],
)
def test_the_nearest_endpoints_are_preferred(
    distribution: str, endpoints: list[tuple[Workload, int]], expected: list[tuple[Workload, int]]
) -> None:
    assert preferred(endpoints, distribution, "n1", "a") == expected


def test_a_zone_that_is_not_known_prefers_nothing() -> None:
    assert preferred([UNKNOWN, FAR], "PreferSameZone", "n1", "") == [UNKNOWN, FAR]
    assert preferred([UNKNOWN, FAR], "PreferSameNode", "n1", "") == [UNKNOWN, FAR]


def test_a_node_is_in_the_zone_that_its_workloads_agree_on() -> None:
    def zone(*found: tuple[Workload, int]) -> str:
        return node_zone([workload for workload, _ in found], "n1")

    assert zone(HERE, endpoint("silent", "n1"), FAR) == "a"
    assert zone(endpoint("silent", "n1"), FAR) == ""
    assert zone(HERE, endpoint("other", "n1", "b")) == ""


def test_shares_are_by_weight() -> None:
    found = shares([endpoint("a", "n1", weight=1), endpoint("b", "n1", weight=3)])
    assert [(workload.name, share) for workload, _, share in found] == [("shop/a", 0.25), ("shop/b", 0.75)]
    assert shares([]) == []


endpoints = st.builds(
    endpoint, st.sampled_from("abcdef"), st.sampled_from(["n1", "n2", "n3"]), st.sampled_from(["", "a", "b"]), st.integers(1, 9)
)


@given(st.lists(endpoints), st.sampled_from(["", "PreferSameZone", "PreferSameNode"]), st.sampled_from(["", "a", "c"]))
def test_a_preference_never_leaves_a_service_without_endpoints_and_invents_none(
    found: list[tuple[Workload, int]], distribution: str, zone: str
) -> None:
    chosen = preferred(found, distribution, "n1", zone)
    assert bool(chosen) is bool(found)
    assert all(one in found for one in chosen)
    assert not chosen or sum(share for _, _, share in shares(chosen)) == pytest.approx(1)
