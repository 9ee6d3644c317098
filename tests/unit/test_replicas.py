"""Two real controllers, an agent's connections to both, and questions that are put to either."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent import replicas
from agent.cli.daemon import run as agent_run
from agent.config import TlsFiles
from agent.replicas import MOST, Replicas, resolved
from controller.server import Controller, ServerTls
from meshapi import agent_pb2
from meshapi import relay_pb2 as pb
from tests.ports import free_ports
from tests.tasks import beside, until
from tests.unit.controller.harness import Authority, serve
from tests.unit.test_relay import MESH, Place, asking

NODE = "spiffe://mesh.local/meshagent/node/node-1"
HOSTS = ("127.0.0.1", "127.0.0.2")


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, authority: Authority, address: str) -> AsyncIterator[Controller]:
    """One controller, at a loopback address of its own; its certificate is for the name that leads to all."""
    source = tmp_path / "src"
    source.mkdir(exist_ok=True)
    (source / "mesh.yaml").write_text(MESH)
    pair = authority.issue("controller", "spiffe://mesh.local/meshagent/controller")
    tls = ServerTls(pair.certificate, pair.key, authority.ca)
    host = address.partition(":")[0]
    async with serve(source, tmp_path / f"{host}.sock", tls, address) as controller:
        yield controller


class Agent(Place):
    """A node's agent whose controller has replicas, and the names that it looks up."""

    def __init__(self, tmp_path: Path, authority: Authority, port: int) -> None:
        super().__init__("node-1", tmp_path, f"127.0.0.1:{port}")
        pair = authority.issue("node-1", NODE)
        object.__setattr__(self.config, "tls", TlsFiles(authority.ca, pair.certificate, pair.key))
        object.__setattr__(self.config, "replicas", f"127.0.0.1:{port}")
        self.names: list[str] | OSError = []
        self.offered = 0

    async def resolve(self, host: str, port: int) -> list[str]:
        assert (host, f"{host}:{port}") == ("127.0.0.1", self.config.replicas)
        if isinstance(self.names, OSError):
            raise self.names
        return self.names


async def status(controller: Controller) -> list[str]:
    """Which nodes answer through a controller."""
    async with asking(controller) as relay:
        told = [one async for one in relay.Ask(pb.AskRequest(status=agent_pb2.StatusRequest()))]
    return [one.node for one in told if one.document and not one.error]


def test_an_agent_answers_through_every_replica_and_goes_on_when_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "LOOK_S", 0.1)
    authority, (port,) = Authority(tmp_path, "mesh"), free_ports(1)
    first, second = (f"{host}:{port}" for host in HOSTS)

    async def check() -> None:
        agent = Agent(tmp_path, authority, port)
        agent.names = [first, second]
        everywhere = Replicas(agent.config, agent.relay.offer, agent.resolve)
        async with (
            beside(agent.api.run()),
            beside(everywhere.run()),
            contextlib.AsyncExitStack() as one,
            serving(tmp_path, authority, second) as b,
        ):
            a = await one.enter_async_context(serving(tmp_path, authority, first))
            await until(lambda: a.relay.nodes == b.relay.nodes == {"node-1"})
            assert await status(a) == await status(b) == ["node-1"]
            async with asking(b) as relay:
                call = relay.Ask(
                    pb.AskRequest(trace=agent_pb2.TraceRequest(source="frontend", destination="redis", duration_s=20, count=2))
                )
                assert json.loads((await call.read()).document)["source"] == "default/frontend"
                await one.aclose()
                agent.names = OSError("the resolver is away")
                await asyncio.sleep(0.3)
                assert await status(b) == ["node-1"], "a replica that goes takes nothing from the others"
                assert not call.done()
                call.cancel()
            async with serving(tmp_path, authority, first) as again:
                await until(lambda: again.relay.nodes == {"node-1"})
                assert await status(again) == ["node-1"]

    asyncio.run(check())


def test_a_replica_that_leaves_the_name_is_not_dialled_again_and_one_that_comes_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "LOOK_S", 0.1)
    authority, (port,) = Authority(tmp_path, "mesh"), free_ports(1)
    first, second = (f"{host}:{port}" for host in HOSTS)

    async def check() -> None:
        agent = Agent(tmp_path, authority, port)
        agent.names = [first]
        everywhere = Replicas(agent.config, agent.relay.offer, agent.resolve)
        async with beside(agent.api.run()), beside(everywhere.run()), serving(tmp_path, authority, second) as b:
            async with serving(tmp_path, authority, first) as a:
                await until(lambda: a.relay.nodes == {"node-1"})
                agent.names = [second]
                await until(lambda: b.relay.nodes == {"node-1"})
                assert await status(a) == ["node-1"], "it may be answering somebody"
            await until(lambda: everywhere._kept.keys() == {second})
            assert b.relay.nodes == {"node-1"}

    asyncio.run(check())


def test_there_are_never_more_connections_than_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "LOOK_S", 0.05)
    authority, (port,) = Authority(tmp_path, "mesh"), free_ports(1)

    async def check() -> None:
        agent = Agent(tmp_path, authority, port)
        agent.names = [f"127.0.1.{number}:{port}" for number in range(1, 3 * MOST)]
        everywhere = Replicas(agent.config, agent.relay.offer, agent.resolve)
        async with beside(everywhere.run()):
            await until(lambda: len(everywhere._kept) == MOST)
            agent.names = [f"127.0.2.{number}:{port}" for number in range(1, 3 * MOST)]
            await asyncio.sleep(0.3)
            assert len(everywhere._kept) <= MOST

    asyncio.run(check())


def test_a_name_is_looked_up_in_one_family() -> None:
    assert asyncio.run(resolved("127.0.0.1", 15010)) == ["127.0.0.1:15010"]
    assert asyncio.run(resolved("::1", 15010)) == ["[::1]:15010"]
    assert len(asyncio.run(resolved("localhost", 15010))) == 1


@pytest.mark.parametrize("given", ["nowhere", ":15010", "host:", "host:0", "host:http", "host:65536"])
def test_a_place_that_is_none_is_refused_before_the_agent_starts(given: str) -> None:
    said = CliRunner().invoke(agent_run, ["--node", "n1", "--controller-replicas", given])
    assert said.exit_code == 2
    assert "is not HOST:PORT" in said.output
