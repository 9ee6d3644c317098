"""The way from the supervisor into this package. Where there can be no identities, `cryptography` and all that needs it (10 MB of memory) is not imported.

There can be some where the controller is reached over TLS; on a unix socket there are no certificates, and a node without one is given none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Protocol

from agent.config import Config
from agent.errors import NotFound
from agent.model import LocalWorkload, Workload
from agent.report import CertificateStatus, IdentityStatus

if TYPE_CHECKING:
    from agent.identity.store import Svid
    from agent.identity.trust import Trust


class Identities(Protocol):
    """The identities of this node, as the supervisor deals with them: `agent.identity.service.Identity`, or none."""

    active: asyncio.Event
    """Set once there are any."""

    @property
    def trust(self) -> Trust | None:
        """Whom to believe."""

    def load(self) -> None:
        """Begin with what an earlier agent of this node had; raises EnvironmentUnfit."""

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Have `listener` called after every change of certificates or trust."""

    def update(self, local: Iterable[LocalWorkload], others: Iterable[Workload] = ()) -> None:
        """Have identities for these workloads."""

    def svids(self) -> Mapping[str, Svid]:
        """By SPIFFE ID."""

    def doubt(self, certificate: bytes, ended: bool) -> str:
        """Why the peer that showed a certificate (PEM) is not believed any more: see `agent.identity.doubt`."""

    def status(self) -> IdentityStatus:
        """For the status and /metrics."""

    def show(self, workload: str) -> CertificateStatus:
        """One workload's; raises NotFound."""

    def problems(self) -> list[str]:
        """Sentences for `meshagent status`."""

    async def run(self) -> None:
        """Do everything that is to be done, for ever."""


class NoIdentities:
    """Nobody has one, and nobody is asked for one."""

    trust: Final = None

    def __init__(self) -> None:
        self.active = asyncio.Event()

    def load(self) -> None:
        """There is nothing."""

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Nothing changes."""

    def update(self, local: Iterable[LocalWorkload], others: Iterable[Workload] = ()) -> None:
        """Nobody gets one."""

    def svids(self) -> Mapping[str, Svid]:
        """None."""
        return MappingProxyType({})

    def doubt(self, certificate: bytes, ended: bool) -> str:  # noqa: ARG002
        """Nobody is asked about."""
        return ""

    def status(self) -> IdentityStatus:
        """Off."""
        return IdentityStatus()

    def show(self, workload: str) -> CertificateStatus:
        """None: raises NotFound."""
        raise NotFound(f"no workload {workload} of this node has an identity: see `meshagent identity list`")

    def problems(self) -> list[str]:
        """None."""
        return []

    async def run(self) -> None:
        """Wait for ever."""
        await asyncio.Event().wait()


def identities(config: Config) -> tuple[Identities, Callable[[], Coroutine[Any, Any, None]]]:
    """Return a node's identities, and what serves them to workloads for ever."""
    if config.tls is None:
        return (nobody := NoIdentities()), nobody.run
    from agent.identity.service import Identity  # noqa: PLC0415  the module says why
    from agent.identity.workload_api import WorkloadApi  # noqa: PLC0415

    identity = Identity(config)
    return identity, WorkloadApi(config, identity).run
