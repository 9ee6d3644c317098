"""For all tests."""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter

import pytest
from hypothesis import settings

# A machine that has something else to do for a moment must not make a test fail: how long things may take is the benchmarks' business.
settings.register_profile("meshagent", deadline=None)
settings.load_profile("meshagent")

_PATIENCE_S = 60.0


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:  # noqa: ARG001
    """Let no run hang when all is said: grpc.aio's last object joins a thread that sometimes does not end (https://github.com/grpc/grpc/pull/40989)."""
    timer = threading.Timer(_PATIENCE_S, _end, (int(exitstatus),))
    timer.daemon = True
    timer.start()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why tests were skipped, a line for each reason: a line for each test (`-rs`) buries those that failed."""
    reasons = Counter(str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", []))
    for reason, count in sorted(reasons.items()):
        terminalreporter.line(f"{count} {reason.replace('Skipped', 'skipped', 1)}")


def _end(status: int) -> None:
    sys.stdout.flush()
    os._exit(status)
