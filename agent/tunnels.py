"""Numbers of SPIFFE IDs: how the kernel tells the waypoint which identity the far end of a tunnel must prove.

A connection to a workload of another node is sent to a loopback address that stands for the workload's SPIFFE ID (bpf_src/mesh_connect.c): its lower 24 bits
are the number given here. Envoy reads it from the address that it accepted the connection on. Owned by the supervisor; thread-safe.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

from agent import files
from agent.config import Config
from agent.errors import KernelRefused
from agent.ids import Ids

FIRST, LAST = 0x000100, 0xFFFFFE
"""127.0.1.0 and 127.255.255.254: what is below is for others, 127.0.0.1 above all, and the last address of the block is its broadcast address."""
_KIND = "identity"


class Tunnels:
    """A number is never given to another identity within one boot: a connection under way must not be proven to somebody else."""

    def __init__(self, config: Config) -> None:
        """Continue with the numbers of the last agent, and with what Envoy had then: the two live on without an agent."""
        self._ids = Ids(config.run_dir / "tunnels")
        self._ids.start_above(FIRST - 1)
        self._path = config.run_dir / "tunnels-ready"
        self._lock = threading.Lock()
        numbered = set(self._ids.names(_KIND))
        known = self._path.read_text().splitlines() if self._path.exists() else []
        self._take(frozenset(known) & numbered)

    def number(self, spiffe_id: str) -> int:
        """The number of an identity, which gets one, stored already, if it has none. Raises KernelRefused when all are used up."""
        found = self._ids.number(_KIND, spiffe_id)
        if found > LAST:
            raise KernelRefused(
                f"{spiffe_id} gets no tunnel: all {LAST - FIRST + 1} loopback addresses for SPIFFE IDs were given away since this node started;"
                " the configuration before stays in force; restart the node"
            )
        self._ids.save()
        return found

    def address(self, spiffe_id: str) -> str:
        """The loopback address that stands for an identity."""
        return self.loopback(self.number(spiffe_id))

    @staticmethod
    def loopback(number: int) -> str:
        """The address that stands for a number: 127.0.1.0 for the first one."""
        return f"127.{number >> 16 & 0xFF}.{number >> 8 & 0xFF}.{number & 0xFF}"

    @property
    def ready(self) -> frozenset[str]:
        """The identities that Envoy has acknowledged."""
        return self._ready

    def mark_ready(self, spiffe_ids: Iterable[str]) -> bool:
        """Envoy has acknowledged these too; True if that is news. Stored: an agent that starts anew goes on with them at once."""
        with self._lock:
            return self._store(self._ready.union(spiffe_ids))

    def keep(self, spiffe_ids: Collection[str]) -> bool:
        """Of those that are ready only these are wanted any more; True if others were. No row of the kernel names the others when it is called."""
        with self._lock:
            return self._store(self._ready.intersection(spiffe_ids))

    def usable(self) -> Mapping[str, int]:
        """The number of each identity that is ready: what the kernel may use now. The same object until that changes."""
        return self._usable

    def _store(self, ready: frozenset[str]) -> bool:
        if ready == self._ready:
            return False
        files.write(self._path, "".join(f"{spiffe_id}\n" for spiffe_id in sorted(ready)).encode())
        self._take(ready)
        return True

    def _take(self, ready: frozenset[str]) -> None:
        self._ready = ready
        self._usable: Mapping[str, int] = MappingProxyType({spiffe_id: self.number(spiffe_id) for spiffe_id in sorted(ready)})
