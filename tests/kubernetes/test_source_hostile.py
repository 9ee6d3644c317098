"""Labels, slices and statuses that try to be somebody else, on a real API server: who an object is decided by its namespace and its pod's service account."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from controller.mesh import Mesh
from tests import tokens
from tests.kubernetes.controlplane import ControlPlane, Failed
from tests.kubernetes.following import conditions, following, found, started, told, writing
from tests.kubernetes.manifest import ACCOUNT, OWN, grant
from tests.kubernetes.samples import namespace, pod, policy, running, service
from tests.tasks import until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("quick")]
MODE, DEFAULT = "meshagent.io/mode", "meshagent.io/default-policy"


@pytest.fixture(autouse=True)
def own(plane: ControlPlane) -> Iterator[None]:
    """A bank, whose vault nobody may call, a stranger, and the controller's rights as the manifest gives them."""
    plane.apply(namespace(OWN, "none"), namespace("bank"), namespace("stranger"))
    plane.apply(pod("bank", "vault", app="vault"), service("bank", "vault"), policy("bank", "p"))
    running(plane, "bank", "vault", "10.1.0.9")
    grant(plane)
    yield
    what = "services,pods,endpointslices,authorizationpolicies,requestauthentications"
    for space in ("bank", "stranger"):
        plane.kubectl("delete", what, "--all", "-n", space, "--force", "--grace-period=0")


def labelled(name: str, **labels: str) -> dict[str, Any]:
    spelled = {"mode": MODE, "default": DEFAULT}
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name, "labels": {spelled[key]: one for key, one in labels.items()}},
    }


def slice_(space: str, of: str, *addresses: str, name: str = "s") -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": space, "labels": {"kubernetes.io/service-name": of}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address]} for address in addresses],
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
    }


def bare(space: str, name: str) -> dict[str, Any]:
    """A Service without a selector."""
    meta = {"name": name, "namespace": space}
    return {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {"ports": [{"port": 80, "targetPort": 8080}]}}


def attached(kind: str, space: str, name: str, **spec: Any) -> dict[str, Any]:
    """A policy that names a Service."""
    whole = {"targetRefs": [{"kind": "Service", "name": name}], **spec}
    return {"apiVersion": "meshagent.io/v1alpha1", "kind": kind, "metadata": {"name": "mine", "namespace": space}, "spec": whole}


def enrolled(mesh: Mesh, name: str) -> bool | None:
    one = found(mesh, name)
    return one.enrolled if one is not None else None


async def test_a_namespace_whose_label_becomes_nonsense_stays_as_it_was_also_in_a_controller_that_starts(plane: ControlPlane) -> None:
    plane.apply(labelled("bank", mode="mesh", default="deny"))
    async with writing(plane, ACCOUNT) as one:
        await until(lambda: enrolled(one.mesh, "bank/vault"))
        await asyncio.to_thread(plane.apply, labelled("bank", mode="Mesh", default="Deny"))
        await until(lambda: 'must be "mesh" (the default) or "none" (not enrolled), not "Mesh"' in told(one.mesh))
        assert "api-server Namespace/bank metadata.labels['meshagent.io/default-policy']: must be" in told(one.mesh)
        assert enrolled(one.mesh, "bank/vault")
        assert "policy/bank/(default-deny)" in one.mesh.compiled.entities
        source = one.part.source
        await until(lambda: source.last_good is not None and "bank" in {key.name for key in source.last_good.kept})
    async with writing(plane, ACCOUNT) as two:
        await started(two.mesh)
        assert enrolled(two.mesh, "bank/vault")
        assert "policy/bank/(default-deny)" in two.mesh.compiled.entities
        await asyncio.to_thread(plane.apply, labelled("bank", mode="none"))
        await until(lambda: enrolled(two.mesh, "bank/vault") is False and not two.mesh.state.problems)
    plane.apply(namespace("bank"))


async def test_a_namespace_that_never_said_anything_else_than_nonsense_says_nothing(plane: ControlPlane) -> None:
    plane.apply(labelled("odd", mode="true"), pod("odd", "app"))
    async with following(plane, ACCOUNT) as mesh:
        await until(lambda: enrolled(mesh, "odd/app") is False)
        assert "Namespace/odd metadata.labels['meshagent.io/mode']" in told(mesh)
    plane.apply(namespace("odd"))
    plane.kubectl("delete", "pods", "--all", "-n", "odd", "--force", "--grace-period=0")


async def test_pods_whose_label_is_nonsense_are_what_their_namespace_says_and_one_problem(plane: ControlPlane) -> None:
    plane.apply(namespace("outside", "none"))
    names = [f"p{number:02}" for number in range(13)]
    for space in ("bank", "outside"):
        plane.apply(*(pod(space, name, **{MODE: "Mesh"}) for name in names))
    async with following(plane, ACCOUNT) as mesh:
        await until(lambda: all(enrolled(mesh, f"bank/{name}") for name in names))
        assert [enrolled(mesh, f"outside/{name}") for name in names] == [False] * 13
        said = [str(one) for one in mesh.state.problems if one.kind == "Pod"]
        assert len(said) == 2
        assert said[0].startswith('api-server Pod/bank metadata.labels[\'meshagent.io/mode\']: must be "mesh" or "none"')
        assert said[0].endswith('the Namespace decides: p00 has "Mesh", p01 has "Mesh", p02 has "Mesh" and 10 more')
        assert "app.kubernetes.io" not in told(mesh)
    plane.kubectl("delete", "pods", "--all", "-n", "outside", "--force", "--grace-period=0")


async def test_who_a_pod_is_follows_from_its_service_account_and_not_from_the_labels_of_another(plane: ControlPlane) -> None:
    imposter = pod("stranger", "imposter", app="vault", version="v1")
    imposter["metadata"]["annotations"] = {"meshagent.io/service-account": "vault", "meshagent.io/namespace": "bank"}
    imposter["metadata"]["labels"] |= {"kubernetes.io/metadata.name": "bank", "meshagent.io/identity": "vault"}
    plane.apply(imposter)
    async with following(plane, ACCOUNT) as mesh:
        await asyncio.to_thread(running, plane, "stranger", "imposter", "10.1.0.66")
        await until(lambda: (now := found(mesh, "stranger/imposter")) and now.ready)
        one, vault = found(mesh, "stranger/imposter"), found(mesh, "bank/vault")
        assert one is not None
        assert vault is not None
        assert (one.namespace, one.service_account, list(one.backing), list(one.policies)) == ("stranger", "imposter", [], [])
        assert [backing.service for backing in vault.backing] == ["bank/vault"]
    again = pod("stranger", "imposter", app="vault")
    again["spec"]["serviceAccountName"] = "vault"
    with pytest.raises(Failed, match="pod updates may not change fields other than"):
        plane.apply(again)


async def test_a_slice_of_another_namespace_or_of_a_service_with_a_selector_leads_nobody_anywhere(plane: ControlPlane) -> None:
    plane.apply(bare("bank", "db"), slice_("bank", "vault", "10.1.0.66"), slice_("stranger", "vault", "10.1.0.66"))
    plane.apply(slice_("stranger", "db", "10.1.0.66", name="t"), slice_("stranger", "nobody", "10.1.0.66", name="u"))
    async with following(plane, ACCOUNT) as mesh:
        await until(lambda: found(mesh, "bank/vault"))
        backing = {
            name: [one.service for one in entity.workload.backing]
            for name, entity in mesh.compiled.entities.items()
            if name.startswith("workload/")
        }
        assert backing == {"workload/bank/vault": ["bank/vault"]}


async def test_what_stands_behind_a_strangers_slice_is_not_the_strangers_to_decide_about(plane: ControlPlane) -> None:
    rule = {"from": [{"source": {"namespaces": ["stranger"]}}]}
    plane.apply(
        bare("stranger", "lure"),
        slice_("stranger", "lure", "10.1.0.9"),
        attached("AuthorizationPolicy", "stranger", "lure", action="ALLOW", rules=[rule]),
        attached(
            "RequestAuthentication",
            "stranger",
            "lure",
            jwtRules=[{"issuer": "https://stranger.test", "jwks": tokens.Issuer("https://stranger.test").jwks}],
        ),
    )
    async with writing(plane, ACCOUNT) as one:
        await until(lambda: (now := found(one.mesh, "bank/vault")) and len(now.backing) == 2)
        vault = found(one.mesh, "bank/vault")
        assert vault is not None
        assert (list(vault.policies), list(vault.authentications)) == (["bank/p"], [])
        kinds = ("authorizationpolicy", "requestauthentication")
        await until(
            lambda: (
                {conditions(plane, kind, "stranger", "mine").get("SelectedInItsNamespace") for kind in kinds}
                == {("False", "OtherNamespace")}
            )
        )


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1"])
def test_the_api_server_takes_no_slice_with_an_address_that_means_another_host_everywhere(plane: ControlPlane, address: str) -> None:
    with pytest.raises(Failed, match=r"endpoints\[0\].addresses\[0\]"):
        plane.apply(slice_("stranger", "lure", address))


async def test_addresses_of_services_and_of_the_api_server_make_nobody_a_workload_of_the_mesh(plane: ControlPlane) -> None:
    plane.apply(bare("stranger", "lure"))
    virtual = plane.kubectl("get", "service", "vault", "-n", "bank", "-o", "jsonpath={.spec.clusterIP}")
    plane.apply(slice_("stranger", "lure", virtual, "192.0.2.10"))
    async with following(plane, ACCOUNT) as mesh:
        await until(lambda: found(mesh, "(address)/192.0.2.10"))
        node = found(mesh, "(address)/192.0.2.10")
        assert node is not None
        assert (node.enrolled, list(node.policies), [one.service for one in node.backing]) == (False, [], ["stranger/lure"])
        assert found(mesh, f"(address)/{virtual}") is None


async def test_of_two_pods_that_say_to_have_one_address_nobody_has_it_until_one_ends(plane: ControlPlane) -> None:
    plane.apply(pod("stranger", "late", app="late"))
    async with following(plane, ACCOUNT) as mesh:
        await until(lambda: (now := found(mesh, "bank/vault")) and list(now.addresses) == ["10.1.0.9"])
        await asyncio.to_thread(running, plane, "stranger", "late", "10.1.0.9")
        await until(lambda: "10.1.0.9 is said to be the address of bank/vault, stranger/late: none of them has it" in told(mesh))
        await until(lambda: [list(one.addresses) for name in ("bank/vault", "stranger/late") if (one := found(mesh, name))] == [[], []])
        await asyncio.to_thread(plane.set_status, "pod", "stranger", "late", {"phase": "Succeeded"})
        await until(lambda: (now := found(mesh, "bank/vault")) and list(now.addresses) == ["10.1.0.9"])
        assert mesh.state.problems == ()


async def test_a_pod_in_its_nodes_network_is_nobody_and_takes_nobodys_place(plane: ControlPlane) -> None:
    host = pod("bank", "host", app="vault")
    host["spec"]["hostNetwork"] = True
    host["spec"]["containers"][0]["ports"][0]["hostPort"] = 8080
    plane.apply(host)
    running(plane, "bank", "host", "10.1.0.9")
    async with following(plane, ACCOUNT) as mesh:
        await until(lambda: found(mesh, "bank/vault"))
        assert found(mesh, "bank/host") is None
        vault = found(mesh, "bank/vault")
        assert vault is not None
        assert (list(vault.addresses), vault.service_account, vault.enrolled) == (["10.1.0.9"], "vault", True)
