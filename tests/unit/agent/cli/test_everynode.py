"""What the checks of all nodes say together: a node whose report is no report was not checked, whatever it says, and the others' reports are shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.check.finding import Finding, Report, Severity, error, ok
from agent.cli import everynode
from agent.errors import NotFound
from agent.report import as_json

GOOD = json.dumps(as_json(Report("node", "x", (ok("kernel", "it has all"),))))
ONE = {"severity": "ok", "check": "kernel", "what": "it has all", "where": "", "cause": "", "nextStep": ""}


def kubectl(tmp_path: Path, said: bytes, status: int = 1) -> list[str]:
    """A command in kubectl's place: pod "bad" says that, and every other that all is well."""
    (tmp_path / "bad").write_bytes(said)
    (tmp_path / "good").write_text(GOOD)
    script = tmp_path / "kubectl"
    script.write_text(
        f"#!/bin/sh\n[ $4 = bad ] && {{ cat {tmp_path}/bad; echo it went wrong >&2; exit {status}; }}\nexec cat {tmp_path}/good\n"
    )
    script.chmod(0o755)
    return [str(script)]


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"{}", id="no-findings"),
        pytest.param(b'{"findings": []}', id="not-one-finding"),
        pytest.param(b"[]", id="a-list"),
        pytest.param(b"\xff\xfe{", id="no-text"),
        pytest.param(json.dumps({"findings": [ONE | {"severity": 7}]}).encode(), id="severity-is-a-number"),
        pytest.param(json.dumps({"findings": [ONE | {"severity": "bad"}]}).encode(), id="severity-is-unknown"),
        pytest.param(json.dumps({"findings": [ONE | {"check": None}]}).encode(), id="check-is-null"),
        pytest.param(json.dumps({"findings": [ONE, "x"]}).encode(), id="a-word"),
    ],
)
@pytest.mark.parametrize("status", [0, 1])
def test_a_node_whose_report_is_none_was_not_checked_and_the_others_are_told_of(tmp_path: Path, said: bytes, status: int) -> None:
    one, other = everynode.reports(kubectl(tmp_path, said, status), "m", {"n1": "bad", "n2": "good"}, [])
    assert (one.name, one.worst, [finding.what for finding in one.findings]) == ("n1", Severity.ERROR, ["it was not checked"])
    assert one.findings[0].cause == "it went wrong"
    assert (other.name, other.worst) == ("n2", Severity.OK)


def test_a_report_of_errors_is_believed(tmp_path: Path) -> None:
    found = Finding(Severity.ERROR, "kernel", "it has\N{ESCAPE}[2J nothing", "here", "it is old", "a newer one")
    (one,) = everynode.reports(kubectl(tmp_path, json.dumps(as_json(Report("node", "x", (found,)))).encode()), "m", {"n1": "bad"}, [])
    assert [(finding.severity, finding.what, finding.next_step) for finding in one.findings] == [
        (Severity.ERROR, "it has\N{REPLACEMENT CHARACTER}[2J nothing", "a newer one")
    ]


def test_a_kubectl_that_is_not_there_or_cannot_be_started_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no kubectl in PATH"):
        everynode.reports([str(tmp_path / "nothing")], "m", {"n1": "good"}, [])
    (command,) = kubectl(tmp_path, b"")
    Path(command).chmod(0o644)
    with pytest.raises(NotFound, match=r"cannot be started: .*Permission denied"):
        everynode.reports([command], "m", {"n1": "good"}, [])


def test_that_no_node_could_be_looked_at_does_not_look_like_a_node(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Report("cluster", "c", (error("nodes", "there are none", next_step="make some"),))
    assert everynode.say([cluster, everynode.unseen("no agent runs", "m")], "text") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "agents m: 1 error, 0 warnings"
    assert "next step: mend first what was found of the cluster" in lines[-2]
    everynode.say([cluster, everynode.unseen("no agent runs", "m")], "json")
    assert [one["scope"] for one in json.loads(capsys.readouterr().out)["reports"]] == ["cluster", "agents"]
