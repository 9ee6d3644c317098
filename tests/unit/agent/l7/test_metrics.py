"""What Envoy counts of requests, and that it stays within bounds: with a real Envoy."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from envoy.config.core.v3 import base_pb2

from agent.l7 import envoy, metrics
from agent.l7.snapshot import build
from agent.requests import full, parse
from tests.ports import free_ports
from tests.unit.agent.l7 import harness

CALLER = harness.workload("caller", "10.0.0.1")


def status(request: BaseHTTPRequestHandler) -> int:
    """As the path says; /slow takes longer than its caller waits."""
    if request.path == "/slow":
        time.sleep(0.7)
        return 200
    return int(request.path[1:])


def through(directory: Path, work: Callable[[int, Path], None]) -> None:
    """Run `work` with the port of a service and Envoy's admin socket."""
    [entry] = free_ports(1)
    settings = harness.config(directory)

    async def scenario(target: int) -> None:
        pod = harness.workload("server-1", "127.0.0.1", backing={"default/server": {entry: target}})
        snapshot = harness.snapshot([CALLER, pod], [harness.service("server", "127.0.0.1", entry)])
        resources = build(snapshot, [harness.local(CALLER)], trust_domain=harness.TRUST_DOMAIN)
        async with harness.waypoint(settings) as (xds, _):
            await harness.applied(xds, harness.on_loopback(resources, entry))
            await asyncio.to_thread(work, entry, settings.envoy_admin_socket)

    with harness.http_server("server", "127.0.0.1", behaviour=status) as server:
        asyncio.run(scenario(server.server_address[1]))


def counted(admin: Path) -> dict[str, float]:
    """Requests by key."""
    text = envoy.ask_admin(admin, "/stats/prometheus?usedonly&filter=%5Emesh%5C.").decode()
    return {key: value for key, (value,) in parse(text.splitlines()).requests.items()}


def test_a_caller_that_hangs_up_is_counted_and_nothing_is_written_to_envoys_log(tmp_path: Path) -> None:
    def work(port: int, admin: Path) -> None:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port)) as caller:
                caller.sendall(b"GET /slow HTTP/1.1\r\nHost: server\r\n\r\n")
                time.sleep(0.1)
        deadline = time.monotonic() + 5
        while sum(counted(admin).values()) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ((key, value),) = counted(admin).items()
        assert (key.split(metrics.SEPARATOR)[-3:], value) == (["0", "", "DC"], 3)

    through(tmp_path, work)
    assert "Stats access logger" not in (tmp_path / "envoy.log").read_text()


def test_what_an_application_answers_fills_no_memory_and_what_is_idle_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "IDLE_S", 5)
    few = metrics._limit(1, 37) + metrics._limit(3, 37) + metrics._EVICT + metrics._length_delimited(5, b"mesh")
    monkeypatch.setattr(metrics, "_SCOPE", metrics._length_delimited(metrics._SCOPE_FIELD, few))

    def work(port: int, admin: Path) -> None:
        codes = range(500, 560)
        for code in codes:
            assert harness.request(port, f"/{code}").status == code
        assert len(counted(admin)) <= 37, "no more than the scope holds"
        while not full(counted(admin), 37):  # a request is counted when it has ended, just after its answer
            assert harness.request(port, "/500").status == 500
        deadline = time.monotonic() + 30
        while counted(admin):
            assert time.monotonic() < deadline, "idle series are there still"
            time.sleep(0.5)
        while not counted(admin):
            assert time.monotonic() < deadline, "there is no room again"
            assert harness.request(port, "/200").status == 200

    through(tmp_path, work)


@pytest.mark.parametrize("name", ["default/a", f"{'n' * 63}/{'w' * 253}"])
@pytest.mark.parametrize("tunnelled", [False, True])
def test_an_endpoint_says_which_workload_it_is(name: str, tunnelled: bool) -> None:
    metadata = base_pb2.Metadata()
    metadata.filter_metadata["other"].fields["kept"].bool_value = True
    metrics.endpoint(metadata, name, tunnelled=tunnelled)
    assert metadata.filter_metadata["mesh.target"]["name"] == name + " mutual_tls" * tunnelled
    assert metadata.filter_metadata["other"]["kept"]
