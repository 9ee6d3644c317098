"""What every agent is told to trust: the newest bundle, a way to wait for a newer one, and its sequence number across restarts (trust.json).

Published by `controller.identity.ca`, streamed by `controller.identity.service`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from controller.identity import fields
from controller.identity.certificates import pem
from controller.identity.directory import TRUST
from controller.identity.fields import BadState
from controller.store import Store
from meshapi import identity_pb2 as pb
from meshapi.join import root_hash

_FIELDS: Final = ("sequence", "digest", "signing", "roots")


@dataclass(frozen=True, slots=True)
class Known:
    """What trust.json says: `signing` is the hash of the root at the end of the controller's own chain, which join tokens carry; `roots` are PEM."""

    sequence: int
    digest: str
    signing: str
    roots: str


def read(store: Store) -> Known | None:
    """Return what trust.json says; None without one. Raises ControllerError."""
    content = store.read(TRUST)
    if content is None:
        return None
    try:
        return parse(content)
    except BadState as error:
        raise fields.refuse(store.where(TRUST), error, "or delete it: the controller writes it anew") from error


def parse(content: bytes) -> Known:
    """Return what a trust.json holds. Raises BadState."""
    record = fields.only(fields.parse(content), _FIELDS)
    digest, signing, roots = (fields.field(record, name, str) for name in ("digest", "signing", "roots"))
    try:
        if not x509.load_pem_x509_certificates(roots.encode()):
            raise BadState("it holds no root")
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise BadState("its roots cannot be read") from error
    return Known(fields.field(record, "sequence", int), digest, signing, roots)


def number(known: Known | None, bundle: pb.TrustBundle, signing: str, now: float) -> Known:
    """Give a bundle its sequence number: the same as before for the same content, otherwise a higher one, also if trust.json was lost."""
    bundle.sequence = 0
    digest = hashlib.sha256(bundle.SerializeToString(deterministic=True)).hexdigest()
    if known is not None and known.digest == digest:
        bundle.sequence = known.sequence
    else:
        bundle.sequence = max(known.sequence + 1 if known else 1, int(now))
    roots = [x509.load_der_x509_certificate(encoded) for encoded in bundle.roots]
    return Known(bundle.sequence, digest, signing, pem(roots).decode())


def write(store: Store, known: Known) -> None:
    """Replace trust.json. Raises ControllerError."""
    store.change(lambda documents: documents.write(TRUST, json.dumps(asdict(known), indent=1) + "\n"))


def serial_bytes(serial: str) -> bytes:
    """Return a hexadecimal serial number as the bundle has it: big endian, no leading zeros."""
    found = int(serial, 16)
    return found.to_bytes(max(1, (found.bit_length() + 7) // 8), "big")


class Publication:
    """The newest bundle. Used in the event loop only."""

    def __init__(self) -> None:
        self.current = pb.TrustBundle()
        self.roots: frozenset[str] = frozenset()
        """Hashes of the roots in `current`."""
        self._changed = asyncio.Event()

    def publish(self, bundle: pb.TrustBundle, roots: Sequence[x509.Certificate]) -> None:
        """Make `bundle` the newest and wake everybody who waits."""
        self.current = bundle
        self.roots = frozenset(root_hash(root) for root in roots)
        self._changed.set()
        self._changed = asyncio.Event()

    async def newer_than(self, sequence: int) -> pb.TrustBundle:
        """Return the newest bundle as soon as its sequence is greater; what came between is skipped."""
        while self.current.sequence <= sequence:
            await self._changed.wait()
        return self.current

    @property
    def changed(self) -> asyncio.Event:
        """Is set at the next change, once."""
        return self._changed


def der(certificate: x509.Certificate) -> bytes:
    """Return a certificate as the wire has it."""
    return certificate.public_bytes(serialization.Encoding.DER)
