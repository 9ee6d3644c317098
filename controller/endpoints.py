"""Who stands behind a Service, where that is not a workload of the mesh's own making. Pure; used by `controller.compile`.

Three things have an address and no identity: pods in their node's network namespace, which share its address with everything else there; endpoints of
EndpointSlices that are no pods; and addresses outside the cluster that somebody put into one. For each such address there is one stand-in: a workload that
is not enrolled, in a namespace that no object can have, so that no policy takes it for somebody.
https://kubernetes.io/docs/concepts/services-networking/service/#services-without-selectors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Final

from controller import externals
from controller.conflicts import workload_addresses
from controller.objects import Key, Object

NODES: Final = "(node)"
ADDRESSES: Final = "(address)"
STAND_INS: Final = frozenset({NODES, ADDRESSES})
Targets = Callable[[Mapping[str, Any]], int | None]
"""The target port of a Service's port; None: the endpoint has none for it."""


def targets_at(workload: Object) -> Targets:
    """Targets as a selecting Service has them: a number, or the name of a container's port."""
    named: Mapping[str, int] = workload.spec.get("ports", {})

    def target(port: Mapping[str, Any]) -> int | None:
        wanted = port.get("targetPort") or port["port"]
        return wanted if isinstance(wanted, int) else named.get(f"{wanted}/{port.get('protocol', 'TCP')}")

    return target


def by_service(slices: Iterable[Object]) -> dict[str, list[Object]]:
    """EndpointSlices by the service that they are of, "NAMESPACE/NAME"."""
    found: dict[str, list[Object]] = defaultdict(list)
    for item in slices:
        found[f"{item.key.namespace}/{item.spec['service']}"].append(item)
    return found


class StandIns:
    """See the module. Made once for each compilation."""

    def __init__(self, workloads: Iterable[Object], hosts: Iterable[Object], virtual: Collection[str]) -> None:
        """`workloads`: those with an address of their own; `hosts`: pods in their node's network; `virtual`: addresses at which there is nobody."""
        self._at = {address: item for item in workloads for address in workload_addresses(item)}
        self._virtual = virtual
        self._made: list[Object] = []
        self.asked: set[str] = set()
        """Addresses that were looked for: a workload that comes to have one, or has it no more, changes what was found."""
        for pod in hosts:
            self.asked.update(pod.spec["addresses"])
            self._stand_in(NODES, pod.spec["node"], pod.spec["addresses"], pod.spec["node"], "")

    def holder(self, workload: Object) -> Object | None:
        """Who has the workload's address: itself, or its node's stand-in. None: it may not receive now, and only a workload can say so of itself."""
        if not workload.spec.get("hostNetwork"):
            return workload
        spec = workload.spec
        return next((self._at[one] for one in spec["addresses"] if one in self._at), None) if spec["ready"] else None

    def of_slices(self, slices: Iterable[Object]) -> Iterator[tuple[Object, Targets]]:
        """The ready endpoints of EndpointSlices, and how they map the ports of their Service: by name."""
        for item in slices:
            ports = {(port["name"], port["protocol"]): port["port"] for port in item.spec["ports"]}

            def target(port: Mapping[str, Any], ports: Mapping[tuple[str, str], int] = ports) -> int | None:
                return ports.get((port.get("name", ""), port.get("protocol", "TCP")))

            for endpoint in item.spec["endpoints"]:
                if not endpoint["ready"]:
                    continue
                for address in endpoint["addresses"]:
                    self.asked.add(address)
                    holder = self._at.get(address) or self._stand_in(ADDRESSES, address, [address], "", endpoint["zone"])
                    if holder is not None:
                        yield holder, target

    def _stand_in(self, namespace: str, name: str, addresses: list[str], node: str, zone: str) -> Object | None:
        free = [one for one in addresses if one not in self._at and one not in self._virtual and not externals.is_virtual(one)]
        if not free:
            return None
        spec = {"node": node, "addresses": free, "serviceAccount": "default", "ready": True, "zone": zone}
        if namespace == NODES and (held := next((one for one in self._made if one.key[1:] == (NODES, name)), None)) is not None:
            return held  # pods of one node that do not agree about its addresses
        made = Object(Key("Pod", namespace, name), {"metadata": {"name": name}, "spec": spec}, "", 0)
        self._made.append(made)
        self._at.update(dict.fromkeys(free, made))
        return made

    def made(self) -> list[Object]:
        """All of them, in order of their names."""
        return sorted(self._made, key=lambda one: one.key)
