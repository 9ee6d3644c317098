"""Following one kind: what is listed, watched, missed, repeated and made up."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from controller.kubernetes import api, definition, reflector
from controller.kubernetes.reflector import Reflector
from controller.kubernetes.shapes import Kind, followed
from controller.objects import Key
from tests.tasks import beside, until
from tests.unit.controller.kubernetes.apiserver import Scripted, Watch, listed, namespace, scripted

pytestmark = pytest.mark.anyio
PATH = "/api/v1/namespaces"
FIRST, LONGEST = reflector.FIRST_BACKOFF_S, reflector.MAX_BACKOFF_S
KIND = next(kind for kind in followed() if kind.kind == "Namespace")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for back-off here."""
    monkeypatch.setattr(reflector, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(reflector, "MAX_BACKOFF_S", 0.02)
    monkeypatch.setattr(reflector, "ABSENT_S", 0.01)


@asynccontextmanager
async def following(tmp_path: Path, *pages: dict[str, Any] | int, kind: Kind = KIND) -> AsyncIterator[tuple[Scripted, Reflector]]:
    async with scripted(tmp_path) as (server, connection):
        server.pages[PATH] = list(pages)
        found = Reflector(connection, kind, lambda: None)
        async with beside(found.run()):
            yield server, found


async def opened(server: Scripted) -> Watch:
    return await asyncio.wait_for(server.watches.get(), 10)


def names(found: Reflector) -> set[str]:
    return {key.name for key in found.store}


def labels(found: Reflector, name: str) -> Any:
    item = found.store[Key("Namespace", "", name)].object
    assert item is not None
    return item.labels


async def test_a_list_of_several_pages_is_one_list_and_the_watch_begins_where_it_ended(tmp_path: Path) -> None:
    async with following(tmp_path, listed("5", namespace("a", "1"), more="x"), listed("5", namespace("b", "2"))) as (server, found):
        watch = await opened(server)
        assert names(found) == {"a", "b"}
        assert found.synced
        assert watch.version == "5"
        assert [params.get("continue") for path, params in server.asked if "watch" not in params] == [None, "x"]
        assert server.asked[-1][1]["allowWatchBookmarks"] == "true"


async def test_events_change_the_store(tmp_path: Path) -> None:
    async with following(tmp_path, listed("5", namespace("a", "1"))) as (server, found):
        watch = await opened(server)
        await watch.send("ADDED", namespace("b", "6"))
        await watch.send("MODIFIED", namespace("a", "7", x="1"))
        await until(lambda: found.events == 2)
        assert (names(found), labels(found, "a")) == ({"a", "b"}, {"x": "1"})
        await watch.send("DELETED", namespace("a", "8"))
        await until(lambda: names(found) == {"b"})


async def test_a_watch_that_ends_goes_on_from_its_last_event_or_bookmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflector, "SHORTEST_S", 0.0)
    async with following(tmp_path, listed("5")) as (server, found):
        watch = await opened(server)
        await watch.send("ADDED", namespace("b", "6"))
        await until(lambda: found.events)
        watch.end()
        watch = await opened(server)
        assert watch.version == "6"
        await watch.send("BOOKMARK", {"metadata": {"resourceVersion": "90"}})
        watch.end()
        assert (await opened(server)).version == "90"
        assert found.lists == 1


@pytest.mark.parametrize("way", ["event", "answer"])
async def test_a_version_that_is_too_old_is_listed_again_and_what_went_meanwhile_is_gone(tmp_path: Path, way: str) -> None:
    pages: list[dict[str, Any] | int] = [
        listed("5", namespace("a", "1"), namespace("b", "2")),
        listed("50", namespace("b", "2"), namespace("c", "40")),
    ]
    if way == "answer":
        pages.insert(1, 410)  # a list may be refused so too: its pages took too long
    async with following(tmp_path, *pages) as (server, found):
        watch = await opened(server)
        held = found.store[Key("Namespace", "", "b")].object
        await watch.send("ERROR", {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"})
        assert (await opened(server)).version == "50"
        assert names(found) == {"b", "c"}
        assert found.store[Key("Namespace", "", "b")].object is held, "what is as it was stays the same object"
        assert found.problem is None


async def test_an_event_twice_and_one_that_comes_too_late_change_nothing(tmp_path: Path) -> None:
    async with following(tmp_path, listed("5", namespace("a", "5", x="5"))) as (server, found):
        watch = await opened(server)
        await watch.send("MODIFIED", namespace("a", "9", x="9"))
        await watch.send("MODIFIED", namespace("a", "9", x="again"))
        await watch.send("MODIFIED", namespace("a", "7", x="7"))
        await watch.send("DELETED", namespace("a", "8"))
        await until(lambda: found.events == 4)
        assert labels(found, "a") == {"x": "9"}
        assert found.ignored == 3


async def test_the_late_end_of_one_that_was_made_again_ends_nothing_and_what_is_gone_stays_gone(tmp_path: Path) -> None:
    async with following(tmp_path, listed("5", namespace("a", "5", "old"))) as (server, found):
        watch = await opened(server)
        await watch.send("ADDED", namespace("a", "9", "new"))
        await watch.send("DELETED", namespace("a", "8", "old"))
        await until(lambda: found.events == 2)
        assert found.store[Key("Namespace", "", "a")].uid == "new"
        await watch.send("DELETED", namespace("a", "12", "new"))
        await watch.send("MODIFIED", namespace("a", "11", "new"))
        await until(lambda: found.events == 4)
        assert names(found) == set()


async def test_an_api_server_that_is_away_changes_nothing_and_is_taken_up_again(tmp_path: Path) -> None:
    async with following(tmp_path, listed("5", namespace("a", "1"))) as (server, found):
        watch = await opened(server)
        server.pages[PATH] = [503]
        await watch.send("ERROR", {"kind": "Status", "code": 410})
        await until(lambda: found.problem)
        assert found.problem is not None
        assert "503" in found.problem.message
        assert "what was known stays in force" in found.problem.message
        assert (names(found), found.synced) == ({"a"}, True)
        server.pages[PATH] = [listed("9", namespace("b", "8"))]
        await opened(server)
        assert names(found) == {"b"}
        assert not found.problem


async def test_a_kind_that_the_server_does_not_know_is_empty_and_one_that_may_not_be_read_is_not(tmp_path: Path) -> None:
    optional = dataclasses.replace(KIND, required=False)
    async with following(tmp_path, 404, kind=optional) as (server, found):
        await until(lambda: found.synced)
        assert (found.absent, found.problem) == (True, None)
        server.pages[PATH] = [listed("3", namespace("a", "1"))]
        await opened(server)
        assert (found.absent, names(found)) == (False, {"a"})
    async with following(tmp_path, 403) as (server, found):
        await until(lambda: found.problem)
        assert not found.synced
        assert found.problem is not None
        assert "see the ClusterRole of the controller's service account" in str(found.problem)


@pytest.mark.parametrize(
    "line",
    [
        b"{\n",
        b'{"type":"ADDED"}\n',
        b'{"type":"ADDED","object":7}\n',
        b"\xff\xfe\n",
        b'{"type":"ADDED","object":' + b"[" * 9000 + b"\n",
        b"x" * 5000,
    ],
    ids=["torn", "no-object", "number", "bytes", "deep", "endless"],
)
async def test_nonsense_in_a_watch_is_reported_and_everything_is_listed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes
) -> None:
    monkeypatch.setattr(api, "MAX_LINE", 4000)
    async with following(tmp_path, listed("5", namespace("a", "1"))) as (server, found):
        watch = await opened(server)
        await watch.raw(line)
        await opened(server)
        assert names(found) == {"a"}


async def test_an_object_that_is_not_understood_is_refused_alone(tmp_path: Path) -> None:
    broken = {"metadata": {"name": "bad", "namespace": "n", "uid": "u", "resourceVersion": "3"}, "spec": []}
    kind = next(one for one in followed() if one.kind == "Pod")
    async with scripted(tmp_path) as (server, connection):
        pod = {"metadata": {"name": "good", "namespace": "n", "uid": "u"}, "spec": {}}
        server.pages["/api/v1/pods"] = [listed("5", pod, broken, kind="Pod")]
        found = Reflector(connection, kind, lambda: None)
        async with beside(found.run()):
            await opened(server)
            assert names(found) == {"good", "bad"}
            (problem,) = found.store[Key("Pod", "n", "bad")].problems
            assert "is not understood" in problem.message


async def test_a_server_whose_versions_have_gone_back_is_listed_again_and_nothing_of_before_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reflector, "SHORTEST_S", 0.0)
    async with following(tmp_path, listed("900", namespace("a", "5", "u"))) as (server, found):
        watch = await opened(server)
        await watch.send("DELETED", namespace("a", "1000", "u"))
        await until(lambda: not found.store)
        watch.end()
        watch = await opened(server)
        assert watch.version == "1000"
        server.pages[PATH] = [listed("300")]  # restored from a backup: watches from the future are silent
        watch.end()
        watch = await opened(server)
        assert watch.version == "300"
        await watch.send("ADDED", namespace("a", "310", "v"))
        await until(lambda: names(found) == {"a"})


async def test_a_list_that_never_ends_is_given_up(tmp_path: Path) -> None:
    async with following(tmp_path, listed("5", namespace("a", "1"), more="x")) as (server, found):
        await until(lambda: found.problem)
        assert "again and again" in str(found.problem)
        assert len(server.asked) < 20


async def test_a_page_that_is_too_large_is_asked_for_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_PAGE", 3000)
    large = listed("5", *(namespace(f"n{number}", "1", x="y" * 60) for number in range(40)))
    assert len(json.dumps(large)) > 3000
    async with following(tmp_path, large, listed("6", namespace("a", "1"))) as (server, found):
        await opened(server)
        assert names(found) == {"a"}
        assert [int(params["limit"]) for _, params in server.asked if "limit" in params] == [reflector.PAGE, reflector.PAGE // 8]


async def test_a_watch_that_is_closed_at_once_again_and_again_does_not_spin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflector, "FIRST_BACKOFF_S", 0.2)
    monkeypatch.setattr(reflector, "MAX_BACKOFF_S", 0.2)
    async with following(tmp_path, listed("5")) as (server, found):

        async def close_all() -> None:
            while True:
                (await server.watches.get()).end()

        closing = asyncio.create_task(close_all())
        await asyncio.sleep(1.0)
        closing.cancel()
        assert 2 <= len(server.asked) <= 24
        assert found.lists == 1


async def test_pauses_after_failures_grow_to_the_longest_and_are_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflector, "FIRST_BACKOFF_S", FIRST)
    monkeypatch.setattr(reflector, "MAX_BACKOFF_S", LONGEST)
    tries, clients = 11, 7
    pauses: list[list[float]] = []

    async def follow() -> None:
        mine: list[float] = []
        enough = asyncio.Event()

        async def sleep(seconds: float) -> None:
            mine.append(seconds)
            if len(mine) == tries:
                enough.set()
                await asyncio.Event().wait()

        monkeypatch.setattr(reflector, "asyncio", SimpleNamespace(sleep=sleep))
        async with following(tmp_path, 500):
            await asyncio.wait_for(enough.wait(), 10)
        pauses.append(mine)

    for _ in range(clients):
        await follow()
    longest = [min(LONGEST, FIRST * 2**number) for number in range(tries)]
    assert (longest[0], longest[5], longest[6], longest[-1]) == (0.8, 25.6, 30.0, 30.0)
    for mine in pauses:
        assert all(most / 2 <= pause <= most for pause, most in zip(mine, longest, strict=True)), mine
    for one in zip(*pauses, strict=True):
        assert len(set(one)) == clients, "controllers that lost one API server come back together"


POLICIES = next(kind for kind in followed() if kind.kind == "AuthorizationPolicy")
DEFINED = f"{definition.PATH}/authorizationpolicies.meshagent.io"


def policy(name: str, version: str, generation: int = 1, uid: str = "u", **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "shop", "uid": uid, "resourceVersion": version, "generation": generation}
    return {"apiVersion": "meshagent.io/v1alpha1", "kind": "AuthorizationPolicy", "metadata": metadata, "spec": {"rules": [{}], **spec}}


def policies(version: str, *items: Any) -> dict[str, Any]:
    return listed(version, *items, kind="AuthorizationPolicy")


@asynccontextmanager
async def following_policies(tmp_path: Path, *pages: Any, defined: Any) -> AsyncIterator[tuple[Scripted, Reflector]]:
    async with scripted(tmp_path) as (server, connection):
        server.pages[POLICIES.path] = list(pages)
        server.pages[DEFINED] = defined
        found = Reflector(connection, POLICIES, lambda: None)
        async with beside(found.run()):
            yield server, found


def defined(uid: str, **more: str) -> dict[str, Any]:
    return {"metadata": {"uid": uid, **more}}


def orphans(found: Reflector) -> dict[str, bool]:
    return {key.name: seen.orphan for key, seen in found.store.items()}


async def test_what_is_not_listed_any_more_is_an_orphan_if_its_definition_is_another_one_now(tmp_path: Path) -> None:
    pages = (policies("5", policy("a", "1"), policy("b", "2")), policies("9", policy("b", "8", uid="v")))
    async with following_policies(tmp_path, *pages, defined=[defined("one"), defined("one"), defined("two")]) as (server, found):
        await (await opened(server)).send("ERROR", {"code": 410})
        await until(lambda: orphans(found) == {"a": True, "b": False})
        watch = await opened(server)
        await watch.send("DELETED", policy("b", "10", uid="v"))
        await until(lambda: orphans(found) == {"a": True})
        await watch.send("ADDED", policy("a", "11", uid="v"))
        await until(lambda: orphans(found) == {"a": False})
        await watch.send("DELETED", policy("a", "12", uid="v"))
        await until(lambda: orphans(found) == {})


async def test_what_is_not_listed_any_more_is_gone_if_its_definition_is_the_same(tmp_path: Path) -> None:
    pages = (policies("5", policy("a", "1")), policies("9"))
    async with following_policies(tmp_path, *pages, defined=[defined("one")]) as (server, found):
        await (await opened(server)).send("ERROR", {"code": 410})
        await until(lambda: found.lists == 2)
        assert orphans(found) == {}


async def test_an_end_that_is_told_when_the_definition_is_another_one_already_is_no_end(tmp_path: Path) -> None:
    pages = (policies("5", policy("a", "1")), policies("9"))
    async with following_policies(tmp_path, *pages, defined=[defined("one"), defined("one"), defined("two")]) as (server, found):
        await (await opened(server)).send("DELETED", policy("a", "7"))
        await until(lambda: found.lists == 2)
        assert orphans(found) == {"a": True}


async def test_a_definition_that_is_replaced_during_a_list_has_it_listed_again(tmp_path: Path) -> None:
    pages = (policies("5", policy("a", "1")), policies("6"), policies("7", policy("b", "6")))
    answers = [defined("one"), defined("one"), defined("one"), defined("two"), defined("two")]
    async with following_policies(tmp_path, *pages, defined=answers) as (server, found):
        await (await opened(server)).send("ERROR", {"code": 410})
        await until(lambda: found.lists == 2)
        assert orphans(found) == {"a": True, "b": False}, "it believed the list between"


async def test_nothing_is_known_at_the_start_while_the_definition_is_being_deleted(tmp_path: Path) -> None:
    answers = [defined("one", deletionTimestamp="x")] * 4 + [404] * 2 + [defined("two")]
    async with following_policies(tmp_path, policies("5"), defined=answers) as (_, found):
        await until(lambda: found.problem is not None and "is being deleted" in found.problem.message)
        assert not found.synced
        await until(lambda: found.synced)
        assert found.definition.used == "two"


async def test_a_field_that_nobody_has_removed_stays_and_one_that_somebody_has_goes(tmp_path: Path) -> None:
    full: dict[str, Any] = {"selector": {"matchLabels": {"app": "a"}}, "action": "DENY"}
    async with following_policies(tmp_path, policies("5", policy("a", "1", **full)), defined=[defined("one")]) as (server, found):
        watch, key = await opened(server), Key("AuthorizationPolicy", "shop", "a")

        def state() -> tuple[bool, bool]:
            item = found.store[key].object
            return "selector" in (item.spec if item else {}), found.store[key].pruned

        await watch.send("MODIFIED", policy("a", "6", action="DENY"))
        await until(lambda: found.store[key].version == "6")
        assert state() == (True, True)
        assert "spec.selector, which nobody has removed" in found.store[key].problems[0].message
        await watch.send("MODIFIED", policy("a", "7", **full))
        await until(lambda: found.store[key].version == "7")
        assert state() == (True, False)
        await watch.send("MODIFIED", policy("a", "8", 2, action="DENY"))
        await until(lambda: found.store[key].version == "8")
        assert state() == (False, False)


async def test_as_long_as_a_field_is_missing_the_end_of_a_watch_has_all_listed_again(tmp_path: Path) -> None:
    full = policy("a", "1", action="DENY")
    async with following_policies(tmp_path, policies("5", full), defined=[defined("one")]) as (server, found):
        watch = await opened(server)
        await watch.send("MODIFIED", policy("a", "6"))
        await until(lambda: [seen.pruned for seen in found.store.values()] == [True])
        server.pages[POLICIES.path] = [policies("7", policy("a", "6", action="DENY"))]
        watch.end()
        await until(lambda: [seen.pruned for seen in found.store.values()] == [False])


async def test_a_pod_loses_addresses_without_a_new_generation(tmp_path: Path) -> None:
    kind = next(kind for kind in followed() if kind.kind == "Pod")

    def pod(version: str, *addresses: str) -> dict[str, Any]:
        metadata = {**policy("a", version)["metadata"], "uid": "0fe7fc41-8d9c-4d6c-8c9f-d9f0a5b8e0a1"}
        return {"metadata": metadata, "spec": {"nodeName": "n"}, "status": {"podIPs": [{"ip": one} for one in addresses]}}

    async with scripted(tmp_path) as (server, connection):
        server.pages[kind.path] = [listed("5", pod("1", "10.1.0.1", "fd00::1"), kind="Pod")]
        found = Reflector(connection, kind, lambda: None)
        async with beside(found.run()):
            await (await opened(server)).send("MODIFIED", pod("6", "10.1.0.1"))
            await until(lambda: [seen.version for seen in found.store.values()] == ["6"])
            assert [seen.object.spec["addresses"] for seen in found.store.values() if seen.object] == [["10.1.0.1"]]
