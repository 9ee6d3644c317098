from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings

from meshapi.graph import export
from meshapi.graph.answer import Answer, Backend
from meshapi.graph.drawing import BOX, MOST_DRAWN, Drawing, Vertex, amount, draw, duration
from meshapi.graph.merge import Graph, merge
from tests.unit.meshapi.graph import made

HOSTILE = '</text><script>alert(1)</script>"];}\\'
SVG = "{http://www.w3.org/2000/svg}"
SHOP = merge(
    [
        Answer(
            "node-1",
            5.0,
            (
                made.edge("default/a", "default/b", rate=4.0, mtls="all", backends=(Backend("default/b-1", 4.0, mtls=True),)),
                made.edge("default/b-1", "default/c", rate=2.0, backends=(Backend("default/c-1", 2.0, mtls=False),)),
                made.edge("default/a", "default/c", denied=1.0, rules=("default/p",)),
                made.edge("default/c-1", "default/a", "workload", rate=1.0, errors=0.5),
            ),
        )
    ]
)


def overlapping(drawing: Drawing) -> list[tuple[Vertex, Vertex]]:
    return [
        (one, other)
        for (one, (ax, ay)), (other, (bx, by)) in itertools.combinations(drawing.places.items(), 2)
        if abs(ax - bx) < BOX[0] and abs(ay - by) < BOX[1]
    ]


@settings(deadline=None)
@given(made.answers())
def test_every_call_is_drawn_and_no_box_covers_another(answer: Answer) -> None:
    graph = merge([answer])
    drawing = draw(graph)
    assert {edge.key for arrow in drawing.arrows for edge in arrow.link.edges} == {edge.key for edge in graph.edges}
    assert overlapping(drawing) == []
    assert drawing == draw(graph), "nothing is random"
    for x, y in drawing.places.values():
        assert 0 <= x <= drawing.size[0] - BOX[0]
        assert 0 <= y <= drawing.size[1] - BOX[1]
    ET.fromstring(export.svg(drawing))  # noqa: S314 - of our own making


def test_callers_stand_left_of_what_they_call() -> None:
    drawing = draw(SHOP)
    left = {vertex: place[0] for vertex, place in drawing.places.items()}
    back = [arrow.link for arrow in drawing.arrows if left[arrow.link.start] >= left[arrow.link.end]]
    assert [(link.start.name, link.end.name) for link in back] == [("default/c-1", "default/a")], "the one that closes a circle"


def test_a_service_has_arrows_to_what_answers_for_it() -> None:
    links = {(arrow.link.start, arrow.link.end): arrow.link for arrow in draw(SHOP).arrows}
    link = links[Vertex("service", "default/b"), Vertex("workload", "default/b-1")]
    assert (link.edges, link.rate, link.mtls, link.label, link.state) == ((), 4.0, "all", "4/s", "good")
    assert links[Vertex("workload", "default/a"), Vertex("service", "default/c")].state == "denied"
    assert links[Vertex("workload", "default/c-1"), Vertex("workload", "default/a")].state == "failing"
    assert links[Vertex("workload", "default/a"), Vertex("service", "default/b")].label == "http 80 4/s, mTLS"


def test_connections_that_live_long_show_their_bytes_and_are_not_idle() -> None:
    edges = (made.edge("default/a", "default/b", protocol="tcp", bytes=1200.0, active=1), made.edge("default/a", "default/c", active=1))
    links = {arrow.link.end.name: arrow.link for arrow in draw(merge([Answer("n", 1.0, edges)])).arrows}
    assert [(links[name].label, links[name].state) for name in ("default/b", "default/c")] == [
        ("tcp 80, 1.2k B/s", "good"),
        ("http 80", "idle"),
    ]


def test_an_empty_graph_is_a_picture_too() -> None:
    drawing = draw(Graph(0.0, (), ()))
    assert (drawing.places, drawing.arrows) == ({}, ())
    ET.fromstring(export.svg(drawing))  # noqa: S314 - of our own making
    assert export.dot(drawing).startswith("digraph mesh {")


@pytest.mark.timeout(30)
def test_the_largest_graph_is_drawn_in_part_and_soon() -> None:
    chain = [made.edge(f"default/w{i}", f"default/w{i + 1}", "workload", rate=1.0) for i in range(300)]
    across = [made.edge(f"default/w{i}", f"default/w{299 - i}", "workload", rate=0.5, port=90) for i in range(300)]
    drawing = draw(merge([Answer("n", 1.0, (*chain, *across))]))
    assert drawing.left_out == 600 - MOST_DRAWN
    assert overlapping(drawing) == []


def test_names_are_text_in_svg_and_dot() -> None:
    """Such names are never read from a node; who draws must not rely on that."""
    drawing = draw(merge([Answer("n", 1.0, (made.edge(HOSTILE, HOSTILE + "2", rate=1.0),))]))
    root = ET.fromstring(export.svg(drawing))  # noqa: S314 - of our own making
    assert {element.tag for element in root.iter()} == {
        SVG + tag for tag in ("svg", "style", "defs", "marker", "path", "g", "title", "rect", "text")
    }
    assert any(HOSTILE in (element.text or "") for element in root.iter(f"{SVG}title"))
    strings = re.compile(r'"(?:[^"\\]|\\.)*"')
    for line in export.dot(drawing).splitlines()[3:-1]:
        rest = strings.sub("", line)
        assert re.fullmatch(r"\s*(-> )?\s*\[[a-z]+=, [a-z]+=[a-z]*(, style=[a-z]+)?\];", rest), rest


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.25, "0.25"), (9.96, "10"), (12.4, "12"), (999.4, "999"), (999.9, "1k"), (3400.0, "3.4k"), (5e6, "5M"), (1e15, "1000T")],
)
def test_amounts_are_short(value: float, text: str) -> None:
    assert amount(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.00085, "850 µs"), (0.0012, "1.2 ms"), (0.25, "250 ms"), (0.99996, "1 s"), (3.0, "3 s"), (120.0, "120 s")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text
