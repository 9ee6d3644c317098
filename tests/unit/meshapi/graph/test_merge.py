from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from meshapi.graph.answer import MOST_EDGES, Answer, Edge
from meshapi.graph.merge import MOST_EDGES as MOST_TOGETHER
from meshapi.graph.merge import Graph, merge, own
from tests.unit.meshapi.graph import made

PLACES = {
    name: "node-1" if name.startswith("default") else "node-2" for name in (f"{ns}/{n}" for ns in ("default", "shop") for n in "abcdefg")
}


def believed(edge: Edge, node: str) -> bool:
    return own(edge, node, PLACES.get)


@given(made.answers("node-1"), made.answers("node-2"), st.randoms())
def test_a_node_is_believed_about_its_own_workloads_only(one: Answer, other: Answer, chosen: random.Random) -> None:
    told = [one, other]
    chosen.shuffle(told)
    found = merge(told, believed)
    assert found == merge([one, other], believed), "the order of answers does not matter"
    mine = {edge.key: edge for answer in told for edge in answer.edges if believed(edge, answer.node)}
    assert {edge.key: edge for edge in found.edges} == mine
    assert found.doubted == len(one.edges) + len(other.edges) - len(mine)
    for edge in found.edges:
        assert PLACES[edge.source if edge.side == "source" else edge.destination] in found.nodes


@given(made.answers("node-1"), made.answers("node-2"))
def test_no_edge_is_added_to_by_a_second_node(one: Answer, other: Answer) -> None:
    found = merge([other, one])
    first = {edge.key: edge for edge in one.edges}
    assert all(edge == first.get(edge.key, edge) for edge in found.edges)
    assert any("tell of the same calls: node-1 is believed" in problem for problem in found.problems) == bool(found.doubted)


def test_of_too_many_edges_denials_and_errors_stay() -> None:
    quiet = [made.edge("default/a", "default/b", port=port + 1, rate=float(port)) for port in range(MOST_EDGES - 2)]
    loud = [made.edge("default/a", "default/z", denied=0.1), made.edge("default/a", "default/y", errors=0.1)]
    told = [Answer(f"node-{n}", 5.0, tuple(replace(edge, source=f"default/a{n}") for edge in [*quiet, *loud]), folded=7) for n in range(3)]
    found = merge(told)
    assert len(found.edges) == MOST_TOGETHER
    assert found.folded == 3 * MOST_EDGES - MOST_TOGETHER + 3 * 7
    assert sum(edge.denied > 0 or edge.errors > 0 for edge in found.edges) == 6


def test_problems_name_their_node_and_are_said_once() -> None:
    found = merge([Answer("node-2", 4.0, (), problems=("slow",)), Answer("node-1", 5.0, (), problems=("slow",))], problems=("lost", "lost"))
    assert found.problems == ("lost", "node-1: slow", "node-2: slow")
    assert (found.seconds, found.nodes) == (4.0, ("node-1", "node-2"))


def test_a_namespace_has_the_calls_from_it_and_to_it() -> None:
    found = merge([Answer("n", 1.0, tuple(made.edge(f"{a}/x", f"{b}/y") for a in "st" for b in "stu"))])
    assert {(e.source, e.destination) for e in found.only("u").edges} == {("s/x", "u/y"), ("t/x", "u/y")}
    assert len(found.only("s").edges) == 4


def test_nobody_answering_is_an_empty_graph() -> None:
    assert merge([]) == Graph(0.0, (), ())
