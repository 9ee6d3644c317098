"""ExternalServices: what is refused and by which field, whose name counts, and which addresses are given."""

from __future__ import annotations

import asyncio
import ipaddress
from pathlib import Path

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from agent.external import Endpoint, External
from agent.model import Service, Workload, decode
from controller import externals
from controller.compile import Compiled, compile_model
from controller.conflicts import resolve
from controller.errors import Problem
from controller.main import main
from controller.schema import read
from controller.server import Controller, Settings
from tests.unit.controller import harness

ORIGIN = """
kind: ExternalService
apiVersion: meshagent.io/v1alpha1
metadata: {{name: {name}, namespace: {namespace}, creationTimestamp: "{created}"}}
spec: {spec}
---
"""
WORKLOAD = """
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {name: cart-1, labels: {app: cart}}
spec: {node: n1, addresses: [10.0.1.2], networkNamespace: cart-1}
---
"""
CART = harness.service("cart", "10.96.0.1") + "---\n"
PLAIN = "{hosts: [api.example.com], ports: [{port: 80, protocol: HTTP}]}"


def document(spec: str = PLAIN, name: str = "api", namespace: str = "default", created: str = "2026-01-01T00:00:00Z") -> str:
    return ORIGIN.format(name=name, namespace=namespace, created=created, spec=spec)


def compiled(text: str, egress: str = "allow") -> Compiled:
    checked = read(text, "f")
    assert [str(problem) for item in checked for problem in item.problems] == []
    return compile_model({item.object.key: item.object for item in checked if item.object}, egress=egress)


def services(model: Compiled) -> dict[str, Service]:
    found = {name.partition("/")[2]: decode(entity.SerializeToString()) for name, entity in model.entities.items()}
    return {name: one for name, one in found.items() if isinstance(one, Service) and one.external is not None}


def only(model: Compiled) -> tuple[Service, External]:
    (service,) = services(model).values()
    assert service.external is not None
    return service, service.external


def conditions(model: Compiled, name: str = "api", namespace: str = "default") -> list[tuple[str, bool, str]]:
    found = next(
        found for key, found in model.conditions.items() if (key.kind, key.namespace, key.name) == (externals.KIND, namespace, name)
    )
    return [(one.type, one.status, one.reason) for one in found]


@pytest.mark.parametrize(
    ("spec", "field", "words"),
    [
        ("{hosts: ['*.example.com'], ports: [{port: 80, protocol: HTTP}]}", "spec.hosts[0]", "wildcards are not supported"),
        ("{hosts: [localhost], ports: [{port: 80, protocol: HTTP}]}", "spec.hosts[0]", "not a DNS name with a dot"),
        ("{hosts: [x.localhost], ports: [{port: 80, protocol: HTTP}]}", "spec.hosts[0]", "the caller itself"),
        ("{hosts: [192.0.2.1], ports: [{port: 80, protocol: HTTP}]}", "spec.hosts[0]", "is an address"),
        ("{hosts: [a.b.1], ports: [{port: 80, protocol: HTTP}]}", "spec.hosts[0]", "taken for an address"),
        ("{hosts: [cart.default.svc], ports: [{port: 80, protocol: HTTP}]}", "spec.hosts[0]", "a service of the mesh"),
        ("{hosts: [cart.default.svc.cluster.local], ports: [{port: 80, protocol: HTTP}]}", "spec.hosts[0]", "a service of the mesh"),
        ("{hosts: [API.example.com], ports: [{port: 80, protocol: HTTP}]}", "spec.hosts[0]", "in lower case"),
        ("{hosts: [\"a.example.com\\n1.2.3.4 x\"], ports: [{port: 80, protocol: HTTP}]}", "spec.hosts[0]", "not a DNS name"),
        ("{hosts: [a.example.com, a.example.com], ports: [{port: 80, protocol: HTTP}]}", "spec.hosts[1]", "listed twice"),
        ("{hosts: [a.example.com], ports: [{port: 53, protocol: UDP}]}", "spec.ports[0].protocol", "not supported"),
        ("{hosts: [a.example.com], ports: [{port: 80, protocol: HTTP}, {port: 80, protocol: TCP}]}", "spec.ports[1].port", "listed twice"),
        ("{hosts: [a.example.com], resolution: NONE, ports: [{port: 80, protocol: HTTP}]}", "spec.resolution", "not supported"),
        ("{hosts: [a.example.com], resolution: STATIC, ports: [{port: 80, protocol: HTTP}]}", "spec.endpoints", "is required"),
        (
            "{hosts: [a.example.com], resolution: STATIC, endpoints: [{address: b.example.com}], ports: [{port: 80, protocol: HTTP}]}",
            "spec.endpoints[0].address",
            "is not an address",
        ),
        (
            "{hosts: [a.example.com], endpoints: [{address: 127.0.0.1}], ports: [{port: 80, protocol: HTTP}]}",
            "spec.endpoints[0].address",
            "loopback",
        ),
        (
            "{hosts: [a.example.com], endpoints: [{address: 169.254.169.254}], ports: [{port: 80, protocol: HTTP}]}",
            "spec.endpoints[0].address",
            "link-local",
        ),
        (
            "{hosts: [a.example.com], endpoints: [{address: 240.240.0.7}], ports: [{port: 80, protocol: HTTP}]}",
            "spec.endpoints[0].address",
            "inside the mesh",
        ),
        (
            "{hosts: [a.example.com], endpoints: [{address: b.example.com, ports: {web: 8}}], ports: [{port: 80, protocol: HTTP}]}",
            "spec.endpoints[0].ports.web",
            "no port of spec.ports",
        ),
        ("{hosts: [a.example.com], addresses: [127.0.0.1], ports: [{port: 80, protocol: HTTP}]}", "spec.addresses[0]", "loopback"),
        ("{hosts: [a.example.com], addresses: [0.0.0.0], ports: [{port: 80, protocol: HTTP}]}", "spec.addresses[0]", "one host"),
        ("{hosts: [a.example.com], addresses: ['::ffff:192.0.2.1'], ports: [{port: 80, protocol: HTTP}]}", "spec.addresses[0]", "IPv6 spelling"),
        ("{hosts: [a.example.com], addresses: [240.240.1.1], ports: [{port: 80, protocol: HTTP}]}", "spec.addresses[0]", "gives away itself"),
        (
            "{hosts: [a.example.com, b.example.com], addresses: [192.0.2.1], ports: [{port: 80, protocol: HTTP}]}",
            "spec.endpoints",
            "nobody can tell",
        ),
        ("{hosts: [a.example.com], tls: {}, ports: [{port: 443, protocol: HTTPS}]}", "spec.tls", "has no effect"),
        ("{hosts: [a.example.com], tls: {mode: MUTUAL}, ports: [{port: 80, protocol: HTTP}]}", "spec.tls.mode", "not supported"),
        ("{hosts: [a.example.com], tls: {mode: DISABLE}, ports: [{port: 80, protocol: HTTP}]}", "spec.tls.mode", 'must be "SIMPLE"'),
        ("{hosts: [a.example.com], tls: {sni: '*'}, ports: [{port: 80, protocol: HTTP}]}", "spec.tls.sni", "not a DNS name"),
        (
            "{hosts: [a.example.com], tls: {subjectAltNames: ['*.example.com']}, ports: [{port: 80, protocol: HTTP}]}",
            "spec.tls.subjectAltNames[0]",
            "wildcards",
        ),
        ("{hosts: [a.example.com], tls: {caCertificates: nonsense}, ports: [{port: 80, protocol: HTTP}]}", "spec.tls.caCertificates", "no PEM"),
        ("{hosts: [a.example.com], exportTo: [other], ports: [{port: 80, protocol: HTTP}]}", "spec.exportTo[0]", 'must be "*" or "."'),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_its_field(spec: str, field: str, words: str) -> None:
    problems = [problem for item in read(document(spec), "f") for problem in item.problems]
    assert [problem.field for problem in problems] == [field]
    assert words in problems[0].message


def test_a_host_is_a_service_of_its_own_at_a_virtual_address() -> None:
    model = compiled(
        document("{hosts: [api.example.com, www.example.com], ports: [{port: 80, protocol: HTTP}, {port: 5432, protocol: TCP}]}")
    )
    found = services(model)
    assert set(found) == {"default/api.example.com", "default/www.example.com"}
    assert len({address for one in found.values() for address in one.addresses}) == 2
    service = found["default/api.example.com"]
    assert all(ipaddress.ip_address(address) in externals.VIRTUAL4 for address in service.addresses)
    assert [(port.port, port.app_protocol, port.waypoint) for port in service.ports] == [(80, "http", True), (5432, "tcp", True)]
    assert service.external == External("api", ("api.example.com",), False, True, (Endpoint("api.example.com", 1, {80: 80, 5432: 5432}),))
    assert conditions(model) == [("Accepted", True, "Accepted")]


def test_virtual_addresses_depend_on_the_name_alone() -> None:
    alone = services(compiled(document()))["default/api.example.com"].addresses
    others = "".join(document(PLAIN.replace("api", f"a{i}"), f"a{i}") for i in range(7))
    assert services(compiled(others + document()))["default/api.example.com"].addresses == alone
    assert services(compiled(document(namespace="other")))["other/api.example.com"].addresses != alone


def test_a_virtual_address_that_is_taken_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    (address,) = services(compiled(document()))["default/api.example.com"].addresses
    taken = harness.service("taken", address) + "---\n"
    (moved,) = services(compiled(taken + document()))["default/api.example.com"].addresses
    assert int(ipaddress.ip_address(moved)) == int(ipaddress.ip_address(address)) + 1
    monkeypatch.setattr("controller.externals.hashlib.sha256", lambda _: type("Same", (), {"digest": staticmethod(lambda: bytes(8))}))
    found = services(compiled(document() + document(PLAIN.replace("api", "b"), "b")))
    assert {one.addresses for one in found.values()} == {("240.240.0.1",), ("240.240.0.2",)}


def test_ipv6_addresses_are_given_where_workloads_have_them() -> None:
    model = compiled(WORKLOAD.replace("10.0.1.2", '"fd00::2"') + document())
    assert [ipaddress.ip_address(address).version for address in only(model)[0].addresses] == [4, 6]
    assert ipaddress.ip_address(only(model)[0].addresses[1]) in externals.VIRTUAL6


def test_origination_goes_to_443_and_verifies_the_host() -> None:
    _, external = only(
        compiled(document("{hosts: [api.example.com], tls: {}, ports: [{port: 80, protocol: HTTP}, {port: 8080, protocol: TCP}]}"))
    )
    assert external.tls is not None
    assert (external.tls.sni, external.tls.names, external.tls.roots) == ("api.example.com", ("api.example.com",), "")
    assert external.endpoints[0].ports == {80: 443, 8080: 8080}


def test_hosts_that_share_addresses_are_one_service() -> None:
    spec = "{hosts: [a.example.com, b.example.com], addresses: [192.0.2.1], resolution: STATIC, endpoints: [{address: 192.0.2.7, weight: 3, ports: {web: 8080}}], ports: [{port: 80, name: web, protocol: HTTP}]}"  # noqa: E501
    service, external = only(compiled(document(spec)))
    assert (service.name, service.addresses, external.fixed, external.dns) == ("default/a.example.com", ("192.0.2.1",), True, False)
    assert external.hosts == ("a.example.com", "b.example.com")
    assert external.endpoints == (Endpoint("192.0.2.7", 3, {80: 8080}),)


def test_static_endpoints_are_the_addresses_by_default() -> None:
    spec = "{hosts: [a.example.com], addresses: [192.0.2.1], resolution: STATIC, ports: [{port: 80, protocol: HTTP, targetPort: 81}]}"
    assert only(compiled(document(spec)))[1].endpoints == (Endpoint("192.0.2.1", 1, {80: 81}),)


def test_of_two_with_one_host_the_older_counts_and_the_other_says_so() -> None:
    model = compiled(document(name="a-new", created="2026-02-01T00:00:00Z", namespace="other") + document(name="old"))
    assert set(services(model)) == {"default/api.example.com"}
    assert conditions(model, "old") == [("Accepted", True, "Accepted")]
    assert conditions(model, "a-new", "other") == [("Accepted", False, "Conflicted")]


def test_a_private_one_stands_beside_one_for_all() -> None:
    private = PLAIN.replace("}]}", "}], exportTo: ['.']}")
    model = compiled(document() + document(private, namespace="other", created="2026-02-01T00:00:00Z"))
    assert set(services(model)) == {"default/api.example.com", "other/api.example.com"}
    found = services(model)["other/api.example.com"].external
    assert found is not None
    assert found.private
    model = compiled(document() + document(private, name="second", created="2026-02-01T00:00:00Z"))
    assert conditions(model, "second") == [("Accepted", False, "Conflicted")]


def test_a_name_of_a_mesh_service_is_never_captured() -> None:
    spec = "{hosts: [cart.default, api.example.com], ports: [{port: 80, protocol: HTTP}]}"
    model = compiled(CART + document(spec))
    assert set(services(model)) == {"default/api.example.com"}
    assert ("Uncontested", False, "Conflicted") in conditions(model)


@pytest.mark.parametrize("endpoint", ["10.0.1.2", "10.96.0.1", "cart.default"])
def test_an_endpoint_in_the_mesh_is_not_used_and_the_name_stays_closed(endpoint: str) -> None:
    spec = f"{{hosts: [api.example.com], endpoints: [{{address: {endpoint}}}], ports: [{{port: 80, protocol: HTTP}}]}}"
    model = compiled(CART + WORKLOAD + document(spec))
    assert only(model)[1].endpoints == ()
    assert ("EndpointsUsed", False, "PointsIntoTheMesh") in conditions(model)


@pytest.mark.parametrize("first", [True, False], ids=["the-mesh-first", "the-outside-first"])
@pytest.mark.parametrize(("text", "address"), [(CART, "10.96.0.1"), (WORKLOAD, "10.0.1.2")], ids=["service", "workload"])
def test_addresses_of_the_mesh_are_the_meshs_whoever_was_first(text: str, address: str, first: bool) -> None:
    outside = document(f"{{hosts: [api.example.com], addresses: [{address}], ports: [{{port: 80, protocol: HTTP}}]}}")
    inside = [item.object for item in read(text, "f") if item.object]
    claims = [item.object for item in read(outside, "g") if item.object]
    held = {item.key: item for item in ([] if first else claims)}
    accepted, problems = resolve([*claims, *inside], held)
    assert [key.kind for key in accepted] == [item.key.kind for item in inside]
    (problem,) = problems.values()
    assert isinstance(problem, Problem)
    assert problem.field == "spec.addresses[0]"


def test_two_may_share_an_address_but_no_port_of_it() -> None:
    def item(name: str, port: int) -> str:
        return document(f"{{hosts: [{name}.example.com], addresses: [192.0.2.1], ports: [{{port: {port}, protocol: TCP}}]}}", name)

    for ports, wrong in (((80, 81), 0), ((80, 80), 1)):
        objects = [one.object for name, port in zip("ab", ports, strict=True) for one in read(item(name, port), "f") if one.object]
        assert len(resolve(objects, {})[1]) == wrong


POLICY = """
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: p}
spec:
  targetRefs: [{group: meshagent.io, kind: ExternalService, name: api}]
  rules: [{from: [{source: {serviceAccounts: [a]}}]}]
---
"""


def test_a_policy_protects_what_it_names_and_no_workload() -> None:
    model = compiled(POLICY + WORKLOAD + document())
    assert only(model)[1].policies == ("default/p",)
    workload = decode(model.entities["workload/default/cart-1"].SerializeToString())
    assert isinstance(workload, Workload)
    assert workload.policies == ()
    key = next(key for key in model.conditions if key.kind == "AuthorizationPolicy")
    assert [(one.type, one.status, one.message) for one in model.conditions[key]] == [("Accepted", True, "in force")]


def test_a_policy_for_what_is_not_there_says_so() -> None:
    model = compiled(POLICY)
    key = next(key for key in model.conditions if key.kind == "AuthorizationPolicy")
    assert [one.reason for one in model.conditions[key]] == ["Accepted", "TargetNotFound"]
    assert "ExternalService default/api" in model.conditions[key][1].message


@pytest.mark.parametrize(("group", "kind"), [("", "ExternalService"), ("meshagent.io", "Service")])
def test_a_target_of_the_wrong_group_is_refused(group: str, kind: str) -> None:
    text = POLICY.replace("group: meshagent.io, kind: ExternalService", f'group: "{group}", kind: {kind}')
    assert [problem.field for item in read(text, "f") for problem in item.problems] == ["spec.targetRefs[0].group"]


@pytest.mark.parametrize(
    ("annotation", "egress", "denied"),
    [("", "allow", False), ("", "deny", True), ("deny", "allow", True), ("allow", "deny", False)],
)
def test_egress_is_the_namespaces_or_else_the_meshs(annotation: str, egress: str, denied: bool) -> None:
    annotations = f", annotations: {{meshagent.io/egress: {annotation}}}" if annotation else ""
    namespace = f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: default{annotations}}}\n---\n"
    for text in (namespace + WORKLOAD, WORKLOAD if not annotation else namespace + WORKLOAD):
        found = decode(compiled(text, egress).entities["workload/default/cart-1"].SerializeToString())
        assert isinstance(found, Workload)
        assert found.egress_deny is denied


def test_another_word_for_egress_is_refused() -> None:
    text = "apiVersion: v1\nkind: Namespace\nmetadata: {name: default, annotations: {meshagent.io/egress: none}}\n"
    (problem,) = (problem for item in read(text, "f") for problem in item.problems)
    assert 'must be "allow" or "deny"' in problem.message


def test_the_crd_is_where_the_others_are() -> None:
    crds = Path(__file__).parents[3] / "deploy/crds"
    content = YAML(typ="safe").load((crds / "meshagent.io_externalservices.yaml").read_text())
    assert content["spec"]["names"]["kind"] == externals.KIND


@pytest.mark.parametrize(
    ("kind", "version", "spec", "field"),
    [
        (
            "HTTPRoute",
            "gateway.networking.k8s.io/v1",
            "{parentRefs: [{group: meshagent.io, kind: ExternalService, name: api}]}",
            "spec.parentRefs[0].kind",
        ),
        (
            "TrafficPolicy",
            "meshagent.io/v1alpha1",
            "{targetRefs: [{group: '', kind: ExternalService, name: api}], limits: {maxConnections: 1}}",
            "spec.targetRefs[0].kind",
        ),
        (
            "RequestAuthentication",
            "meshagent.io/v1alpha1",
            "{targetRefs: [{group: '', kind: ExternalService, name: api}]}",
            "spec.targetRefs[0].kind",
        ),
    ],
)
def test_what_cannot_be_attached_to_the_outside_yet_says_so(kind: str, version: str, spec: str, field: str) -> None:
    text = f"kind: {kind}\napiVersion: {version}\nmetadata: {{name: x}}\nspec: {spec}\n"
    problems = {problem.field: problem.message for item in read(text, "f") for problem in item.problems}
    assert "is not supported" in problems[field]


def test_the_meshs_own_egress_is_an_option_of_the_controller(tmp_path: Path) -> None:
    (tmp_path / "workload.yaml").write_text(WORKLOAD)
    mesh = Controller(Settings(tmp_path, tmp_path / "socket", egress="deny")).mesh
    asyncio.run(mesh.start())
    assert mesh.compiled.entities["workload/default/cart-1"].workload.egress_deny
    run = CliRunner().invoke(main, ["run", "--directory", str(tmp_path), "--egress", "maybe"])
    assert "'maybe' is not one of 'allow', 'deny'" in run.output
