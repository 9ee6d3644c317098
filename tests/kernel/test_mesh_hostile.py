"""What no client should send, at real waypoints: requests that could be two, floods of frames, half requests. Each has one outcome, and no other caller pays.

What could be read in two ways is answered, refused or written anew by the waypoint; the server here would be fooled by whatever is passed on as it came.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.l7 import fairness
from lab import resources
from lab.lab import Lab
from lab.topology import Pod
from tests.kernel import hostile, shop

pytestmark = pytest.mark.kernel

SCRIPT = Path(hostile.__file__)
PODS = tuple(
    Pod(f"naive-{node}", f"node-{node}", (f"10.77.{node}.95", f"fd77:0:0:{node}::95"), command=(sys.executable, str(SCRIPT), "serve"), ports=(8080,),
        labels={"app": "naive", "node": str(node)})
    for node in (1, 2)
)  # fmt: skip
ADDRESSES = {"same node": "10.96.0.95", "other node": "10.96.0.96"}
SERVICE = """
apiVersion: v1
kind: Service
metadata: {{name: naive-{n}}}
spec: {{clusterIP: 10.96.0.{host}, selector: {{app: naive, node: '{n}'}}, ports: [{{name: http, port: 80, targetPort: 8080, appProtocol: http}}]}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: naive-{n}}}
spec: {{parentRefs: [{{group: "", kind: Service, name: naive-{n}}}], rules: [{{backendRefs: [{{name: naive-{n}, port: 80}}]}}]}}
"""
DENY = """
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: naive}
spec:
  selector: {matchLabels: {app: naive}}
  action: DENY
  rules: [{to: [{operation: {paths: [/admin, "/admin/*"]}}]}, {to: [{operation: {hosts: [b]}}]}]
"""
PASSES = (
    "a folded coding", "a coding in capitals", "chunks in HTTP/1.0", "an underscore for a dash", "a length with zeros", "a length of a GET hides a request",
    "a chunk extension", "a long chunk extension", "a chunk that is longer than it says", "a length as a trailer", "a host as a trailer",
    "a line before the request", "two spaces", "a tab", "HTTP/0.9", "HTTP/1.2", "HTTP/2.0 in a line", "an upgrade to HTTP/2", "100 headers",
    "59 KiB of headers", "a user in the target",
)  # fmt: skip
"""Written anew by the waypoint, in one reading."""
OTHERS = {
    **dict.fromkeys(
        ("two codings", "chunked twice", "identity, chunked", "chunked, identity", "gzip, chunked", "a coding in quotation marks"), 501
    ),
    **dict.fromkeys(("1,000 headers", "61 KiB of headers", "61 KiB of path", "200 KiB of trailers"), 431),
    **dict.fromkeys(("another host in the target", "two hosts", "an unknown upgrade"), 403),
}
FIRST = {name: 200 if name in PASSES else OTHERS.get(name, 400) for name in hostile.HTTP1}
SECOND: dict[str, int | str] = {
    **dict.fromkeys(hostile.HTTP2, "closed"),
    **dict.fromkeys(("a length that is too short", "a length that is too long", "1,000 headers"), "reset"),
    "data before headers": "goaway",
    "plain": 200,
    "another host": 200,  # the server is told the :authority
}


@pytest.fixture(scope="module", autouse=True)
def naive(lab: Lab) -> Iterator[None]:
    """A service on each node."""
    documents = [SERVICE.format(n=n, host=94 + n) for n in (1, 2)]
    for pod in PODS:
        lab.add_pod(pod)
        documents.append(json.dumps(resources.workload(pod)))
    with shop.applied(lab, "\n---\n".join([*documents, DENY])):
        shop.takes(lambda: all(shop.codes(lab, "frontend", f"http://{host}/admin") == {"403": 1} for host in ADDRESSES.values()))
        yield


def ask(lab: Lab, host: str, *names: str, caller: str = "frontend") -> dict[str, Any]:
    run = lab.exec(caller, [sys.executable, str(SCRIPT), "ask", host, "80", *names], timeout=120)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def status(outcome: Any) -> int | str:
    """Of the one answer that came, or what came instead; more than one answer is what must not be."""
    if isinstance(outcome, str):
        return outcome
    return int(outcome[0][0]) if len(outcome) == 1 else f"{len(outcome)} answers"


def lines(lab: Lab, host: str) -> set[str]:
    return set(shop.get(lab, "frontend", f"http://{host}/lines")["lines"])


@pytest.mark.parametrize("host", ADDRESSES.values(), ids=ADDRESSES)
def test_http1_that_could_be_two_requests_is_one_or_none(lab: Lab, host: str) -> None:
    found = ask(lab, host, *(f"1 {name}" for name in hostile.HTTP1))
    assert {name: status(found[f"1 {name}"]) for name in hostile.HTTP1} == FIRST
    for name in PASSES:
        seen = found[f"1 {name}"][0][1]
        assert "http/1.1" in seen["line"].lower(), name
        assert seen["body"] in {"", "hello", hostile.HIDDEN}, name
        fields = [field.partition(":")[0] for field in seen["headers"]]
        assert len({"content-length", "transfer-encoding"} & set(fields)) <= 1, name
        assert fields.count("host") == 1, name
    assert not {line for line in lines(lab, host) if "admin" in line}, "nothing that was hidden came out"


@pytest.mark.parametrize("host", ADDRESSES.values(), ids=ADDRESSES)
def test_http2_that_would_be_something_else_in_http1_is_refused(lab: Lab, host: str) -> None:
    found = ask(lab, host, *(f"2 {name}" for name in hostile.HTTP2))
    assert {name: status(found[f"2 {name}"]) for name in hostile.HTTP2} == SECOND
    (other,) = found["2 another host"]
    assert [field for field in other[1]["headers"] if field.startswith("host")] == ["host: a"]
    assert not {line for line in lines(lab, host) if "admin" in line}
    assert ask(lab, host, "2 plain")["2 plain"][0][0] == 200, "who was refused may come again"


@pytest.mark.parametrize("name", hostile.FLOODS)
def test_a_flood_of_frames_ends_with_its_connection_and_another_caller_is_served(lab: Lab, name: str) -> None:
    before = shop.status("node-1")["waypoint"]["pid"]
    host = ADDRESSES["same node"]
    with shop.loads(lab, ("frontend", f"http://{host}/items")) as calls:
        for _ in range(3):
            assert ask(lab, host, f"flood {name}", caller="other") == {f"flood {name}": "closed"}
    (found,) = calls
    assert shop.outcomes(found).keys() == {"200"}, shop.outcomes(found)
    assert shop.status("node-1")["waypoint"]["pid"] == before
    assert resident(before) < 512 << 20


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) << 10


@contextlib.contextmanager
def holding(lab: Lab, host: str, count: int, begun: str) -> Iterator[None]:
    """So many connections of one workload, each with the beginning of a request on it."""
    command = lab.command("other", [sys.executable, str(SCRIPT), "hold", host, "80", str(count), begun])
    with subprocess.Popen(
        command, env=lab.environment(lab.topology.place("other")), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as held:
        assert held.stdin is not None
        assert held.stdout is not None
        try:
            assert held.stdout.readline() == f"{count}\n"
            yield
        finally:
            held.stdin.close()


@pytest.mark.parametrize(
    "begun",
    [
        pytest.param(r"GET / HTTP/1.1\r\nhost: a\r\nx: ", id="headers"),
        pytest.param(r"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\nx", id="bodies"),
        pytest.param("", id="nothing"),
    ],
)
def test_a_thousand_half_requests_of_one_workload_do_not_keep_another_waiting(lab: Lab, begun: str) -> None:
    host = ADDRESSES["same node"]
    with holding(lab, host, 1000, begun):
        answers = shop.codes(lab, "frontend", f"http://{host}/items?[1-23]")
        again = shop.codes(lab, "other", f"http://{host}/items?[1-23]")
    assert (answers, again) == ({"200": 23}, {"200": 23})


def test_more_connections_than_one_workload_may_have_are_closed_and_another_gets_in(lab: Lab) -> None:
    host = ADDRESSES["same node"]
    shop.takes(lambda: limited(lab)[0] == 0 or limited(lab)[0] < 50, 20)
    before = limited(lab)[1]
    with holding(lab, host, fairness.MOST_CONNECTIONS + 100, ""):
        assert shop.codes(lab, "frontend", f"http://{host}/items?[1-23]") == {"200": 23}
        assert shop.codes(lab, "other", f"http://{host}/items").keys() <= {"curl 52", "curl 56"}, "an empty answer, or a reset"
        active, closed = limited(lab)
        assert active <= fairness.MOST_CONNECTIONS + 50
        assert closed - before >= 100
    shop.takes(lambda: shop.codes(lab, "other", f"http://{host}/items") == {"200": 1})


def limited(lab: Lab) -> tuple[int, int]:
    """Of outbound listeners: connections now, and how many were closed for being too many."""
    stats = lab.envoy_stats("node-1")
    return stats.get("connection_limit.outbound.active_connections", 0), stats.get("connection_limit.outbound.limited_connections", 0)
