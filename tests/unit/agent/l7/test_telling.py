"""What is told of requests: spans and lines, by a real Envoy to a real collector and a real file; and what a change of it leaves alone."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from envoy.config.route.v3 import route_pb2
from google.protobuf import json_format

from agent.l7 import envoy, gateways, names, request_log, telling
from agent.l7.resources import Resources
from agent.l7.snapshot import Builder, tracing
from agent.logfiles import LogFile
from agent.model import Backend, Gateway, GatewayListener, Retry, RouteMatch, Snapshot
from agent.observability import ALL, AccessLogs, Marks, Telemetry, Tracing
from tests import otlp
from tests.ports import free_ports
from tests.unit.agent.l7 import harness

CALLER = harness.workload("caller", "10.0.0.1", account="front")
EVERY = Tracing(("default/jaeger", 4317), ALL)
CONTEXT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"
SPANS_S = 12
"""Envoy hands spans on after 5 s."""


def said(*telemetry: Telemetry) -> dict[str, Telemetry]:
    return {one.name: one for one in telemetry}


def mesh(tracing: Tracing | None = None, access: AccessLogs | None = None) -> Telemetry:
    return Telemetry("meshagent-system/mesh", ("mesh",), tracing, access)


def on_server(tracing: Tracing | None = None, access: AccessLogs | None = None) -> Telemetry:
    return Telemetry("default/server", ("service/default/server",), tracing, access)


class Asked:
    """A caller's listener in a running Envoy in front of a server, and what is told of its requests."""

    def __init__(self, port: int, spans: list[dict[str, Any]], log: Path) -> None:
        self.port, self.spans, self.log = port, spans, log

    def get(self, path: str, **headers: str) -> harness.Answer:
        """One request of the caller."""
        return harness.request(self.port, path, headers=headers)

    def lines(self) -> list[dict[str, Any]]:
        """The log."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def wait(self, count: int, what: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """Exactly so many, when they have come."""
        end = time.monotonic() + SPANS_S
        while len(what()) < count and time.monotonic() < end:
            time.sleep(0.05)
        assert len(what()) == count, what()
        return what()


def model(entry: int, target: int, collector: int, *telemetry: Telemetry) -> Snapshot:
    workloads = [
        CALLER,
        harness.workload("server-1", "127.0.0.1", backing={"default/server": {entry: target}}),
        harness.workload("jaeger-1", "127.0.0.1", backing={"default/jaeger": {4317: collector}}),
    ]
    services = [harness.service("server", "127.0.0.1", entry), harness.service("jaeger", "10.96.0.9", 4317, waypoint=False)]
    again = harness.rule(Backend("default/server", entry, 1), matches=(RouteMatch(method="GET"),), retry=Retry(2, (503,), 10))
    route = harness.route("again", again, parent="server")
    return replace(harness.snapshot(workloads, services, [route]), telemetry=said(*telemetry))


def through(directory: Path, work: Callable[[Asked], None], *telemetry: Telemetry) -> None:
    [entry] = free_ports(1)
    log, failures = directory / "requests.log", iter(range(1000))
    spans: list[dict[str, Any]] = []

    def status(request: BaseHTTPRequestHandler) -> int:
        """/again fails every second time; /500 always."""
        if request.path.startswith("/again"):
            return 503 if next(failures) % 2 == 0 else 200
        return 500 if request.path.startswith("/500") else 200

    async def scenario(target: int, collector: int) -> None:
        snapshot = model(entry, target, collector, *telemetry)
        local = [harness.local(CALLER)]
        resources = Builder("node-1", harness.TRUST_DOMAIN, str(log)).build(snapshot, local, "")
        runtime = tracing(frozenset(), logs=request_log.runtime(snapshot, local))
        async with harness.waypoint(harness.config(directory)) as (xds, _):
            await harness.applied(xds, {**harness.on_loopback(resources, entry), **runtime})
            await asyncio.to_thread(work, Asked(entry, spans, log))
            assert xds.state.nacks == 0

    with harness.http_server("server", "127.0.0.1", behaviour=status) as server, otlp.collector("127.0.0.1:0", spans.append) as port:
        asyncio.run(scenario(server.server_address[1], port))


def test_a_request_has_a_span_with_one_below_it_for_each_attempt_and_a_line_that_names_the_trace(tmp_path: Path) -> None:
    def work(asked: Asked) -> None:
        answer = asked.get("/again?token=s3cret", authorization="Bearer s3cret")
        spans = asked.wait(3, lambda: asked.spans)
        by_id = {one["span"]: one for one in spans}
        (root,) = (one for one in spans if not one["parent"])
        attempts = [one for one in spans if one["parent"]]
        assert {one["parent"] for one in attempts} == {root["span"]}
        assert sorted(one["attributes"]["http.status_code"] for one in attempts) == ["200", "503"]
        trace, parent = answer.seen["headers"]["traceparent"].split("-")[1:3]
        assert by_id[parent]["attributes"]["http.status_code"] == "200", "the application is the child of the attempt that it answers"
        assert {one["trace"] for one in spans} == {trace}
        assert root["service"] == "default/front"
        assert root["name"] == "GET default/again rule 0"
        expected = {
            "mesh.direction": "outbound",
            "mesh.source.workload": "default/caller",
            "mesh.destination.workload": "default/server-1",
            "mesh.destination.service": f"default/server:{asked.port}",
            "mesh.route": "default/again rule 0",
            "mesh.redirect.dialled": f"127.0.0.1:{asked.port}",
            "mesh.attempts": "2",
            "mesh.reason": "via_upstream",
            "http.url": "/again",
            "http.status_code": "200",
        }
        assert {key: root["attributes"].get(key) for key in expected} == expected
        (line,) = asked.wait(1, asked.lines)
        assert line["traceId"] == trace
        assert {key: line[key] for key in ("kind", "direction", "source", "destination", "service", "path", "status", "attempts")} == {
            "kind": "request",
            "direction": "outbound",
            "source": "default/caller",
            "destination": "default/server-1",
            "service": f"default/server:{asked.port}",
            "path": "/again",
            "status": 200,
            "attempts": 2,
        }
        assert "s3cret" not in json.dumps(spans) + asked.log.read_text()

    through(tmp_path, work, mesh(EVERY, AccessLogs(True)))


def test_who_decided_already_is_obeyed_and_who_brings_a_request_id_keeps_it(tmp_path: Path) -> None:
    def work(asked: Asked) -> None:
        sampled = asked.get(
            "/", traceparent=f"{CONTEXT}-01", tracestate="vendor=1", **{"x-request-id": "8cda17a5-eb41-4ced-9843-acc826f95c8c"}
        )
        assert sampled.seen["headers"]["x-request-id"] == "8cda17a5-eb41-4ced-9843-acc826f95c8c"
        assert sampled.seen["headers"]["tracestate"] == "vendor=1"
        refused = asked.get("/", traceparent=f"{CONTEXT}-00")
        assert refused.seen["headers"]["traceparent"].endswith("-00")
        asked.get("/")  # nobody has decided: sampling 0
        spans = asked.wait(2, lambda: asked.spans)
        assert {one["trace"] for one in spans} == {CONTEXT.split("-")[1]}
        assert CONTEXT.split("-")[2] in {one["parent"] for one in spans}
        time.sleep(6)
        assert len(asked.spans) == 2, "no others came"

    through(tmp_path, work, mesh(EVERY), on_server(Tracing(sampling=0)))


def test_what_fails_is_logged_always_and_of_the_rest_a_share(tmp_path: Path) -> None:
    count = 400

    def work(asked: Asked) -> None:
        for number in range(count):
            asked.get("/fine" if number % 4 else "/500")
        end = time.monotonic() + 5
        while sum(line["status"] == 500 for line in asked.lines()) < count // 4 and time.monotonic() < end:
            time.sleep(0.05)
        lines = asked.lines()
        assert sum(line["status"] == 500 for line in lines) == count // 4
        fine = sum(line["status"] == 200 for line in lines)
        assert 25 <= fine <= 105, "300 with a share of 0.2: 60, ± 5 standard deviations"

    through(tmp_path, work, on_server(access=AccessLogs(True, ALL // 5)))


@pytest.mark.parametrize(
    "telemetry",
    [
        pytest.param((), id="nothing"),
        pytest.param((mesh(access=AccessLogs(True)), on_server(access=AccessLogs(False))), id="off-for-the-service"),
        pytest.param((on_server(access=AccessLogs(True, 0, errors=False)),), id="none-at-all"),
    ],
)
def test_nothing_is_written_that_nobody_wants(tmp_path: Path, telemetry: tuple[Telemetry, ...]) -> None:
    def work(asked: Asked) -> None:
        headers = [asked.get(path).seen["headers"] for path in ("/", "/500")]
        assert all("traceparent" not in one for one in headers), "no tracer, no header"
        time.sleep(1.5)  # Envoy writes after a second
        assert asked.lines() == []

    through(tmp_path, work, *telemetry)


def test_a_log_that_was_moved_away_goes_on_in_a_new_file(tmp_path: Path) -> None:
    def work(asked: Asked) -> None:
        asked.get("/before")
        asked.wait(1, asked.lines)
        assert LogFile(asked.log, most_bytes=1).rotate()
        envoy.reopen_logs(tmp_path / "envoy-admin.sock")
        asked.get("/after")
        (line,) = asked.wait(1, asked.lines)
        assert line["path"] == "/after"
        assert json.loads((tmp_path / "requests.log.1").read_text())["path"] == "/before"

    through(tmp_path, work, mesh(access=AccessLogs(True)))


def test_who_calls_what_no_route_knows_is_logged_as_its_namespace_says(tmp_path: Path) -> None:
    def work(asked: Asked) -> None:
        assert harness.request(asked.port, "/?q=1", "DELETE").status == 404
        (line,) = asked.wait(1, asked.lines)
        told = {key: line.get(key) for key in ("source", "method", "path", "status", "flags", "route")}
        assert told == {"source": "default/caller", "method": "DELETE", "path": "/", "status": 404, "flags": "NR", "route": None}

    through(tmp_path, work, Telemetry("default/all", ("namespace/default",), None, AccessLogs(True, 0)))
    keys = request_log.runtime(model(80, 80, 1, mesh(access=AccessLogs(True))), [harness.local(CALLER)])
    assert keys == {"meshagent.requests": 100, "meshagent.requests.default.caller": 100}
    keys = request_log.runtime(model(80, 80, 1, on_server(access=AccessLogs(True))), [harness.local(CALLER)])
    assert keys == {"meshagent.requests": 100}


def built(*telemetry: Telemetry) -> Resources:
    return Builder("node-1", harness.TRUST_DOMAIN, "/tmp/requests.log").build(model(80, 80, 4317, *telemetry), [harness.local(CALLER)], "")  # noqa: S108


def test_logs_and_sampling_change_no_listener_and_a_tracer_only_those_of_its_namespace() -> None:
    plain = built()
    logged = built(on_server(access=AccessLogs(True, 7)), mesh(access=AccessLogs(True)))
    assert logged[names.LISTENER] == plain[names.LISTENER]
    assert logged[names.ROUTES] != plain[names.ROUTES]
    traced, more = built(mesh(EVERY)), built(mesh(EVERY), on_server(Tracing(sampling=7), AccessLogs(True)))
    assert more[names.LISTENER] == traced[names.LISTENER] != plain[names.LISTENER]
    elsewhere = built(Telemetry("other/all", ("namespace/other",), EVERY))
    assert elsewhere[names.LISTENER] == plain[names.LISTENER]


def test_a_builder_that_goes_on_gives_what_a_new_one_gives() -> None:
    builder = Builder("node-1", harness.TRUST_DOMAIN, "/x")
    steps: list[tuple[Telemetry, ...]] = [
        (),
        (mesh(EVERY),),
        (mesh(EVERY), on_server(access=AccessLogs(True))),
        (on_server(access=AccessLogs(True)),),
        (),
    ]
    for telemetry in steps:
        snapshot = model(80, 80, 4317, *telemetry)
        found = builder.build(snapshot, [harness.local(CALLER)], "")
        fresh = Builder("node-1", harness.TRUST_DOMAIN, "/x").build(snapshot, [harness.local(CALLER)], "")
        assert {kind: dict(some) for kind, some in found.items()} == {kind: dict(some) for kind, some in fresh.items()}


def test_a_collector_that_is_not_there_leaves_listeners_without_a_tracer() -> None:
    gone = built(mesh(Tracing(("default/gone", 4317), ALL)))
    assert gone[names.LISTENER] == built()[names.LISTENER]


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        pytest.param(Marks("s", ALL, ALL), [(0, "yes", "all")], id="all"),
        pytest.param(Marks("s", 5, 7, errors=True), [(5, "yes", "all"), (7, "", "all"), (0, "", "errors")], id="two-shares"),
        pytest.param(Marks("s", 7, 7), [(7, "yes", "all"), (0, "", "")], id="one-share"),
        pytest.param(Marks("s", 7, 0, errors=True), [(7, "yes", "errors"), (0, "", "errors")], id="errors"),
        pytest.param(Marks(), [(0, "", "")], id="none"),
    ],
)
def test_a_route_is_there_once_for_each_share(marks: Marks, expected: list[tuple[int, str, str]]) -> None:
    def make() -> route_pb2.RouteConfiguration:
        result = route_pb2.RouteConfiguration(name="r")
        result.virtual_hosts.add(name="h").routes.add(name="one").match.prefix = "/"
        return result

    found = []
    for route in telling.routes(marks, make).virtual_hosts[0].routes:
        told = json_format.MessageToDict(route.metadata).get("filterMetadata", {}).get(telling.MARKS, {})
        values = [told.get(key, "") for key in (telling.TRACE, telling.LOG)]
        found.append((route.match.runtime_fraction.default_value.numerator, *values))
    assert found == expected


@pytest.mark.parametrize("believed", [False, True])
def test_envoy_takes_a_gateway_that_traces_and_strangers_are_believed_only_if_told(tmp_path: Path, believed: bool) -> None:
    edge = replace(harness.workload("edge", "10.0.0.1"), labels={gateways.LABEL: "web"})
    gateway = Gateway("default/web", (GatewayListener("http", 8080, "", ()),))
    snapshot = replace(
        model(80, 80, 4317, mesh(replace(EVERY, accept_from_outside=believed), AccessLogs(True, 5))), gateways={gateway.name: gateway}
    )
    builder = Builder("node-1", harness.TRUST_DOMAIN, str(tmp_path / "requests.log"))
    resources = builder.build(replace(snapshot, workloads={**snapshot.workloads, edge.name: edge}), [harness.local(edge)], "")
    harness.validate(resources, tmp_path)
    manager = harness.manager(harness.decoded(resources, names.LISTENER, "gateway/default/edge/8080"))
    removed = b"traceparent" in b"".join(one.typed_config.value for one in manager.early_header_mutation_extensions)
    assert removed is not believed
