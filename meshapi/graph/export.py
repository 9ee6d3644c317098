"""A drawing as text for other programs: SVG and Graphviz' DOT. Names are data: whatever stands in them, it is text there too.

https://www.w3.org/TR/SVG2/, https://graphviz.org/doc/info/lang.html.
"""

from __future__ import annotations

from typing import Final
from xml.sax.saxutils import escape

from meshapi.graph.drawing import BOX, Arrow, Drawing, Vertex

COLOURS: Final = {"denied": "#c62828", "failing": "#e07b00", "good": "#2e7d32", "idle": "#8a8f98"}
_SHAPES: Final = {"workload": "box", "service": "ellipse", "outside": "diamond"}
_STYLE: Final = (
    "text{font:12px sans-serif;fill:#1c2026}.box{fill:#fff;stroke:#5b6470}.service{fill:#eef3fb}.outside{fill:#f5f1e6}"
    ".link{fill:none;stroke-width:1.6}.part{stroke-dasharray:3 3}.label{font-size:11px;fill:#3a404a;paint-order:stroke;stroke:#fff;stroke-width:3px}"
)


def title(vertex: Vertex) -> str:
    """What stands in a box."""
    return vertex.name or "outside the mesh"


def svg(drawing: Drawing) -> str:
    """A whole SVG document, without scripts and without anything from elsewhere."""
    width, height = drawing.size
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f"<style>{_STYLE}</style><defs>",
    ]
    parts += [
        f'<marker id="{state}" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
        for state, colour in COLOURS.items()
    ]
    parts.append("</defs>")
    parts += map(_svg_arrow, drawing.arrows)
    parts += [_svg_box(vertex, place) for vertex, place in drawing.places.items()]
    return "\n".join([*parts, "</svg>", ""])


def _svg_box(vertex: Vertex, place: tuple[int, int]) -> str:
    (x, y), (width, height) = place, BOX
    round_ = 18 if vertex.kind == "service" else 4
    name = title(vertex)
    shown = name if len(name) <= 28 else f"{name[:27]}…"
    return (
        f"<g><title>{escape(f'{vertex.kind} {name}' if vertex.name else name)}</title>"
        f'<rect class="box {vertex.kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="{round_}"/>'
        f'<text x="{x + width // 2}" y="{y + height // 2 + 4}" text-anchor="middle">{escape(shown)}</text></g>'
    )


def _svg_arrow(arrow: Arrow) -> str:
    link, (x, y) = arrow.link, arrow.label
    return (
        f'<path class="{"link" if link.edges else "link part"}" stroke="{COLOURS[link.state]}" marker-end="url(#{link.state})" d="{arrow.path}"/>'
        f'<text class="label" x="{x}" y="{y}" text-anchor="middle">{escape(link.label)}</text>'
    )


def dot(drawing: Drawing) -> str:
    """A digraph for `dot -Tsvg`."""
    lines = ["digraph mesh {", "  rankdir=LR;", '  node [fontname="sans-serif"]; edge [fontname="sans-serif", fontsize=10];']
    lines += [f"  {_quoted(_id(vertex))} [label={_quoted(title(vertex))}, shape={_SHAPES[vertex.kind]}];" for vertex in drawing.places]
    lines += [
        f"  {_quoted(_id(link.start))} -> {_quoted(_id(link.end))} "
        f'[label={_quoted(link.label)}, color="{COLOURS[link.state]}", style={"solid" if link.edges else "dashed"}];'
        for link in (arrow.link for arrow in drawing.arrows)
    ]
    return "\n".join([*lines, "}", ""])


def _id(vertex: Vertex) -> str:
    return f"{vertex.kind} {vertex.name}"


def _quoted(text: str) -> str:
    r"""A double-quoted string: only the quote needs a backslash there, and a backslash before anything is an escape of labels (\N, \n)."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
