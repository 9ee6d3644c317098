"""`meshagent graph` against stand-ins for agents and for a controller: what is printed, and the exit code."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from xml.etree import ElementTree as ET

import grpc
from click.testing import CliRunner, Result

from agent.cli.main import main
from meshapi import agent_pb2 as pb
from meshapi import relay_pb2, relay_pb2_grpc
from meshapi.graph.answer import Answer, Backend
from tests.unit.agent.cli import test_observe
from tests.unit.meshapi.graph import made

CART = made.edge(
    "default/frontend", "default/cart", rate=8.6, errors=0.5, p50=0.0016, p99=0.021, mtls="some", bytes=3800.0, active=1,
    backends=(Backend("default/cart-v1-1", 8.6, mtls=False),),
)  # fmt: skip
REDIS = made.edge("shop/other", "default/redis", protocol="tcp", port=6379, denied=4.0, rules=("default/redis-clients: no rule matches",))
STRANGER = made.edge("", "default/cart-v1-2", "workload", protocol="tcp", port=0, denied=1.0, rules=("[bold]not markup[/bold]",))
ONE, OTHER = Answer("node-1", 5.25, (CART, REDIS), 2), Answer("node-2", 5.5, (STRANGER,), 0, ("the waypoint does not say",))


class Agent(test_observe.Agent):
    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.node)
        self.answer = answer
        self.windows: list[float] = []

    def Graph(self, request: pb.GraphRequest, context: grpc.ServicerContext) -> pb.Json:  # noqa: ARG002, N802 - gRPC's names
        self.windows.append(request.window_s)
        return pb.Json(document=self.answer.encode())


class Controller(relay_pb2_grpc.RelayServicer):
    def __init__(self, *told: relay_pb2.Told) -> None:
        self.told = told

    def Ask(self, request: relay_pb2.AskRequest, context: grpc.ServicerContext) -> Iterator[relay_pb2.Told]:  # noqa: ARG002, N802
        assert request.HasField("graph")
        assert not request.node
        yield from self.told

    def Offer(self, request_iterator: object, context: grpc.ServicerContext) -> Iterator[relay_pb2.Question]:  # noqa: N802
        raise NotImplementedError


@contextlib.contextmanager
def through(path: Path, *told: relay_pb2.Told) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    relay_pb2_grpc.add_RelayServicer_to_server(Controller(*told), server)  # type: ignore[no-untyped-call,unused-ignore]
    server.add_insecure_port(f"unix:{path}/controller.sock")
    server.start()
    try:
        yield f"unix://{path}/controller.sock"
    finally:
        server.stop(0).wait()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["graph", *arguments])


def test_the_table_has_a_line_for_each_kind_of_call_and_why_it_is_denied(tmp_path: Path) -> None:
    with test_observe.serving(tmp_path / "n1", one := Agent(ONE)), test_observe.serving(tmp_path / "n2", Agent(OTHER)):
        result = run("--run-dir", str(tmp_path), "--window", "7")
    assert result.exit_code == 0, result.output
    assert one.windows == [7.0]
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "from to port rate/s errors/s denied/s p50 p99 bytes/s live mTLS" in lines
    assert "default/frontend default/cart 80 http 8.6 0.5 1.6 ms 21 ms 3.8k 1 in part" in lines
    assert "shop/other default/redis 6379 tcp 0 4 0" in lines
    assert "(outside) default/cart-v1-2 tcp 0 1 0" in lines
    assert "denied  shop/other -> default/redis: default/redis-clients: no rule matches" in result.stdout
    assert "[bold]not markup[/bold]" in result.stdout
    assert "3 kinds of calls, told by node-1, node-2, over 5.2 s, 2 quieter ones are not shown" in result.stdout
    assert result.stderr == "Error: node-2: the waypoint does not say\n"


def test_json_is_one_object_with_everything(tmp_path: Path) -> None:
    with test_observe.serving(tmp_path, Agent(ONE)):
        document = json.loads(run("--run-dir", str(tmp_path), "-o", "json").stdout)
    assert (document["kind"], document["seconds"], document["nodes"], document["folded"]) == ("graph", 5.25, ["node-1"], 2)
    (cart,) = (edge for edge in document["edges"] if edge["destination"] == "default/cart")
    assert (cart["rate"], cart["mtls"], cart["backends"]) == (8.6, "some", [{"workload": "default/cart-v1-1", "rate": 8.6, "mtls": False}])


def test_a_namespace_can_be_chosen(tmp_path: Path) -> None:
    with test_observe.serving(tmp_path, Agent(ONE)):
        document = json.loads(run("--run-dir", str(tmp_path), "-o", "json", "-n", "shop").stdout)
    assert [edge["source"] for edge in document["edges"]] == ["shop/other"]


def test_svg_and_dot_are_whole_documents(tmp_path: Path) -> None:
    with test_observe.serving(tmp_path, Agent(ONE)):
        svg, dot = (run("--run-dir", str(tmp_path), "-o", form).stdout for form in ("svg", "dot"))
    assert ET.fromstring(svg).tag.endswith("svg")  # noqa: S314 - of our own making
    assert '"workload shop/other" -> "service default/redis" [label="tcp 6379, 4/s denied", color="#c62828", style=solid];' in dot


def test_through_a_controller_every_node_is_shown_and_one_that_is_away_is_a_negative_answer(tmp_path: Path) -> None:
    told = [relay_pb2.Told(node="node-1", document=ONE.encode()), relay_pb2.Told(node="node-2", error="its agent is gone")]
    with through(tmp_path, *told) as target:
        result = run("--controller", target, "-o", "json")
    assert result.exit_code == 1
    assert len(json.loads(result.stdout)["edges"]) == 2
    assert result.stderr == "Error: node-2: its agent is gone\n"


def test_a_node_that_speaks_for_another_or_is_older_is_named_and_not_shown(tmp_path: Path) -> None:
    told = [
        relay_pb2.Told(node="node-2", document=ONE.encode()),
        relay_pb2.Told(node="node-3", document=b'{"ready": true, "node": "node-3"}'),
    ]
    with through(tmp_path, *told) as target:
        result = run("--controller", target, "-o", "json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["edges"] == []
    assert "node-2: node: it is another node's" in result.stderr
    assert "node-3: it is no graph: is the agent, or the controller, of an older version?" in result.stderr


def test_no_agent_and_no_controller_are_said_in_one_line(tmp_path: Path) -> None:
    result = run("--run-dir", str(tmp_path))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: no agent has its socket in {tmp_path}")
    result = run("--controller", f"unix://{tmp_path}/none.sock")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: controller unix://{tmp_path}/none.sock is not reachable (")
    assert result.stderr.endswith("is `mesh-controller run` up? give its address with --controller\n")


def test_an_agent_that_does_not_know_the_question_is_named(tmp_path: Path) -> None:
    with test_observe.serving(tmp_path, test_observe.Agent("node-1")):
        result = run("--run-dir", str(tmp_path))
    assert result.exit_code == 1
    assert f"the agent at {tmp_path}/agent.sock does not answer" in result.stderr
