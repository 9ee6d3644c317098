"""Gateway API durations (https://gateway-api.sigs.k8s.io/geps/gep-2257/): "100ms", "1h30m"; no fractions, no sign, no spaces."""

from __future__ import annotations

import re

_UNIT_MS = {"h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}


def milliseconds(text: str) -> int:
    """Return the length of a duration that the schema has already accepted; an empty text is 0."""
    return sum(int(number) * _UNIT_MS[unit] for number, unit in re.findall(r"([0-9]+)(ms|h|m|s)", text))
