"""The delta protocol: against a scripted client for what Envoy does rarely, against a real Envoy for what matters."""

from __future__ import annotations

import asyncio
import random
import stat
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from envoy.config.listener.v3 import listener_pb2

from agent.l7 import names, xds
from agent.l7.envoy import stop
from agent.l7.resources import Resource, Resources, pack
from agent.l7.snapshot import Builder, build
from agent.model import Backend, HeaderEdit, Snapshot
from agent.traffic import Limits, TrafficPolicy
from tests.ports import free_ports
from tests.unit.agent.l7 import harness
from tests.unit.agent.l7.scripted import got, serving, some

LINGER_S = 0.3


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters that go, go soon."""
    monkeypatch.setattr(xds, "LINGER_S", LINGER_S)


def test_a_wildcard_gets_everything_then_differences_then_removals(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, some(cluster="a:1 b:1")) as (server, client):
            assert stat.S_IMODE((tmp_path / "xds.sock").stat().st_mode) == 0o600
            await client.greet(names.LISTENER)
            await client.send(names.CLUSTER)
            first = await client.receive()
            assert got(first) == ("Cluster", {"a": "1", "b": "1"}, [])
            assert server.state.connected
            assert not await server.wait_acked(0.05)
            server.set(some(cluster="a:2 c:1"))
            await client.send(names.CLUSTER, nonce=first.nonce)
            second = await client.receive()
            assert got(second) == ("Cluster", {"a": "2", "c": "1"}, [])
            await client.send(names.CLUSTER, nonce=second.nonce)
            third = await client.receive()
            assert got(third) == ("Cluster", {}, ["b"])
            await client.send(names.CLUSTER, nonce=third.nonce)
            assert await server.wait_acked(2)
            assert not server._pending()

    asyncio.run(scenario())


def test_when_a_second_stream_ends_the_first_one_is_served_again_with_what_it_missed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, some(cluster="a:1 b:1")) as (server, client):
            await client.greet(names.LISTENER)
            await client.send(names.CLUSTER)
            assert await client.take() == ("Cluster", {"a": "1", "b": "1"}, [])
            assert await server.wait_acked(2)
            other = client.anew()
            await other.greet(names.LISTENER)
            server.set(some(cluster="a:2 b:1"))
            other.end()
            assert await client.take() == ("Cluster", {"a": "2"}, [])
            assert await server.wait_acked(2)
            assert server.state.connected
            server.set(some(cluster="a:3 b:1"))
            assert await client.take() == ("Cluster", {"a": "3"}, [])

    asyncio.run(scenario())


def test_an_empty_wildcard_is_answered_because_envoy_waits(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, {}) as (_, client):
            await client.send(names.LISTENER)
            assert got(await client.receive()) == ("Listener", {}, [])

    asyncio.run(scenario())


def test_a_cluster_outlives_the_routes_that_named_it_and_stays_if_it_is_named_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, some(cluster="a:1 b:1", endpoints="a:1 b:1")) as (server, client):
            await client.greet(names.LISTENER)
            await client.send(names.CLUSTER, has={"a": "1", "b": "1"})
            await client.send(names.ENDPOINTS, subscribe=["a", "b"], has={"a": "1", "b": "1"})
            await client.send(names.ENDPOINTS, nonce=(await client.receive()).nonce)
            assert await server.wait_acked(2)
            server.set(some(cluster="a:1", endpoints="a:1"))
            assert await server.wait_acked(2), "nobody waits for what only lingers"
            assert not await server.wait_acked(0.05, lingering=True), "but who asks for it"
            server.set(some(cluster="a:1 b:1", endpoints="a:1 b:1"))
            await asyncio.sleep(2 * LINGER_S)
            server.set(some(cluster="a:1", endpoints="a:1"))
            began = time.monotonic()
            response = await client.receive()
            assert got(response) == ("Cluster", {}, ["b"])
            assert time.monotonic() - began > 0.9 * LINGER_S
            await client.send(names.ENDPOINTS, unsubscribe=["b"])
            await client.send(names.CLUSTER, nonce=response.nonce)
            assert await client.silent()

    asyncio.run(scenario())


@pytest.mark.parametrize("stays", ["", f"{names.OUTBOUND}/shop/other:1"], ids=["last", "one-of-two"])
def test_scopes_and_routes_outlive_the_last_listener_whose_connections_still_have_requests(tmp_path: Path, stays: str) -> None:
    before = some(cluster="a:1", endpoints="a:1", listener=f"{names.OUTBOUND}/shop/one:1 {stays}", scope="s:1", routes="r:1")
    kinds = {names.LISTENER: [], names.SCOPE: [], names.CLUSTER: [], names.ENDPOINTS: ["a"], names.ROUTES: ["r"]}

    async def scenario() -> None:
        async with serving(tmp_path, before) as (server, client):
            for kind, named in kinds.items():
                await client.send(kind, subscribe=named, has=dict.fromkeys(before[kind], "1"))
            await client.send(names.ENDPOINTS, nonce=(await client.receive()).nonce)
            assert await server.wait_acked(2)
            server.set(some(listener=stays))
            began, removed = time.monotonic(), []
            for _ in range(4):
                kind, _, gone = await client.take()
                removed.append((kind, gone, time.monotonic() - began > 0.9 * LINGER_S))
            expected = ["ScopedRouteConfiguration", "RouteConfiguration", "Cluster"]
            assert [kind for kind, _, _ in removed if kind != "Listener"] == expected
            lingering = {kind: late for kind, _, late in removed}
            assert lingering == {"Listener": False, "ScopedRouteConfiguration": not stays, "RouteConfiguration": not stays, "Cluster": True}
            assert time.monotonic() - began > (0.9 if stays else 1.9) * LINGER_S, "the cluster's time begins when nothing names it any more"
            assert not await server.wait_acked(0.05, lingering=True)
            assert await client.take() == ("ClusterLoadAssignment", {}, ["a"])
            assert await server.wait_acked(2, lingering=True)

    asyncio.run(scenario())


def test_a_client_that_comes_back_gets_only_what_it_lacks(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, some(cluster="a:1 b:2", endpoints="a:1")) as (server, client):
            await client.greet(names.LISTENER)
            await client.send(names.CLUSTER, has={"a": "1", "b": "1", "gone": "1"})
            response = await client.receive()
            assert got(response) == ("Cluster", {"b": "2"}, [])
            await client.send(names.ENDPOINTS, subscribe=["a"], has={"a": "1"})
            endpoints = await client.receive()
            assert got(endpoints) == ("ClusterLoadAssignment", {"a": "1"}, []), "it may wait for them all the same"
            await client.send(names.ENDPOINTS, nonce=endpoints.nonce)
            await client.send(names.CLUSTER, nonce=response.nonce)
            response = await client.receive()
            assert got(response) == ("Cluster", {}, ["gone"])
            await client.send(names.CLUSTER, nonce=response.nonce)
            assert await server.wait_acked(2)
            assert await client.silent()

    asyncio.run(scenario())


def test_a_name_that_does_not_exist_is_answered_as_removed_and_served_when_it_comes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, some(routes="a:1")) as (server, client):
            await client.send(names.ROUTES, subscribe=["a", "later"])
            response = await client.receive()
            assert got(response) == ("RouteConfiguration", {"a": "1"}, ["later"])
            await client.send(names.ROUTES, nonce=response.nonce)
            server.set(some(routes="a:1 later:1 other:1"))
            response = await client.receive()
            assert got(response) == ("RouteConfiguration", {"later": "1"}, [])
            await client.send(names.ROUTES, nonce=response.nonce, unsubscribe=["a"])
            await client.send(names.ROUTES, subscribe=["a"])
            assert got(await client.receive()) == ("RouteConfiguration", {"a": "1"}, []), "asked for again, sent again"

    asyncio.run(scenario())


def test_routes_wait_for_the_endpoints_of_new_clusters(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, some(cluster="a:1", endpoints="a:1", routes="r:1")) as (_, client):
            await client.send(names.CLUSTER)
            await client.send(names.ROUTES, subscribe=["r"])
            clusters = await client.receive()
            await client.send(names.CLUSTER, nonce=clusters.nonce)
            await client.send(names.ENDPOINTS, subscribe=["a"])
            endpoints = await client.receive()
            assert got(endpoints)[0] == "ClusterLoadAssignment"
            await client.send(names.ENDPOINTS, nonce=endpoints.nonce)
            assert got(await client.receive())[0] == "RouteConfiguration"

    asyncio.run(scenario())


def test_nothing_waits_for_clusters_that_change_more_often_than_envoy_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xds, "WARM_PATIENCE_S", 3600.0)

    def version(cluster: int, rest: int) -> Resources:
        return some(cluster=f"a:{cluster} b:1", endpoints="a:1 b:1", listener=f"l:{rest}", scope=f"s:{rest}", routes=f"r:{rest}")

    async def scenario() -> None:
        async with serving(tmp_path, version(1, 1)) as (server, client):
            await client.send(names.CLUSTER, has={"a": "1", "b": "1"})
            await client.send(names.ENDPOINTS, subscribe=["a", "b"])
            await client.send(names.LISTENER, has={"l": "1"})
            await client.send(names.SCOPE, has={"s": "1"})
            await client.send(names.ROUTES, subscribe=["r"], has={"r": "1"})
            assert (await client.take())[1] == {"a": "1", "b": "1"}
            assert await server.wait_acked(2)
            server.set(version(2, 1))
            unanswered = await client.receive()
            assert got(unanswered) == ("Cluster", {"a": "2"}, [])
            server.set(version(3, 2))
            came = [got(await client.receive()) for _ in range(4)]
            assert [kind for kind, _, _ in came] == ["ClusterLoadAssignment", "Listener", "ScopedRouteConfiguration", "RouteConfiguration"]
            assert came[-1][1] == {"r": "2"}
            await client.send(names.CLUSTER, nonce=unanswered.nonce)
            assert got(await client.receive()) == ("Cluster", {"a": "3"}, [])

    asyncio.run(scenario())


@pytest.mark.parametrize("of_two", [False, True], ids=["alone", "with-one-that-changes"])
def test_routes_wait_for_the_first_version_of_a_cluster_also_of_one_that_is_about_to_go(tmp_path: Path, of_two: bool) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, some(cluster="a:1 b:1", endpoints="a:1", routes="r:1")) as (server, client):
            await client.greet(names.LISTENER)
            await client.send(names.CLUSTER, has={"a": "1", "b": "1"})
            await client.send(names.ENDPOINTS, subscribe=["a"])
            await client.send(names.ROUTES, subscribe=["r"], has={"r": "1"})
            await client.take()
            server.set(some(cluster="a:1", endpoints="a:1", routes="r:1"))
            going = await client.receive()
            assert got(going) == ("Cluster", {}, ["b"])
            server.set(some(cluster=f"a:{1 + of_two} b:1", endpoints="a:1", routes="r:2"))
            asking = asyncio.create_task(client.receive())
            assert not (await asyncio.wait([asking], timeout=0.2))[0], "Envoy is to let go of a cluster that it gets anew"
            await client.send(names.CLUSTER, nonce=going.nonce)
            again = await asking
            assert got(again)[1].keys() == {"a", "b"} if of_two else {"b"}
            if of_two:
                await client.take()  # endpoints of the one that changes
            asking = asyncio.create_task(client.receive())
            assert not (await asyncio.wait([asking], timeout=0.2))[0]
            await client.send(names.CLUSTER, nonce=again.nonce)
            assert got(await asking) == ("RouteConfiguration", {"r": "2"}, [])

    asyncio.run(scenario())


def test_routes_do_not_wait_for_endpoints_that_change_all_the_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, some(cluster="a:1 b:1", endpoints="a:1 b:1", routes="r:1")) as (server, client):
            await client.send(names.CLUSTER, has={"a": "1", "b": "1"})
            await client.send(names.ENDPOINTS, subscribe=["a", "b"])
            await client.send(names.ROUTES, subscribe=["r"], has={"r": "1"})
            assert (await client.take())[1] == {"a": "1", "b": "1"}
            server.set(some(cluster="a:1 b:1", endpoints="a:2 b:1", routes="r:2"))
            assert got(await client.receive()) == ("ClusterLoadAssignment", {"a": "2"}, [])
            assert got(await client.receive()) == ("RouteConfiguration", {"r": "2"}, []), "and nobody has answered yet"

    asyncio.run(scenario())


def test_a_cluster_that_never_gets_endpoints_does_not_have_routes_overtake_those_of_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xds, "WARM_PATIENCE_S", 0.3)

    async def scenario() -> None:
        async with serving(tmp_path, some(cluster="never:1", endpoints="never:1", routes="r:1")) as (server, client):
            await client.send(names.CLUSTER)
            await client.send(names.ROUTES, subscribe=["r"])
            clusters = await client.receive()
            asked = time.monotonic()
            await client.send(names.CLUSTER, nonce=clusters.nonce)
            routes = await client.receive()
            assert got(routes) == ("RouteConfiguration", {"r": "1"}, [])
            assert time.monotonic() - asked > 0.2
            await client.send(names.ROUTES, nonce=routes.nonce)
            server.set(some(cluster="never:1 next:1", endpoints="never:1 next:1", routes="r:2"))
            clusters = await client.receive()
            assert got(clusters)[1] == {"next": "1"}
            await client.send(names.CLUSTER, nonce=clusters.nonce)
            await client.send(names.ENDPOINTS, subscribe=["next"])
            endpoints = await client.receive()
            assert got(endpoints) == ("ClusterLoadAssignment", {"next": "1"}, [])
            await client.send(names.ENDPOINTS, nonce=endpoints.nonce)
            assert got(await client.receive()) == ("RouteConfiguration", {"r": "2"}, [])

    asyncio.run(scenario())


def test_a_cluster_that_changes_while_its_endpoints_are_on_their_way_gets_them_again(tmp_path: Path) -> None:
    """Envoy acknowledges the cluster as soon as it has the endpoints, and only then the endpoints: the next cluster waits for some of its own."""

    async def scenario() -> None:
        async with serving(tmp_path, some(cluster="a:1", endpoints="a:1")) as (server, client):
            await client.send(names.CLUSTER)
            cluster = await client.receive()
            await client.send(names.ENDPOINTS, subscribe=["a"])
            endpoints = await client.receive()
            server.set(some(cluster="a:2", endpoints="a:1"))
            await client.send(names.CLUSTER, nonce=cluster.nonce)
            cluster = await client.receive()
            assert got(cluster) == ("Cluster", {"a": "2"}, [])
            await client.send(names.ENDPOINTS, nonce=endpoints.nonce)
            assert got(await client.receive()) == ("ClusterLoadAssignment", {"a": "1"}, [])

    asyncio.run(scenario())


def test_a_refused_resource_is_isolated_surfaced_and_not_sent_again_until_it_changes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, some(cluster="a:1 bad:1 c:1")) as (server, client):
            await client.greet(names.LISTENER)
            await client.send(names.CLUSTER)
            together = await client.receive()
            await client.send(names.CLUSTER, nonce=together.nonce, error="one of them is wrong")
            for expected in (["a"], ["bad", "c"], ["bad"], ["c"]):
                portion = await client.receive()
                assert list(got(portion)[1]) == expected
                await client.send(names.CLUSTER, nonce=portion.nonce, error="no such filter" if "bad" in expected else "")
            assert await server.wait_acked(2)
            assert (server.state.nacks, server.state.rejected) == (1, 1)
            assert server.state.last_nack == "Cluster bad: no such filter"
            server.set(some(cluster="a:1 bad:1 c:2"))
            only = await client.receive()
            assert got(only)[1] == {"c": "2"}
            await client.send(names.CLUSTER, nonce=only.nonce)
            server.set(some(cluster="a:1 bad:2 c:2"))
            again = await client.receive()
            assert got(again)[1] == {"bad": "2"}
            await client.send(names.CLUSTER, nonce=again.nonce)
            assert await server.wait_acked(2)
            assert (server.state.nacks, server.state.rejected) == (1, 0)

    asyncio.run(scenario())


def test_two_bad_ones_among_thousands_are_found_in_a_few_steps(tmp_path: Path) -> None:
    many = some(cluster=" ".join(f"c{number}:1" for number in range(2003)))
    bad = {"c7", "c1999"}

    async def scenario() -> None:
        async with serving(tmp_path, many) as (server, client):
            await client.greet(names.LISTENER)
            await client.send(names.CLUSTER)
            steps, taken = 0, set[str]()
            while len(taken) < 2001 or server.state.rejected < 2:
                response = await client.receive()
                found = set(got(response)[1])
                steps += 1
                await client.send(names.CLUSTER, nonce=response.nonce, error="bad" if found & bad else "")
                if not found & bad:
                    taken |= found
                elif len(found) == 1:
                    while not server.state.rejected or f"Cluster {min(found)}: bad" != server.state.last_nack:  # noqa: ASYNC110  nothing announces it
                        await asyncio.sleep(0.005)
            assert await server.wait_acked(2)
            assert steps < 50
            assert (server.state.nacks, taken & bad) == (2, set())
            assert server.state.pushes == 1
            assert server.state.last_push_s > 0

    asyncio.run(scenario())


CALLER = harness.workload("caller", "10.0.0.1")


def web(entry: int, target: int, *, header: str) -> Resources:
    backing = {"default/web": {entry: target}}
    edit = HeaderEdit({"x-version": header})
    route = harness.route("r", harness.rule(Backend("default/web", entry, 1), response=edit), parent="web")
    snapshot = harness.snapshot(
        [CALLER, harness.workload("b", "127.0.0.1", backing=backing)], [harness.service("web", "127.0.0.1", entry)], [route]
    )
    return harness.on_loopback(build(snapshot, [harness.local(CALLER)], trust_domain=harness.TRUST_DOMAIN), entry)


def test_envoy_survives_the_agent_and_the_next_agent_changes_only_what_differs(tmp_path: Path) -> None:
    [entry] = free_ports(1)
    settings = harness.config(tmp_path)

    async def agent(resources: Resources) -> tuple[int | None, dict[str, int], set[str]]:
        async with harness.agent(settings, resources) as (server, envoy):
            assert await server.wait_acked(20), server.state
            return envoy.state.pid, await envoy.stats("listener_manager|cluster_manager"), await envoy.listeners()

    with harness.http_server("b", "127.0.0.1") as backend:
        try:
            pid, before, listeners = asyncio.run(agent(web(entry, backend.server_address[1], header="1")))
            assert listeners == {"outbound/default/caller"}
            assert harness.request(entry).headers["x-version"] == "1", "no agent, and traffic goes on"
            again, after, _ = asyncio.run(agent(web(entry, backend.server_address[1], header="2")))
            assert again == pid
            for counter in ("listener_added", "listener_modified", "listener_removed"):
                assert after.get(f"listener_manager.{counter}") == before.get(f"listener_manager.{counter}")
            assert after["cluster_manager.cluster_added"] == before["cluster_manager.cluster_added"]
            assert harness.request(entry).headers["x-version"] == "2"
        finally:
            stop(tmp_path)


def test_a_listener_that_envoy_refuses_leaves_the_last_good_one_and_the_others_in_force(tmp_path: Path) -> None:
    entry, other = free_ports(2)

    async def scenario() -> None:
        async with harness.waypoint(harness.config(tmp_path)) as (server, envoy):
            good = web(entry, backend.server_address[1], header="1")
            await harness.applied(server, good)
            broken: listener_pb2.Listener = harness.decoded(good, names.LISTENER, "outbound/default/caller")
            second = type(broken).FromString(broken.SerializeToString())
            second.name, second.address.socket_address.port_value = "outbound/default/second", other
            broken.filter_chains[0].filters[0].typed_config.type_url = "type.googleapis.com/no.such.Filter"
            changed = {**good, names.LISTENER: {listener.name: pack(listener) for listener in (broken, second)}}
            await harness.applied(server, changed)
            assert server.state.nacks == 1
            assert "outbound/default/caller" in server.state.last_nack
            assert await envoy.listeners() == {"outbound/default/caller", "outbound/default/second"}
            assert (await asyncio.to_thread(harness.request, entry)).status == 200

    with harness.http_server("b", "127.0.0.1") as backend:
        asyncio.run(scenario())


def test_a_new_service_is_never_answered_by_a_cluster_that_is_not_there_yet(tmp_path: Path) -> None:
    """Make before break, seen from a client that asks all the time while backends are swapped."""
    [entry] = free_ports(1)
    statuses: list[int] = []

    def between(target: int, name: str) -> Resources:
        services = [harness.service("web", "127.0.0.1", entry), harness.service(name, "10.96.0.9", 80, waypoint=False)]
        pod = harness.workload("b", "127.0.0.1", backing={f"default/{name}": {80: target}})
        route = harness.route("r", harness.rule(Backend(f"default/{name}", 80, 1)), parent="web")
        snapshot = harness.snapshot([CALLER, pod], services, [route])
        return harness.on_loopback(build(snapshot, [harness.local(CALLER)], trust_domain=harness.TRUST_DOMAIN), entry)

    async def scenario() -> None:
        async with harness.waypoint(harness.config(tmp_path)) as (server, _):
            await harness.applied(server, between(target, "v0"))
            done, answered = asyncio.Event(), asyncio.Event()

            async def ask() -> None:
                while not done.is_set():
                    statuses.append((await asyncio.to_thread(harness.request, entry)).status)
                    answered.set()

            asking = asyncio.create_task(ask())
            try:
                for number in range(1, 14):
                    answered.clear()
                    await harness.applied(server, between(target, f"v{number}"))
                    await asyncio.wait_for(answered.wait(), 10)
            finally:
                done.set()
                await asking

    with harness.http_server("b", "127.0.0.1") as backend:
        target = backend.server_address[1]
        asyncio.run(scenario())
    assert len(statuses) >= 13
    assert set(statuses) == {200}


def test_routes_change_while_a_cluster_changes_whenever_envoy_has_taken_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [entry] = free_ports(1)
    services = [harness.service("web", "127.0.0.1", entry), harness.service("v", "10.96.0.9", 80, waypoint=False)]
    builder, statuses = Builder("", harness.TRUST_DOMAIN), set[int]()

    def built(number: int, target: int, route: str) -> Resources:
        """The cluster changes with the number, its routes with their name."""
        pod = harness.workload("b", "127.0.0.1", backing={"default/v": {80: target}})
        rule = harness.rule(Backend("default/v", 80, 1), response=HeaderEdit({"x-route": route}))
        policy = TrafficPolicy("default/p", (("default/v", 80),), limits=Limits(requests=1000 + number))
        snapshot = harness.snapshot([CALLER, pod], services, [harness.route("r", rule, parent="web")])
        return harness.on_loopback(builder.build(replace(snapshot, traffic={policy.name: policy}), [harness.local(CALLER)], ""), entry)

    async def scenario(target: int) -> None:
        async with harness.waypoint(harness.config(tmp_path)) as (server, _):
            await harness.applied(server, built(0, target, "old"))
            taken, changed = 0, server.changed

            def change() -> None:
                """Before anything else can go out: Envoy has answered."""
                nonlocal taken
                changed()
                stream = server._stream
                if stream is not None and not stream.types[names.CLUSTER].nonce:
                    taken += 1
                    server.set(built(taken, target, "new"))

            monkeypatch.setattr(server, "changed", change)
            change()
            deadline = time.monotonic() + 10
            while (answer := await asyncio.to_thread(harness.request, entry)).headers.get("x-route") != "new":
                statuses.add(answer.status)
                assert time.monotonic() < deadline
            while taken < 53:
                statuses.add((await asyncio.to_thread(harness.request, entry)).status)
                assert time.monotonic() < deadline + 20
            monkeypatch.undo()

    with harness.http_server("b", "127.0.0.1") as backend:
        asyncio.run(scenario(backend.server_address[1]))
    assert statuses <= {200}


@pytest.mark.parametrize("seed", [1, 2])
def test_clusters_that_come_go_and_change_faster_than_envoy_takes_them_are_never_without_endpoints(tmp_path: Path, seed: int) -> None:
    """Else Envoy waits 15 s for endpoints that do not come, and everything after them with it; then it goes on without any."""
    [entry] = free_ports(1)
    chance = random.Random(seed)  # noqa: S311
    backends = tuple(f"default/v{i}" for i in range(4))
    services = [
        harness.service("web", "127.0.0.1", entry),
        *(harness.service(f"v{i}", f"10.96.0.{9 + i}", 80, waypoint=False) for i in range(4)),
    ]
    builder, statuses = Builder("", harness.TRUST_DOMAIN), set[int]()

    def model(targets: Sequence[int]) -> Snapshot:
        """Two of four backends, one or two endpoints, limits of some kind or none."""
        ready = targets[: chance.randint(1, len(targets))]
        pods = [harness.workload(f"b{n}", "127.0.0.1", backing={name: {80: target} for name in backends}) for n, target in enumerate(ready)]
        rule = harness.rule(*(Backend(name, 80, chance.randint(1, 4)) for name in chance.sample(backends, 2)))
        limits = Limits(requests=chance.randint(1000, 2000), per_workload=chance.random() < 0.5)
        policy = TrafficPolicy("default/p", tuple((name, 80) for name in backends), limits=limits)
        traffic = {policy.name: policy} if chance.random() < 0.7 else {}
        return replace(harness.snapshot([CALLER, *pods], services, [harness.route("r", rule, parent="web")]), traffic=traffic)

    async def scenario(targets: Sequence[int]) -> None:
        def built() -> Resources:
            return harness.on_loopback(builder.build(model(targets), [harness.local(CALLER)], ""), entry)

        async with harness.waypoint(harness.config(tmp_path)) as (server, _):
            await harness.applied(server, built())
            done = asyncio.Event()

            async def ask() -> None:
                while not done.is_set():
                    statuses.add((await asyncio.to_thread(harness.request, entry)).status)

            asking = asyncio.create_task(ask())
            try:
                for _ in range(100):
                    server.set(built())
                    await asyncio.sleep(chance.uniform(0, 0.05))
                assert await server.wait_acked(5), server._pending()
            finally:
                done.set()
                await asking

    with harness.http_server("b0", "127.0.0.1") as one, harness.http_server("b1", "127.0.0.1") as other:
        asyncio.run(scenario([one.server_address[1], other.server_address[1]]))
    assert statuses == {200}


def test_endpoints_that_are_wanted_no_more_go_to_a_cluster_that_still_waits_for_them(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, some(cluster="a:1", endpoints="a:1")) as (server, client):
            await client.send(names.CLUSTER)
            cluster = await client.receive()
            server.set(some(cluster="", endpoints=""))
            await client.send(names.ENDPOINTS, subscribe=["a"])
            endpoints = await client.receive()
            assert got(endpoints) == ("ClusterLoadAssignment", {"a": "1"}, [])
            await client.send(names.CLUSTER, nonce=cluster.nonce)
            await client.send(names.ENDPOINTS, nonce=endpoints.nonce)
            assert got(await client.receive()) == ("Cluster", {}, ["a"])

    asyncio.run(scenario())


def secret(version: str) -> dict[str, Resource]:
    return {"spiffe://m/a": Resource(version, b"")}


def test_a_secret_is_answered_when_it_exists_and_at_once_whatever_else_is_under_way(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, some(cluster="a:1", listener="l:1")) as (server, client):
            await client.send(names.CLUSTER)
            assert (await client.receive()).type_url == names.CLUSTER  # and stays unanswered: a cluster waits for its secret
            await client.send(names.SECRET, subscribe=["spiffe://m/a"])
            server.set_secrets({"spiffe://m/other": Resource("7", b"")})
            server.set_secrets(secret("1"))
            first = await client.receive()
            assert (first.type_url, [r.version for r in first.resources], list(first.removed_resources)) == (names.SECRET, ["1"], [])
            await client.send(names.SECRET, nonce=first.nonce)
            server.set_secrets(secret("2"))
            second = await client.receive()
            assert [(r.name, r.version) for r in second.resources] == [("spiffe://m/a", "2")]

    asyncio.run(scenario())


def test_a_secret_is_never_taken_back_and_what_envoy_kept_is_not_sent_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, some()) as (server, client):
            await client.greet(names.CLUSTER, names.LISTENER)
            server.set_secrets(secret("1"))
            await client.send(names.SECRET, subscribe=["spiffe://m/a"], has={"spiffe://m/a": "1"})
            server.set_secrets({})
            server.set(some())
            assert await client.silent()
            assert not server._pending()

    asyncio.run(scenario())


def test_secrets_that_nobody_named_are_not_waited_for_and_do_not_show(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, some()) as (server, client):
            await client.greet(names.CLUSTER, names.LISTENER)
            server.set_secrets({"spiffe://m/a": Resource("1", b"a private key")})
            await client.send(names.SECRET, subscribe=["spiffe://m/b"])
            assert await client.silent()
            assert not server._pending()
            assert "private" not in repr(server.of(names.SECRET))

    asyncio.run(scenario())


def test_what_quotes_a_private_key_is_not_repeated(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, some()) as (server, client):
            server.set_secrets(secret("1"))
            await client.send(names.SECRET, subscribe=["spiffe://m/a"])
            answer = await client.receive()
            await client.send(names.SECRET, nonce=answer.nonce, error="bad: -----BEGIN PRIVATE KEY----- MIG")
            while not server.state.nacks:  # noqa: ASYNC110  nothing announces it
                await asyncio.sleep(0.005)
            assert server.state.last_nack == "Secret spiffe://m/a: not shown, because it quotes a private key"

    asyncio.run(scenario())
