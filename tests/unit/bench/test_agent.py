"""What the benchmark of agents reads and writes, and its controller, over a real gRPC connection."""

from __future__ import annotations

from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, cast

import grpc
import pytest

from bench.agent import PAIRS, cgroup_seconds, check_page, pairs
from bench.controller import Controller
from bench.model import Model
from lab.errors import LabError
from meshapi import discovery_pb2 as pb
from meshapi import discovery_pb2_grpc

PAGE = 'mesh_tcp_connections_opened_total{source_workload="%s",destination_workload="server",port="80"} 1.0'


def test_cpu_time_of_a_cgroup_is_read_as_seconds() -> None:
    assert cgroup_seconds("usage_usec 1500000\nuser_usec 1000000\nsystem_usec 500000\n") == 1.5


def test_no_pair_is_named_twice() -> None:
    found = pairs(Model(), 0, PAIRS)
    assert len(set(found)) == len(found) == PAIRS
    assert {source for source, _, _ in found} == {"default/caller", "default/server"}


def test_a_page_with_every_pair_is_complete() -> None:
    other = 'mesh_tcp_connections_closed_total{source_workload="caller"} 1.0'
    assert check_page("\n".join([PAGE % "caller"] * 3 + [other, "mesh_map_entries 1.0"]), 3) == 4


def test_a_pair_without_a_name_is_missing() -> None:
    with pytest.raises(LabError, match="names 2 pairs of workloads, 3 were counted"):
        check_page("\n".join([PAGE % "caller"] * 2 + [PAGE % "unknown"]), 3)


def test_the_controller_sends_everything_then_each_change(tmp_path: Path) -> None:
    model = Model()
    received: list[list[str]] = []
    with Controller(tmp_path / "socket", [model.service(1), model.workload(1, 0)]) as controller:
        agent = Thread(target=_follow, args=(controller.target, received, ""))
        agent.start()
        controller.wait(10)
        assert controller.change(model.workload(1, 0, ready=False), 10) > 0
    agent.join(10)
    assert received == [[model.service(1).name, model.workload(1, 0).name], [model.workload(1, 0).name]]


def test_a_refusal_has_its_reason(tmp_path: Path) -> None:
    with Controller(tmp_path / "socket", []) as controller:
        agent = Thread(target=_follow, args=(controller.target, [], "too large"))
        agent.start()
        with pytest.raises(LabError, match="too large"):
            controller.wait(10)
    agent.join(10)


def test_an_agent_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    with Controller(tmp_path / "socket", []) as controller, pytest.raises(LabError, match="not answered"):
        controller.wait(0.01)


def _follow(target: str, received: list[list[str]], error: str) -> None:
    """Answer every response until the controller ends."""
    answers: SimpleQueue[pb.DiscoveryRequest | None] = SimpleQueue()
    answers.put(pb.DiscoveryRequest(node="node-1"))
    with grpc.insecure_channel(target) as channel:
        stub = discovery_pb2_grpc.DiscoveryStub(channel)  # type: ignore[no-untyped-call,unused-ignore]
        try:
            for response in cast("Any", stub).Stream(iter(answers.get, None)):
                received.append([resource.name for resource in response.resources])
                answers.put(pb.DiscoveryRequest(nonce=response.nonce, error=error))
        except grpc.RpcError:
            pass
        finally:
            answers.put(None)
