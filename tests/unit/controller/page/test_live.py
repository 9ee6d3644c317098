"""What the page knows of the mesh: whom it asks and when, and whom it believes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from controller.page import live
from controller.page.live import Live, believed
from meshapi.graph.answer import Answer, Backend, Edge
from tests.tasks import until
from tests.unit.controller.page.harness import CART, MODEL, PLAN, REDIS, STRANGER, Relay, model, usual
from tests.unit.meshapi.graph import made


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"POLL_S": 0.05, "AGAIN_S": 0.01, "FIRST_S": 0.1, "PATIENCE_S": 0.4}.items():
        monkeypatch.setattr(live, name, value)


def run(relay: Relay, scenario: Callable[[Live], Awaitable[None]], entities: Any = MODEL) -> None:
    async def body() -> None:
        running = Live(relay, lambda: entities)
        try:
            await asyncio.wait_for(scenario(running), 30)
        finally:
            await running.stop()

    asyncio.run(body())


async def graph(running: Live) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(await running.graph())
    return document


def calls(document: dict[str, Any]) -> set[tuple[str, str]]:
    return {(call["source"], call["destination"]) for arrow in document["arrows"] for call in arrow["calls"]}


def test_nobody_is_asked_before_somebody_looks_nor_after_nobody_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "IDLE_S", 0.3)
    relay = usual()

    async def scenario(running: Live) -> None:
        await asyncio.sleep(0.2)
        assert relay.asked == []
        assert calls(await graph(running)) == {
            ("default/frontend", "default/cart"),
            ("default/other", "default/redis"),
            ("", "default/cart-1"),
        }
        await asyncio.sleep(0.8)
        number = len(relay.asked)
        assert number > 2
        await asyncio.sleep(0.3)
        assert len(relay.asked) == number
        assert running._said == {}
        assert len(calls(await graph(running))) == 3, "and again"

    run(relay, scenario)


def test_many_who_look_ask_no_more_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "POLL_S", 0.5)
    relay = usual()

    async def scenario(running: Live) -> None:
        documents = await asyncio.gather(*(running.graph() for _ in range(50)))
        assert len(set(documents)) == 1
        assert len(relay.asked) == 2

    run(relay, scenario)


def test_windows_begin_short_and_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "WINDOW_S", 0.3)
    relay = usual()

    async def scenario(running: Live) -> None:
        await running.graph()
        await until(lambda: len(relay.asked) > 20)
        windows = [one.graph.window_s for one in relay.asked if one.node == "node-1"]
        assert windows == sorted(windows)
        assert (windows[0], windows[-1]) == (0.1, 0.3)

    run(relay, scenario)


def test_a_node_that_is_silent_holds_no_other_up_and_is_named() -> None:
    relay = usual()
    relay.silent = {"node-3"}
    relay.errors = {"node-4": "the agent's connection to the controller ended"}

    async def scenario(running: Live) -> None:
        document = await graph(running)
        assert len(calls(document)) == 3
        assert "node-4: the agent's connection to the controller ended" in document["problems"]
        before = len([one for one in relay.asked if one.node == "node-1"])
        await until(lambda: len([one for one in relay.asked if one.node == "node-1"]) > before + 3)
        assert any(problem.startswith("node-3: it has not answered within") for problem in (await graph(running))["problems"])

    run(relay, scenario)


def test_a_node_of_the_model_that_is_not_connected_is_named() -> None:
    async def scenario(running: Live) -> None:
        problems = (await graph(running))["problems"]
        assert "node node-2 is not connected to the controller: what happens there is not shown" in problems

    run(Relay(Answer("node-1", 5.0, ())), scenario)


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b'{"ready": true}', id="status"),
        pytest.param(b'{"kind": "graph"}', id="empty"),
        pytest.param(b"[" * 9999, id="deep"),
        pytest.param(b"\xff", id="bytes"),
        pytest.param(Answer("node-1", 5.0, (CART,)).encode(), id="another-nodes"),
    ],
)
def test_a_node_that_says_something_unreadable_is_named_and_nothing_of_it_is_shown(document: bytes) -> None:
    relay = Relay(Answer("node-1", 5.0, (REDIS,)))
    relay.documents["node-2"] = document

    async def scenario(running: Live) -> None:
        found = await graph(running)
        assert calls(found) == {("default/other", "default/redis")}
        assert [problem for problem in found["problems"] if problem.startswith("node-2: ")] != []

    run(relay, scenario)


def test_what_a_node_said_stays_until_it_is_old_while_it_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "STALE_S", 0.5)
    relay = usual()

    async def scenario(running: Live) -> None:
        await graph(running)
        relay.errors["node-1"] = "busy"
        await until(lambda: running._said["node-1"].problem)
        found = await graph(running)
        assert ("default/other", "default/redis") in calls(found)
        assert "node-1: busy" in found["problems"]
        await asyncio.sleep(0.6)
        assert calls(await graph(running)) == {("", "default/cart-1")}

    run(relay, scenario)


@pytest.mark.parametrize(
    ("edge", "node"),
    [
        pytest.param(CART, "node-2", id="another-nodes-caller"),
        pytest.param(STRANGER, "node-1", id="another-nodes-receiver"),
        pytest.param(replace(CART, source="default/nobody"), "node-1", id="caller-that-does-not-exist"),
        pytest.param(replace(CART, destination="default/invented"), "node-1", id="service-that-does-not-exist"),
        pytest.param(replace(CART, port=81), "node-1", id="port-that-does-not-exist"),
        pytest.param(replace(CART, backends=(Backend("default/invented", 1.0, mtls=True),)), "node-1", id="backend-that-does-not-exist"),
        pytest.param(replace(STRANGER, source="default/nobody"), "node-2", id="denied-caller-that-does-not-exist"),
        pytest.param(replace(CART, destination="default/redis-0", kind="service"), "node-1", id="workload-as-service"),
    ],
)
def test_what_a_node_cannot_know_is_not_believed(edge: Edge, node: str) -> None:
    assert believed(CART, "node-1", MODEL)
    assert believed(STRANGER, "node-2", MODEL)
    assert not believed(edge, node, MODEL)

    async def scenario(running: Live) -> None:
        found = await graph(running)
        assert (calls(found), found["doubted"]) == (set(), 1)

    run(Relay(Answer(node, 5.0, (edge,))), scenario)


@given(made.answers("node-2"))
def test_no_answer_of_a_node_shows_calls_of_another_nodes_workloads(answer: Answer) -> None:
    entities = model(a="node-1", b="node-1", c="node-2", d="node-2")
    for edge in answer.edges:
        if believed(edge, "node-2", entities):
            mine = edge.source if edge.side == "source" else edge.destination
            assert entities[f"workload/{mine}"].workload.node == "node-2"


def test_each_node_has_its_share_of_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MOST_KEPT", 10)
    many = tuple(replace(CART, kind="workload", destination="default/cart-1", port=port + 1, rate=float(port)) for port in range(23))

    async def scenario(running: Live) -> None:
        found = await graph(running)
        shown = [call["port"] for arrow in found["arrows"] for call in arrow["calls"] if call["source"]]
        assert sorted(shown) == [19, 20, 21, 22, 23]
        assert found["notShown"] == 23 - 5
        assert ("", "default/cart-1") in calls(found)

    run(Relay(Answer("node-1", 5.0, many), Answer("node-2", 5.0, (STRANGER,))), scenario)


def test_why_there_is_no_plan_is_said() -> None:
    async def refused(running: Live) -> None:
        assert await running.plan("default/other", "default/redis:6379") == {"error": "no service or workload is called that"}

    run(Relay(plan="no service or workload is called that"), refused)

    async def slow(running: Live) -> None:
        running._relay = Slow()
        plan = await running.plan("default/other", "default/redis:6379")
        assert plan["error"].startswith("the node of default/other has not answered")

    class Slow(Relay):
        def __init__(self) -> None:
            super().__init__()

        async def ask(self, request: Any) -> Any:
            await asyncio.Event().wait()
            yield request

    run(Relay(), slow)

    async def good(running: Live) -> None:
        assert await running.plan("default/other", "default/redis:53/udp") == PLAN

    run(Relay(), good)
