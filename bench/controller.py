"""A controller that holds one model, for agents of a benchmark: no files, no validation, a unix socket. Called by `bench.agent`.

A real one would need 100,000 documents first. What an agent receives is the same: everything in the first response, then one response for each change.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from lab.errors import LabError
from meshapi import discovery_pb2 as pb
from meshapi import discovery_pb2_grpc


class Controller(discovery_pb2_grpc.DiscoveryServicer):
    """Serves one agent at a time, in its context."""

    def __init__(self, socket: Path, resources: Sequence[pb.Resource]) -> None:
        self.target = f"unix://{socket}"
        """What the agent is told."""
        self._everything = resources
        self._version = 0
        self._changes: queue.SimpleQueue[pb.DiscoveryResponse | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[pb.DiscoveryRequest] = queue.SimpleQueue()
        self._server = grpc.server(ThreadPoolExecutor(max_workers=2), options=[("grpc.max_send_message_length", -1)])
        discovery_pb2_grpc.add_DiscoveryServicer_to_server(self, self._server)  # type: ignore[no-untyped-call,unused-ignore]
        self._server.add_insecure_port(self.target)

    def __enter__(self) -> Controller:  # noqa: PYI034 - typing.Self needs Python 3.11
        self._server.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._changes.put(None)
        self._server.stop(None).wait()

    def Stream(self, requests: Iterator[pb.DiscoveryRequest], _context: Any) -> Iterator[pb.DiscoveryResponse]:  # noqa: N802 - gRPC's name
        """Answer an agent."""
        next(requests)
        yield self._response(self._everything)
        self._answers.put(next(requests))
        while (change := self._changes.get()) is not None:
            yield change
            self._answers.put(next(requests))

    def ReportTunnels(self, _request: pb.TunnelReport, _context: Any) -> pb.TunnelReportAnswer:  # noqa: N802 - gRPC's name
        """Nobody asks for it: take it."""
        return pb.TunnelReportAnswer()

    def wait(self, timeout: float) -> None:
        """Wait until the agent has everything in force. Raises LabError."""
        try:
            answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            raise LabError(f"the agent has not answered within {timeout:.0f} s") from None
        if answer.error:
            raise LabError(f"the agent refused the model: {answer.error}")

    def change(self, resource: pb.Resource, timeout: float) -> float:
        """Change one resource; returns the seconds until the agent says that it is in force. Raises LabError."""
        response = self._response([resource])
        started = time.monotonic()
        self._changes.put(response)
        self.wait(timeout)
        return time.monotonic() - started

    def _response(self, resources: Sequence[pb.Resource]) -> pb.DiscoveryResponse:
        self._version += 1
        name = str(self._version)
        return pb.DiscoveryResponse(nonce=name, version=name, resources=resources, changed_at_ns=time.time_ns())
