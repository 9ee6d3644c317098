"""The SPIFFE Workload API, for whoever the kernel says is calling: https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE_Workload_API.md.

Codes: SPIFFE_Workload_Endpoint.md, 6. Whose identity a call is about follows from the caller's network namespace at each message, not only at the first: a
workload that is no longer enrolled loses its streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, NoReturn, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from agent.config import Config
from agent.errors import EnvironmentUnfit
from agent.identity import jwt
from agent.identity.authority import Away, Refused
from agent.identity.callers import Callers
from agent.identity.door import Door
from agent.identity.service import Identity
from agent.identity.trust import Trust, jwks
from meshapi import workload_pb2 as pb
from meshapi import workload_pb2_grpc

_log = logging.getLogger(__name__)

HEADER: Final = ("workload.spiffe.io", "true")
PATIENCE_S: Final = 3.0
"""How long a caller waits for a certificate that is being signed, before it is told to come back."""
MAX_REQUEST: Final = 1 << 16
MAX_AUDIENCES: Final = 16
MAX_AUDIENCE: Final = 1024
MAX_STREAMS: Final = 32
STOP_GRACE_S: Final = 0.2
RETRY_S: Final = 30.0
SAY_EVERY_S: Final = 1.0

_T = TypeVar("_T", bound=Message)
Context = grpc.aio.ServicerContext[Any, Any]


class _Gone(Exception):
    """A caller gets nothing: with this code, for this reason."""

    def __init__(self, code: grpc.StatusCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def _decoder(kind: type[Message]) -> Callable[[bytes], Message]:
    """Something that is no request is an empty one: it asks for nothing, or lacks what it has to say."""

    def decode(content: bytes) -> Message:
        try:
            return kind.FromString(content)
        except DecodeError:
            return kind()

    return decode


class WorkloadApi(workload_pb2_grpc.SpiffeWorkloadAPIServicer):
    """See the module. Belongs to one event loop."""

    def __init__(self, config: Config, identity: Identity) -> None:
        """Touch nothing yet."""
        self._config = config
        self._identity = identity
        self._door = Door(config.workload_socket, config.identity_dir / "door", Callers(config.cgroup, identity.local))
        self._stopping = False
        self._said_at = -SAY_EVERY_S
        self.refused = 0
        """Calls that were denied: nobody's, or not of a workload."""
        identity.callers_refused = lambda: self.refused + self._door.turned_away

    async def run(self) -> None:
        """Serve from the moment there is something to serve until cancelled."""
        await self._identity.active.wait()
        while True:
            try:
                await self._serve()
            except EnvironmentUnfit as error:  # nothing else on this node depends on it
                if str(error) != self._identity.socket_problem:
                    _log.error("workloads cannot ask for their identities, trying again", extra={"reason": str(error)})
                self._identity.socket_problem = str(error)
            await asyncio.sleep(RETRY_S)

    async def _serve(self) -> None:
        await asyncio.to_thread(self._door.prepare)
        server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MAX_REQUEST),
                ("grpc.max_concurrent_streams", MAX_STREAMS),
            ]
        )
        server.add_generic_rpc_handlers((self._handlers(),))
        try:
            server.add_insecure_port(f"unix:{self._door.inner_socket}")
        except RuntimeError as error:
            raise EnvironmentUnfit(f"cannot listen on {self._door.inner_socket}: {error}") from error
        await server.start()
        _log.info("workloads can ask for their identities", extra={"socket": str(self._config.workload_socket)})
        self._identity.socket_problem = ""
        try:
            await self._door.run()
        finally:
            self._stopping = True
            self._identity.wake()
            await server.stop(STOP_GRACE_S)
            self._config.workload_socket.unlink(missing_ok=True)  # the directory stays: containers have it mounted

    def _handlers(self) -> grpc.GenericRpcHandler:
        """What the generated code does, but for requests that cannot be decoded: with it each would leave a traceback in the log."""
        service = pb.DESCRIPTOR.services_by_name["SpiffeWorkloadAPI"]
        methods = {}
        for method in service.methods:
            request = getattr(pb, method.input_type.name)
            make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
            methods[method.name] = make(
                getattr(self, method.name), _decoder(request), getattr(pb, method.output_type.name).SerializeToString
            )
        return grpc.method_handlers_generic_handler(service.full_name, methods)

    def _workload(self, context: Context) -> str:
        """Who is calling, NAMESPACE/NAME. Raises _Gone."""
        metadata = dict(context.invocation_metadata() or ())
        if metadata.get(HEADER[0]) != HEADER[1]:
            raise _Gone(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"the metadata {HEADER[0]}: {HEADER[1]} is missing, as a client of the Workload API sends it",
            )
        caller = self._door.caller(context.peer())
        local = None if caller.refused else self._identity.local(caller.netns_cookie)
        if local is None:
            reason = caller.refused or f"process {caller.pid} is in no network namespace of an enrolled workload any more"
            raise _Gone(grpc.StatusCode.PERMISSION_DENIED, f"no identity: {reason}")
        return local.workload.name

    def _trust(self) -> Trust:
        trust = self._identity.trust
        if trust is None:
            raise _Gone(grpc.StatusCode.UNAVAILABLE, "the controller has not said yet who is to be trusted")
        return trust

    async def _abort(self, context: Context, gone: _Gone) -> NoReturn:
        if gone.code is grpc.StatusCode.PERMISSION_DENIED:
            self.refused += 1
            now = asyncio.get_running_loop().time()
            if now >= self._said_at + SAY_EVERY_S:  # a workload must not fill the log
                self._said_at = now
                _log.info("a call of the workload socket was denied", extra={"reason": str(gone), "since_start": self.refused})
        await context.abort(gone.code, str(gone))
        raise AssertionError  # abort raises

    async def _follow(self, context: Context, answer: Callable[[str], _T | None]) -> AsyncIterator[_T]:
        """Yield what `answer` says of the caller, now and each time it says something else; None from it: not yet, or no longer."""
        try:
            async for found in self._updates(context, answer):
                yield found
        except _Gone as gone:
            await self._abort(context, gone)

    async def _updates(self, context: Context, answer: Callable[[str], _T | None]) -> AsyncIterator[_T]:
        loop = asyncio.get_running_loop()
        end = loop.time() + PATIENCE_S
        last: _T | None = None
        with self._identity.watch() as news:
            while True:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(news.wait(), max(0.0, end - loop.time()) if last is None else None)
                news.clear()
                if self._stopping:
                    raise _Gone(grpc.StatusCode.UNAVAILABLE, "the agent is ending")
                workload = self._workload(context)
                found = answer(workload)
                if found is None and (last is not None or loop.time() >= end):
                    standing = self._identity.standing(workload)
                    why = standing.problem if standing is not None else ""
                    raise _Gone(grpc.StatusCode.UNAVAILABLE, f"workload {workload} has no certificate{': ' + why if why else ' yet'}")
                if found is not None and found != last:
                    last = found
                    yield found

    async def FetchX509SVID(self, request: pb.X509SVIDRequest, context: Context) -> AsyncIterator[pb.X509SVIDResponse]:  # noqa: ARG002, N802  gRPC's names
        """The caller's certificate and key, and whom to believe."""

        def answer(workload: str) -> pb.X509SVIDResponse | None:
            svid, trust = self._identity.svid(workload), self._trust()
            if svid is None:
                return None
            one = pb.X509SVID(
                spiffe_id=svid.chain.spiffe_id,
                x509_svid=b"".join(svid.chain.der),
                x509_svid_key=svid.key.der(),
                bundle=b"".join(trust.roots),
            )
            return pb.X509SVIDResponse(svids=[one], crl=trust.crls_der)

        async for found in self._follow(context, answer):
            yield found

    async def FetchX509Bundles(  # noqa: N802
        self,
        request: pb.X509BundlesRequest,  # noqa: ARG002
        context: Context,
    ) -> AsyncIterator[pb.X509BundlesResponse]:
        """Whom to believe."""

        def answer(_workload: str) -> pb.X509BundlesResponse:
            trust = self._trust()
            return pb.X509BundlesResponse(crl=trust.crls_der, bundles={f"spiffe://{trust.trust_domain}": b"".join(trust.roots)})

        async for found in self._follow(context, answer):
            yield found

    async def FetchJWTBundles(  # noqa: N802
        self,
        request: pb.JWTBundlesRequest,  # noqa: ARG002
        context: Context,
    ) -> AsyncIterator[pb.JWTBundlesResponse]:
        """The keys that sign JWT-SVIDs."""

        def answer(_workload: str) -> pb.JWTBundlesResponse:
            trust = self._trust()
            return pb.JWTBundlesResponse(bundles={f"spiffe://{trust.trust_domain}": trust.jwt_keys})

        async for found in self._follow(context, answer):
            yield found

    async def FetchJWTSVID(self, request: pb.JWTSVIDRequest, context: Context) -> pb.JWTSVIDResponse:  # noqa: N802
        """A token for the caller's identity."""
        try:
            return await self._token(request, context)
        except _Gone as gone:
            await self._abort(context, gone)

    async def _token(self, request: pb.JWTSVIDRequest, context: Context) -> pb.JWTSVIDResponse:
        workload = self._workload(context)
        audience = list(request.audience)
        if not 1 <= len(audience) <= MAX_AUDIENCES or not all(1 <= len(one) <= MAX_AUDIENCE for one in audience):
            raise _Gone(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"give 1 to {MAX_AUDIENCES} audiences of 1 to {MAX_AUDIENCE} characters for whom the token is",
            )
        standing = self._identity.standing(workload)
        if standing is None or request.spiffe_id not in {"", standing.spiffe_id}:
            raise _Gone(grpc.StatusCode.PERMISSION_DENIED, f"no identity: workload {workload} is not {request.spiffe_id[:256]!r}")
        try:
            token = await self._identity.sign_jwt(workload, audience)
        except Away as error:
            raise _Gone(grpc.StatusCode.UNAVAILABLE, str(error)) from error
        except Refused as error:
            raise _Gone(grpc.StatusCode.PERMISSION_DENIED, f"the controller signs no token for workload {workload}: {error}") from error
        if self._workload(context) != workload:
            raise _Gone(grpc.StatusCode.PERMISSION_DENIED, "no identity: the workload has changed meanwhile")
        return pb.JWTSVIDResponse(svids=[pb.JWTSVID(spiffe_id=standing.spiffe_id, svid=token)])

    async def ValidateJWTSVID(self, request: pb.ValidateJWTSVIDRequest, context: Context) -> pb.ValidateJWTSVIDResponse:  # noqa: N802
        """What somebody's token says, if it is to be believed."""
        try:
            return self._validated(request, context)
        except _Gone as gone:
            await self._abort(context, gone)

    def _validated(self, request: pb.ValidateJWTSVIDRequest, context: Context) -> pb.ValidateJWTSVIDResponse:
        self._workload(context)
        trust = self._trust()
        if not request.audience or not request.svid:
            raise _Gone(grpc.StatusCode.INVALID_ARGUMENT, "give the token, and the audience that the validator is")
        try:
            claims = jwt.validate(request.svid, [request.audience], jwks(trust.jwt_keys), trust.trust_domain, self._identity.now())
            answer = pb.ValidateJWTSVIDResponse(spiffe_id=claims.spiffe_id)
            answer.claims.update(claims.all)
        except (ValueError, RecursionError) as error:
            raise _Gone(grpc.StatusCode.INVALID_ARGUMENT, f"the token does not hold: {error}") from error
        return answer
