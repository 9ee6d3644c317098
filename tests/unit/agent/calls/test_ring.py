"""What is remembered: counts by the minute, for an hour, and never more than there is room for."""

from __future__ import annotations

from agent.calls.ring import MOST_PATHS, Outcome, Ring, Seen

MINUTE = 60.0
CALLS = 7


def seen(path: str = "", *, source: str = "shop/web", port: int = 80) -> Seen:
    return Seen(False, source, "shop/cart", "", port, "TCP", Outcome.SERVED, "GET" if path else "", path)


class Clock:
    """Unix time, by hand."""

    def __init__(self) -> None:
        self.now = 1_000_000_020.0

    def __call__(self) -> float:
        return self.now


def test_calls_are_counted_in_the_time_that_is_asked_for() -> None:
    clock = Clock()
    ring = Ring(now=clock)
    for calls in (1, 2, 4):
        ring.add(seen(), calls)
        clock.now += 10 * MINUTE
    assert [(r.calls, r.last_seen) for r in ring.read(3600)] == [(7, clock.now - 10 * MINUTE)]
    assert [r.calls for r in ring.read(21 * MINUTE)] == [6]
    assert [r.calls for r in ring.read(11 * MINUTE)] == [4]
    assert list(ring.read(5 * MINUTE)) == []


def test_after_an_hour_nothing_is_left() -> None:
    clock = Clock()
    ring = Ring(now=clock)
    ring.add(seen("/a"))
    clock.now += 59 * MINUTE
    ring.add(seen("/b"))
    clock.now += 2 * MINUTE
    assert [r.seen.path for r in ring.read(3600)] == ["/b"]
    ring.add(seen("/a"), CALLS)
    assert {r.seen.path: r.calls for r in ring.read(3600)} == {"/a": CALLS, "/b": 1}


def test_minutes_of_an_hour_ago_are_not_those_of_now() -> None:
    clock = Clock()
    ring = Ring(now=clock)
    ring.add(seen(), 100)
    for _ in range(70):
        clock.now += MINUTE
        ring.add(seen(), 1)
    assert [r.calls for r in ring.read(3600)] == [60]


def test_a_connection_that_lives_counts_however_old_it_is() -> None:
    clock = Clock()
    ring = Ring(now=clock)
    for _ in range(120):
        ring.add(seen(), 0, alive=3)
        clock.now += MINUTE
    assert [r.calls for r in ring.read(3600)] == [3]
    ring.still(seen())
    assert list(ring.read(3600)) == []


def test_what_was_not_seen_for_the_longest_time_makes_room() -> None:
    clock = Clock()
    ring = Ring(most=3, now=clock)
    for port in (1, 2, 3, 1, 4):
        clock.now += 1
        ring.add(seen(port=port))
    assert {r.seen.port for r in ring.read(3600)} == {1, 3, 4}
    assert ring.forgotten == 1


def test_a_pair_with_too_many_paths_has_them_folded_and_others_keep_theirs() -> None:
    ring = Ring()
    for number in range(5 * MOST_PATHS):
        ring.add(seen(f"/shelf/n{number}x"))
    for number in range(5 * MOST_PATHS):
        ring.add(seen(f"/s{number}x/y"))
    ring.add(seen("/shelf/mine", source="shop/other"))
    rows = list(ring.read(3600))
    own = {r.seen.path: r.calls for r in rows if r.seen.source == "shop/web"}
    assert len(own) <= 2 * MOST_PATHS + 1
    assert own["/shelf/*"] == 4 * MOST_PATHS
    assert own["*"] > 0
    assert sum(own.values()) == 10 * MOST_PATHS
    assert [r.seen.path for r in rows if r.seen.source == "shop/other"] == ["/shelf/mine"]


def test_paths_that_are_forgotten_make_room_for_others() -> None:
    clock = Clock()
    ring = Ring(now=clock)
    for number in range(MOST_PATHS):
        ring.add(seen(f"/n{number}x"))
    clock.now += 61 * MINUTE
    assert list(ring.read(3600)) == []
    ring.add(seen("/new"))
    assert [r.seen.path for r in ring.read(3600)] == ["/new"]
