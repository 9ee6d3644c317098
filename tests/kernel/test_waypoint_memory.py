"""Envoy under a limit of its cgroup, where cgroup2 has the memory controller: it sheds load before the kernel has to end it, and comes back when it did.

On a machine with the hybrid layout the controller belongs to cgroup v1. Guests of `make test-kernels` have the other one:
`make test-kernels KERNELS=6.1 ARGS="--suite more --pytest '-k waypoint_memory'"`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from agent.l7 import memory
from agent.l7.envoy import Envoy
from lab import cgroup
from tests.kernel import shop
from tests.ports import free_ports
from tests.unit.agent.l7 import harness
from tests.unit.agent.l7.test_fairness import HOSTS, ask, resources, scene

pytestmark = pytest.mark.kernel

LIMIT = 192 << 20
PIECE = bytes(64 << 10)


@pytest.fixture
def own() -> Iterator[Path]:
    """A cgroup whose children may have limits."""
    top = cgroup.mount_point()
    if "memory" not in (top / "cgroup.controllers").read_text().split():
        pytest.skip(f"no memory controller in {top}")
    (top / "mesh-memory").mkdir()
    given = (top, top / "mesh-memory")
    before = "memory" in (top / "cgroup.subtree_control").read_text().split()
    for place in given:
        (place / "cgroup.subtree_control").write_text("+memory")
    try:
        yield given[-1]
    finally:
        cgroup.kill(given[-1])
        for place in (given[-1] / "meshagent-waypoint", given[-1]):
            with contextlib.suppress(FileNotFoundError):
                place.rmdir()
        if not before:
            (top / "cgroup.subtree_control").write_text("-memory")


def supervised(own: Path, directory: Path, port: int, target: int, work: Callable[[Envoy], Awaitable[None]]) -> None:
    """Run `work` beside an Envoy with the limit, through which two callers reach the server at `target`."""

    async def scenario() -> None:
        settings = harness.config(directory, envoy_memory=LIMIT)
        object.__setattr__(settings, "cgroup", own)
        object.__setattr__(settings, "waypoint_cgroup", own / "meshagent-waypoint")
        async with harness.waypoint(settings) as (server, envoy):
            await harness.applied(server, resources(scene(port, target), port))
            await work(envoy)

    asyncio.run(scenario())


@pytest.fixture
def files() -> Iterator[None]:
    """Room for as many connections as there are in a flood, both ends in this process."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextlib.contextmanager
def streaming() -> Iterator[int]:
    """A server that answers `/` at once, and anything else with more than anybody reads; returns its port."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            asked = connection.recv(65536)
            if asked.startswith(b"GET / "):
                connection.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                return
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n")
            while True:
                connection.sendall(PIECE)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


@pytest.mark.usefixtures("files")
def test_an_envoy_has_its_limit_and_sheds_load_before_the_kernel_ends_it(own: Path, tmp_path: Path) -> None:
    """Callers that ask for much and read nothing fill its buffers, and those of its sockets."""
    [port] = free_ports(1)
    waypoint = own / "meshagent-waypoint"

    async def work(envoy: Envoy) -> None:
        assert (waypoint / "memory.max").read_text().strip() == str(LIMIT)
        monitors = json.loads((tmp_path / "envoy-bootstrap.json").read_text())["overload_manager"]["resource_monitors"]
        assert monitors[0]["typed_config"]["max_heap_size_bytes"] == LIMIT * 3 // 4
        pid = envoy.state.pid
        assert await asyncio.to_thread(ask, "quiet", port) == 200
        with contextlib.ExitStack() as held:
            most = await asyncio.to_thread(flood, held, port, waypoint)
            kinds = dict(line.split() for line in (waypoint / "memory.stat").read_text().splitlines())
            told = ", ".join(f"{name} {int(kinds[name]) >> 20}" for name in ("anon", "file", "sock", "slab"))
            print(f"cgroup at most {most >> 20} MiB of {LIMIT >> 20}; at the end {told}")
            assert most > LIMIT // 2, "there was a flood"
        assert memory.killed(waypoint) == 0
        assert envoy.state.pid == pid
        await asyncio.to_thread(shop.takes, lambda: answered(port), 60)

    with streaming() as target:
        supervised(own, tmp_path, port, target, work)


def flood(held: contextlib.ExitStack, port: int, waypoint: Path) -> int:
    """Open connections that nobody reads from; returns the most that the cgroup had, in bytes."""
    most = 0
    for _ in range(200):
        with contextlib.suppress(OSError):
            one = held.enter_context(socket.create_connection((HOSTS["loud"], port), timeout=5))
            one.sendall(b"GET /much HTTP/1.1\r\nhost: s\r\n\r\n")
        most = max(most, int((waypoint / "memory.current").read_text()))
    return most


def test_an_envoy_that_the_kernel_ended_for_want_of_memory_is_started_again_and_the_log_says_why(
    own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    [port] = free_ports(1)
    waypoint = own / "meshagent-waypoint"

    async def work(envoy: Envoy) -> None:
        first = envoy.state.pid
        assert await asyncio.to_thread(ask, "quiet", port) == 200
        # Below what it needs at all: the kernel reclaims what it can, and then ends it (cgroup-v2.rst, "memory.max").
        await asyncio.to_thread((waypoint / "memory.max").write_text, str(8 << 20))
        began = time.monotonic()
        await asyncio.to_thread(shop.takes, lambda: envoy.state.pid not in {first, None} and envoy.state.ready, 60)
        print(f"another is ready {time.monotonic() - began:.1f} s after there was no room for the first")
        assert memory.killed(waypoint) >= 1
        assert (waypoint / "memory.max").read_text().strip() == str(LIMIT), "the next one has its limit again"
        await asyncio.to_thread(shop.takes, lambda: answered(port), 60)

    with caplog.at_level(logging.ERROR), streaming() as target:
        supervised(own, tmp_path, port, target, work)
    assert [one.message for one in caplog.records if "ended envoy" in one.message] != []


def answered(port: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        return ask("quiet", port) == 200
    return False
