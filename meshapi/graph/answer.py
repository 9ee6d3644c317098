"""What one node says about who talks to whom: the document, and reading it from whoever sent it.

The one definition of its shape. Other nodes' documents are outside bytes: what is not exactly as it should be is an Unreadable, with the field; fields that
nobody knows are ignored, so that newer agents are understood.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar, cast, get_args

from meshapi.text import shown

KIND: Final = "graph"
MOST_EDGES: Final = 1000
"""Of one node; the busiest. A document has then at most 1.5 MB, of the 2 that pass through the controller."""
MOST_BACKENDS: Final = 16
MOST_RULES: Final = 3
MOST_PROBLEMS: Final = 8
MOST_BYTES: Final = 2 << 20
_MOST_TEXT: Final = 300
_MOST: Final = 1e15
"""No rate is higher."""
_LABEL: Final = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"
_NAME: Final = re.compile(f"{_LABEL}/{_LABEL}", re.ASCII)

Kind = Literal["service", "workload", "outside"]
Protocol = Literal["http", "tcp", "udp"]
Side = Literal["source", "destination"]
Mtls = Literal["all", "some", "none", ""]
_T = TypeVar("_T")


class Unreadable(ValueError):
    """It is no graph, or not a sound one. The text says which field; what stood there is not repeated."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A workload that answered for a service. `rate`: per second, as in Edge; `mtls`: through a tunnel to another node."""

    workload: str
    rate: float
    mtls: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """Calls of one workload to one destination, as one node has seen them.

    `source` is NAMESPACE/NAME, "" for who is not in the mesh; `destination` what was dialled: a service, a workload's own address, or "" outside the
    mesh. `port`: as dialled, 0 if not known. `side`: where it was seen; calls from workloads of the mesh are told by the source's node, the destination's
    node adds what it denied.

    Per second: `rate` counts requests (http), connections (tcp), or sockets with whom they talk to (udp) that were not denied; `errors` those of them that
    failed: answers of 500 and above or none, gRPC statuses that are a server's fault, connections never established; `denied` by policy; `bytes` both ways.

    `active`: connections that live now. `p50`, `p99`, seconds: from a request's first byte to its answer's last one (http), or of connecting (tcp); None if
    nothing was measured. `mtls`: which part went through tunnels, "" if nothing went anywhere. `rules`: of denials.
    """

    source: str
    destination: str
    kind: Kind
    port: int
    protocol: Protocol
    side: Side = "source"
    rate: float = 0.0
    errors: float = 0.0
    denied: float = 0.0
    bytes: float = 0.0
    active: int = 0
    p50: float | None = None
    p99: float | None = None
    mtls: Mtls = ""
    backends: tuple[Backend, ...] = ()
    rules: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str, str, int, str, str]:
        """What tells edges apart."""
        return (self.source, self.destination, self.kind, self.port, self.protocol, self.side)

    @property
    def weight(self) -> tuple[bool, float, float]:
        """How much it matters when there is not room for all: denials and errors first."""
        return (self.denied > 0, self.errors, self.rate + self.denied + self.active)


@dataclass(frozen=True, slots=True)
class Answer:
    """`seconds`: over which rates were taken. `folded`: edges that found no room. `problems`: sentences for people."""

    node: str
    seconds: float
    edges: tuple[Edge, ...]
    folded: int = 0
    problems: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """The JSON document. One that nobody would read for its size is without the last edges: they are folded, too."""
        found = {"kind": KIND, **dataclasses.asdict(self)}
        document = json.dumps(found).encode()
        if len(document) <= MOST_BYTES:
            return document
        edges, room = found["edges"], MOST_BYTES - len(json.dumps({**found, "edges": [], "folded": self.folded + len(self.edges)}))
        ends = list(itertools.accumulate(len(json.dumps(edge)) + 2 for edge in edges))  # ", " between two
        kept = bisect.bisect_right(ends, room)
        return json.dumps({**found, "edges": edges[:kept], "folded": self.folded + len(edges) - kept}).encode()


def decode(document: bytes, node: str) -> Answer:
    """Read what `node` has sent; it may speak in its own name only. Raises Unreadable."""
    if len(document) > MOST_BYTES:
        raise Unreadable(f"it has {len(document)} bytes, at most {MOST_BYTES} are read")
    try:
        value = json.loads(document, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Unreadable("it is not JSON") from error
    if not isinstance(value, dict) or value.get("kind") != KIND:
        raise Unreadable("it is no graph: is the agent, or the controller, of an older version?")
    fields = _Fields(value, "")
    if fields.get("node") != node:
        raise Unreadable("node: it is another node's")
    edges = fields.items("edges", MOST_EDGES, _edge)
    if len({edge.key for edge in edges}) < len(edges):
        raise Unreadable("edges: one is there twice")
    return Answer(
        node,
        fields.number("seconds"),
        edges,
        fields.whole("folded"),
        fields.items("problems", MOST_PROBLEMS, lambda field: field.own_text()),
    )


def _edge(field: _Fields) -> Edge:
    source, destination, kind = field.name("source"), field.name("destination"), field.one_of("kind", Kind)
    side = field.one_of("side", Side)
    if (kind == "outside") != (destination == ""):
        raise Unreadable(f"{field.path}.destination: does not go with its kind")
    if side == "source" and not source:
        raise Unreadable(f"{field.path}.source: nobody's node can tell what an unknown source does")
    if side == "destination" and kind != "workload":
        raise Unreadable(f"{field.path}.kind: a destination's node knows workloads")
    return Edge(
        source=source,
        destination=destination,
        kind=cast("Kind", kind),
        port=field.whole("port", 65535),
        protocol=cast("Protocol", field.one_of("protocol", Protocol)),
        side=cast("Side", side),
        rate=field.number("rate"),
        errors=field.number("errors"),
        denied=field.number("denied"),
        bytes=field.number("bytes"),
        active=field.whole("active"),
        p50=field.perhaps("p50"),
        p99=field.perhaps("p99"),
        mtls=cast("Mtls", field.one_of("mtls", Mtls)),
        backends=field.items("backends", MOST_BACKENDS, _backend),
        rules=field.items("rules", MOST_RULES, lambda rule: rule.own_text()),
    )


def _backend(field: _Fields) -> Backend:
    workload = field.name("workload")
    mtls = field.get("mtls")
    if not workload or not isinstance(mtls, bool):
        raise Unreadable(f"{field.path}: wants a workload, and mtls true or false")
    return Backend(workload, field.number("rate"), mtls)


def _no_number(_text: str) -> float:
    raise ValueError("NaN and Infinity are not JSON")  # RFC 8259, section 6


class _Fields:
    """Typed access to one value of the document."""

    def __init__(self, value: object, path: str) -> None:
        self.value = value
        self.path = path

    def get(self, name: str) -> object:
        if not isinstance(self.value, dict):
            raise Unreadable(f"{self.path}: must be an object")
        return cast("dict[str, object]", self.value).get(name)

    def _wrong(self, name: str, what: str) -> Unreadable:
        return Unreadable(f"{self.path}.{name}: must be {what}".lstrip("."))

    def number(self, name: str) -> float:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _MOST:
            raise self._wrong(name, "a number, 0 or more")
        return float(value)

    def perhaps(self, name: str) -> float | None:
        return None if self.get(name) is None else self.number(name)

    def whole(self, name: str, most: int = 1 << 50) -> int:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise self._wrong(name, f"a whole number of 0 to {most}")
        return value

    def name(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str) or (value and not _NAME.fullmatch(value)):
            raise self._wrong(name, "NAMESPACE/NAME, or empty")
        return value

    def one_of(self, name: str, kind: Any) -> str:
        value, known = self.get(name), get_args(kind)
        if not isinstance(value, str) or value not in known:
            raise self._wrong(name, f"one of {', '.join(repr(one) for one in known)}")
        return value

    def own_text(self) -> str:
        if not isinstance(self.value, str) or len(self.value) > _MOST_TEXT or not self.value.isprintable():
            raise Unreadable(f"{self.path}: must be a line of at most {_MOST_TEXT} characters")
        return self.value

    def items(self, name: str, most: int, read: Callable[[_Fields], _T]) -> tuple[_T, ...]:
        value = self.get(name)
        if not isinstance(value, list) or len(value) > most:
            raise self._wrong(name, f"a list of at most {most}")
        return tuple(read(_Fields(item, f"{self.path}.{name}[{i}]".lstrip("."))) for i, item in enumerate(value))


def line(text: str) -> str:
    """A text as `decode` takes it: printable, and not too long."""
    return shown(text, _MOST_TEXT)


def finite(value: float) -> float:
    """A rate as `decode` takes it."""
    return min(max(value, 0.0), _MOST) if math.isfinite(value) else 0.0
