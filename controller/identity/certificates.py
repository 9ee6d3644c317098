"""X.509 as this mesh makes it: roots, X.509-SVIDs and revocation lists. Pure; called by the signers and the certificate authority.

X.509-SVIDs follow https://github.com/spiffe/spiffe/blob/main/standards/X509-SVID.md: exactly one URI name, no subject (so the names are critical, RFC
5280, 4.1.2.6), keyUsage digitalSignature and critical, extendedKeyUsage for servers and clients, no CA.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from controller.identity.names import root_id, serial_allowed
from controller.identity.refusals import SigningFailed

BACKDATE_S: Final = 300  # clocks of peers are 5 to 30 s off in practice
ROOT_LIFETIME_S: Final = 10 * 365 * 86_400
_ROOT_BACKDATE_S: Final = 3600
MAX_CHAIN: Final = 8  # signing certificates that are looked at between a leaf and its root

SigningKey: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
Chain: TypeAlias = tuple[x509.Certificate, ...]
"""Leaf first, without the root."""


@dataclass(frozen=True, slots=True)
class Issuer:
    """A signing certificate and its key. `above`: what stands between it and the root, itself included; nothing if it is the root."""

    certificate: x509.Certificate
    key: SigningKey
    above: Chain = ()


@dataclass(frozen=True, slots=True)
class Order:
    """One certificate that is to be made. `csr` is DER and only its key counts; `names` and `addresses` are for the controller itself."""

    spiffe_id: str
    key: ec.EllipticCurvePublicKey
    csr: bytes
    lifetime_s: int
    node: str = ""
    names: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    alone: bool = False
    """Only if no other certificate for this name is in force when it goes on record."""
    knew: int | None = None
    """The newest revocation of the node (`revocations.newest`) that was known when this was granted; None: all that the controller knows when it signs."""
    asker: str = ""
    """Serial number of the certificate with which it was asked for; what was known when that was granted counts as known."""


def moment(unix: float) -> dt.datetime:
    """Return a time as X.509 has it: UTC, whole seconds."""
    return dt.datetime.fromtimestamp(int(unix), dt.timezone.utc)


def new_key() -> ec.EllipticCurvePrivateKey:
    """Make a P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def new_root(trust_domain: str, now: float) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Make a root that may sign nothing but leaves and lists, and that is an SVID without a path (X509-SVID, 3.2)."""
    key = new_key()
    digest = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # Two roots must not share a name: verifiers that look issuers up by name would find the wrong one.
    common = f"meshagent root {digest.digest.hex()[:8]}"
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, trust_domain[:64]),  # RFC 5280, appendix A: ub-organization-name is 64
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(moment(now - _ROOT_BACKDATE_S))
        .not_valid_after(moment(now + ROOT_LIFETIME_S))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs=True), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(root_id(trust_domain))]), critical=False)
        .add_extension(digest, critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate, key


def new_leaf(issuer: Issuer, order: Order, now: float) -> Chain:
    """Make an X.509-SVID; it does not outlive its issuer. Raises SigningFailed if the issuer has run out, or is from the future."""
    if moment(now) < issuer.certificate.not_valid_before_utc:
        raise SigningFailed(
            f"the signing certificate is valid from {issuer.certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on, and now is "
            f"{moment(now):%Y-%m-%d %H:%M}: set the clock of this machine, or make a new root (mesh-controller ca rotate)"
        )
    until = min(moment(now + order.lifetime_s), issuer.certificate.not_valid_after_utc)
    if until <= moment(now):
        raise SigningFailed(
            f"the signing certificate ran out on {issuer.certificate.not_valid_after_utc:%Y-%m-%d}: rotate it (mesh-controller ca show)"
        )
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(order.spiffe_id)]
    names += [x509.DNSName(name) for name in order.names]
    names += [x509.IPAddress(ipaddress.ip_address(address)) for address in order.addresses]
    certificate = (
        x509.CertificateBuilder(issuer.certificate.subject, x509.Name([]), order.key, x509.random_serial_number())
        .not_valid_before(moment(now - BACKDATE_S))
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(order.key), critical=False)
        .add_extension(_authority(issuer.certificate), critical=False)
        .sign(issuer.key, hashes.SHA256())
    )
    return (certificate, *issuer.above)


def new_crl(issuer: Issuer, revoked: Iterable[tuple[int, int]], number: int, now: float, until: float) -> bytes:
    """Return the revocation list of one issuer, PEM. `revoked`: (serial number, when: Unix seconds). RFC 5280, 5."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(moment(now - BACKDATE_S))
        .next_update(moment(until))
        .add_extension(_authority(issuer.certificate), critical=False)
        .add_extension(x509.CRLNumber(number), critical=False)
    )
    for serial, when in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(moment(when)).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(issuer.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def check_chain(chain: Sequence[x509.Certificate], roots: Iterable[x509.Certificate], now: float) -> x509.Certificate:
    """Return the root at which a chain (leaf first) ends. Raises ValueError, which says where it breaks."""
    upper = list(chain[1:])
    for above in upper:
        if not _signs(above):
            raise ValueError(f"{above.subject.rfc4514_string()} in the chain is no signing certificate")
    for lower, above in zip(chain, upper, strict=False):
        if not issued(lower, above):
            raise ValueError(f"{above.subject.rfc4514_string()} did not sign what stands before it in the chain")
    for certificate in chain:
        if not certificate.not_valid_before_utc <= moment(now) <= certificate.not_valid_after_utc:
            raise ValueError(
                f"serial {certificate.serial_number:x} is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} "
                f"to {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, and now is {moment(now):%Y-%m-%d %H:%M}"
            )
    for root in roots:
        if chain[-1] == root or issued(chain[-1], root):
            return root
    raise ValueError("the chain does not lead to a root that is trusted")


def check_svid(chain: Chain, order: Order, roots: Iterable[x509.Certificate], now: float) -> None:
    """Raise ValueError unless a foreign signer made exactly what was ordered: it must not be able to give anybody more."""
    leaf = chain[0]
    if not serial_allowed(leaf.serial_number):
        raise ValueError("the certificate's serial number is not between 1 and 2^159 (RFC 5280, 4.1.2.2): it could not be revoked")
    if leaf.public_key() != order.key:
        raise ValueError("the certificate is for another key")
    try:
        extensions = leaf.extensions
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        usage = extensions.get_extension_for_class(x509.KeyUsage)
        purposes = set(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound as error:
        raise ValueError(f"the certificate has no {getattr(error.oid, '_name', error.oid)}") from error
    except (x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise ValueError(f"the certificate's extensions cannot be read: {error}") from error
    expected: set[x509.GeneralName] = {x509.UniformResourceIdentifier(order.spiffe_id)}
    expected |= {x509.DNSName(name) for name in order.names}
    expected |= {x509.IPAddress(ipaddress.ip_address(address)) for address in order.addresses}
    if set(names) != expected or len(list(names)) != len(expected):
        raise ValueError(f"the certificate names {', '.join(str(name.value) for name in names) or 'nothing'} instead of {order.spiffe_id}")
    if _signs(leaf) or usage.value.key_cert_sign or usage.value.crl_sign:
        raise ValueError("the certificate may sign others")
    if not usage.critical or not usage.value.digital_signature:
        raise ValueError("the certificate's keyUsage must be critical and digitalSignature (X509-SVID, 4.3)")
    if purposes != {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}:
        raise ValueError("the certificate's extendedKeyUsage must be serverAuth and clientAuth (X509-SVID, 4.4)")
    if leaf.not_valid_after_utc > moment(now + order.lifetime_s + BACKDATE_S):
        raise ValueError(f"the certificate is valid until {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, longer than --svid-lifetime")
    check_chain(chain, roots, now)


def pem(certificates: Iterable[x509.Certificate]) -> bytes:
    """Return certificates as PEM, one after the other."""
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)


def key_pem(key: SigningKey) -> bytes:
    """Return a private key as unencrypted PEM: for the CA file and for gRPC, nothing else."""
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def may_sign(certificate: x509.Certificate) -> bool:
    """True for a CA certificate (RFC 5280, 4.2.1.9) whose keyUsage, if it has one, allows to sign certificates."""
    return _signs(certificate)


def _signs(certificate: x509.Certificate) -> bool:
    try:
        extensions = certificate.extensions
        if not extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            return False
        return extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except x509.ExtensionNotFound as error:
        return error.oid == x509.KeyUsage.oid
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return False


def issued(lower: x509.Certificate, above: x509.Certificate) -> bool:
    """True if `above` is the issuer of `lower` and signed it."""
    try:
        lower.verify_directly_issued_by(above)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def vouched(leaf: x509.Certificate, between: Iterable[x509.Certificate], roots: Collection[x509.Certificate]) -> bool:
    """True if one of `roots` signed a certificate, directly or by way of some of `between`, which is in no order and may hold anything."""
    left = [certificate for certificate in between if _signs(certificate)][:MAX_CHAIN]
    reached = [leaf]
    for lower in reached:
        if any(issued(lower, root) for root in roots):
            return True
        above = [certificate for certificate in left if issued(lower, certificate)]
        left = [certificate for certificate in left if certificate not in above]
        reached += above
    return False


def _authority(certificate: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    """RFC 5280, 4.2.1.1: as the issuer spells its own key identifier, which need not be the usual hash."""
    try:
        own = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        key = certificate.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
            raise SigningFailed("the signing certificate's key is neither ECDSA nor RSA") from None
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(key)
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
