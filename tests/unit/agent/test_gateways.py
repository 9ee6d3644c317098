"""How certificates of gateways come from a real controller, outlive an agent, and leave no trace where none is to be."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent import netns
from agent.config import Config
from agent.gateways import GatewayCertificates, read
from tests.tasks import beside, until
from tests.unit.controller.harness import serve
from tests.unit.controller.test_gateways import GOOD, HTTPS, WORKLOAD, Signer, gateway, secret

MESH = WORKLOAD + gateway(HTTPS)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "src"
    path.mkdir()
    return path


def config(tmp_path: Path, *, on_disk: bool = True) -> Config:
    cgroup = tmp_path / "cgroup"
    cgroup.mkdir(exist_ok=True)
    run = tmp_path / "run"
    return Config(
        node="n1", controller=f"unix:{tmp_path}/c.sock", cgroup=cgroup, run_dir=run, state_dir=tmp_path / "state", keys_on_disk=on_disk
    )


@contextlib.asynccontextmanager
async def running(settings: Config) -> AsyncIterator[GatewayCertificates]:
    part = GatewayCertificates(settings, lambda: None)
    part.load()
    async with beside(part.run()):
        yield part


def test_they_come_are_renewed_outlive_the_agent_and_go(directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    (directory / "a.yaml").write_text(MESH + secret())
    settings = config(tmp_path)
    renewed = Signer().issue()

    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock") as controller, running(settings) as part:
            assert not part.held  # nobody has asked
            part.want(True)
            await until(lambda: part.held)
            assert part.held["edge/tls"][1].decode() == GOOD[1]
            (directory / "a.yaml").write_text(MESH + secret(*renewed))
            await controller.mesh.reload()
            await until(lambda: part.held["edge/tls"][1].decode() == renewed[1])
        async with running(settings) as part:  # without a controller
            part.want(True)
            assert part.held["edge/tls"] == (renewed[0].encode(), renewed[1].encode())
            part.want(True)
            await until(lambda: part._last_error)
            assert part.held
            part.want(False)
            assert not part.held
            assert not (settings.identity_dir / "gateways.json").exists()
            assert part.problems() == []

    asyncio.run(check())
    assert "PRIVATE KEY" not in caplog.text
    assert renewed[1].split("\n")[1] not in caplog.text


def test_no_key_reaches_a_disk(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "file_system", lambda _: "ext4")
    (directory / "a.yaml").write_text(MESH + secret())
    settings = config(tmp_path, on_disk=False)

    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock"), running(settings) as part:
            part.want(True)
            await until(lambda: part.held)
            part.want(True)

    asyncio.run(check())
    key = GOOD[1].split("\n")[1].encode()
    places = [path for path in tmp_path.rglob("*") if path.is_file() and directory not in path.parents]
    assert not [path for path in places if key in path.read_bytes()]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"version": 1, "certificates": {"a": {"key": 5}}}', b'{"version": 2, "certificates": {}}', b"\xff"]
)
def test_a_damaged_file_is_not_used_and_not_quoted(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "gateways.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^it is damaged, or of another form$"):
        read(path)


def test_what_is_kept_is_for_root_alone(tmp_path: Path) -> None:
    async def check() -> Path:
        settings = config(tmp_path)
        GatewayCertificates(settings, lambda: None)._take({"a/b": (b"chain", b"key")})
        return settings.identity_dir / "gateways.json"

    path = asyncio.run(check())
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert json.loads(path.read_text())["certificates"] == {"a/b": {"chain": "chain", "key": "key"}}
