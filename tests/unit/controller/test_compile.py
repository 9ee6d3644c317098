from __future__ import annotations

import pytest

from agent.model import Action, Entity, MatchKind, Operation, Policy, PolicyRule, Route, Service, Source, Workload, decode
from controller.compile import Compiled, compile_model
from controller.objects import Key
from controller.schema import read
from controller.snapshot import Snapshot, encode

SHOP = """
apiVersion: v1
kind: Service
metadata: {name: cart}
spec: {clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{name: http, port: 80, targetPort: 8080}, {name: admin, port: 81, targetPort: 9090}]}
---
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {name: cart-1, labels: {app: cart, version: v1}}
spec: {node: n1, addresses: ["10.0.1.2", "FD00::2"], serviceAccount: cart, networkNamespace: cart-1}
---
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {name: other, labels: {app: other}}
spec: {node: n2, addresses: [10.0.2.3], ready: false}
---
"""


def compiled(text: str) -> Compiled:
    checked = read(text, "f")
    assert [problem for item in checked for problem in item.problems] == []
    return compile_model({item.object.key: item.object for item in checked if item.object})


def entity(model: Compiled, name: str) -> Entity:
    return decode(model.entities[name].SerializeToString())


def service(model: Compiled, name: str = "default/cart") -> Service:
    found = entity(model, f"service/{name}")
    assert isinstance(found, Service)
    return found


def workload(model: Compiled, name: str) -> Workload:
    found = entity(model, f"workload/{name}")
    assert isinstance(found, Workload)
    return found


def route(model: Compiled, name: str) -> Route:
    found = entity(model, f"route/{name}")
    assert isinstance(found, Route)
    return found


def reasons(text: str) -> list[tuple[bool, str]]:
    return [(port.waypoint, port.reason) for port in service(compiled(text)).ports]


def statuses(model: Compiled, kind: str, name: str) -> dict[str, tuple[bool, str]]:
    return {item.type: (item.status, item.reason) for item in model.conditions[Key(kind, "default", name)]}


def http_route(spec: str, name: str = "r") -> str:
    return f"apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {name}}}\nspec: {spec}\n---\n"


def policy(spec: str, name: str = "p") -> str:
    return f"apiVersion: meshagent.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}}}\nspec: {spec}\n---\n"


def test_a_workload_backs_the_services_that_select_it() -> None:
    model = compiled(SHOP)
    cart = workload(model, "default/cart-1")
    assert [(backing.service, dict(backing.ports)) for backing in cart.backing] == [("default/cart", {80: 8080, 81: 9090})]
    assert cart.addresses == ("10.0.1.2", "fd00::2")
    assert (cart.enrolled, cart.ready, cart.node, cart.service_account) == (True, True, "n1", "cart")
    other = workload(model, "default/other")
    assert (other.enrolled, other.ready, other.backing, other.service_account) == (False, False, (), "default")


def test_the_workloads_mode_label_wins_over_the_namespaces() -> None:
    namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: default, labels: {meshagent.io/mode: none}}\n---\n"
    assert not workload(compiled(SHOP + namespace), "default/cart-1").enrolled
    mesh = SHOP.replace("version: v1", "meshagent.io/mode: mesh")
    assert workload(compiled(mesh + namespace), "default/cart-1").enrolled
    assert not workload(compiled(SHOP.replace("version: v1", "meshagent.io/mode: none")), "default/cart-1").enrolled


def test_without_l7_features_no_port_goes_through_the_waypoint() -> None:
    assert reasons(SHOP) == [(False, "no L7 feature is used")] * 2


def test_a_route_makes_its_port_l7_and_no_other() -> None:
    only_http = http_route("{parentRefs: [{kind: Service, name: cart, port: 80}]}")
    assert reasons(SHOP + only_http) == [(True, "HTTPRoute default/r"), (False, "no L7 feature is used")]
    every_port = http_route("{parentRefs: [{kind: Service, name: cart}]}")
    assert reasons(SHOP + every_port) == [(True, "HTTPRoute default/r")] * 2


def test_a_route_for_every_port_leaves_a_port_alone_that_speaks_something_else() -> None:
    text = SHOP.replace("name: admin,", "name: admin, appProtocol: redis,") + http_route("{parentRefs: [{kind: Service, name: cart}]}")
    assert reasons(text) == [(True, "HTTPRoute default/r"), (False, "no L7 feature is used")]


def test_a_policy_with_http_rules_makes_the_ports_l7_that_it_speaks_about() -> None:
    every = policy("{selector: {matchLabels: {app: cart}}, rules: [{to: [{operation: {methods: [GET]}}]}]}")
    assert reasons(SHOP + every) == [(True, "AuthorizationPolicy default/p has HTTP rules")] * 2
    target = policy("{selector: {matchLabels: {app: cart}}, rules: [{to: [{operation: {methods: [GET], ports: ['8080']}}]}]}")
    assert reasons(SHOP + target) == [(True, "AuthorizationPolicy default/p has HTTP rules"), (False, "no L7 feature is used")]
    excluded = policy("{selector: {matchLabels: {app: cart}}, rules: [{to: [{operation: {methods: [GET], notPorts: [8080]}}]}]}")
    assert reasons(SHOP + excluded) == [(False, "no L7 feature is used"), (True, "AuthorizationPolicy default/p has HTTP rules")]
    elsewhere = policy("{selector: {matchLabels: {app: other}}, rules: [{to: [{operation: {methods: [GET]}}]}]}")
    assert reasons(SHOP + elsewhere) == [(False, "no L7 feature is used")] * 2


def test_an_l4_policy_makes_nothing_l7() -> None:
    assert reasons(SHOP + policy("{rules: [{to: [{operation: {ports: [8080]}}]}]}")) == [(False, "no L7 feature is used")] * 2


def test_the_waypoint_annotation_needs_an_http_protocol() -> None:
    annotated = SHOP.replace("metadata: {name: cart}", "metadata: {name: cart, annotations: {meshagent.io/waypoint: 'true'}}")
    annotated = annotated.replace("name: http,", "name: http, appProtocol: grpc,")
    assert reasons(annotated) == [
        (True, "annotation meshagent.io/waypoint and appProtocol grpc"),
        (False, "annotation meshagent.io/waypoint has no effect without appProtocol http, h2c or grpc"),
    ]


def test_udp_is_never_l7() -> None:
    text = SHOP.replace("name: admin,", "name: admin, protocol: UDP,") + http_route("{parentRefs: [{kind: Service, name: cart}]}")
    assert reasons(text)[1] == (False, "UDP is never L7")


def test_policies_protect_by_target_selector_or_namespace() -> None:
    text = SHOP + policy("{targetRefs: [{kind: Service, name: cart}]}", "by-target") + policy("{}", "whole")
    text += policy("{selector: {matchLabels: {version: v2}}}", "by-selector")
    model = compiled(text)
    assert workload(model, "default/cart-1").policies == ("default/by-target", "default/whole")


def test_nothing_is_enforced_for_a_workload_that_is_not_in_the_mesh_not_even_by_callers_that_are() -> None:
    http = policy("{action: DENY, rules: [{to: [{operation: {paths: [/x]}}]}]}", "http")
    tokens = http.replace("kind: AuthorizationPolicy", "kind: RequestAuthentication").split("spec:")[0]
    tokens += "spec: {jwtRules: [{issuer: https://one.example, jwksUri: https://one.example/jwks}]}\n---\n"
    inside = compiled(SHOP + policy("{}", "whole") + http + tokens)
    assert {"default/http", "default/whole"} < set(workload(inside, "default/cart-1").policies)
    assert workload(inside, "default/cart-1").authentications == ("default/http",)
    assert [port.waypoint for port in service(inside).ports] == [True, True]
    assert workload(inside, "default/other").policies == workload(inside, "default/other").authentications == ()
    left = compiled(SHOP.replace("version: v1", "meshagent.io/mode: none") + policy("{}", "whole") + http + tokens)
    assert workload(left, "default/cart-1").policies == workload(left, "default/cart-1").authentications == ()
    assert [port.waypoint for port in service(left).ports] == [False, False]


def test_a_policy_whose_target_is_missing_protects_nothing_and_says_so() -> None:
    model = compiled(SHOP + policy("{action: DENY, targetRefs: [{kind: Service, name: none}], rules: [{}]}"))
    assert workload(model, "default/cart-1").policies == ()
    assert statuses(model, "AuthorizationPolicy", "p") == {"Accepted": (True, "Accepted"), "ResolvedRefs": (False, "TargetNotFound")}


def conditions(model: Compiled, kind: str, name: str) -> list[tuple[str, str, str]]:
    found = model.conditions[Key(kind, "" if kind == "Namespace" else "default", name)]
    return [(item.type, item.reason, item.message) for item in found]


def test_a_policy_says_whom_it_selects_but_cannot_be_enforced_for() -> None:
    enforced = compiled(SHOP + policy("{selector: {matchLabels: {app: cart}}}"))
    assert conditions(enforced, "AuthorizationPolicy", "p") == [("Accepted", "Accepted", "in force")]
    hint = (
        "not in the mesh; to enroll a Pod label it, or its Namespace, meshagent.io/mode: mesh; "
        "a Workload needs spec.networkNamespace and no label meshagent.io/mode: none"
    )
    nowhere = compiled(SHOP + policy("{selector: {matchLabels: {app: other}}}"))
    assert conditions(nowhere, "AuthorizationPolicy", "p") == [
        ("Accepted", "Accepted", "valid"),
        ("Enforced", "NotEnrolled", f"nothing enforces it for default/other: {hint}"),
    ]
    partly = compiled(SHOP + policy("{}"))
    assert conditions(partly, "AuthorizationPolicy", "p") == [
        ("Accepted", "Accepted", "in force"),
        ("Enforced", "PartlyEnrolled", f"nothing enforces it for default/other: {hint}"),
    ]
    switched_off = compiled(SHOP.replace("version: v1", "meshagent.io/mode: none") + policy("{targetRefs: [{kind: Service, name: cart}]}"))
    assert conditions(switched_off, "AuthorizationPolicy", "p")[1][:2] == ("Enforced", "NotEnrolled")


def test_a_policy_that_selects_nothing_says_so() -> None:
    model = compiled(SHOP + policy("{selector: {matchLabels: {app: crat}}}"))
    assert conditions(model, "AuthorizationPolicy", "p") == [
        ("Accepted", "Accepted", "valid"),
        ("Enforced", "NothingSelected", "selects no workload of its namespace: nothing is protected"),
    ]


def test_only_the_first_of_many_workloads_are_listed() -> None:
    many = "".join(
        f"apiVersion: meshagent.io/v1alpha1\nkind: Workload\nmetadata: {{name: w{n:02}}}\nspec: {{node: n, addresses: [10.0.9.{n}]}}\n---\n"
        for n in range(1, 14)
    )
    message = conditions(compiled(many + policy("{}")), "AuthorizationPolicy", "p")[1][2]
    assert "default/w10 and 3 more: not in the mesh" in message


def test_a_policy_keeps_its_words() -> None:
    text = policy(
        "{action: DENY, rules: [{from: [{source: {serviceAccounts: [cart, shop/web], notNamespaces: [x]}}], to: [{operation: {ports: ['80', 81]}}]}]}"
    )
    found = entity(compiled(text), "policy/default/p")
    assert isinstance(found, Policy)
    assert found.action is Action.DENY
    (rule,) = found.rules
    assert rule.sources[0].service_accounts == ("default/cart", "shop/web")
    assert rule.sources[0].not_namespaces == ("x",)
    assert rule.operations[0].ports == (80, 81)


def test_a_route_is_resolved_with_gateway_api_defaults() -> None:
    model = compiled(
        SHOP
        + http_route(
            "{parentRefs: [{kind: Service, name: cart, port: 80}], hostnames: [cart.local], rules: [{name: main,"
            " matches: [{path: {value: /a}, method: GET, headers: [{name: X-A, value: b.*, type: RegularExpression}]}],"
            " backendRefs: [{name: cart, port: 80}, {name: cart, port: 81, weight: 7}],"
            " retry: {codes: [503], attempts: 3, backoff: 100ms}, timeouts: {request: 1m30s, backendRequest: 500ms},"
            " filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: a, value: b}], remove: [c]}}]}]}"
        )
    )
    found = route(model, "default/r")
    assert found.parents == (("default/cart", 80),)
    (rule,) = found.rules
    (match,) = rule.matches
    assert match.path is not None
    assert (match.path.kind, match.path.value, match.method) == (MatchKind.PREFIX, "/a", "GET")
    assert [(name, value.kind) for name, value in match.headers] == [("X-A", MatchKind.REGEX)]
    assert [(backend.port, backend.weight, backend.invalid) for backend in rule.backends] == [(80, 1, ""), (81, 7, "")]
    assert rule.retry is not None
    assert (rule.retry.attempts, rule.retry.codes, rule.retry.backoff_ms) == (3, (503,), 100)
    assert (rule.request_timeout_ms, rule.backend_request_timeout_ms) == (90_000, 500)
    assert (dict(rule.request_headers.set), rule.request_headers.remove) == ({"a": "b"}, ("c",))
    assert statuses(model, "HTTPRoute", "r") == {
        "Accepted": (True, "Accepted"),
        "ResolvedRefs": (True, "ResolvedRefs"),
        "HostnamesApplied": (False, "Ignored"),
    }
    assert found.hostnames == (), "no functionality is inferred from them (GEP-1294)"


def test_backends_that_cannot_be_resolved_answer_for_their_share() -> None:
    model = compiled(
        SHOP
        + http_route(
            "{parentRefs: [{kind: Service, name: cart}], rules: [{backendRefs: [{name: none, port: 80}, {name: cart, port: 82},"
            " {name: cart, namespace: far, port: 80}, {kind: ServiceImport, group: multicluster.x-k8s.io, name: x}]}]}"
        )
    )
    assert [backend.invalid for backend in route(model, "default/r").rules[0].backends] == [
        "there is no Service default/none",
        "Service default/cart has no TCP port 82",
        "there is no Service far/cart",
        "a backend of kind multicluster.x-k8s.io/ServiceImport is not supported",
    ]
    assert statuses(model, "HTTPRoute", "r")["ResolvedRefs"] == (False, "InvalidKind")


def test_a_route_without_a_parent_is_not_sent() -> None:
    model = compiled(SHOP + http_route("{parentRefs: [{kind: Service, name: none}]}"))
    assert "route/default/r" not in model.entities
    assert statuses(model, "HTTPRoute", "r")["Accepted"] == (False, "NoMatchingParent")


def test_the_order_of_objects_changes_no_byte() -> None:
    text = SHOP + policy("{}") + http_route("{parentRefs: [{kind: Service, name: cart}]}")
    documents = [document for document in text.split("---\n") if document.strip()]
    forwards, backwards = compiled("---\n".join(documents)), compiled("---\n".join(reversed(documents)))
    one, other = encode(forwards.entities, Snapshot(), 1), encode(backwards.entities, Snapshot(), 2)
    assert one.version == other.version
    assert dict(one.versions) == dict(other.versions)


DNS = """
apiVersion: v1
kind: Service
metadata: {name: dns}
spec:
  clusterIP: 10.96.0.10
  selector: {app: dns}
  ports: [{name: tcp, port: 53, targetPort: 5353}, {name: udp, port: 53, protocol: UDP, targetPort: 5300}, {name: log, port: 514, protocol: UDP}]
---
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {name: dns-1, labels: {app: dns}}
spec: {node: n1, addresses: [10.0.1.9], networkNamespace: dns-1}
---
"""


def test_each_protocol_of_a_port_has_its_own_target() -> None:
    model = compiled(DNS)
    (backing,) = workload(model, "default/dns-1").backing
    assert (dict(backing.ports), dict(backing.udp)) == ({53: 5353}, {53: 5300, 514: 514})
    assert [(port.port, port.protocol) for port in service(model, "default/dns").ports] == [(53, "TCP"), (53, "UDP"), (514, "UDP")]


def balanced(spec: str = "", annotation: str = "") -> Service:
    text = SHOP.replace("spec: {clusterIP: 10.96.0.1,", f"spec: {{clusterIP: 10.96.0.1, {spec}")
    annotations = f", annotations: {{meshagent.io/load-balancing: {annotation}}}" if annotation else ""
    return service(compiled(text.replace("metadata: {name: cart}", f"metadata: {{name: cart{annotations}}}")))


def test_the_old_name_of_a_traffic_distribution_means_the_zone() -> None:
    assert balanced().traffic_distribution == ""
    assert balanced("trafficDistribution: PreferSameNode,").traffic_distribution == "PreferSameNode"
    assert balanced("trafficDistribution: PreferSameZone,").traffic_distribution == "PreferSameZone"
    assert balanced("trafficDistribution: PreferClose,").traffic_distribution == "PreferSameZone"


@pytest.mark.parametrize(
    ("port", "spoken", "level"),
    [
        pytest.param("{name: http, port: 80}", "", True, id="a-name-of-any-version"),
        pytest.param("{name: grpc-main, port: 80}", "grpc", True, id="the-first-part-of-a-name"),
        pytest.param("{name: grpc-web-x, port: 80}", "grpc-web", True, id="a-longer-protocol"),
        pytest.param("{name: httpfoo, port: 80}", "", True, id="a-word-that-begins-like-one"),
        pytest.param("{name: redis-main, port: 80}", "redis", False, id="what-is-not-http"),
        pytest.param("{name: https, port: 80}", "https", False, id="tls-of-the-application"),
        pytest.param("{name: redis, port: 80, appProtocol: http}", "http", True, id="appprotocol-wins"),
        pytest.param("{port: 80}", "", True, id="nothing"),
    ],
)
def test_a_port_says_what_it_speaks_by_appprotocol_or_by_its_name(port: str, spoken: str, level: bool) -> None:
    """And a route for every port makes L7 of what is HTTP or not known."""
    text = (
        f"apiVersion: v1\nkind: Service\nmetadata: {{name: cart}}\nspec: {{clusterIP: 10.96.0.1, ports: [{port}]}}\n---\n"
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r}\n"
        "spec: {parentRefs: [{group: '', kind: Service, name: cart}], rules: [{backendRefs: [{name: cart, port: 80}]}]}\n"
    )
    (found,) = service(compiled(text)).ports
    assert (found.app_protocol, found.waypoint) == (spoken, level)


def test_the_fail_mode_is_closed_unless_it_is_open() -> None:
    for mode, fails_open in (("", False), ("closed", False), ("open", True)):
        text = SHOP.replace(
            "metadata: {name: cart}",
            f"metadata: {{name: cart, annotations: {{meshagent.io/fail-mode: {mode}}}}}" if mode else "metadata: {name: cart}",
        )
        assert service(compiled(text)).fail_open is fails_open


def test_session_affinity_lasts_three_hours_unless_it_says_how_long() -> None:
    assert balanced().affinity_s == balanced("sessionAffinity: None,").affinity_s == 0
    assert balanced("sessionAffinity: ClientIP,").affinity_s == 10800
    assert balanced("sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {}},").affinity_s == 10800
    assert balanced("sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}},").affinity_s == 60


def test_load_balancing_is_random_unless_annotated() -> None:
    assert balanced().load_balancing == balanced(annotation="random").load_balancing == ""
    assert balanced(annotation="least-connections").load_balancing == "least-connections"


def test_a_service_says_which_wishes_do_not_reach_its_l7_ports() -> None:
    text = SHOP.replace("spec: {clusterIP", "spec: {sessionAffinity: ClientIP, clusterIP")
    text = text.replace("metadata: {name: cart}", "metadata: {name: cart, annotations: {meshagent.io/load-balancing: least-connections}}")
    assert [item[0] for item in conditions(compiled(text), "Service", "cart")] == ["Accepted"]
    model = compiled(text + http_route("{parentRefs: [{kind: Service, name: cart, port: 81}]}"))
    assert conditions(model, "Service", "cart")[1] == (
        "BalancedAsWished",
        "BalancedByRequest",
        (
            "spec.sessionAffinity and annotation meshagent.io/load-balancing hold for connections; "
            "ports that are L7 are balanced by request, to the less busy endpoint: 81"
        ),
    )


def test_a_workload_has_weight_and_zone() -> None:
    plain = workload(compiled(SHOP), "default/cart-1")
    assert (plain.weight, plain.zone) == (1, "")
    weighted = SHOP.replace("serviceAccount: cart,", "serviceAccount: cart, weight: 100000, zone: z1,")
    assert (workload(compiled(weighted), "default/cart-1").weight, workload(compiled(weighted), "default/cart-1").zone) == (100000, "z1")


def test_the_zone_label_is_used_where_the_spec_names_no_zone() -> None:
    labelled = SHOP.replace("version: v1", "topology.kubernetes.io/zone: z2")
    assert workload(compiled(labelled), "default/cart-1").zone == "z2"
    assert workload(compiled(labelled.replace("serviceAccount: cart,", "zone: z1,")), "default/cart-1").zone == "z1"


def namespace(labels: str) -> str:
    return f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: default, labels: {{{labels}}}}}\n---\n"


def test_the_workloads_acceleration_label_wins_over_the_namespaces() -> None:
    def found(own: str, inherited: str) -> str:
        text = SHOP.replace("version: v1", f"meshagent.io/acceleration: {own}" if own else "version: v1")
        return workload(
            compiled(text + (namespace(f"meshagent.io/acceleration: {inherited}") if inherited else "")), "default/cart-1"
        ).acceleration

    assert [found("", ""), found("enabled", ""), found("force", "")] == ["", "enabled", "force"]
    assert [found("", "force"), found("disabled", "force"), found("enabled", "disabled")] == ["force", "", "enabled"]


def test_a_namespace_that_denies_by_default_protects_every_enrolled_workload_of_it() -> None:
    deny = namespace("meshagent.io/default-policy: deny")
    model = compiled(SHOP + deny + policy("{action: DENY, rules: [{}], selector: {matchLabels: {app: cart}}}"))
    assert workload(model, "default/cart-1").policies == ("default/(default-deny)", "default/p")
    assert workload(model, "default/other").policies == (), "not enrolled"
    found = entity(model, "policy/default/(default-deny)")
    assert found == Policy("default/(default-deny)", Action.ALLOW), "an ALLOW policy without rules"
    for text in (SHOP, SHOP + namespace("meshagent.io/default-policy: allow")):
        assert "policy/default/(default-deny)" not in compiled(text).entities
        assert workload(compiled(text), "default/cart-1").policies == ()


def test_the_policy_that_denies_by_default_is_nobodys_object() -> None:
    model = compiled(SHOP + namespace("meshagent.io/default-policy: deny"))
    assert not [key for key in model.conditions if "(" in key.name]
    assert [problem.field for item in read(policy("{}", "(default-deny)"), "f") for problem in item.problems] == ["metadata.name"]


def test_blocks_have_one_spelling_and_labels_and_protocols_arrive() -> None:
    text = policy(
        "{rules: [{from: [{source: {ipBlocks: [10.1.2.3/8, 192.0.2.7, 'FD00::1/32', 10.0.0.0/8], notIpBlocks: [10.1.0.0/16], "
        "matchLabels: {tier: front, app: web}}}], to: [{operation: {protocols: [UDP], ports: [53]}}]}]}"
    )
    found = entity(compiled(text), "policy/default/p")
    assert isinstance(found, Policy)
    source = Source(
        ip_blocks=("10.0.0.0/8", "192.0.2.7/32", "fd00::/32"), not_ip_blocks=("10.1.0.0/16",), labels=(("app", "web"), ("tier", "front"))
    )
    assert found.rules == (PolicyRule((source,), (Operation(ports=(53,), protocols=("UDP",)),)),)


def test_an_audit_policy_makes_a_port_l7_only_for_its_http_rules() -> None:
    assert (
        reasons(SHOP + policy("{action: AUDIT, rules: [{from: [{source: {namespaces: [x]}}]}]}")) == [(False, "no L7 feature is used")] * 2
    )
    l7 = policy("{action: AUDIT, rules: [{to: [{operation: {methods: [GET], ports: [8080]}}]}]}")
    assert reasons(SHOP + l7) == [(True, "AuthorizationPolicy default/p has HTTP rules"), (False, "no L7 feature is used")]
