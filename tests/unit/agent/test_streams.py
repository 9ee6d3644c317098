"""Which streams of tunnels end when policy changes, with stand-ins for kernel and Envoy; the real ones are in tests/kernel/test_hbone_refusals.py."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from agent import addresses, asking, streams
from agent.bpf.manifest import Direction
from agent.bpf.sockets import ESTABLISHED, NO_RECORD, LiveSocket, T
from agent.config import UNREAD_MARK
from agent.enrolment import Enrolled
from agent.errors import KernelRefused
from agent.l7.tunnel_log import TunnelRecord
from agent.model import Action, LocalWorkload, Operation, Policy, PolicyRule, Snapshot, Source, Workload
from agent.revocation import Rules
from agent.streams import Streams
from tests.tasks import beside, until

SERVER = Workload("default/server", "server", "here", {}, ("10.0.0.1",), "/7", enrolled=True, ready=True, policies=("default/p",))
QUIET = replace(SERVER, name="default/quiet", addresses=("10.0.0.2",))
OPEN = replace(SERVER, name="default/open", addresses=("10.0.0.3",), policies=())
CALLER = Workload("default/caller", "caller", "there", {"app": "caller"}, ("10.1.0.1",), "", enrolled=True, ready=True)
PLACES = {SERVER.name: 7, QUIET.name: 11, OPEN.name: 13}


def record(
    port: int, *, account: str = "caller", remote: str = "10.1.0.1:999", target: int = 80, workload: str = SERVER.name
) -> TunnelRecord:
    """A stream that is open; `port` is that of Envoy's own end."""
    return TunnelRecord(
        receiver=True,
        workload=workload,
        netns_path="",
        caller="",
        target=f"10.0.0.1:{target}",
        remote=remote,
        peer=f"spiffe://mesh.local/ns/default/sa/{account}",
        tls="TLSv1.3",
        code=200,
        details="",
        flags=(),
        failure="",
        ended=False,
        start_ns=0,
        duration_ns=0,
        sent_bytes=0,
        received_bytes=0,
        stream=f"10.0.0.1:{port}",
    )


def end(port: int, mark: int = UNREAD_MARK, *, target: int = 80) -> LiveSocket:
    """Envoy's own end of a connection to the application."""
    here, there = addresses.packed("10.0.0.1")[12:].ljust(16, b"\0"), bytes(16)
    ident = struct.pack("!HH16s16s", port, target, here, there) + bytes(12)
    return LiveSocket(2, ESTABLISHED, ident, 0, 0, 0, 0, NO_RECORD._replace(direction=Direction.FROM_WAYPOINT), mark)


class Node:
    """Kernel and Envoy: `open` are sockets by namespace; what Envoy was asked is in `asked`, which streams ended in `closed`."""

    def __init__(self) -> None:
        self.open: dict[str, list[LiveSocket]] = {"/7": [end(port) for port in (1, 2, 3)], "/13": [end(4)]}
        self.asked: list[Collection[str]] = []
        self.closed: list[int] = []
        self.hears = True
        self.refuses: Exception | None = None
        self.newest: Rules | None = None
        self.streams = Streams(cast("Any", self), self.who, lambda: self.newest, self.asked.append, lambda: self.hears)

    def who(self, address: bytes) -> str:
        return CALLER.name if addresses.text(address) == "10.1.0.1" else ""

    def dump(self, path: Path) -> list[LiveSocket]:
        return self.open.get(str(path), [])

    def destroy(self, _: Path, found: Collection[tuple[LiveSocket, T]]) -> Iterator[tuple[LiveSocket, T]]:
        for one in found:
            if self.refuses:
                raise self.refuses
            self.closed.append(one[0].ends[0][1])
            yield one


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    for name, value in (("ASK_S", 0.1), ("LOOK_S", 0.01), ("PATIENCE_S", 0.05)):
        monkeypatch.setattr(asking, name, value)
    monkeypatch.setattr(streams, "RETRY_S", 0.01)
    return Node()


def rules(*sources: Source, operations: tuple[Operation, ...] = ()) -> Rules:
    """Who is one of these is denied."""
    policy = Policy("default/p", Action.DENY, (PolicyRule(sources, operations),))
    local = [LocalWorkload(one, PLACES[one.name], f"/{PLACES[one.name]}") for one in (SERVER, QUIET, OPEN)]
    model = Snapshot("1", {one.name: one for one in (SERVER, QUIET, OPEN, CALLER)}, policies={policy.name: policy})
    return Rules(model, Enrolled(tuple(local)))


async def told(node: Node, what: Rules, *records: TunnelRecord, where: set[int] | None = None) -> None:
    """Envoy takes new rules, and answers with these streams while it is asked."""
    async with beside(node.streams.run()):
        node.streams.on_tunnel(record(1))  # of an earlier question
        node.streams.changed(what, where)
        await until(lambda: bool(node.asked))
        for one in records:
            node.streams.on_tunnel(one)
        await until(lambda: frozenset() in node.asked)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(Source(service_accounts=("default/caller",)), id="certificate"),
        pytest.param(Source(ip_blocks=("10.1.0.0/16",)), id="address-of-the-tunnel"),
        pytest.param(Source(labels=(("app", "caller"),)), id="labels-of-who-is-there"),
    ],
)
def test_a_stream_ends_if_policy_forbids_it_to_who_is_at_the_far_end(node: Node, source: Source) -> None:
    others = (record(2, account="other", remote="10.2.0.1:999"), replace(record(3), ended=True))
    asyncio.run(told(node, rules(source), record(1), *others))
    assert (node.closed, node.streams.closed, node.streams.problem) == ([1], 1, "")


def test_only_the_port_that_is_forbidden_ends(node: Node) -> None:
    asyncio.run(told(node, rules(operations=(Operation(ports=(80,)),)), record(1), record(2, target=81), record(3)))
    assert sorted(node.closed) == [1, 3]


def test_a_stream_to_another_port_from_the_same_port_of_envoy_goes_on(node: Node) -> None:
    node.open["/7"] = [end(1, target=81), end(1)]
    asyncio.run(told(node, rules(operations=(Operation(ports=(80,)),)), record(1), record(1, target=81)))
    assert node.closed == [1]


def test_what_is_read_or_not_envoys_own_is_let_be(node: Node) -> None:
    node.open["/7"] = [end(1), end(2, mark=0), end(3)._replace(record=NO_RECORD)]
    asyncio.run(told(node, rules(), record(1), record(2), record(3)))
    assert node.closed == [1]


def test_envoy_is_asked_about_who_is_protected_and_has_streams_and_is_silent_again(node: Node) -> None:
    asyncio.run(told(node, rules()))
    assert node.asked == [{SERVER.name}, frozenset()]
    assert not node.streams.problem


def test_where_nothing_changed_envoy_is_not_asked(node: Node) -> None:
    async def scenario() -> None:
        async with beside(node.streams.run()):
            node.streams.changed(rules(), {13})
            await asyncio.sleep(0.2)

    asyncio.run(scenario())
    assert not node.asked


def test_what_is_allowed_again_while_envoy_is_asked_goes_on(node: Node) -> None:
    async def scenario() -> None:
        async with beside(node.streams.run()):
            node.streams.changed(rules(), None)
            await until(lambda: bool(node.asked))
            node.streams.changed(rules(Source(service_accounts=("default/nobody",))), None)
            node.streams.on_tunnel(record(1))
            await until(lambda: frozenset() in node.asked)

    asyncio.run(scenario())
    assert node.closed == []


def test_what_envoy_may_have_let_in_by_newer_rules_goes_on(node: Node) -> None:
    node.newest = rules(Source(service_accounts=("default/nobody",)))
    asyncio.run(told(node, rules(), record(1)))
    assert node.closed == []


@pytest.mark.parametrize(
    "fails", [None, KernelRefused("not permitted"), OSError(24, "Too many open files")], ids=["silent", "refused", "no-descriptor"]
)
def test_what_cannot_be_closed_is_a_problem_and_is_tried_again(node: Node, fails: Exception | None) -> None:
    async def scenario() -> None:
        node.hears, node.refuses = fails is not None, fails
        async with beside(node.streams.run()):
            node.streams.changed(rules(), {7})
            await until(lambda: node.asked)
            node.streams.on_tunnel(record(1))
            await until(lambda: node.streams.problem)
            assert "the agent tries again" in node.streams.problem
            node.hears, node.refuses = True, None
            asked = len(node.asked)
            await until(lambda: len(node.asked) > asked and node.asked[-1])
            node.streams.on_tunnel(record(1))
            await until(lambda: not node.streams.problem)
        assert 1 in node.closed

    asyncio.run(scenario())
