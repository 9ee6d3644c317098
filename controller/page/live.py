"""The graph of the mesh as the page shows it: asked of every node while somebody looks, and only then.

Nodes are outside: what one says is read as `meshapi.graph.answer` does, and believed as far as it is about workloads that the compiled model puts on that node
and about services and workloads that exist.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Protocol

from meshapi import agent_pb2, discovery_pb2, relay_pb2
from meshapi.graph import drawing
from meshapi.graph.answer import Answer, Edge, Unreadable, decode
from meshapi.graph.drawing import Arrow
from meshapi.graph.merge import Graph, merge, own

WINDOW_S: Final = 10.0
"""Over so long rates are taken; the first time over FIRST_S, so that there is something to see."""
FIRST_S: Final = 2.0
POLL_S: Final = 3.0
PATIENCE_S: Final = 8.0
"""How long a node may take beyond the window, and for a plan."""
STALE_S: Final = 30.0
"""What a node said longer ago is not shown any more."""
IDLE_S: Final = 20.0
"""After so long without anybody who looks nodes are not asked any more."""
AGAIN_S: Final = 1.0
"""A document serves so long."""
AT_ONCE: Final = 64
"""So many nodes are asked at the same time."""
MOST_PLANS: Final = 8
MOST_KEPT: Final = 20_000
"""Edges of all nodes; each may have its share."""
_MOST_MISSING: Final = 5
_DESTINATION: Final = re.compile(r"[a-z0-9.-]{1,253}/[a-z0-9.-]{1,253}(:[0-9]{1,5}(/udp)?)?", re.ASCII)

Entities = Mapping[str, discovery_pb2.Entity]


class Relay(Protocol):
    """Whom nodes are asked through: `controller.relay`."""

    @property
    def nodes(self) -> frozenset[str]:
        """Those that can be asked now."""

    def ask(self, request: relay_pb2.AskRequest) -> AsyncGenerator[relay_pb2.Told, None]:
        """Ask one of them."""


@dataclass(frozen=True, slots=True)
class _Said:
    """The last answer of a node, when it came, and what was wrong since."""

    answer: Answer | None
    at: float
    problem: str


class Live:
    """See the module. Belongs to the event loop."""

    def __init__(self, relay: Relay, entities: Callable[[], Entities]) -> None:
        """`entities` is the compiled model of now."""
        self._relay = relay
        self._entities = entities
        self._said: dict[str, _Said] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._plans = asyncio.Semaphore(MOST_PLANS)
        self._following: asyncio.Task[None] | None = None
        self._begun = asyncio.Event()
        self._wanted_at = 0.0
        self._building = asyncio.Lock()
        self._built: tuple[float, bytes] = (-AGAIN_S, b"")
        self._nodes: tuple[Entities | None, frozenset[str]] = (None, frozenset())

    async def graph(self) -> bytes:
        """The graph as JSON, with places for everything. The first time it takes about FIRST_S."""
        self._wanted_at = time.monotonic()
        if self._following is None or self._following.done():
            self._begun.clear()
            self._following = asyncio.create_task(self._follow(), name="page")
        await self._begun.wait()
        async with self._building:
            if time.monotonic() - self._built[0] >= AGAIN_S:
                document = await asyncio.to_thread(self._document, dict(self._said), self._relay.nodes, self._entities())
                self._built = (time.monotonic(), document)
            return self._built[1]

    async def plan(self, source: str, destination: str) -> Mapping[str, Any]:
        """What would happen to a call, as `meshagent trace` plans it, without one; `error` says why that is not known."""
        if f"workload/{source}" not in self._entities() or not _DESTINATION.fullmatch(destination):
            return {"error": "there is no such workload, or that is not what it can call"}
        trace = agent_pb2.TraceRequest(source=source, destination=destination)
        try:
            async with self._plans:
                return await asyncio.wait_for(self._first(relay_pb2.AskRequest(trace=trace)), PATIENCE_S)
        except asyncio.TimeoutError:
            return {"error": f"the node of {source} has not answered within {PATIENCE_S:.0f} s"}

    async def _first(self, request: relay_pb2.AskRequest) -> Mapping[str, Any]:
        async with aclosing(self._relay.ask(request)) as answers:
            async for told in answers:
                if told.error:
                    return {"error": told.error}
                try:
                    found = json.loads(told.document)
                except (ValueError, RecursionError):
                    found = None
                return found if isinstance(found, dict) else {"error": f"{told.node} gave an answer that is no plan"}
        return {"error": "nobody has answered"}

    async def stop(self) -> None:
        """Ask nobody any more."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)

    async def _follow(self) -> None:
        started = time.monotonic()
        try:
            while time.monotonic() - self._wanted_at < IDLE_S:
                window = min(WINDOW_S, max(FIRST_S, time.monotonic() - started))
                for node in sorted(self._relay.nodes - self._asking.keys()):
                    task = self._asking[node] = asyncio.create_task(self._ask(node, window), name=f"page {node}")
                    task.add_done_callback(lambda _, node=node: self._asking.pop(node, None))  # type: ignore[misc]
                if not self._begun.is_set():
                    if self._asking:
                        await asyncio.wait(self._asking.values(), timeout=FIRST_S + PATIENCE_S)
                    self._begun.set()
                await asyncio.sleep(POLL_S)
        finally:
            self._begun.set()
            for task in (asking := list(self._asking.values())):
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            self._said.clear()

    async def _ask(self, node: str, window: float) -> None:
        request = relay_pb2.AskRequest(node=node, graph=agent_pb2.GraphRequest(window_s=window))
        answer, problem = None, "it has said nothing"
        try:
            async with self._turns:
                answer, problem = await asyncio.wait_for(self._answer(request, node), window + PATIENCE_S)
        except asyncio.TimeoutError:
            problem = f"it has not answered within {window + PATIENCE_S:.0f} s"
        except Unreadable as error:
            problem = str(error)
        before = self._said.get(node)
        if answer is not None or before is None:
            self._said[node] = _Said(answer, time.monotonic(), problem)
        else:
            self._said[node] = replace(before, problem=problem)

    async def _answer(self, request: relay_pb2.AskRequest, node: str) -> tuple[Answer | None, str]:
        async with aclosing(self._relay.ask(request)) as answers:
            async for told in answers:
                if told.error:
                    return None, told.error
                return await asyncio.to_thread(decode, told.document, node), ""
        return None, "it has said nothing"

    def _document(self, said: Mapping[str, _Said], connected: frozenset[str], entities: Entities) -> bytes:
        """In a thread: a large mesh takes longer than the event loop may stand still."""
        now = time.monotonic()
        share = max(MOST_KEPT // max(len(said), 1), 1)
        told = [_at_most(one.answer, share) for one in said.values() if one.answer is not None and now - one.at < STALE_S]
        problems = [one.problem if node in one.problem else f"{node}: {one.problem}" for node, one in sorted(said.items()) if one.problem]
        missing = sorted(self._expected(entities) - connected)
        problems += [f"node {node} is not connected to the controller: what happens there is not shown" for node in missing[:_MOST_MISSING]]
        if missing[_MOST_MISSING:]:
            problems.append(f"nor are {len(missing) - _MOST_MISSING} other nodes")
        graph = merge(told, lambda edge, node: believed(edge, node, entities), problems)
        return json.dumps(laid_out(graph)).encode()

    def _expected(self, entities: Entities) -> frozenset[str]:
        """The nodes that workloads of the model are on."""
        if self._nodes[0] is not entities:
            found = frozenset(entity.workload.node for key, entity in entities.items() if key.startswith("workload/"))
            self._nodes = (entities, found - {""})
        return self._nodes[1]


def believed(edge: Edge, node: str, entities: Entities) -> bool:
    """Is an edge about the node's own workloads, and about what exists?"""

    def node_of(name: str) -> str | None:
        entity = entities.get(f"workload/{name}")
        return None if entity is None else entity.workload.node

    names = [f"workload/{backend.workload}" for backend in edge.backends]
    names += [f"workload/{edge.source}"] if edge.source else []
    names += [f"{edge.kind}/{edge.destination}"] if edge.destination else []
    if not own(edge, node, node_of) or any(name not in entities for name in names):
        return False
    return edge.kind != "service" or edge.port in {0, *(port.port for port in entities[f"service/{edge.destination}"].service.ports)}


def _at_most(answer: Answer, number: int) -> Answer:
    if len(answer.edges) <= number:
        return answer
    edges = sorted(answer.edges, key=lambda edge: edge.weight, reverse=True)
    return replace(answer, edges=tuple(edges[:number]), folded=answer.folded + len(edges) - number)


def laid_out(graph: Graph) -> dict[str, Any]:
    """JSON values: boxes with their places, arrows with their ways and what they stand for."""
    drawn = drawing.draw(graph)
    numbers = {vertex: number for number, vertex in enumerate(drawn.places)}
    return {
        "seconds": graph.seconds,
        "nodes": graph.nodes,
        "problems": graph.problems,
        "notShown": graph.folded + drawn.left_out,
        "doubted": graph.doubted,
        "size": drawn.size,
        "box": drawing.BOX,
        "boxes": [{"kind": vertex.kind, "name": vertex.name, "place": place} for vertex, place in drawn.places.items()],
        "arrows": [_arrow(arrow, numbers[arrow.link.start], numbers[arrow.link.end]) for arrow in drawn.arrows],
    }


def _arrow(arrow: Arrow, start: int, end: int) -> dict[str, Any]:
    link = arrow.link
    return {
        "start": start,
        "end": end,
        "path": arrow.path,
        "labelPlace": arrow.label,
        "label": link.label,
        "state": link.state,
        "rate": link.rate,
        "mtls": link.mtls,
        "calls": [{**asdict(edge), "plan": _dialled(edge)} for edge in link.edges],
    }


def _dialled(edge: Edge) -> str:
    """The destination as `plan` takes it; "" if there is nothing to plan."""
    if not edge.source or edge.kind == "outside":
        return ""
    port = f":{edge.port}{'/udp' if edge.protocol == 'udp' else ''}" if edge.port else ""
    return f"{edge.destination}{port}"
