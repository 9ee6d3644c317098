"""Requests that enforcing an AUDIT policy would deny: counted by Envoy, and told to people, a few a second. Used by the supervisor and by /metrics.

Neither costs anything per request in Python unless an AUDIT rule matches: the counters are read from Envoy when somebody asks for metrics, and Envoy streams
records only of requests that its shadow rules marked (`agent.l7.listeners`). What a node's two sides see is counted apart: a request to another node meets
the same rule at the caller's waypoint ("outbound") and at the receiver's ("inbound").
"""

from __future__ import annotations

import http.client
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote

from agent.l7 import envoy
from agent.l7.access_log import RequestRecord
from agent.model import Action, Snapshot

_log = logging.getLogger(__name__)

LINES_PER_S = 10
"""At most so many lines; the first one of the next second says how many were left out."""
_FILTER = r"^http\..*\.rbac\.policy\..*\.shadow_denied$"
_LINE = re.compile(r"http\.(?P<side>[a-z]+)\.rbac\.policy\.(?P<rule>.+)\.shadow_denied: (?P<count>[0-9]+)")


def wanted(snapshot: Snapshot) -> bool:
    """Is there anything to count? Envoy looks through all of its statistics."""
    return any(policy.action is Action.AUDIT for policy in snapshot.policies.values())


def counts(admin: Path) -> Mapping[tuple[str, str], int]:
    """Requests that would be denied by (side, rule), from Envoy; empty if it does not answer. Blocks for a moment: not for the event loop."""
    try:
        text = envoy.ask_admin(admin, f"/stats?filter={quote(_FILTER, safe='')}").decode()
    except (OSError, http.client.HTTPException):
        return {}
    found: Counter[tuple[str, str]] = Counter()
    for line in text.splitlines():
        if match := _LINE.fullmatch(line):
            found[match["side"], match["rule"]] += int(match["count"])
    return found


class Reporter:
    """Writes the lines. One event loop."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._second = 0
        self._written = 0
        self._left_out = 0

    def on_record(self, record: RequestRecord) -> None:
        """Tell of one request. Its query is left out: tokens may be in there."""
        second = int(self._now())
        if second != self._second:
            self._second, self._written = second, 0
        if self._written >= LINES_PER_S:
            self._left_out += 1
            return
        self._written += 1
        extra = {
            "rule": record.audited,
            "side": record.side,
            "workload": record.workload,
            "caller": record.downstream_remote_address,
            "method": record.method,
            "host": record.authority,
            "path": record.path.partition("?")[0],
        }
        if self._left_out:
            extra["left_out"] = str(self._left_out)
            self._left_out = 0
        _log.warning("enforcing would deny", extra=extra)
