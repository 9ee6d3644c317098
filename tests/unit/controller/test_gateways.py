"""Which listeners of a Gateway are served and with which conditions, which routes hold for them, and who gets the keys of their certificates."""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from controller import mesh
from controller.compile import Compiled, compile_model
from controller.gateways import Known, intersection, selects
from controller.objects import Key
from controller.schema import read
from controller.server import ServerTls
from meshapi import admin_pb2, admin_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from tests.tasks import until
from tests.unit.controller.harness import Authority, serve

NOW = dt.datetime.now(dt.timezone.utc)
WORKLOAD = """
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {name: edge, namespace: edge, labels: {gateway.networking.k8s.io/gateway-name: web}}
spec: {node: n1, addresses: [10.0.0.1], networkNamespace: edge, serviceAccount: edge}
---
"""
SHOP = """
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{port: 80}]}
---
"""


class Signer:
    """A root and what it signs, as PEM."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")])

    def issue(self, *, key: Any = None, begins: float = -1, ends: float = 1) -> tuple[str, str]:
        """In days from NOW, which is when the tests were collected: perhaps an hour ago."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "leaf")]))
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW + dt.timedelta(days=begins))
            .not_valid_after(NOW + dt.timedelta(days=ends))
            .sign(self.key, hashes.SHA256())
        )
        return certificate.public_bytes(Encoding.PEM).decode(), key.private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        ).decode()


GOOD = Signer().issue()


def secret(chain: str = GOOD[0], key: str = GOOD[1], *, name: str = "tls", namespace: str = "edge", plain: bool = False) -> str:
    entries = {"tls.crt": chain, "tls.key": key}
    data = entries if plain else {name: base64.b64encode(text.encode()).decode() for name, text in entries.items()}
    metadata = {"name": name, "namespace": namespace}
    kind = {"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls"}
    return json.dumps({**kind, "metadata": metadata, "stringData" if plain else "data": data}) + "\n---\n"


def gateway(*listeners: str, name: str = "web", of: str = "meshagent") -> str:
    return f"""
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: {name}, namespace: edge}}
spec: {{gatewayClassName: {of}, listeners: [{", ".join(f"{{{one}}}" for one in listeners)}]}}
---
"""


HTTP = "name: http, port: 80, protocol: HTTP"
HTTPS = "name: https, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: tls}]}"
ALL = "allowedRoutes: {namespaces: {from: All}}"


def route(
    parent: str = "", *, namespace: str = "edge", hosts: str = "", backend: str = "", kind: str = "HTTPRoute", name: str = "r"
) -> str:
    hostnames = f"hostnames: [{hosts}], " if hosts else ""
    rules = f"rules: [{{backendRefs: [{{name: cart, namespace: shop, port: 80{backend}}}]}}]"
    return f"""
apiVersion: gateway.networking.k8s.io/v1
kind: {kind}
metadata: {{name: {name}, namespace: {namespace}}}
spec: {{parentRefs: [{{name: web, namespace: edge{parent}}}], {hostnames}{rules}}}
---
"""


def grant(namespace: str, source: str, kind: str, name: str = "") -> str:
    target = f"{{group: '', kind: {kind}{f', name: {name}' if name else ''}}}"
    return f"""
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: {{name: g-{kind.lower()}, namespace: {namespace}}}
spec: {{from: [{{group: gateway.networking.k8s.io, kind: {source}, namespace: edge}}], to: [{target}]}}
---
"""


def compiled(*texts: str, authority: bool = False, now: float | None = None) -> Compiled:
    checked = read("".join(texts), "f.yaml")
    assert not [problem for one in checked for problem in one.problems]
    return compile_model({one.object.key: one.object for one in checked if one.object}, authority=authority, now=now)


def said(model: Compiled, kind: str = "Gateway", name: str = "web") -> dict[str, tuple[bool, str]]:
    return {one.type: (one.status, one.reason) for one in model.conditions[Key(kind, "edge", name)]}


def listener(model: Compiled, name: str = "http") -> dict[str, Any]:
    (found,) = [one for one in model.status[Key("Gateway", "edge", "web")]["listeners"] if one["name"] == name]
    conditions = {one["type"]: (one["status"], one["reason"]) for one in found["conditions"]}
    return {**found, "conditions": conditions}


def served(model: Compiled) -> list[str]:
    return [one.name for one in model.entities["gateway/edge/web"].gateway.listeners]


def test_a_gateway_runs_where_a_workload_has_its_label() -> None:
    model = compiled(WORKLOAD, gateway(HTTP, HTTPS), secret())
    assert said(model) == {"Accepted": (True, "Accepted"), "Programmed": (True, "Programmed")}
    assert served(model) == ["http", "https"]
    assert model.status[Key("Gateway", "edge", "web")]["addresses"] == [{"type": "IPAddress", "value": "10.0.0.1"}]
    assert listener(model, "https")["conditions"] == {
        "Accepted": ("True", "Accepted"),
        "Conflicted": ("False", "NoConflicts"),
        "ResolvedRefs": ("True", "ResolvedRefs"),
        "Programmed": ("True", "Programmed"),
    }
    assert {node: list(held) for node, held in model.certificates.items()} == {"n1": ["edge/tls"]}
    nowhere = compiled(gateway(HTTP))
    assert said(nowhere)["Programmed"] == (False, "NoResources")
    assert listener(nowhere)["conditions"]["Programmed"] == ("False", "Pending")
    assert not nowhere.certificates


def test_a_gateway_of_another_class_is_somebody_elses() -> None:
    model = compiled(WORKLOAD, gateway(HTTP, of="istio"), route())
    assert "gateway/edge/web" not in model.entities
    assert said(model) == {}
    assert Key("HTTPRoute", "edge", "r") not in model.status
    assert "route/edge/r" not in model.entities


@pytest.mark.parametrize("protocol", ["TLS", "TCP", "UDP", "example.com/own"])
def test_a_protocol_that_is_not_served_is_refused_by_name(protocol: str) -> None:
    model = compiled(WORKLOAD, gateway(HTTP, f"name: x, port: 81, protocol: {protocol}"))
    assert listener(model, "x")["conditions"]["Accepted"] == ("False", "UnsupportedProtocol")
    assert said(model)["ListenersValid"] == (False, "UnsupportedProtocol")
    assert served(model) == ["http"]
    alone = compiled(WORKLOAD, gateway(f"name: x, port: 81, protocol: {protocol}"))
    assert said(alone) == {"Accepted": (False, "ListenersNotValid"), "Programmed": (False, "Invalid")}


def test_listeners_that_conflict_are_none_of_them_served() -> None:
    model = compiled(WORKLOAD, gateway(HTTP, HTTPS.replace("443", "80"), "name: other, port: 81, protocol: HTTP"), secret())
    assert listener(model)["conditions"]["Conflicted"] == ("True", "ProtocolConflict")
    assert listener(model)["conditions"]["Accepted"] == ("False", "ProtocolConflict")
    assert served(model) == ["other"]
    model = compiled(WORKLOAD, gateway(f"{HTTP}, hostname: a.b", f"{HTTP}, hostname: a.b".replace("name: http", "name: two")))
    assert listener(model, "two")["conditions"]["Conflicted"] == ("True", "HostnameConflict")
    assert served(model) == []
    assert served(compiled(WORKLOAD, gateway(f"{HTTP}, hostname: a.b", HTTP.replace("name: http", "name: two")))) == ["http", "two"]


@pytest.mark.parametrize("port", [15001, 15002, 15003, 15006, 15008, 15053])
def test_the_meshs_own_ports_are_not_available(port: int) -> None:
    model = compiled(WORKLOAD, gateway(f"name: http, port: {port}, protocol: HTTP"))
    assert listener(model)["conditions"]["Accepted"] == ("False", "PortUnavailable")
    assert served(model) == []


RSA_1024 = rsa.generate_private_key(65537, 1024)  # noqa: S505  that is the point


@pytest.mark.parametrize(
    ("document", "words"),
    [
        pytest.param("", "there is no Secret edge/tls", id="missing"),
        pytest.param(secret(GOOD[0], Signer().issue()[1]), "its tls.key is not that of the first certificate", id="another key"),
        pytest.param(secret("nothing"), "its tls.crt is no PEM certificate", id="no certificate"),
        pytest.param(secret(key="nothing"), "its tls.key is no unencrypted PEM key", id="no key"),
        pytest.param(secret(*Signer().issue(begins=-2, ends=-1)), "its certificate ran out at", id="expired"),
        pytest.param(secret(*Signer().issue(begins=1, ends=2)), "its certificate does not hold before", id="not yet"),
        pytest.param(secret(GOOD[0] + Signer().issue()[0], GOOD[1]), "are no chain", id="no chain"),
        pytest.param(secret(*Signer().issue(key=RSA_1024)), "neither RSA of at least 2048 bits nor", id="short key"),
        pytest.param(secret().replace('"tls.key"', '"key"'), "it has no tls.key", id="no entry"),
        pytest.param(secret().replace('"tls.key": "', '"tls.key": "%'), "its tls.key is not base64", id="not base64"),
    ],
)
def test_a_certificate_that_is_not_fit_takes_its_listener_out_and_no_other(document: str, words: str) -> None:
    model = compiled(WORKLOAD, gateway(HTTP, HTTPS), document)
    found = listener(model, "https")["conditions"]
    assert (found["ResolvedRefs"], found["Programmed"]) == (("False", "InvalidCertificateRef"), ("False", "Invalid"))
    (condition,) = [one for one in model.conditions[Key("Gateway", "edge", "web")] if one.type == "ListenersValid"]
    assert words in condition.message
    assert served(model) == ["http"]
    assert not model.certificates


def test_plain_text_wins_over_base64_and_a_certificate_runs_out() -> None:
    both = json.loads(secret().split("\n")[0]) | {"stringData": {"tls.crt": GOOD[0], "tls.key": GOOD[1]}}
    both["data"] = {"tls.crt": "", "tls.key": ""}
    assert served(compiled(WORKLOAD, gateway(HTTPS), json.dumps(both))) == ["https"]
    assert served(compiled(WORKLOAD, gateway(HTTPS), secret(plain=True))) == ["https"]
    assert served(compiled(WORKLOAD, gateway(HTTPS), secret(), now=(NOW + dt.timedelta(days=2)).timestamp())) == []


def test_a_secret_of_another_namespace_needs_a_grant() -> None:
    far = HTTPS.replace("{name: tls}", "{name: tls, namespace: vault}")
    there = secret(namespace="vault")
    assert listener(compiled(gateway(far), there), "https")["conditions"]["ResolvedRefs"] == ("False", "RefNotPermitted")
    assert served(compiled(gateway(far), there, grant("vault", "HTTPRoute", "Secret"))) == []
    assert served(compiled(gateway(far), there, grant("vault", "Gateway", "Secret", "other"))) == []
    assert served(compiled(gateway(far), there, grant("vault", "Gateway", "Secret", "tls"))) == ["https"]
    assert served(compiled(gateway(far), there, grant("vault", "Gateway", "Secret"))) == ["https"]


def attached(model: Compiled, name: str = "r") -> list[tuple[str, list[str]]]:
    entity = model.entities.get(f"route/edge/{name}")
    return [(parent.listener, list(parent.hostnames)) for parent in entity.route.parents] if entity else []


@pytest.mark.parametrize(
    ("listeners", "text", "expected", "reason"),
    [
        pytest.param([HTTP, HTTPS], route(), [("http", []), ("https", [])], "Accepted", id="all listeners"),
        pytest.param([HTTP, HTTPS], route(", sectionName: https"), [("https", [])], "Accepted", id="by name"),
        pytest.param([HTTP, HTTPS], route(", port: 80"), [("http", [])], "Accepted", id="by port"),
        pytest.param([HTTP], route(", port: 81"), [], "NoMatchingParent", id="no such port"),
        pytest.param([HTTP], route(", sectionName: x"), [], "NoMatchingParent", id="no such name"),
        pytest.param(["name: x, port: 80, protocol: TCP"], route(), [], "NoMatchingParent", id="listener refused"),
        pytest.param([f"{HTTP}, hostname: a.b"], route(hosts="a.b, c.d"), [("http", ["a.b"])], "Accepted", id="common host"),
        pytest.param([f"{HTTP}, hostname: '*.b'"], route(hosts="b, x.y.b"), [("http", ["x.y.b"])], "Accepted", id="below wildcard"),
        pytest.param([f"{HTTP}, hostname: a.b"], route(hosts="'*.b'"), [("http", ["a.b"])], "Accepted", id="above"),
        pytest.param([f"{HTTP}, hostname: a.b"], route(hosts="c.d"), [], "NoMatchingListenerHostname", id="no common host"),
        pytest.param(
            [f"{HTTP}, allowedRoutes: {{kinds: [{{kind: GRPCRoute}}]}}"], route(), [], "NotAllowedByListeners", id="kind not allowed"
        ),
        pytest.param([HTTP], route(kind="GRPCRoute"), [], "", id="grpc"),
    ],
)
def test_a_route_holds_for_the_listeners_that_it_means_and_that_let_it_in(
    listeners: list[str], text: str, expected: list[tuple[str, list[str]]], reason: str
) -> None:
    model = compiled(WORKLOAD, SHOP, secret(), grant("shop", "HTTPRoute", "Service"), gateway(*listeners), text)
    if not reason:
        assert [parent.listener for parent in model.entities["route/edge/r:grpc"].route.parents] == ["http"]
        return
    assert attached(model) == expected
    (parent,) = model.status[Key("HTTPRoute", "edge", "r")]["parents"]
    assert parent["conditions"][0]["reason"] == reason
    assert said(model, "HTTPRoute", "r")["Accepted"] == (reason == "Accepted", reason)
    counts = {one["name"]: one["attachedRoutes"] for one in model.status[Key("Gateway", "edge", "web")]["listeners"]}
    assert {name: 1 for name, _ in expected} == {name: count for name, count in counts.items() if count}


def test_routes_of_other_namespaces_need_to_be_let_in() -> None:
    def holds(allowed: str, labels: str = "") -> bool:
        namespace = f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: far{labels}}}\n---\n"
        model = compiled(WORKLOAD, namespace, gateway(f"{HTTP}, {allowed}" if allowed else HTTP), route(namespace="far"))
        return "route/far/r" in model.entities

    assert not holds("")
    assert not holds("allowedRoutes: {namespaces: {from: Same}}")
    assert holds(ALL)
    by_label = "allowedRoutes: {namespaces: {from: Selector, selector: {matchLabels: {shared: 'yes'}}}}"
    assert not holds(by_label)
    assert holds(by_label, ", labels: {shared: 'yes'}")
    assert holds("allowedRoutes: {namespaces: {from: Selector, selector: {matchLabels: {kubernetes.io/metadata.name: far}}}}")


def test_a_backend_of_another_namespace_needs_a_grant_for_gateways_only() -> None:
    both = route().replace("{name: web, namespace: edge}", "{name: web}, {kind: Service, name: own}")
    own = SHOP.replace("name: cart, namespace: shop", "name: own, namespace: edge").replace("10.96.0.1", "10.96.0.2")
    model = compiled(WORKLOAD, SHOP, own, gateway(HTTP), both)
    entity = model.entities["route/edge/r"].route
    assert {(parent.service, parent.gateway) for parent in entity.parents} == {("edge/own", ""), ("", "edge/web")}
    assert list(entity.not_from_gateways) == ["shop/cart"]
    assert not entity.rules[0].backends[0].invalid
    assert said(model, "HTTPRoute", "r")["ResolvedRefs"] == (False, "RefNotPermitted")
    model = compiled(WORKLOAD, SHOP, own, gateway(HTTP), both, grant("shop", "HTTPRoute", "Service", "cart"))
    assert not model.entities["route/edge/r"].route.not_from_gateways
    assert said(model, "HTTPRoute", "r")["ResolvedRefs"] == (True, "ResolvedRefs")


def test_a_strict_mesh_lets_strangers_in_at_the_ports_of_a_gateway() -> None:
    strict = """
apiVersion: meshagent.io/v1alpha1
kind: PeerAuthentication
metadata: {name: all, namespace: meshagent-system}
spec: {mtls: {mode: STRICT}}
---
"""
    model = compiled(WORKLOAD, strict, gateway(HTTP, "name: x, port: 81, protocol: TCP"), authority=True)
    workload = model.entities["workload/edge/edge"].workload
    assert workload.mtls == workload.STRICT
    assert [(port.port, port.mode) for port in workload.mtls_ports] == [(80, workload.PERMISSIVE)]


def test_hostnames_have_in_common_what_the_standard_says() -> None:
    assert intersection([], "") == []
    assert intersection(["a.b"], "") == ["a.b"]
    assert intersection([], "*.b") == ["*.b"]
    assert intersection(["*.a.b", "*.c"], "*.b") == ["*.a.b"]
    assert intersection(["*.b"], "*.a.b") == ["*.a.b"]
    assert intersection(["b"], "*.b") is None
    assert intersection(["xb"], "*.b") is None


def test_a_selector_with_expressions() -> None:
    def holds(key: str, operator: str, *values: str) -> bool:
        return selects({"matchExpressions": [{"key": key, "operator": operator, "values": list(values)}]}, {"a": "1"})

    assert holds("a", "In", "1", "2")
    assert not holds("a", "NotIn", "1")
    assert holds("b", "NotIn", "1")
    assert holds("a", "Exists")
    assert holds("b", "DoesNotExist")
    assert not holds("b", "Exists")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (gateway(HTTP, HTTP), 'spec.listeners[1].name: "http" is used twice'),
        (gateway(f"{HTTP}, tls: {{}}"), "spec.listeners[0].tls: does not belong to protocol HTTP"),
        (gateway("name: a, port: 443, protocol: HTTPS"), "spec.listeners[0].tls: is required for protocol HTTPS"),
        (
            gateway("name: a, port: 443, protocol: HTTPS, tls: {mode: Passthrough}"),
            'spec.listeners[0].tls.mode: must be "Terminate" for protocol HTTPS',
        ),
        (gateway("name: a, port: 443, protocol: HTTPS, tls: {}"), "spec.listeners[0].tls.certificateRefs: is required for mode Terminate"),
        (
            gateway(f"{HTTP}, allowedRoutes: {{namespaces: {{from: Selector}}}}"),
            'spec.listeners[0].allowedRoutes.namespaces.selector: is required for from: "Selector"',
        ),
        (gateway(f"{HTTP}, hostname: 10.a.*"), "spec.listeners[0].hostname: "),
        (gateway(HTTP).replace("listeners:", "addresses: [], listeners:"), "spec.addresses: is not supported: remove it"),
        (
            route(", group: ''"),
            'spec.parentRefs[0].group: must be "gateway.networking.k8s.io" for kind Gateway; for a Service write kind: Service',
        ),
        (route(", kind: Service, group: gateway.networking.k8s.io"), 'spec.parentRefs[0].group: must be "" for kind Service'),
    ],
)
def test_what_is_not_valid_is_refused_with_its_field(text: str, expected: str) -> None:
    found = [f"{problem.field}: {problem.message}" for one in read(text, "f") for problem in one.problems]
    assert [one for one in found if one.startswith(expected)], found


SECRETS = ("MIGHAgEAMBMG", "hunter2")


@pytest.mark.parametrize(
    "data",
    [
        "data: MIGHAgEAMBMG",
        "data: {tls.key: [hunter2]}",
        "data: {tls.key: 12345678}",
        "data: {MIGHAgEAMBMG: {hunter2: 1}}",
        "stringData: {tls.key: {hunter2: MIGHAgEAMBMG}}",
        "data: {tls.key: null}",
    ],
)
def test_no_message_about_a_secret_quotes_it(data: str) -> None:
    text = f"apiVersion: v1\nkind: Secret\nmetadata: {{name: s}}\ntype: kubernetes.io/tls\n{data}\n"
    problems = [str(problem) for one in read(text, "f") for problem in one.problems]
    assert problems
    assert not [problem for problem in problems if any(word in problem for word in (*SECRETS, "12345678"))]


def test_hostile_objects_are_refused_or_bounded() -> None:
    many = gateway(*(f"name: l{n}, port: {n + 1}, protocol: HTTP" for n in range(65)))
    assert [problem.field for one in read(many, "f") for problem in one.problems] == ["spec.listeners"]
    huge = secret(plain=True).replace("-----BEGIN CERTIFICATE", "x" * 300_000 + "-----BEGIN CERTIFICATE", 1)
    assert [problem.field for one in read(huge, "f") for problem in one.problems] == ["stringData"]
    same = "".join(route(name=f"r{n}", hosts=", ".join(f"h{m}.x" for m in range(16))) for n in range(5))
    assert len(compiled(WORKLOAD, gateway(HTTP), same).entities) == 7


def test_keys_go_to_the_node_that_serves_them_and_to_nobody_else(directory: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path, "mesh")
    own, other = (authority.issue(node, f"spiffe://mesh.local/meshagent/node/{node}") for node in ("n1", "n2"))
    server = authority.issue("controller")
    (directory / "a.yaml").write_text(WORKLOAD + gateway(HTTPS) + secret())

    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock", ServerTls(server.certificate, server.key, authority.ca)) as controller:

            def channel(pair: Any) -> grpc.aio.Channel:
                files = (authority.ca, pair.key, pair.certificate)
                return grpc.aio.secure_channel(
                    f"127.0.0.1:{controller.port}", grpc.ssl_channel_credentials(*(f.read_bytes() for f in files))
                )

            async with channel(own) as mine, channel(other) as theirs:

                def ask(one: grpc.aio.Channel, node: str) -> Any:
                    stub: Any = gateway_pb2_grpc.GatewaysStub(one)  # type: ignore[no-untyped-call,unused-ignore]
                    return stub.Certificates(gateway_pb2.CertificatesRequest(node=node))

                call = ask(mine, "n1")
                first = await call.read()
                assert [(one.name, one.key.decode()) for one in first.certificates] == [("edge/tls", GOOD[1])]
                for node in ("n1", "", "../n1", "n1/x"):  # a hostile agent of another node
                    with pytest.raises(grpc.aio.AioRpcError, match="is not yours"):
                        await ask(theirs, node).read()
                assert list((await ask(theirs, "n2").read()).certificates) == []
                renewed = Signer().issue()
                (directory / "a.yaml").write_text(WORKLOAD + gateway(HTTPS) + secret(*renewed))
                await controller.mesh.reload()
                second = await asyncio.wait_for(call.read(), 10)
                assert second.certificates[0].key.decode() == renewed[1]

    asyncio.run(check())


def test_a_certificate_that_runs_out_is_taken_from_its_nodes(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "EXPIRY_S", 0.05)
    left_s = (dt.datetime.now(dt.timezone.utc) - NOW).total_seconds() + 3
    (directory / "a.yaml").write_text(WORKLOAD + gateway(HTTPS) + secret(*Signer().issue(ends=left_s / 86400)))

    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock") as controller:
            first = await controller.mesh.certificates.other_than("n1", None)
            assert len(first.certificates) == 1
            then = await asyncio.wait_for(controller.mesh.certificates.other_than("n1", first), 20)
            assert len(then.certificates) == 0
            assert served(controller.mesh.compiled) == []

    asyncio.run(check())


def test_a_certificate_that_begins_to_hold_is_served_without_any_other_change(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mesh, "EXPIRY_S", 0.05)
    begins_s = (dt.datetime.now(dt.timezone.utc) - NOW).total_seconds() + 3
    (directory / "a.yaml").write_text(WORKLOAD + gateway(HTTPS) + secret(*Signer().issue(begins=begins_s / 86400)))

    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock") as controller:
            assert served(controller.mesh.compiled) == []
            first = await controller.mesh.certificates.other_than("n1", None)
            assert len(first.certificates) == 0
            then = await asyncio.wait_for(controller.mesh.certificates.other_than("n1", first), 20)
            assert len(then.certificates) == 1
            assert served(controller.mesh.compiled) != []

    asyncio.run(check())


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(secret("nothing"), id="unfit"),
        pytest.param(secret().replace("kubernetes.io/tls", "Opaque"), id="refused"),
        pytest.param(secret(*Signer().issue(begins=0.5)), id="not yet"),
    ],
)
def test_a_certificate_goes_on_being_served_while_the_one_after_it_is_bad_and_says_so(directory: Path, tmp_path: Path, bad: str) -> None:
    (directory / "a.yaml").write_text(WORKLOAD + gateway(HTTPS))
    path, again = directory / "secret.yaml", Signer().issue()
    path.write_text(secret())

    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock") as controller:

            def state() -> tuple[list[str], bytes, tuple[str, str]]:
                model = controller.mesh.compiled
                (held,) = model.certificates["n1"].values()
                return served(model), held.chain, listener(model, "https")["conditions"]["ResolvedRefs"]

            assert state() == (["https"], GOOD[0].encode(), ("True", "ResolvedRefs"))
            path.write_text(bad)
            await until(lambda: listener(controller.mesh.compiled, "https")["conditions"]["ResolvedRefs"][0] == "False")
            assert state() == (["https"], GOOD[0].encode(), ("False", "InvalidCertificateRef"))
            (said,) = [one for one in controller.mesh.compiled.conditions[Key("Gateway", "edge", "web")] if one.type == "ListenersValid"]
            assert "the certificate before it goes on being served" in said.message
            await controller.mesh.reload()
            assert state()[1] == GOOD[0].encode(), "only the compilation right after the change knew it"
            path.write_text(secret(*again))
            await until(lambda: listener(controller.mesh.compiled, "https")["conditions"]["ResolvedRefs"][0] == "True")
            assert state()[1] == again[0].encode()
            path.unlink()
            await until(lambda: not controller.mesh.compiled.certificates)
            assert served(controller.mesh.compiled) == []

    asyncio.run(check())


def test_what_goes_on_being_served_ends_with_its_time() -> None:
    before = compiled(WORKLOAD, gateway(HTTPS), secret(*Signer().issue(ends=1)))
    objects = {
        item.object.key: item.object for text in (WORKLOAD, gateway(HTTPS), secret("nothing")) for item in read(text, "f") if item.object
    }
    for days, expected in ((0.5, ["https"]), (1.5, [])):
        now = (NOW + dt.timedelta(days=days)).timestamp()
        assert served(compile_model(objects, now=now, known=Known(served=before.pairs))) == expected


def test_apply_takes_a_secret_and_get_shows_nothing_of_it(directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")

    async def check() -> Mapping[str, Any]:
        async with serve(directory, tmp_path / "c.sock") as controller, grpc.aio.insecure_channel(f"unix:{tmp_path}/c.sock") as channel:
            stub: Any = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call,unused-ignore]
            held = json.loads(secret().split("\n")[0])
            held["metadata"]["annotations"] = {"kubectl.kubernetes.io/last-applied-configuration": secret(), "own": "kept"}
            texts = [json.dumps(held), WORKLOAD, gateway(HTTPS)]
            documents = [admin_pb2.Document(origin="f", yaml=text) for text in texts]
            results = (await stub.Apply(admin_pb2.ApplyRequest(documents=documents))).results
            assert [one.action for one in results] == ["created"] * 3
            again = (await stub.Apply(admin_pb2.ApplyRequest(documents=documents[:1]))).results
            assert [one.action for one in again] == ["unchanged"]
            shown = [one.decode() for one in (await stub.Get(admin_pb2.GetRequest(kind="all"))).objects]
            published = b"".join(entity.SerializeToString() for entity in controller.mesh.compiled.entities.values()).decode("latin-1")
            encoded = base64.b64encode(GOOD[1].encode()).decode()
            for text in (*shown, published, caplog.text, repr(controller.mesh.compiled), *(str(one) for one in again)):
                assert encoded[:60] not in text
                assert "PRIVATE KEY" not in text
                assert GOOD[1].split("\n")[1] not in text
            assert (directory / "applied" / "edge_secret_tls.yaml").stat().st_mode & 0o777 == 0o600
            (found,) = [json.loads(one) for one in shown if '"Secret"' in one]
            return dict(found)

    found = asyncio.run(check())
    assert found["metadata"]["annotations"] == {"own": "kept"}
    assert "data" not in found
    assert found["status"]["conditions"][0]["type"] == "Accepted"
