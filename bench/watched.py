"""Parts of `make bench-observe` that need a whole mesh: what calls cost while somebody looks on.

The same load, wrk or connections that close at once, with nobody looking and with
- a trace of other workloads, which must not be felt: `trace-other`;
- a trace of these two, of every request or connection, and one that keeps failures only: `trace`, `trace-errors`;
- logs of requests, where none failed (`logs-errors`), or of all (`logs`); logs of connections at layer 4;
- the record of calls that `policy try` asks (`record`): the agent is started anew for each run, with it or without.

The agent, and the command that watches, run where the kernel puts them: on these machines that is beside the proxies and the load, so what they cost is in
the time and in the CPU of the whole machine; the proxies' own is apart.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from bench import l4, l7, machine, tools
from bench.result import Result, Target, pairs, rounds
from bench.testbed import CALLER, NODE, ONE_NODE, SERVER, VIP, Testbed, testbed, to_yaml
from lab import mesh, paths
from lab.errors import LabError

ROUNDS = 7
CONNECTIONS = 32
ATTACHED_S = 0.5
"""From the plan, which is the first that a trace shows, until kernel and Envoy tell it of calls."""
FLUSH_S = 1.5
"""Envoy tells of requests once a second."""
IN_FORCE_S = 0.5
QUIET = "nobody looks on"
MOST_UNMATCHED = Target(1.01, at_least=False)
TRACES = {"trace-other": ("server", "caller"), "trace": ("caller", "server"), "trace-errors": ("caller", "server", "--errors-only")}
SEEN = {"trace-other": False, "trace": True, "trace-errors": None}
"""Must they show calls? None: wrk may leave some unanswered when it ends."""
LOGS = {"logs-errors": {"enabled": True, "sampling": 0}, "logs": {"enabled": True}}
T = TypeVar("T")
Looking = Callable[[], contextlib.AbstractContextManager[None]]


def requests(progress: Callable[[str], None]) -> list[Result]:
    """Requests through the waypoint, and who looks on."""
    with testbed(l7.RESOURCES, progress, ONE_NODE) as bed:
        bed.start_nginx(SERVER, bed.cpus.near, tools.nginx(l7.HTTP), l7.HTTP)
        waypoint = bed.lab.status(NODE)["waypoint"]["pid"]
        machine.pin(waypoint, bed.cpus.far)
        way = l7.Way(CALLER, f"{VIP}:{l7.HTTP}", (waypoint,))
        once = partial(l7.once, bed, way, CONNECTIONS)
        looking: dict[str, Looking] = {
            "quiet": contextlib.nullcontext,
            **{name: partial(_tracing, bed, args, seen=SEEN[name]) for name, args in TRACES.items()},
            **{name: partial(_telling, bed, {"accessLogs": spec}) for name, spec in LOGS.items()},
        }
        found = rounds({name: partial(_under, context, once) for name, context in looking.items()}, ROUNDS, progress)
        setup = f"closed loop; wrk (1 thread, {CONNECTIONS} connections) and nginx on CPU {bed.cpus.near}, Envoy on CPU {bed.cpus.far}; 2-byte answers"
        results = [result for name in looking if name != "quiet" for result in _costs(found, name, "quiet", QUIET, setup)]
        ways = {
            "record": partial(_anew, bed, once, ()),
            "without": partial(_anew, bed, once, ("--no-record-flows",)),
        }
        found = rounds(ways, ROUNDS, progress)
        return [*results, *_costs(found, "record", "without", "no record of calls", setup)]


def connections(progress: Callable[[str], None]) -> list[Result]:
    """Connections at layer 4, one request each, and who looks on."""
    with testbed(l4.RESOURCES, progress, ONE_NODE) as bed:
        bed.start_nginx(SERVER, bed.cpus.far, tools.nginx(l4.HTTP), l4.HTTP)
        once = partial(l4.connect, bed, l4.OURS)
        looking: dict[str, Looking] = {
            "quiet": contextlib.nullcontext,
            "trace-other": partial(_tracing, bed, TRACES["trace-other"], seen=False),
            "trace": partial(_tracing, bed, ("caller", f"server:{l4.HTTP}"), seen=True),
            "logs": partial(_telling, bed, {"connectionLogs": {"enabled": True}}),
        }
        found = rounds({name: partial(_under, context, once) for name, context in looking.items()}, ROUNDS, progress)
    setup = f"closed loop; wrk, {l4.CONNECTIONS} at a time, Connection: close"
    return [
        Result(
            f"observe-l4-{name}-time",
            "us/connection",
            QUIET,
            pairs(found, name, "quiet", lambda one: 1e6 / one.per_second),
            setup,
            MOST_UNMATCHED if name == "trace-other" else None,
        )
        for name in looking
        if name != "quiet"
    ]


def _costs(found: Sequence[dict[str, l7.Load]], name: str, baseline: str, called: str, setup: str) -> Iterator[Result]:
    values: tuple[tuple[str, str, Callable[[l7.Load], float]], ...] = (
        ("time", "us/request", lambda one: 1e6 / one.http.per_second),
        ("proxy-cpu", "CPU us/request, Envoy", lambda one: one.proxy_us),
        ("cpu", "CPU us/request, whole machine", lambda one: one.cpu_us),
    )
    for what, unit, value in values:
        target = MOST_UNMATCHED if (name, what) == ("trace-other", "time") else None
        yield Result(f"observe-{name}-{what}", unit, called, pairs(found, name, baseline, value), setup, target)


def _under(context: Looking, once: Callable[[], T]) -> T:
    with context():
        return once()


@contextlib.contextmanager
def _tracing(bed: Testbed, args: Sequence[str], *, seen: bool | None) -> Iterator[None]:
    """A trace runs within the block. `seen`: it must show calls; LabError if it shows none, or some that it should not."""
    file = bed.directory / "trace.jsonl"
    argv = mesh.agent_command(NODE, "trace", *args, "-o", "json", "--duration", "60")
    with file.open("w") as out, subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT) as watcher:
        try:
            end = time.monotonic() + l7.READY_S
            while not file.stat().st_size:
                if watcher.poll() is not None or time.monotonic() > end:
                    raise LabError(f"meshagent trace {' '.join(args)} shows no plan")
                time.sleep(0.01)
            time.sleep(ATTACHED_S)
            yield
            time.sleep(FLUSH_S if seen else 0.0)
        finally:
            watcher.send_signal(signal.SIGINT)
            watcher.wait(l7.READY_S)
    calls = sum(json.loads(line)["kind"] in {"connection", "request"} for line in file.read_text().splitlines())
    if seen is not None and bool(calls) is not seen:
        raise LabError(f"meshagent trace {' '.join(args)} has shown {calls} calls: what was measured is something else")


@contextlib.contextmanager
def _telling(bed: Testbed, spec: dict[str, Any]) -> Iterator[None]:
    """A Telemetry of the pods' namespace is in force within the block."""
    file = bed.directory / "telemetry.yaml"
    file.write_text(to_yaml([{"apiVersion": "meshagent.io/v1alpha1", "kind": "Telemetry", "metadata": {"name": "all"}, "spec": spec}]))
    bed.lab.apply(file)
    try:
        bed.lab.settle()
        time.sleep(IN_FORCE_S)
        yield
    finally:
        bed.lab.meshagent("delete", "--controller", f"unix://{paths.CONTROLLER_SOCKET}", "-f", str(file), check=True)
        bed.lab.settle()


def _anew(bed: Testbed, once: Callable[[], l7.Load], options: Sequence[str]) -> l7.Load:
    """With an agent that was started with these options."""
    bed.lab.kill_agent(NODE)
    bed.lab.start_agent(NODE, options)
    time.sleep(IN_FORCE_S)
    return once()
