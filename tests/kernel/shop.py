"""What tests of the whole mesh ask of the running shop: real clients, the pods' own counters, the agents, and how fast a change holds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from prometheus_client.parser import text_string_to_metric_families

from lab import mesh, paths
from lab.lab import Lab
from meshapi import agent_pb2 as pb
from meshapi import agent_pb2_grpc
from tests.kernel import programs

LOAD = Path(__file__).with_name("load.py")
CONTROLLER = f"unix://{paths.CONTROLLER_SOCKET}"
POLL_S = 0.01
DENY_FRONTEND = """
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: deny-frontend}}
spec:
  selector: {{matchLabels: {{app: {app}}}}}
  action: DENY
  rules: [{{from: [{{source: {{serviceAccounts: [default/frontend]}}}}]}}]
"""
ALL_MAY_READ = """
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: all-may-read}
spec:
  selector: {matchLabels: {app: cart}}
  action: ALLOW
  rules: [{to: [{operation: {methods: [GET], paths: ["/items*"]}}]}]
"""


def codes(lab: Lab, place: str, url: str, *options: str) -> Counter[str]:
    """How often each HTTP status came, or "curl N" (7: could not connect) where none did; `url` may have curl's ranges."""
    out = "%{stderr}%{http_code} %{exitcode}\\n"
    argv = ["curl", "-s", "--max-time", "10", "-o", "/dev/null", "-w", out, *options, url]
    pairs = [line.split() for line in lab.exec(place, argv, timeout=90).stderr.splitlines()]
    return Counter(code if code != "000" else f"curl {number}" for code, number in pairs)


def get(lab: Lab, place: str, url: str, *options: str) -> dict[str, Any]:
    """The JSON that a URL answers, with its status as `status` and its headers as `headers`; the body is {} if it is no JSON."""
    argv = ["curl", "-s", "--max-time", "10", "-w", '%{stderr}{"status": %{http_code}, "headers": %{header_json}}', *options, url]
    run = lab.exec(place, argv)
    try:
        body = json.loads(run.stdout)
    except ValueError:
        body = {}
    return {**body, **json.loads(run.stderr)}


def answered(lab: Lab, pod: str) -> Counter[str]:
    """What a shop program has answered so far, by "METHOD PATH STATUS"; asked over the pod's own loopback, which the mesh leaves alone."""
    run = lab.exec(pod, ["curl", "-sS", "--max-time", "5", "http://127.0.0.1:8080/admin/counters"], check=True)
    return Counter(json.loads(run.stdout))


def ping(lab: Lab, place: str, host: str = "redis") -> str:
    """What redis, or redis-cli on its behalf, says to a PING."""
    run = lab.exec(place, ["redis-cli", "-h", host, "PING"], timeout=10)
    return (run.stdout.strip() or run.stderr.strip()).splitlines()[0]


def status(node: str) -> dict[str, Any]:
    """What the agent of a node says of itself; asked at its socket, because a command takes 0.3 s to start."""
    with grpc.insecure_channel(f"unix:{paths.agent_run(node)}/agent.sock") as channel:
        stub = agent_pb2_grpc.AgentStub(channel)  # type: ignore[no-untyped-call,unused-ignore]
        document: dict[str, Any] = json.loads(stub.Status(pb.StatusRequest(), timeout=5).document)
        return document


def samples(lab: Lab, node: str, name: str, **labels: str) -> float:
    """Sum of a node's samples of one name that carry these labels."""
    families = text_string_to_metric_families(lab.metrics(node))
    return sum(s.value for f in families for s in f.samples if s.name == name and labels.items() <= s.labels.items())


def requests(lab: Lab, node: str, side: str) -> int:
    """Requests that a node's waypoint has accepted on one side ("outbound": for callers, "inbound": for receivers)."""
    return lab.envoy_stats(node).get(f"http.{side}.downstream_rq_total", 0)


def plan(lab: Lab, node: str, source: str, destination: str) -> dict[str, Any]:
    """The first object of `meshagent trace -o json`: what would happen."""
    document: dict[str, Any] = json.loads(lab.ask(node, "trace", source, destination, "-o", "json", "--duration", "0").stdout)
    return document


def takes(condition: Callable[[], object], limit: float = 10.0, *, pause: float = POLL_S, said: Callable[[], object] = str) -> float:
    """Seconds until a condition came true; AssertionError if that takes longer than `limit`, with what is `said` then."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit, f"not true after {limit} s {said()}"
        time.sleep(pause)
    return time.monotonic() - started


def delete(lab: Lab, document: str) -> None:
    """`meshagent delete` what a YAML text names."""
    path = paths.RUN / "delete.yaml"
    path.write_text(document)
    lab.meshagent("delete", "--controller", CONTROLLER, "-f", str(path), check=True)


@contextmanager
def applied(lab: Lab, document: str) -> Iterator[None]:
    """Resources that are in force on every node within the block, as far as the agents' kernel tables go, and are gone afterwards."""
    with changed(lab):
        lab.apply(document)
    try:
        yield
    finally:
        with changed(lab):
            delete(lab, document)


@contextmanager
def changed(lab: Lab, limit: float = 5.0) -> Iterator[None]:
    """Wait, at the end of the block, until every agent holds one and the same model that is not the one from before."""

    def versions() -> set[str]:
        return {str(status(node.name)["controller"]["version"]) for node in lab.topology.nodes}

    before = versions()
    yield
    takes(lambda: len(now := versions()) == 1 and not now & before, limit)


@contextmanager
def tracing(node: str, source: str, destination: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A running `meshagent trace -o json` whose plan was read: from now on it sees every connection. Ended by SIGINT, as people do."""
    command = mesh.agent_command(node, "trace", source, destination, "-o", "json", *options)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as trace:
        try:
            assert trace.stdout is not None
            assert json.loads(trace.stdout.readline())["kind"] == "plan"
            yield trace
        finally:
            if trace.poll() is None:
                trace.send_signal(signal.SIGINT)
            try:
                trace.wait(10)
            except subprocess.TimeoutExpired:
                trace.kill()
                raise


def connections(trace: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """The connections that a trace has printed until it ends by itself."""
    assert trace.stdout is not None
    return [json.loads(line) for line in trace.stdout]


def filters(node: str) -> tuple[int, int]:
    """Rows of mesh_trace, and mesh_config.tracing: what the kernel looks at. Read with bpftool, so that the agent cannot be wrong about it."""
    (maps,) = paths.agent_pins(node).glob("maps-*")
    rows = dump(maps / "mesh_trace")
    (config,) = dump(maps / "mesh_config")
    value = bytes(int(byte, 16) for byte in config["value"])
    return len(rows), int.from_bytes(value[8:12], sys.byteorder)


def dump(pin: Path) -> list[dict[str, Any]]:
    """The rows of a pinned map, as bpftool sees them."""
    out = subprocess.run(["bpftool", "-j", "map", "dump", "pinned", str(pin)], capture_output=True, text=True, check=True).stdout
    found: list[dict[str, Any]] = json.loads(out)
    return found


def program_ids(node: str) -> list[int]:
    """Ids of a node's pinned programs, in a stable order."""
    return programs.pinned(paths.agent_pins(node))


def map_ids(node: str) -> dict[str, int]:
    """Ids of a node's pinned maps, by name."""
    (directory,) = paths.agent_pins(node).glob("maps-*")
    return programs.ids(directory)


def running_ids(node: str) -> set[int]:
    """Ids of the programs that a node's links run."""
    return set(programs.running(paths.agent_pins(node)).values())


def alive(pid: int) -> bool:
    """True if a process runs; an ended one that nobody has waited for does not (proc(5), /proc/PID/stat)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a Load: when it began (time.monotonic), how long it took, what came of it."""

    started: float
    seconds: float
    outcome: str


class Load:
    """A load.py that runs in a place until `stop`."""

    def __init__(self, lab: Lab, place: str, target: str, rate: float = 20.0) -> None:
        self._process = lab.popen(place, ["python3", str(LOAD), str(rate), target])
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "running\n"

    def stop(self) -> list[Call]:
        """End it; every call that it made."""
        self._process.terminate()
        out, error = self._process.communicate(timeout=20)
        assert self._process.returncode == 0, error
        return [Call(*call) for call in json.loads(out)]


def outcomes(calls: list[Call]) -> Counter[str]:
    """How often each came."""
    return Counter(call.outcome for call in calls)


@contextmanager
def loads(lab: Lab, *targets: tuple[str, str]) -> Iterator[list[list[Call]]]:
    """Loads of (place, target) that run within the block; the list is filled when it ends."""
    running = [Load(lab, place, target) for place, target in targets]
    found: list[list[Call]] = []
    try:
        yield found
    finally:
        found += [load.stop() for load in running]
