"""`make bench-identity`: how long a new workload waits for its certificate, and how long it takes until 250 that appear at once are in the mesh.

Workloads are network namespaces with nothing but a loopback interface: nothing runs in them, and nothing has to. A certificate counts as ready
when the agent would show it; a workload as enrolled when it has one, the kernel's tables know it and Envoy listens in its namespace.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc

from bench.main import run
from bench.result import LEAST_ROUNDS, Result, Target
from bench.testbed import CALLER, NODE, to_yaml
from lab import netns, paths, resources
from lab.errors import LabError
from lab.lab import Lab
from lab.topology import Node, Pod, Topology
from meshapi import admin_pb2 as admin_pb
from meshapi import admin_pb2_grpc, agent_pb2_grpc
from meshapi import agent_pb2 as agent_pb

MANY = 250
CERTIFICATE_MS, ENROLLED_S = 200.0, 5.0
POLL_S, SLOW_POLL_S = 0.002, 0.1
"""How often the agent is asked; an answer about 250 workloads takes it a while."""
READY_S = 60.0
PAUSE_S = 0.5
"""Between two Workloads: the agent is quiet again by then."""


def measure(progress: Callable[[str], None]) -> list[Result]:
    """Bring the lab up and measure both."""
    with Lab(Topology((Node(NODE, 1),), (CALLER,), identity=True), progress=progress) as lab:
        lab.apply(to_yaml([resources.workload(CALLER)]))
        lab.settle()
        socket = paths.agent_run(NODE) / "agent.sock"
        with grpc.insecure_channel(f"unix:{socket}") as near, grpc.insecure_channel(f"unix:{paths.CONTROLLER_SOCKET}") as far:
            agent, controller = agent_pb2_grpc.AgentStub(near), admin_pb2_grpc.AdminStub(far)
            _until(lambda: _certified(agent, {CALLER.full_name}) == 1, POLL_S)
            ones = []
            for i in range(LEAST_ROUNDS + 1):
                progress(f"one workload: round {i} of {LEAST_ROUNDS}" if i else "one workload: warming up")
                ones.append(_one(controller, agent, pods(i, 1)[0]) * 1e3)
            progress(f"{MANY} workloads")
            many = _many(controller, agent, pods(LEAST_ROUNDS + 1, MANY))
    setup = "one node, empty network namespaces that exist already; from the moment in which the controller is given"
    return [
        _against("identity-ready", "ms", ones[1:], CERTIFICATE_MS, f"{setup} the Workload; asked every {POLL_S * 1e3:g} ms"),
        _against("identity-enrolled-250", "s", [many], ENROLLED_S, f"{setup} {MANY} Workloads; asked every {SLOW_POLL_S:g} s; one run"),
    ]


def _one(controller: admin_pb2_grpc.AdminStub, agent: agent_pb2_grpc.AgentStub, pod: Pod) -> float:
    def ready() -> bool:
        try:
            return bool(_ask(agent.Identity(agent_pb.IdentityRequest(workload=pod.full_name))).get("serial"))
        except grpc.RpcError:  # the agent has not heard of it
            return False

    with _namespaces([pod]):
        time.sleep(PAUSE_S)
        begun = time.monotonic()
        _apply(controller, [pod])
        _until(ready, POLL_S)
        return time.monotonic() - begun


def _many(controller: admin_pb2_grpc.AdminStub, agent: agent_pb2_grpc.AgentStub, found: Sequence[Pod]) -> float:
    names = {pod.full_name for pod in found}

    def ready() -> bool:
        return _certified(agent, names) == len(names) and names <= enrolled(_ask(agent.Status(agent_pb.StatusRequest())))

    with _namespaces(found):
        begun = time.monotonic()
        _apply(controller, found)
        _until(ready, SLOW_POLL_S)
        return time.monotonic() - begun


def _apply(controller: admin_pb2_grpc.AdminStub, found: Sequence[Pod]) -> None:
    document = admin_pb.Document(origin="bench", yaml=to_yaml([resources.workload(pod) for pod in found]))
    results = controller.Apply(admin_pb.ApplyRequest(documents=[document]), timeout=READY_S).results
    refused = [result.message for result in results if result.action != "created"]
    if refused:
        raise LabError(f"the controller refuses {len(refused)} Workloads: {refused[0]}")


def pods(first: int, count: int) -> list[Pod]:
    """Return workloads that differ in all that can differ; `first` numbers the first one."""
    return [
        Pod(f"bench-{i}", NODE, (f"10.80.{i // 250}.{i % 250 + 1}",), namespace=f"bench-{i // 250}", service_account=f"bench-{i}")
        for i in range(first, first + count)
    ]


def enrolled(status: dict[str, Any]) -> set[str]:
    """Return the workloads that are in the mesh by an agent's status: known to the kernel, and Envoy takes their connections."""
    return {f"{w['namespace']}/{w['name']}" for w in status.get("workloads", ()) if w.get("enrolled") and w.get("redirected")}


def _certified(agent: agent_pb2_grpc.AgentStub, names: Collection[str]) -> int:
    document = _ask(agent.Identity(agent_pb.IdentityRequest()))
    return sum(bool(one["serial"]) and one["workload"] in names for one in document["workloads"])


def _ask(answer: agent_pb.Json) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(answer.document)
    return document


def _until(condition: Callable[[], bool], pause: float) -> None:
    deadline = time.monotonic() + READY_S
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"not there after {READY_S:g} s")
        time.sleep(pause)


@contextmanager
def _namespaces(found: Sequence[Pod]) -> Iterator[None]:
    names = [paths.place_netns(pod) for pod in found]
    made = []
    try:
        for name in names:
            netns.create(name)
            made.append(name)
            subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield
    finally:
        for name in made:
            netns.delete(name)


def _against(name: str, unit: str, found: Sequence[float], bound: float, setup: str) -> Result:
    return Result(name, unit, "target", tuple((one, bound) for one in found), setup, Target(1.0, at_least=False))


if __name__ == "__main__":
    sys.exit(run(measure))
