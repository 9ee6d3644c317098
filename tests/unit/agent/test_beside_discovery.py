"""What runs beside discovery, over its connection: it ends when discovery ends it, at whatever moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest

from agent.config import Config
from agent.quota import Quotas
from agent.relay import Relay
from tests.tasks import until

Work = Callable[[grpc.aio.Channel], Coroutine[Any, Any, None]]


class Silent(grpc.GenericRpcHandler):  # type: ignore[misc,unused-ignore]
    """Accepts every call, and never says a word."""

    def service(self, handler_call_details: object) -> Any:  # noqa: ARG002
        async def never(requests: object, context: object) -> AsyncIterator[bytes]:  # noqa: ARG001
            await asyncio.Event().wait()
            yield b""

        return grpc.stream_stream_rpc_method_handler(never)


@pytest.mark.parametrize("work", [Relay(Config(node="n", controller="unix:/nowhere")).run, Quotas("n").follow], ids=["relay", "quotas"])
def test_who_is_cancelled_in_the_moment_in_which_the_call_ends_has_ended(tmp_path: Path, work: Work) -> None:
    """grpc.aio takes that cancellation for the call's: discovery, which waited for the end, did not connect again until its agent was restarted."""

    async def scenario() -> None:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((Silent(),))
        server.add_insecure_port(f"unix:{tmp_path}/controller.sock")
        await server.start()
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/controller.sock") as channel:
            task = asyncio.create_task(work(channel))
            calls: Any = channel._active_calls  # type: ignore[attr-defined,unused-ignore]
            await until(lambda: calls)
            (call,) = calls
            await asyncio.sleep(0.1)  # it reads, and waits for the first metadata
            call.add_done_callback(lambda _: task.cancel())
            await server.stop(0)
            await until(call.done)
            await asyncio.wait({task}, timeout=1)
            assert task.cancelled()

    asyncio.run(scenario())
