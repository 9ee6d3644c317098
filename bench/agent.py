"""`make bench-agent`: how long an agent takes from its start until it is ready, and what it costs: memory, CPU when nothing happens, scrapes.

The shop. Cold: nothing of it is on the node (`meshagent uninstall` came before), so the loader compiles and loads the programs and Envoy is started.
Warm: it was killed, as in a crash or an upgrade; programs, maps, links and Envoy are there and are taken over. Time runs from the start of
the process, the interpreter's included, until /readyz answers 200. Memory is the resident set (VmRSS) of the agent's process once the shop
has settled; what it shares with other processes is counted in full. The loader is a child and has ended by then.

The large model (`bench.model`), served by `bench.controller`: memory again, before and after the agent was scraped; CPU of the agent's cgroup while
nothing changes; a change of one endpoint from its sending until the agent's acknowledgement is back; and a scrape of /metrics with 10,000 pairs of
workloads that the kernel counts, compressed as Prometheus asks for it, and plain.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.bpf.manifest import BUCKETS, Close, Direction, Manifest
from agent.bpf.maps import Map
from agent.errors import KernelRefused
from agent.ids import Ids
from bench.controller import Controller
from bench.main import run
from bench.model import PORT, Model, changes, resource
from bench.result import LEAST_ROUNDS, Result, Target
from bench.testbed import CALLER, SERVER
from lab import mesh, mounts, netns, paths, process, topology
from lab.cli import SHOP
from lab.errors import LabError
from lab.lab import Lab
from lab.process import Process, Seat
from lab.topology import Node, Pod, Topology
from meshapi import discovery_pb2 as pb

NODE = "node-1"
START_S = 3.0
RSS_MB = 90.0
LARGE_RSS_MB = 150.0
IDLE_PERCENT = 0.5
SCRAPE_MS = 250.0
CHANGE_MS = 5.0
PAIRS = 10_000
SERIES = 10_000
SERIES_PAIRS = 240
"""Enough for so many series of mesh_tcp_*: a pair that has had connections has more than forty, most of them buckets of its two histograms."""
IDLE_S = 5.0
"""Of one round."""
CHANGES = 10
"""In one round."""
PATIENCE = 1000
READY_S = 90.0
QUIET = 0.2
"""An agent that uses less of a core than this has done what the last change asked for."""
WITHIN = Target(1.0, at_least=False)
SETUP = f"the shop of lab/shop, two nodes; agent of {NODE}; no load, no pinning"
_TCP = 6
_OPENED = "mesh_tcp_connections_opened_total{"


def measure(progress: Callable[[str], None]) -> list[Result]:
    """Measure agents of a small and of a large mesh."""
    return [*_shop(progress), *_large(progress)]


def _shop(progress: Callable[[str], None]) -> list[Result]:
    """Bring the shop up and restart one of its agents again and again."""
    cold, warm, memory = [], [], []
    with Lab(topology.load(SHOP / "lab.yaml"), progress=progress) as lab:
        lab.apply(SHOP / "mesh")
        lab.settle()
        for i in range(LEAST_ROUNDS):
            progress(f"round {i + 1} of {LEAST_ROUNDS}")
            lab.stop_agent(NODE)
            if complaint := mesh.uninstall(NODE):
                raise LabError(f"meshagent uninstall on {NODE}: {complaint}")
            cold.append(lab.start_agent(NODE))
            lab.settle()
            lab.kill_agent(NODE)
            warm.append(lab.start_agent(NODE))
            lab.settle()
            memory.append(resident_mb(Path(f"/proc/{lab.agent_pid(NODE)}/status").read_text()))
    return [
        _against("agent-start-cold", "s", cold, START_S, SETUP),
        _against("agent-start-warm", "s", warm, START_S, SETUP),
        _against("agent-rss", "MB", memory, RSS_MB, SETUP),
    ]


def _large(progress: Callable[[str], None]) -> list[Result]:
    """Give one agent a large model, leave it alone, change one endpoint after the other, scrape it."""
    model = Model()
    node = Node(NODE, 1)
    progress(f"the large model: {model.size}")
    resources = [*model.resources(), *map(_workload, (CALLER, SERVER))]
    with _bpffs(), Lab(Topology((node,), (CALLER, SERVER)), mesh=False, progress=progress):
        socket = paths.RUN / "bench.sock"
        with Controller(socket, resources) as controller, _agent(node, controller) as agent:
            status = Path(f"/proc/{agent.pid}/status")
            progress("waiting until the agent is quiet")
            settle()
            memory, idle = [], []
            for i in range(LEAST_ROUNDS):
                progress(f"idle: round {i + 1} of {LEAST_ROUNDS}")
                idle.append(used_share(IDLE_S) * 100)
                memory.append(resident_mb(status.read_text()))
            one = changes(model)
            changed = []
            for i in range(LEAST_ROUNDS + 1):
                progress(f"changes: round {i} of {LEAST_ROUNDS}" if i else "changes: warming up")
                changed.append(statistics.median(controller.change(next(one), READY_S) * 1e3 for _ in range(CHANGES)))
            progress(f"{SERIES_PAIRS} pairs")
            fill(model, 0, SERIES_PAIRS)
            few = []
            for _ in range(LEAST_ROUNDS + 1):
                seconds, page = scrape(node, "identity")
                few.append(seconds * 1e3)
                series = check_page(page.decode(), SERIES_PAIRS)
            if series < SERIES:
                raise LabError(f"{SERIES_PAIRS} pairs have {series} series, {SERIES} were wanted")
            progress(f"{PAIRS} pairs")
            fill(model, SERIES_PAIRS, PAIRS)
            used = []
            times: dict[str, list[float]] = {"gzip": [], "identity": []}
            size = {}
            for i in range(LEAST_ROUNDS + 1):
                progress(f"scrapes: round {i} of {LEAST_ROUNDS}" if i else "scrapes: warming up")
                for encoding, taken in times.items():
                    seconds, page = scrape(node, encoding)
                    taken.append(seconds * 1e3)
                    size[encoding] = len(page)
                    if encoding == "identity":
                        all_series = check_page(page.decode(), PAIRS)
                used.append(resident_mb(status.read_text()))
    setup = f"{model.size}; one node, no load, no pinning"
    scraped = f"{setup}; {PAIRS} pairs of workloads, {all_series} series; the first scrape is left out"
    return [
        _against("agent-rss-large", "MB", memory, LARGE_RSS_MB, f"{setup}; before changes and scrapes"),
        _against("agent-rss-large-scraped", "MB", used[1:], LARGE_RSS_MB, f"{scraped}; after {len(changed) * CHANGES} changes"),
        _against("agent-idle", "% of a core", idle, IDLE_PERCENT, f"{setup}; {IDLE_S:g} s in each round; the whole cgroup of the agent"),
        _against("agent-change", "ms", changed[1:], CHANGE_MS, f"{setup}; sent to acknowledged, median of {CHANGES} changes in a row"),
        _against("agent-scrape-series", "ms", few[1:], SCRAPE_MS, f"{setup}; {SERIES_PAIRS} pairs, {series} series; the first is left out"),
        _against("agent-scrape", "ms", times["gzip"][1:], SCRAPE_MS, f"{scraped}; gzip, {size['gzip']} bytes"),
        _against("agent-scrape-plain", "ms", times["identity"][1:], SCRAPE_MS, f"{scraped}; not compressed, {size['identity']} bytes"),
    ]


def _against(name: str, unit: str, values: list[float], bound: float, setup: str) -> Result:
    return Result(name, unit, "target", tuple((value, bound) for value in values), setup, WITHIN)


def resident_mb(status: str) -> float:
    """Read VmRSS from the text of /proc/PID/status: kibibytes there, megabytes (10^6 bytes) here."""
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise LabError("the agent has no resident memory: it ended")
    return int(found[1]) * 1024 / 1e6


def _workload(pod: Pod) -> pb.Resource:
    """A pod of the lab, enrolled."""
    workload = pb.Workload(
        namespace=pod.namespace,
        name=pod.name,
        service_account=pod.service_account,
        node=pod.node,
        labels=pod.labels,
        addresses=pod.addresses,
        network_namespace=paths.place_netns(pod),
        enrolled=True,
        ready=True,
    )
    return resource("workload", pod.namespace, pod.name, pb.Entity(workload=workload))


@contextlib.contextmanager
def _bpffs() -> Iterator[None]:
    mounted = mounts.mount_bpffs(paths.BPF)
    try:
        yield
    finally:
        if mounted:
            mounts.unmount_bpffs(paths.BPF)


@contextlib.contextmanager
def _agent(node: Node, controller: Controller) -> Iterator[Process]:
    """An agent that has the controller's model in force and is ready; stopped at the end. The lab removes what it leaves."""
    for directory in (paths.AGENT_RUN, paths.AGENT_STATE):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    argv = [mesh.program("meshagent"), "run", "--node", node.name, "--controller", controller.target, *mesh.agent_directories(node.name)]
    argv += ["--metrics-address", node.gateways[0], "--metrics-port", str(mesh.METRICS_PORT)]
    seat = Seat(paths.agent_cgroup(node.name), paths.node_netns(node))
    agent = process.start(f"agent-{node.name}", seat, argv, {}, Path("/"), paths.log(f"agent-{node.name}"))
    try:
        controller.wait(READY_S)
        mesh.wait_agent(node, agent, READY_S)
        yield agent
    finally:
        agent.stop(10.0)


def settle() -> None:
    """Wait until the agent is quiet. Raises LabError if it never is."""
    end = time.monotonic() + READY_S
    while used_share(1.0) > QUIET:
        if time.monotonic() > end:
            raise LabError(f"the agent still uses more than {QUIET:.0%} of a core after {READY_S:.0f} s without a change")


def used_share(seconds: float) -> float:
    """Part of a core that the agent's cgroup uses for so long; threads and children that end meanwhile are counted too."""
    place = paths.agent_cgroup(NODE)
    used, started = cgroup_seconds((place / "cpu.stat").read_text()), time.monotonic()
    time.sleep(seconds)
    return (cgroup_seconds((place / "cpu.stat").read_text()) - used) / (time.monotonic() - started)


def cgroup_seconds(stat: str) -> float:
    """Read CPU seconds from the text of cpu.stat (Documentation/admin-guide/cgroup-v2.rst); every cgroup has it, also without the cpu controller."""
    return int(dict(line.split() for line in stat.splitlines())["usage_usec"]) / 1e6


def pairs(model: Model, first: int, end: int) -> list[tuple[str, str, str]]:
    """(source, target, service and port) of pairs of workloads by number, as `agent.ids` knows them: two callers, each endpoint in turn."""
    size = model.size
    found = []
    for number in range(first, end):
        service, endpoint = number // 2 % size.services, number // 2 // size.services
        caller = (CALLER, SERVER)[number % 2]
        found.append((caller.full_name, model.workload_name(service, endpoint), f"{model.service_name(service)}:{PORT}"))
    return found


def fill(model: Model, first: int, end: int) -> None:
    """For these pairs, write what the kernel would have counted, beside the agent, into its pinned map."""
    (pin,) = paths.agent_pins(NODE).glob("maps-*/mesh_stats")
    (manifest,) = paths.agent_run(NODE).glob("manifest-*.json")
    with tempfile.TemporaryDirectory(prefix="meshbench-") as directory:
        copy = Path(directory) / "ids"
        shutil.copy(paths.agent_run(NODE) / "ids", copy)  # `Ids` writes the file that it reads
        ids = Ids(copy)
    known = {kind: frozenset(ids.names(kind)) for kind in ("workload", "service")}
    table = Map(pin, Manifest.read(manifest).maps["mesh_stats"])
    buckets = (*range(100, 105), *[0] * (BUCKETS - 5))
    counts = table.layout.value.pack(
        opened=510, closed=(500, *[0] * (Close.MAX - 1)), sent_bytes=123_456_789, received_bytes=987_654_321, retransmits=3,
        connect_ns=51_000_000, rtt_ns=50_000_000, connect_bucket=buckets, rtt_bucket=buckets,
    )  # fmt: skip
    try:
        for source, target, service in pairs(model, first, end):
            if not (known["workload"].issuperset((source, target)) and service in known["service"]):
                raise LabError(f"the agent has no number for {source}, {target} or {service}")
            key = table.layout.key.pack(
                source=ids.number("workload", source),
                target=ids.number("workload", target),
                service=ids.number("service", service),
                port=PORT,
                direction=Direction.OUTBOUND,
                protocol=_TCP,
            )
            _put(table, key, counts)
    finally:
        table.close()


def _put(table: Map, key: bytes, value: bytes) -> None:
    """Write a row; the kernel refills what new rows are made of in the background (kernel/bpf/memalloc.c) and may have nothing for a moment."""
    for _ in range(PATIENCE):
        with contextlib.suppress(KernelRefused):
            table.put(key, value)
            return
        time.sleep(0.001)
    raise LabError(f"the kernel refuses a row of {table.name} again and again")


def scrape(node: Node, encoding: str) -> tuple[float, bytes]:
    """Seconds from the request to the last byte of /metrics, and the page as it came."""
    connection = http.client.HTTPConnection(node.gateways[0], mesh.METRICS_PORT, timeout=30)
    with contextlib.closing(connection):
        netns.inside(paths.place_netns(node), connection.connect)
        started = time.monotonic()
        connection.request("GET", "/metrics", headers={"Accept-Encoding": encoding})
        answer = connection.getresponse()
        page = answer.read()
        seconds = time.monotonic() - started
    if answer.status != 200:
        raise LabError(f"/metrics answered {answer.status}: {page.decode(errors='replace').strip()[:300]}")
    return seconds, page


def check_page(page: str, wanted: int) -> int:
    """Return how many series of TCP a page of /metrics has. Raises LabError unless so many pairs are there, with names."""
    series = [line for line in page.splitlines() if line.startswith("mesh_tcp_")]
    found = [line for line in series if line.startswith(_OPENED)]
    unknown = sum('source_workload="unknown"' in line or 'destination_workload="unknown"' in line for line in found)
    if len(found) - unknown < wanted:
        raise LabError(f"/metrics names {len(found) - unknown} pairs of workloads, {wanted} were counted")
    return len(series)


if __name__ == "__main__":
    sys.exit(run(measure))
