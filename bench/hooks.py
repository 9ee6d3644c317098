"""`make bench-hooks`: what one run of each kernel program takes, counted by the kernel itself (kernel.bpf_stats_enabled).

The kernel reads a clock before and after each run and adds the difference (kernel/bpf/trampoline.c and include/linux/filter.h, __bpf_prog_run); reading it
is part of what it finds. `hook-empty` is that of a program that only allows, attached for these runs to a cgroup that no program of the mesh serves: the
floor on this machine. Nothing is subtracted. A value is the mean over the runs of one round: every connection of a round is new, and so are its sockets.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
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
from bench.main import run
from bench.result import Result, Target, rounds
from bench.testbed import CALLER, NODE, PLAIN_CALLER, PLAIN_SERVER, SERVER, VIP, Testbed, seat, testbed
from lab import cgroup, netns, paths
from lab.errors import LabError
from lab.process import Seat

PORT = 8080
ROUNDS = 7
CONNECTIONS, DATAGRAMS = 500, 3000
SWITCH = Path("/proc/sys/kernel/bpf_stats_enabled")
EMPTY = "empty"
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
    with testbed(DOCUMENTS, progress) as bed, _empty_program(seat(PLAIN_CALLER).cgroup) as empty, counting():
        for pod in (SERVER, PLAIN_SERVER):
            bed.start(f"serve-{pod.name}", pod, bed.cpus.far, ["python3", "-c", _SERVE, str(PORT)], PORT)
        cases = _cases()
        fds = {**_programs(), EMPTY: empty}
        try:
            found = rounds({case.name: partial(_once, bed, case, fds) for case in cases}, ROUNDS, progress)
        finally:
            for name in fds.keys() - {EMPTY}:
                os.close(fds[name])
        where = f"client on CPU {bed.cpus.near}, server on CPU {bed.cpus.far}; SCHED_RR, CPUs kept awake"
    by_case = {case.name: case for case in cases}
    floor = [one[EMPTY][EMPTY] for one in found]
    results = [
        Result("hook-empty", "ns", "one ns", tuple((value, 1.0) for value in floor), f"the floor; mean of {CONNECTIONS} runs; {where}")
    ]
    for question in QUESTIONS:
        try:
            ours = [one[question.case][question.program] for one in found]
        except KeyError:
            raise LabError(f"{question.program} did not run in the case {question.case}") from None
        bound = question.bound_ns
        values = [(value, bound or least) for value, least in zip(ours, floor, strict=True)]
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
        Case(EMPTY, seat(PLAIN_CALLER), PLAIN_SERVER.addresses[0]),
    ]


def _once(bed: Testbed, case: Case, fds: Mapping[str, int]) -> dict[str, float]:
    before = _stats(fds)
    bed.run_in(case.seat, bed.cpus.near, ["python3", "-c", case.code, case.address, str(PORT), str(case.times)])
    return means(before, _stats(fds), case.times // 2)


def means(before: Stats, after: Stats, least: int) -> dict[str, float]:
    """Nanoseconds a run between two looks, by program; one that has run less often than `least` ran by chance."""
    runs = {name: after[name][1] - before[name][1] for name in after}
    return {name: (after[name][0] - before[name][0]) / number for name, number in runs.items() if number >= least}


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


class _LoadOptions(ct.Structure):
    """The beginning of struct bpf_prog_load_opts (tools/lib/bpf/bpf.h)."""

    _fields_ = (("sz", ct.c_size_t), ("attempts", ct.c_int), ("expected_attach_type", ct.c_int))


@contextmanager
def _empty_program(place: Path) -> Iterator[int]:
    """Attach a program that allows every connect() below a cgroup; yields its descriptor. Nothing pins it: it goes with the last descriptor."""
    attach_type = "cgroup_inet4_connect"
    kind = next(program.type_number for program in PROGRAMS if program.attach_type == attach_type)
    code = struct.pack("=BBhi", 0xB7, 0, 0, 1) + struct.pack("=BBhi", 0x95, 0, 0, 0)  # r0 = 1; exit
    options = _LoadOptions(ct.sizeof(_LoadOptions), 0, libbpf.ATTACH_TYPES[attach_type])
    library = ct.CDLL("libbpf.so.1", use_errno=True)
    with contextlib.ExitStack() as stack:
        program = library.bpf_prog_load(kind, b"empty", b"GPL", code, ct.c_size_t(2), ct.byref(options))
        if program < 0:
            raise LabError(f"the kernel refuses an empty program: {os.strerror(ct.get_errno())}")
        stack.callback(os.close, program)
        directory = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, directory)
        stack.callback(os.close, libbpf.link_create(program, directory, attach_type))
        yield program


if __name__ == "__main__":
    sys.exit(run(measure))
