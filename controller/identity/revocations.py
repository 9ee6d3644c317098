"""Certificates that are not believed although they have not run out, and nodes that may not come back by themselves: revoked.json.

Written by `ca revoke` and `ca restore`, read and pruned by the controller. A node whose certificate was revoked stays on the list of nodes until an operator
takes it off. It concerns proofs that serve more than once (Kubernetes): a join token that is made for the node afterwards is an operator's word too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

from controller.errors import ControllerError
from controller.identity import fields
from controller.identity.directory import ISSUED, REVOKED, Directory
from controller.identity.fields import BadState
from controller.identity.lapse import Lapse
from controller.identity.ledger import Issued, check_serial
from controller.store import Documents, SharedStore, Store

KEPT_S: Final = 600  # after it ran out: clocks of peers may be behind
EMPTY: Final = '{"revoked": []}'
_LOSS: Final = (
    "an empty one would make every revoked certificate good again; `mesh-controller ca rotate` replaces all certificates; after a backup revoke again "
    "what was revoked since"
)
_FIELDS: Final = ("serial", "spiffe_id", "node", "issuer", "until", "at", "also")


@dataclass(frozen=True, slots=True)
class Revoked:
    """One revoked certificate; as in the ledger, and when (Unix seconds; of a node's later than of what was revoked of it before).

    `also`: what else its node gets until the controller reads this is revoked with it: "" nothing, "node" certificates of its own, "workloads" all.
    """

    serial: str
    spiffe_id: str
    node: str
    issuer: str
    until: int
    at: int
    also: str = ""


def prepare(store: Directory | SharedStore) -> None:
    """Make an empty list and ledger before the first certificate is issued. Raises ControllerError if one of them was lost since."""
    if isinstance(store, Directory):
        _prepare_files(store)
    else:
        store.change(lambda documents: _prepare_shared(store, documents))


def _prepare_shared(store: SharedStore, documents: Documents) -> None:
    if documents.read(REVOKED) is None:
        if store.groups():
            raise ControllerError(
                f"{store.where(REVOKED)} is gone, and certificates have been issued: revoked ones would be good again; put it back from a backup, or, if "
                f"none was revoked, write {EMPTY!r} there"
            )
        documents.write(REVOKED, EMPTY + "\n")


def _prepare_files(directory: Directory) -> None:
    path, issued = directory.path / REVOKED, directory.read(ISSUED)
    if directory.signature(REVOKED) is None:
        if issued:
            raise ControllerError(
                f"{path} is gone, and certificates have been issued: revoked ones would be good again; put it back from a backup, or, if none was "
                f"revoked, write {EMPTY!r} into it"
            )
        with directory.locked():
            directory.write(ISSUED, "")  # first: without it, a list means that it was lost
            directory.write(REVOKED, EMPTY + "\n")
    elif issued is None:
        raise ControllerError(
            f"{directory.path / ISSUED} is gone: revoking by SPIFFE ID would miss what was issued, and join tokens for any node would give the names of "
            "nodes that have certificates; put it back from a backup, or make it (empty) and `mesh-controller ca rotate`"
        )


def read(store: Store) -> list[Revoked]:
    """Return the certificates on the list. Raises ControllerError: a list that cannot be read must not pass for an empty one."""
    return _read(store)[0]


def barred(store: Store, node_of: Callable[[str], str]) -> dict[str, int]:
    """Return the nodes that may not come back by themselves, as of now: see `since`. Raises ControllerError."""
    return store.change(lambda documents: since(*_read(store, documents), node_of))


def known(store: Store) -> tuple[list[Revoked], frozenset[str]]:
    """Return the certificates on the list, and the nodes that may not come back by themselves. Raises ControllerError."""
    return _read(store)


def since(certificates: Iterable[Revoked], nodes: Iterable[str], node_of: Callable[[str], str]) -> dict[str, int]:
    """Return for each of these nodes when a certificate of its own was revoked last; 1 if none is on the list any more, or none ever was.

    `node_of` tells whose own a SPIFFE ID is.
    """
    own = newest(record for record in certificates if node_of(record.spiffe_id))
    return {node: max(1, own.get(node, 0)) for node in nodes}


def _read(store: Store, documents: Documents | None = None) -> tuple[list[Revoked], frozenset[str]]:
    content, place = (documents or store).read(REVOKED), store.where(REVOKED)
    if content is None:
        raise fields.refuse(place, BadState("it is gone"), _LOSS)
    try:
        return _parse(content)
    except BadState as error:
        raise fields.refuse(place, error, _LOSS) from error


def parse(content: bytes) -> list[Revoked]:
    """Return the certificates in a revoked.json. Raises BadState."""
    return _parse(content)[0]


def _parse(content: bytes) -> tuple[list[Revoked], frozenset[str]]:
    record = fields.parse(content)
    certificates = [_record(item) for item in fields.listed(record, "revoked")]
    if "nodes" not in record:  # written by an earlier release
        record = {**record, "nodes": [item.node for item in certificates if item.also]}
    nodes = fields.listed(fields.only(record, ("revoked", "nodes")), "nodes")
    if not all(isinstance(node, str) for node in nodes):
        raise BadState("nodes are not all names")
    return certificates, frozenset(nodes)


def newest(certificates: Iterable[Revoked]) -> dict[str, int]:
    """Return when something of each node was revoked last. Who knows of this knows of all that was revoked of the node before."""
    found: dict[str, int] = {}
    for record in certificates:
        found[record.node] = max(record.at, found.get(record.node, 0))
    return found


def revoked(issued: Issued, at: int, also: str = "") -> Revoked:
    """Return a certificate as a revoked one."""
    return Revoked(issued.serial, issued.spiffe_id, issued.node, issued.issuer, issued.until, at, also)


def add(store: Store, certificates: Iterable[Issued], now: float, also: str = "", bar: Iterable[str] = ()) -> list[Revoked]:
    """Revoke certificates and bar nodes; return the certificates that were not revoked before."""
    certificates, bar = list(certificates), list(bar)

    def work(documents: Documents) -> list[Revoked]:
        held, nodes = _read(store, documents)
        known, every, last = {record.serial for record in held}, nodes.union(bar), newest(held)
        new = [revoked(record, max(int(now), last.get(record.node, 0) + 1), also) for record in certificates if record.serial not in known]
        if new or every != nodes:
            _write(documents, [*held, *new], every)
        return new

    return store.change(work)


def restore(store: Store, node: str) -> bool:
    """Let a node come back; False if nothing kept it away."""

    def work(documents: Documents) -> bool:
        held, nodes = _read(store, documents)
        if node in nodes:
            _write(documents, held, nodes - {node})
        return node in nodes

    return store.change(work)


def prune(store: Store, lapse: Lapse) -> None:
    """Forget what has run out anyway."""
    gone = {record.serial for record in read(store) if lapse.passed(("revoked", record.serial), record.until + KEPT_S)}
    if not gone:
        return

    def work(documents: Documents) -> None:
        held, nodes = _read(store, documents)
        if any(record.serial in gone for record in held):
            _write(documents, [record for record in held if record.serial not in gone], nodes)

    store.change(work)
    for serial in gone:
        lapse.forget(("revoked", serial))


def _record(item: Any) -> Revoked:
    record = fields.only(item, _FIELDS)
    serial, spiffe_id, node, issuer, also = (fields.field(record, name, str) for name in ("serial", "spiffe_id", "node", "issuer", "also"))
    if also not in {"", "node", "workloads"}:
        raise BadState("also is none of node, workloads and nothing")
    return Revoked(check_serial(serial), spiffe_id, node, issuer, fields.field(record, "until", int), fields.field(record, "at", int), also)


def _write(documents: Documents, records: Iterable[Revoked], nodes: Iterable[str]) -> None:
    content = {"revoked": [asdict(record) for record in records], "nodes": sorted(nodes)}
    documents.write(REVOKED, json.dumps(content, indent=1) + "\n")
