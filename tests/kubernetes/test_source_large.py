"""Objects near etcd's limit: they are in force, whoever is beside them too, and what cannot be written of them is said."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from agent.model import policy as read
from agent.policy import Caller, Verdict, decide
from controller.kubernetes import lastgood, lease, reflector, status
from controller.objects import Key
from meshapi import discovery_pb2 as pb
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.following import action, following, found, got, kept, started, told, writing, written
from tests.kubernetes.manifest import ACCOUNT, OWN, grant
from tests.kubernetes.samples import namespace, pod, policy, service
from tests.tasks import until

pytestmark = pytest.mark.anyio
BAD = {"meshagent.io/dry-run": "perhaps"}
ANNOTATIONS = 262_144  # all of an object together (apimachinery, TotalAnnotationSizeLimitB)


@pytest.fixture(autouse=True)
def own(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The controller's rights, as the manifest gives them."""
    monkeypatch.setattr(lease, "RENEW_S", 0.5)
    monkeypatch.setattr(reflector, "MAX_BACKOFF_S", 1.0)
    monkeypatch.setattr(status, "AGAIN_S", 0.5)
    monkeypatch.setattr(lastgood, "AGAIN_S", 0.5)
    plane.install_gateway_api()
    plane.apply(namespace(OWN, "none"), namespace("defined"), service("defined", "cart"))
    grant(plane)
    yield
    plane.kubectl("delete", "httproutes,authorizationpolicies,pods", "--all", "-n", "defined", "--force", "--grace-period=0")


def route(name: str, rules: int = 1, headers: int = 1, pattern: str = "/shop/.*") -> dict[str, Any]:
    """An HTTPRoute with so many rules of two matches with so many headers of 4 KB."""
    values = [{"name": f"x-{number}", "value": "v" * 4000} for number in range(headers)]
    paths = [{"type": "RegularExpression", "value": pattern}, {"type": "PathPrefix", "value": "/other"}]
    made = [{"matches": [{"path": path, "headers": values} for path in paths], "backendRefs": [{"name": "cart", "port": 80}]}] * rules
    spec = {"parentRefs": [{"kind": "Service", "group": "", "name": "cart"}], "rules": made}
    meta = {"name": name, "namespace": "defined"}
    return {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": meta, "spec": spec}


def accepted(plane: ControlPlane, name: str) -> str:
    parents = got(plane, "httproute", "defined", name).get("status", {}).get("parents", [{"conditions": []}])
    return next((one["status"] for one in parents[0]["conditions"] if one["type"] == "Accepted"), "")


async def test_a_route_as_large_as_etcd_takes_is_in_force_and_broken_stays_so_beside_its_neighbours(plane: ControlPlane) -> None:
    whole, broken = route("huge", 15, 11), route("huge", 15, 11, pattern="(")
    assert 1_300_000 < len(json.dumps(whole)) < 1_450_000
    plane.apply(whole, route("small"), policy("defined", "p"))
    async with writing(plane, ACCOUNT) as one:
        await until(lambda: {"route/defined/huge", "route/defined/small"} <= one.mesh.compiled.entities.keys())
        before = one.mesh.compiled.entities["route/defined/huge"].SerializeToString()
        await until(lambda: (accepted(plane, "huge"), accepted(plane, "small")) == ("True", "True"))
        small = policy("defined", "p")
        small["metadata"]["annotations"] = BAD
        await asyncio.to_thread(plane.apply, broken, small)
        await until(lambda: accepted(plane, "huge") == "False" and written(one, "p"))
        await until(lambda: "there is no room for HTTPRoute defined/huge; a restart of all controllers would lose" in told(one.mesh))
        assert one.mesh.compiled.entities["route/defined/huge"].SerializeToString() == before
        assert "route/defined/small" in one.mesh.compiled.entities
        assert kept(plane).keys() == {"p"}
    async with writing(plane, ACCOUNT) as two:
        await started(two.mesh)
        assert action(two.mesh, "p") == pb.Policy.DENY
        assert "route/defined/small" in two.mesh.compiled.entities
        assert "HTTPRoute/huge" in told(two.mesh)


async def test_a_pod_with_as_many_annotations_as_there_may_be_is_a_workload(plane: ControlPlane) -> None:
    large = pod("defined", "large")
    large["metadata"]["annotations"] = {f"example.com/{number}": "a" * 10_000 for number in range(26)}
    assert len(json.dumps(large)) > ANNOTATIONS - 3000
    plane.apply(large, pod("defined", "beside"))
    async with following(plane, ACCOUNT) as mesh:
        await until(lambda: found(mesh, "defined/large") and found(mesh, "defined/beside"))
        item = mesh.state.objects[Key("Pod", "defined", "large")]
        assert len(json.dumps(item.data)) < 1000, "all of it is kept in memory"
        assert mesh.state.problems == ()


async def test_a_policy_as_large_as_etcd_takes_is_in_force_and_stays_so_when_it_is_broken(plane: ControlPlane) -> None:
    """Its names are as long as names are, and nobody but the last of them is a pod's."""
    large, names = policy("defined", "large"), [f"{'n' * 63}/{'a' * 247}{number:06}" for number in range(4200)]
    sources = [{"serviceAccounts": names[first : first + 300]} for first in range(0, len(names), 300)]
    large["spec"] = {"action": "DENY", "rules": [{"from": [{"source": one}]} for one in sources]}
    assert 1_300_000 < len(json.dumps(large)) < 1_450_000
    plane.apply(large, policy("defined", "small"), pod("defined", "victim"))
    async with writing(plane, ACCOUNT) as one:
        await until(lambda: action(one.mesh, "large") == action(one.mesh, "small") == pb.Policy.DENY)
        entity = one.mesh.compiled.entities["policy/defined/large"]
        held = read(entity.policy)
        for account, verdict in ((names[-1], Verdict.DENY), (names[-1][:-1] + "x", Verdict.ALLOW)):
            space, _, name = account.partition("/")
            assert decide([held], Caller(space, name, "mesh.test"), 8080).verdict is verdict
        large["metadata"]["annotations"] = BAD
        await asyncio.to_thread(plane.apply, large)
        await until(
            lambda: "there is no room for AuthorizationPolicy defined/large; a restart of all controllers would lose" in told(one.mesh)
        )
        assert one.mesh.compiled.entities["policy/defined/large"] == entity
        looked = one.part._writer.written
        await asyncio.sleep(2)
        assert one.part._writer.written - looked <= 1, "it goes on writing"
