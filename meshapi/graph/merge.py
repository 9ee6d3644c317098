"""One graph out of what several nodes say, and which of it is believed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from meshapi.graph.answer import KIND, Answer, Edge

MOST_EDGES: Final = 2000
"""Of the whole graph; the busiest."""


@dataclass(frozen=True, slots=True)
class Graph:
    """`seconds`: the shortest time over which a node took its rates. `nodes`: those that have said something. `folded`: edges that found no room.

    `doubted`: edges that were not the node's to tell. `problems`: sentences for people.
    """

    seconds: float
    nodes: tuple[str, ...]
    edges: tuple[Edge, ...]
    folded: int = 0
    doubted: int = 0
    problems: tuple[str, ...] = ()

    def only(self, namespace: str) -> Graph:
        """The calls from and to a namespace."""
        edges = tuple(e for e in self.edges if namespace in {e.source.partition("/")[0], e.destination.partition("/")[0]})
        return replace(self, edges=edges)

    def document(self) -> dict[str, Any]:
        """JSON values, as `meshagent graph -o json` prints them."""
        return {"kind": KIND, **asdict(self)}


def own(edge: Edge, node: str, node_of: Callable[[str], str | None]) -> bool:
    """Is an edge a node's own to tell? `node_of` knows where a workload runs, by NAMESPACE/NAME."""
    return node_of(edge.source if edge.side == "source" else edge.destination) == node


def merge(
    answers: Iterable[Answer], believed: Callable[[Edge, str], bool] = lambda _edge, _node: True, problems: Iterable[str] = ()
) -> Graph:
    """Put answers together, one of each node. `believed` judges an edge and the node that told it.

    Where two nodes tell of one edge all the same, the first by name has it, and there is a problem: no edge is ever added to by a second node.
    """
    found: dict[tuple[object, ...], tuple[Edge, str]] = {}
    told = sorted(answers, key=lambda answer: answer.node)
    said = list(problems)
    doubted = 0
    for answer in told:
        said += (f"{answer.node}: {problem}" for problem in answer.problems)
        for edge in answer.edges:
            if not believed(edge, answer.node):
                doubted += 1
            elif (first := found.setdefault(edge.key, (edge, answer.node))[1]) != answer.node:
                doubted += 1
                said.append(f"{first} and {answer.node} tell of the same calls: {first} is believed; does a workload name both?")
    edges = sorted((edge for edge, _ in found.values()), key=lambda edge: edge.weight, reverse=True)
    kept, left = edges[:MOST_EDGES], edges[MOST_EDGES:]
    return Graph(
        min((answer.seconds for answer in told), default=0.0),
        tuple(answer.node for answer in told),
        tuple(sorted(kept, key=lambda edge: edge.key)),
        len(left) + sum(answer.folded for answer in told),
        doubted,
        tuple(dict.fromkeys(said)),
    )
