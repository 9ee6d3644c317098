"""Global limits: two nodes' real Envoys, agents' and controller's real parts, on loopback. What the agent does alone is told by words."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from envoy.service.rate_limit_quota.v3 import rlqs_pb2

from agent import quota as part
from agent.l7 import names, quota
from agent.l7.clusters import socket_address
from agent.l7.resources import Resources, pack
from agent.l7.snapshot import build
from agent.model import Service, Snapshot, Workload
from agent.quota import Quotas
from agent.traffic import Failure, Per, RateLimit, TrafficPolicy
from controller.quota.service import QuotaService
from controller.quota.store import Memory
from meshapi import discovery_pb2, quota_pb2, quota_pb2_grpc
from tests.ports import free_ports
from tests.tasks import beside
from tests.unit.agent.l7 import harness

FLOOD = dataclasses.replace(harness.workload("flood", "10.0.0.1"), node="node-1")
MODEST = dataclasses.replace(harness.workload("modest", "10.0.0.2"), node="node-2")
ADDRESSES = {FLOOD.name: "127.0.0.1", MODEST.name: "127.0.0.2"}
RATE = 60


class Load(threading.Thread):
    """Sends so many requests a second, one after the other, until it is stopped; statuses by second."""

    def __init__(self, address: str, port: int, rate: float) -> None:
        super().__init__(daemon=True)
        self.seen: list[tuple[float, int]] = []
        self.reason = ""
        self._where = (address, port)
        self._rate = rate
        self._stop_it = threading.Event()

    def run(self) -> None:
        connection = http.client.HTTPConnection(*self._where, timeout=10)
        begin, count = time.monotonic(), 0
        while not self._stop_it.wait(max(0.0, begin + count / self._rate - time.monotonic())):
            count = max(count + 1, int((time.monotonic() - begin - 0.2) * self._rate))  # what a slow machine missed is not made up for
            connection.request("GET", "/")
            response = connection.getresponse()
            response.read()
            self.seen.append((time.monotonic(), response.status))
            if response.status == 429:
                self.reason = str(response.headers[names.REASON_HEADER])
        connection.close()

    def counts(self, begin: float, end: float) -> Counter[int]:
        return Counter(status for at, status in list(self.seen) if begin <= at < end)

    def stop(self) -> None:
        self._stop_it.set()
        self.join()


@contextlib.contextmanager
def load(address: str, port: int, rate: float) -> Iterator[Load]:
    running = Load(address, port, rate)
    running.start()
    try:
        yield running
    finally:
        running.stop()


def policy(port: int, *limits: RateLimit) -> TrafficPolicy:
    return TrafficPolicy("default/web", (("default/web", port),), rate_limits=limits)


def scene(port: int, target: int, *limits: RateLimit) -> Snapshot:
    pod = harness.workload("pod", "127.0.0.1", backing={"default/web": {port: target}})
    web = Service("default/web", tuple(ADDRESSES.values()), harness.service("web", "127.0.0.1", port).ports)
    snapshot = harness.snapshot([FLOOD, MODEST, pod], [web])
    return dataclasses.replace(snapshot, traffic={"default/web": policy(port, *limits)})


def at(resources: Resources, address: str, port: int) -> Resources:
    """On loopback, at an address of the node's own."""
    found = dict(harness.on_loopback(resources, port))
    listeners = {}
    for name in found[names.LISTENER]:
        listener = harness.decoded(found, names.LISTENER, name)
        listener.address.CopyFrom(socket_address(address, port))
        listeners[name] = pack(listener)
    return {**found, names.LISTENER: listeners}


class Controller:
    """The controller's part on a socket of its own; it can go away and come back."""

    def __init__(self, directory: Path, port: int, rate: discovery_pb2.RateLimit) -> None:
        self.address = f"unix:{directory / 'controller.sock'}"
        self._path = directory / "quotas.json"
        target = discovery_pb2.Parent(service="default/web", port=port)
        traffic = discovery_pb2.TrafficPolicy(rate_limits=[rate], targets=[target])
        self._model = {"traffic/default/web": discovery_pb2.Entity(traffic=traffic)}
        for one in (FLOOD, MODEST):
            workload = discovery_pb2.Workload(namespace="default", name=one.name.partition("/")[2], node=one.node, enrolled=True)
            self._model[f"workload/{one.name}"] = discovery_pb2.Entity(workload=workload)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[QuotaService]:
        store = Memory(self._path)
        store.load()
        service = QuotaService(lambda: self._model, store, "mesh.test")
        server = grpc.aio.server()
        quota_pb2_grpc.add_QuotasServicer_to_server(service, server)  # type: ignore[no-untyped-call,unused-ignore]
        server.add_insecure_port(self.address)
        await server.start()
        try:
            async with beside(service.run()):
                yield service
        finally:
            await server.stop(0)
            await service.close()


@contextlib.asynccontextmanager
async def node(directory: Path, one: Workload, snapshot: Snapshot, port: int, controller: Controller) -> AsyncIterator[Quotas]:
    """One node: Envoy, its configuration, the agent's part."""
    await asyncio.to_thread(directory.mkdir)
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 500)]
    async with grpc.aio.insecure_channel(controller.address, options=options) as channel:
        quotas = Quotas(one.node)
        quotas.update(snapshot)
        resources = build(snapshot, [harness.local(one)], trust_domain=harness.TRUST_DOMAIN)
        async with (
            harness.waypoint(harness.config(directory), quotas=quotas.serve) as (server, _),
            beside(quotas.run()),
            beside(quotas.follow(channel)),
        ):
            await harness.applied(server, at(resources, ADDRESSES[one.name], port))
            yield quotas


@contextlib.asynccontextmanager
async def mesh(directory: Path, limit: RateLimit, rate: discovery_pb2.RateLimit) -> AsyncIterator[tuple[Controller, int]]:
    """Two nodes and a service, without the controller running."""
    (port,) = free_ports(1)
    with harness.http_server("pod", "127.0.0.1") as server:
        snapshot = scene(port, server.server_address[1], limit)
        controller = Controller(directory, port, rate)
        async with (
            node(directory / "one", FLOOD, snapshot, port, controller),
            node(directory / "two", MODEST, snapshot, port, controller),
        ):
            yield controller, port


def wait(seconds: float) -> tuple[float, float]:
    begin = time.monotonic()
    time.sleep(seconds)
    return begin, time.monotonic()


@pytest.mark.timeout(300)
def test_two_envoys_keep_one_limit_and_the_modest_caller_gets_what_it_wants(tmp_path: Path) -> None:
    limit = RateLimit(Per.WORKLOAD, RATE, 1000, RATE // 2, True)
    rate = discovery_pb2.RateLimit(is_global=True, requests=RATE, interval_ms=1000, burst=RATE // 2, by=discovery_pb2.RateLimit.WORKLOAD)

    def traffic(port: int) -> None:
        flood_at, modest_at = ADDRESSES.values()
        with load(flood_at, port, 4 * RATE) as flood:
            alone = wait(8)
            with load(modest_at, port, 13) as modest:
                joined = wait(2)
                wait(9)  # until both have reported once
                steady = wait(10)
            left = time.monotonic()
            wait(14)
            after = wait(5)
        in_joined = modest.counts(*joined)
        passed = flood.counts(*steady)[200], modest.counts(*steady)[200]
        total = sum(passed) / (steady[1] - steady[0])
        gained = next((second for second in range(2, 19) if flood.counts(left + second, left + second + 2)[200] >= 1.9 * 0.9 * RATE), 99)
        print("alone", flood.counts(*alone), "joined", in_joined, "steady", passed, total, "regained after", gained, flood.counts(*after))
        assert flood.reason == "rate-limit"
        assert flood.counts(*alone)[200] <= 8 * RATE * 1.1 + RATE
        assert in_joined[429] <= 1
        assert modest.counts(*steady)[429] == 0
        assert passed[0] >= 10 * (RATE - 13 * 1.35)
        assert 0.8 * RATE <= total <= 1.1 * RATE
        assert gained <= 12

    async def scenario() -> None:
        async with mesh(tmp_path, limit, rate) as (controller, port), controller.running():
            await asyncio.to_thread(traffic, port)

    asyncio.run(scenario())


@pytest.mark.timeout(300)
def test_a_quota_is_kept_over_a_restart_of_the_controller_and_never_exceeded(tmp_path: Path) -> None:
    requests = 300
    limit = RateLimit(Per.WORKLOAD, requests, 86_400_000, 1, True)
    rate = discovery_pb2.RateLimit(is_global=True, requests=requests, interval_ms=86_400_000, by=discovery_pb2.RateLimit.WORKLOAD)

    async def scenario() -> None:
        async with mesh(tmp_path, limit, rate) as (controller, port):
            with load(ADDRESSES[FLOOD.name], port, 80) as flood:
                async with controller.running():
                    await asyncio.sleep(15)
                before = flood.counts(0, time.monotonic())[200]
                assert 150 <= before < requests
                async with controller.running() as service:
                    await asyncio.sleep(25)
                    end = time.monotonic()
                    last = flood.counts(end - 5, end)
                    assert last[200] <= 15
                    await service.turn()
                total = flood.counts(0, time.monotonic())[200]
                print("quota: before the restart", before, "in all", total)
                assert before < total <= requests * 1.02

    asyncio.run(scenario())


def test_without_a_controller_a_burst_is_bounded_and_refusals_say_why_to_http_and_grpc(tmp_path: Path) -> None:
    limit = RateLimit(Per.WORKLOAD, 10, 1000, 4, True)  # of two nodes: 5 a second here, 2 at once

    def burst(port: int) -> tuple[Counter[int], harness.Answer, harness.Answer]:
        harness.request(port)
        time.sleep(0.5)  # by now the agent has answered
        statuses = Counter(harness.request(port).status for _ in range(60))
        return statuses, harness.request(port), harness.request(port, headers={"content-type": "application/grpc"})

    async def scenario() -> None:
        async with mesh(tmp_path, limit, discovery_pb2.RateLimit()) as (_, port):
            begin = time.monotonic()
            statuses, refused, grpc_refused = await asyncio.to_thread(burst, port)
            assert statuses[429] > 0
            assert statuses[200] <= 2 + 5 * (time.monotonic() - begin) + 1
            assert (refused.status, refused.headers[names.REASON_HEADER], refused.headers["retry-after"]) == (429, "rate-limit", "1")
            assert (grpc_refused.status, grpc_refused.headers["grpc-status"]) == (200, "14")  # UNAVAILABLE

    asyncio.run(scenario())


# The agent's part by itself


def used(limit: str, caller: str, allowed: int = 0, denied: int = 0) -> rlqs_pb2.RateLimitQuotaUsageReports:
    report = rlqs_pb2.RateLimitQuotaUsageReports(domain=quota.DOMAIN)
    report.bucket_quota_usages.add(bucket_id=quota.bucket_id(limit, caller), num_requests_allowed=allowed, num_requests_denied=denied)
    return report


def alone(*limits: RateLimit, now: list[float] | None = None) -> Quotas:
    clock = now or [0.0]
    quotas = Quotas("node-1", lambda: clock[0])
    quotas.update(scene(80, 8080, *limits))
    return quotas


NAME = "service/default/web/80#0"


def test_until_the_controller_answers_a_node_has_an_even_share() -> None:
    quotas = alone(RateLimit(Per.WORKLOAD, 100, 1000, 50, True))
    (first,) = quotas.heard(used(NAME, "default/flood", 1))
    bucket = first.quota_assignment_action.rate_limit_strategy.token_bucket
    assert (bucket.tokens_per_fill.value, bucket.fill_interval.seconds, bucket.max_tokens) == (50_000, 1000, 25)
    (second,) = quotas.heard(used(NAME, "default/other", 1))
    assert second.quota_assignment_action.rate_limit_strategy.token_bucket.tokens_per_fill.value == 25_000


def test_what_was_used_is_told_once_and_a_quiet_caller_forgotten() -> None:
    now = [0.0]
    quotas = alone(RateLimit(Per.WORKLOAD, 100, 1000, 50, True), now=now)
    quotas.heard(used(NAME, "default/flood", 1))
    assert quotas.usages() == [quota_pb2.QuotaUsage(limit=NAME, caller="default/flood", allowed=1)]
    now[0] = 5.0
    assert quotas.heard(used(NAME, "default/flood", 17, 6)) == []
    told = quota_pb2.QuotaUsage(limit=NAME, caller="default/flood", allowed=17, denied=6, elapsed_ms=5000)
    assert quotas.usages() == [told]
    assert quotas.usages() == []
    for _ in range(part.QUIET):
        now[0] += 5
        actions = quotas.heard(used(NAME, "default/flood"))
    assert [action.WhichOneof("bucket_action") for action in actions] == ["abandon_action"]
    assert quotas.usages() == [quota_pb2.QuotaUsage(limit=NAME, caller="default/flood", gone=True)]


def test_a_controller_that_comes_back_is_told_what_callers_want() -> None:
    now = [0.0]
    quotas = alone(RateLimit(Per.WORKLOAD, 100, 1000, 50, True), now=now)
    quotas.heard(used(NAME, "default/flood", 1))
    quotas.usages()
    now[0] = 5.0
    quotas.heard(used(NAME, "default/flood", 17, 6))
    quotas.usages()
    quotas._anew()
    told = quota_pb2.QuotaUsage(limit=NAME, caller="default/flood", denied=23, elapsed_ms=5000)
    assert quotas.usages() == [told], "what was allowed has been counted"
    now[0] = 15.0
    quotas.heard(used(NAME, "default/flood", 30, 6))
    quotas._anew()
    assert quotas.usages() == [quota_pb2.QuotaUsage(limit=NAME, caller="default/flood", allowed=30, denied=6, elapsed_ms=10_000)]


def test_a_share_that_never_changes_is_told_again_before_envoy_forgets_it() -> None:
    now = [0.0]
    quotas = alone(RateLimit(Per.WORKLOAD, 100, 1000, 50, True), now=now)
    quotas.heard(used(NAME, "default/flood", 1))
    quotas.given(quota_pb2.QuotaAssignment(shares=[quota_pb2.QuotaShare(limit=NAME, caller="default/flood", millis=70_000, burst=35)]))
    now[0] = part.REFRESH_S - 1
    assert quotas.heard(used(NAME, "default/flood", 17)) == []
    now[0] = part.REFRESH_S + 1
    (action,) = quotas.heard(used(NAME, "default/flood", 17))
    assert action == quota.share(NAME, "default/flood", 70_000, 35)
    assert action.quota_assignment_action.assignment_time_to_live.seconds > 2 * part.REFRESH_S
    assert quotas.heard(used(NAME, "default/flood", 17)) == []


def test_a_filter_that_begins_anew_is_told_its_share_although_the_old_one_still_reports() -> None:
    now = [0.0]
    quotas = alone(RateLimit(Per.WORKLOAD, 100, 1000, 50, True), now=now)
    quotas.heard(used(NAME, "default/flood", 3))
    quotas.update(scene(80, 8080, RateLimit(Per.WORKLOAD, 1, 2000, 1, True)))
    now[0] = 1.0
    assert len(quotas.heard(used(NAME, "default/flood", 3))) == 1, "the old one's last words"
    now[0] = 2.0
    assert len(quotas.heard(used(NAME, "default/flood", 1))) == 1, "the new one's first"
    now[0] = 1.0 + part.ANEW_S
    assert quotas.heard(used(NAME, "default/flood", 1)) == []


def test_a_caller_of_whom_envoy_says_nothing_any_more_has_gone() -> None:
    now = [0.0]
    quotas = alone(RateLimit(Per.WORKLOAD, 100, 1000, 50, True), now=now)
    quotas.heard(used(NAME, "default/flood", 3))
    quotas.usages()
    now[0] = part.LOST_S + 1
    assert [(usage.caller, usage.gone) for usage in quotas.usages()] == [("default/flood", True)]


def test_a_limit_that_is_gone_is_not_asked_about_by_each_request() -> None:
    quotas = alone(RateLimit(Per.WORKLOAD, 100, 1000, 50, True))
    (action,) = quotas.heard(used("service/default/web/80#1", "default/flood", 3))
    assert action.quota_assignment_action.rate_limit_strategy.blanket_rule == 0
    (action,) = quotas.heard(used("service/default/web/80#1", "default/flood"))
    assert action.HasField("abandon_action")


@pytest.mark.parametrize(
    ("after", "told"),
    [
        ([], []),  # the controller knows no such limit any more
        ([RateLimit(Per.SERVICE_ACCOUNT, 100, 1000, 50, True)], [(3, True)]),
        ([RateLimit(Per.WORKLOAD, 1, 2000, 1, True)], [(3, True)]),  # retry-after is another
        ([RateLimit(Per.WORKLOAD, 90, 1000, 50, True)], [(3, False)]),
    ],
)
def test_callers_of_a_limit_that_envoy_begins_anew_are_forgotten(after: list[RateLimit], told: list[tuple[int, bool]]) -> None:
    quotas = alone(RateLimit(Per.WORKLOAD, 100, 1000, 50, True))
    quotas.heard(used(NAME, "default/flood", 3))
    quotas.update(scene(80, 8080, *after))
    assert [(usage.allowed, usage.gone) for usage in quotas.usages()] == told
    quotas._anew()
    assert bool(quotas.usages()) == (told == [(3, False)])


@pytest.mark.parametrize(
    ("failure", "expected"),
    [(Failure.SHARE, "token_bucket"), (Failure.ALLOW, "ALLOW_ALL"), (Failure.DENY, "DENY_ALL")],
)
def test_without_the_controller_a_limit_does_what_its_failure_says(
    failure: Failure, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part, "PATIENCE_S", 0.01)
    monkeypatch.setattr(part, "RETRY_S", 0.02)

    async def scenario() -> None:
        quotas = Quotas("node-1")
        quotas.update(scene(80, 8080, RateLimit(Per.WORKLOAD, 100, 1000, 50, True, failure)))
        out: asyncio.Queue[rlqs_pb2.RateLimitQuotaResponse] = asyncio.Queue()
        quotas._streams.add(out)
        quotas.heard(used(NAME, "default/flood", 1))
        async with beside(quotas.run()):
            (action,) = (await asyncio.wait_for(out.get(), 10)).bucket_action
            assert quotas.problems()
        strategy = action.quota_assignment_action.rate_limit_strategy
        kind = strategy.WhichOneof("strategy")
        assert expected == (kind if kind == "token_bucket" else strategy.BlanketRule.Name(strategy.blanket_rule))

    asyncio.run(scenario())


def test_only_global_limits_wake_the_filter_and_each_node_has_the_whole_as_its_bound(tmp_path: Path) -> None:
    limits = (
        RateLimit(Per.SERVICE, 7, 1000, 7),
        RateLimit(Per.NAMESPACE, 50, 1000, 25, True),
        RateLimit(Per.WORKLOAD, 99, 86_400_000, 1, True),
    )
    resources = build(scene(80, 8080, *limits), [harness.local(FLOOD)], trust_domain=harness.TRUST_DOMAIN)
    routes = harness.decoded(resources, names.ROUTES, names.service("default/web", 80))
    assert {*quota.FILTERS} <= routes.typed_per_filter_config.keys()
    harness.validate(resources, tmp_path)


def test_each_connection_is_followed_until_it_is_given_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        said: asyncio.Queue[str] = asyncio.Queue()

        async def share(requests: Any, _: Any) -> None:
            said.put_nowait("begin")
            try:
                async for _ in requests:
                    pass
            finally:
                said.put_nowait("end")

        server = grpc.aio.server()
        method: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(share)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("meshagent.v1.Quotas", {"Share": method}),))
        server.add_insecure_port(f"unix:{tmp_path}/controller.sock")
        await server.start()
        quotas = Quotas("node-1")
        for _ in range(3):
            async with grpc.aio.insecure_channel(f"unix:{tmp_path}/controller.sock") as channel:
                async with beside(quotas.follow(channel)):
                    assert await asyncio.wait_for(said.get(), 30) == "begin"
                assert await asyncio.wait_for(said.get(), 30) == "end"
        await server.stop(0)

    asyncio.run(scenario())
