"""One lab for a benchmark: two pods in the mesh and two on the same wires that no program of the mesh ever touches.

"No mesh" is measured without taking the mesh down, so that the two can take turns. The plain pods hang on the same bridges of the same
nodes, no Workload describes them, and their programs are started in a cgroup beside the node's, where the lab keeps hosts outside the mesh.
A cgroup program runs for the sockets of processes below the cgroup it is attached to, and sk_lookup for the namespaces it is linked to:
here neither is the case (`_require` asks the kernel), so it executes no instruction of ours for them, not even an early exit. What is
left is two static keys of the kernel's (`cgroup_bpf_enabled_key`, `bpf_sk_lookup_enabled`), which are on for the whole machine; each leads
to a test for an empty array.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from bench.machine import Cpus, awake, busy_seconds, cpus, pinned, used_seconds
from lab import cgroup, mesh, netns, paths, process, resources
from lab.demo import samples
from lab.errors import LabError
from lab.lab import Lab
from lab.process import Process, Seat
from lab.topology import Node, Pod, Topology

NODE = "node-1"
CALLER = Pod("caller", NODE, ("10.77.1.11",), service_account="caller", labels={"app": "caller"})
SERVER = Pod("server", NODE, ("10.77.1.21",), service_account="server", labels={"app": "server"})
PLAIN_CALLER = Pod("plain-caller", NODE, ("10.77.1.12",), mesh=False)
PLAIN_SERVER = Pod("plain-server", NODE, ("10.77.1.22",), mesh=False)
ONE_NODE = Topology((Node(NODE, 1),), (CALLER, SERVER, PLAIN_CALLER, PLAIN_SERVER))
VIP = "10.96.0.10"
"""Address of the one Service, which SERVER backs (pods with the label app: server)."""
READY_S = 15.0


class Testbed:
    """A running lab with the programs of a benchmark in it. They end with the lab."""

    def __init__(self, lab: Lab, chosen: Cpus, spinners: tuple[int, ...]) -> None:
        self.lab = lab
        self.cpus = chosen
        self._spinners = spinners
        self.directory = paths.RUN / "bench"
        """On the lab's tmpfs; goes with it."""
        self.directory.mkdir(mode=0o700, exist_ok=True)

    def start(self, name: str, pod: Pod, cpu: int, argv: Sequence[str], port: int) -> Process:
        """Start a program in a pod, pinned, and wait until it listens on `port`."""
        started = process.start(name, seat(pod), pinned(cpu, argv), {}, Path("/"), paths.log(name))
        mesh.wait_ready(started, lambda: port in netns.inside(paths.place_netns(pod), _listening), READY_S)
        return started

    def start_nginx(self, pod: Pod, cpu: int, text: str, port: int) -> Process:
        """Start nginx with this configuration."""
        file = self.directory / f"nginx-{pod.name}.conf"
        file.write_text(text)
        return self.start(f"nginx-{pod.name}", pod, cpu, ["nginx", "-e", "stderr", "-c", str(file)], port)

    def run(self, pod: Pod, cpu: int, argv: Sequence[str], timeout: float = 30.0) -> str:
        """Run a program in a pod, pinned, and return what it printed. Raises LabError if it fails."""
        return self.run_in(seat(pod), cpu, argv, timeout)

    def run_in(self, where: Seat, cpu: int, argv: Sequence[str], timeout: float = 30.0) -> str:
        """The same somewhere else."""
        run = subprocess.run(
            process.command(where, pinned(cpu, argv)), env=process.BASE_ENV, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        if run.returncode != 0:
            text = (run.stderr or run.stdout).strip()[-300:]
            raise LabError(f"{argv[0]} in {where.cgroup.name} ended with exit code {run.returncode}: {text}")
        return run.stdout

    def busy_seconds(self) -> float:
        """Return CPU seconds that the whole machine has worked, other programs' included, those that keep it awake left out."""
        return busy_seconds() - used_seconds(self._spinners)

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Stop what keeps the CPUs from halting, while something else does."""
        for pid in self._spinners:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in self._spinners:
                os.kill(pid, signal.SIGCONT)

    def opened(self, source: str, target: str) -> float:
        """Return how many connections between two workloads the kernel programs have counted, at both ends."""
        labels = (f'source_workload="{source}"', f'destination_workload="{target}"')
        return samples(self.lab.metrics(NODE), "mesh_tcp_connections_opened_total", *labels)


def seat(pod: Pod) -> Seat:
    """Return where a pod's programs run: those of a plain pod in a cgroup that no node's agent serves."""
    group = paths.place_cgroup(pod) if pod.mesh else paths.cgroup_root() / "outside" / pod.name
    cgroup.create(group)
    return Seat(group, netns.path(paths.place_netns(pod)))


@contextmanager
def testbed(documents: Sequence[dict[str, Any]], progress: Callable[[str], None], topology: Topology) -> Iterator[Testbed]:
    """Bring the lab up with these resources and the Workloads of its mesh pods in force; take it down at the end."""
    if os.geteuid() != 0:
        raise LabError("a lab makes network namespaces, cgroups and mounts: run it as root (sudo)")
    with Lab(topology, progress=progress) as lab:
        lab.apply(to_yaml([*(resources.workload(pod) for pod in topology.pods if pod.mesh), *documents]))
        lab.settle()
        for pod in topology.pods:
            _require(pod, touched=pod.mesh)
        chosen = cpus()
        with awake(chosen) as spinners:
            yield Testbed(lab, chosen, spinners)


def service(*ports: tuple[str, int], protocol: str = "") -> dict[str, Any]:
    """Return the Service in front of SERVER; ports are (name, number), `protocol` their appProtocol."""
    entries: list[dict[str, Any]] = [{"name": name, "port": port} for name, port in ports]
    for entry in entries if protocol else ():
        entry["appProtocol"] = protocol
    spec = {"clusterIPs": [VIP], "selector": {"app": "server"}, "ports": entries}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "server"}, "spec": spec}


def _require(pod: Pod, *, touched: bool) -> None:
    """Raise LabError unless programs of the mesh run for this pod, or do not; the kernel is asked, by bpftool."""
    effective = _bpftool("cgroup", "show", str(seat(pod).cgroup), "effective")
    inode = netns.path(paths.place_netns(pod)).stat().st_ino
    hooks = sorted(str(entry["name"]) for entry in effective if str(entry["name"]).startswith("mesh_"))
    hooks += ["mesh_sk_lookup" for link in _bpftool("link", "show") if link["type"] == "netns" and link["netns_ino"] == inode]
    if bool(hooks) != touched or ("mesh_sk_lookup" in hooks) != touched:
        raise LabError(f"pod {pod.name} is not what the benchmark needs: the kernel runs {', '.join(hooks) or 'no program'} for it")


def _bpftool(*args: str) -> list[dict[str, Any]]:
    run = subprocess.run(["bpftool", "--json", *args], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout.strip() or "[]")
    return found if isinstance(found, list) else []


def to_yaml(documents: Sequence[dict[str, Any]]) -> str:
    """Return resources as text for `Lab.apply`."""
    stream = io.StringIO()
    YAML(typ="safe").dump_all(documents, stream)
    return stream.getvalue()


def _listening() -> set[int]:
    """Return the TCP ports that are listened on in this thread's namespace; looks only, because a connection would disturb a server."""
    lines = subprocess.run(["ss", "-Hltn"], capture_output=True, text=True, check=True).stdout.splitlines()
    return {int(line.split()[3].rpartition(":")[2]) for line in lines}
