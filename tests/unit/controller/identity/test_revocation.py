from __future__ import annotations

import asyncio
import functools
import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography import x509

from controller.errors import ControllerError
from controller.identity import crl, directory, ledger, revocations
from controller.identity.ca import CertificateAuthority
from controller.identity.certificates import Order, pem
from controller.identity.directory import Directory
from controller.identity.operator import Intermediate
from controller.main import main
from meshapi.join import root_hash
from tests.unit.controller.identity.authorities import Held, make
from tests.unit.controller.identity.harness import Clock, authority, new_key, request

CART, REDIS, NODE = "spiffe://mesh.local/ns/shop/sa/cart", "spiffe://mesh.local/ns/shop/sa/redis", "spiffe://mesh.local/meshagent/node/n1"


def command(path: Path, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["ca", *arguments, "--ca-directory", str(path)])
    return result.exit_code, result.stdout + result.stderr


def issue(found: CertificateAuthority, *identities: str) -> list[x509.Certificate]:
    made = found.issue_now([Order(name, (key := new_key()).public_key(), request(key), 86_400, "n1") for name in identities])
    return [chain[0] for chain in made if isinstance(chain, tuple)]


def crls(found: CertificateAuthority) -> list[x509.CertificateRevocationList]:
    end = b"-----END X509 CRL-----\n"
    return [x509.load_pem_x509_crl(part + end) for part in found.trust.current.crl.split(end) if part]


def test_a_serial_or_an_identity_is_revoked_and_everybody_is_told(tmp_path: Path) -> None:
    found = authority(tmp_path / "ca")
    cart, again, redis = issue(found, CART, CART, REDIS)

    async def check() -> None:
        await found.tick()
        assert (found.trust.current.crl, list(found.trust.current.revoked)) == (b"", [])
        before = found.trust.current.sequence
        code, said = command(tmp_path / "ca", "revoke", f"{redis.serial_number:X}")
        assert (code, said) == (0, f"{redis.serial_number:x}  {REDIS}  revoked\n")
        code, said = command(tmp_path / "ca", "revoke", CART)
        assert (code, said.count(" revoked\n")) == (0, 2)
        assert "was revoked before" in command(tmp_path / "ca", "revoke", CART)[1]
        await found.tick()
        assert found.trust.current.sequence > before
        wanted = {cart.serial_number, again.serial_number, redis.serial_number}
        assert {int.from_bytes(serial, "big") for serial in found.trust.current.revoked} == wanted
        assert all(found.is_revoked(serial) for serial in wanted)
        (crl,) = crls(found)
        assert {item.serial_number for item in crl} == wanted
        assert crl.is_signature_valid(found.roots[0].public_key())  # type: ignore[arg-type]

    asyncio.run(check())
    found.stop()


def test_while_two_roots_are_trusted_each_has_its_list(tmp_path: Path) -> None:
    found = authority(tmp_path / "ca")
    (old,) = issue(found, CART)

    async def check() -> None:
        for _ in range(2):
            command(tmp_path / "ca", "rotate", "--now")
        await found.tick()
        (new,) = issue(found, REDIS)
        for name in (CART, REDIS):
            command(tmp_path / "ca", "revoke", name)
        await found.tick()
        listed = {crl.issuer: [item.serial_number for item in crl] for crl in crls(found)}
        assert listed == {old.issuer: [old.serial_number], new.issuer: [new.serial_number]}

    asyncio.run(check())
    found.stop()


def test_the_list_is_signed_anew_before_it_runs_out(tmp_path: Path) -> None:
    clock = Clock()
    found = authority(tmp_path / "ca", clock, lifetime_s=30 * 86_400)
    found.issue_now([Order(CART, (key := new_key()).public_key(), request(key), 90 * 86_400)])

    async def check() -> None:
        command(tmp_path / "ca", "revoke", CART)
        await found.tick()
        (first,) = crls(found)
        await found.tick()
        assert crls(found) == [first]
        clock.now += 31 * 86_400
        await found.tick()
        (second,) = crls(found)
        assert first.next_update_utc is not None
        assert second.last_update_utc < first.next_update_utc != second.next_update_utc

    asyncio.run(check())
    found.stop()


def test_what_has_run_out_leaves_the_list(tmp_path: Path) -> None:
    clock = Clock()
    found = authority(tmp_path / "ca", clock)
    issue(found, CART)

    async def check() -> None:
        command(tmp_path / "ca", "revoke", CART)
        await found.tick()
        assert len(found.trust.current.revoked) == 1
        clock.now += 86_400 + 300
        await found.tick()
        assert len(found.trust.current.revoked) == 1  # clocks of peers may be behind
        clock.now += revocations.KEPT_S
        await found.tick()
        assert (list(found.trust.current.revoked), found.trust.current.crl) == ([], b"")
        assert revocations.read(Directory(tmp_path / "ca")) == []

    asyncio.run(check())
    found.stop()


def test_a_node_is_revoked_alone_or_with_what_its_workloads_were_given(tmp_path: Path) -> None:
    found = authority(tmp_path / "ca")
    issue(found, NODE, CART)
    found.issue_now([Order(CART, (key := new_key()).public_key(), request(key), 86_400, "n2")])
    assert found.holds("n1")
    assert command(tmp_path / "ca", "revoke", NODE)[1].count(" revoked\n") == 1
    assert command(tmp_path / "ca", "revoke", "--with-workloads", NODE)[1].count(" revoked\n") == 1
    asyncio.run(found.tick())
    assert not found.holds("n1")
    found.stop()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("abcdef",), "no certificate in force is on record for abcdef"),
        (("spiffe://mesh.local/ns/shop/sa/nobody",), "no certificate in force is on record"),
        (("xyz",), "is neither a serial number"),
        (("",), "is neither a serial number"),
        (("f" * 41,), "is neither a serial number"),
        (("--unknown", "8" + "0" * 39), "is neither a serial number"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, arguments: tuple[str, ...], expected: str) -> None:
    found = authority(tmp_path / "ca")
    code, said = command(tmp_path / "ca", "revoke", *arguments)
    assert (code, expected in said) == (1, True), said
    found.stop()


def test_a_serial_that_is_not_on_record_can_be_revoked_on_purpose(tmp_path: Path) -> None:
    found = authority(tmp_path / "ca")
    assert command(tmp_path / "ca", "revoke", "--unknown", "0x00:ab:cd")[0] == 0
    asyncio.run(found.tick())
    assert list(found.trust.current.revoked) == [b"\xab\xcd"]
    assert [item.serial_number for item in crls(found)[0]] == [0xABCD]
    found.stop()


def test_a_damaged_list_does_not_pass_for_an_empty_one(tmp_path: Path) -> None:
    found = authority(tmp_path / "ca")
    (cart,) = issue(found, CART)

    async def check() -> None:
        command(tmp_path / "ca", "revoke", CART)
        await found.tick()
        path = tmp_path / "ca" / "revoked.json"
        path.write_text(path.read_text()[:-9])
        await found.tick()
        assert found.is_revoked(cart.serial_number)
        assert len(found.trust.current.revoked) == 1
        code, said = command(tmp_path / "ca", "revoke", f"{cart.serial_number:x}")
        assert (code, "an empty one would make every revoked certificate good again" in said) == (1, True)

    asyncio.run(check())
    found.stop()
    with pytest.raises(ControllerError, match=r"revoked\.json cannot be used"):
        authority(tmp_path / "ca")


def test_a_list_that_is_gone_does_not_pass_for_an_empty_one(tmp_path: Path) -> None:
    found = authority(tmp_path / "ca")
    (cart,) = issue(found, CART)

    async def check() -> None:
        command(tmp_path / "ca", "revoke", CART)
        await found.tick()
        (tmp_path / "ca" / "revoked.json").unlink()
        await found.tick()
        assert found.is_revoked(cart.serial_number)
        assert "it is gone" in command(tmp_path / "ca", "revoke", CART)[1]

    asyncio.run(check())
    found.stop()
    with pytest.raises(ControllerError, match=r"revoked\.json is gone, and certificates have been issued"):
        authority(tmp_path / "ca")


def test_a_ledger_that_is_gone_while_something_is_revoked_is_missed(tmp_path: Path) -> None:
    found = authority(tmp_path / "ca")
    issue(found, CART)
    command(tmp_path / "ca", "revoke", CART)
    found.stop()
    (tmp_path / "ca" / "issued.jsonl").unlink()
    with pytest.raises(ControllerError, match=r"issued\.jsonl is gone"):
        authority(tmp_path / "ca")


def test_damage_elsewhere_does_not_hold_a_revocation_up(tmp_path: Path) -> None:
    found = authority(tmp_path / "ca")
    (cart,) = issue(found, CART)

    async def check() -> None:
        for name in ("authority.json", "tokens.json", "trust.json"):
            (tmp_path / "ca" / name).write_text("{")
        revocations.add(found.directory, ledger.read(found.directory)[0], found.clock())
        await found.tick()
        assert [int.from_bytes(serial, "big") for serial in found.trust.current.revoked] == [cart.serial_number]

    asyncio.run(check())
    found.stop()


def test_the_ledger_forgets_what_has_run_out_once_that_is_worth_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_SPARE", 22)
    clock = Clock()
    found = authority(tmp_path / "ca", clock)
    issue(found, *[CART] * 23)
    clock.now += 86_401
    issue(found, REDIS)
    asyncio.run(found.tick())
    lines = (tmp_path / "ca" / "issued.jsonl").read_text().splitlines()
    assert [json.loads(line)["spiffe_id"] for line in lines] == [REDIS]
    issue(found, CART)
    assert len((tmp_path / "ca" / "issued.jsonl").read_text().splitlines()) == 2
    found.stop()


def test_show_names_roots_and_revoked_certificates(tmp_path: Path) -> None:
    found = authority(tmp_path / "ca")
    (_, cart) = issue(found, NODE, CART)
    command(tmp_path / "ca", "revoke", CART)
    said = command(tmp_path / "ca", "show")[1]
    assert f"root          {root_hash(found.roots[0])}  signing since 20" in said
    assert "in force      1 certificates, 1 nodes" in said
    assert f"revoked       {cart.serial_number:x}  {CART}" in said
    content = json.loads(command(tmp_path / "ca", "show", "-o", "json")[1])
    assert (content["trustDomain"], content["nodes"], len(content["revoked"])) == ("mesh.local", ["n1"], 1)
    assert x509.load_pem_x509_certificates(command(tmp_path / "ca", "show", "-o", "pem")[1].encode()) == list(found.roots)
    found.stop()


def test_a_node_that_renews_while_it_is_revoked_gains_nothing(tmp_path: Path) -> None:
    clock = Clock()
    found = authority(tmp_path / "ca", clock)
    issue(found, NODE, CART)

    def listed() -> set[int]:
        return {int(record.serial, 16) for record in revocations.read(found.directory)}

    async def check() -> None:
        await found.tick()
        assert command(tmp_path / "ca", "revoke", NODE)[0] == 0
        renewed, cart = issue(found, NODE, CART)  # the controller has not read the list yet
        (other,) = found.issue_now([Order(NODE.replace("n1", "n2"), (key := new_key()).public_key(), request(key), 86_400, "n2")])
        await found.tick()
        assert found.is_revoked(renewed.serial_number)
        assert renewed.serial_number in listed()
        assert not found.is_revoked(cart.serial_number)
        assert isinstance(other, tuple)
        assert not found.is_revoked(other[0].serial_number)
        (again,) = issue(found, NODE)  # joined anew
        for _ in range(2):
            await found.tick()
        assert not found.is_revoked(again.serial_number)
        assert command(tmp_path / "ca", "revoke", "--with-workloads", NODE)[0] == 0
        renewed, late = issue(found, NODE, REDIS)
        await found.tick()
        for certificate in (again, cart, renewed, late):
            assert found.is_revoked(certificate.serial_number)
        await found.tick()
        assert len(found.trust.current.revoked) == len(listed()) == 7

    asyncio.run(check())
    (joined,) = issue(found, NODE)
    found.stop()
    restarted = authority(tmp_path / "ca", clock)
    asyncio.run(restarted.tick())
    assert not restarted.is_revoked(joined.serial_number)
    restarted.stop()


def test_what_a_revoked_node_got_is_kept_in_mind_until_it_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = authority(tmp_path / "ca")
    issue(found, NODE)

    def full(*_: object) -> None:
        raise ControllerError("disk full")

    async def check() -> None:
        await found.tick()
        command(tmp_path / "ca", "revoke", NODE)
        (renewed,) = issue(found, NODE)
        with monkeypatch.context() as patch:
            patch.setattr(revocations, "_write", full)
            for _ in range(3):
                await found.tick()
                assert found.is_revoked(renewed.serial_number)
        await found.tick()
        assert int(revocations.read(found.directory)[-1].serial, 16) == renewed.serial_number

    asyncio.run(check())
    found.stop()


def test_no_list_stops_the_controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    found = authority(tmp_path / "ca")

    def unsigned(*_: object) -> bytes:
        raise ValueError("no list")

    monkeypatch.setattr("controller.identity.crl.RevocationLists.current", unsigned)
    asyncio.run(found.tick())
    assert "no list" in [vars(record).get("error") for record in caplog.records]
    found.stop()


def test_a_ledger_that_is_gone_is_missed_although_nothing_is_revoked(tmp_path: Path) -> None:
    authority(tmp_path / "ca").stop()
    (tmp_path / "ca" / "issued.jsonl").unlink()
    with pytest.raises(ControllerError, match=r"issued\.jsonl is gone"):
        authority(tmp_path / "ca")


def test_a_crash_before_the_first_list_is_there_is_gone_on_from(tmp_path: Path) -> None:
    authority(tmp_path / "ca").stop()
    (tmp_path / "ca" / "revoked.json").unlink()
    authority(tmp_path / "ca").stop()


def below(tmp_path: Path, root: Held, name: str) -> tuple[Held, dict[str, object]]:
    """Give an intermediate to be used, or to be used instead of the one before; return it and the settings."""
    found = make(name, root, lifetime_s=10**7)
    certificate, key = found.write(tmp_path, "intermediate")
    return found, {"intermediate": Intermediate(certificate, key), "roots": root.write(tmp_path, "root")[0]}


def openssl_believes(directory: Path, root: x509.Certificate, crl: bytes, leaf: x509.Certificate, above: x509.Certificate) -> bool:
    """As Envoy checks it, with only_verify_leaf_cert_crl: every leaf needs a list of its issuer."""
    content = {"top": pem([root]), "above": pem([above]), "leaf": pem([leaf]), "crl": crl}
    for name, text in content.items():
        (directory / f"{name}.pem").write_bytes(text)
    files = ("-CAfile", "top.pem", "-untrusted", "above.pem", "-CRLfile", "crl.pem", "leaf.pem")
    return subprocess.run(["openssl", "verify", "-crl_check", *files], cwd=directory, check=False, capture_output=True).returncode == 0


def listed(found: CertificateAuthority) -> dict[str, set[int]]:
    return {crl.issuer.rfc4514_string(): {item.serial_number for item in crl} for crl in crls(found)}


def test_what_a_former_intermediate_signed_can_be_revoked_and_stays_so_as_long_as_it_could_be_believed(tmp_path: Path) -> None:
    root, clock = make("root", lifetime_s=10**7), Clock()
    first, settings = below(tmp_path, root, "first")
    found = authority(tmp_path / "ca", clock, **settings)
    cart, redis, last = issue(found, CART, REDIS, REDIS)

    async def tick(found: CertificateAuthority) -> None:
        await found.tick()

    command(tmp_path / "ca", "revoke", CART)
    asyncio.run(tick(found))
    assert listed(found) == {"CN=first": {cart.serial_number}}
    second, _ = below(tmp_path, root, "second")
    asyncio.run(tick(found))
    (new,) = issue(found, CART)
    assert new.issuer.rfc4514_string() == "CN=second"
    assert listed(found) == {"CN=first": {cart.serial_number}, "CN=second": set()}
    command(tmp_path / "ca", "revoke", f"{redis.serial_number:x}")
    asyncio.run(tick(found))
    assert listed(found) == {"CN=first": {cart.serial_number, redis.serial_number}, "CN=second": set()}
    assert all(one.is_signature_valid(first.certificate.public_key()) for one in crls(found) if one.issuer == cart.issuer)  # type: ignore[arg-type]
    believed = functools.partial(openssl_believes, tmp_path, root.certificate, found.trust.current.crl)
    assert [believed(leaf, first.certificate) for leaf in (cart, redis, last)] == [False, False, True]
    assert believed(new, second.certificate)
    before = found.trust.current
    found.stop()

    assert not any(b"PRIVATE" in path.read_bytes() for path in (tmp_path / "ca").iterdir() if path.name != "authority.json")
    assert (tmp_path / "ca" / "authority.json").read_text().count("BEGIN PRIVATE") == 2  # JWT keys; an operator's key is written nowhere
    again = authority(tmp_path / "ca", clock, **settings)
    asyncio.run(tick(again))
    assert again.trust.current == before
    assert all(one.next_update_utc is not None and one.next_update_utc > last.not_valid_after_utc for one in crls(again))
    command(tmp_path / "ca", "revoke", f"{last.serial_number:x}")  # nobody can put it into the first one's list any more
    asyncio.run(tick(again))
    assert listed(again) == {"CN=second": set()}  # Envoy believes nobody whose issuer has no list
    assert last.serial_number in {int.from_bytes(serial, "big") for serial in again.trust.current.revoked}
    clock.now += 86_400 + revocations.KEPT_S + 1
    (other,) = issue(again, NODE)
    command(tmp_path / "ca", "revoke", NODE)
    asyncio.run(tick(again))
    asyncio.run(tick(again))
    assert listed(again) == {"CN=first": {cart.serial_number, redis.serial_number}, "CN=second": {other.serial_number}}
    clock.now += crl.LIFETIME_S
    (other,) = issue(again, NODE)
    command(tmp_path / "ca", "revoke", NODE)
    asyncio.run(tick(again))
    asyncio.run(tick(again))
    assert list(listed(again)) == ["CN=second"]
    assert "CN=first" not in {one.subject.rfc4514_string() for one in crl.parse((tmp_path / "ca" / "lists.json").read_bytes())}
    again.stop()


def test_an_intermediate_that_is_replaced_while_nothing_is_revoked_and_nobody_looks_has_its_list_afterwards(tmp_path: Path) -> None:
    root, clock = make("root"), Clock()
    _, settings = below(tmp_path, root, "first")
    found = authority(tmp_path / "ca", clock, **settings)
    issue(found, CART)
    found.stop()
    below(tmp_path, root, "second")
    again = authority(tmp_path / "ca", clock, **settings)
    (redis,) = issue(again, REDIS)
    assert again.trust.current.crl == b""
    command(tmp_path / "ca", "revoke", REDIS)
    asyncio.run(again.tick())
    assert listed(again) == {"CN=first": set(), "CN=second": {redis.serial_number}}
    again.stop()


@pytest.mark.parametrize("days", [1, 30, 90])
def test_whenever_the_controller_goes_away_its_lists_outlive_every_certificate(tmp_path: Path, days: int) -> None:
    clock, lifetime_s = Clock(), days * 86_400
    found = authority(tmp_path / "ca", clock, lifetime_s=lifetime_s)
    command(tmp_path / "ca", "revoke", "--unknown", "abcd")

    async def check() -> None:
        await found.tick()
        (first,) = crls(found)
        assert first.next_update_utc is not None
        lives = first.next_update_utc.timestamp() - clock.now
        for step_s in (lives / 2 - 1, 2, lives / 2 - lifetime_s, lifetime_s / 2, 300):
            clock.now += max(0.0, step_s)
            await found.tick()
            command(tmp_path / "ca", "revoke", "--unknown", f"{int(clock.now):x}")
            (leaf,) = issue_for(found, lifetime_s)
            assert all(one.next_update_utc.timestamp() >= leaf.not_valid_after_utc.timestamp() + 300 for one in crls(found))  # type: ignore[union-attr]

    asyncio.run(check())
    found.stop()


def issue_for(found: CertificateAuthority, lifetime_s: int) -> list[x509.Certificate]:
    (made,) = found.issue_now([Order(CART, (key := new_key()).public_key(), request(key), lifetime_s, "n1")])
    assert isinstance(made, tuple)
    return [made[0]]


def test_the_ledger_is_as_large_as_what_is_in_force_and_never_too_large_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (directory, ledger):
        monkeypatch.setattr(module, "MAX_BYTES", 40_000)
    clock = Clock()
    found = authority(tmp_path / "ca", clock)
    path = tmp_path / "ca" / "issued.jsonl"
    for _ in range(12):  # without maintenance, which comes once in a minute
        assert len(issue(found, *[CART] * 40)) == 40
        assert path.stat().st_size <= 40_000
        clock.now += 43_200
    found.stop()
    again = authority(tmp_path / "ca", clock)
    assert len(list(again._ledger.live(clock()))) == 40
    (last,) = issue(again, REDIS)
    assert command(tmp_path / "ca", "revoke", f"{last.serial_number:x}")[0] == 0
    again.stop()


def test_a_ledger_that_is_full_of_certificates_in_force_takes_no_more_and_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (directory, ledger):
        monkeypatch.setattr(module, "MAX_BYTES", 20_000)
    clock = Clock()
    found = authority(tmp_path / "ca", clock)
    known = [one.serial_number for _ in range(30) for one in issue(found, *[CART] * 10)]
    assert 0 < len(known) < 300
    failed = found.issue_now([Order(CART, (key := new_key()).public_key(), request(key), 86_400, "n1")] * 10)
    assert "has no room for more than" in str(failed[0])
    found.stop()
    again = authority(tmp_path / "ca", clock)
    assert {int(record.serial, 16) for record in again._ledger.live(clock())} == set(known)
    clock.now += 86_401
    assert len(issue(again, CART)) == 1
    again.stop()
