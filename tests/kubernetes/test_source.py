"""The controller's source against a real API server: what is applied is in force, also through its absence and the end of its memory."""

from __future__ import annotations

import asyncio
import http.client
import json
from typing import Any

import pytest

from controller.errors import ControllerError
from controller.kubernetes import reflector
from controller.kubernetes.api import Api
from controller.kubernetes.source import KubernetesSource
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.following import following, found
from tests.kubernetes.samples import namespace, pod, policy, running, service
from tests.tasks import until

pytestmark = pytest.mark.anyio


async def test_what_is_applied_is_in_force(plane: ControlPlane) -> None:
    plane.apply(namespace("shop"), pod("shop", "cart", app="cart"), service("shop", "cart"), policy("shop", "none-from-elsewhere"))
    async with following(plane) as mesh:
        await until(lambda: found(mesh, "shop/cart"))
        cart = found(mesh, "shop/cart")
        assert cart is not None
        assert (cart.enrolled, cart.ready, list(cart.addresses), len(cart.pod_uid)) == (True, False, [], 36)
        assert "policy/shop/none-from-elsewhere" in mesh.compiled.entities
        await asyncio.to_thread(running, plane, "shop", "cart", "10.1.0.5", "fd00::5")
        await until(lambda: (now := found(mesh, "shop/cart")) and now.ready)
        cart = found(mesh, "shop/cart")
        assert cart is not None
        assert list(cart.addresses) == ["10.1.0.5", "fd00::5"]
        assert [(one.service, one.ports[0].target_port) for one in cart.backing] == [("shop/cart", 8080)]
        await asyncio.to_thread(plane.kubectl, "delete", "pod", "cart", "-n", "shop", "--force", "--grace-period=0")
        await until(lambda: found(mesh, "shop/cart") is None)
        assert mesh.state.problems == ()


async def test_a_label_enrols_and_lets_go_of_pods_that_run(plane: ControlPlane) -> None:
    plane.apply(namespace("later", "none"), pod("later", "app"))
    async with following(plane) as mesh:
        await until(lambda: (now := found(mesh, "later/app")) and not now.enrolled)
        await asyncio.to_thread(plane.kubectl, "label", "namespace", "later", "meshagent.io/mode=mesh", "--overwrite")
        await until(lambda: (now := found(mesh, "later/app")) and now.enrolled)
        await asyncio.to_thread(plane.kubectl, "label", "pod", "-n", "later", "app", "meshagent.io/mode=none")
        await until(lambda: (now := found(mesh, "later/app")) and not now.enrolled)


async def test_an_api_server_that_is_killed_changes_nothing_and_is_taken_up_where_it_was(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reflector, "MAX_BACKOFF_S", 1.0)
    plane.apply(namespace("away"), pod("away", "app"))
    async with following(plane) as mesh:
        await until(lambda: found(mesh, "away/app") and mesh.publication.current.serial)
        version, entities = mesh.publication.current.version, set(mesh.compiled.entities)
        await asyncio.to_thread(plane.stop)
        await until(lambda: mesh.state.problems)
        assert "what was known stays in force" in str(mesh.state.problems[0])
        assert (mesh.publication.current.version, set(mesh.compiled.entities)) == (version, entities)
        await asyncio.to_thread(plane.start)
        await asyncio.to_thread(plane.apply, pod("away", "second"))
        await until(lambda: found(mesh, "away/second"))
        await until(lambda: not mesh.state.problems)


async def test_versions_that_etcd_has_forgotten_are_listed_again(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflector, "MAX_BACKOFF_S", 1.0)
    plane.apply(namespace("compacted"), pod("compacted", "before"))
    async with following(plane) as mesh:
        await until(lambda: found(mesh, "compacted/before"))
        source = mesh.source
        assert isinstance(source, KubernetesSource)
        lists = source.reflectors["Pod"].lists
        await asyncio.to_thread(plane.stop)
        await asyncio.to_thread(_compact, plane)
        await asyncio.to_thread(plane.start)
        await asyncio.to_thread(plane.apply, pod("compacted", "after"))
        await until(lambda: found(mesh, "compacted/after"), 60)
        assert source.reflectors["Pod"].lists > lists
        assert found(mesh, "compacted/before") is not None


def _compact(plane: ControlPlane) -> None:
    """Write something else into etcd until its revision has moved on, then have it forget everything before (its gRPC gateway, JSON)."""

    def call(path: str, body: dict[str, Any]) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", plane.etcd_port, timeout=30)
        try:
            connection.request("POST", path, json.dumps(body))
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        return answer

    for _ in range(50):
        revision = call("/v3/kv/put", {"key": "eA==", "value": "eA=="})["header"]["revision"]
    call("/v3/kv/compaction", {"revision": revision, "physical": True})


async def test_a_user_who_may_not_read_policies_gets_nothing_into_force_and_is_told_why(plane: ControlPlane) -> None:
    rule = {"apiGroups": ["*"], "resources": ["*"], "verbs": ["list", "watch"]}
    most = [{**rule, "apiGroups": ["", "discovery.k8s.io", "gateway.networking.k8s.io"]}]
    some = {"apiGroups": ["meshagent.io"], "resources": ["workloads"], "verbs": ["list", "watch"]}
    plane.allow("less", *most, some)
    async with following(plane, "less") as mesh:
        await until(lambda: any(problem.kind == "AuthorizationPolicy" for problem in mesh.state.problems))
        told = next(str(problem) for problem in mesh.state.problems if problem.kind == "AuthorizationPolicy")
        assert "does not let the controller read it (403 Forbidden" in told
        assert "see the ClusterRole" in told
        assert not mesh.publication.current.serial


async def test_gateway_api_may_come_later_and_is_followed_when_it_comes(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflector, "ABSENT_S", 0.5)
    plane.apply(namespace("early"), service("early", "cart"))
    async with following(plane) as mesh:
        source = mesh.source
        assert isinstance(source, KubernetesSource)
        await until(lambda: source.ready)
        assert source.reflectors["HTTPRoute"].absent
        assert mesh.state.problems == ()
        await asyncio.to_thread(plane.install_gateway_api)
        parents, backends = [{"kind": "Service", "group": "", "name": "cart"}], [{"name": "cart", "port": 80}]
        route = {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": {"name": "r", "namespace": "early"},
            "spec": {"parentRefs": parents, "rules": [{"backendRefs": backends}]},
        }
        await asyncio.to_thread(plane.apply, route)
        await until(lambda: "route/early/r" in mesh.compiled.entities)
        assert mesh.state.problems == ()


async def test_a_definition_that_is_no_longer_served_takes_nothing_out_of_force(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reflector, "ABSENT_S", 0.5)
    monkeypatch.setattr(reflector, "MAX_BACKOFF_S", 1.0)
    plane.apply(namespace("served"), policy("served", "p"))

    def serve(word: str) -> None:
        patch = json.dumps([{"op": "replace", "path": "/spec/versions/0/served", "value": word == "yes"}])
        plane.kubectl("patch", "crd", "authorizationpolicies.meshagent.io", "--type=json", "-p", patch)

    async with following(plane) as mesh:
        await until(lambda: "policy/served/p" in mesh.compiled.entities)
        try:
            await asyncio.to_thread(serve, "no")
            await until(lambda: any("served?" in problem.message for problem in mesh.state.problems), 60)
            assert "policy/served/p" in mesh.compiled.entities
        finally:
            await asyncio.to_thread(serve, "yes")
        await until(lambda: mesh.state.problems == (), 60)
        assert "policy/served/p" in mesh.compiled.entities


def test_a_kubeconfig_that_is_not_there_or_says_nothing_is_a_sentence(plane: ControlPlane) -> None:
    missing = plane.directory / "missing"
    empty = plane.directory / "empty.kubeconfig"
    empty.write_text("{}")
    for path in (missing, empty, plane.directory / "ca.crt"):
        with pytest.raises(ControllerError, match="cannot use --kubeconfig"):
            Api.connect(path)
    with pytest.raises(ControllerError, match="so this runs in no pod of Kubernetes; give --kubeconfig"):
        Api.connect()
