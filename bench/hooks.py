"""`make bench-hooks`: what one run of each kernel program takes, counted by the kernel itself (kernel.bpf_stats_enabled).

The kernel reads a clock before and after each run and adds the difference (kernel/bpf/trampoline.c and include/linux/filter.h, __bpf_prog_run); reading it
is part of what it finds. `hook-empty` is that of a program that only allows, `hook-record` that of one that only makes a socket storage as large as ours
(bench.floor), attached for these runs to a cgroup that no program of the mesh serves: the floors on this machine. Nothing is subtracted. A value is the
mean over the runs of one round: every connection of a round is new, and so are its sockets.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from agent.bpf import libbpf
from agent.bpf.manifest import PROGRAMS
from bench import floor
from bench.main import run
from bench.result import Result, Target, rounds
from bench.testbed import CALLER, NODE, ONE_NODE, PLAIN_CALLER, PLAIN_SERVER, SERVER, VIP, Testbed, seat, testbed
from lab import cgroup, netns, paths
from lab.errors import LabError
from lab.process import Seat

PORT = 8080
ROUNDS = 7
CONNECTIONS, DATAGRAMS = 500, 3000
SWITCH = Path("/proc/sys/kernel/bpf_stats_enabled")
WITHIN = Target(1.0, at_least=False)
_INFO_BYTES = 256
_RUNS = struct.Struct("=192xQQ")  # struct bpf_prog_info in include/uapi/linux/bpf.h: run_time_ns, run_cnt
_SERVE = """
import socket, sys
port = int(sys.argv[1])
drain = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
drain.bind(("", port))
with socket.create_server(("", port), backlog=64) as server:
    while True:
        with server.accept()[0] as connection:
            connection.recv(1)
"""
_CONNECT = """
import socket, sys
for _ in range(int(sys.argv[3])):
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5).close()
"""
_SEND = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
    for _ in range(int(sys.argv[3])):
        sender.sendto(b"x", (sys.argv[1], int(sys.argv[2])))
"""
DOCUMENTS = (
    {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "server"},
        "spec": {
            "clusterIPs": [VIP],
            "selector": {"app": "server"},
            "ports": [{"name": "tcp", "port": PORT}, {"name": "udp", "port": PORT, "protocol": "UDP"}],
        },
    },
    {
        "apiVersion": "meshagent.io/v1alpha1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "server-callers"},
        "spec": {
            "selector": {"matchLabels": {"app": "server"}},
            "action": "ALLOW",
            "rules": [
                {"from": [{"source": {"serviceAccounts": ["default/caller"]}}], "to": [{"operation": {"ports": [str(PORT)]}}]},
            ],
        },
    },
)
"""L4 only: the whole decision is the kernel's."""
Stats = Mapping[str, tuple[int, int]]
"""(nanoseconds, runs) by program."""


@dataclass(frozen=True, slots=True)
class Case:
    """Something that a process does again and again."""

    name: str
    seat: Seat
    address: str
    code: str = _CONNECT
    times: int = CONNECTIONS


@dataclass(frozen=True, slots=True)
class Question:
    """One number that a case answers: what a run of a program takes in it. `bound_ns` 0: compared with the empty program."""

    name: str
    case: str
    program: str
    bound_ns: float = 0.0


QUESTIONS = (
    Question("connect-service", "service", "mesh_connect4", 1000.0),
    Question("connect-direct", "direct", "mesh_connect4", 1000.0),
    Question("connect-outside", "outside", "mesh_connect4", 1000.0),
    Question("connect-loopback", "loopback", "mesh_connect4", 1000.0),
    Question("connect-unenrolled", "unenrolled", "mesh_connect4", 150.0),
    Question("sockops-service", "service", "mesh_sockops", 600.0),
    Question("sockops-direct", "direct", "mesh_sockops", 600.0),
    Question("sockops-outside", "outside", "mesh_sockops", 600.0),
    Question("sockops-loopback", "loopback", "mesh_sockops", 600.0),
    Question("sockops-unenrolled", "unenrolled", "mesh_sockops", 600.0),
    Question("sk-lookup-service", "service", "mesh_sk_lookup"),
    Question("sk-lookup-loopback", "loopback", "mesh_sk_lookup"),
    Question("sk-lookup-udp", "udp", "mesh_sk_lookup"),
    Question("sendmsg-service", "udp", "mesh_sendmsg4"),
)


def measure(progress: Callable[[str], None]) -> list[Result]:
    """Bring the lab up and let every case take its turn."""
    with testbed(DOCUMENTS, progress, ONE_NODE) as bed, floor.attached(seat(PLAIN_CALLER).cgroup, _record_bytes()) as least, counting():
        for pod in (SERVER, PLAIN_SERVER):
            bed.start(f"serve-{pod.name}", pod, bed.cpus.far, ["python3", "-c", _SERVE, str(PORT)], PORT)
        cases = _cases()
        fds = {**_programs(), **least}
        try:
            found = rounds({case.name: partial(_once, bed, case, fds) for case in cases}, ROUNDS, progress)
        finally:
            for name in fds.keys() - least.keys():
                os.close(fds[name])
        where = f"client on CPU {bed.cpus.near}, server on CPU {bed.cpus.far}; SCHED_RR, CPUs kept awake"
    by_case = {case.name: case for case in cases}
    empty = [one[floor.EMPTY][floor.EMPTY] for one in found]
    record = [one[floor.EMPTY][floor.RECORD] for one in found]
    text = f"mean of {CONNECTIONS} runs; {where}"
    results = [
        Result("hook-empty", "ns", "one ns", tuple((value, 1.0) for value in empty), f"the floor; {text}"),
        Result(
            "hook-record",
            "ns",
            "empty program",
            tuple(zip(record, empty, strict=True)),
            f"the floor of a connect() that leaves a record on its socket; {text}",
        ),
    ]
    for question in QUESTIONS:
        try:
            ours = [one[question.case][question.program] for one in found]
        except KeyError:
            raise LabError(f"{question.program} did not run in the case {question.case}") from None
        bound = question.bound_ns
        values = [(value, bound or least) for value, least in zip(ours, empty, strict=True)]
        text = f"closed loop, one at a time; mean over {by_case[question.case].times} operations; {where}"
        results.append(
            Result(f"hook-{question.name}", "ns", "target" if bound else "empty program", tuple(values), text, WITHIN if bound else None)
        )
    return results


def _cases() -> list[Case]:
    caller, server, address = seat(CALLER), seat(SERVER), SERVER.addresses[0]
    # In the node's cgroup, so that the programs run, but in a namespace that is no workload's.
    stranger = Seat(cgroup.create(paths.node_cgroup(NODE) / "unenrolled"), netns.path(paths.place_netns(PLAIN_CALLER)))
    return [
        Case("service", caller, VIP),
        Case("direct", caller, address),
        Case("outside", caller, PLAIN_SERVER.addresses[0]),
        Case("loopback", server, "127.0.0.1"),
        Case("unenrolled", stranger, PLAIN_SERVER.addresses[0]),
        Case("udp", caller, VIP, _SEND, DATAGRAMS),
        Case(floor.EMPTY, seat(PLAIN_CALLER), PLAIN_SERVER.addresses[0]),
    ]


def _once(bed: Testbed, case: Case, fds: Mapping[str, int]) -> dict[str, float]:
    before = _stats(fds)
    bed.run_in(case.seat, bed.cpus.near, ["python3", "-c", case.code, case.address, str(PORT), str(case.times)])
    return means(before, _stats(fds), case.times // 2)


def means(before: Stats, after: Stats, least: int) -> dict[str, float]:
    """Nanoseconds a run between two looks, by program; one that has run less often than `least` ran by chance."""
    runs = {name: after[name][1] - before[name][1] for name in after}
    return {name: (after[name][0] - before[name][0]) / number for name, number in runs.items() if number >= least}


def _record_bytes() -> int:
    """Size of what the mesh leaves on a socket."""
    descriptor = libbpf.open_pin(next(paths.agent_pins(NODE).glob("maps-*/mesh_sock")))
    try:
        return libbpf.map_info(descriptor)[2]
    finally:
        os.close(descriptor)


def _programs() -> dict[str, int]:
    """Descriptors of the pinned programs."""
    directories = list(paths.agent_pins(NODE).glob("programs-*"))
    if len(directories) != 1:
        raise LabError(f"the agent has pinned {len(directories)} sets of programs")
    return {program.name: libbpf.open_pin(directories[0] / program.name) for program in PROGRAMS}


def _stats(fds: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    found = {}
    for name, fd in fds.items():
        nanoseconds, runs = _RUNS.unpack_from(libbpf.object_info(fd, _INFO_BYTES))
        found[name] = (int(nanoseconds), int(runs))
    return found


@contextmanager
def counting() -> Iterator[None]:
    """Have the kernel count, and leave the switch as it was."""
    before = SWITCH.read_text()
    SWITCH.write_text("1")
    try:
        yield
    finally:
        SWITCH.write_text(before)


if __name__ == "__main__":
    sys.exit(run(measure))
