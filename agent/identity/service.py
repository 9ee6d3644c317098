"""The identities of this node: who has which, until when, and who is to be believed. Owned by the supervisor; everything of `agent.identity` hangs on it.

Made only where the controller is reached over TLS (`agent.identity.part`). Without effect if this node does not join and the controller offers nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from cryptography.hazmat.primitives.serialization import Encoding

from agent.config import Config
from agent.errors import NotFound
from agent.identity import jwt
from agent.identity.authority import Authority, Away, Refused
from agent.identity.certificates import Chain, ceiling
from agent.identity.clock import Clock, Due
from agent.identity.doubt import doubt
from agent.identity.keys import protect_memory
from agent.identity.node import Node, node_id
from agent.identity.store import Kept, Store, Svid, disk
from agent.identity.trust import Trust, decode, jwks
from agent.identity.workloads import Standing, Workloads
from agent.model import LocalWorkload, Workload
from agent.patience import until_one_ends
from agent.report import CertificateStatus, IdentityStatus
from meshapi import identity_pb2 as pb

_log = logging.getLogger(__name__)

STORE_RETRY_S: Final = 10.0
MAX_TOKENS: Final = 1024
"""JWT-SVIDs that are remembered."""
TOKENS_AT_ONCE: Final = 100.0
TOKENS_PER_S: Final = 5.0


class Identity:
    """See the module. Belongs to one event loop; `load` is called before `run`."""

    def __init__(self, config: Config, clock: Clock | None = None) -> None:
        """Touch nothing yet."""
        self._config = config
        self._clock = clock or Clock()
        self._store = Store(config.identity_dir)
        self._authority = Authority(config, self._clock, self._take_trust_message)
        self._workloads = Workloads(self._authority.sign, self._authority.connected, self._clock, self._changed)
        self._node = Node(config, self._authority, self._clock, self._take_trust_message) if config.join is not None else None
        self._trust: Trust | None = None
        self._local: Mapping[int, LocalWorkload] = MappingProxyType({})
        self._listeners: list[Callable[[], None]] = []
        self._watchers: set[asyncio.Event] = set()
        self._to_store = asyncio.Event()
        self._kept = ""
        self._tokens: OrderedDict[tuple[str, str, tuple[str, ...]], tuple[str, float]] = OrderedDict()
        self._budgets: dict[str, tuple[float, float]] = {}
        """By workload: how many tokens it may still ask the controller for, as of when (boot clock)."""
        self.active = asyncio.Event()
        """Set once there is something to serve to workloads and to Envoy."""
        self.callers_refused: Callable[[], int] = lambda: 0
        """Asked for the status; the workload socket sets it."""
        self.socket_problem = ""
        """Why workloads cannot ask for their identities; the workload socket sets it."""

    def load(self) -> None:
        """Begin with what an earlier agent of this node had. Raises EnvironmentUnfit if this node joins and its key would reach a disk."""
        protect_memory()
        if self._node is not None:
            self._node.load()
        else:
            self._authority.ready.set()
        kind = disk(self._config.identity_dir)
        if kind and not self._config.keys_on_disk:
            return
        self._kept = str(self._store.path)
        kept = self._store.read(self._config.trust_domain)
        if kept.trust is not None:
            self._trust = kept.trust
            self._workloads.restore(kept)
            self.active.set()

    def update(self, local: Iterable[LocalWorkload], others: Iterable[Workload] = ()) -> None:
        """Have identities for the workloads in the data path, and for `others` of this node that are not in it right now."""
        self._local = MappingProxyType({one.netns_cookie: one for one in local})
        workloads = [*(one.workload for one in self._local.values()), *others]
        self._budgets = {one.name: self._budgets[one.name] for one in workloads if one.name in self._budgets}
        self._workloads.want({one.name: one.identity(self._config.trust_domain) for one in workloads})
        self.wake()

    async def run(self) -> None:
        """Join, follow, sign and renew until cancelled."""
        if not self._kept:
            _log.warning(
                "keys are kept in memory only: after a restart of the agent identities come from the controller",
                extra={"directory": str(self._config.identity_dir), "file_system": disk(self._config.identity_dir)},
            )
        parts = [self._authority.run(), self._workloads.run(), self._keep_stored()]
        if self._node is not None:
            parts.append(self._node.run())
        try:
            await until_one_ends(*parts)
        finally:
            await asyncio.to_thread(self._write, self._workloads.kept())  # what was signed last survives an orderly end

    @property
    def trust(self) -> Trust | None:
        """Whom to believe."""
        return self._trust

    def now(self) -> float:
        """Unix seconds."""
        return self._clock.wall()

    def svid(self, workload: str) -> Svid | None:
        """The SVID of a workload that holds now."""
        return self._workloads.get(workload)

    def svids(self) -> dict[str, Svid]:
        """By SPIFFE ID; of several workloads with one identity the SVID that lasts longest."""
        found: dict[str, Svid] = {}
        for one in self._workloads.standings():
            if one.svid is not None and (one.spiffe_id not in found or one.svid.chain.not_after > found[one.spiffe_id].chain.not_after):
                found[one.spiffe_id] = one.svid
        return found

    def local(self, netns_cookie: int) -> LocalWorkload | None:
        """The workload in the data path with this network namespace."""
        return self._local.get(netns_cookie)

    def standing(self, workload: str) -> Standing | None:
        """How a workload's identity is doing."""
        return self._workloads.standing(workload)

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Have `listener` called, on the event loop, after every change of certificates or trust. It must not raise."""
        self._listeners.append(listener)

    @contextlib.contextmanager
    def watch(self) -> Iterator[asyncio.Event]:
        """An event that is set at first and after every change of anything; the watcher clears it."""
        event = asyncio.Event()
        event.set()
        self._watchers.add(event)
        try:
            yield event
        finally:
            self._watchers.discard(event)

    def _changed(self) -> None:
        self._to_store.set()
        if self._trust is not None:
            self.active.set()
        for listener in self._listeners:
            listener()
        self.wake()

    def wake(self) -> None:
        """Have every watcher look again."""
        for event in self._watchers:
            event.set()

    def _take_trust_message(self, message: pb.TrustBundle, first: bool) -> None:
        """Bring a bundle into force. Raises ValueError with the one before in force.

        A lower sequence number is taken only as the first of a connection: from a controller that was restored from a backup.
        """
        trust = decode(message, self._config.trust_domain)
        before = self._trust
        if before is not None and trust.sequence < before.sequence:
            if not first:
                raise ValueError(f"trust bundle {trust.sequence} is older than {before.sequence}, which is in force")
            _log.warning(
                "the controller's trust bundle is older than the one before", extra={"before": before.sequence, "now": trust.sequence}
            )
        if trust == before:
            return
        self._trust = trust
        self._tokens.clear()
        if self._node is not None:
            try:
                self._node.write_roots(trust)
            except OSError as error:
                _log.error(
                    "the controller's roots cannot be stored: after its root has changed it is not believed", extra={"reason": str(error)}
                )
        self._workloads.take_trust(trust)

    async def sign_jwt(self, workload: str, audience: Sequence[str]) -> str:
        """A JWT-SVID for a workload of this node: one that was signed before, until half of its life is over. Raises Away or Refused."""
        trust, standing = self._trust, self.standing(workload)
        if trust is None or standing is None:
            raise Refused("there is no identity for this workload")
        key = (workload, standing.spiffe_id, tuple(sorted(set(audience))))
        now = self._clock.wall()
        if (known := self._tokens.get(key)) is not None and now < known[1]:
            self._tokens.move_to_end(key)
            return known[0]
        self._spend(workload)
        answer = await self._authority.sign_jwt(workload, key[2])
        trust = self._trust or trust  # another one may have come meanwhile, without the key that signed this
        try:
            claims = jwt.validate(answer.token, key[2], jwks(trust.jwt_keys), trust.trust_domain, now)
        except jwt.UnknownKey as error:
            raise Away(f"the controller's token does not serve until its key is known here: {error}") from error
        except ValueError as error:
            raise Refused(f"the controller's token does not serve: {error}") from error
        if claims.spiffe_id != standing.spiffe_id:
            raise Refused(f"the controller's token is for another identity than {standing.spiffe_id}")
        self._tokens[key] = (answer.token, now + (claims.expires_at - now) / 2)
        while len(self._tokens) > MAX_TOKENS:
            self._tokens.popitem(last=False)
        return answer.token

    def _spend(self, workload: str) -> None:
        """Raise Away if a workload asks for too many tokens: the controller counts them by node, and one must not use up what is for all."""
        now = self._clock.boot()
        left, since = self._budgets.get(workload, (TOKENS_AT_ONCE, now))
        left = min(TOKENS_AT_ONCE, left + (now - since) * TOKENS_PER_S)
        if left < 1:
            raise Away(f"workload {workload} asks for more than {TOKENS_PER_S:.0f} tokens in a second: keep those that have not expired")
        self._budgets[workload] = (left - 1, now)

    async def _keep_stored(self) -> None:
        while True:
            await self._to_store.wait()
            self._to_store.clear()
            if not await asyncio.to_thread(self._write, self._workloads.kept()):
                await asyncio.sleep(STORE_RETRY_S)
                self._to_store.set()

    def _write(self, kept: Kept) -> bool:
        if not self._kept or kept.trust is None:
            return True
        try:
            self._store.write(kept)
        except OSError as error:
            _log.error(
                "identities not stored, a restart without the controller would lose them; trying again",
                extra={"path": self._kept, "error": str(error)},
            )
            return False
        return True

    def doubt(self, certificate: bytes, ended: bool) -> str:
        """Why the peer that showed a certificate (PEM) is not believed any more: see `agent.identity.doubt`."""
        if self._trust is None:
            return ""
        between = {one for svid in self.svids().values() for one in svid.chain.certificates[1:]}
        return doubt(certificate, self._trust, between, self._clock.wall(), ended=ended)

    def status(self) -> IdentityStatus:
        """For `meshagent status`, `meshagent identity` and /metrics; never a key."""
        trust = self._trust
        if self._authority.offered is False and self._node is None and trust is None:
            return IdentityStatus()
        return IdentityStatus(
            mode="on" if self.active.is_set() else "waiting",
            connected=self._authority.connected.is_set(),
            trust_domain=self._config.trust_domain,
            trust_sequence=None if trust is None else trust.sequence,
            roots=0 if trust is None else len(trust.roots),
            revoked=0 if trust is None else len(trust.revoked),
            kept=self._kept,
            workload_socket=str(self._config.workload_socket),
            node=self._node_status(),
            workloads=tuple(self._standing(one) for one in self._workloads.standings()) if self.active.is_set() else (),
            signed=self._workloads.signed,
            failures=self._workloads.failures,
            callers_refused=self.callers_refused(),
        )

    def _node_status(self) -> CertificateStatus | None:
        if self._node is None:
            return None
        return self._described("", node_id(self._config), self._node.chain, self._node.due, self._node.problem)

    def _described(
        self, workload: str, spiffe_id: str, held: Chain | None, due: Due | None, problem: str, *, chain: bool = False
    ) -> CertificateStatus:
        if held is None:
            return CertificateStatus(workload, spiffe_id, problem=problem)
        above = ceiling(held, self._trust.certificates if self._trust is not None else ())
        return CertificateStatus(
            workload=workload,
            spiffe_id=spiffe_id,
            serial=f"{held.serial:x}",
            not_before=held.not_before,
            expires_at=held.not_after,
            renews_at=None if due is None else due.wall,
            problem=problem,
            chain=tuple(c.public_bytes(Encoding.PEM).decode() for c in held.certificates) if chain else (),
            authority="" if above is None else above.subject.rfc4514_string(),
            authority_begins_at=None if above is None else above.not_valid_before_utc.timestamp(),
            authority_ends_at=None if above is None else above.not_valid_after_utc.timestamp(),
        )

    def _standing(self, one: Standing, *, chain: bool = False) -> CertificateStatus:
        held = None if one.svid is None else one.svid.chain
        return self._described(one.workload, one.spiffe_id, held, one.due, one.problem, chain=chain)

    def show(self, workload: str) -> CertificateStatus:
        """One workload's, with its chain. Raises NotFound."""
        standing = self.standing(workload)
        if standing is None:
            raise NotFound(f"no workload {workload} of this node has an identity: see `meshagent identity list`")
        return self._standing(standing, chain=True)

    def problems(self) -> list[str]:
        """Sentences for `meshagent status`."""
        status = self.status()
        if status.mode == "off":
            return []
        found = [f"workloads cannot ask for their identities: {self.socket_problem}"] if self.socket_problem else []
        if status.node is not None and status.node.problem:
            found.append(f"this node's certificate: {status.node.problem}")
        without = sum(one.expires_at is None and not one.problem for one in status.workloads)
        if without and not status.connected and self._authority.last_error:
            found.append(
                f"{without} workloads have no certificate: identity service of {self._config.controller}: {self._authority.last_error}"
            )
        failing = [one for one in status.workloads if one.problem]
        for one in failing[:_SHOWN]:
            state = (
                "has none"
                if one.expires_at is None
                else f"keeps the one that ends in {max(0, round(one.expires_at - self._clock.wall()))} s"
            )
            found.append(f"workload {one.workload} gets no new certificate and {state}: {one.problem}; see the controller's log")
        if len(failing) > _SHOWN:
            found.append(f"{len(failing) - _SHOWN} more workloads get no new certificate: see `meshagent identity list`")
        return found


_SHOWN: Final = 5
