"""Certificates that are not believed although they have not run out, and nodes that may not come back by themselves: revoked.json.

Written by `ca revoke` and `ca restore`, read and pruned by the controller. A node whose certificate was revoked stays on the list of nodes until an operator
takes it off. It concerns proofs that serve more than once (Kubernetes): a join token that is made for the node afterwards is an operator's word too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

from controller.errors import ControllerError
from controller.identity import fields
from controller.identity.directory import ISSUED, REVOKED, Directory
from controller.identity.fields import BadState
from controller.identity.lapse import Lapse
from controller.identity.ledger import Issued, check_serial

KEPT_S: Final = 600  # after it ran out: clocks of peers may be behind
EMPTY: Final = '{"revoked": []}'
_LOSS: Final = (
    "an empty one would make every revoked certificate good again; `mesh-controller ca rotate` replaces all certificates; after a backup revoke again "
    "what was revoked since"
)
_FIELDS: Final = ("serial", "spiffe_id", "node", "issuer", "until", "at", "also")


@dataclass(frozen=True, slots=True)
class Revoked:
    """One revoked certificate; as in the ledger, and when (Unix seconds).

    `also`: what else its node gets until the controller reads this is revoked with it: "" nothing, "node" certificates of its own, "workloads" all.
    """

    serial: str
    spiffe_id: str
    node: str
    issuer: str
    until: int
    at: int
    also: str = ""


def prepare(directory: Directory) -> None:
    """Make an empty list and ledger before the first certificate is issued. Raises ControllerError if one of them was lost since."""
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


def read(directory: Directory) -> list[Revoked]:
    """Return the certificates in a directory's list. Raises ControllerError: a list that cannot be read must not pass for an empty one."""
    return _read(directory)[0]


def barred(directory: Directory) -> frozenset[str]:
    """Return the nodes that may not come back by themselves. Raises ControllerError."""
    return _read(directory)[1]


def _read(directory: Directory) -> tuple[list[Revoked], frozenset[str]]:
    content, path = directory.read(REVOKED), directory.path / REVOKED
    if content is None:
        raise fields.refuse(path, BadState("it is gone"), _LOSS)
    try:
        return _parse(content)
    except BadState as error:
        raise fields.refuse(path, error, _LOSS) from error


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


def add(directory: Directory, certificates: Iterable[Issued], now: float, also: str = "", bar: Iterable[str] = ()) -> list[Revoked]:
    """Revoke certificates and bar nodes; return the certificates that were not revoked before."""
    with directory.locked():
        held, nodes = _read(directory)
        known, every = {record.serial for record in held}, nodes.union(bar)
        new = [Revoked(**asdict(record), at=int(now), also=also) for record in certificates if record.serial not in known]
        if new or every != nodes:
            _write(directory, [*held, *new], every)
    return new


def restore(directory: Directory, node: str) -> bool:
    """Let a node come back; False if nothing kept it away."""
    with directory.locked():
        held, nodes = _read(directory)
        if node in nodes:
            _write(directory, held, nodes - {node})
    return node in nodes


def prune(directory: Directory, lapse: Lapse) -> list[Revoked]:
    """Forget what has run out anyway; return what remains."""
    held = read(directory)
    gone = {record.serial for record in held if lapse.passed(("revoked", record.serial), record.until + KEPT_S)}
    if not gone:
        return held
    with directory.locked():
        held, nodes = _read(directory)
        held = [record for record in held if record.serial not in gone]
        _write(directory, held, nodes)
    for serial in gone:
        lapse.forget(("revoked", serial))
    return held


def _record(item: Any) -> Revoked:
    record = fields.only(item, _FIELDS)
    serial, spiffe_id, node, issuer, also = (fields.field(record, name, str) for name in ("serial", "spiffe_id", "node", "issuer", "also"))
    if also not in {"", "node", "workloads"}:
        raise BadState("also is none of node, workloads and nothing")
    return Revoked(check_serial(serial), spiffe_id, node, issuer, fields.field(record, "until", int), fields.field(record, "at", int), also)


def _write(directory: Directory, records: Iterable[Revoked], nodes: Iterable[str]) -> None:
    content = {"revoked": [asdict(record) for record in records], "nodes": sorted(nodes)}
    directory.write(REVOKED, json.dumps(content, indent=1) + "\n")
