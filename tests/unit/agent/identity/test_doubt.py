"""Which peers of open tunnels are believed, by the certificate that they showed when the tunnel was opened."""

from __future__ import annotations

import dataclasses
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from agent.identity.doubt import doubt
from agent.identity.trust import Trust, decode
from meshapi import identity_pb2 as pb
from tests.unit.agent.identity.signer import TRUST_DOMAIN, Root, spiffe_id

ROOT, OLD = Root(), Root(name="old root")


def shown(root: Root = ROOT) -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    return root.sign(key.public_key(), [x509.UniformResourceIdentifier(spiffe_id("near"))])


def trust(*roots: Root, revoked: tuple[int, ...] = ()) -> Trust:
    found = decode(pb.TrustBundle(trust_domain=TRUST_DOMAIN, sequence=1, roots=[root.der for root in roots]), TRUST_DOMAIN)
    return dataclasses.replace(found, revoked=frozenset(revoked))


def asked(
    leaf: x509.Certificate, held: Trust, *, later_s: float = 0, ended: bool = False, between: tuple[x509.Certificate, ...] = ()
) -> str:
    return doubt(leaf.public_bytes(Encoding.PEM), held, between, time.time() + later_s, ended=ended)


@pytest.mark.parametrize("ended", [False, True])
def test_who_is_on_no_list_and_has_a_root_is_believed(ended: bool) -> None:
    assert asked(shown(), trust(OLD, ROOT, revoked=(7,)), ended=ended) == ""


def test_who_is_revoked_is_not() -> None:
    leaf = shown()
    assert asked(leaf, trust(ROOT, revoked=(leaf.serial_number,))) == "its certificate is revoked"


def test_whose_root_is_forgotten_before_the_certificate_has_run_out_is_not() -> None:
    assert asked(shown(OLD), trust(ROOT)) == "no trusted root has signed its certificate"
    assert asked(shown(OLD), trust(OLD, ROOT)) == ""


def test_a_certificate_that_ran_out_is_believed_unless_somebody_was_revoked() -> None:
    """Rotation forgets a root when all that it signed has run out, and connections that are older go on."""
    leaf, day = shown(OLD), 25 * 3600.0
    assert asked(leaf, trust(ROOT), later_s=day) == ""
    assert asked(leaf, trust(ROOT), later_s=day, ended=True) == "its certificate has run out, and may be one of somebody who was revoked"


def test_an_intermediate_vouches_if_this_node_knows_it_and_its_root() -> None:
    between = Root(name="between")
    leaf, signed = shown(between), ROOT.sign(between.key.public_key(), [], ca=True, subject=between.certificate.subject)
    assert asked(leaf, trust(ROOT)) != ""
    assert asked(leaf, trust(ROOT), between=(signed,)) == ""
    assert asked(leaf, trust(OLD), between=(signed,)) != ""


@pytest.mark.parametrize("pem", [b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_what_cannot_be_read_is_not_believed(pem: bytes) -> None:
    assert doubt(pem, trust(ROOT), (), time.time(), ended=False) == "its certificate cannot be read"
