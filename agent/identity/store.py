"""Where keys are kept for a restart while the controller is away: one file, mode 0600, on a file system that lives in memory. Nothing else writes keys.

Each entry vouches for itself: its key fits its certificate, which a root of the stored bundle signed. One that does not is left out.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from agent import files, netns
from agent.errors import EnvironmentUnfit
from agent.identity import certificates
from agent.identity.certificates import Chain
from agent.identity.keys import PrivateKey
from agent.identity.trust import Trust, decode
from meshapi import identity_pb2 as pb

_log = logging.getLogger(__name__)

IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})
_VERSION: Final = 1
_NAME: Final = "svids.json"


@dataclass(frozen=True, slots=True)
class Svid:
    """A key and the certificate for it."""

    key: PrivateKey
    chain: Chain


@dataclass(frozen=True, slots=True)
class Kept:
    """What a restart begins with."""

    trust: Trust | None = None
    svids: Mapping[str, Svid] = field(default_factory=dict)
    """By workload."""


def disk(directory: Path) -> str:
    """The type of the file system that would hold `directory`, if that is not known to live in memory; else ""."""
    kind = netns.file_system(directory)
    return "" if kind in IN_MEMORY else kind or "unknown"


def require_memory(directory: Path, *, on_disk: bool) -> None:
    """Raise EnvironmentUnfit if keys below `directory` would reach a disk, unless the operator said that they may."""
    kind = disk(directory)
    if kind and not on_disk:
        raise EnvironmentUnfit(
            f"{directory} is on {kind}, which may be a disk, and private keys do not go there: mount a tmpfs at it, choose another --run-dir, "
            "or accept it with --keys-on-disk"
        )


class Store:
    """The file. Blocking: its methods are called in a thread."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / _NAME

    def write(self, kept: Kept) -> None:
        """Replace the file. Raises OSError."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        document = {
            "version": _VERSION,
            "trust": _text(kept.trust.message().SerializeToString()) if kept.trust else "",
            "svids": {
                name: {"key": _text(svid.key.der()), "chain": [_text(one) for one in svid.chain.der]} for name, svid in kept.svids.items()
            },
        }
        files.write(self.path, json.dumps(document).encode())

    def read(self, trust_domain: str) -> Kept:
        """What the file says, without what is damaged or has lost its root; nothing if there is no file."""
        for left in self.path.parent.glob(f".{_NAME}.*"):  # what a killed agent was writing
            left.unlink(missing_ok=True)
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return Kept()
        except OSError as error:
            _log.error("stored identities unreadable, starting without them", extra={"path": str(self.path), "error": str(error)})
            return Kept()
        try:
            return parse(content, trust_domain)
        except ValueError as error:
            _log.error("stored identities damaged, starting without them", extra={"path": str(self.path), "error": str(error)})
            return Kept()


def parse(content: bytes, trust_domain: str) -> Kept:
    """Decode a file. Raises ValueError if it is none, which never quotes it; single bad entries are logged by name and left out."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(document, dict) or document.get("version") != _VERSION or not isinstance(document.get("svids"), dict):
        raise ValueError("it is of another form")
    if not document.get("trust"):
        return Kept()
    trust = decode(_bundle(_bytes(document["trust"])), trust_domain)
    svids = {}
    for name, entry in document["svids"].items():
        try:
            svids[name] = _svid(entry)
        except ValueError as error:
            _log.error("a stored identity is damaged and left out", extra={"workload": name[:300], "error": str(error)})
    return Kept(trust, svids)


def _svid(entry: Any) -> Svid:
    if not isinstance(entry, dict) or not isinstance(entry.get("chain"), list):
        raise ValueError("it is of another form")  # noqa: TRY004  a parser's one error
    svid = Svid(PrivateKey.load(_bytes(entry.get("key"))), certificates.read(_bytes(one) for one in entry["chain"]))
    if svid.key.public() != svid.chain.public:
        raise ValueError("its key is not its certificate's")
    return svid


def _bundle(content: bytes) -> pb.TrustBundle:
    try:
        return pb.TrustBundle.FromString(content)
    except Exception as error:
        raise ValueError("its trust bundle is none") from error


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _bytes(text: Any) -> bytes:
    if not isinstance(text, str):
        raise ValueError("it is of another form")  # noqa: TRY004  a parser's one error
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError("it is not base64") from None
