"""The agent's socket, with a stand-in for the supervisor: gRPC is real, kernel and Envoy are not there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from agent.api import Api
from agent.calls.ring import Outcome, Recorded, Ring
from agent.calls.ring import Seen as Called
from agent.config import Config
from agent.enrolment import Enrolled
from agent.model import NO_DIRECT, Backing, LocalWorkload, Service, ServicePort, Snapshot, Workload
from agent.relay import Relay
from agent.report import Connection, ControllerStatus, Status, WaypointStatus
from agent.trace import Pair, Seen, Tracer, Watch
from meshapi import agent_pb2 as pb
from meshapi import agent_pb2_grpc, discovery_pb2, proposal_pb2
from meshapi.graph.answer import Answer, Edge, decode
from tests.tasks import beside, until

STATUS = Status(True, "node-1", (), WaypointStatus(True, "1", 23, 0), ControllerStatus(True, "v", None), (), ())
CALLS = Edge(source="default/frontend", destination="default/redis", kind="service", port=6379, protocol="tcp", rate=2.0)
SEEN = Connection(source="default/frontend", destination="default/redis:6379", hops=(), outcome="closed")


def workload(name: str, node: str = "node-1", backing: tuple[Backing, ...] = ()) -> Workload:
    return Workload(f"default/{name}", name, node, {}, ("10.0.0.1",), "", enrolled=True, ready=True, backing=backing)


class Remembered:
    """What was called: seven connections of the frontend."""

    def __init__(self) -> None:
        self.on = True
        self.since = 1000.0
        self.ring = Ring()
        self.ring.add(Called(False, "default/frontend", "default/redis", "default/redis", 6379, "TCP", Outcome.SERVED), 7)

    async def read(self, since_s: float) -> list[Recorded]:
        return list(self.ring.read(since_s))


class Node:
    """What the Api asks of a supervisor."""

    def __init__(self) -> None:
        redis = workload("redis", backing=(Backing("default/redis", {6379: 6379}),))
        service = Service("default/redis", ("10.96.0.1",), (ServicePort(6379, "", "TCP", "", False, "no L7"),))
        workloads = {w.name: w for w in (workload("frontend"), workload("elsewhere", "node-2"), redis)}
        self.snapshot = Snapshot("1", workloads, {service.name: service})
        self.enrolled = Enrolled((LocalWorkload(workloads["default/frontend"], 7, "/proc/self/ns/net"),))
        self.asked: list[frozenset[Pair]] = []
        self.tracer = Tracer("node-1", self.asked.append)
        self.direct = NO_DIRECT
        self.lost = 0
        self.armed = True
        self.calls = Remembered()

    def status(self) -> Status:
        return STATUS

    async def graph(self, window_s: float) -> Answer:
        return Answer("node-1", window_s, (CALLS,))

    def certified(self, workload: str) -> bool:
        return workload in self.snapshot.workloads

    async def tracing_armed(self) -> bool:
        return self.armed

    def lost_events(self) -> int:
        return self.lost

    def find(self, connection: Connection) -> None:
        """Let every running trace see a connection."""
        for watch in self.tracer._watches:
            if isinstance(watch, Watch):
                watch._put(Seen(connection))


@contextlib.asynccontextmanager
async def served(tmp_path: Path) -> AsyncIterator[tuple[Node, Any]]:
    node = Node()
    config = Config(node="node-1", controller="unix:x", run_dir=tmp_path)
    async with (
        beside(Api(config, cast("Any", node), Relay(config)).run()),
        grpc.aio.insecure_channel(f"unix:{config.api_socket}") as channel,
    ):
        await channel.channel_ready()
        yield node, agent_pb2_grpc.AgentStub(channel)  # type: ignore[no-untyped-call,unused-ignore]


def run(tmp_path: Path, scenario: Callable[[Node, Any], Awaitable[None]]) -> None:
    async def body() -> None:
        async with served(tmp_path) as (node, stub):
            await asyncio.wait_for(scenario(node, stub), 20)

    asyncio.run(body())


def request(destination: str = "redis", source: str = "frontend", **fields: Any) -> pb.TraceRequest:
    return pb.TraceRequest(source=source, destination=destination, **fields)


def test_the_socket_is_for_root_only_and_answers_the_status(tmp_path: Path) -> None:
    async def scenario(_: Node, stub: Any) -> None:
        assert stat.S_IMODE((tmp_path / "agent.sock").stat().st_mode) == 0o600
        document = json.loads((await stub.Status(pb.StatusRequest())).document)
        assert (document["ready"], document["waypoint"]["pid"]) == (True, 23)

    run(tmp_path, scenario)


def test_the_graph_is_of_this_node_over_the_window_that_was_asked_for(tmp_path: Path) -> None:
    async def scenario(_: Node, stub: Any) -> None:
        document = (await stub.Graph(pb.GraphRequest(window_s=7))).document
        assert decode(document, "node-1") == Answer("node-1", 7.0, (CALLS,))

    run(tmp_path, scenario)


def test_a_socket_that_a_killed_agent_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "agent.sock").touch()

    async def scenario(_: Node, stub: Any) -> None:
        assert (await stub.Status(pb.StatusRequest())).document

    run(tmp_path, scenario)


def test_a_trace_without_duration_is_the_plan_alone_and_arms_nothing(tmp_path: Path) -> None:
    async def scenario(node: Node, stub: Any) -> None:
        documents = [json.loads(answer.document) async for answer in stub.Trace(request())]
        assert [(d["kind"], d["verdict"], d["level"]) for d in documents] == [("plan", "ALLOW", "L4")]
        assert node.asked == []

    run(tmp_path, scenario)


def test_a_trace_ends_after_its_count_and_takes_its_filter_away(tmp_path: Path) -> None:
    async def scenario(node: Node, stub: Any) -> None:
        call = stub.Trace(request(duration_s=20, count=3))
        assert json.loads((await call.read()).document)["kind"] == "plan"
        (pair,) = node.asked[-1]
        assert pair == Pair("default/frontend", "default/redis:6379", frozenset({"default/redis"}), pair.allowing)
        for _ in range(5):
            node.find(SEEN)
        assert [json.loads((await call.read()).document)["outcome"] for _ in range(3)] == ["closed"] * 3
        assert await call.read() is grpc.aio.EOF
        await until(lambda: node.asked[-1] == frozenset())

    run(tmp_path, scenario)


def test_a_waypoint_that_does_not_take_what_it_is_told_is_a_problem_of_the_plan(tmp_path: Path) -> None:
    async def scenario(node: Node, stub: Any) -> None:
        node.armed = False
        call = stub.Trace(request(duration_s=20, count=1))
        (problem,) = json.loads((await call.read()).document)["problems"]
        assert "the waypoint of node node-1 does not take what it is told" in problem
        call.cancel()

    run(tmp_path, scenario)


def test_a_probe_over_udp_is_one_datagram_to_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.tracing.netns.run_in", lambda _, work: work())  # entering a namespace needs root
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(5)
        port = receiver.getsockname()[1]
        log = Service("default/log", ("127.0.0.1",), (ServicePort(port, "", "UDP", "", False, "no L7"),))

        async def scenario(node: Node, stub: Any) -> None:
            node.snapshot = Snapshot("1", node.snapshot.workloads, {log.name: log})
            call = stub.Trace(request("log", probe=True))
            assert json.loads((await call.read()).document)["destination"] == f"default/log:{port}/udp"
            assert await asyncio.to_thread(receiver.recv, 10) == b""
            (pair,) = node.asked[0]
            assert pair.service == f"default/log:{port}/udp"
            call.cancel()

        run(tmp_path, scenario)


def test_a_trace_ends_after_its_duration(tmp_path: Path) -> None:
    async def scenario(node: Node, stub: Any) -> None:
        documents = [json.loads(answer.document) async for answer in stub.Trace(request(duration_s=0.05))]
        assert [d["kind"] for d in documents] == ["plan"]
        await until(lambda: len(node.asked) == 2)

    run(tmp_path, scenario)


def test_a_trace_ends_after_its_duration_however_much_there_is_to_report(tmp_path: Path) -> None:
    async def scenario(node: Node, stub: Any) -> None:
        call = stub.Trace(request(duration_s=0.1))
        await call.read()

        async def flood() -> None:
            while True:
                node.find(SEEN)
                await asyncio.sleep(0)

        flooding = asyncio.create_task(flood())
        started = asyncio.get_running_loop().time()
        while await call.read() is not grpc.aio.EOF:
            assert asyncio.get_running_loop().time() - started < 5
        flooding.cancel()

    run(tmp_path, scenario)


def test_a_caller_that_goes_away_takes_its_filter_away(tmp_path: Path) -> None:
    async def scenario(node: Node, stub: Any) -> None:
        call = stub.Trace(request(duration_s=20))
        await call.read()
        assert node.tracer.pairs
        call.cancel()
        await until(lambda: not node.tracer.pairs)
        assert node.asked[-1] == frozenset()

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("asked", "code", "message"),
    [
        pytest.param(request(source="frontent"), grpc.StatusCode.NOT_FOUND, "did you mean default/frontend?", id="source"),
        pytest.param(request("rediss"), grpc.StatusCode.NOT_FOUND, "did you mean default/redis?", id="destination"),
        pytest.param(
            request(source="elsewhere", duration_s=1), grpc.StatusCode.FAILED_PRECONDITION, "node node-2, this is node-1", id="node"
        ),
        pytest.param(request(duration_s=math.nan), grpc.StatusCode.FAILED_PRECONDITION, "--duration is a number", id="no-time"),
        pytest.param(request(duration_s=math.inf), grpc.StatusCode.FAILED_PRECONDITION, "--duration is a number", id="for-ever"),
        pytest.param(request(source="redis", duration_s=1), grpc.StatusCode.FAILED_PRECONDITION, "it is not enrolled", id="not-bound"),
    ],
)
def test_what_cannot_be_traced_is_said(tmp_path: Path, asked: pb.TraceRequest, code: grpc.StatusCode, message: str) -> None:
    async def scenario(node: Node, stub: Any) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            _ = [answer async for answer in stub.Trace(asked)]
        assert failure.value.code() is code
        assert message in str(failure.value.details())
        assert node.asked == []

    run(tmp_path, scenario)


def test_status_is_answered_while_a_trace_runs(tmp_path: Path) -> None:
    async def scenario(_: Node, stub: Any) -> None:
        call = stub.Trace(request(duration_s=20))
        await call.read()
        assert (await stub.Status(pb.StatusRequest(), timeout=2)).document
        call.cancel()

    run(tmp_path, scenario)


def test_calls_are_held_against_a_proposal(tmp_path: Path) -> None:
    deny = discovery_pb2.Policy(namespace="default", name="new", action=discovery_pb2.Policy.DENY, rules=[discovery_pb2.PolicyRule()])
    protected = proposal_pb2.Protected(name="default/redis", policies=["default/new"])
    proposal = proposal_pb2.Proposal(policies=[deny], workloads=[protected])

    async def scenario(_: Node, stub: Any) -> None:
        rows, summary = [json.loads(answer.document) async for answer in stub.Calls(pb.CallsRequest(proposal=proposal))]
        (change,) = rows["calls"]
        assert (change["change"], change["destination"], change["count"]) == ("newly denied", "default/redis:6379", 7)
        assert {**summary, "since": 0} == {"kind": "summary", "node": "node-1", "since": 0, "unchanged": 0, "gone": 0, "forgotten": 0}
        nothing = [json.loads(answer.document) async for answer in stub.Calls(pb.CallsRequest(proposal=proposal_pb2.Proposal()))]
        assert [(one["kind"], one.get("unchanged")) for one in nothing] == [("summary", 7)]

    run(tmp_path, scenario)


def test_calls_to_a_namespace_are_listed(tmp_path: Path) -> None:
    async def scenario(_: Node, stub: Any) -> None:
        rows, _summary = [json.loads(answer.document) async for answer in stub.Calls(pb.CallsRequest(namespace="default"))]
        assert rows["calls"] == [
            {
                "owner": "default/frontend", "source": "default/frontend", "serviceAccount": "default/frontend", "receivers": {"default/redis": {}},
                "destination": "default/redis:6379", "port": 6379, "protocol": "TCP", "method": "", "path": "", "outcome": "served",
                "answer": "allowed", "count": 7,
            }
        ]  # fmt: skip
        elsewhere = [json.loads(answer.document)["kind"] async for answer in stub.Calls(pb.CallsRequest(namespace="bank"))]
        assert elsewhere == ["summary"]

    run(tmp_path, scenario)


def test_a_node_that_remembers_nothing_says_why_and_so_does_one_whose_controller_is_away(tmp_path: Path) -> None:
    async def scenario(node: Node, stub: Any) -> None:
        files = pb.CallsRequest(files=proposal_pb2.CompileRequest())
        with pytest.raises(grpc.aio.AioRpcError, match="the controller, which reads the files, is away"):
            await stub.Calls(files).read()
        node.calls.on = False
        with pytest.raises(grpc.aio.AioRpcError, match="node node-1 remembers no calls: --no-record-flows"):
            await stub.Calls(files).read()

    run(tmp_path, scenario)
