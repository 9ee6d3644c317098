"""What tests ask of dashboards and rules, as Grafana and Prometheus read them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_DEPLOY = Path(__file__).parents[1] / "deploy"
RULES = _DEPLOY / "prometheus/rules.yaml"


class Panel(NamedTuple):
    """One query of a panel, with its variables filled in."""

    dashboard: str
    title: str
    expr: str


def dashboards() -> dict[str, Any]:
    """By name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((_DEPLOY / "grafana").glob("*.json"))}


def panels(values: Mapping[str, str]) -> Iterator[Panel]:
    """Every query of every panel; `values` are what variables stand for, with their names."""
    for name, board in dashboards().items():
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                yield Panel(name, panel["title"], filled(target["expr"], values))


def variables(values: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """(dashboard, variable, its query) of each variable whose values come from Prometheus."""
    for name, board in dashboards().items():
        for one in board["templating"]["list"]:
            if one["type"] == "query":
                yield name, one["name"], filled(one["query"]["query"], values)


def filled(text: str, values: Mapping[str, str]) -> str:
    """As Grafana fills variables in."""
    for name, value in sorted(values.items(), reverse=True):
        text = text.replace(f"${name}", value)
    return text
