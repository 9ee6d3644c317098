"""What a node says about who talks to whom: tables as a test fills them, and Envoy's text from a socket."""

from __future__ import annotations

import asyncio
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import graph
from agent.bpf.manifest import STATS_TUNNELLED, Direction, Reason, Verdict
from agent.enrolment import Enrolled
from agent.graph import Observer, Reading, quantile
from agent.ids import Ids
from agent.l7.metrics import BOUNDS_US
from agent.model import LocalWorkload, Service, ServicePort
from meshapi.graph.answer import Answer, Backend, Edge, decode
from tests.unit.agent import tables
from tests.unit.agent.test_api import workload

TCP, UDP = int(socket.IPPROTO_TCP), int(socket.IPPROTO_UDP)
CART = Service("default/cart", ("10.96.0.10",), (ServicePort(80, "", "HTTP", "", True, "a route"),))


class Node:
    """A node with the workloads a and b; c is elsewhere."""

    def __init__(self, tmp_path: Path) -> None:
        self.stats, self.verdicts = tables.stats(), tables.verdicts()
        self.ids = Ids(tmp_path / "ids")
        self.admin = tmp_path / "admin.sock"
        enrolled = Enrolled(tuple(LocalWorkload(workload(name), n, "/proc/self/ns/none") for n, name in enumerate("ab")))
        maps = {"mesh_stats": self.stats, "mesh_verdicts": self.verdicts, **tables.of_sockets()}
        self.observer = Observer("node-1", cast("Any", maps), self.ids, self.admin, lambda: {CART.name: CART}, lambda: enrolled)

    def pair(
        self, source: str, target: str = "", service: str = "", port: int = 80, way: int = Direction.OUTBOUND, protocol: int = TCP
    ) -> dict[str, int]:
        """A key of mesh_stats."""
        return {**self.ends(source, target, service), "port": port, "direction": way, "protocol": protocol}

    def ends(self, source: str, target: str = "", service: str = "") -> dict[str, int]:
        found = {"source": ("workload", source), "target": ("workload", target), "service": ("service", service)}
        return {member: self.ids.number(kind, f"default/{name}") if name else 0 for member, (kind, name) in found.items()}

    def verdict(
        self, count: int, ends: dict[str, int], reason: Reason, direction: Direction = Direction.OUTBOUND, protocol: int = TCP
    ) -> None:
        rule = {"rule": self.ids.number("rule", "default/p: no rule matches")}
        key = {**ends, **rule, "verdict": Verdict.DENY, "direction": direction, "reason": reason, "protocol": protocol}
        self.verdicts.add(key, {"": count})

    def reading(self, at: float) -> Reading:
        return self.observer._count([])._replace(at=at)

    def grown(self, before: Reading, seconds: float = 2.0) -> dict[tuple[str, str, str], Edge]:
        """What came after a reading, by source, destination and protocol; as others read it."""
        answer = self.observer._compare(before, self.reading(before.at + seconds))
        assert decode(answer.encode(), "node-1") == answer
        self.problems = answer.problems
        return {
            (edge.source.removeprefix("default/"), edge.destination.removeprefix("default/"), edge.protocol): edge for edge in answer.edges
        }


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


@contextmanager
def envoy(path: Path, pages: list[str]) -> Iterator[None]:
    """Answers with one page after the other, and the last one again."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = (pages.pop(0) if len(pages) > 1 else pages[0]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None: ...

        def address_string(self) -> str:
            return ""

    with socketserver.UnixStreamServer(str(path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def counted(key: str, code: str, count: int, status: str = "-") -> str:
    return f'envoy_mesh_requests{{k="{key}|{code}|{status}|-"}} {count}\n'


def timed(key: str, slot: int, count: int) -> str:
    bounds = [*BOUNDS_US, "+Inf"]
    lines = [f'envoy_mesh_duration_bucket{{k="{key}",le="{bound}"}} {count if n >= slot else 0}' for n, bound in enumerate(bounds)]
    return "\n".join([*lines, f'envoy_mesh_duration_sum{{k="{key}"}} 1', f'envoy_mesh_duration_count{{k="{key}"}} {count}', ""])


def asked(target: str, owner: str = "default/a", address: str = "10.96.0.10:80", direction: str = "outbound") -> str:
    return f"{direction}|{owner}||{address}|{target}|default/route rule 0"


def test_connections_have_rates_failures_bytes_and_the_time_to_connect(node: Node) -> None:
    key = node.pair("a", "c", "redis:6379", 6379)
    node.stats.add(key, opened=10, closed=(9, 0, 1, 0, 0), sent_bytes=100, connect_bucket=(10,) + (0,) * 15)
    before = node.reading(1.0)
    node.stats.add(key, opened=30, closed=(29, 0, 2, 2, 1), sent_bytes=500, received_bytes=600, connect_bucket=(10, 20) + (0,) * 14)
    edge = node.grown(before)["a", "redis", "tcp"]
    assert (edge.kind, edge.port, edge.side, edge.rate, edge.errors, edge.bytes) == ("service", 6379, "source", 12.0, 2.0, 500.0)
    assert edge.p50 is not None
    assert 16e-6 < edge.p50 < 33e-6
    assert (edge.mtls, edge.backends) == ("none", (Backend("default/c", 12.0, mtls=False),))


def test_what_did_not_happen_in_the_window_is_not_told(node: Node) -> None:
    node.stats.add(node.pair("a", "c"), opened=10, sent_bytes=100)
    before = node.reading(1.0)
    assert node.grown(before) == {}


def test_a_pair_that_was_forgotten_and_came_back_counts_from_nothing(node: Node) -> None:
    node.stats.add(node.pair("a", "c"), opened=1000, sent_bytes=100)
    before = node.reading(1.0)
    node.stats.add(node.pair("a", "c"), opened=4, sent_bytes=10)
    assert node.grown(before)["a", "c", "tcp"].rate == 2.0


def test_tunnels_are_mtls_and_several_ends_are_some(node: Node) -> None:
    before = node.reading(1.0)
    node.stats.add(node.pair("a", "c", "redis:6379", way=Direction.OUTBOUND | STATS_TUNNELLED), opened=4)
    assert node.grown(before)["a", "redis", "tcp"].mtls == "all"
    node.stats.add(node.pair("a", "b", "redis:6379"), opened=2)
    edge = node.grown(before)["a", "redis", "tcp"]
    assert (edge.mtls, edge.backends) == ("some", (Backend("default/c", 2.0, mtls=True), Backend("default/b", 1.0, mtls=False)))


def test_a_node_tells_of_its_own_workloads_and_of_who_comes_from_outside(node: Node) -> None:
    before = node.reading(1.0)
    for way in Direction:
        node.stats.add(node.pair("c", "a", way=way), opened=2)  # told by the node of c
        node.stats.add(node.pair("", "b", port=8080, way=way), opened=2)
    node.stats.add(node.pair("a", "c", way=Direction.FROM_WAYPOINT), opened=2)  # the waypoint's own leg of a call
    node.stats.add(node.pair("a", port=443), opened=2)
    found = node.grown(before)
    assert found.keys() == {("", "b", "tcp"), ("a", "", "tcp")}
    assert (found["", "b", "tcp"].side, found["", "b", "tcp"].port) == ("destination", 8080)
    assert (found["a", "", "tcp"].kind, found["a", "", "tcp"].port) == ("outside", 443)


def test_denials_have_their_rule_and_calls_nobody_was_there_for_are_errors(node: Node) -> None:
    before = node.reading(1.0)
    node.verdict(4, node.ends("a", "c", "redis:6379"), Reason.POLICY)
    node.verdict(6, node.ends("c", "b"), Reason.PLAINTEXT, Direction.INBOUND)
    node.verdict(8, node.ends("a", service="empty:80"), Reason.NO_BACKEND)
    node.verdict(10, node.ends("a"), Reason.NO_PORT, protocol=UDP)  # getaddrinfo() sorts addresses by connecting to port 0
    found = node.grown(before)
    assert {ends: (edge.denied, edge.errors, edge.side) for ends, edge in found.items()} == {
        ("a", "redis", "tcp"): (2.0, 0.0, "source"),
        ("c", "b", "tcp"): (3.0, 0.0, "destination"),
        ("a", "empty", "tcp"): (0.0, 4.0, "source"),
    }
    assert found["a", "redis", "tcp"].rules == ("default/p: no rule matches",)


def test_datagrams_are_flows(node: Node) -> None:
    before = node.reading(1.0)
    node.stats.add(node.pair("a", "c", "dns:53/udp", 53, protocol=UDP), opened=6)
    assert node.grown(before)["a", "dns", "udp"].rate == 3.0


def test_requests_take_the_place_of_the_connections_that_they_came_by(node: Node) -> None:
    node.stats.add(node.pair("a", service="cart:80"), opened=1)
    near, far, nowhere = asked("default/b"), asked("default/c mutual_tls"), asked("")
    pages = [
        counted(near, "200", 100) + timed(near, 0, 100),
        counted(near, "200", 104) + counted(near, "503", 2) + counted(far, "200", 8, "0") + counted(far, "200", 2, "14")
        + counted(nowhere, "403", 6) + counted(nowhere, "404", 4) + timed(near, 1, 106) + timed(far, 2, 8)
        + counted(asked("default/b", owner="default/c"), "200", 99) + counted(asked("", direction="inbound"), "200", 99),
    ]  # fmt: skip
    with envoy(node.admin, pages):
        before = node.reading(1.0)
        node.stats.add(node.pair("a", service="cart:80"), opened=3, sent_bytes=40, closed=(0, 0, 2, 0, 0))
        node.verdict(2, node.ends("a", service="cart:80"), Reason.POLICY)
        found = node.grown(before)
    assert found.keys() == {("a", "cart", "http")}
    edge = found["a", "cart", "http"]
    assert (edge.rate, edge.errors, edge.denied, edge.bytes) == (10.0 + 1.0, 2.0 + 1.0, 3.0 + 1.0, 20.0)
    assert edge.backends == (Backend("default/c", 5.0, mtls=True), Backend("default/b", 3.0, mtls=False))
    assert (edge.mtls, edge.port) == ("some", 80)
    assert edge.p99 is not None
    assert 0.001 < edge.p99 <= 0.0025
    assert node.problems == ()


def test_requests_of_long_ago_do_not_take_the_place_of_connections_of_now(node: Node) -> None:
    old = counted(asked("default/b"), "200", 100) + timed(asked("default/b"), 0, 100)
    with envoy(node.admin, [old, old]):
        before = node.reading(1.0)
        node.stats.add(node.pair("a", service="cart:80"), opened=3)
        found = node.grown(before)
    assert found.keys() == {("a", "cart", "tcp")}


def test_an_envoy_that_begins_anew_counts_from_nothing(node: Node) -> None:
    with envoy(node.admin, [counted(asked("default/b"), "200", 1000), counted(asked("default/b"), "200", 4)]):
        before = node.reading(1.0)
        assert node.grown(before)["a", "cart", "http"].rate == 2.0


def test_without_envoy_there_are_connections_and_a_problem_and_never_a_jump(node: Node) -> None:
    before = node.reading(1.0)
    node.stats.add(node.pair("a", "c"), opened=2)
    with envoy(node.admin, [counted(asked("default/b"), "200", 1000)]):
        assert node.grown(before).keys() == {("a", "c", "tcp")}
    assert node.problems == ("the waypoint does not say what it has counted: requests are missing, connections are not",)


def test_a_full_table_of_the_kernel_is_a_problem(node: Node) -> None:
    other = dict.fromkeys(("source", "target", "service", "port", "direction", "protocol"), 0)
    node.stats.add(other, opened=5)
    before = node.reading(1.0)
    node.grown(before)
    assert not any("full" in problem for problem in node.problems)
    node.stats.add(other, opened=6)
    assert node.grown(before) == {}
    assert any("full" in problem for problem in node.problems)


def test_the_busiest_edges_are_told_and_the_others_counted(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "MOST_EDGES", 5)
    node.stats.capacity = 1000
    before = node.reading(1.0)
    for n in range(23):
        node.stats.add(node.pair("a", f"w{n}"), opened=n + 1)
    node.verdict(1, node.ends("b", "denied"), Reason.POLICY)
    answer = node.observer._compare(before, node.reading(2.0))
    assert [edge.destination for edge in answer.edges] == [f"default/{name}" for name in ("denied", "w22", "w21", "w20", "w19")]
    assert answer.folded == 23 + 1 - 5


def test_the_first_question_takes_the_window_and_the_next_one_nothing(node: Node) -> None:
    async def scenario() -> tuple[float, Answer, float, Answer]:
        started = time.monotonic()
        first = await node.observer.answer(1.2)
        between = time.monotonic()
        node.stats.add(node.pair("a", "c"), opened=2)
        await asyncio.sleep(graph.FRESH_S)
        asked_at = time.monotonic()
        second = await node.observer.answer(1.2)
        return between - started, first, time.monotonic() - asked_at, second

    took, first, again, second = asyncio.run(scenario())
    assert 1.2 <= took < 3
    assert first.edges == ()
    assert again < 0.5
    assert second.seconds >= 1.2
    assert [edge.destination for edge in second.edges] == ["default/c"]


def test_several_who_ask_at_once_share_the_readings(node: Node) -> None:
    async def scenario() -> None:
        await asyncio.gather(*(node.observer.answer(1.0) for _ in range(7)))

    asyncio.run(scenario())
    assert len(node.observer._readings) == 2


def test_rows_that_did_not_change_are_kept_once(node: Node) -> None:
    async def scenario() -> None:
        node.stats.add(node.pair("a", "c"), opened=2)
        node.stats.add(node.pair("a", "b"), opened=2)
        first = await node.observer._read()
        await asyncio.sleep(graph.FRESH_S + 0.05)
        changed = node.stats.add(node.pair("a", "b"), opened=3)
        second = await node.observer._read()
        assert {key: second.flows[key] is flow for key, flow in first.flows.items()} == {key: key != changed for key in first.flows}

    asyncio.run(scenario())


@given(st.lists(st.integers(0, 50), min_size=4, max_size=4), st.floats(0.01, 1))
def test_a_quantile_lies_in_the_slot_of_its_observation(slots: list[int], share: float) -> None:
    bounds = (1.0, 2.0, 5.0)
    values = [slot for slot, count in enumerate(slots) for _ in range(count)]
    found = quantile(share, slots, bounds)
    if not values:
        assert found is None
        return
    rank = share * len(values)
    slot = values[max(0, -int(-rank // 1) - 1)]
    low, high = (0.0, *bounds)[slot], (*bounds, 5.0)[slot]
    assert found is not None
    assert low <= found <= high
