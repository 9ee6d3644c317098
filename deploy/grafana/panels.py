"""Panels, variables and links as all dashboards of the mesh have them. Used by `deploy.grafana.dashboards`.

The library is Grafana Labs' own (grafana-foundation-sdk); grafanalib, the community's, has had no release since January 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common, dashboard

TAG = "meshagent"
SOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH = 24
Steps = Sequence[tuple[float | None, str]]
"""(from this value on, colour); the first value is None."""
GOOD_IF_ONE: Steps = ((None, "red"), (1, "green"))
BAD_IF_ANY: Steps = ((None, "green"), (1, "red"))
RATIO_OF_ERRORS: Steps = ((None, "green"), (0.01, "orange"), (0.05, "red"))
DAYS_LEFT: Steps = ((None, "red"), (3600, "orange"), (6 * 3600, "green"))
FILL: Steps = ((None, "green"), (0.8, "orange"), (0.95, "red"))
PLAIN: Steps = ((None, "blue"),)


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression and how its series are called ({{label}} stands for a label)."""

    expr: str
    legend: str = ""


def graph(
    title: str, unit: str, *queries: Query, about: str = "", steps: Steps = (), stacked: bool = False, span: int = 12
) -> timeseries.Panel:
    """Lines over time; `steps` draw thresholds."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(about)
        .datasource(SOURCE)
        .unit(unit)
        .span(span)
        .height(8)
        .min(0)
        .fill_opacity(30 if stacked else 8)
        .show_points(common.VisibilityMode.AUTO)
        .legend(
            common_builders.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING))
    )
    if stacked:
        panel.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL))
    if steps:
        panel.thresholds(_thresholds(steps))
        panel.thresholds_style(common_builders.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED))
    for i, query in enumerate(queries):
        panel.with_target(prometheus.Dataquery().expr(query.expr).legend_format(query.legend).range().ref_id(_name(i)))
    return panel


def number(title: str, unit: str, expr: str, *, about: str = "", steps: Steps = PLAIN, span: int = 4) -> stat.Panel:
    """One number, coloured by `steps`, with its course behind it."""
    return (
        stat.Panel()
        .title(title)
        .description(about)
        .datasource(SOURCE)
        .unit(unit)
        .span(span)
        .height(4)
        .thresholds(_thresholds(steps))
        .color_mode(common.BigValueColorMode.VALUE)
        .graph_mode(common.BigValueGraphMode.AREA)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(prometheus.Dataquery().expr(expr).range().ref_id("A"))
    )


def rows(title: str, unit: str, *queries: Query, about: str = "", link: tuple[str, str] | None = None, span: int = 24) -> table.Panel:
    """A table with a line for each label set and a column for each query; `link` is (title, URL) of each line."""
    panel = table.Panel().title(title).description(about).datasource(SOURCE).unit(unit).span(span).height(8).filterable(True)
    for i, query in enumerate(queries):
        panel.with_target(prometheus.Dataquery().expr(query.expr).legend_format(query.legend).instant().format(_TABLE).ref_id(_name(i)))
    panel.with_transformation(dashboard.DataTransformerConfig(id_val="merge", options={}))
    renamed = {f"Value #{_name(i)}": query.legend for i, query in enumerate(queries)} | {"Value": queries[0].legend}
    panel.with_transformation(
        dashboard.DataTransformerConfig(id_val="organize", options={"excludeByName": {"Time": True}, "renameByName": renamed})
    )
    if link is not None:
        panel.data_links([builders.DashboardLink(link[0]).url(link[1]).type(dashboard.DashboardLinkType.LINK)])
    return panel


def variable(name: str, label: str, query: str, *, multi: bool = False) -> builders.QueryVariable:
    """A choice of values that Prometheus knows; `multi`: several, or all of them."""
    result = (
        builders.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query({"query": query, "refId": name})
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
    )
    if multi:
        result.multi(True).include_all(True).all_value(".+").current(
            dashboard.VariableOption(selected=True, text=["All"], value=["$__all"])
        )
    return result


def board(
    uid: str,
    title: str,
    about: str,
    variables: Sequence[Builder[dashboard.VariableModel]],
    content: Sequence[tuple[str, Sequence[Builder[dashboard.Panel]]]],
) -> dashboard.Dashboard:
    """A dashboard of rows of panels, (heading, panels), with links to the others."""
    others = builders.DashboardLink("meshagent").type(dashboard.DashboardLinkType.DASHBOARDS).tags([TAG]).as_dropdown(True)
    result = (
        builders.Dashboard(title)
        .uid(uid)
        .description(about)
        .tags([TAG])
        .readonly()
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .link(others.include_vars(True).keep_time(True))
        .with_variable(builders.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    for one in variables:
        result.with_variable(one)
    for heading, panels in content:
        result.with_row(builders.Row(heading))
        for panel in panels:
            result.with_panel(panel)
    built = result.build()
    _lay_out(built)
    return built


def _lay_out(built: dashboard.Dashboard) -> None:
    """Number the panels and put them into lines: the library lets what does not fit stand over the edge."""
    x = y = height = 0
    for number_of, one in enumerate(built.panels or (), 1):
        one.id_val = number_of
        at = one.grid_pos
        assert at is not None  # noqa: S101  for mypy: builders set it
        if x + at.w > WIDTH or isinstance(one, dashboard.RowPanel):
            x, y, height = 0, y + height, 0
        at.x, at.y = x, y
        x, height = x + at.w, max(height, at.h)


_TABLE = "table"


def _name(i: int) -> str:
    return chr(ord("A") + i)


def _thresholds(steps: Steps) -> builders.ThresholdsConfig:
    found = [dashboard.Threshold(value=value, color=colour) for value, colour in steps]
    return builders.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(found)
