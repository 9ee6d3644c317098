"""Whose own node reads requests, whoever else has, and when Envoy is to let go of connections that were made before it did. Called by `agent.l7.snapshot`.

A policy that needs the request comes to all nodes at about one time, not at one. Connections that a waypoint makes to a receiver which does not read
yet go past its inspection for ever, and stay in pools that everybody uses. So an endpoint is another one to Envoy (`agent.l7.clusters.assignment`) when
its node has had time to begin (`settle`), and again some times after that (`settle_again`): a node may begin late, and it closes what goes past it after
a while (`agent.revocation.LET_GO_S`), with the requests in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.l7.view import View

AGAIN = 12
"""How often Envoy is to let go of connections again to who has begun to read."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Whose own node reads requests, whoever else has, by a view."""

    view: View
    node: str
    receivers: frozenset[str]
    """Of this node's workloads."""

    @staticmethod
    def of(view: View, node: str) -> Reading:
        """To a node: the waypoint of another one never takes its word."""
        return Reading(view, node, view.left_to_receivers)

    def ports(self, name: str) -> tuple[int, ...] | None:
        """At which ports of a workload; None: all."""
        workload = self.view.snapshot.workloads.get(name)
        if workload is None or (workload.node == self.node and name not in self.receivers):
            return ()
        return self.view.request_ports(workload)


class Readers:
    """What is settled of that. One thread at a time."""

    def __init__(self, node: str) -> None:
        """Nothing is."""
        self._node = node
        self._settled: Reading | None = None
        """By what receivers have read for some time."""
        self._now: Reading | None = None
        """By what they are to read."""
        self._unsettled: set[str] = set()
        """Workloads of which it said something else, or nothing, when `kind` was asked last."""
        self._again: dict[str, int] = {}
        """Workloads whose nodes may not have begun yet: how often Envoy is to let go of their connections still."""
        self._turned: set[str] = set()
        """Of those who read: who is of the second kind."""

    def settle(self, view: View) -> bool:
        """Say that by now receivers read what `view` has them read; True if something follows from that."""
        before, self._settled = self._settled, Reading.of(view, self._node)
        if before is not None:
            named = before.view.asking.keys() | view.asking.keys()
            begun = {name for name in named if before.ports(name) != self._settled.ports(name)}
            self._unsettled |= begun
            self._again |= dict.fromkeys(begun, AGAIN)
        return bool(self._unsettled)

    def settle_again(self, view: View) -> bool:
        """Say that some time has passed; True if something follows from that."""
        there = view.snapshot.workloads.keys()
        due = self._again.keys() & there
        self._unsettled |= due
        self._again = {name: self._again[name] - 1 for name in due if self._again[name] > 1}
        self._turned = (self._turned ^ due) & there
        return bool(due)

    def begin(self, now: Reading) -> set[str]:
        """Say what receivers are to read; return the workloads that are to be asked about anew. What comes first is settled: nobody has older connections."""
        self._now = now
        if self._settled is None:
            self._settled = now
        unsettled, self._unsettled = self._unsettled, set()
        return unsettled

    def kind(self, workload: str, port: int) -> int:
        """The kind of endpoint (`agent.l7.clusters.Target.read`) that a port of a workload is. For who is new it is what it is to be."""
        reading = self._settled
        if reading is None or workload not in reading.view.snapshot.workloads:
            self._unsettled.add(workload)
            reading = self._now
        ports = reading.ports(workload) if reading is not None else ()
        read = ports is None or port in ports
        return 0 if not read else 2 if workload in self._turned else 1
