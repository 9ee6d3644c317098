"""`make bench-mtls`: TCP between pods of two nodes, encrypted by the nodes' waypoints (HBONE), against no mesh and against two sidecars with mTLS.

No proxy knows what is said; the load generators are those of `bench.l4` and the servers are the same for all ways between the two pods:
- ours: the caller dials a Service; the connect hook leads it to its node's Envoy, which sends it to the other node's through a tunnel that is
  kept. Every port of the server is STRICT, so that nothing can get there in plaintext;
- plain: pods that no program of the mesh touches, dialled by their address;
- sidecars: the same pods with an Envoy beside each, TLS 1.3 with certificates on both sides, one TLS connection for each of the caller's.
All proxies share one CPU and have the same number of worker threads each; client and server share the other one, so that what saturates first
is the proxies, which is what is compared.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from agent.l7.envoy import find
from bench import envoys, machine, tools
from bench.main import run
from bench.result import Result, Target, pairs, rounds
from bench.testbed import NODE, VIP, Testbed, service, testbed
from lab.errors import LabError
from lab.topology import Node, Pod, Topology

FAR = "node-2"
CALLER = Pod("caller", NODE, ("10.77.1.11",), service_account="caller", labels={"app": "caller"})
SERVER = Pod("server", FAR, ("10.77.2.21",), service_account="server", labels={"app": "server"})
PLAIN_CALLER = Pod("plain-caller", NODE, ("10.77.1.12",), mesh=False)
PLAIN_SERVER = Pod("plain-server", FAR, ("10.77.2.22",), mesh=False)
TOPOLOGY = Topology((Node(NODE, 1), Node(FAR, 2)), (CALLER, SERVER, PLAIN_CALLER, PLAIN_SERVER), identity=True)

PING, SMALL, KILOBYTE, BULK = 5001, 8080, 8081, 5201
"""Ports of sockperf, nginx with answers of 2 bytes and of 1 KiB, iperf3."""
PORTS = (PING, SMALL, KILOBYTE, BULK)
SIDECAR_TLS = 10000
"""What the accepting sidecar adds to a port."""
ROUNDS = 6
SECONDS = 1
FEW, MANY = 16, 64
"""Connections at a time. The more of them share a tunnel, the more of their messages share a TLS record and a system call."""
RATE = 500
"""Messages a second in the ping-pong: few enough that no way is ever late."""
READY_S = 30.0
BASELINES = {"plain": "no mesh, no encryption", "sidecars": "two Envoy sidecars with mTLS"}
RESOURCES = (
    service(("ping", PING), ("small", SMALL), ("kilobyte", KILOBYTE), ("bulk", BULK)),
    {
        "apiVersion": "meshagent.io/v1alpha1",
        "kind": "PeerAuthentication",
        "metadata": {"name": "strict"},
        "spec": {"mtls": {"mode": "STRICT"}},
    },
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
                    "to": [{"operation": {"ports": [str(port) for port in PORTS]}}],
                }
            ],
        },
    },
)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Way:
    """One of the ways from a caller to the servers."""

    name: str
    caller: Pod
    address: str
    proxies: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Load:
    """Requests or connections a second, and the CPU that each cost, microseconds: of the whole machine, and of the proxies alone."""

    per_second: float
    cpu_us: float
    proxy_us: float


def measure(progress: Callable[[str], None]) -> list[Result]:
    """Bring the lab up and measure everything."""
    with testbed(RESOURCES, progress, TOPOLOGY) as bed:
        workers, ways = start(bed)
        before = tunnelled(bed)
        setup = (
            f"two nodes of one machine; client and server on CPU {bed.cpus.near}, all proxies on CPU {bed.cpus.far}, {workers} workers each; "
            "SCHED_RR, CPUs kept awake"
        )
        results = [
            *_ping_pong(bed, ways, setup, progress),
            *_requests(bed, ways, setup, progress),
            *_connects(bed, ways, setup, progress),
            *_bulk(bed, ways, setup, progress),
        ]
        if tunnelled(bed) <= before:
            raise LabError("no connection came through a tunnel: what was measured was not HBONE")
        return results


def start(bed: Testbed) -> tuple[int, tuple[Way, ...]]:
    """Start servers and sidecars, pin all proxies to one CPU; return how many workers each proxy has, and the ways."""
    workers = bed.lab.envoy_stats(NODE).get("server.concurrency", 0)
    waypoints = tuple(bed.lab.status(node).get("waypoint", {}).get("pid", 0) for node in (NODE, FAR))
    if not workers or not all(waypoints):
        raise LabError("a waypoint does not say its pid and its number of workers")
    for pid in waypoints:
        machine.pin(pid, bed.cpus.far)
    for pod in (SERVER, PLAIN_SERVER):
        _start_servers(bed, pod)
    sidecars = _start_sidecars(bed, workers)
    ours = Way("ours", CALLER, VIP, waypoints)
    await_tunnel(bed)
    return workers, (ours, Way("plain", PLAIN_CALLER, PLAIN_SERVER.addresses[0]), Way("sidecars", PLAIN_CALLER, "127.0.0.1", sidecars))


def _start_servers(bed: Testbed, pod: Pod) -> None:
    address, cpu = pod.addresses[0], bed.cpus.near
    bed.start(f"ping-{pod.name}", pod, cpu, tools.sockperf_server(address, PING), PING)
    bed.start(f"bulk-{pod.name}", pod, cpu, ["iperf3", "--server", "--port", str(BULK)], BULK)
    for port, answer in ((SMALL, "ok"), (KILOBYTE, "k" * 1024)):
        file = bed.directory / f"nginx-{pod.name}-{port}.conf"
        file.write_text(tools.nginx(port, answer))
        bed.start(f"nginx-{pod.name}-{port}", pod, cpu, ["nginx", "-e", "stderr", "-c", str(file)], port)


def _start_sidecars(bed: Testbed, workers: int) -> tuple[int, ...]:
    envoys.write_certificates(bed.directory)
    address = PLAIN_SERVER.addresses[0]
    inbound, outbound = hops(address)
    opens, accepts = envoys.mutual_tls(bed.directory, "caller", "server"), envoys.mutual_tls(bed.directory, "server", "caller")

    def one(pod: Pod, configuration: str, port: int) -> int:
        file = bed.directory / f"sidecar-{pod.name}.json"
        file.write_text(configuration)
        return bed.start(f"envoy-{pod.name}", pod, bed.cpus.far, envoys.command(find(), file, workers), port).pid

    return (
        one(PLAIN_SERVER, envoys.tcp(inbound, accept_tls=accepts), inbound[-1][0][1]),
        one(PLAIN_CALLER, envoys.tcp(outbound, open_tls=opens), outbound[-1][0][1]),
    )


Hops = list[tuple[tuple[str, int], tuple[str, int]]]


def hops(server: str) -> tuple[Hops, Hops]:
    """Return what the sidecar beside the server and the one beside the caller forward: from where, to where."""
    inbound: Hops = [((server, port + SIDECAR_TLS), (server, port)) for port in PORTS]
    return inbound, [(("127.0.0.1", port), (server, port + SIDECAR_TLS)) for port in PORTS]


def await_tunnel(bed: Testbed) -> None:
    """Wait until the certificates are there: a request gets through."""
    deadline = time.monotonic() + READY_S
    while True:
        try:
            bed.run(CALLER, bed.cpus.near, ["curl", "-sS", "-m", "2", f"http://{VIP}:{SMALL}/"])
        except LabError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


def tunnelled(bed: Testbed) -> int:
    """Return how many connections have come through tunnels on the far node."""
    return bed.lab.envoy_stats(FAR).get("http.hbone.downstream_rq_total", 0)


def _ping_pong(bed: Testbed, ways: tuple[Way, ...], setup: str, progress: Callable[[str], None]) -> list[Result]:
    def once(way: Way) -> tools.PingPong:
        return tools.parse_sockperf(bed.run(way.caller, bed.cpus.near, tools.sockperf(way.address, PING, SECONDS, RATE)))

    found = _all(once, ways, "ping-pong", progress)
    where = f"closed loop, at most {RATE} messages/s; sockperf, {tools.MESSAGE_BYTES} bytes, one TCP connection; {setup}"
    return [
        *_results("rtt-p50", "us", found, lambda one: one.p50_us, where, Target(1.0, at_least=False)),
        *_results("rtt-p99", "us", found, lambda one: one.p99_us, where),
    ]


def _requests(bed: Testbed, ways: tuple[Way, ...], setup: str, progress: Callable[[str], None]) -> list[Result]:
    results = []
    for name, port, size, connections in (("small", SMALL, "150", FEW), ("small", SMALL, "150", MANY), ("1k", KILOBYTE, "1,200", MANY)):
        found = _all(partial(load, bed, port, connections), ways, f"{name} requests, {connections} connections", progress)
        where = f"closed loop; wrk (1 thread), {connections} connections that are kept, requests of some 60 bytes, answers of some {size}; {setup}"
        label = f"c{connections}-{name}"
        results += [
            *_results(f"{label}-requests", "requests/s", found, lambda one: one.per_second, where, Target(1.5, at_least=True)),
            *_results(f"{label}-cpu", "CPU us/request, whole machine", found, lambda one: one.cpu_us, where),
            _result(f"{label}-proxy-cpu", "CPU us/request, proxies", found, "sidecars", lambda one: one.proxy_us, where),
        ]
    return results


def _connects(bed: Testbed, ways: tuple[Way, ...], setup: str, progress: Callable[[str], None]) -> list[Result]:
    found = _all(partial(load, bed, SMALL, FEW, headers=("Connection: close",)), ways, "connections", progress)
    where = f"closed loop; wrk (1 thread), {FEW} at a time, Connection: close; {setup}"
    return [
        *_results("connections", "connections/s", found, lambda one: one.per_second, where),
        *_results("connection-cpu", "CPU us/connection, whole machine", found, lambda one: one.cpu_us, where),
    ]


def load(bed: Testbed, port: int, connections: int, way: Way, headers: tuple[str, ...] = ()) -> Load:
    """Run wrk once over one way."""
    proxies, whole = machine.used_seconds(way.proxies), bed.busy_seconds()
    found = tools.parse_wrk(bed.run(way.caller, bed.cpus.near, tools.wrk(f"http://{way.address}:{port}/", connections, SECONDS, headers)))
    proxies, whole = machine.used_seconds(way.proxies) - proxies, bed.busy_seconds() - whole
    return Load(found.per_second, whole / found.requests * 1e6, proxies / found.requests * 1e6)


def _bulk(bed: Testbed, ways: tuple[Way, ...], setup: str, progress: Callable[[str], None]) -> list[Result]:
    def once(way: Way) -> float:
        return tools.parse_iperf(bed.run(way.caller, bed.cpus.near, tools.iperf(way.address, BULK, SECONDS))) / 1e9

    found = _all(once, ways, "bulk", progress)
    return _results("bulk", "Gbit/s", found, float, f"iperf3, one TCP connection; {setup}", Target(1.0, at_least=True))


def _all(once: Callable[[Way], T], ways: tuple[Way, ...], what: str, progress: Callable[[str], None]) -> list[dict[str, T]]:
    return rounds({way.name: partial(once, way) for way in ways}, ROUNDS, lambda text: progress(f"{what}: {text}"))


def _results(
    what: str, unit: str, found: list[dict[str, T]], value: Callable[[T], float], setup: str, target: Target | None = None
) -> list[Result]:
    """Against both baselines; the target is about sidecars."""
    return [_result(what, unit, found, name, value, setup, target if name == "sidecars" else None) for name in BASELINES]


def _result(
    what: str, unit: str, found: list[dict[str, T]], baseline: str, value: Callable[[T], float], setup: str, target: Target | None = None
) -> Result:
    return Result(f"mtls-{what}-against-{baseline}", unit, BASELINES[baseline], pairs(found, "ours", baseline, value), setup, target)


if __name__ == "__main__":
    sys.exit(run(measure))
