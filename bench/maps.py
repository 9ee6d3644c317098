"""`make bench-maps`: how long a large model takes from its bytes into the kernel's tables, and one change of it.

The whole state: an empty node gets everything in one response. `decode` is from the bytes to the snapshot that the discovery client hands on, `tables` from
there until `Tables.sync` has returned, `kernel` the part of it that is spent in the system calls that write. One change: an endpoint becomes unready; from
the bytes until `sync` has returned, the median of CHANGES in a row. All of it is the agent's own code in this process, with programs and maps that are
pinned but attached nowhere. What the agent does apart from that for a change is part of `make bench-agent`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agent.bpf import libbpf
from agent.bpf.datapath import DataPath
from agent.bpf.tables import Tables
from agent.config import Config
from agent.discovery import Discovery
from agent.errors import MeshError
from agent.ids import Ids
from agent.model import Snapshot
from bench.machine import cpus, pin
from bench.main import run
from bench.model import Model, changes
from bench.result import LEAST_ROUNDS, Result, Target, rounds
from lab import mounts, paths
from lab.errors import LabError
from meshapi import discovery_pb2 as pb

NODE = "node-1"
TRUST_DOMAIN = "mesh.local"
CHANGES = 10
KERNEL_MS = 200.0
CHANGE_MS = 5.0
WITHIN = Target(1.0, at_least=False)
WRITES = ("update", "update_batch", "delete")
"""The calls of `agent.bpf.libbpf` that change a map."""


@dataclass(frozen=True, slots=True)
class Times:
    """Of one round."""

    decode_s: float
    tables_s: float
    kernel_ms: float
    change_ms: float


class Receiver(Discovery):
    """A discovery client without a connection: what arrives is given to it. It brings snapshots into tables instead of a whole agent."""

    def __init__(self, config: Config, tables: Tables) -> None:
        super().__init__(config, self._sync)
        self._tables = tables
        self.decoded = 0.0
        """When, by time.perf_counter, the last response was decoded."""

    async def _sync(self, snapshot: Snapshot) -> None:
        self.decoded = time.perf_counter()
        await asyncio.to_thread(self._tables.sync, snapshot, (), frozenset())

    async def receive(self, encoded: bytes) -> None:
        """Bring an encoded DiscoveryResponse into force."""
        if refused := await self._take(pb.DiscoveryResponse.FromString(encoded), first=False):
            raise LabError(f"the model was refused: {refused}")


def measure(progress: Callable[[str], None]) -> list[Result]:
    """Load the programs and fill their maps again and again."""
    model = Model()
    progress(str(model.size))
    everything = response("all", list(model.resources()))
    ones = [response(f"change-{i}", [change]) for i, change in zip(range(CHANGES), changes(model), strict=False)]
    cpu = cpus().far
    pin(os.getpid(), cpu)
    with private_node() as config:
        datapath = DataPath(config)
        try:
            asyncio.run(datapath.load())
            turn = 0

            def once() -> Times:
                nonlocal turn
                turn += 1
                return asyncio.run(_round(config, datapath, everything, ones, turn))

            found = [one["once"] for one in rounds({"once": once}, LEAST_ROUNDS, progress)]
        except MeshError as error:
            raise LabError(str(error)) from error
        finally:
            for table in datapath.maps.values():
                table.close()
    setup = f"{model.size}; {len(everything)} bytes encoded; on CPU {cpu}, SCHED_RR; "
    whole = setup + "an empty node gets everything"
    targets = (
        ("maps-decode", "s", whole, "one second", 1.0, None, [t.decode_s for t in found]),
        ("maps-tables", "s", whole, "one second", 1.0, None, [t.tables_s for t in found]),
        ("maps-kernel", "ms", whole, "target", KERNEL_MS, WITHIN, [t.kernel_ms for t in found]),
        ("maps-change", "ms", f"{setup}median of {CHANGES} changes in a row", "target", CHANGE_MS, WITHIN, [t.change_ms for t in found]),
    )
    return [
        Result(name, unit, baseline, tuple((value, bound) for value in values), text, target)
        for name, unit, text, baseline, bound, target, values in targets
    ]


def response(version: str, resources: Sequence[pb.Resource]) -> bytes:
    """Encode these resources as the controller sends them."""
    return pb.DiscoveryResponse(nonce=version, version=version, resources=resources, changed_at_ns=time.time_ns()).SerializeToString()


async def _round(config: Config, datapath: DataPath, everything: bytes, ones: Sequence[bytes], turn: int) -> Times:
    for name in Tables.ORDER:
        datapath.maps[name].prune(set())
    receiver = Receiver(config, Tables(datapath.maps, Ids(config.run_dir / f"ids-{turn}"), TRUST_DOMAIN, config.node))
    with stopwatch() as spent:
        started = time.perf_counter()
        await receiver.receive(everything)
        decoded, done = receiver.decoded, time.perf_counter()
        kernel = sum(spent)
    taken = []
    for one in ones:
        begin = time.perf_counter()
        await receiver.receive(one)
        taken.append(time.perf_counter() - begin)
    return Times(decoded - started, done - decoded, kernel * 1e3, statistics.median(taken) * 1e3)


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """Collect the seconds that each call of WRITES takes."""
    spent: list[float] = []

    def timed(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: object) -> None:
            started = time.perf_counter()
            try:
                function(*args)
            finally:
                spent.append(time.perf_counter() - started)

        return call

    originals = {name: getattr(libbpf, name) for name in WRITES}
    try:
        for name, function in originals.items():
            setattr(libbpf, name, timed(function))
        yield spent
    finally:
        for name, function in originals.items():
            setattr(libbpf, name, function)


@contextmanager
def private_node() -> Iterator[Config]:
    """Directories of an agent that never runs; gone afterwards."""
    if os.geteuid() != 0:
        raise LabError("programs are loaded and pinned: run it as root (sudo)")
    mounted = mounts.mount_bpffs(paths.BPF)
    pins = Path(tempfile.mkdtemp(prefix="meshbench-", dir=paths.BPF))
    try:
        with tempfile.TemporaryDirectory(prefix="meshbench-") as directory:
            root = Path(directory)
            (root / "run").mkdir()
            (root / "state").mkdir()
            yield Config(node=NODE, controller="unix:none", pin_dir=pins, run_dir=root / "run", state_dir=root / "state")
    finally:
        shutil.rmtree(pins)
        if mounted:
            mounts.unmount_bpffs(paths.BPF)


if __name__ == "__main__":
    sys.exit(run(measure))
