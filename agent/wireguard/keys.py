"""Curve25519 key pairs (RFC 7748) that show only their public half to who does not ask for the other."""

from __future__ import annotations

import os
from typing import Final, NoReturn

KEY_BYTES: Final = 32


class KeyPair:
    """Kept in memory until the kernel has it, and never written anywhere else. Its repr, and pickle, show nothing of the private half."""

    __slots__ = ("_private", "public")

    def __init__(self, private: bytes = b"") -> None:
        """Make a new one, or take `private` (32 bytes)."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey  # noqa: PLC0415  10 MB that most agents do without

        self._private = private or os.urandom(KEY_BYTES)
        self.public: bytes = X25519PrivateKey.from_private_bytes(self._private).public_key().public_bytes_raw()

    def private(self) -> bytes:
        """For the kernel only."""
        return self._private

    def __reduce__(self) -> NoReturn:
        raise TypeError("a private key is not pickled or copied")
