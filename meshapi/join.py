"""The text form of a join token, which the controller makes and an agent is given: a secret, and the root that the agent has to find.

    mesh1.<secret, base64url without padding>.<SHA-256 of the root's SubjectPublicKeyInfo, 64 hexadecimal digits>

The secret proves the node to the controller; the hash proves the controller to the node, which has no other way to know it, as with the
`--discovery-token-ca-cert-hash` of kubeadm (https://kubernetes.io/docs/reference/setup-tools/kubeadm/kubeadm-join/). The service presents the root itself
at the end of its TLS chain: what has that hash there is what everything else is checked against.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from cryptography import x509

PREFIX: Final = "mesh1"
PORT: Final = 15011
"""Of the Join service, beside discovery (15010)."""
CONTROLLER_NAME: Final = "mesh-controller"
"""DNS name in every certificate that a mesh's authority makes for a controller, and in no other: a node that joined expects it, whatever it dials."""
SECRET_BYTES: Final = 16
"""At least: 128 bits cannot be guessed."""
AUDIENCE: Final = "meshagent"
"""Whom a Kubernetes service-account token has to be projected for."""
_FORM: Final = re.compile(r"mesh1\.([A-Za-z0-9_-]{22,342})\.([0-9a-f]{64})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Token:
    """A join token. `root_hash`: lower-case hexadecimal digits. The secret does not show in its repr."""

    secret: bytes = field(repr=False)
    root_hash: str

    def __str__(self) -> str:
        """The text form."""
        return f"{PREFIX}.{base64.urlsafe_b64encode(self.secret).rstrip(b'=').decode()}.{self.root_hash}"


def parse(text: str) -> Token:
    """The token in `text`, which may stand between white space. Raises ValueError, which never holds any of the text."""
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise ValueError("not a join token: it looks like mesh1.SECRET.HASH and comes from `mesh-controller token create`")
    encoded, root_hash = found.groups()
    try:
        secret = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except binascii.Error:
        secret = b""
    token = Token(secret, root_hash)
    if len(secret) < SECRET_BYTES or str(token) != text.strip():
        raise ValueError("not a join token: its secret is cut off or damaged; copy all of what `mesh-controller token create` printed")
    return token


def root_hash(root: x509.Certificate) -> str:
    """What a token says of a root: the SHA-256 of its SubjectPublicKeyInfo (RFC 7469, 2.4), in hexadecimal digits.

    Of the key and not of the certificate, so that a root that is signed again with its key stays the same.
    """
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat  # noqa: PLC0415  every command imports this module

    return hashlib.sha256(root.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
