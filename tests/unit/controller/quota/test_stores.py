"""The same facts of both stores; what is Redis' own, and what memory keeps over a restart."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from controller import metrics
from controller.errors import ControllerError
from controller.quota import redis
from controller.quota.store import EXPIRY_S, Member, Memory, News, State, Store
from tests.unit.controller.quota.stores import PASSWORD, redis_server

RATE, DAY = "service/default/web/80#0", "service/default/web/80#1"
ONE, TWO = Member("node-1", "default/one"), Member("node-2", "default/two")
Body = Callable[[Store], Awaitable[None]]


@contextlib.asynccontextmanager
async def opened(kind: str, directory: Path) -> AsyncIterator[Store]:
    if kind == "memory":
        yield Memory()
        return
    with redis_server(directory) as server:
        store = redis.Shared(redis.client(server.url))
        yield store
        await store.close()


@pytest.fixture(params=["memory", "redis"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(kind: str, directory: Path, body: Body) -> None:
    async def scenario() -> None:
        async with opened(kind, directory) as store:
            await body(store)

    asyncio.run(scenario())


def test_what_is_said_of_a_member_is_what_is_read(kind: str, tmp_path: Path) -> None:
    async def body(store: Store) -> None:
        assert await store.exchange([], {RATE: 0}) == {RATE: State()}
        found = await store.exchange([News(RATE, ONE, 12.5), News(RATE, TWO, math.inf)], {RATE: 0})
        assert found == {RATE: State({ONE: 12.5, TWO: math.inf}, {})}
        found = await store.exchange([News(RATE, ONE, None)], {RATE: 0, DAY: 7})
        assert found == {RATE: State({TWO: math.inf}, {}), DAY: State()}

    run(kind, tmp_path, body)


def test_requests_are_counted_by_caller_and_window(kind: str, tmp_path: Path) -> None:
    async def body(store: Store) -> None:
        same = Member("node-2", ONE.caller)
        news = [News(DAY, ONE, 1.0, 17, 7), News(DAY, same, 1.0, 6, 7), News(DAY, TWO, 1.0, 3, 7)]
        found = await store.exchange(news, {DAY: 7})
        assert found[DAY].used == {ONE.caller: 23, TWO.caller: 3}
        assert (await store.exchange([News(DAY, ONE, 1.0, 5, 8)], {DAY: 8}))[DAY].used == {ONE.caller: 5}

    run(kind, tmp_path, body)


def test_who_is_gone_keeps_what_he_used(kind: str, tmp_path: Path) -> None:
    async def body(store: Store) -> None:
        await store.exchange([News(DAY, ONE, 1.0, 17, 7)], {})
        found = await store.exchange([News(DAY, ONE, None, 2, 7)], {DAY: 7})
        assert found == {DAY: State({}, {ONE.caller: 19})}

    run(kind, tmp_path, body)


def test_a_silent_member_is_forgotten() -> None:
    now = 1000.0
    store = Memory(clock=lambda: now)

    async def body() -> None:
        nonlocal now
        await store.exchange([News(RATE, ONE, 1.0)], {})
        now += EXPIRY_S - 1
        assert (await store.exchange([], {RATE: 0}))[RATE].demands
        now += 2
        assert not (await store.exchange([], {RATE: 0}))[RATE].demands

    asyncio.run(body())


def test_a_silent_member_is_forgotten_in_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis, "EXPIRY_S", 0.01)

    async def body(store: Store) -> None:
        await store.exchange([News(RATE, ONE, 1.0)], {})
        await asyncio.sleep(0.03)
        assert await store.exchange([], {RATE: 0}) == {RATE: State()}

    run("redis", tmp_path, body)


def test_counts_outlive_a_restart_of_the_controller(tmp_path: Path) -> None:
    async def body() -> None:
        first = Memory(tmp_path / "quotas.json")
        await first.exchange([News(DAY, ONE, 1.0, 17, 7)], {})
        await first.exchange([News(DAY, ONE, 1.0, 6, 7)], {})
        await first.close()
        second = Memory(tmp_path / "quotas.json")
        second.load()
        assert (await second.exchange([], {DAY: 7}))[DAY].used == {ONE.caller: 23}
        assert (await second.exchange([], {DAY: 8}))[DAY].used == {}

    asyncio.run(body())


@pytest.mark.parametrize("content", ["{", "[]", '{"used": {"x": 1}}', '{"used": {"x": ["a", {}]}}'])
def test_a_damaged_file_is_said_and_begins_anew(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "quotas.json").write_text(content)
    store = Memory(tmp_path / "quotas.json")
    store.load()
    assert "begin anew" in caplog.text
    assert store.state(DAY, 7) == State()


def test_two_controllers_see_each_others_members_and_add_up(tmp_path: Path) -> None:
    async def body() -> None:
        with redis_server(tmp_path) as server:
            stores = [redis.Shared(redis.client(server.url)) for _ in range(2)]
            await asyncio.gather(
                *(stores[n % 2].exchange([News(DAY, (ONE, TWO)[n % 2], float(n), 1, 7)], {DAY: 7}) for n in range(46)),
            )
            found = [await store.exchange([], {DAY: 7}) for store in stores]
            assert found[0] == found[1]
            assert found[0][DAY].used == {ONE.caller: 23, TWO.caller: 23}
            for store in stores:
                await store.close()

    asyncio.run(body())


def test_without_redis_the_controller_goes_on_from_what_was_known_and_pays_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def body() -> None:
        now = 0.0
        with redis_server(tmp_path) as server:
            store = redis.WithFallback(redis.Shared(redis.client(server.url)), Memory(), lambda: now)
            other = redis.Shared(redis.client(server.url))
            await other.exchange([News(DAY, TWO, 5.0, 3, 7)], {})
            assert (await store.exchange([News(DAY, ONE, 1.0, 17, 7)], {DAY: 7}))[DAY].used == {ONE.caller: 17, TWO.caller: 3}
            assert metrics.QUOTA_REDIS._value.get() == 1
            server.stop()
            found = await store.exchange([News(DAY, ONE, 2.0, 6, 7)], {DAY: 7})
            assert found == {DAY: State({ONE: 2.0, TWO: 5.0}, {ONE.caller: 23, TWO.caller: 3})}
            assert metrics.QUOTA_REDIS._value.get() == 0
            assert "Redis is away" in caplog.text
            server.start()  # it has forgotten everything
            assert (await store.exchange([], {DAY: 7}))[DAY].used[ONE.caller] == 23  # not tried again yet
            now += 10
            assert (await store.exchange([], {DAY: 7}))[DAY].used == {ONE.caller: 6}
            assert "Redis is back" in caplog.text
            assert (await store.exchange([], {DAY: 7}))[DAY].used == {ONE.caller: 6}
            await other.close()
            await store.close()

    asyncio.run(body())
    assert PASSWORD not in caplog.text


@pytest.mark.parametrize("url", [f"http://:{PASSWORD}@here", f"redis://:{PASSWORD}@here:port/0", PASSWORD])
def test_a_bad_address_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ControllerError, match="--quota-redis") as caught:
        redis.client(url)
    assert PASSWORD not in str(caught.value)
