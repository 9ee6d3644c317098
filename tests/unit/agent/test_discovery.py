"""The agent's discovery client against the real controller, both in this process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import tempfile
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import discovery
from agent.config import Config, TlsFiles
from agent.discovery import Discovery
from agent.errors import EnvironmentUnfit, KernelRefused
from agent.journal import COMMIT, DamagedError, Journal
from agent.model import Delta, Snapshot
from controller.server import ServerTls
from meshapi import discovery_pb2 as pb
from tests.tasks import until
from tests.unit.controller.harness import SHOP, Authority, serve, service


def stored(path: Path) -> str:
    """The version that a restart would begin with; "" if there is none."""
    versions = [""]
    with contextlib.suppress(FileNotFoundError, DamagedError):
        versions += [content.decode() for kind, content in Journal(path).read() if kind == COMMIT]
    return versions[-1]


class Agent:
    """A discovery client whose `apply` records, and refuses when told to."""

    def __init__(self, config: Config) -> None:
        self.applied: asyncio.Queue[Snapshot] = asyncio.Queue()
        self.refuse = ""
        self.refused = asyncio.Event()
        self.discovery = Discovery(config, self._apply)

    async def _apply(self, snapshot: Snapshot) -> None:
        if self.refuse:
            self.refused.set()
            raise KernelRefused(self.refuse)
        self.applied.put_nowait(snapshot)

    async def settled(self, version: str) -> None:
        """Wait until the state and the file on disk are those of `version`."""
        await until(lambda: self.discovery.state.version == version and self.discovery.state.connected and self._stored(version))

    def _stored(self, version: str) -> bool:
        return stored(self.discovery._journal.path) == version

    async def disconnected(self) -> None:
        await until(lambda: not self.discovery.state.connected)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Agent]:
        task = asyncio.create_task(self.discovery.run())
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "src"
    path.mkdir()
    (path / "a.yaml").write_text(SHOP)
    return path


def config(tmp_path: Path, node: str = "n1") -> Config:
    return Config(node, f"unix:{tmp_path}/c.sock", state_dir=tmp_path / f"state-{node}")


def test_the_model_arrives_and_is_stored(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock"), Agent(config(tmp_path)).running() as agent:
            snapshot = await agent.applied.get()
            assert list(snapshot.services) == ["default/cart"]
            assert [(workload.name, port) for workload, port in snapshot.endpoints("default/cart", 80)] == [("default/cart-1", 80)]
            (directory / "b.yaml").write_text(service("extra", "10.96.0.2"))
            second = await agent.applied.get()
            assert sorted(second.services) == ["default/cart", "default/extra"]
            assert second.workloads["default/cart-1"] is snapshot.workloads["default/cart-1"]
            await agent.settled(second.version)
            state = agent.discovery.state
            assert state.lag_s is not None
            assert 0 <= state.lag_s < 10
            assert (state.nacks, state.last_error) == (0, "")
        stored = tmp_path / "state-n1" / "snapshot.journal"
        assert stored.stat().st_mode & 0o777 == 0o600
        assert Agent(config(tmp_path)).discovery.load_last_good() == replace(second, delta=None)

    asyncio.run(check())


def test_an_agent_starts_from_its_last_good_snapshot_and_gets_only_what_changed(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock"), Agent(config(tmp_path)).running() as agent:
            first = await agent.applied.get()
            await agent.settled(first.version)
        again = Agent(config(tmp_path))
        assert again.discovery.load_last_good() == first
        assert again.discovery.state.version == first.version
        (directory / "b.yaml").write_text(service("extra", "10.96.0.2"))
        async with again.running(), serve(directory, tmp_path / "c.sock") as controller:
            second = await again.applied.get()
            assert sorted(second.services) == ["default/cart", "default/extra"]
            difference = pb.DiscoveryResponse.FromString(next(iter(controller.mesh.publication._differences.values())))
            assert [resource.name for resource in difference.resources] == ["service/default/extra"]

    asyncio.run(check())


def test_a_controller_restart_costs_nothing_but_a_reconnect(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        async with Agent(config(tmp_path)).running() as agent:
            async with serve(directory, tmp_path / "c.sock"):
                first = await agent.applied.get()
                await agent.settled(first.version)
            await agent.disconnected()
            assert agent.discovery.state.version == first.version
            assert agent.discovery.state.last_error
            async with serve(directory, tmp_path / "c.sock"):
                await agent.settled(first.version)
                assert agent.applied.empty()
                assert agent.discovery.state.last_error == ""
                (directory / "a.yaml").unlink()
                assert (await agent.applied.get()).services == {}

    asyncio.run(check())


def test_what_apply_refuses_is_refused_to_the_controller_and_the_old_stays(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock") as controller, Agent(config(tmp_path)).running() as agent:
            first = await agent.applied.get()
            await agent.settled(first.version)
            agent.refuse = "map full"
            (directory / "b.yaml").write_text(service("extra", "10.96.0.2"))
            await agent.refused.wait()
            await until(lambda: controller.discovery.nacks)
            state = agent.discovery.state
            assert (state.version, state.nacks, state.last_error, state.connected) == (first.version, 1, "map full", True)
            assert Agent(config(tmp_path)).discovery.load_last_good() == first
            agent.refuse = ""
            (directory / "c.yaml").write_text(service("more", "10.96.0.3"))
            assert sorted((await agent.applied.get()).services) == ["default/cart", "default/extra", "default/more"]

    asyncio.run(check())


def test_two_agents_at_different_versions_end_at_the_same(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock"):
            async with Agent(config(tmp_path, "n1")).running() as one:
                old = await one.applied.get()
                await one.settled(old.version)
            (directory / "b.yaml").write_text(service("extra", "10.96.0.2"))
            late = Agent(config(tmp_path, "n1"))
            late.discovery.load_last_good()
            async with Agent(config(tmp_path, "n2")).running() as two, late.running():
                fresh = await two.applied.get()
                while "default/extra" not in fresh.services:
                    fresh = await two.applied.get()
                caught_up = await late.applied.get()
                while "default/extra" not in caught_up.services:
                    caught_up = await late.applied.get()
                own = caught_up.workloads["default/cart-1"]
                assert own.network_namespace, "only the agent of its node has use for it"
                elsewhere = {**caught_up.workloads, own.name: replace(own, network_namespace="")}
                assert replace(fresh, delta=None) == replace(caught_up, workloads=elsewhere, delta=None)

    asyncio.run(check())


def test_an_entity_that_does_not_decode_is_refused_whole(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock") as controller, Agent(config(tmp_path)).running() as agent:
            first = await agent.applied.get()
            await agent.settled(first.version)
            publication = controller.mesh.publication
            response = pb.DiscoveryResponse(
                nonce=str(publication.current.serial + 1), version="newer", removed=list(publication.current.versions)
            )
            response.resources.add(name="gadget/default/x", version="1", entity=b"\x5a\x00")
            publication._differences.clear()
            bad = response.SerializeToString()
            publication.response = lambda *_: bad  # type: ignore[method-assign]
            (directory / "b.yaml").write_text(service("extra", "10.96.0.2"))
            await until(lambda: controller.discovery.nacks)
            assert "gadget/default/x: an Entity of a kind that this agent does not know" in agent.discovery.state.last_error
            assert agent.discovery.state.version == first.version
            assert agent.applied.empty()

    asyncio.run(check())


def workload_resource(name: str, *, ready: bool = True) -> pb.Resource:
    entity = pb.Entity(workload=pb.Workload(namespace="n", name=name, ready=ready, labels={"app": name}))
    return pb.Resource(name=f"workload/n/{name}", version=f"{name}-{ready}", entity=entity.SerializeToString())


def response(version: str, *resources: pb.Resource, removed: tuple[str, ...] = ()) -> pb.DiscoveryResponse:
    return pb.DiscoveryResponse(version=version, resources=resources, removed=removed)


def test_each_snapshot_says_how_it_differs_from_the_one_that_was_applied_before(tmp_path: Path) -> None:
    async def check() -> None:
        agent = Agent(config(tmp_path))
        policy = pb.Resource(name="policy/n/p", entity=pb.Entity(policy=pb.Policy(namespace="n", name="p")).SerializeToString())
        await agent.discovery._take(response("1", workload_resource("a"), workload_resource("b"), policy), first=True)
        await agent.discovery._take(response("2", workload_resource("a", ready=False), removed=("workload/n/b",)), first=False)
        await agent.discovery._take(response("3", removed=("policy/n/p",)), first=False)
        one, two, three = (agent.applied.get_nowait() for _ in range(3))
        assert one.delta is None
        assert two.delta == Delta("1", workloads=frozenset({"n/a", "n/b"}))
        assert three.delta == Delta("2", policies=frozenset({"n/p"}))
        assert (sorted(one.workloads), sorted(two.workloads), sorted(three.workloads)) == (["n/a", "n/b"], ["n/a"], ["n/a"])
        assert (one.workloads["n/a"].ready, two.workloads["n/a"].ready) == (True, False)
        assert three.workloads is two.workloads
        assert two.policies is one.policies

    asyncio.run(check())


def test_after_a_refusal_the_difference_is_to_what_is_in_force(tmp_path: Path) -> None:
    async def check() -> None:
        agent = Agent(config(tmp_path))
        await agent.discovery._take(response("1", workload_resource("a")), first=True)
        agent.refuse = "map full"
        assert await agent.discovery._take(response("2", workload_resource("b"), removed=("workload/n/a",)), first=False) == "map full"
        assert "holds Workload" in await agent.discovery._take(
            response("3", workload_resource("c"), pb.Resource(name="workload/n/x", entity=workload_resource("y").entity)), first=False
        )
        agent.refuse = ""
        await agent.discovery._take(response("4", workload_resource("d")), first=False)
        agent.applied.get_nowait()
        found = agent.applied.get_nowait()
        assert found.delta == Delta("1", workloads=frozenset({"n/d"}))
        assert sorted(found.workloads) == ["n/a", "n/d"]
        assert pb.DiscoveryRequest.FromString(agent.discovery._held.request("n1")) == pb.DiscoveryRequest(
            node="n1", known={"workload/n/a": "a-True", "workload/n/d": "d-True"}
        )

    asyncio.run(check())


def test_the_first_difference_after_a_restart_is_to_what_was_loaded(tmp_path: Path) -> None:
    async def check() -> None:
        before = Agent(config(tmp_path))
        await before.discovery._take(response("1", workload_resource("a")), first=True)
        await before.discovery._take(response("2", workload_resource("b")), first=False)
        assert before.discovery._store()
        agent = Agent(config(tmp_path))
        loaded = agent.discovery.load_last_good()
        assert loaded is not None
        assert (loaded.version, loaded.delta, sorted(loaded.workloads)) == ("2", None, ["n/a", "n/b"])
        await agent.discovery._take(response("3", removed=("workload/n/a", "workload/n/never")), first=True)
        found = agent.applied.get_nowait()
        assert found.delta is not None
        assert found.delta.base == "2"
        assert sorted(found.workloads) == ["n/b"]

    asyncio.run(check())


def test_what_apply_refused_is_never_stored(tmp_path: Path) -> None:
    async def check() -> None:
        agent = Agent(config(tmp_path))
        for version in range(20):
            agent.refuse = "no" if version % 2 else ""
            await agent.discovery._take(response(str(version), workload_resource(f"w{version}")), first=False)
            agent.discovery._store()
            loaded = Agent(config(tmp_path)).discovery.load_last_good()
            assert loaded is not None
            assert sorted(loaded.workloads) == sorted(f"n/w{number}" for number in range(0, version + 1, 2))

    asyncio.run(check())


def test_a_disk_that_hangs_does_not_hold_up_the_next_change(tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging, go_on = threading.Event(), threading.Event()
    write = Journal.write

    def hang(journal: Journal) -> None:
        hanging.set()
        go_on.wait(20)
        write(journal)

    monkeypatch.setattr(Journal, "write", hang)

    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock"), Agent(config(tmp_path)).running() as agent:
            await agent.applied.get()
            await asyncio.to_thread(hanging.wait, 20)
            (directory / "b.yaml").write_text(service("extra", "10.96.0.2"))
            second = await agent.applied.get()
            assert stored(agent.discovery._journal.path) == ""
            go_on.set()
            await agent.settled(second.version)

    asyncio.run(check())


def test_an_agent_that_ends_in_order_has_stored_what_it_applied_last(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock"), Agent(config(tmp_path)).running() as agent:
            found = await agent.applied.get()
        assert stored(agent.discovery._journal.path) == found.version

    asyncio.run(check())


def test_a_disk_that_refuses_is_tried_again(tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "STORE_RETRY_S", 0.01)
    write, failures = Journal.write, iter([OSError(28, "No space left on device")] * 3)

    def refuse(journal: Journal) -> None:
        for failure in failures:
            raise failure
        write(journal)

    monkeypatch.setattr(Journal, "write", refuse)

    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock"), Agent(config(tmp_path)).running() as agent:
            await agent.settled((await agent.applied.get()).version)

    asyncio.run(check())


def test_many_resources_at_once_are_one_snapshot(tmp_path: Path) -> None:
    async def check() -> None:
        agent = Agent(config(tmp_path))
        names = [f"w{number}" for number in range(discovery.BULK + 1)]
        assert not await agent.discovery._take(response("1", *map(workload_resource, names)), first=True)
        assert sorted(agent.applied.get_nowait().workloads) == sorted(f"n/{name}" for name in names)
        assert gc.isenabled()
        known = pb.DiscoveryRequest.FromString(agent.discovery._held.request("n1")).known
        assert dict(known) == {f"workload/n/{name}": f"{name}-True" for name in names}

    asyncio.run(check())


@pytest.mark.parametrize("version", ["0123456789abcdef", "0123456789ABCDEF", "abc", "", "v1", "00 11"])
def test_the_controller_hears_the_version_it_sent(tmp_path: Path, version: str) -> None:
    async def check() -> None:
        agent = Agent(config(tmp_path))
        sent = workload_resource("a")
        sent.version = version
        await agent.discovery._take(response("1", sent), first=True)
        assert pb.DiscoveryRequest.FromString(agent.discovery._held.request("n1")).known["workload/n/a"] == version

    asyncio.run(check())


def test_a_damaged_end_leaves_the_state_before_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        agent = Agent(config(tmp_path))
        for version, name in (("1", "a"), ("2", "b"), ("3", "c")):
            await agent.discovery._take(response(version, workload_resource(name)), first=False)
        agent.discovery._store()
        path = agent.discovery._journal.path
        path.write_bytes(path.read_bytes()[:-1])
        again = Agent(config(tmp_path))
        loaded = again.discovery.load_last_good()
        assert loaded is not None
        assert (loaded.version, sorted(loaded.workloads)) == ("2", ["n/a", "n/b"])
        assert again.discovery.state.version == "2"
        assert "its newest part is not used, version 2 is" in caplog.text
        await again.discovery._take(response("4", workload_resource("d")), first=True)
        again.discovery._store()
        assert stored(path) == "4"

    asyncio.run(check())


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=9), st.integers(0, 2000), st.sampled_from(["cut", "replace", "append"]))
def test_whatever_the_file_holds_the_agent_starts_from_what_was_applied_or_from_nothing(noise: bytes, position: int, damage: str) -> None:
    async def check(tmp_path: Path) -> None:
        agent = Agent(config(tmp_path))
        for version, name in (("1", "a"), ("2", "b"), ("3", "c")):
            await agent.discovery._take(response(version, workload_resource(name), removed=("workload/n/a",)), first=False)
        agent.discovery._store()
        applied = {snapshot.version: snapshot for snapshot in (agent.applied.get_nowait() for _ in range(3))}
        path = agent.discovery._journal.path
        content = path.read_bytes()
        at = position % len(content)
        damaged = {"cut": content[:at], "replace": content[:at] + noise + content[at + len(noise) :], "append": content + noise}[damage]
        path.write_bytes(damaged)
        loaded = Agent(config(tmp_path)).discovery.load_last_good()
        assert loaded is None or loaded == replace(applied[loaded.version], delta=None)

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(check(Path(directory)))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "noise"])
def test_a_damaged_snapshot_is_ignored(tmp_path: Path, directory: Path, damage: str) -> None:
    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock"), Agent(config(tmp_path)).running() as agent:
            await agent.settled((await agent.applied.get()).version)

    asyncio.run(check())
    path = tmp_path / "state-n1" / "snapshot.journal"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes({"cut": bytes(content[:-7]), "flip": bytes(content), "empty": b"", "noise": b"\xff" * 53}[damage])
    agent = Agent(config(tmp_path))
    assert agent.discovery.load_last_good() is None
    assert agent.discovery.state.version == ""


def test_without_a_stored_snapshot_there_is_none(tmp_path: Path) -> None:
    assert Agent(config(tmp_path)).discovery.load_last_good() is None


def test_tcp_without_credentials_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfit, match="reached over TCP, which needs credentials"):
        Agent(Config("n1", "127.0.0.1:1", state_dir=tmp_path))


def test_over_tcp_the_nodes_certificate_opens_the_stream(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        authority = Authority(tmp_path, "ours")
        server, client = authority.issue("controller"), authority.issue("n1", "spiffe://mesh.local/meshagent/node/n1")
        tls = TlsFiles(authority.ca, client.certificate, client.key)
        async with serve(directory, tmp_path / "c.sock", ServerTls(server.certificate, server.key, authority.ca)) as controller:
            target = f"127.0.0.1:{controller.port}"
            async with Agent(Config("n1", target, tls, state_dir=tmp_path / "state")).running() as agent:
                assert list((await agent.applied.get()).services) == ["default/cart"]
            async with Agent(Config("n2", target, tls, state_dir=tmp_path / "state2")).running() as agent:
                await until(lambda: agent.discovery.state.last_error)
                assert agent.discovery.state.last_error.startswith("permission denied: node n2 is not yours")

    asyncio.run(check())


@pytest.mark.parametrize("which", [0, 1, 2], ids=["ca", "certificate", "key"])
def test_an_empty_file_of_credentials_is_waited_for(tmp_path: Path, which: int) -> None:
    """GRPC would end the process."""
    files = [tmp_path / name for name in ("ca", "crt", "key")]
    for file in files:
        file.write_text("not empty")
    files[which].write_text(" \n")

    async def check() -> None:
        client = Agent(Config("n1", "127.0.0.1:1", TlsFiles(*files), state_dir=tmp_path / "state"))
        async with client.running():
            await until(lambda: client.discovery.state.last_error)
            assert f"{files[which]} is empty" in client.discovery.state.last_error

    asyncio.run(check())
