"""`make bench-fairness`: how long a quiet workload waits at the waypoint beside another workload that floods it.

One quiet caller asks at a fixed rate (h2load, open loop); beside it a second workload of the same node does its worst, in one way after the other:
- connections: as many requests as 256 kept-open connections can ask for (closed loop);
- streams: the same over 4 HTTP/2 connections of 100 streams each;
- churn: a new connection for every request, 64 at a time;
- bodies: 16 uploads of 8 MiB at a time;
- held: 1,000 requests that never end.
Each is also done past the waypoint, between two plain pods (`bare`): what the flood's own programs cost the quiet one on a machine of two CPUs is in that
number, and only what is above it is the waypoint's. "apart" has a TrafficPolicy for the flooded service, which gives each calling workload
eight connections of its own (`limits: {per: Workload, maxConnections: 8}`): what is above waits in the waypoint.

The proxy's workers have a CPU each, and go before the floods there; the quiet caller and its server go before the workers. All have real-time priorities: if
something without one waited for a CPU that the others fill, it would get 50 ms of each second (the fair server, Documentation/scheduler/sched-deadline.rst),
and every 20th request would measure that. So the programs that keep CPUs awake are stopped while a flood does that. The median is
reported beside the 99th percentile: what else the machine does shows in the latter only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from bench import machine, tools
from bench.main import run
from bench.result import Result, Target, pairs, rounds
from bench.testbed import CALLER, NODE, ONE_NODE, PLAIN_CALLER, PLAIN_SERVER, SERVER, Testbed, seat, testbed
from lab import process
from lab.errors import LabError
from lab.topology import Pod, Topology

HTTP = 8080
QUIET_VIP, LOUD_VIP, APART_VIP = "10.96.0.10", "10.96.0.11", "10.96.0.12"
LOUD = Pod("loud", NODE, ("10.77.1.13",), service_account="loud", labels={"app": "loud"})
LOUD_SERVER = Pod("loud-server", NODE, ("10.77.1.23",), service_account="loud-server", labels={"app": "loud-server"})
TOPOLOGY = Topology((*ONE_NODE.nodes,), (*ONE_NODE.pods, LOUD, LOUD_SERVER))
ROUNDS = 5
SECONDS, RATE, CONNECTIONS = 1, 600, 4
WARM_S = 0.4
FEWEST = 20
"""Answers; one that waits keeps its connection from asking again, so there are fewer than the rate would have."""
LAST, SECOND, FIRST = range(machine.PRIORITY, machine.PRIORITY + 3)
"""Priorities of the floods, of the waypoint, of the quiet ones."""
BODY_BYTES = 8 << 20
HOLD = """
import socket, sys
held = []
for _ in range(int(sys.argv[3])):
    one = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)
    one.sendall(b"POST / HTTP/1.1\\r\\nhost: a\\r\\ncontent-length: 1000000\\r\\n\\r\\nx")
    held.append(one)
sys.stdin.read()
"""


def _service(name: str, address: str, app: str) -> dict[str, object]:
    ports = [{"name": "http", "port": HTTP, "appProtocol": "http"}]
    metadata = {"name": name, "annotations": {"meshagent.io/waypoint": "true"}}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {"clusterIPs": [address], "selector": {"app": app}, "ports": ports},
    }


BARE = {"streams": "connections"}
"""What nginx has no HTTP/2 for; behind the waypoint they are connections as well."""
RESOURCES = (
    _service("quiet", QUIET_VIP, "server"),
    _service("loud", LOUD_VIP, "loud-server"),
    _service("apart", APART_VIP, "loud-server"),
    {
        "apiVersion": "meshagent.io/v1alpha1",
        "kind": "TrafficPolicy",
        "metadata": {"name": "apart"},
        "spec": {"targetRefs": [{"kind": "Service", "name": "apart"}], "limits": {"per": "Workload", "maxConnections": 8}},
    },
)


def floods(address: str, body: Path) -> Mapping[str, list[str]]:
    """The command of each flood against an address."""
    url, seconds = f"http://{address}:{HTTP}/", str(SECONDS + 2)
    return {
        "connections": ["wrk", "-t", "1", "-c", "256", "-d", f"{seconds}s", url],
        "streams": ["h2load", "-p", "h2c", "-c", "4", "-m", "100", "-D", seconds, url],
        "churn": ["wrk", "-t", "1", "-c", "64", "-d", f"{seconds}s", "-H", "connection: close", url],
        "bodies": ["h2load", "--h1", "-c", "16", "-D", seconds, "-d", str(body), url],
        "held": [sys.executable, "-c", HOLD, address, str(HTTP), "1000"],
    }


def measure(progress: Callable[[str], None]) -> list[Result]:
    """Bring the lab up and measure everything."""
    with testbed(RESOURCES, progress, TOPOLOGY) as bed:
        config = tools.nginx(HTTP).replace("return 200 ok", "client_max_body_size 0; return 200 ok")
        _turn(bed.start_nginx(SERVER, bed.cpus.near, tools.nginx(HTTP), HTTP).pid, FIRST)
        for pod in (LOUD_SERVER, PLAIN_SERVER):
            bed.start_nginx(pod, bed.cpus.near, config, HTTP)
        waypoint = bed.lab.status(NODE).get("waypoint", {}).get("pid")
        if not waypoint:
            raise LabError(f"the waypoint of {NODE} does not say its pid")
        _workers_apart(waypoint, bed.cpus)
        body = bed.directory / "body"
        body.write_bytes(bytes(BODY_BYTES))
        modes: dict[str, Callable[[], tuple[float, float]]] = {"quiet": partial(_quiet, bed)}
        for name in floods("", body):
            beside = partial(_beside, bed, fills=name != "held")
            modes[f"{name} bare"] = partial(beside, PLAIN_CALLER, floods(PLAIN_SERVER.addresses[0], body)[BARE.get(name, name)])
            modes[f"{name} waypoint"] = partial(beside, LOUD, floods(LOUD_VIP, body)[name])
            if name in {"connections", "streams", "bodies"}:
                modes[f"{name} apart"] = partial(beside, LOUD, floods(APART_VIP, body)[name])
        found = rounds(modes, ROUNDS, progress)
    setup = f"a quiet caller, open loop, {RATE} requests/s over {CONNECTIONS} connections; each worker of the waypoint on a CPU of its own"
    results = []
    for mode in modes:
        if mode != "quiet":
            name, bound = f"fairness-{mode.replace(' ', '-')}", None if mode.endswith("bare") else Target(2.0, at_least=False)
            results.append(
                Result(f"{name}-p99", "us", "the same caller alone", pairs(found, mode, "quiet", lambda one: one[1]), setup, bound)
            )
            results.append(Result(f"{name}-p50", "us", "the same caller alone", pairs(found, mode, "quiet", lambda one: one[0]), setup))
    return results


def _workers_apart(pid: int, chosen: machine.Cpus) -> None:
    """Give each worker of Envoy a CPU; the other threads go where the second is."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        first = (task / "comm").read_text().strip().endswith("worker_0")
        os.sched_setaffinity(int(task.name), {chosen.near if first else chosen.far})
        _turn(int(task.name), SECOND)


def _turn(task: int, priority: int) -> None:
    os.sched_setscheduler(task, os.SCHED_RR, os.sched_param(priority))


@contextmanager
def _flooding(bed: Testbed, caller: Pod, argv: list[str], *, fills: bool) -> Iterator[None]:
    command = process.command(seat(caller), machine.pinned(bed.cpus.near, argv))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=process.BASE_ENV) as flood:
        try:
            time.sleep(WARM_S)
            if flood.poll() is not None:
                assert flood.stderr is not None
                raise LabError(f"{argv[0]} ended at once: {flood.stderr.read().decode()[-300:]}")
            with bed.asleep() if fills else nullcontext():
                yield
        finally:
            flood.kill()


def _beside(bed: Testbed, caller: Pod, argv: list[str], *, fills: bool) -> tuple[float, float]:
    with _flooding(bed, caller, argv, fills=fills):
        return _quiet(bed)


def _quiet(bed: Testbed) -> tuple[float, float]:
    """The median and the 99th percentile, microseconds, of what the quiet caller waits."""
    with tempfile.NamedTemporaryFile(dir=bed.directory) as log:
        argv = ["h2load", "--h1", "-c", str(CONNECTIONS), "--rps", str(RATE / CONNECTIONS), "-D", str(SECONDS), "--log-file", log.name]
        bed.run(CALLER, bed.cpus.near, ["chrt", "--rr", str(FIRST), *argv, f"http://{QUIET_VIP}:{HTTP}/"])
        rows = [line.split("\t") for line in Path(log.name).read_text().splitlines()]
    if any(status != "200" for _, status, *_ in rows) or len(rows) < FEWEST:
        raise tools.ToolFailed(f"h2load: {len(rows)} requests, {sum(status != '200' for _, status, *_ in rows)} of them failed")
    times = sorted(int(took) for _, _, took, *_ in rows)
    return float(times[len(times) // 2]), float(times[int(0.99 * len(times))])


if __name__ == "__main__":
    sys.exit(run(measure))
