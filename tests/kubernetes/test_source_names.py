"""Names as long as the API server lets them be: from there through the controller into certificates, the agent's model and what Envoy accepts.

https://kubernetes.io/docs/concepts/overview/working-with-objects/names/: 63 characters for Namespaces and Services, 253 for all else here. The same with
real connections: tests/kernel/test_mesh_long_names.py.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from agent.l7 import names as l7
from agent.l7.snapshot import build
from agent.model import Snapshot, decode
from controller.mesh import Mesh
from tests.kubernetes.controlplane import ControlPlane, Failed
from tests.kubernetes.following import conditions, following, found, writing
from tests.kubernetes.manifest import OWN
from tests.kubernetes.replicas import replicas
from tests.kubernetes.samples import namespace, pod, policy, running
from tests.tasks import until
from tests.unit.agent.l7 import harness

pytestmark = pytest.mark.anyio
SPACE, SERVICE, PORT, LABEL, NODE = "s" * 63, "v" * 63, "p" * 63, "L" * 63, f"{'n.' * 126}n"
KEY = f"{'k' * 63}.{'k' * 63}.{'k' * 63}.{'k' * 61}/{'k' * 63}"


def long(name: str) -> str:
    """A name of 253 characters, which none of the others begins like for 200."""
    return f"{'x' * 63}.{'x' * 63}.{'x' * 63}.{'x' * (61 - len(name))}{name}"


def large_pod(name: str, **labels: str) -> dict[str, Any]:
    item = pod(SPACE, long(name), NODE)
    item["spec"]["serviceAccountName"] = long(f"{name}-a")
    item["spec"]["containers"][0]["ports"][0]["name"] = "p" * 15
    item["metadata"]["labels"] = labels
    return item


def route() -> dict[str, Any]:
    parents, backends = [{"kind": "Service", "group": "", "name": SERVICE}], [{"name": SERVICE, "port": 80}]
    rules = [{"name": "r" * 253, "backendRefs": backends, "matches": [{"path": {"value": "/items"}}]}]
    meta = {"name": long("route"), "namespace": SPACE}
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": meta,
        "spec": {"parentRefs": parents, "rules": rules},
    }


def objects() -> list[dict[str, Any]]:
    odd = f"{'a' * 63}.{'a' * 63}/{'h' * 63}"
    ports = [
        {"name": PORT, "port": 80, "targetPort": "p" * 15, "appProtocol": "http"},
        {"name": "q" * 63, "port": 81, "targetPort": "p" * 15, "appProtocol": odd},
    ]
    service = {"selector": {KEY: LABEL}, "ports": ports}
    only = policy(SPACE, long("only"))
    source = {"serviceAccounts": [f"{SPACE}/{long('caller-a')}"], "principals": [f"mesh.local/ns/{SPACE}/sa/{long('caller-a')}"]}
    operation = {"methods": ["GET"], "paths": [f"/{'i' * 510}*"]}
    only["spec"] = {
        "selector": {"matchLabels": {KEY: LABEL}},
        "action": "ALLOW",
        "rules": [{"from": [{"source": source}], "to": [{"operation": operation}]}],
    }
    return [
        namespace(SPACE),
        large_pod("caller"),
        large_pod("server", **{KEY: LABEL}),
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": SERVICE, "namespace": SPACE}, "spec": service},
        only,
        route(),
    ]


@pytest.fixture(scope="module", autouse=True)
def shop(plane: ControlPlane) -> None:
    """All of it is there, and the pods run."""
    plane.install_gateway_api()
    plane.apply(namespace(OWN, "none"), *objects())
    running(plane, SPACE, long("caller"), "10.1.0.5")
    running(plane, SPACE, long("server"), "10.1.0.6")


def snapshot(mesh: Mesh) -> Snapshot:
    """The model, as an agent reads it."""
    tables: dict[str, dict[str, Any]] = {}
    for name, entity in mesh.compiled.entities.items():
        kind, _, rest = name.partition("/")
        tables.setdefault(kind, {})[rest] = decode(entity.SerializeToString())
    return Snapshot("1", tables["workload"], tables["service"], tables["route"], tables["policy"])


async def test_they_are_in_force_whole_and_the_real_envoy_accepts_what_is_built_of_them(plane: ControlPlane, tmp_path: Path) -> None:
    async with following(plane) as mesh:
        await until(lambda: (one := found(mesh, f"{SPACE}/{long('server')}")) and one.ready and one.backing)
        server = found(mesh, f"{SPACE}/{long('server')}")
        assert server is not None
        assert (server.service_account, server.node, dict(server.labels)) == (long("server-a"), NODE, {KEY: LABEL})
        assert [one.service for one in server.backing] == [f"{SPACE}/{SERVICE}"]
        assert mesh.state.problems == ()
        model = snapshot(mesh)
    local = [
        harness.local(model.workloads[f"{SPACE}/{long(name)}"], path)
        for name, path in (("caller", harness.OWN_NETNS), ("server", harness.OWN_NETNS_TOO))
    ]
    resources = build(model, local, trust_domain="mesh.local")
    assert l7.listener(l7.OUTBOUND, f"{SPACE}/{long('caller')}") in resources[l7.LISTENER]
    assert l7.service(f"{SPACE}/{SERVICE}", 80) in resources[l7.CLUSTER]
    await asyncio.to_thread(harness.validate, resources, tmp_path)


async def test_statuses_and_events_are_written_of_objects_with_such_names(plane: ControlPlane) -> None:
    bad = policy(SPACE, long("bad"))
    bad["metadata"]["annotations"] = {"meshagent.io/dry-run": "perhaps"}
    await asyncio.to_thread(plane.apply, bad)
    async with writing(plane) as one:
        await until(lambda: conditions(plane, "authorizationpolicy", SPACE, long("bad")).get("Accepted") == ("False", "Invalid"))
        await until(lambda: long("bad") in plane.kubectl("get", "events.events.k8s.io", "-n", SPACE, "-o", "json"))
        assert conditions(plane, "authorizationpolicy", SPACE, long("only"))["Accepted"] == ("True", "Accepted")
        assert one.part._writer.failed == 0


async def test_certificates_carry_them_whole(plane: ControlPlane, tmp_path: Path) -> None:
    with replicas(plane, tmp_path) as two:
        two.a.start()
        await asyncio.to_thread(two.a.wait, 60)
        node = await two.join(NODE, two.a)
        for name in ("caller", "server"):
            answer = await node.sign(two.a, f"{SPACE}/{long(name)}")
            assert answer.chain, answer.error
            leaf = x509.load_der_x509_certificate(answer.chain[0])
            names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            uris = names.get_values_for_type(x509.UniformResourceIdentifier)
            assert uris == [f"spiffe://mesh.local/ns/{SPACE}/sa/{long(f'{name}-a')}"]


@pytest.mark.parametrize(
    ("item", "field"),
    [
        pytest.param(namespace("s" * 64), "metadata.name", id="namespace"),
        pytest.param(pod(SPACE, "x" * 254), "metadata.name", id="pod"),
        pytest.param(pod(SPACE, "y", "n" * 254), "spec.nodeName", id="node"),
        pytest.param(policy(SPACE, "x" * 254), "metadata.name", id="policy"),
    ],
)
def test_one_character_more_is_refused_by_the_api_server(plane: ControlPlane, item: dict[str, Any], field: str) -> None:
    with pytest.raises(Failed, match=field):
        plane.apply(item)
