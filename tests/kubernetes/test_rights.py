"""The rights of the manifest, measured: the API server writes down what a controller asks for in its life, which is all that it may."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from controller.documents import parse
from controller.gateways import LABEL
from controller.identity.certificates import pem
from controller.identity.lapse import Lapse
from controller.identity.ledger import SharedLedger
from controller.kubernetes.part import opened
from controller.store import of_node
from meshapi import identity_pb2 as pb
from meshapi import identity_pb2_grpc
from meshapi.join import AUDIENCE
from tests.kubernetes import controlplane
from tests.kubernetes.conftest import ASSETS
from tests.kubernetes.controlplane import CRDS, ControlPlane
from tests.kubernetes.manifest import ACCOUNT, FULL, OWN, RIGHTS
from tests.kubernetes.remembered import issued, soon
from tests.kubernetes.replicas import OVERRIDE, Replica, replicas
from tests.kubernetes.samples import API, SIGNER, listener, namespace, pod, policy, secret, service
from tests.unit.controller.identity.harness import new_key, request
from tests.unit.controller.test_crds import documents

AGENT = f"system:serviceaccount:{OWN}:meshagent-agent"
Right = tuple[str, str, str, str]
"""Group, resource, verb and, where a rule names objects, name."""


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """An API server that writes an audit log."""
    assets = os.environ.get(ASSETS)
    if not assets:
        pytest.skip(f"no control plane: `make test-kubernetes` builds one and says so in {ASSETS}")
    with controlplane.running(Path(assets), tmp_path_factory.mktemp("audited"), audited=True) as found:
        found.install_crds()
        found.install_gateway_api()
        found.apply(namespace(OWN, "none"), *(namespace(name) for name in ("shop", "blog")))
        yield found


def granted() -> dict[str, set[Right]]:
    """What the chart gives the controller, by the kind of role; every name of an object that a rule has is a right of its own."""
    found: dict[str, set[Right]] = {}
    for one in parse(FULL.read_bytes(), str(FULL)):
        for rule in one.value.get("rules", ()) if one.value["kind"] in {"ClusterRole", "Role"} else ():
            names = rule.get("resourceNames", [""])
            found.setdefault(one.value["metadata"]["name"], set()).update(
                (group, resource, verb, name)
                for group in rule["apiGroups"]
                for resource in rule["resources"]
                for verb in rule["verbs"]
                for name in names
            )
    return found


def right(event: dict[str, Any], named: set[tuple[str, str]]) -> Right:
    """Which right a request took; `named` are the resources of which rules name objects."""
    what = event["objectRef"]
    resource = "/".join(text for text in (what["resource"], what.get("subresource")) if text)
    group = what.get("apiGroup", "")
    return (group, resource, event["verb"], what.get("name", "") if (group, resource) in named and event["verb"] != "create" else "")


def test_a_controller_uses_every_right_in_its_life_and_is_refused_none(plane: ControlPlane, tmp_path: Path) -> None:
    plane.apply(*(one.value for one in parse(FULL.read_bytes(), str(FULL)) if one.value["kind"] in RIGHTS))
    of_each_kind(plane)
    with replicas(plane, tmp_path) as both:
        controller = both.a
        controller.user = ACCOUNT
        (tmp_path / "token").write_text(plane.kubectl("create", "token", "meshagent-controller", "-n", OWN).strip())
        controller.options = (
            f"--kubernetes-api={plane.url}",
            f"--kubernetes-ca={plane.directory / 'ca.crt'}",
            f"--kubernetes-token={tmp_path / 'token'}",
            f"--kubernetes-agent={OWN}/meshagent-agent",
        )
        controller.start()
        controller.wait(60)
        join(plane, controller, pem([both.root.certificate]))
        remember(plane)
        plane.kubectl("delete", "-f", str(CRDS / "meshagent.io_callermatches.yaml"))
        plane.install_crds()

        wanted = granted()
        own, secrets = wanted["meshagent-controller"], wanted["meshagent-gateway-secrets"]
        named = {(group, resource) for group, resource, _, name in own | secrets if name}

        def used() -> set[Right]:
            asked = [event for event in plane.asked(ACCOUNT) if "objectRef" in event]
            return {right(event, named) for event in asked if event["annotations"]["authorization.k8s.io/decision"] == "allow"}

        def idle() -> set[Right]:
            return {one for one in own | secrets if one not in used()}

        deadline = time.monotonic() + 60
        while idle() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert idle() == set(), f"never needed: {sorted(idle())}"
        refused = [event for event in plane.asked(ACCOUNT) if event["responseStatus"]["code"] == 403]
        assert [(event["verb"], event["requestURI"]) for event in refused] == []


def of_each_kind(plane: ControlPlane) -> None:
    """Something of every kind that is read, and of each whose status is written; of one that is refused there is an event."""
    plane.apply(*(namespace(one.value["metadata"].get("namespace", "default")) for one in documents()))
    shown = {one.value["kind"]: one.value for one in documents()}
    refused = policy("shop", "refused")
    refused["metadata"]["annotations"] = {"meshagent.io/dry-run": "perhaps"}
    web = {
        "gatewayClassName": "meshagent",
        "listeners": [tls("l", 8443, "shop-tls"), tls("m", 8444, "api-tls"), tls("n", 8445, "blog-tls", "blog")],
    }
    lets = {"from": [{"group": API, "kind": "Gateway", "namespace": "shop"}], "to": [{"group": "", "kind": "Secret"}]}
    routed = {"parentRefs": [{"kind": "Service", "group": "", "name": "cart"}], "rules": [{"backendRefs": [{"name": "cart", "port": 80}]}]}
    plane.apply(
        *shown.values(),
        refused,
        service("shop", "cart"),
        pod("shop", "edge", **{LABEL: "web"}),
        secret("shop", "shop-tls", *SIGNER.issue()),
        secret("shop", "api-tls", *SIGNER.issue()),
        secret("blog", "blog-tls", *SIGNER.issue()),
        gateway_api("Gateway", "web", web),
        gateway_api("HTTPRoute", "pages", routed),
        gateway_api("GRPCRoute", "calls", routed),
        {**gateway_api("ReferenceGrant", "tls", lets, "v1beta1"), "metadata": {"name": "tls", "namespace": "blog"}},
    )


def gateway_api(kind: str, name: str, spec: dict[str, Any], version: str = "v1") -> dict[str, Any]:
    return {"apiVersion": f"{API}/{version}", "kind": kind, "metadata": {"name": name, "namespace": "shop"}, "spec": spec}


def tls(name: str, port: int, secret: str, space: str = "shop") -> dict[str, Any]:
    return listener(name, port, protocol="HTTPS", tls={"certificateRefs": [{"name": secret, "namespace": space}]})


def join(plane: ControlPlane, controller: Replica, roots: bytes) -> None:
    """As an agent in its pod does, with a token that a kubelet has projected for the controller."""
    plane.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"}}, pod(OWN, "meshagent-agent"))
    with grpc.secure_channel(f"127.0.0.1:{controller.join_port}", grpc.ssl_channel_credentials(roots), OVERRIDE) as channel:
        stub: Any = identity_pb2_grpc.JoinStub(channel)  # type: ignore[no-untyped-call,unused-ignore]
        answer = stub.Join(pb.JoinRequest(node="node-1", csr=request(new_key()), service_account_token=token(plane)))
    assert answer.chain


def token(plane: ControlPlane) -> str:
    """An agent's."""
    bound = ("--audience", AUDIENCE, "--bound-object-kind", "Pod", "--bound-object-name", "meshagent-agent")
    return plane.kubectl("create", "token", "meshagent-agent", "-n", OWN, *bound).strip()


def remember(plane: ControlPlane) -> None:
    """A certificate on record for a node, until it has run out: the object of the node is made, changed and deleted."""
    now = [time.time()]
    with opened(plane.kubeconfig(ACCOUNT), "", OWN) as store:
        ledger = SharedLedger(store, Lapse(lambda: now[0], time.monotonic, 0.0))
        for number in (1, 2):
            ledger.append([issued(number, "gone", int(now[0]) + 10)])
        now[0] += 20
        ledger.compact()
        soon(lambda: of_node("gone") not in store.groups())


def test_an_agent_has_no_rights_and_its_token_is_none_for_the_api_server(plane: ControlPlane) -> None:
    plane.apply(*(one.value for one in parse(FULL.read_bytes(), str(FULL)) if one.value["kind"] in RIGHTS), pod(OWN, "meshagent-agent"))
    allowed = [
        plane.kubectl("auth", "can-i", "--list", "-n", OWN, f"--as={who}", "--as-group=system:authenticated") for who in (AGENT, "nobody")
    ]
    assert allowed[0] == allowed[1], "it may what everybody may"
    cluster = {"server": plane.url, "certificate-authority": str(plane.directory / "ca.crt")}
    config = plane.directory / "agent.kubeconfig"
    config.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "test", "cluster": cluster}],
                "users": [{"name": "agent", "user": {"token": token(plane)}}],
                "contexts": [{"name": "test", "context": {"cluster": "test", "user": "agent"}}],
                "current-context": "test",
            }
        )
    )
    said = plane.kubectl("--kubeconfig", str(config), "get", "--raw", "/version", check=False)
    assert "Unauthorized" in said or "must be logged in" in said, said
    assert plane.asked(AGENT) == []
