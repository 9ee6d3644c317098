"""RequestAuthentication and conditions of AuthorizationPolicy: what is refused, with the field, and what agents are told."""

from __future__ import annotations

import json

import pytest

from agent.model import Authentication, ClaimCondition, HeaderCondition, Operation, Policy, Service, Source, Workload, decode
from controller.compile import Compiled, compile_model
from controller.jwks import Fetched
from controller.schema import read
from tests.tokens import Issuer

ONE = Issuer("https://one.test")
URI = "https://keys.test/jwks"
SHOP = """
apiVersion: v1
kind: Service
metadata: {name: cart}
spec:
  clusterIP: 10.96.0.1
  selector: {app: cart}
  ports: [{name: http, port: 80, targetPort: 8080, appProtocol: http}, {name: web, port: 81, targetPort: 8081}, {name: db, port: 82, appProtocol: redis}]
---
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {name: cart-1, labels: {app: cart}}
spec: {node: n1, addresses: [10.0.1.2], networkNamespace: cart-1}
---
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {name: job, labels: {app: job}}
spec: {node: n1, addresses: [10.0.1.3], networkNamespace: job}
---
"""


def authentication(rules: object, more: str = "") -> str:
    return f"apiVersion: meshagent.io/v1alpha1\nkind: RequestAuthentication\nmetadata: {{name: t}}\nspec: {{{more}jwtRules: {json.dumps(rules)}}}\n"


def policy(spec: str, annotations: str = "") -> str:
    head = f"metadata: {{name: p, annotations: {{{annotations}}}}}"
    return f"apiVersion: meshagent.io/v1alpha1\nkind: AuthorizationPolicy\n{head}\nspec: {spec}\n"


def when(conditions: object, action: str = "DENY") -> str:
    return policy(json.dumps({"action": action, "rules": [{"when": conditions}]}))


def problems(text: str) -> list[str]:
    return [f"{problem.field}: {problem.message}" for item in read(text, "f.yaml") for problem in item.problems]


def rule(**fields: object) -> dict[str, object]:
    return {"issuer": ONE.name, **fields}


SMALL = json.dumps({"keys": [{"kty": "RSA", "n": "AQAB", "e": "AQAB"}]})
SECRET = json.dumps({"keys": [{**ONE.jwk, "d": "c2VjcmV0"}]})
SYMMETRIC = json.dumps({"keys": [{"kty": "oct", "k": "c2VjcmV0"}]})


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        pytest.param(authentication([]), "spec.jwtRules", "must not be empty", id="no-rules"),
        pytest.param(authentication([{"jwks": ONE.jwks}]), "spec.jwtRules[0].issuer", "is required", id="no-issuer"),
        pytest.param(authentication([rule()]), "spec.jwtRules[0].jwksUri", "is required, or jwks", id="no-keys"),
        pytest.param(authentication([rule(jwks=ONE.jwks, jwksUri=URI)]), "spec.jwtRules[0].jwksUri", "not both", id="both-keys"),
        pytest.param(authentication([rule(jwksUri="http://keys.test")]), "spec.jwtRules[0].jwksUri", "https://", id="plaintext"),
        pytest.param(authentication([rule(jwksUri="file:///etc/passwd")]), "spec.jwtRules[0].jwksUri", "https://", id="file"),
        pytest.param(authentication([rule(jwksUri="https://u:p@keys.test/")]), "spec.jwtRules[0].jwksUri", "without user", id="user"),
        pytest.param(authentication([rule(jwks="[]")]), "spec.jwtRules[0].jwks", "no JWK set", id="no-set"),
        pytest.param(authentication([rule(jwks='{"keys": []}')]), "spec.jwtRules[0].jwks", "has no key", id="empty-set"),
        pytest.param(authentication([rule(jwks="[" * 100000)]), "spec.jwtRules[0].jwks", "no JWK set", id="deep"),
        pytest.param(authentication([rule(jwks=SMALL)]), "spec.jwtRules[0].jwks", "keys[0]", id="weak-key"),
        pytest.param(authentication([rule(jwks=SECRET)]), "spec.jwtRules[0].jwks", 'holds a secret ("d")', id="private-key"),
        pytest.param(authentication([rule(jwks=SYMMETRIC)]), "spec.jwtRules[0].jwks", 'holds a secret ("k")', id="symmetric-key"),
        pytest.param(authentication([rule(jwks=ONE.jwks, timeout="2m")]), "spec.jwtRules[0].timeout", "at most 60s", id="timeout"),
        pytest.param(
            authentication([rule(jwks=ONE.jwks, fromHeaders=[{"name": "a b"}])]), "spec.jwtRules[0].fromHeaders[0].name", "no name", id="name"
        ),
        pytest.param(
            authentication([rule(jwks=ONE.jwks, outputPayloadToHeader="Host")]),
            "spec.jwtRules[0].outputPayloadToHeader",
            "belongs to the proxy",
            id="host",
        ),
        pytest.param(
            authentication([rule(jwks=ONE.jwks, outputClaimToHeaders=[{"header": "x-envoy-a", "claim": "a"}])]),
            "spec.jwtRules[0].outputClaimToHeaders[0].header",
            "waypoint's own",
            id="reserved",
        ),
        pytest.param(authentication([rule(jwks=ONE.jwks, jwksURI="x")]), "spec.jwtRules[0].jwksURI", "did you mean", id="unknown-field"),
        pytest.param(when([{"key": "request.header[x]", "values": ["a"]}]), "spec.rules[0].when[0].key", "is unknown; known are", id="key"),
        pytest.param(when([{"key": "remote.ip", "values": ["10.0.0.1"]}]), "spec.rules[0].when[0].key", "not supported", id="remote-ip"),
        pytest.param(when([{"key": "source.ip"}]), "spec.rules[0].when[0].values", "is required, or notValues", id="no-values"),
        pytest.param(when([{"key": "source.ip", "notValues": ["x"]}]), "spec.rules[0].when[0].notValues[0]", "no", id="address"),
        pytest.param(when([{"key": "destination.port", "values": ["http"]}]), "spec.rules[0].when[0].values[0]", "is not a port", id="port"),
        pytest.param(when([{"key": "request.headers[Host]", "values": ["a"]}]), "spec.rules[0].when[0].key", "operation.hosts", id="header-host"),
        pytest.param(when([{"key": "request.headers[x-envoy-a]", "values": ["a"]}]), "spec.rules[0].when[0].key", "never arrives", id="own-header"),
        pytest.param(when([{"key": "request.headers[]", "values": ["a"]}]), "spec.rules[0].when[0].key", "no name", id="no-header"),
        pytest.param(when([{"key": "request.auth.claims[]", "values": ["a"]}]), "spec.rules[0].when[0].key", "is unknown", id="no-claim"),
        pytest.param(when([{"key": "request.auth.claims[a", "values": ["a"]}]), "spec.rules[0].when[0].key", "is unknown", id="open-claim"),
        pytest.param(when([{"key": "request.headers[x]", "values": ["a*b"]}]), "spec.rules[0].when[0].values[0]", 'a "*" may', id="wildcard"),
        pytest.param(
            policy("{rules: [{from: [{source: {requestPrincipals: ['a*b']}}]}]}"),
            "spec.rules[0].from[0].source.requestPrincipals[0]",
            'a "*" may',
            id="principal",
        ),
        pytest.param(
            policy("{action: ALLOW}", 'meshagent.io/dry-run: "true"'), "metadata.annotations['meshagent.io/dry-run']", "is for DENY", id="dry-allow"
        ),
        pytest.param(
            policy("{action: DENY}", 'meshagent.io/dry-run: "yes"'), "metadata.annotations['meshagent.io/dry-run']", '"true" or', id="dry-word"
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_with_the_field_named(text: str, field: str, words: str) -> None:
    found = problems(text)
    assert len(found) == 1, found
    assert found[0].startswith(f"{field}: ")
    assert words in found[0]


def compiled(text: str, keys: dict[str, Fetched] | None = None) -> Compiled:
    checked = read(text, "f")
    assert [problem for item in checked for problem in item.problems] == []
    return compile_model({item.object.key: item.object for item in checked if item.object}, keys=keys)


def entity(model: Compiled, name: str) -> object:
    return decode(model.entities[name].SerializeToString())


def conditions(model: Compiled, kind: str = "RequestAuthentication") -> dict[str, tuple[str, str]]:
    return {c.type: (c.reason, c.message) for key, found in model.conditions.items() if key.kind == kind for c in found}


def test_an_authentication_makes_http_ports_l7_and_guards_them_in_the_data_path() -> None:
    model = compiled(SHOP + authentication([rule(jwks=ONE.jwks)], "selector: {matchLabels: {app: cart}}, "))
    service, workload = entity(model, "service/default/cart"), entity(model, "workload/default/cart-1")
    assert isinstance(service, Service)
    assert isinstance(workload, Workload)
    assert [(port.waypoint, port.reason) for port in service.ports] == [
        (True, "RequestAuthentication default/t"),
        (True, "RequestAuthentication default/t"),
        (False, "no L7 feature is used"),
    ]
    assert workload.authentications == ("default/t",)
    assert workload.policies == ("default/(authentication:8080,8081)",)
    guard = entity(model, f"policy/{workload.policies[0]}")
    assert isinstance(guard, Policy)
    assert guard.rules[0].operations == (Operation(ports=(8080, 8081), methods=("(none)",), protocols=("TCP",)),)
    assert conditions(model) == {"Accepted": ("Accepted", "in force")}


def test_a_workload_without_http_ports_is_named() -> None:
    model = compiled(SHOP + authentication([rule(jwks=ONE.jwks)]))
    assert conditions(model)["Enforced"] == ("NoHTTPPort", "tokens are not looked at where no HTTP port of a Service leads: default/job")


def test_an_authentication_keeps_its_words_and_public_keys_only() -> None:
    keys = json.dumps({"keys": [{**ONE.jwk, "x5t": "y", "note": "z"}, {"kty": "EC", "crv": "P-256K"}]})
    full = rule(
        jwks=keys,
        audiences=["a"],
        fromHeaders=[{"name": "x-token", "prefix": "JWT "}],
        fromParams=["t"],
        fromCookies=["c"],
        forwardOriginalToken=True,
        outputPayloadToHeader="X-Payload",
        outputClaimToHeaders=[{"header": "X-Group", "claim": "realm.group"}],
        timeout="3s",
    )
    found = entity(compiled(SHOP + authentication([full])), "authentication/default/t")
    assert isinstance(found, Authentication)
    (issuer,) = found.issuers
    assert (issuer.issuer, issuer.audiences, issuer.headers, issuer.parameters, issuer.cookies) == (
        ONE.name, ("a",), (("x-token", "JWT "),), ("t",), ("c",)
    )  # fmt: skip
    assert (issuer.forward, issuer.payload_header, issuer.claim_headers) == (True, "x-payload", (("x-group", "realm.group"),))
    assert json.loads(issuer.keys)["keys"] == [{name: value for name, value in ONE.jwk.items() if name != "use"}]


@pytest.mark.parametrize(
    ("found", "keys", "expected"),
    [
        ({}, "", ("KeysMissing", f"{URI}: not asked yet; until then no token of this issuer is believed (401)")),
        (
            {URI: Fetched("", "answered 500")},
            "",
            ("KeysMissing", f"{URI}: answered 500; until then no token of this issuer is believed (401)"),
        ),
        ({URI: Fetched("K", "answered 500")}, "K", ("KeysNotRefreshed", f"{URI}: answered 500; the last good keys stay in force")),
        ({URI: Fetched("K")}, "K", None),
    ],
)
def test_keys_by_uri_are_those_that_were_fetched_and_a_failure_is_a_condition(
    found: dict[str, Fetched], keys: str, expected: tuple[str, str] | None
) -> None:
    model = compiled(SHOP + authentication([rule(jwksUri=URI)]), found)
    sent = entity(model, "authentication/default/t")
    assert isinstance(sent, Authentication)
    assert sent.issuers[0].keys == keys
    assert conditions(model).get("KeysCurrent") == expected


def test_conditions_keep_their_words() -> None:
    text = json.dumps([
        {"key": "source.ip", "values": ["10.0.0.0/8"], "notValues": ["10.1.2.3"]},
        {"key": "source.namespace", "values": ["a*"]},
        {"key": "source.principal", "notValues": ["*"]},
        {"key": "source.serviceAccount", "values": ["web"]},
        {"key": "request.auth.principal", "values": ["i/*"]},
        {"key": "destination.port", "values": ["80"], "notValues": ["81"]},
        {"key": "request.headers[X-A]", "values": ["1"]},
        {"key": "request.auth.audiences", "values": ["a"]},
        {"key": "request.auth.presenter", "notValues": ["b"]},
        {"key": "request.auth.claims[a][b]", "values": ["c"]},
    ])  # fmt: skip
    found = entity(compiled(SHOP + when(json.loads(text))), "policy/default/p")
    assert isinstance(found, Policy)
    assert found.rules[0].also_sources == (
        Source(ip_blocks=("10.0.0.0/8",), not_ip_blocks=("10.1.2.3/32",)),
        Source(namespaces=("a*",)),
        Source(not_principals=("*",)),
        Source(service_accounts=("default/web",)),
        Source(request_principals=("i/*",)),
    )
    assert found.rules[0].also_operations == (
        Operation(ports=(80,), not_ports=(81,)),
        Operation(headers=(HeaderCondition("x-a", ("1",)),)),
        Operation(claims=(ClaimCondition(("aud",), ("a",)),)),
        Operation(claims=(ClaimCondition(("azp",), (), ("b",)),)),
        Operation(claims=(ClaimCondition(("a", "b"), ("c",)),)),
    )


@pytest.mark.parametrize(
    ("spec", "ports"),
    [
        ("{rules: [{from: [{source: {requestPrincipals: ['*']}}]}]}", [True, True, True]),
        ("{rules: [{from: [{source: {requestPrincipals: ['*']}}], to: [{operation: {ports: [8080]}}]}]}", [True, False, False]),
        ("{rules: [{when: [{key: 'request.headers[a]', values: [b]}, {key: destination.port, values: ['8081']}]}]}", [False, True, False]),
        ("{rules: [{when: [{key: source.ip, values: [10.0.0.0/8]}]}]}", [False, False, False]),
    ],
)
def test_conditions_on_requests_make_the_ports_that_they_are_about_l7(spec: str, ports: list[bool]) -> None:
    service = entity(compiled(SHOP + policy(spec)), "service/default/cart")
    assert isinstance(service, Service)
    assert [port.waypoint for port in service.ports] == ports


def test_a_dry_run_is_an_audit() -> None:
    found = entity(compiled(SHOP + policy("{action: DENY, rules: [{}]}", 'meshagent.io/dry-run: "true"')), "policy/default/p")
    assert isinstance(found, Policy)
    assert found.action.name == "AUDIT"


def test_what_is_not_enforced_for_two_reasons_says_both_in_one_condition() -> None:
    outside = SHOP.replace("{app: job}}", "{app: job, meshagent.io/mode: none}}")
    found = compile_model(
        {item.object.key: item.object for item in read(outside + authentication([rule(jwks=ONE.jwks)]), "f") if item.object}
    )
    (said,) = [
        one for key, several in found.conditions.items() if key.kind == "RequestAuthentication" for one in several if one.type == "Enforced"
    ]
    assert (said.status, said.reason) == (False, "PartlyEnrolled")
    assert "not in the mesh" in said.message
    assert "no HTTP port of a Service leads: default/job" in said.message
