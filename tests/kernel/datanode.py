"""A node's data path without controller and Envoy: real programs on a real lab network, configured by a snapshot that a test writes itself."""

from __future__ import annotations

import asyncio
import functools
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.bpf import source
from agent.bpf.datapath import DataPath
from agent.bpf.events import Event, Events
from agent.bpf.manifest import STATS_TUNNELLED, Close, Direction
from agent.bpf.tables import NO_TUNNELS
from agent.config import Config
from agent.enrolment import Enrolment
from agent.ids import Ids
from agent.model import NO_DIRECT, Action, Backing, Direct, Policy, PolicyRule, Service, ServicePort, Snapshot, Source, Workload
from agent.uninstall import uninstall
from lab import mounts, paths
from lab.lab import Lab
from lab.topology import Node, Outside, Pod, Topology

NODE = "node-1"
ECHO = """
import socket, threading
def serve(s):
    while True:
        c, _ = s.accept()
        threading.Thread(target=talk, args=(c,), daemon=True).start()
def talk(c):
    with c:
        while data := c.recv(65536):
            c.sendall(data)
for port in (8080, 8081):
    s = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)
    threading.Thread(target=serve, args=(s,)).start()
"""
# getpeername() says what was dialled: proc(5), /proc/net/tcp, says where the segments go. State 01 is established: a port may have others in TIME_WAIT.
REAL = """
import ipaddress
def real(s):
    port = s.getsockname()[1]
    for name in ("tcp", "tcp6"):
        for line in open("/proc/net/" + name).readlines()[1:]:
            local, remote, state = line.split()[1:4]
            if int(local.rpartition(":")[2], 16) == port and state == "01":
                raw = bytes.fromhex(remote.partition(":")[0])
                return str(ipaddress.ip_address(b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))))
"""
CALL = f"""{REAL}
import errno, socket, sys
address, port, size, timeout = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
try:
    s = socket.create_connection((address, port), timeout=timeout)
    assert s.getpeername()[:2] == (address, port), s.getpeername()
    peer = real(s)
    s.sendall(b"x" * size); s.shutdown(socket.SHUT_WR)
    got = b""
    while data := s.recv(65536): got += data
    assert len(got) == size, got
    print("ok", peer)
except TimeoutError: print("timeout")
except OSError as e: print(errno.errorcode.get(e.errno, e))
"""


def pod(name: str, host: int, *, serves: bool = False, node: int = 1) -> Pod:
    """A pod with addresses of both families; one that serves echoes on 8080 and 8081."""
    command = ("python3", "-c", ECHO) if serves else ()
    return Pod(
        name, f"node-{node}", (f"10.77.{node}.{host}", f"fd77:0:0:{node}::{host}"), command=command, ports=(8080, 8081) if serves else ()
    )


PODS = (
    pod("caller", 11),
    pod("other", 12),
    pod("server-a", 21, serves=True),
    pod("server-b", 22, serves=True),
    pod("remote", 31, serves=True, node=2),
    pod("stranger", 41),
)
TOPOLOGY = Topology((Node("node-1", 1), Node("node-2", 2)), PODS, (Outside("client", ("10.77.255.200", "fd77:0:0:ff::200")),), Path("/"))
ADDRESSES = {p.name: p.addresses for p in PODS}
VIP4, VIP6, VIP_EMPTY = "10.96.0.10", "fd96::10", "10.96.0.20"
FAMILIES = [pytest.param(socket.AF_INET, id="ipv4"), pytest.param(socket.AF_INET6, id="ipv6")]
ALLOW_CALLER = Policy("default/p", Action.ALLOW, (PolicyRule((Source(service_accounts=("default/caller",)),)),))


def workload(name: str, *, policies: tuple[str, ...] = (), ready: bool = True, enrolled: bool = True) -> Workload:
    """The pod of this name as a workload; both servers and `remote` back the service `echo`."""
    found = next(p for p in PODS if p.name == name)
    backing = (Backing("default/echo", {80: 8080}),) if found.ports else ()
    namespace = paths.place_netns(found)
    return Workload(f"default/{name}", name, found.node, {}, found.addresses, namespace, enrolled, ready, backing, tuple(sorted(policies)))


def snapshot(*workloads: Workload, policies: tuple[Policy, ...] = (), waypoint: bool = False) -> Snapshot:
    """A model of these workloads with the services `echo` (both families) and `empty`."""
    port = ServicePort(80, "", "TCP", "", waypoint, "test")
    services = (Service("default/echo", (VIP4, VIP6), (port,)), Service("default/empty", (VIP_EMPTY,), (port,)))
    return Snapshot("test", {w.name: w for w in workloads}, {s.name: s for s in services}, {}, {p.name: p for p in policies})


class DataNode:
    """See the module."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.config = Config(
            node=NODE,
            controller="unix:none",
            cgroup=paths.node_cgroup(NODE),
            pin_dir=paths.agent_pins(NODE),
            run_dir=paths.agent_run(NODE),
            state_dir=paths.agent_state(NODE),
        )
        for directory in (self.config.run_dir, self.config.state_dir, self.config.pin_dir):
            directory.mkdir(parents=True, exist_ok=True)
        self.config.waypoint_cgroup.mkdir(exist_ok=True)
        self.open()

    def open(self) -> None:
        """Load or take over, as an agent does when it starts."""
        self.datapath = DataPath(self.config)
        asyncio.run(self.datapath.load())
        self.ids = Ids(self.config.run_dir / "ids")
        self.enrolment = Enrolment(self.config, self.datapath, self.ids)

    def enforce(
        self,
        model: Snapshot,
        enforce_inbound: frozenset[str] = frozenset(),
        tunnels: Mapping[str, int] = NO_TUNNELS,
        direct: Direct = NO_DIRECT,
    ) -> None:
        """Bring a snapshot into force and attach."""
        self.enrolled = self.enrolment.enforce(model, enforce_inbound, tunnels, direct)
        assert self.enrolled.missing == ()
        self.datapath.configure(waypoint_cgroup_id=self.config.waypoint_cgroup.stat().st_ino, tracing=0)
        self.datapath.attach(self.config.waypoint_cgroup)

    def connect(self, place: str, address: str, port: int, *, size: int = 5, timeout: float = 2.0) -> str:
        """Connect from inside a pod and exchange `size` bytes; "ok" and the address that the connection really went to, or the name of the errno."""
        run = self.lab.exec(place, ["python3", "-c", CALL, address, str(port), str(size), str(timeout)])
        assert run.returncode == 0, run.stderr
        return run.stdout.strip()

    def in_force(self) -> bool:
        """Does ALLOW_CALLER hold at server-a, for the one who may and for one who may not?"""
        server = address_of("server-a")
        return self.connect("caller", server, 8080).startswith("ok") and self.connect("other", server, 8080) == "EPERM"

    @contextmanager
    def program(self, place: str, argv: Sequence[str], says: str = "ready") -> Iterator[subprocess.Popen[str]]:
        """A program in a pod, killed after the block; the block begins when it has printed a line with `says`, so nobody asks before it listens."""
        process = self.lab.popen(place, argv)
        try:
            assert process.stdout is not None
            while says not in (line := process.stdout.readline()):
                assert line, process.communicate()[1]
            yield process
        finally:
            process.kill()
            process.communicate()

    def stats(self, source: str, target: str, direction: Direction) -> dict[str, int]:
        """Sums of a pair's counters over services, ports and CPUs, through tunnels or not; `closed` and `failed` apart."""
        table = self.datapath.maps["mesh_stats"]
        total = {"opened": 0, "sent_bytes": 0, "received_bytes": 0, "closed": 0, "failed": 0, "reset": 0}
        for key, values in table.items():
            k = table.layout.key.unpack(key)
            if (self.ids.name(k["source"]), self.ids.name(k["target"]), k["direction"] & ~STATS_TUNNELLED) != (source, target, direction):
                continue
            for value in map(table.layout.value.unpack, values):
                for name in ("opened", "sent_bytes", "received_bytes"):
                    total[name] += value[name]
                total["closed"] += value["closed"][Close.NORMAL]
                total["failed"] += sum(value["closed"][c] for c in (Close.FAILED, Close.REFUSED, Close.TIMED_OUT))
                total["reset"] += value["closed"][Close.RESET]
        return total

    def verdicts(self) -> dict[tuple[str, str, str], int]:
        """Counts by (source, target, rule)."""
        table = self.datapath.maps["mesh_verdicts"]
        found: dict[tuple[str, str, str], int] = {}
        for key, values in table.items():
            k = table.layout.key.unpack(key)
            who = (self.ids.name(k["source"]), self.ids.name(k["target"]), self.ids.name(k["rule"]))
            found[who] = found.get(who, 0) + sum(table.layout.value.unpack(v)[""] for v in values)
        return found

    @contextmanager
    def events(self) -> Iterator[list[Event]]:
        """Events that arrive within the block, complete when it ends."""
        found: list[Event] = []
        ring = Events(self.datapath.maps["mesh_events"], self.ids, found.append)
        ring._ring.consume()
        found.clear()
        yield found
        ring._ring.consume()
        ring._ring.close()

    def close(self) -> None:
        """Remove everything."""
        for table in self.datapath.maps.values():
            table.close()
        uninstall(self.config)


def compile_from(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Have data paths that are opened from now on use another copy of the C source."""
    read, job = source.read, source.Job
    monkeypatch.setattr(source, "read", lambda _directory=None, flags=(), capacities=None: read(directory, flags, capacities))
    monkeypatch.setattr(source, "Job", functools.partial(job, source=str(directory)))


def until(condition: object, timeout: float = 3.0) -> bool:
    """Poll a condition that no event announces (a counter in the kernel); False if it does not come true."""
    assert callable(condition)
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@contextmanager
def running() -> Iterator[DataNode]:
    """A lab without a mesh, and the data path on its first node."""
    with Lab(TOPOLOGY, mesh=False) as lab:
        mounted = mounts.mount_bpffs(paths.BPF)
        node = DataNode(lab)
        try:
            yield node
        finally:
            node.close()
            for parent in (paths.PINS, paths.AGENT_RUN):
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
            if mounted:
                assert mounts.unmount_bpffs(paths.BPF)


def address_of(place: str, family: socket.AddressFamily = socket.AF_INET) -> str:
    """A pod's address of a family."""
    return ADDRESSES[place][0 if family == socket.AF_INET else 1]
