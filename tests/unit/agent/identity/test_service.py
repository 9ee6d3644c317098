"""A node's identities against a controller that really signs: joining, signing, renewal, outages, and what is never given away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from agent.config import Config, Join
from agent.errors import EnvironmentUnfit, NotFound
from agent.identity import authority, jwt, node, workloads
from agent.identity.authority import Away
from agent.identity.clock import Clock
from agent.identity.keys import PrivateKey
from agent.identity.service import Identity
from agent.identity.trust import jwks
from agent.report import encode
from controller.identity import command
from tests.tasks import until
from tests.unit.agent.identity.signer import NODE, TRUST_DOMAIN, JwtKey, Root, Signer, local, spiffe_id, workload


class Hands:
    """Clocks that a test moves on from the real ones; no jitter."""

    def __init__(self) -> None:
        self.wall = self.boot = 0.0

    @property
    def clock(self) -> Clock:
        return Clock(lambda: time.time() + self.wall, lambda: time.monotonic() + self.boot, lambda: 0.5)


@contextlib.asynccontextmanager
async def running(config: Config, clock: Clock | None = None) -> AsyncIterator[Identity]:
    identity = Identity(config, clock)
    identity.load()
    task = asyncio.create_task(identity.run())
    try:
        yield identity
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks that a test moves are looked at often."""
    for module in (node, workloads):
        monkeypatch.setattr(module, "LOOK_S", 0.02)
        monkeypatch.setattr(module, "MAX_BACKOFF_S", 0.1)
    monkeypatch.setattr(authority, "MAX_BACKOFF_S", 0.1)


def test_a_node_joins_with_its_token_and_its_workloads_get_certificates(run_dir: Path) -> None:
    async def check() -> None:
        async with Signer().serving() as signer, running(signer.joining(run_dir)) as identity:
            identity.update([local("cart", 1), local("shop", 2, account="web")])
            signer.accounts["default/shop"] = "web"
            await until(lambda: identity.svid("default/cart") and identity.svid("default/shop"))
            held = identity.svid("default/cart")
            assert held is not None
            assert held.chain.spiffe_id == spiffe_id("cart")
            assert held.chain.public == held.key.public()
            assert set(identity.svids()) == {spiffe_id("cart"), spiffe_id("web")}
            assert signer.joins == [str(signer.token)]
            status = identity.status()
            assert (status.mode, status.connected, status.trust_sequence, status.roots) == ("on", True, 1, 1)
            assert status.node is not None
            assert status.node.spiffe_id == f"spiffe://{TRUST_DOMAIN}/meshagent/node/{NODE}"
            assert identity.problems() == []
            for file in ("node.pem", "roots.pem"):
                assert stat.S_IMODE((run_dir / "identity" / file).stat().st_mode) == 0o600
            assert stat.S_IMODE((run_dir / "identity").stat().st_mode) == 0o700

    asyncio.run(check())


def test_a_node_that_has_joined_does_not_need_its_token_again(run_dir: Path) -> None:
    async def check() -> None:
        async with Signer().serving() as signer:
            for _ in range(3):
                async with running(signer.joining(run_dir)) as identity:
                    await until(lambda: identity.status().connected)
            assert len(signer.joins) == 1

    asyncio.run(check())


@pytest.mark.usefixtures("quick")
def test_a_token_that_is_used_up_is_refused_with_the_next_step_and_a_new_one_is_taken(run_dir: Path) -> None:
    async def check() -> None:
        async with Signer().serving() as signer:
            signer.tokens.clear()
            config = signer.joining(run_dir)
            async with running(config) as identity:
                await until(identity.problems)
                (problem,) = identity.problems()
                assert "used up" in problem
                assert "mesh-controller token create" in problem
                signer.tokens.add(str(signer.token))  # the operator replaces the file
                await until(lambda: identity.status().connected)
                assert identity.problems() == []

    asyncio.run(check())


def test_a_controller_without_the_root_that_the_token_names_is_told_nothing(run_dir: Path) -> None:
    async def check() -> None:
        async with Signer().serving() as signer, Signer().serving() as other:
            config = signer.joining(run_dir)
            assert config.join is not None
            elsewhere = replace(config, join=replace(config.join, address=f"127.0.0.1:{other.join_port}"))
            async with running(elsewhere) as identity:
                await until(identity.problems)
                assert "does not have the root that the token names" in identity.problems()[0]
            assert other.joins == []

    asyncio.run(check())


def test_who_shows_the_right_root_without_a_key_of_its_own_is_told_nothing(run_dir: Path) -> None:
    async def check() -> None:
        impostor = Signer()
        async with Signer().serving() as signer:
            config = signer.joining(run_dir)
            assert config.join is not None
            impostor.root = Root()
            impostor.root.certificate, real = signer.root.certificate, impostor.root.certificate
            impostor.trusted = [impostor.root]
            async with impostor.serving():
                elsewhere = replace(config, join=replace(config.join, address=f"127.0.0.1:{impostor.join_port}"))
                async with running(elsewhere) as identity:
                    await until(identity.problems)
            assert impostor.joins == []
            assert real is not impostor.root.certificate

    asyncio.run(check())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(None, "cannot read the token file", id="no-file"),
        pytest.param("mesh1.short", "not a join token", id="no-token"),
        pytest.param("\xff\xfe", "not text", id="not-text"),
    ],
)
def test_a_token_file_that_does_not_serve_is_a_problem_without_its_content(run_dir: Path, content: str | None, said: str) -> None:
    async def check() -> None:
        async with Signer().serving() as signer:
            config = signer.joining(run_dir)
            assert config.join is not None
            assert config.join.token_file is not None
            if content is None:
                config.join.token_file.unlink()
            else:
                config.join.token_file.write_text(content, "latin1")
            async with running(config) as identity:
                await until(identity.problems)
                assert said in identity.problems()[0]
                assert "short" not in identity.problems()[0]

    asyncio.run(check())


@pytest.mark.usefixtures("quick")
def test_a_service_account_token_is_read_anew_and_the_root_is_the_operators_file(run_dir: Path, tmp_path: Path) -> None:
    async def check() -> None:
        async with Signer().serving() as signer:
            signer.tokens = {"second"}
            (tmp_path / "token").write_text("first")
            (tmp_path / "root.pem").write_bytes(signer.root.pem)
            given = Join(f"127.0.0.1:{signer.join_port}", service_account_token_file=tmp_path / "token", root=tmp_path / "root.pem")
            async with running(replace(signer.joining(run_dir), join=given)) as identity:
                await until(lambda: signer.joins)
                (tmp_path / "token").write_text("second")
                await until(lambda: identity.status().connected)
                assert (signer.joins[0], signer.joins[-1]) == ("first", "second")

    asyncio.run(check())


def test_keys_are_refused_to_a_disk_unless_the_operator_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.netns.file_system", lambda _: "ext4")
    given = Join("127.0.0.1:1", token="x")  # noqa: S106
    config = Config(NODE, "127.0.0.1:1", run_dir=tmp_path, trust_domain=TRUST_DOMAIN, join=given)
    with pytest.raises(EnvironmentUnfit, match=r"on ext4.*--keys-on-disk"):
        Identity(config).load()
    Identity(replace(config, keys_on_disk=True)).load()


def test_with_an_operators_files_on_a_disk_keys_stay_in_memory(tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.netns.file_system", lambda _: "ext4")

    async def check() -> None:
        async with Signer().serving() as signer, running(signer.with_files(tmp_path, run_dir)) as identity:
            identity.update([local("cart", 1)])
            await until(lambda: identity.svid("default/cart"))
            assert identity.status().kept == ""
            assert identity.status().node is None

    asyncio.run(check())
    assert not run_dir.exists()


def test_a_controller_without_an_identity_service_leaves_it_off(tmp_path: Path, run_dir: Path) -> None:
    async def check() -> None:
        signer = Signer()
        async with signer.serving():
            signer.fail = grpc.StatusCode.UNIMPLEMENTED
            async with running(signer.with_files(tmp_path, run_dir)) as identity:
                identity.update([local("cart", 1)])
                await until(lambda: identity._authority.offered is False)
                assert identity.status().mode == "off"
                assert identity.problems() == []
                assert not identity.active.is_set()

    asyncio.run(check())


def test_250_workloads_are_signed_in_bounded_batches_within_5_s_and_a_new_one_within_200_ms(run_dir: Path) -> None:
    async def check() -> None:
        async with Signer().serving() as signer, running(signer.joining(run_dir)) as identity:
            await until(lambda: identity.status().connected)
            everybody = [local(f"w{n}", n) for n in range(250)]
            started = time.monotonic()
            identity.update(everybody)
            await until(lambda: len(identity.svids()) == 250, 30)
            took = time.monotonic() - started
            assert max(signer.batches) <= workloads.BATCH
            times = []
            for n in range(7):
                everybody.append(local(f"new{n}", 1000 + n))
                started = time.monotonic()
                identity.update(everybody)
                await until(lambda: identity.svid(f"default/new{n}"))  # noqa: B023
                times.append(time.monotonic() - started)
            print(f"250 signed in {took:.3f} s, one more in {min(times) * 1000:.1f} to {max(times) * 1000:.1f} ms")
            assert took < 5
            assert sorted(times)[len(times) // 2] < 0.2

    asyncio.run(check())


@pytest.mark.usefixtures("quick")
def test_certificates_are_renewed_at_half_of_their_life_with_other_keys(run_dir: Path, tmp_path: Path) -> None:
    hands = Hands()

    async def check() -> None:
        async with Signer().serving() as signer, running(signer.with_files(tmp_path, run_dir), hands.clock) as identity:
            signer.clock, signer.backdate_s = hands.clock.wall, 0
            identity.update([local("cart", 1)])
            await until(lambda: identity.svid("default/cart"))
            first = identity.svid("default/cart")
            assert first is not None
            hands.wall = hands.boot = 1700
            await asyncio.sleep(0.1)
            assert identity.svid("default/cart") is first
            hands.wall = hands.boot = 1850
            await until(lambda: identity.svid("default/cart") is not first)
            second = identity.svid("default/cart")
            assert second is not None
            assert second.key.public() != first.key.public()
            assert second.chain.serial != first.chain.serial

    asyncio.run(check())


@pytest.mark.usefixtures("quick")
def test_the_nodes_certificate_is_renewed_over_the_connection_that_it_made(run_dir: Path) -> None:
    async def check() -> None:
        async with Signer().serving() as signer:
            signer.lifetime_s, signer.backdate_s = 4, 0
            async with running(signer.joining(run_dir)) as identity:
                await until(lambda: identity.status().connected)
                before = (run_dir / "identity" / "node.pem").read_bytes()
                await until(lambda: signer.renewals == 2)
                await until(lambda: (run_dir / "identity" / "node.pem").read_bytes() != before)
                await until(lambda: identity.status().connected)
                assert len(signer.joins) == 1
                assert identity.problems() == []

    asyncio.run(check())


@pytest.mark.parametrize(("wall", "boot"), [pytest.param(1850, 0, id="set-forward"), pytest.param(-86_400, 1850, id="set-back-a-day")])
@pytest.mark.usefixtures("quick")
def test_a_clock_that_is_set_does_not_put_renewal_off(run_dir: Path, wall: float, boot: float) -> None:
    hands = Hands()

    async def check() -> None:
        async with Signer().serving() as signer, running(signer.joining(run_dir), hands.clock) as identity:
            identity.update([local("cart", 1)])
            await until(lambda: identity.svid("default/cart"))
            asked = len(signer.batches)
            hands.wall, hands.boot = wall, boot
            await until(lambda: len(signer.batches) > asked)

    asyncio.run(check())


@pytest.mark.usefixtures("quick")
def test_a_valid_certificate_stays_when_renewal_fails_and_is_gone_when_it_has_expired(run_dir: Path, tmp_path: Path) -> None:
    hands = Hands()

    async def check() -> None:
        async with Signer().serving() as signer, running(signer.with_files(tmp_path, run_dir), hands.clock) as identity:
            signer.clock, signer.backdate_s = hands.clock.wall, 0
            identity.update([local("cart", 1), local("shop", 2)])
            await until(lambda: len(identity.svids()) == 2)
            held = identity.svid("default/cart")
            signer.refuse["default/cart"] = "no such workload on this node"
            changes = []
            identity.subscribe(lambda: changes.append(1))
            hands.wall = hands.boot = 1850
            await until(identity.problems)
            assert identity.svid("default/cart") is held
            (problem,) = identity.problems()
            assert "default/cart gets no new certificate" in problem
            assert "no such workload on this node" in problem
            assert [one.workload for one in identity.status().workloads if one.problem] == ["default/cart"]
            hands.wall = hands.boot = 3700  # also shop's is renewed by then
            await until(lambda: identity.svid("default/cart") is None)
            assert spiffe_id("cart") not in identity.svids()
            assert identity.status().workloads[0].expires_at is None
            assert changes
            await until(lambda: b"cart" not in (run_dir / "identity" / "svids.json").read_bytes())

    asyncio.run(check())


def test_a_restart_while_the_controller_is_away_begins_with_what_there_was(run_dir: Path) -> None:
    async def check() -> None:
        async with Signer().serving() as signer:
            config = signer.joining(run_dir)
            async with running(config) as identity:
                identity.update([local("cart", 1), local("shop", 2)])
                await until(lambda: len(identity.svids()) == 2)
                before = {name: svid.chain.serial for name, svid in identity.svids().items()}
        file = run_dir / "identity" / "svids.json"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        async with running(config) as identity:
            identity.update([local("cart", 1), local("shop", 2)])
            assert {name: svid.chain.serial for name, svid in identity.svids().items()} == before
            assert identity.trust is not None
            identity.update([local("cart", 1)])
            assert set(identity.svids()) == {spiffe_id("cart")}

    asyncio.run(check())


def test_a_workload_that_has_gone_or_has_another_account_loses_its_certificate_at_once(run_dir: Path) -> None:
    async def check() -> None:
        async with Signer().serving() as signer, running(signer.joining(run_dir)) as identity:
            identity.update([local("cart", 1)])
            await until(lambda: identity.svid("default/cart"))
            identity.update([local("cart", 1, account="other")])
            assert identity.svid("default/cart") is None
            assert identity.svids() == {}
            signer.accounts["default/cart"] = "other"
            await until(lambda: identity.svid("default/cart"))
            assert set(identity.svids()) == {spiffe_id("other")}
            identity.update([])
            assert identity.svid("default/cart") is None
            with pytest.raises(NotFound):
                identity.show("default/cart")

    asyncio.run(check())


def test_a_workload_whose_namespace_is_away_keeps_its_certificate(run_dir: Path) -> None:
    async def check() -> None:
        async with Signer().serving() as signer, running(signer.joining(run_dir)) as identity:
            identity.update([local("cart", 1)])
            await until(lambda: identity.svid("default/cart"))
            held = identity.svid("default/cart")
            identity.update([], [workload("cart")])
            assert identity.svid("default/cart") is held
            assert identity.local(1) is None

    asyncio.run(check())


def test_a_revoked_certificate_is_given_up_at_once_and_another_asked_for(run_dir: Path) -> None:
    async def check() -> None:
        async with Signer().serving() as signer, running(signer.joining(run_dir)) as identity:
            identity.update([local("cart", 1)])
            await until(lambda: identity.svid("default/cart"))
            first = identity.svid("default/cart")
            assert first is not None
            signer.revoked.append(first.chain.serial)
            await signer.announce()
            await until(lambda: identity.svid("default/cart") not in {None, first})
            assert identity.trust is not None
            assert first.chain.serial in identity.trust.revoked

    asyncio.run(check())


def test_roots_are_rotated_without_a_moment_without_certificates(run_dir: Path) -> None:
    async def check() -> None:
        async with Signer().serving() as signer, running(signer.joining(run_dir)) as identity:
            identity.update([local("cart", 1)])
            await until(lambda: identity.svid("default/cart"))
            first = identity.svid("default/cart")
            old, new = signer.root, Root(name="another root")
            signer.trusted = [old, new]
            await signer.announce()
            await until(lambda: identity.trust is not None and len(identity.trust.roots) == 2)
            assert identity.svid("default/cart") is first
            await until(lambda: (run_dir / "identity" / "roots.pem").read_bytes() == old.pem + new.pem)
            signer.root = new
            signer.trusted = [new]  # too early: what the old root signed is not believed any more
            await signer.announce()
            await until(lambda: identity.svid("default/cart") not in {None, first})

    asyncio.run(check())


@pytest.mark.usefixtures("quick")
def test_a_bundle_that_does_not_hold_leaves_the_one_before(run_dir: Path) -> None:
    async def check() -> None:
        async with Signer().serving() as signer, running(signer.joining(run_dir)) as identity:
            identity.update([local("cart", 1)])
            await until(lambda: identity.svid("default/cart"))
            before = identity.trust
            signer.trusted = []
            await signer.announce()
            await until(lambda: not identity.status().connected)
            assert identity.trust is before
            assert identity.svid("default/cart") is not None
            signer.trusted = [signer.root]
            signer.sequence += 1
            await until(lambda: identity.status().connected)

    asyncio.run(check())


def test_another_connection_costs_no_failure_and_no_certificate(run_dir: Path) -> None:
    async def check() -> None:
        async with Signer().serving() as signer, running(signer.joining(run_dir)) as identity:
            identity.update([local("cart", 1)])
            await until(lambda: identity.svid("default/cart"))
            for n in range(7):
                identity._authority.reconnect()
                identity.update([local("cart", 1), *(local(f"more{m}", 10 + m) for m in range(n))])
                await asyncio.sleep(0.01)
            await until(lambda: len(identity.svids()) == 7)
            assert identity.problems() == []

    asyncio.run(check())


@pytest.mark.parametrize("content", [b"", b"garbage", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_credentials_that_are_none_are_tried_again(run_dir: Path, tmp_path: Path, content: bytes) -> None:
    async def check() -> None:
        async with Signer().serving() as signer:
            config = signer.with_files(tmp_path, run_dir)
            assert config.tls is not None
            good = config.tls.key.read_bytes()
            config.tls.key.write_bytes(content)
            async with running(config) as identity:
                identity.update([local("cart", 1)])
                await until(lambda: identity._authority.last_error)
                config.tls.key.write_bytes(good)
                await until(lambda: identity.svid("default/cart"))

    asyncio.run(check())


@pytest.mark.parametrize(
    "damage", [lambda _: b"", lambda text: text[:-200], lambda text: text[200:], lambda text: text.replace(b"A", b"B")]
)
def test_a_damaged_certificate_of_the_node_is_replaced(run_dir: Path, damage: Callable[[bytes], bytes]) -> None:
    async def check() -> None:
        async with Signer().serving() as signer:
            config = signer.joining(run_dir)
            async with running(config) as identity:
                await until(lambda: identity.status().connected)
            file = run_dir / "identity" / "node.pem"
            file.write_bytes(damage(file.read_bytes()))
            signer.tokens.add(str(signer.token))
            async with running(config) as identity:
                await until(lambda: identity.status().connected)
            assert len(signer.joins) == 2

    asyncio.run(check())


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(lambda b: b"-----BEGIN PRIVATE KEY-----\n" + b)))
def test_any_bytes_are_no_certificate_of_a_node(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^node.pem is damaged$"):
        node._parsed(content)


def test_an_older_bundle_is_refused_unless_a_connection_begins_with_it(run_dir: Path) -> None:
    async def check() -> None:
        async with Signer().serving() as signer, running(signer.joining(run_dir)) as identity:
            await until(lambda: identity.status().connected)
            signer.sequence = 7
            await signer.announce()
            await until(lambda: identity.status().trust_sequence == 8)
            older = signer.bundle()
            older.sequence, older.revoked[:] = 3, [b"\x07"]
            with pytest.raises(ValueError, match="is older than 8"):
                identity._take_trust_message(older, first=False)
            assert identity.status().trust_sequence == 8
            identity._take_trust_message(older, first=True)
            assert (identity.status().trust_sequence, identity.status().revoked) == (3, 1)

    asyncio.run(check())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        pytest.param(lambda _, __: [], "refused: without a reason", id="nothing"),
        pytest.param(lambda _, __: [b"\x30\x03\x02\x01\x01"], "not a certificate", id="no-certificate"),
        pytest.param(lambda signer, _: [signer.root.der], "not an X.509-SVID", id="the-root"),
        pytest.param(lambda _, chain: [Root().der, *chain], "not an X.509-SVID", id="a-root-first"),
        pytest.param(lambda _, chain: [*chain, Root().der], "did not sign the one before", id="a-stranger-above"),
        pytest.param(lambda _, chain: [*chain, *chain], "an intermediate that may not sign", id="a-leaf-above"),
        pytest.param(lambda _, chain: chain * 9, "a chain of 9", id="too-long"),
        pytest.param(lambda _, __: [signed(Root(), "cart")], "is for another key", id="another-key"),
    ],
)
def test_an_answer_that_does_not_hold_is_not_taken(run_dir: Path, spoil: object, said: str) -> None:
    async def check() -> None:
        async with Signer().serving() as signer, running(signer.joining(run_dir)) as identity:
            signer.spoil = lambda name, chain: spoil(signer, chain) if name == "default/cart" else chain  # type: ignore[operator]
            identity.update([local("cart", 1), local("shop", 2)])
            await until(lambda: identity.svid("default/shop") and identity.problems())
            assert identity.svid("default/cart") is None
            assert said in identity.problems()[0]

    asyncio.run(check())


def signed(root: Root, account: str) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    return root.sign(key.public_key(), [x509.UniformResourceIdentifier(spiffe_id(account))]).public_bytes(Encoding.DER)


def test_a_certificate_for_somebody_else_is_not_taken(run_dir: Path) -> None:
    async def check() -> None:
        async with Signer().serving() as signer, running(signer.joining(run_dir)) as identity:
            signer.accounts["default/cart"] = "admin"
            identity.update([local("cart", 1)])
            await until(identity.problems)
            assert identity.svid("default/cart") is None
            assert "sa/admin" in identity.problems()[0]

    asyncio.run(check())


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INTERNAL])
@pytest.mark.usefixtures("quick")
def test_a_controller_that_fails_is_asked_again_and_takes_nothing_away(run_dir: Path, code: grpc.StatusCode) -> None:
    async def check() -> None:
        async with Signer().serving() as signer, running(signer.joining(run_dir)) as identity:
            identity.update([local("cart", 1)])
            await until(lambda: identity.svid("default/cart"))
            held = identity.svid("default/cart")
            signer.fail = code
            identity.update([local("cart", 1), local("shop", 2)])
            await until(identity.problems)
            assert identity.svid("default/cart") is held
            signer.fail = None
            await until(lambda: identity.svid("default/shop"))
            assert identity.problems() == []

    asyncio.run(check())


@pytest.mark.usefixtures("quick")
def test_a_node_whose_certificate_the_controller_does_not_accept_any_more_joins_anew(run_dir: Path) -> None:
    async def check() -> None:
        async with Signer().serving() as signer:
            config = signer.joining(run_dir)
            async with running(config) as identity:
                await until(lambda: identity.status().connected)
            signer.fail = grpc.StatusCode.PERMISSION_DENIED  # revoked
            async with running(config) as identity:
                await until(lambda: len(signer.joins) > 1)
                signer.tokens.add(str(signer.token))
                signer.fail = None
                await until(lambda: identity.status().connected)

    asyncio.run(check())


def private_parts(identity: Identity) -> list[bytes]:
    """Everything that must not get out: keys as PEM, as DER, as numbers, and pieces of their text."""
    keys = [svid.key for svid in identity.svids().values()]
    found = []
    for key in keys:
        numbers = key._key.private_numbers().private_value
        text = b"".join(key.pem().splitlines()[1:-1])
        found += [key.der(), numbers.to_bytes(32, "big"), b"%x" % numbers, b"%d" % numbers, text, text[30:80]]
    return found


def test_no_private_key_is_in_a_log_a_status_an_error_a_repr_or_any_other_file(
    run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.chdir(tmp_path)

    async def check() -> list[bytes]:
        async with Signer().serving() as signer, running(signer.joining(run_dir)) as identity:
            signer.refuse["default/bad"] = "no"
            identity.update([local("cart", 1), local("shop", 2), local("bad", 3)])
            await until(lambda: len(identity.svids()) == 2 and identity.problems())
            signer.fail = grpc.StatusCode.INTERNAL
            secrets = private_parts(identity)
            said: list[bytes | str] = [
                encode(identity.status()),
                encode(identity.show("default/cart")),
                repr(identity.svids()),
                repr(vars(identity._workloads)),
            ]
            said += identity.problems()
            held = identity.svid("default/cart")
            assert held is not None
            for broken in (held.key.der()[:-7], held.key.pem(), b"\x30" + held.key.der()):
                with pytest.raises(ValueError) as caught:  # noqa: PT011
                    PrivateKey.load(broken)
                said += [str(caught.value), repr(caught.value), repr(caught.value.__context__)]
            for text in said:
                content = text if isinstance(text, bytes) else text.encode()
                assert not any(secret in content for secret in secrets)
            return secrets

    secrets = asyncio.run(check())
    logged = "\n".join(f"{record.getMessage()} {vars(record)}" for record in caplog.records).encode()
    assert logged
    assert not any(secret in logged for secret in secrets)
    written = {path: path.read_bytes() for top in (tmp_path, run_dir.parent) for path in top.rglob("*") if path.is_file()}
    assert {path.name for path, content in written.items() if b"PRIVATE" in content or any(s in content for s in secrets)} <= {
        "node.pem",
        "svids.json",
    }
    assert "svids.json" in {path.name for path in written}
    assert {path.stat().st_mode & 0o777 for path in written if path.parent.name == "identity"} == {0o600}
    assert {os.stat(path).st_dev for path in written if path.parent.name == "identity"} == {os.stat("/dev/shm").st_dev}  # noqa: PTH116, S108


def test_a_node_waits_for_certificates_as_long_as_the_slowest_signer_may_take(run_dir: Path) -> None:
    async def check() -> None:
        async with Signer().serving() as signer, running(signer.joining(run_dir)) as identity:
            identity.update([local("cart", 1)])
            await until(lambda: identity.svid("default/cart"))
            assert min(signer.patience) > command.TIMEOUT_S + command.ALL_S

    asyncio.run(check())


def test_a_token_whose_key_was_replaced_while_it_was_signed_is_not_given_to_anybody(run_dir: Path) -> None:
    async def check() -> None:
        async with Signer().serving() as signer, running(signer.joining(run_dir)) as identity:
            identity.update([local("cart", 1)])
            await until(lambda: identity.svid("default/cart"))
            old = identity.trust

            async def replaced() -> None:
                signer.jwt, signer.before_jwt = JwtKey(), nothing
                await signer.announce()
                await until(lambda: identity.trust != old)

            nothing, signer.before_jwt = signer.before_jwt, replaced
            with pytest.raises(Away, match="no key of the trust domain has signed it"):
                await identity.sign_jwt("default/cart", ["a"])
            trust = identity.trust
            assert trust is not None
            token = await identity.sign_jwt("default/cart", ["a"])
            assert jwt.validate(token, ["a"], jwks(trust.jwt_keys), TRUST_DOMAIN, time.time()).spiffe_id == spiffe_id("cart")
            assert signer.jwts == 2

    asyncio.run(check())
