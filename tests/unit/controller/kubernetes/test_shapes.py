"""What is read of each kind, and what of an object that is not as it should be."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.kubernetes.shapes import Seen, followed
from controller.objects import Key

KINDS = {kind.kind: kind for kind in followed()}
UID = "0fe7fc41-8d9c-4d6c-8c9f-d9f0a5b8e0a1"


def read(kind: str, item: dict[str, Any]) -> Seen:
    seen = KINDS[kind].read(json.dumps(item).encode())
    assert seen is not None
    return seen


def spec(kind: str, item: dict[str, Any]) -> Any:
    found = read(kind, item).object
    return None if found is None else found.spec


def pod(status: dict[str, Any] | None = None, meta: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "cart-1", "namespace": "shop", "uid": UID, "resourceVersion": "7", **(meta or {})},
        "spec": {"nodeName": "node-1", "serviceAccountName": "cart", **changes},
        "status": {"phase": "Running", "podIPs": [{"ip": "10.1.0.5"}, {"ip": "fd00:0::5"}], **(status or {})},
    }


READY = {"conditions": [{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": "True"}]}


def test_a_pod_is_a_workload_with_its_addresses_account_and_uid() -> None:
    assert spec("Pod", pod(READY)) == {
        "node": "node-1",
        "addresses": ["10.1.0.5", "fd00::5"],
        "serviceAccount": "cart",
        "ready": True,
        "podUid": UID,
    }
    assert read("Pod", pod()).key == Key("Pod", "shop", "cart-1")


@pytest.mark.parametrize(
    ("status", "meta", "ready"),
    [
        (READY, {}, True),
        ({}, {}, False),
        ({"conditions": [{"type": "Ready", "status": "False"}]}, {}, False),
        (READY, {"deletionTimestamp": "2026-01-01T00:00:00Z"}, False),
    ],
)
def test_only_a_pod_that_is_ready_and_does_not_terminate_gets_new_connections(status: Any, meta: Any, ready: bool) -> None:
    assert spec("Pod", pod(status, meta))["ready"] is ready


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_pod_that_has_ended_is_nobody_whatever_address_it_still_shows(phase: str) -> None:
    assert spec("Pod", pod({"phase": phase})) is None


def test_a_pod_without_a_node_is_nobody_and_one_without_an_address_yet_is_somebody() -> None:
    assert spec("Pod", pod(nodeName="")) is None
    assert spec("Pod", pod({"podIPs": None}))["addresses"] == []


def test_ports_of_containers_have_names() -> None:
    ports = [{"name": "http", "containerPort": 8080}, {"containerPort": 9}, {"name": "dns", "containerPort": 53, "protocol": "UDP"}]
    containers = [
        {"ports": ports},
        {"ports": None},
        {"ports": [{"name": "http", "containerPort": 9090}, {"name": "dns", "containerPort": 5353}]},
    ]
    before = [
        {"restartPolicy": "Always", "ports": [{"name": "admin", "containerPort": 15000}, {"name": "http", "containerPort": 1}]},
        {"ports": [{"name": "over", "containerPort": 2}]},
    ]
    found = spec("Pod", pod(containers=containers, initContainers=before))
    assert found["ports"] == {"http/TCP": 8080, "dns/UDP": 53, "dns/TCP": 5353, "admin/TCP": 15000}


def test_the_ports_that_the_kubelet_calls_are_those_of_probes_and_lifecycle_handlers() -> None:
    named = [{"name": "web", "containerPort": 8080}, {"name": "web", "containerPort": 1}, {"containerPort": 7}]
    containers = [
        {
            "ports": named,
            "livenessProbe": {"httpGet": {"path": "/live", "port": "web"}, "periodSeconds": 5},
            "readinessProbe": {"grpc": {"port": 9090}},
            "startupProbe": {"tcpSocket": {"port": "7070"}},
            "lifecycle": {"preStop": {"httpGet": {"port": 6060}}, "postStart": {"exec": {"command": ["true"]}}},
        },
        {"livenessProbe": {"exec": {"command": ["true"]}}, "readinessProbe": {"tcpSocket": {"port": "web"}}},  # that of another container
        {
            "livenessProbe": {"httpGet": {"port": 5050, "host": "192.0.2.1"}},
            "readinessProbe": {"httpGet": {"port": 65536}},
            "startupProbe": {},
        },
        {"readinessProbe": {"tcpSocket": {"port": 8080}}, "startupProbe": None, "lifecycle": None},
    ]
    before = [
        {"restartPolicy": "Always", "startupProbe": {"httpGet": {"port": 4040}}},
        {"startupProbe": {"httpGet": {"port": 3030}}},  # the API server refuses it: such a container runs to its end
    ]
    assert spec("Pod", pod(containers=containers, initContainers=before))["probePorts"] == [4040, 6060, 7070, 8080, 9090]
    assert "probePorts" not in spec("Pod", pod(containers=[{"ports": named}]))


@pytest.mark.parametrize(
    ("item", "field"),
    [
        (pod(serviceAccountName="a/../b"), "spec.serviceAccountName"),
        (pod(serviceAccountName="x" * 254), "spec.serviceAccountName"),
        (pod(meta={"uid": "../../proc/1"}), "metadata.uid"),
        (pod(nodeName="Node 1"), "spec.nodeName"),
    ],
)
def test_what_would_become_part_of_an_identity_or_a_path_is_checked(item: dict[str, Any], field: str) -> None:
    seen = read("Pod", item)
    assert seen.object is None
    assert [problem.field for problem in seen.problems] == [field]


def service(**changes: Any) -> dict[str, Any]:
    ports = [{"name": "http", "port": 80, "targetPort": "web", "protocol": "TCP", "nodePort": 30080}]
    return {"metadata": {"name": "cart", "namespace": "shop"}, "spec": {"clusterIP": "10.96.0.7", "ports": ports, **changes}}


def test_of_a_load_balancer_what_it_is_within_the_cluster_is_read() -> None:
    found = spec("Service", service(type="LoadBalancer", selector={"app": "cart"}, externalTrafficPolicy="Local", loadBalancerIP="1.2.3.4"))
    ports = [{"port": 80, "name": "http", "protocol": "TCP", "targetPort": "web"}]
    assert found == {"clusterIPs": ["10.96.0.7"], "ports": ports, "selector": {"app": "cart"}}


@pytest.mark.parametrize("changes", [{"type": "ExternalName", "externalName": "x.example"}, {"clusterIP": ""}, {"ports": None}])
def test_a_service_without_a_virtual_address_or_ports_says_nothing_to_a_mesh(changes: dict[str, Any]) -> None:
    assert spec("Service", service(**changes)) is None


def test_a_headless_service_has_no_address() -> None:
    assert spec("Service", service(clusterIP="None", clusterIPs=["None"]))["clusterIPs"] == ["None"]


def test_an_endpoint_slice_says_where_its_service_leads() -> None:
    item = {
        "metadata": {"name": "db-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "db"}},
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 5432}, {"port": None}],
        "endpoints": [
            {"addresses": ["192.0.2.7"], "conditions": {"ready": None}},
            {"addresses": ["192.0.2.8"], "conditions": {"ready": False}},
            {"addresses": ["nonsense"]},
        ],
    }
    assert spec("EndpointSlice", item) == {
        "service": "db",
        "ports": [{"name": "", "port": 5432, "protocol": "TCP"}],
        "endpoints": [
            {"addresses": ["192.0.2.7"], "ready": True, "zone": "", "pod": ""},
            {"addresses": ["192.0.2.8"], "ready": False, "zone": "", "pod": ""},
        ],
    }


def test_our_own_kinds_are_held_against_their_schemas() -> None:
    item = {
        "apiVersion": "meshagent.io/v1alpha1",
        "kind": "AuthorizationPolicy",
        "metadata": {
            "name": "p",
            "namespace": "shop",
            "uid": UID,
            "generation": 3,
            "resourceVersion": "9",
            "managedFields": [{}],
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}"},
        },
        "spec": {"action": "DENY", "rules": [{"from": [{"source": {"namespaces": ["x"]}}]}]},
        "status": {"conditions": []},
    }
    seen = read("AuthorizationPolicy", item)
    assert seen.object is not None
    assert seen.object.data["metadata"] == {"name": "p", "namespace": "shop"}
    assert (seen.generation, seen.version, seen.uid) == (3, "9", UID)
    item["spec"] = {"action": "DENI"}
    seen = read("AuthorizationPolicy", item)
    assert seen.object is None
    assert (
        str(seen.problems[0])
        == 'api-server AuthorizationPolicy/p spec.action: must be "ALLOW" or "DENY" or "AUDIT", not "DENI"; did you mean "DENY"?'
    )


def test_versions_are_compared_as_numbers_and_other_words_are_news() -> None:
    seen = {version: Seen(Key("Pod", "n", "p"), UID, version) for version in ("9", "10", "x", "y")}
    assert seen["10"].after(seen["9"])
    assert not seen["9"].after(seen["10"])
    assert not seen["9"].after(seen["9"])
    assert seen["x"].after(seen["y"])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["10.0.0.1", "a", "TCP", "None", "True"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["nodeName", "containers", "hostNetwork", "clusterIP", "clusterIPs", "ports", "selector", "type", "rules", "action", "targetRefs"]


@pytest.mark.parametrize("kind", sorted(KINDS))
@given(
    spec_=st.dictionaries(st.sampled_from(FIELDS), json_values),
    status=st.dictionaries(st.sampled_from(["phase", "podIPs", "conditions"]), json_values),
    meta=st.dictionaries(st.sampled_from(["labels", "annotations", "uid", "name", "namespace", "generation"]), json_values),
    more=st.dictionaries(st.sampled_from(["endpoints", "ports", "kind", "apiVersion"]), json_values),
)
def test_whatever_an_object_holds_it_is_read_or_refused(
    kind: str, spec_: dict[str, Any], status: dict[str, Any], meta: dict[str, Any], more: dict[str, Any]
) -> None:
    item = {"metadata": {"name": "a", "namespace": "b", **meta}, "spec": spec_, "status": status, **more}
    try:
        seen = KINDS[kind].read(json.dumps(item).encode())
    except msgspec.MsgspecError:
        return
    assert seen is None or seen.object is None or seen.object.key == seen.key


@given(st.binary(max_size=200))
def test_bytes_that_are_no_object_are_refused(raw: bytes) -> None:
    for kind in KINDS.values():
        try:
            assert kind.read(raw) is None
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
