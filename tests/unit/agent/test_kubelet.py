"""Where the kubelet may be, and how it is followed. Real processes, namespaces and calls are in tests/kernel/test_probes.py."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from agent import kubelet, netns
from agent.kubelet import ANY, NOBODY, Finder, Follower, Kubelet
from agent.model import Workload
from agent.pods import birth


@pytest.fixture(autouse=True)
def _cookie(monkeypatch: pytest.MonkeyPatch) -> None:
    """A namespace's cookie takes root to read."""
    monkeypatch.setattr(netns, "cookie", lambda _: 4711)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        pytest.param(".", "holds whatever nobody put elsewhere", id="the-root"),
        pytest.param("..", "holds whatever nobody put elsewhere", id="above-the-root"),
        pytest.param("../elsewhere", "is not below", id="elsewhere"),
        pytest.param("kubepods.slice", "is that of pods", id="kubepods"),
        pytest.param("kubelet/kubepods/besteffort/pod1", "is that of pods", id="a-pod"),
        pytest.param("system.slice/link", "is that of pods", id="a-link-to-a-pod"),
        pytest.param("system.slice/gone.service", "does not exist", id="gone"),
    ],
)
def test_a_cgroup_that_would_let_in_others_is_refused_with_its_reason(tmp_path: Path, given: str, words: str) -> None:
    root = tmp_path / "cgroup"
    for name in ("kubepods.slice", "kubelet/kubepods/besteffort/pod1", "system.slice", "../elsewhere"):
        (root / name).mkdir(parents=True)
    (root / "system.slice/link").symlink_to(root / "kubepods.slice")
    found = Finder(root, given=root / given).find()
    assert (found.cgroup, found.process) == (0, 0)
    assert f"--kubelet-cgroup {root / given} {words}" in found.reason


def test_a_cgroup_that_an_operator_names_is_all_that_is_asked(tmp_path: Path) -> None:
    service = tmp_path / "system.slice/kubelet.service"
    service.mkdir(parents=True)
    assert Finder(tmp_path, given=service).find() == Kubelet(ANY, service.stat().st_ino, 4711, directory=str(service))


def test_a_machine_without_a_kubelet_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubelet, "NAMES", frozenset({"no such name"}))
    assert Finder(tmp_path).find() == Kubelet(reason="no process of this node is called no such name; --kubelet-cgroup names its cgroup")


class Told:
    """A finder that finds what it is told, and what the follower made of it."""

    def __init__(self) -> None:
        self.now = NOBODY
        self.asked = 0
        self.recognised: list[Kubelet] = []
        self.follower = Follower(self, self.recognised.append)  # type: ignore[arg-type]

    def find(self, _: Kubelet = NOBODY) -> Kubelet:
        self.asked += 1
        return self.now

    async def following(self, script: Callable[[], None]) -> None:
        task = asyncio.create_task(self.follower.run())
        try:
            await asyncio.sleep(0.1)
            await asyncio.to_thread(script)
            await asyncio.sleep(0.2)
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def test_nobody_is_recognised_from_the_start_on_where_there_is_nobody() -> None:
    """The kernel may still hold what an agent before this one found."""
    told = Told()
    told.follower.look()
    told.follower.look()
    assert told.recognised == [NOBODY]


@pytest.mark.parametrize(
    ("found", "ports", "enrolled", "told"),
    [
        pytest.param(Kubelet(reason="why"), (8080,), True, True, id="a-probed-pod"),
        pytest.param(Kubelet(reason="why"), (), True, False, id="nobody-is-probed"),
        pytest.param(Kubelet(reason="why"), (8080,), False, False, id="not-in-the-mesh"),
        pytest.param(Kubelet(ANY, 1, 4711), (8080,), True, False, id="found"),
    ],
)
def test_a_kubelet_that_is_not_found_is_a_problem_where_pods_are_probed(
    found: Kubelet, ports: tuple[int, ...], enrolled: bool, told: bool
) -> None:
    follower = Told()
    follower.now = found
    follower.follower.look()
    pod = Workload("d/a", "a", "n", {}, (), "", enrolled, ready=True, probe_ports=ports)
    words = ["the kubelet is not recognised, and what protects pods refuses its probes: why"]
    assert follower.follower.problems([pod]) == (words if told else [])


def test_the_end_of_the_process_is_told_at_once_and_then_another_is_looked_for_soon(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    told = Told()
    with subprocess.Popen(["sleep", "1000"]) as process:
        told.now = Kubelet(process.pid, 1, 4711, process.pid, birth(process.pid) or 0, "/nowhere/kubelet.service")

        def end() -> None:
            told.now = Kubelet(reason="gone")
            process.kill()
            process.wait()

        asyncio.run(told.following(end))
    assert [found.cgroup for found in told.recognised] == [1, 0]
    assert [record.message for record in caplog.records if record.name == kubelet.__name__] == [
        "the kubelet is recognised",
        "the kubelet has ended: until another runs nobody's calls are probes",
    ]
    assert told.asked <= 4, "it is not asked again and again"


def test_a_kubelet_that_moves_to_another_cgroup_is_recognised_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubelet, "RECHECK_S", 0.05)
    told = Told()
    with subprocess.Popen(["sleep", "1000"]) as process:
        began = birth(process.pid) or 0
        told.now = Kubelet(process.pid, 1, 4711, process.pid, began, "/nowhere/kubelet.service")

        def move() -> None:
            told.now = Kubelet(process.pid, 2, 4711, process.pid, began, "/nowhere/elsewhere")

        asyncio.run(told.following(move))
        process.kill()
    assert [found.cgroup for found in told.recognised] == [1, 2]


def test_its_cgroup_is_watched_for_so_that_the_next_one_is_found_soon(tmp_path: Path) -> None:
    told = Told()
    place = tmp_path / "kubelet.service"
    told.now = Kubelet(directory=str(place), reason="gone")

    def come() -> None:
        told.now = Kubelet(ANY, 1, 4711, directory=str(place))
        place.mkdir()

    asyncio.run(told.following(come))
    assert [found.cgroup for found in told.recognised] == [0, 1]
