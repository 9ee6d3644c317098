"""The controller's own certificate on its ports: made by its authority, renewed while it runs, for new connections at once. Used by the plane.

gRPC asks for the configuration at the start of every handshake (https://grpc.github.io/grpc/python/grpc.html#grpc.dynamic_ssl_server_credentials), so
that neither a new certificate nor a new trusted root costs a connection. The key is made here, is held in memory and never leaves it.
"""

from __future__ import annotations

import logging
import re
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, cast

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from controller.errors import ControllerError
from controller.identity.ca import CertificateAuthority
from controller.identity.certificates import Chain, Order, SigningKey, key_pem, new_key, pem
from controller.identity.names import controller_id
from controller.identity.refusals import SigningFailed
from meshapi.join import CONTROLLER_NAME

_log = logging.getLogger(__name__)

_DNS: Final = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*", re.ASCII)
RETRY_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Shown:
    """What a port shows and whom it believes. PEM; without `client_roots` it asks nobody for a certificate."""

    key: bytes = field(repr=False)
    chain: bytes
    client_roots: bytes = b""

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """Return it as gRPC wants it."""
        return grpc.ssl_server_certificate_configuration([(self.key, self.chain)], root_certificates=self.client_roots or None)


class Port:
    """One listener's changing configuration. gRPC asks from threads of its own."""

    def __init__(self, shown: Shown, *, mutual: bool) -> None:
        if mutual and not shown.client_roots:
            raise ControllerError("there is no root that could vouch for clients: give --ca-root or --tls-client-ca")
        self._lock = threading.Lock()
        self._shown, self._told = shown, shown
        self.credentials: Final = grpc.dynamic_ssl_server_credentials(
            shown.configuration(),
            # None means "no change" (see the module's source); the stub does not know that.
            cast("Callable[[], grpc.ServerCertificateConfiguration]", self._newer),
            require_client_authentication=mutual,
        )

    def show(self, shown: Shown) -> None:
        """Use something else from the next handshake on."""
        with self._lock:
            self._shown = shown

    def _newer(self) -> grpc.ServerCertificateConfiguration | None:
        with self._lock:
            if self._shown == self._told:
                return None
            self._told = self._shown
            return self._shown.configuration()


class OwnCertificate:
    """The controller's certificate. `current` may be called from any one thread at a time."""

    def __init__(self, ca: CertificateAuthority, names: Sequence[str], addresses: Sequence[str]) -> None:
        self._ca = ca
        self._names, self._addresses = tuple(dict.fromkeys((CONTROLLER_NAME, *names))), tuple(dict.fromkeys(addresses))
        self._chain: Chain = ()
        self._key: SigningKey
        self._root: x509.Certificate
        self._renew_at = self._failed_at = 0.0
        self._generation = ""

    def current(self, generation: str) -> tuple[bytes, bytes, bytes]:
        """Return key, chain without and chain with its root, PEM; makes a new one at half of its life, or when `generation` (who signs) differs.

        Raises SigningFailed if there is none that is still good.
        """
        now = self._ca.clock()
        leaf = self._chain[0] if self._chain else None
        born = leaf.not_valid_before_utc.timestamp() if leaf else 0.0
        revoked = leaf is not None and self._ca.is_revoked(leaf.serial_number)
        due = revoked or generation != self._generation or now >= self._renew_at or now < born
        if leaf is None or (due and not 0 <= now - self._failed_at < RETRY_S):
            try:
                self._make(now)
                self._generation = generation
            except SigningFailed as error:
                if leaf is None or now >= leaf.not_valid_after_utc.timestamp():
                    raise
                _log.error("the controller's certificate cannot be renewed, the old one stays", extra={"error": str(error)})
                self._failed_at = now
        return key_pem(self._key), pem(self._chain), pem((*self._chain, *(() if self._chain[-1] == self._root else (self._root,))))

    def _make(self, now: float) -> None:
        key = new_key()
        request = x509.CertificateSigningRequestBuilder(x509.Name([])).sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
        spiffe_id, lifetime_s = controller_id(self._ca.trust_domain), self._ca.settings.lifetime_s
        order = Order(spiffe_id, key.public_key(), request, lifetime_s, names=self._names, addresses=self._addresses)
        (made,) = self._ca.issue_now([order])
        if isinstance(made, SigningFailed):
            raise made
        try:
            self._root = self._ca.end_of(made)
        except ValueError as error:
            raise SigningFailed(f"the controller's own certificate would not be believed: {error}") from error
        self._key, self._chain = key, made
        self._renew_at = now + (made[0].not_valid_after_utc.timestamp() - now) / 2
        _log.info(
            "controller certificate made",
            extra={"serial": f"{made[0].serial_number:x}", "names": ",".join((*self._names, *self._addresses))},
        )


def split_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return DNS names and IP addresses out of a mixture. Raises ControllerError for what is neither."""
    found: tuple[list[str], list[str]] = ([], [])
    for name in names:
        if not _is_address(name) and not (len(name) <= 253 and _DNS.fullmatch(name)):
            raise ControllerError(f"--server-name {name!r} is neither a DNS name nor an IP address")
        found[_is_address(name)].append(name)
    return found


def _is_address(name: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, name)
        except (OSError, ValueError):
            continue
        return True
    return False
