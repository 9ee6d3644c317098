"""Names as long as Kubernetes lets them be, in a mesh of two nodes: who calls, certificates, policies of both layers, routes, metrics and traces.

63 characters for a label, 253 for a subdomain, 253 for a service account and 63 for the value of a label
(https://kubernetes.io/docs/concepts/overview/working-with-objects/names/).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import paths
from lab.lab import Lab
from lab.topology import Node, Pod, Topology
from tests.kernel import echo, shop

pytestmark = pytest.mark.kernel

ECHO = (sys.executable, str(Path(echo.__file__)))
NODES = (Node("node-1", 1), Node("vm-" + "n" * 60, 2))
PODS = tuple(
    Pod(name, NODES[number - 1].name, (f"10.77.{number}.{host}",), command=ECHO, env={"POD": name}, ports=(8080,), mesh=False)
    for name, number, host in (("caller", 1, 20), ("stranger", 1, 21), ("near", 1, 22), ("far", 2, 20))
)
SPACE, SERVICE, PORT, LABEL = "s" * 63, "v" * 63, "p" * 63, "l" * 63
KEY = f"{'k' * 63}.{'k' * 63}.{'k' * 63}.{'k' * 61}/{'k' * 63}"


def long(name: str) -> str:
    """A name of 253 characters, which none of the others begins like for 200."""
    return f"{'x' * 63}.{'x' * 63}.{'x' * 63}.{'x' * (60 - len(name))}{name}"


def own(kind: str, name: str, spec: dict[str, Any], api: str = "meshagent.io/v1alpha1", **labels: str) -> dict[str, Any]:
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name, "namespace": SPACE, "labels": labels}, "spec": spec}


def workload(pod: Pod) -> dict[str, Any]:
    spec = {
        "node": pod.node,
        "addresses": list(pod.addresses),
        "serviceAccount": long(f"{pod.name}-a"),
        "networkNamespace": paths.place_netns(pod),
    }
    labels = {KEY: LABEL} if pod.name in {"near", "far"} else {}
    return own("Workload", long(pod.name), spec, **labels)


def only_caller(**operation: Any) -> dict[str, Any]:
    rule: dict[str, Any] = {"from": [{"source": {"serviceAccounts": [f"{SPACE}/{long('caller-a')}"]}}]}
    rule |= {"to": [{"operation": operation}]} if operation else {}
    spec = {"selector": {"matchLabels": {KEY: LABEL}}, "action": "ALLOW", "rules": [rule]}
    return own("AuthorizationPolicy", long("policy"), spec)


def objects() -> list[dict[str, Any]]:
    ports = [{"name": PORT, "port": 80, "targetPort": 8080}]
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE}},
        *map(workload, PODS),
        own("Service", SERVICE, {"clusterIP": "10.96.0.9", "selector": {KEY: LABEL}, "ports": ports}, "v1"),
        own("PeerAuthentication", long("mode"), {"mtls": {"mode": "STRICT"}}),
        only_caller(),
    ]


def applied(lab: Lab, *several: dict[str, Any]) -> None:
    lab.apply("\n---\n".join(map(json.dumps, several)))


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(Topology(NODES, PODS, identity=True)) as found:
        applied(found, *objects())
        shop.takes(lambda: status(found, "caller") == {"200"} and status(found, "stranger") == {"curl 7"}, 60, pause=0.5)
        yield found


def status(lab: Lab, caller: str, host: str = "10.96.0.9:80", path: str = "/[1-8]", *options: str) -> set[str]:
    return set(shop.codes(lab, f"default/{caller}", f"http://{host}{path}", *options))


def test_an_account_is_told_from_one_that_differs_at_the_end_alone_on_both_nodes(lab: Lab) -> None:
    for address in ("10.77.1.22:8080", "10.77.2.20:8080"):
        assert status(lab, "caller", address) == {"200"}
        assert status(lab, "stranger", address) == {"curl 7"}


def test_certificates_carry_the_whole_name_and_tunnels_use_them(lab: Lab) -> None:
    identity = shop.status(NODES[0].name)["identity"]
    wanted = {f"spiffe://{identity['trustDomain']}/ns/{SPACE}/sa/{long(f'{name}-a')}" for name in ("caller", "stranger", "near")}
    held = {one["spiffeId"] for one in identity["workloads"] if one["serial"] and not one["problem"]}
    assert wanted <= held
    plan = lab.ask(NODES[0].name, "trace", f"{SPACE}/{long('caller')}", f"{SPACE}/{long('far')}:8080", "-o", "text", "--duration", "0")
    assert "mTLS between nodes (HBONE)" in plan.stdout, plan.stdout + plan.stderr


def test_requests_are_routed_and_decided_by_such_names(lab: Lab) -> None:
    spec = {
        "parentRefs": [{"group": "", "kind": "Service", "name": SERVICE}],
        "rules": [{"name": "r" * 253, "matches": [{"path": {"value": "/items"}}], "backendRefs": [{"name": SERVICE, "port": 80}]}],
    }
    applied(lab, own("HTTPRoute", long("route"), spec, "gateway.networking.k8s.io/v1"), only_caller(methods=["GET"], paths=["/items*"]))
    shop.takes(lambda: status(lab, "caller", path="/items/[1-8]") == {"200"}, 30, pause=0.5)
    assert status(lab, "caller", "10.96.0.9:80", "/items/[1-8]", "-X", "POST") == {"403"}
    assert status(lab, "caller", path="/other/[1-8]") <= {"403", "404"}
    assert "200" not in status(lab, "stranger", path="/items/[1-8]")


def test_metrics_traces_and_tables_show_such_names_whole(lab: Lab) -> None:
    node = NODES[0].name
    metrics = lab.metrics(node)
    assert all(name in metrics for name in (f"{SPACE}/{SERVICE}", long("caller"), long("near"))), metrics[-3000:]
    plan = lab.ask(node, "trace", f"{SPACE}/{long('caller')}", f"{SPACE}/{SERVICE}", "-o", "text", "--duration", "0")
    assert plan.returncode == 0, plan.stderr
    assert all(name in plan.stdout for name in (long("caller"), SERVICE)), plan.stdout
    for kind, name in (("workloads", long("caller")), ("services", SERVICE), ("authz", long("policy"))):
        assert name in lab.meshagent("get", kind, "--namespace", SPACE, "--controller", shop.CONTROLLER, check=True).stdout
