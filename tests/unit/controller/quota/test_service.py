"""What agents are given for what they say, and what a lying one achieves."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest
from prometheus_client import generate_latest

from controller import metrics
from controller.quota import redis
from controller.quota.catalogue import Catalogue, Limit
from controller.quota.service import QuotaService, allot
from controller.quota.store import Member, Memory, State
from meshapi import discovery_pb2, quota_pb2
from meshapi.quotas import MOST_USAGES
from tests.tasks import beside
from tests.unit.controller.identity.harness import OPTIONS, Node, World, join, world
from tests.unit.controller.quota.stores import redis_server

RATE, DAY = "service/default/web/80#0", "service/default/web/80#1"
SOURCE = """
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {clusterIP: 10.96.0.1, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: meshagent.io/v1alpha1
kind: TrafficPolicy
metadata: {name: web}
spec:
  targetRefs: [{kind: Service, name: web}]
  rateLimits: [{requests: 100, scope: Global}, {requests: 1000, interval: 24h, scope: Global}, {requests: 7}]
---
""" + "".join(
    f"apiVersion: meshagent.io/v1alpha1\nkind: Workload\nmetadata: {{name: {name}}}\n"
    f"spec: {{node: {node}, addresses: [{address}], networkNamespace: {name}}}\n---\n"
    for name, node, address in (("flood", "node-1", "10.0.1.1"), ("modest", "node-2", "10.0.1.2"), ("other", "node-2", "10.0.1.3"))
)


def entities(
    *, by: discovery_pb2.RateLimit.Per.ValueType = discovery_pb2.RateLimit.WORKLOAD, requests: int = 100
) -> dict[str, discovery_pb2.Entity]:
    rates = [
        discovery_pb2.RateLimit(is_global=True, requests=requests, interval_ms=1000, burst=50, by=by),
        discovery_pb2.RateLimit(is_global=True, requests=1000, interval_ms=86_400_000, by=by),
    ]
    traffic = discovery_pb2.TrafficPolicy(rate_limits=rates, targets=[discovery_pb2.Parent(service="default/web", port=80)])
    found = {"traffic/default/web": discovery_pb2.Entity(traffic=traffic)}
    for name, node in (("flood", "node-1"), ("modest", "node-2"), ("other", "node-2")):
        one = discovery_pb2.Workload(namespace="default", name=name, service_account="web", node=node, enrolled=True)
        found[f"workload/default/{name}"] = discovery_pb2.Entity(workload=one)
    return found


class Bench:
    """A service with a clock that stands, and agents without a network."""

    def __init__(self, path: Path | None = None) -> None:
        self.now = 86_400.0 * 1000
        self.model = entities()
        self.store = Memory(path, lambda: self.now)
        self.store.load()
        self.service = QuotaService(lambda: self.model, self.store, "mesh.test", lambda: self.now)
        self.nodes = {name: self.service.connected(name) for name in ("node-1", "node-2")}
        self.told: dict[tuple[str, str], float] = {}
        self.refused: list[str] = []

    async def say(self, node: str, caller: str, allowed: int = 0, denied: int = 0, *, limit: str = RATE, s: float = 5, gone: bool = False) -> None:  # fmt: skip
        usage = quota_pb2.QuotaUsage(limit=limit, caller=caller, allowed=allowed, denied=denied, elapsed_ms=int(s * 1000), gone=gone)
        self.service.take(self.nodes[node], quota_pb2.QuotaReport(node=node, usages=[usage]))
        await self.turn()

    async def turn(self) -> None:
        await self.service.turn()
        for connection in self.nodes.values():
            while not connection.out.empty():
                message = connection.out.get_nowait()
                assert message is not None
                self.refused += message.refused
                self.told |= {(share.caller, share.limit): share.millis / 1000 for share in message.shares}

    def rate(self, caller: str, limit: str = RATE) -> float:
        return self.told[f"default/{caller}", limit]


def on_bench(work: Callable[[Bench], Awaitable[None]], path: Path | None = None) -> None:
    async def scenario() -> None:
        bench = Bench(path)
        await work(bench)
        await bench.service.close()

    asyncio.run(scenario())


def test_a_caller_that_comes_has_its_part_at_once_and_what_it_does_not_want_goes_back() -> None:
    async def work(bench: Bench) -> None:
        await bench.say("node-1", "default/flood", s=0)
        assert bench.rate("flood") == 100
        await bench.say("node-2", "default/modest", s=0)
        assert (bench.rate("flood"), bench.rate("modest")) == (50, 50)
        await bench.say("node-1", "default/flood", 250, 4750)
        bench.now += 5
        await bench.say("node-2", "default/modest", 50)
        assert 10 < bench.rate("modest") < 12
        assert bench.rate("flood") == pytest.approx(100 - bench.rate("modest"), abs=0.01)
        await bench.say("node-2", "default/modest", gone=True)
        assert bench.rate("flood") == 100

    on_bench(work)


def test_a_node_speaks_for_its_own_callers_only() -> None:
    async def work(bench: Bench) -> None:
        await bench.say("node-2", "default/modest", s=0)
        await bench.say("node-1", "default/modest", 0, 10**18)
        await bench.say("node-1", "default/modest", gone=True)
        await bench.say("node-1", "default/nobody", s=0)
        await bench.say("node-1", "default/flood", limit="service/default/web/80#2", s=0)
        assert len(bench.refused) == 4
        assert "does not live on node node-1" in bench.refused[0]
        assert "there is none of this name" in bench.refused[3]
        assert bench.told == {("default/modest", RATE): 100}

    on_bench(work)


def test_a_lying_node_takes_from_nobody_his_part() -> None:
    async def work(bench: Bench) -> None:
        for caller, node in (("flood", "node-1"), ("modest", "node-2"), ("other", "node-2")):
            await bench.say(node, f"default/{caller}", s=0)
        for _ in range(7):
            bench.now += 5
            await bench.say("node-1", "default/flood", 2**64 - 1, 0)
            await bench.say("node-2", "default/modest", 100, 400)
            await bench.say("node-2", "default/other", 100, 400)
            assert bench.rate("modest") >= 33
            assert bench.rate("other") >= 33

    on_bench(work)


def test_a_lying_node_uses_up_its_own_part_of_a_counted_limit_and_no_more() -> None:
    async def work(bench: Bench) -> None:
        await bench.say("node-2", "default/modest", limit=DAY, s=0)
        await bench.say("node-1", "default/flood", limit=DAY, s=0)
        for _ in range(200):
            bench.now += 1
            await bench.say("node-1", "default/flood", 2**63, limit=DAY, s=1)
            await bench.say("node-2", "default/modest", 0, limit=DAY, s=1)
        used = bench.store.state(DAY, int(bench.now) // 86_400).used
        assert 450 < used["default/flood"] <= 560, used
        assert bench.rate("modest", DAY) > 20

    on_bench(work)


def test_a_counted_limit_is_given_out_once_and_begins_anew_with_its_interval(tmp_path: Path) -> None:
    spent = 0.0

    async def spend(bench: Bench) -> None:
        nonlocal spent
        for _ in range(60):
            bench.now += 5
            use = int(5 * bench.rate("flood", DAY))
            spent += use
            await bench.say("node-1", "default/flood", use, 100, limit=DAY)

    async def work(bench: Bench) -> None:
        await bench.say("node-1", "default/flood", limit=DAY, s=0)
        assert bench.rate("flood", DAY) == 100
        await spend(bench)
        assert 985 <= spent <= 1000
        assert bench.rate("flood", DAY) <= 0.1

    async def after_restart(bench: Bench) -> None:
        bench.now += 500
        await bench.say("node-1", "default/flood", limit=DAY, s=0)
        assert bench.rate("flood", DAY) <= 0.1
        bench.now += 86_400
        await bench.say("node-1", "default/flood", limit=DAY, s=0)
        assert bench.rate("flood", DAY) == 100

    on_bench(work, tmp_path / "quotas.json")
    on_bench(after_restart, tmp_path / "quotas.json")


def test_a_service_account_on_two_nodes_is_one_caller() -> None:
    limit = Limit(RATE, 100, 1000, 50, discovery_pb2.RateLimit.SERVICE_ACCOUNT, {"default/gold": 3})
    demands = {Member("node-1", "default/web"): 500.0, Member("node-2", "default/web"): 5.0, Member("node-1", "default/gold"): math.inf}
    found = allot(limit, State(demands), 0.0)
    assert found == pytest.approx(
        {Member("node-1", "default/web"): 20, Member("node-2", "default/web"): 5, Member("node-1", "default/gold"): 75}
    )


def test_a_changed_limit_is_told_and_a_removed_one_forgotten() -> None:
    async def work(bench: Bench) -> None:
        await bench.say("node-1", "default/flood", s=0)
        bench.model = entities(requests=40)
        await bench.turn()
        assert bench.rate("flood") == 40
        bench.model = {}
        await bench.turn()
        assert not bench.nodes["node-1"].held

    on_bench(work)


def test_who_called_under_a_limit_that_was_removed_has_no_part_of_the_next_of_its_name() -> None:
    async def work(bench: Bench) -> None:
        await bench.say("node-1", "default/flood", s=0)
        await bench.say("node-2", "default/modest", s=0)
        assert bench.rate("flood") == 50
        limited, bench.model = bench.model, {}
        await bench.turn()
        bench.model = limited
        await bench.say("node-1", "default/flood", s=0)
        assert bench.rate("flood") == 100

    on_bench(work)


def test_noise_changes_no_share() -> None:
    async def work(bench: Bench) -> None:
        await bench.say("node-1", "default/flood", s=0)
        await bench.say("node-2", "default/modest", s=0)
        await bench.say("node-1", "default/flood", 250, 4750)
        await bench.say("node-2", "default/modest", 50)
        bench.told.clear()
        for noise in (51, 47, 50, 53, 49, 48, 52):
            bench.now += 5
            await bench.say("node-2", "default/modest", noise)
            await bench.say("node-1", "default/flood", 440, 4000 + noise)
        assert bench.told == {}

    on_bench(work)


def test_which_callers_live_where_is_read_from_the_model() -> None:
    catalogue = Catalogue.of(entities(by=discovery_pb2.RateLimit.NAMESPACE))
    assert catalogue.objection("node-1", RATE, "default") == ""
    assert catalogue.objection("node-3", RATE, "default")
    assert catalogue.objection("node-1", RATE, "default/flood")
    assert Catalogue.of({}) == Catalogue()


async def _calls(served: World, node: Node, report: quota_pb2.QuotaReport) -> list[quota_pb2.QuotaAssignment]:
    async with grpc.aio.secure_channel(served.address, node.credentials, OPTIONS) as channel:
        call = channel.stream_stream(
            "/meshagent.v1.Quotas/Share", quota_pb2.QuotaReport.SerializeToString, quota_pb2.QuotaAssignment.FromString
        )()
        await call.write(report)
        found = []
        for _ in range(2):
            message = await call.read()
            assert isinstance(message, quota_pb2.QuotaAssignment)
            found.append(message)
        call.cancel()
        return found


def _report(node: str, *callers: str) -> quota_pb2.QuotaReport:
    return quota_pb2.QuotaReport(node=node, usages=[quota_pb2.QuotaUsage(limit=RATE, caller=caller) for caller in callers])


def test_over_tcp_the_certificate_says_which_node_it_is(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, SOURCE) as served, beside(served.controller.quotas.run()):
            node = await join(served, "node-1")
            greeting, shares = await _calls(served, node, _report("node-1", "default/flood"))
            assert greeting == quota_pb2.QuotaAssignment()
            assert [(share.caller, share.millis, share.burst) for share in shares.shares] == [("default/flood", 100_000, 50)]
            for report, code, text in (
                (_report("node-2", "default/modest"), grpc.StatusCode.PERMISSION_DENIED, "node-2 is not yours"),
                (_report(""), grpc.StatusCode.INVALID_ARGUMENT, "node:"),
                (_report("node-1", *["default/flood"] * (MOST_USAGES + 1)), grpc.StatusCode.INVALID_ARGUMENT, "usages: 10001"),
            ):
                with pytest.raises(grpc.aio.AioRpcError, match=text) as caught:
                    await _calls(served, node, report)
                assert caught.value.code() is code

    asyncio.run(scenario())


def test_who_says_all_it_has_to_say_at_once_is_answered_and_let_go(tmp_path: Path) -> None:
    def lie(served: World, node: Node) -> list[str]:
        with grpc.secure_channel(served.address, node.credentials, OPTIONS) as channel:
            share = channel.stream_stream(
                "/meshagent.v1.Quotas/Share", quota_pb2.QuotaReport.SerializeToString, quota_pb2.QuotaAssignment.FromString
            )
            return [text for answer in share(iter([_report("node-1", "default/modest")]), timeout=20) for text in answer.refused]

    async def scenario() -> None:
        async with world(tmp_path, SOURCE) as served, beside(served.controller.quotas.run()):
            node = await join(served, "node-1")
            for _ in range(7):
                assert await asyncio.to_thread(lie, served, node) == [f'caller "default/modest" of {RATE}: does not live on node node-1']

    asyncio.run(scenario())


def test_controllers_with_one_redis_share_one_limit(tmp_path: Path) -> None:
    async def scenario() -> None:
        model = entities()
        with redis_server(tmp_path) as server:
            stores = [redis.WithFallback(redis.Shared(redis.client(server.url)), Memory()) for _ in range(2)]
            one, two = (QuotaService(lambda: model, store, "mesh.test") for store in stores)
            first, second = one.connected("node-1"), two.connected("node-2")
            one.take(first, _report("node-1", "default/flood"))
            await one.turn()
            two.take(second, _report("node-2", "default/modest"))
            await two.turn()
            await one.turn()
            assert [held.millis for held in (*first.held.values(), *second.held.values())] == [50_000, 50_000]
            usage = quota_pb2.QuotaUsage(limit=RATE, caller="default/modest", allowed=50, elapsed_ms=5000)
            two.take(second, quota_pb2.QuotaReport(node="node-2", usages=[usage]))
            await two.turn()
            await one.turn()
            total = sum(held.millis for held in (*first.held.values(), *second.held.values()))
            assert first.held[RATE, Member("node-1", "default/flood")].millis > 80_000
            assert 99_000 < total <= 100_000
            for service in (one, two):
                await service.close()

    asyncio.run(scenario())


def test_what_limits_allow_and_give_is_in_metrics() -> None:
    async def work(bench: Bench) -> None:
        await bench.say("node-1", "default/flood", s=0)
        await bench.say("node-2", "default/modest", s=0)
        await bench.say("node-2", "default/modest", 50)
        shown = generate_latest(metrics.REGISTRY).decode()
        for name, value in (("limit", "100.0"), ("granted", "100.0"), ("demand", "11.77")):
            assert f'mesh_quota_{name}_requests_per_second{{limit="{RATE}"}} {value}' in shown
        bench.model = {}
        await bench.turn()
        assert RATE not in generate_latest(metrics.REGISTRY).decode()

    on_bench(work)
