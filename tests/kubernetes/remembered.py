"""What the ledgers of controllers have of a certificate, for tests; and waiting for what another one has written."""

from __future__ import annotations

import time
from collections.abc import Callable

from controller.identity.ledger import Issued

NOW = 1_700_000_000


def soon(condition: Callable[[], object]) -> None:
    """Wait for a watch."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def issued(number: int, node: str = "n1", until_s: int = NOW + 100) -> Issued:
    return Issued(f"{number:x}", f"spiffe://mesh.local/ns/shop/sa/{node}", node, "", until_s)
