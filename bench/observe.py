"""`make bench-observe`: what metrics, traces, logs and records of calls cost, and how long a scrape with 10,000 series of requests takes.

Metrics: two Envoys with one and the same listener of a workload, one of them without the access logs that count (`agent.l7.metrics`). wrk and nginx share a
CPU, both Envoys the other one, in turn. Scrape: a real Envoy that has counted requests of six workloads on 1,700 routes each; `agent.requests` reads it and
writes the page. Both are on loopback, without a mesh: the hooks in the kernel are the same with and without. The rest is in `bench.watched`.

`python -m bench.observe metrics requests connections` chooses parts.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from envoy.config.bootstrap.v3 import bootstrap_pb2
from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.listener.v3 import listener_pb2
from envoy.config.route.v3 import route_components_pb2
from google.protobuf import json_format

from agent.l7 import envoy, listeners, metrics, names
from agent.l7.clusters import Target as Endpoint
from agent.l7.clusters import socket_address, workload_cluster
from agent.requests import Requests
from bench import envoys, machine, tools, watched
from bench.main import run
from bench.result import LEAST_ROUNDS, Result, Target, pairs, rounds
from lab.errors import LabError

ON, OFF, SERVER = 18091, 18092, 18093
CALLER, CALLED = "default/caller", "default/server"
CONNECTIONS, SECONDS = 32, 2
OWNERS, ROUTES = 6, 1700
"""Together 10,200 label sets; each listener's stay below `metrics.MOST_HISTOGRAMS`."""
FLUSH_S = 6.0
"""Envoy merges its threads' histograms every five seconds."""
PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Load:
    """What wrk measured, and the CPU time that each request cost the Envoy, microseconds."""

    per_second: float
    cpu_us: float


def measure(progress: Callable[[str], None], parts: Sequence[str] = ()) -> list[Result]:
    """Measure these parts, or all."""
    known = {"metrics": _alone, "requests": watched.requests, "connections": watched.connections}
    if unknown := set(parts) - known.keys():
        raise LabError(f"no part is called {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    return [result for name, part in known.items() if not parts or name in parts for result in part(progress)]


def _alone(progress: Callable[[str], None]) -> list[Result]:
    """What needs no mesh."""
    chosen = machine.cpus()
    with tempfile.TemporaryDirectory(prefix="bench-observe-") as name, machine.awake(chosen):
        directory = Path(name)
        return [*_cost(directory, chosen, progress), *_scrape(directory, chosen, progress)]


def _cost(directory: Path, chosen: machine.Cpus, progress: Callable[[str], None]) -> list[Result]:
    with contextlib.ExitStack() as stack:
        server = directory / "nginx.conf"
        text = tools.nginx(SERVER).replace(f"listen {SERVER}", f"listen 127.0.0.1:{SERVER}")
        server.write_text(text.replace("pid /dev/null", f"pid {directory}/nginx.pid"))  # nginx removes its pid file when it ends
        stack.enter_context(_running(machine.pinned(chosen.near, ["nginx", "-p", str(directory), "-c", str(server)]), SERVER))
        ways = {}
        for way, port in (("on", ON), ("off", OFF)):
            file = directory / f"{way}.pb"
            file.write_bytes(_one_hop(directory / f"{way}.sock", port, counted=way == "on").SerializeToString())
            ways[way] = (port, stack.enter_context(_envoy(file, port, chosen.far)))
        found = rounds({way: partial(_once, chosen.near, *where) for way, where in ways.items()}, LEAST_ROUNDS, progress)
        counted = Requests(directory / "on.sock", dict)
        if not any(line.startswith("mesh_requests_total{") for piece in counted.text() for line in piece.splitlines()):
            raise LabError("the Envoy that should count requests has counted none")
    setup = f"closed loop; wrk and nginx on CPU {chosen.near}, Envoy with one worker on CPU {chosen.far}; {CONNECTIONS} connections; 2-byte answers"
    return [
        Result(
            "observe-requests",
            "requests/s",
            "without metrics of requests",
            pairs(found, "on", "off", lambda one: one.per_second),
            setup,
            Target(0.95, at_least=True),
        ),
        Result(
            "observe-cpu", "CPU us/request, Envoy", "without metrics of requests", pairs(found, "on", "off", lambda one: one.cpu_us), setup
        ),
    ]


def _once(cpu: int, port: int, pid: int) -> Load:
    before = machine.used_seconds((pid,))
    argv = machine.pinned(cpu, tools.wrk(f"http://127.0.0.1:{port}/", CONNECTIONS, SECONDS))
    found = tools.parse_wrk(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    return Load(found.per_second, (machine.used_seconds((pid,)) - before) / found.requests * 1e6)


def _scrape(directory: Path, chosen: machine.Cpus, progress: Callable[[str], None]) -> list[Result]:
    file, admin = directory / "many.pb", directory / "many.sock"
    ports = [ON + i for i in range(OWNERS)]
    file.write_bytes(_many_routes(admin, ports).SerializeToString())
    machine.pin(os.getpid(), chosen.near)
    with _envoy(file, ports[-1], chosen.far):
        before = _memory(admin)
        progress(f"{OWNERS * ROUTES} label sets")
        for port in ports:
            _use(port)
        time.sleep(FLUSH_S)
        requests = Requests(admin, dict, OWNERS * ROUTES)
        size = lines = 0
        for piece in requests.text():
            size, lines = size + len(piece), lines + piece.count("\n")
        wire = sum(
            map(len, envoy.stream_admin(admin, f"/stats/prometheus?usedonly&filter=%5E{metrics.PREFIX}%5C.", PATIENCE_S, PATIENCE_S))
        )
        memory = (_memory(admin) - before) / (OWNERS * ROUTES)
        found = rounds({"scrape": lambda: _took(requests)}, LEAST_ROUNDS, progress)
    setup = f"{OWNERS * ROUTES} label sets of each metric: {lines} lines, {size} bytes; Envoy writes {wire} bytes and keeps {memory:.0f} bytes for each"
    return [Result("observe-scrape", "s", "target", tuple((one["scrape"], 1.0) for one in found), setup, Target(1.0, at_least=False))]


def _took(requests: Requests) -> float:
    started = time.perf_counter()
    text = "".join(requests.text())
    took = time.perf_counter() - started
    if "mesh_waypoint_stats_up 1\n" not in text:
        raise LabError("Envoy did not say in time what it has counted")
    return took


def _memory(admin: Path) -> int:
    text = envoy.ask_admin(admin, "/stats?filter=%5Eserver.memory_allocated$").decode()
    return int(text.rpartition(": ")[2])


def _use(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    for i in range(ROUTES):
        connection.request("GET", f"/{i}/")
        connection.getresponse().read()
    connection.close()


def _one_hop(admin: Path, port: int, *, counted: bool) -> bootstrap_pb2.Bootstrap:
    result = _bootstrap(admin)
    cluster = workload_cluster(CALLED, SERVER, "http", Endpoint("127.0.0.1", SERVER, workload=CALLED))
    cluster.ClearField("upstream_bind_config")  # there are no namespaces here
    result.static_resources.clusters.append(cluster)
    route = route_components_pb2.Route(name="default/route rule 0", match=route_components_pb2.RouteMatch(prefix="/"))
    route.route.cluster = cluster.name
    result.static_resources.listeners.append(_listener(CALLER, port, [route], counted=counted))
    return result


def _many_routes(admin: Path, ports: list[int]) -> bootstrap_pb2.Bootstrap:
    result = _bootstrap(admin)
    for i, port in enumerate(ports):
        routes = []
        for r in range(ROUTES):
            route = route_components_pb2.Route(name=f"payments/checkout-{r} rule 0", match=route_components_pb2.RouteMatch(prefix=f"/{r}/"))
            route.direct_response.status = 200
            routes.append(route)
        result.static_resources.listeners.append(_listener(f"payments/checkout-5d9f7b6c4d-{i:05d}", port, routes, counted=True))
    return result


def _bootstrap(admin: Path) -> bootstrap_pb2.Bootstrap:
    result = bootstrap_pb2.Bootstrap()
    json_format.ParseDict(metrics.bootstrap(), result)
    result.node.id = result.node.cluster = "bench"
    result.admin.address.pipe.path = str(admin)
    agent = cluster_pb2.Cluster(name=names.XDS_CLUSTER)
    agent.load_assignment.cluster_name = names.XDS_CLUSTER
    result.static_resources.clusters.append(agent)
    return result


def _listener(workload: str, port: int, routes: list[route_components_pb2.Route], *, counted: bool) -> listener_pb2.Listener:
    name = names.listener(names.OUTBOUND, workload)
    manager = listeners.manager(workload, name, names.OUTBOUND)
    # What is bounded by a bucket asks the agent for it (agent.l7.call_log), and there is none here.
    kept = [log for log in manager.access_log if not log.filter.HasField("and_filter")]
    if not counted:
        kept = [log for log in kept if log.name != "envoy.access_loggers.stats"]
    del manager.access_log[:]
    manager.access_log.extend(kept)
    manager.route_config.virtual_hosts.add(name="*", domains=["*"], routes=routes)
    result = listener_pb2.Listener(name=name)
    result.address.CopyFrom(socket_address("127.0.0.1", port))
    result.filter_chains.add(filters=[listeners.http(manager)])
    return result


@contextlib.contextmanager
def _envoy(configuration: Path, port: int, cpu: int) -> Iterator[int]:
    with _running(machine.pinned(cpu, envoys.command(envoy.find(), configuration, 1)), port) as pid:
        yield pid


@contextlib.contextmanager
def _running(argv: list[str], port: int) -> Iterator[int]:
    """A program that listens on a port of loopback; its pid."""
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + PATIENCE_S
            while True:
                with contextlib.suppress(OSError):
                    http.client.HTTPConnection("127.0.0.1", port, timeout=1).connect()
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise LabError(f"{argv[0]} does not listen on port {port}")
                time.sleep(0.05)
            yield process.pid
        finally:
            process.terminate()


if __name__ == "__main__":
    sys.exit(run(partial(measure, parts=sys.argv[1:])))
