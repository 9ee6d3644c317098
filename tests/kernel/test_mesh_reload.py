"""Configuration that changes all the time under a thousand requests a second: none is lost, and an agent that is replaced meanwhile loses none either."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.l7.xds import LINGER_S
from agent.revocation import LET_GO_S, SETTLE_S
from agent.supervisor import READERS_S
from bench import tools
from lab import paths, resources
from lab.lab import Lab
from lab.topology import Pod
from meshapi import admin_pb2 as pb
from meshapi import admin_pb2_grpc
from tests.kernel import openloop, shop

pytestmark = pytest.mark.kernel

URL = "http://10.96.0.91/"
RATE, SECONDS, EVERY_S = 1000, 15, 0.2
LATE_S = READERS_S + 2
"""How late a node begins to read requests: later than others think."""
ENOUGH = 0.5
"""Of the rate that is asked for: a machine that others use may not reach it."""
PODS = tuple(
    Pod(f"swift-{n}", node, (f"10.77.{node[-1]}.9{n}", f"fd77:0:0:{node[-1]}::9{n}"), labels={"app": "swift", "n": str(n)}, ports=(8080,),
        command=("sh", "-c", f"printf '%s' '{tools.nginx(8080)}' > {paths.RUN}/swift-{n}.conf && exec nginx -e stderr -c {paths.RUN}/swift-{n}.conf"))
    for n, node in ((1, "node-1"), (2, "node-1"), (3, "node-2"))
)  # fmt: skip
SERVICES = """
apiVersion: v1
kind: Service
metadata: {name: swift}
spec: {clusterIP: 10.96.0.91, selector: {app: swift}, ports: [{name: http, port: 80, targetPort: 8080, appProtocol: http}]}
---
apiVersion: v1
kind: Service
metadata: {name: swift-near}
spec: {clusterIP: 10.96.0.92, selector: {app: swift, n: '1'}, ports: [{name: http, port: 80, targetPort: 8080, appProtocol: http}]}
"""
ROUTE = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: swift}}
spec:
  parentRefs: [{{group: "", kind: Service, name: swift}}]
  rules:
    - matches: [{{path: {{type: PathPrefix, value: /other-{turn}}}}}]
      backendRefs: [{{name: swift, port: 80}}]
    - backendRefs: [{{name: swift, port: 80, weight: {weight}}}, {{name: swift-near, port: 80, weight: 1}}]
      filters: [{{type: ResponseHeaderModifier, responseHeaderModifier: {{set: [{{name: x-turn, value: "{turn}"}}]}}}}]
"""
POLICY = """
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: swift}}
spec: {{selector: {{matchLabels: {{app: swift}}}}, action: DENY, rules: [{{to: [{{operation: {{paths: [/secret-{turn}]}}}}]}}]}}
"""
BY_PORT = """
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: swift}
spec: {selector: {matchLabels: {app: swift}}, action: DENY, rules: [{to: [{operation: {ports: ['9']}}]}]}
"""
PLAIN = """
apiVersion: meshagent.io/v1alpha1
kind: PeerAuthentication
metadata: {name: swift}
spec: {selector: {matchLabels: {app: swift}}, mtls: {mode: DISABLE}}
"""
TRAFFIC = """
apiVersion: meshagent.io/v1alpha1
kind: TrafficPolicy
metadata: {{name: swift}}
spec:
  targetRefs: [{{kind: Service, name: swift}}]
  loadBalancing: {{type: {kind}}}
  limits: {{maxRequests: {limit}, per: {per}}}
"""


def endpoint(turn: int) -> str:
    """The second endpoint of the caller's node, ready or not."""
    document = resources.workload(PODS[1])
    return json.dumps({**document, "spec": {**document["spec"], "ready": turn % 2 == 0}})


CHANGES: tuple[Callable[[int], str], ...] = (
    lambda turn: ROUTE.format(turn=turn, weight=turn % 7 + 1),
    lambda turn: POLICY.format(turn=turn),
    lambda turn: TRAFFIC.format(
        kind=("RoundRobin", "LeastRequest")[turn % 2], limit=1000 + turn, per=("Service", "Workload")[turn // 2 % 2]
    ),
    endpoint,
)


@pytest.fixture(scope="module", autouse=True)
def swift(lab: Lab) -> Iterator[None]:
    """A service of three quick servers, one of them on the other node."""
    documents = [SERVICES, ROUTE.format(turn=0, weight=1)]
    for pod in PODS:
        lab.add_pod(pod)
        documents.append(json.dumps(resources.workload(pod)))
    with shop.applied(lab, "\n---\n".join(documents)):
        shop.takes(lambda: shop.codes(lab, "frontend", f"{URL}?[1-23]") == {"200": 23})
        yield


@pytest.fixture
def admin() -> Iterator[Callable[[str], None]]:
    """The way that `meshagent apply` takes, without starting a program each time."""
    with grpc.insecure_channel(f"unix:{paths.CONTROLLER_SOCKET}") as channel:
        stub = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call,unused-ignore]

        def apply(text: str) -> None:
            answer = stub.Apply(pb.ApplyRequest(documents=[pb.Document(origin="test", yaml=text)]), timeout=5)
            assert [one.message for one in answer.results if one.action == "refused"] == []

        yield apply


def refused(lab: Lab) -> Counter[str]:
    """Requests of the callers that were answered with 503, by what the waypoints say of them."""
    families = [family for node in ("node-1", "node-2") for family in text_string_to_metric_families(lab.metrics(node))]
    found = [s for family in families for s in family.samples if s.name == "mesh_requests_total" and s.labels["response_code"] == "503"]
    return Counter({json.dumps({name: value for name, value in s.labels.items() if value}): int(s.value) for s in found})


def closed_by_policy(lab: Lab) -> int:
    """Connections that went past who reads them until their time was over."""
    families = [family for node in ("node-1", "node-2") for family in text_string_to_metric_families(lab.metrics(node))]
    return int(sum(s.value for family in families for s in family.samples if s.name == "mesh_connections_closed_by_policy_total"))


@contextmanager
def none_lost(lab: Lab, options: tuple[str, ...] = ("--h1",), seconds: int = SECONDS) -> Iterator[None]:
    """Ask meanwhile. If anything was lost, the report says when that had been asked, and what the waypoints say of it."""
    before, closed = refused(lab), closed_by_policy(lab)
    with openloop.asking(lab, "frontend", URL, rate=RATE, seconds=seconds, options=options) as seen:
        yield
    assert seen.statuses[openloop.OK] > ENOUGH * RATE * seconds
    assert not seen.failed, (
        f"lost, with the second in which it was asked: {seen.failed}; what the waypoints say: {refused(lab) - before}; "
        f"connections that the agents closed: {closed_by_policy(lab) - closed}"
    )


def change(apply: Callable[[str], None], until: float) -> int:
    """Apply one change after the other until then; how many."""
    for turn in itertools.count(1):
        if time.monotonic() >= until:
            return turn - 1
        began = time.monotonic()
        apply(CHANGES[turn % len(CHANGES)](turn // len(CHANGES)))
        time.sleep(max(0.0, EVERY_S - (time.monotonic() - began)))
    raise AssertionError


@pytest.mark.parametrize("options", [("--h1",), ("-p", "h2c", "-m", "10")], ids=["http1", "http2"])
def test_no_request_is_lost_while_routes_policies_and_endpoints_change(
    lab: Lab, admin: Callable[[str], None], options: tuple[str, ...]
) -> None:
    with none_lost(lab, options):
        changes = change(admin, time.monotonic() + SECONDS - 1)
    assert changes > SECONDS / EVERY_S / 2, "the controller took them as fast as they came"
    assert shop.status("node-1")["problems"] == []


def test_no_request_is_lost_while_the_agents_are_replaced_and_configuration_changes(lab: Lab, admin: Callable[[str], None]) -> None:
    envoys = [shop.status(node)["waypoint"]["pid"] for node in ("node-1", "node-2")]
    with none_lost(lab):
        ends = time.monotonic() + SECONDS - 1
        change(admin, time.monotonic() + 3)
        for node in ("node-1", "node-2"):
            lab.kill_agent(node)
            change(admin, time.monotonic() + 1)
            lab.start_agent(node)
        change(admin, ends)
    assert [shop.status(node)["waypoint"]["pid"] for node in ("node-1", "node-2")] == envoys


def test_no_request_is_lost_when_a_receiver_begins_late_to_read_requests(lab: Lab, admin: Callable[[str], None]) -> None:
    """Its node closes what goes past its inspection. By then the caller's waypoint has let go of that, however late the node was."""
    policy = POLICY.format(turn=0)
    admin(policy)
    shop.delete(lab, policy)
    time.sleep(READERS_S + 1)
    before = closed_by_policy(lab)
    agent = lab.agent_pid("node-2")
    with none_lost(lab, seconds=int(LATE_S + LET_GO_S + SETTLE_S) + 5):
        time.sleep(1)
        os.kill(agent, signal.SIGSTOP)
        try:
            admin(policy)
            time.sleep(LATE_S)
        finally:
            os.kill(agent, signal.SIGCONT)
    assert closed_by_policy(lab) == before


@pytest.mark.parametrize(
    ("peers", "before"), [(PLAIN, ""), ("", ""), (PLAIN, BY_PORT)], ids=["plain", "tunnels", "plain-and-another-one-before"]
)
def test_no_request_is_lost_when_the_first_policy_that_asks_for_requests_comes_with_the_first_connections(
    lab: Lab, admin: Callable[[str], None], peers: str, before: str
) -> None:
    """Receivers lead new connections to their waypoint from one moment on: it listens by then."""
    policy = POLICY.format(turn=0)
    with shop.applied(lab, peers) if peers else nullcontext():
        for _ in range(2):
            admin(policy)
            if before:
                admin(before)
            else:
                shop.delete(lab, policy)
            time.sleep(LINGER_S + READERS_S)
            with none_lost(lab, seconds=2):
                admin(policy)
