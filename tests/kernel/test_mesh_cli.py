"""The command line against running agents: shapes of the JSON, exit codes, and that a trace leaves nothing behind."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from agent.bpf.manifest import HOOKED
from lab.lab import Lab
from tests.kernel import shop

pytestmark = pytest.mark.kernel

CALLS = 7


def test_status_has_the_documented_shape(lab: Lab) -> None:
    run = lab.ask("node-1", "status", "-o", "json")
    report = json.loads(run.stdout)
    assert run.returncode == 0
    assert {key: type(value) for key, value in report.items()} == {
        "ready": bool, "node": str, "hooks": list, "waypoint": dict, "controller": dict, "workloads": list, "problems": list, "probe": dict,
        "acceleration": dict, "foreignPrograms": list, "identity": dict, "wireguard": dict, "version": str,
    }  # fmt: skip
    assert {tuple(hook) for hook in report["hooks"]} == {("name", "attached", "effective")}
    assert report["waypoint"].keys() == {
        "ready", "version", "pid", "nacks", "rejected", "lastNack", "sent", "pushes", "pushedSeconds", "lastPushSeconds", "residentBytes"
    }  # fmt: skip
    assert report["controller"].keys() == {"connected", "version", "lagSeconds"}
    assert {tuple(workload) for workload in report["workloads"]} == {("namespace", "name", "enrolled", "redirected", "identity", "drift")}
    assert report["probe"].keys() == {"works", "ageSeconds"}
    assert report["acceleration"] == {"workloads": [], "failingChecks": []}
    assert report["wireguard"].keys() == {"mode", "reason", "publicKey", "port", "mtu", "peers"}
    assert (report["wireguard"]["mode"], report["wireguard"]["peers"]) == ("off", [])
    assert (report["foreignPrograms"], any(w["drift"] for w in report["workloads"])) == ([], False)
    assert (report["ready"], report["node"], report["problems"]) == (True, "node-1", [])
    assert len(report["hooks"]) == len(HOOKED)
    assert all(hook["attached"] and hook["effective"] for hook in report["hooks"])
    mine = {w["name"]: w["identity"] for w in report["workloads"] if w["enrolled"] and w["redirected"]}
    assert mine == {
        name: f"spiffe://mesh.local/ns/default/sa/{account}"
        for name, account in {"cart-v1-1": "cart", "frontend": "frontend", "other": "other", "redis": "redis"}.items()
    }


def test_status_of_a_machine_with_several_agents_is_one_object_a_line(lab: Lab) -> None:
    run = lab.meshagent("status", "-o", "json")
    assert [json.loads(line)["node"] for line in run.stdout.splitlines()] == ["node-1", "node-2"]
    text = lab.meshagent("status")
    assert text.returncode == 0
    assert "default/frontend" in text.stdout


def test_status_without_an_agent_is_a_negative_answer_in_one_line(lab: Lab, tmp_path: Path) -> None:
    run = lab.meshagent("status", "--run-dir", str(tmp_path))
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == f"Error: no agent has its socket in {tmp_path}: is 'meshagent run' running, and are you root?\n"


def test_the_plan_of_a_trace_has_the_documented_shape(lab: Lab) -> None:
    run = lab.ask("node-1", "trace", "frontend", "cart", "-o", "json", "--duration", "0")
    (line,) = run.stdout.splitlines()
    plan = json.loads(line)
    assert run.returncode == 0
    assert list(plan) == [
        "kind", "source", "destination", "verdict", "rule", "level", "reason", "backends", "encryption", "failMode", "problems", "audit",
    ]  # fmt: skip
    assert (plan["kind"], plan["source"], plan["destination"]) == ("plan", "default/frontend", "default/cart:80")
    assert (plan["verdict"], plan["rule"], plan["level"], plan["problems"]) == ("ALLOW", None, "L7", [])
    assert {b["workload"]: (b["node"], b["share"]) for b in plan["backends"]} == {
        "default/cart-v1-1": ("node-1", 0.4), "default/cart-v1-2": ("node-2", 0.4), "default/cart-v2-1": ("node-2", 0.2),
    }  # fmt: skip


def test_a_plan_that_denies_is_a_negative_answer(lab: Lab) -> None:
    run = lab.ask("node-1", "trace", "other", "redis", "-o", "json", "--duration", "0")
    plan = json.loads(run.stdout)
    assert (run.returncode, plan["verdict"], plan["rule"]) == (1, "DENY", "default/redis-clients: no rule matches")
    assert lab.ask("node-1", "trace", "other", "redis", "--duration", "0").returncode == 1


def test_a_probe_of_an_l7_service_shows_every_hop(lab: Lab) -> None:
    run = lab.ask("node-1", "trace", "frontend", "cart", "-o", "json", "--probe", "--duration", "5")
    plan, connection = map(json.loads, run.stdout.splitlines())
    assert run.returncode == 0
    assert plan["kind"] == "plan"
    assert connection.keys() >= {"kind", "source", "destination", "hops", "outcome"}
    assert (connection["kind"], connection["outcome"]) == ("connection", "200")
    near = [hop for hop in connection["hops"] if hop["node"] == "node-1"]
    assert [hop["at"] for hop in near] == ["connect", "handshake", "waypoint", "backend", "response"]
    assert all(isinstance(hop["durationNs"], int) and hop["durationNs"] > 0 for hop in near)
    assert {(hop["at"], hop["node"]) for hop in connection["hops"] if hop not in near} <= {("inbound", "node-2"), ("app", "node-2")}
    backends = {b["address"] for b in plan["backends"]}
    assert connection["hops"][3]["address"] in backends


def test_a_probe_of_an_l4_service_shows_every_hop(lab: Lab) -> None:
    run = lab.ask("node-1", "trace", "frontend", "redis", "-o", "json", "--probe", "--duration", "5")
    _, connection = map(json.loads, run.stdout.splitlines())
    assert (run.returncode, connection["outcome"], connection["rule"]) == (0, "closed", "default/redis-clients[0]")
    assert [hop["at"] for hop in connection["hops"]] == ["connect", "handshake", "inbound", "close"]


def test_a_probe_that_is_denied_names_the_rule_and_the_next_step(lab: Lab) -> None:
    run = lab.ask("node-1", "trace", "other", "redis", "-o", "json", "--probe", "--duration", "5")
    _, connection = map(json.loads, run.stdout.splitlines())
    assert (run.returncode, connection["outcome"], connection["rule"]) == (1, "denied", "default/redis-clients: no rule matches")
    assert "allow the caller" in connection["nextStep"]
    text = lab.ask("node-1", "trace", "other", "redis", "--probe", "--duration", "5", "-o", "text")
    assert text.returncode == 1
    assert "next step   allow the caller" in text.stdout


def test_a_trace_ends_after_count_connections(lab: Lab) -> None:
    with shop.tracing("node-1", "frontend", "redis", "--count", str(CALLS), "--duration", "30") as trace:
        for _ in range(CALLS + 2):
            shop.ping(lab, "frontend")
        seen = shop.connections(trace)
    assert [c["outcome"] for c in seen] == ["closed"] * CALLS
    assert all(c["hops"][-1]["receivedBytes"] > 0 for c in seen)


def test_a_trace_ends_after_its_duration(lab: Lab) -> None:
    started = time.monotonic()
    run = lab.ask("node-1", "trace", "frontend", "redis", "-o", "json", "--duration", "0.7")
    assert (run.returncode, len(run.stdout.splitlines())) == (0, 1)
    assert 0.7 < time.monotonic() - started < 3


def test_a_trace_that_is_interrupted_leaves_no_filter_in_the_kernel(lab: Lab) -> None:
    assert lab.status("node-1")["ready"]
    assert shop.filters("node-1") == (0, 0)
    with shop.tracing("node-1", "frontend", "redis", "--duration", "60") as trace:
        rows, tracing = shop.filters("node-1")
        assert rows == tracing > 0
        trace.send_signal(signal.SIGINT)
        assert trace.wait(5) == 0
        assert trace.stderr is not None
        assert trace.stderr.read() == ""
    shop.takes(lambda: shop.filters("node-1") == (0, 0), 2)


def test_a_trace_whose_command_is_killed_leaves_no_filter_in_the_kernel(lab: Lab) -> None:
    assert lab.status("node-1")["ready"]
    with shop.tracing("node-1", "frontend", "cart", "--duration", "60") as trace:
        assert shop.filters("node-1")[1] > 0
        trace.kill()
        trace.wait(5)
    shop.takes(lambda: shop.filters("node-1") == (0, 0), 2)


def test_two_traces_at_once_see_their_own_connections_only(lab: Lab) -> None:
    with (
        shop.tracing("node-1", "frontend", "redis", "--count", str(CALLS), "--duration", "30") as l4,
        shop.tracing("node-1", "frontend", "cart", "--count", str(CALLS)) as l7,
    ):
        for _ in range(CALLS):
            assert shop.ping(lab, "frontend") == "PONG"
            assert shop.codes(lab, "frontend", "http://cart/items") == {"200": 1}
        requests, sessions = shop.connections(l7), shop.connections(l4)
    assert [c["outcome"] for c in requests] == ["200"] * CALLS
    assert [(c["destination"], c["outcome"]) for c in sessions] == [("default/redis:6379", "closed")] * CALLS
    shop.takes(lambda: shop.filters("node-1") == (0, 0), 2)


def test_requests_over_one_connection_are_traced_one_by_one(lab: Lab) -> None:
    with shop.tracing("node-1", "frontend", "cart", "--count", str(CALLS)) as trace:
        assert shop.codes(lab, "frontend", f"http://cart/items?[1-{CALLS}]") == {"200": CALLS}
        seen = shop.connections(trace)
    paths_seen = {next(hop["path"] for hop in c["hops"] if hop["at"] == "waypoint") for c in seen}
    assert paths_seen == {f"/items?{n}" for n in range(1, CALLS + 1)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(("frontent", "redis"), "no workload is called default/frontent: did you mean default/frontend?", id="source"),
        pytest.param(
            ("frontend", "rediss"), "no service or workload is called default/rediss: did you mean default/redis?", id="destination"
        ),
        pytest.param(("frontend", "redis:99"), "service default/redis has no port 99; it has 6379", id="port"),
        pytest.param(("frontend", "redis:http"), "redis:http: http is no port number", id="no-number"),
        pytest.param(
            ("frontend", "rediss.default.svc.cluster.local"),
            "no service has the DNS name rediss.default.svc.cluster.local: pods that look it up get what the resolver outside of the mesh says, mostly "
            "NXDOMAIN; did you mean default/redis?",
            id="dns-name",
        ),
    ],
)
def test_a_name_that_does_not_exist_is_a_negative_answer_with_a_suggestion(lab: Lab, arguments: tuple[str, str], said: str) -> None:
    run = lab.ask("node-1", "trace", *arguments, "--duration", "0")
    assert (run.returncode, run.stdout, run.stderr) == (1, "", f"Error: {said}\n")


def test_a_trace_works_from_any_node(lab: Lab) -> None:
    with shop.tracing("node-1", "cart-v1-2", "redis", "--count", "1", "--duration", "30") as trace:
        shop.ping(lab, "cart-v1-2")
        (seen,) = shop.connections(trace)
    assert (seen["source"], {hop["node"] for hop in seen["hops"]}) == ("default/cart-v1-2", {"node-2"})
    assert lab.meshagent("trace", "cart-v1-2", "frontend", "-o", "json", "--duration", "1").returncode == 0, "the right agent is found"
    run = lab.ask("node-1", "trace", "cart-v1-2", "redis", "--probe", "-o", "json")
    assert (run.returncode, json.loads(run.stdout)["source"]) == (1, "default/cart-v1-2")
    assert "a node may not probe for another: ask on the source's node, or the controller (--controller)" in run.stderr


def test_a_trace_and_the_status_of_all_nodes_come_through_the_controller(lab: Lab) -> None:
    run = lab.meshagent("trace", "cart-v1-2", "frontend", "--probe", "-o", "json", "--controller", shop.CONTROLLER)
    plan, seen = (json.loads(line) for line in run.stdout.splitlines())
    assert (run.returncode, plan["source"], seen["hops"][0]["node"]) == (0, "default/cart-v1-2", "node-2")
    run = lab.meshagent("status", "-o", "json", "--controller", shop.CONTROLLER)
    assert (run.returncode, sorted(json.loads(line)["node"] for line in run.stdout.splitlines())) == (0, ["node-1", "node-2"])
    run = lab.meshagent("trace", "cart-v1-9", "frontend", "--controller", shop.CONTROLLER)
    assert (run.returncode, "did you mean default/cart-v1-" in run.stderr) == (1, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("trace", "frontend"),
        ("trace", "frontend", "cart", "--count", "-1"),
        ("trace", "frontend", "cart", "--duration", "soon"),
        ("status", "-o", "xml"),
        ("run",),
        ("no-such-command",),
        ("apply",),
        ("apply", "-f", "/nonexistent.yaml"),
        ("get",),
        ("completion", "tcsh"),
        ("lab", "exec", "frontend"),
        ("lab", "up", "-f", "/"),
        ("uninstall", "--no-such-option"),
    ],
    ids=" ".join,
)
def test_misuse_is_exit_code_2(lab: Lab, arguments: tuple[str, ...]) -> None:
    run = lab.meshagent(*arguments)
    assert (run.returncode, run.stdout) == (2, "")
    assert "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("Error: ")


def test_get_prints_a_table_and_json(lab: Lab) -> None:
    table = lab.meshagent("get", "services", "--controller", shop.CONTROLLER)
    header, *rows = [line.split() for line in table.stdout.splitlines()]
    assert header == ["KIND", "NAMESPACE", "NAME", "SUMMARY", "STATUS"]
    assert [row[2] for row in rows] == ["cart", "cart-v1", "cart-v2", "frontend", "redis"]
    listed = json.loads(lab.meshagent("get", "svc", "-o", "json", "--controller", shop.CONTROLLER).stdout)
    assert [item["metadata"]["name"] for item in listed["items"]] == [row[2] for row in rows]
    one = json.loads(lab.meshagent("get", "httproute", "default/cart-split", "-o", "json", "--controller", shop.CONTROLLER).stdout)
    assert (one["kind"], one["spec"]["rules"][0]["retry"]["attempts"]) == ("HTTPRoute", 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("servicez",), 'did you mean "service"'),
        (("service", "redis", "-n", "elsewhere"), "there is no service elsewhere/redis"),
    ],
)
def test_get_of_what_does_not_exist_is_a_negative_answer(lab: Lab, arguments: tuple[str, ...], said: str) -> None:
    run = lab.meshagent("get", *arguments, "--controller", shop.CONTROLLER)
    assert (run.returncode, run.stdout) == (1, "")
    assert said in run.stderr


def test_get_without_a_controller_is_a_negative_answer_in_one_line(lab: Lab, tmp_path: Path) -> None:
    run = lab.meshagent("get", "services", "--controller", f"unix:{tmp_path}/absent.sock")
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert "is `mesh-controller run` up?" in line


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_that_the_shell_takes(lab: Lab, shell: str) -> None:
    run = lab.meshagent("completion", shell)
    assert run.returncode == 0
    assert "_MESHAGENT_COMPLETE" in run.stdout
    if shell == "bash":
        completed = subprocess.run(["bash", "-n"], input=run.stdout, text=True, check=False, capture_output=True)
        assert completed.returncode == 0, completed.stderr


@pytest.mark.parametrize(("command", "code"), [("exit 23", 23), ("true", 0), ("kill -9 $$", -9)])
def test_lab_exec_hands_on_the_exit_code(lab: Lab, command: str, code: int) -> None:
    assert lab.meshagent("lab", "exec", "frontend", "--", "sh", "-c", command).returncode == code


def test_lab_exec_of_a_pod_that_does_not_exist_suggests_one(lab: Lab) -> None:
    run = lab.meshagent("lab", "exec", "frontent", "--", "true")
    assert (run.returncode, run.stderr) == (1, "Error: no pod is called default/frontent: did you mean default/frontend?\n")
