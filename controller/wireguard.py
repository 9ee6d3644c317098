"""The WireGuard keys of nodes: what agents announced on their own, authenticated streams, and the `Node` entities that carry it to all of them.

Only a node's key and where it is reached come from its agent. Which addresses it may use comes from the operator's resources (`Workload.node`), so no agent
can get another node's. An agent that claims to be reached at the address of another node's workload is not told to anybody: `NodeKeys.entities`.
The keys are kept beside what the authority remembers: a controller that starts anew must not take away what connections run on.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, NamedTuple

from controller.errors import ControllerError
from controller.store import Documents, Store, of_node
from controller.waiting import heard
from meshapi import discovery_pb2 as pb

_log = logging.getLogger(__name__)

FILE: Final = "wireguard.json"
SINCE: Final = "wireguard-since.json"
"""Beside it, for nodes that were let in again: an earlier release, which may run at the same time, writes nothing but keys to the former."""
KEY_BYTES: Final = 32  # Curve25519 (RFC 7748, 5)
LOOK_S: Final = 5.0
"""How often it is looked whether a node was revoked."""
SETTLE_S: Final = 0.1
"""Many agents that come at once are one change."""
DEPARTED_S: Final = 3600.0
"""How long a node must have had no certificate in force until its key is forgotten, where several controllers share it."""
Barred = Callable[[], Mapping[str, int]]
"""Names the nodes that an operator has revoked, and since when (`controller.identity.revocations.since`)."""
Groups = Callable[[], Collection[str]]


class BadKey(ValueError):
    """What an agent announced cannot be used; the text says why."""


class Stolen(NamedTuple):
    """An endpoint that is the address of another node's workload."""

    endpoint: str
    workload: str
    node: str


class Said(NamedTuple):
    """What a node announced: an encoded WireGuard message, and since when it was barred as far as was known then; 0 if it was not."""

    content: bytes
    since: int = 0


class NodeKeys:
    """Keys by node. `announce` is called on the event loop, everything else from any thread."""

    def __init__(self, store: Store, barred: Barred, known: Barred, groups: Groups | None = None) -> None:
        """`barred` is of now; it blocks, and raises ControllerError. `known` is what calls are let in by: who announces a key then has been let in since.

        `groups`: what is shared of nodes, by `controller.store.of_node`. A node of which nothing is, not even a certificate in force, has left the mesh.
        """
        self._store, self._groups = store, groups
        self._missed: dict[str, float] = {}
        """Since when (monotonic clock) nothing is shared of a node whose key is known."""
        self._barred, self._known = barred, known
        self._keys: dict[str, Said] = {}
        self._withheld: Mapping[str, Stolen] = {}
        """What was said last of nodes that others are not told."""
        self._lock = threading.Lock()
        self._changed = asyncio.Event()
        self._fresh = self._foreign = False
        """Has one of our nodes announced something; may other controllers have been told something?"""
        self._looked = time.monotonic()

    def start(self) -> None:
        """Read what was kept. Blocking. Raises ControllerError: an empty list would take WireGuard from connections that run on it."""
        self._keys = self._parsed(self._store.read)
        self.forget_barred()

    def read(self) -> bool:
        """Read what other controllers were told; True if it is news. Blocking."""
        with self._lock:
            try:
                keys = self._parsed(self._store.read)
            except ControllerError as error:
                _log.error("WireGuard keys of nodes cannot be read, those that are known stay", extra={"error": str(error)})
                return False
            before, self._keys = self._keys, keys
        return keys != before

    def look(self) -> None:
        """Other controllers may have been told something."""
        self._foreign = True
        self._changed.set()

    def _parsed(self, read: Callable[[str], bytes | None]) -> dict[str, Said]:
        content = read(FILE)
        try:
            return {} if content is None else _parse(content, _since(read(SINCE)))
        except ValueError as error:
            raise ControllerError(
                f"{self._store.where(FILE)} cannot be used: {error}. Restore it from a backup; without it connections between nodes go on unencrypted "
                "until their agents have connected again"
            ) from error

    async def announce(self, node: str, said: pb.WireGuard | None) -> None:
        """A node's agent says how the node is reached; None: it has no WireGuard. Stored when this returns.

        Raises BadKey for what cannot be used, with what was known before still in force, and ControllerError if it cannot be stored.
        """
        content = None if said is None else check(said).SerializeToString(deterministic=True)
        if await asyncio.to_thread(self._take, node, content):
            self._fresh = True
            self._changed.set()

    def _take(self, node: str, content: bytes | None) -> bool:
        said = None if content is None else Said(content, self._known().get(node, 0))
        if self._keys.get(node) == said:
            return False
        self._change(lambda keys: _announced(keys, node, said))
        _log.info("WireGuard key of a node changed", extra={"node": node, "has": content is not None})
        return True

    def forget_barred(self) -> bool:
        """Forget the keys of nodes that were revoked since they announced them; True if there were any. Blocking.

        A node that an operator lets join again announces its key again, and keeps it, also when the controller starts anew.
        """
        try:
            barred = self._barred()
            self._forget_departed()
            gone = {name for name, said in self._keys.items() if said.since < barred.get(name, 0)}
            if gone:
                self._change(lambda keys: {name: said for name, said in keys.items() if said.since >= barred.get(name, 0)})
                _log.warning("WireGuard keys of revoked nodes forgotten", extra={"nodes": sorted(gone)})
        except ControllerError as error:  # the authority says so too, and lets nobody in
            _log.error("WireGuard keys of revoked nodes cannot be forgotten yet", extra={"error": str(error)})
            return False
        return bool(gone)

    def _forget_departed(self) -> None:
        """Keys of nodes that come and go must not fill what several controllers share. Nobody is told of a node without workloads: it is no news."""
        if self._groups is None:
            return
        present, now = self._groups(), time.monotonic()
        self._missed = {name: self._missed.get(name, now) for name in self._keys if of_node(name) not in present}
        gone = {name for name, since in self._missed.items() if now - since >= DEPARTED_S}
        if gone:
            self._change(lambda keys: {name: kept for name, kept in keys.items() if name not in gone})
            _log.info("WireGuard keys of nodes that have left forgotten", extra={"nodes": len(gone)})

    def _change(self, work: Callable[[dict[str, Said]], dict[str, Said]]) -> None:
        """Make the keys into others, durably. Raises ControllerError, and whatever `work` does."""

        def written(documents: Documents) -> dict[str, Said]:
            keys = work(self._parsed(documents.read))
            nodes = {name: base64.b64encode(said.content).decode() for name, said in sorted(keys.items())}
            since = {name: {"key": nodes[name], "since": said.since} for name, said in sorted(keys.items()) if said.since}
            documents.write(FILE, json.dumps({"nodes": nodes}, indent=1) + "\n")
            if since or documents.read(SINCE) is not None:
                documents.write(SINCE, json.dumps({"nodes": since}, indent=1) + "\n")
            return keys

        with self._lock:
            self._keys = self._store.change(written)

    def entities(self, model: Mapping[str, pb.Entity]) -> dict[str, pb.Entity]:
        """A `Node` for each node that has workloads in `model`, by resource name.

        One that announced the address of an enrolled workload of another node is said to have no WireGuard, and logged, as long as both are so: it is looked
        at here, and not in `announce`, because the workload may come after the announcement.
        """
        nodes = {entity.workload.node for name, entity in model.items() if name.startswith("workload/")}
        keys = {node: said.content for node, said in self._keys.items()}
        withheld = _stolen({node: keys[node] for node in nodes if node in keys}, model)
        self._tell(withheld)
        found = {}
        for node in sorted(nodes):
            message = pb.Node(name=node)
            if node in keys and node not in withheld:
                message.wireguard.ParseFromString(keys[node])
            found[f"node/{node}"] = pb.Entity(node=message)
        return found

    def _tell(self, withheld: Mapping[str, Stolen]) -> None:
        """Log once what others are not told."""
        before, self._withheld = self._withheld, withheld
        for node, stolen in withheld.items():
            if before.get(node) != stolen:
                _log.error(
                    "WireGuard of a node is kept from the others: its agent announces the address of another node's workload; correct the agent's "
                    "--wireguard-address or the workload's spec.addresses, or revoke the node if it is not trusted",
                    extra={"node": node, "endpoint": stolen.endpoint, "workload": stolen.workload, "workload_node": stolen.node},
                )
        for node in before.keys() - withheld.keys():
            _log.info("WireGuard of a node is not kept from the others any more", extra={"node": node})

    async def changed(self) -> None:
        """Wait until there is something new to publish."""
        while True:
            if time.monotonic() - self._looked >= LOOK_S:  # first: there may be news without end
                self._looked = time.monotonic()
                if await asyncio.to_thread(self.forget_barred):
                    return
            if await heard(self._changed, max(0.0, self._looked + LOOK_S - time.monotonic())):
                await asyncio.sleep(SETTLE_S)
                self._changed.clear()
                fresh, foreign, self._fresh, self._foreign = self._fresh, self._foreign, False, False
                if (foreign and await asyncio.to_thread(self.read)) or fresh:
                    return


def _announced(keys: Mapping[str, Said], node: str, said: Said | None) -> dict[str, Said]:
    """Return the keys after what a node announced. Raises BadKey."""
    found = {name: kept for name, kept in keys.items() if name != node}
    if said is not None:
        key = pb.WireGuard.FromString(said.content).public_key
        for other, kept in found.items():
            if pb.WireGuard.FromString(kept.content).public_key == key:
                raise BadKey(f"its public key is node {other}'s: each node makes its own; was the machine copied while its agent ran?")
        found[node] = said
    return found


def check(said: pb.WireGuard) -> pb.WireGuard:
    """Return what an agent announced, addresses in their usual form. Raises BadKey."""
    if len(said.public_key) != KEY_BYTES or not any(said.public_key):
        raise BadKey(f"a public key has {KEY_BYTES} bytes that are not all zero")
    if not 1 <= said.port <= 65535:
        raise BadKey(f"{said.port} is no UDP port")
    families = set()
    endpoints = []
    for text in said.endpoints:
        try:
            address = ipaddress.ip_address(text)
        except ValueError as error:
            raise BadKey(f"endpoint {text[:100]!r} is no IP address") from error
        if address.is_loopback or address.is_unspecified or address.is_multicast or address.is_link_local or "%" in text:
            raise BadKey(f"endpoint {address} cannot be reached from other nodes: give the agent --wireguard-address")
        families.add(address.version)
        endpoints.append(str(address))
    if not endpoints or len(families) != len(endpoints):
        raise BadKey("one address of each family at most, and one at least, says where the node is reached")
    return pb.WireGuard(public_key=said.public_key, port=said.port, endpoints=endpoints)


def _stolen(keys: Mapping[str, bytes], model: Mapping[str, pb.Entity]) -> dict[str, Stolen]:
    """The nodes, of those with `keys`, that announced the address of an enrolled workload of another node: the first by its text and the workload's name."""
    ends = {node: frozenset(pb.WireGuard.FromString(kept).endpoints) for node, kept in keys.items()}
    every = frozenset(text for texts in ends.values() for text in texts)
    found: dict[str, Stolen] = {}
    for name, entity in model.items():
        if not name.startswith("workload/") or not entity.workload.enrolled:
            continue
        for text in every.intersection(map(_usual, entity.workload.addresses)):
            stolen = Stolen(text, name.partition("/")[2], entity.workload.node)
            for node, texts in ends.items():
                if node != stolen.node and text in texts:
                    found[node] = min(stolen, found.get(node, stolen))
    return found


def _usual(text: str) -> str:
    """An address in the form that `check` leaves endpoints in."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return text


def _since(content: bytes | None) -> dict[tuple[str, str], int]:
    """Return, by node and encoded key, since when it was barred when it announced that. What is damaged is nothing: then keys are forgotten too soon."""
    try:
        nodes = {} if content is None else json.loads(content)["nodes"]
        return {(str(name), str(item["key"])): int(item["since"]) for name, item in nodes.items()}
    except (ValueError, OverflowError, RecursionError, TypeError, KeyError, AttributeError) as error:
        _log.error(
            f"{SINCE} is cut off or overwritten: keys of nodes that were revoked are forgotten until these announce them again",
            extra={"error": repr(error)},
        )
        return {}


def _parse(content: bytes, since: Mapping[tuple[str, str], int]) -> dict[str, Said]:
    try:
        document: Any = json.loads(content)
        nodes, earlier = document["nodes"], document.get("since", {})  # which stood here before it had a file of its own
        found = {
            str(name): Said(base64.b64decode(text, validate=True), since.get((name, text), int(earlier.get(name, 0))))
            for name, text in nodes.items()
        }
    except (ValueError, OverflowError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ValueError("it is cut off or overwritten") from error
    for name, kept in found.items():
        try:
            check(pb.WireGuard.FromString(kept.content))
        except Exception as error:
            raise ValueError(f"what it says about node {name[:100]} is damaged") from error
    return found
