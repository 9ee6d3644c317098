"""Telemetry: what is refused, who decides for what, and what agents make of it."""

from __future__ import annotations

from typing import Any

import pytest

from agent.model import decode
from agent.observability import ALL, DEFAULT_SAMPLING, AccessLogs, Marks, Observability, Telemetry, Tracing
from controller.compile import Compiled, compile_model
from controller.objects import Key
from controller.schema import read
from meshapi import discovery_pb2 as pb

WORLD = """
apiVersion: v1
kind: Service
metadata: {name: cart}
spec: {clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: jaeger, namespace: observability}
spec: {clusterIP: 10.96.0.2, selector: {app: jaeger}, ports: [{name: grpc-otlp, port: 4317}, {name: http, port: 4318, appProtocol: http}]}
---
apiVersion: meshagent.io/v1alpha1
kind: ExternalService
metadata: {name: vendor}
spec: {hosts: [otlp.example.com], ports: [{port: 4317, name: grpc, protocol: GRPC}, {port: 4318, name: http, protocol: HTTP}], tls: {mode: SIMPLE}}
---
"""
GRANT = """
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: {name: telemetry, namespace: observability}
spec: {from: [{group: meshagent.io, kind: Telemetry, namespace: default}], to: [{group: "", kind: Service, name: jaeger}]}
---
"""


def telemetry(spec: str, name: str = "t", namespace: str = "default", created: str = "") -> str:
    stamp = f", creationTimestamp: '{created}'" if created else ""
    return f"apiVersion: meshagent.io/v1alpha1\nkind: Telemetry\nmetadata: {{name: {name}, namespace: {namespace}{stamp}}}\nspec: {spec}\n---\n"


def messages(spec: str) -> list[str]:
    return [f"{problem.field}: {problem.message}" for checked in read(telemetry(spec), "f.yaml") for problem in checked.problems]


def compiled(text: str) -> Compiled:
    checked = read(text, "f")
    assert [problem for item in checked for problem in item.problems] == []
    return compile_model({item.object.key: item.object for item in checked if item.object})


def telemetries(model: Compiled) -> dict[str, Telemetry]:
    found = (decode(entity.SerializeToString()) for name, entity in model.entities.items() if name.startswith("telemetry/"))
    return {one.name: one for one in found if isinstance(one, Telemetry)}


def observation(text: str) -> Observability:
    return Observability(telemetries(compiled(WORLD + text)))


def statuses(model: Compiled, name: str = "t", namespace: str = "default") -> dict[str, tuple[bool, str]]:
    return {item.type: (item.status, item.reason) for item in model.conditions[Key("Telemetry", namespace, name)]}


CART = "targetRefs: [{kind: Service, name: cart}]"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        pytest.param("{}", "spec: says nothing: give at least one of tracing, accessLogs, connectionLogs", id="nothing"),
        pytest.param("{tracing: {}}", "spec.tracing: must not be empty", id="empty"),
        pytest.param("{tracing: {sampling: 101}}", "spec.tracing.sampling: must be at most 100, not 101", id="too-many"),
        pytest.param("{tracing: {sampling: -0.5}}", "spec.tracing.sampling: must be at least 0, not -0.5", id="negative"),
        pytest.param("{tracing: {sampling: .nan}}", "spec.tracing.sampling: must be a number", id="no-number"),
        pytest.param("{accessLogs: {enabled: true, sampling: 0.00001}}", "spec.accessLogs.sampling: is less than one in a million", id="too-few"),
        pytest.param("{accessLogs: {sampling: 1}}", "spec.accessLogs.enabled: is required", id="on-or-off"),
        pytest.param("{accessLogs: {enabled: true, errorAlways: true}}", 'spec.accessLogs.errorAlways: unknown field; did you mean', id="unknown"),
        pytest.param("{" + CART + ", tracing: {collector: {name: jaeger}}}", "spec.tracing.collector: is for a namespace", id="collector-of-a-service"),
        pytest.param("{" + CART + ", tracing: {acceptFromOutside: true}}", "spec.tracing.acceptFromOutside: is for a namespace", id="outside-of-a-service"),
        pytest.param("{" + CART + ", connectionLogs: {enabled: true}}", "spec.connectionLogs: is for a namespace", id="connections-of-a-service"),
        pytest.param("{targetRefs: [{kind: Service, name: a}, {kind: Service, name: a}], tracing: {sampling: 1}}", "spec.targetRefs[1]: ", id="twice"),
        pytest.param("{tracing: {collector: {kind: ExternalService, name: a}}}", "spec.tracing.collector.group: must be meshagent.io", id="group"),
        pytest.param("{tracing: {collector: {group: meshagent.io, name: a}}}", 'spec.tracing.collector.group: must be "" for kind Service', id="no-group"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_and_the_field_is_named(spec: str, expected: str) -> None:
    (message,) = messages(spec)
    assert message.startswith(expected)


def test_what_is_right_is_taken() -> None:
    tracing = "{collector: {name: jaeger, namespace: observability, port: 4317}, sampling: 12.5}"
    spec = f"{{tracing: {tracing}, accessLogs: {{enabled: true}}, connectionLogs: {{enabled: true}}}}"
    found = telemetries(compiled(WORLD + GRANT + telemetry(spec)))["default/t"]
    assert found == Telemetry(
        "default/t", ("namespace/default",), Tracing(("observability/jaeger", 4317), 125_000), AccessLogs(True, ALL, True), True
    )


def test_the_most_specific_one_that_says_a_part_decides_about_it() -> None:
    collector = "collector: {group: meshagent.io, kind: ExternalService, name: vendor}"
    mesh = telemetry(
        "{tracing: {sampling: 2, acceptFromOutside: true}, accessLogs: {enabled: true, sampling: 10}, connectionLogs: {enabled: true}}",
        "mesh",
        "meshagent-system",
    )
    namespace = telemetry("{tracing: {" + collector + "}, accessLogs: {enabled: false}}", "ns")
    service = telemetry("{" + CART + ", tracing: {sampling: 100}}", "cart")
    found = observation(mesh + namespace + service)
    assert found.marks("default/cart", 80) == Marks("default/cart:80", ALL)
    assert found.marks("default/other", 80) == Marks("default/other:80", 20_000)
    assert found.marks("shop/web", 80) == Marks("shop/web:80", 20_000, 100_000, errors=True)
    assert found.collector("default") == ("default/vendor", 4317)
    assert found.collector("shop") is None
    assert found.accepts_from_outside("default") is True, "as the mesh says"
    assert found.logs_connections("default") is found.logs_connections("shop") is True
    assert found.received("default", ["default/cart", "default/other"]).traced == ALL


def test_who_says_where_but_not_how_many_gets_one_in_a_hundred() -> None:
    found = observation(telemetry("{tracing: {collector: {group: meshagent.io, kind: ExternalService, name: vendor}}}"))
    assert found.marks("default/cart", 80).traced == DEFAULT_SAMPLING
    assert not found.marks("shop/web", 80)


def test_without_any_telemetry_nothing_is_told() -> None:
    found = observation("")
    assert not found.marks("default/cart", 80)
    assert found.collector("default") is None
    assert not found.logs_requests
    assert not found.logs_connections("default")


@pytest.mark.parametrize(
    ("collector", "more", "reason"),
    [
        pytest.param("{name: jaeger, namespace: observability}", "", "RefNotPermitted", id="no-grant"),
        pytest.param("{name: jaeger, namespace: observability}", GRANT.replace("Telemetry", "HTTPRoute"), "RefNotPermitted", id="grant-for-others"),
        pytest.param("{name: jaeger, namespace: observability}", GRANT.replace("meshagent.io", "example.com"), "RefNotPermitted", id="another-group"),
        pytest.param("{name: jaeger, namespace: observability}", GRANT, "", id="grant"),
        pytest.param("{name: jaeger, namespace: observability, port: 4318}", GRANT, "UnsupportedProtocol", id="http"),
        pytest.param("{name: jaeger, namespace: observability, port: 9}", GRANT, "BackendNotFound", id="no-port"),
        pytest.param("{name: gone}", "", "BackendNotFound", id="no-service"),
        pytest.param("{group: meshagent.io, kind: ExternalService, name: vendor}", "", "", id="external"),
        pytest.param("{group: meshagent.io, kind: ExternalService, name: vendor, port: 4318}", "", "UnsupportedProtocol", id="external-http"),
    ],
)  # fmt: skip
def test_a_collector_that_cannot_be_used_is_left_out_and_the_rest_holds(collector: str, more: str, reason: str) -> None:
    model = compiled(WORLD + more + telemetry("{tracing: {sampling: 1, collector: " + collector + "}}"))
    tracing = telemetries(model)["default/t"].tracing
    assert tracing is not None
    assert tracing.sampling == 10_000
    assert (tracing.collector is None) is bool(reason)
    assert statuses(model).get("ResolvedRefs", (False, "")) == (False, reason)


def test_of_two_for_one_service_or_namespace_the_older_decides() -> None:
    old, young = "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"
    model = compiled(
        WORLD
        + telemetry("{" + CART + ", tracing: {sampling: 1}}", "b", created=young)
        + telemetry("{targetRefs: [{kind: Service, name: cart}, {kind: Service, name: gone}], tracing: {sampling: 2}}", "c", created=old)
        + telemetry("{tracing: {sampling: 3}}", "d", created=old)
        + telemetry("{tracing: {sampling: 4}}", "e", created=young)
    )
    assert {name: one.scopes for name, one in telemetries(model).items()} == {
        "default/c": ("service/default/cart",),
        "default/d": ("namespace/default",),
    }
    assert statuses(model, "b") == {"Accepted": (False, "Conflicted")}
    assert statuses(model, "c") == {"Accepted": (True, "Accepted"), "TargetsResolved": (False, "TargetNotFound")}
    assert statuses(model, "e") == {"Accepted": (False, "Conflicted")}


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(pb.Telemetry(name="t", tracing=pb.Tracing(sampling=ALL + 1)), id="traces"),
        pytest.param(pb.Telemetry(name="t", access_logs=pb.AccessLogs(sampling=ALL + 1)), id="lines"),
        pytest.param(pb.Telemetry(name="t", tracing=pb.Tracing(collector="a/b")), id="no-port"),
    ],
)
def test_an_agent_refuses_what_makes_no_sense(message: Any) -> None:
    with pytest.raises(ValueError, match="telemetry"):
        decode(pb.Entity(telemetry=message).SerializeToString())
