"""How the parts of the daemon live and die together."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import grpc.aio
import pytest

from agent import supervisor
from agent.compact import Table
from agent.config import INBOUND_PORT, OUTBOUND_PORT, Config
from agent.enrolment import Enrolled
from agent.errors import EnvironmentUnfit, KernelRefused
from agent.identity.part import NoIdentities
from agent.l7 import names
from agent.l7.parting import Dialled
from agent.l7.resources import Resource
from agent.l7.view import View
from agent.l7.xds import XdsServer
from agent.model import (
    NO_DIRECT,
    Action,
    Delta,
    LocalWorkload,
    Operation,
    Policy,
    PolicyRule,
    Service,
    ServicePort,
    Snapshot,
    Workload,
)
from agent.quota import Quotas
from agent.supervisor import Supervisor, run_forever
from agent.tunnels import Tunnels
from agent.watch import Watch
from tests.tasks import beside, until
from tests.unit.agent.l7.scripted import Client

if TYPE_CHECKING:
    from agent.enrolment import Enrolment
    from agent.l7.envoy import Envoy
    from agent.l7.snapshot import Builder
    from agent.names.service import Names
    from agent.revocation import Revocation
    from agent.wireguard.part import WireGuard

FOREVER_S = 30.0


async def forever() -> None:
    await asyncio.sleep(FOREVER_S)


async def returns() -> None:
    await asyncio.sleep(0)


async def fails() -> None:
    await asyncio.sleep(0)
    raise EnvironmentUnfit("a part failed")


class Part:
    """A part that notes how it ended."""

    ended = ""

    async def run(self) -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # a part may take its time to clean up
            self.ended = "cancelled"
            raise


def test_a_part_that_returns_is_an_error_and_ends_the_others() -> None:
    other = Part()
    with pytest.raises(RuntimeError, match="part discovery ended, but should run for ever"):
        asyncio.run(run_forever({"other": other.run(), "discovery": returns()}))
    assert other.ended == "cancelled"


def test_a_part_that_fails_ends_the_others_with_its_own_error() -> None:
    other = Part()
    with pytest.raises(EnvironmentUnfit, match="a part failed"):
        asyncio.run(run_forever({"other": other.run(), "envoy": fails()}))
    assert other.ended == "cancelled"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_every_part_and_is_no_error(number: signal.Signals) -> None:
    parts = [Part(), Part()]

    async def scenario() -> None:
        asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), number)
        await run_forever({str(n): part.run() for n, part in enumerate(parts)})

    asyncio.run(scenario())
    assert [part.ended for part in parts] == ["cancelled"] * 2


def test_a_part_that_does_not_end_cannot_hold_up_the_rest_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    real = asyncio.wait_for
    monkeypatch.setattr(asyncio, "wait_for", lambda work, _: real(work, 0.2))
    released = asyncio.Event()

    async def stubborn() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            await released.wait()

    async def scenario() -> float:
        started = time.monotonic()
        with pytest.raises(EnvironmentUnfit):
            await run_forever({"stubborn": stubborn(), "envoy": fails()})
        took = time.monotonic() - started
        released.set()
        return took

    assert asyncio.run(scenario()) < 2


def test_an_agent_checks_the_machine_before_it_touches_anything(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.chdir(str(tmp_path))
    with pytest.raises(EnvironmentUnfit, match="this needs root"):
        asyncio.run(Supervisor(Config(node="n", controller="unix:x")).run())


def test_a_restarted_agent_without_certificates_goes_on_with_the_tunnels_that_envoy_has(tmp_path: Path) -> None:
    """Their callers must not fall back to plaintext because the controller is away and keys were kept nowhere else."""

    def agent(directory: Path) -> Supervisor:
        config = Config(node="node-1", controller="unix:/nowhere", run_dir=directory)
        found = Supervisor(config)
        found._identity, found._tunnels = NoIdentities(), Tunnels(config)
        return found

    first = agent(tmp_path / "one")
    assert not first._secured
    first._identity.active.set()
    assert first._secured
    first._tunnels.mark_ready({"spiffe://mesh.local/ns/default/sa/cart"})
    again = agent(tmp_path / "one")
    assert not again._identity.active.is_set()
    assert again._secured
    again._tunnels.keep(())
    assert not again._secured
    assert not agent(tmp_path / "two")._secured


class Carrier:
    """WireGuard, as far as the order of things goes."""

    direct = NO_DIRECT

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def prepare(self, snapshot: Snapshot) -> None:
        self.calls.append(f"prepare {snapshot.version}")

    async def finish(self, *, dialled: bool = False) -> None:
        self.calls.append("keep" if dialled else "remove")


class Dialler(Supervisor):
    """An agent with a real xDS server, without a kernel: Envoy gets one cluster with the snapshot's version."""

    def __init__(self, directory: Path) -> None:
        super().__init__(Config(node="n1", controller="unix:/nowhere", run_dir=directory))
        self.carrier, self.refused = Carrier(), False
        self._wireguard = cast("WireGuard", self.carrier)
        self._tunnels, self._xds = Tunnels(self._config), XdsServer(self._config.xds_socket)
        self._revocation = cast("Revocation", SimpleNamespace(changed=lambda *_: None, taken=lambda: None))
        self._quotas = Quotas("n1")

    async def _enforce(self, snapshot: Snapshot, enforce_inbound: frozenset[str]) -> None:  # noqa: ARG002
        if self.refused:
            raise KernelRefused(f"version {snapshot.version} does not fit")

    async def _configure_waypoint(self, needed: frozenset[str] | None = None) -> None:  # noqa: ARG002
        self._xds.set({names.CLUSTER: {"backend": Resource(self.snapshot.version, b"")}})


def test_wireguard_lets_go_of_nothing_before_envoy_has_acknowledged_what_is_not_dialled_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not while Envoy is away, has not answered, or refuses; and not of what a failed snapshot would not need."""
    monkeypatch.setattr(supervisor, "RETRY_S", 0.05)

    async def scenario() -> None:
        agent = Dialler(tmp_path)
        calls = agent.carrier.calls
        await agent.apply(Snapshot("1"))
        await agent._xds.start()
        try:
            async with beside(agent._release()), grpc.aio.insecure_channel(f"unix:{agent._config.xds_socket}") as channel:
                await asyncio.sleep(0.2)
                assert calls == ["prepare 1", "keep"]  # away
                envoy = Client(channel)
                await envoy.greet(names.LISTENER)
                await envoy.send(names.CLUSTER)
                first = await envoy.receive()
                await asyncio.sleep(0.2)
                assert calls == ["prepare 1", "keep"]  # has not answered
                await envoy.send(names.CLUSTER, nonce=first.nonce)
                await until(lambda: calls == ["prepare 1", "keep", "remove"])
                calls.clear()
                await agent.apply(Snapshot("2"))
                second = await envoy.receive()
                await envoy.send(names.CLUSTER, nonce=second.nonce, error="no")
                await asyncio.sleep(0.3)
                assert calls == ["prepare 2", "keep"]  # goes on with version 1
                await agent.apply(Snapshot("3"))
                third = await envoy.receive()
                agent.refused = True
                with pytest.raises(KernelRefused):
                    await agent.apply(Snapshot("4"))
                await envoy.send(names.CLUSTER, nonce=third.nonce)
                assert await agent._xds.wait_acked(2)
                await asyncio.sleep(0.2)
                assert calls == ["prepare 2", "keep", "prepare 3", "keep", "prepare 4"]  # nobody was given version 4
                agent.refused = False
                await agent.apply(Snapshot("4"))
                fourth = await envoy.receive()
                await envoy.send(names.CLUSTER, nonce=fourth.nonce)
                await until(lambda: calls[-3:] == ["prepare 4", "keep", "remove"])
        finally:
            await agent._xds.stop()

    asyncio.run(scenario())


class Late:
    """An enrolment to which a namespace appears while it is asked to enforce less: as in `agent.enrolment`, its watch tells nobody of that again."""

    def __init__(self) -> None:
        self.watch, self.now, self.found = Watch(), list[LocalWorkload](), list[str]()
        self.tables = self.holding = SimpleNamespace()

    def enforce(self, *_: object) -> Enrolled:
        return Enrolled(tuple(self.now))

    def find(self, snapshot: Snapshot) -> tuple[LocalWorkload, ...]:
        self.found.append(snapshot.version)
        return tuple(self.now)

    def namespaces_changed(self, _: Snapshot) -> bool:
        return False

    def let_go(self) -> None: ...


class Latecomer(Dialler):
    """A `Dialler` that enforces what `Late` finds and notes who Revocation and Envoy hear of."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.late, self.looked, self.built, self.down = Late(), list[list[int]](), list[list[int]](), False
        self._enrolment = cast("Enrolment", self.late)
        self._identity = NoIdentities()
        self._names = cast("Names", SimpleNamespace(update=lambda *_: None))
        self._revocation = cast("Revocation", SimpleNamespace(changed=lambda rules: self.looked.append(cookies(rules.enrolled.local))))

    _enforce = Supervisor._enforce

    async def _called(self) -> Dialled | None:
        return None  # there is no kernel

    async def _configure_waypoint(self, needed: frozenset[str] | None = None) -> None:  # noqa: ARG002
        if self.down:
            raise KernelRefused("not now")
        self.built.append(cookies(self.enrolled.local))


def cookies(local: Iterable[LocalWorkload]) -> list[int]:
    return [one.netns_cookie for one in local]


@pytest.mark.parametrize("failing", [pytest.param(False, id="at-once"), pytest.param(True, id="after-a-failure")])
def test_a_pod_that_is_bound_while_less_is_enforced_is_made_known_to_envoy_and_revocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: bool
) -> None:
    """Else nothing listens in its namespace, and connections that are older than its place in the mesh go on."""
    monkeypatch.setattr(supervisor, "RETRY_S", 0.05)

    async def scenario() -> None:
        agent = Latecomer(tmp_path)
        agent._loop = asyncio.get_running_loop()
        await agent.apply(Snapshot("1"))
        assert (agent.looked, agent.built) == ([[]], [[]])
        async with beside(agent._watch_namespaces()):
            async with agent._enforcing:
                agent.down = failing
                agent.late.now = [LocalWorkload(Workload("default/a", "a", "n1", {}, (), "/a", enrolled=True, ready=True), 7, "/7")]
                agent._enforced_inbound = frozenset({"default/a"})
                await agent._make_use(True)
            if failing:
                await until(lambda: len(agent.looked) > 3)
                agent.down = False
            await until(lambda: agent.built == [[], [7]])
            assert agent.looked[-1] == [7]
            looks = len(agent.looked)
            await asyncio.sleep(2 * supervisor.NAMESPACE_POLL_S)
            assert (len(agent.looked), len(agent.built)) == (looks, 2)  # what is known is not told again

    asyncio.run(scenario())


class Host(Latecomer):
    """A `Latecomer` whose Envoy listens when it has been asked twice whether it does."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, side: str = names.OUTBOUND) -> None:
        super().__init__(directory)
        self.log: list[object] = []
        self._side = side
        self._waypoint = cast("Envoy", SimpleNamespace(state=SimpleNamespace(ready=True)))
        monkeypatch.setattr("agent.netns.listening", self.listening)

    def listening(self, path: Path) -> set[int]:
        self.log.append(f"listens in {path}?")
        return {OUTBOUND_PORT, INBOUND_PORT} if len(self.log) > 2 else set()

    async def _show_waypoint(self, snapshot: Snapshot, local: tuple[LocalWorkload, ...]) -> None:
        self.log.append((snapshot.version, cookies(local), sorted(snapshot.policies)))
        self._built = {names.LISTENER: {names.listener(self._side, "default/a"): Resource("1", b"")}}

    async def _enforce(self, snapshot: Snapshot, enforce_inbound: frozenset[str]) -> None:
        self.log.append(f"enforce {snapshot.version}")
        await super()._enforce(snapshot, enforce_inbound)


@pytest.mark.parametrize("ran", [pytest.param(True, id="that-has-run"), pytest.param(False, id="that-starts")])
def test_envoy_listens_for_a_pod_that_has_run_before_the_kernel_leads_anything_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: bool
) -> None:
    """And is told of no policy before the kernel decides by it. Who starts is protected at once."""
    inside = Workload("default/a", "a", "n1", {}, (), "/a", enrolled=True, ready=True)

    async def scenario() -> None:
        agent = Host(tmp_path, monkeypatch)
        await agent.apply(Snapshot("1", {inside.name: replace(inside, enrolled=False)} if ran else {}))
        agent.log.clear()
        agent.late.now = [LocalWorkload(inside, 7, "/7")]
        await agent.apply(Snapshot("2", {inside.name: inside}, policies={"default/p": Policy("default/p", Action.ALLOW)}))
        welcome = [("1+", [7], []), "listens in /7?", "listens in /7?"]
        assert agent.log == [*(welcome if ran else []), "enforce 2"]
        assert agent.late.found == (["1+"] if ran else [])

    asyncio.run(scenario())


def test_receivers_decide_before_envoy_leaves_it_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another endpoint that is protected otherwise, who may ask a service is decided at its receivers."""
    inside = Workload("default/a", "a", "n1", {}, (), "/a", enrolled=True, ready=True)
    builder = SimpleNamespace(needs_inbound=lambda _: frozenset({"default/other"}), reading=lambda _: frozenset(), identities=frozenset())

    async def scenario() -> None:
        agent = Host(tmp_path, monkeypatch)
        await agent.apply(Snapshot("1", {inside.name: replace(inside, enrolled=False)}))
        agent.log.clear()
        agent._builder = cast("Builder", builder)
        agent.late.now = [LocalWorkload(inside, 7, "/7")]
        await agent.apply(Snapshot("2", {inside.name: inside}))
        assert [one for one in agent.log if "listens" not in str(one)] == ["enforce 1", ("1+", [7], []), "enforce 2"]
        assert agent._enforced_inbound == {"default/other"}

    asyncio.run(scenario())


def test_envoy_listens_for_a_workload_whose_first_policy_comes_before_the_kernel_leads_requests_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only then: who has a listener already is waited for no more."""
    before = Workload("default/a", "a", "n1", {}, (), "/a", enrolled=True, ready=True)
    after, policies = replace(before, policies=("default/p",)), {"default/p": Policy("default/p", Action.ALLOW)}
    builder = SimpleNamespace(
        needs_inbound=lambda _: frozenset(), reading=lambda one: frozenset(one.policies and {"default/a"}), identities=frozenset()
    )

    async def scenario() -> None:
        agent = Host(tmp_path, monkeypatch, names.INBOUND)
        agent._builder = cast("Builder", builder)
        agent.late.now = [LocalWorkload(before, 7, "/7")]
        await agent.apply(Snapshot("1", {before.name: before}))
        agent._built = {}
        agent.log.clear()
        await agent.apply(Snapshot("2", {after.name: after}, policies=policies))
        assert agent.log == [("1+", [7], ["default/p"]), "listens in /7?", "listens in /7?", "enforce 2"]
        agent.log.clear()
        await agent.apply(Snapshot("3", {after.name: replace(after, ready=False)}, policies=policies))
        assert agent.log == ["enforce 3"]

    asyncio.run(scenario())


def test_what_lingers_is_decided_by_receivers_before_envoy_leaves_it_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections to a service that needs the waypoint no more, and has endpoints that are not protected alike, are found later than all was enforced."""
    inside = Workload("default/a", "a", "n1", {}, (), "/a", enrolled=True, ready=True)
    needed = set[str]()

    class Found(Host):
        _configure_waypoint = Supervisor._configure_waypoint

        async def _called(self) -> Dialled:
            return Dialled(frozenset({("default/s", 80)}))

    def look(_: Dialled) -> bool:
        needed.add("default/a")
        return True

    async def scenario() -> None:
        agent = Found(tmp_path, monkeypatch)
        builder = SimpleNamespace(
            needs_inbound=lambda _: frozenset(needed), reading=lambda _: frozenset(), look=look, identities=frozenset(), parts=True
        )
        agent._builder = cast("Builder", builder)
        agent.late.now = [LocalWorkload(inside, 7, "/7")]
        await agent.apply(Snapshot("1", {inside.name: inside}))
        assert agent.log == ["enforce 1", "enforce 1", ("1", [7], [])]
        assert agent._enforced_inbound == {"default/a"}

    asyncio.run(scenario())


def test_what_is_left_to_receivers_is_asked_once_for_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()

    class Shows(Host):
        _configure_waypoint = Supervisor._configure_waypoint

    def needs_inbound(snapshot: Snapshot) -> frozenset[str]:
        asked.append(snapshot.version)
        return frozenset()

    async def scenario() -> None:
        agent = Shows(tmp_path, monkeypatch)
        agent._builder = cast(
            "Builder", SimpleNamespace(needs_inbound=needs_inbound, reading=lambda _: frozenset(), identities=frozenset())
        )
        await agent.apply(Snapshot("1"))
        await agent.apply(Snapshot("2"))
        assert asked == ["1", "2"]

    asyncio.run(scenario())


def test_an_agent_that_starts_has_receivers_go_on_to_decide_until_envoy_has_taken_what_makes_that_needless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An Envoy that it has adopted may leave decisions to them, and nobody remembers which."""
    inside = Workload("default/a", "a", "n1", {}, (), "/a", enrolled=True, ready=True, policies=("default/p",))
    there = replace(inside, name="default/b", node="n2")

    async def scenario() -> None:
        agent = Host(tmp_path, monkeypatch)
        await agent.apply(
            Snapshot("1", {one.name: one for one in (inside, there)}, policies={"default/p": Policy("default/p", Action.ALLOW)})
        )
        assert agent._enforced_inbound == {"default/a"}
        assert agent._relaxable.is_set()
        await agent._make_use(True)
        assert agent._enforced_inbound == frozenset()

    asyncio.run(scenario())


def test_who_comes_brings_the_policies_that_nobody_has_yet() -> None:
    """Without them Envoy would take them for some that allow nothing; without those that ask for requests only now it would not listen for them."""
    reads = PolicyRule(operations=(Operation(paths=("/secret",)),))
    policies = {name: Policy(name, Action.ALLOW) for name in ("default/p", "default/q", "default/r")}
    policies |= {name: Policy(name, Action.DENY, (reads,)) for name in ("default/s", "default/t")}
    older = {name: Policy(name, Action.DENY) for name in ("default/q", "default/s")} | {
        "default/t": Policy("default/t", Action.ALLOW, (reads,))
    }
    one = Workload("default/a", "a", "n1", {}, (), "/a", enrolled=True, ready=True, policies=tuple(sorted(policies.keys() - {"default/r"})))
    found = supervisor._with(Snapshot("1", policies=older), Snapshot("2", policies=policies), {one.name: one})
    assert found.policies == {**older, "default/p": policies["default/p"], "default/s": policies["default/s"]}
    assert found.workloads == {one.name: one}


def test_who_comes_costs_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the snapshot with them nor the next one is looked at as a whole; it is not said how they differ from each other."""
    many = {f"default/w{number}": Workload(f"default/w{number}", "w", "n2", {}, (), "", enrolled=True, ready=True) for number in range(211)}
    inside = Workload("default/a", "a", "n1", {}, (), "/a", enrolled=True, ready=True, policies=("default/p",))
    workloads = Table[Workload]().changed({**many, inside.name: replace(inside, enrolled=False)})
    port = ServicePort(80, "", "TCP", "", True, "")
    services = Table[Service]().changed({"default/s": Service("default/s", ("10.96.0.1",), (replace(port, waypoint=False),))})
    before = Snapshot("1", workloads, services)
    after = Snapshot(
        "2",
        workloads.changed({inside.name: inside}),
        services.changed({"default/s": Service("default/s", ("10.96.0.1",), (port,))}),
        policies=Table[Policy]().changed({"default/p": Policy("default/p", Action.ALLOW)}),
        delta=Delta("1", frozenset({inside.name}), frozenset({"default/s"}), policies=frozenset({"default/p"})),
    )
    view = View.of(before)
    monkeypatch.setattr(View, "of", None)
    present = supervisor._with(before, after, {inside.name: inside})
    assert isinstance(present.workloads, Table)
    assert after.since(present) == Delta("1+"), "all that is new came with them"
    assert present.since(before) == replace(after.since(before), base="1")
    assert view.after(after).after(present).after(after).used == {("default/s", 80)}


def test_a_pod_is_in_the_mesh_whether_envoy_listens_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "WELCOME_S", 0.05)
    inside = Workload("default/a", "a", "n1", {}, (), "/a", enrolled=True, ready=True)

    async def scenario() -> None:
        agent = Host(tmp_path, monkeypatch)
        monkeypatch.setattr("agent.netns.listening", lambda _: set())
        await agent.apply(Snapshot("1", {inside.name: replace(inside, enrolled=False)}))
        agent.late.now = [LocalWorkload(inside, 7, "/7")]
        await agent.apply(Snapshot("2", {inside.name: inside}))
        assert agent.log[-1] == "enforce 2"

    asyncio.run(scenario())


def test_what_is_up_is_reported_until_nobody_asks_for_it_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "TUNNEL_ENDS_S", 0.005)
    monkeypatch.setattr(supervisor, "RETRY_S", 0.05)
    awaited, told, answer = {"default/one"}, list[frozenset[str]](), ["it is away"]

    async def report(names: frozenset[str]) -> str:
        told.append(names)
        return answer[0]

    async def scenario() -> None:
        task = asyncio.create_task(supervisor.report_tunnel_ends(lambda: frozenset(awaited), report))
        await until(lambda: len(told) >= 2)
        answer[0] = ""
        await until(lambda: len(told) >= 4)  # and again: the model still says that nobody knows
        awaited.add("default/two")
        await until(lambda: frozenset(awaited) in told)
        awaited.clear()
        await asyncio.sleep(0.02)
        before = len(told)
        await asyncio.sleep(0.15)
        assert len(told) == before
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(scenario())
    assert set(told) == {frozenset({"default/one"}), frozenset({"default/one", "default/two"})}
