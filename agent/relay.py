"""The agent's end of the relay: answers what others ask about this node through the controller, and asks for others. Run beside discovery.

What is asked goes to the agent's own socket, so that there is one answer to a question, whichever way it came.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio

from agent.errors import NotFound
from agent.patience import until_one_ends
from meshapi import agent_pb2, agent_pb2_grpc, proposal_pb2, proposal_pb2_grpc, relay_pb2_grpc
from meshapi import relay_pb2 as pb
from meshapi.text import shown

if TYPE_CHECKING:
    from agent.config import Config

_log = logging.getLogger(__name__)

RETRY_S: Final = 5.0
COMPILE_TIMEOUT_S: Final = 60.0
AT_ONCE: Final = 64
"""Questions, of all controllers together; one that asks more is told so."""
_LONGEST_ERROR: Final = 500
"""Characters of what another machine says went wrong."""
_LOST = (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError)


class Relay:
    """See the module."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._channel: grpc.aio.Channel | None = None
        self._open = 0
        """Questions that are being answered, whoever asked."""

    async def run(self, channel: grpc.aio.Channel) -> None:
        """Ask over the channel to the controller, and offer to answer, for as long as it lives; to be cancelled when it ends.

        Where the controller has replicas, all of them are offered that by `agent.replicas`.
        """
        self._channel = channel
        try:
            if self._config.replicas:
                await asyncio.Event().wait()
            while True:
                try:
                    await until_one_ends(self.offer(channel))
                except _LOST as error:
                    if isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.UNIMPLEMENTED:
                        return  # an older controller
                    _log.info("the controller cannot ask this node for others; trying again", extra={"error": str(error)})
                await asyncio.sleep(RETRY_S)
        finally:
            self._channel = None

    async def trace(self, request: agent_pb2.TraceRequest, node: str) -> AsyncGenerator[agent_pb2.Json, None]:
        """Pass a question on to another node. Raises NotFound if it has no answer."""
        if self._channel is None:
            raise NotFound(f"it runs on node {node}, this is {self._config.node}, and the controller, which would ask there, is away")
        channel = self._channel
        ask = relay_pb2_grpc.RelayStub(channel).Ask(pb.AskRequest(node=node, trace=request))
        try:
            async for told in ask:
                if told.error:
                    raise NotFound(shown(told.error, _LONGEST_ERROR))
                yield agent_pb2.Json(document=told.document)
        except asyncio.CancelledError:
            if self._channel is channel:
                raise  # whoever asks was cancelled, and not only the call, which its channel took along
            raise NotFound("the connection to the controller was made anew meanwhile: ask again") from None
        except grpc.aio.AioRpcError as error:
            raise NotFound(
                f"it runs on node {node}, and the controller did not ask there: {shown(error.details() or '', _LONGEST_ERROR)}"
            ) from error
        finally:
            ask.cancel()

    async def compiled(self, request: proposal_pb2.CompileRequest) -> proposal_pb2.CompileResponse:
        """What policies in files mean, from the controller. Raises NotFound if it does not say."""
        if self._channel is None:
            raise NotFound("the controller, which reads the files, is away: see 'meshagent status'")
        ask: Any = proposal_pb2_grpc.ProposalsStub(self._channel)
        try:
            found: proposal_pb2.CompileResponse = await ask.Compile(request, timeout=COMPILE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise NotFound(f"the controller, which reads the files, did not: {error.details() or error.code().name.lower()}") from error
        return found

    async def offer(self, channel: grpc.aio.Channel) -> None:
        """Answer what is asked over a channel until that ends, or the call does."""
        call: Any = relay_pb2_grpc.RelayStub(channel).Offer()
        answers: dict[int, asyncio.Task[None]] = {}
        writing = asyncio.Lock()  # a gRPC call takes one message after the other
        writes: set[asyncio.Task[None]] = set()

        async def write(message: pb.Reply) -> None:
            async with writing:
                await call.write(message)

        async def reply(message: pb.Reply) -> None:
            # Whoever is cancelled while it writes takes the whole call with it (grpc.aio, _StreamRequestMixin._write), so it does not write itself.
            task = asyncio.create_task(write(message))
            writes.add(task)
            task.add_done_callback(functools.partial(_written, writes))
            await asyncio.shield(task)

        try:
            await reply(pb.Reply(node=self._config.node))
            while isinstance(question := await call.read(), pb.Question):
                if question.enough:
                    if question.number in answers:
                        answers.pop(question.number).cancel()
                elif self._open >= AT_ONCE or question.number in answers:
                    await reply(pb.Reply(number=question.number, end=True, code=8, error=f"{AT_ONCE} questions are open: try again later"))
                else:
                    self._open += 1
                    task = answers[question.number] = asyncio.create_task(self._answer(question, reply))
                    task.add_done_callback(functools.partial(self._forget, answers, question.number))
        finally:
            for task in (running := list(answers.values())):
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            call.cancel()
            # One that waits for a connection that never comes would wait for ever: cancelling the call does not wake it.
            for task in writes:
                task.cancel()
            await asyncio.gather(*writes, return_exceptions=True)

    def _forget(self, answers: dict[int, asyncio.Task[None]], number: int, _task: asyncio.Task[None]) -> None:
        self._open -= 1
        answers.pop(number, None)

    async def _answer(self, question: pb.Question, reply: Any) -> None:
        """Ask the agent's own socket, and pass on what it says."""
        end = pb.Reply(number=question.number, end=True)
        async with grpc.aio.insecure_channel(f"unix:{self._config.api_socket}") as channel:
            agent: Any = agent_pb2_grpc.AgentStub(channel)
            try:
                if question.HasField("trace"):
                    async for one in agent.Trace(question.trace):
                        await reply(pb.Reply(number=question.number, document=one.document))
                elif question.HasField("calls"):
                    async for one in agent.Calls(question.calls):
                        await reply(pb.Reply(number=question.number, document=one.document))
                else:
                    one = await (agent.Graph(question.graph) if question.HasField("graph") else agent.Status(question.status))
                    await reply(pb.Reply(number=question.number, document=one.document))
            except grpc.aio.AioRpcError as error:
                end.code, end.error = error.code().value[0], error.details() or error.code().name.lower()
        with contextlib.suppress(*_LOST):  # the controller is away: it knows
            await reply(end)


def _written(writes: set[asyncio.Task[None]], task: asyncio.Task[None]) -> None:
    writes.discard(task)
    if not task.cancelled():
        task.exception()  # whoever still waits for it has it, too
