"""The node's own certificate where the agent gets it itself: joining, renewal, and the two files that the connections to the controller read.

`node.pem` holds key and certificates together, so that they always fit; `roots.pem` whom to believe, replaced whenever the controller announces other
roots. Both are written atomically, mode 0600, and only to memory (`agent.identity.store`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from agent import files
from agent.config import Config
from agent.errors import MeshError
from agent.identity import certificates, join
from agent.identity.authority import Authority
from agent.identity.certificates import Chain
from agent.identity.clock import Clock, Due, renewal
from agent.identity.keys import PrivateKey
from agent.identity.store import Svid, require_memory
from agent.identity.trust import Trust, decode
from agent.patience import Backoff, within
from meshapi import identity_pb2 as pb

_log = logging.getLogger(__name__)

FIRST_BACKOFF_S: Final = 0.5
MAX_BACKOFF_S: Final = 60.0
LOOK_S: Final = 30.0
"""So often the wall clock is looked at: it may have been set."""


class Node:
    """See the module. Belongs to one event loop; `load` is called before it runs."""

    def __init__(self, config: Config, authority: Authority, clock: Clock, take_trust: Callable[[pb.TrustBundle, bool], None]) -> None:
        self._config = config
        self._authority = authority
        self._clock = clock
        self._take_trust = take_trust
        self._svid: Svid | None = None
        self.due: Due | None = None
        """When it is to be renewed."""
        self.problem = ""
        """Why there is no certificate, or no newer one; "" if all is well."""
        assert config.tls is not None  # noqa: S101  Config derives it from `join`
        self._files = config.tls

    @property
    def chain(self) -> Chain | None:
        """The certificate, if it has not expired."""
        chain = self._svid.chain if self._svid else None
        return chain if chain is not None and self._clock.wall() < chain.not_after else None

    def load(self) -> None:
        """Take the certificate that an earlier agent got, if there is a good one. Raises EnvironmentUnfit if keys would reach a disk."""
        require_memory(self._config.identity_dir, on_disk=self._config.keys_on_disk)
        try:
            svid = _parsed(self._files.certificate.read_bytes())
            roots = x509.load_pem_x509_certificates(self._files.ca.read_bytes())
            certificates.verify(svid.chain, roots, self._clock.wall())
            _check_node(svid.chain, self._config)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            _log.warning("this node's stored certificate does not serve, joining anew", extra={"reason": str(error)[:300]})
            return
        self._adopt(svid, fresh=False)

    def _adopt(self, svid: Svid, *, fresh: bool) -> None:
        self._svid = svid
        self.due = renewal(svid.chain.not_before, svid.chain.not_after, self._clock, fresh=fresh)
        self.problem = ""
        self._authority.ready.set()

    async def run(self) -> None:
        """Join, then renew, for ever."""
        backoff = Backoff(FIRST_BACKOFF_S, MAX_BACKOFF_S, self._clock.random)
        key = PrivateKey.generate()  # the same until it has its certificate: a token that was used up for it serves again for it
        while True:
            renewing = self.chain is not None and not self._authority.denied
            if renewing and self.due is not None and not self.due.come(self._clock):
                await asyncio.sleep(min(self.due.wait_s(self._clock) + 0.01, LOOK_S))
                continue
            try:
                if renewing:
                    with contextlib.suppress(asyncio.TimeoutError):
                        await within(self._authority.connected.wait(), LOOK_S)
                    await self._take(key, await self._authority.renew(key.csr()))
                else:
                    await self._join(key)
            except (MeshError, ValueError, OSError) as error:
                if str(error) != self.problem:
                    message = "this node's certificate cannot be renewed" if renewing else "this node cannot join"
                    _log.error(message, extra={"reason": str(error)})
                self.problem = str(error)
                await asyncio.sleep(backoff.pause())
                continue
            backoff.reset()
            key = PrivateKey.generate()

    async def _join(self, key: PrivateKey) -> None:
        given = self._config.join
        assert given is not None  # noqa: S101  only a node that joins has this part
        await self._take(key, await join.ask(self._config.node, given, key.csr()))

    async def _take(self, key: PrivateKey, answer: pb.JoinResponse) -> None:
        """Check an answer, store it, and use it from now on. Raises ValueError or OSError, with everything as it was."""
        chain = certificates.read(answer.chain)
        trust = decode(answer.trust, self._config.trust_domain)
        if chain.public != key.public():
            raise ValueError("the controller's certificate is for another key")
        _check_node(chain, self._config)
        if chain.serial in trust.revoked:
            raise ValueError("the controller's certificate is revoked already")
        certificates.verify(chain, trust.certificates, self._clock.wall())
        svid = Svid(key, chain)
        await asyncio.to_thread(self._write, svid, trust)
        self._adopt(svid, fresh=True)
        _log.info("this node has a certificate", extra={"spiffe_id": chain.spiffe_id, "serial": f"{chain.serial:x}"})
        with contextlib.suppress(ValueError):  # an older bundle than the stream's
            self._take_trust(answer.trust, False)
        self._authority.reconnect()

    def _write(self, svid: Svid, trust: Trust) -> None:
        self._files.certificate.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.write_roots(trust)
        files.write(self._files.certificate, svid.key.pem() + svid.chain.pem)

    def write_roots(self, trust: Trust) -> None:
        """Believe the controller by these roots from its next connection on. Blocking. Raises OSError."""
        files.write(self._files.ca, trust.pem)


def node_id(config: Config) -> str:
    """SPIFFE ID of this node's agent."""
    return f"spiffe://{config.trust_domain}/meshagent/node/{config.node}"


def _check_node(chain: Chain, config: Config) -> None:
    if chain.spiffe_id != node_id(config):
        raise ValueError(f"the certificate is for {chain.spiffe_id!r:.200} and this node is {node_id(config)}")


def _parsed(content: bytes) -> Svid:
    """Key and certificates in one PEM text. Raises ValueError."""
    try:
        key = load_pem_private_key(content, None)
        der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        chain = certificates.read(one.public_bytes(Encoding.DER) for one in x509.load_pem_x509_certificates(content))
    except Exception:  # noqa: BLE001  whatever the parser says may quote what it read
        raise ValueError("node.pem is damaged") from None
    svid = Svid(PrivateKey.load(der), chain)
    if svid.key.public() != svid.chain.public:
        raise ValueError("node.pem holds a key and another key's certificate")
    return svid
