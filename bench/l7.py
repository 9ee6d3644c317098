"""`make bench-l7`: HTTP between two pods of one node through the waypoint, against one bare Envoy hop and against two sidecars with mTLS.

One nginx and one wrk command for all modes; the way between them differs:
- waypoint: the caller dials a Service with an HTTPRoute; the connect hook leads it to the node's Envoy, which counts its requests for the mesh's metrics;
- bare: a plain pod dials an Envoy in its own namespace that knows one route and one cluster: the floor for any mesh at layer 7;
- sidecars: the same with an Envoy at either end and mTLS between them.
All proxies of a mode share one CPU and have the same number of worker threads each; wrk and nginx share the other one, so that what saturates
first is the proxies, which is what is compared. Every mode's connections to nginx are kept open.

Closed loop (wrk): latencies are reported for one connection only: with 32, two busy workers of one Envoy take turns on its CPU by real-time slices (100 ms).
Open loop (h2load): fixed rates that none of the ways saturates; latencies are from the moment in which a request was due (`tools.parse_h2load`).
Features: services of other pods, each with its own nginx, whose routes have retries and timeouts (`retries`), whose requests are authorized by method and
caller as well (`rbac`), or by their tokens, too (`rs256`, `es256`); against the same with a route alone.
Route change: from the call of the controller's Apply, with a changed HTTPRoute, to the first answer that shows it, on a connection that asks all the time.

`python -m bench.l7 closed open features routes` chooses parts; each brings a lab of its own up.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import grpc

from agent.l7.envoy import find
from bench import envoys, machine, tools
from bench.main import run
from bench.result import Result, Target, pairs, rounds
from bench.scale import percentile
from bench.testbed import CALLER, NODE, ONE_NODE, PLAIN_CALLER, SERVER, VIP, Testbed, seat, service, testbed, to_yaml
from bench.tokens import Issuer
from lab import paths, process
from lab.errors import LabError
from lab.topology import Node, Pod, Topology
from meshapi import admin_pb2 as admin_pb
from meshapi import admin_pb2_grpc

HTTP, BARE, SIDECAR, SIDECAR_TLS = 8080, 18080, 18081, 18443
ROUNDS = 13
"""Many short rounds: the runs that are compared with each other lie close together."""
SECONDS = 1
CONNECTIONS = (1, 32)
OPEN_ROUNDS, OPEN_SECONDS, OPEN_CONNECTIONS = 7, 2, 32
EACH = (10, 40)
"""Requests a second on each connection of the open loop."""
FEATURE_ROUNDS = 11
CHANGES, WARM = 100, 5
CHANGE_MS = 100.0
READY_S = 15.0


_RETRIES = {
    "retry": {"codes": [503], "attempts": 3, "backoff": "10ms"},
    "timeouts": {"request": "5s", "backendRequest": "1s"},
}


def route(name: str, version: str = "0", *, retries: bool = False) -> dict[str, Any]:
    """The HTTPRoute of a service: with retries and timeouts, or with neither, and with a header on answers that tells versions other than "0" apart."""
    edit = {"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": [{"name": "x-version", "value": version}]}}
    rule = {
        "backendRefs": [{"name": name, "port": HTTP}],
        **(_RETRIES if retries else {}),
        **({"filters": [edit]} if version != "0" else {}),
    }
    spec = {"parentRefs": [{"group": "", "kind": "Service", "name": name, "port": HTTP}], "rules": [rule]}
    return {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": name}, "spec": spec}


RESOURCES = (service(("http", HTTP), protocol="http"), route("server"))
BASELINES = {"bare": ("one bare Envoy hop", 0.95), "sidecars": ("two Envoy sidecars with mTLS", 2.2)}
"""What each baseline is called in results, and how many of its requests a second ours must reach."""
HALF = {"sidecars": Target(0.5, at_least=False)}
"""Of CPU and of the median latency."""
PLAIN = "a route alone"
MOST = Target(1.15, at_least=False)
"""What retries, authorization and tokens may cost, all together."""


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
    headers: tuple[str, ...] = ()


def measure(progress: Callable[[str], None], parts: Sequence[str] = ()) -> list[Result]:
    """Measure these parts, or all."""
    known = {"closed": _closed, "open": _open, "features": _features, "routes": _routes}
    if unknown := set(parts) - known.keys():
        raise LabError(f"no part is called {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    return [result for name, part in known.items() if not parts or name in parts for result in part(progress)]


def _closed(progress: Callable[[str], None]) -> list[Result]:
    with testbed(RESOURCES, progress, ONE_NODE) as bed:
        bed.start_nginx(SERVER, bed.cpus.near, tools.nginx(HTTP), HTTP)
        workers, ways = _start_proxies(bed)
        modes = {f"{name}-{c}": partial(once, bed, way, c) for c in CONNECTIONS for name, way in ways.items()}
        before = _requests(bed)
        found = rounds(modes, ROUNDS, progress)
        measured = sum(one.http.requests for row in found for name, one in row.items() if name.startswith("waypoint"))
        if _requests(bed) - before < measured:
            raise LabError("the waypoint has not seen the requests that were measured: they took another way")
        setup = f"closed loop; wrk (1 thread) {_setup(bed, workers)}"
        return [result for connections in CONNECTIONS for name in BASELINES for result in _results(found, name, connections, setup)]


def _setup(bed: Testbed, workers: int) -> str:
    return (
        f"and nginx on CPU {bed.cpus.near}, all proxies on CPU {bed.cpus.far}, {workers} workers each; "
        "SCHED_RR, CPUs kept awake; 2-byte answers"
    )


def _open(progress: Callable[[str], None]) -> list[Result]:
    with testbed(RESOURCES, progress, ONE_NODE) as bed:
        bed.start_nginx(SERVER, bed.cpus.near, tools.nginx(HTTP), HTTP)
        workers, ways = _start_proxies(bed)
        modes = {f"{name}-{each}": partial(_scheduled, bed, way, each) for each in EACH for name, way in ways.items()}
        found = rounds(modes, OPEN_ROUNDS, progress)
        results = []
        for each in EACH:
            rate = each * OPEN_CONNECTIONS
            setup = f"open loop, {rate} requests/s on {OPEN_CONNECTIONS} connections, latency from when due; h2load (1 thread) {_setup(bed, workers)}"
            for baseline, (name, _) in BASELINES.items():
                values: tuple[tuple[str, str, Callable[[Load], float], Target | None], ...] = (
                    ("p50", "us", lambda one: one.http.p50_us, HALF.get(baseline)),
                    ("p99", "us", lambda one: one.http.p99_us, None),
                    ("cpu", "CPU us/request, whole machine", lambda one: one.cpu_us, HALF.get(baseline)),
                )
                results += [
                    Result(
                        f"l7-open-{what}-{rate}-against-{baseline}",
                        unit,
                        name,
                        pairs(found, f"waypoint-{each}", f"{baseline}-{each}", value),
                        setup,
                        target,
                    )
                    for what, unit, value, target in values
                ]
        return results


def _scheduled(bed: Testbed, way: Way, each: int) -> Load:
    log = bed.directory / "h2load.log"
    log.unlink(missing_ok=True)
    proxies, whole = machine.used_seconds(way.proxies), bed.busy_seconds()
    argv = tools.h2load(f"http://{way.target}/", OPEN_CONNECTIONS, each, OPEN_SECONDS, str(log))
    bed.run(way.caller, bed.cpus.near, argv)
    proxies, whole = machine.used_seconds(way.proxies) - proxies, bed.busy_seconds() - whole
    found = tools.parse_h2load(log.read_text(), OPEN_CONNECTIONS, each)
    return Load(found, whole / found.requests * 1e6, proxies / found.requests * 1e6)


def _features(progress: Callable[[str], None]) -> list[Result]:
    issuers = {name: Issuer(f"https://{name}.test", name.upper()) for name in ("rs256", "es256")}
    pods = {name: replace(SERVER, name=name, addresses=(f"10.77.1.{30 + i}",), labels={"app": name}) for i, name in enumerate(_FEATURES)}
    topology = Topology((Node(NODE, 1),), (CALLER, SERVER, *pods.values()))
    documents = [*RESOURCES, *(one for i, name in enumerate(_FEATURES) for one in _service(name, f"10.96.0.{30 + i}", issuers.get(name)))]
    with testbed(documents, progress, topology) as bed:
        for pod in (SERVER, *pods.values()):
            bed.start_nginx(pod, bed.cpus.near, tools.nginx(HTTP), HTTP)
        waypoint = bed.lab.status(NODE).get("waypoint", {}).get("pid")
        machine.pin(waypoint, bed.cpus.far)
        workers = bed.lab.envoy_stats(NODE).get("server.concurrency", 0)
        ways = {"plain": Way(CALLER, f"{VIP}:{HTTP}", (waypoint,))}
        for i, name in enumerate(_FEATURES):
            headers = (f"Authorization: Bearer {issuers[name].token('caller')}",) if name in issuers else ()
            ways[name] = Way(CALLER, f"10.96.0.{30 + i}:{HTTP}", (waypoint,), headers)
        modes = {f"{name}-{c}": partial(once, bed, way, c) for c in CONNECTIONS for name, way in ways.items()}
        found = rounds(modes, FEATURE_ROUNDS, progress)
        setup = f"closed loop; wrk (1 thread) {_setup(bed, workers)}; {PLAIN} against the same with retries, timeouts and authorization"
        return [
            Result(f"l7-{name}-{what}-c{c}", unit, PLAIN, pairs(found, f"{name}-{c}", f"plain-{c}", value), setup, MOST)
            for c in CONNECTIONS
            for name in _FEATURES
            for what, unit, value in (
                ("cpu", "CPU us/request, whole machine", lambda one: one.cpu_us),
                ("proxy-cpu", "CPU us/request, proxies", lambda one: one.proxy_us),
                ("time", "us/request", lambda one: 1e6 / one.http.per_second),
            )
        ]


_FEATURES = ("retries", "rbac", "rs256", "es256")
"""Each has what those before it have, but the tokens of one kind."""
_OWN = "meshagent.io/v1alpha1"


def _service(name: str, address: str, issuer: Issuer | None) -> list[dict[str, Any]]:
    """A service with one of the features; requests are decided by method, path and caller, and by a token if there is an issuer."""
    ports = [{"name": "http", "port": HTTP, "appProtocol": "http"}]
    spec: dict[str, Any] = {"clusterIPs": [address], "selector": {"app": name}, "ports": ports}
    found = [{"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}, route(name, retries=True)]
    if name == "retries":
        return found
    source: dict[str, Any] = {"serviceAccounts": ["default/caller"]}
    if issuer is not None:
        source["requestPrincipals"] = [f"{issuer.name}/*"]
    rule = {"from": [{"source": source}], "to": [{"operation": {"methods": ["GET", "HEAD"], "paths": ["/", "/api/*"]}}]}
    selector = {"matchLabels": {"app": name}}
    spec = {"selector": selector, "action": "ALLOW", "rules": [rule]}
    found.append({"apiVersion": _OWN, "kind": "AuthorizationPolicy", "metadata": {"name": name}, "spec": spec})
    if issuer is not None:
        spec = {"selector": selector, "jwtRules": [{"issuer": issuer.name, "jwks": issuer.jwks}]}
        found.append({"apiVersion": _OWN, "kind": "RequestAuthentication", "metadata": {"name": name}, "spec": spec})
    return found


_WATCH = """
import http.client, sys, time
connection = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=5)
last = ""
while True:
    connection.request("GET", "/")
    answer = connection.getresponse()
    answer.read()
    version = answer.getheader("x-version")
    if answer.status != 200:
        sys.exit("status %d" % answer.status)
    if version != last:
        last = version
        print(version, time.monotonic_ns(), flush=True)
"""


def _routes(progress: Callable[[str], None]) -> list[Result]:
    """How long a changed route takes to show on the wire."""
    with testbed(RESOURCES, progress, ONE_NODE) as bed, grpc.insecure_channel(f"unix:{paths.CONTROLLER_SOCKET}") as channel:
        bed.start_nginx(SERVER, bed.cpus.near, tools.nginx(HTTP), HTTP)
        controller = admin_pb2_grpc.AdminStub(channel)
        argv = process.command(seat(CALLER), [sys.executable, "-I", "-S", "-c", _WATCH, VIP, str(HTTP)])
        with subprocess.Popen(argv, env=process.BASE_ENV, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as watcher:
            try:
                assert watcher.stdout is not None
                progress(f"{CHANGES} changes of a route")
                watcher.stdout.readline()
                times = [_changed(controller, watcher.stdout.readline, f"v{number}") for number in range(1, CHANGES + WARM + 1)][WARM:]
            finally:
                watcher.kill()
        setup = (
            f"one node, a caller that asks one request after the other; {CHANGES} changes one after the other, each from the call of the controller's "
            f"Apply to the first answer that shows it; largest {max(times):.4g} ms"
        )
        return [
            Result("l7-route-change-p50", "ms", "target", ((statistics.median(times), CHANGE_MS),), setup, Target(1.0, at_least=False)),
            Result(
                "l7-route-change-p99", "ms", "target", ((percentile(sorted(times), 99), CHANGE_MS),), setup, Target(1.0, at_least=False)
            ),
        ]


def _changed(controller: admin_pb2_grpc.AdminStub, line: Callable[[], str], version: str) -> float:
    """Milliseconds until a route with another version answers."""
    document = admin_pb.Document(origin="bench", yaml=to_yaml([route("server", version)]))
    begun = time.monotonic_ns()
    results = controller.Apply(admin_pb.ApplyRequest(documents=[document]), timeout=READY_S).results
    if any(one.action not in {"created", "configured"} for one in results):
        raise LabError(f"the controller did not take the route: {results}")
    found, _, seen = line().partition(" ")
    if found != version:
        raise LabError(f"the wire shows version {found or 'none'} and not {version}: the watcher or the route has failed")
    return (int(seen) - begun) / 1e6


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


def once(bed: Testbed, way: Way, connections: int) -> Load:
    """A closed loop of one way."""
    proxies, whole = machine.used_seconds(way.proxies), bed.busy_seconds()
    found = tools.parse_wrk(bed.run(way.caller, bed.cpus.near, tools.wrk(f"http://{way.target}/", connections, SECONDS, way.headers)))
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
        result("cpu", "CPU us/request, whole machine", lambda one: one.cpu_us, HALF.get(baseline)),
        result("proxy-cpu", "CPU us/request, proxies", lambda one: one.proxy_us),
    ]
    if connections == 1:
        results += [result("p50", "us", lambda one: one.http.p50_us, HALF.get(baseline)), result("p99", "us", lambda one: one.http.p99_us)]
    return results


if __name__ == "__main__":
    sys.exit(run(partial(measure, parts=sys.argv[1:])))
