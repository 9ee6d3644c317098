from __future__ import annotations

import datetime as dt
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID

from controller.identity import certificates
from controller.identity.certificates import Issuer, Order, check_chain, check_svid, new_crl, new_leaf, new_root
from controller.identity.refusals import SigningFailed
from tests.unit.controller.identity.harness import new_key, request, uris

NOW = 1_800_000_000.0
ID = "spiffe://mesh.local/ns/shop/sa/cart"


def order(**changes: object) -> Order:
    key = new_key()
    return replace(Order(ID, key.public_key(), request(key), 86_400), **changes)  # type: ignore[arg-type]


def issuer(now: float = NOW) -> Issuer:
    return Issuer(*new_root("mesh.local", now))


def test_an_svid_is_what_the_standard_says_field_by_field() -> None:
    root, wanted = issuer(), order()
    (leaf,) = new_leaf(root, wanted, NOW)
    extensions = {item.oid: item for item in leaf.extensions}
    assert list(leaf.subject) == []
    names = extensions[x509.SubjectAlternativeName.oid]
    assert (list(names.value), names.critical) == ([x509.UniformResourceIdentifier(ID)], True)
    usage = extensions[x509.KeyUsage.oid]
    assert usage.critical
    assert [
        name
        for name in ("digital_signature", "key_cert_sign", "crl_sign", "key_encipherment", "key_agreement")
        if getattr(usage.value, name)
    ] == ["digital_signature"]
    assert set(extensions[x509.ExtendedKeyUsage.oid].value) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    constraints = extensions[x509.BasicConstraints.oid]
    assert (constraints.value.ca, constraints.critical) == (False, True)
    assert leaf.not_valid_before_utc.timestamp() == NOW - 300
    assert leaf.not_valid_after_utc.timestamp() == NOW + 86_400
    assert isinstance(leaf.signature_hash_algorithm, hashes.SHA256)
    assert leaf.public_key() == wanted.key
    assert 2**100 < leaf.serial_number < 2**159
    above = root.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    assert extensions[x509.AuthorityKeyIdentifier.oid].value.key_identifier == above
    check_svid((leaf,), wanted, [root.certificate], NOW)


def test_a_root_is_an_svid_without_a_path_that_signs_leaves_only() -> None:
    root = issuer().certificate
    assert uris(root) == ["spiffe://mesh.local"]
    constraints = root.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.value.ca, constraints.value.path_length, constraints.critical) == (True, 0, True)
    usage = root.extensions.get_extension_for_class(x509.KeyUsage)
    assert (usage.value.key_cert_sign, usage.value.crl_sign, usage.value.digital_signature, usage.critical) == (True, True, False, True)
    assert root.subject != issuer().certificate.subject


def test_a_certificate_does_not_outlive_its_issuer() -> None:
    root = issuer()
    end = root.certificate.not_valid_after_utc.timestamp()
    (leaf,) = new_leaf(root, order(), end - 60)
    assert leaf.not_valid_after_utc.timestamp() == end
    with pytest.raises(SigningFailed, match="the signing certificate ran out on 20"):
        new_leaf(root, order(), end + 1)
    with pytest.raises(SigningFailed, match="set the clock of this machine"):
        new_leaf(root, order(), NOW - 3601)


def foreign(root: Issuer, wanted: Order, **changes: object) -> x509.Certificate:
    """Make what a bad signer makes: an SVID in which something differs."""
    given = {
        "key": wanted.key,
        "names": [x509.UniformResourceIdentifier(ID)],
        "ca": False,
        "signature": True,
        "cert_sign": False,
        "critical": True,
        "purposes": [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
        "lifetime": 86_400,
        "start": -300,
        **changes,
    }
    usage = x509.KeyUsage(given["signature"], False, False, False, False, given["cert_sign"], False, False, False)  # type: ignore[arg-type]
    builder = x509.CertificateBuilder(root.certificate.subject, x509.Name([]), given["key"], x509.random_serial_number())  # type: ignore[arg-type]
    builder = builder.not_valid_before(dt.datetime.fromtimestamp(NOW + given["start"], dt.timezone.utc))  # type: ignore[operator]
    builder = builder.not_valid_after(dt.datetime.fromtimestamp(NOW + given["lifetime"], dt.timezone.utc))  # type: ignore[operator]
    builder = builder.add_extension(x509.BasicConstraints(given["ca"], None), critical=True)  # type: ignore[arg-type]
    builder = builder.add_extension(usage, critical=given["critical"])  # type: ignore[arg-type]
    if given["purposes"]:
        builder = builder.add_extension(x509.ExtendedKeyUsage(given["purposes"]), critical=False)  # type: ignore[arg-type]
    if given["names"]:
        builder = builder.add_extension(x509.SubjectAlternativeName(given["names"]), critical=True)  # type: ignore[arg-type]
    return builder.sign(root.key, hashes.SHA256())


URI = x509.UniformResourceIdentifier


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ""),
        ({"key": new_key().public_key()}, "another key"),
        ({"names": [URI("spiffe://mesh.local/ns/shop/sa/admin")]}, "names spiffe://mesh.local/ns/shop/sa/admin instead of"),
        ({"names": [URI(ID), URI(ID + "x")]}, "instead of"),
        ({"names": [URI(ID), URI(ID)]}, "instead of"),
        ({"names": [URI(ID), x509.DNSName("mesh-controller")]}, "instead of"),
        ({"names": []}, "has no"),
        ({"ca": True, "cert_sign": True}, "may sign others"),
        ({"cert_sign": True}, "may sign others"),
        ({"critical": False}, "must be critical"),
        ({"purposes": [ExtendedKeyUsageOID.CLIENT_AUTH]}, "serverAuth and clientAuth"),
        ({"purposes": []}, "has no"),
        ({"lifetime": 90_000}, "longer than --svid-lifetime"),
        ({"start": 60}, "is valid from"),
    ],
)
def test_what_a_foreign_signer_makes_must_be_exactly_what_was_ordered(changes: dict[str, object], expected: str) -> None:
    root, wanted = issuer(), order()
    leaf = foreign(root, wanted, **changes)
    if not expected:
        check_svid((leaf,), wanted, [root.certificate], NOW)
        return
    with pytest.raises(ValueError, match=expected):
        check_svid((leaf,), wanted, [root.certificate], NOW)


def test_a_chain_must_lead_to_a_trusted_root_through_signing_certificates() -> None:
    root, other = issuer(), issuer()
    (leaf,) = new_leaf(root, order(), NOW)
    (second,) = new_leaf(root, order(), NOW)
    assert check_chain([leaf], [other.certificate, root.certificate], NOW) == root.certificate
    for chain, roots, expected in (
        ([leaf], [other.certificate], "does not lead to a root"),
        ([leaf], [], "does not lead to a root"),
        ([leaf, second], [root.certificate], "is no signing certificate"),
        ([leaf, other.certificate], [other.certificate], "did not sign what stands before it"),
    ):
        with pytest.raises(ValueError, match=expected):
            check_chain(chain, roots, NOW)
    with pytest.raises(ValueError, match="is valid from"):
        check_chain([leaf], [root.certificate], NOW + 86_401)


def test_a_crl_is_signed_by_its_issuer_and_lists_the_serials() -> None:
    root = issuer()
    pem = new_crl(root, [(23, int(NOW)), (2**150 + 1, int(NOW))], 7, NOW, NOW + 60)
    found = x509.load_pem_x509_crl(pem)
    key = root.certificate.public_key()
    assert found.is_signature_valid(key)  # type: ignore[arg-type]
    assert found.issuer == root.certificate.subject
    assert sorted(item.serial_number for item in found) == [23, 2**150 + 1]
    assert found.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 7


def test_openssl_believes_an_svid_and_a_crl_takes_that_back(tmp_path: Path) -> None:
    root = issuer(now := time.time())
    (leaf,) = new_leaf(root, order(), now)
    (tmp_path / "root.pem").write_bytes(certificates.pem([root.certificate]))
    (tmp_path / "leaf.pem").write_bytes(certificates.pem([leaf]))
    (tmp_path / "crl.pem").write_bytes(new_crl(root, [(leaf.serial_number, int(now))], 1, now, now + 60))
    verify = ["openssl", "verify", "-x509_strict", "-CAfile", str(tmp_path / "root.pem")]
    for purpose in ("sslserver", "sslclient"):
        assert subprocess.run([*verify, "-purpose", purpose, str(tmp_path / "leaf.pem")], check=False).returncode == 0
    revoked = [*verify, "-crl_check", "-CRLfile", str(tmp_path / "crl.pem"), str(tmp_path / "leaf.pem")]
    assert "certificate revoked" in subprocess.run(revoked, check=False, capture_output=True, text=True).stderr


@pytest.mark.parametrize(("serial", "allowed"), [(1, True), (2**159 - 1, True), (2**159, False)])
def test_a_foreign_certificate_that_no_revocation_list_could_name_is_refused(serial: int, allowed: bool) -> None:
    root, wanted = issuer(), order()
    (good,) = new_leaf(root, wanted, NOW)
    builder = x509.CertificateBuilder(good.issuer, good.subject, wanted.key, 7).not_valid_before(good.not_valid_before_utc)
    for extension in good.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    builder = builder.not_valid_after(good.not_valid_after_utc)
    builder._serial_number = serial
    leaf = builder.sign(root.key, hashes.SHA256())
    if allowed:
        check_svid((leaf,), wanted, [root.certificate], NOW)
    else:
        with pytest.raises(ValueError, match="it could not be revoked"):
            check_svid((leaf,), wanted, [root.certificate], NOW)
