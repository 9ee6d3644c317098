"""`make bench-l4`: two pods of one node over the mesh's L4 path against the same two wires with no mesh at all.

Ours: the caller dials a Service's virtual address, an L4 AuthorizationPolicy protects the server, the kernel programs choose the backend,
decide and count. Baseline: plain pods, dialled by their address (`bench.testbed` says why that is no mesh at all). Round-trip times are of 64
bytes over one long TCP connection, once between two cores and once on one, where no wake-up of another CPU adds its noise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from bench import tools
from bench.main import run
from bench.result import Result, Target, pairs, rounds
from bench.testbed import CALLER, ONE_NODE, PLAIN_CALLER, PLAIN_SERVER, SERVER, VIP, Testbed, service, testbed
from lab.errors import LabError
from lab.topology import Pod

PING, HTTP, BULK = 5001, 8080, 5201
"""Ports of sockperf, nginx and iperf3."""
ROUNDS = 11
SECONDS = 1
T = TypeVar("T")
CONNECTIONS = 8
BASELINE = "no mesh, same wires"
RESOURCES = (
    service(("ping", PING), ("http", HTTP), ("bulk", BULK)),
    {
        "apiVersion": "meshagent.io/v1alpha1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "server-callers"},
        "spec": {
            "selector": {"matchLabels": {"app": "server"}},
            "action": "ALLOW",
            "rules": [
                {
                    "from": [{"source": {"serviceAccounts": ["default/caller"]}}],
                    "to": [{"operation": {"ports": [str(PING), str(HTTP), str(BULK)]}}],
                }
            ],
        },
    },
)


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two ways: who calls whom, and by which address."""

    name: str
    caller: Pod
    server: Pod
    address: str


OURS = Side("ours", CALLER, SERVER, VIP)
PLAIN = Side("plain", PLAIN_CALLER, PLAIN_SERVER, PLAIN_SERVER.addresses[0])


@dataclass(frozen=True, slots=True)
class Connects:
    """Connections a second, and CPU of the whole machine for each, microseconds."""

    per_second: float
    cpu_us: float


def measure(progress: Callable[[str], None]) -> list[Result]:
    """Bring the lab up and measure everything."""
    with testbed(RESOURCES, progress, ONE_NODE) as bed:
        for side in (OURS, PLAIN):
            bed.start(f"ping-{side.server.name}", side.server, bed.cpus.far, tools.sockperf_server(side.server.addresses[0], PING), PING)
            bed.start(f"bulk-{side.server.name}", side.server, bed.cpus.far, ["iperf3", "--server", "--port", str(BULK)], BULK)
            bed.start_nginx(side.server, bed.cpus.far, tools.nginx(HTTP), HTTP)
        before = bed.opened(CALLER.name, SERVER.name)
        results = [*_ping_pong(bed, progress), *_connects(bed, progress), _bulk(bed, progress)]
        if bed.opened(CALLER.name, SERVER.name) <= before:
            raise LabError("the kernel programs counted no connection of ours: what was measured was not the mesh")
        return results


def _ping_pong(bed: Testbed, progress: Callable[[str], None]) -> list[Result]:
    results = []
    for name, cpu in (("two cores", bed.cpus.near), ("one core", bed.cpus.far)):

        def once(side: Side, cpu: int = cpu) -> tools.PingPong:
            return tools.parse_sockperf(bed.run(side.caller, cpu, tools.sockperf(side.address, PING, SECONDS)))

        found = _both(once, f"ping-pong on {name}", progress)
        where = f"client on CPU {cpu}, server on CPU {bed.cpus.far}; SCHED_RR, CPUs kept awake"
        setup = f"closed loop; sockperf, {tools.MESSAGE_BYTES} bytes, one TCP connection; {where}"
        label = name.replace(" ", "-")
        p50, p99 = (pairs(found, "ours", "plain", value) for value in (_p50, _p99))
        results.append(Result(f"l4-rtt-p50-{label}", "us", BASELINE, p50, setup, Target(1.05, at_least=False)))
        results.append(Result(f"l4-rtt-p99-{label}", "us", BASELINE, p99, setup))
    return results


def _p50(found: tools.PingPong) -> float:
    return found.p50_us


def _p99(found: tools.PingPong) -> float:
    return found.p99_us


def connect(bed: Testbed, side: Side) -> Connects:
    """A closed loop of connections that close after one request."""
    busy = bed.busy_seconds()
    argv = tools.wrk(f"http://{side.address}:{HTTP}/", CONNECTIONS, SECONDS, ("Connection: close",))
    found = tools.parse_wrk(bed.run(side.caller, bed.cpus.near, argv))
    return Connects(found.per_second, (bed.busy_seconds() - busy) / found.requests * 1e6)


def _connects(bed: Testbed, progress: Callable[[str], None]) -> list[Result]:
    found = _both(partial(connect, bed), "connections", progress)
    setup = f"closed loop; wrk, {CONNECTIONS} at a time, Connection: close; wrk on CPU {bed.cpus.near}, nginx on CPU {bed.cpus.far}; SCHED_RR, CPUs kept awake"
    return [
        Result("l4-connections", "connections/s", BASELINE, pairs(found, "ours", "plain", lambda one: one.per_second), setup),
        Result("l4-connection-cpu", "CPU us, whole machine", BASELINE, pairs(found, "ours", "plain", lambda one: one.cpu_us), setup),
    ]


def _bulk(bed: Testbed, progress: Callable[[str], None]) -> Result:
    def once(side: Side) -> float:
        return tools.parse_iperf(bed.run(side.caller, bed.cpus.near, tools.iperf(side.address, BULK, SECONDS))) / 1e9

    found = _both(once, "bulk", progress)
    setup = f"iperf3, one TCP connection; client on CPU {bed.cpus.near}, server on CPU {bed.cpus.far}; SCHED_RR, CPUs kept awake"
    return Result("l4-bulk", "Gbit/s", BASELINE, pairs(found, "ours", "plain", float), setup)


def _both(once: Callable[[Side], T], what: str, progress: Callable[[str], None]) -> list[dict[str, T]]:
    return rounds({side.name: partial(once, side) for side in (OURS, PLAIN)}, ROUNDS, lambda text: progress(f"{what}: {text}"))


if __name__ == "__main__":
    sys.exit(run(measure))
