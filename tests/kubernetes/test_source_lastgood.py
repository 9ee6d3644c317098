"""What a controller that starts knows of what is in force and not in the API server any more: last good versions, orphans, fields that were pruned."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.kubernetes import lastgood
from controller.objects import Key
from meshapi import discovery_pb2 as pb
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.definitions import CRD, install, older, soon
from tests.kubernetes.following import Writing, action, conditions, kept, started, told, writing, written
from tests.kubernetes.manifest import ACCOUNT, OWN, grant, objects
from tests.kubernetes.samples import namespace, policy
from tests.tasks import until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("quick")]
BAD = {"meshagent.io/dry-run": "perhaps"}


@pytest.fixture(autouse=True)
def own(plane: ControlPlane) -> Iterator[None]:
    """The controller's rights, as the manifest gives them, and no policies."""
    plane.apply(namespace(OWN, "none"), namespace("defined"))
    grant(plane)
    yield
    plane.kubectl("delete", "crd", CRD, "--ignore-not-found", "--wait")
    plane.kubectl("delete", "controllerstate", lastgood.NAME, "-n", OWN, "--ignore-not-found")
    install(plane)


async def test_a_policy_that_was_broken_is_in_force_as_it_was_in_a_controller_that_starts(plane: ControlPlane) -> None:
    await soon(plane.apply, policy("defined", "p"), policy("defined", "good"))
    broken = policy("defined", "p")
    broken["metadata"]["annotations"] = BAD
    broken["spec"]["rules"][0]["from"][0]["source"]["namespaces"] = ["broken"]
    async with writing(plane, ACCOUNT) as one:
        await until(lambda: action(one.mesh, "p") is not None)
        before = one.mesh.compiled.entities["policy/defined/p"].SerializeToString()
        await asyncio.to_thread(plane.apply, broken)
        await until(lambda: written(one, "p"))
        assert kept(plane).keys() == {"p"}
    async with writing(plane, ACCOUNT) as two:
        await started(two.mesh)
        assert two.mesh.compiled.entities["policy/defined/p"].SerializeToString() == before
        assert "dry-run" in told(two.mesh)
        broken["metadata"]["annotations"] = {}
        await asyncio.to_thread(plane.apply, broken)
        await until(lambda: not written(two, "p"))
        assert two.mesh.compiled.entities["policy/defined/p"].SerializeToString() != before
        assert kept(plane) == {}


async def test_a_broken_policy_that_is_deleted_or_made_again_leaves_nothing_to_the_next_controller(plane: ControlPlane) -> None:
    broken = [policy("defined", name) for name in ("gone", "again")]
    await soon(plane.apply, *broken)
    for item in broken:
        item["metadata"]["annotations"] = BAD
    async with writing(plane, ACCOUNT) as one:
        await until(lambda: action(one.mesh, "gone") is not None and action(one.mesh, "again") is not None)
        await asyncio.to_thread(plane.apply, *broken)
        await until(lambda: written(one, "gone") and written(one, "again"))
    for name in ("gone", "again"):
        await soon(plane.kubectl, "delete", "authorizationpolicy", name, "-n", "defined")
    await soon(plane.apply, broken[1])
    async with writing(plane, ACCOUNT) as two:
        await started(two.mesh)
        assert (action(two.mesh, "gone"), action(two.mesh, "again")) == (None, None)
        await until(lambda: not written(two, "gone") and not written(two, "again"))


async def test_what_its_definition_took_along_is_in_force_in_a_controller_that_starts_until_it_is_made_again(plane: ControlPlane) -> None:
    await soon(plane.apply, policy("defined", "p"), policy("defined", "q"))
    async with writing(plane, ACCOUNT) as one:
        await until(lambda: action(one.mesh, "p") is not None and action(one.mesh, "q") is not None)
        await asyncio.to_thread(plane.kubectl, "delete", "crd", CRD, "--wait")
        await until(lambda: written(one, "p") and written(one, "q"))
    install(plane)
    async with writing(plane, ACCOUNT) as two:
        await started(two.mesh)
        assert (action(two.mesh, "p"), action(two.mesh, "q")) == (pb.Policy.DENY, pb.Policy.DENY)
        assert "AuthorizationPolicy/defined/p: is not there any more" in told(two.mesh)
        await soon(plane.apply, policy("defined", "p"))
        await until(lambda: "defined/p" not in told(two.mesh))
        await soon(plane.kubectl, "delete", "authorizationpolicy", "p", "-n", "defined")
        await until(lambda: action(two.mesh, "p") is None and not written(two, "p"))
        assert action(two.mesh, "q") == pb.Policy.DENY
    async with writing(plane, ACCOUNT) as three:
        await started(three.mesh)
        assert (action(three.mesh, "p"), action(three.mesh, "q")) == (None, pb.Policy.DENY)


async def test_a_field_that_an_older_definition_hides_is_in_force_in_a_controller_that_starts(plane: ControlPlane, tmp_path: Path) -> None:
    item = policy("defined", "p")
    item["spec"] = {"action": "ALLOW", "rules": [{"when": [{"key": "source.namespace", "values": ["defined"]}]}]}
    await soon(plane.apply, item)
    async with writing(plane, ACCOUNT) as one:
        await until(lambda: action(one.mesh, "p") is not None)
        before = one.mesh.compiled.entities["policy/defined/p"].SerializeToString()
        await asyncio.to_thread(older, plane, tmp_path / "older.json")
        await soon(plane.kubectl, "label", "authorizationpolicy", "p", "-n", "defined", "touched=yes")
        await until(lambda: written(one, "p"))
    async with writing(plane, ACCOUNT) as two:
        await started(two.mesh)
        assert two.mesh.compiled.entities["policy/defined/p"].SerializeToString() == before
        assert "gives it without spec.rules[0].when" in told(two.mesh)
        await asyncio.to_thread(plane.set_status, "authorizationpolicy", "defined", "p", {"conditions": []})
        await until(lambda: conditions(plane, "authorizationpolicy", "defined", "p").get("Accepted") == ("False", "Invalid"))


async def test_a_gateway_whose_definition_is_gone_keeps_no_controller_from_starting(plane: ControlPlane) -> None:
    plane.install_gateway_api()
    listener = {"name": "l", "port": 8443, "protocol": "HTTPS", "tls": {"certificateRefs": [{"name": "c"}]}}
    spec = {"gatewayClassName": "meshagent", "listeners": [listener]}
    metadata = {"name": "g", "namespace": "defined"}
    item = {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "metadata": metadata, "spec": spec}
    await soon(plane.apply, item)
    key = Key("Gateway", "defined", "g")
    async with writing(plane, ACCOUNT) as one:
        await until(lambda: key in one.mesh.state.objects)
        await asyncio.to_thread(plane.kubectl, "delete", "crd", "gateways.gateway.networking.k8s.io", "--wait")
        await until(lambda: written(one, "g"))
    async with writing(plane, ACCOUNT) as two:
        await started(two.mesh)
        assert key in two.mesh.state.objects
        assert "Gateway/defined/g: is not there any more" in told(two.mesh)
        await asyncio.to_thread(plane.install_gateway_api)
        await soon(plane.apply, item)
        await until(lambda: "Gateway/defined/g" not in told(two.mesh))
        await soon(plane.kubectl, "delete", "gateway", "g", "-n", "defined")
        await until(lambda: key not in two.mesh.state.objects and not written(two, "g"))


async def test_the_controller_that_has_the_lease_writes_and_the_other_one_reads(plane: ControlPlane) -> None:
    await soon(plane.apply, policy("defined", "p"))
    broken = policy("defined", "p")
    broken["metadata"]["annotations"] = BAD
    one = Writing(plane, ACCOUNT)
    await one.start()
    try:
        await until(lambda: one.holds and action(one.mesh, "p") is not None)
        await asyncio.to_thread(plane.apply, broken)
        await until(lambda: written(one, "p"))
    except BaseException:
        await one.kill()
        raise
    async with writing(plane, ACCOUNT) as two:
        await started(two.mesh)
        assert (two.holds, action(two.mesh, "p")) == (False, pb.Policy.DENY)
        await one.kill()
        await until(lambda: two.holds, 15)
        await asyncio.sleep(2)
        assert kept(plane).keys() == {"p"}, "who takes over writes what it does not know away"


async def test_without_the_right_to_read_it_nothing_is_published(plane: ControlPlane) -> None:
    await soon(plane.apply, policy("defined", "p"))
    (role,) = objects("Role")
    plane.apply({**role, "rules": [rule for rule in role["rules"] if rule["resources"] != ["controllerstates"]]})
    async with writing(plane, ACCOUNT) as one:
        await until(lambda: f"ControllerState/{OWN}/{lastgood.NAME}" in told(one.mesh))
        assert "see the Role of the controller's service account" in told(one.mesh)
        assert not one.mesh.publication.current.serial
        plane.apply(role)
        await started(one.mesh)
