"""What is written of last good versions, and what is believed of it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from controller.kubernetes import lastgood
from controller.kubernetes.lastgood import Kept, LastGood
from controller.objects import Key, Object
from tests.tasks import beside, until
from tests.unit.controller.kubernetes.apiserver import listed, scripted

pytestmark = pytest.mark.anyio
PATH = "/apis/meshagent.io/v1alpha1/namespaces/own/controllerstates"
KEY = Key("AuthorizationPolicy", "shop", "p")
DATA = {
    "apiVersion": "meshagent.io/v1alpha1",
    "kind": "AuthorizationPolicy",
    "metadata": {"name": "p", "namespace": "shop"},
    "spec": {"action": "DENY", "rules": [{}]},
}
KEPT = {KEY: Kept(Object(KEY, DATA, "api-server", 0), "u", orphan=True, generation=7)}


async def read(tmp_path: Path, documents: dict[str, str]) -> LastGood:
    """Last good versions of an API server that has these documents."""
    state = {"metadata": {"name": "last-good", "namespace": "own", "uid": "u", "resourceVersion": "5"}, "documents": documents}
    async with scripted(tmp_path) as (server, connection):
        server.pages[PATH] = [listed("5", state, kind="ControllerState")]
        found = LastGood(connection, "own", lambda: None)
        async with beside(found.reflector.run()):
            await until(lambda: found.reflector.synced)
        return found


async def test_what_is_written_is_read_as_it_was(tmp_path: Path) -> None:
    documents, left_out = lastgood._documents(KEPT)
    assert (list(documents), left_out) == (["AuthorizationPolicy.json"], [])
    (found,) = (await read(tmp_path, documents)).kept.values()
    assert (found.object.data, found.uid, found.orphan, found.generation) == (DATA, "u", True, 7)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("nothing", "cannot be read"),
        ([{"uid": 5, "object": DATA}], "cannot be read"),
        ([{"uid": "u", "object": []}], "cannot be read"),
        ([{"uid": "u", "object": {**DATA, "spec": {"action": "DENI"}}}], "is not valid any more"),
    ],
)
async def test_what_is_no_last_good_version_is_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture, rows: Any, said: str) -> None:
    found = await read(tmp_path, {"AuthorizationPolicy.json": json.dumps(rows), "other": "["})
    assert found.kept == {}
    assert said in caplog.text


def test_policies_have_room_before_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Key("ExternalService", "shop", "e")
    kept = {**KEPT, other: Kept(Object(other, {**DATA, "kind": "ExternalService"}, "api-server", 0), "v")}
    monkeypatch.setattr(lastgood, "MOST", len(lastgood._documents(KEPT)[0]["AuthorizationPolicy.json"]))
    documents, left_out = lastgood._documents(kept)
    assert (list(documents), left_out) == (["AuthorizationPolicy.json"], ["ExternalService"])


async def test_what_cannot_be_written_is_a_problem_until_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lastgood, "AGAIN_S", 0.02)
    async with scripted(tmp_path) as (server, connection):
        server.pages[PATH] = [listed("5", kind="ControllerState"), 403, 403, {"metadata": {"name": "last-good", "namespace": "own"}}]
        found = LastGood(connection, "own", lambda: None)
        allowed = False
        async with beside(found.reflector.run()), beside(found.write(lambda: allowed)):
            await until(lambda: found.reflector.synced)
            found.want(KEPT, found.kept)
            await asyncio.sleep(0.2)
            assert len([path for path, params in server.asked if path == PATH and "watch" not in params]) == 1, "it has no right to write"
            allowed = True
            await until(lambda: found.problem)
            assert "a restart of all controllers would lose last good versions of refused objects" in str(found.problem)
            await until(lambda: found.problem is None)
