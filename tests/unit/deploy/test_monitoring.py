"""Dashboards and rules: up to date, consistent with each other and with the metrics that exist, and right."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from deploy.grafana import build
from tests import monitoring

DASHBOARDS = monitoring.dashboards()
RULES = monitoring.RULES


def test_what_is_committed_is_what_the_code_builds() -> None:
    assert build.main(["--check"]) == 0


def test_a_file_that_somebody_changed_by_hand_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "HERE", tmp_path)
    assert build.main([]) == 0
    (tmp_path / "mesh.json").write_text("{}")
    assert build.main(["--check"]) == 1
    assert "run 'make generate'" in capsys.readouterr().err
    assert build.main([]) == 0
    (tmp_path / "old.json").write_text("{}")
    assert build.main(["--check"]) == 1
    assert build.main([]) == 0
    assert build.main(["--check"]) == 0


def test_there_are_the_six() -> None:
    assert set(DASHBOARDS) == {"mesh", "service", "workload", "agent", "waypoint", "identity"}
    assert len({board["uid"] for board in DASHBOARDS.values()}) == 6


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_as_people_expect(name: str) -> None:
    board = DASHBOARDS[name]
    assert board["description"]
    assert board["links"][0]["type"] == "dashboards", "one click to the others"
    variables = {one["name"] for one in board["templating"]["list"]}
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        for target in panel["targets"]:
            used = set(re.findall(r"\$([a-z]+)", target["expr"]))
            assert used <= variables, f"{panel['title']}: {used - variables} is no variable"
            assert "[5m]" not in target["expr"], "a rate goes by the zoom"
    titles = [panel["title"] for panel in panels if panel["type"] == "stat"]
    assert len(titles) == len(set(titles))


def test_panels_do_not_lie_over_each_other() -> None:
    for name, board in DASHBOARDS.items():
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            at = panel["gridPos"]
            cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
            assert not cells & taken, f"{name}: {panel['title']}"
            assert all(x < 24 for x, _ in cells)
            taken |= cells


def test_links_to_dashboards_lead_somewhere() -> None:
    known = {board["uid"] for board in DASHBOARDS.values()}
    assert set(re.findall(r"/d/([a-z-]+)", json.dumps(DASHBOARDS))) <= known


def test_rules_hold_what_they_promise() -> None:
    run = subprocess.run(["promtool", "test", "rules", "tests.yaml"], cwd=RULES.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_rules_are_well_formed() -> None:
    run = subprocess.run(["promtool", "check", "rules", str(RULES)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def alerts() -> list[dict[str, Any]]:
    groups = YAML(typ="safe").load(RULES)["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def test_metrics_that_rules_and_dashboards_ask_for_are_of_agent_or_controller() -> None:
    rules = [rule for group in YAML(typ="safe").load(RULES)["groups"] for rule in group["rules"]]
    asked = [rule["expr"] for rule in rules] + [panel.expr for panel in monitoring.panels({})]
    named = {name for expr in asked for name in re.findall(r"(?<![\w:])(?:mesh|process)_\w+(?!:)\b", re.sub(r'"[^"]*"', "", expr))}
    assert len(named) > 70
    own = "\n".join(path.read_text() for top in ("agent", "controller") for path in (RULES.parents[2] / top).rglob("*.py"))
    of_every_process = {"process_cpu_seconds_total", "process_resident_memory_bytes"}  # prometheus_client.ProcessCollector
    found = {name for name in named if re.search(rf"""["'](?:{name}|{re.sub("_(total|bucket|count|sum)$", "", name)})["']""", own)}
    assert named - found == of_every_process


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: str(alert["alert"]))
def test_an_alert_says_what_and_what_to_do_and_has_a_test(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"critical", "warning"}
    assert alert["annotations"]["summary"]
    assert len(alert["annotations"]["description"]) > 20
    assert alert["alert"] in (RULES.parent / "tests.yaml").read_text()
