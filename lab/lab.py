"""A running lab: bring it up, run programs in its pods, ask its agents, break things, take it down. What tests and benchmarks use.

Owns the order of things; the parts are in the modules beside it. One lab a machine. Needs root.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from lab import cgroup, hosts, mesh, mounts, netns, network, paths, process, settle, state, teardown
from lab.errors import LabError
from lab.process import Process, Seat
from lab.state import State
from lab.topology import Place, Pod, Topology

READY_TIMEOUT_S = 60.0
"""How long a controller or an agent may take until it is ready."""
POD_TIMEOUT_S = 20.0
"""How long a pod's program may take until it listens."""
Progress = Callable[[str], None]


def silent(_: str) -> None:
    """Show no progress."""


class Lab:
    """A lab of `topology`; without `mesh` only its network and its pods ("no mesh at all"). A context manager: up, then always down."""

    def __init__(self, topology: Topology, *, mesh: bool = True, progress: Progress = silent) -> None:
        self._state = State(topology, mesh)
        self.progress = progress
        """Called with each step that takes a while; may be replaced at any time."""
        self.controller_options: Sequence[str] = ()
        """More of `mesh-controller run`, for each start of the controller by this object."""

    @classmethod
    def attach(cls, progress: Progress = silent) -> Lab:
        """Return the lab that another process brought up."""
        found = state.load()
        if found is None:
            raise LabError("no lab is up: `meshagent lab up` brings one up")
        lab = cls(found.topology, mesh=found.mesh, progress=progress)
        lab._state = found
        return lab

    def __enter__(self) -> Lab:  # noqa: PYI034 - typing.Self needs Python 3.11
        self.up()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.down()

    @property
    def topology(self) -> Topology:
        """What the lab consists of now."""
        return self._state.topology

    @property
    def state(self) -> State:
        """What the lab remembers; for reading."""
        return self._state

    def up(self) -> None:
        """Bring everything up and wait until it is ready; if that fails, or is interrupted, take it down again.

        A lab that died (`State.dead`) is taken down first; one that lives is an error.
        """
        _require_root()
        before = state.load()
        if before is not None and before.dead():
            self.progress("taking down what a lab that died has left")
            teardown.run(before, self.progress)
        mounts.mount_tmpfs(paths.RUN)
        self._state.save(new=True)
        try:
            self._build()
        except BaseException:
            self.down()
            raise

    def down(self) -> list[str]:
        """Take everything down; return what did not go as it should, [] if all is well."""
        _require_root()
        return teardown.run(state.load() or self._state, self.progress)

    def add_pod(self, pod: Pod) -> None:
        """Make a pod and start its program, and wait until that listens."""
        self._change(replace(self.topology, pods=(*self.topology.pods, pod)))
        self.progress(f"pod {pod.full_name}")
        self._make_pod(pod)
        self._wait_pod(pod)

    def remove_pod(self, name: str) -> None:
        """Kill a pod's programs and remove its namespace, wire and cgroup."""
        pod = self.topology.pod(name)
        where = paths.place_cgroup(pod)
        cgroup.kill(where)
        network.remove_pod(pod, self.topology.node(pod.node))
        cgroup.remove(where)
        paths.place_hosts(pod).unlink(missing_ok=True)
        self._state.processes.pop(_process_name(pod), None)
        self._change(replace(self.topology, pods=tuple(p for p in self.topology.pods if p is not pod)))

    def exec(
        self,
        place: str,
        argv: Sequence[str],
        *,
        timeout: float = 30.0,
        check: bool = False,
        input: str | None = None,  # noqa: A002 - as in subprocess.run
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a pod, a host outside or a node, and return what came of it."""
        where = self.topology.place(place)
        return subprocess.run(
            self.command(place, argv), env=self.environment(where), input=input, stdin=None if input is not None else subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout, check=check,
        )  # fmt: skip

    def popen(self, place: str, argv: Sequence[str]) -> subprocess.Popen[str]:
        """Start a command as a child of the caller, who ends it; its streams are pipes."""
        where = self.topology.place(place)
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self.command(place, argv), env=self.environment(where), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
        )

    def command(self, place: str, argv: Sequence[str]) -> list[str]:
        """Return the command line that runs `argv` in a place."""
        where = self.topology.place(place)
        cgroup.create(paths.place_cgroup(where))
        hosts.write([where])
        return process.command(_seat(where), argv)

    def environment(self, place: Place) -> dict[str, str]:
        """Return the environment of programs in a place: nothing of the caller's but the terminal's type."""
        terminal = {"TERM": os.environ["TERM"]} if "TERM" in os.environ else {}
        return {**process.BASE_ENV, **terminal, **_environment(place)}

    def netns(self, place: str) -> Path:
        """Return the path of a place's network namespace."""
        return netns.path(paths.place_netns(self.topology.place(place)))

    def cgroup(self, place: str) -> Path:
        """Return the cgroup of a place's programs."""
        return paths.place_cgroup(self.topology.place(place))

    def meshagent(self, *args: str, timeout: float = 60.0, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Run the `meshagent` command on the host, as an operator does."""
        return subprocess.run([mesh.program("meshagent"), *args], capture_output=True, text=True, timeout=timeout, check=check)

    def ask(self, node: str, command: str, *args: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a `meshagent` command that talks to the agent of a node: `status` or `trace`."""
        return subprocess.run(mesh.agent_command(node, command, *args), capture_output=True, text=True, timeout=timeout, check=False)

    def status(self, node: str) -> dict[str, Any]:
        """Return `meshagent status -o json` of a node; {} if its agent does not answer."""
        try:
            report = json.loads(self.ask(node, "status", "-o", "json").stdout)
        except ValueError:
            return {}
        return report if isinstance(report, dict) else {}

    def settle(self, timeout: float = READY_TIMEOUT_S) -> None:
        """Wait until every agent holds the same version of the model and has taken its pods of the topology into the mesh."""
        deadline = time.monotonic() + timeout
        while True:
            waiting = settle.unsettled(self.topology, {node.name: self.status(node.name) for node in self.topology.nodes})
            if not waiting:
                return
            if process.deadline_left(deadline) == 0:
                raise LabError(f"the mesh has not settled after {timeout:.0f} s: {'; '.join(waiting)}")
            time.sleep(mesh.POLL_S)

    def apply(self, *sources: Path | str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`meshagent apply` files, directories (Path) or YAML (str), and let the pods know the Services' names."""
        files: list[str] = []
        for i, source in enumerate(sources):
            path = source
            if isinstance(source, str):
                path = paths.RUN / f"apply-{i}.yaml"
                path.write_text(source)
            files.append(str(path))
        run = subprocess.run(mesh.apply_command(files), capture_output=True, text=True, timeout=60, check=False)
        if check and run.returncode != 0:
            raise LabError(f"meshagent apply failed (exit code {run.returncode}): {(run.stderr or run.stdout).strip()}")
        hosts.write(self.topology.pods)
        return run

    def agent_pid(self, node: str) -> int:
        """Return the pid of a node's agent."""
        return self._process(f"agent-{node}").pid

    def kill_agent(self, node: str) -> None:
        """SIGKILL a node's agent, and nothing else, and wait until it is gone."""
        _kill(self._process(f"agent-{node}"))

    def stop_agent(self, node: str, timeout: float = 10.0) -> bool:
        """SIGTERM a node's agent; return whether it ended by itself within `timeout` seconds."""
        return self._process(f"agent-{node}").stop(timeout)

    def start_agent(self, node: str, options: Sequence[str] = (), timeout: float = READY_TIMEOUT_S) -> float:
        """Start a node's agent, perhaps with more options, wait until it is ready, and return the seconds that took."""
        started = time.monotonic()
        agent = self._remember(mesh.start_agent(self.topology.node(node), options))
        mesh.wait_agent(self.topology.node(node), agent, timeout)
        return time.monotonic() - started

    def controller_pid(self) -> int:
        """Return the pid of the controller."""
        return self._process("controller").pid

    def controller_stop(self) -> None:
        """SIGKILL the controller and wait until it is gone: nothing may depend on a polite goodbye."""
        _kill(self._process("controller"))

    def controller_start(self, timeout: float = READY_TIMEOUT_S) -> None:
        """Start the controller and wait until it serves."""
        topology, options = self.topology, self.controller_options
        controller = mesh.start_controller(identity=topology.identity, wireguard=topology.wireguard, options=options)
        mesh.wait_controller(self._remember(controller), timeout)

    def metrics(self, node: str) -> str:
        """Return what a node's agent exposes at /metrics."""
        code, text = mesh.http_get(self.topology.node(node), "/metrics")
        if code != 200:
            raise LabError(f"/metrics of {node} answered {code}: {text.strip()}")
        return text

    def agent_ready(self, node: str) -> bool:
        """Return whether a node's agent says that it is ready."""
        try:
            return mesh.http_get(self.topology.node(node), "/readyz")[0] == 200
        except OSError:
            return False

    def envoy_stats(self, node: str) -> dict[str, int]:
        """Return the counters and gauges of a node's Envoy; {} if no Envoy runs."""
        try:
            return mesh.parse_envoy_stats(mesh.envoy_get(node, "/stats?format=json")[1])
        except OSError:
            return {}

    def logs(self, lines: int = 25) -> dict[str, str]:
        """Return the end of every log that is not empty, by program."""
        tails = {path.stem: process.tail(path, lines) for path in sorted(paths.LOGS.glob("*.log"))}
        return {name: text for name, text in tails.items() if text}

    def _build(self) -> None:
        topology = self.topology
        if self._state.mesh:
            self._state.mounted_bpffs = mounts.mount_bpffs(paths.BPF)
            self._state.save()
        self.progress(f"network of {len(topology.nodes)} nodes")
        network.build(topology)
        for node in topology.nodes:
            cgroup.create(paths.agent_cgroup(node.name))
        cgroup.create(paths.controller_cgroup())
        hosts.write([*topology.nodes, *topology.outside])
        self.progress(f"{len(topology.pods)} pods")
        for pod in topology.pods:
            self._make_pod(pod)
        if self._state.mesh:
            self._start_mesh()
        self.progress("waiting for the pods' programs")
        for pod in topology.pods:
            self._wait_pod(pod)
        self._state.complete = True
        self._state.save()

    def _start_mesh(self) -> None:
        mesh.prepare(self.topology)
        self.progress("starting the controller")
        self.controller_start()
        agents = {node: self._remember(mesh.start_agent(node)) for node in self.topology.nodes}
        for node, agent in agents.items():
            self.progress(f"waiting for the agent of {node.name}")
            mesh.wait_agent(node, agent, READY_TIMEOUT_S)

    def _make_pod(self, pod: Pod) -> None:
        network.add_pod(pod, self.topology.node(pod.node))
        cgroup.create(paths.place_cgroup(pod))
        hosts.write([pod])
        if pod.command:
            name = _process_name(pod)
            log = paths.log(name)
            self._remember(process.start(name, _seat(pod), pod.command, _environment(pod), self.topology.directory, log))

    def _wait_pod(self, pod: Pod) -> None:
        """Wait until a pod's program listens on its ports; looks at the sockets, so that no connection of the lab's own is counted."""
        if not pod.ports:
            return
        wanted = set(pod.ports)
        namespace = paths.place_netns(pod)
        mesh.wait_ready(self._process(_process_name(pod)), lambda: wanted <= netns.inside(namespace, _listening), POD_TIMEOUT_S)

    def _process(self, name: str) -> Process:
        try:
            return self._state.processes[name]
        except KeyError:
            raise LabError(f"{name} was never started in this lab") from None

    def _remember(self, started: Process) -> Process:
        self._state.processes[started.name] = started
        self._state.save()
        return started

    def _change(self, topology: Topology) -> None:
        self._state.topology = topology
        self._state.save()


def _seat(place: Place) -> Seat:
    return Seat(paths.place_cgroup(place), netns.path(paths.place_netns(place)), place.name, paths.place_hosts(place))


def _environment(place: Place) -> Mapping[str, str]:
    if isinstance(place, Pod):
        return {"POD_NAME": place.name, "POD_NAMESPACE": place.namespace, "NODE_NAME": place.node, **place.env}
    return {}


def _process_name(pod: Pod) -> str:
    return f"{pod.namespace}_{pod.name}"


def _listening() -> set[int]:
    """Return the TCP ports that are listened on in this thread's network namespace (man 5 proc_pid_net: state 0A, hexadecimal ports)."""
    ports: set[int] = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/thread-self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def _kill(target: Process) -> None:
    if not target.alive():
        raise LabError(f"{target.name} (pid {target.pid}) is not running")
    target.kill()


def _require_root() -> None:
    if os.geteuid() != 0:
        raise LabError("a lab makes network namespaces, cgroups and mounts: run it as root (sudo)")
