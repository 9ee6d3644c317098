"""What an authority must not forget, as those see it who keep it: documents that are read, and changed by one at a time.

A controller that is alone has its CA directory (`controller.identity.directory.Directory`), several have the API server
(`controller.kubernetes.store.ClusterStore`). What a document says, and what its loss means, is the business of who owns it: revocations, tokens, the ledger.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Hashable
from typing import Final, Protocol, TypeVar

T = TypeVar("T")
CONTROLLERS: Final = "controllers"
"""Group of what belongs to no node."""
LAST: Final = frozenset({"revoked.json", "lists.json", "trust.json", "about.json", "jwt.json", "withdrawn.json"})
"""Documents that still have room where others have none: who is to be shut out is, and hears of it, however many nodes and join tokens there are."""
_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9.]{0,230}[a-z0-9])?")


class Documents(Protocol):
    """Documents at one moment, in a change."""

    def read(self, name: str) -> bytes | None:
        """Return a document; None if there is none."""

    def write(self, name: str, text: str) -> None:
        """Replace it."""


class Store(Protocol):
    """See the module. Every method may block and raise ControllerError; none may be called on an event loop that others need."""

    @property
    def alone(self) -> bool:
        """Does no other controller change it?"""

    def where(self, name: str) -> str:
        """Return where a document is, for people."""

    def read(self, name: str) -> bytes | None:
        """Return a document; None if there is none."""

    def signature(self, name: str) -> Hashable | None:
        """Return what tells one version of a document from another; None without one."""

    def change(self, work: Callable[[Documents], T]) -> T:
        """Let `work` read and replace documents: all of it is done, durably, or nothing, and nobody else has changed them meanwhile.

        `work` may be called again, with what others have written: it must do nothing but that. What it raises ends the change.
        """


class SharedStore(Store, Protocol):
    """A state that several controllers change. Documents are in groups, "" and others, so that not everything is written for each change.

    To write "" is to remove a document; a group without any is gone.
    """

    def groups(self) -> dict[str, object]:
        """Return the groups other than "" that there are, each with what differs from one version to the next."""

    def read(self, name: str, group: str = "") -> bytes | None:
        """As in `Store`, as this controller knows it: others may have written since."""

    def change(self, work: Callable[[Documents], T], group: str = "", *, known: bool = False) -> T:
        """As in `Store`, with the documents of one group. `known`: begin with what this controller knows of it, to ask less."""

    def listen(self, told: Callable[[], object]) -> None:
        """Have `told` called whenever others may have changed something; by a thread of its own."""

    def waiting(self) -> str:
        """Why what others have changed may not be known here; "" if it is."""


def of_node(node: str) -> str:
    """Return the group of a node, of which the API server takes the name (RFC 1123, 2.1)."""
    if not node:
        return CONTROLLERS
    return f"node.{node}" if _NAME.fullmatch(node) and ".." not in node else f"node-{hashlib.sha256(node.encode()).hexdigest()[:40]}"
