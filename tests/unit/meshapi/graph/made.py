"""Edges and answers, made by hand and by hypothesis."""

from __future__ import annotations

from typing import Any, get_args

from hypothesis import strategies as st

from meshapi.graph.answer import Answer, Backend, Edge, Kind, Side

NAMES = st.sampled_from([f"{namespace}/{name}" for namespace in ("default", "shop") for name in "abcdefg"])
RATES = st.floats(0, 1e9)
TIMES = st.none() | st.floats(0, 100)
TEXTS = st.text(st.characters(exclude_categories=("C", "Z")), max_size=60)


def edge(source: str, destination: str, kind: Kind = "service", **fields: Any) -> Edge:
    """A call; seen at the destination if nobody knows the source."""
    given = {"port": 80, "protocol": "http", "side": "source" if source else "destination", **fields}
    return Edge(source=source, destination=destination, kind=kind, **given)


@st.composite
def edges(draw: st.DrawFn, workloads: st.SearchStrategy[str] = NAMES) -> Edge:
    """Any sound edge."""
    side: Side = draw(st.sampled_from(get_args(Side)))
    kind: Kind = draw(st.sampled_from(get_args(Kind))) if side == "source" else "workload"
    return Edge(
        source=draw(workloads if side == "source" else workloads | st.just("")),
        destination="" if kind == "outside" else draw(workloads),
        kind=kind,
        port=draw(st.integers(0, 65535)),
        protocol=draw(st.sampled_from(["http", "tcp", "udp"])),
        side=side,
        rate=draw(RATES),
        errors=draw(RATES),
        denied=draw(RATES),
        bytes=draw(RATES),
        active=draw(st.integers(0, 1000)),
        p50=draw(TIMES),
        p99=draw(TIMES),
        mtls=draw(st.sampled_from(["all", "some", "none", ""])),
        backends=tuple(draw(st.lists(st.builds(Backend, workloads, RATES, st.booleans()), max_size=3))),
        rules=tuple(draw(st.lists(TEXTS, max_size=3))),
    )


def answers(node: str = "node-1", workloads: st.SearchStrategy[str] = NAMES) -> st.SearchStrategy[Answer]:
    """Any sound answer of a node."""
    some = st.lists(edges(workloads), max_size=12, unique_by=lambda one: one.key).map(tuple)
    return st.builds(Answer, st.just(node), RATES, some, st.integers(0, 100), st.lists(TEXTS, max_size=3).map(tuple))
