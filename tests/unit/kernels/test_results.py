"""Reading what guests answered, and showing it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.kernel.kernels import machine, matrix, results
from tests.kernel.kernels.__main__ import job, judge

REPORT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.kernel.test_connect" name="test_a[ipv4]" time="1.5"/>
<testcase classname="tests.kernel.test_connect" name="test_b" time="2.0"><failure message="assert 1 == 2">where</failure></testcase>
<testcase classname="tests.kernel.test_connect" name="test_c" time="0.5"><error message="failed on setup">lab</error></testcase>
<testcase classname="tests.kernel.test_connect" name="test_d" time="0"><skipped message="no promtool"/></testcase>
</testsuite></testsuites>"""
GOOD = '<testsuites><testsuite><testcase classname="m" name="t" time="1"/></testsuite></testsuites>'
DATAPATH = matrix.Suite("datapath", ("tests/kernel/test_connect.py",), budget_s=10)
ROW, REFUSED = matrix.Row("6.1", "bookworm"), matrix.Row("5.10", "bullseye", refused=True)


def test_a_report_is_counted_and_failures_keep_their_words() -> None:
    tests = results.junit("datapath", REPORT, 1)
    assert (tests.passed, tests.skipped, tests.seconds, tests.complete, tests.good) == (1, 1, 4.0, True, False)
    assert tests.failures == {"test_connect::test_b": "assert 1 == 2\nwhere", "test_connect::test_c": "failed on setup\nlab"}


@pytest.mark.parametrize(
    ("report", "code", "good"),
    [
        pytest.param(GOOD, 0, True, id="all passed"),
        pytest.param(GOOD, 2, False, id="interrupted by its budget"),
        pytest.param(GOOD, -1, False, id="killed"),
        pytest.param("", 124, False, id="no report"),
        pytest.param("<testsuites/>", 0, False, id="no test"),
    ],
)
def test_only_a_whole_run_without_failure_is_good(report: str, code: int, good: bool) -> None:
    assert results.junit("datapath", report, code).good is good


def answered(directory: Path, files: dict[str, str]) -> machine.Ran:
    for name, text in files.items():
        (directory / name).write_text(text)
    return machine.Ran(12.0, directory, "")


@pytest.mark.parametrize(
    ("said", "code", "pins", "good"),
    [
        pytest.param("Error: bpf_get_netns_cookie needs 5.15", "2", "", True, id="names what is missing"),
        pytest.param("Error: bpf_get_netns_cookie needs 5.15", "0", "", False, id="goes on all the same"),
        pytest.param("Error: bpf_get_netns_cookie needs 5.15", "124", "", False, id="hangs"),
        pytest.param("Error: Invalid argument", "2", "", False, id="does not name it"),
        pytest.param("Error: bpf_get_netns_cookie needs 5.15", "2", "meshagent", False, id="leaves pins"),
    ],
)
def test_a_refusal_names_the_feature_and_leaves_nothing(tmp_path: Path, said: str, code: str, pins: str, good: bool) -> None:
    ran = answered(tmp_path, {"agent.log": said, "agent.exit": code, "bpffs": pins})
    assert judge(REFUSED, [DATAPATH], ran, "5.10").good is good


def test_a_guest_that_does_not_answer_is_not_good_and_says_why() -> None:
    result = judge(ROW, [DATAPATH], machine.Ran(99.0, None, "the guest was stopped after 99 s"), "6.1")
    assert not result.good
    assert result.error == "the guest was stopped after 99 s"


def test_table_and_json_say_the_same(tmp_path: Path) -> None:
    ran = answered(tmp_path, {"datapath.xml": REPORT, "datapath.exit": "1"})
    found = [
        judge(ROW, [DATAPATH], ran, "6.1.0-50"),
        results.Result("5.10", "bullseye", "5.10.0-32", 30.0, good=True, refusal="a\nb is missing"),
    ]
    lines = results.table(found).splitlines()
    assert lines[2] == "| 6.1.0-50 | bookworm | datapath | 1 | 2 | 1 | 4 |"
    assert lines[3] == "| 5.10.0-32 | bullseye | refused, as it must be: b is missing | | | | 30 |"
    results.store(found, tmp_path / "results.json", "abc123")
    stored = json.loads((tmp_path / "results.json").read_text())
    assert (stored["source"], stored["good"]) == ("abc123", False)
    assert stored["results"][0]["tests"][0]["passed"] == 1


def test_a_job_runs_the_tests_or_the_agent_that_must_refuse() -> None:
    assert "meshagent run" not in job(ROW, [DATAPATH], [])
    assert "-m pytest" in job(ROW, [DATAPATH], ["-k", "two words"])
    assert "'two words'" in job(ROW, [DATAPATH], ["-k", "two words"])
    assert "-m pytest" not in job(REFUSED, [DATAPATH], [])
