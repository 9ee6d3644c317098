"""`make bench-scale`: what the waypoint's configuration costs a node with 250 workloads, 2,000 L7 services and 500 routes (`bench.l7_model`).

The agent's own parts without the kernel's: the builder, the xDS server and a real Envoy with a listener in each of 250 network namespaces, all in the
bench's process but Envoy. Measured are

- everything: building it (`scale-build`), and a fresh Envoy from its first question to the last acknowledgement (`scale-push`);
- one change, from its encoded bytes, as the controller sends them, until Envoy has acknowledged all that follows from it: the 50th and the 99th percentile
  of many changes one after the other, each of another resource (`scale-endpoint`, ...), and how many resources went out for it; the agent's CPU time for it,
  which says the same on a busy machine;
- memory: what the model, its configuration and the server add to the agent, and Envoy with it and without (VmRSS).

No load, no pinning, closed loop: the next change comes when the last one is acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import math
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent import memory
from agent.config import Config
from agent.l7.envoy import Envoy, stop
from agent.l7.snapshot import Builder
from agent.l7.xds import XdsServer
from agent.model import LocalWorkload
from bench.agent import resident_mb
from bench.l7_model import NODE, History, L7Model
from bench.machine import used_seconds
from bench.main import run
from bench.result import Result, Target
from lab import netns
from lab.errors import LabError
from meshapi import discovery_pb2 as pb

BUILDS, PUSHES = 5, 3
CHANGES, LOCAL_CHANGES = 200, 60
CHANGE_MS, CPU_MS = 100.0, 25.0
PUSH_S, BUILD_S = 15.0, 5.0
RSS_MB, ENVOY_RSS_MB = 150.0, 500.0
PATIENCE_S = 120.0
READY_S = 30.0
WITHIN = Target(1.0, at_least=False)
_PREFIX = "meshscale-"


@dataclass(frozen=True, slots=True)
class Change:
    """Resources that change, or go, together."""

    resources: Sequence[pb.Resource] = ()
    removed: Sequence[str] = ()


class Plant:
    """The parts of an agent that configure Envoy, and one Envoy."""

    def __init__(self, model: L7Model, server: XdsServer, envoy: Envoy, paths: dict[str, str]) -> None:
        self.history = History(model)
        self.server = server
        self.envoy = envoy
        self.builder = Builder(NODE, "mesh.local")
        self._paths = paths
        self._local: dict[str, LocalWorkload] = {}

    async def change(self, change: Change) -> float:
        """Bring a change into force; returns the seconds until Envoy has acknowledged everything."""
        started = time.monotonic()
        self.build(change)
        if not await self.server.wait_acked(PATIENCE_S):
            raise LabError(f"Envoy has not acknowledged everything within {PATIENCE_S:.0f} s: {self.server.state}")
        if self.server.state.rejected:
            raise LabError(f"Envoy refuses what is measured: {self.server.state.last_nack}")
        return time.monotonic() - started

    def build(self, change: Change) -> None:
        """Build the next configuration and hand it to the server."""
        snapshot = self.history.take(change.resources, change.removed)
        self.builder.needs_inbound(snapshot)
        self.server.set(self.builder.build(snapshot, self.local(), ""))

    def local(self) -> tuple[LocalWorkload, ...]:
        """The node's workloads; what did not change is the same object."""
        workloads, found = self.history.snapshot.workloads, {}
        for name, path in self._paths.items():
            if (workload := workloads.get(name)) is not None:
                known = self._local.get(name)
                found[name] = known if known is not None and known.workload is workload else LocalWorkload(workload, 1, path)
        self._local = found
        return tuple(found.values())


def measure(progress: Callable[[str], None]) -> list[Result]:
    """Measure everything."""
    model = L7Model()
    progress(f"{model.size}: network namespaces")
    with _namespaces(model) as paths, tempfile.TemporaryDirectory(prefix="meshscale-") as directory:
        return asyncio.run(_measure(model, paths, Path(directory), progress))


async def _measure(model: L7Model, paths: dict[str, str], directory: Path, progress: Callable[[str], None]) -> list[Result]:
    memory.one_heap()
    everything = Change([*model.resources()])
    bare: list[float] = []
    full: list[float] = []
    agent: list[float] = []
    pushes: list[float] = []
    results: list[Result] = []
    setup = f"{model.size}; one node, no load, no pinning"
    for number in range(PUSHES):
        progress(f"a fresh Envoy: {number + 1} of {PUSHES}")
        before = _rss("self")
        async with _plant(model, directory / str(number), paths) as plant:
            bare.append(_rss(plant.envoy.state.pid))
            plant.build(everything)
            started = time.monotonic()
            await plant.change(Change())
            pushes.append(time.monotonic() - started)
            full.append(_rss(plant.envoy.state.pid))
            agent.append(_rss("self") - before)
            if number == PUSHES - 1:
                results = await _changes(model, plant, setup, progress)
    progress("building everything")
    builds = [_build(plant) for _ in range(BUILDS)]
    agent = agent[:1]  # later ones find memory that the one before has left
    return [
        _against("scale-build", "s", builds, BUILD_S, f"{setup}; everything, without what was built before"),
        _against(
            "scale-push", "s", pushes, PUSH_S, f"{setup}; a fresh Envoy, from the configuration's being there to the last acknowledgement"
        ),
        _against("scale-agent-rss", "MB", agent, RSS_MB, f"{setup}; what model, builder and server add to the process; one run"),
        Result("scale-envoy-rss", "MB", "an Envoy with nothing", tuple(zip(full, bare, strict=True)), setup),
        *results,
    ]


async def _changes(model: L7Model, plant: Plant, setup: str, progress: Callable[[str], None]) -> list[Result]:
    await asyncio.to_thread(memory.settle)  # as the agent does after so much
    results = []
    for name, changes in _kinds(model).items():
        progress(name)
        before = sum(plant.server.state.sent.values())
        used, proxy = time.process_time(), used_seconds([plant.envoy.state.pid or 0])
        times = sorted([await plant.change(change) * 1e3 for change in changes])
        used, proxy = time.process_time() - used, used_seconds([plant.envoy.state.pid or 0]) - proxy
        sent = (sum(plant.server.state.sent.values()) - before) / len(times)
        text = (
            f"{setup}; {len(times)} changes one after the other, {sent:.3g} resources sent for each; from bytes to the last acknowledgement"
        )
        results.append(_against(f"scale-{name}-p50", "ms", [statistics.median(times)], CHANGE_MS, text))
        results.append(_against(f"scale-{name}-p99", "ms", [percentile(times, 99)], CHANGE_MS, f"{text}; largest {times[-1]:.4g} ms"))
        text = f"{setup}; mean of {len(times)} changes; Envoy's own: {proxy / len(times) * 1e3:.4g} ms"
        results.append(_against(f"scale-{name}-cpu", "ms", [used / len(times) * 1e3], CPU_MS, text))
    return results


def _kinds(model: L7Model) -> dict[str, list[Change]]:
    """What changes: each time another one, spread over services with routes, with TrafficPolicies and with neither."""
    services = [number * 7 % model.size.services for number in range(CHANGES)]
    local = [number % model.size.local for number in range(LOCAL_CHANGES)]
    gone = [f"workload/{model.namespace(n)}/service-{n}-00002" for n in services]
    away = [f"workload/{model.namespace(n)}/service-{n}-here" for n in local]
    return {
        "endpoint": [Change([model.endpoint(n, 1, ready=False)]) for n in services],
        "route": [Change([model.route(n % model.size.routes, weight=20 + n % 7)]) for n in services],
        "policy": [Change([model.policy(n % model.size.namespaces, method="POST")]) for n in range(LOCAL_CHANGES)],
        "traffic": [Change([model.traffic(n % 100 * 20, requests=77)]) for n in range(LOCAL_CHANGES)],
        "endpoint-removed": [Change(removed=[name]) for name in gone],
        "endpoint-added": [Change([model.endpoint(n, 2)]) for n in services],
        "local-removed": [Change(removed=[name]) for name in away],
        "local-added": [Change([model.local(n)]) for n in local],
    }


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent are not larger than (nearest rank); `ordered` are sorted and at least one."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _build(plant: Plant) -> float:
    builder, local = Builder(NODE, "mesh.local"), plant.local()
    started = time.monotonic()
    builder.needs_inbound(plant.history.snapshot)
    builder.build(plant.history.snapshot, local, "")
    return time.monotonic() - started


@contextlib.asynccontextmanager
async def _plant(model: L7Model, directory: Path, paths: dict[str, str]) -> AsyncIterator[Plant]:
    """A server with nothing, and an Envoy that has asked for it; ended at the end."""
    cgroup = directory / "cgroup"
    cgroup.mkdir(parents=True)
    config = Config(node=NODE, controller="unix:///nowhere", cgroup=cgroup, run_dir=directory)
    server, envoy = XdsServer(config.xds_socket), Envoy(config)
    await server.start()
    running = asyncio.create_task(envoy.run())
    try:
        plant = Plant(model, server, envoy, paths)
        deadline = time.monotonic() + READY_S
        while not (envoy.state.ready and server.state.connected):
            if running.done() or time.monotonic() > deadline:
                raise LabError("Envoy has not started: see its log")
            await asyncio.sleep(0.05)
        yield plant
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await server.stop()
        await asyncio.to_thread(stop, directory)


def _rss(pid: int | str | None) -> float:
    return resident_mb(Path(f"/proc/{pid}/status").read_text())


@contextlib.contextmanager
def _namespaces(model: L7Model) -> Iterator[dict[str, str]]:
    """A network namespace for each workload of the node, by the workload's name; loopback is up."""
    made: list[str] = []
    try:
        found = {}
        for number in range(model.size.local):
            name = f"{_PREFIX}{number}"
            netns.create(name)
            made.append(name)
            netns.inside(name, _loopback_up)
            found[f"{model.namespace(number)}/service-{number}-here"] = str(netns.path(name))
        yield found
    finally:
        for name in made:
            netns.delete(name)


def _loopback_up() -> None:
    """In this thread's namespace; SIOCSIFFLAGS is netdevice(7)'s."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1  # include/uapi/linux/sockios.h, if.h


def _against(name: str, unit: str, values: Iterable[float], bound: float, setup: str) -> Result:
    return Result(name, unit, "target", tuple((value, bound) for value in values), setup, WITHIN)


if __name__ == "__main__":
    sys.exit(run(measure))
