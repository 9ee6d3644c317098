"""One `meshagent trace`, from the question to its last document. Served by `agent.api`.

The caller's node does the work: it watches its own kernel and Envoy (`agent.trace`), asks the agents of the nodes where the destination is for what they see of
the same pair (`agent.receiving`, through the controller), and joins both (`agent.joining`). Everything ends with the question, however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import math
import socket
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from agent import netns, plan
from agent.config import Config
from agent.enrolment import Enrolled
from agent.errors import MeshError, NotFound
from agent.joining import Joiner
from agent.model import NO_DIRECT, Direct, Snapshot, Workload
from agent.observation import Clock, document, number, observed
from agent.patience import within
from agent.policy import UDP
from agent.receiving import Caller, Reception
from agent.relay import Relay
from agent.report import Notice, Plan, encode
from agent.trace import Filter, Pair, Tracer, Watch
from meshapi import agent_pb2 as pb
from meshapi.text import shown

_T = TypeVar("_T")

LONGEST_S: Final = 7 * 24 * 3600.0
PROBE_TIMEOUT_S: Final = 3.0
SETTLE_S: Final = 0.6
"""After the last connection: Envoy flushes its records within 0.1 s, and other nodes tell what they saw within 0.5 s (`agent.joining`)."""
FAR_S: Final = 3.0
"""What another node has for getting ready; after that the trace begins without it."""
CLOCK_ASKS: Final = 3
MOST_NODES: Final = 16
"""Other nodes that one trace asks."""
LOST_EVERY_S: Final = 1.0


class NotWatched(MeshError):
    """There is a plan, but no more can be seen from here."""


class Node(Protocol):
    """What a trace asks of the supervisor."""

    @property
    def snapshot(self) -> Snapshot:
        """What is in force."""

    @property
    def enrolled(self) -> Enrolled:
        """The workloads in the data path."""

    @property
    def tracer(self) -> Tracer:
        """The running traces."""

    @property
    def direct(self) -> Direct:
        """Who is reached without a tunnel, over WireGuard."""

    def certified(self, workload: str) -> bool:
        """Does a workload of this node have a certificate that is valid?"""

    async def tracing_armed(self) -> bool:
        """Wait until Envoy reports what the tracer asked for."""

    def lost_events(self) -> int:
        """How many kernel events found no room so far."""


class Tracing:
    """See the module. Belongs to the event loop."""

    def __init__(self, config: Config, node: Node, relay: Relay) -> None:
        """`relay` is asked for what other nodes see."""
        self._config = config
        self._node = node
        self._relay = relay

    async def answer(self, request: pb.TraceRequest) -> AsyncGenerator[bytes, None]:
        """Every document of the answer. Raises NotFound for names that nobody knows, and NotWatched."""
        if not (0 <= request.duration_s <= LONGEST_S and 0 <= request.slow_ms < math.inf):  # which NaN is not either
            raise NotWatched(f"--duration is a number of seconds from 0 to {LONGEST_S:.0f}, --slow one of milliseconds")
        snapshot = self._node.snapshot
        source = plan.find_caller(snapshot, request.source, request.destination, self._config.node)
        if request.receiving:
            parts = self._received(request, source)
        else:
            here = source.node == self._config.node
            planned = plan.plan(snapshot, source, request.destination, self._config.trust_domain, self._node.direct if here else NO_DIRECT)
            if not request.duration_s and not request.probe:
                yield encode(planned)
                return
            parts = self._watched(request, source, planned) if here else self._elsewhere(request, source, planned)
        async with aclosing(parts):
            async for part in parts:
                yield part

    async def _elsewhere(self, request: pb.TraceRequest, source: Workload, planned: Plan) -> AsyncGenerator[bytes, None]:
        """What the source's own node says; if that is away, at least the plan, which any node can make."""
        if request.relayed:
            yield encode(planned)
            raise NotWatched(
                f"connections of {source.name} cannot be watched here: it runs on node {source.node}, this is {self._config.node}"
            )
        told = False
        try:
            async with aclosing(self._relay.trace(request, source.node)) as found:
                async for one in found:
                    told = True
                    yield one.document
        except NotFound as error:
            if not told:
                yield encode(planned)
            raise NotWatched(f"connections of {source.name} cannot be watched: {shown(str(error))}") from error

    async def _watched(self, request: pb.TraceRequest, source: Workload, planned: Plan) -> AsyncGenerator[bytes, None]:
        """The plan, then connections until a limit is reached."""
        snapshot = self._node.snapshot
        service, behind = plan.targets(snapshot, request.destination)
        local = next((one for one in self._node.enrolled.local if one.workload.name == source.name), None)
        asked = _nodes(snapshot, behind, self._config.node)
        here = self._here(behind)
        probes = plan.is_kubelet(source)
        if probes and request.probe:
            yield encode(planned)
            raise NotWatched("only the kubelet itself can call as the kubelet: without --probe its calls are shown")
        if local is None and (request.probe or not (asked or here)):
            yield encode(planned)
            raise NotWatched(f"connections of {source.name} cannot be watched here: it is not enrolled")
        watch = Watch(
            Pair(source.name, service, behind, plan.allowing(snapshot, behind), plan.demands_tokens(snapshot, behind)),
            self._config.node,
            _filter(request),
            local.netns_path if local else "",
            lambda cluster: self._endpoints(cluster, request.destination),
            lambda: self._node.certified(source.name),
        )
        session = _Session(self._relay, request, source.name, watch, planned.destination, _places(snapshot, behind, asked))
        async with contextlib.AsyncExitStack() as stack:
            self._node.tracer.add(watch)
            stack.callback(self._node.tracer.end, watch)
            if local is None and here and not probes:  # nobody tells of its calls but who refuses them
                refusing = self._node.tracer.add(self._reception(source, here, watch.found))
                stack.callback(self._node.tracer.end, refusing)
            stack.push_async_callback(session.close)
            armed, _ = await asyncio.gather(self._node.tracing_armed(), session.follow(asked[:MOST_NODES]))
            problems = [*planned.problems, *session.problems]
            if not armed:
                problems.append(
                    f"the waypoint of node {self._config.node} does not take what it is told: calls through it may get no answer, "
                    "and their requests are not shown; see 'meshagent status' and its log"
                )
            if local is None and not probes:
                problems.append("only what receivers refuse can be shown of it")
            if len(asked) > MOST_NODES:
                problems.append(
                    f"{len(asked) - MOST_NODES} more nodes have endpoints and are not asked: trace a workload instead of the service"
                )
            yield encode(dataclasses.replace(planned, problems=tuple(problems)))
            if request.probe and local is not None:
                await asyncio.to_thread(_probe, Path(local.netns_path), self._dialled(planned))
            lost = self._node.lost_events()
            async for one in session.shown(lambda: self._node.lost_events() - lost):
                yield one

    def _here(self, behind: frozenset[str]) -> frozenset[str]:
        return frozenset(one.workload.name for one in self._node.enrolled.local if one.workload.name in behind)

    def _reception(self, source: Workload, targets: frozenset[str], found: asyncio.Queue[Any] | None = None) -> Reception:
        pair = Pair(source.name, "", targets, plan.allowing(self._node.snapshot, targets), receiving=True)
        caller = Caller(source.identity(self._config.trust_domain), frozenset(source.addresses))
        reception = Reception(pair, self._config.node, caller, self._node.certified)
        if found is not None:
            reception.found = found
        return reception

    async def _received(self, request: pb.TraceRequest, source: Workload) -> AsyncGenerator[bytes, None]:
        """For another node: what time it is here, then what receivers on this node see of the pair."""
        yield encode({"kind": "clock", "unixNs": time.time_ns()})
        if not request.duration_s:
            return
        snapshot = self._node.snapshot
        _, behind = plan.targets(snapshot, request.destination)
        targets = self._here(behind)
        if not targets:
            raise NotWatched(f"no workload behind {request.destination} is enrolled on node {self._config.node}")
        loop = asyncio.get_running_loop()
        end = loop.time() + request.duration_s
        reception = self._node.tracer.add(self._reception(source, targets))
        try:
            await self._node.tracing_armed()
            yield encode({"kind": "armed"})
            before, told, look_at = self._node.lost_events(), 0, 0.0
            while (now := loop.time()) < end:
                with contextlib.suppress(asyncio.TimeoutError):
                    yield encode(await _next(reception.found, min(end - now, LOST_EVERY_S)))
                if now >= look_at:
                    look_at = now + LOST_EVERY_S
                    lost = self._node.lost_events() - before + reception.missed
                    if lost > told:
                        told = lost
                        yield encode({"kind": "lost", "events": lost})
        finally:
            self._node.tracer.end(reception)

    def _endpoints(self, cluster: str, destination: str) -> int | None:
        """How many ready endpoints stand behind a cluster (`agent.l7.names.service`, `share`), or, where none was chosen, behind the destination."""
        kind, _, rest = cluster.partition("@")[0].partition("/")
        name, _, port = rest.rpartition("/")
        if kind == "service" and port.isdigit():
            return len(self._node.snapshot.endpoints(name, int(port)))
        with contextlib.suppress(NotFound):
            return len(plan.targets(self._node.snapshot, destination)[1])
        return None

    def _dialled(self, planned: Plan) -> _Call:
        """The call that a plan is about."""
        found = plan.find_destination(self._node.snapshot, planned.destination)
        address = found.entity.addresses[0] if found.entity.addresses else ""
        return _Call(address, found.port, "HTTP" if planned.level == "L7" else found.protocol)


class _Session:
    """A trace that runs on the caller's node: what other nodes tell, and what is shown."""

    def __init__(self, relay: Relay, request: pb.TraceRequest, source: str, watch: Watch, destination: str, places: dict[str, str]) -> None:
        self._relay = relay
        self._request = request
        self._source = source
        self._watch = watch
        self._joiner = Joiner(source, destination, places, {})
        self._following: list[asyncio.Task[None]] = []
        self._begun = False
        self._lost: dict[str, int] = {}
        self.problems: list[str] = []

    async def close(self) -> None:
        """Ask nobody any more."""
        for task in self._following:
            task.cancel()
        await asyncio.gather(*self._following, return_exceptions=True)

    async def follow(self, nodes: list[str]) -> None:
        """Ask these nodes; returns when each of them watches, or has said why not, or has had its time."""
        armed = [asyncio.Event() for _ in nodes]
        self._following = [
            asyncio.create_task(self._follow(node, event), name=f"trace {node}") for node, event in zip(nodes, armed, strict=True)
        ]
        with contextlib.suppress(asyncio.TimeoutError):
            await within(asyncio.gather(*(event.wait() for event in armed)), FAR_S)
        for node, event in zip(nodes, armed, strict=True):
            if not event.is_set():
                self._without(node, f"it was not ready within {FAR_S:.0f} s")
        self._begun = True

    async def _follow(self, node: str, armed: asyncio.Event) -> None:
        try:
            clocks = [await self._clock(node) for _ in range(CLOCK_ASKS)]
            self._joiner.clocks[node] = min(clocks, key=lambda one: one.error_ns)
            async with aclosing(self._relay.trace(self._ask(self._length), node)) as told:
                async for one in told:
                    self._take(node, one.document, armed)
            why = "it ended its answer"
        except NotFound as error:
            why = shown(str(error), 300)
        except (ValueError, KeyError):
            why = "its answer is not understood: does the same version of meshagent run there?"
        if not armed.is_set() or why != "it ended its answer":
            self._without(node, why)
        armed.set()

    async def _clock(self, node: str) -> Clock:
        asked = time.time_ns()
        async with aclosing(self._relay.trace(self._ask(0), node)) as told:
            async for one in told:
                answered = time.time_ns()
                return Clock.of(asked, number(document(one.document)["unixNs"]), answered)
        raise ValueError("no time")

    def _take(self, node: str, data: bytes, armed: asyncio.Event) -> None:
        found = document(data)
        kind = found.get("kind")
        if kind == "armed":
            armed.set()
        elif kind == "lost":
            self._lost[node] = max(0, number(found["events"]))
        elif kind == "observation":
            if self._watch.found.full():
                self._watch.missed += 1
            else:
                self._watch.found.put_nowait(observed(found, node))
        elif kind != "clock":
            raise ValueError("not understood")

    @property
    def _length(self) -> float:
        return (self._request.duration_s or PROBE_TIMEOUT_S) + SETTLE_S + FAR_S

    def _ask(self, duration_s: float) -> pb.TraceRequest:
        return pb.TraceRequest(source=self._source, destination=self._request.destination, duration_s=duration_s, receiving=True)

    def _without(self, node: str, why: str) -> None:
        text = f"node {node} does not tell what it sees, its hops are missing: {why}"
        self._joiner.forget(node)
        if not self._begun:
            self.problems.append(text)
        elif not self._watch.found.full():
            self._watch.found.put_nowait(Notice(text=text))

    async def shown(self, lost_here: Callable[[], int]) -> AsyncGenerator[bytes, None]:
        """Connections as they are complete, until a limit is reached."""
        loop = asyncio.get_running_loop()
        end = loop.time() + (self._request.duration_s or PROBE_TIMEOUT_S) + SETTLE_S
        limit = self._request.count or (1 if self._request.probe else 0)
        found, joiner = self._watch.found, self._joiner
        count, told, look_at = 0, 0, 0.0
        while True:
            now = loop.time()
            over = now >= end
            for seen, connection in joiner.finished(float("inf") if over else now):
                if self._watch.filter.shows(seen, connection):
                    count += 1
                    yield encode(connection)
                    if count == limit:
                        over = True
                        break
            if over or now >= look_at:
                look_at = now + LOST_EVERY_S
                missed = lost_here() + self._watch.missed + sum(self._lost.values())
                if missed > told:
                    told = missed
                    yield encode(
                        Notice(
                            text=f"{missed} events or connections came faster than they could be taken, and are not shown", missed=missed
                        )
                    )
            if over:
                return
            due = joiner.next_deadline()
            with contextlib.suppress(asyncio.TimeoutError):
                one = await _next(found, max(0.0, min(end, look_at, end if due is None else due) - now))
                if isinstance(one, Notice):
                    yield encode(one)
                else:
                    joiner.take(one, loop.time())


async def _next(queue: asyncio.Queue[_T], seconds: float) -> _T:
    """The next thing that comes. Raises asyncio.TimeoutError."""
    if not queue.empty():
        await asyncio.sleep(0)  # others have a turn, however much comes
        return queue.get_nowait()
    return await within(queue.get(), seconds)


def _filter(request: pb.TraceRequest) -> Filter:
    return Filter(
        request.method.upper(), request.path, frozenset(request.status), request.errors_only, int(max(0.0, request.slow_ms) * 1_000_000)
    )


def _nodes(snapshot: Snapshot, behind: frozenset[str], own: str) -> list[str]:
    return sorted({snapshot.workloads[name].node for name in behind} - {own, ""})


def _places(snapshot: Snapshot, behind: frozenset[str], nodes: list[str]) -> dict[str, str]:
    """Workloads and their addresses that are on these nodes."""
    places: dict[str, str] = {}
    for workload in (snapshot.workloads[name] for name in behind):
        if workload.node in nodes[:MOST_NODES]:
            places |= dict.fromkeys((workload.name, *workload.addresses), workload.node)
    return places


class _Call(NamedTuple):
    address: str
    port: int
    protocol: str
    """TCP, UDP or HTTP."""


def _probe(namespace: Path, to: _Call) -> None:
    """One connection from inside the source's namespace; for HTTP one GET / over it. Its failure is what the trace then shows.

    Over UDP it is one empty datagram, which no protocol mistakes for a request (RFC 768 allows it), and nobody waits for an answer.
    """

    def call() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if to.protocol == "HTTP":
                connection = http.client.HTTPConnection(to.address, to.port, timeout=PROBE_TIMEOUT_S)
                connection.request("GET", "/", headers={"User-Agent": "meshagent-probe", "Connection": "close"})
                connection.getresponse().read()
                connection.close()
            elif to.protocol == UDP:
                with socket.socket(socket.AF_INET6 if ":" in to.address else socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
                    datagrams.connect((to.address, to.port))
                    datagrams.send(b"")
            else:
                socket.create_connection((to.address, to.port), timeout=PROBE_TIMEOUT_S).close()

    netns.run_in(namespace, call)
