"""CustomResourceDefinitions that go, come back, lose fields and get other versions while a controller runs: nothing goes out of force that nobody took out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshapi import discovery_pb2 as pb
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.definitions import CRD, FILE, install, older, soon
from tests.kubernetes.following import action, following, told
from tests.kubernetes.manifest import ACCOUNT, OWN, grant, objects
from tests.kubernetes.samples import namespace, policy
from tests.tasks import until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("quick")]


@pytest.fixture(autouse=True)
def own(plane: ControlPlane) -> Iterator[None]:
    """The controller's rights, as the manifest gives them; afterwards the definition as it is here, with nothing of its kind."""
    plane.apply(namespace(OWN, "none"), namespace("defined"))
    grant(plane)
    yield
    plane.kubectl("delete", "crd", CRD, "--ignore-not-found", "--wait")
    install(plane)


async def test_policies_stay_in_force_when_their_definition_is_deleted_until_they_are_made_again_and_deleted(plane: ControlPlane) -> None:
    await soon(plane.apply, *(policy("defined", name) for name in ("one", "two", "three")))
    async with following(plane, ACCOUNT) as mesh:
        await until(lambda: action(mesh, "three"))
        await soon(plane.kubectl, "delete", "authorizationpolicy", "three", "-n", "defined")
        await until(lambda: action(mesh, "three") is None)
        await mesh.reload()  # the publication is behind the model
        version = mesh.publication.current.version
        await asyncio.to_thread(plane.kubectl, "delete", "crd", CRD, "--wait")
        await until(lambda: "is its CustomResourceDefinition, and this version of it, served?" in told(mesh))
        assert (
            "AuthorizationPolicy/defined/one: is not there any more, because the CustomResourceDefinition of its kind was deleted"
            in told(mesh)
        )
        assert "AuthorizationPolicy/defined/two: is not there any more" in told(mesh)
        await asyncio.to_thread(install, plane)
        await until(lambda: "served?" not in told(mesh))
        assert (action(mesh, "one"), action(mesh, "two"), action(mesh, "three")) == (pb.Policy.DENY, pb.Policy.DENY, None)
        assert mesh.publication.current.version == version, "something was taken out of force meanwhile"
        again = policy("defined", "one")
        again["spec"]["action"] = "AUDIT"
        await soon(plane.apply, again)
        await until(lambda: action(mesh, "one") == pb.Policy.AUDIT)
        assert "defined/one" not in told(mesh)
        await soon(plane.kubectl, "delete", "authorizationpolicy", "one", "-n", "defined")
        await until(lambda: action(mesh, "one") is None)
        assert action(mesh, "two") == pb.Policy.DENY
        await soon(plane.apply, policy("defined", "two"))
        await until(lambda: "/defined/" not in told(mesh))  # what other tests have left behind are orphans now


async def test_what_its_definition_took_along_goes_with_its_namespace(plane: ControlPlane) -> None:
    await soon(plane.apply, namespace("passing"), policy("passing", "p"))
    async with following(plane, ACCOUNT) as mesh:
        await until(lambda: "policy/passing/p" in mesh.compiled.entities)
        await asyncio.to_thread(plane.kubectl, "delete", "crd", CRD, "--wait")
        await until(lambda: "AuthorizationPolicy/passing/p" in told(mesh))
        assert "policy/passing/p" in mesh.compiled.entities
        # No controller-manager takes the finalizer away here.
        finalize = json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "passing"}, "spec": {"finalizers": []}})
        await asyncio.to_thread(plane.kubectl, "delete", "namespace", "passing", "--wait=false")
        await asyncio.to_thread(plane.kubectl, "replace", "--raw", "/api/v1/namespaces/passing/finalize", "-f", "-", stdin=finalize)
        await until(lambda: "policy/passing/p" not in mesh.compiled.entities)
        assert "passing/p" not in told(mesh)


async def test_a_route_stays_when_gateway_apis_definition_is_deleted(plane: ControlPlane) -> None:
    plane.install_gateway_api()
    parents = [{"kind": "Service", "group": "", "name": "cart"}]
    meta = {"name": "r", "namespace": "defined"}
    route = {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": meta, "spec": {"parentRefs": parents}}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "cart", "namespace": "defined"},
        "spec": {"ports": [{"port": 80}]},
    }
    await soon(plane.apply, service, route)
    async with following(plane, ACCOUNT) as mesh:
        await until(lambda: "route/defined/r" in mesh.compiled.entities)
        await asyncio.to_thread(plane.kubectl, "delete", "crd", "httproutes.gateway.networking.k8s.io", "--wait")
        await until(lambda: "HTTPRoute/defined/r: is not there any more" in told(mesh))
        await asyncio.to_thread(plane.install_gateway_api)
        await until(lambda: "served?" not in told(mesh))
        assert "route/defined/r" in mesh.compiled.entities
        await soon(plane.apply, route)
        await until(lambda: "/defined/" not in told(mesh))  # what other tests have left behind are orphans now
    plane.kubectl("delete", "httproute", "r", "-n", "defined")


async def test_a_definition_that_loses_a_field_does_not_make_a_policy_allow_more(plane: ControlPlane, tmp_path: Path) -> None:
    one = policy("defined", "p")
    one["spec"] = {"action": "ALLOW", "rules": [{"when": [{"key": "source.namespace", "values": ["defined"]}]}]}
    await soon(plane.apply, one)
    async with following(plane, ACCOUNT) as mesh:
        await until(lambda: action(mesh, "p") is not None)
        before = mesh.compiled.entities["policy/defined/p"].SerializeToString()
        await asyncio.to_thread(older, plane, tmp_path / "older.json")
        await asyncio.to_thread(plane.kubectl, "label", "authorizationpolicy", "p", "-n", "defined", "touched=yes")
        served = json.loads(await asyncio.to_thread(plane.kubectl, "get", "authorizationpolicy", "p", "-n", "defined", "-o", "json"))
        assert served["spec"]["rules"] == [{}], "the API server has not lost it, and there is nothing to test"
        await until(lambda: "gives it without spec.rules[0].when, which nobody has removed" in told(mesh))
        assert mesh.compiled.entities["policy/defined/p"].SerializeToString() == before
        await asyncio.to_thread(install, plane)
        one["spec"]["rules"][0]["when"][0]["values"] = ["defined", "other"]
        await soon(plane.apply, one)
        await until(lambda: mesh.state.problems == () and mesh.compiled.entities["policy/defined/p"].SerializeToString() != before)
    plane.kubectl("delete", "authorizationpolicy", "p", "-n", "defined")


async def test_another_version_beside_ours_changes_nothing_and_one_without_ours_takes_nothing_out_of_force(
    plane: ControlPlane, tmp_path: Path
) -> None:
    await soon(plane.apply, policy("defined", "p"))
    definition = json.loads(plane.kubectl("create", "--dry-run=client", "-o", "json", "-f", str(FILE)))
    (ours,) = definition["spec"]["versions"]
    newer = {**ours, "name": "v1beta1"}

    def apply(item: dict[str, Any]) -> None:
        options = ("--server-side", "--force-conflicts", "--cache-dir", str(tmp_path))  # other tests' kubectl is not to know of v1beta1
        plane.kubectl("apply", *options, "-f", "-", stdin=json.dumps(item))

    def serve(*versions: dict[str, Any]) -> None:
        apply({**definition, "spec": {**definition["spec"], "versions": list(versions)}})

    async with following(plane, ACCOUNT) as mesh:
        await until(lambda: action(mesh, "p") == pb.Policy.DENY)
        await asyncio.to_thread(serve, newer, {**ours, "storage": False})
        changed = policy("defined", "p")
        changed |= {"apiVersion": "meshagent.io/v1beta1", "spec": {**changed["spec"], "action": "AUDIT"}}
        await soon(apply, changed)
        await until(lambda: action(mesh, "p") == pb.Policy.AUDIT)
        await until(lambda: mesh.state.problems == ())
        await asyncio.to_thread(serve, newer, {**ours, "storage": False, "served": False})
        await until(lambda: "and this version of it, served?" in told(mesh), 60)
        changed["spec"]["action"] = "DENY"
        await soon(apply, changed)
        assert action(mesh, "p") == pb.Policy.AUDIT
        await asyncio.to_thread(serve, newer, {**ours, "storage": False})
        await until(lambda: action(mesh, "p") == pb.Policy.DENY)
        await until(lambda: mesh.state.problems == ())


async def test_a_controller_that_may_not_look_at_definitions_says_so_and_goes_on(plane: ControlPlane) -> None:
    role = next(one for one in objects("ClusterRole") if one["metadata"]["name"] == "meshagent-controller")
    role["rules"] = [rule for rule in role["rules"] if "apiextensions.k8s.io" not in rule["apiGroups"]]
    plane.apply(role)
    await soon(plane.apply, policy("defined", "p"))
    async with following(plane, ACCOUNT) as mesh:
        await until(lambda: action(mesh, "p") is not None)
        assert f"let it get {CRD}, as the chart's ClusterRole does" in told(mesh)
        await soon(plane.kubectl, "delete", "authorizationpolicy", "p", "-n", "defined")
        await until(lambda: action(mesh, "p") is None)
