from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner
from cryptography import x509

from agent.identity import jwt
from agent.identity.trust import jwks
from controller.errors import ControllerError
from controller.identity import keys, rotation
from controller.identity.ca import CaSettings, CertificateAuthority
from controller.identity.certificates import check_chain
from controller.identity.directory import Directory
from controller.main import main
from meshapi import identity_pb2 as pb
from meshapi.join import root_hash
from tests.unit.controller.identity.authorities import make
from tests.unit.controller.identity.harness import (
    DOMAIN,
    Clock,
    Node,
    World,
    authority,
    decoded,
    join,
    new_key,
    presented,
    request,
    sign,
    world,
)

DAY = 86_400
CART = f"spiffe://{DOMAIN}/ns/shop/sa/cart"


def command(directory: Path, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["ca", *arguments, "--ca-directory", str(directory)])
    return result.exit_code, result.stdout + result.stderr


def stages(directory: Path) -> list[str]:
    held = keys.load(Directory(directory))
    assert held is not None
    return [root.stage for root in held.roots]


async def to_its_end(stream: Any) -> None:
    while await stream.read() is not grpc.aio.EOF:
        pass


async def tick(served: World) -> None:
    await served.plane.tick()
    await served.plane.tick()


@contextlib.asynccontextmanager
async def attentive(served: World, *nodes: Node) -> Any:
    """Follow trust as agents do: the newest bundle is what a node trusts."""

    async def follow(node: Node) -> None:
        async with node.identity(served) as stub:
            async for bundle in stub.Trust(pb.TrustRequest()):
                node.trust = bundle

    tasks = [asyncio.create_task(follow(node)) for node in nodes]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def told(served: World, *nodes: Node) -> None:
    """Wait until every node has the newest bundle, and the controller knows that it has: who reads faster than gRPC goes on is ahead of it."""
    ca = served.plane.ca
    for _ in range(10_000):
        if all(node.trust.sequence == ca.trust.current.sequence and ca._delivered.get(node.name) == ca.trust.roots for node in nodes):
            return
        await asyncio.sleep(0.005)
    raise AssertionError("not everybody was told")


async def new_certificate(served: World, node: Node, workload: str) -> x509.Certificate:
    async with node.identity(served) as stub:
        (signed,) = await sign(stub, [(workload, request(new_key()))])
    assert signed.error == ""
    return decoded(signed.chain)[0]


def believed(certificate: x509.Certificate, node: Node, now: float) -> bool:
    try:
        check_chain([certificate], decoded(node.trust.roots), now)
    except ValueError:
        return False
    return True


def test_a_root_is_replaced_and_at_every_moment_every_node_believes_every_certificate(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as served:
            one, two = await join(served, "n1"), await join(served, "n2")
            async with attentive(served, one, two):
                old = await new_certificate(served, one, "shop/cart")
                assert command(served.ca_directory, "rotate", "--wait", "60s")[0] == 0
                await tick(served)
                await told(served, one, two)
                assert [len(node.trust.roots) for node in (one, two)] == [2, 2]
                between = await new_certificate(served, one, "shop/cart")
                assert between.issuer == old.issuer  # trusted everywhere before it signs
                await tick(served)
                assert stages(served.ca_directory) == ["signing", "next"]

                served.clock.after_commands(61)
                await tick(served)
                assert stages(served.ca_directory) == ["retired", "signing"]
                new = await new_certificate(served, two, "shop/redis")
                assert new.issuer != old.issuer
                now = served.clock()
                assert all(believed(certificate, node, now) for certificate in (old, between, new) for node in (one, two))
                assert (await presented(served.join_address))[-1].subject == new.issuer

                renewed = []
                for node in (one, two):  # at half of their life
                    key = new_key()
                    async with node.identity(served) as stub:
                        answer = await stub.Renew(pb.RenewRequest(csr=request(key)))
                    renewed.append(Node(node.name, key, decoded(answer.chain), answer.trust))

                served.clock.now += DAY + 61
                await tick(served)
                assert stages(served.ca_directory) == ["retired", "signing"]  # still within the margin for clocks that are behind
                served.clock.now += rotation.MARGIN_S
                await tick(served)
                assert stages(served.ca_directory) == ["signing"]
                assert [root_hash(root) for root in served.plane.ca.roots] == [
                    root_hash(root) for root in decoded(served.plane.ca.trust.current.roots)
                ]

    asyncio.run(check())


def test_the_new_root_does_not_sign_before_every_node_knows_it_and_no_token_names_the_old_one(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as served:
            one, two = await join(served, "n1"), await join(served, "n2")
            token = served.token("n3", 3600)
            command(served.ca_directory, "rotate", "--wait", "0s")
            served.clock.after_commands(1)
            async with attentive(served, one):
                await tick(served)
                await told(served, one)
                await tick(served)
                code, said = command(served.ca_directory, "show")
                assert (code, stages(served.ca_directory)) == (0, ["signing", "next"])
                assert "waits         not connected since the new root was made: n2\n" in said
                assert f"waits         join tokens that know only the old root: {served.tokens.all()[-1].id}\n" in said
                async with attentive(served, two):
                    await told(served, two)
                    await tick(served)
                    assert stages(served.ca_directory) == ["signing", "next"]
                    three = await join(served, "n3", token)  # what a node that joins is told holds the new root
                    assert len(three.trust.roots) == 2
                    await tick(served)
                    assert stages(served.ca_directory) == ["retired", "signing"]
            assert (await join(served, "n4")).trust.trust_domain == DOMAIN

    asyncio.run(check())


def test_a_node_whose_certificate_has_run_out_is_not_waited_for(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as served:
            await join(served, "n1")
            command(served.ca_directory, "rotate", "--wait", "0s")
            served.clock.after_commands(1)
            await tick(served)
            assert stages(served.ca_directory) == ["signing", "next"]
            served.clock.now += DAY + 1
            await tick(served)
            assert stages(served.ca_directory) == ["retired", "signing"]

    asyncio.run(check())


def test_streams_that_are_open_outlive_every_step_until_their_root_is_forgotten(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as served:
            node = await join(served, "n1")
            async with node.identity(served) as stub:
                stream = stub.Trust(pb.TrustRequest())
                seen = [await stream.read()]
                command(served.ca_directory, "rotate", "--wait", "0s")
                served.clock.after_commands(1)
                await tick(served)
                seen.append(await stream.read())
                for _ in range(100):
                    await tick(served)
                    if stages(served.ca_directory) == ["retired", "signing"]:
                        break
                    await asyncio.sleep(0.01)
                assert stages(served.ca_directory) == ["retired", "signing"]
                await stub.Renew(pb.RenewRequest(csr=request(new_key())))
                assert not stream.done()
                assert [len(bundle.roots) for bundle in seen] == [1, 2]
                assert [bundle.sequence for bundle in seen] == sorted({bundle.sequence for bundle in seen})
                assert (
                    command(served.ca_directory, "rotate", "--now")[0] == 0
                )  # the old root is forgotten, and with it who still has its certificates
                await tick(served)
                for call in (to_its_end(stream), stub.Renew(pb.RenewRequest(csr=request(new_key())))):
                    with pytest.raises(grpc.aio.AioRpcError, match="is not trusted any more: join again") as caught:
                        await asyncio.wait_for(call, 20)
                    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(check())


def test_a_rotation_can_be_cancelled_until_the_new_root_signs_and_called_again_it_says_where_it_stands(tmp_path: Path) -> None:
    directory = tmp_path / "ca"
    authority(directory).stop()
    before = (directory / "authority.json").read_text()
    assert command(directory, "rotate", "--cancel")[0] == 1
    assert "next: the new root signs, not before" in command(directory, "rotate")[1]
    begun = (directory / "authority.json").read_text()
    code, said = command(directory, "rotate")
    assert (code, (directory / "authority.json").read_text()) == (0, begun)
    assert "signing" in said
    assert command(directory, "rotate", "--cancel")[0] == 0
    assert (directory / "authority.json").read_text() == before
    for expected in (["signing", "next"], ["retired", "signing"], ["signing"]):
        assert command(directory, "rotate", "--now")[0] == 0
        assert stages(directory) == expected
    assert command(directory, "rotate", "--now", "--cancel")[0] == 2


@pytest.mark.parametrize("when", ["fsync", "replace"])
@pytest.mark.parametrize("step", ["begin", "switch", "finish"])
def test_a_crash_in_a_step_leaves_the_old_state_or_the_new_one_and_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, when: str
) -> None:
    directory = tmp_path / "ca"
    clock = Clock()
    authority(directory, clock).stop()
    for _ in range({"begin": 0, "switch": 1, "finish": 2}[step]):
        command(directory, "rotate", "--now")
    before = stages(directory)

    class Crash(BaseException):
        pass

    def crash(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync" if when == "fsync" else "pathlib.Path.replace", crash)
        with contextlib.suppress(Crash):
            CliRunner().invoke(main, ["ca", "rotate", "--now", "--ca-directory", str(directory)], standalone_mode=False)
    assert stages(directory) == before
    assert command(directory, "rotate", "--now")[0] == 0
    assert stages(directory) != before
    authority(directory, clock).stop()


def test_a_restart_in_the_middle_goes_on_where_it_was(tmp_path: Path) -> None:
    clock, directory = Clock(), tmp_path / "ca"
    authority(directory, clock).stop()
    command(directory, "rotate", "--wait", "0s")
    clock.after_commands(1)

    async def step() -> None:
        found = authority(directory, clock)
        await found.tick()
        await found.tick()
        found.stop()

    asyncio.run(step())
    assert stages(directory) == ["retired", "signing"]
    clock.now += DAY + rotation.MARGIN_S + 1
    asyncio.run(step())
    assert stages(directory) == ["signing"]


def test_a_root_stays_trusted_as_long_as_the_longest_certificate_that_it_can_have_signed(tmp_path: Path) -> None:
    clock, directory = Clock(), tmp_path / "ca"
    authority(directory, clock, lifetime_s=30 * DAY).stop()
    authority(directory, clock, lifetime_s=3600).stop()
    for _ in range(2):
        command(directory, "rotate", "--now")
    held = keys.load(Directory(directory))
    assert held is not None
    retired = held.root("retired")
    assert retired is not None
    assert retired.until - retired.since == 30 * DAY + rotation.MARGIN_S


def test_a_clock_that_jumps_ahead_for_a_moment_drops_no_root(tmp_path: Path) -> None:
    wall, steady, directory = Clock(), Clock(0.0), tmp_path / "ca"
    found = CertificateAuthority(CaSettings(directory), DOMAIN, wall, steady)
    found.start()
    for _ in range(2):
        command(directory, "rotate", "--now")

    async def check() -> None:
        await found.tick()
        wall.now += 10 * 365 * DAY / 2
        for _ in range(5):
            steady.now += 100
            await found.tick()
        wall.now -= 10 * 365 * DAY / 2
        await found.tick()
        steady.now += 10_000
        await found.tick()

    asyncio.run(check())
    assert stages(directory) == ["retired", "signing"]
    found.stop()


def test_a_ca_file_that_is_damaged_while_it_runs_changes_nothing_and_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = authority(tmp_path / "ca")
    path = tmp_path / "ca" / "authority.json"
    good = path.read_bytes()

    async def check() -> None:
        trusted = found.trust.current
        path.write_bytes(good[:100])
        for _ in range(5):
            await found.tick()
        assert found.trust.current == trusted
        assert path.read_bytes() == good[:100]
        path.write_bytes(good)
        await found.tick()

    asyncio.run(check())
    said = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert said == ["certificate authority cannot go on as it should"]
    found.stop()


def test_jwt_keys_change_after_they_were_published_and_the_old_one_is_kept_for_its_tokens(tmp_path: Path) -> None:
    clock, directory = Clock(), tmp_path / "ca"
    found = authority(directory, clock)

    def kids() -> set[str]:
        return {key["kid"] for key in json.loads(found.trust.current.jwt_keys)["keys"]}

    async def check() -> None:
        first = kids()
        clock.now += rotation.JWT_PERIOD_S + 1
        await found.tick()
        second = kids()
        assert (len(first), len(second), first < second) == (2, 3, True)
        clock.now += 300 + rotation.MARGIN_S + 1
        await found.tick()
        third = kids()
        assert (len(third), third < second, len(third & first)) == (2, True, 1)

    asyncio.run(check())
    found.stop()


def test_steps_out_of_order_are_refused() -> None:
    held = rotation.first(DOMAIN, 1.8e9, DAY, with_root=True)
    steps: list[Callable[[], object]] = [
        lambda: rotation.switch(held, 1.8e9),
        lambda: rotation.cancel(held),
        lambda: rotation.begin(rotation.begin(held, 1.8e9, 0), 1.8e9, 0),
        lambda: rotation.cancel(rotation.switch(rotation.begin(held, 1.8e9, 0), 1.8e9)),
        lambda: rotation.begin(rotation.switch(rotation.begin(held, 1.8e9, 0), 1.8e9), 1.8e9, 0),
    ]
    for step in steps:
        with pytest.raises(ControllerError):
            step()


def test_a_node_that_was_told_the_new_root_believes_a_controller_that_uses_it(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as served:
            node, late = await join(served, "n1"), await join(served, "n2")
            async with attentive(served, node):
                command(served.ca_directory, "rotate", "--now")
                await tick(served)
                await told(served, node)
            command(served.ca_directory, "rotate", "--now")
            await tick(served)
            async with node.identity(served) as stub:
                await stub.Renew(pb.RenewRequest(csr=request(new_key())))
            async with late.identity(served) as stub:
                with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                    await stub.Renew(pb.RenewRequest(csr=request(new_key())))

    asyncio.run(check())


def test_a_rotation_that_begins_while_the_controller_starts_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "ca"
    authority(directory).stop()
    locked = Directory.locked
    begun: list[int] = []

    @contextlib.contextmanager
    def then_begin(self: Directory) -> Any:
        with locked(self):
            yield
        monkeypatch.setattr(Directory, "locked", locked)
        begun.append(command(directory, "rotate")[0])

    monkeypatch.setattr(Directory, "locked", then_begin)
    found = authority(directory)
    asyncio.run(found.tick())
    assert (begun, len(found.roots)) == ([0], 2)
    found.stop()


def test_rotating_at_once_replaces_the_jwt_keys_and_tokens_of_the_old_ones_are_refused_by_who_has_the_new_bundle(tmp_path: Path) -> None:
    directory = tmp_path / "ca"
    found = authority(directory)

    async def check() -> None:
        for _ in range(3):
            token, _ = await found.jwt(CART, ["a"])
            before = found.trust.current
            jwt.validate(token, ["a"], jwks(before.jwt_keys), DOMAIN, found.clock())
            assert "the JWT keys are replaced\n" in command(directory, "rotate", "--now")[1]
            await found.tick()
            bundle = found.trust.current
            assert bundle.sequence > before.sequence
            assert not kids(bundle) & kids(before)
            with pytest.raises(ValueError, match="no key of the trust domain has signed it"):
                jwt.validate(token, ["a"], jwks(bundle.jwt_keys), DOMAIN, found.clock())
            jwt.validate((await found.jwt(CART, ["a"]))[0], ["a"], jwks(bundle.jwt_keys), DOMAIN, found.clock())
        while stages(directory) != ["signing"]:  # the controller takes steps too
            command(directory, "rotate", "--now")
            await found.tick()
        held = kids(found.trust.current)
        assert command(directory, "rotate")[0] == 0  # a rotation that nobody hurries leaves them
        await found.tick()
        assert kids(found.trust.current) == held

    asyncio.run(check())
    found.stop()


def kids(bundle: pb.TrustBundle) -> set[str]:
    return {key["kid"] for key in json.loads(bundle.jwt_keys)["keys"]}


def test_the_jwt_keys_are_replaced_at_once_also_where_somebody_else_signs_certificates(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"command": "false", "roots": make("external root").write(tmp_path, "root")[0]}
    found = authority(tmp_path / "ca", **settings)
    before = kids(found.trust.current)
    assert command(tmp_path / "ca", "rotate")[0] == 1
    assert command(tmp_path / "ca", "rotate", "--now") == (0, "the JWT keys are replaced\nno rotation is under way\n")
    asyncio.run(found.tick())
    assert not kids(found.trust.current) & before
    found.stop()
