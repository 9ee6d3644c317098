"""A graph as boxes and arrows with places: what SVG, DOT and the controller's page draw.

Boxes are workloads, services and the outside. An arrow goes from a caller to what it dialled; a thin one from a service to each workload that answered for it.
The layout is the layered one of Sugiyama, Tagawa and Toda (1981): callers stand left of what they call, as far as there are no circles; within a layer boxes
stand near their neighbours. Nothing in it is random, so the same graph looks the same.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal, NamedTuple

from meshapi.graph.answer import Edge
from meshapi.graph.merge import Graph

MOST_DRAWN: Final = 400
"""Edges; nobody can read more."""
BOX: Final = (190, 36)
"""Width and height of a box, pixels."""
_STEP: Final = 400
_ROW: Final = 72
_BEND_ROW: Final = 34
"""Pixels from layer to layer, and what a box and a bend take of a layer's height."""
_MARGIN: Final = 24
_SWEEPS: Final = 8
_LONGEST: Final = 12
"""A link over more layers than that goes straight."""


class Vertex(NamedTuple):
    """A box. `name` is NAMESPACE/NAME, "" for the outside."""

    kind: Literal["workload", "service", "outside"]
    name: str


_OUTSIDE: Final = Vertex("outside", "")


@dataclass(frozen=True, slots=True)
class Link:
    """An arrow. `edges`: the calls that it stands for; none where a service hands over to a workload, of which only the rate is known."""

    start: Vertex
    end: Vertex
    edges: tuple[Edge, ...]
    rate: float
    mtls: str

    @property
    def state(self) -> str:
        """denied, failing, good or idle: its colour."""
        if any(edge.denied for edge in self.edges):
            return "denied"
        if any(edge.errors for edge in self.edges):
            return "failing"
        return "good" if self.rate or any(edge.bytes for edge in self.edges) else "idle"

    @property
    def label(self) -> str:
        """What stands beside it."""
        if not self.edges:
            return f"{amount(self.rate)}/s" if self.rate else ""
        return "; ".join(_words(edge) for edge in self.edges[:3]) + (f"; {len(self.edges) - 3} more" if len(self.edges) > 3 else "")


class Arrow(NamedTuple):
    """A link's way as an SVG path, and the middle of its label, pixels."""

    link: Link
    path: str
    label: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Drawing:
    """`places`: the upper left corner of each box, pixels; `size`: of all of it. `left_out`: edges that are not drawn."""

    places: Mapping[Vertex, tuple[int, int]]
    arrows: tuple[Arrow, ...]
    size: tuple[int, int]
    left_out: int


class _Bend(NamedTuple):
    """Where a link passes a layer between its ends."""

    link: int
    layer: int


_Cell = Vertex | _Bend


def draw(graph: Graph) -> Drawing:
    """Choose places for everything; of a graph that is too large, for what matters most."""
    edges = sorted(graph.edges, key=lambda edge: edge.weight, reverse=True)[:MOST_DRAWN]
    links = _links(sorted(edges, key=lambda edge: edge.key))
    layers = _layers(links)
    heights = [sum(map(_height, layer)) for layer in layers]
    places: dict[_Cell, tuple[int, int]] = {}
    for x, layer in enumerate(layers):
        y = _MARGIN + (max(heights) - heights[x]) // 2
        for cell in layer:
            places[cell] = (_MARGIN + x * _STEP, y)
            y += _height(cell)
    arrows = tuple(_arrow(number, link, places) for number, link in enumerate(links))
    size = (2 * _MARGIN + max(len(layers) - 1, 0) * _STEP + BOX[0], 2 * _MARGIN + max(heights, default=0))
    boxes = {cell: place for cell, place in places.items() if isinstance(cell, Vertex)}
    return Drawing(boxes, arrows, size, len(graph.edges) - len(edges))


def _height(cell: _Cell) -> int:
    return _ROW if isinstance(cell, Vertex) else _BEND_ROW


def _arrow(number: int, link: Link, places: Mapping[_Cell, tuple[int, int]]) -> Arrow:
    (width, height), (ax, ay), (bx, by) = BOX, places[link.start], places[link.end]
    ay, by = ay + height // 2, by + height // 2
    if ax >= bx:  # back, or to itself: below the boxes
        low = max(ay, by) + height
        ax, bx = ax + width // 2 + 12, bx + width // 2 - 12
        ay, by = ay + height // 2, by + height // 2
        return Arrow(link, f"M{ax} {ay}C{ax} {low} {bx} {low} {bx} {by}", ((ax + bx) // 2, low - 8))
    bends = [places[bend] for layer in range((bx - ax) // _STEP) if (bend := _Bend(number, (ax - _MARGIN) // _STEP + layer)) in places]
    ax += width
    path = f"M{ax} {ay}"
    label = (0, 0)
    for x, y in [*bends, (bx, by)]:
        middle = (ax + x) // 2
        path += f"C{middle} {ay} {middle} {y} {x} {y}"
        label = label if any(label) else (middle, (ay + y) // 2 - 5)
        ax, ay = x, y
        if (x, y) != (bx, by):
            ax += width
            path += f"H{ax}"
    return Arrow(link, path, label)


def _links(edges: Sequence[Edge]) -> tuple[Link, ...]:
    calls: dict[tuple[Vertex, Vertex], list[Edge]] = defaultdict(list)
    answers: dict[tuple[Vertex, Vertex], list[tuple[float, bool]]] = defaultdict(list)
    for edge in edges:
        start = Vertex("workload", edge.source) if edge.source else _OUTSIDE
        end = Vertex(edge.kind, edge.destination)
        calls[start, end].append(edge)
        if edge.kind == "service":
            for backend in edge.backends:
                answers[end, Vertex("workload", backend.workload)].append((backend.rate, backend.mtls))
    found = [Link(*ends, tuple(some), sum(e.rate for e in some), _together({e.mtls for e in some})) for ends, some in calls.items()]
    for ends, parts in answers.items():
        found.append(Link(*ends, (), sum(rate for rate, _ in parts), _together({"all" if mtls else "none" for _, mtls in parts})))
    return tuple(found)


def _together(states: set[str]) -> str:
    known = states - {""}
    return known.pop() if len(known) == 1 else "some" if known else ""


def _layers(links: Sequence[Link]) -> list[list[_Cell]]:
    """Every box, and every bend, from left to right and from top to bottom."""
    after: dict[Vertex, set[Vertex]] = defaultdict(set)
    vertices = sorted({vertex for link in links for vertex in (link.start, link.end)})
    for link in links:
        if link.start != link.end:
            after[link.start].add(link.end)
    depth = _depths(vertices, _without_circles(vertices, after))
    layers: list[list[_Cell]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for vertex in vertices:
        layers[depth[vertex]].append(vertex)
    beside: dict[_Cell, list[_Cell]] = defaultdict(list)
    for number, link in enumerate(links):
        way: list[_Cell] = [link.start]
        if depth[link.end] - depth[link.start] <= _LONGEST:
            for layer in range(depth[link.start] + 1, depth[link.end]):
                way.append(_Bend(number, layer))
                layers[layer].append(way[-1])
        for one, other in pairwise([*way, link.end]):
            beside[one].append(other)
            beside[other].append(one)
    for sweep in range(_SWEEPS):
        _settle(layers if sweep % 2 == 0 else layers[::-1], beside)
    return layers


def _without_circles(vertices: Sequence[Vertex], after: Mapping[Vertex, set[Vertex]]) -> dict[Vertex, list[Vertex]]:
    """The arrows that a walk in depth does not find to lead back to where it came from. Who calls more than it is called comes first."""
    called = Counter(end for ends in after.values() for end in ends)
    forward: dict[Vertex, list[Vertex]] = {vertex: [] for vertex in vertices}
    done: set[Vertex] = set()
    for root in sorted(vertices, key=lambda vertex: (called[vertex] - len(after.get(vertex, ())), vertex)):
        if root in done:
            continue
        way = [(root, iter(sorted(after.get(root, ()))))]
        on_way = {root}
        while way:
            vertex, rest = way[-1]
            for end in rest:
                if end in on_way:
                    continue
                forward[vertex].append(end)
                if end not in done:
                    way.append((end, iter(sorted(after.get(end, ())))))
                    on_way.add(end)
                    break
            else:
                way.pop()
                on_way.discard(vertex)
                done.add(vertex)
    return forward


def _depths(vertices: Iterable[Vertex], forward: Mapping[Vertex, Sequence[Vertex]]) -> dict[Vertex, int]:
    """How many arrows lead to each vertex on the longest way (Kahn's order)."""
    waiting = dict.fromkeys(vertices, 0)
    for ends in forward.values():
        for end in ends:
            waiting[end] += 1
    depth = dict.fromkeys(waiting, 0)
    ready = [vertex for vertex, number in waiting.items() if not number]
    while ready:
        vertex = ready.pop()
        for end in forward[vertex]:
            depth[end] = max(depth[end], depth[vertex] + 1)
            waiting[end] -= 1
            if not waiting[end]:
                ready.append(end)
    return depth


def _settle(layers: Sequence[list[_Cell]], beside: Mapping[_Cell, Sequence[_Cell]]) -> None:
    """Sort each layer by where its neighbours stand on average."""
    place: dict[_Cell, float] = {}
    for layer in layers:
        place.update((cell, (i + 0.5) / len(layer)) for i, cell in enumerate(layer))

    def wished(cell: _Cell) -> float:
        near = [place[other] for other in beside[cell]]
        return sum(near) / len(near)

    for layer in layers:
        layer.sort(key=wished)
        place.update((cell, (i + 0.5) / len(layer)) for i, cell in enumerate(layer))


def _words(edge: Edge) -> str:
    """One call in a few words."""
    parts = [f"{edge.protocol} {edge.port or ''}".strip()]
    if edge.rate:
        parts[0] += f" {amount(edge.rate)}/s"
    elif edge.bytes:  # on connections that were there before
        parts.append(f"{amount(edge.bytes)} B/s")
    if edge.errors:
        parts.append(f"{amount(edge.errors)}/s errors")
    if edge.denied:
        parts.append(f"{amount(edge.denied)}/s denied")
    if edge.p99 is not None:
        parts.append(f"p99 {duration(edge.p99)}")
    if edge.mtls in {"all", "some"}:
        parts.append("mTLS" if edge.mtls == "all" else "mTLS in part")
    return ", ".join(parts)


def amount(value: float) -> str:
    """A number with two or three digits: 0, 0.25, 12, 3.4k, 5M."""
    for limit, unit in ((1e3, ""), (1e6, "k"), (1e9, "M"), (1e12, "G")):
        if value < limit * 0.9995:
            scaled = value / (limit / 1e3)
            return f"{scaled:.2g}{unit}" if scaled < 9.95 else f"{scaled:.0f}{unit}"
    return f"{value / 1e12:.0f}T"


def duration(seconds: float) -> str:
    """A time with two digits: 850 µs, 1.2 ms, 3 s."""
    for scale, unit in ((1e-6, "µs"), (1e-3, "ms")):
        if seconds < scale * 999.5:
            value = seconds / scale
            return f"{value:.2g} {unit}" if value < 99.5 else f"{value:.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 99.5 else f"{seconds:.0f} s"
