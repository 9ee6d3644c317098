from __future__ import annotations

import pytest

from controller.documents import path_text
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


def peers(spec: str) -> str:
    return f"apiVersion: meshagent.io/v1alpha1\nkind: PeerAuthentication\nmetadata: {{name: p}}\nspec: {spec}\n"


def test_every_kind_of_the_issue_is_known() -> None:
    assert sorted(kinds()) == [
        "AuthorizationPolicy",
        "CallerMatch",
        "ExternalService",
        "GRPCRoute",
        "Gateway",
        "HTTPRoute",
        "Namespace",
        "PeerAuthentication",
        "ReferenceGrant",
        "RequestAuthentication",
        "Secret",
        "Service",
        "Telemetry",
        "TrafficPolicy",
        "Workload",
    ]


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
            'f.yaml:4 Service/cart spec.ports[0].targetPort: named ports ("http") are not supported: give the number',
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
            'f.yaml:4 Service/cart spec.type: "NodePort" is not supported; supported: "ClusterIP"',
            id="service type",
        ),
        pytest.param(
            service("{clusterIP: 10.0.0.1, ports: [{port: 80.0}]}"),
            "f.yaml:4 Service/cart spec.ports[0].port: must be a whole number, not 80.0",
            id="fraction",
        ),
        pytest.param(
            route("{filters: [{type: RequestMirror}]}"),
            'f.yaml:7 HTTPRoute/r spec.rules[0].filters[0].requestMirror: is required for type "RequestMirror"',
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
        pytest.param(policy("{rules: [{when: []}]}"), "f.yaml:4 AuthorizationPolicy/p spec.rules[0].when: must not be empty", id="when"),
        pytest.param(
            policy("{rules: [{from: [{source: {remoteIpBlocks: [10.0.0.0/8]}}]}]}"),
            "f.yaml:4 AuthorizationPolicy/p spec.rules[0].from[0].source.remoteIpBlocks: is not supported: remove it",
            id="remoteIpBlocks",
        ),
        pytest.param(
            policy("{rules: [{from: [{source: {matchLabels: {app: 'web*'}}}]}]}"),
            "f.yaml:4 AuthorizationPolicy/p spec.rules[0].from[0].source.matchLabels.app: "
            '"web*" is not the value of a label: values are compared exactly, there are no wildcards',
            id="wildcard in a label",
        ),
        pytest.param(
            policy("{rules: [{from: [{source: {matchLabels: {a/b/c: web}}}]}]}"),
            "f.yaml:4 AuthorizationPolicy/p spec.rules[0].from[0].source.matchLabels['a/b/c']: is not the name of a label",
            id="label name",
        ),
        pytest.param(
            policy("{rules: [{from: [{source: {matchLabels: {}}}]}]}"),
            "f.yaml:4 AuthorizationPolicy/p spec.rules[0].from[0].source.matchLabels: must not be empty",
            id="empty labels would match everybody",
        ),
        pytest.param(
            policy("{rules: [{to: [{operation: {protocols: [udp]}}]}]}"),
            'f.yaml:4 AuthorizationPolicy/p spec.rules[0].to[0].operation.protocols[0]: must be "TCP" or "UDP", not "udp"; did you mean "UDP"?',
            id="protocol",
        ),
        pytest.param(
            policy("{rules: [{to: [{operation: {protocols: [UDP], paths: [/a], methods: [GET]}}]}]}"),
            "f.yaml:4 AuthorizationPolicy/p spec.rules[0].to[0].operation.protocols: "
            "datagrams have no requests: add TCP, or remove methods, paths",
            id="requests over UDP",
        ),
        pytest.param(
            service("{clusterIP: 10.0.0.1, trafficDistribution: PreferSameRegion, ports: [{port: 80}]}"),
            'f.yaml:4 Service/cart spec.trafficDistribution: must be "PreferSameZone" or "PreferSameNode" or "PreferClose", '
            'not "PreferSameRegion"; did you mean "PreferSameZone"?',
            id="trafficDistribution",
        ),
        pytest.param(
            service("{clusterIP: 10.0.0.1, sessionAffinity: Cookie, ports: [{port: 80}]}"),
            'f.yaml:4 Service/cart spec.sessionAffinity: must be "None" or "ClientIP", not "Cookie"',
            id="sessionAffinity",
        ),
        pytest.param(
            service("{clusterIP: 10.0.0.1, sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}, ports: [{port: 80}]}"),
            "f.yaml:4 Service/cart spec.sessionAffinityConfig: belongs to spec.sessionAffinity: ClientIP, "
            'and spec.sessionAffinity is "None" (the default)',
            id="sessionAffinityConfig alone",
        ),
        pytest.param(
            service(
                "{clusterIP: 10.0.0.1, sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 86401}}, ports: [{port: 80}]}"
            ),
            "f.yaml:4 Service/cart spec.sessionAffinityConfig.clientIP.timeoutSeconds: must be at most 86400, not 86401",
            id="longer than a day",
        ),
        pytest.param(
            service("{clusterIP: 10.0.0.1, ports: [{name: a, port: 53, protocol: UDP}, {name: b, port: 53, protocol: UDP}]}"),
            "f.yaml:4 Service/cart spec.ports[1].port: UDP port 53 is already spec.ports[0]",
            id="the same port and protocol twice",
        ),
        pytest.param(
            "apiVersion: v1\nkind: Service\nmetadata: {name: cart, annotations: {meshagent.io/load-balancing: round-robin}}\n"
            "spec: {clusterIP: 10.0.0.1, ports: [{port: 80}]}\n",
            "f.yaml:3 Service/cart metadata.annotations['meshagent.io/load-balancing']: "
            'must be "random" (the default) or "least-connections", not "round-robin"',
            id="load balancing",
        ),
        pytest.param(
            "apiVersion: v1\nkind: Service\nmetadata: {name: cart, annotations: {meshagent.io/fail-mode: fail-open}}\n"
            "spec: {clusterIP: 10.0.0.1, ports: [{port: 80}]}\n",
            "f.yaml:3 Service/cart metadata.annotations['meshagent.io/fail-mode']: "
            'must be "closed" (the default) or "open" (without a waypoint its L7 ports are served as L4), not "fail-open"',
            id="fail mode",
        ),
        pytest.param(
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {meshagent.io/default-policy: Deny}}\n",
            "f.yaml:3 Namespace/shop metadata.labels['meshagent.io/default-policy']: "
            'must be "allow" (the default) or "deny" (what no ALLOW policy allows is denied), not "Deny"',
            id="default policy",
        ),
        pytest.param(
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, annotations: {meshagent.io/default-policy: deny}}\n",
            "f.yaml:3 Namespace/shop metadata.annotations['meshagent.io/default-policy']: has no effect here: write it under metadata.labels",
            id="default policy as an annotation",
        ),
        pytest.param(
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {meshagent.io/acceleration: on}}\n",
            "f.yaml:3 Namespace/shop metadata.labels['meshagent.io/acceleration']: "
            'must be "enabled", "force" or "disabled" (the default), not "on"',
            id="acceleration",
        ),
        pytest.param(
            "apiVersion: meshagent.io/v1alpha1\nkind: Workload\nmetadata: {name: w, labels: {meshagent.io/acceleration: auto}}\n"
            "spec: {node: n, addresses: [10.0.0.1]}\n",
            "f.yaml:3 Workload/w metadata.labels['meshagent.io/acceleration']: "
            'must be "enabled", "force" or "disabled" (the default), not "auto"',
            id="acceleration of a workload",
        ),
        pytest.param(
            "apiVersion: meshagent.io/v1alpha1\nkind: Workload\nmetadata: {name: w}\nspec: {node: n, addresses: [10.0.0.1], weight: 0}\n",
            "f.yaml:4 Workload/w spec.weight: must be at least 1, not 0",
            id="weight",
        ),
        pytest.param(
            "apiVersion: meshagent.io/v1alpha1\nkind: Workload\nmetadata: {name: w}\nspec: {node: n, addresses: [10.0.0.1], zone: 'a b'}\n",
            'f.yaml:4 Workload/w spec.zone: "a b" does not match ^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$',
            id="zone",
        ),
        pytest.param(
            policy(f"{{rules: [{{to: [{{operation: {{paths: ['/{'a' * 512}']}}}}]}}]}}"),
            "f.yaml:4 AuthorizationPolicy/p spec.rules[0].to[0].operation.paths[0]: must have at most 512 characters, not 513",
            id="a path that no expression of Envoy could hold",
        ),
        pytest.param(
            policy("{action: CUSTOM}"),
            'f.yaml:4 AuthorizationPolicy/p spec.action: "CUSTOM" is not supported; supported: "ALLOW" or "DENY" or "AUDIT"',
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


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        pytest.param(text, f'"{text}" is not a CIDR block such as 10.0.0.0/8 or fd00::/8, nor a single address', id=text)
        for text in ("10.0.0.0/33", "10.0.0", "office", "*", "10.0.0.0/255.0.0.0", "10.0.0.0/0.0.0.255", "10.0.0.0/", "fe80::1%eth0")
    ]
    + [
        pytest.param("::ffff:10.0.0.0/104", "::ffff:10.0.0.0/104 are IPv4 addresses in IPv6 spelling: write 10.0.0.0/8", id="mapped"),
        pytest.param("::ffff:10.0.0.1", "::ffff:10.0.0.1 are IPv4 addresses in IPv6 spelling: write 10.0.0.1/32", id="mapped address"),
    ],
)
@pytest.mark.parametrize("field", ["ipBlocks", "notIpBlocks"])
def test_what_is_no_block_of_addresses_is_refused(field: str, block: str, reason: str) -> None:
    text = policy(f"{{rules: [{{from: [{{source: {{{field}: [10.0.0.0/8, '{block}']}}}}]}}]}}")
    assert messages(text) == [f"f.yaml:4 AuthorizationPolicy/p spec.rules[0].from[0].source.{field}[1]: {reason}"]


def test_one_port_number_may_serve_both_protocols_with_targets_of_their_own() -> None:
    ports = "[{name: tcp, port: 53, targetPort: 5353}, {name: udp, port: 53, protocol: UDP, targetPort: 5300}]"
    assert messages(service(f"{{clusterIP: 10.0.0.1, ports: {ports}}}")) == []


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


@pytest.mark.parametrize(
    "spec",
    [
        "{}",
        "{mtls: {}}",
        "{mtls: {mode: UNSET}}",
        "{selector: {matchLabels: {}}, mtls: {mode: STRICT}}",
        "{selector: {matchLabels: {app: cart}}, portLevelMtls: {8080: {mode: DISABLE}, '9090': {}}}",
        "{targetRefs: [{kind: Service, name: cart}], portLevelMtls: {65535: {mode: PERMISSIVE}}}",
    ],
)
def test_a_peer_authentication_of_istio_is_accepted_as_it_is(spec: str) -> None:
    assert messages(peers(spec)) == []


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            "{mtls: {mode: STRIKT}}",
            '.mtls.mode: must be "UNSET" or "DISABLE" or "PERMISSIVE" or "STRICT", not "STRIKT"; did you mean "STRICT"?',
        ),
        ("{mtls: }", ".mtls: is empty: give a value or remove the field"),
        ("{mtls: STRICT}", '.mtls: must be a mapping, not "STRICT"'),
        ("{mtls: {modus: STRICT}}", '.mtls.modus: unknown field; did you mean "mode"?'),
        ("{mode: STRICT}", ".mode: unknown field; known are targetRefs, selector, mtls, portLevelMtls"),
        ("{portLevelMtls: {}}", ".portLevelMtls: must not be empty"),
        (
            "{portLevelMtls: {8080: {mode: STRICT}}}",
            ".portLevelMtls: needs spec.targetRefs or labels in spec.selector: ports belong to workloads",
        ),
        (
            "{selector: {matchLabels: {}}, portLevelMtls: {8080: {mode: STRICT}}}",
            ".portLevelMtls: needs spec.targetRefs or labels in spec.selector: ports belong to workloads",
        ),
        (
            "{selector: {matchLabels: {a: b}}, portLevelMtls: {8080: {mode: OFF}}}",
            '.portLevelMtls.8080.mode: must be "UNSET" or "DISABLE" or "PERMISSIVE" or "STRICT", not "OFF"',
        ),
        ("{selector: {matchLabels: {a: b}}, portLevelMtls: {8080: {port: 1}}}", ".portLevelMtls.8080.port: unknown field; known are mode"),
        (
            "{targetRefs: [{kind: Service, name: cart}], selector: {matchLabels: {a: b}}}",
            ".selector: cannot be combined with spec.targetRefs: choose one",
        ),
        ("{targetRefs: [{kind: Gateway, name: cart}]}", '.targetRefs[0].kind: must be "Service", not "Gateway"'),
    ],
)
def test_a_peer_authentication_that_cannot_be_meant_is_refused_with_the_path_of_its_field(spec: str, expected: str) -> None:
    assert messages(peers(spec)) == [f"f.yaml:4 PeerAuthentication/p spec{expected}"]


@pytest.mark.parametrize("port", ["0", "65536", "080", "-1", "http", "٨"])
def test_a_port_of_a_peer_authentication_is_a_number_in_its_one_spelling(port: str) -> None:
    (found,) = messages(peers(f"{{selector: {{matchLabels: {{a: b}}}}, portLevelMtls: {{'{port}': {{mode: STRICT}}}}}}"))
    assert found == f"f.yaml:4 PeerAuthentication/p {path_text(('spec', 'portLevelMtls', port))}: is not a port from 1 to 65535"
