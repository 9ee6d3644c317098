"""Questions through the controller: a real controller, agents' sockets with stand-ins for supervisors behind them, gRPC in between."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from agent.api import Api
from agent.config import Config
from agent.model import LocalWorkload, Snapshot
from agent.observation import Observation
from agent.receiving import Reception
from agent.relay import Relay
from agent.report import Hop
from agent.trace import Seen, Watch
from controller import relay as relaying
from controller.page.live import Live
from controller.server import Controller, ServerTls
from meshapi import agent_pb2, agent_pb2_grpc, relay_pb2_grpc
from meshapi import relay_pb2 as pb
from tests.tasks import beside, until
from tests.unit.agent.test_api import SEEN, Node, workload
from tests.unit.controller.harness import Authority, serve

MESH = """
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {name: frontend}
spec: {node: node-1, addresses: [10.0.1.1], networkNamespace: frontend}
---
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {name: elsewhere, labels: {app: far}}
spec: {node: node-2, addresses: [10.0.2.1], networkNamespace: elsewhere}
---
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {name: redis}
spec: {node: node-1, addresses: [10.0.1.3], networkNamespace: redis}
---
apiVersion: v1
kind: Service
metadata: {name: far}
spec: {clusterIP: 10.96.0.2, selector: {app: far}, ports: [{port: 80}]}
"""


class Place:
    """A node: what a supervisor would be, its socket and its end of the relay."""

    def __init__(self, name: str, directory: Path, controller: str) -> None:
        self.config = Config(node=name, controller=controller, run_dir=directory / name)
        self.config.run_dir.mkdir()
        self.node = Node()
        if name == "node-2":
            far = workload("elsewhere", "node-2")
            self.node.snapshot = Snapshot("1", self.node.snapshot.workloads, self.node.snapshot.services)
            self.node.enrolled = type(self.node.enrolled)((LocalWorkload(far, 7, "/proc/self/ns/net"),))
        self.relay = Relay(self.config)
        self.api = Api(self.config, cast("Any", self.node), self.relay)


@contextlib.asynccontextmanager
async def mesh(tmp_path: Path, tls: ServerTls | None = None) -> AsyncIterator[tuple[Controller, Place, Place]]:
    """A controller, and two nodes that have offered to answer."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "mesh.yaml").write_text(MESH)
    socket = tmp_path / "controller.sock"
    async with serve(tmp_path / "src", socket, tls) as controller, contextlib.AsyncExitStack() as stack:
        places = [Place(name, tmp_path, f"unix:{socket}") for name in ("node-1", "node-2")]
        for place in places:
            await stack.enter_async_context(beside(place.api.run()))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"unix:{socket}"))
        for place in places:
            await stack.enter_async_context(beside(place.relay.run(channel)))
        await until(lambda: controller.relay.nodes == {"node-1", "node-2"})
        yield controller, places[0], places[1]


def run(tmp_path: Path, scenario: Callable[[Controller, Place, Place], Awaitable[None]], tls: ServerTls | None = None) -> None:
    async def body() -> None:
        async with mesh(tmp_path, tls) as (controller, near, far):
            await asyncio.wait_for(scenario(controller, near, far), 30)

    asyncio.run(body())


@contextlib.asynccontextmanager
async def asking(place: Place | Controller, credentials: grpc.ChannelCredentials | None = None) -> AsyncIterator[Any]:
    """A stub for an agent, or for the relay of a controller."""
    if isinstance(place, Place):
        async with grpc.aio.insecure_channel(f"unix:{place.config.api_socket}") as channel:
            yield agent_pb2_grpc.AgentStub(channel)  # type: ignore[no-untyped-call,unused-ignore]
    elif credentials is None:
        async with grpc.aio.insecure_channel(f"unix:{place.settings.socket}") as channel:
            yield relay_pb2_grpc.RelayStub(channel)  # type: ignore[no-untyped-call,unused-ignore]
    else:
        async with grpc.aio.secure_channel(f"127.0.0.1:{place.port}", credentials) as channel:
            yield relay_pb2_grpc.RelayStub(channel)  # type: ignore[no-untyped-call,unused-ignore]


def trace(source: str = "elsewhere", **fields: Any) -> agent_pb2.TraceRequest:
    return agent_pb2.TraceRequest(source=source, destination="redis", **fields)


def test_an_agent_asks_the_node_of_the_source(tmp_path: Path) -> None:
    async def scenario(_: Controller, near: Place, far: Place) -> None:
        async with asking(near) as agent:
            call = agent.Trace(trace(duration_s=20, count=2))
            assert json.loads((await call.read()).document)["source"] == "default/elsewhere"
            await until(lambda: bool(far.node.tracer.pairs))
            far.node.find(SEEN)
            far.node.find(SEEN)
            assert [json.loads((await call.read()).document)["outcome"] for _ in range(2)] == ["closed", "closed"]
            assert await call.read() is grpc.aio.EOF
            assert near.node.asked == []

    run(tmp_path, scenario)


def test_an_offer_ends_at_once_also_if_it_never_reached_the_controller(tmp_path: Path) -> None:
    async def scenario() -> None:
        relay = Relay(Config(node="far", controller="unix:///nowhere", cgroup=tmp_path, run_dir=tmp_path))
        for turn in range(23):
            async with grpc.aio.insecure_channel("127.0.0.1:1", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
                offering = asyncio.create_task(relay.run(channel))
                await asyncio.sleep(turn / 2000)
                offering.cancel()
                done, _ = await asyncio.wait({offering}, timeout=2)
                assert done, "whoever follows the controller waits for it before connecting anew"

    asyncio.run(scenario())


def test_who_goes_away_takes_the_filter_of_the_other_node_away(tmp_path: Path) -> None:
    async def scenario(_: Controller, near: Place, far: Place) -> None:
        async with asking(near) as agent:
            call = agent.Trace(trace(duration_s=20))
            await call.read()
            await until(lambda: bool(far.node.tracer.pairs))
            call.cancel()
            await until(lambda: not far.node.tracer.pairs)

    run(tmp_path, scenario)


def test_the_controller_finds_the_node_of_a_workload_and_of_a_service(tmp_path: Path) -> None:
    async def scenario(controller: Controller, _near: Place, _far: Place) -> None:
        assert [controller.mesh.node_of(name) for name in ("default/frontend", "elsewhere", "far", "nobody")] == [
            "node-1",
            "node-2",
            "node-2",
            "",
        ]
        async with asking(controller) as relay:
            told = [one async for one in relay.Ask(pb.AskRequest(trace=trace(duration_s=0.05)))]
            assert [(one.node, json.loads(one.document)["kind"]) for one in told] == [("node-2", "plan")]

    run(tmp_path, scenario)


def test_the_kubelet_is_asked_about_at_the_node_of_whom_it_probes(tmp_path: Path) -> None:
    async def scenario(controller: Controller, near: Place, _far: Place) -> None:
        asked = agent_pb2.TraceRequest(source="kubelet", destination="default/elsewhere:8080", duration_s=0.05)
        async with asking(controller) as relay:
            told = [one async for one in relay.Ask(pb.AskRequest(trace=asked))]
            assert [(one.node, json.loads(one.document)["source"]) for one in told] == [("node-2", "(kubelet)/node-2")]
        async with asking(near) as agent:
            documents = [json.loads(one.document) async for one in agent.Trace(asked)]
            assert [one["source"] for one in documents] == ["(kubelet)/node-2"]

    run(tmp_path, scenario)


def test_every_connected_node_tells_its_status(tmp_path: Path) -> None:
    async def scenario(controller: Controller, _near: Place, _far: Place) -> None:
        async with asking(controller) as relay:
            told = [one async for one in relay.Ask(pb.AskRequest(status=agent_pb2.StatusRequest()))]
            assert sorted(one.node for one in told) == ["node-1", "node-2"]
            assert all(json.loads(one.document)["ready"] for one in told)

    run(tmp_path, scenario)


def test_every_connected_node_tells_its_graph(tmp_path: Path) -> None:
    async def scenario(controller: Controller, _near: Place, _far: Place) -> None:
        async with asking(controller) as relay:
            told = [one async for one in relay.Ask(pb.AskRequest(graph=agent_pb2.GraphRequest(window_s=3)))]
            assert {(one.node, one.error) for one in told} == {("node-1", ""), ("node-2", "")}
            assert {json.loads(one.document)["seconds"] for one in told} == {3}

    run(tmp_path, scenario)


def test_the_page_of_the_controller_asks_the_agents(tmp_path: Path) -> None:
    async def scenario(controller: Controller, _near: Place, _far: Place) -> None:
        live = Live(controller.relay, lambda: controller.mesh.compiled.entities)
        try:
            document = json.loads(await live.graph())
            assert document["nodes"] == ["node-1"]
            assert document["doubted"] == 1, "the model knows no service redis"
            assert document["problems"] == ["node-2: node: it is another node's"], "the stand-in says that it is node-1"
            assert (await live.plan("default/elsewhere", "default/redis:6379"))["source"] == "default/elsewhere"
            assert "no service or workload is called default/nothing" in (await live.plan("default/frontend", "default/nothing"))["error"]
        finally:
            await live.stop()

    run(tmp_path, scenario)


def test_a_node_that_is_away_is_named_and_the_plan_is_shown_all_the_same(tmp_path: Path) -> None:
    async def scenario(controller: Controller, near: Place, _far: Place) -> None:
        lost = workload("lost", "node-3")
        near.node.snapshot = Snapshot("2", {**near.node.snapshot.workloads, lost.name: lost}, near.node.snapshot.services)
        async with asking(near) as agent:
            call = agent.Trace(trace("lost", duration_s=1))
            assert json.loads((await call.read()).document)["kind"] == "plan"
            with pytest.raises(grpc.aio.AioRpcError, match="node node-3 is not connected to the controller: is its agent running"):
                await call.read()
        async with asking(controller) as relay:
            told = [one async for one in relay.Ask(pb.AskRequest(node="node-3", status=agent_pb2.StatusRequest()))]
            assert [(one.node, bool(one.document), "is its agent running" in one.error) for one in told] == [("node-3", False, True)]

    run(tmp_path, scenario)


def test_without_a_controller_an_agent_says_why_it_cannot_ask(tmp_path: Path) -> None:
    async def body() -> None:
        place = Place("node-1", tmp_path, "unix:nowhere")
        async with beside(place.api.run()), asking(place) as agent:
            call = agent.Trace(trace(duration_s=1), wait_for_ready=True)
            assert json.loads((await call.read()).document)["kind"] == "plan"
            with pytest.raises(grpc.aio.AioRpcError, match="it runs on node node-2, this is node-1, and the controller"):
                await call.read()

    asyncio.run(body())


def test_a_node_that_goes_away_ends_the_answers_it_owes(tmp_path: Path) -> None:
    async def scenario(controller: Controller, _near: Place, _far: Place) -> None:
        async with asking(controller) as relay:
            offer = relay.Offer()
            await offer.write(pb.Reply(node="node-3"))
            await until(lambda: "node-3" in controller.relay.nodes)
            call = relay.Ask(pb.AskRequest(node="node-3", trace=trace(duration_s=20)))
            assert (await offer.read()).trace.relayed
            offer.cancel()
            assert "connection to the controller ended" in (await call.read()).error

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        pytest.param([b"x" * (relaying.MAX_DOCUMENT - 1), b"x" * (relaying.MAX_DOCUMENT + 1)], "at most 2097152 are passed on", id="size"),
        pytest.param([b"x" * (1 << 20)] * 24, "came faster than it was read", id="flood"),
    ],
)
def test_an_agent_that_says_too_much_loses_this_answer_and_nothing_else(tmp_path: Path, documents: list[bytes], message: str) -> None:
    async def scenario(controller: Controller, _near: Place, _far: Place) -> None:
        async with asking(controller) as relay:
            offer = relay.Offer()
            await offer.write(pb.Reply(node="node-3"))
            await until(lambda: "node-3" in controller.relay.nodes)
            call = relay.Ask(pb.AskRequest(node="node-3", trace=trace(duration_s=20)))
            question = await offer.read()
            await offer.write(pb.Reply(number=question.number + 100, document=b"nobody asked"))
            for document in documents:
                await offer.write(pb.Reply(number=question.number, document=document))
            told = [one async for one in call]
            assert message in told[-1].error
            assert (await offer.read()).enough
            again = relay.Ask(pb.AskRequest(node="node-3", status=agent_pb2.StatusRequest()))
            question = await offer.read()
            await offer.write(pb.Reply(number=question.number, document=b"{}", end=True))
            assert [one.document async for one in again] == [b"{}"]

    run(tmp_path, scenario)


def test_nodes_ask_for_traces_only_and_never_in_anothers_name(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "test")
    own = authority.issue("controller", "spiffe://mesh.local/meshagent/controller")
    names = {
        "node-1": "spiffe://mesh.local/meshagent/node/node-1",
        "admin": "spiffe://mesh.local/meshagent/admin",
        "workload": "spiffe://mesh.local/ns/a/sa/b",
    }
    pairs = {name: authority.issue(name, uri) for name, uri in names.items()}

    def credentials(name: str) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(authority.ca.read_bytes(), pairs[name].key.read_bytes(), pairs[name].certificate.read_bytes())

    async def scenario(controller: Controller, _near: Place, _far: Place) -> None:
        async def ask(name: str, request: pb.AskRequest) -> str:
            async with asking(controller, credentials(name)) as relay:
                try:
                    return " ".join([json.loads(one.document).get("kind", "status") async for one in relay.Ask(request)])
                except grpc.aio.AioRpcError as error:
                    return f"{error.code().name}: {error.details()}"

        watched, probed = pb.AskRequest(trace=trace(duration_s=0.05)), pb.AskRequest(trace=trace(probe=True, duration_s=0.05))
        status = pb.AskRequest(node="node-2", status=agent_pb2.StatusRequest())
        calls = pb.AskRequest(node="node-2", calls=agent_pb2.CallsRequest(namespace="default"))
        assert await ask("admin", calls) == "calls summary"
        assert "a node may ask for traces only" in await ask("node-1", calls)
        assert await ask("node-1", watched) == await ask("admin", watched) == "plan"
        assert await ask("admin", status) == "status"
        assert "a node may not probe for another" in await ask("node-1", probed)
        graph = pb.AskRequest(node="node-2", graph=agent_pb2.GraphRequest())
        assert await ask("admin", graph) == "graph"
        for request in (status, graph, calls):
            assert "a node may ask for traces only" in await ask("node-1", request)
        own, others = (pb.AskRequest(node="node-2", trace=trace(source, receiving=True)) for source in ("frontend", "elsewhere"))
        assert await ask("node-1", own) == await ask("admin", others) == "clock"
        assert "of its own workloads only, and elsewhere is none of them" in await ask("node-1", others)
        for request in (watched, probed, status, graph, calls):
            assert (await ask("workload", request)).startswith("PERMISSION_DENIED: the client certificate must name")
        async with asking(controller, credentials("node-1")) as relay:
            offer = relay.Offer()
            await offer.write(pb.Reply(node="node-2"))
            with pytest.raises(grpc.aio.AioRpcError, match="node node-2 is not yours"):
                await offer.read()

    run(tmp_path, scenario, ServerTls(own.certificate, own.key, authority.ca))


def test_the_command_line_asks_through_a_controller(tmp_path: Path) -> None:
    async def scenario(controller: Controller, _near: Place, _far: Place) -> None:
        def command(*words: str) -> tuple[int, str]:
            argv = [sys.executable, "-m", "agent.cli.main", *words, "--controller", f"unix:{controller.settings.socket}", "-o", "json"]
            result = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False)
            return result.returncode, result.stdout + result.stderr

        code, output = await asyncio.to_thread(command, "status")
        assert (code, sorted(json.loads(line)["node"] for line in output.splitlines())) == (0, ["node-1", "node-2"])
        code, output = await asyncio.to_thread(command, "trace", "elsewhere", "redis", "--duration", "0")
        assert (code, json.loads(output)["source"]) == (0, "default/elsewhere")
        code, output = await asyncio.to_thread(command, "trace", "elsewere", "redis")
        assert code == 1
        assert "did you mean default/elsewhere" in output

    run(tmp_path, scenario)


POLICY = """
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: new}
spec:
  action: DENY
  rules: [{to: [{operation: {ports: ["6379"]}}]}]
"""


def test_policies_are_tried_on_one_node_and_on_all(tmp_path: Path) -> None:
    """Both nodes tell of a call of default/frontend, which runs on node-1: the other one is not believed."""

    async def scenario(controller: Controller, near: Place, _far: Place) -> None:
        file = tmp_path / "new.yaml"

        def command(text: str, *place: str) -> tuple[int, str, str]:
            file.write_text(text)
            argv = [sys.executable, "-m", "agent.cli.main", "policy", "try", "-f", str(file), *place]
            result = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False)
            return result.returncode, result.stdout, result.stderr

        on_node, on_all = ("--run-dir", str(near.config.run_dir)), ("--controller", f"unix:{controller.settings.socket}")
        for place in (on_node, on_all):
            code, output, error = await asyncio.to_thread(command, POLICY, *place)
            assert (code, output.splitlines()[:2]) == (
                1,
                ["newly denied: 7 calls", "        7  default/frontend  ->  default/redis:6379  default/new[0]"],
            )
            assert ("node node-2 tells of 1 calls that are not its own" in error) is (place is on_all)
            code, output, error = await asyncio.to_thread(command, POLICY.replace("6379", "70000"), *place)
            assert (code, output) == (1, "")
            assert f"{file}:7 AuthorizationPolicy/new spec.rules[0].to[0].operation.ports[0]:" in error
            code, output, _ = await asyncio.to_thread(command, POLICY.replace("6379", "80"), *place)
            assert (code, output.splitlines()[0].partition(";")[0]) == (0, f"unchanged: {14 if place is on_all else 7} calls")

    run(tmp_path, scenario)


def test_whoever_goes_away_in_the_middle_of_an_answer_takes_no_other_question_along(tmp_path: Path) -> None:
    async def scenario(controller: Controller, _near: Place, far: Place) -> None:
        line = controller.relay._lines["node-2"]
        async with asking(controller) as relay:
            watching = relay.Ask(pb.AskRequest(node="node-2", trace=trace(duration_s=20)))
            await watching.read()
            for _ in range(7):
                call = relay.Ask(pb.AskRequest(node="node-2", trace=trace(duration_s=20)))
                await call.read()
                for _ in range(503):
                    far.node.find(SEEN)
                await call.read()
                call.cancel()  # its agent writes on
                await asyncio.sleep(0.05)
                assert controller.relay._lines["node-2"] is line
            first = far.node.tracer._watches[0]
            assert isinstance(first, Watch)
            while not first.found.empty():
                await watching.read()
            far.node.find(SEEN)
            assert json.loads((await watching.read()).document)["outcome"] == "closed"
            assert controller.relay._lines["node-2"] is line
            watching.cancel()

    run(tmp_path, scenario)


def apart(near: Place, far: Place) -> None:
    """Put the destination on the other node."""
    redis = workload("redis", "node-2", near.node.snapshot.workloads["default/redis"].backing)
    for place in (near, far):
        place.node.snapshot = Snapshot("2", {**place.node.snapshot.workloads, redis.name: redis}, place.node.snapshot.services)
    far.node.enrolled = type(far.node.enrolled)((LocalWorkload(redis, 7, "/proc/self/ns/net"),))


def seen_by_receiver(node: str = "node-1") -> Observation:
    """What the receiver denied; of a connection from CALLER. Nobody speaks for another node than his own."""
    hops = (Hop("inbound", node, 5, {"workload": "default/redis"}),)
    return Observation(
        of="denied", node=node, workload="default/redis", caller="10.0.0.1:40001", target="10.0.0.1:6379", began_ns=time.time_ns(),
        outcome="denied", rule="default/p[0]", hops=hops,
    )  # fmt: skip


def test_what_the_receivers_node_saw_is_joined_and_its_filter_ends_with_the_question(tmp_path: Path) -> None:
    async def scenario(_: Controller, near: Place, far: Place) -> None:
        apart(near, far)
        async with asking(near) as agent:
            call = agent.Trace(trace("frontend", duration_s=20))
            assert json.loads((await call.read()).document)["problems"] == []
            (pair,) = far.node.tracer.pairs
            assert (pair.source, pair.targets, pair.receiving) == ("default/frontend", frozenset({"default/redis"}), True)
            (reception,) = far.node.tracer._watches
            (watch,) = near.node.tracer._watches
            assert isinstance(reception, Reception)
            assert isinstance(watch, Watch)
            watch._put(Seen(SEEN, time.time_ns(), time.time_ns(), "default/redis", "10.0.0.1:40001", "10.0.0.1:6379"))
            reception._put(seen_by_receiver())
            found = json.loads((await call.read()).document)
            assert (found["outcome"], found["rule"], [hop["node"] for hop in found["hops"]]) == ("denied", "default/p[0]", ["node-2"])
            assert 0 < found["clockErrorNs"] < 1_000_000_000
            far.node.lost = 23
            notice = json.loads((await call.read()).document)
            assert (notice["kind"], notice["missed"]) == ("notice", 23)
            call.cancel()
            await until(lambda: not near.node.tracer.pairs and not far.node.tracer.pairs)

    run(tmp_path, scenario)


def test_a_node_that_goes_away_during_a_trace_is_named_and_nobody_waits_for_it(tmp_path: Path) -> None:
    async def scenario(controller: Controller, near: Place, far: Place) -> None:
        apart(near, far)
        async with asking(near) as agent:
            call = agent.Trace(trace("frontend", duration_s=20))
            assert (await call.read()).document
            controller.relay._lines["node-2"].close()
            notice = json.loads((await call.read()).document)
            assert notice["kind"] == "notice"
            assert notice["text"].startswith("node node-2 does not tell what it sees, its hops are missing: the agent's connection")
            (watch,) = near.node.tracer._watches
            assert isinstance(watch, Watch)
            watch._put(Seen(SEEN, workload="default/redis", caller="10.0.0.1:40001"))
            assert json.loads((await asyncio.wait_for(call.read(), 0.4)).document)["outcome"] == "closed"
            call.cancel()

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        pytest.param([b"not json"], "is not understood", id="nonsense"),
        pytest.param([b'{"kind": "clock", "unixNs": "\\u001b[2J"}'], "is not understood", id="a clock that is none"),
        pytest.param([], "is not understood", id="nothing"),
    ],
)
def test_an_answer_that_nobody_understands_costs_hops_and_nothing_else(tmp_path: Path, said: list[bytes], why: str) -> None:
    async def scenario(controller: Controller, near: Place, far: Place) -> None:
        apart(near, far)
        async with asking(controller) as relay:
            before = controller.relay._lines["node-2"]
            offer = relay.Offer()
            await offer.write(pb.Reply(node="node-2"))

            async def lie() -> None:
                while isinstance(question := await offer.read(), pb.Question):
                    for document in said:
                        await offer.write(pb.Reply(number=question.number, document=document))
                    await offer.write(pb.Reply(number=question.number, end=True))

            await until(lambda: controller.relay._lines["node-2"] is not before)
            lying = asyncio.create_task(lie())
            async with asking(near) as agent:
                (plan,) = [json.loads(one.document) async for one in agent.Trace(trace("frontend", duration_s=0.1))]
            (problem,) = plan["problems"]
            assert why in problem
            offer.cancel()
            await asyncio.gather(lying, return_exceptions=True)

    run(tmp_path, scenario)
