"""What controllers that share a state do to each other: one that was away, one that lags, one that begins again and again."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from controller.identity import crl, jwtkeys, ledger, revocations, rotation
from controller.identity.attest import TokenAttestor
from controller.identity.ca import CertificateAuthority
from controller.identity.certificates import Issuer, Order, new_crl
from controller.identity.directory import ISSUED, KNEW, LISTS, Directory
from controller.identity.jwtkeys import SharedKeys
from controller.identity.refusals import SigningFailed
from controller.identity.service import JoinService
from controller.identity.tokens import JOINING_S, TokenStore
from controller.store import Documents
from meshapi import identity_pb2 as pb
from tests.unit.controller.identity.authorities import make
from tests.unit.controller.identity.harness import Clock, decoded, new_key, request
from tests.unit.controller.identity.shared import Mesh, Replica, State

TOKENS_S, DAY_S = 300, 86_400
CART = "spiffe://mesh.local/ns/shop/sa/cart"
NODE = "spiffe://mesh.local/meshagent/node/n1"


def kids(bundle: pb.TrustBundle) -> set[str]:
    return {key["kid"] for key in json.loads(bundle.jwt_keys)["keys"]}


def test_a_controller_that_was_away_when_the_jwt_keys_were_withdrawn_does_not_bring_its_own_back(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path)
    one, shared = mesh.authority("one")
    other, _ = mesh.authority("other")
    asyncio.run(one.tick())
    before = kids(one.trust.current)
    assert len(before) == 4
    other.stop()
    jwtkeys.withdraw(shared)
    asyncio.run(one.tick())
    back, _ = mesh.authority("other")
    for found in (back, one):
        asyncio.run(found.tick())
        assert not kids(found.trust.current) & before
    assert kids(one.trust.current) == kids(back.trust.current)
    after = kids(back.trust.current)
    back.stop()
    again, _ = mesh.authority("other")  # and that it has made others it remembers
    asyncio.run(again.tick())
    assert kids(again.trust.current) == after
    again.stop()
    (tmp_path / "other" / jwtkeys.WITHDRAWN).write_text("{")
    unsure, _ = mesh.authority("other")
    asyncio.run(unsure.tick())
    assert len(kids(unsure.trust.current) - after) == 2, "they are made anew rather than believed wrongly"


def test_a_controller_that_lags_does_not_tell_keys_again_that_were_withdrawn_meanwhile(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path)
    found, shared = mesh.authority("one")
    asyncio.run(found.tick())

    def told() -> set[str]:
        return {one.key for one in jwtkeys.parse(Replica(mesh.state).read(jwtkeys.FILE) or b"")}

    before = told()
    assert len(before) == 2
    shared.lags = True
    jwtkeys.withdraw(Replica(mesh.state))
    mesh.clock.now += 2 * rotation.JWT_PERIOD_S  # they are to be told for longer
    for _ in range(2):
        asyncio.run(found.tick())
        assert not told() & before
    assert len(told()) >= 2


def test_a_controller_that_begins_again_and_again_takes_no_other_ones_keys_away(tmp_path: Path) -> None:
    state, clock, steady = State(), Clock(1_700_000_000.0), Clock(0.0)

    def keys(name: str) -> SharedKeys:
        (tmp_path / name).mkdir(mode=0o700, exist_ok=True)
        return SharedKeys(Replica(state), Directory(tmp_path / name), clock, steady)

    living, own = keys("living"), new_key().public_key()
    for _ in range(48):
        living.tell([own], TOKENS_S, DAY_S)
        clock.now, steady.now = clock.now + 3600, steady.now + 3600
    for number in range(2 * jwtkeys.MOST):
        keys(f"short-{number}").tell([new_key().public_key(), new_key().public_key()], TOKENS_S, DAY_S)
        clock.now += 5
        assert living.withdrawn() is None
    assert living.knows(own)
    assert len(living.others) <= jwtkeys.MOST
    clock.now += 2 * (TOKENS_S + jwtkeys.FIRST_S)
    living.tell([own, new_key().public_key()], TOKENS_S, DAY_S)
    assert living.others == (), "nobody lives any more who has signed with them"


def test_a_controller_that_begins_again_with_the_keys_that_it_had_tells_them_once(tmp_path: Path) -> None:
    state, clock, steady = State(), Clock(1_700_000_000.0), Clock(0.0)
    own = [new_key().public_key(), new_key().public_key()]
    for _ in range(5):
        found = SharedKeys(Replica(state), Directory(tmp_path), clock, steady)
        found.tell(own, TOKENS_S, DAY_S)
        assert all(found.knows(key) for key in own)
    assert len(jwtkeys.parse(Replica(state).read(jwtkeys.FILE) or b"")) == 2


def test_keys_of_a_controller_that_has_lived_for_long_are_believed_for_long_after_it(tmp_path: Path) -> None:
    state, clock, steady = State(), Clock(1_700_000_000.0), Clock(0.0)
    found, own = SharedKeys(Replica(state), Directory(tmp_path), clock, steady), new_key().public_key()
    writes = set()
    for _ in range(2 * DAY_S // 60):
        found.tell([own], TOKENS_S, DAY_S)
        writes.add(state.version)
        (told,) = jwtkeys.parse(Replica(state).read(jwtkeys.FILE) or b"")
        assert told.until - clock.now >= min(DAY_S, TOKENS_S + jwtkeys.FIRST_S, max(900, steady.now))
        clock.now, steady.now = clock.now + 60, steady.now + 60
    assert told.until - clock.now >= DAY_S - 60
    assert len(writes) < 20


def certificate(found: CertificateAuthority, identity: str = CART, asker: x509.Certificate | None = None) -> x509.Certificate:
    """As an agent of n1 asks for it, with the certificate that it has."""
    with_serial = f"{asker.serial_number:x}" if asker else ""
    (made,) = found.issue_now([Order(identity, (key := new_key()).public_key(), request(key), DAY_S, "n1", asker=with_serial)])
    assert isinstance(made, tuple)
    return made[0]


def revoke(mesh: Mesh, leaf: x509.Certificate) -> None:
    """As `ca revoke SERIAL` does."""
    (found,) = (record for record in ledger.issued(Replica(mesh.state)) if int(record.serial, 16) == leaf.serial_number)
    revocations.add(Replica(mesh.state), [found], mesh.clock())


def lists(found: CertificateAuthority) -> dict[str, set[int]]:
    pems = found.trust.current.crl.decode().split("-----BEGIN X509 CRL-----")[1:]
    crls = [x509.load_pem_x509_crl(f"-----BEGIN X509 CRL-----{pem}".encode()) for pem in pems]
    return {crl.issuer.rfc4514_string(): {entry.serial_number for entry in crl} for crl in crls}


def tick(*authorities: CertificateAuthority) -> None:
    for found in authorities:
        asyncio.run(found.tick())


def at_rest(mesh: Mesh, *replicas: CertificateAuthority) -> bool:
    """True if nobody writes anything, however often each looks."""
    before = mesh.state.version
    tick(*list(replicas) * 3)
    return mesh.state.version == before


def test_what_one_replica_can_still_sign_for_a_former_issuer_every_replica_tells(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path)
    one, _ = mesh.authority("one")
    cart, redis = certificate(one), certificate(one)
    mesh.replace("second")
    tick(one)
    other, _ = mesh.authority("other")  # has never had the former key
    revoke(mesh, cart)
    tick(other, one, other, one)
    assert lists(one) == lists(other) == {"CN=middle": {cart.serial_number}, "CN=second": set()}
    revoke(mesh, redis)
    tick(one, other, other, one)
    assert lists(one) == lists(other) == {"CN=middle": {cart.serial_number, redis.serial_number}, "CN=second": set()}
    one.stop()
    tick(other)
    late, _ = mesh.authority("late")
    tick(late)
    assert lists(late) == lists(other), "what the one that has ended signed was kept"


def test_replicas_come_to_the_same_lists_and_then_write_no_more(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path)
    one, _ = mesh.authority("one")
    other, _ = mesh.authority("other")
    for _ in range(3):
        revoke(mesh, certificate(one))
        revoke(mesh, certificate(other))
        tick(*[one, other] * 3)
        assert one.trust.current.crl == other.trust.current.crl != b""
        assert at_rest(mesh, one, other)


def test_a_replica_whose_clock_is_behind_and_one_whose_is_not_leave_each_others_lists_alone(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path)
    one, _ = mesh.authority("one")
    other, _ = mesh.authority("other")
    other.clock = Clock(mesh.clock.now - 900)
    leaf = certificate(one)
    revoke(mesh, leaf)
    tick(*[one, other] * 3)
    assert lists(one) == lists(other) == {"CN=middle": {leaf.serial_number}}
    assert at_rest(mesh, one, other)


def test_a_replica_that_lags_does_not_replace_a_newer_list_by_the_one_that_it_knows(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path)
    one, shared = mesh.authority("one")
    leaf = certificate(one)
    mesh.replace("second")
    tick(one)
    other, _ = mesh.authority("other", lags=True)
    mesh.clock.now += 5
    revoke(mesh, leaf)
    tick(one)
    mesh.clock.now += crl.LIFETIME_S - DAY_S  # the list of the issuer that signs is to be renewed
    before = mesh.state.version
    tick(other)
    assert mesh.state.version > before
    former = next(found for found in crl.parse(shared.read(LISTS) or b"") if found.subject.rfc4514_string() == "CN=middle")
    assert former.serials == {leaf.serial_number}


def test_a_list_that_its_issuer_has_not_signed_is_not_told(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path)
    one, shared = mesh.authority("one")
    leaf = certificate(one)
    revoke(mesh, leaf)
    tick(one)
    stranger = make("middle")
    entry = (leaf.serial_number, int(mesh.clock()))
    forged = new_crl(Issuer(stranger.certificate, stranger.key), [entry], 1, mesh.clock(), mesh.clock() + 10**8).decode()
    (held,) = crl.parse(shared.read(LISTS) or b"")
    shared.change(lambda documents: documents.write(LISTS, json.dumps({"lists": [{"issuer": held.issuer, "crl": forged}]})))
    tick(one, one)
    assert lists(one) == {"CN=middle": {leaf.serial_number}}
    assert forged not in one.trust.current.crl.decode()
    revoke(mesh, certificate(one))
    tick(one)
    (again,) = crl.parse(shared.read(LISTS) or b"")
    assert len(again.serials) == 2


def test_lists_that_are_damaged_while_a_replica_runs_hold_no_revocation_up(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path)
    one, shared = mesh.authority("one")
    shared.change(lambda documents: documents.write(LISTS, "{"))
    leaf = certificate(one)
    revoke(mesh, leaf)
    tick(one)
    assert lists(one) == {"CN=middle": {leaf.serial_number}}
    assert one.is_revoked(leaf.serial_number)


def revoke_node(mesh: Mesh, also: str) -> None:
    """As `ca revoke NODE` does."""
    state = Replica(mesh.state)
    found = [record for record in ledger.issued(state) if record.spiffe_id == NODE or also == "workloads"]
    revocations.add(state, found, mesh.clock(), also, ["n1"])


class Refusal(Exception):
    """How a call ends."""


class Context:
    """Of a call of somebody without a certificate."""

    def peer(self) -> str:
        return "ipv4:192.0.2.1:4711"

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise Refusal(f"{code.name}: {details}")


def join(found: CertificateAuthority, token: str, node: str = "n1") -> x509.Certificate:
    service = JoinService(found, TokenAttestor(found), None, time.monotonic)
    asked = pb.JoinRequest(node=node, csr=request(new_key()), token=token)
    context: Any = Context()
    return decoded(asyncio.run(service.Join(asked, context)).chain)[0]


def new_token(mesh: Mesh, node: str = "") -> str:
    return str(TokenStore(Replica(mesh.state), mesh.clock).create(node, 3600, "0" * 64)[0])


@pytest.mark.parametrize("also", ["node", "workloads"])
def test_a_replica_that_lags_revokes_what_it_gave_a_revoked_node_and_nothing_of_one_that_has_joined_again(
    tmp_path: Path, also: str
) -> None:
    mesh = Mesh(tmp_path)
    one, _ = mesh.authority("one")
    other, lagging = mesh.authority("other")
    stolen = certificate(one, NODE)
    tick(one, other)
    lagging.lags = True
    revoke_node(mesh, also)
    tick(one)
    assert one.is_revoked(stolen.serial_number)
    joined = join(one, new_token(mesh, "n1"))
    given = [certificate(one, CART, joined), certificate(one, NODE, joined)]
    assert not other.is_revoked(stolen.serial_number)
    renewed, cart = certificate(other, NODE, stolen), certificate(other, CART, stolen)
    given += [certificate(other, CART, joined), certificate(other, NODE, joined)]
    lagging.lags = False
    tick(other, one)
    for found in (one, other):
        assert all(found.is_revoked(leaf.serial_number) for leaf in (stolen, renewed))
        assert found.is_revoked(cart.serial_number) == (also == "workloads")
        assert not any(found.is_revoked(leaf.serial_number) for leaf in (joined, *given))
    revoke_node(mesh, also)  # at the same second
    late = certificate(one, NODE, joined)
    tick(one, other)
    assert all(found.is_revoked(leaf.serial_number) for leaf in (joined, late) for found in (one, other))


def test_a_join_that_was_believed_before_its_node_was_revoked_and_is_signed_afterwards_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = Mesh(tmp_path)
    one, _ = mesh.authority("one")
    certificate(one, NODE)
    tick(one)
    issue_now = one.issue_now

    def slowly(orders: Sequence[Order]) -> Any:
        revoke_node(mesh, "node")
        one._read_revoked()
        return issue_now(orders)

    with monkeypatch.context() as patch:
        patch.setattr(one, "issue_now", slowly)
        token = new_token(mesh, "n1")
        with pytest.raises(Refusal, match="UNAVAILABLE"):
            join(one, token)
    join(one, token)  # an operator's word, and it was given back


def test_a_token_for_any_node_gives_no_name_that_a_node_got_at_a_replica_that_this_one_lags_behind(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path)
    one, _ = mesh.authority("one")
    other, lagging = mesh.authority("other")
    token = new_token(mesh)
    tick(other)
    lagging.lags = True
    first = join(one, new_token(mesh, "n1"))
    with pytest.raises(Refusal, match=r"PERMISSION_DENIED: node n1 has a valid certificate, and join token .* is for any node"):
        join(other, token)
    assert [record.serial for record in ledger.issued(Replica(mesh.state)) if record.spiffe_id == NODE] == [f"{first.serial_number:x}"]
    revoke_node(mesh, "node")
    again = join(other, token)  # it was given back, and what was revoked is known although this one lags
    tick(one, other)
    assert not one.is_revoked(again.serial_number)
    mesh.clock.now += JOINING_S
    with pytest.raises(Refusal, match="has a valid certificate"):
        join(one, new_token(mesh))


def earlier(content: bytes) -> list[dict[str, Any]]:
    """Read a ledger as the release before knew.json does, which refuses a line with any other field."""
    lines = [json.loads(line) for line in content.splitlines()]
    assert all(line.keys() == {"serial", "spiffe_id", "node", "issuer", "until"} for line in lines)
    return lines


def test_what_was_known_when_a_certificate_was_given_stands_where_an_earlier_release_does_not_read(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path)
    one, shared = mesh.authority("one")
    joined = join(one, new_token(mesh, "n1"))
    assert shared.read(KNEW, "node.n1") is None
    revoke(mesh, joined)
    tick(one)
    again = join(one, new_token(mesh, "n1"))
    renewed = certificate(one, NODE, again)
    (revoked,) = revocations.read(shared)
    knew = {f"{joined.serial_number:x}": 0, f"{again.serial_number:x}": revoked.at, f"{renewed.serial_number:x}": revoked.at}
    assert {record.serial: record.knew for record in ledger.issued(shared)} == knew
    lines = earlier(shared.read(ISSUED, "node.n1") or b"")

    def go_on(documents: Documents) -> None:  # as the earlier release does
        kept = [line for line in lines if line["serial"] != f"{again.serial_number:x}"]
        documents.write(ISSUED, "".join(json.dumps(line) + "\n" for line in [*kept, {**lines[0], "serial": "1"}]))

    Replica(mesh.state).change(go_on, "node.n1")
    del knew[f"{again.serial_number:x}"]
    assert {record.serial: record.knew for record in ledger.issued(shared)} == knew | {"1": 0}
    late = certificate(one, CART, renewed)
    assert ledger.parse_knew(shared.read(KNEW, "node.n1") or b"").keys() == {f"{found.serial_number:x}" for found in (renewed, late)}
    assert len(earlier(shared.read(ISSUED, "node.n1") or b"")) == 4


def test_what_was_known_goes_with_the_last_certificate_also_if_an_earlier_release_has_removed_that(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path)
    one, shared = mesh.authority("one")
    for remove in (False, True):
        revoke(mesh, certificate(one, NODE))
        tick(one)
        certificate(one, NODE)
        assert shared.read(KNEW, "node.n1") is not None
        if remove:
            Replica(mesh.state).change(lambda documents: documents.write(ISSUED, ""), "node.n1")
        else:
            mesh.clock.now += 2 * DAY_S
        one._prune()
        assert shared.groups().keys() <= {"controllers"}


def test_what_was_known_that_stands_in_a_line_is_read_and_moves_with_the_next_certificate(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path)
    one, shared = mesh.authority("one")
    held = {"serial": "1", "spiffe_id": NODE, "node": "n1", "issuer": "0" * 64, "until": int(mesh.clock()) + DAY_S, "knew": 7}
    Replica(mesh.state).change(lambda documents: documents.write(ISSUED, json.dumps(held) + "\n"), "node.n1")
    assert [record.knew for record in ledger.issued(shared)] == [7]
    leaf = certificate(one)
    assert len(earlier(shared.read(ISSUED, "node.n1") or b"")) == 2
    assert {record.serial: record.knew for record in ledger.issued(shared)} == {"1": 7, f"{leaf.serial_number:x}": 0}


@pytest.mark.parametrize("content", ["{", "{}", '{"knew": []}', '{"knew": {"1": "7"}}', '{"knew": {"x": 7}}'])
def test_a_damaged_list_of_what_was_known_is_left_as_it_is_and_nothing_is_signed(tmp_path: Path, content: str) -> None:
    mesh = Mesh(tmp_path)
    one, _ = mesh.authority("one")
    certificate(one)
    Replica(mesh.state).change(lambda documents: documents.write(KNEW, content), "node.n1")
    (made,) = one.issue_now([Order(CART, (key := new_key()).public_key(), request(key), DAY_S, "n1")])
    assert isinstance(made, SigningFailed)
    assert "node.n1/knew.json cannot be used" in str(made)
    assert Replica(mesh.state).read(KNEW, "node.n1") == content.encode()


def test_since_when_a_node_is_barred_is_told_by_certificates_of_its_own_alone(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path)
    one, _ = mesh.authority("one")
    assert one.barred() == one.known_barred == {}
    joined = certificate(one, NODE)
    revoke_node(mesh, "node")
    assert one.known_barred == {}
    tick(one)
    before = {"n1": int(mesh.clock())}
    assert one.barred() == one.known_barred == before
    mesh.clock.now += 60
    revoke(mesh, certificate(one, CART, joined))
    tick(one)
    assert one.barred() == one.known_barred == before
    certificate(one, NODE)
    revoke_node(mesh, "node")
    tick(one)
    assert one.barred() == one.known_barred == {"n1": int(mesh.clock()) + 1}, "later than what was revoked of it before"
    mesh.clock.now += DAY_S + revocations.KEPT_S + 1
    one._prune()
    assert one.barred() == one.known_barred == {"n1": 1}, "what has run out is not on the list any more"
