"""Every panel of every dashboard has data: a real Prometheus scrapes the lab's agents and its controller while the shop is used and abused.

`make pictures` runs this for longer, with MESH_PICTURES naming the folder that the pictures are to go to.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from deploy.grafana import picture
from lab import mesh, netns, paths
from lab.lab import Lab
from lab.topology import CONTROLLER_ADDRESSES
from tests import monitoring
from tests.kernel import shop

TRAFFIC_S = float(os.environ.get("MESH_PICTURES_S", "20"))
pytestmark = [pytest.mark.kernel, pytest.mark.timeout(180 + TRAFFIC_S)]

PORT = 9090
VARIABLES = {"__rate_interval": "30s", "namespace": ".+", "node": ".+", "service": "default/cart", "workload": "frontend"}
PLACE = "node-1"
DESERTED = """
apiVersion: v1
kind: Service
metadata: {name: deserted}
spec:
  clusterIP: 10.96.0.90
  selector: {app: deserted}
  ports: [{port: 80}]
"""


class Prometheus:
    """A running server, asked over its HTTP API (https://prometheus.io/docs/prometheus/latest/querying/api/)."""

    def __init__(self, lab: Lab) -> None:
        self._where = paths.place_netns(lab.topology.place(PLACE))

    def get(self, path: str, **parameters: str) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=10)
        netns.inside(self._where, connection.connect)
        try:
            connection.request("GET", f"/api/v1/{path}?{urlencode(parameters)}")
            document = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        assert document["status"] == "success", f"{parameters}: {document}"
        return document["data"]

    def values(self, expr: str) -> list[float]:
        """What an expression is now, by series; NaN is nothing."""
        found = (float(one["value"][1]) for one in self.get("query", query=expr)["result"])
        return [value for value in found if not math.isnan(value)]


@contextmanager
def prometheus(lab: Lab, directory: Path) -> Iterator[Prometheus]:
    """Debian's, in the namespace of a node, with the rules that are shipped."""
    program = shutil.which("prometheus")
    assert program, "Prometheus is missing: scripts/setup dev installs Debian's"
    agents = [{"targets": [f"{node.gateways[0]}:{mesh.METRICS_PORT}"], "labels": {"instance": node.name}} for node in lab.topology.nodes]
    controller = {"targets": [f"{CONTROLLER_ADDRESSES[0]}:{mesh.CONTROLLER_METRICS_PORT}"], "labels": {"instance": "controller"}}
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(monitoring.RULES)],
        "scrape_configs": [
            {"job_name": "meshagent", "static_configs": agents},
            {"job_name": "mesh-controller", "static_configs": [controller]},
        ],
    }
    (directory / "prometheus.yaml").write_text(json.dumps(config))
    argv = [program, f"--config.file={directory}/prometheus.yaml", f"--storage.tsdb.path={directory}/data"]
    log = (directory / "prometheus.log").open("w")
    argv = lab.command(PLACE, [*argv, f"--web.listen-address=127.0.0.1:{PORT}", "--log.level=warn"])
    with log, subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as process:
        try:
            server = Prometheus(lab)
            shop.takes(lambda: _answers(server), 20)
            yield server
        finally:
            process.terminate()


def _answers(server: Prometheus) -> bool:
    try:
        return len(server.values("up == 1")) == 3
    except (OSError, ValueError):  # it says "Service Unavailable" while it starts
        return False


def _use(lab: Lab, enough: threading.Event) -> None:
    """Requests and connections of every kind: allowed, denied, failing, tried again, through tunnels, to nobody."""
    while not enough.is_set():
        shop.codes(lab, "frontend", "http://cart/items?[1-20]")
        shop.codes(lab, "frontend", "http://cart/flaky?[1-5]")
        shop.codes(lab, "frontend", "http://cart/admin/counters")
        shop.codes(lab, "other", "http://cart/items")
        shop.codes(lab, "other", "http://frontend/")
        shop.ping(lab, "frontend")
        shop.ping(lab, "other")
        shop.ping(lab, "client", "10.77.1.40")
        shop.codes(lab, "frontend", "http://10.96.0.90/")


@pytest.fixture(scope="module")
def server(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has seen traffic for a while, and sees it still."""
    lab.apply(DESERTED)
    with prometheus(lab, tmp_path_factory.mktemp("prometheus")) as running:
        enough = threading.Event()
        user = threading.Thread(target=_use, args=(lab, enough), daemon=True)
        user.start()
        time.sleep(TRAFFIC_S)
        try:
            yield running
        finally:
            enough.set()
            user.join(30)
            shop.delete(lab, DESERTED)


def test_every_panel_has_data(server: Prometheus) -> None:
    empty = [panel for panel in monitoring.panels(VARIABLES) if not server.values(panel.expr)]
    assert not empty, "\n".join(f"{one.dashboard}: {one.title}: {one.expr}" for one in empty)


def test_every_variable_has_values(server: Prometheus) -> None:
    for board, name, query in monitoring.variables(VARIABLES):
        match = re.fullmatch(r"label_values\((.+), ([a-z_]+)\)", query)
        assert match, query
        values = server.get(f"label/{match[2]}/values", **{"match[]": match[1]})
        assert values, f"{board}: {name}"
        expected = VARIABLES[name]
        assert expected == ".+" or expected in values


@pytest.mark.parametrize("name", monitoring.dashboards())
def test_each_dashboard_can_be_drawn(server: Prometheus, name: str, tmp_path: Path) -> None:
    now = time.time()

    def ask(expr: str, instant: bool) -> list[picture.Series]:
        if instant:
            found = server.get("query", query=expr)["result"]
            return [picture.Series(one["metric"], [(now, float(one["value"][1]))]) for one in found]
        found = server.get("query_range", query=expr, start=str(now - TRAFFIC_S), end=str(now), step="1")["result"]
        return [picture.Series(one["metric"], [(float(at), float(value)) for at, value in one["values"]]) for one in found]

    file = Path(os.environ.get("MESH_PICTURES", tmp_path)) / f"{name}.png"
    picture.draw(monitoring.dashboards()[name], ask, file, filled=lambda text: monitoring.filled(text, VARIABLES))
    assert file.read_bytes().startswith(b"\x89PNG")


def test_requests_are_counted_by_workload_route_and_code(server: Prometheus) -> None:
    ends = 'source_workload="frontend",destination_service="default/cart",direction="outbound"'
    by_workload = server.get(
        "query", query=f'sum by (destination_workload,security_policy) (mesh_requests_total{{{ends},response_code="200"}})'
    )["result"]
    found = {one["metric"]["destination_workload"]: one["metric"]["security_policy"] for one in by_workload}
    assert found == {"cart-v1-1": "none", "cart-v1-2": "mutual_tls", "cart-v2-1": "mutual_tls"}
    assert server.values(f'mesh_requests_total{{{ends},route="default/cart-split rule 0",response_code="403"}} > 0')
    assert server.values('mesh_request_retries_total{destination_service=~"default/cart-v.*"} > 0')
    denied = 'mesh_requests_total{source_workload="other",destination_service="default/cart",response_code="403"} > 0'
    assert server.values(denied)


def test_rules_are_evaluated_and_nothing_is_wrong_with_the_mesh(server: Prometheus) -> None:
    rules = [rule for group in server.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    firing = {rule["name"] for rule in rules if rule.get("state") == "firing"}
    assert not firing & {
        "MeshAgentDown",
        "MeshNodeNotReady",
        "MeshHookNotEffective",
        "MeshRedirectDrift",
        "MeshWaypointDown",
        "MeshMetricsIncomplete",
    }
    expr = 'destination_service:mesh_requests:rate5m{destination_service="default/cart"} > 0'
    shop.takes(lambda: server.values(expr), 60)  # Prometheus evaluates a group first at a moment of its interval that its name decides
