"""A dashboard as a picture, from its own JSON and what a Prometheus answers: for the documentation, where no Grafana is. Development only.

Draws what the dashboards here are made of: rows, time series (lines, stacks, thresholds), numbers with their course, tables. The queries, units, colours,
legends and places are the file's; the look is near Grafana's, not Grafana's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WIDTH, INCH_PER_COLUMN, INCH_PER_LINE = 24, 0.62, 0.36
BACKGROUND, PANEL, TEXT, FAINT = "#111217", "#181b1f", "#ccccdc", "#5a5d66"
LINES: Final = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#b877d9", "#8ab8ff", "#f2495c", "#96d98d", "#ffb357", "#ca95e5")
_COLOURS: Final = {"green": "#73bf69", "orange": "#ff9830", "red": "#f2495c", "blue": "#5794f2", "yellow": "#f2cc0c"}
_MOST_IN_LEGEND, _MOST_LINES = 6, 8
_STEPS: Final[Mapping[str, tuple[float, Sequence[str]]]] = {
    "bytes": (1024, ("B", "KiB", "MiB", "GiB", "TiB")),
    "Bps": (1000, ("B/s", "kB/s", "MB/s", "GB/s")),
    "short": (1000, ("", "K", "Mil", "Bil")),
    "reqps": (1000, ("req/s", "K req/s", "M req/s")),
    "cps": (1000, ("c/s", "K c/s", "M c/s")),
    "ops": (1000, ("ops/s", "K ops/s", "M ops/s")),
}


@dataclass(frozen=True, slots=True)
class Series:
    """One line: labels, and (Unix seconds, value)."""

    labels: Mapping[str, str]
    points: Sequence[tuple[float, float]]


Ask = Callable[[str, bool], Sequence[Series]]
"""What Prometheus answers to an expression; now only (True), or over the time of the picture."""


def draw(board: Mapping[str, Any], ask: Ask, file: Path, *, filled: Callable[[str], str] = str) -> None:
    """Draw a dashboard. `filled` puts values in the place of variables. Raises OSError if `file` cannot be written."""
    lines = max(one["gridPos"]["y"] + one["gridPos"]["h"] for one in board["panels"]) + 1
    figure = Figure(figsize=(WIDTH * INCH_PER_COLUMN, lines * INCH_PER_LINE), facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    figure.text(0.006, 1 - 0.6 / lines, board["title"], color=TEXT, fontsize=13, va="center", weight="bold")
    for panel in board["panels"]:
        at = panel["gridPos"]
        x, width = at["x"] / WIDTH, at["w"] / WIDTH
        top, height = (at["y"] + 1) / lines, at["h"] / lines
        if panel["type"] == "row":
            figure.text(x + 0.006, 1 - top - height / 2, panel["title"], color=TEXT, fontsize=10, va="center")
            continue
        gap = 0.003
        back = figure.add_axes((x + gap, 1 - top - height + gap / 2, width - 2 * gap, height - gap))
        back.set_facecolor(PANEL)
        _bare(back)
        back.text(0.02, 1 - 0.55 / at["h"], panel["title"], color=TEXT, fontsize=8, va="center", transform=back.transAxes, clip_on=True)
        _DRAWN[panel["type"]](back, panel, _asked(panel, ask, filled))
    figure.savefig(file, dpi=75, facecolor=BACKGROUND)


def _asked(panel: Mapping[str, Any], ask: Ask, filled: Callable[[str], str]) -> list[tuple[str, Series]]:
    """Every series of a panel with its legend."""
    return [
        (_legend(target.get("legendFormat", ""), series), Series(series.labels, points))
        for target in panel["targets"]
        for series in ask(filled(target["expr"]), panel["type"] == "table")
        if (points := [point for point in series.points if math.isfinite(point[1])])
    ]


def _legend(pattern: str, series: Series) -> str:
    if not pattern:
        return ", ".join(series.labels.values())
    return re.sub(r"{{\s*(\w+)\s*}}", lambda found: series.labels.get(found[1], ""), pattern)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)


def _graph(back: Axes, panel: Mapping[str, Any], found: Sequence[tuple[str, Series]]) -> None:
    unit = panel["fieldConfig"]["defaults"].get("unit", "short")
    axes = back.inset_axes((0.1, 0.22, 0.88, 0.66))
    axes.set_facecolor(PANEL)
    bottoms: dict[float, float] = {}
    stacked = panel["fieldConfig"]["defaults"].get("custom", {}).get("stacking", {}).get("mode") == "normal"
    for number, (name, series) in enumerate(found):
        colour, times = LINES[number % len(LINES)], [time for time, _ in series.points]
        values = [value + (bottoms.get(time, 0.0) if stacked else 0.0) for time, value in series.points]
        axes.fill_between(
            times, values, [bottoms.get(time, 0.0) for time in times], color=colour, alpha=0.3 if stacked else 0.08, linewidth=0
        )
        axes.plot(times, values, color=colour, linewidth=1.1, label=name if number < _MOST_IN_LEGEND else None)
        bottoms |= dict(zip(times, values, strict=True)) if stacked else {}
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    for step in panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", []):
        if step["value"] is not None and 0 < step["value"] <= axes.get_ylim()[1] and panel["type"] == "timeseries":
            axes.axhline(step["value"], color=_COLOURS.get(step["color"], FAINT), linewidth=0.8, linestyle="--")
    axes.tick_params(colors=FAINT, labelsize=6, length=0)
    axes.grid(color="#2a2d33", linewidth=0.5)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_yticks(axes.get_yticks())
    axes.set_ylim(bottom=0)
    axes.set_yticklabels([_shown(value, unit) for value in axes.get_yticks()])
    begin = min((series.points[0][0] for _, series in found if series.points), default=0.0)
    axes.set_xticks(axes.get_xticks())
    axes.set_xticklabels([f"{time - begin:.0f} s" if time >= begin else "" for time in axes.get_xticks()])
    if found:
        more = f"and {len(found) - _MOST_IN_LEGEND} more" if len(found) > _MOST_IN_LEGEND else None
        legend = back.legend(
            *axes.get_legend_handles_labels(),
            loc="lower left",
            ncol=3,
            fontsize=5.5,
            frameon=False,
            labelcolor=TEXT,
            title=more,
            title_fontsize=5.5,
        )
        legend.get_title().set_color(FAINT)


def _number(back: Axes, panel: Mapping[str, Any], found: Sequence[tuple[str, Series]]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    last = [series.points[-1][1] for _, series in found if series.points]
    if not last:
        back.text(0.5, 0.4, "No data", color=FAINT, fontsize=9, ha="center", va="center")
        return
    colour = TEXT
    for step in defaults.get("thresholds", {}).get("steps", []):
        if step["value"] is None or last[0] >= step["value"]:
            colour = _COLOURS.get(step["color"], TEXT)
    course = back.inset_axes((0, 0, 1, 0.4))
    course.set_facecolor("none")
    _bare(course)
    times, values = zip(*found[0][1].points, strict=True)
    course.fill_between(times, values, min(0.0, *values), color=colour, alpha=0.15, linewidth=0)
    course.margins(0)
    course.set_ylim(top=max(*values, 1e-9) * 1.2)
    back.text(0.5, 0.45, _shown(last[0], defaults.get("unit", "short")), color=colour, fontsize=15, ha="center", va="center", weight="bold")


def _table(back: Axes, panel: Mapping[str, Any], found: Sequence[tuple[str, Series]]) -> None:
    unit = panel["fieldConfig"]["defaults"].get("unit", "short")
    columns = list(dict.fromkeys(name for name, _ in found))
    rows: dict[tuple[tuple[str, str], ...], dict[str, float]] = {}
    for name, series in found:
        labels = tuple((key, value) for key, value in series.labels.items() if key != "__name__")
        rows.setdefault(labels, {})[name] = series.points[-1][1]
    keys = list(dict.fromkeys(key for row in rows for key, _ in row))
    cells = [keys + columns]
    cells += [
        [dict(row).get(key, "") for key in keys] + [_shown(values[name], unit) if name in values else "" for name in columns]
        for row, values in rows.items()
    ]
    for line, row in enumerate(cells[: _MOST_LINES + 1]):
        for column, cell in enumerate(row):
            place = (0.01 + column / len(row), 0.82 - 0.09 * line)
            back.text(*place, str(cell)[:40], color=FAINT if line == 0 else TEXT, fontsize=7, va="center", transform=back.transAxes)


_DRAWN: Final = {"timeseries": _graph, "stat": _number, "table": _table}


def _shown(value: float, unit: str) -> str:
    """A value with its unit, as short as Grafana has it."""
    if math.isnan(value):
        return ""
    if unit == "percentunit":
        return f"{value * 100:.3g}%"
    if unit in {"s", "dtdurations"}:
        for size, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
            if abs(value) >= size:
                return f"{value / size:.3g} {name}"
        return "0 s"
    base, names = _STEPS.get(unit, (1000.0, ("", "K", "Mil", "Bil")))
    step = min(len(names) - 1, int(math.log(abs(value), base))) if abs(value) >= 1 else 0
    return f"{value / base**step:.3g} {names[step]}".strip()
