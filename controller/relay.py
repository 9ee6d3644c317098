"""The Relay service: hands questions about nodes to their agents, and what those say to whoever asked. Served by `controller.server`.

It does not look into answers. An agent that says too much, or somebody who listens too slowly, loses one answer and nothing else.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable
from contextlib import aclosing
from typing import Any, Final, NamedTuple

import grpc

from controller.peers import NotAllowed, is_local, require, uris
from meshapi import relay_pb2 as pb
from meshapi import relay_pb2_grpc
from meshapi.text import shown

_log = logging.getLogger(__name__)

MAX_ERROR: Final = 500
"""Characters of what a node says went wrong."""
_OVERHEAD: Final = 64
BACKLOG: Final = 16 << 20
"""Bytes of answers to one who asks that he has not taken yet."""
MAX_DOCUMENT: Final = 2 << 20
"""Bytes; the status of a node with 250 workloads is 100 KB."""
MAX_QUESTIONS: Final = 64
"""That one agent is asked at the same time."""
Context = grpc.aio.ServicerContext[Any, Any]


class Relay(relay_pb2_grpc.RelayServicer):
    """See the module. Belongs to the event loop."""

    def __init__(self, trust_domain: str, node_of: Callable[[str], str]) -> None:
        """`node_of` tells on which node a workload is, or one behind a service, by "NAMESPACE/NAME"; "" if it does not know."""
        self._nodes = f"spiffe://{trust_domain}/meshagent/node/"
        self._admin = f"spiffe://{trust_domain}/meshagent/admin"
        self._node_of = node_of
        self._lines: dict[str, _Line] = {}

    @property
    def nodes(self) -> frozenset[str]:
        """The nodes that can be asked now."""
        return frozenset(self._lines)

    async def Offer(self, request_iterator: AsyncIterator[pb.Reply], context: Context) -> AsyncIterator[pb.Question]:  # noqa: N802  gRPC's names
        """Ask the agent at the other end of this call what others want to know."""
        node = (await anext(request_iterator, pb.Reply())).node
        try:
            require(context, self._nodes + node)
        except NotAllowed as error:
            _log.warning("offer refused", extra={"node": node, "peer": context.peer(), "error": str(error)})
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"node {node} is not yours: {error}")
        line = self._lines[node] = _Line()  # instead of a call that has broken, perhaps unnoticed
        listening = asyncio.create_task(line.listen(request_iterator))
        try:
            while (question := await line.questions.get()) is not None:
                yield question
        finally:
            # First what must not be left out: whoever is cancelled here, because the connection broke meanwhile, comes no further than the next await.
            line.close()
            if self._lines.get(node) is line:
                del self._lines[node]
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def Ask(self, request: pb.AskRequest, context: Context) -> AsyncIterator[pb.Told]:  # noqa: N802
        """Ask one node or all of them."""
        if objection := self._objection(request, context):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, objection)
        async with aclosing(self.ask(request)) as answers:
            async for told in answers:
                yield told

    async def ask(self, request: pb.AskRequest) -> AsyncGenerator[pb.Told, None]:
        """Ask, for the controller itself or for somebody who may. To be closed by who does not read to the end."""
        inbox = _Inbox()
        asked = []
        for node in self._asked(request):
            line = self._lines.get(node)
            if line is None:
                yield pb.Told(node=node, error=f"node {node} is not connected to the controller: is its agent running?")
                continue
            question = pb.Question(status=request.status)
            if request.HasField("trace"):
                question = pb.Question(trace=request.trace)
                question.trace.relayed = True
            elif request.HasField("graph"):
                question = pb.Question(graph=request.graph)
            elif request.HasField("calls"):
                question = pb.Question(calls=request.calls)
            asked.append(line.ask(question, _Letterbox(inbox, node)))
        try:
            for _ in asked:
                async for told in inbox.until_one_ends():
                    yield told
        finally:
            for enough in asked:
                enough()

    def _objection(self, request: pb.AskRequest, context: Context) -> str:
        """Return why the caller may not ask this; "" if it may."""
        if is_local(context):
            return ""
        found = uris(context)
        if self._admin in found:
            return ""
        if not any(uri.startswith(self._nodes) for uri in found):
            return f"the client certificate must name {self._admin}; it names {', '.join(found) or 'no URI'}"
        return self._objection_to_node(request, found)

    def _objection_to_node(self, request: pb.AskRequest, found: Collection[str]) -> str:
        if not request.HasField("trace"):
            return "a node may ask for traces only: use an administrator's certificate, or the controller's socket"
        if request.trace.probe:
            return "a node may not probe for another: ask on the source's node, or the controller (--controller)"
        if request.trace.receiving and self._nodes + self._node_of(request.trace.source) not in found:
            return f"a node may ask what receivers see of its own workloads only, and {request.trace.source} is none of them"
        return ""

    def _asked(self, request: pb.AskRequest) -> Iterable[str]:
        if request.node:
            return [request.node]
        if not request.HasField("trace"):
            return sorted(self._lines)
        if found := self._node_of(request.trace.source):
            return [found]
        # Nobody knows the source. A kubelet is that of the destination's node; else any agent has the same model, and says what is called nearly so.
        called = self._node_of(request.trace.destination.partition(":")[0])
        return [called if called in self._lines else next(iter(sorted(self._lines)), "")]


class _Inbox:
    """What one who asks has not taken yet."""

    def __init__(self) -> None:
        self.size = 0
        """Bytes."""
        self._replies: asyncio.Queue[tuple[str, pb.Reply]] = asyncio.Queue()

    def put(self, node: str, reply: pb.Reply) -> None:
        """Add a reply."""
        self.size += _size(reply)
        self._replies.put_nowait((node, reply))

    async def until_one_ends(self) -> AsyncIterator[pb.Told]:
        """What nodes say until one of them has ended."""
        while True:
            node, reply = await self._replies.get()
            self.size -= _size(reply)
            if reply.document:
                yield pb.Told(node=node, document=reply.document)
            if reply.end:
                if reply.code:
                    yield pb.Told(node=node, error=reply.error)
                return


def _size(reply: pb.Reply) -> int:
    return len(reply.document) + len(reply.error) + _OVERHEAD


class _Letterbox(NamedTuple):
    """Where a node's answer to one question goes."""

    inbox: _Inbox
    node: str

    def put(self, reply: pb.Reply) -> None:
        self.inbox.put(self.node, reply)


class _Line:
    """One agent's call: what it is to be asked, and who waits for what it says."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self.questions: asyncio.Queue[pb.Question | None] = asyncio.Queue()
        """To be passed on; None: the agent is gone."""
        self._waiting: dict[int, _Letterbox] = {}

    def ask(self, question: pb.Question, answer: _Letterbox) -> Callable[[], None]:
        """Ask; every reply goes to `answer`, and the last one says that it is. Returns what says "enough"."""
        number = question.number = next(self._numbers)
        if len(self._waiting) >= MAX_QUESTIONS:
            answer.put(_end(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_QUESTIONS} questions to this node are open: try again later"))
            return lambda: None
        self._waiting[number] = answer
        self.questions.put_nowait(question)

        def enough() -> None:
            if self._waiting.pop(number, None):
                self.questions.put_nowait(pb.Question(number=number, enough=True))

        return enough

    async def listen(self, replies: AsyncIterator[pb.Reply]) -> None:
        """Take what the agent says until it is gone."""
        try:
            async for reply in replies:
                self.take(reply)
        finally:
            self.questions.put_nowait(None)

    def take(self, reply: pb.Reply) -> None:
        """Hand a reply to who waits for it; one that nobody waits for came too late."""
        number = reply.number
        if number not in self._waiting:
            return
        answer = self._waiting[number]
        reply.error = shown(reply.error, MAX_ERROR)
        if not (reply.document or reply.end):
            return  # nothing is said
        why = ""
        if len(reply.document) > MAX_DOCUMENT:
            why = f"the answer has a document of {len(reply.document)} bytes, at most {MAX_DOCUMENT} are passed on"
        elif answer.inbox.size >= BACKLOG:
            why = f"the answer came faster than it was read, and was ended when {BACKLOG} bytes lay there"
        if why:
            self.questions.put_nowait(pb.Question(number=number, enough=True))
            reply = _end(grpc.StatusCode.RESOURCE_EXHAUSTED, why)
        if reply.end:
            del self._waiting[number]
        answer.put(reply)

    def close(self) -> None:
        """Tell those who wait that nothing comes any more."""
        waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            answer.put(_end(grpc.StatusCode.UNAVAILABLE, "the agent's connection to the controller ended"))


def _end(code: grpc.StatusCode, error: str) -> pb.Reply:
    return pb.Reply(end=True, code=code.value[0], error=error)
