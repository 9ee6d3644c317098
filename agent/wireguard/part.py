"""WireGuard as a part of the agent: keeps the device at what the model says, and says which workloads may be reached without a tunnel.

Owned by the supervisor, which calls `prepare` before the kernel's tables and Envoy get a snapshot, `finish(dialled=True)` when they were sent it,
and `finish()` when Envoy has acknowledged it: what is to be reached through WireGuard is encrypted before it is dialled without a tunnel, and goes on to be
until it is not dialled any more. Nothing here fails a snapshot: what cannot be brought about leaves HBONE in use, is a problem in `status`, and is tried
again. The device works without the agent.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import random
import socket
import time
from base64 import b64encode
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from agent import files
from agent.config import Config
from agent.errors import KernelRefused, MeshError
from agent.model import Direct, Snapshot
from agent.report import WireGuardPeer, WireGuardStatus
from agent.wireguard import device
from agent.wireguard.desired import Desired, desired
from agent.wireguard.device import Device, Found
from agent.wireguard.keys import KeyPair
from meshapi import discovery_pb2 as pb

_log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
CALM_S: Final = 5.0
"""How often it is looked at handshakes, while some are missing and when none is."""
VERIFY_S: Final = 30.0
"""How often all of it is compared with the kernel."""
STALE_S: Final = 190.0
"""A peer whose last handshake is older cannot be talked to: keys end after 180 s (https://www.wireguard.com/protocol/, REJECT_AFTER_TIME), and with keepalives
the next handshake is after 145 s at most."""
PATIENCE_S: Final = 15.0
"""How long a new peer may take before its silence is a problem."""
ROTATE_S: Final = 24 * 3600.0
"""Age at which a key is replaced, give or take a tenth."""
FILE: Final = "wireguard"
"""In the run directory: when the key was made. The key itself is in the kernel only."""


_UNAVAILABLE: Final = (
    "WireGuard, with which this mesh encrypts between nodes, is not available here: {}; "
    "TCP from and to other nodes goes through HBONE instead, UDP between nodes is not encrypted"
)


_KEPT: Final = (
    "WireGuard keeps what is not needed any more until Envoy has acknowledged its whole configuration: if this lasts, Envoy is away or refuses a part, "
    "which is a problem of its own here; what Envoy has not let go of stays encrypted, or is refused"
)


@dataclass(slots=True)
class _Mirror:
    """What the kernel has of ours: endpoint by key, key by address, addresses with routes, sources with rules."""

    peers: dict[bytes, tuple[str, int]] = field(default_factory=dict)
    allowed: dict[str, bytes] = field(default_factory=dict)
    routes: set[str] = field(default_factory=set)
    sources: set[str] = field(default_factory=set)


class WireGuard:
    """One agent's. `start`, then `prepare` and `finish` around each snapshot, `run` for ever."""

    def __init__(self, config: Config, changed: Callable[[], Awaitable[None]], announce: Callable[[], None]) -> None:
        """`changed` brings the snapshot in force again, `announce` has the controller ask for `announcement` anew; both called on the event loop."""
        self._config = config
        self._changed, self._announce = changed, announce
        self._device = Device(str(config.run_dir))
        self._path = config.run_dir / FILE
        self._reason = "it was not looked yet whether the kernel has WireGuard"
        self._nowhere = ""
        """Why other nodes cannot be told where this one is."""
        self._pair: KeyPair | None = None
        """None: the device of the agent before this one has it."""
        self._next: KeyPair | None = None
        self._public = b""
        self._made_at = 0.0
        self._jitter = random.uniform(0.9, 1.1)  # noqa: S311  spreads load, hides nothing
        self._mirror: _Mirror | None = None
        self._made = False
        """The device was brought up by this agent."""
        self._snapshot: Snapshot | None = None
        self._desired = Desired()
        self._found: Mapping[bytes, Found] = {}
        self._since: dict[bytes, float] = {}
        self._problem = ""
        self._keeps_since: float | None = None
        """Since when there is something that only Envoy needs, which has not acknowledged yet that it does not dial it any more."""
        self._told: frozenset[str] = frozenset()
        self._mtu = 0
        self._verified = 0.0
        self.direct = Direct()
        """What may be reached without a tunnel: for the kernel's tables and Envoy."""

    async def start(self) -> None:
        """See whether the kernel has WireGuard, and take over the device of the agent before this one."""
        await asyncio.to_thread(self._start)
        if self._reason:
            _log.info("WireGuard is not available", extra={"reason": self._reason})

    def _start(self) -> None:
        self._reason = device.unavailable()
        if self._reason:
            return
        try:
            socket.if_nametoindex(device.DEVICE)
            state = self._device.read(allowed=False)
        except OSError:
            state = None
        except KernelRefused as error:
            self._reason = str(error)
            return
        if state is None or len(state.public_key) == 0:
            self._new_pair()
            return
        self._public, self._found = state.public_key, state.peers
        try:
            self._made_at = float(self._path.read_text())
        except (OSError, ValueError):
            self._made_at = 0.0  # not known: it is time for another one

    def _new_pair(self) -> None:
        self._pair = KeyPair()
        self._take(self._pair)

    def _take(self, pair: KeyPair) -> None:
        self._pair, self._public, self._made_at = pair, pair.public, time.time()
        try:
            files.write(self._path, f"{self._made_at}\n".encode())
        except OSError as error:
            _log.warning("the age of the WireGuard key is not kept: the next agent will replace it", extra={"error": str(error)})

    # What the controller is told.

    def announcement(self) -> pb.WireGuard | None:
        """How other nodes reach this one; None: not over WireGuard. Blocking."""
        if self._reason:
            return None
        endpoints, self._nowhere = self._endpoints()
        if not endpoints:
            return None
        pair = self._next
        return pb.WireGuard(public_key=pair.public if pair else self._public, port=self._config.wireguard_port, endpoints=endpoints)

    def _endpoints(self) -> tuple[tuple[str, ...], str]:
        """Where this node is reached, or why that is not known."""
        config = self._config
        if config.wireguard_addresses:
            return config.wireguard_addresses, ""
        hint = "give the agent --wireguard-address"
        if config.controller.startswith("unix:"):
            return (), f"its controller is on this machine, which does not tell by which address other nodes reach it: {hint}"
        host, _, port = config.controller.removeprefix("dns:///").rpartition(":")
        try:
            kind, _, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
            with socket.socket(kind, socket.SOCK_DGRAM) as found:
                found.connect(address)  # sends nothing
                own = ipaddress.ip_address(found.getsockname()[0].partition("%")[0])
        except (OSError, ValueError) as error:
            return (), f"no address of its own leads to the controller {config.controller} ({error}): {hint}"
        if own.is_loopback or own.is_link_local:
            return (), f"it reaches its controller from {own}, where other nodes do not reach it: {hint}"
        return (str(own),), ""

    # Around a snapshot.

    async def prepare(self, snapshot: Snapshot) -> None:
        """Add to the device what `snapshot` asks for, and find out what `direct` may be with it. Never fails."""
        if self._reason or not snapshot.nodes:
            self._snapshot, self._desired, self.direct = snapshot, Desired(), Direct()
            return
        await asyncio.to_thread(self._prepare, snapshot)
        self._tell(snapshot)

    def _prepare(self, snapshot: Snapshot) -> None:
        try:
            if not self._same(snapshot):
                self._desired = desired(snapshot, self._config.node, device.own_addresses())
            self._snapshot = snapshot
            self._add(snapshot)
            self._problem = ""
        except (MeshError, OSError) as error:
            if self._problem != str(error):
                _log.error(
                    "WireGuard is not as it should be, HBONE stays in use where it is not; trying again", extra={"reason": str(error)}
                )
            self._problem, self._mirror = str(error), None
        self.direct = self._usable()

    def _same(self, snapshot: Snapshot) -> bool:
        """Is what `_desired` was made of still so?"""
        if self._snapshot is None or snapshot is self._snapshot:
            return False
        delta = snapshot.since(self._snapshot)
        return not delta.workloads and not delta.nodes

    def _add(self, snapshot: Snapshot) -> None:
        own = snapshot.nodes.get(self._config.node)
        if own is None or own.wireguard is None:
            return
        mirror = self._mirrored(own.wireguard.endpoints)
        if self._next is not None and own.wireguard.public_key == self._next.public:
            self._device.rekey(self._next)
            self._take(self._next)
            self._next = None
            _log.info("WireGuard has a new key")
        want = self._desired
        # In this order: an answer is never sent round the device, whatever the other node has already done.
        self._once(self._device.lead, want.allowed.keys() - mirror.routes, mirror.routes)
        self._once(self._device.serve, want.local - mirror.sources, mirror.sources)
        for peer in want.peers.values():
            if mirror.peers.get(peer.public_key) != peer.endpoint:
                self._device.put_peer(peer.public_key, peer.endpoint)
                mirror.peers[peer.public_key] = peer.endpoint
                self._since.setdefault(peer.public_key, time.monotonic())
        news: dict[bytes, list[str]] = {}
        for address, node in want.allowed.items():
            key = want.peers[node].public_key
            if mirror.allowed.get(address) != key:
                news.setdefault(key, []).append(address)
        for key, addresses in news.items():
            self._device.allow(key, addresses)
            mirror.allowed.update(dict.fromkeys(addresses, key))

    @staticmethod
    def _once(change: Callable[[list[str]], None], addresses: set[str] | frozenset[str], done: set[str]) -> None:
        if addresses:
            change(sorted(addresses))
            done |= addresses

    def _mirrored(self, endpoints: tuple[str, ...]) -> _Mirror:
        """What the kernel has; first of all a device."""
        if self._mirror is not None:
            return self._mirror
        state = self._device.read()
        if state is None or not self._made:
            if state is None and self._pair is None:  # its key went with the device of the agent before this one
                self._new_pair()
                self._announce()
            self._mtu = device.mtu_for(endpoints)
            pair = self._pair or KeyPair()  # of a device that is there the key stays
            self._device.make(pair, self._config.wireguard_port, self._mtu)
            self._made = True
            state = self._device.read()
        if state is None:
            raise KernelRefused(f"network device {device.DEVICE} went as soon as it was made: does something else remove it?")
        # Whole pairs before halves go: what is wanted is never without a route.
        self._device.lead(sorted(self._desired.allowed.keys() - self._device.routes()))
        self._device.tidy()
        mirror = _Mirror(
            allowed={address: key for key, found in state.peers.items() for address in found.allowed},
            routes=set(self._device.routes()),
            sources=set(self._device.sources()),
        )
        if state.public_key != self._public:  # somebody changed it: ours again, if we have it
            if self._pair is None:
                self._public = state.public_key
                self._announce()
            else:
                self._device.rekey(self._pair)
        known = {peer.public_key: peer.endpoint for peer in self._desired.peers.values()}
        # Where a peer really is WireGuard finds out by itself: only one that is not wanted, or new, is written anew.
        mirror.peers = {key: known.get(key, ("", 0)) for key in state.peers}
        self._mirror, self._found, self._verified = mirror, state.peers, time.monotonic()
        return mirror

    async def finish(self, *, dialled: bool = False) -> None:
        """Remove from the device what nothing needs any more. Never fails.

        `dialled`: Envoy has not acknowledged `direct` yet, and may still dial what WireGuard is to carry no more, which must not go unencrypted. Then only
        keys go that no node announces any more: a revoked node gets in no longer, and what is dialled there is refused, because its routes stay.
        """
        if self._reason:
            return
        try:
            await asyncio.to_thread(self._forget if dialled else self._remove)
        except (MeshError, OSError) as error:
            _log.error("WireGuard keeps what is not needed any more; trying again", extra={"reason": str(error)})
            self._problem, self._mirror = str(error), None

    def _forget(self) -> None:
        """Remove the peers whose keys no node announces. Where WireGuard is switched off for all nobody lost his key: they stay with the rest."""
        snapshot, mirror, want = self._snapshot, self._mirror, self._desired
        if snapshot is None or mirror is None:
            return
        if snapshot.nodes:
            announced = {node.wireguard.public_key for node in snapshot.nodes.values() if node.wireguard}
            self._remove_peers(mirror.peers.keys() - announced)
        left = not snapshot.nodes or any(
            (
                mirror.allowed.keys() - want.allowed.keys(),
                mirror.peers.keys() - {peer.public_key for peer in want.peers.values()},
                mirror.sources - want.local,
                mirror.routes - want.allowed.keys(),
            )
        )
        self._keeps_since = (self._keeps_since or time.monotonic()) if left else None

    def _remove_peers(self, keys: Collection[bytes]) -> None:
        mirror = self._mirror
        if mirror is None:
            return
        for key in keys:
            self._device.remove_peer(key)
            mirror.peers.pop(key)
            mirror.allowed = {address: one for address, one in mirror.allowed.items() if one != key}
            self._since.pop(key, None)

    def _remove(self) -> None:
        snapshot, mirror, want = self._snapshot, self._mirror, self._desired
        self._keeps_since = None
        if snapshot is not None and not snapshot.nodes:
            self._switch_off()
        if mirror is None or self._mirror is None:
            return
        if gone := [address for address in mirror.allowed if address not in want.allowed]:
            self._device.disallow(gone)
            for address in gone:
                del mirror.allowed[address]
        self._remove_peers(mirror.peers.keys() - {peer.public_key for peer in want.peers.values()})
        if silent := mirror.sources - want.local:
            self._device.ignore(sorted(silent))
            mirror.sources -= silent
        if left := mirror.routes - want.allowed.keys():
            self._device.leave(sorted(left))
            mirror.routes -= left

    def _switch_off(self) -> None:
        if not self._made and self._pair is not None:
            return
        if self._device.remove():
            _log.warning("WireGuard is switched off: connections that used it go on unencrypted until they end")
        self._mirror, self._made, self._found = None, False, {}
        if self._pair is None:
            self._new_pair()
            self._announce()

    def _usable(self) -> Direct:
        mirror, want = self._mirror, self._desired
        if mirror is None or not want.local <= mirror.sources:
            return Direct()
        nodes = frozenset(node for node, peer in want.peers.items() if peer.public_key in mirror.peers and self._fresh(peer.public_key))
        return Direct(nodes, frozenset(want.unfit)) if nodes else Direct()

    def _fresh(self, key: bytes) -> bool:
        found = self._found.get(key)
        return found is not None and found.handshake > 0 and time.time() - found.handshake < STALE_S

    def _tell(self, snapshot: Snapshot) -> None:
        """Say once which nodes cannot."""
        without = frozenset(name for name, node in snapshot.nodes.items() if node.wireguard is None)
        if fresh := without - self._told:
            _log.warning(
                "nodes have no WireGuard: TCP to and from them goes through HBONE, everything else, and connections that used it, unencrypted",
                extra={"nodes": sorted(fresh)},
            )
        self._told = without

    # As time goes by.

    async def run(self) -> None:
        """Follow handshakes, repair what others changed, replace old keys."""
        while True:
            await asyncio.sleep(LOOK_S if self._waiting() else CALM_S)
            if not self._active:
                continue
            try:
                if await asyncio.to_thread(self._look):
                    await self._changed()
            except (MeshError, OSError) as error:
                _log.error("WireGuard cannot be looked at; trying again", extra={"reason": str(error)})
            self._rotate()

    @property
    def _active(self) -> bool:
        return not self._reason and self._snapshot is not None and bool(self._snapshot.nodes)

    def _waiting(self) -> bool:
        return bool(self._problem) or any(not self._fresh(peer.public_key) for peer in self._desired.peers.values())

    def _look(self) -> bool:
        """Ask the kernel; True if something has to change."""
        mirror = self._mirror
        if mirror is None:
            return bool(self._problem) or bool(self._desired.peers)
        thorough = time.monotonic() - self._verified >= VERIFY_S
        state = self._device.read(allowed=thorough)
        if state is None:
            _log.error("network device %s was removed by somebody else: what it carried is refused until it is back", device.DEVICE)
            self._mirror, self._made = None, False
            return True
        self._found = state.peers
        wrong = state.peers.keys() != mirror.peers.keys() or state.public_key != self._public or state.port != self._config.wireguard_port
        if thorough:
            self._verified = time.monotonic()
            allowed = {address: key for key, found in state.peers.items() for address in found.allowed}
            wrong |= allowed != mirror.allowed or self._device.routes() != mirror.routes or self._device.sources() != mirror.sources
        if wrong and self._mirror is mirror:
            _log.error("somebody else changed %s, its routes or its rules: repairing", device.DEVICE)
            self._mirror, self._made = None, False
            return True
        return self._usable() != self.direct

    def _rotate(self) -> None:
        if self._next is None and self._public and time.time() - self._made_at > ROTATE_S * self._jitter:
            self.rotate()

    def rotate(self) -> None:
        """Announce a new key; the device gets it when the controller has told everybody."""
        self._next = KeyPair()
        self._announce()

    # What people are told.

    def status(self) -> WireGuardStatus:
        """For `meshagent status` and metrics."""
        snapshot = self._snapshot
        if snapshot is None or not snapshot.nodes:
            return WireGuardStatus("off", self._reason)
        if self._reason or self._nowhere:
            return WireGuardStatus("unavailable", self._reason or self._nowhere)
        peers = []
        for name in sorted(snapshot.nodes.keys() - {self._config.node}):
            peer = self._desired.peers.get(name)
            found = self._found.get(peer.public_key) if peer else None
            state = "none" if peer is None else "encrypted" if name in self.direct.nodes else "waiting"
            shaken = found.handshake if found else 0
            age = max(0.0, time.time() - shaken) if shaken else None
            peers.append(WireGuardPeer(name, state, age, found.sent if found else 0, found.received if found else 0))
        return WireGuardStatus("on", "", b64encode(self._public).decode(), self._config.wireguard_port, self._mtu, tuple(peers))

    def problems(self) -> list[str]:
        """Sentences for people, each with the next step; none where the mesh does not use WireGuard."""
        status = self.status()
        kept = [_KEPT] if self._keeps_since is not None and time.monotonic() - self._keeps_since > PATIENCE_S else []
        if status.mode == "off":
            return kept
        if status.mode == "unavailable":
            return [_UNAVAILABLE.format(status.reason)]
        problems = kept + [f"WireGuard: {text}" for text in (self._problem, self._desired.trouble) if text]
        problems += [f"node {name} is no WireGuard peer: {reason}" for name, reason in sorted(self._desired.refused.items())]
        if self._snapshot is not None and (own := self._snapshot.nodes.get(self._config.node)) is not None and own.wireguard is None:
            problems.append(
                "the controller does not tell other nodes this one's WireGuard key: the controller's log says why, if this lasts"
            )
        problems += [f"workload {name} is not reached over WireGuard: {reason}" for name, reason in sorted(self._desired.unfit.items())]
        for peer in status.peers:
            to = self._desired.peers.get(peer.node)
            silent = time.monotonic() - self._since.get(to.public_key, 0.0) if to else 0.0
            if to and peer.state == "waiting" and silent > PATIENCE_S:
                problems.append(
                    f"no WireGuard handshake with node {peer.node} at {to.endpoint[0]} port {to.endpoint[1]}: is UDP open between the nodes, and its agent "
                    "running? TCP goes through HBONE meanwhile, everything else between the two nodes is refused"
                )
        if without := [peer.node for peer in status.peers if peer.state == "none"]:
            problems.append(
                f"no WireGuard with {len(without)} nodes ({', '.join(without[:5])}): `meshagent status` there says why; TCP goes through HBONE, UDP unencrypted"
            )
        return problems
