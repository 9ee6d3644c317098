"""The deadline that a gRPC caller sets, at a real Envoy: kept to, bounded by policy, and told to the backend."""

from __future__ import annotations

import dataclasses
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from agent.model import Retry
from agent.traffic import Limits, TrafficPolicy
from tests.ports import free_ports
from tests.unit.agent.l7 import harness
from tests.unit.agent.l7 import test_requests as requests

ASKS = {"content-type": "application/grpc", "grpc-timeout": "5S"}


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        pytest.param(None, "5S", id="the-applications"),
        pytest.param(0, "5000m", id="kept-to"),
        pytest.param(3000, "3000m", id="shorter"),
        pytest.param(9000, "5000m", id="longer"),
    ],
)
def test_a_backend_is_told_the_deadline_that_holds(tmp_path: Path, limit: int | None, told: str) -> None:
    """On each try: Envoy 1.40 does not take off what the tries before have used."""
    [entry] = free_ports(1)
    seen: list[str | None] = []

    def fails_once(handler: BaseHTTPRequestHandler) -> int:
        seen.append(handler.headers.get("grpc-timeout"))
        return 503 if len(seen) == 1 else 200

    with requests.backends(s=fails_once) as targets:
        route = harness.route("r", harness.rule(requests.to("s", entry), retry=Retry(2, (503,), 0)), parent="s")
        snapshot = requests.scene([requests.pod("p", "s", entry, targets["s"])], [harness.service("s", "127.0.0.1", entry)], route)
        policy = TrafficPolicy("default/tp", (("default/s", entry),), limits=Limits(grpc_deadline_ms=limit))
        [answer] = requests.through_envoy(
            tmp_path, dataclasses.replace(snapshot, traffic={policy.name: policy}), [entry], lambda: [harness.request(entry, headers=ASKS)]
        )
    assert (answer.status, seen) == (200, [told, told])


def test_tries_do_not_outlast_the_deadline(tmp_path: Path) -> None:
    [entry] = free_ports(1)
    asked: list[float] = []

    def slow(_: BaseHTTPRequestHandler) -> int:
        asked.append(time.monotonic())
        time.sleep(0.4)
        return 503

    with requests.backends(s=slow) as targets:
        route = harness.route("r", harness.rule(requests.to("s", entry), retry=Retry(23, (503,), 1)), parent="s")
        snapshot = requests.scene([requests.pod("p", "s", entry, targets["s"])], [harness.service("s", "127.0.0.1", entry)], route)
        policy = TrafficPolicy("default/tp", (("default/s", entry),), limits=Limits(grpc_deadline_ms=0))
        [answer] = requests.through_envoy(
            tmp_path,
            dataclasses.replace(snapshot, traffic={policy.name: policy}),
            [entry],
            lambda: [harness.request(entry, headers={**ASKS, "grpc-timeout": "1S"})],
        )
    assert answer.headers["grpc-status"] in {"4", "14"}, "DEADLINE_EXCEEDED, or UNAVAILABLE of the last try"
    assert asked[-1] - asked[0] < 1.1
