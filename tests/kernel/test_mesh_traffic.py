"""TrafficPolicies in the mesh: what endpoints get, what callers get, on one node and through tunnels."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lab import resources
from lab.lab import Lab
from lab.topology import Pod
from tests.kernel import shop

pytestmark = pytest.mark.kernel

# /set/NUMBER has it answer that status from now on; /healthz too. /slow takes a second, /big/KIB is so large. Everything else is counted by path.
WEB = """
import collections, http.server, json, os, socket, threading, time
state, seen = {"status": 200}, collections.Counter()
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    def do_GET(self):
        word, _, value = self.path.partition("?")[0][1:].partition("/")
        if word == "counters":
            return self.say(200, json.dumps(seen).encode())
        if word == "set":
            state["status"] = int(value)
            return self.say(200, b"{}")
        seen[word] += 1
        if word == "slow":
            time.sleep(1)
        self.say(state["status"], b"x" * (int(value) << 10) if word == "big" else json.dumps({"pod": os.environ["POD_NAME"]}).encode())
    def say(self, status, body):
        self.send_response(status); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass
class Server(http.server.ThreadingHTTPServer):
    address_family, daemon_threads, request_queue_size = socket.AF_INET6, True, 128
Server(("::", 8080), Handler).serve_forever()
"""
NEAR, FAR, MORE = "web-1", "web-2", "web-3"
PODS = tuple(
    Pod(name, f"node-{node}", (f"10.77.{node}.{70 + n}", f"fd77:0:0:{node}::{70 + n}"), command=("python3", "-c", WEB), ports=(8080,),
        labels={"app": "web"}, service_account="web")
    for n, (name, node) in enumerate(((NEAR, 1), (FAR, 2), (MORE, 2)))
)  # fmt: skip
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  clusterIPs: ["10.96.0.70", "fd96::70"]
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: web-callers}
spec:
  selector: {matchLabels: {app: web}}
  action: ALLOW
  rules: [{from: [{source: {serviceAccounts: [default/frontend, default/other]}}]}]
"""
URL = "http://10.96.0.70"
RETRY = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web-retry}
spec:
  parentRefs: [{group: "", kind: Service, name: web}]
  rules: [{backendRefs: [{name: web, port: 80}], retry: {codes: [503], attempts: 3, backoff: 10ms}}]
"""


@pytest.fixture(scope="module", autouse=True)
def web(lab: Lab) -> Iterator[None]:
    """One endpoint beside the callers, two on the other node, behind a policy that names the callers."""
    for pod in PODS:
        lab.add_pod(pod)
    with shop.applied(lab, "\n---\n".join([SERVICE, *(str(resources.workload(pod)) for pod in PODS)])):
        shop.takes(lambda: shop.codes(lab, "frontend", f"{URL}/") == {"200": 1})
        yield


@contextmanager
def policy(lab: Lab, spec: str, more: str = "") -> Iterator[None]:
    """A TrafficPolicy for `web`, and what else is given, in force; what pods were told to answer is forgotten afterwards."""
    document = f"apiVersion: meshagent.io/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: web}}\nspec:\n  targetRefs: [{{kind: Service, name: web}}]\n{spec}"
    with shop.applied(lab, document + (f"\n---\n{more}" if more else "")):
        shop.takes(lambda: _through_the_waypoint(lab))
        time.sleep(
            0.3
        )  # requests may take it by what it had before: nothing says from outside when Envoy has used what it has acknowledged
        try:
            yield
        finally:
            for pod in PODS:
                told(lab, pod.name, "set/200")
    assert [shop.status(node.name)["waypoint"]["nacks"] for node in lab.topology.nodes] == [0, 0]


def _through_the_waypoint(lab: Lab) -> bool:
    before = shop.requests(lab, "node-1", "outbound")
    shop.codes(lab, "frontend", f"{URL}/")
    return shop.requests(lab, "node-1", "outbound") > before


def told(lab: Lab, pod: str, what: str) -> Any:
    """What a pod says to itself, over its own loopback."""
    return json.loads(lab.exec(pod, ["curl", "-sS", "--max-time", "5", f"http://127.0.0.1:8080/{what}"], check=True).stdout)


def who(lab: Lab, count: int, *options: str, path: str = "/") -> Counter[str]:
    """Which pods answered, by calls of the frontend on connections of their own or on one."""
    out = lab.exec("frontend", ["curl", "-s", "--max-time", "10", "-w", "\n", *options, f"{URL}{path}?[1-{count}]"], timeout=60).stdout
    return Counter(json.loads(line)["pod"] for line in out.splitlines() if line.startswith("{"))


def by_user(lab: Lab, users: int, times: int) -> list[set[str]]:
    """Which pods answered each user, who is known by a header; every call on a connection of its own."""
    argv = ["curl"]
    for user in range(users):
        argv += [
            "-s",
            "--max-time",
            "10",
            "-w",
            "\n",
            "-H",
            f"x-user: user-{user}",
            "-H",
            "Connection: close",
            f"{URL}/?[1-{times}]",
            "--next",
        ]
    out = lab.exec("frontend", argv[:-1], timeout=60, check=True).stdout
    pods = [json.loads(line)["pod"] for line in out.splitlines() if line]
    return [set(pods[user * times : (user + 1) * times]) for user in range(users)]


@pytest.mark.parametrize("kind", ["RingHash", "Maglev"])
def test_a_hash_of_a_header_keeps_each_user_at_one_pod(lab: Lab, kind: str) -> None:
    with policy(lab, f"  loadBalancing: {{type: {kind}, hashOn: [{{header: x-user}}]}}"):
        seen = by_user(lab, 17, 5)
    assert all(len(pods) == 1 for pods in seen), seen
    assert len(set().union(*seen)) > 1


def test_maglev_moves_few_users_when_a_pod_goes(lab: Lab) -> None:
    with policy(lab, "  loadBalancing: {type: Maglev, hashOn: [{header: x-user}]}"):
        before = by_user(lab, 29, 1)
        whole = resources.workload(PODS[2])
        with shop.changed(lab):
            lab.apply(json.dumps({**whole, "spec": {**whole["spec"], "ready": False}}))
        shop.takes(lambda: {MORE} not in by_user(lab, 29, 1))
        after = by_user(lab, 29, 1)
        with shop.changed(lab):
            lab.apply(json.dumps(whole))
    moved = [user for user, pods in enumerate(before) if pods != {MORE} and after[user] != pods]
    assert {MORE} in before
    assert len(moved) <= 2, "who was elsewhere stays there, but for about one in a hundred"


def test_a_hash_of_the_caller_keeps_each_workload_at_one_pod(lab: Lab) -> None:
    with policy(lab, "  loadBalancing: {type: RingHash, hashOn: [{source: Workload}]}"):
        assert len(who(lab, 23)) == 1


@pytest.mark.parametrize("kind", ["RoundRobin", "Random", "LeastRequest"])
def test_without_a_hash_all_pods_have_their_share(lab: Lab, kind: str) -> None:
    with policy(lab, f"  loadBalancing: {{type: {kind}}}"):
        seen = who(lab, 60)
    assert set(seen) == {NEAR, FAR, MORE}
    assert min(seen.values()) >= (16 if kind == "RoundRobin" else 6), seen


def test_requests_above_the_limit_are_refused_at_once_with_a_reason(lab: Lab) -> None:
    with policy(lab, "  limits: {maxRequests: 3}"):
        started = time.monotonic()
        out = lab.exec(
            "frontend", ["curl", "-s", "-Z", "--parallel-immediate", "-D", "-", "-o", "/dev/null", f"{URL}/slow?[1-11]"]
        ).stdout.lower()
    assert (out.count(" 200 ok"), out.count(" 503 ")) == (3, 8), out
    assert out.count("x-meshagent-reason: overload") == 8
    assert time.monotonic() - started < 8


def test_a_pod_that_fails_is_ejected_and_taken_back_and_never_more_than_the_bound(lab: Lab) -> None:
    spec = "  loadBalancing: {type: RoundRobin}\n  outlierEjection: {consecutive5xx: 3, interval: 500ms, baseEjectionTime: 3s, maxEjectionPercent: 34}"
    with policy(lab, spec):
        for pod in (FAR, MORE):
            told(lab, pod, "set/500")
        who(lab, 60)
        time.sleep(0.3)  # Envoy collects such news for 100 ms
        seen = who(lab, 30)
        assert seen[NEAR] > 0
        assert len({FAR, MORE} & set(seen)) == 1, f"34 % of three is one: {seen}"
        for pod in (FAR, MORE):
            told(lab, pod, "set/200")
        shop.takes(lambda: set(who(lab, 12)) == {NEAR, FAR, MORE}, 15)


def test_a_retry_budget_bounds_retries(lab: Lab) -> None:
    def retries() -> int:
        return lab.envoy_stats("node-1").get("cluster.service/default/web/80.upstream_rq_retry", 0)

    with policy(lab, "  retryBudget: {percent: 0, minConcurrent: 0}", RETRY):
        for pod in PODS:
            told(lab, pod.name, "set/503")
        before = retries()
        assert shop.codes(lab, "frontend", f"{URL}/?[1-11]") == {"503": 11}
        assert retries() == before
    with policy(lab, "  limits: {maxRetries: 100}", RETRY):
        for pod in PODS:
            told(lab, pod.name, "set/503")
        before = retries()
        assert shop.codes(lab, "frontend", f"{URL}/?[1-11]") == {"503": 11}
        assert retries() == before + 33


CHECK = "  healthCheck: {http: {path: /healthz}, interval: 300ms, timeout: 250ms, unhealthyThreshold: 2, healthyThreshold: 1}"


def test_a_health_check_passes_policy_and_takes_a_sick_pod_out(lab: Lab) -> None:
    with policy(lab, CHECK):
        shop.takes(lambda: told(lab, NEAR, "counters").get("healthz", 0) > 2)
        assert set(who(lab, 30)) == {NEAR, FAR, MORE}
        told(lab, NEAR, "set/500")
        shop.takes(lambda: set(who(lab, 12)) == {FAR, MORE})
        told(lab, NEAR, "set/200")
        shop.takes(lambda: set(who(lab, 12)) == {NEAR, FAR, MORE})
        assert told(lab, FAR, "counters").get("healthz", 0) == 0, "who is behind a tunnel is not asked"


def test_what_is_near_comes_first_and_others_take_over(lab: Lab) -> None:
    with policy(lab, f"  loadBalancing: {{prefer: SameNode}}\n{CHECK}"):
        shop.takes(lambda: set(who(lab, 12)) == {NEAR})
        told(lab, NEAR, "set/500")
        shop.takes(lambda: set(who(lab, 12)) == {FAR, MORE})
        told(lab, NEAR, "set/200")
        shop.takes(lambda: set(who(lab, 12)) == {NEAR})


def test_faults_go_by_header_by_caller_and_by_percentage(lab: Lab) -> None:
    spec = """  faults:
    - {from: [{serviceAccounts: [other]}], abort: {httpStatus: 418}}
    - {headers: [{name: x-slow, value: "yes"}], delay: {duration: 400ms}}
    - {headers: [{name: x-some, value: "yes"}], abort: {httpStatus: 599, percent: 25}}
"""
    with policy(lab, spec):
        assert shop.codes(lab, "frontend", f"{URL}/?[1-7]") == {"200": 7}
        assert shop.codes(lab, "other", f"{URL}/?[1-7]") == {"418": 7}
        assert shop.get(lab, "other", f"{URL}/")["headers"]["x-meshagent-reason"] == ["fault-injection"]
        started = time.monotonic()
        assert shop.codes(lab, "frontend", f"{URL}/", "-H", "x-slow: yes") == {"200": 1}
        assert time.monotonic() - started >= 0.4
        # Binomial(200, 0.25): mean 50, standard deviation 6.1.
        assert abs(shop.codes(lab, "frontend", f"{URL}/?[1-200]", "-H", "x-some: yes")["599"] - 50) <= 37


def test_a_rate_limit_per_caller_leaves_another_caller_alone(lab: Lab) -> None:
    with policy(lab, "  rateLimits: [{requests: 7, interval: 100s, per: Workload}]"):
        shop.takes(lambda: shop.codes(lab, "frontend", f"{URL}/?[1-8]").get("429", 0) > 0)
        assert shop.codes(lab, "frontend", f"{URL}/?[1-5]") == {"429": 5}
        answer = shop.get(lab, "frontend", f"{URL}/")["headers"]
        assert (answer["x-meshagent-reason"], answer["retry-after"]) == (["rate-limit"], ["15"])
        assert shop.codes(lab, "other", f"{URL}/?[1-9]") == {"200": 7, "429": 2}


def test_a_rate_limit_of_a_service_is_one_count_for_all_callers_of_the_node(lab: Lab) -> None:
    with policy(lab, "  rateLimits: [{requests: 20, interval: 100s}]"):
        shop.takes(lambda: shop.codes(lab, "frontend", f"{URL}/?[1-10]").get("429", 0) > 0)
        assert shop.codes(lab, "other", f"{URL}/?[1-3]") == {"429": 3}


def test_bandwidth_is_within_15_percent_and_callers_share_it(lab: Lab) -> None:
    rate, size = 1024, 4096
    seconds: dict[str, float] = {}

    def fetch(caller: str, streams: int) -> None:
        started = time.monotonic()
        argv = [
            "curl",
            "-s",
            "-Z",
            "--parallel-immediate",
            "--max-time",
            "30",
            "-o",
            "/dev/null",
            f"{URL}/big/{size // streams}?[1-{streams}]",
        ]
        lab.exec(caller, argv, timeout=40, check=True)
        seconds[caller] = time.monotonic() - started

    with policy(lab, f"  bandwidth: {{responseKiB: {rate}}}"):
        time.sleep(1)
        fetch("frontend", 1)
        # One second's worth passes at once.
        assert abs((size - rate) / seconds["frontend"] - rate) <= 0.15 * rate, seconds
        both = [threading.Thread(target=fetch, args=args) for args in (("frontend", 4), ("other", 1))]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
    assert abs(seconds["frontend"] - seconds["other"]) <= 0.2 * seconds["other"], (
        f"four streams of one caller weigh as much as one of another: {seconds}"
    )


def test_two_policies_for_one_service_the_older_decides_and_the_other_says_so(lab: Lab) -> None:
    younger = """apiVersion: meshagent.io/v1alpha1
kind: TrafficPolicy
metadata: {name: web-younger, creationTimestamp: "2099-01-01T00:00:00Z"}
spec:
  targetRefs: [{kind: Service, name: web}]
  faults: [{abort: {httpStatus: 418}}]
"""
    with policy(lab, "  limits: {maxRequests: 100}"):
        lab.apply(younger)
        try:
            out = lab.meshagent("get", "trafficpolicies", "--controller", shop.CONTROLLER, "-o", "json", check=True).stdout
            assert "Conflicted" in out
            assert shop.codes(lab, "frontend", f"{URL}/?[1-5]") == {"200": 5}
        finally:
            shop.delete(lab, younger)
