"""The kubelet's probes at the real kernel: a process in a cgroup of its own outside those of pods, in the node's network namespace, calls pods of its node."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent import kubelet, netns
from agent.bpf.manifest import Direction, Reason, Verdict
from agent.kubelet import Finder, Follower
from agent.model import Action, Mtls, Operation, Policy, PolicyRule, Snapshot
from agent.trace import Pair, Seen, Watch
from lab import cgroup, paths
from lab import netns as lab_netns
from tests.kernel.datanode import FAMILIES, NODE, DataNode, address_of, snapshot, until, workload

CLOSED = Policy("default/closed", Action.ALLOW)
DENY = Policy("default/deny", Action.DENY, (PolicyRule(),))
READS = Policy("default/reads", Action.ALLOW, (PolicyRule((), (Operation(methods=("GET",)),)),))
CALLER = kubelet.caller(NODE)
CALLS = """
import errno, socket, sys
for line in sys.stdin:
    address, port, kind = line.split()
    try:
        if kind == "udp":
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
                s.connect((address, int(port))); s.send(b"x")
            print("sent", flush=True)
            continue
        with socket.create_connection((address, int(port)), timeout=2) as s:
            s.sendall(b"probe"); s.shutdown(socket.SHUT_WR)
            got = b""
            while data := s.recv(64): got += data
        print(got.decode(), flush=True)
    except OSError as error:
        print(errno.errorcode.get(error.errno, error), flush=True)
"""


class Program:
    """A process that connects as it is told, called `name` by the kernel."""

    def __init__(self, name: str, place: Path, space: str, directory: Path, wrapper: tuple[str, ...] = ()) -> None:
        self.place = cgroup.create(place)
        binary = directory / name
        if not binary.exists():
            binary.symlink_to(Path(sys.executable).resolve())  # execve() calls a process by the name of the file: proc(5), /proc/PID/comm
        enter = ["nsenter", f"--net={lab_netns.path(space)}", "--"]
        script = 'echo 0 > "$1/cgroup.procs"; shift; exec "$@"'
        self._process = subprocess.Popen(
            ["sh", "-c", script, "sh", str(place), *enter, *wrapper, str(binary), "-c", CALLS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self.call("127.0.0.1", 1)  # it runs

    def call(self, address: str, port: int, kind: str = "tcp") -> str:
        """What it got back, or the name of the errno."""
        self.tell(address, port, kind)
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def tell(self, address: str, port: int, kind: str = "tcp") -> None:
        """Have it call, after all that it was told before."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{address} {port} {kind}\n")
        self._process.stdin.flush()

    def end(self) -> None:
        """End it, and wait until it has."""
        self._process.kill()
        self._process.communicate()


class Machine:
    """The programs of a node outside its pods."""

    def __init__(self, node: DataNode, directory: Path) -> None:
        self.node = node
        self.directory = directory
        self.holder = subprocess.Popen(
            ["nsenter", f"--net={lab_netns.path(paths.place_netns(node.lab.topology.nodes[0]))}", "sleep", "1000"]
        )
        self._started: list[Program] = []
        self.finder = Finder(node.config.cgroup, node=Path(f"/proc/{self.holder.pid}"))
        own = netns.mark("/proc/self/ns/net")
        while netns.mark(f"/proc/{self.holder.pid}/ns/net") == own:  # nsenter is on its way
            os.sched_yield()

    def start(self, name: str, place: str = "system.slice/kubelet.service", space: str = "", wrapper: tuple[str, ...] = ()) -> Program:
        """A program of this name in a cgroup below the agent's; in the node's own network namespace, if no other is said."""
        space = space or paths.place_netns(self.node.lab.topology.nodes[0])
        self._started.append(Program(name, self.node.config.cgroup / place, space, self.directory, wrapper))
        return self._started[-1]

    def recognise(self, found: kubelet.Kubelet) -> None:
        """As the supervisor does."""
        number = self.node.ids.number("workload", CALLER)
        self.node.ids.save()
        self.node.datapath.recognise_kubelet(found, number)

    def find(self) -> kubelet.Kubelet:
        """Look, and have the kernel recognise what was found."""
        found = self.finder.find()
        self.recognise(found)
        return found

    def close(self) -> None:
        """Leave nothing behind."""
        self.recognise(kubelet.NOBODY)
        for program in self._started:
            program.end()
        for place in {program.place for program in self._started}:
            cgroup.remove(place)
            for above in place.parents:
                if above == self.node.config.cgroup:
                    break
                with contextlib.suppress(OSError):
                    above.rmdir()
        self.holder.kill()
        self.holder.wait()


@pytest.fixture
def machine(node: DataNode, tmp_path: Path) -> Iterator[Machine]:
    found = Machine(node, tmp_path)
    try:
        yield found
    finally:
        found.close()


def strict(*policies: Policy, ports: tuple[int, ...] = (8080,)) -> Snapshot:
    """server-a is STRICT and probed on 8080, server-b is probed and not STRICT; 8081 has a row of its own in the kernel, without being probed."""
    names = tuple(policy.name for policy in policies)
    return snapshot(
        workload("caller"),
        replace(workload("server-a", policies=names), mtls=Mtls.STRICT, mtls_ports=((8081, Mtls.STRICT),), probe_ports=ports),
        replace(workload("server-b", policies=names), probe_ports=ports),
        workload("stranger", enrolled=False),
        policies=policies,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kubelet_reaches_the_probed_ports_of_a_strict_pod_and_no_others(
    node: DataNode, machine: Machine, family: socket.AddressFamily
) -> None:
    node.enforce(strict())
    program = machine.start("kubelet")
    address = address_of("server-a", family)
    assert program.call(address, 8080) == "ECONNREFUSED"
    found = machine.find()
    assert (found.pid, found.process, found.directory) == (program.pid, program.pid, str(program.place))
    assert program.call(address, 8080) == "probe"
    with node.events() as events:
        assert program.call(address, 8081) == "ECONNREFUSED"
    assert {(Reason(e.reason), e.source) for e in events} == {(Reason.PLAINTEXT, "")}


@pytest.mark.parametrize("policy", [CLOSED, DENY, READS], ids=lambda one: one.name)
def test_no_policy_decides_about_a_probe(node: DataNode, machine: Machine, policy: Policy) -> None:
    """READS asks for the request, which nobody is here to read: a probe does not go by the waypoint."""
    node.enforce(strict(policy), enforce_inbound=frozenset({"default/server-a"}))
    program = machine.start("kubelet")
    machine.find()
    for server in ("server-a", "server-b"):
        assert program.call(address_of(server), 8080) == "probe"
        assert program.call(address_of(server), 8081) == "ECONNREFUSED"
    assert node.connect("caller", address_of("server-a"), 8080) != "ok"


@pytest.mark.parametrize("family", FAMILIES)
def test_another_process_of_the_node_is_refused(node: DataNode, machine: Machine, family: socket.AddressFamily) -> None:
    node.enforce(strict())
    real = machine.start("kubelet")
    neighbour = machine.start("helper")
    outside = machine.start("kubelet", "user.slice")
    machine.find()
    assert real.call(address_of("server-a", family), 8080) == "probe"
    for other in (neighbour, outside):
        with node.events() as events:
            assert other.call(address_of("server-a", family), 8080) == "ECONNREFUSED"
        assert {Reason(e.reason) for e in events} == {Reason.PLAINTEXT}


@pytest.mark.parametrize(
    ("place", "space"),
    [
        pytest.param("kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/c.scope", "", id="hostNetwork-pod"),
        pytest.param("kubepods/burstable/pod1/c", "", id="hostNetwork-pod-cgroupfs"),
        pytest.param("system.slice/kubelet.service", "stranger", id="pod-that-left-its-cgroup"),
    ],
)
def test_a_pod_that_calls_itself_kubelet_is_nobody(node: DataNode, machine: Machine, place: str, space: str) -> None:
    node.enforce(strict())
    posing = machine.start("kubelet", place, paths.place_netns(node.lab.topology.place(space)) if space else "")
    found = machine.find()
    assert (found.cgroup, found.process) == (0, 0)
    assert f"process {posing.pid} is called kubelet, but is " in found.reason
    assert posing.call(address_of("server-a"), 8080) == "ECONNREFUSED"
    real = machine.start("kubelet", "system.slice/real.service")
    assert machine.find().pid == real.pid
    assert real.call(address_of("server-a"), 8080) == "probe"
    assert posing.call(address_of("server-a"), 8080) == "ECONNREFUSED"


def test_a_process_of_the_node_without_rights_is_not_the_kubelet(machine: Machine) -> None:
    drop = ("setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", "--reuid", "65534", "--clear-groups", "--")
    posing = machine.start("kubelet", wrapper=drop)
    assert f"process {posing.pid} is called kubelet, but lacks CAP_SYS_ADMIN, without which no kubelet works" in machine.find().reason


def test_an_address_of_the_node_is_not_what_lets_in(node: DataNode, machine: Machine) -> None:
    """A pod that takes the node's own address is not believed: its calls come from another namespace."""
    node.enforce(strict())
    program = machine.start("kubelet")
    machine.find()
    assert program.call(address_of("server-a"), 8080) == "probe"
    gateway = node.lab.topology.nodes[0].gateways[0]
    code = (
        f"import socket,errno\ns=socket.socket(); s.settimeout(1); s.bind(('{gateway}',0))\n"
        f"try: s.connect(('{address_of('server-a')}',8080)); print('in')\n"
        "except TimeoutError: print('timeout')\n"
        "except OSError as e: print(errno.errorcode[e.errno])\n"
    )
    node.lab.exec("stranger", ["ip", "address", "add", f"{gateway}/32", "dev", "lo"], check=True)
    try:
        with node.events() as events:
            assert node.lab.exec("stranger", ["python3", "-c", code]).stdout.strip() != "in"
        assert {Reason(e.reason) for e in events} == {Reason.PLAINTEXT}
    finally:
        node.lab.exec("stranger", ["ip", "address", "del", f"{gateway}/32", "dev", "lo"], check=True)


def test_a_kubelet_of_another_node_and_datagrams_gain_nothing(node: DataNode, machine: Machine) -> None:
    node.enforce(strict())
    far = machine.start("kubelet", space=paths.place_netns(node.lab.topology.nodes[1]))
    near = machine.start("kubelet")
    assert machine.find().pid == near.pid
    assert far.call(address_of("server-a"), 8080) == "ECONNREFUSED"
    with node.events() as events:
        assert near.call(address_of("server-a"), 8080, "udp") == "sent"
    assert {(Reason(e.reason), e.protocol) for e in events} == {(Reason.PLAINTEXT, "UDP")}


def test_a_cgroup_that_an_operator_names_counts_by_itself_and_none_below_it(node: DataNode, machine: Machine) -> None:
    node.enforce(strict())
    service, nested = machine.start("anything"), machine.start("anything", "system.slice/kubelet.service/below")
    own = Path(f"/proc/{machine.holder.pid}")
    found = Finder(node.config.cgroup, given=service.place, node=own).find()
    assert (found.process, found.reason) == (kubelet.ANY, "")
    machine.recognise(found)
    assert service.call(address_of("server-a"), 8080) == "probe"
    assert nested.call(address_of("server-a"), 8080) == "ECONNREFUSED"


def test_probes_are_counted_under_their_own_reason(node: DataNode, machine: Machine) -> None:
    node.enforce(strict(CLOSED))
    program = machine.start("kubelet")
    machine.find()
    before, calls = node.stats(CALLER, "default/server-a", Direction.OUTBOUND)["closed"], 23
    answers = {program.call(address_of("server-a"), 8080) for _ in range(calls)}
    assert answers == {"probe"}
    table = node.datapath.maps["mesh_verdicts"]
    keys = [table.layout.key.unpack(key) for key, _ in table.items()]
    probes = [k for k in keys if k["reason"] == Reason.PROBE and node.ids.name(k["target"]) == "default/server-a"]
    assert {(node.ids.name(k["source"]), k["verdict"], k["direction"], k["rule"]) for k in probes} == {
        (CALLER, Verdict.ALLOW, Direction.INBOUND, 0)
    }
    assert node.stats(CALLER, "default/server-a", Direction.OUTBOUND)["closed"] - before == calls
    assert node.stats(CALLER, "default/server-a", Direction.INBOUND)["opened"] >= calls


def test_what_the_receiver_hears_of_a_probe_vouches_for_nobody(node: DataNode, machine: Machine) -> None:
    """A row with a namespace stands for a caller of the mesh: were the port probed no more when it is read, STRICT would let it in."""
    node.enforce(strict(ports=(8082,)))
    program = machine.start("kubelet")
    machine.find()
    table = node.datapath.maps["mesh_flow"]

    heard: set[tuple[int, str]] = set()

    def look() -> bool:
        rows = [(table.layout.key.unpack(key), table.layout.value.unpack(values[0])) for key, values in table.items()]
        heard.update((row["netns_cookie"], node.ids.name(row["workload"])) for key, row in rows if key["destination_port"] == 8082)
        return bool(heard)

    full = "import socket,time; s=socket.socket(); s.bind(('',8082)); s.listen(0); print('ready',flush=True); time.sleep(60)"
    with node.program("server-a", ["python3", "-c", full]):
        # Nobody accepts: when the queue is full a SYN waits, and with it what was written for the receiver.
        for _ in range(3):
            program.tell(address_of("server-a"), 8082)
        assert until(look, 15)
    assert heard == {(0, CALLER)}


def test_a_trace_shows_a_probe_hop_by_hop(node: DataNode, machine: Machine) -> None:
    node.enforce(strict(CLOSED))
    program = machine.start("kubelet")
    machine.find()
    table = node.datapath.maps["mesh_trace"]
    numbers = {"source": node.ids.number("workload", CALLER), "target": node.ids.number("workload", "default/server-a")}
    table.put(table.layout.key.pack(**numbers), table.layout.value.pack(**{"": 1}))
    waypoint = node.config.waypoint_cgroup.stat().st_ino
    node.datapath.configure(waypoint_cgroup_id=waypoint, tracing=1)
    watch = Watch(Pair(CALLER, "", frozenset({"default/server-a"})), NODE)
    try:
        with node.events() as events:
            assert program.call(address_of("server-a"), 8080) == "probe"
            assert until(lambda: node.stats(CALLER, "default/server-a", Direction.INBOUND)["closed"] > 0)
        for event in events:
            watch.on_event(event)
    finally:
        node.datapath.configure(waypoint_cgroup_id=waypoint, tracing=0)
        table.prune(set())
    seen = watch.found.get_nowait()
    assert isinstance(seen, Seen)
    shown = seen.connection
    assert (shown.source, shown.destination, shown.outcome) == (CALLER, "default/server-a", "closed")
    assert [hop.at for hop in shown.hops] == ["connect", "handshake", "inbound", "close"]
    assert {key: shown.hops[0].detail[key] for key in ("verdict", "probe", "pid", "command")} == {
        "verdict": "allow",
        "probe": "of the kubelet",
        "pid": program.pid,
        "command": "kubelet",
    }


def test_in_another_pid_namespace_the_kubelet_must_have_its_cgroup_to_itself(
    node: DataNode, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the kernel's numbers of processes are not those that the agent sees."""
    monkeypatch.setattr(kubelet, "_FIRST_PID_NAMESPACE", 1)
    node.enforce(strict())
    program = machine.start("kubelet")
    assert machine.find().process == kubelet.ANY
    assert program.call(address_of("server-a"), 8080) == "probe"
    other = machine.start("helper")
    assert f"shares its cgroup {program.place} with others" in machine.find().reason
    for one in (program, other):
        assert one.call(address_of("server-a"), 8080) == "ECONNREFUSED"


def test_a_port_that_is_probed_no_more_is_refused(node: DataNode, machine: Machine) -> None:
    node.enforce(strict())
    program = machine.start("kubelet")
    machine.find()
    assert program.call(address_of("server-a"), 8080) == "probe"
    node.enforce(strict(ports=(8081,)))
    node.enrolment.tables.remove_retired()  # the supervisor does it every two seconds
    assert [program.call(address_of("server-a"), port) for port in (8080, 8081)] == ["ECONNREFUSED", "probe"]
    node.enforce(strict(ports=()))
    assert program.call(address_of("server-a"), 8081) == "ECONNREFUSED"


def test_a_kubelet_that_is_started_anew_is_followed(node: DataNode, machine: Machine) -> None:
    """In another cgroup of the same name, with another number: as a service manager does it."""
    node.enforce(strict())
    address = address_of("server-a")

    async def follow() -> None:
        told = asyncio.Queue[kubelet.Kubelet]()
        loop = asyncio.get_running_loop()

        def recognise(found: kubelet.Kubelet) -> None:
            machine.recognise(found)
            loop.call_soon_threadsafe(told.put_nowait, found)

        follower = Follower(machine.finder, recognise)
        first = await asyncio.to_thread(machine.start, "kubelet")
        inode = first.place.stat().st_ino
        task = asyncio.create_task(follower.run())
        try:
            assert (await asyncio.wait_for(told.get(), 5)).pid == first.pid
            assert await asyncio.to_thread(first.call, address, 8080) == "probe"
            first.end()
            assert (await asyncio.wait_for(told.get(), 1)).cgroup == 0  # at once: not by looking now and then
            cgroup.remove(first.place)
            second = await asyncio.to_thread(machine.start, "kubelet")
            found = await asyncio.wait_for(told.get(), 2)
            assert (found.pid, found.cgroup) == (second.pid, second.place.stat().st_ino)
            assert found.cgroup != inode
            assert await asyncio.to_thread(second.call, address, 8080) == "probe"
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    asyncio.run(follow())
