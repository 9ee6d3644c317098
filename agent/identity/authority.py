"""The controller's Identity service as this node sees it: one connection, held open by the Trust stream, that everything else goes over.

It owns the connection and its backoff. What arrives is handed on undecoded; whoever gets it checks it. Credentials are read anew at each attempt.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

import grpc
import grpc.aio

from agent.config import Config
from agent.errors import MeshError
from agent.identity.clock import Clock
from agent.patience import Backoff, within
from meshapi import identity_pb2 as pb
from meshapi import identity_pb2_grpc, limits

_log = logging.getLogger(__name__)

FIRST_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 10.0
NOT_OFFERED_S: Final = 60.0
"""How long after a controller said that it has no identity service it is asked again: it may have been upgraded."""
MAX_ANSWER: Final = 64 << 20
OPTIONS: Final = (
    # As in agent/discovery.py: a controller whose machine vanished is noticed, and the pauses are ours.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_ANSWER),
    ("grpc.use_local_subchannel_pool", 1),
)


class Away(MeshError):
    """The controller cannot be asked now; the message says why."""


class Refused(MeshError):
    """The controller answered that it will not."""


class Authority:
    """See the module. Belongs to one event loop."""

    def __init__(self, config: Config, clock: Clock, take_trust: Callable[[pb.TrustBundle, bool], None]) -> None:
        """`take_trust` gets each bundle, and whether it is the first of its connection; ValueError from it refuses the bundle."""
        self._config = config
        self._clock = clock
        self._take_trust = take_trust
        self._channel: grpc.aio.Channel | None = None
        self._again = asyncio.Event()
        self._lost = False
        """The last connection had come to stand."""
        self.ready = asyncio.Event()
        """Set once there are credentials."""
        self.connected = asyncio.Event()
        """Set while there is a connection over which a bundle has come."""
        self.offered: bool | None = None
        """Whether the controller has an identity service; None: it has not been reached yet."""
        self.denied = False
        """The controller does not accept this node's certificate: it may be revoked."""
        self.last_error = ""

    def reconnect(self) -> None:
        """Make a new connection: with other credentials, or at once instead of after a pause."""
        self._again.set()

    async def run(self) -> None:
        """Connect, follow, reconnect, for ever."""
        await self.ready.wait()
        backoff = Backoff(FIRST_BACKOFF_S, MAX_BACKOFF_S, self._clock.random)
        while True:
            self._again.clear()
            pause, self._lost = 0.0, False
            try:
                await self._follow(backoff)
            except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError, OSError, ValueError) as error:
                reason = words(error)
                code = error.code() if isinstance(error, grpc.aio.AioRpcError) else None
                self.denied = code in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}
                if code is grpc.StatusCode.UNIMPLEMENTED:
                    if self.offered is not False:
                        _log.info("the controller has no identity service", extra={"controller": self._config.controller})
                    self.offered, pause = False, NOT_OFFERED_S * (0.5 + self._clock.random())
            else:
                reason = "the controller ended the stream"
            if self._again.is_set():  # asked for: nothing is wrong
                continue
            if self.offered is not False and (self._lost or reason != self.last_error):
                _log.warning("identity service not reachable, certificates and trust stay as they are", extra={"error": reason})
            self.last_error = reason
            await self._sleep(pause or backoff.pause())

    async def _sleep(self, seconds: float) -> None:
        try:
            await within(self._again.wait(), seconds)
        except asyncio.TimeoutError:
            return

    async def _follow(self, backoff: Backoff) -> None:
        """One connection, until it ends or another is wanted."""
        channel = await self._connect()
        following = asyncio.create_task(self._read(channel, backoff))
        other = asyncio.create_task(self._again.wait())
        try:
            done, _ = await asyncio.wait((following, other), return_when=asyncio.FIRST_COMPLETED)
            if following in done:
                following.result()
        finally:
            self._channel, self._lost = None, self.connected.is_set()
            self.connected.clear()
            for task in (following, other):
                task.cancel()
            await asyncio.gather(following, other, return_exceptions=True)
            await channel.close()

    async def _read(self, channel: grpc.aio.Channel, backoff: Backoff) -> None:
        call: Any = _stub(channel).Trust(pb.TrustRequest())
        try:
            first = True
            async for bundle in call:
                try:
                    self._take_trust(bundle, first)
                except ValueError as error:
                    _log.error("trust bundle refused, the last good one stays", extra={"sequence": bundle.sequence, "error": str(error)})
                    raise
                first = False
                if not self.connected.is_set():
                    _log.info("identity service connected", extra={"sequence": bundle.sequence})
                self.offered, self.denied, self.last_error, self._channel = True, False, "", channel
                self.connected.set()
                backoff.reset()
        finally:
            call.cancel()

    async def _connect(self) -> grpc.aio.Channel:
        tls = self._config.tls
        if tls is None:
            raise ValueError("there are no credentials for the controller")
        ca, key, certificate = await asyncio.to_thread(tls.read)
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)
        return grpc.aio.secure_channel(self._config.controller, credentials, options=(*OPTIONS, *self._config.channel_options))

    async def renew(self, csr: bytes) -> pb.JoinResponse:
        """Get a new certificate for this node. Raises Away or Refused."""
        answer: pb.JoinResponse = await self._call("Renew", pb.RenewRequest(csr=csr))
        return answer

    async def sign(self, requests: Sequence[tuple[str, bytes]]) -> Sequence[pb.Signed]:
        """Get certificates for (workload, CSR), one answer each. Raises Away or Refused."""
        request = pb.SignRequest(workloads=[pb.WorkloadCsr(workload=name, csr=csr) for name, csr in requests])
        answer: pb.SignResponse = await self._call("Sign", request)
        if len(answer.workloads) != len(requests):
            raise Refused(f"the controller gave {len(answer.workloads)} answers to {len(requests)} requests")
        return answer.workloads

    async def sign_jwt(self, workload: str, audience: Sequence[str]) -> pb.SignJwtResponse:
        """Get a JWT-SVID. Raises Away or Refused."""
        answer: pb.SignJwtResponse = await self._call("SignJwt", pb.SignJwtRequest(workload=workload, audience=audience))
        return answer

    async def _call(self, method: str, request: Any) -> Any:
        channel = self._channel
        if channel is None:
            raise Away(f"controller {self._config.controller} is away{': ' + self.last_error if self.last_error else ''}")
        try:
            call = getattr(_stub(channel), method)(request, timeout=limits.CALL_S)
        except (grpc.aio.UsageError, asyncio.InvalidStateError) as error:  # the channel was closed meanwhile
            raise Away(words(error)) from error
        try:
            code = await call.code()  # and not the call itself, which looks cancelled from outside when its channel is closed
        except asyncio.CancelledError:
            call.cancel()
            raise
        if code is not grpc.StatusCode.OK:
            kind = Away if code in _PASSING else Refused
            raise kind(f"{code.name.lower().replace('_', ' ')}: {' '.join((await call.details() or 'no details').split())[:300]}")
        return await call


_PASSING: Final = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
}
"""What goes away by itself."""


def _stub(channel: grpc.aio.Channel) -> Any:
    return identity_pb2_grpc.IdentityStub(channel)


def words(error: Exception) -> str:
    """What went wrong, on one line."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name.lower().replace('_', ' ')}: {' '.join((error.details() or 'no details').split())[:300]}"
    return " ".join(str(error).split())[:300] or type(error).__name__
