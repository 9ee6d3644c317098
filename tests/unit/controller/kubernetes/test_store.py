"""What controllers remember together, when the API server, or what is before it, does what no test can have a real one do."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from controller.errors import ControllerError
from controller.kubernetes import store as stores
from controller.kubernetes.api import TIMEOUT_S, Api
from controller.kubernetes.reflector import Reflector
from controller.kubernetes.store import ClusterStore
from controller.store import Documents
from tests.tasks import until
from tests.unit.controller.kubernetes.apiserver import Scripted, Watch, listed, scripted

pytestmark = pytest.mark.anyio
PATH = "/apis/meshagent.io/v1alpha1/namespaces/own/controllerstates"
AUTHORITY = f"{PATH}/authority"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked often here."""
    monkeypatch.setattr(stores, "LOOK_S", 0.05)
    monkeypatch.setattr(stores, "AGAIN_S", 0.05)


def authority(version: str, **documents: str) -> dict[str, Any]:
    return {"metadata": {"name": "authority", "namespace": "own", "uid": "u", "resourceVersion": version}, "documents": documents}


def states(version: str, *items: dict[str, Any]) -> dict[str, Any]:
    return listed(version, *items, kind="ControllerState")


@asynccontextmanager
async def following(tmp_path: Path, first: dict[str, Any]) -> AsyncIterator[tuple[Scripted, ClusterStore, Watch]]:
    """A store that has read `first`, and its watch."""
    async with scripted(tmp_path) as (server, _):
        server.pages = {PATH: [states("5", first)], AUTHORITY: [first]}
        found = ClusterStore(functools.partial(Api.connect, tmp_path / "kubeconfig"), "own")
        await asyncio.to_thread(found.start)
        try:
            yield server, found, await asyncio.wait_for(server.watches.get(), 10)
        finally:
            await asyncio.to_thread(found.close)


async def test_what_an_open_watch_does_not_tell_is_known_all_the_same_and_the_watch_begins_anew(tmp_path: Path) -> None:
    async with following(tmp_path, authority("3", x="1")) as (server, found, _):
        told = asyncio.Event()
        loop = asyncio.get_running_loop()
        found.listen(lambda: loop.call_soon_threadsafe(told.set))
        server.pages = {PATH: [states("7", authority("6", x="2"))], AUTHORITY: [authority("6", x="2")]}
        await asyncio.wait_for(told.wait(), 10)
        assert found.read("x") == b"2"
        again = await asyncio.wait_for(server.watches.get(), 10)
        assert again.version == "7"
        await again.send("MODIFIED", authority("8", x="3"))
        await until(lambda: found.read("x") == b"3")


async def test_a_watch_that_tells_what_has_changed_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "LOOK_S", 0.5)  # within which the test must have the watch tell
    async with following(tmp_path, authority("3", x="1")) as (server, found, watch):
        for version in range(6, 9):
            server.pages[AUTHORITY] = [authority(str(version), x=str(version))]
            await until(lambda version=version: found.read("x") == str(version).encode())  # type: ignore[misc]
            await watch.send("MODIFIED", authority(str(version), x=str(version)))
        asked = len(server.asked)
        await until(lambda: len(server.asked) > asked + 2)
        assert server.watches.empty()


async def test_an_api_server_that_is_silent_while_the_watch_is_open_makes_a_controller_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with following(tmp_path, authority("3", x="1")) as (server, found, _):
        monkeypatch.setattr(stores, "STALE_S", 0.5)
        server.silent.add(AUTHORITY)
        await until(found.waiting)
        assert "must remember is not known: the API server has not answered for " in found.waiting()
        assert found.read("x") == b"1"


async def test_a_controller_is_ready_again_when_the_api_server_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with following(tmp_path, authority("3", x="1")) as (server, found, _):
        monkeypatch.setattr(stores, "STALE_S", 0.5)
        server.pages[AUTHORITY] = [503]
        await until(found.waiting)
        server.pages[AUTHORITY] = [authority("3", x="1")]
        await until(lambda: not found.waiting())


async def test_a_reader_that_ends_is_an_error_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with following(tmp_path, authority("3", x="1")) as (_, found, watch):

        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("boom")

        monkeypatch.setattr(Reflector, "_take", broken)
        ended = asyncio.create_task(found.ended())
        await watch.send("MODIFIED", authority("6"))
        with pytest.raises(ControllerError, match=r"not read any more \(RuntimeError\('boom'\)\): this is a bug"):
            await asyncio.wait_for(ended, 10)
        assert found.waiting() == "what the certificate authority must remember is not being read"


async def test_a_change_that_is_under_way_fails_when_the_store_is_closed_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    def work(documents: Documents) -> None:
        documents.write("x", "2")

    async with following(tmp_path, authority("3", x="1")) as (server, found, _):
        server.silent.add(AUTHORITY)
        changes = [asyncio.create_task(asyncio.to_thread(found.change, work)) for _ in range(3)]
        await until(lambda: sum(path == AUTHORITY for path, _ in server.asked) >= 1)
        began = time.monotonic()
        await asyncio.wait_for(asyncio.to_thread(found.close), 20)
        answers = await asyncio.wait_for(asyncio.gather(*changes, return_exceptions=True), 20)
        assert time.monotonic() - began < TIMEOUT_S / 2
    assert all(isinstance(answer, ControllerError) for answer in answers)
    assert any("the controller is ending: nothing was written" in str(answer) for answer in answers)
