"""What the kernel is told about pods that are to be held back, on tables in memory; what it makes of that is in tests/kernel."""

from __future__ import annotations

import asyncio
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from agent import features, supervisor
from agent.config import Config
from agent.holding import Holding
from agent.supervisor import Supervisor
from tests.tasks import beside, until

if TYPE_CHECKING:
    from agent.bpf.maps import Map
    from agent.discovery import Discovery
    from agent.enrolment import Enrolment
    from meshapi.notify import Notifier

UID = "0f6f7d2a-3b1c-4e5d-8a9b-c0d1e2f30415"
NOWHERE = bytes(8)


class Table(dict[bytes, bytes]):
    """A map of the kernel, as far as `Holding` needs one."""

    put = dict.__setitem__

    def items(self) -> Iterator[tuple[bytes, list[bytes]]]:  # type: ignore[override]
        yield from [(key, [value]) for key, value in super().items()]

    def remove(self, keys: Iterable[bytes]) -> int:
        return sum(self.pop(key, None) is not None for key in keys)

    def prune(self, keep: Iterable[bytes]) -> None:
        self.remove([key for key in self if key not in keep])


class Node:
    """A node whose cgroups are directories."""

    def __init__(self, directory: Path) -> None:
        self.cgroup = directory
        self.tables = {name: Table() for name in ("mesh_held", "mesh_kubepods", "mesh_alive")}
        self.holding = Holding(cast("dict[str, Map]", self.tables), directory)

    def kubelet_starts(self) -> None:
        for name in ("burstable", "besteffort"):
            (self.cgroup / "kubepods" / name).mkdir(parents=True)
        self.holding._pods.search()

    @property
    def alive(self) -> int:
        """When the agent said last that it is here, nanoseconds; 0: it is not."""
        (found,) = struct.unpack("=Q", self.tables["mesh_alive"].get(bytes(4), bytes(8)))
        return int(found)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    monkeypatch.setattr(features, "kubernetes_node", lambda: False)
    return Node(tmp_path)


def test_an_agent_is_one_when_it_knows_where_pods_are_and_who_is_in_the_mesh(node: Node) -> None:
    node.kubelet_starts()
    node.holding.beat(served=True)
    assert node.alive == 0  # nobody has looked yet
    node.holding.look_after((), pods=False)
    node.holding.beat(served=True)
    assert node.alive > 0
    node.holding.beat(served=False)
    assert node.alive == 0


def test_no_pods_are_said_to_be_here_only_while_the_controller_knows_of_none(node: Node) -> None:
    node.holding.look_after((), pods=False)
    assert node.tables["mesh_kubepods"].keys() == {NOWHERE}
    node.holding.look_after((UID,), pods=True)
    assert not node.tables["mesh_kubepods"]
    node.kubelet_starts()
    node.holding.look_after((UID,), pods=True)
    assert len(node.tables["mesh_kubepods"]) == 3


def test_threads_that_are_all_taken_make_no_agent_look_dead(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the kernel refuses every pod that is to be in the mesh, and systemd ends the agent."""
    monkeypatch.setattr(supervisor, "BEAT_S", 0.02)
    beats = list[str]()
    agent = Supervisor(Config(node="n", controller="unix:x", run_dir=node.cgroup / "run"))
    agent._enrolment = cast("Enrolment", SimpleNamespace(holding=node.holding, let_go=lambda: None))
    agent._discovery = cast("Discovery", SimpleNamespace(state=SimpleNamespace(connected=True)))
    agent._notifier = cast("Notifier", SimpleNamespace(beat=beats.append))
    free = threading.Event()

    async def scenario() -> None:
        agent._loop = asyncio.get_running_loop()
        agent._loop.set_default_executor(ThreadPoolExecutor(1))
        taken = agent._loop.run_in_executor(None, free.wait)
        try:
            async with beside(agent._heartbeat()), beside(agent._look_after_held()):
                node.kubelet_starts()
                await until(lambda: node.alive)
                assert len(node.tables["mesh_kubepods"]) == 3
                since, before = time.monotonic_ns(), len(beats)
                await until(lambda: node.alive > since and len(beats) > before)
                monkeypatch.setattr(node.holding, "look_after", lambda *_, **__: free.wait())  # and a walk that takes long
                await asyncio.sleep(0.1)
                since, before = time.monotonic_ns(), len(beats)
                await until(lambda: node.alive > since and len(beats) > before)
                free.set()
        finally:
            free.set()
            await taken

    asyncio.run(scenario())
