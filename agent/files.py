"""Files that are whole or not there, and descriptors that are closed again."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write(path: Path, content: bytes, *, durable: bool = False, mode: int = 0o600) -> None:
    """Replace a file atomically: a reader, or a crash, sees the old content or the new, never half.

    `durable` also survives a power cut (fsync(2)). The temporary file begins with a dot and is removed on failure.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            if mode != 0o600:  # what mkstemp(3) gives
                os.fchmod(file.fileno(), mode)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def closing(descriptor: int) -> Iterator[int]:
    """A descriptor that is closed after the block."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)
