"""The agent's discovery client against the real controller, both in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent.config import Config, TlsFiles
from agent.discovery import Discovery
from agent.errors import EnvironmentUnfit, KernelRefused
from agent.model import Snapshot
from controller.server import ServerTls
from meshapi import discovery_pb2 as pb
from tests.unit.controller.harness import SHOP, Authority, serve, service, until


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
        try:
            return pb.DiscoveryResponse.FromString(self.discovery._path.read_bytes()).version == version
        except FileNotFoundError:
            return False

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
        stored = tmp_path / "state-n1" / "snapshot.pb"
        assert stored.stat().st_mode & 0o777 == 0o600
        assert Agent(config(tmp_path)).discovery.load_last_good() == second

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
                assert fresh == caught_up

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


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "noise"])
def test_a_damaged_snapshot_is_ignored(tmp_path: Path, directory: Path, damage: str) -> None:
    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock"), Agent(config(tmp_path)).running() as agent:
            await agent.settled((await agent.applied.get()).version)

    asyncio.run(check())
    path = tmp_path / "state-n1" / "snapshot.pb"
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
