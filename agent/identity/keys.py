"""Private keys that show themselves only to who asks for them by name, and a process that leaves no core dump with them in it."""

from __future__ import annotations

import ctypes
import os
from typing import Final, NoReturn

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat, load_der_private_key

_PR_SET_DUMPABLE: Final = 4  # include/uapi/linux/prctl.h
_libc = ctypes.CDLL(None, use_errno=True)


class PrivateKey:
    """A P-256 key. Its repr, a traceback that quotes it, and pickle show nothing of it."""

    __slots__ = ("_key",)

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key

    @classmethod
    def generate(cls) -> PrivateKey:
        """A new one."""
        return cls(ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def load(cls, der: bytes) -> PrivateKey:
        """From PKCS #8, DER. Raises ValueError, without the content."""
        try:
            key = load_der_private_key(der, None)
        except Exception:  # noqa: BLE001  whatever the parser says may quote what it read
            raise ValueError("not a private key in PKCS #8, DER") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
            raise ValueError("not a P-256 key")  # noqa: TRY004  a parser's one error
        return cls(key)

    def csr(self) -> bytes:
        """A PKCS #10 request, DER, that names nobody: it says that whoever made it has the key (RFC 2986)."""
        return x509.CertificateSigningRequestBuilder(x509.Name([])).sign(self._key, hashes.SHA256()).public_bytes(Encoding.DER)

    def public(self) -> bytes:
        """SubjectPublicKeyInfo, DER."""
        return self._key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def der(self) -> bytes:
        """PKCS #8, DER, not encrypted."""
        return self._key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())

    def pem(self) -> bytes:
        """PKCS #8, PEM, not encrypted."""
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def __repr__(self) -> str:
        return "PrivateKey(...)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a private key is not pickled or copied")


def protect_memory() -> None:
    """Have the kernel write no core dump of this process, also not to a handler, and let nobody without CAP_SYS_PTRACE look into its memory.

    PR_SET_DUMPABLE, prctl(2). What it changes for /proc: the files in /proc/PID of this process belong to root and need CAP_SYS_PTRACE, which a root with
    all capabilities has; the process itself is let in as before (kernel/ptrace.c, __ptrace_may_access). Programs that it starts are dumpable again,
    because execve(2) sets it anew. Memory may still be swapped out: a node with unencrypted swap writes keys to a disk.
    """
    if _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        code = ctypes.get_errno()
        raise OSError(code, f"forbid core dumps: {os.strerror(code)}")
