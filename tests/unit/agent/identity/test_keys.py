"""Keys that show nothing, and a process that leaves nothing behind when it crashes."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from agent.identity.keys import PrivateKey


def test_a_request_names_nobody_and_proves_that_the_key_is_held() -> None:
    key = PrivateKey.generate()
    csr = x509.load_der_x509_csr(key.csr())
    assert csr.is_signature_valid
    assert (list(csr.subject), len(csr.extensions)) == ([], 0)
    assert PrivateKey.load(key.der()).public() == key.public()


def test_a_key_shows_nothing_of_itself() -> None:
    key = PrivateKey.generate()
    secret = key.pem().splitlines()[1].decode()
    for text in (repr(key), str(key), f"{key}", repr([key]), repr({"key": key})):
        assert text.strip("[]{}'key: ") == "PrivateKey(...)"
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            attempt(key)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        PrivateKey.load(key.pem())
    assert secret not in "".join(traceback.format_exception(caught.value))


def der(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


def test_other_kinds_of_keys_are_refused() -> None:
    for other in (ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)):
        with pytest.raises(ValueError, match="not a P-256 key"):
            PrivateKey.load(der(other))


@given(st.binary(max_size=200))
def test_anything_else_is_a_value_error_that_quotes_nothing(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^not a private key in PKCS #8, DER$"):
        PrivateKey.load(content)


CRASH = """
import ctypes, os, sys
from agent.identity.keys import PrivateKey, protect_memory
if sys.argv[1] == "protected":
    protect_memory()
key = PrivateKey.generate()
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), os.readlink("/proc/self/ns/net")[:4], flush=True)
os.abort()
"""


@pytest.mark.parametrize(("how", "dumpable"), [("protected", "0"), ("open", "1")])
def test_a_protected_process_leaves_no_core_dump_and_still_sees_itself_in_proc(tmp_path: Path, how: str, dumpable: str) -> None:
    with_cores = ["sh", "-c", 'ulimit -c "$(ulimit -Hc)"; exec "$@"', "sh"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])}
    process = subprocess.Popen(
        [*with_cores, sys.executable, "-c", CRASH, how],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.read().split() == [dumpable.encode(), b"net:"]
    process.stdout.close()
    _, status = os.waitpid(process.pid, 0)
    process.returncode = 0
    assert os.WTERMSIG(status) == signal.SIGABRT
    if how == "protected":
        assert not os.WCOREDUMP(status)
        assert list(tmp_path.iterdir()) == []
