"""A node's key on its way: real discovery clients of two nodes, a real controller between them."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from agent.config import Config
from agent.discovery import Discovery
from agent.model import Snapshot
from agent.wireguard.keys import KeyPair
from controller.identity.ca import CaSettings
from controller.identity.plane import IdentitySettings
from controller.server import Controller, Settings
from meshapi import discovery_pb2 as pb
from tests.tasks import until
from tests.unit.controller.test_wireguard import TWO_NODES


class Agent:
    """The discovery client of one node, and what it applied last."""

    def __init__(self, tmp_path: Path, name: str, address: str) -> None:
        self.pair, self.snapshot = KeyPair(), Snapshot()
        self._address = address
        config = Config(name, f"unix:{tmp_path}/c.sock", state_dir=tmp_path / f"state-{name}")
        self.discovery = Discovery(config, self._apply, self._say)

    async def _apply(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def _say(self) -> pb.WireGuard:
        return pb.WireGuard(public_key=self.pair.public, port=51871, endpoints=[self._address])

    def keys(self) -> dict[str, bytes]:
        return {name: node.wireguard.public_key for name, node in self.snapshot.nodes.items() if node.wireguard}


def test_every_agent_learns_every_key_and_a_new_one_without_a_word_of_trouble(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "src"
    directory.mkdir()
    (directory / "a.yaml").write_text(TWO_NODES)

    async def check() -> None:
        identity = IdentitySettings(CaSettings(tmp_path / "ca"))
        controller, stopping = Controller(Settings(directory, tmp_path / "c.sock", identity=identity, wireguard=True)), asyncio.Event()
        await controller.start()
        serving = asyncio.create_task(controller.run(stopping))
        agents = [Agent(tmp_path, "n1", "192.0.2.1"), Agent(tmp_path, "n2", "192.0.2.2")]
        running = [asyncio.create_task(agent.discovery.run()) for agent in agents]
        try:

            def all_know() -> bool:
                want = {"n1": agents[0].pair.public, "n2": agents[1].pair.public}
                return all(agent.keys() == want for agent in agents)

            await until(all_know)
            assert set(agents[0].snapshot.nodes) == {"n1", "n2"}
            with caplog.at_level(logging.WARNING, logger="agent"):
                agents[0].pair = KeyPair()
                agents[0].discovery.reconnect()
                await until(all_know)
            assert [r.message for r in caplog.records if r.name.startswith("agent") and r.levelno >= logging.WARNING] == []
            assert agents[0].snapshot.delta is not None
            assert agents[0].snapshot.delta.nodes <= {"n1", "n2"}
            assert not agents[0].snapshot.delta.workloads
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            stopping.set()
            await serving
            await controller.stop()

    asyncio.run(check())
