"""What every benchmark's command does: show steps on standard error, print results, say which targets were missed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from bench.result import Result
from bench.tools import ToolFailed
from lab.cli import progress
from lab.errors import LabError, StartFailed


def run(measure: Callable[[Callable[[str], None]], Sequence[Result]]) -> int:
    """Run a benchmark and publish its results; return the exit code: 0 measured, 1 not. A missed target is a result, not a failure."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with progress() as show:
            results = measure(show)
    except (LabError, ToolFailed, subprocess.SubprocessError) as error:
        if isinstance(error, StartFailed):
            print(error.log, file=sys.stderr)
        print(f"no result: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    for result in results:
        result.publish()
    for result in results:
        if result.target is not None:
            verdict = "met" if result.target.met(result.ratio) else "MISSED"
            text = f"{result.name} against {result.baseline_name}: {result.ratio:.3f}, target {result.target}: {verdict}"
            print(text, file=sys.stderr)
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
