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


def row(kind: str, name: str, text: str = "") -> tuple[Key, Kept]:
    key = Key(kind, "shop", name)
    return key, Kept(Object(key, {**DATA, "kind": kind, "text": text}, "api-server", 0), "u")


def size(documents: dict[str, str]) -> int:
    """Bytes in a request, and in etcd, where less than and such are escaped too (https://pkg.go.dev/encoding/json#Marshal)."""
    text = json.dumps(documents)
    return len(text) + 5 * sum(text.count(one) for one in "<>&")


def test_policies_have_room_before_all_else_and_one_that_is_too_large_takes_no_other_along(monkeypatch: pytest.MonkeyPatch) -> None:
    small = dict([row("AuthorizationPolicy", "a"), row("AuthorizationPolicy", "z"), row("PeerAuthentication", "p")])
    monkeypatch.setattr(lastgood, "MOST", size(lastgood._documents(small)[0]) + 100)
    kept = dict([row("ExternalService", "e"), row("AuthorizationPolicy", "m", "x" * 3000)]) | small
    documents, left_out = lastgood._documents(kept)
    names = {kind: [one["object"]["metadata"]["name"] for one in json.loads(text)] for kind, text in documents.items()}
    assert list(names) == ["AuthorizationPolicy.json", "PeerAuthentication.json"]
    assert len(names["AuthorizationPolicy.json"]) == 2
    assert left_out == [Key("AuthorizationPolicy", "shop", "m"), Key("ExternalService", "shop", "e")]


def test_one_that_is_large_takes_nobodys_room() -> None:
    kept = dict(
        [row("AuthorizationPolicy", "huge", "x" * (1 << 20)), *(row("AuthorizationPolicy", f"l{n:02}", "x" * 20_000) for n in range(97))]
    )
    kept |= dict([row("AuthorizationPolicy", "small")])
    documents, left_out = lastgood._documents(kept)
    assert Key("AuthorizationPolicy", "shop", "huge") in left_out
    assert Key("AuthorizationPolicy", "shop", "small") not in left_out
    assert 40 < len(json.loads(documents["AuthorizationPolicy.json"])) == len(kept) - len(left_out)


@pytest.mark.parametrize("text", ['"', "<", "ß", "\\", "\u0001", "x"])
def test_no_more_is_written_than_etcd_takes_however_it_is_escaped(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(lastgood, "MOST", 20_000)
    documents, left_out = lastgood._documents(dict(row("AuthorizationPolicy", f"p{number}", text * 100) for number in range(300)))
    assert left_out
    assert 17_000 < size(documents) <= 20_000


async def test_what_has_no_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(lastgood, "AGAIN_S", 0.02)
    monkeypatch.setattr(lastgood, "MOST", 10)
    async with scripted(tmp_path) as (server, connection):
        server.pages[PATH] = [listed("5", kind="ControllerState")]
        found = LastGood(connection, "own", lambda: None)
        async with beside(found.reflector.run()), beside(found.write(lambda: True)):
            await until(lambda: found.reflector.synced)
            found.want(dict(row("AuthorizationPolicy", f"p{number:02}") for number in range(30)), found.kept)
            await until(lambda: found.problem)
            assert "there is no room for AuthorizationPolicy shop/p00, " in str(found.problem)
            assert "and 20 more, which the log names;" in str(found.problem)
            await asyncio.sleep(0.1)
    (said,) = [record for record in caplog.records if "no room" in record.message]
    assert "AuthorizationPolicy shop/p29" in said.__dict__["objects"]


async def test_what_another_writer_has_written_is_read_and_written_over_and_one_that_is_always_first_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lastgood, "AGAIN_S", 0.02)
    one = f"{PATH}/{lastgood.NAME}"

    def state(version: str, documents: dict[str, str]) -> dict[str, Any]:
        metadata = {"name": lastgood.NAME, "namespace": "own", "uid": "u", "resourceVersion": version}
        return {"metadata": metadata, "documents": documents}

    async with scripted(tmp_path) as (server, connection):
        server.pages[PATH] = [listed("5", state("5", {}), kind="ControllerState")]
        there = state("6", {})
        server.pages[one] = [409, there, 409, there, 409, there, 409, there, state("9", lastgood._documents(KEPT)[0])]
        found = LastGood(connection, "own", lambda: None)
        async with beside(found.reflector.run()), beside(found.write(lambda: True)):
            await until(lambda: found.reflector.synced)
            found.want(KEPT, found.kept)
            await until(lambda: found.problem)
            assert "somebody else writes it again and again" in str(found.problem)
            await until(lambda: found.problem is None and found.kept)
            assert [held.version for held in found.reflector.store.values()] == ["9"]


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
