"""`meshagent status` and `meshagent trace` against a stand-in for an agent: what is printed, and the exit code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from agent.cli.live import Shown
from agent.cli.main import main
from meshapi import agent_pb2 as pb
from meshapi import agent_pb2_grpc

PLAN = {
    "kind": "plan", "source": "default/a", "destination": "default/b:80", "verdict": "ALLOW", "rule": None, "level": "L4", "reason": "why",
    "backends": [{"workload": "default/b-1", "address": "10.0.0.1:80", "node": "node-1", "share": 1.0}], "encryption": "none",
    "failMode": "closed", "problems": ["b-2 is not ready"],
}  # fmt: skip
PROBLEM = "Envoy refused [a listener] [/run/x]: " + "word " * 23 + "end"
HOPS = [
    {"at": "connect", "node": "node-1", "durationNs": 999, "verdict": "allow", "flags": ["x", "y"]},
    {"at": "handshake", "node": "node-1", "durationNs": 1_500},
    {"at": "backend", "node": "node-1", "durationNs": 2_500_000},
    {"at": "close", "node": "node-1", "durationNs": 3_500_000_000},
]


class Agent(agent_pb2_grpc.AgentServicer):
    """Answers what it is told to."""

    def __init__(self, node: str, *, ready: bool = True, answers: tuple[dict[str, Any], ...] = (), error: str = "") -> None:
        self.node, self.ready, self.answers, self.error = node, ready, answers, error
        self.asked: list[pb.TraceRequest] = []

    def Calls(self, request: pb.CallsRequest, context: grpc.ServicerContext) -> Iterator[pb.Json]:  # noqa: N802 - gRPC's names
        raise NotImplementedError

    def Status(self, request: pb.StatusRequest, context: object) -> pb.Json:  # noqa: N802, ARG002 - gRPC's names
        document = {
            "ready": self.ready, "node": self.node, "hooks": [{"name": "mesh_connect4", "attached": True, "effective": self.ready}],
            "waypoint": {"ready": True, "version": "1", "pid": 23, "nacks": 0},
            "controller": {"connected": True, "version": "v1", "lagSeconds": 0.25},
            "workloads": [{"namespace": "default", "name": f"of-{self.node}", "enrolled": True, "redirected": True, "identity": "spiffe://m"}],
            "problems": [] if self.ready else [PROBLEM],
        }  # fmt: skip
        return pb.Json(document=json.dumps(document).encode())

    def Identity(self, request: pb.IdentityRequest, context: grpc.ServicerContext) -> pb.Json:  # noqa: N802
        raise NotImplementedError

    def Graph(self, request: pb.GraphRequest, context: grpc.ServicerContext) -> pb.Json:  # noqa: N802
        raise NotImplementedError

    def Trace(self, request: pb.TraceRequest, context: grpc.ServicerContext) -> Iterator[pb.Json]:  # noqa: N802
        self.asked.append(request)
        for answer in self.answers:
            yield pb.Json(document=json.dumps(answer).encode())
        if self.error:
            context.abort(grpc.StatusCode.NOT_FOUND, self.error)


@contextlib.contextmanager
def serving(directory: Path, agent: Agent) -> Iterator[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    server = grpc.server(futures.ThreadPoolExecutor(2))
    agent_pb2_grpc.add_AgentServicer_to_server(agent, server)  # type: ignore[no-untyped-call,unused-ignore]
    server.add_insecure_port(f"unix:{directory}/agent.sock")
    server.start()
    try:
        yield directory
    finally:
        server.stop(0).wait()


def run(command: str, run_dir: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, [command, "--run-dir", str(run_dir), *arguments])


def connection(outcome: str) -> dict[str, Any]:
    return {
        "kind": "connection", "source": "default/a", "destination": "default/b:80", "hops": HOPS, "outcome": outcome, "rule": None,
        "nextStep": "do something" if outcome == "denied" else None,
    }  # fmt: skip


@pytest.mark.parametrize(("ready", "code"), [(True, 0), (False, 1)])
def test_the_status_of_a_node_decides_the_exit_code(tmp_path: Path, ready: bool, code: int) -> None:
    with serving(tmp_path, Agent("node-1", ready=ready)):
        text, document = run("status", tmp_path), run("status", tmp_path, "-o", "json")
    assert (text.exit_code, document.exit_code) == (code, code)
    assert ("not ready" in text.stdout) is not ready
    assert "of-node-1" in text.stdout
    assert json.loads(document.stdout)["ready"] is ready


def test_a_problem_is_printed_whole_and_on_one_line(tmp_path: Path) -> None:
    with serving(tmp_path, Agent("node-1", ready=False)):
        assert f"  ! {PROBLEM}\n" in run("status", tmp_path).stdout


def test_several_agents_are_shown_one_a_line_and_one_that_is_not_ready_counts(tmp_path: Path) -> None:
    with serving(tmp_path / "n1", Agent("node-1")), serving(tmp_path / "n2", Agent("node-2", ready=False)):
        result = run("status", tmp_path, "-o", "json")
    assert [json.loads(line)["node"] for line in result.stdout.splitlines()] == ["node-1", "node-2"]
    assert result.exit_code == 1


def test_no_agent_is_a_negative_answer(tmp_path: Path) -> None:
    result = run("status", tmp_path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: no agent has its socket in {tmp_path}: is 'meshagent run' running, and are you root?\n"


def test_who_may_not_look_for_an_agent_is_told_to_be_root(tmp_path: Path) -> None:
    closed = tmp_path / "run"
    closed.mkdir(mode=0)
    command = [sys.executable, "-c", "from agent.cli.main import main; main()", "status", "--run-dir", str(closed)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, user=65534 if os.geteuid() == 0 else None)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert f"{closed} is not yours to look into: run this as root" in ended.stderr


def test_an_agent_that_was_killed_is_a_negative_answer_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "agent.sock").touch()
    result = run("status", tmp_path)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert f"the agent at {tmp_path}/agent.sock does not answer" in result.stderr


@pytest.mark.parametrize(
    ("outcome", "code"),
    [("closed", 0), ("200", 0), ("404", 0), ("503", 0), ("reset", 0), ("denied", 1), ("refused", 1), ("failed", 1), ("403", 1), ("401", 1)],
)
def test_the_outcome_of_a_connection_decides_the_exit_code(tmp_path: Path, outcome: str, code: int) -> None:
    with serving(tmp_path, Agent("node-1", answers=(PLAN, connection(outcome)))):
        result = run("trace", tmp_path, "a", "b", "-o", "json")
    assert result.exit_code == code
    assert [json.loads(line) for line in result.stdout.splitlines()] == [PLAN, connection(outcome)]


@pytest.mark.parametrize(("outcome", "code"), [("503", 1), ("404", 1), ("no response", 1), ("would be denied", 0)])
def test_what_the_mesh_has_a_next_step_for_is_a_negative_answer_unless_it_is_only_audited(tmp_path: Path, outcome: str, code: int) -> None:
    with serving(tmp_path, Agent("node-1", answers=(PLAN, {**connection(outcome), "nextStep": "do something"}))):
        assert run("trace", tmp_path, "a", "b").exit_code == code


def test_a_plan_that_denies_decides_the_exit_code(tmp_path: Path) -> None:
    with serving(tmp_path, Agent("node-1", answers=({**PLAN, "verdict": "DENY", "rule": "default/p[0]"},))):
        result = run("trace", tmp_path, "a", "b", "-o", "text")
    assert result.exit_code == 1
    assert "verdict     DENY  rule default/p[0]" in result.stdout


def test_what_an_audited_rule_would_deny_is_said_and_decides_no_exit_code(tmp_path: Path) -> None:
    with serving(tmp_path, Agent("node-1", answers=({**PLAN, "audit": "default/dry-run[0]"},))):
        result = run("trace", tmp_path, "a", "b", "-o", "text")
    assert result.exit_code == 0
    assert "  audit       enforcing default/dry-run[0] would deny" in result.stdout.splitlines()


def test_the_text_has_every_fact_with_readable_durations(tmp_path: Path) -> None:
    with serving(tmp_path, Agent("node-1", answers=(PLAN, connection("denied")))):
        lines = run("trace", tmp_path, "a", "b", "-o", "text").stdout.splitlines()
    assert lines == [
        "default/a  ->  default/b:80",
        "  verdict     ALLOW",
        "  level       L4: why",
        "  backends     100.0%  default/b-1  10.0.0.1:80  on node-1",
        "  encryption  none",
        "  fail mode   closed",
        "  problem     b-2 is not ready",
        "",
        "default/a  ->  default/b:80   denied",
        "  connect    node-1      999 ns  verdict allow  flags x, y",
        "  handshake  node-1      1.5 µs  ",
        "  backend    node-1      2.5 ms  ",
        "  close      node-1       3.5 s  ",
        "  next step   do something",
    ]


def test_the_options_reach_the_agent(tmp_path: Path) -> None:
    agent = Agent("node-1", answers=(PLAN,))
    with serving(tmp_path, agent):
        run("trace", tmp_path, "a", "b:80", "--probe", "--duration", "1.5", "--count", "7")
        run("trace", tmp_path, "a", "b")
        run(
            "trace",
            tmp_path,
            "a",
            "b",
            "--method",
            "GET",
            "--path",
            "/x*",
            "--status",
            "5xx",
            "--status",
            "404",
            "--errors-only",
            "--slow",
            "7",
        )
    assert agent.asked == [
        pb.TraceRequest(source="a", destination="b:80", duration_s=1.5, count=7, probe=True),
        pb.TraceRequest(source="a", destination="b", duration_s=10, count=0, probe=False),
        pb.TraceRequest(
            source="a", destination="b", duration_s=10, method="GET", path="/x*", status=["5xx", "404"], errors_only=True, slow_ms=7
        ),
    ]


def test_names_without_a_namespace_are_of_the_one_that_is_given(tmp_path: Path) -> None:
    agent = Agent("node-1", answers=(PLAN,))
    with serving(tmp_path, agent):
        run("trace", tmp_path, "a", "b:80", "-n", "shop")
        run("trace", tmp_path, "other/a", "b.other.svc", "-n", "shop")
        run("trace", tmp_path, "a", "b", "-n", "default")
    assert [(asked.source, asked.destination) for asked in agent.asked] == [("shop/a", "shop/b:80"), ("other/a", "b.other.svc"), ("a", "b")]


def test_a_probe_of_which_nothing_is_seen_is_a_negative_answer_unless_something_was_to_be_left_out(tmp_path: Path) -> None:
    with serving(tmp_path, Agent("node-1", answers=(PLAN, NOTICE))):
        silent = run("trace", tmp_path, "a", "b", "--probe")
        assert (silent.exit_code, "nothing answered the probe" in silent.stderr) == (1, True)
        assert run("trace", tmp_path, "a", "b", "--probe", "--errors-only").exit_code == 0
        assert run("trace", tmp_path, "a", "b").exit_code == 0
    with serving(tmp_path / "other", Agent("node-1", answers=(PLAN, connection("200")))):
        assert run("trace", tmp_path / "other", "a", "b", "--probe").exit_code == 0


def test_what_the_agent_refuses_is_said_in_one_line(tmp_path: Path) -> None:
    with serving(tmp_path, Agent("node-1", error="no workload is called default/x")):
        result = run("trace", tmp_path, "x", "b")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "Error: no workload is called default/x\n")


def test_a_trace_asks_the_agent_of_the_sources_node(tmp_path: Path) -> None:
    agents = [Agent("node-1", answers=(PLAN,)), Agent("node-2", answers=(PLAN,))]
    with serving(tmp_path / "n1", agents[0]), serving(tmp_path / "n2", agents[1]):
        for source in ("of-node-2", "default/of-node-2", "nobody"):
            assert run("trace", tmp_path, source, "b").exit_code == 0
    assert [[request.source for request in agent.asked] for agent in agents] == [["nobody"], ["of-node-2", "default/of-node-2"]]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("a",),
        ("a", "b", "--count", "-1"),
        ("a", "b", "--duration", "-1"),
        ("a", "b", "--duration", "soon"),
        ("a", "b", "-o", "yaml"),
        ("a", "b", "--status", "6xx"),
        ("a", "b", "--slow", "-1"),
    ],
)
def test_misuse_is_exit_code_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert run("trace", tmp_path, *arguments).exit_code == 2


NOTICE = {"kind": "notice", "text": "23 events were missed", "missed": 23}


def test_what_is_no_terminal_gets_one_object_a_line(tmp_path: Path) -> None:
    with serving(tmp_path, Agent("node-1", answers=(PLAN, connection("200"), NOTICE))):
        result = run("trace", tmp_path, "a", "b")
    assert [json.loads(line)["kind"] for line in result.stdout.splitlines()] == ["plan", "connection", "notice"]


@pytest.mark.parametrize("output", ["text", "table"])
def test_what_others_said_is_text_and_no_command_to_the_terminal_or_to_rich(tmp_path: Path, output: str) -> None:
    evil = "/\x1b[2J\x07[red]x[/]\u202e"
    hops = [{"at": "waypoint", "node": evil, "durationNs": 1, "method": "GET", "path": evil}]
    seen = {**connection("200"), "hops": hops, "nextStep": evil, "clockErrorNs": 2_000_000}
    with serving(tmp_path, Agent("node-1", answers=({**PLAN, "problems": [evil]}, seen, {"kind": "notice", "text": evil}))):
        result = run("trace", tmp_path, "a", "b", "-o", output)
    assert result.exit_code == 1
    assert not {"\x07", "\u202e"} & set(result.stdout)
    assert "[2J" in result.stdout
    assert "\x1b[2J" not in result.stdout
    assert "[red]" in result.stdout


def test_the_table_keeps_the_newest_that_fit_and_counts_all() -> None:
    shown = Shown(Console(width=120, height=23))
    for n in range(101):
        shown.take({**connection("200"), "destination": f"number-{n}"})
    shown.take({**connection("denied"), "destination": "the-last"})
    shown.take(NOTICE)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(shown.table())
    text = console.export_text()
    assert "102 shown, 23 events missed" in text
    assert "the-last" in text
    assert "do something" in text
    assert "number-100 " in text
    assert "number-50 " not in text
    assert len(text.splitlines()) <= 23
