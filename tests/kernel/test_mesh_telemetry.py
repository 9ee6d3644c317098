"""Spans and logs in the mesh: a real collector in a pod hears of calls between nodes, and each node's files say what they should and no more."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab import paths, resources
from lab.lab import Lab
from lab.topology import Pod
from tests.kernel import shop

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).parents[2]
SPANS = Path("/tmp/meshagent-test-spans.jsonl")  # noqa: S108  made and removed by this module, as root
COLLECTOR = Pod("jaeger", "node-2", ("10.77.2.90", "fd77:0:0:2::90"), command=(sys.executable, "-m", "tests.otlp", "4317", str(SPANS)),
                env={"PYTHONPATH": str(ROOT)}, ports=(4317,), labels={"app": "jaeger"}, service_account="jaeger")  # fmt: skip
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: jaeger}
spec: {clusterIP: 10.96.0.90, selector: {app: jaeger}, ports: [{name: grpc-otlp, port: 4317}]}
"""
QUIET = """
---
apiVersion: meshagent.io/v1alpha1
kind: Telemetry
metadata: {name: cart}
spec: {targetRefs: [{kind: Service, name: cart}], accessLogs: {enabled: false}}
"""
CALL = "http://cart/flaky?token=s3cret"
CONTEXT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module", autouse=True)
def jaeger(lab: Lab) -> Iterator[None]:
    """A collector on the other node."""
    SPANS.unlink(missing_ok=True)
    lab.add_pod(COLLECTOR)
    with shop.applied(lab, "\n---\n".join([SERVICE, str(resources.workload(COLLECTOR))])):
        yield
    SPANS.unlink(missing_ok=True)


@contextmanager
def telemetry(lab: Lab, spec: str, more: str = "") -> Iterator[None]:
    """A Telemetry for the namespace, in force at Envoy too."""
    document = f"apiVersion: meshagent.io/v1alpha1\nkind: Telemetry\nmetadata: {{name: all}}\nspec: {spec}"
    with shop.applied(lab, document + more):
        time.sleep(
            0.5
        )  # requests may take it by what it had before: nothing says from outside when Envoy has used what it has acknowledged
        yield
    assert [shop.status(node.name)["waypoint"]["nacks"] for node in lab.topology.nodes] == [0, 0]


def spans() -> list[dict[str, Any]]:
    """What the collector has heard."""
    return [json.loads(line) for line in SPANS.read_text().splitlines()] if SPANS.exists() else []


def lines(node: str, file: str) -> list[dict[str, Any]]:
    """A log of a node."""
    path = paths.agent_state(node) / "logs" / file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class New:
    """What has come to a log, or to the collector, since this was made."""

    def __init__(self, read: Callable[[], list[dict[str, Any]]]) -> None:
        self._read, self._before = read, len(read())

    def __call__(self) -> list[dict[str, Any]]:
        return self._read()[self._before :]


def test_a_call_between_nodes_with_a_retry_is_one_trace(lab: Lab) -> None:
    heard, logged = New(spans), New(lambda: lines("node-1", "requests.log"))
    with telemetry(lab, "{tracing: {collector: {name: jaeger}, sampling: 100}, accessLogs: {enabled: true}}"):
        shop.takes(lambda: shop.codes(lab, "frontend", f"{CALL}&[1-9]", "-H", "Authorization: Bearer s3cret") == {"200": 9})
        shop.takes(lambda: any(retried(one) for one in roots(heard())) and any(tunnelled(one) for one in heard()), 15)
        shop.takes(lambda: len(logged()) >= 9)
    every = heard()
    (root, *_) = [one for one in roots(every) if retried(one)]
    attempts = [one for one in every if one["parent"] == root["span"]]
    assert {one["trace"] for one in attempts} == {root["trace"]}
    assert sorted(one["attributes"]["http.status_code"] for one in attempts) == ["200", "503"]
    assert root["service"] == "default/frontend"
    told = root["attributes"]
    assert told["mesh.source.workload"] == "default/frontend"
    assert told["mesh.destination.service"] == "default/cart:80"
    assert told["mesh.route"].startswith("default/cart")
    assert told["mesh.redirect.dialled"].endswith(":80")
    assert told["http.url"] == "/flaky"
    assert {one["attributes"]["mesh.tunnel"] for one in every if tunnelled(one)} <= {"10.77.2.22:8080", "10.77.2.23:8080"}
    inbound = [one for one in every if one["attributes"]["mesh.direction"] == "inbound"]
    tunnelled_ids = {one["span"] for one in every if tunnelled(one)}
    assert inbound
    assert {one["parent"] for one in inbound if "attempt" not in one["name"]} <= tunnelled_ids, (
        "children of what the caller's waypoint sent"
    )
    identities = {one["attributes"].get("mesh.source.identity") for one in inbound}
    assert identities == {"spiffe://mesh.local/ns/default/sa/frontend"}
    lines_ = [one for one in logged() if one["path"] == "/flaky"]
    assert {one["destination"] for one in lines_} <= {"default/cart-v1-1", "default/cart-v1-2", "default/cart-v2-1"}
    assert {one["service"] for one in lines_} == {"default/cart:80"}
    assert root["trace"] in {one["traceId"] for one in lines_}
    assert "s3cret" not in json.dumps(every) + json.dumps(lines_)


def roots(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in found if not one["parent"]]


def retried(span: dict[str, Any]) -> bool:
    return int(span["attributes"]["mesh.attempts"]) > 1


def tunnelled(span: dict[str, Any]) -> bool:
    return "mesh.tunnel" in span["attributes"]


def test_the_application_decides_and_where_it_has_not_sampling_0_gives_none(lab: Lab) -> None:
    every = New(spans)
    with telemetry(lab, "{tracing: {collector: {name: jaeger}, sampling: 0}}"):

        def heard() -> list[dict[str, Any]]:
            return [one for one in every() if one["attributes"]["http.url"] == "/items"]  # and not late ones of other tests

        assert shop.codes(lab, "frontend", "http://cart/items?[1-23]") == {"200": 23}
        assert shop.codes(lab, "frontend", "http://cart/items", "-H", f"traceparent: {CONTEXT}") == {"200": 1}
        shop.takes(lambda: len(heard()) >= 2, 15)
        time.sleep(6)  # the others would have come by now: Envoy hands spans on every 5 s
    assert {one["trace"] for one in heard()} == {CONTEXT.split("-")[1]}
    assert CONTEXT.split("-")[2] in {one["parent"] for one in heard()}


def test_lines_of_requests_are_switched_per_service_and_what_is_denied_is_told_always(lab: Lab) -> None:
    logged = New(lambda: lines("node-1", "requests.log"))
    with telemetry(lab, "{accessLogs: {enabled: true}}", QUIET):
        assert shop.codes(lab, "frontend", "http://cart/items?[1-7]") == {"200": 7}
        time.sleep(1.5)
    assert logged() == []
    with telemetry(lab, "{accessLogs: {enabled: true, sampling: 0}}"):
        assert shop.codes(lab, "frontend", "http://cart/items?[1-7]") == {"200": 7}
        assert shop.codes(lab, "frontend", "http://cart/admin/counters?token=s3cret") == {"403": 1}
        shop.takes(logged, 5)
        (line,) = logged()
    told = {key: line[key] for key in ("kind", "direction", "source", "service", "method", "path", "status")}
    assert told == {
        "kind": "request",
        "direction": "outbound",
        "source": "default/frontend",
        "service": "default/cart:80",
        "method": "GET",
        "path": "/admin/counters",
        "status": 403,
    }
    assert "default/cart-no-admin" in line["reason"]
    assert "s3cret" not in json.dumps(line)
    before = New(lambda: lines("node-1", "requests.log"))
    shop.codes(lab, "frontend", "http://cart/admin/counters")
    time.sleep(1.5)
    assert before() == [], "off again"


def test_ends_and_denials_of_connections_are_told_at_both_ends_in_the_words_of_requests(lab: Lab) -> None:
    logged = New(lambda: lines("node-1", "connections.log"))
    with telemetry(lab, "{connectionLogs: {enabled: true}, accessLogs: {enabled: true}}"):
        requests = New(lambda: lines("node-1", "requests.log"))
        assert shop.ping(lab, "frontend") == "PONG"
        assert shop.ping(lab, "other") != "PONG"
        assert shop.codes(lab, "frontend", "http://cart/items") == {"200": 1}
        shop.takes(lambda: len(ends(logged())) >= 4 and requests(), 5)
        found = ends(logged())
        (request, *_) = requests()
    caller, receiver = (found["default/frontend", direction, "default/redis:6379"] for direction in ("outbound", "inbound"))
    assert caller["destination"] == receiver["destination"] == "default/redis"
    assert caller["dialled"] == "10.96.0.20:6379"
    assert caller["sourceAddress"] == receiver["sourceAddress"]
    assert (caller["outcome"], caller["reason"]) == ("closed", "normal")
    assert caller["sentBytes"] == receiver["receivedBytes"] > 0
    denied = found["default/other", "outbound", "default/redis:6379"]
    assert (denied["outcome"], denied["reason"], denied["rule"]) == ("denied", "policy", "default/redis-clients: no rule matches")
    assert found["default/frontend", "outbound", "default/cart:80"]["via"] == "waypoint"
    common = {"time", "kind", "direction", "source", "sourceAddress", "dialled", "service", "destination", "destinationAddress", "protocol"}
    common |= {"reason", "durationMs", "sentBytes", "receivedBytes"}
    assert common <= caller.keys() & request.keys()
    before = New(lambda: lines("node-1", "connections.log"))
    assert shop.ping(lab, "frontend") == "PONG"
    time.sleep(1.5)
    assert before() == [], "off again"


def ends(found: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(one.get("source", ""), one["direction"], one.get("service", "")): one for one in found}


def test_files_are_for_nobody_else(lab: Lab) -> None:
    directory = paths.agent_state(lab.topology.nodes[0].name) / "logs"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in directory.iterdir()} == {0o640}
