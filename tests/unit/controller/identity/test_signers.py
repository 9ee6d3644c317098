from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from controller.errors import ControllerError
from controller.identity import command, revocations
from controller.identity.ca import SIGNERS, CaSettings
from controller.identity.certificates import ROOT_LIFETIME_S, Order, check_chain, pem, vouched
from controller.identity.ledger import read
from controller.identity.operator import Intermediate
from meshapi import identity_pb2 as pb
from tests.tasks import until
from tests.unit.controller.identity import authorities
from tests.unit.controller.identity.authorities import make
from tests.unit.controller.identity.harness import Clock, authority, decoded, join, new_key, presented, request, sign, uris, world

DAY = 86_400
WORKLOAD = """
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {{name: {node}, namespace: shop}}
spec: {{node: {node}, addresses: [10.0.1.{last}], networkNamespace: {node}, serviceAccount: {node}}}
"""


def operator(tmp_path: Path, **more: Any) -> CaSettings:
    """Return the settings for an intermediate below a root."""
    root = make("operator root")
    certificate, key = make("operator intermediate", root, **more).write(tmp_path, "intermediate")
    return CaSettings(tmp_path / "ca", Intermediate(certificate, key), roots=root.write(tmp_path, "root")[0], hold_s=0.0)


@pytest.mark.parametrize("kind", ["P-256", "P-384", "RSA"])
def test_an_operators_intermediate_signs_and_its_root_is_trusted(tmp_path: Path, kind: str) -> None:
    curve = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1()}.get(kind)
    key = ec.generate_private_key(curve) if curve else rsa.generate_private_key(65537, 2048)

    async def check() -> None:
        async with world(tmp_path, ca=operator(tmp_path, key=key)) as served:
            node = await join(served, "n1")
            assert [item.subject.rfc4514_string() for item in node.chain[1:]] == ["CN=operator intermediate"]
            assert [item.subject.rfc4514_string() for item in decoded(node.trust.roots)] == ["CN=operator root"]
            assert (await presented(served.join_address))[-1].subject.rfc4514_string() == "CN=operator root"
            async with node.identity(served) as stub:
                (signed,) = await sign(stub, [("shop/cart", request(new_key()))])
            check_chain(decoded(signed.chain), decoded(node.trust.roots), served.clock())
            directory = served.plane.ca.directory
            revocations.add(directory, [record for record in read(directory)[0] if record.spiffe_id.endswith("/cart")], served.clock())
            await served.plane.tick()
            crl = x509.load_pem_x509_crl(served.plane.ca.trust.current.crl)
            assert crl.issuer == node.chain[1].subject
            assert [item.serial_number for item in crl] == [decoded(signed.chain)[0].serial_number]

    asyncio.run(check())


def refusal(settings: CaSettings) -> str:
    with pytest.raises(ControllerError) as caught:
        authority(settings.directory, intermediate=settings.intermediate, roots=settings.roots, command=settings.command)
    return str(caught.value)


def test_operators_files_that_cannot_work_are_refused_with_what_and_why(tmp_path: Path) -> None:
    settings = operator(tmp_path)
    files, roots = settings.intermediate, settings.roots
    assert files is not None
    assert roots is not None
    whole, key, root = files.certificate.read_bytes(), files.key.read_bytes(), roots.read_bytes()
    other = make("other")
    leaf_certificate, leaf_key = make("leaf", make("operator root"), ca=False).write(tmp_path, "leaf")
    encrypted = new_key().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    edwards = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for path, content, expected in (
        (files.certificate, whole[:200], "holds no PEM certificate: cut off, or DER?"),
        (files.certificate, b"", "holds no PEM certificate"),
        (files.certificate, pem([other.certificate]), "does not belong to the first certificate of --ca-cert"),
        (files.key, key[:100], "is no unencrypted PEM key: cut off, or encrypted?"),
        (files.key, encrypted, "is no unencrypted PEM key"),
        (files.key, edwards, "is neither ECDSA nor RSA"),
        (files.key, other.write(tmp_path, "other")[1].read_bytes(), "does not belong to the first certificate"),
        (roots, pem([other.certificate]), "does not lead to a root that is trusted; put everything between"),
        (roots, leaf_certificate.read_bytes(), "CN=leaf is no signing certificate"),
        (roots, b"x", "--ca-root"),
    ):
        good = path.read_bytes()
        path.write_bytes(content)
        assert expected in refusal(settings), expected
        path.write_bytes(good)
    files.key.chmod(0o644)
    assert f"everybody may read --ca-key {files.key} (mode 0644): `chmod 600" in refusal(settings)
    files.key.chmod(0o640)
    leaf = CaSettings(settings.directory, Intermediate(leaf_certificate, leaf_key), roots=roots)
    assert "is no signing certificate" in refusal(leaf)
    gone = CaSettings(settings.directory, Intermediate(tmp_path / "gone", files.key), roots=roots)
    assert f"cannot read --ca-cert {tmp_path}/gone: No such file or directory" in refusal(gone)
    assert (files.certificate.read_bytes(), files.key.read_bytes(), roots.read_bytes()) == (whole, key, root)
    authority(settings.directory, intermediate=settings.intermediate, roots=settings.roots).stop()


def test_an_authority_that_forbids_what_it_is_wanted_for_is_refused(tmp_path: Path) -> None:
    narrow = make("narrow root", path_length=0)
    servers = (ExtendedKeyUsageOID.SERVER_AUTH,)
    both = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
    plain = make("plain root")
    for root, intermediate, expected in (
        (narrow, make("below", narrow), "CN=narrow root above"),
        (plain, make("below", plain, purposes=servers), "without serverAuth and clientAuth"),
        (plain, make("below", plain, path_length=0, purposes=both), ""),
    ):
        certificate, key = intermediate.write(tmp_path, "below")
        settings = CaSettings(tmp_path / "ca", Intermediate(certificate, key), roots=root.write(tmp_path, "top")[0])
        if expected:
            assert expected in refusal(settings)
        else:
            authority(settings.directory, intermediate=settings.intermediate, roots=settings.roots).stop()
    certificate, key = narrow.write(tmp_path, "itself")  # signs leaves, which it may
    authority(tmp_path / "other", intermediate=Intermediate(certificate, key), roots=certificate).stop()


def test_an_operators_new_files_are_taken_while_it_runs_and_bad_ones_are_not(tmp_path: Path) -> None:
    settings = operator(tmp_path)
    files, roots = settings.intermediate, settings.roots
    assert files is not None
    assert roots is not None

    async def check() -> None:
        async with world(tmp_path, ca=settings) as served:
            before = await join(served, "n1")
            good = files.certificate.read_bytes()
            files.certificate.write_bytes(good[:50])
            await served.plane.tick()
            await join(served, "n2")
            new_root = make("new root")
            roots.write_bytes(roots.read_bytes() + pem([new_root.certificate]))
            files.certificate.write_bytes(good)
            await served.plane.tick()
            assert len(served.plane.ca.trust.current.roots) == 2
            make("new intermediate", new_root).write(tmp_path, "intermediate")
            await served.plane.tick()
            after = await join(served, "n3")
            assert after.chain[1].subject.rfc4514_string() == "CN=new intermediate"
            assert (await presented(served.join_address))[-1].subject.rfc4514_string() == "CN=new root"
            before.trust = after.trust
            async with before.identity(served) as stub:
                await stub.Renew(pb.RenewRequest(csr=request(new_key())))

    asyncio.run(check())


def test_a_mesh_with_its_own_root_changes_to_an_operators_authority_and_goes_on_trusting_both(tmp_path: Path) -> None:
    clock = Clock()
    first = authority(tmp_path / "ca", clock)
    own = first.roots[0]
    first.stop()
    settings = operator(tmp_path)
    beside = authority(tmp_path / "ca", clock, roots=settings.roots)  # trusted everywhere before it signs
    assert len(beside.trust.current.roots) == 2
    beside.stop()
    changed = authority(tmp_path / "ca", clock, intermediate=settings.intermediate, roots=settings.roots)
    assert own in changed.roots
    assert len(changed.roots) == 2
    clock.now += 86_400 + 361
    asyncio.run(changed.tick())
    assert own not in changed.roots
    changed.stop()
    with pytest.raises(ControllerError, match="has no root that signs, because somebody else signed"):
        authority(tmp_path / "ca", clock)


def external(tmp_path: Path, twist: str = "") -> CaSettings:
    root = make("external root")
    line = authorities.command(tmp_path, root, make("external intermediate", root), twist)
    return CaSettings(tmp_path / "ca", command=line, roots=root.write(tmp_path, "root")[0], hold_s=0.0)


def test_a_command_signs_for_nodes_workloads_and_the_controller_itself(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path, ca=external(tmp_path)) as served:
            node = await join(served, "n1")
            assert uris(node.chain[0]) == ["spiffe://mesh.local/meshagent/node/n1"]
            assert [item.subject.rfc4514_string() for item in node.chain[1:]] == ["CN=external intermediate"]
            async with node.identity(served) as stub:
                answers = await sign(stub, [("shop/cart", request(new_key()))] * 3)
            for answer in answers:
                check_chain(decoded(answer.chain), decoded(node.trust.roots), served.clock())
            assert served.plane.ca.trust.current.crl == b""

    asyncio.run(check())


@pytest.mark.parametrize(
    ("twist", "expected"),
    [
        (
            "names = names if names[0].value.endswith('/controller') else [x509.UniformResourceIdentifier('spiffe://mesh.local/ns/a/sa/b')]",
            "names spiffe",
        ),
        (
            "sys.exit('vault is sealed') if not names[0].value.endswith('/controller') else None",
            "ended with status 1 and said: vault is sealed",
        ),
        ("(sys.stdout.write('nonsense'), sys.exit(0)) if not names[0].value.endswith('/controller') else None", "cannot be used"),
        ("(os.kill(os.getppid(), 0), sys.exit(0)) if not names[0].value.endswith('/controller') else None", "cannot be used"),
    ],
)
def test_what_a_command_does_wrong_gives_nobody_anything_and_costs_no_token(
    tmp_path: Path, twist: str, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def check() -> None:
        settings = external(tmp_path, twist)
        async with world(tmp_path, ca=settings) as served:
            token = served.token("n1")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await join(served, "n1", token)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert caught.value.details() == "the controller cannot sign now; its log says why; asking again later may help"
            assert not [record for record in read(served.plane.ca.directory)[0] if record.node]
            repair(Path(settings.command.split()[1]), twist)
            await join(served, "n1", token)

    asyncio.run(check())
    assert expected in " ".join(str(vars(record).get("error")) for record in caplog.records)


def repair(script: Path, twist: str) -> None:
    script.write_text(script.read_text().replace(twist, ""))


def test_a_command_that_hangs_or_is_not_there_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "TIMEOUT_S", 0.2)
    roots = make("external root").write(tmp_path, "root")[0]
    for index, (line, expected) in enumerate(
        (("sleep 60", "did not answer within"), (f"{tmp_path}/gone", "cannot be run: No such file or directory"))
    ):
        found = authority(tmp_path / str(index), command=line, roots=roots)
        (failed,) = found.issue_now([Order("spiffe://mesh.local/ns/a/sa/b", (key := new_key()).public_key(), request(key), 60)])
        assert expected in str(failed)
        found.stop()
    for line in ("'open", "   "):
        with pytest.raises(ControllerError, match="is no command line"):
            authority(tmp_path / "bad", command=line, roots=roots)


def test_a_slow_signer_keeps_neither_maintenance_nor_the_model_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, begun = tmp_path / "go-on", tmp_path / "begun"
    begun.mkdir()
    slow = f"""
if '/ns/' in names[0].value:
    import pathlib, time
    pathlib.Path({str(begun)!r}, str(os.getpid())).touch()
    while not pathlib.Path({str(go_on)!r}).exists():
        time.sleep(0.02)
"""
    monkeypatch.setattr(command, "TIMEOUT_S", 110.0)
    nodes = [f"n{number}" for number in range(SIGNERS + 2)]  # more than can be asked for at the same time
    model = "---\n".join(WORKLOAD.format(node=node, last=last) for last, node in enumerate(nodes, 2))

    async def check() -> None:
        async with world(tmp_path, model, ca=external(tmp_path, slow)) as served:
            joined = [await join(served, node) for node in nodes]
            async with AsyncExitStack() as stack:
                stubs = [await stack.enter_async_context(node.identity(served)) for node in joined]
                stream = stubs[0].Trust(pb.TrustRequest())
                await stream.read()
                asked = [
                    asyncio.ensure_future(sign(stub, [(f"shop/{n}", request(new_key()))])) for n, stub in zip(nodes, stubs, strict=True)
                ]
                await until(lambda: len(list(begun.iterdir())) == SIGNERS)
                records = [record for record in read(served.plane.ca.directory)[0] if record.spiffe_id.endswith("/controller")]
                revocations.add(served.plane.ca.directory, records, served.clock())
                assert len((await stream.read()).revoked) == 1
                await served.controller.mesh.reload()
                assert not any(call.done() for call in asked)
                stream.cancel()
                go_on.touch()
                assert [item.error for call in asked for item in await call] == [""] * len(nodes)

    try:
        asyncio.run(check())
    finally:
        go_on.touch()


def test_what_a_command_that_hangs_has_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, pid = tmp_path / "hang", tmp_path / "pid"
    script.write_text(f"sleep 600 & echo $! > {pid}.new; mv {pid}.new {pid}; wait\n")

    class Patient(subprocess.Popen[bytes]):
        """Lets the time begin when the script has started what it starts, however busy the machine is."""

        def communicate(self, *arguments: Any) -> Any:
            while not pid.exists():
                time.sleep(0.01)
            return super().communicate(*arguments)

    monkeypatch.setattr(command, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(subprocess, "Popen", Patient)
    found = authority(tmp_path / "ca", command=f"sh {script}", roots=make("external root").write(tmp_path, "root")[0])
    (failed,) = found.issue_now([Order("spiffe://mesh.local/ns/a/sa/b", (key := new_key()).public_key(), request(key), 60)])
    assert "did not answer within" in str(failed)
    stat = Path(f"/proc/{int(pid.read_text())}/stat")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it is gone for good
        while stat.read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
    found.stop()


def test_a_call_that_asks_a_slow_command_for_much_does_not_take_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "ALL_S", 0.05)
    found = authority(tmp_path / "ca", command="sleep 0.2", roots=make("external root").write(tmp_path, "root")[0])
    order = Order("spiffe://mesh.local/ns/a/sa/b", (key := new_key()).public_key(), request(key), 60)
    failed = found.issue_now([order] * 40)
    assert sum("is too slow" in str(item) for item in failed) >= 40 - command.PARALLEL
    found.stop()


def test_operators_files_that_everybody_may_write_to_are_refused(tmp_path: Path) -> None:
    settings = operator(tmp_path)
    assert settings.intermediate is not None
    assert settings.roots is not None
    for path in (settings.roots, settings.intermediate.certificate):
        path.chmod(0o646)
        assert f"{path} (mode 0646), which decides who is believed" in refusal(settings)
        path.chmod(0o644)


def test_who_stands_below_a_root_that_was_dropped_is_sent_away_also_behind_an_intermediate(tmp_path: Path) -> None:
    settings = operator(tmp_path)
    files, roots = settings.intermediate, settings.roots
    assert files is not None
    assert roots is not None

    async def check() -> None:
        async with world(tmp_path, ca=settings) as served:
            before = await join(served, "n1")
            new_root = make("new root")
            roots.write_bytes(roots.read_bytes() + pem([new_root.certificate]))
            await served.plane.tick()
            make("new intermediate", new_root).write(tmp_path, "intermediate")
            await served.plane.tick()
            after = await join(served, "n2")
            before.trust = after.trust
            async with before.identity(served) as stub, after.identity(served) as other:
                stream, others = stub.Trust(pb.TrustRequest()), other.Trust(pb.TrustRequest())
                assert len((await stream.read()).roots) == len((await others.read()).roots) == 2
                roots.write_bytes(pem([new_root.certificate]))
                await served.plane.tick()
                assert len((await others.read()).roots) == 1
                for call in (to_its_end(stream), stub.Renew(pb.RenewRequest(csr=request(new_key())))):
                    with pytest.raises(grpc.aio.AioRpcError, match="is not trusted any more: join again") as caught:
                        await asyncio.wait_for(call, 60)
                    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                await other.Renew(pb.RenewRequest(csr=request(new_key())))

    asyncio.run(check())


async def to_its_end(stream: Any) -> None:
    while await stream.read() is not grpc.aio.EOF:
        pass


def test_only_signing_certificates_lead_to_a_root_and_only_by_what_they_signed() -> None:
    root, other = make("root"), make("other")
    upper = make("upper", root)
    lower = make("lower", upper)
    leaf, stranger = make("leaf", lower, ca=False).certificate, make("leaf", other, ca=False).certificate
    chain = [lower.certificate, upper.certificate]
    assert vouched(leaf, chain, [root.certificate])
    assert vouched(leaf, [stranger, *reversed(chain)], [root.certificate])  # as it was sent, which may be in any order
    assert vouched(stranger, chain, [other.certificate])
    for one, between, roots in (
        (leaf, chain, [other.certificate]),
        (leaf, chain[:1], [root.certificate]),
        (stranger, chain, [root.certificate]),
        (leaf, [make("lower", root).certificate], [root.certificate]),  # the name alone
        (make("below", make("lower", root, ca=False)).certificate, [make("lower", root, ca=False).certificate], [root.certificate]),
        (leaf, chain, []),
    ):
        assert not vouched(one, between, roots)


@pytest.mark.parametrize(
    ("kind", "life_s", "quiet_s", "step"),
    [
        pytest.param("intermediate", 90 * DAY, 89 * DAY - 60, "put the next one in place of --ca-cert and --ca-key", id="intermediate"),
        pytest.param(
            "intermediate", DAY, DAY * 3 // 4 - 3600, "put the next one in place of --ca-cert and --ca-key", id="of-a-day-by-design"
        ),
        pytest.param("root", ROOT_LIFETIME_S, ROOT_LIFETIME_S - DAY - 3600, "begin with `mesh-controller ca rotate`", id="self-made-root"),
    ],
)
def test_a_signing_certificate_whose_end_is_near_is_a_problem_and_one_that_is_made_for_a_short_time_is_none(
    tmp_path: Path, kind: str, life_s: int, quiet_s: int, step: str
) -> None:
    clock = Clock()
    settings: dict[str, Any] = {}
    if kind == "intermediate":
        given = operator(tmp_path, lifetime_s=life_s)
        settings = {"intermediate": given.intermediate, "roots": given.roots}
    own = authority(tmp_path / "ca", clock, lifetime_s=DAY, **settings)
    for seconds, expected in ((60, 0), (quiet_s - 60, 0), (2 * 3600, 1)):
        clock.now += seconds
        problems = [problem for problem in own._work()[1] if "the signing certificate ends on" in problem]
        assert len(problems) == expected, (seconds, problems)
    assert problems[0].endswith(f"UTC, and all that it signs no later: {step}")
