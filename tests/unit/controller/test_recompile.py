"""What is compiled of a change alone is what is compiled of everything."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import pytest

from controller.compile import Compiled, compile_model
from controller.gateways import Known
from controller.kubernetes.shapes import followed
from controller.objects import Key, Object
from controller.recompile import Compiler
from controller.schema import read

KINDS = {kind.kind: kind for kind in followed()}
OURS = """
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {meshagent.io/mode: mesh, meshagent.io/default-policy: deny}}
---
apiVersion: v1
kind: Namespace
metadata: {name: bank}
---
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {name: vm, namespace: shop, labels: {app: a}}
spec: {node: n9, addresses: [10.0.9.1], networkNamespace: vm}
---
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {name: p3, namespace: shop}
spec: {node: n9, addresses: [10.0.9.2]}
---
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: by-label, namespace: shop}
spec: {selector: {matchLabels: {app: a, version: v2}}, rules: [{to: [{operation: {methods: [GET], ports: [8080]}}]}]}
---
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: of-few, namespace: shop}
spec: {selector: {matchLabels: {app: rare}}, rules: [{to: [{operation: {methods: [GET], ports: [8080]}}]}]}
---
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: by-service, namespace: shop}
spec: {targetRefs: [{kind: Service, name: first}, {kind: Service, name: a}], action: DENY, rules: [{from: [{source: {namespaces: [bank]}}]}]}
---
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: wide, namespace: bank}
spec: {rules: [{}]}
---
apiVersion: meshagent.io/v1alpha1
kind: RequestAuthentication
metadata: {name: tokens, namespace: shop}
spec: {selector: {matchLabels: {version: v1}}, jwtRules: [{issuer: i, jwksUri: "https://issuer.example/keys"}]}
---
apiVersion: meshagent.io/v1alpha1
kind: PeerAuthentication
metadata: {name: mesh, namespace: meshagent-system}
spec: {mtls: {mode: STRICT}}
---
apiVersion: meshagent.io/v1alpha1
kind: PeerAuthentication
metadata: {name: wide, namespace: shop, creationTimestamp: "2026-01-02T00:00:00Z"}
spec: {mtls: {mode: PERMISSIVE}}
---
apiVersion: meshagent.io/v1alpha1
kind: PeerAuthentication
metadata: {name: old, namespace: shop, creationTimestamp: "2026-01-01T00:00:00Z"}
spec: {selector: {matchLabels: {app: a}}, mtls: {mode: STRICT}, portLevelMtls: {"8080": {mode: DISABLE}}}
---
apiVersion: meshagent.io/v1alpha1
kind: PeerAuthentication
metadata: {name: young, namespace: shop, creationTimestamp: "2026-01-03T00:00:00Z"}
spec: {selector: {matchLabels: {version: v1}}, mtls: {mode: DISABLE}}
---
apiVersion: meshagent.io/v1alpha1
kind: ExternalService
metadata: {name: outside, namespace: shop}
spec:
  hosts: [api.example.com]
  ports: [{name: https, port: 443, protocol: TLS}]
  resolution: STATIC
  endpoints: [{address: 10.0.1.4}, {address: 198.51.100.7}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: edge, namespace: shop}
spec: {gatewayClassName: meshagent, listeners: [{name: web, port: 8443, protocol: HTTP}]}
"""
SLICE = {
    "metadata": {"name": "by-hand-1", "namespace": "shop", "uid": "s", "labels": {"kubernetes.io/service-name": "by-hand"}},
    "endpoints": [{"addresses": ["10.0.1.5"]}, {"addresses": ["192.0.2.9"]}],
    "ports": [{"name": "web", "port": 8080}],
}


def shaped(kind: str, value: Mapping[str, Any]) -> Object:
    seen = KINDS[kind].read(json.dumps(value).encode())
    assert seen is not None
    assert seen.object is not None
    return seen.object


def pod(draw: random.Random, number: int, *, plain: bool = False) -> Object:
    """With whatever a pod may have; a `plain` one concerns nobody else."""
    namespace = draw.choice(("shop", "shop", "bank"))
    labels = {"app": "rare" if draw.random() < 0.02 else draw.choice("abc"), "version": draw.choice(("v1", "v2"))}
    if draw.random() < 0.2:
        labels["meshagent.io/mode"] = draw.choice(("mesh", "none"))
    if not plain and draw.random() < 0.1:
        labels["gateway.networking.k8s.io/gateway-name"] = "edge"
    addresses = [f"10.0.{2 if plain else 1}.{number}", *([f"fd00::{number}"] if draw.random() < 0.3 else [])][: draw.choice((0, 1, 2, 2))]
    ports = [{"name": name, "containerPort": number, "protocol": protocol} for name, number, protocol in PORTS if draw.random() < 0.6]
    return shaped(
        "Pod",
        {
            "metadata": {"name": f"{'plain' if plain else 'p'}{number}", "namespace": namespace, "uid": f"{number:032x}", "labels": labels},
            "spec": {
                "nodeName": f"n{draw.randrange(3)}",
                "hostNetwork": not plain and draw.random() < 0.1,
                "containers": [{"ports": ports, "readinessProbe": {"httpGet": {"port": 8080}}}],
            },
            "status": {
                "podIPs": [{"ip": address} for address in addresses],
                "conditions": [{"type": "Ready", "status": draw.choice(("True", "False"))}],
            },
        },
    )


SERVICES = (
    ("shop", "a", "10.96.0.1", {"app": "a"}, [{"name": "http", "port": 80, "targetPort": "web"}]),
    (
        "shop",
        "first",
        "10.96.0.2",
        {"app": "a", "version": "v1"},
        [{"port": 80, "targetPort": 8080}, {"port": 81, "targetPort": "dns", "protocol": "UDP"}],
    ),
    ("bank", "b", "10.96.0.3", {"app": "b"}, [{"name": "http", "port": 80}]),
    ("shop", "rare", "10.96.0.5", {"app": "rare"}, [{"name": "http", "port": 80, "targetPort": "web"}]),
    ("shop", "by-hand", "10.96.0.4", None, [{"name": "web", "port": 80}]),
)
PORTS = (("web", 8080, "TCP"), ("web", 9090, "TCP"), ("dns", 53, "UDP"))


def told(model: Compiled) -> dict[str, Any]:
    """All of it, in a form that shows what differs."""
    return {
        "entities": {name: entity.SerializeToString(deterministic=True) for name, entity in model.entities.items()},
        "conditions": {key: said for key, said in model.conditions.items() if said},
        "status": model.status,
    }


def world() -> dict[Key, Object]:
    checked = read(OURS, "f")
    assert [problem for item in checked for problem in item.problems] == []
    found = {item.object.key: item.object for item in checked if item.object}
    made = [shaped("EndpointSlice", SLICE)]
    for namespace, name, address, selector, ports in SERVICES:
        spec = {"clusterIP": address, "selector": selector, "ports": ports}
        made.append(shaped("Service", {"metadata": {"name": name, "namespace": namespace, "uid": name}, "spec": spec}))
    return found | {item.key: item for item in made}


@pytest.mark.parametrize("seed", range(11))
@pytest.mark.parametrize("plain", [True, False], ids=["pods that concern nobody else", "pods of every sort"])
def test_a_model_that_is_compiled_of_changes_is_that_of_everything(seed: int, plain: bool) -> None:
    draw = random.Random(seed)  # noqa: S311 - has to be the same each time
    objects = world()
    crowd = {one.key: one for number in range(100, 180) if (one := pod(draw, number, plain=True))}
    objects |= crowd
    compiler = Compiler(authority=True, egress="allow")
    before = compiler.compile(objects, keys={}, known=Known())
    for _ in range(29):
        held = told(before)
        after = dict(objects)
        for _ in range(draw.choice((1, 1, 2, 5))):
            pods = [key for key in after if key.kind == "Pod"]
            if draw.random() < 0.3:
                del after[draw.choice(pods)]
            else:
                made = pod(draw, draw.randrange(1, 8) if not plain else draw.randrange(100, 190), plain=plain)
                after[made.key] = made
        found = compiler.compile(after, keys={}, known=Known())
        assert told(found) == told(compile_model(after, authority=True))
        assert told(before) == held, "what was returned before is not changed"
        objects, before = after, found
    assert compiler.partly >= (29 if plain else 5)


def test_any_other_change_compiles_everything() -> None:
    objects = world()
    draw = random.Random(1)  # noqa: S311 - has to be the same each time
    objects |= {one.key: one for number in range(100, 130) if (one := pod(draw, number, plain=True))}
    compiler = Compiler(authority=True, egress="allow")
    compiler.compile(objects, keys={}, known=Known())
    without = {key: item for key, item in objects.items() if key != Key("AuthorizationPolicy", "shop", "by-service")}
    found = compiler.compile(without, keys={}, known=Known())
    assert (told(found), compiler.partly) == (told(compile_model(without, authority=True)), 0)
    compiler.compile(without, keys={}, known=Known())
    compiler.compile(without, keys={}, known=Known({Key("Secret", "shop", "s"): "no"}))
    assert compiler.partly == 0
