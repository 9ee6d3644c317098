"""Totals of connections that ended and that live. What the kernel says of real ones is in tests/kernel/test_live.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import flows
from agent.bpf.sockets import LiveSocket, Record
from agent.flows import Flows
from tests.unit.agent import tables

SENT, RETRANSMITS = flows.counter(flows.SENT), flows.counter(flows.RETRANSMITS)


def living(source: int, sent: int, *, established: bool = True) -> LiveSocket:
    record = Record(1, int(established), source, 2, 3, 0, 80, 0, 0, 0, 0, 6, 0)
    return LiveSocket(2, 1, bytes(48), sent, 0, 1, 0, record)


class Node:
    def __init__(self) -> None:
        self.stats = tables.stats()
        self.living: list[LiveSocket] = []
        self.flows = Flows(cast("Any", self.stats), cast("Any", self))

    def dump(self, namespace: Path) -> Iterator[LiveSocket]:
        if namespace.name == "closed":
            raise OSError(24, "too many open files")
        return iter(self.living)

    def ended(self, source: int, **members: Any) -> bytes:
        return self.stats.add({"source": source, "target": 2, "service": 3, "port": 80, "protocol": 6}, **members)

    def read(self) -> dict[bytes, flows.Flow]:
        return self.flows.read([Path("here")])


def test_what_lives_is_added_to_what_ended() -> None:
    node = Node()
    key = node.ended(1, sent_bytes=100, retransmits=5)
    node.living = [living(1, 10), living(1, 20), living(1, 0, established=False)]
    found = node.read()[key]
    assert (SENT(found.counts), RETRANSMITS(found.counts), found.active) == (130, 8, 2)


def test_a_connection_that_ends_between_the_looks_takes_nothing_away() -> None:
    node = Node()
    key = node.ended(1, sent_bytes=100)
    node.living = [living(1, 10)]
    assert SENT(node.read()[key].counts) == 110
    node.living = []
    for _ in range(2):
        assert SENT(node.read()[key].counts) == 110
    node.ended(1, sent_bytes=111, retransmits=1)
    assert SENT(node.read()[key].counts) == 111
    assert not node.flows._floor, "nothing to remember when the map has caught up"


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 50)), max_size=30))
def test_totals_never_fall(steps: list[tuple[bool, int]]) -> None:
    """A connection sends, or ends with one byte less than it seemed (a FIN that nobody acknowledged), and is not in the map at once."""
    node = Node()
    key = node.ended(1)
    done = last = 0
    for ends, sent in steps:
        if ends and node.living:
            done += max(0, sum(s.sent_bytes for s in node.living) - 1)
            node.living = []
            assert SENT(node.read()[key].counts) >= last
            node.ended(1, sent_bytes=done)
        else:
            node.living = [living(1, sent + sum(s.sent_bytes for s in node.living))]
        now = SENT(node.read()[key].counts)
        assert now >= last
        last = now


def test_a_pair_that_is_new_since_the_look_at_the_map_waits_for_the_next() -> None:
    node = Node()
    node.living = [living(7, 10)]
    assert node.read() == {}


def test_what_found_no_room_in_a_full_map_is_counted_with_the_others() -> None:
    node = Node()
    other = node.stats.add({})
    node.stats.capacity = 1
    node.living = [living(7, 10)]
    found = node.read()[other]
    assert (SENT(found.counts), found.active) == (10, 1)


def test_counters_of_every_cpu_are_added_up() -> None:
    node = Node()
    key = node.ended(1, sent_bytes=5, rtt_bucket=tuple(range(16)))
    node.stats.rows[key] = [node.stats.rows[key][1]] * 3
    found = node.read()[key]
    assert SENT(found.counts) == 15
    assert flows.buckets(flows.RTT_BUCKET)(found.counts) == tuple(3 * i for i in range(16))


def test_a_namespace_that_cannot_be_looked_at_takes_only_its_own_connections_with_it(caplog: pytest.LogCaptureFixture) -> None:
    node = Node()
    key = node.ended(1)
    node.living = [living(1, 10)]
    assert SENT(node.flows.read([Path("closed"), Path("here")])[key].counts) == 10
    assert [one.message for one in caplog.records] == ["living connections of some namespaces are not counted"]
