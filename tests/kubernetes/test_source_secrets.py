"""Certificates of Gateways out of Secrets of a real API server, read with the rights that the chart gives: those that it was told, and no others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from controller.compile import Compiled
from controller.documents import parse
from controller.kubernetes import reflector
from controller.kubernetes.source import KubernetesSource
from controller.mesh import Mesh
from controller.objects import Key
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.following import following
from tests.kubernetes.manifest import ACCOUNT, FULL, OWN, RIGHTS
from tests.kubernetes.samples import SIGNER, namespace, pod, secret
from tests.tasks import until

pytestmark = pytest.mark.anyio
GATEWAY_API = "gateway.networking.k8s.io"


@pytest.fixture(autouse=True)
def edge(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Namespaces and rights as the chart makes them, a pod in whose place gateways are served, and nothing else; gone afterwards but for the namespaces."""
    monkeypatch.setattr(reflector, "MAX_BACKOFF_S", 1.0)
    plane.install_gateway_api()
    plane.apply(namespace(OWN, "none"), namespace("shop"), namespace("blog"), namespace("vault"))
    rights = [one.value for one in parse(FULL.read_bytes(), str(FULL)) if one.value["kind"] in RIGHTS]
    plane.apply(*rights)
    plane.apply(pod("shop", "edge", **{f"{GATEWAY_API}/gateway-name": "web"}))
    yield
    for space in ("shop", "blog", "vault"):
        plane.kubectl("delete", "gateways,referencegrants,secrets,pods", "--all", "-n", space, "--force", "--grace-period=0")


def gateway(*references: dict[str, str], name: str = "web") -> dict[str, Any]:
    listeners = [
        {"name": f"l{port}", "port": port, "protocol": "HTTPS", "tls": {"certificateRefs": [reference]}}
        for port, reference in enumerate(references, 8443)
    ]
    spec = {"gatewayClassName": "meshagent", "listeners": listeners}
    return {"apiVersion": f"{GATEWAY_API}/v1", "kind": "Gateway", "metadata": {"name": name, "namespace": "shop"}, "spec": spec}


def grant(space: str, name: str) -> dict[str, Any]:
    spec = {
        "from": [{"group": GATEWAY_API, "kind": "Gateway", "namespace": "shop"}],
        "to": [{"group": "", "kind": "Secret", "name": name}],
    }
    return {"apiVersion": f"{GATEWAY_API}/v1beta1", "kind": "ReferenceGrant", "metadata": {"name": name, "namespace": space}, "spec": spec}


def resolved(model: Compiled, name: str = "l8443") -> tuple[str, str, str]:
    """ResolvedRefs of a listener: status, reason, message."""
    listeners = model.status.get(Key("Gateway", "shop", "web"), {}).get("listeners", ())
    found = [one for listener in listeners if listener["name"] == name for one in listener["conditions"] if one["type"] == "ResolvedRefs"]
    return (found[0]["status"], found[0]["reason"], found[0]["message"]) if found else ("", "", "")


def served(model: Compiled) -> dict[str, bytes]:
    """What is served on the node, by Secret."""
    return {name: pair.chain for name, pair in model.certificates.get("node-1", {}).items()}


def source(mesh: Mesh) -> KubernetesSource:
    assert isinstance(mesh.source, KubernetesSource)
    return mesh.source


async def test_a_secret_that_the_chart_names_is_served_and_followed_and_nothing_of_it_is_said(
    plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    first, second = SIGNER.issue(), SIGNER.issue()
    plane.apply(secret("shop", "shop-tls", *first), gateway({"name": "shop-tls"}))
    async with following(plane, ACCOUNT) as mesh:
        await until(lambda: mesh.publication.current.serial)
        assert served(mesh.compiled) == {"shop/shop-tls": first[0].encode()}, "the first thing that is published has it"
        assert resolved(mesh.compiled)[:2] == ("True", "ResolvedRefs")
        await until(lambda: mesh.state.problems == ())  # 429 for a moment: the definitions are new
        await asyncio.to_thread(plane.apply, secret("shop", "shop-tls", *second))
        await until(lambda: served(mesh.compiled) == {"shop/shop-tls": second[0].encode()})
        await asyncio.to_thread(plane.apply, secret("shop", "shop-tls", second[0], first[1]))
        await until(lambda: resolved(mesh.compiled)[:2] == ("False", "InvalidCertificateRef"))
        assert "the certificate before it goes on being served" in resolved(mesh.compiled)[2]
        assert served(mesh.compiled) == {"shop/shop-tls": second[0].encode()}
        await asyncio.to_thread(plane.kubectl, "delete", "secret", "shop-tls", "-n", "shop")
        await until(lambda: resolved(mesh.compiled)[2] == "there is no Secret shop/shop-tls")
        assert served(mesh.compiled) == {}
        said = caplog.text + str(mesh.state.problems) + str(mesh.compiled.entities) + str(mesh.compiled.status)
        assert first[1].split("\n")[1] not in said
        assert second[1].split("\n")[1] not in said


async def test_a_secret_that_the_chart_does_not_name_is_not_read_and_the_condition_says_what_to_do(plane: ControlPlane) -> None:
    plane.apply(secret("shop", "other", *SIGNER.issue()), gateway({"name": "other"}, {"name": "api-tls"}))
    plane.apply(secret("shop", "api-tls", *SIGNER.issue()))
    async with following(plane, ACCOUNT) as mesh:
        await until(lambda: mesh.publication.current.serial)
        assert served(mesh.compiled).keys() == {"shop/api-tls"}, "it takes another listener with it"
        status, reason, message = resolved(mesh.compiled)
        assert (status, reason) == ("False", "InvalidCertificateRef")
        assert "add namespace shop with name other to controller.gatewaySecrets" in message
        role = {"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["other"], "verbs": ["list", "watch"]}
        await asyncio.to_thread(plane.allow, ACCOUNT, role)
        await until(lambda: served(mesh.compiled).keys() == {"shop/api-tls", "shop/other"})
        assert mesh.state.problems == ()
    plane.kubectl("delete", "clusterrolebinding,clusterrole", ACCOUNT)


async def test_a_secret_of_another_namespace_is_read_when_a_grant_says_so_and_not_before(plane: ControlPlane) -> None:
    pair = SIGNER.issue()
    plane.apply(secret("blog", "blog-tls", *pair), gateway({"name": "blog-tls", "namespace": "blog"}))
    async with following(plane, ACCOUNT) as mesh:
        await until(lambda: mesh.publication.current.serial)
        assert resolved(mesh.compiled)[:2] == ("False", "RefNotPermitted")
        assert source(mesh).secrets.tasks == set(), "it is read although nobody may use it"
        assert Key("Secret", "blog", "blog-tls") not in mesh.state.objects
        await asyncio.to_thread(plane.apply, grant("blog", "blog-tls"))
        await until(lambda: served(mesh.compiled) == {"blog/blog-tls": pair[0].encode()})
        await asyncio.to_thread(plane.kubectl, "delete", "referencegrant", "blog-tls", "-n", "blog")
        await until(lambda: resolved(mesh.compiled)[:2] == ("False", "RefNotPermitted"))
        assert served(mesh.compiled) == {}
        await until(lambda: source(mesh).secrets.tasks == set())
        await until(lambda: Key("Secret", "blog", "blog-tls") not in mesh.state.objects)


async def test_a_listener_that_is_added_closes_no_other_while_its_certificate_is_being_read(plane: ControlPlane) -> None:
    plane.apply(*(secret("shop", name, *SIGNER.issue()) for name in ("shop-tls", "api-tls")), gateway({"name": "shop-tls"}))
    async with following(plane, ACCOUNT) as mesh:
        await until(lambda: mesh.publication.current.serial)
        seen: list[set[str]] = []
        mesh.looked = lambda _, compiled: seen.append(set(served(compiled)))
        both = gateway({"name": "shop-tls"}, {"name": "api-tls"})
        both["spec"]["listeners"][0]["tls"]["certificateRefs"].append({"name": "api-tls"})
        await asyncio.to_thread(plane.apply, both)
        await until(lambda: seen and seen[-1] == {"shop/shop-tls", "shop/api-tls"})
        assert all("shop/shop-tls" in one for one in seen)


async def test_a_secret_of_another_type_is_refused_by_its_type(plane: ControlPlane) -> None:
    plane.apply(secret("shop", "shop-tls", *SIGNER.issue(), kind="Opaque"), gateway({"name": "shop-tls"}))
    async with following(plane, ACCOUNT) as mesh:
        await until(lambda: resolved(mesh.compiled)[:2] == ("False", "InvalidCertificateRef"))
        assert "is of type 'Opaque', not kubernetes.io/tls" in resolved(mesh.compiled)[2]
        assert served(mesh.compiled) == {}


def test_with_these_rights_no_other_secret_can_be_read(plane: ControlPlane) -> None:
    def may(verb: str, what: str, space: str) -> bool:
        return plane.kubectl("auth", "can-i", verb, what, "-n", space, f"--as={ACCOUNT}", check=False).startswith("yes")

    assert [may(verb, "secrets/shop-tls", "shop") for verb in ("list", "watch", "get", "update")] == [True, True, False, False]
    assert [may(*one) for one in (("list", "secrets", "shop"), ("get", "secrets/other", "shop"), ("get", "secrets/shop-tls", "vault"))] == [
        False
    ] * 3
    plane.apply(secret("shop", "other", *SIGNER.issue()))
    listed = plane.kubectl("get", "secrets", "-n", "shop", "--field-selector=metadata.name=other", f"--as={ACCOUNT}", check=False)
    assert 'secrets "other" is forbidden' in listed
    assert "kubernetes.io/tls" not in listed
