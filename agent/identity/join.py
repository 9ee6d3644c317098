"""How a node that has no certificate gets one: it finds the controller's root, trusts that alone, and shows what proves it.

With a join token the root is found by its hash (`meshapi/join.py`): the service presents its root at the end of its TLS chain, and that connection is used
for nothing else. Whoever is in between can show the same root, but on the second connection, where it is the only one trusted, has to have a key that it
signed, in a certificate with the controller's name. With a Kubernetes service-account token the root is the file of --tls-ca.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from agent.config import Join
from agent.errors import MeshError
from agent.identity.authority import OPTIONS, Away, Refused, words
from meshapi import identity_pb2 as pb
from meshapi import identity_pb2_grpc, join, limits

MAX_TOKEN: Final = 1 << 16
CONNECT_S: Final = 20.0


class CannotJoin(MeshError):
    """What the operator gave does not serve; the message says what to give instead."""


@dataclass(frozen=True, slots=True)
class _Means:
    """How this node proves itself, and how the controller does."""

    request: pb.JoinRequest
    root: bytes | None
    """PEM; None: to be found by its hash."""
    root_hash: str


async def ask(node: str, given: Join, csr: bytes) -> pb.JoinResponse:
    """Join, once. Raises CannotJoin, Away or Refused. The token file is read anew: Kubernetes replaces it, operators too."""
    means = await asyncio.to_thread(_means, node, given)
    means.request.csr = csr
    root = means.root or await _find_root(given.address, means.root_hash)
    options = (*OPTIONS, ("grpc.ssl_target_name_override", join.CONTROLLER_NAME))
    async with grpc.aio.secure_channel(given.address, grpc.ssl_channel_credentials(root), options=options) as channel:
        stub: Any = identity_pb2_grpc.JoinStub(channel)
        try:
            answer: pb.JoinResponse = await stub.Join(means.request, timeout=limits.CALL_S)
        except grpc.aio.AioRpcError as error:
            said = words(error)
            if error.code() in {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT}:
                raise Refused(f"{said}; a token serves once and for one node: make another with `mesh-controller token create`") from error
            raise Away(said) from error
        return answer


def _means(node: str, given: Join) -> _Means:
    if given.service_account_token_file is not None:
        token = _text(given.service_account_token_file)
        if given.root is None:
            raise CannotJoin("a service-account token says nothing about the controller: give its root with --tls-ca")
        try:
            root = given.root.read_bytes()
        except OSError as error:
            raise CannotJoin(f"cannot read {given.root}: {error.strerror}; it holds the controller's root") from error
        if not root.strip():
            raise CannotJoin(f"{given.root} is empty: it holds the controller's root")
        return _Means(pb.JoinRequest(node=node, service_account_token=token), root, "")
    text = _text(given.token_file) if given.token_file is not None else given.token
    try:
        parsed = join.parse(text)
    except ValueError as error:
        raise CannotJoin(f"{given.token_file or 'MESHAGENT_JOIN_TOKEN'}: {error}") from error
    return _Means(pb.JoinRequest(node=node, token=str(parsed)), None, parsed.root_hash)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_TOKEN).decode("ascii").strip()
    except OSError as error:
        raise CannotJoin(f"cannot read the token file {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise CannotJoin(f"{path} holds no token: it is not text") from None


async def _find_root(address: str, root_hash: str) -> bytes:
    """The root with this hash among what the service presents, PEM. Raises Away, or CannotJoin if it presents another one."""
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent, and of what is received only the certificate with the right hash is used
    context.set_alpn_protocols(["h2"])
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host.strip("[]"), int(port), ssl=context), CONNECT_S)
    except (OSError, ValueError, asyncio.TimeoutError) as error:
        raise Away(f"join service {address}: {words(error)}; does the controller serve it, and is this its port?") from error
    try:
        presented = _presented(writer.get_extra_info("ssl_object"))
    finally:
        writer.transport.abort()
    for der in presented:
        try:
            certificate = x509.load_der_x509_certificate(der)
            if join.root_hash(certificate) == root_hash:
                return certificate.public_bytes(Encoding.PEM)
        except Exception:  # noqa: BLE001, S112  not a certificate that can be meant
            continue
    raise CannotJoin(
        f"join service {address} does not have the root that the token names: the token is of another controller, its root was replaced since, "
        "or somebody is in between; make a new token there"
    )


def _presented(connection: Any) -> list[bytes]:
    """The chain as the peer sent it, DER. Python has a public name for it since 3.13 (https://docs.python.org/3.13/library/ssl.html)."""
    if hasattr(connection, "get_unverified_chain"):
        return list(connection.get_unverified_chain())
    inner = connection._sslobj  # noqa: SLF001
    return [one.public_bytes(_DER) for one in inner.get_unverified_chain() or ()]


_DER: Final = 2
"""_ssl.ENCODING_DER, Modules/_ssl.c: X509_FILETYPE_ASN1."""
