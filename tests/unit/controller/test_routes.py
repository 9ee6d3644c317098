"""What HTTPRoute, GRPCRoute and CallerMatch become, which conditions they have, and what of them is refused, with the field named."""

from __future__ import annotations

import time

import pytest

from agent.model import MatchKind, Route, RouteRule, decode
from agent.routing import Mirror, Redirect, Rewrite, Session
from controller import regexes
from controller.compile import Compiled, compile_model
from controller.objects import Key
from controller.routes import MOST_MATCHES
from controller.schema import read
from tests.unit.controller.test_compile import compiled, service

SHOP = """
apiVersion: v1
kind: Service
metadata: {name: cart}
spec:
  clusterIP: 10.96.0.1
  selector: {app: cart}
  ports: [{name: http, port: 80, appProtocol: http}, {name: admin, port: 81}, {name: redis, port: 82, appProtocol: redis}]
---
apiVersion: v1
kind: Service
metadata: {name: far, namespace: other}
spec: {clusterIP: 10.96.0.2, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: headless}
spec: {clusterIP: None, ports: [{port: 80}]}
---
"""


def document(spec: str, kind: str = "HTTPRoute", name: str = "r", namespace: str = "default", created: str = "") -> str:
    extra = f", creationTimestamp: '{created}'" if created else ""
    group = "meshagent.io/v1alpha1" if kind == "CallerMatch" else "gateway.networking.k8s.io/v1"
    return f"apiVersion: {group}\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}{extra}}}\nspec: {spec}\n---\n"


def rules(text: str, kind: str = "HTTPRoute", parent: str = "name: cart", **more: str) -> str:
    return document(f"{{parentRefs: [{{kind: Service, {parent}}}], rules: [{text}]}}", kind, **more)


def rule(text: str, kind: str = "HTTPRoute") -> RouteRule:
    found = found_route(compiled(SHOP + rules(text, kind)), "default/r" if kind == "HTTPRoute" else "default/r:grpc")
    return found.rules[0]


def found_route(model: Compiled, name: str) -> Route:
    found = decode(model.entities[f"route/{name}"].SerializeToString())
    assert isinstance(found, Route)
    return found


def conditions(model: Compiled, name: str = "r", kind: str = "HTTPRoute", namespace: str = "default") -> dict[str, tuple[bool, str, str]]:
    return {item.type: (item.status, item.reason, item.message) for item in model.conditions[Key(kind, namespace, name)]}


def refusals(text: str) -> list[str]:
    return [f"{problem.field}: {problem.message}" for checked in read(text, "f") for problem in checked.problems]


def test_filters_keep_their_words() -> None:
    redirect = rule(
        "{filters: [{type: RequestRedirect, requestRedirect: {scheme: https, hostname: a.b, port: 8443, statusCode: 308,"
        " path: {type: ReplaceFullPath, replaceFullPath: /x}}}]}"
    )
    assert redirect.redirect == Redirect("https", "a.b", 8443, "/x", None, 308)
    assert rule("{filters: [{type: RequestRedirect, requestRedirect: {}}]}").redirect == Redirect()
    rewrite = rule("{filters: [{type: URLRewrite, urlRewrite: {hostname: a.b, path: {type: ReplacePrefixMatch, replacePrefixMatch: ''}}}]}")
    assert rewrite.rewrite == Rewrite("a.b", None, "")
    backend = rule("{backendRefs: [{name: cart, port: 80, filters: [{type: URLRewrite, urlRewrite: {hostname: a.b}}]}]}").backends[0]
    assert backend.hostname == "a.b"


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        ("", (100, 100)),
        ("percent: 7", (7, 100)),
        ("percent: 0", (0, 100)),
        ("fraction: {numerator: 1}", (1, 100)),
        ("fraction: {numerator: 1, denominator: 8}", (1250, 10_000)),
        ("fraction: {numerator: 1, denominator: 3}", (333_333, 1_000_000)),
        ("fraction: {numerator: 2147483647, denominator: 2147483647}", (100, 100)),
    ],
)
def test_the_share_of_a_mirror_is_exact_or_rounded_to_a_millionth(share: str, expected: tuple[int, int]) -> None:
    text = f"{{filters: [{{type: RequestMirror, requestMirror: {{backendRef: {{name: cart, port: 80}}, {share}}}}}]}}"
    assert rule(text).mirrors == (Mirror("default/cart", 80, *expected),)


def test_cors_says_what_browsers_understand() -> None:
    cors = rule(
        "{filters: [{type: CORS, cors: {allowOrigins: ['https://a.b:443', 'http://*.c.d:8080', 'https://*'], allowMethods: ['*'], allowHeaders: [X-A, x-b],"
        " allowCredentials: true}}]}"
    ).cors
    assert cors is not None
    assert cors.origins == ((False, "https://a.b"), (True, r"http://[^:/]+\.c\.d:8080"), (True, "https://[^:/]+"))
    assert cors.methods == "GET, HEAD, POST, PUT, DELETE, CONNECT, OPTIONS, TRACE, PATCH", "with credentials * is only a name"
    assert (cors.headers, cors.max_age_s, cors.credentials) == ("X-A, x-b", 5, True)
    anybody = rule("{filters: [{type: CORS, cors: {allowOrigins: ['*'], allowMethods: ['*'], allowHeaders: ['*']}}]}").cors
    assert anybody is not None
    assert (anybody.origins, anybody.methods, anybody.headers) == (((True, ".*"),), "*", "*")


def test_sessions_have_a_cookie_of_their_own_unless_named() -> None:
    first, second = (
        rule(f"{{name: {name}, sessionPersistence: {{cookie: {{path: /x}}}}, backendRefs: [{{name: cart, port: 80}}]}}").session
        for name in "ab"
    )
    assert first is not None
    assert second is not None
    assert first.cookie.startswith("meshagent-")
    assert first.cookie != second.cookie
    assert (first.path, first.lifetime_ms, first.header) == ("/x", 0, "")
    lasting = rule("{sessionPersistence: {absoluteTimeout: 1h, cookie: {name: c, lifetimeType: Permanent}}}")
    assert lasting.session == Session("c", "/", 3_600_000, "")
    assert rule("{sessionPersistence: {type: Header, header: {name: x-s}}}").session == Session("", "", 0, "x-s")


def test_grpc_matches_are_resolved() -> None:
    first, second = rule(
        "{matches: [{method: {service: a.B, method: C}}, {method: {type: RegularExpression, method: 'G.*'}, headers: [{name: x, value: y}]}]}",
        "GRPCRoute",
    ).matches
    assert first.grpc is not None
    assert first.grpc.service is not None
    assert (first.grpc.service.kind, first.grpc.service.value) == (MatchKind.EXACT, "a.B")
    assert second.grpc is not None
    assert second.grpc.service is None
    assert second.grpc.method is not None
    assert (second.grpc.method.kind, [name for name, _ in second.headers]) == (MatchKind.REGEX, ["x"])


def test_a_port_that_says_nothing_speaks_grpc_if_a_grpc_route_of_its_namespace_says_so() -> None:
    model = compiled(SHOP + rules("{backendRefs: [{name: far, namespace: other, port: 80}]}", "GRPCRoute", "name: cart, port: 81"))
    assert [port.app_protocol for port in service(model).ports] == ["http", "grpc", "redis"]
    assert service(model).ports[1].reason == "GRPCRoute default/r"
    assert [port.app_protocol for port in service(model, "other/far").ports] == [""], "no other namespace says what it speaks"
    said = conditions(model, kind="GRPCRoute")["ResolvedRefs"]
    assert said[:2] == (False, "UnsupportedProtocol")
    assert said[2].startswith(
        "Service other/far port 80 does not say that it speaks gRPC (appProtocol), and a route of another namespace cannot"
    )
    own = compiled(SHOP + rules("{backendRefs: [{name: cart, port: 81}]}", "GRPCRoute"))
    assert [port.app_protocol for port in service(own).ports] == ["http", "grpc", "redis"]


def test_an_http_and_a_grpc_route_may_have_one_name() -> None:
    model = compiled(SHOP + rules("{}", parent="name: cart, port: 80") + rules("{}", "GRPCRoute", "name: cart, port: 81"))
    assert {"route/default/r", "route/default/r:grpc"} <= set(model.entities)
    assert (found_route(model, "default/r").grpc, found_route(model, "default/r:grpc").grpc) == (False, True)


def test_a_grpc_route_wins_a_port_and_the_http_route_keeps_the_others() -> None:
    model = compiled(SHOP + rules("{}", created="2020-01-01T00:00:00Z") + rules("{}", "GRPCRoute", "name: cart, port: 81", name="g"))
    assert found_route(model, "default/r").parents == (("default/cart", 80), ("default/cart", 82))
    said = conditions(model)
    assert said["Accepted"][0] is True
    assert said["ParentsResolved"] == (
        False,
        "Conflicted",
        "GRPCRoute default/g holds for default/cart:81: a GRPCRoute wins against an HTTPRoute (GEP-1294)",
    )
    lost = compiled(SHOP + rules("{}", parent="name: cart, port: 81") + rules("{}", "GRPCRoute", "name: cart, port: 81", name="g"))
    assert conditions(lost)["Accepted"][:2] == (False, "Conflicted")
    assert "route/default/r" not in lost.entities


@pytest.mark.parametrize(
    ("parent", "expected"),
    [
        ("name: cart", (("default/cart", 0),)),
        ("name: cart, port: 81", (("default/cart", 81),)),
        ("name: cart, sectionName: admin", (("default/cart", 81),)),
        ("name: cart, sectionName: admin, port: 81", (("default/cart", 81),)),
    ],
)
def test_a_parent_is_a_service_a_port_or_a_named_port(parent: str, expected: tuple[tuple[str, int], ...]) -> None:
    assert found_route(compiled(SHOP + rules("{}", parent=parent)), "default/r").parents == expected


@pytest.mark.parametrize(
    ("parent", "message"),
    [
        ("name: cart, port: 99", "Service default/cart has no TCP port 99"),
        ("name: cart, sectionName: grpc", "Service default/cart has no TCP port with the name grpc"),
        ("name: cart, sectionName: admin, port: 80", "Service default/cart has no TCP port 80 with the name admin"),
        ("name: headless", "Service default/headless is headless: without an address of its own nothing is sent to it"),
        ("name: cart, namespace: nowhere", "there is no Service nowhere/cart"),
    ],
)
def test_a_parent_that_is_not_there_is_named(parent: str, message: str) -> None:
    assert conditions(compiled(SHOP + rules("{}", parent=parent)))["Accepted"] == (False, "NoMatchingParent", message)


def test_a_consumer_route_holds_where_http_is_spoken_anyway_and_changes_no_other_port() -> None:
    model = compiled(SHOP + rules("{}", parent="name: cart, namespace: default", namespace="other"))
    found = found_route(model, "other/r")
    assert found.parents == (("default/cart", 80),)
    assert found.consumes("default/cart")
    assert [port.waypoint for port in service(model).ports] == [True, False, False], "others may speak what they want there"
    message = conditions(model, namespace="other")["ParentsResolved"][2]
    assert "default/cart:81 is not declared to speak HTTP, and a route of another namespace cannot make it" in message
    produced = compiled(
        SHOP
        + rules("{}", parent="name: cart, port: 81")
        + rules("{}", parent="name: cart, namespace: default, port: 81", namespace="other")
    )
    assert found_route(produced, "other/r").parents == (("default/cart", 81),)


def test_a_backend_in_another_namespace_needs_no_grant_in_a_mesh() -> None:
    model = compiled(SHOP + rules("{backendRefs: [{name: far, namespace: other, port: 80}]}"))
    assert conditions(model)["ResolvedRefs"] == (True, "ResolvedRefs", "every backend is known")


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        (
            "{backendRefs: [{name: gone, port: 80}]}",
            "HTTPRoute",
            ("BackendNotFound", "there is no Service default/gone: its share of requests answers 500"),
        ),
        (
            "{backendRefs: [{name: cart, port: 82}]}",
            "HTTPRoute",
            (
                "UnsupportedProtocol",
                "Service default/cart port 82 speaks redis (appProtocol), which is not HTTP: its share of requests answers 500",
            ),
        ),
        (
            "{backendRefs: [{name: cart, port: 80}]}",
            "GRPCRoute",
            (
                "UnsupportedProtocol",
                "Service default/cart port 80 speaks http (appProtocol), which is not gRPC: its share of requests answers UNAVAILABLE",
            ),
        ),
        (
            "{filters: [{type: RequestMirror, requestMirror: {backendRef: {name: gone, port: 80}}}]}",
            "HTTPRoute",
            ("BackendNotFound", "mirror: there is no Service default/gone: nothing is mirrored there"),
        ),
        (
            "{filters: [{type: ExtensionRef, extensionRef: {group: meshagent.io, kind: CallerMatch, name: gone}}]}",
            "HTTPRoute",
            ("BackendNotFound", "there is no CallerMatch default/gone: what its rule matches answers 500"),
        ),
        (
            "{filters: [{type: ExtensionRef, extensionRef: {group: example.com, kind: Magic, name: x}}]}",
            "GRPCRoute",
            ("InvalidKind", "a filter of kind example.com/Magic is not supported: what its rule matches answers 500"),
        ),
    ],
)
def test_a_reference_that_leads_nowhere_says_where_and_what_it_costs(text: str, kind: str, expected: tuple[str, str]) -> None:
    assert conditions(compiled(SHOP + rules(text, kind)), kind=kind)["ResolvedRefs"] == (False, *expected)


def test_a_caller_match_becomes_a_condition_of_the_rule() -> None:
    text = SHOP + document(
        "{from: [{source: {serviceAccounts: [web], matchLabels: {version: v2}}}, {source: {namespaces: [x]}}]}", "CallerMatch", "c"
    )
    model = compiled(text + rules("{filters: [{type: ExtensionRef, extensionRef: {group: meshagent.io, kind: CallerMatch, name: c}}]}"))
    ((first, second),) = found_route(model, "default/r").rules[0].callers
    assert (first.service_accounts, first.labels, second.namespaces) == (("default/web",), (("version", "v2"),), ("x",))
    assert conditions(model, "c", "CallerMatch")["Accepted"][:2] == (True, "Accepted")


PREFIX = "path: {type: ReplacePrefixMatch, replacePrefixMatch: /x}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{filters: [{type: RequestRedirect, requestRedirect: {}}], backendRefs: [{name: cart, port: 80}]}",
         "filters[0]: a redirect answers by itself: remove it or rules[].backendRefs"),
        ("{filters: [{type: RequestRedirect, requestRedirect: {}}, {type: URLRewrite, urlRewrite: {}}]}",
         "filters: RequestRedirect and URLRewrite exclude each other"),
        ("{filters: [{type: RequestRedirect, requestRedirect: {statusCode: 304}}]}",
         "filters[0].requestRedirect.statusCode: must be 301 or 302 or 303 or 307 or 308, not 304"),
        ("{filters: [{type: RequestRedirect, requestRedirect: {scheme: ftp}}]}",
         'filters[0].requestRedirect.scheme: must be "http" or "https", not "ftp"'),
        ("{filters: [{type: RequestRedirect, requestRedirect: {hostname: '*.a'}}]}", "filters[0].requestRedirect.hostname: "),
        ("{filters: [{type: CORS, cors: {}}, {type: CORS, cors: {}}]}", 'filters[1].type: "CORS" may be there only once'),
        ("{filters: [{type: CORS, cors: {}, urlRewrite: {}}]}", 'filters[0].urlRewrite: does not belong to type "CORS"'),
        ("{filters: [{type: URLRewrite}]}", 'filters[0].urlRewrite: is required for type "URLRewrite"'),
        ("{filters: [{type: CORS, cors: {}, externalAuth: {}}]}", "filters[0].externalAuth: is not supported: remove it"),
        (f"{{matches: [{{path: {{value: /a}}}}, {{path: {{value: /b}}}}], filters: [{{type: URLRewrite, urlRewrite: {{{PREFIX}}}}}]}}",
         "filters[0].urlRewrite.path.replacePrefixMatch: needs exactly one entry in the rule's matches, with a path of type PathPrefix"),
        (f"{{matches: [{{path: {{type: Exact, value: /a}}}}], filters: [{{type: RequestRedirect, requestRedirect: {{{PREFIX}}}}}]}}",
         "filters[0].requestRedirect.path.replacePrefixMatch: needs exactly one entry in the rule's matches, with a path of type PathPrefix"),
        ("{filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath}}}]}",
         'filters[0].urlRewrite.path.replaceFullPath: is required for type "ReplaceFullPath"'),
        ("{filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: '/a?b'}}}]}",
         'filters[0].urlRewrite.path.replaceFullPath: must start with "/" and hold what a path may hold (no "?", "#", blanks), not "/a?b"'),
        ("{filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: '/a\\\\1'}}}]}",
         "filters[0].urlRewrite.path.replaceFullPath: must start"),
        ("{filters: [{type: RequestMirror, requestMirror: {backendRef: {name: cart, port: 80}, percent: 5, fraction: {numerator: 1}}}]}",
         "filters[0].requestMirror.fraction: cannot be combined with percent: choose one"),
        ("{filters: [{type: RequestMirror, requestMirror: {backendRef: {name: cart, port: 80}, fraction: {numerator: 5, denominator: 4}}}]}",
         "filters[0].requestMirror.fraction.numerator: must be at most the denominator (4)"),
        ("{filters: [{type: RequestMirror, requestMirror: {backendRef: {name: cart}}}]}",
         "filters[0].requestMirror.backendRef.port: is required for a Service"),
        ("{filters: [{type: CORS, cors: {allowOrigins: ['*', 'https://a.b']}}]}",
         'filters[0].cors.allowOrigins: "*" means all: it must stand alone'),
        ("{filters: [{type: CORS, cors: {allowOrigins: ['https://a.b:99999']}}]}",
         "filters[0].cors.allowOrigins[0]: 99999 is not a port from 1 to 65535"),
        ("{filters: [{type: CORS, cors: {allowHeaders: ['*'], allowCredentials: true}}]}",
         'filters[0].cors.allowHeaders: with allowCredentials "*" is only a name: list the headers'),
        ("{backendRefs: [{name: cart, port: 80, filters: [{type: CORS, cors: {}}]}]}",
         'backendRefs[0].filters[0].type: "CORS" is not supported for one backend: write it under rules[].filters'),
        (f"{{backendRefs: [{{name: cart, port: 80, filters: [{{type: URLRewrite, urlRewrite: {{{PREFIX}}}}}]}}]}}",
         "backendRefs[0].filters[0].urlRewrite.path: is not supported for one backend: write it under rules[].filters"),
        ("{sessionPersistence: {type: Header}}", 'sessionPersistence.header: is required for type "Header"'),
        ("{sessionPersistence: {header: {name: x}}}", 'sessionPersistence.header: does not belong to type "Cookie"'),
        ("{sessionPersistence: {absoluteTimeout: 1h}}",
         'sessionPersistence.absoluteTimeout: is supported for cookies of lifetimeType "Permanent" only'),
        ("{sessionPersistence: {cookie: {lifetimeType: Permanent}}}",
         'sessionPersistence.absoluteTimeout: is required for cookies of lifetimeType "Permanent"'),
        ("{sessionPersistence: {cookie: {path: '/; Domain=x'}}}", 'sessionPersistence.cookie.path: must start with "/" and hold no blanks and no ";"'),
        ("{sessionPersistence: {type: Header, header: {name: X-Meshagent-Session}}}",
         'sessionPersistence.header.name: "X-Meshagent-Session" never arrives: the waypoint removes it from every request'),
        ("{matches: [{headers: [{name: a, value: b}]}, {headers: [{name: a, value: b}, {name: X-Envoy-Internal, value: 'true'}]}]}",
         'matches[1].headers[1].name: "X-Envoy-Internal" never arrives: the waypoint removes it from every request'),
        ("{matches: [{path: {type: RegularExpression, value: '(a{1000}){1000}'}}]}",
         "matches[0].path.value: repeats more than 1000 times (1000000), which RE2 refuses"),
    ],
)  # fmt: skip
def test_what_a_rule_cannot_mean_is_refused_with_the_field_named(text: str, expected: str) -> None:
    (found,) = refusals(rules(text))
    assert found.startswith(f"spec.rules[0].{expected}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{matches: [{method: {}}]}", "matches[0].method: one or both of service and method are required"),
        ("{matches: [{method: {service: a/b}}]}", 'matches[0].method.service: "a/b" is not the name of a gRPC service'),
        ("{matches: [{method: {method: a.b}}]}", 'matches[0].method.method: "a.b" is not the name of a gRPC method'),
        ("{matches: [{method: {type: RegularExpression, method: '('}}]}", "matches[0].method.method: not a regular expression"),
        ("{matches: [{path: {value: /}}]}", "matches[0].path: unknown field"),
        (
            "{matches: [{method: {type: RegularExpression, service: '.{500}', method: '.{400}'}}]}",
            "matches[0].method: service and method together: too large",
        ),
        (
            "{matches: [{headers: [{name: x-meshagent-a, value: b}]}]}",
            'matches[0].headers[0].name: "x-meshagent-a" never arrives: the waypoint removes it from every request',
        ),
        ("{filters: [{type: URLRewrite}]}", "filters[0].type: must be"),
        ("{retry: {}}", "retry: unknown field"),
    ],
)
def test_what_a_grpc_rule_cannot_mean_is_refused_with_the_field_named(text: str, expected: str) -> None:
    (found,) = refusals(rules(text, "GRPCRoute"))
    assert found.startswith(f"spec.rules[0].{expected}")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("{}", "spec: must not be empty"),
        ("{from: []}", "spec.from: must not be empty"),
        ("{from: [{source: {}}]}", "spec.from[0].source: must not be empty"),
        ("{from: [{source: {serviceAccounts: ['a*']}}]}", "spec.from[0].source.serviceAccounts[0]: "),
        ("{from: [{source: {principals: ['spiffe://a/ns/b/sa/c']}}]}", "spec.from[0].source.principals[0]: write it without the scheme"),
    ],
)
def test_a_caller_match_that_means_nothing_is_refused(spec: str, expected: str) -> None:
    (found,) = refusals(document(spec, "CallerMatch"))
    assert found.startswith(expected)


def test_ten_thousand_rules_in_one_route_are_refused_at_once() -> None:
    started = time.monotonic()
    (found,) = refusals(rules(", ".join(["{}"] * 10_000)))
    assert found == "spec.rules: must have at most 16 items, not 10000"
    assert time.monotonic() - started < 30
    match = ", ".join(f"{{path: {{value: /{n}}}}}" for n in range(64))
    (found,) = refusals(rules(", ".join([f"{{matches: [{match}]}}"] * 3)))
    assert found == "spec.rules[2].matches: all rules of a route together may have at most 128 matches: divide it into several routes"


def test_the_youngest_routes_of_a_service_are_refused_when_there_are_too_many_and_the_others_hold() -> None:
    checked = read(SHOP + rules(", ".join(["{matches: [" + ", ".join(["{}"] * 8) + "]}"] * 16)), "f")
    objects = {item.object.key: item.object for item in checked if item.object}
    template = objects.pop(Key("HTTPRoute", "default", "r"))
    routes = [type(template)(Key("HTTPRoute", "default", f"r{n:04}"), template.data, "f", 1) for n in range(MOST_MATCHES // 128 + 3)]
    routes.reverse()
    model = compile_model({**objects, **{route.key: route for route in routes}})
    accepted = {route.key.name for route in routes if f"route/{route.key.qualified}" in model.entities}
    assert accepted == {f"r{n:04}" for n in range(MOST_MATCHES // 128)}
    status = conditions(model, f"r{MOST_MATCHES // 128:04}")["Accepted"]
    assert status[:2] == (False, "UnsupportedValue")
    assert "matches of older routes; at most 10000 are allowed" in status[2]


@pytest.mark.parametrize(
    "text",
    [
        *("/a.*", "[a-z]{1,63}", "(?i)a|b", r"\d+\.\w+", "(?P<x>a)+", "a{1000}", "[]a]", r"[^\]]*", "", r"\x41", "(a|b{2}){3,}"),
        *("[*+.]+", "[*+]a", r"a\++", r"[\]*+]+", "a}+", r"a\}+", "[(?=]", r"[(?#\w]*", "[[:alpha:][:^space:]]+", r"[\\b]", "a{,3}+"),
    ],
)
def test_ordinary_expressions_pass(text: str) -> None:
    assert regexes.problem(text) == ""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("(", "not a regular expression"),
        ("(?=a)", "look-around"),
        *((text, "possessive") for text in ("a*+", "a++", "a?+", "a{2}+", "a{2,}+", "[*+.]*+", r"\*++", "(a)?+", r"\x41++", "(?>a)")),
        (r"[\b]", r"\b does not exist within []"),
        ("[[:foo:]]", "[:foo:] does not exist within []"),
        (r"(a)\1", "back references"),
        (r"a\Z", r"\Z does not exist"),
        (r"\u0041", r"\u does not exist"),
        ("a{1001}", "repeats more than 1000 times (1001)"),
        ("((a{10}){10}){11}", "repeats more than 1000 times (1100)"),
        ("(.{100}){10}" * 2, "too large"),
        ("(" * 500 + "a" + ")" * 500, "not a regular expression"),
    ],
)
def test_expressions_that_envoy_would_refuse_or_choke_on_are_refused(text: str, why: str) -> None:
    assert why in regexes.problem(text)
