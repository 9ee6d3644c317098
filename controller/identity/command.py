"""An external signer as a command (`--ca-command`): the request goes in on stdin, the chain comes out on stdout, both PEM.

A command and not a directory of request files: it needs no second daemon, leaves nothing behind, says by its exit status and stderr what went wrong, and
is one line for what operators have (`step ca sign`, `vault write pki/sign/...`, a script around a cloud's private CA). The request has no
names, because agents may not ask for any: they are in the environment, and the command must put them into the certificate:

    MESHAGENT_SPIFFE_ID   the one URI name
    MESHAGENT_DNS_NAMES   comma-separated, for the controller's own certificate only
    MESHAGENT_ADDRESSES   IP addresses, likewise
    MESHAGENT_LIFETIME_S  seconds

What it prints is checked against the order before anybody gets it: a signer that errs must not give an agent more than the model does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from controller.identity.certificates import Issuer, Order, check_chain, check_svid
from controller.identity.refusals import SigningFailed
from controller.identity.signer import Made
from meshapi import limits

TIMEOUT_S: Final = limits.COMMAND_S
ALL_S: Final = limits.BEGIN_S  # for one call, however much is asked for in it: others wait for the thread
MAX_OUTPUT: Final = 1 << 16
PARALLEL: Final = 8
_SHOWN: Final = 200


class CommandSigner:
    """Runs one command for each certificate, PARALLEL of them at a time."""

    def __init__(self, command: Sequence[str], roots: Sequence[x509.Certificate]) -> None:
        self._command, self._roots = tuple(command), tuple(roots)

    @property
    def issuers(self) -> tuple[Issuer, ...]:
        """None: only the external authority can sign its revocation lists."""
        return ()

    def sign(self, orders: Sequence[Order], now: float) -> list[Made | SigningFailed]:
        """Run the command for every order; what is not begun within ALL_S fails."""
        deadline = time.monotonic() + ALL_S
        with ThreadPoolExecutor(min(PARALLEL, max(1, len(orders))), thread_name_prefix="ca-command") as pool:
            return list(pool.map(lambda order: self._one(order, now, deadline), orders))

    def _one(self, order: Order, now: float, deadline: float) -> Made | SigningFailed:
        if time.monotonic() > deadline:
            return SigningFailed(
                f"--ca-command {self._command[0]} is too slow: it was not begun within {ALL_S:.0f} s for one of many certificates"
            )
        try:
            return self._run(order, now)
        except SigningFailed as error:
            return error

    def _run(self, order: Order, now: float) -> Made:
        name = self._command[0]
        request = x509.load_der_x509_csr(order.csr).public_bytes(serialization.Encoding.PEM)
        environment = {
            **os.environ,
            "MESHAGENT_SPIFFE_ID": order.spiffe_id,
            "MESHAGENT_DNS_NAMES": ",".join(order.names),
            "MESHAGENT_ADDRESSES": ",".join(order.addresses),
            "MESHAGENT_LIFETIME_S": str(order.lifetime_s),
        }
        try:
            status, out, err = _call(self._command, request, environment)
        except subprocess.TimeoutExpired as error:
            raise SigningFailed(f"--ca-command {name} did not answer within {TIMEOUT_S:.0f} s: can it reach its authority?") from error
        except OSError as error:
            raise SigningFailed(f"--ca-command {name} cannot be run: {error.strerror}; check the path and its x bit") from error
        if status:
            said = " ".join(err.decode(errors="replace").split())[-_SHOWN:] or "nothing"
            raise SigningFailed(f"--ca-command {name} ended with status {status} and said: {said}")
        try:
            chain = tuple(x509.load_pem_x509_certificates(out[:MAX_OUTPUT]))
            chain = (chain[0], *(certificate for certificate in chain[1:] if certificate not in self._roots))
            check_svid(chain, order, self._roots, now)
            root = check_chain(chain, self._roots, now)
        except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
            raise SigningFailed(f"what --ca-command {name} printed for {order.spiffe_id} cannot be used: {error}") from error
        return Made(chain, chain[1] if len(chain) > 1 else root)


def _call(command: Sequence[str], request: bytes, environment: Mapping[str, str]) -> tuple[int, bytes, bytes]:
    """Run a command; return status, stdout and stderr. What it started itself ends with it when it takes too long, instead of piling up."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(request, TIMEOUT_S)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
        return process.returncode, out, err
