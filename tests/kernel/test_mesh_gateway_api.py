"""The cases of Gateway API's mesh conformance, and the rest of HTTPRoute, in a running shop: real requests of real pods, over both nodes.

Which cases there are, and what is asked of each: https://gateway-api.sigs.k8s.io/reference/spec/ and https://gateway-api.sigs.k8s.io/geps/gep-1294/.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from lab.lab import Lab
from tests.kernel import gateway, shop
from tests.kernel.gateway import V1, V2

pytestmark = pytest.mark.kernel

CALLS = 23
SPLIT_CALLS = 307
TO_V1, TO_V2 = "backendRefs: [{name: echo-v1, port: 80}]", "backendRefs: [{name: echo-v2, port: 80}]"


def prefix(value: str) -> str:
    return f"matches: [{{path: {{type: PathPrefix, value: {value}}}}}]"


def redirect(path: str, fields: str) -> str:
    return f"{{{prefix(path)}, filters: [{{type: RequestRedirect, requestRedirect: {{{fields}}}}}]}}"


def rewrite(path: str, fields: str, more: str = "") -> str:
    return f"{{{prefix(path)}, filters: [{{type: URLRewrite, urlRewrite: {{{fields}}}}}{more}], {TO_V1}}}"


def persistent(fields: str, v1: int = 30) -> str:
    backends = f"{{name: echo-v1, port: 80, weight: {v1}}}, {{name: echo-v2, port: 80, weight: 70}}"
    return f"[{{sessionPersistence: {{{fields}}}, backendRefs: [{backends}]}}]"


REPLACE = "path: {{type: ReplacePrefixMatch, replacePrefixMatch: '{}'}}"
FULL = "path: {{type: ReplaceFullPath, replaceFullPath: {}}}"
EDIT = (
    "set: [{name: X-Header-Set, value: set-overwrites-values}], add: [{name: X-Header-Add, value: header-val-1}, "
    "{name: X-Header-Add-Append, value: header-val-2}], remove: [X-Header-Remove]"
)
SAYS = "filters: [{{type: ResponseHeaderModifier, responseHeaderModifier: {{set: [{{name: X-Header-Set, value: {}}}]}}}}]"
ROUTES = {
    "split": f"[{{matches: [{{path: {{type: Exact, value: /v1}}}}], {TO_V1}}}, {{matches: [{{path: {{type: Exact, value: /v2}}}}], {TO_V2}}}]",
    "matching": f"[{{matches: [{{path: {{type: PathPrefix, value: /}}}}, {{headers: [{{name: version, value: one}}]}}], {TO_V1}}}, "
    f"{{matches: [{{path: {{type: PathPrefix, value: /v2}}}}, {{headers: [{{name: version, value: two}}]}}], {TO_V2}}}]",
    "query": f"[{{matches: [{{queryParams: [{{name: animal, value: whale}}]}}], {TO_V1}}}, "
    f"{{matches: [{{queryParams: [{{name: animal, value: dolphin}}]}}], {TO_V2}}}, "
    f"{{matches: [{{queryParams: [{{name: animal, value: whale}}, {{name: color, value: blue}}]}}], {TO_V2}}}]",
    "weight": "[{backendRefs: [{name: echo-v1, port: 8080, weight: 70}, {name: echo-v2, port: 8080, weight: 30}]}]",
    "half": "[{backendRefs: [{name: echo-v1, port: 80}, {name: nobody, port: 80}, {name: echo-v2, port: 80, weight: 0}]}]",
    "nothing": "[{backendRefs: [{name: echo-v1, port: 80, weight: 0}]}]",
    "edits": f"[{{filters: [{{type: RequestHeaderModifier, requestHeaderModifier: {{{EDIT}}}}}], {TO_V1}}}]",
    "backend-edits": f"[{{backendRefs: [{{name: echo-v1, port: 80, filters: [{{type: RequestHeaderModifier, requestHeaderModifier: {{{EDIT}}}}}]}}]}}]",
    "redirect": "["
    + ", ".join(
        [
            redirect("/host", "hostname: example.org"),
            *(redirect(f"/{status}", f"hostname: example.org, statusCode: {status}") for status in (301, 302, 303, 307, 308)),
            redirect("/original-prefix", REPLACE.format("/replacement-prefix")),
            redirect("/full", FULL.format("/full-path-replacement")),
            redirect("/path-and-host", "hostname: example.org, " + REPLACE.format("/replacement-prefix")),
            redirect("/strip", REPLACE.format("/")),
            redirect("/port", "port: 8083"),
            redirect("/port-and-host", "hostname: example.org, port: 8083"),
            redirect("/scheme", "scheme: https"),
            redirect("/scheme-and-host", "scheme: https, hostname: example.org, statusCode: 301"),
        ]
    )
    + "]",
    "rewrite": "["
    + ", ".join(
        [
            rewrite("/prefix/one", REPLACE.format("/one")),
            rewrite("/strip-prefix", REPLACE.format("/")),
            rewrite("/slash", REPLACE.format("/xyz/")),
            rewrite("/full/one", FULL.format("/one")),
            rewrite("/full/headers", FULL.format("/test"), f", {{type: RequestHeaderModifier, requestHeaderModifier: {{{EDIT}}}}}"),
            rewrite("/host", "hostname: other.example"),
        ]
    )
    + "]",
    "named": f"[{{name: named-rule, {prefix('/named')}, {TO_V1}}}, {{{prefix('/unnamed')}, {TO_V2}}}]",
    "mirror": "[{filters: [{type: RequestMirror, requestMirror: {backendRef: {name: echo-v2, port: 80}}}, "
    "{type: RequestMirror, requestMirror: {backendRef: {name: nobody, port: 80}}}, "
    "{type: RequestMirror, requestMirror: {fraction: {numerator: 1, denominator: 2}, backendRef: {name: echo-v1, port: 80}}}], " + TO_V1 + "}]",
    "cors": "[{filters: [{type: CORS, cors: {allowOrigins: ['https://www.foo.com', 'https://*.bar.com'], allowMethods: [GET, PUT], "
    "allowHeaders: [x-one, x-two], exposeHeaders: [x-from-backend], maxAge: 3600, allowCredentials: true}}], " + TO_V1 + "}]",
    "slow": f"[{{{prefix('/slow/limited')}, timeouts: {{request: 300ms}}, {TO_V2}}}, {{{prefix('/slow/open')}, timeouts: {{request: 0s}}, {TO_V2}}}]",
    "flaky": f"[{{retry: {{codes: [503], attempts: 2, backoff: 5ms}}, {TO_V1}}}]",
    "cookie": "[{sessionPersistence: {cookie: {name: stay}}, backendRefs: [{name: echo, port: 80}]}]",
    "lasting": "[{sessionPersistence: {absoluteTimeout: 1h, cookie: {lifetimeType: Permanent}}, backendRefs: [{name: echo, port: 80}]}]",
    "header": "[{sessionPersistence: {type: Header, header: {name: x-stay}}, backendRefs: [{name: echo, port: 80}]}]",
    "split-cookie": persistent("cookie: {name: stay}"),
    "split-header": persistent("type: Header, header: {name: x-stay}"),
    "merged": "",
    "frontend": f"[{{{SAYS.format('set')}, {TO_V2}}}]",
    "ports": "",
    "sections": "",
    "consumed": "",
    "produced": f"[{{{SAYS.format('producer')}, {TO_V1}}}]",
    "hosts": f"[{{matches: [{{headers: [{{name: Host, value: shop.example}}]}}], {TO_V1}}}]",
    "callers": "["
    "{matches: [{path: {value: /account}}], filters: [{type: ExtensionRef, extensionRef: {group: meshagent.io, kind: CallerMatch, name: account}}], "
    + TO_V2 + "}, "
    "{matches: [{path: {value: /namespace}}], filters: [{type: ExtensionRef, extensionRef: {group: meshagent.io, kind: CallerMatch, name: namespace}}], "
    + TO_V2 + "}, "
    "{matches: [{path: {value: /version}}], filters: [{type: ExtensionRef, extensionRef: {group: meshagent.io, kind: CallerMatch, name: version}}], "
    + TO_V2 + "}, "
    "{matches: [{path: {value: /missing}}], filters: [{type: ExtensionRef, extensionRef: {group: meshagent.io, kind: CallerMatch, name: nobody}}], "
    + TO_V2 + "}, {" + TO_V1 + "}]",
    "empty": "[{backendRefs: [{name: none, port: 80}]}]",
}  # fmt: skip
CALLER = "apiVersion: meshagent.io/v1alpha1\nkind: CallerMatch\nmetadata: {{name: {}}}\nspec: {{from: [{{source: {{{}}}}}]}}\n---\n"
MORE = (
    gateway.route("ports", f"[{{{SAYS.format('v1')}, {TO_V1}}}]", "name: ports, port: 80"),
    gateway.route("sections", f"[{{{SAYS.format('alt')}, {TO_V1}}}]", "name: sections, sectionName: http-alt"),
    gateway.route("merged-a", f"[{{{prefix('/one')}, {TO_V1}}}]", "name: merged"),
    gateway.route("merged-b", f"[{{{prefix('/one/two')}, {TO_V2}}}, {{{prefix('/one')}, {TO_V2}}}]", "name: merged"),
    *(
        gateway.route(
            f"for-{name}",
            f"[{{{prefix('/ok')}, {SAYS.format('consumer')}, backendRefs: [{{name: echo-v2, namespace: default, port: 80}}]}}]",
            f"name: {name}, namespace: default, port: 80",
            namespace=gateway.CONSUMER,
        )
        for name in ("consumed", "produced")
    ),
    gateway.service("none", 19, "{app: nobody}"),
    "\n",
    CALLER.format("account", "serviceAccounts: [consumer/client-v2, default/nobody]"),
    CALLER.format("namespace", "namespaces: [consumer]"),
    CALLER.format("version", "matchLabels: {version: v2}"),
)


@pytest.fixture(scope="module")
def at(lab: Lab) -> Iterator[dict[str, str]]:
    """The address of each Service by its name."""
    with gateway.running(lab, ROUTES, *MORE) as addresses:
        yield addresses


def ask(lab: Lab, url: str, *options: str, place: str = "frontend") -> dict[str, Any]:
    return shop.get(lab, place, f"http://{url}", *options)


def asked(lab: Lab, url: str, *options: str, place: str = "frontend") -> str:
    """Which pod answered, or the status."""
    answer = ask(lab, url, *options, place=place)
    return str(answer.get("pod", answer["status"]))


def test_requests_work_without_a_route(lab: Lab, at: dict[str, str]) -> None:
    each_on_its_own = ("-H", "Connection: close")  # without a route it is L4, and balanced by connection
    assert set(gateway.pods(lab, "frontend", f"http://{at['echo']}/?[1-{CALLS}]", *each_on_its_own)) == {"echo-v1", "echo-v2"}


def test_paths_split_traffic_and_what_no_rule_matches_is_a_404_that_says_so(lab: Lab, at: dict[str, str]) -> None:
    assert [asked(lab, f"{at['split']}/v{n}") for n in (1, 2)] == ["echo-v1", "echo-v2"]
    answer = ask(lab, f"{at['split']}/v3")
    assert (answer["status"], answer["headers"]["x-meshagent-reason"]) == (404, ["no-route"])


@pytest.mark.parametrize(
    ("path", "header", "pod"),
    [
        ("/", "", "echo-v1"),
        ("/example", "", "echo-v1"),
        ("/", "Version: one", "echo-v1"),
        ("/v2", "", "echo-v2"),
        ("/v2/", "", "echo-v2"),
        ("/v2/example", "", "echo-v2"),
        ("/v2example", "", "echo-v1"),
        ("/foo/v2/example", "", "echo-v1"),
        ("/", "Version: two", "echo-v2"),
    ],
)
def test_paths_and_headers_match(lab: Lab, at: dict[str, str], path: str, header: str, pod: str) -> None:
    assert asked(lab, f"{at['matching']}{path}", *(("-H", header) if header else ())) == pod


@pytest.mark.parametrize(
    ("query", "pod"),
    [
        ("animal=whale", "echo-v1"),
        ("animal=dolphin&color=x", "echo-v2"),
        ("animal=whale&color=blue", "echo-v2"),
        ("animal=WHALE", "404"),
        ("", "404"),
    ],
)
def test_query_parameters_match(lab: Lab, at: dict[str, str], query: str, pod: str) -> None:
    assert asked(lab, f"{at['query']}/?{query}") == pod


def test_weights_hold(lab: Lab, at: dict[str, str]) -> None:
    before = {pod: gateway.seen(lab, pod).get("/weighed", 0) for pod in ("echo-v1", "echo-v2")}
    assert shop.codes(lab, "frontend", f"http://{at['weight']}/weighed?[1-{SPLIT_CALLS}]") == {"200": SPLIT_CALLS}
    first, second = (gateway.seen(lab, pod)["/weighed"] - count for pod, count in before.items())
    assert first + second == SPLIT_CALLS
    assert abs(second - 0.3 * SPLIT_CALLS) <= 4.5 * math.sqrt(SPLIT_CALLS * 0.3 * 0.7)


def test_a_missing_backend_answers_500_for_its_share_and_weight_0_gets_nothing(lab: Lab, at: dict[str, str]) -> None:
    found = shop.codes(lab, "frontend", f"http://{at['half']}/half?[1-{SPLIT_CALLS}]")
    assert set(found) == {"200", "500"}
    assert abs(found["500"] - SPLIT_CALLS / 2) <= 4.5 * math.sqrt(SPLIT_CALLS / 4)
    assert gateway.seen(lab, "echo-v2").get("/half", 0) == 0
    answer = ask(lab, f"{at['nothing']}/")
    assert (answer["status"], answer["headers"]["x-meshagent-reason"]) == (500, ["no-backend"])


@pytest.mark.parametrize("name", ["edits", "backend-edits"])
def test_request_headers_are_changed_at_the_rule_and_at_the_backend(lab: Lab, at: dict[str, str], name: str) -> None:
    sent = ("-H", "X-Header-Remove: x", "-H", "X-Header-Add-Append: append-val-1", "-H", "X-Header-Set: y", "-H", "X-Kept: z")
    got = ask(lab, f"{at[name]}/", *sent)["request"]
    _assert_edited(got)
    assert got["x-header-add-append"] == "append-val-1,header-val-2"
    assert got["x-kept"] == "z"


def _assert_edited(got: dict[str, str]) -> None:
    assert got["x-header-set"] == "set-overwrites-values"
    assert got["x-header-add"] == "header-val-1"
    assert "x-header-remove" not in got


@pytest.mark.parametrize(
    ("path", "status", "location"),
    [
        ("/host/x?q=1", 302, "http://example.org/host/x?q=1"),
        *((f"/{status}", status, f"http://example.org/{status}") for status in (301, 302, 303, 307, 308)),
        ("/original-prefix/lemon", 302, "http://echo/replacement-prefix/lemon"),
        ("/original-prefix", 302, "http://echo/replacement-prefix"),
        ("/full/path/original", 302, "http://echo/full-path-replacement"),
        ("/path-and-host/x", 302, "http://example.org/replacement-prefix/x"),
        ("/strip/three", 302, "http://echo/three"),
        ("/strip", 302, "http://echo/"),
        ("/port", 302, "http://echo:8083/port"),
        ("/port-and-host", 302, "http://example.org:8083/port-and-host"),
        ("/scheme", 302, "https://echo/scheme"),
        ("/scheme-and-host", 301, "https://example.org/scheme-and-host"),
    ],
)
def test_redirects_say_where_to_go(lab: Lab, at: dict[str, str], path: str, status: int, location: str) -> None:
    answer = ask(lab, f"{at['redirect']}{path}", "-H", "Host: echo")
    assert (answer["status"], answer["headers"]["location"]) == (status, [location])


@pytest.mark.parametrize(
    ("host", "path", "location"),
    [
        pytest.param("echo:8080", "/host", "http://example.org:8080/host", id="the-services-port"),
        pytest.param("echo:8080", "/scheme", "https://echo:443/scheme", id="the-schemes-port"),
        pytest.param("echo:8080", "/port", "http://echo:8083/port", id="the-filters-port"),
        pytest.param("echo:8080", "/scheme-and-host", "https://example.org/scheme-and-host", id="none"),
    ],
)
def test_redirects_from_another_port_keep_or_change_it(lab: Lab, at: dict[str, str], host: str, path: str, location: str) -> None:
    answer = ask(lab, f"{at['redirect']}:8080{path}", "-H", f"Host: {host}")
    assert answer["headers"]["location"] == [location]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/prefix/one/two?q=1", "/one/two?q=1"),
        ("/prefix/one", "/one"),
        ("/prefix/one/", "/one/"),
        ("/strip-prefix/three", "/three"),
        ("/strip-prefix", "/"),
        ("/strip-prefix/", "/"),
        ("/slash/bar", "/xyz/bar"),
        ("/full/one/two?q=1", "/one?q=1"),
    ],
)
def test_paths_are_rewritten(lab: Lab, at: dict[str, str], path: str, expected: str) -> None:
    assert ask(lab, f"{at['rewrite']}{path}")["path"] == expected


def test_rewrites_go_together_with_header_changes_and_change_the_host(lab: Lab, at: dict[str, str]) -> None:
    answer = ask(lab, f"{at['rewrite']}/full/headers/x", "-H", "X-Header-Remove: x", "-H", "X-Header-Set: y")
    assert answer["path"] == "/test"
    _assert_edited(answer["request"])
    assert ask(lab, f"{at['rewrite']}/host")["request"]["host"] == "other.example"


def test_rules_with_and_without_names_route(lab: Lab, at: dict[str, str]) -> None:
    assert [asked(lab, f"{at['named']}/{path}") for path in ("named", "unnamed")] == ["echo-v1", "echo-v2"]


def test_a_route_holds_for_its_service_and_not_for_a_pods_address_or_for_a_host_header(lab: Lab, at: dict[str, str]) -> None:
    for url, host, expected in (
        (at["frontend"], "echo-v2", ["set"]),
        (at["frontend"], "echo-v1", ["set"]),
        (at["echo-v1"], "frontend", None),
        (f"{gateway.ECHOES[1].addresses[0]}:8080", "frontend", None),
    ):
        assert ask(lab, f"{url}/", "-H", f"Host: {host}")["headers"].get("x-header-set") == expected


def test_a_route_holds_for_the_port_of_its_parent_ref_or_for_all(lab: Lab, at: dict[str, str]) -> None:
    def said(name: str) -> list[Any]:
        return [ask(lab, f"{at[name]}{port}/")["headers"].get("x-header-set") for port in ("", ":8080")]

    assert said("ports") == [["v1"], None]
    assert said("sections") == [None, ["alt"]]
    assert said("frontend") == [["set"], ["set"]]


def test_several_routes_of_one_service_are_merged(lab: Lab, at: dict[str, str]) -> None:
    assert [asked(lab, f"{at['merged']}{path}") for path in ("/one", "/one/two", "/x")] == ["echo-v1", "echo-v2", "404"]


@pytest.mark.parametrize(("name", "other"), [("consumed", None), ("produced", ["producer"])])
def test_a_consumer_route_is_for_callers_of_its_namespace_alone_and_replaces_the_producers(
    lab: Lab, at: dict[str, str], name: str, other: list[str] | None
) -> None:
    for caller in (V1, V2):
        answer = ask(lab, f"{at[name]}/ok", place=caller)
        assert (answer["pod"], answer["headers"]["x-header-set"]) == ("echo-v2", ["consumer"])
        refused = ask(lab, f"{at[name]}/elsewhere", place=caller)
        assert (refused["status"], refused["headers"]["x-meshagent-reason"]) == (404, ["no-route"])
        assert ask(lab, f"{at[name]}:8080/ok", place=caller)["headers"].get("x-header-set") == other, "another port"
    forged = ("-H", "mesh.source.namespace: consumer", "-H", "x-meshagent-destination: consumer")
    assert ask(lab, f"{at[name]}/ok", *forged)["headers"].get("x-header-set") == other


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/account", ["echo-v1", "echo-v1", "echo-v2"]),
        ("/namespace", ["echo-v1", "echo-v2", "echo-v2"]),
        ("/version", ["echo-v1", "echo-v1", "echo-v2"]),
        ("/missing", ["500", "500", "500"]),
    ],
)
def test_who_calls_decides_where_a_request_goes(lab: Lab, at: dict[str, str], path: str, expected: list[str]) -> None:
    assert [asked(lab, f"{at['callers']}{path}", place=place) for place in ("frontend", V1, V2)] == expected
    forged = ("-H", "mesh.source.service_account: consumer/client-v2", "-H", "x-meshagent-caller-version: v2")
    assert asked(lab, f"{at['callers']}{path}", *forged) == expected[0]


def test_a_new_version_of_a_caller_is_routed_as_one(lab: Lab, at: dict[str, str]) -> None:
    assert asked(lab, f"{at['callers']}/version", place=V1) == "echo-v1"
    assert "version" in gateway.CLIENTS[0].labels
    lab.apply(_workload("v2"))
    try:
        assert shop.takes(lambda: asked(lab, f"{at['callers']}/version", place=V1) == "echo-v2", 5) < 5
    finally:
        lab.apply(_workload("v1"))
    shop.takes(lambda: asked(lab, f"{at['callers']}/version", place=V1) == "echo-v1", 5)


def _workload(version: str) -> str:
    client = gateway.CLIENTS[0]
    return gateway.workload(client, version=version)


def test_requests_are_mirrored_and_nobody_waits_for_the_copies(lab: Lab, at: dict[str, str]) -> None:
    before = {pod: gateway.seen(lab, pod).get("/copied", 0) for pod in ("echo-v1", "echo-v2")}
    assert shop.codes(lab, "frontend", f"http://{at['mirror']}/copied?[1-{SPLIT_CALLS}]") == {"200": SPLIT_CALLS}
    shop.takes(lambda: gateway.seen(lab, "echo-v2").get("/copied", 0) - before["echo-v2"] == SPLIT_CALLS)
    more = gateway.seen(lab, "echo-v1")["/copied"] - before["echo-v1"] - SPLIT_CALLS
    assert abs(more - SPLIT_CALLS / 2) <= 4.5 * math.sqrt(SPLIT_CALLS / 4)


@pytest.mark.parametrize("origin", ["https://www.foo.com", "https://a.b.bar.com"])
def test_cors_answers_a_preflight_and_lets_the_origin_read(lab: Lab, at: dict[str, str], origin: str) -> None:
    asking = ("-H", f"Origin: {origin}")
    exposed = "access-control-expose-headers"
    preflight = ask(lab, f"{at['cors']}/", "-X", "OPTIONS", *asking, "-H", "Access-Control-Request-Method: PUT")
    said = {name: value for name, (value,) in preflight["headers"].items() if name.startswith("access-control") and name != exposed}
    assert preflight["status"] in {200, 204}
    assert "pod" not in preflight
    assert {name: value.replace(", ", ",") for name, value in said.items()} == {
        "access-control-allow-origin": origin,
        "access-control-allow-methods": "GET,PUT",
        "access-control-allow-headers": "x-one,x-two",
        "access-control-allow-credentials": "true",
        "access-control-max-age": "3600",
    }
    answer = ask(lab, f"{at['cors']}/", *asking)
    assert answer["pod"] == "echo-v1"
    assert answer["headers"]["access-control-allow-origin"] == [origin]
    assert answer["headers"][exposed] == ["x-from-backend"]


@pytest.mark.parametrize("origin", ["https://www.foo.com.evil", "http://www.foo.com", "https://bar.com", "https://a.bar.com:8443"])
def test_cors_gives_no_permission_to_other_origins(lab: Lab, at: dict[str, str], origin: str) -> None:
    for options in (("-X", "OPTIONS", "-H", "Access-Control-Request-Method: PUT"), ()):
        answer = ask(lab, f"{at['cors']}/", "-H", f"Origin: {origin}", *options)
        assert answer["status"] in {200, 204}
        assert "access-control-allow-origin" not in answer["headers"], "browsers ask for nothing else"


def test_a_timeout_is_a_504_and_0_is_none(lab: Lab, at: dict[str, str]) -> None:
    answer = ask(lab, f"{at['slow']}/slow/limited")
    assert (answer["status"], answer["headers"]["x-meshagent-reason"]) == (504, ["timeout"])
    assert ask(lab, f"{at['slow']}/slow/open")["status"] == 200


def test_what_failed_is_tried_again(lab: Lab, at: dict[str, str]) -> None:
    assert gateway.pods(lab, "frontend", f"http://{at['flaky']}/flaky/[1-{CALLS}]") == {"echo-v1": CALLS}
    seen = gateway.seen(lab, "echo-v1")
    assert [seen[f"/flaky/{n}"] for n in range(1, CALLS + 1)] == [2] * CALLS


@pytest.mark.parametrize("place", ["frontend", V2])
def test_a_session_stays_with_its_endpoint(lab: Lab, at: dict[str, str], place: str) -> None:
    answer = ask(lab, f"{at['cookie']}/", place=place)
    (cookie,) = answer["headers"]["set-cookie"]
    assert cookie.startswith("stay=")
    assert "max-age" not in cookie.lower()
    held = gateway.pods(lab, place, f"http://{at['cookie']}/?[1-{CALLS}]", "-H", f"Cookie: {cookie.partition(';')[0]}")
    assert held == {answer["pod"]: CALLS}
    answer = ask(lab, f"{at['header']}/", place=place)
    (value,) = answer["headers"]["x-stay"]
    assert gateway.pods(lab, place, f"http://{at['header']}/?[1-{CALLS}]", "-H", f"x-stay: {value}") == {answer["pod"]: CALLS}
    (cookie,) = ask(lab, f"{at['lasting']}/", place=place)["headers"]["set-cookie"]
    assert "max-age=3600" in cookie.lower()


@pytest.mark.parametrize("place", ["frontend", V2])
def test_a_session_stays_with_its_backend_where_weights_draw_one_for_others_also_when_they_change(
    lab: Lab, at: dict[str, str], place: str
) -> None:
    sessions: dict[str, str] = {}
    for _ in range(CALLS):
        answer = ask(lab, f"{at['split-cookie']}/", place=place)
        sessions[answer["pod"]] = answer["headers"]["set-cookie"][0].partition(";")[0]
    assert sessions.keys() == {"echo-v1", "echo-v2"}
    answer = ask(lab, f"{at['split-header']}/", place=place)
    (value,) = answer["headers"]["x-stay"]

    def hold() -> None:
        for pod, cookie in sessions.items():
            found = gateway.pods(lab, place, f"http://{at['split-cookie']}/?[1-{CALLS}]", "-H", f"Cookie: a=b; {cookie}")
            assert found == {pod: CALLS}
        found = gateway.pods(lab, place, f"http://{at['split-header']}/?[1-{CALLS}]", "-H", f"x-stay: {value}")
        assert found == {answer["pod"]: CALLS}

    hold()
    fields = {"split-cookie": "cookie: {name: stay}", "split-header": "type: Header, header: {name: x-stay}"}
    try:
        with shop.changed(lab):
            lab.apply("".join(gateway.route(name, persistent(said, v1=0)) for name, said in fields.items()).removesuffix("---"))
        shop.takes(lambda: gateway.pods(lab, place, f"http://{at['split-cookie']}/?[1-{CALLS}]") == {"echo-v2": CALLS})
        hold()
    finally:
        with shop.changed(lab):
            lab.apply("".join(gateway.route(name, persistent(said)) for name, said in fields.items()).removesuffix("---"))


def test_a_session_with_nonsense_gets_an_endpoint(lab: Lab, at: dict[str, str]) -> None:
    for value in ("nonsense", "MTI3LjAuMC4xOjIyCg==", "MTAuOTYuMC4yMDo2Mzc5"):
        assert asked(lab, f"{at['cookie']}/", "-H", f"Cookie: stay={value}").startswith("echo-v")


def test_the_header_host_is_matched_as_one(lab: Lab, at: dict[str, str]) -> None:
    assert asked(lab, f"{at['hosts']}/", "-H", "Host: shop.example") == "echo-v1"
    assert asked(lab, f"{at['hosts']}/") == "404"


def test_a_backend_without_endpoints_is_a_503(lab: Lab, at: dict[str, str]) -> None:
    answer = ask(lab, f"{at['empty']}/")
    assert (answer["status"], answer["headers"]["x-meshagent-reason"]) == (503, ["no-ready-backend"])
