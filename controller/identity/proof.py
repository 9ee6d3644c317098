"""What became of the proof that a node showed when it joined. Made by attestors, used by the service that gives the certificate."""

from __future__ import annotations

from typing import NamedTuple


class Proof(NamedTuple):
    """What was believed."""

    shown: str
    """To log."""
    alone: bool = False
    """It gives no name that somebody has: a certificate is ordered with `Order.alone`, and `ledger.Taken` is raised inside if that cannot be."""
