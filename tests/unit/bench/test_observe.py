"""The two Envoys that are compared differ in what is measured alone, and a real Envoy takes what both parts are made of."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from envoy.config.bootstrap.v3 import bootstrap_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2

from agent.l7 import envoy, metrics
from bench import observe


def manager(bootstrap: bootstrap_pb2.Bootstrap) -> hcm_pb2.HttpConnectionManager:
    result = hcm_pb2.HttpConnectionManager()
    assert bootstrap.static_resources.listeners[0].filter_chains[0].filters[0].typed_config.Unpack(result)
    return result


def test_the_two_differ_in_the_logs_that_count(tmp_path: Path) -> None:
    on, off = (manager(observe._one_hop(tmp_path / "admin", 1, counted=counted)) for counted in (True, False))
    assert len(on.access_log) == len(off.access_log) + 2
    del on.access_log[-2:]
    assert on == off


@pytest.mark.parametrize("part", ["one", "many"])
def test_a_real_envoy_takes_it(tmp_path: Path, part: str) -> None:
    admin = tmp_path / "admin.sock"
    made = observe._one_hop(admin, observe.ON, counted=True) if part == "one" else observe._many_routes(admin, [observe.ON, observe.OFF])
    file = tmp_path / "envoy.pb"
    file.write_bytes(made.SerializeToString())
    run = subprocess.run(
        [envoy.find(), "--mode", "validate", "-c", file, "--log-level", "error"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_no_listener_has_more_series_than_envoy_keeps_for_one() -> None:
    assert min(metrics.MOST_HISTOGRAMS, metrics.MOST_COUNTERS) > observe.ROUTES
