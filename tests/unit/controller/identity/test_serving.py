from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from controller.errors import ControllerError
from controller.identity import ledger, revocations
from controller.identity.ca import CaSettings
from controller.identity.plane import Files
from controller.identity.serving import Shown
from controller.main import main
from controller.server import ServerTls
from meshapi import admin_pb2, admin_pb2_grpc, identity_pb2_grpc
from meshapi import identity_pb2 as pb
from tests.unit.controller.harness import Authority
from tests.unit.controller.identity.harness import OPTIONS, Node, ask_to_join, decoded, join, new_key, presented, request, sign, uris, world


def names(certificate: x509.Certificate) -> list[str]:
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*found.get_values_for_type(x509.DNSName), *(str(item) for item in found.get_values_for_type(x509.IPAddress))]


def test_the_controllers_certificate_is_an_svid_with_its_names(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path, server_names=("controller.mesh.example", "192.0.2.1", "2001:db8::1")) as served:
            for address in (served.address, served.join_address):
                leaf = (await presented(address))[0]
                assert uris(leaf) == ["spiffe://mesh.local/meshagent/controller"]
                assert {"mesh-controller", "controller.mesh.example", "localhost", "127.0.0.1", "192.0.2.1", "2001:db8::1"} <= set(
                    names(leaf)
                )

    asyncio.run(check())


def test_it_is_renewed_at_half_of_its_life_without_ending_a_connection(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path, behind_s=43_300) as served:
            node = await join(served, "n1")
            before = [(await presented(address))[0] for address in (served.address, served.join_address)]
            async with node.identity(served) as stub:
                stream = stub.Trust(pb.TrustRequest())
                await stream.read()
                served.clock.now += 43_000
                await served.plane.tick()
                assert [(await presented(address))[0] for address in (served.address, served.join_address)] == before
                served.clock.now += 300
                await served.plane.tick()
                after = [(await presented(address))[0] for address in (served.address, served.join_address)]
                assert after[0] == after[1] != before[0]
                assert after[0].public_key() != before[0].public_key()
                assert (await sign(stub, [("shop/cart", request(new_key()))]))[0].chain
                assert not stream.done()
                stream.cancel()
            async with node.identity(served) as stub:
                await stub.Renew(pb.RenewRequest(csr=request(new_key())))

    asyncio.run(check())


def test_a_clock_that_is_set_back_makes_a_new_certificate(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path, ca=CaSettings(tmp_path / "ca", hold_s=0.0)) as served:
            before = (await presented(served.address))[0]
            served.clock.now -= 3000
            await served.plane.tick()
            after = (await presented(served.address))[0]
            assert after.not_valid_before_utc < before.not_valid_before_utc

    asyncio.run(check())


def test_a_certificate_of_the_controller_that_is_revoked_is_replaced_at_once(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as served:
            before = (await presented(served.address))[0]
            directory = served.plane.ca.directory
            revocations.add(directory, [record for record in ledger.read(directory)[0] if not record.node], served.clock())
            await served.plane.tick()
            after = (await presented(served.address))[0]
            assert (after.serial_number == before.serial_number, served.plane.ca.is_revoked(after.serial_number)) == (False, False)

    asyncio.run(check())


def test_a_clock_before_the_roots_birth_is_refused(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path):
            pass
        with pytest.raises(ControllerError, match="set the clock of this machine"):
            async with world(tmp_path, behind_s=7200):
                pass

    asyncio.run(check())


def test_a_join_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, said = run(tmp_path, "--ca-directory", str(tmp_path / "ca"), "--join-listen", address)
    assert (code, f"Error: cannot listen on {address}: is the port taken?" in said) == (1, True)


def test_files_show_another_certificate_and_let_another_authoritys_clients_in_too(tmp_path: Path) -> None:
    async def check() -> None:
        operators = Authority(tmp_path, "operators")
        pair = operators.issue("controller")
        async with world(tmp_path, tls=ServerTls(pair.certificate, pair.key, operators.ca)) as served:
            shown = x509.load_pem_x509_certificate(pair.certificate.read_bytes())
            for address in (served.address, served.join_address):
                assert await presented(address) == [shown]
            key = new_key()
            message = pb.JoinRequest(node="n1", csr=request(key), token=served.token("n1"))
            answer = await ask_to_join(served, message, operators.ca.read_bytes())
            node = Node(
                "n1",
                key,
                decoded(answer.chain),
                pb.TrustBundle(roots=[x509.load_pem_x509_certificate(operators.ca.read_bytes()).public_bytes(Encoding.DER)]),
            )
            async with node.identity(served) as identity:
                assert (await sign(identity, [("shop/cart", request(new_key()))]))[0].chain
            admin = operators.issue("admin", "spiffe://mesh.local/meshagent/admin")
            credentials = grpc.ssl_channel_credentials(operators.ca.read_bytes(), admin.key.read_bytes(), admin.certificate.read_bytes())
            async with grpc.aio.secure_channel(served.address, credentials, OPTIONS) as channel:
                admins: Any = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call,unused-ignore]
                assert len((await admins.Get(admin_pb2.GetRequest(kind="all"))).objects) == 3
                stub: Any = identity_pb2_grpc.IdentityStub(channel)  # type: ignore[no-untyped-call,unused-ignore]
                with pytest.raises(grpc.aio.AioRpcError, match="PERMISSION_DENIED"):
                    await stub.Renew(pb.RenewRequest(csr=request(new_key())))

    asyncio.run(check())


def run(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    (tmp_path / "src").mkdir(exist_ok=True)
    result = CliRunner().invoke(main, ["run", "--directory", str(tmp_path / "src"), "--socket", str(tmp_path / "c.sock"), *arguments])
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--join-listen", "127.0.0.1:0"), "--join-listen without --ca-directory"),
        (("--ca-cert", "a", "--ca-key", "b", "--ca-root", "c"), "--ca-cert, --ca-key, --ca-root without --ca-directory"),
        (("--ca-directory", "x", "--ca-cert", "a"), "--ca-cert and --ca-key belong together"),
        (("--ca-directory", "x", "--ca-cert", "a", "--ca-key", "b"), "need --ca-root"),
        (("--ca-directory", "x", "--ca-cert", "a", "--ca-key", "b", "--ca-root", "c", "--ca-command", "d"), "exclude each other"),
        (("--ca-directory", "x", "--join-listen", "nowhere"), "is not HOST:PORT"),
        (("--ca-directory", "x", "--kubernetes-api", "https://x"), "--kubernetes-api without --join-listen"),
        (("--ca-directory", "x", "--svid-lifetime", "1s"), "is not between"),
        (("--ca-directory", "x", "--svid-lifetime", "soon"), "is not a number with a unit"),
        (("--ca-directory", "x", "--tls-cert", "a"), "--tls-cert and --tls-key belong together"),
    ],
)
def test_options_that_do_not_go_together_are_status_2(tmp_path: Path, arguments: tuple[str, ...], expected: str) -> None:
    code, said = run(tmp_path, *arguments)
    assert (code, expected in " ".join(said.split())) == (2, True), said


def test_what_an_operator_must_put_right_is_one_line_and_status_1(tmp_path: Path) -> None:
    ca = tmp_path / "ca"
    for arguments, expected in (
        (("--ca-directory", str(ca), "--trust-domain", "Mesh Local"), "--trust-domain 'Mesh Local' cannot be part of a SPIFFE ID"),
        (
            ("--ca-directory", str(ca), "--ca-command", "false", "--ca-root", str(Authority(tmp_path, "x").ca)),
            "cannot get a certificate for itself",
        ),
        (("--ca-directory", "/proc/nothing"), "cannot make the CA directory /proc/nothing"),
        (("--ca-directory", str(ca), "--join-listen", "127.0.0.1:0", "--kubernetes-api", "http://x"), "is not https://"),
        (("--ca-directory", str(ca), "--server-name", "a b"), "--server-name 'a b' is neither a DNS name nor an IP address"),
    ):
        code, said = run(tmp_path, *arguments)
        assert (code, f"Error: {expected}" in said or expected in said) == (1, True), said
        assert "Traceback" not in said


def test_a_real_controller_process_takes_joins_and_what_commands_change(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    code = "from controller.main import main; main()"
    arguments = ["run", "--directory", str(tmp_path / "src"), "--socket", str(tmp_path / "c.sock"), "--ca-directory", str(tmp_path / "ca")]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments, "--listen", "127.0.0.1:0", "--join-listen", "127.0.0.1:0"],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        lines = (json.loads(line) for line in process.stderr)
        assert next(line for line in lines if line["message"] == "nodes can join")["listen"] == "127.0.0.1:0"
        said = CliRunner().invoke(main, ["token", "create", "--ca-directory", str(tmp_path / "ca")])
        assert said.stdout.startswith("mesh1.")
        CliRunner().invoke(main, ["ca", "revoke", "--unknown", "abcd", "--ca-directory", str(tmp_path / "ca")])
        assert next(line for line in lines if line["message"] == "trust published" and line["revoked"] == 1)
        process.send_signal(signal.SIGTERM)
        assert "PRIVATE" not in process.communicate(timeout=60)[1]
    assert process.returncode == 0


def test_a_killed_controller_leaves_nothing_in_the_way_of_the_next(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    code = "from controller.main import main; main()"
    arguments = ["run", "--directory", str(tmp_path / "src"), "--socket", str(tmp_path / "c.sock"), "--ca-directory", str(tmp_path / "ca")]
    roots = set()
    for number in (signal.SIGKILL, signal.SIGTERM):
        with subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            assert next(line for line in process.stderr if json.loads(line)["message"] == "controller serving")
            roots.add(CliRunner().invoke(main, ["ca", "show", "-o", "pem", "--ca-directory", str(tmp_path / "ca")]).stdout)
            process.send_signal(number)
            process.communicate(timeout=60)
    assert len(roots) == 1


def test_no_repr_shows_a_key() -> None:
    assert "secret" not in repr((Shown(b"secret", b""), Files(b"", b"secret")))
