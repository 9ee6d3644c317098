"""The ways that `bench.mtls` compares."""

from __future__ import annotations

from typing import Any, cast

import pytest

from bench import machine, mtls, tools
from bench.mtls import PORTS, SIDECAR_TLS, Way, hops
from bench.result import Target
from lab import resources

WRK = "  Latency Distribution\n     50%  1.00ms\n     99%  2.00ms\n  200 requests in 1.00s, 0.93MB read\nRequests/sec:   199.50\n"


def test_the_mesh_knows_one_pod_of_each_node() -> None:
    described = [resources.workload(pod)["spec"]["node"] for pod in mtls.TOPOLOGY.pods if pod.mesh]
    assert described == ["node-1", "node-2"]
    assert mtls.TOPOLOGY.identity


def test_what_the_sidecar_of_the_caller_sends_out_is_what_the_other_takes() -> None:
    inbound, outbound = hops("10.0.0.1")
    assert [target for _, target in outbound] == [listen for listen, _ in inbound]
    assert [listen[1] for listen, _ in outbound] == [target[1] for _, target in inbound] == list(PORTS)
    assert {port for (_, port), _ in inbound}.isdisjoint(PORTS)
    assert inbound[0] == (("10.0.0.1", PORTS[0] + SIDECAR_TLS), ("10.0.0.1", PORTS[0]))


class Bed:
    """A testbed in which a second of CPU passes with every run of the load generator."""

    cpus = type("Cpus", (), {"near": 0, "far": 1})

    def __init__(self) -> None:
        self.busy = 10.0
        self.ran: list[str] = []

    def busy_seconds(self) -> float:
        return self.busy

    def run(self, _pod: object, _cpu: int, argv: list[str]) -> str:
        self.busy += 1.0
        self.ran = argv
        return WRK


def test_a_load_says_what_each_request_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    bed = Bed()
    monkeypatch.setattr(machine, "used_seconds", lambda _: bed.busy / 2)
    found = mtls.load(cast("Any", bed), 8080, 64, Way("ours", mtls.CALLER, "10.96.0.10"), ("Connection: close",))
    assert found == mtls.Load(199.5, 5000.0, 2500.0)
    assert bed.ran == tools.wrk("http://10.96.0.10:8080/", 64, mtls.SECONDS, ("Connection: close",))


def test_the_target_is_about_sidecars_only() -> None:
    found = [{"ours": 3.0, "plain": 6.0, "sidecars": 2.0}]
    plain, sidecars = mtls._results("bulk", "Gbit/s", found, float, "", Target(1.0, at_least=True))
    assert (plain.name, plain.ratio, plain.target) == ("mtls-bulk-against-plain", 0.5, None)
    assert (sidecars.name, sidecars.ratio, sidecars.target) == ("mtls-bulk-against-sidecars", 1.5, Target(1.0, at_least=True))
