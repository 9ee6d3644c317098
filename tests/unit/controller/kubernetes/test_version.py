"""An API server that is older than the definitions need is said at the start; one that does not say, or is away, stops nothing."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from agent.check.cluster import OLDEST_KUBERNETES
from controller.kubernetes import version
from controller.kubernetes.part import KubernetesPart
from tests.tasks import beside, until
from tests.unit.controller.kubernetes.apiserver import scripted

pytestmark = pytest.mark.anyio


def said(minor: str, major: str = "1") -> dict[str, str]:
    return {"major": major, "minor": minor, "gitVersion": f"v{major}.{minor}.4", "platform": "linux/amd64"}


@pytest.mark.parametrize(
    ("answer", "warned"),
    [
        pytest.param(said("30"), True, id="older"),
        pytest.param(said("30+"), True, id="older-of-a-provider"),
        pytest.param(said("9"), True, id="no-comparison-of-text"),
        pytest.param(said("31"), False, id="oldest"),
        pytest.param(said("36"), False, id="newer"),
        pytest.param(said("0", "2"), False, id="next-major"),
    ],
)
async def test_an_api_server_that_is_too_old_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, answer: Any, warned: bool) -> None:
    async with scripted(tmp_path) as (server, connection):
        server.pages["/version"] = [answer]
        await asyncio.wait_for(version.tell(connection), 10)
    found = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [(vars(record)["version"], vars(record)["oldest"]) for record in found] == ([(answer["gitVersion"], "1.31")] if warned else [])


@pytest.mark.parametrize("answer", [403, [], {"major": 1}, b"<html>"], ids=["forbidden", "list", "numbers", "proxy"])
async def test_one_that_does_not_say_is_left_at_that(tmp_path: Path, caplog: pytest.LogCaptureFixture, answer: Any) -> None:
    caplog.set_level(logging.INFO)
    async with scripted(tmp_path) as (server, connection):
        server.pages["/version"] = [answer]
        await asyncio.wait_for(version.tell(connection), 10)
    assert "how old the API server is is not known" in caplog.text


async def test_one_that_is_away_is_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "AGAIN_S", 0.02)
    async with scripted(tmp_path) as (server, connection):
        server.silent.add("/version")
        asking = asyncio.create_task(version.tell(connection))
        await until(lambda: server.asked)
        server.silent.clear()
        server.pages["/version"] = [said("30")]
        for task in list(server.serving):
            task.cancel()
        await asyncio.wait_for(asking, 10)
    assert "older than the mesh's definitions need" in caplog.text


async def test_a_controller_says_it_when_it_starts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with scripted(tmp_path) as (server, _):
        server.pages["/version"] = [said("30")]
        part = KubernetesPart(tmp_path / "kubeconfig", "", "own")
        async with beside(part.run()):
            await until(lambda: "older than the mesh's definitions need" in caplog.text)
        await part.source.close()


def test_the_controller_and_check_mean_the_same_version() -> None:
    assert version.OLDEST == OLDEST_KUBERNETES
