"""`python -m bench.scrape`: how long /metrics takes to write for 10,000 pairs of workloads, from the kernel's table to the last byte of the page.

Each pair has counted something in every slot of both histograms on every CPU: the longest page that many pairs can have. `scrape-gzip` is the same packed,
as Prometheus asks for it. The sending is not measured.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterator

from agent import telemetry
from agent.bpf import libbpf
from agent.bpf.datapath import DataPath
from agent.bpf.manifest import BUCKETS, Close
from agent.enrolment import Enrolled
from agent.errors import MeshError
from agent.ids import Ids
from agent.telemetry import FlowMetrics
from bench.machine import cpus, pin
from bench.main import run
from bench.maps import private_node
from bench.result import LEAST_ROUNDS, Result, Target, rounds
from lab.errors import LabError

PAIRS = 10_000
PLAIN_S = 0.25
PATIENCE_S = 10.0


def measure(progress: Callable[[str], None]) -> list[Result]:
    """Fill mesh_stats, and read the page again and again."""
    cpu = cpus().far
    pin(os.getpid(), cpu)
    with private_node() as config:
        datapath = DataPath(config)
        try:
            asyncio.run(datapath.load())
            ids = Ids(config.run_dir / "ids")
            fill(datapath, ids)
            page = FlowMetrics(datapath, ids, Enrolled)

            def encoded() -> Iterator[bytes]:
                return map(str.encode, page.text())

            size, lines = (sum(found) for found in zip(*((len(piece), piece.count(b"\n")) for piece in encoded()), strict=True))
            ways = {"scrape": lambda: took(encoded), "scrape-gzip": lambda: took(lambda: telemetry._compressed(encoded()))}  # noqa: SLF001
            found = rounds(ways, LEAST_ROUNDS, progress)
        except MeshError as error:
            raise LabError(str(error)) from error
        finally:
            for table in datapath.maps.values():
                table.close()
    setup = f"{PAIRS} pairs, {lines} lines, {size} bytes, {libbpf.possible_cpus()} CPUs; on CPU {cpu}, SCHED_RR"
    target = Target(1.0, at_least=False)
    return [
        Result("scrape", "s", "target", tuple((one["scrape"], PLAIN_S) for one in found), setup, target),
        Result("scrape-gzip", "s", "one second", tuple((one["scrape-gzip"], 1.0) for one in found), setup),
    ]


def took(page: Callable[[], Iterator[bytes]]) -> float:
    """Seconds until a page is written."""
    started = time.perf_counter()
    for _ in page():
        pass
    return time.perf_counter() - started


def fill(datapath: DataPath, ids: Ids) -> None:
    """Write the pairs into mesh_stats."""
    table = datapath.maps["mesh_stats"]
    workloads = [ids.number("workload", f"default/checkout-5d9f7b6c4d-{i:05d}") for i in range(200)]
    services = [ids.number("service", f"default/payments-{i}:8080") for i in range(50)]
    closed = (0,) * Close.MAX
    for i in range(PAIRS):
        slots = tuple((i + slot) % 997 + 1 for slot in range(BUCKETS))
        total = sum(slots)
        key = table.layout.key.pack(source=workloads[i % 200], target=workloads[i // 200], service=services[i % 50], port=8080, protocol=6)
        value = table.layout.value.pack(
            opened=total, closed=(total, *closed[1:]), sent_bytes=i << 20, received_bytes=i << 30, retransmits=i, connect_ns=total << 20,
            rtt_ns=total << 18, connect_bucket=slots, rtt_bucket=slots,
        )  # fmt: skip
        put(table.put, key, value)


def put(write: Callable[[bytes, bytes], None], key: bytes, value: bytes) -> None:
    """Write an element. The kernel sets memory for per-CPU elements aside in the background (kernel/bpf/memalloc.c) and refuses what comes too quickly."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            write(key, value)
        except MeshError:
            if time.monotonic() > end:
                raise
            time.sleep(0.001)
        else:
            return


if __name__ == "__main__":
    sys.exit(run(measure))
