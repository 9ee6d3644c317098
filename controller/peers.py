"""Who is calling: a unix socket (file permissions decide) or a client certificate. Asked by the discovery and admin services."""

from __future__ import annotations

from typing import Any

import grpc
from cryptography import x509


class NotAllowed(Exception):
    """The caller may not do this; the text says why."""


def is_local(context: grpc.aio.ServicerContext[Any, Any]) -> bool:
    """True if the caller came through the unix socket, which only its owner may open (mode 0600)."""
    return context.peer().startswith("unix:")


def _certificate(context: grpc.aio.ServicerContext[Any, Any]) -> x509.Certificate | None:
    pem = list(context.auth_context().get("x509_pem_cert", []))
    return x509.load_pem_x509_certificate(bytes(pem[0])) if pem else None


def serial(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Serial number of the verified client certificate, hexadecimal; "" without one."""
    certificate = _certificate(context)
    return "" if certificate is None else f"{certificate.serial_number:x}"


def uris(context: grpc.aio.ServicerContext[Any, Any]) -> list[str]:
    """URI names of the verified client certificate (RFC 5280, 4.2.1.6); empty without one."""
    certificate = _certificate(context)
    if certificate is None:
        return []
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def require(context: grpc.aio.ServicerContext[Any, Any], uri: str) -> None:
    """Raise NotAllowed unless the caller is local or its certificate names `uri`."""
    if is_local(context):
        return
    found = uris(context)
    if uri not in found:
        raise NotAllowed(f"the client certificate must name {uri}; it names {', '.join(found) or 'no URI'}")
