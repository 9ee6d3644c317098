from __future__ import annotations

import contextlib

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import AttributeOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.identity.csr import MAX_BYTES, public_key
from controller.identity.refusals import Refused
from tests.unit.controller.identity.harness import new_key, request

BUILDER = x509.CertificateSigningRequestBuilder(x509.Name([]))


def der(built: x509.CertificateSigningRequest) -> bytes:
    return built.public_bytes(serialization.Encoding.DER)


def foreign_signature() -> bytes:
    """A request whose signature is another request's."""
    one, other = request(new_key()), request(new_key())
    signature = x509.load_der_x509_csr(other).signature
    own = x509.load_der_x509_csr(one).signature
    return one.replace(own, signature[: len(own)].ljust(len(own), b"\0")) if len(own) == len(signature) else foreign_signature()


def named(*names: x509.GeneralName) -> bytes:
    return der(BUILDER.add_extension(x509.SubjectAlternativeName(names), critical=True).sign(new_key(), hashes.SHA256()))


def test_the_key_of_a_good_request_is_taken_and_its_subject_is_not_looked_at() -> None:
    key = new_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "spiffe://mesh.local/ns/shop/sa/admin")])
    for csr in (request(key), request(key, subject)):
        assert public_key(csr) == key.public_key()


@pytest.mark.parametrize(
    ("csr", "reason"),
    [
        pytest.param(b"", "csr-garbage", id="empty"),
        pytest.param(b"\x30\x82" + b"\xff" * 99, "csr-garbage", id="garbage"),
        pytest.param(request(new_key())[:-1], "csr-garbage", id="cut off"),
        pytest.param(request(new_key()) + b"\0", "csr-garbage", id="something after it"),
        pytest.param(b"\0" * (MAX_BYTES + 1), "csr-size", id="oversize"),
        pytest.param(
            named(x509.UniformResourceIdentifier("spiffe://mesh.local/ns/shop/sa/admin")), "csr-extensions", id="foreign identity"
        ),
        pytest.param(named(x509.DNSName("mesh-controller")), "csr-extensions", id="DNS name"),
        pytest.param(
            der(BUILDER.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(new_key(), hashes.SHA256())),
            "csr-extensions",
            id="wants to be a CA",
        ),
        pytest.param(
            der(BUILDER.add_attribute(AttributeOID.CHALLENGE_PASSWORD, b"x").sign(new_key(), hashes.SHA256())),
            "csr-extensions",
            id="attribute",
        ),
        pytest.param(der(BUILDER.sign(rsa.generate_private_key(65537, 2048), hashes.SHA256())), "csr-key", id="RSA"),
        pytest.param(der(BUILDER.sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256())), "csr-key", id="P-384"),
        pytest.param(der(BUILDER.sign(ec.generate_private_key(ec.SECP256K1()), hashes.SHA256())), "csr-key", id="secp256k1"),
        pytest.param(der(BUILDER.sign(ed25519.Ed25519PrivateKey.generate(), None)), "csr-key", id="Ed25519"),
        pytest.param(foreign_signature(), "csr-signature", id="signed by another key"),
        pytest.param(der(BUILDER.sign(new_key(), hashes.SHA224())), "csr-signature", id="weak hash"),
    ],
)
def test_a_bad_request_is_refused_by_name(csr: bytes, reason: str) -> None:
    with pytest.raises(Refused) as caught:
        public_key(csr)
    assert caught.value.reason == reason


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_do_anything_but_being_refused(content: bytes) -> None:
    with pytest.raises(Refused):
        public_key(content)


GOOD = named(x509.DNSName("a")), request(new_key()), der(BUILDER.sign(rsa.generate_private_key(65537, 2048), hashes.SHA256()))


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(GOOD), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_requests_are_refused_or_still_signed_by_their_key(good: bytes, damage: list[tuple[int, int]]) -> None:
    content = bytearray(good)
    for where, what in damage:
        content[where % len(content)] = what
    with contextlib.suppress(Refused):
        assert public_key(bytes(content)) == x509.load_der_x509_csr(bytes(content)).public_key()
