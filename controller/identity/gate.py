"""Every call over TCP passes here first: a certificate that was revoked, has run out or whose root was forgotten ends it, also a stream that is open.

Put before all services. The handshake alone is not enough: gRPC looks at no revocation list, and a connection outlives the certificate, and the root,
that it began with.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final

import grpc
from cryptography import x509

from controller.identity.ca import CertificateAuthority
from controller.peers import is_local
from controller.waiting import heard

_log = logging.getLogger(__name__)

LOOK_S: Final = 5.0  # how often an open stream's certificate is compared with the clock
Context = grpc.aio.ServicerContext[Any, Any]
_Behaviour = Callable[[Any, Context], Any]


class Gate(grpc.aio.ServerInterceptor):
    """Wraps the handlers of every service of a server."""

    def __init__(self, ca: CertificateAuthority) -> None:
        self._ca = ca

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Return the handler with the check around it; gRPC's form (https://grpc.github.io/grpc/python/grpc_asyncio.html#grpc.aio.ServerInterceptor)."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        codecs = (handler.request_deserializer, handler.response_serializer)
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._once(handler.unary_unary), *codecs)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._throughout(handler.unary_stream), *codecs)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(self._once(handler.stream_unary), *codecs)
        return grpc.stream_stream_rpc_method_handler(self._throughout(handler.stream_stream), *codecs)

    def _once(self, behaviour: _Behaviour) -> _Behaviour:
        async def call(request: Any, context: Context) -> Any:
            await self._check(context)
            response = await behaviour(request, context)
            await self._check(context)  # what took long is not given to somebody who was revoked meanwhile
            return response

        return call

    def _throughout(self, behaviour: _Behaviour) -> _Behaviour:
        async def call(request: Any, context: Context) -> None:
            await self._check(context)
            if is_local(context):
                await _serve(behaviour, request, context)
                return
            work = asyncio.ensure_future(_serve(behaviour, request, context))
            watch = asyncio.ensure_future(self._ended(context))
            try:
                await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    work.result()
                    return
            finally:
                for task in (work, watch):
                    task.cancel()
                await asyncio.gather(work, watch, return_exceptions=True)
            await self._check(context)

        return call

    async def _ended(self, context: Context) -> None:
        """Return when the caller's certificate is not good any more."""
        while not self._objection(context):
            await heard(self._ca.trust.changed, LOOK_S)

    async def _check(self, context: Context) -> None:
        if objection := self._objection(context):
            _log.warning("call refused", extra={"peer": context.peer(), "error": objection})
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, objection)

    def _objection(self, context: Context) -> str:
        """Return why the caller is not believed; "" if it is. The handshake has verified the chain."""
        if is_local(context):
            return ""
        pem = list(context.auth_context().get("x509_pem_cert", []))
        if not pem:
            return "a client certificate is needed: join first"
        certificate = x509.load_pem_x509_certificate(bytes(pem[0]))
        if self._ca.is_revoked(certificate.serial_number):
            return f"the client certificate {certificate.serial_number:x} was revoked: join again, with a new token"
        if self._ca.clock() > certificate.not_valid_after_utc.timestamp():
            return (
                f"the client certificate {certificate.serial_number:x} ran out at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC: renew it or "
                "join again; if it is young, compare the clocks of both machines"
            )
        if self._ca.is_forsaken(certificate, _shown_with(context)):
            return (
                f"the root above the client certificate {certificate.serial_number:x} is not trusted any more: join again, with a new token"
            )
        return ""


def _shown_with(context: Context) -> list[x509.Certificate]:
    """Return what the caller sent besides its certificate (GRPC_X509_PEM_CERT_CHAIN_PROPERTY_NAME, include/grpc/grpc_security_constants.h)."""
    return [one for pem in context.auth_context().get("x509_pem_cert_chain", []) for one in x509.load_pem_x509_certificates(bytes(pem))]


async def _serve(behaviour: _Behaviour, request: Any, context: Context) -> None:
    """Run a streaming handler, whichever of gRPC's two forms it has."""
    if inspect.isasyncgenfunction(behaviour):
        async with aclosing(behaviour(request, context)) as responses:
            async for response in responses:
                await context.write(response)
    else:
        await behaviour(request, context)
