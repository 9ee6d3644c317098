"""What an operator gives in files: an intermediate with its key (`--ca-cert`, `--ca-key`) and trusted roots (`--ca-root`). Read by the certificate authority.

To replace the root above an intermediate, without a dropped connection: put the new root beside the old one into --ca-root; when every agent is
connected, replace --ca-cert and --ca-key; when the old certificates have run out, take the old root out. The files are read again when they change.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from controller.errors import ControllerError
from controller.identity.certificates import Issuer, SigningKey, check_chain, may_sign


@dataclass(frozen=True, slots=True)
class Intermediate:
    """Paths of an operator's intermediate. `certificate` may hold more than one: the way up to the root, the intermediate first."""

    certificate: Path
    key: Path


def read_roots(path: Path) -> tuple[x509.Certificate, ...]:
    """Return the trusted roots in a file. Raises ControllerError."""
    roots = _certificates("--ca-root", path)
    for root in roots:
        if not may_sign(root):
            raise ControllerError(
                f"--ca-root {path}: {root.subject.rfc4514_string()} is no signing certificate (basicConstraints CA, keyUsage keyCertSign): "
                "is it a server's certificate? give the root's"
            )
    return roots


def read_issuer(files: Intermediate, roots: Sequence[x509.Certificate], now: float) -> Issuer:
    """Return the intermediate, ready to sign. Raises ControllerError for whatever would make agents refuse what it signs."""
    chain = tuple(certificate for certificate in _certificates("--ca-cert", files.certificate) if certificate not in roots)
    certificate = chain[0] if chain else _certificates("--ca-cert", files.certificate)[0]
    key = _key(files.key)
    if key.public_key() != certificate.public_key():
        raise ControllerError(
            f"--ca-key {files.key} does not belong to the first certificate of --ca-cert {files.certificate}: swapped files?"
        )
    if not may_sign(certificate):
        raise ControllerError(
            f"--ca-cert {files.certificate} is no signing certificate (basicConstraints CA, keyUsage keyCertSign): ask for an intermediate CA"
        )
    try:
        root = check_chain(chain or (certificate,), roots, now)
    except ValueError as error:
        raise ControllerError(
            f"--ca-cert {files.certificate} cannot be used with --ca-root: {error}; put everything between it and the root into --ca-cert"
        ) from error
    for depth, signing in enumerate((*(chain or (certificate,)), root)):
        if wrong := _forbids(signing, depth if chain else 0):
            raise ControllerError(
                f"{signing.subject.rfc4514_string()} above --ca-cert {files.certificate} {wrong}: Envoy would believe nothing that is signed below it"
            )
    return Issuer(certificate, key, chain)


def _forbids(certificate: x509.Certificate, below: int) -> str:
    """Return why a signing certificate does not allow workloads `below` other signing certificates (RFC 5280, 4.2.1.9 and 4.2.1.12); "" if it does."""
    for extension in certificate.extensions:
        value = extension.value
        if isinstance(value, x509.BasicConstraints) and value.path_length is not None and value.path_length < below:
            return f"allows {value.path_length} signing certificates below it (pathLenConstraint), and there are {below}"
        if isinstance(value, x509.ExtendedKeyUsage):
            missing = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH} - set(value)
            if missing and ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE not in value:
                return "has an extendedKeyUsage without serverAuth and clientAuth"
    return ""


def _key(path: Path) -> SigningKey:
    content = _read("--ca-key", path, private=True)
    try:
        key = load_pem_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ControllerError(
            f"--ca-key {path} is no unencrypted PEM key: cut off, or encrypted? decrypt it with `openssl pkey`"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise ControllerError(f"--ca-key {path} is neither ECDSA nor RSA: Envoy verifies nothing else; ask for an ECDSA P-256 intermediate")
    return key


def _certificates(option: str, path: Path) -> tuple[x509.Certificate, ...]:
    try:
        return tuple(x509.load_pem_x509_certificates(_read(option, path)))
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise ControllerError(f"{option} {path} holds no PEM certificate: cut off, or DER? convert it with `openssl x509`") from error


def _read(option: str, path: Path, *, private: bool = False) -> bytes:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            # The group may read it: that is how Kubernetes mounts secrets for a pod with an fsGroup.
            if private and mode & 0o007:
                raise ControllerError(
                    f"everybody may read {option} {path} (mode {mode:04o}): `chmod 600 {path}`, or defaultMode: 0440 of the secret's volume"
                )
            if mode & 0o002:
                raise ControllerError(
                    f"everybody may write to {option} {path} (mode {mode:04o}), which decides who is believed: make sure that nobody changed it, then "
                    f"`chmod o-w {path}`"
                )
            return file.read(1 << 20)
    except OSError as error:
        raise ControllerError(f"cannot read {option} {path}: {error.strerror}") from error
