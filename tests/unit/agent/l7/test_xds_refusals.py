"""What Envoy has when it has refused something, has come back, or was told something else meanwhile: it is never left waiting, stale or misjudged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from envoy.config.listener.v3 import listener_pb2

from agent.l7 import names, xds
from agent.l7.envoy import stop
from agent.l7.resources import Resources, pack
from agent.l7.snapshot import build
from agent.l7.xds import XdsServer
from agent.model import Backend
from agent.traffic import Limits, TrafficPolicy
from tests.ports import free_ports
from tests.unit.agent.l7 import harness
from tests.unit.agent.l7.scripted import Client, got, serving, some

LINGER_S = 0.3
QUICKLY_S = 5.0
"""Envoy waits 15 s for what does not come."""
CALLER = harness.workload("caller", "127.0.0.1")
Scenario = Callable[[XdsServer, Client], Coroutine[Any, Any, None]]


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters that go, go soon."""
    monkeypatch.setattr(xds, "LINGER_S", LINGER_S)


def scripted(directory: Path, resources: Resources, scenario: Scenario) -> None:
    """Run a scenario against a server that has these resources at first."""

    async def run() -> None:
        async with serving(directory, resources) as (server, client):
            await scenario(server, client)

    asyncio.run(run())


def web(entry: int, target: int, limit: int) -> Resources:
    """A service with a route, on loopback; `limit` is in its cluster."""
    route = harness.route("r", harness.rule(Backend("default/web", entry, 1)), parent="web")
    pod = harness.workload("b", "127.0.0.1", backing={"default/web": {entry: target}})
    policy = TrafficPolicy("default/p", (("default/web", entry),), limits=Limits(requests=limit))
    model = replace(harness.snapshot([CALLER, pod], [harness.service("web", "127.0.0.1", entry)], [route]), traffic={policy.name: policy})
    return harness.on_loopback(build(model, [harness.local(CALLER)], trust_domain=harness.TRUST_DOMAIN), entry)


async def under_way(server: XdsServer, kind: str) -> None:
    """Wait until Envoy has been sent something that it has not answered."""
    while not (server._stream and kind in server._stream.types and server._stream.types[kind].nonce):  # noqa: ASYNC110
        await asyncio.sleep(0)


@pytest.mark.parametrize("first", ["clusters", "endpoints"])
def test_who_comes_back_gets_endpoints_again_because_a_cluster_may_wait_for_them(tmp_path: Path, first: str) -> None:
    """It says that it has some, and has: for the cluster before."""

    async def scenario(_: XdsServer, client: Client) -> None:
        if first == "clusters":
            await client.send(names.CLUSTER, has={"a": "1"})
            assert await client.take() == ("Cluster", {"a": "2"}, [])
        await client.send(names.ENDPOINTS, subscribe=["a"], has={"a": "1"})
        assert await client.take() == ("ClusterLoadAssignment", {"a": "1"}, [])

    scripted(tmp_path, some(cluster="a:2", endpoints="a:1"), scenario)


@pytest.mark.parametrize("dies", ["before the change", "before the endpoints"])
def test_a_cluster_that_changed_while_the_agent_was_away_is_used_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: str) -> None:
    [entry] = free_ports(1)
    settings, update = harness.config(tmp_path), xds._Stream._update

    async def scenario(target: int) -> None:
        with monkeypatch.context() as patched:
            async with harness.agent(settings, web(entry, target, 1000)) as (server, _):
                assert await server.wait_acked(20)
                if dies == "before the endpoints":
                    patched.setattr(
                        xds._Stream, "_update", lambda self, kind, state: None if kind == names.ENDPOINTS else update(self, kind, state)
                    )
                    server.set(web(entry, target, 1500))
                    await under_way(server, names.CLUSTER)
        async with harness.agent(settings, web(entry, target, 1500)) as (server, _):
            assert await server.wait_acked(QUICKLY_S), server._pending()
            assert (await asyncio.to_thread(harness.request, entry)).status == 200

    with harness.http_server("b", "127.0.0.1") as backend:
        try:
            asyncio.run(scenario(backend.server_address[1]))
        finally:
            stop(tmp_path)


def test_nothing_is_acknowledged_before_envoy_has_said_which_listeners_it_has(tmp_path: Path) -> None:
    async def scenario(server: XdsServer, client: Client) -> None:
        await client.send(names.CLUSTER, has={"a": "1"})
        assert not await server.wait_acked(0.2)
        await client.send(names.LISTENER, has={"stale": "1"})
        assert await client.take() == ("Listener", {}, ["stale"])
        assert await server.wait_acked(2)

    scripted(tmp_path, some(cluster="a:1"), scenario)


def test_routes_that_envoy_goes_on_with_keep_their_clusters_until_the_refused_ones_change(tmp_path: Path) -> None:
    async def scenario(server: XdsServer, client: Client) -> None:
        await client.greet(names.LISTENER)
        await client.send(names.CLUSTER, has={"a": "1"})
        await client.send(names.ROUTES, subscribe=["r"], has={"r": "1"})
        assert await server.wait_acked(2)
        server.set(some(cluster="b:1", routes="r:2"))
        assert await client.take() == ("Cluster", {"b": "1"}, [])
        assert await client.take("no such thing") == ("RouteConfiguration", {"r": "2"}, [])
        assert await server.wait_acked(2)
        await asyncio.sleep(3 * LINGER_S)
        server.set(some(cluster="b:1", routes="r:3"))
        assert await client.take() == ("RouteConfiguration", {"r": "3"}, []), "and not that a is gone"
        assert await client.take() == ("Cluster", {}, ["a"])

    scripted(tmp_path, some(cluster="a:1", routes="r:1"), scenario)


def test_what_is_new_and_refused_holds_nothing_back(tmp_path: Path) -> None:
    async def scenario(server: XdsServer, client: Client) -> None:
        await client.send(names.CLUSTER, has={"a": "1"})
        await client.send(names.LISTENER, has={"k": "1"})
        assert await server.wait_acked(2)
        server.set(some(cluster="", listener="k:1 bad:1 l:1"))
        assert [await client.take("bad" if bad else "") for bad in (True, True, False)] == [
            ("Listener", {"bad": "1", "l": "1"}, []),
            ("Listener", {"bad": "1"}, []),
            ("Listener", {"l": "1"}, []),
        ]
        assert await client.take() == ("Cluster", {}, ["a"])

    scripted(tmp_path, some(cluster="a:1", listener="k:1"), scenario)


def test_a_cluster_of_a_refused_response_that_changes_gets_its_endpoints_again(tmp_path: Path) -> None:
    """Envoy has taken it: it refuses the others alone."""

    async def scenario(server: XdsServer, client: Client) -> None:
        await client.send(names.CLUSTER)
        response = await client.receive()
        await client.send(names.ENDPOINTS, subscribe=["a"])
        assert await client.take() == ("ClusterLoadAssignment", {"a": "1"}, [])
        server.set(some(cluster="a:2 bad:1", endpoints="a:1"))
        await client.send(names.CLUSTER, nonce=response.nonce, error="bad")
        assert got(await client.receive()) == ("Cluster", {"a": "2"}, [])
        assert got(await client.receive()) == ("ClusterLoadAssignment", {"a": "1"}, [])

    scripted(tmp_path, some(cluster="a:1 bad:1", endpoints="a:1"), scenario)


@pytest.mark.parametrize(
    ("more", "then"),
    [pytest.param("a:2 bad:1", ({"a": "1"}, []), id="changed"), pytest.param("a:1 n:1 bad:1", ({}, ["bad", "n"]), id="new")],
)
def test_what_envoy_may_have_taken_of_a_refused_response_is_set_right(
    tmp_path: Path, more: str, then: tuple[dict[str, str], list[str]]
) -> None:
    async def scenario(server: XdsServer, client: Client) -> None:
        await client.send(names.LISTENER, has={"a": "1"})
        server.set(some(listener=more))
        response = await client.receive()
        server.set(some(listener="a:1"))
        await client.send(names.LISTENER, nonce=response.nonce, error="bad")
        assert (await client.take())[1:] in (then, (then[0], ["bad"]))

    scripted(tmp_path, some(listener="a:1"), scenario)


def test_a_listener_of_a_refused_response_that_nobody_wants_any_more_goes(tmp_path: Path) -> None:
    """With a real Envoy, which takes the good ones of a response that it refuses."""
    entry, other = free_ports(2)

    def listener(of: Resources, name: str, port: int) -> listener_pb2.Listener:
        found: listener_pb2.Listener = harness.decoded(of, names.LISTENER, "outbound/default/caller")
        found.name, found.address.socket_address.port_value = name, port
        return found

    async def scenario(target: int) -> None:
        async with harness.waypoint(harness.config(tmp_path)) as (server, envoy):
            good = web(entry, target, 1000)
            await harness.applied(server, good)
            second, broken = listener(good, "outbound/default/second", other), listener(good, "outbound/default/broken", other)
            broken.filter_chains[0].filters[0].typed_config.type_url = "type.googleapis.com/no.such.Filter"
            server.set({**good, names.LISTENER: {**good[names.LISTENER], **{one.name: pack(one) for one in (broken, second)}}})
            await under_way(server, names.LISTENER)
            server.set(good)
            assert await server.wait_acked(10)
            assert await envoy.listeners() == {"outbound/default/caller"}
            assert server.state.rejected == 0

    with harness.http_server("b", "127.0.0.1") as backend:
        asyncio.run(scenario(backend.server_address[1]))


def test_a_refusal_of_what_is_wanted_no_more_is_no_refusal(tmp_path: Path) -> None:
    async def scenario(server: XdsServer, client: Client) -> None:
        await client.greet(names.LISTENER)
        await client.send(names.CLUSTER)
        response = await client.receive()
        server.set(some(cluster="bad:2"))
        await client.send(names.CLUSTER, nonce=response.nonce, error="bad")
        assert await client.take() == ("Cluster", {"bad": "2"}, [])
        assert await server.wait_acked(2)
        assert (server.state.nacks, server.state.rejected) == (1, 0)

    scripted(tmp_path, some(cluster="bad:1"), scenario)


def test_endpoints_are_not_refused_for_others_that_are_sent_again_anyway(tmp_path: Path) -> None:
    async def scenario(server: XdsServer, client: Client) -> None:
        await client.send(names.CLUSTER, has={"a": "1", "b": "1"})
        await client.send(names.ENDPOINTS, subscribe=["a", "b"])
        endpoints = await client.receive()
        assert got(endpoints)[1] == {"a": "1", "b": "1"}
        server.set(some(cluster="a:1 b:2", endpoints="a:1 b:1"))
        assert got(await client.receive()) == ("Cluster", {"b": "2"}, [])
        await client.send(names.ENDPOINTS, nonce=endpoints.nonce, error="b is bad")
        assert await client.take() == ("ClusterLoadAssignment", {"a": "1"}, [])
        assert server.state.rejected == 0

    scripted(tmp_path, some(cluster="a:1 b:1", endpoints="a:1 b:1"), scenario)


def test_refused_endpoints_are_none_to_who_asks_again(tmp_path: Path) -> None:
    async def scenario(server: XdsServer, client: Client) -> None:
        await client.send(names.CLUSTER, has={"a": "1"})
        await client.send(names.ENDPOINTS, subscribe=["a"])
        assert await client.take("bad") == ("ClusterLoadAssignment", {"a": "1"}, [])
        await client.send(names.ENDPOINTS, unsubscribe=["a"])
        await client.send(names.ENDPOINTS, subscribe=["a"])
        assert await client.take() == ("ClusterLoadAssignment", {}, ["a"])
        server.set(some(cluster="a:2", endpoints="a:1"))
        assert await client.take() == ("Cluster", {"a": "2"}, [])

    scripted(tmp_path, some(cluster="a:1", endpoints="a:1"), scenario)


def test_that_there_is_none_is_said_again_if_it_was_refused_together_with_others(tmp_path: Path) -> None:
    async def scenario(_: XdsServer, client: Client) -> None:
        await client.send(names.ROUTES, subscribe=["a", "bad", "none"])
        assert await client.take("bad") == ("RouteConfiguration", {"a": "1", "bad": "1"}, ["none"])
        assert await client.take() == ("RouteConfiguration", {"a": "1"}, ["none"])

    scripted(tmp_path, some(routes="a:1 bad:1"), scenario)


def test_another_envoy_is_offered_what_the_one_before_refused(tmp_path: Path) -> None:
    async def scenario(server: XdsServer, client: Client) -> None:
        await client.send(names.LISTENER)
        assert await client.take("Address already in use") == ("Listener", {"l": "1"}, [])
        while not server.state.rejected:  # noqa: ASYNC110  nothing announces it
            await asyncio.sleep(0.005)
        again = client.anew()
        await again.send(names.LISTENER)
        assert await again.take() == ("Listener", {"l": "1"}, [])

    scripted(tmp_path, some(listener="l:1"), scenario)
