from __future__ import annotations

import pytest

from controller.schema import kinds, read


def messages(text: str) -> list[str]:
    return [str(problem) for checked in read(text, "f.yaml") for problem in checked.problems]


def service(spec: str) -> str:
    return f"apiVersion: v1\nkind: Service\nmetadata: {{name: cart}}\nspec: {spec}\n"


def route(rule: str) -> str:
    return (
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r}\nspec:\n  parentRefs: [{kind: Service, name: cart}]\n"
        f"  rules:\n  - {rule}\n"
    )


def policy(spec: str) -> str:
    return f"apiVersion: meshagent.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: p}}\nspec: {spec}\n"


def test_every_kind_of_the_issue_is_known() -> None:
    assert sorted(kinds()) == ["AuthorizationPolicy", "HTTPRoute", "Namespace", "Service", "Workload"]


def test_a_problem_names_file_line_object_field_and_reason() -> None:
    text = route("backendRefs:\n    - {name: a, port: 80}\n    - name: b\n      port: 80\n      weight: heavy")
    assert messages(text) == ['f.yaml:11 HTTPRoute/r spec.rules[0].backendRefs[1].weight: must be a whole number, not "heavy"']


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            "kind: Servce\nmetadata: {name: x}\n", 'f.yaml:1 Servce/x kind: unknown kind "Servce"; did you mean "Service"?', id="kind"
        ),
        pytest.param("metadata: {name: x}\n", "f.yaml:1 ?/x kind: is required", id="no kind"),
        pytest.param(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: x}\n",
            'f.yaml:1 AuthorizationPolicy/x apiVersion: must be "meshagent.io/v1alpha1" for kind AuthorizationPolicy',
            id="apiVersion",
        ),
        pytest.param(
            service("{clusterIP: 10.0.0.1, selektor: {}, ports: [{port: 80}]}"),
            'f.yaml:4 Service/cart spec.selektor: unknown field; did you mean "selector"?',
            id="unknown field",
        ),
        pytest.param(
            service("{clusterIP: 10.0.0.1, ports: [{port: 80, targetPort: http}]}"),
            'f.yaml:4 Service/cart spec.ports[0].targetPort: named ports ("http") are not supported yet: give the number',
            id="named port",
        ),
        pytest.param(
            service("{ports: [{port: 80}]}"),
            "f.yaml:4 Service/cart spec.clusterIP: is required: this source allocates no addresses; give a free address, "
            'or "None" for a headless service',
            id="no clusterIP",
        ),
        pytest.param(
            service("{clusterIP: 10.0.0.1, type: NodePort, ports: [{port: 80}]}"),
            'f.yaml:4 Service/cart spec.type: "NodePort" is not supported yet; supported: "ClusterIP"',
            id="service type",
        ),
        pytest.param(
            service("{clusterIP: 10.0.0.1, ports: [{port: 80.0}]}"),
            "f.yaml:4 Service/cart spec.ports[0].port: must be a whole number, not 80.0",
            id="fraction",
        ),
        pytest.param(
            route("{filters: [{type: RequestMirror}]}"),
            'f.yaml:7 HTTPRoute/r spec.rules[0].filters[0].type: "RequestMirror" is not supported yet; '
            'supported: "RequestHeaderModifier" or "ResponseHeaderModifier"',
            id="mirror",
        ),
        pytest.param(
            route("{timeouts: {request: 1.5s}}"),
            'f.yaml:7 HTTPRoute/r spec.rules[0].timeouts.request: "1.5s" is not a duration such as "100ms", "5s" or "1h30m" '
            "(Gateway API, GEP-2257: no fractions)",
            id="duration",
        ),
        pytest.param(
            route("{timeouts: {request: 1s, backendRequest: 2s}}"),
            "f.yaml:7 HTTPRoute/r spec.rules[0].timeouts.backendRequest: must not be longer than timeouts.request (1s)",
            id="timeouts",
        ),
        pytest.param(
            route("{matches: [{path: {type: RegularExpression, value: '/(?=a)'}}]}"),
            "f.yaml:7 HTTPRoute/r spec.rules[0].matches[0].path.value: look-around, back references and possessive quantifiers do not exist "
            "in RE2, which Envoy uses",
            id="regex",
        ),
        pytest.param(
            policy("{rules: [{from: null, to: [{operation: {ports: [80]}}]}]}"),
            "f.yaml:4 AuthorizationPolicy/p spec.rules[0].from: is empty: give a value or remove the field",
            id="an empty from would match everybody",
        ),
        pytest.param(
            policy("{rules: [{from: [{source: {principals: []}}]}]}"),
            "f.yaml:4 AuthorizationPolicy/p spec.rules[0].from[0].source.principals: must not be empty",
            id="an empty list would match everybody",
        ),
        pytest.param(
            policy("{rules: [{when: []}]}"), "f.yaml:4 AuthorizationPolicy/p spec.rules[0].when: is not supported yet: remove it", id="when"
        ),
        pytest.param(
            policy("{rules: [{from: [{source: {ipBlocks: [10.0.0.0/8]}}]}]}"),
            "f.yaml:4 AuthorizationPolicy/p spec.rules[0].from[0].source.ipBlocks: is not supported yet: remove it",
            id="ipBlocks",
        ),
        pytest.param(
            policy("{action: CUSTOM}"),
            'f.yaml:4 AuthorizationPolicy/p spec.action: "CUSTOM" is not supported yet; supported: "ALLOW" or "DENY" or "AUDIT"',
            id="custom",
        ),
        pytest.param(
            policy("{rules: [{from: [{source: {principals: ['spiffe://mesh.local/ns/a/sa/b']}}]}]}"),
            "f.yaml:4 AuthorizationPolicy/p spec.rules[0].from[0].source.principals[0]: write it without the scheme, as Istio does: "
            '"mesh.local/ns/a/sa/b"',
            id="spiffe scheme",
        ),
        pytest.param(
            policy("{rules: [{to: [{operation: {paths: ['/a*b']}}]}]}"),
            'f.yaml:4 AuthorizationPolicy/p spec.rules[0].to[0].operation.paths[0]: "/a*b": a "*" may stand only at the start or at the end',
            id="wildcard in the middle",
        ),
        pytest.param(
            policy("{rules: [{to: [{operation: {ports: ['80a']}}]}]}"),
            'f.yaml:4 AuthorizationPolicy/p spec.rules[0].to[0].operation.ports[0]: "80a" is not a port from 1 to 65535',
            id="port",
        ),
        pytest.param(
            "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: Shop\n",
            "f.yaml:4 Namespace/Shop metadata.name: must be a DNS-1123 label: lower-case letters, digits and '-', at most 63 characters",
            id="name",
        ),
        pytest.param(
            "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n  labels: {meshagent.io/mode: off}\n",
            'f.yaml:5 Namespace/shop metadata.labels[\'meshagent.io/mode\']: must be "mesh" (the default) or "none" (not enrolled), not "off"',
            id="mode",
        ),
        pytest.param(
            "apiVersion: meshagent.io/v1alpha1\nkind: Workload\nmetadata: {name: w}\nspec: {node: n, addresses: [10.0.0.1, 10.0.0.256]}\n",
            'f.yaml:4 Workload/w spec.addresses[1]: "10.0.0.256" is not an IPv4 or IPv6 address',
            id="address",
        ),
    ],
)
def test_bad_input_is_refused_with_one_clean_line(text: str, expected: str) -> None:
    assert messages(text) == [expected]


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("::ffff:10.77.1.40", "::ffff:10.77.1.40 is an IPv4 address in IPv6 spelling: write 10.77.1.40"),
        ("::ffff:0a4d:0128", "::ffff:0a4d:0128 is an IPv4 address in IPv6 spelling: write 10.77.1.40"),
        ("0.0.0.0", "0.0.0.0 is not the address of one host"),
        ("::", ":: is not the address of one host"),
        ("224.0.0.1", "224.0.0.1 is not the address of one host"),
        ("ff02::1", "ff02::1 is not the address of one host"),
        ("127.0.0.1", "127.0.0.1 is a loopback address, which means another host wherever it is used"),
        ("::1", "::1 is a loopback address, which means another host wherever it is used"),
        ("169.254.1.1", "169.254.1.1 is a link-local address, which means another host wherever it is used"),
        ("fe80::1", "fe80::1 is a link-local address, which means another host wherever it is used"),
    ],
)
def test_an_address_that_no_single_host_has_is_refused_in_every_field(address: str, reason: str) -> None:
    listed = service(f"{{clusterIPs: [10.0.0.1, '{address}'], ports: [{{port: 80}}]}}")
    single = service(f"{{clusterIP: '{address}', ports: [{{port: 80}}]}}")
    workload = f"apiVersion: meshagent.io/v1alpha1\nkind: Workload\nmetadata: {{name: w}}\nspec: {{node: n, addresses: ['{address}']}}\n"
    assert messages(listed) == [f"f.yaml:4 Service/cart spec.clusterIPs[1]: {reason}"]
    assert messages(single) == [f"f.yaml:4 Service/cart spec.clusterIP: {reason}"]
    assert messages(workload) == [f"f.yaml:4 Workload/w spec.addresses[0]: {reason}"]


def test_what_kubectl_writes_beside_the_spec_is_accepted() -> None:
    text = (
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, creationTimestamp: null, labels: , annotations: {a/b: c}, uid: u,"
        " resourceVersion: '7', generation: 3, managedFields: [{manager: kubectl}]}\nspec: {finalizers: [kubernetes]}\nstatus: {phase: Active}\n"
    )
    (checked,) = read(text, "f")
    assert checked.problems == ()
    assert checked.object is not None
    assert "status" not in checked.object.data


def test_an_invalid_object_still_says_which_object_it_is() -> None:
    (checked,) = read(policy("{action: CUSTOM}"), "f")
    assert checked.key is not None
    assert checked.key.qualified == "default/p"
