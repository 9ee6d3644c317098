"""Who signs: the interface, and the signer that has the key in this process (a self-made root, or an operator's intermediate).

A signer is given orders and makes certificates; it decides nothing about who may have which. Behind this interface stands also a command
(`controller.identity.command`), and there is room for others: an order holds the request itself, so that it can be handed on, for example as a
Kubernetes CertificateSigningRequest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from cryptography import x509

from controller.identity.certificates import Chain, Issuer, Order, new_leaf
from controller.identity.refusals import SigningFailed


class Made(NamedTuple):
    """A certificate with its chain (leaf first, without the root), and the certificate of who signed it."""

    chain: Chain
    issuer: x509.Certificate


class Signer(Protocol):
    """Makes certificates. Called in worker threads, several at a time."""

    @property
    def issuers(self) -> Sequence[Issuer]:
        """Whose revocation lists can be signed here; none if the keys are elsewhere."""

    def sign(self, orders: Sequence[Order], now: float) -> list[Made | SigningFailed]:
        """Return one result for each order, in order; blocks. `now` is Unix seconds. Never raises for one bad order."""


@dataclass(frozen=True, slots=True)
class LocalSigner:
    """Signs with a key in memory. `issuers` also holds retired roots: what they signed can still be revoked."""

    issuer: Issuer
    issuers: tuple[Issuer, ...]

    def sign(self, orders: Sequence[Order], now: float) -> list[Made | SigningFailed]:
        """Sign every order; some 0.2 ms each."""
        results: list[Made | SigningFailed] = []
        for order in orders:
            try:
                results.append(Made(new_leaf(self.issuer, order, now), self.issuer.certificate))
            except SigningFailed as error:
                results.append(error)
        return results
