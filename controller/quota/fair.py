"""Who gets how much of a limit. Pure arithmetic: no clock, no store, no messages. Used by `controller.quota.service`.

Weighted max-min fairness (D. Bertsekas, R. Gallager, Data Networks, 6.5.2): nobody's share can grow without taking from somebody who has, for his weight, no
more. What nobody asks for is spread by weight too, so that a caller who begins to want more has some of it at once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

UNKNOWN: Final = math.inf
"""The demand of a caller that has just come: it is taken to want everything."""
HORIZON_S: Final = 10.0
"""What is left of a counted limit is given out so that it would last this long: Envoy 1.40 says every 5 s what was used."""

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Want:
    """Of one caller, in requests a second. `most` is what it may not exceed whatever is to spare."""

    demand: float
    weight: float = 1.0
    most: float = math.inf


def shares(limit: float, wants: Mapping[K, Want]) -> dict[K, float]:
    """Share out `limit`: in sum never more, to each at least the smaller of its demand and its part by weight, and to nobody more than its `most`."""
    result = _fill(limit, {key: (min(want.demand, want.most), want.weight) for key, want in wants.items()})
    spare = limit - math.fsum(result.values())
    if spare > 0:
        more = _fill(spare, {key: (want.most - result[key], want.weight) for key, want in wants.items()})
        result = {key: value + more[key] for key, value in result.items()}
    return result


def _fill(limit: float, wants: Mapping[K, tuple[float, float]]) -> dict[K, float]:
    """Raise everybody's level together; who has what it wants stops there."""
    result: dict[K, float] = {}
    left, weights = max(0.0, limit), math.fsum(weight for _, weight in wants.values())
    for key, (demand, weight) in sorted(wants.items(), key=lambda item: item[1][0] / item[1][1]):
        result[key] = max(0.0, min(demand, left * weight / weights)) if weights > 0 else 0.0
        left -= result[key]
        weights -= weight
    return result


def left(requests: int, used: Mapping[K, int], weights: Mapping[K, float], elapsed: float) -> dict[K, float]:
    """How many more requests each caller may make of a counted limit; `used` is by all callers of the interval, of which `elapsed` (0 to 1) is over.

    Everybody has a part by weight. Who has used his up may have what others, at an even pace, would have used by now and did not. Together with the rest of
    the limit as the bound of the sum, which is the caller's business, nothing is given twice.
    """
    total = math.fsum(weights[key] for key in used)
    parts = {key: requests * weights[key] / total for key in used}
    unused = {key: max(0.0, parts[key] * elapsed - count) for key, count in used.items()}
    lent = math.fsum(max(0.0, count - parts[key]) for key, count in used.items())
    pool = max(0.0, math.fsum(unused.values()) - lent)
    rest = max(0, requests - sum(used.values()))
    return {key: min(float(rest), max(0.0, parts[key] - count) + max(0.0, pool - unused[key])) for key, count in used.items()}


def steady(demand: float, before: float) -> float:
    """Turn a measured rate into a demand with some room above it; it stays as it was `before` while it still fits, because a new share begins with a burst."""
    roomy = demand * 1.05 + 0.2
    return before if roomy <= before <= roomy * 1.5 else roomy * 1.1
