from __future__ import annotations

import pytest

from agent.model import Service, decode
from agent.traffic import Balancing, CheckKind, Failure, HashOn, Per, RateLimit, TrafficPolicy
from controller.compile import Compiled, compile_model
from controller.objects import Key
from controller.quota.catalogue import Catalogue
from controller.schema import read

SHOP = """
apiVersion: v1
kind: Service
metadata: {name: cart}
spec:
  clusterIP: 10.96.0.1
  selector: {app: cart}
  ports: [{name: http, port: 80}, {name: redis, port: 6379, appProtocol: redis}, {name: api, port: 81, appProtocol: http}, {name: dns, port: 53, protocol: UDP}]
---
"""


def policy(spec: str, name: str = "p", created: str = "") -> str:
    stamp = f", creationTimestamp: '{created}'" if created else ""
    return f"apiVersion: meshagent.io/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: {name}{stamp}}}\nspec: {spec}\n---\n"


def on_cart(rest: str) -> str:
    return policy("{targetRefs: [{kind: Service, name: cart}]" + (f", {rest}" if rest else "") + "}")


def messages(text: str) -> list[str]:
    return [f"{problem.field}: {problem.message}" for checked in read(text, "f.yaml") for problem in checked.problems]


def compiled(text: str) -> Compiled:
    checked = read(text, "f")
    assert [problem for item in checked for problem in item.problems] == []
    return compile_model({item.object.key: item.object for item in checked if item.object})


def traffic(model: Compiled, name: str = "default/p") -> TrafficPolicy:
    found = decode(model.entities[f"traffic/{name}"].SerializeToString())
    assert isinstance(found, TrafficPolicy)
    return found


def levels(model: Compiled) -> dict[int, str]:
    found = decode(model.entities["service/default/cart"].SerializeToString())
    assert isinstance(found, Service)
    return {port.port: port.reason for port in found.ports if port.waypoint}


def statuses(model: Compiled, name: str = "p") -> dict[str, tuple[bool, str]]:
    return {item.type: (item.status, item.reason) for item in model.conditions[Key("TrafficPolicy", "default", name)]}


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        pytest.param("", "spec: says nothing: give at least one of loadBalancing", id="nothing"),
        pytest.param("limits: {}", "spec.limits: must not be empty", id="empty"),
        pytest.param("limits: {maxRequests: 0}", "spec.limits.maxRequests: must be at least 1, not 0", id="zero"),
        pytest.param("limits: {maxRequest: 1}", 'spec.limits.maxRequest: unknown field; did you mean "maxRequests"?', id="unknown"),
        pytest.param("loadBalancing: {type: PeakEWMA}", 'spec.loadBalancing.type: "PeakEWMA" is not supported', id="latency"),
        pytest.param("loadBalancing: {type: RingHash}", 'spec.loadBalancing.hashOn: is required for type "RingHash"', id="hash-on-nothing"),
        pytest.param("loadBalancing: {hashOn: [{header: x}]}", 'spec.loadBalancing.hashOn: does not belong to type "LeastRequest"', id="needless-hash"),
        pytest.param(
            "loadBalancing: {type: Maglev, hashOn: [{header: x, queryParam: y}]}",
            "spec.loadBalancing.hashOn[0]: has header and queryParam: write each as an item of its own",
            id="two-in-one",
        ),
        pytest.param(
            "loadBalancing: {type: Maglev, tableSize: 100, hashOn: [{header: x}]}",
            "spec.loadBalancing.tableSize: must be a prime for Maglev; the next one is 101",
            id="no-prime",
        ),
        pytest.param(
            "loadBalancing: {type: RingHash, hashOn: [{queryParam: a}, {header: X-Envoy-Peer}]}",
            'spec.loadBalancing.hashOn[1].header: "X-Envoy-Peer" never arrives: the waypoint removes it from every request',
            id="hash-on-what-is-removed",
        ),
        pytest.param(
            "faults: [{delay: {duration: 1s}, headers: [{name: a, value: b}, {name: x-meshagent-a, value: b}]}]",
            'spec.faults[0].headers[1].name: "x-meshagent-a" never arrives: the waypoint removes it from every request',
            id="fault-on-what-is-removed",
        ),
        pytest.param("loadBalancing: {slowStart: {window: 0s}}", "spec.loadBalancing.slowStart.window: must be longer than 0", id="no-window"),
        pytest.param("timeouts: {connect: 1.5s}", 'spec.timeouts.connect: "1.5s" is not a duration', id="fraction"),
        pytest.param("timeouts: {connect: 99999h}", "spec.timeouts.connect: must be longer than 0 and not longer than 30 days", id="for-ever"),
        pytest.param(
            "limits: {maxRetries: 1}, retryBudget: {percent: 20}", "spec.retryBudget: takes the place of spec.limits.maxRetries", id="budget"
        ),
        pytest.param("outlierEjection: {interval: 1s}", "spec.outlierEjection: ejects nothing: give at least one of consecutive5xx", id="no-cause"),
        pytest.param(
            "outlierEjection: {consecutive5xx: 1, baseEjectionTime: 60s, maxEjectionTime: 30s}",
            "spec.outlierEjection.maxEjectionTime: must not be shorter than baseEjectionTime (60s)",
            id="ejection-time",
        ),
        pytest.param("healthCheck: {interval: 1s}", "spec.healthCheck: needs one of http, grpc and tcp, not none of them", id="no-check"),
        pytest.param("healthCheck: {tcp: {}, grpc: {}}", "spec.healthCheck: needs one of http, grpc and tcp, not grpc and tcp", id="two-checks"),
        pytest.param("healthCheck: {tcp: {}, interval: 1ms}", "spec.healthCheck.interval: must be at least 100ms", id="hammer"),
        pytest.param('healthCheck: {http: {path: "/a b"}}', "spec.healthCheck.http.path: ", id="path"),
        pytest.param("faults: [{headers: [{name: a, value: b}]}]", "spec.faults[0]: does nothing: give delay or abort, or both", id="no-fault"),
        pytest.param("faults: [{abort: {percent: 5}}]", "spec.faults[0].abort: needs one of httpStatus and grpcStatus", id="no-status"),
        pytest.param("faults: [{abort: {httpStatus: 503, percent: 101}}]", "spec.faults[0].abort.percent: must be at most 100, not 101", id="percent"),
        pytest.param("faults: [{delay: {duration: 0ms}}]", "spec.faults[0].delay.duration: must be longer than 0", id="no-delay"),
        pytest.param(
            "faults: [{delay: {duration: 1s}, headers: [{name: a, type: RegularExpression, value: '(?=x)'}]}]",
            "spec.faults[0].headers[0].value: look-around, back references",
            id="regex",
        ),
        pytest.param(
            'faults: [{delay: {duration: 1s}, from: [{namespaces: ["a*"]}]}]',
            'spec.faults[0].from[0].namespaces[0]: "a*": wildcards are not allowed here',
            id="wildcard",
        ),
        pytest.param("rateLimits: [{requests: 5, interval: 1ms}]", "spec.rateLimits[0].interval: must be from 50ms", id="interval"),
        pytest.param("rateLimits: [{requests: 1000000, interval: 50ms}]", "spec.rateLimits[0].requests: is more than 1000000 a second", id="no-limit"),
        pytest.param(f"rateLimits: [{', '.join(['{requests: 1}'] * 10_000)}]", "spec.rateLimits: must have at most 8 items, not 10000", id="huge-limits"),
        pytest.param(
            f"faults: [{', '.join(['{delay: {duration: 1s}}'] * 10_000)}]", "spec.faults: must have at most 16 items, not 10000", id="huge-faults"
        ),
        pytest.param(
            f"faults: [{{delay: {{duration: 1s}}, from: [{{namespaces: [{', '.join(['a'] * 10_000)}]}}]}}]",
            "spec.faults[0].from[0].namespaces: must have at most 64 items, not 10000",
            id="huge-callers",
        ),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_field(rest: str, expected: str) -> None:
    found = messages(on_cart(rest))
    assert any(message.startswith(expected) for message in found), found


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        pytest.param("[]", "spec.targetRefs: must not be empty", id="none"),
        pytest.param("[{kind: TrafficPolicy, name: p}]", 'spec.targetRefs[0].kind: must be "Service", not "TrafficPolicy"', id="itself"),
        pytest.param(
            "[{kind: Gateway, name: p}]", 'spec.targetRefs[0].kind: "Gateway" is not supported; supported: "Service"', id="gateway"
        ),
        pytest.param(
            "[{kind: Service, name: c, port: 1, sectionName: x}]", "spec.targetRefs[0].port: cannot be combined with sectionName", id="both"
        ),
        pytest.param("[{kind: Service, name: c}, {kind: Service, name: c}]", "spec.targetRefs[1]: Service c is listed twice", id="twice"),
        pytest.param(
            "[{kind: Service, name: c, namespace: other}]", "spec.targetRefs[0].namespace: is not supported: remove it", id="elsewhere"
        ),
        pytest.param(
            "[" + ", ".join(f"{{kind: Service, name: s{n}}}" for n in range(10_000)) + "]",
            "spec.targetRefs: must have at most 16 items, not 10000",
            id="huge",
        ),
    ],
)
def test_targets_that_make_no_sense_are_refused_by_field(targets: str, expected: str) -> None:
    found = messages(policy(f"{{targetRefs: {targets}, limits: {{maxRequests: 1}}}}"))
    assert any(message.startswith(expected) for message in found), found


def test_a_policy_makes_ports_l7_that_may_speak_http() -> None:
    model = compiled(SHOP + on_cart("limits: {maxRequests: 1}"))
    assert levels(model) == {80: "TrafficPolicy default/p", 81: "TrafficPolicy default/p"}
    assert traffic(model).targets == (("default/cart", 80), ("default/cart", 81))
    assert statuses(model) == {"Accepted": (True, "Accepted")}


@pytest.mark.parametrize("target", ["sectionName: redis", "port: 6379"])
def test_a_port_that_is_named_is_l7_whatever_it_declares(target: str) -> None:
    model = compiled(SHOP + policy(f"{{targetRefs: [{{kind: Service, name: cart, {target}}}], limits: {{maxRequests: 1}}}}"))
    assert levels(model) == {6379: "TrafficPolicy default/p"}


@pytest.mark.parametrize("target", ["name: nobody", "name: cart, sectionName: web", "name: cart, port: 53", "name: cart, port: 1"])
def test_a_target_that_is_not_there_is_said(target: str) -> None:
    model = compiled(SHOP + policy(f"{{targetRefs: [{{kind: Service, {target}}}], limits: {{maxRequests: 1}}}}"))
    assert statuses(model) == {"Accepted": (False, "TargetNotFound")}
    assert "traffic/default/p" not in model.entities
    assert levels(model) == {}


def test_of_two_policies_the_older_decides_and_the_other_says_conflicted() -> None:
    spec = "{targetRefs: [{kind: Service, name: cart}], limits: {maxRequests: 1}}"
    model = compiled(SHOP + policy(spec, "a-younger", "2026-02-01T00:00:00Z") + policy(spec, "b-older", "2026-01-01T00:00:00Z"))
    assert statuses(model, "b-older") == {"Accepted": (True, "Accepted")}
    assert statuses(model, "a-younger") == {"Accepted": (False, "Conflicted")}
    assert "traffic/default/a-younger" not in model.entities
    [condition] = model.conditions[Key("TrafficPolicy", "default", "a-younger")]
    assert condition.message.startswith("TrafficPolicy default/b-older decides for default/cart:80, default/cart:81: ")


def test_who_names_the_port_goes_before_who_names_the_service() -> None:
    wide = policy("{targetRefs: [{kind: Service, name: cart}], limits: {maxRequests: 1}}", "older", "2026-01-01T00:00:00Z")
    narrow = policy("{targetRefs: [{kind: Service, name: cart, port: 80}], limits: {maxRequests: 2}}", "younger", "2026-02-01T00:00:00Z")
    model = compiled(SHOP + wide + narrow)
    assert traffic(model, "default/younger").targets == (("default/cart", 80),)
    assert traffic(model, "default/older").targets == (("default/cart", 81),)
    assert statuses(model, "older") == {"Accepted": (True, "Accepted"), "Uncontested": (False, "Conflicted")}


def test_a_policy_arrives_at_the_agent_as_it_was_written() -> None:
    rest = """
      loadBalancing: {type: Maglev, hashOn: [{header: X-User}, {cookie: {name: c, lifetime: 1m}}, {queryParam: q}, {source: Workload}], prefer: SameZone,
        panicPercent: 0, tableSize: 101, loadBoundPercent: 150},
      limits: {maxConnections: 1, maxPendingRequests: 2, maxRequests: 3, maxRequestsPerConnection: 4, per: Workload}, retryBudget: {percent: 20},
      timeouts: {connect: 1s, idle: 1m, maxGrpcDeadline: 0s},
      outlierEjection: {consecutiveGatewayErrors: 5}, healthCheck: {http: {path: /h, statuses: [204, 200]}},
      faults: [{from: [{serviceAccounts: [a, b/c]}], headers: [{name: X, value: y}], delay: {duration: 1s, percent: 0.5}, abort: {grpcStatus: 0}}],
      rateLimits: [{requests: 5, per: Namespace}, {requests: 2, interval: 1m, burst: 9}], bandwidth: {requestKiB: 7}"""
    found = traffic(compiled(SHOP + on_cart(rest.replace("\n", " "))))
    assert found.balancing.kind is Balancing.MAGLEV
    assert found.balancing.hash_on == (HashOn("header", "X-User"), HashOn("cookie", "c", 60_000), HashOn("query", "q"), HashOn("workload"))
    assert (found.balancing.prefer, found.balancing.panic_percent) == ("PreferSameZone", 0)
    limits = found.limits
    assert (limits.connections, limits.pending, limits.requests, limits.requests_per_connection) == (1, 2, 3, 4)
    assert (limits.retries, limits.retry_percent, limits.retry_min, limits.per_workload) == (None, 20, None, True)
    assert (limits.connect_ms, limits.idle_ms, limits.grpc_deadline_ms) == (1000, 60_000, 0)
    assert found.outliers is not None
    assert (found.outliers.errors, found.outliers.gateway_errors, found.outliers.ejection_ms, found.outliers.max_percent) == (
        0,
        5,
        30_000,
        50,
    )
    assert found.health_check is not None
    assert (found.health_check.kind, found.health_check.statuses) == (CheckKind.HTTP, (200, 204))
    [fault] = found.faults
    assert fault.callers[0].service_accounts == ("default/a", "b/c")
    assert (fault.headers, fault.delay_ppm, fault.grpc_status, fault.abort_ppm) == ((("x", "y", False),), 5000, 0, 1_000_000)
    assert [(limit.per, limit.requests, limit.interval_ms, limit.burst) for limit in found.rate_limits] == [
        (Per.NAMESPACE, 5, 1000, 5),
        (Per.SERVICE, 2, 60_000, 9),
    ]
    assert (found.request_kib, found.response_kib) == (7, 0)


def test_a_thousand_policies_for_one_service_leave_one_in_force() -> None:
    spec = "{targetRefs: [{kind: Service, name: cart}], limits: {maxRequests: 1}}"
    text = SHOP + "".join(policy(spec, f"p-{n:05}") for n in range(1000))
    model = compiled(text)
    assert [name for name in model.entities if name.startswith("traffic/")] == ["traffic/default/p-00000"]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ("{requests: 5, scope: Global}", []),
        ("{requests: 5, scope: Global}, {requests: 100000, interval: 24h, scope: Global}, {requests: 9}", []),
        ("{requests: 5, scope: Mesh}", ['spec.rateLimits[0].scope: must be "Local" or "Global"']),
        ("{requests: 5, fairness: {}}", ['spec.rateLimits[0].fairness: belongs to scope "Global" only']),
        ("{requests: 5, failure: Deny, scope: Local}", ['spec.rateLimits[0].failure: belongs to scope "Global" only']),
        ("{requests: 5, scope: Global, per: Workload}", ["spec.rateLimits[0].per: belongs to"]),
        ("{requests: 5, scope: Global, interval: 25h}", ["spec.rateLimits[0].interval: must be from 1s to 24h"]),
        ("{requests: 5, scope: Global, interval: 500ms}", ["spec.rateLimits[0].interval: must be from 1s to 24h"]),
        ("{requests: 5, scope: Global, interval: 1h, burst: 5}", ["spec.rateLimits[0].burst: does not belong"]),
        (", ".join(["{requests: 5, scope: Global}"] * 3), ["spec.rateLimits[2].scope: is the 3. Global one: at most 2"]),
        (
            "{requests: 5, scope: Global, fairness: {by: Namespace, weights: [{name: a/b, weight: 2}, {name: c, weight: 2}, {name: c, weight: 3}]}}",
            ["spec.rateLimits[0].fairness.weights[0].name: is no namespace", 'spec.rateLimits[0].fairness.weights[2].name: "c" is listed twice'],
        ),
    ],
)  # fmt: skip
def test_a_global_limit_is_refused_where_it_makes_no_sense(limits: str, expected: list[str]) -> None:
    found = messages(on_cart(f"rateLimits: [{limits}]"))
    assert len(found) == len(expected), found
    assert all(one.startswith(text) for one, text in zip(found, expected, strict=True)), found


def test_a_global_limit_travels_to_agents_and_its_weights_to_the_controllers_own_part() -> None:
    fairness = "fairness: {by: ServiceAccount, weights: [{name: gold, weight: 3}, {name: far/away, weight: 2}]}"
    model = compiled(SHOP + on_cart(f"rateLimits: [{{requests: 100, scope: Global, {fairness}, failure: Deny}}, {{requests: 7}}]"))
    assert traffic(model).rate_limits == (
        RateLimit(Per.SERVICE_ACCOUNT, 100, 1000, 50, True, Failure.DENY),
        RateLimit(Per.SERVICE, 7, 1000, 7),
    )
    catalogue = Catalogue.of(model.entities)
    assert sorted(catalogue.limits) == ["service/default/cart/80#0", "service/default/cart/81#0"]
    limit = catalogue.limits["service/default/cart/80#0"]
    assert limit.weights == {"default/gold": 3, "far/away": 2}
    assert not limit.counted
