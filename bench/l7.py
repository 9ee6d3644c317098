"""`make bench-l7`: HTTP between two pods of one node through the waypoint, against one bare Envoy hop and against two sidecars with mTLS.

One nginx and one wrk command for all modes; the way between them differs:
- waypoint: the caller dials a Service with an HTTPRoute (retries and timeouts); the connect hook leads it to the node's Envoy;
- bare: a plain pod dials an Envoy in its own namespace that knows one route and one cluster: the floor for any mesh at layer 7;
- sidecars: the same with an Envoy at either end and mTLS between them.
All proxies of a mode share one CPU and have the same number of worker threads each; wrk and nginx share the other one, so that what saturates
first is the proxies, which is what is compared. Every mode's connections to nginx are kept open.

Latencies are reported for one connection only: with 32, two busy workers of one Envoy take turns on its CPU by real-time slices (100 ms).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from agent.l7.envoy import find
from bench import envoys, machine, tools
from bench.main import run
from bench.result import Result, Target, pairs, rounds
from bench.testbed import CALLER, NODE, PLAIN_CALLER, SERVER, VIP, Testbed, service, testbed
from lab.errors import LabError
from lab.topology import Pod

HTTP, BARE, SIDECAR, SIDECAR_TLS = 8080, 18080, 18081, 18443
ROUNDS = 13
"""Many short rounds: the runs that are compared with each other lie close together."""
SECONDS = 1
CONNECTIONS = (1, 32)
RESOURCES = (
    service(("http", HTTP), protocol="http"),
    {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "server"},
        "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": "server", "port": HTTP}],
            "rules": [
                {
                    "backendRefs": [{"name": "server", "port": HTTP}],
                    "retry": {"codes": [503], "attempts": 3, "backoff": "10ms"},
                    "timeouts": {"request": "5s", "backendRequest": "1s"},
                }
            ],
        },
    },
)
BASELINES = {"bare": ("one bare Envoy hop", 0.9), "sidecars": ("two Envoy sidecars with mTLS", 1.8)}
"""What each baseline is called in results, and how many of its requests a second ours must reach."""


@dataclass(frozen=True, slots=True)
class Load:
    """What wrk measured, and the CPU that each request cost, microseconds: of the whole machine, and of the proxies alone."""

    http: tools.Http
    cpu_us: float
    proxy_us: float


@dataclass(frozen=True, slots=True)
class Way:
    """One of the ways from a caller to nginx, and the proxies on it."""

    caller: Pod
    target: str
    proxies: tuple[int, ...]


def measure(progress: Callable[[str], None]) -> list[Result]:
    """Bring the lab up and measure everything."""
    with testbed(RESOURCES, progress) as bed:
        bed.start_nginx(SERVER, bed.cpus.near, tools.nginx(HTTP), HTTP)
        workers, ways = _start_proxies(bed)
        modes = {f"{name}-{c}": partial(_once, bed, way, c) for c in CONNECTIONS for name, way in ways.items()}
        before = _requests(bed)
        found = rounds(modes, ROUNDS, progress)
        measured = sum(one.http.requests for row in found for name, one in row.items() if name.startswith("waypoint"))
        if _requests(bed) - before < measured:
            raise LabError("the waypoint has not seen the requests that were measured: they took another way")
        setup = (
            f"closed loop; wrk (1 thread) and nginx on CPU {bed.cpus.near}, all proxies on CPU {bed.cpus.far}, "
            f"{workers} workers each; SCHED_RR, CPUs kept awake; 2-byte answers"
        )
        return [result for connections in CONNECTIONS for name in BASELINES for result in _results(found, name, connections, setup)]


def _start_proxies(bed: Testbed) -> tuple[int, dict[str, Way]]:
    """Start what the waypoint is compared with, pin all proxies to one CPU; return how many workers each has, and the ways."""
    workers = bed.lab.envoy_stats(NODE).get("server.concurrency", 0)
    waypoint = bed.lab.status(NODE).get("waypoint", {}).get("pid")
    if not workers or not waypoint:
        raise LabError(f"the waypoint of {NODE} does not say its pid and its number of workers")
    machine.pin(waypoint, bed.cpus.far)
    envoys.write_certificates(bed.directory)
    server = SERVER.addresses[0]
    opens = envoys.mutual_tls(bed.directory, "caller", "server")
    accepts = envoys.mutual_tls(bed.directory, "server", "caller")

    def start(name: str, pod: Pod, configuration: str, port: int) -> int:
        file = bed.directory / f"{name}.json"
        file.write_text(configuration)
        return bed.start(f"envoy-{name}", pod, bed.cpus.far, envoys.command(find(), file, workers), port).pid

    sidecars = (
        start("server", SERVER, envoys.hop((server, SIDECAR_TLS), ("127.0.0.1", HTTP), accept_tls=accepts), SIDECAR_TLS),
        start("caller", PLAIN_CALLER, envoys.hop(("127.0.0.1", SIDECAR), (server, SIDECAR_TLS), open_tls=opens), SIDECAR),
    )
    bare = start("bare", PLAIN_CALLER, envoys.hop(("127.0.0.1", BARE), (server, HTTP)), BARE)
    return workers, {
        "waypoint": Way(CALLER, f"{VIP}:{HTTP}", (waypoint,)),
        "bare": Way(PLAIN_CALLER, f"127.0.0.1:{BARE}", (bare,)),
        "sidecars": Way(PLAIN_CALLER, f"127.0.0.1:{SIDECAR}", sidecars),
    }


def _once(bed: Testbed, way: Way, connections: int) -> Load:
    proxies, whole = machine.used_seconds(way.proxies), bed.busy_seconds()
    found = tools.parse_wrk(bed.run(way.caller, bed.cpus.near, tools.wrk(f"http://{way.target}/", connections, SECONDS)))
    proxies, whole = machine.used_seconds(way.proxies) - proxies, bed.busy_seconds() - whole
    return Load(found, whole / found.requests * 1e6, proxies / found.requests * 1e6)


def _requests(bed: Testbed) -> int:
    return bed.lab.envoy_stats(NODE).get("http.outbound.downstream_rq_total", 0)


def _results(found: list[dict[str, Load]], baseline: str, connections: int, setup: str) -> list[Result]:
    name, bound = BASELINES[baseline]
    ours, theirs = f"waypoint-{connections}", f"{baseline}-{connections}"

    def result(what: str, unit: str, value: Callable[[Load], float], target: Target | None = None) -> Result:
        return Result(f"l7-{what}-c{connections}-against-{baseline}", unit, name, pairs(found, ours, theirs, value), setup, target)

    results = [
        result("requests", "requests/s", lambda one: one.http.per_second, Target(bound, at_least=True)),
        result("cpu", "CPU us/request, whole machine", lambda one: one.cpu_us),
        result("proxy-cpu", "CPU us/request, proxies", lambda one: one.proxy_us),
    ]
    if connections == 1:
        results += [result("p50", "us", lambda one: one.http.p50_us), result("p99", "us", lambda one: one.http.p99_us)]
    return results


if __name__ == "__main__":
    sys.exit(run(measure))
