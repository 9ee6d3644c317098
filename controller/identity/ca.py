"""The certificate authority while a controller runs: signs, records, publishes what is trusted, and takes the steps that time brings.

Started and kept going by `controller.identity.plane`; asked by the services. Decides nothing about who may have which identity. All that blocks runs in
worker threads. What cannot be read later on (a file that somebody damages meanwhile) changes nothing and is reported; at the start it is refused.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import shlex
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Final, ParamSpec, TypeVar

from cryptography import x509

from controller import metrics
from controller.errors import ControllerError
from controller.identity import about, jwt, keys, operator, revocations, rotation, trust
from controller.identity.about import About
from controller.identity.certificates import Chain, Order, check_chain, vouched
from controller.identity.command import CommandSigner
from controller.identity.crl import RevocationLists
from controller.identity.directory import AUTHORITY, REVOKED, STATUS, Directory, signature_of
from controller.identity.jwtkeys import SharedKeys
from controller.identity.keys import Keys, Root
from controller.identity.lapse import Clock, Lapse
from controller.identity.ledger import FileLedger, Issued, Ledger, SharedLedger, Unless
from controller.identity.names import check_trust_domain, node_id, node_of
from controller.identity.opening import open_keys
from controller.identity.operator import Intermediate
from controller.identity.refusals import SigningFailed
from controller.identity.revocations import Revoked
from controller.identity.signer import LocalSigner, Made, Signer
from controller.identity.times import when
from controller.identity.tokens import TokenStore
from controller.identity.trust import Known, Publication
from controller.store import SharedStore
from controller.waiting import heard
from meshapi import identity_pb2 as pb
from meshapi.join import root_hash

_log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

LIFETIME_S: Final = 86_400
JWT_LIFETIME_S: Final = 300
TICK_S: Final = 1.0
SIGNERS: Final = 4  # calls that sign at the same time
PRUNE_S: Final = 60.0
HOLD_S: Final = 600.0  # how long the clock must say so before anything is forgotten
SOON_S: Final = 10.0  # the same for a step that drops nothing
_NAMES_SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class CaSettings:
    """What a certificate authority can be told."""

    directory: Path
    """The CA directory: state, and the self-made root if nobody else signs."""
    intermediate: Intermediate | None = None
    """An operator's intermediate signs instead."""
    command: str = ""
    """A command signs instead."""
    roots: Path | None = None
    """Roots that are trusted besides the self-made ones; required with `intermediate` and `command`."""
    lifetime_s: int = LIFETIME_S
    """Of X.509-SVIDs."""
    jwt_lifetime_s: int = JWT_LIFETIME_S
    """Of JWT-SVIDs."""
    hold_s: float = HOLD_S
    """How long the clock must say that something has run out before it is forgotten."""

    @property
    def foreign(self) -> bool:
        """Does somebody else's certificate sign, and not a self-made root?"""
        return self.intermediate is not None or bool(self.command)


class CertificateAuthority:
    """One CA directory in use."""

    def __init__(
        self,
        settings: CaSettings,
        trust_domain: str,
        clock: Clock = time.time,
        monotonic: Clock = time.monotonic,
        shared: SharedStore | None = None,
    ) -> None:
        """`shared`: what several controllers remember together; None: this one is alone."""
        self.settings, self.trust_domain, self.clock = settings, trust_domain, clock
        self.directory = Directory(settings.directory)
        """Of keys, and of everything else unless it is shared."""
        self.store = shared or self.directory
        self.tokens = TokenStore(self.store, clock)
        self.trust = Publication()
        self._monotonic = monotonic
        self._lapse = Lapse(clock, monotonic, settings.hold_s)
        self._soon = Lapse(clock, monotonic, min(settings.hold_s, SOON_S))
        self._ledger: Ledger = SharedLedger(shared, self._lapse) if shared is not None else FileLedger(self.directory, self._lapse)
        self._recording = threading.Lock()
        self._jwt_keys = SharedKeys(shared, self.directory, clock, monotonic) if shared is not None else None
        # Not the event loop's own threads: neither a slow signer nor many joins may keep maintenance, or the model, waiting.
        self._signing = ThreadPoolExecutor(SIGNERS, thread_name_prefix="sign")
        # Nor may tokens, which workloads ask for, keep certificates waiting.
        self._jwt_signing = ThreadPoolExecutor(1, thread_name_prefix="jwt")
        self._maintaining = ThreadPoolExecutor(1, thread_name_prefix="ca")
        self._ticking = asyncio.Lock()
        self._owner: IO[str] | None = None
        self._keys: Keys
        self._signer: Signer
        self._outside: tuple[x509.Certificate, ...] = ()
        self._seen: frozenset[x509.Certificate] = frozenset()
        self._revoked: Mapping[str, Revoked] = {}
        self._revoked_version: object = None
        self._newest: Mapping[str, int] = {}
        """`revocations.newest` of what is in `_revoked`."""
        self._barred: Mapping[str, int] = {}
        self._chased: dict[str, Issued] = {}
        self._unchased: set[str] = set()
        """Revocations, by serial, after which nobody has looked yet for what their nodes got meanwhile."""
        self._unclaimed: frozenset[str] = frozenset()
        self._keys_version: list[object] = []
        self._known: Known | None = None
        self._delivered: dict[str, frozenset[str]] = {}
        self._lists = RevocationLists(self.store, self._lapse)
        self._waits: list[str] | None = None
        self._published: tuple[object, ...] = ()
        self._end = ""
        self._pruned = monotonic()
        self._problem = ""

    # What the services ask.

    @property
    def roots(self) -> tuple[x509.Certificate, ...]:
        """Every root that is trusted."""
        own = tuple(root.certificate for root in self._keys.roots)
        return (*own, *(root for root in self._outside if root not in own))

    @property
    def generation(self) -> str:
        """Who signs, and who is trusted: differs after either has changed."""
        signer = self._signer.issuer.certificate if isinstance(self._signer, LocalSigner) else None
        return " ".join(root_hash(certificate) for certificate in (*([signer] if signer else []), *self._outside))

    def is_revoked(self, serial: int) -> bool:
        """True if a certificate with this serial number is not to be believed."""
        return f"{serial:x}" in self._revoked

    def is_forsaken(self, certificate: x509.Certificate, between: Sequence[x509.Certificate] = ()) -> bool:
        """True if a root that was trusted when this controller started, or later, and is not any more, made a certificate.

        `between`: what its owner showed besides it in a handshake that was found good then.
        """
        dropped = self._seen - frozenset(self.roots)
        return bool(dropped) and vouched(certificate, between, dropped) and not vouched(certificate, between, self.roots)

    def holds(self, node: str) -> bool:
        """True if the node has a certificate that is neither revoked nor run out; blocks. Raises ControllerError."""
        name, ended = node_id(self.trust_domain, node), self._ended_now()
        return any(record.spiffe_id == name and record.serial not in ended for record in self._ledger.live(self.clock()))

    def newest(self, node: str) -> int:
        """Return when something of the node was revoked last, as of now; 0 if nothing was. Blocks. Raises ControllerError."""
        return revocations.newest(revocations.read(self.store)).get(node, 0)

    def barred(self) -> Mapping[str, int]:
        """Return the revoked nodes that no operator has restored, and since when, as of now and not of the last tick; blocks. Raises ControllerError."""
        return revocations.barred(self.store, self._node_of)

    @property
    def known_barred(self) -> Mapping[str, int]:
        """The same as of the last tick, which is what calls are let in by."""
        return self._barred

    def _node_of(self, spiffe_id: str) -> str:
        return node_of(self.trust_domain, spiffe_id)

    def delivered(self, node: str, bundle: pb.TrustBundle) -> None:
        """Note that the node was given a bundle."""
        if bundle.sequence == self.trust.current.sequence:
            self._delivered[node] = self.trust.roots

    async def issue(self, orders: Sequence[Order]) -> list[Chain | SigningFailed]:
        """Return a certificate or a failure for each order, in order; each is on record before it is returned. Raises Taken: see `issue_now`."""
        work = self._signing.submit(self.issue_now, orders)
        try:
            return await asyncio.wrap_future(work)
        except asyncio.CancelledError:
            work.add_done_callback(self._nobody_got)
            raise

    async def in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run something that signs, or waits for a lock, in a thread for that."""
        return await asyncio.get_running_loop().run_in_executor(self._signing, functools.partial(work, *args, **kwargs))

    def issue_now(self, orders: Sequence[Order]) -> list[Chain | SigningFailed]:
        """`issue`, blocking. Raises Taken, with nothing on record, if an order cannot be alone."""
        made = self._signer.sign(orders, self.clock())
        done = [(order, result) for order, result in zip(orders, made, strict=True) if not isinstance(result, SigningFailed)]
        try:
            unless = self._unless([order.spiffe_id for order, _ in done if order.alone])
            with self._recording:
                late = {order.node for order, _ in done if order.knew is not None and order.knew < self._newest.get(order.node, 0)}
                if late:
                    return [SigningFailed(f"node {_some(sorted(late))} was revoked meanwhile")] * len(orders)
                if done:
                    records = [_record(order, result, self._newest.get(order.node, 0)) for order, result in done]
                    askers = {record.serial: order.asker for record, (order, _) in zip(records, done, strict=True) if order.asker}
                    self._ledger.append(records, unless, askers)
        except ControllerError as error:
            return [SigningFailed(str(error))] * len(orders)
        return [result if isinstance(result, SigningFailed) else result.chain for result in made]

    def _unless(self, names: Collection[str]) -> Unless | None:
        """Return what tells certificates in force for these names from others."""
        if not names:
            return None
        ended, now = self._ended_now(), self.clock()
        return lambda record: record.spiffe_id in names and record.until > now and record.serial not in ended

    def _ended_now(self) -> frozenset[str]:
        """Serial numbers that count for nothing any more, also of what was revoked after the last tick. Raises ControllerError."""
        return self._unclaimed.union(self._revoked, (record.serial for record in revocations.read(self.store)))

    async def jwt(self, spiffe_id: str, audience: Sequence[str]) -> tuple[str, int]:
        """Return a JWT-SVID and when it runs out (Unix seconds). Raises SigningFailed."""
        return await asyncio.get_running_loop().run_in_executor(self._jwt_signing, self._jwt, spiffe_id, audience)

    def _jwt(self, spiffe_id: str, audience: Sequence[str]) -> tuple[str, int]:
        key = self._keys.jwt_key("signing")
        if key is None or (self._jwt_keys is not None and not self._jwt_keys.knows(key.key.public_key())):
            raise SigningFailed("there is no key for JWT-SVIDs, or nobody has been told of it yet")
        now = int(self.clock())
        return jwt.sign(key.key, spiffe_id, audience, now, now + self.settings.jwt_lifetime_s), now + self.settings.jwt_lifetime_s

    def end_of(self, chain: Chain) -> x509.Certificate:
        """Return the root at which the controller's own chain ends: what join tokens name. Raises ValueError."""
        root = check_chain(chain, self.roots, self.clock())
        self._end = root_hash(root)
        return root

    # Start, maintenance, end.

    def start(self) -> None:
        """Read or make everything; blocks. Raises ControllerError for whatever an operator must put right first."""
        check_trust_domain(self.trust_domain)
        self.directory.prepare()
        self._owner = self.directory.own()
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        if self.settings.foreign and self.settings.roots is None:
            raise ControllerError("--ca-cert, --ca-key and --ca-command need --ca-root: what agents are to trust")
        with self.directory.locked():
            self.directory.tidy()
            self._keys = open_keys(
                self.directory, self.trust_domain, self.settings.lifetime_s, self.clock(), self_made=not self.settings.foreign
            )
            # Still locked, and before the rest is read: what changes from here on is read again.
            self._keys_version = self._keys_signature()
        if self._jwt_keys is not None:
            self._check_shared()
        self._known = trust.read(self.store)
        self._ledger.load()
        self.tokens.all()
        revocations.prepare(self.store)
        self._read_revoked()
        self._lists.load()
        self._outside = self._outside_roots()
        self._signer = self._make_signer()
        self._publish(self._bundle())
        self._lists.save()

    def stop(self) -> None:
        """Let go of the directory; what is being signed is not waited for."""
        self._signing.shutdown(wait=False, cancel_futures=True)
        self._jwt_signing.shutdown(wait=False, cancel_futures=True)
        self._maintaining.shutdown(wait=False, cancel_futures=True)
        if self._owner is not None:
            self._owner.close()
            self._owner = None

    async def maintain(self, after: Callable[[], None]) -> None:
        """Every second, and when others have changed something: take that in, do what is due, publish; for ever.

        `after` blocks and follows in the same thread.
        """
        news, loop = asyncio.Event(), asyncio.get_running_loop()
        if not isinstance(self.store, Directory):
            self.store.listen(lambda: loop.call_soon_threadsafe(news.set))
        while True:
            await heard(news, TICK_S)
            news.clear()
            await self.tick(after)

    async def tick(self, after: Callable[[], None] = lambda: None) -> None:
        """Do what is due once. What goes wrong is reported once and tried again, and keeps nothing else from being done."""
        async with self._ticking:
            loop = asyncio.get_running_loop()
            bundle, problems = await loop.run_in_executor(self._maintaining, self._work)
            if bundle is not None:
                self._publish(bundle)
            problems += await loop.run_in_executor(self._maintaining, _attempt, after)
        problem = "; ".join(dict.fromkeys(problems))
        if problem and problem != self._problem:
            _log.error("certificate authority cannot go on as it should", extra={"error": problem})
        elif self._problem and not problem:
            _log.info("certificate authority problem solved", extra={"problem": self._problem})
        self._problem = problem
        metrics.CA_PROBLEM.set(bool(problem))

    # Below here: worker threads.

    def _make_signer(self) -> Signer:
        own = tuple(root.issuer for root in self._keys.roots)
        if self.settings.command:
            return CommandSigner(_words(self.settings.command), self._outside)
        if self.settings.intermediate is not None:
            issuer = operator.read_issuer(self.settings.intermediate, self.roots, self.clock())
            return LocalSigner(issuer, (issuer, *own))
        signing = self._keys.root("signing")
        if signing is None:
            raise ControllerError(f"{self.directory.path / AUTHORITY} has no root that signs: restore it from a backup")
        return LocalSigner(signing.issuer, own)

    def _outside_roots(self) -> tuple[x509.Certificate, ...]:
        return operator.read_roots(self.settings.roots) if self.settings.roots is not None else ()

    def _work(self) -> tuple[pb.TrustBundle | None, list[str]]:
        """Return a new bundle if there is one, and what went wrong."""
        steps: list[Callable[[], None]] = [
            self._read_revoked,
            self._read_keys,
            self._lists.read,
            self._rotate,
            self._turn_jwt,
            self._share_jwt,
            self._check_end,
        ]
        if self._monotonic() - self._pruned >= min(PRUNE_S, self.settings.hold_s):
            self._pruned = self._monotonic()
            steps.append(self._prune)
        problems = [problem for step in steps for problem in _attempt(step)]
        self._gauges()
        try:
            crl = self._lists.current(self._signer.issuers, self._revoked, self.clock(), self._keys.longest_s)
            problems += _attempt(self._lists.save)  # if not, what is revoked is published all the same
            others = self._jwt_keys.others if self._jwt_keys is not None else ()
            content = (self._keys, self._outside, self._revoked, self._signer, crl, others)
            if self._published and all(new is old for new, old in zip(content, self._published, strict=True)):
                return None, problems
            bundle = self._bundle()
        except (ControllerError, SigningFailed, ValueError) as error:
            return None, [*problems, str(error)]
        self._published = content
        return (bundle if bundle.sequence != self.trust.current.sequence else None), problems

    def _read_revoked(self) -> None:
        """Read again what `ca revoke` changed."""
        version = self.store.signature(REVOKED)
        if version == self._revoked_version:
            return
        certificates, nodes = revocations.known(self.store)
        found = {record.serial: record for record in certificates}
        if self._revoked_version is not None:
            self._unchased |= {record.serial for record in found.values() if record.also and record.serial not in self._revoked}
        self._revoked = {**self._revoked, **found}  # at once: what follows waits for others, and may fail
        with self._recording:  # whatever is recorded after this was asked for by somebody whom the gate does not let have it
            fresh = [found[serial] for serial in self._unchased & found.keys()]
            self._chased |= {record.serial: record for record in self._meanwhile(fresh)}
            self._unchased.clear()
            self._chased = {serial: record for serial, record in self._chased.items() if serial not in found}
            chased = [revocations.revoked(record, int(self.clock())) for record in self._chased.values()]
            self._revoked = {**found, **{record.serial: record for record in chased}}
            self._newest = revocations.newest(certificates)
            self._barred = revocations.since(certificates, nodes, self._node_of)
        _log.info("revocations read", extra={"revoked": len(self._revoked)})
        if self._chased:
            revocations.add(self.store, self._chased.values(), self.clock())
        self._revoked_version = version

    def _meanwhile(self, revoked: Sequence[Revoked]) -> list[Issued]:
        """Return what revoked nodes got after `ca revoke` had read the ledger: who renews every second would never be caught otherwise.

        That is what was given by somebody who did not know of it: this controller until now, and others for as long as they lag. What a node got that has
        joined again since, at another controller that knew, it keeps.
        """
        nodes, wholly = revocations.newest(revoked), revocations.newest(record for record in revoked if record.also == "workloads")
        live = self._ledger.live(self.clock()) if nodes else ()
        since = ((record, nodes if node_of(self.trust_domain, record.spiffe_id) else wholly) for record in live)
        return [record for record, last in since if record.knew < last.get(record.node, 0)]

    def _read_keys(self) -> None:
        """Read again what `ca rotate` or operators changed; all of it is good, or nothing changes."""
        version = self._keys_signature()
        if version == self._keys_version:
            return
        before = (self._keys, self._outside, self._signer)
        try:
            self._keys = self._current_keys()
            self._outside = self._outside_roots()
            self._signer = self._make_signer()
        except ControllerError:
            self._keys, self._outside, self._signer = before
            raise
        self._keys_version = version
        _log.info("certificate authority read", extra={"roots": len(self.roots)})

    def _keys_signature(self) -> list[object]:
        """Return what tells whether anybody changed the CA file or the operator's files."""
        files = [self.settings.roots]
        if self.settings.intermediate is not None:
            files += [self.settings.intermediate.certificate, self.settings.intermediate.key]
        return [self.directory.signature(AUTHORITY), *(signature_of(path) for path in files if path is not None)]

    def _current_keys(self) -> Keys:
        found = keys.load(self.directory)
        if found is None or found.trust_domain != self.trust_domain:
            raise ControllerError(
                f"{self.directory.path / AUTHORITY} is gone or is for another trust domain: put it back; what was read before stays in force"
            )
        return found

    def _rotate(self) -> None:
        upcoming, retired = self._keys.root("next"), self._keys.root("retired")
        waits: list[str] = []
        if upcoming is not None:
            if not self._soon.passed(("wait", upcoming.hash), upcoming.since + upcoming.wait_s):
                waits.append(f"agents have until {when(upcoming.since + upcoming.wait_s)} to hand the new root on")
            waits += self._ignorant(upcoming)
            if not waits:
                self._step(upcoming, rotation.switch, "the new root signs now")
        elif retired is not None and self._lapse.passed(("root", retired.hash), retired.until):
            self._step(retired, lambda found, _now: rotation.finish(found), "the old root is not trusted any more")
        self._report(waits)

    def _step(self, root: Root, step: Callable[[Keys, float], Keys], done: str) -> None:
        with self.directory.locked():
            found = self._current_keys()
            if not any((item.hash, item.stage) == (root.hash, root.stage) for item in found.roots):
                return  # a command was faster: it is read at the next tick
            found = step(found, self.clock())
            keys.store(self.directory, found)
        self._keys = found
        self._signer = self._make_signer()
        _log.warning("root rotation step taken", extra={"step": done, "root": root.hash})

    def _ignorant(self, upcoming: Root) -> list[str]:
        """Return who would not believe a certificate of the next root: nodes that were not told, tokens that name another root."""
        names = {node_of(self.trust_domain, record.spiffe_id) for record in self._believed()} - {""}
        absent = sorted(name for name in names if upcoming.hash not in self._delivered.get(name, frozenset()))
        found = []
        if absent:
            found.append(f"not connected since the new root was made: {_some(absent)}")
        now = self.clock()
        tokens = sorted(record.id for record in self.tokens.all() if record.state(now) == "valid" and record.root != upcoming.hash)
        if tokens:
            found.append(f"join tokens that know only the old root: {_some(tokens)}")
        return found

    def _report(self, waits: list[str]) -> None:
        if waits != self._waits:
            if waits:
                _log.info("root rotation waits", extra={"for": "; ".join(waits)})
            if waits or self._waits or self.directory.signature(STATUS):
                with self.directory.locked():
                    self.directory.write(STATUS, json.dumps({"waits": waits}) + "\n")
            self._waits = waits

    def _turn_jwt(self) -> None:
        signing, now = self._keys.jwt_key("signing"), self.clock()
        due = signing is not None and self._lapse.passed(("jwt", signing.since), signing.since + rotation.JWT_PERIOD_S)
        gone = [key for key in self._keys.jwt if key.stage == "retired" and self._lapse.passed(("jwt", key.since, 0), key.until)]
        if not due and not gone:
            return
        with self.directory.locked():
            found = self._current_keys()
            for key in gone:
                found = replace(found, jwt=tuple(item for item in found.jwt if (item.stage, item.since) != (key.stage, key.since)))
            if due:
                found = rotation.turn_jwt(found, now, self.settings.jwt_lifetime_s)
            keys.store(self.directory, found)
        self._keys = found

    def _share_jwt(self) -> None:
        """Tell the other controllers which keys this one has, and read which ones they have."""
        if self._jwt_keys is None:
            return
        if (withdrawal := self._jwt_keys.withdrawn()) is not None:  # by `ca rotate --now`: whoever has it must not be believed any more
            with self.directory.locked():
                found = rotation.new_jwt(self._current_keys(), self.clock())
                keys.store(self.directory, found)
            self._keys = found
            self._jwt_keys.renewed(withdrawal)
        own = [key.key.public_key() for key in self._keys.jwt]
        self._jwt_keys.tell(own, self.settings.jwt_lifetime_s, rotation.JWT_PERIOD_S + self.settings.jwt_lifetime_s)

    def _check_shared(self) -> None:
        """Make sure that this controller belongs to the others. Raises ControllerError."""
        about.agree(self.store, About(self.trust_domain, self._keys.longest_s))
        self._share_jwt()

    def _check_end(self) -> None:
        """Say so when what signs ends before what it signs should, except of one that is made for so short a time: of that when its last quarter has begun.

        Who renews such certificates has done so before that: cert-manager, at two thirds of their life
        (https://cert-manager.io/docs/usage/certificate/#reissuance-triggered-by-expiry-renewal). Raises ControllerError.
        """
        issuer = self._signer.issuer.certificate if isinstance(self._signer, LocalSigner) else None
        if issuer is None:
            return
        life_s = (issuer.not_valid_after_utc - issuer.not_valid_before_utc).total_seconds()
        if issuer.not_valid_after_utc.timestamp() - self.clock() >= min(self.settings.lifetime_s, life_s / 4):
            return
        step = (
            "put the next one in place of --ca-cert and --ca-key"
            if self.settings.intermediate
            else "begin with `mesh-controller ca rotate`"
        )
        raise ControllerError(
            f"the signing certificate ends on {issuer.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, and all that it signs no later: {step}"
        )

    def _prune(self) -> None:
        revocations.prune(self.store, self._lapse)
        self._read_revoked()
        with self._recording:
            self._ledger.compact()
            self._unclaimed &= {record.serial for record in self._ledger.live(self.clock())}
        self.tokens.lapse()

    def _nobody_got(self, work: Future[list[Chain | SigningFailed]]) -> None:
        """Remember what was made for somebody who did not wait: it must not keep a node from joining, or a root from being replaced."""
        if work.cancelled() or work.exception():
            return
        with self._recording:
            self._unclaimed |= {f"{made[0].serial_number:x}" for made in work.result() if not isinstance(made, SigningFailed)}

    def _gauges(self) -> None:
        metrics.REVOKED.set(len(self._revoked))
        metrics.ROOTS.set(len(self.roots))
        issuer = self._signer.issuer.certificate if isinstance(self._signer, LocalSigner) else None
        metrics.CA_EXPIRY.set(issuer.not_valid_after_utc.timestamp() if issuer else 0)

    def _believed(self) -> Iterable[Issued]:
        ended = (self._revoked, self._unclaimed)
        return (record for record in self._ledger.live(self.clock()) if not any(record.serial in serials for serials in ended))

    def _bundle(self) -> pb.TrustBundle:
        """Return what is trusted now, with its sequence number."""
        own = [key.key.public_key() for key in self._keys.jwt]
        others = self._jwt_keys.others if self._jwt_keys is not None else ()
        bundle = pb.TrustBundle(
            trust_domain=self.trust_domain,
            roots=[trust.der(root) for root in self.roots],
            revoked=sorted(trust.serial_bytes(serial) for serial in self._revoked),
            jwt_keys=jwt.key_set((*own, *(key for key in others if key not in own))),
            crl=self._lists.current(self._signer.issuers, self._revoked, self.clock(), self._keys.longest_s),
        )
        known = trust.number(self._known, bundle, self._end_of_chain(), self.clock())
        if known != self._known:
            trust.write(self.store, known)
            self._known = known
        return bundle

    def _end_of_chain(self) -> str:
        """Return the hash of the root at the end of what this authority signs."""
        signing = self._keys.root("signing")
        if signing is not None:
            return signing.hash
        if isinstance(self._signer, LocalSigner):
            above = self._signer.issuer.above or (self._signer.issuer.certificate,)
            try:
                return root_hash(check_chain(above, self.roots, self.clock()))
            except ValueError:
                return self._end  # run out: what signing says is clearer
        return self._end or root_hash(self._outside[0])

    def _publish(self, bundle: pb.TrustBundle) -> None:
        self._seen |= frozenset(self.roots)
        self.trust.publish(bundle, self.roots)
        self._gauges()
        _log.info("trust published", extra={"sequence": bundle.sequence, "roots": len(bundle.roots), "revoked": len(bundle.revoked)})


def _attempt(step: Callable[[], None]) -> list[str]:
    """Return what went wrong in a step: nothing, or one message."""
    try:
        step()
    except (ControllerError, SigningFailed, OSError, ValueError) as error:
        return [str(error)]
    return []


def _record(order: Order, made: Made, knew: int) -> Issued:
    leaf, knew = made.chain[0], knew if order.knew is None else order.knew
    until = int(leaf.not_valid_after_utc.timestamp())
    return Issued(f"{leaf.serial_number:x}", order.spiffe_id, order.node, root_hash(made.issuer), until, knew)


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError:
        words = []
    if not words:
        raise ControllerError(f"--ca-command {command!r} is no command line: is a quote missing?")
    return words


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
