"""Which global limits there are, and which callers live on which node: read from the compiled model. Pure, used by `controller.quota.service`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from meshapi import discovery_pb2 as pb
from meshapi import quotas

MOST_LIMITS: Final = 10_000


@dataclass(frozen=True, slots=True)
class Limit:
    """One global limit of one service port. `weights` by caller; who is not in it weighs 1."""

    name: str
    requests: int
    interval_ms: int
    burst: int
    by: int
    weights: Mapping[str, int] = field(default_factory=dict)

    @property
    def counted(self) -> bool:
        """Is it a number of requests through an interval, instead of a rate?"""
        return self.interval_ms > quotas.COUNTED_MS

    def window(self, now: float) -> int:
        """Which interval it is at a Unix time; all controllers agree. 0 for a rate."""
        return int(now * 1000) // self.interval_ms if self.counted else 0

    def elapsed(self, now: float) -> float:
        """How much of the interval is over, 0 to 1."""
        return now * 1000 % self.interval_ms / self.interval_ms


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All limits by name, and the nodes of each caller by (kind of caller, its name)."""

    limits: Mapping[str, Limit] = field(default_factory=dict)
    homes: Mapping[tuple[int, str], frozenset[str]] = field(default_factory=dict)

    @staticmethod
    def of(entities: Mapping[str, pb.Entity]) -> Catalogue:
        """Read a compiled model."""
        limits: dict[str, Limit] = {}
        for entity in entities.values():
            if entity.WhichOneof("kind") != "traffic":
                continue
            for target in entity.traffic.targets:
                for number, rate in enumerate(entity.traffic.rate_limits):
                    if rate.is_global and len(limits) < MOST_LIMITS:
                        name = quotas.name(target.service, target.port, number)
                        limits[name] = Limit(name, rate.requests, rate.interval_ms, rate.burst, rate.by, dict(rate.weights))
        if not limits:
            return Catalogue()
        homes: dict[tuple[int, str], set[str]] = defaultdict(set)
        for entity in entities.values():
            if entity.WhichOneof("kind") == "workload" and entity.workload.enrolled:
                one = entity.workload
                homes[pb.RateLimit.WORKLOAD, f"{one.namespace}/{one.name}"].add(one.node)
                homes[pb.RateLimit.SERVICE_ACCOUNT, f"{one.namespace}/{one.service_account}"].add(one.node)
                homes[pb.RateLimit.NAMESPACE, one.namespace].add(one.node)
        return Catalogue(limits, {key: frozenset(nodes) for key, nodes in homes.items()})

    def objection(self, node: str, limit: str, caller: str) -> str:
        """Why `node` may not speak for a caller of a limit, or nothing."""
        found = self.limits.get(limit)
        if found is None:
            return f'limit "{limit[:80]}": there is none of this name'
        if node not in self.homes.get((found.by, caller), ()):
            return f'caller "{caller[:80]}" of {limit}: does not live on node {node}'
        return ""
