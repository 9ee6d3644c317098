"""`meshagent graph` and the controller's page while the shop works: real calls, their rates, a denied one, mTLS between nodes."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from xml.etree import ElementTree as ET

import pytest

from agent.graph import FRESH_S
from lab import paths
from lab.lab import Lab
from tests.kernel import shop

pytestmark = pytest.mark.kernel

RATE = 20.0
"""Calls per second of each load."""
WINDOW_S = 6
Edges = dict[tuple[str, str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def traffic(lab: Lab) -> Iterator[None]:
    """What runs while the tests look: L7 to both nodes, L4, L4 that is denied, and strangers."""
    places = (
        ("frontend", "http://cart/items"),
        ("frontend", "redis://redis:6379"),
        ("other", "redis://redis:6379"),
        ("client", "redis://10.77.1.40:6379"),
    )
    with shop.loads(lab, *places):
        yield


def edges(document: dict[str, Any]) -> Edges:
    """By source, destination and protocol, without the namespace."""
    return {tuple(edge[end].removeprefix("default/") for end in ("source", "destination", "protocol")): edge for edge in document["edges"]}


def graph(lab: Lab, *options: str) -> tuple[subprocess.CompletedProcess[str], Edges]:
    run = lab.meshagent("graph", "--window", str(WINDOW_S), "-o", "json", *options)
    return run, edges(json.loads(run.stdout))


def page(path: str) -> tuple[int, bytes]:
    """GET of the controller's page."""
    connection = http.client.HTTPConnection("localhost", timeout=30)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(30)
    connection.sock.connect(str(paths.PAGE_SOCKET))
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body


@pytest.mark.parametrize("through", ["", shop.CONTROLLER], ids=["agents", "controller"])
@pytest.mark.usefixtures("traffic")
def test_the_graph_has_every_call_with_its_rate(lab: Lab, through: str) -> None:
    run, found = graph(lab, *(("--controller", through) if through else ()))
    assert (run.returncode, run.stderr) == (0, "")
    document = json.loads(run.stdout)
    assert document["nodes"] == ["node-1", "node-2"]
    assert document["seconds"] >= WINDOW_S
    assert found.keys() == {
        ("frontend", "cart", "http"), ("frontend", "redis", "tcp"), ("other", "redis", "tcp"), ("", "redis", "tcp"),
    }  # fmt: skip
    cart, redis = found["frontend", "cart", "http"], found["frontend", "redis", "tcp"]
    for edge, port in ((cart, 80), (redis, 6379)):
        assert (edge["kind"], edge["port"], edge["errors"], edge["denied"]) == ("service", port, 0, 0)
        assert RATE * 0.6 < edge["rate"] < RATE * 1.4
        assert edge["bytes"] > RATE
        assert 0 < edge["p50"] <= edge["p99"] < 1
    assert sum(backend["rate"] for backend in cart["backends"]) == pytest.approx(cart["rate"])


@pytest.mark.usefixtures("traffic")
def test_between_nodes_it_is_mtls_and_within_one_it_is_not(lab: Lab) -> None:
    _, found = graph(lab)
    cart = found["frontend", "cart", "http"]
    assert {backend["workload"]: backend["mtls"] for backend in cart["backends"]} == {
        "default/cart-v1-1": False, "default/cart-v1-2": True, "default/cart-v2-1": True,
    }  # fmt: skip
    assert (cart["mtls"], found["frontend", "redis", "tcp"]["mtls"]) == ("some", "none")


@pytest.mark.usefixtures("traffic")
def test_a_denied_call_has_its_rate_and_its_rule(lab: Lab) -> None:
    _, found = graph(lab)
    for caller in ("other", ""):
        edge = found[caller, "redis", "tcp"]
        assert edge["rate"] == 0
        assert RATE * 0.5 < edge["denied"] < RATE * 2.5
        assert edge["rules"] == ["default/redis-clients: no rule matches"]


def test_a_request_that_the_waypoint_denies_is_denied_and_no_error(lab: Lab) -> None:
    with shop.loads(lab, ("frontend", "http://cart/admin/counters")):
        # The window slides: that of the first answers begins before the load.
        shop.takes(lambda: RATE * 0.6 < graph(lab)[1]["frontend", "cart", "http"]["denied"] < RATE * 1.4, 30)
        assert graph(lab)[1]["frontend", "cart", "http"]["errors"] == 0


@pytest.mark.usefixtures("traffic")
def test_the_drawings_have_the_same_calls(lab: Lab) -> None:
    svg, dot, table = (lab.meshagent("graph", "--window", "1", "-o", form, check=True).stdout for form in ("svg", "dot", "table"))
    titles = {title.text for title in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}title")}  # noqa: S314 - of our own making
    assert {
        "workload default/frontend",
        "service default/cart",
        "service default/redis",
        "workload default/other",
        "outside the mesh",
    } <= titles
    assert '"workload default/other" -> "service default/redis"' in dot
    assert "denied  default/other -> default/redis: default/redis-clients: no rule matches" in table


@pytest.mark.usefixtures("traffic")
def test_the_page_shows_the_same_calls_and_plans_them() -> None:
    def calls() -> dict[tuple[str, str], dict[str, Any]]:
        status, body = page("/graph.json")
        assert status == 200
        document = json.loads(body)
        assert (document["problems"], document["doubted"], document["nodes"]) == ([], 0, ["node-1", "node-2"])
        return {(call["source"], call["destination"]): {**arrow, **call} for arrow in document["arrows"] for call in arrow["calls"]}

    shop.takes(lambda: {("default/frontend", "default/cart"), ("default/other", "default/redis")} <= calls().keys(), 20)
    found = calls()
    assert found["default/other", "default/redis"]["state"] == "denied"
    assert found["default/frontend", "default/redis"]["state"] == "good"
    shop.takes(lambda: RATE * 0.6 < calls()["default/frontend", "default/cart"]["rate"] < RATE * 1.4, 30)
    for (source, destination), verdict in ((("default/other", "default/redis"), "DENY"), (("default/frontend", "default/cart"), "ALLOW")):
        status, body = page(f"/plan.json?{urlencode({'source': source, 'destination': found[source, destination]['plan']})}")
        plan = json.loads(body)
        assert (status, plan["kind"], plan["verdict"], plan["source"]) == (200, "plan", verdict, source)
    assert page("/")[1].startswith(b"<!DOCTYPE html>")


@pytest.mark.usefixtures("traffic")
def test_while_envoy_is_silent_connections_are_shown_and_it_is_said(lab: Lab) -> None:
    pid = shop.status("node-1")["waypoint"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(2 * FRESH_S)  # a reading of a moment ago would do, and the page may have asked for one
        run, found = graph(lab)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert ("other", "redis", "tcp") in found
    assert RATE * 0.5 < found["frontend", "redis", "tcp"]["rate"] < RATE * 1.5
    assert "node-1: the waypoint does not say what it has counted" in run.stderr


def test_a_graph_without_an_agent_is_a_negative_answer_in_one_line(lab: Lab, tmp_path: Path) -> None:
    run = lab.meshagent("graph", "--run-dir", str(tmp_path))
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (1, "", 1)
