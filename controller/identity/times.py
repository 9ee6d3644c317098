"""Times as people read them."""

from __future__ import annotations

import time


def when(unix: float) -> str:
    """Return Unix seconds as a date and time in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(unix))
