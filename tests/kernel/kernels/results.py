"""What guests answered: pytest's JUnit reports and the agent's words on a kernel that is too old; as records, JSON and a table."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Tests:
    """One pytest run. `complete` is false if it was interrupted or never reported: then the other tests of the suite did not run."""

    suite: str
    passed: int
    skipped: int
    seconds: float
    failures: dict[str, str]
    complete: bool

    @property
    def good(self) -> bool:
        """Whether every test ran and none failed; a run without a test is not good."""
        return self.complete and not self.failures and self.passed > 0


@dataclass(frozen=True, slots=True)
class Result:
    """One row of the matrix. `refusal` is what the agent said where it must refuse; `seconds` is the boot from start to end."""

    name: str
    suite: str
    kernel: str
    seconds: float
    good: bool
    tests: tuple[Tests, ...] = ()
    refusal: str = ""
    error: str = ""


def junit(suite: str, report: str, exit_code: int) -> Tests:
    """Read pytest's --junitxml. Exit codes 0 and 1 mean that all selected tests ran (pytest's ExitCode)."""
    try:
        root = ET.fromstring(report)  # noqa: S314  # written by our own guest
    except ET.ParseError:
        return Tests(suite, 0, 0, 0.0, {}, complete=False)
    passed = skipped = 0
    seconds = 0.0
    failures: dict[str, str] = {}
    for case in root.iter("testcase"):
        seconds += float(case.get("time", "0"))
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        if bad is not None:
            failures[f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"] = (
                f"{bad.get('message', '')}\n{bad.text or ''}".strip()
            )
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return Tests(suite, passed, skipped, round(seconds, 1), failures, complete=exit_code in (0, 1))


def read(suite: str, answer: Path) -> Tests:
    """A suite's result from what a guest answered."""
    report, code = answer / f"{suite}.xml", answer / f"{suite}.exit"
    return junit(suite, report.read_text() if report.exists() else "", int(code.read_text()) if code.exists() else -1)


def table(results: list[Result]) -> str:
    """The results for people, in Markdown."""
    lines = ["| kernel | from Debian | tests | passed | failed | skipped | seconds |", "|---|---|---|---|---|---|---|"]
    for result in results:
        head = f"| {result.kernel or result.name} | {result.suite} |"
        if result.refusal or result.error:
            word = "refused, as it must be" if result.good else "NOT GOOD"
            lines.append(f"{head} {word}: {(result.refusal or result.error).strip().splitlines()[-1]} | | | | {result.seconds:.0f} |")
        for tests in result.tests:
            note = "" if tests.complete else " (interrupted)"
            lines.append(f"{head} {tests.suite}{note} | {tests.passed} | {len(tests.failures)} | {tests.skipped} | {tests.seconds:.0f} |")
    return "\n".join(lines)


def store(results: list[Result], path: Path, source: str) -> None:
    """Write the results as JSON."""
    document = {"source": source, "good": all(r.good for r in results), "results": [dataclasses.asdict(r) for r in results]}
    path.write_text(json.dumps(document, indent=2) + "\n")
