"""The lab's credentials: who they name, and that they are worth something only to each other."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509

from lab import pki


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A PKI of two nodes."""
    pki.write(tmp_path / "pki", ["node-1", "node-2"], ["10.77.255.254", "fd77:0:0:ff::fe"])
    return tmp_path / "pki"


def names(path: Path) -> x509.SubjectAlternativeName:
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def test_files_are_for_the_owner_only_and_the_authority_leaves_no_key(directory: Path) -> None:
    leaves = {f"{name}.{kind}" for name in ("controller", "node-1", "node-2") for kind in ("crt", "key")}
    assert {path.name for path in directory.iterdir()} == leaves | {"ca.crt"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_an_agent_is_named_by_its_spiffe_id(directory: Path) -> None:
    found = names(directory / "node-2.crt").get_values_for_type(x509.UniformResourceIdentifier)
    assert found == ["spiffe://mesh.local/meshagent/node/node-2"]


def test_the_controller_is_named_by_address_and_name(directory: Path) -> None:
    found = names(directory / "controller.crt")
    assert found.get_values_for_type(x509.DNSName) == ["mesh-controller"]
    assert found.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("10.77.255.254"), ipaddress.ip_address("fd77:0:0:ff::fe")]


def handshake(directory: Path, client: str, ca: Path) -> str:
    """Let `client` talk to the controller over a socket pair; return the URI that the controller sees."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(directory / "controller.crt", directory / "controller.key")
    serving.load_verify_locations(ca)
    serving.verify_mode = ssl.CERT_REQUIRED
    calling = ssl.create_default_context(cafile=str(directory / "ca.crt"))
    calling.load_cert_chain(directory / f"{client}.crt", directory / f"{client}.key")
    ours, theirs = socket.socketpair()
    seen: list[str] = []

    def serve() -> None:
        try:
            with serving.wrap_socket(theirs, server_side=True) as stream:
                certificate = x509.load_der_x509_certificate(stream.getpeercert(binary_form=True) or b"")
                alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
                seen.extend(alternative.get_values_for_type(x509.UniformResourceIdentifier))
                stream.sendall(b"!")
        except ssl.SSLError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with calling.wrap_socket(ours, server_hostname="10.77.255.254") as stream:
            stream.recv(1)
    finally:
        thread.join()
    return "".join(seen)


def test_agent_and_controller_accept_each_other(directory: Path) -> None:
    assert handshake(directory, "node-1", directory / "ca.crt") == "spiffe://mesh.local/meshagent/node/node-1"


def test_an_agent_of_another_lab_is_refused(directory: Path, tmp_path: Path) -> None:
    pki.write(tmp_path / "other", ["node-1"], ["10.77.255.254"])
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(directory, "node-1", tmp_path / "other" / "ca.crt")
