"""What a benchmark found: one JSON object a result, printed and appended to build/bench/results.jsonl. Called by every benchmark.

Modes are run in turns (`rounds`), so that whatever else the machine does meets all of them. A result compares two modes round by round:
its ratio is the *median of the rounds' ratios*, not the ratio of the medians, and its spread is the smallest and the largest of them.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

RESULTS = Path(__file__).resolve().parents[1] / "build" / "bench" / "results.jsonl"
LEAST_ROUNDS = 5
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """A promise about a ratio: the bound itself still keeps it."""

    bound: float
    at_least: bool
    """True: the ratio must not be smaller (rates); False: it must not be larger (times)."""

    def met(self, ratio: float) -> bool:
        """Return whether a ratio keeps the promise."""
        return ratio >= self.bound if self.at_least else ratio <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Result:
    """One number of ours against one of somebody else's, pair by pair."""

    name: str
    unit: str
    baseline_name: str
    pairs: tuple[tuple[float, float], ...]
    """(ours, baseline) of each round, in order."""
    setup: str
    """What ran where, and whether the load was an open or a closed loop."""
    target: Target | None = None

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError(f"{self.name}: no measured pair")
        if any(baseline <= 0 for _, baseline in self.pairs):
            raise ValueError(f"{self.name}: a baseline of zero or less has no ratio")

    @property
    def ratios(self) -> list[float]:
        """Ours / baseline, one for each round."""
        return [ours / baseline for ours, baseline in self.pairs]

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(self.ratios)

    def document(self) -> dict[str, Any]:
        """Return the JSON object. `ours` and `baseline` are medians over the rounds; numbers carry five significant digits."""
        ratios = self.ratios
        found: dict[str, Any] = {
            "name": self.name,
            "unit": self.unit,
            "ours": _short(statistics.median(ours for ours, _ in self.pairs)),
            "baseline": _short(statistics.median(baseline for _, baseline in self.pairs)),
            "baseline_name": self.baseline_name,
            "ratio": _short(self.ratio),
            "runs": [
                {"ours": _short(ours), "baseline": _short(base), "ratio": _short(ratio)}
                for (ours, base), ratio in zip(self.pairs, ratios, strict=True)
            ],
            "spread": {"min": _short(min(ratios)), "max": _short(max(ratios))},
            "kernel": platform.release(),
            "cpus": os.cpu_count(),
            "setup": self.setup,
        }
        if self.target is not None:
            found |= {"target": str(self.target), "met": self.target.met(self.ratio)}
        return found

    def publish(self, path: Path = RESULTS) -> None:
        """Print the object, and append it with the time to `path`."""
        document = self.document()
        print(json.dumps(document), flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as stream:
            stream.write(json.dumps({**document, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}) + "\n")


def rounds(modes: Mapping[str, Callable[[], T]], count: int, progress: Callable[[str], None]) -> list[dict[str, T]]:
    """Run every mode once a round and return what each returned, by name; a first round that warms up is thrown away.

    The order turns over with every round (A B, B A, A B, ...): a machine that gets slower all the time favours nobody.
    """
    if count < LEAST_ROUNDS:
        raise ValueError(f"{count} rounds are not enough to compare: at least {LEAST_ROUNDS}")
    found = []
    for i in range(count + 1):
        progress(f"round {i} of {count}" if i else "warming up")
        found.append({name: modes[name]() for name in (list(modes) if i % 2 else list(modes)[::-1])})
    return found[1:]


def pairs(found: Sequence[Mapping[str, T]], ours: str, baseline: str, value: Callable[[T], float]) -> tuple[tuple[float, float], ...]:
    """Return (ours, baseline) of each round for one of the values that a run returned."""
    return tuple((value(one[ours]), value(one[baseline])) for one in found)


def _short(value: float) -> float:
    return float(f"{value:.5g}")
