"""Socket acceleration on this kernel: the self-test, the bytes, the kernel log. MESH_STRESS_BYTES=10e9 makes the stress a full one."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent import features, files
from agent.bpf import acceleration, libbpf, source
from agent.bpf.datapath import run_loader
from agent.bpf.manifest import Direction
from lab import cgroup, mounts
from tests.kernel import datanode, programs
from tests.kernel.datanode import until

ROOT = Path(__file__).resolve().parents[2]
STRESS_BYTES = float(os.environ.get("MESH_STRESS_BYTES", "1e9"))
CONNECTIONS = 1000
COMPLAINT = re.compile(
    r"BUG|WARNING|Oops|general protection|refcount|lockdep|deadlock|stall|hung task|KASAN|use-after-free|sk_psock|sock_map"
)
NEVER = ("splice-from", "close-unread")
"""What no kernel known to us does for accelerated sockets; the day one of them passes, read the kernel's news."""

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def pins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A BPF file system of our own with maps and programs, mesh_sk_msg attached."""
    directory = tmp_path_factory.mktemp("bpf")
    mounts.mount_bpffs(directory)
    try:
        load(directory)
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def load(directory: Path) -> None:
    job = source.Job(
        maps=str(directory / "maps"),
        programs=str(directory / "programs"),
        bridge=str(directory / "bridge"),
        manifest=str(directory.with_suffix(".json")),
        flags=list(features.compile_flags()),
        capacities={},
    )
    asyncio.run(run_loader(job, directory.with_suffix(".log")))
    acceleration.attach(directory / "programs", directory / "maps")


@pytest.fixture(autouse=True)
def kernel_log() -> Iterator[None]:
    """The kernel complains about nothing while a test runs."""
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    os.lseek(log, 0, os.SEEK_END)
    yield
    lines = []
    try:
        while True:
            lines.append(os.read(log, 8192).decode(errors="replace"))
    except (BlockingIOError, BrokenPipeError):
        pass
    finally:
        os.close(log)
    assert [line for line in lines if COMPLAINT.search(line)] == []


def rows(pins: Path, name: str, key_size: int, value_size: int) -> int:
    with files.closing(libbpf.open_pin(pins / "maps" / name)) as fd:
        return len(list(libbpf.items(fd, key_size, value_size)))


def agreements(pins: Path) -> tuple[int, int]:
    """Rows of mesh_offer and mesh_pair: nothing may stay behind a connection."""
    return rows(pins, "mesh_offer", 36, 24), rows(pins, "mesh_pair", 16, 24)


def script(code: str) -> list[str]:
    """Arguments of a Python that runs `code` within a `bed`; its own cgroup comes next."""
    head = "import os, socket, subprocess, sys, threading, time\nfrom pathlib import Path\nfrom agent.bpf import acceleration\n"
    return [
        sys.executable,
        "-c",
        f"{head}with acceleration.bed(Path(sys.argv[1])) as bed:\n{textwrap.indent(textwrap.dedent(code), '    ')}",
    ]


def in_place(pins: Path, code: str, *more: str) -> list[str]:
    """Lines that `code` writes, run in a process of its own in which everything is accelerated."""
    with acceleration.place(pins / "programs", cgroup.mount_point()) as own:
        done = subprocess.run([*script(code), str(own), *more], capture_output=True, text=True, check=False, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_self_test_names_each_check_and_leaves_nothing(pins: Path, tmp_path: Path) -> None:
    before = sorted(cgroup.mount_point().iterdir())
    started = time.monotonic()
    checks = acceleration.self_test(pins / "programs", cgroup.mount_point(), tmp_path / "cache.json", "v1")
    took = time.monotonic() - started
    assert tuple(c.name for c in checks) == acceleration.NAMES
    assert all(c.seen for c in checks)
    needed = {"redirect", "byte-order", "half-close", "large-transfer", "epoll-level", "epoll-edge"}
    assert {c.name: c.seen for c in checks if c.name in needed and not c.passed} == {}
    assert set(acceleration.failing(checks)) >= set(NEVER)
    assert took < 3
    assert sorted(cgroup.mount_point().iterdir()) == before
    assert agreements(pins) == (0, 0)


def test_the_result_is_kept_for_this_kernel_and_these_programs(pins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache.json"
    asked: list[list[str]] = []

    def run(argv: list[str]) -> tuple[bytes, str]:
        asked.append(argv)
        return b"", "no"

    monkeypatch.setattr(acceleration, "_run", run)
    for version in ("v1", "v1", "v2"):
        checks = acceleration.self_test(pins / "programs", cgroup.mount_point(), cache, version)
    assert len(asked) == 2
    assert {(c.passed, c.seen) for c in checks} == {(False, "no")}
    cache.write_text('{"kernel": "another"}')
    acceleration.self_test(pins / "programs", cgroup.mount_point(), cache, "v2")
    assert len(asked) == 3


def test_every_check_passes_on_plain_tcp() -> None:
    """Each has a second for what takes milliseconds; on a machine that stands still for so long it is asked again."""
    failed = set(acceleration.NAMES)
    for _ in range(3):
        failed &= {c.name for c in on_plain_tcp() if not c.passed}
    assert failed == set()


def on_plain_tcp() -> list[acceleration.Check]:
    own = cgroup.mount_point() / f"test-plain-{os.getpid()}"
    own.mkdir()
    try:
        argv = [sys.executable, "-m", "agent.bpf.acceleration", str(own), "plain"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT, timeout=30)
    finally:
        acceleration._remove(own)
    checks = [acceleration.Check(**json.loads(line)) for line in done.stdout.splitlines()]
    assert tuple(c.name for c in checks) == acceleration.NAMES, done.stderr
    return checks


def test_a_hanging_check_is_a_failed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "TIME_LIMIT_S", 0.5)
    code = "import json,time;print(json.dumps(dict(name='redirect',passed=True,seen='x')),flush=True);time.sleep(60)"
    checks = acceleration._parse(*acceleration._run([sys.executable, "-c", code]))
    assert checks[0] == acceleration.Check("redirect", passed=True, seen="x")
    assert {(c.passed, c.seen.split()[0]) for c in checks[1:]} == {(False, "no")}


@pytest.mark.timeout(60 + STRESS_BYTES / 50e6)
def test_nothing_is_lost_or_reordered_under_stress(pins: Path) -> None:
    with acceleration.place(pins / "programs", cgroup.mount_point()) as own:
        argv = [sys.executable, "-m", "tests.kernel.accelerated", str(own), str(STRESS_BYTES), str(CONNECTIONS)]
        limit = 30 + STRESS_BYTES / 50e6
        done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT, timeout=limit)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    print(figures)
    assert figures["bytes"] == int(STRESS_BYTES) // CONNECTIONS * CONNECTIONS
    assert figures["wrong_checksums"] == 0
    assert figures["mixed"] == []
    assert (figures["accelerated"], figures["tcp"]) == (CONNECTIONS * 9 // 10, CONNECTIONS // 10)  # each wholly one or the other
    assert agreements(pins) == (0, 0)


def test_a_direction_is_chosen_once_whoever_writes_first(pins: Path) -> None:
    """Many rounds of the check that races writes against the receiver's joining: every way of connecting, each record in its place."""
    code = """
        for _ in range(20):
            print(acceleration._byte_order(bed))
    """
    assert [line.endswith("all in order") for line in in_place(pins, code)] == [True] * 20
    assert agreements(pins) == (0, 0)


def test_redirected_bytes_are_counted_while_both_ends_live(pins: Path) -> None:
    code = """
        with bed.pair() as pair:
            for (sender, reader), size in zip(pair.ends, (1009, 2003)):
                sender.sendall(bytes(size))
                reader.recv(5000)
            sys.stdout.write("ready")
            sys.stdout.flush()
            sys.stdin.read()
    """
    with (
        acceleration.place(pins / "programs", cgroup.mount_point()) as own,
        subprocess.Popen([*script(code), str(own)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.read(5) == b"ready"
        fd = libbpf.open_pin(pins / "maps" / "mesh_pair")
        values = [struct.unpack("=IIQQ", value) for _, value in libbpf.items(fd, 16, 24)]
        os.close(fd)
        child.stdin.close()
    assert values == [(1, 0, 1010, 2004)]  # REDIRECT; each with the byte that `pair` sends first
    assert agreements(pins) == (0, 0)


def test_half_closed_connections_deliver_everything_first(pins: Path) -> None:
    code = """
        for size in (1, 4099, 1 << 20):
            with bed.pair() as pair:
                work = threading.Thread(target=lambda: (pair.caller.sendall(bytes(size)), pair.caller.shutdown(socket.SHUT_WR)))
                work.start()
                got = 0
                while data := pair.receiver.recv(1 << 16):
                    got += len(data)
                work.join()
                pair.receiver.sendall(b"bye")
                print(got == size, pair.caller.recv(9))
    """
    assert in_place(pins, code) == ["True b'bye'"] * 3


def test_connections_go_on_when_every_pin_is_removed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """`meshagent uninstall` meets accelerated connections: not a byte may get lost, and the kernel frees all when they close."""
    code = """
        with bed.pair() as pair:
            pair.caller.sendall(b"before")
            for pin in [*Path(sys.argv[2]).glob("maps/*"), *Path(sys.argv[2]).glob("programs/*")]:
                pin.unlink()
            time.sleep(0.3)
            pair.caller.sendall(b"after")
            data = b""
            while len(data) < 11:
                data += pair.receiver.recv(100)
            print(data, acceleration.over_tcp(pair.receiver))
    """
    directory = tmp_path_factory.mktemp("bpf")
    mounts.mount_bpffs(directory)
    try:
        load(directory)
        number = programs.ids(directory / "maps")["mesh_peers"]
        assert in_place(directory, code, str(directory)) == ["b'beforeafter' 0"]
    finally:
        subprocess.run(["umount", str(directory)], check=True)
    assert until(lambda: number not in map_numbers())


def map_numbers() -> set[int]:
    """Ids of every map that the kernel has."""
    found = subprocess.run(["bpftool", "--json", "map", "list"], capture_output=True, check=True).stdout
    return {one["id"] for one in json.loads(found)}


def test_kernel_tls_is_refused_on_an_accelerated_socket_only(pins: Path) -> None:
    code = """
        def ulp(end):
            try:
                end.setsockopt(socket.IPPROTO_TCP, 31, b"nosuch")  # TCP_ULP
            except OSError as error:
                return error.errno
        with bed.pair() as pair:
            print(ulp(pair.caller), ulp(pair.receiver))
        with bed.call(deferred=True) as plain:
            plain.sendall(b"x")
            print(ulp(plain))
    """
    with acceleration.place(pins / "programs", cgroup.mount_point()) as own:
        program, target = libbpf.open_pin(pins / "programs/mesh_setsockopt"), os.open(own, os.O_RDONLY)
        link = libbpf.link_create(program, target, "cgroup_setsockopt")
        done = subprocess.run([*script(code), str(own)], capture_output=True, text=True, check=False, cwd=ROOT, timeout=30)
        for fd in (link, program, target):
            os.close(fd)
    assert done.stdout.split() == [str(errno.EPERM), str(errno.EPERM), str(errno.ENOENT)], done.stderr


def test_ipv6_and_mixed_families_work_as_ipv4(pins: Path) -> None:
    """The receiver of a dual-stack listener is an IPv6 socket, also when its caller is an IPv4 one."""
    code = """
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        listener = socket.create_server(("::", 1600), family=socket.AF_INET6, dualstack_ipv6=True)
        for address in ("127.0.0.1", "::1"):
            caller = socket.create_connection((address, 1600))
            receiver, _ = listener.accept()
            caller.sendall(b"there")
            receiver.sendall(b"back")
            print(receiver.recv(9), caller.recv(9), acceleration.over_tcp(caller) + acceleration.over_tcp(receiver))
            caller.close()
            receiver.close()
    """
    assert in_place(pins, code) == ["b'there' b'back' 0"] * 2


def test_a_workload_gets_it_only_by_force_where_a_check_fails() -> None:
    with datanode.running() as node:
        pair = [datanode.workload(name) for name in ("caller", "server-a")]
        for wish, accelerated in (("enabled", False), ("force", True)):
            node.enforce(datanode.snapshot(*(replace(w, acceleration=wish) for w in pair)))
            chosen = node.enrolment.acceleration
            assert chosen.chosen == (frozenset({"default/caller", "default/server-a"}) if accelerated else frozenset())
            (problem, *_) = chosen.problems()
            assert ("splice-from" in problem, "in spite of" in problem) == (True, accelerated)
            before = node.stats("default/caller", "default/server-a", Direction.OUTBOUND)
            assert node.connect("caller", datanode.VIP4, 80, size=20_000) == f"ok {datanode.ADDRESSES['server-a'][0]}"
            assert until(
                lambda was=before: node.stats("default/caller", "default/server-a", Direction.OUTBOUND)["closed"] == was["closed"] + 1
            )
            after = node.stats("default/caller", "default/server-a", Direction.OUTBOUND)
            assert after["sent_bytes"] - before["sent_bytes"] == 20_000
            assert (
                0 <= after["received_bytes"] - before["received_bytes"] - 20_000 <= 1
            )  # the peer's FIN: bpf_src/mesh_sockops.c, mesh_payload
