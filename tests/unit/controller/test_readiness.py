"""Who has tunnels: what agents report, what survives, and what agents are told."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from agent.config import Config
from agent.discovery import Discovery
from agent.model import Mtls, Snapshot, Workload, decode
from controller.identity.directory import Directory
from controller.readiness import FILE, FileMemory, Place, Readiness
from meshapi import discovery_pb2 as pb
from meshapi import discovery_pb2_grpc
from tests.tasks import beside, until
from tests.unit.controller.identity.harness import OPTIONS, Node, World, join, world

WORKLOADS = "".join(
    f"apiVersion: meshagent.io/v1alpha1\nkind: Workload\nmetadata: {{name: {name}, labels: {{{labels}}}}}\n"
    f"spec: {{node: {node}, addresses: [{address}], networkNamespace: {name}}}\n---\n"
    for name, node, address, labels in (
        ("one", "node-1", "10.0.1.1", ""),
        ("two", "node-1", "10.0.1.2", ""),
        ("three", "node-2", "10.0.1.3", ""),
        ("other", "node-3", "10.0.1.4", "networking.istio.io/tunnel: http"),
    )
)


def awaiting(served: World) -> set[str]:
    """What agents are told."""
    found = set()
    for name, resource in served.controller.mesh.publication.current.resources.items():
        workload = decode(resource.entity)
        if isinstance(workload, Workload) and workload.awaits_tunnels:
            assert name == f"workload/{workload.name}"
            found.add(workload.name.removeprefix("default/"))
    return found


def stored(directory: Path) -> int:
    """How many workloads a restart would know."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return len(json.loads((directory / FILE).read_text())["ready"])
    return -1


@contextlib.asynccontextmanager
async def discovery(served: World, node: Node) -> AsyncIterator[Any]:
    async with grpc.aio.secure_channel(served.address, node.credentials, OPTIONS) as channel:
        yield discovery_pb2_grpc.DiscoveryStub(channel)  # type: ignore[no-untyped-call,unused-ignore]


def report(node: str, *names: str) -> pb.TunnelReport:
    return pb.TunnelReport(node=node, workloads=[f"default/{name}" for name in names])


def test_a_workload_awaits_tunnels_until_its_own_node_says_that_they_are_there(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path, WORKLOADS) as served:
            first = await join(served, "node-1")
            assert awaiting(served) == {"one", "two", "three"}
            async with discovery(served, first) as stub:
                await stub.ReportTunnels(report("node-1", "one", "three", "nobody"))
                await until(lambda: awaiting(served) == {"two", "three"})
                with pytest.raises(grpc.aio.AioRpcError, match="node node-2 is not yours"):
                    await stub.ReportTunnels(report("node-2", "three"))
            assert awaiting(served) == {"two", "three"}, "and holds when the agent is away"

    asyncio.run(check())


def test_a_restart_of_the_controller_takes_nothing_back(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path, WORKLOADS) as served:
            first = await join(served, "node-1")
            async with discovery(served, first) as stub:
                await stub.ReportTunnels(report("node-1", "one"))
            await until(lambda: awaiting(served) == {"two", "three"})
            version = served.controller.mesh.publication.current.version
        async with world(tmp_path, WORKLOADS) as served:
            assert served.controller.mesh.publication.current.version == version, "from the first moment on"

    asyncio.run(check())


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"ready": []}'])
def test_a_file_that_is_lost_widens_nothing(tmp_path: Path, content: str | None) -> None:
    async def check() -> None:
        async with world(tmp_path, WORKLOADS) as served:
            await until((served.ca_directory / FILE).exists)
        if content is None:
            (served.ca_directory / FILE).unlink()
        else:
            (served.ca_directory / FILE).write_text(content)
        async with world(tmp_path, WORKLOADS) as served:
            assert awaiting(served) == set()
            await until(lambda: stored(served.ca_directory) == 4)
            (tmp_path / "src" / "more.yaml").write_text(
                WORKLOADS.replace("name: one", "name: late").replace("10.0.1.1", "10.0.1.9").partition("---")[0]
            )
            await until(lambda: awaiting(served) == {"late"})

    asyncio.run(check())


def test_a_workload_that_leaves_the_model_or_its_node_begins_anew(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path, WORKLOADS) as served:
            first = await join(served, "node-1")
            async with discovery(served, first) as stub:
                await stub.ReportTunnels(report("node-1", "one", "two"))
            await until(lambda: awaiting(served) == {"three"})
            source = tmp_path / "src" / "workloads.yaml"
            source.write_text(WORKLOADS.replace("node: node-1, addresses: [10.0.1.1]", "node: node-2, addresses: [10.0.1.1]"))
            await until(lambda: awaiting(served) == {"one", "three"})
            source.write_text(WORKLOADS)
            await until(lambda: awaiting(served) == {"one", "three"})

    asyncio.run(check())


def test_nothing_is_published_that_a_restart_would_not_know(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    readiness = Readiness(FileMemory(Directory(tmp_path / "file"), used=False))  # no directory: nothing can be stored
    readiness.load()
    one = pb.Entity(workload=pb.Workload(namespace="default", name="one", node="node-1", enrolled=True))
    assert readiness.report("node-1", ["default/one"], {"default/one": Place("default/one", "node-1")}) == 1

    async def check() -> None:
        async def published() -> None:
            raise AssertionError

        async with beside(readiness.run(published)):
            await asyncio.sleep(0.3)

    asyncio.run(check())
    assert readiness.awaiting({"workload/default/one": one}) == {"workload/default/one"}


def test_without_an_authority_nobody_awaits_anything(tmp_path: Path) -> None:
    readiness = Readiness(None)
    readiness.load()
    one = {"workload/default/one": pb.Entity(workload=pb.Workload(namespace="default", name="one", node="node-1", enrolled=True))}
    assert readiness.awaiting(one) == frozenset()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mode", "awaits", "tunnel"),
    [
        (Mtls.DISABLE, False, False),
        (Mtls.DISABLE, True, False),
        (Mtls.PERMISSIVE, False, True),
        (Mtls.PERMISSIVE, True, False),
        (Mtls.STRICT, False, True),
        (Mtls.STRICT, True, True),
    ],
)
def test_only_a_permissive_workload_is_called_in_plaintext_for_want_of_tunnels(mode: Mtls, awaits: bool, tunnel: bool) -> None:
    one = Workload("default/one", "one", "node-1", {}, ("10.0.0.1",), "", enrolled=True, ready=True, mtls=mode, awaits_tunnels=awaits)
    assert one.tunnelled_at(80) is tunnel


def test_an_agent_reports_over_its_connection_and_says_why_if_it_cannot(tmp_path: Path) -> None:
    async def check() -> None:
        async def apply(_: Snapshot) -> None:
            pass

        config = Config("node-1", f"unix:{tmp_path}/c.sock", state_dir=tmp_path / "state")
        agent = Discovery(config, apply)
        assert await agent.report_tunnels(["default/one"]) == f"controller unix:{tmp_path}/c.sock is away"
        async with world(tmp_path, WORKLOADS) as served, beside(agent.run()):
            await until(lambda: agent.state.connected)
            assert await agent.report_tunnels(["default/one"]) == ""
            await until(lambda: awaiting(served) == {"two", "three"})

    asyncio.run(check())
