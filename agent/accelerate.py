"""Which workloads' connections bypass TCP within the node: those that ask for it, where this kernel passes the self-test, or that insist.

Called by the enrolment, in its worker thread. Nothing is tested or attached before a workload of this node asks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from agent.bpf.acceleration import Check, failing
from agent.bpf.datapath import DataPath
from agent.errors import MeshError
from agent.model import Workload

ENABLED, FORCE = "enabled", "force"
LABEL = "meshagent.io/acceleration"
_log = logging.getLogger(__name__)


class Acceleration:
    """See the module. `chosen` and `checks` are what is in force."""

    def __init__(self, datapath: DataPath) -> None:
        """Do nothing yet."""
        self._datapath = datapath
        self._refused: frozenset[str] = frozenset()
        self._error = ""
        self.checks: tuple[Check, ...] = ()
        self.chosen: frozenset[str] = frozenset()

    def choose(self, workloads: Iterable[Workload]) -> frozenset[str]:
        """Names of the workloads to accelerate, with what that needs in force. The first wish costs a second, for the self-test."""
        wishes = {w.name: w.acceleration for w in workloads if w.acceleration in {ENABLED, FORCE}}
        chosen: frozenset[str] = frozenset()
        self._error = ""
        if wishes:
            try:
                self.checks = self.checks or self._datapath.acceleration_checks()
                bad = failing(self.checks)
                chosen = frozenset(name for name, wish in wishes.items() if wish == FORCE or not bad)
                if chosen:
                    self._datapath.accelerate()
            except (MeshError, OSError) as error:
                self._error, chosen = str(error), frozenset()
        if chosen != self.chosen:
            _log.info("acceleration", extra={"workloads": sorted(chosen), "failing_checks": list(failing(self.checks))})
        self._refused = frozenset(wishes) - chosen
        self.chosen = chosen
        return chosen

    def problems(self) -> list[str]:
        """For people: who is not accelerated and why, and what those who insist must live with."""
        if self._error:
            return [f"no workload is accelerated: {self._error}"]
        seen = "; ".join(f"{c.name}: {c.seen}" for c in self.checks if not c.passed)
        found = [
            f"workload {name} is not accelerated: this kernel cannot do it safely for any application ({seen}); label it {LABEL}: {FORCE} if its"
            " programs can live with that"
            for name in sorted(self._refused)
        ]
        if seen and self.chosen:
            found.append(f"accelerated in spite of failing checks: {', '.join(sorted(self.chosen))} ({seen})")
        return found
