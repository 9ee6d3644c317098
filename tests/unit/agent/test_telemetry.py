"""The arithmetic between the kernel's counters and Prometheus; the tables themselves are in tests/kernel/test_mesh_metrics.py."""

from __future__ import annotations

import itertools
import math
import socket
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import telemetry
from agent.bpf.manifest import BUCKET_SHIFT, Direction
from agent.config import Config
from agent.errors import EnvironmentUnfit
from agent.ids import Ids
from agent.telemetry import MeshCollector, MetricsServer

COUNTS = st.lists(st.integers(0, 2**40), min_size=16, max_size=16).map(tuple)


@given(COUNTS)
def test_buckets_are_cumulative_doublings_that_end_with_everything(counts: tuple[int, ...]) -> None:
    buckets = telemetry._buckets(counts)
    bounds = [float(bound) for bound, _ in buckets]
    assert bounds[0] == (1 << BUCKET_SHIFT) / 1e9
    assert all(math.isclose(after, 2 * before) for before, after in itertools.pairwise(bounds[:-1]))
    assert bounds[-1] == math.inf
    assert [count for _, count in buckets] == sorted(count for _, count in buckets)
    assert buckets[-1][1] == sum(counts)


def test_one_event_of_each_slot_is_counted_once_in_each_bucket_above_it() -> None:
    assert [count for _, count in telemetry._buckets((1,) * 16)] == list(range(1, 17))


@given(st.lists(st.fixed_dictionaries({"opened": st.integers(0, 2**40), "closed": st.tuples(*[st.integers(0, 2**40)] * 3)}), min_size=1))
def test_the_counters_of_every_cpu_are_added_up(parts: list[dict[str, Any]]) -> None:
    total = telemetry._sum(parts)
    assert total["opened"] == sum(p["opened"] for p in parts)
    assert total["closed"] == tuple(sum(p["closed"][i] for p in parts) for i in range(3))


def labels(tmp_path: Path, **names: tuple[str, str]) -> dict[str, str]:
    ids = Ids(tmp_path / "ids.json")
    key: dict[str, int] = {"source": 0, "target": 0, "service": 0, "port": 6379, "direction": Direction.OUTBOUND}
    key |= {member: ids.number(kind, name) for member, (kind, name) in names.items()}
    collector = MeshCollector(cast("Any", None), ids, cast("Any", None))
    return dict(zip(telemetry._LABELS, collector._labels(key), strict=True))


def test_labels_are_the_names_behind_the_numbers(tmp_path: Path) -> None:
    found = labels(
        tmp_path, source=("workload", "shop/frontend"), target=("workload", "data/redis-0"), service=("service", "data/redis:6379")
    )
    assert found == {
        "source_workload": "frontend",
        "source_namespace": "shop",
        "destination_workload": "redis-0",
        "destination_namespace": "data",
        "destination_service": "data/redis",
        "port": "6379",
        "security_policy": "none",
        "direction": "outbound",
    }


def test_whom_the_mesh_does_not_know_is_unknown(tmp_path: Path) -> None:
    found = labels(tmp_path)
    assert {found[name] for name in ("source_workload", "source_namespace", "destination_workload", "destination_namespace")} == {"unknown"}
    assert found["destination_service"] == ""


def test_a_connection_to_the_waypoint_has_a_service_and_no_workload_yet(tmp_path: Path) -> None:
    found = labels(tmp_path, source=("workload", "shop/frontend"), service=("service", "shop/cart:80"))
    assert (found["destination_workload"], found["destination_namespace"], found["destination_service"]) == ("", "shop", "shop/cart")


def test_a_port_that_is_taken_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = Config(node="n", controller="unix:x", metrics_address="127.0.0.1", metrics_port=port)
        with pytest.raises(
            EnvironmentUnfit, match=f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --metrics-port"
        ):
            MetricsServer(config, cast("Any", _Nothing()), cast("Any", None), lambda: True)


class _Nothing:
    """A collector without metrics."""

    def describe(self) -> tuple[()]:
        return ()

    collect = describe
