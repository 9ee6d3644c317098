"""What happens to the tunnels of a node when somebody is no longer to be believed: real sockets, a waypoint that says what is to be said."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from agent import asking, distrust
from agent.bpf.manifest import Direction
from agent.bpf.sockets import LiveSocket, Record, Sockets, T
from agent.config import HBONE_PORT, Config
from agent.distrust import Distrust, Waypoint
from agent.errors import KernelRefused, MeshError
from agent.l7.peer_log import Shown
from tests.tasks import beside, until

HERE = "/run/netns/here"
LOCAL = bytes(10) + b"\xff\xff" + bytes((10, 0, 0, 1))


def tunnel(port: int, *, to_hbone: bool = False) -> LiveSocket:
    """One end of a tunnel: at the receiver, or at the caller."""
    ports = (port, HBONE_PORT) if to_hbone else (HBONE_PORT, port)
    ident = ports[0].to_bytes(2, "big") + ports[1].to_bytes(2, "big") + (LOCAL[12:] + bytes(12)) * 2 + bytes(12)
    direction = Direction.FROM_WAYPOINT if to_hbone else Direction.INBOUND
    return LiveSocket(2, 1, ident, 0, 0, 0, 0, Record(0, 1, 0, 0, 0, 0, 0, 0, direction, 0, 0, 6, 0))


class Kernel(Sockets):
    """The connections of one namespace, without the kernel's: which of them are closed."""

    def __init__(self, *found: LiveSocket) -> None:
        self.live = list(found)
        self.closed: list[LiveSocket] = []
        self.fails: OSError | None = None

    def dump(self, namespace: Path) -> Iterator[LiveSocket]:
        if self.fails:
            raise self.fails
        return iter(list(self.live) if str(namespace) == HERE else [])

    def destroy(  # type: ignore[override]
        self, namespace: Path, found: Collection[tuple[LiveSocket, T]]
    ) -> Iterator[tuple[LiveSocket, T]]:
        for one in found:
            assert str(namespace) == HERE
            self.live.remove(one[0])
            self.closed.append(one[0])
            yield one


class Scene:
    """A node with an Envoy that speaks of its tunnels while it is asked."""

    def __init__(self, directory: Path, *found: LiveSocket) -> None:
        self.kernel = Kernel(*found)
        self.asks: list[bool] = []
        self.configured = 0
        self.hears = True
        self.fails: MeshError | None = None
        self.reasons: dict[bytes, str] = {}
        self.judged: list[tuple[bytes, bool]] = []
        waypoint = Waypoint(self.asks.append, lambda: self.hears, self._configure)
        config = Config(node="node-1", controller="unix:/nowhere", run_dir=directory)
        self.distrust = Distrust(config, self.kernel, waypoint, self._doubt, lambda: ["/run/netns/gone", HERE])

    async def _configure(self) -> None:
        if self.fails:
            raise self.fails
        self.configured += 1

    def _doubt(self, certificate: bytes, ended: bool) -> str:
        self.judged.append((certificate, ended))
        return self.reasons.get(certificate, "")

    def says(self, one: LiveSocket, certificate: bytes) -> None:
        if self.asks and self.asks[-1]:
            local, remote = distrust._ends(one)
            self.distrust.shown(Shown(HERE, local, remote, certificate))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "ASK_S", 0.3)
    monkeypatch.setattr(asking, "LOOK_S", 0.01)


async def settled(scene: Scene) -> None:
    for _ in range(500):
        await asyncio.sleep(0.01)
        if scene.configured and (not scene.asks or not scene.asks[-1]):
            return
    raise AssertionError(f"not settled: {scene.asks}")


def test_who_is_revoked_is_closed_at_either_end_and_nobody_else(tmp_path: Path) -> None:
    bad, good, silent, out = tunnel(1001), tunnel(1002), tunnel(1003), tunnel(1004, to_hbone=True)
    scene = Scene(tmp_path, bad, good, silent, out)
    scene.reasons = {b"bad": "its certificate is revoked"}

    async def scenario() -> None:
        async with beside(scene.distrust.run()):
            scene.distrust.trusted([], [b"root"])
            await settled(scene)
            assert scene.asks == [], "nobody was believed before"
            scene.configured = 0
            scene.distrust.trusted([5], [b"root"])
            await asyncio.sleep(0.05)
            for one, certificate in ((bad, b"bad"), (good, b"good"), (out, b"bad"), (good, b"good")):
                scene.says(one, certificate)
            await settled(scene)

    asyncio.run(scenario())
    assert sorted(map(str, scene.kernel.closed)) == sorted(map(str, (bad, out)))
    assert scene.kernel.live == [good, silent]
    assert (scene.asks, scene.configured, scene.distrust.closed) == ([True, False], 1, 2)
    assert scene.judged == [(b"bad", True), (b"good", True)], "each certificate once"
    assert scene.distrust.distrusted.serials == ("05",)


def test_what_is_revoked_while_peers_are_looked_at_counts_at_once(tmp_path: Path) -> None:
    one = tunnel(1001)
    scene = Scene(tmp_path, one)

    async def scenario() -> None:
        async with beside(scene.distrust.run()):
            scene.distrust.trusted([5], [b"root"])
            await asyncio.sleep(0.05)
            scene.says(one, b"bad")
            scene.reasons = {b"bad": "its certificate is revoked"}
            scene.distrust.trusted([5, 6], [b"root"])
            scene.says(one, b"bad")
            await asyncio.sleep(0.1)
            assert scene.kernel.closed == [one]

    asyncio.run(scenario())


def test_a_forgotten_root_closes_what_says_nothing_too_but_only_where_tunnels_end(tmp_path: Path) -> None:
    good, silent, out = tunnel(1001), tunnel(1002), tunnel(1003, to_hbone=True)
    scene = Scene(tmp_path, good, silent, out)

    async def scenario() -> None:
        async with beside(scene.distrust.run()):
            scene.distrust.trusted([], [b"one", b"two"])
            await settled(scene)
            scene.configured = 0
            scene.distrust.trusted([], [b"two"])
            await asyncio.sleep(0.05)
            scene.says(good, b"good")
            await settled(scene)

    asyncio.run(scenario())
    assert scene.kernel.closed == [silent]
    assert scene.judged == [(b"good", False)]


def test_a_new_root_or_a_list_that_gets_shorter_asks_nobody(tmp_path: Path) -> None:
    scene = Scene(tmp_path, tunnel(1001))

    async def scenario() -> None:
        async with beside(scene.distrust.run()):
            scene.distrust.trusted([5], [b"one"])
            await settled(scene)
            asks, scene.configured = list(scene.asks), 0
            scene.distrust.trusted([], [b"one", b"two"])
            await settled(scene)
            assert scene.asks == asks

    asyncio.run(scenario())


def test_an_agent_that_ends_meanwhile_has_its_successor_look_again(tmp_path: Path) -> None:
    bad = tunnel(1001)
    first = Scene(tmp_path, bad)

    async def interrupted() -> None:
        async with beside(first.distrust.run()):
            first.distrust.trusted([5], [b"root"])
            await asyncio.sleep(0.05)

    asyncio.run(interrupted())
    second = Scene(tmp_path, bad)
    second.reasons = {b"bad": "its certificate is revoked"}
    assert second.distrust.distrusted == first.distrust.distrusted, "from its first configuration on"

    async def finished() -> None:
        async with beside(second.distrust.run()):
            second.distrust.trusted([5], [b"root"])
            await asyncio.sleep(0.05)
            second.says(bad, b"bad")
            await settled(second)

    asyncio.run(finished())
    assert second.kernel.closed == [bad]
    third = Scene(tmp_path)

    async def nothing_to_do() -> None:
        async with beside(third.distrust.run()):
            third.distrust.trusted([5], [b"root"])
            await asyncio.sleep(0.05)

    asyncio.run(nothing_to_do())
    assert (third.asks, third.configured) == ([], 0)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"serials": ["x"], "roots": [], "looked": true}'])
def test_a_damaged_file_means_that_everybody_is_looked_at(tmp_path: Path, content: str) -> None:
    (tmp_path / "tunnels-distrusted").write_text(content)
    bad = tunnel(1001)
    scene = Scene(tmp_path, bad)
    scene.reasons = {b"bad": "its certificate is revoked"}

    async def scenario() -> None:
        async with beside(scene.distrust.run()):
            scene.distrust.trusted([5], [b"root"])
            await asyncio.sleep(0.05)
            scene.says(bad, b"bad")
            await settled(scene)

    asyncio.run(scenario())
    assert scene.kernel.closed == [bad]


def test_an_envoy_that_does_not_answer_is_a_problem_until_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "PATIENCE_S", 0.05)
    scene = Scene(tmp_path)
    scene.hears = False

    async def scenario() -> None:
        async with beside(scene.distrust.run()):
            scene.distrust.trusted([5], [b"root"])
            await asyncio.sleep(0.3)
            assert "Envoy does not answer" in scene.distrust.problem
            assert scene.asks == [True], "it is asked all the time"
            scene.hears = True
            await settled(scene)
            assert scene.distrust.problem == ""

    asyncio.run(scenario())


def test_tunnels_that_cannot_be_looked_at_are_a_problem_until_another_look_has_worked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(distrust, "RETRY_S", 0.05)
    bad = tunnel(1001)
    scene = Scene(tmp_path, bad)
    scene.reasons = {b"bad": "its certificate is revoked"}
    scene.kernel.fails = OSError(24, "Too many open files")

    async def looked() -> None:
        """Once more, from the question to the end."""
        end = len(scene.asks) // 2 * 2 + 2
        while len(scene.asks) < end:
            scene.says(bad, b"bad")
            await asyncio.sleep(0.01)

    async def scenario() -> None:
        async with beside(scene.distrust.run()):
            scene.distrust.trusted([5], [b"root"])
            for _ in range(3):
                await looked()
            assert "Too many open files; restart their pods" in scene.distrust.problem
            scene.kernel.fails = None
            await looked()
            await until(lambda: not scene.distrust.problem)
            asks = list(scene.asks)
            scene.distrust.trusted([5], [b"root", b"new"])
            await until(lambda: scene.configured > len(asks) // 2)
            assert scene.asks == asks, "all has been looked at"

    asyncio.run(scenario())
    assert scene.kernel.closed == [bad]
    assert len([message for message in caplog.messages if "may go on" in message]) == 1


def test_a_configuration_that_failed_is_no_problem_any_more_when_it_has_worked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distrust, "RETRY_S", 0.05)
    scene = Scene(tmp_path)
    scene.fails = KernelRefused("not now")

    async def scenario() -> None:
        async with beside(scene.distrust.run()):
            scene.distrust.trusted([], [b"root"])
            await until(lambda: "not now" in scene.distrust.problem)
            scene.fails = None
            await until(lambda: not scene.distrust.problem)

    asyncio.run(scenario())
