"""Global limits in the mesh: callers of two nodes share one, the controller goes away and comes back, an agent lies."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab import mesh, paths, resources
from lab.lab import Lab
from lab.topology import CONTROLLER_ADDRESSES, Pod
from tests.kernel import shop

pytestmark = pytest.mark.kernel

WEB = """
import http.server, socket
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *_): pass
class Server(http.server.ThreadingHTTPServer):
    address_family, daemon_threads, request_queue_size = socket.AF_INET6, True, 128
Server(("::", 8080), Handler).serve_forever()
"""
PODS = (
    Pod("web-1", "node-1", ("10.77.1.80", "fd77:0:0:1::80"), command=("python3", "-c", WEB), ports=(8080,), labels={"app": "web"}),
    Pod("modest", "node-2", ("10.77.2.81", "fd77:0:0:2::81"), service_account="modest"),
)
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  clusterIPs: ["10.96.0.80", "fd96::80"]
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
"""
URL = "http://10.96.0.80"
POLICY = """
apiVersion: meshagent.io/v1alpha1
kind: TrafficPolicy
metadata: {name: web}
spec:
  targetRefs: [{kind: Service, name: web}]
  rateLimits: [%s]
"""
# Calls on one connection, evenly, as many a second as the first argument says, for as many seconds as the second. Says "begun" after the first one; when each
# ended and its status after the last: nobody reads before, and a full pipe would stop the calls.
CALLS = """
import http.client, sys, time
rate, seconds, host = float(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
connection, begin, count, seen = http.client.HTTPConnection(host, timeout=10), time.monotonic(), 0, []
while (now := time.monotonic()) - begin < seconds:
    if count > (now - begin) * rate:
        time.sleep(0.002)
        continue
    count = max(count + 1, int((now - begin - 0.2) * rate))
    connection.request("GET", "/")
    answer = connection.getresponse()
    answer.read()
    seen.append((time.monotonic(), answer.status))
    if len(seen) == 1:
        print("begun", flush=True)
for ended, status in seen:
    print(ended, status)
"""
# Says with one node's certificate what a caller of the other node wants; prints what the controller answers.
LIAR = """
import sys, grpc
from pathlib import Path
from meshapi import quota_pb2 as pb
ca, key, certificate, target, node, caller = sys.argv[1:]
credentials = grpc.ssl_channel_credentials(*(Path(name).read_bytes() for name in (ca, key, certificate)))
with grpc.secure_channel(target, credentials) as channel:
    share = channel.stream_stream("/meshagent.v1.Quotas/Share", pb.QuotaReport.SerializeToString, pb.QuotaAssignment.FromString)
    usage = pb.QuotaUsage(limit="service/default/web/80#0", caller=caller, allowed=10**9, denied=10**9, elapsed_ms=1000)
    try:
        for answer in share(iter([pb.QuotaReport(node=node, usages=[usage])]), timeout=25):
            for text in answer.refused:
                print("refused", text)
    except grpc.RpcError as error:
        print(error.code().name)
"""


class Calls:
    """Calls from a pod, as they come."""

    def __init__(self, lab: Lab, place: str, rate: float, seconds: float) -> None:
        argv = [sys.executable, "-c", CALLS, str(rate), str(seconds), URL.removeprefix("http://")]
        self._process = lab.popen(place, argv)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "begun\n"
        self._seen: list[tuple[float, int]] = []

    def wait(self) -> Calls:
        """Until all were made."""
        out, error = self._process.communicate(timeout=90)
        assert self._process.returncode == 0, error
        self._seen = [(float(at), int(status)) for at, status in (line.split() for line in out.splitlines())]
        return self

    def between(self, begin: float, end: float) -> Counter[int]:
        """Statuses of a time."""
        return Counter(status for at, status in self._seen if begin <= at < end)


@pytest.fixture(scope="module", autouse=True)
def web(lab: Lab) -> Iterator[None]:
    """A service on one node, and a caller on the other."""
    for pod in PODS:
        lab.add_pod(pod)
    with shop.applied(lab, "\n---\n".join([SERVICE, *(str(resources.workload(pod)) for pod in PODS)])):
        shop.takes(lambda: shop.codes(lab, "frontend", f"{URL}/") == shop.codes(lab, "modest", f"{URL}/") == {"200": 1})
        yield


@contextmanager
def limited(lab: Lab, limits: str) -> Iterator[None]:
    with shop.applied(lab, POLICY % limits):
        time.sleep(0.5)  # nothing says from outside when Envoy uses it
        yield
    assert [shop.status(node.name)["waypoint"]["nacks"] for node in lab.topology.nodes] == [0, 0]


def test_a_flood_from_one_node_leaves_the_modest_caller_of_the_other_all_it_wants(lab: Lab) -> None:
    with limited(lab, "{requests: 60, scope: Global}"):
        flood = Calls(lab, "frontend", 200, 40)
        time.sleep(7)
        modest = Calls(lab, "modest", 13, 26)
        joined = time.monotonic()
        time.sleep(16)
        restarted = time.monotonic()
        lab.controller_stop()
        lab.controller_start()
        back = time.monotonic()
        flood.wait()
        modest.wait()
    steady = (joined + 6, restarted)
    passed, seconds = flood.between(*steady)[200] + modest.between(*steady)[200], steady[1] - steady[0]
    print("joined", modest.between(0, joined + 3), "steady", flood.between(*steady), modest.between(*steady), passed / seconds)
    print("controller away", flood.between(restarted, back + 8), modest.between(restarted, back + 8), back + 8 - restarted)
    assert modest.between(0, joined + 3)[429] <= 2
    assert modest.between(*steady)[429] == 0
    assert flood.between(*steady)[429] > 0
    assert 0.75 * 60 <= passed / seconds <= 1.1 * 60
    assert modest.between(restarted, back + 8)[429] <= 2
    assert flood.between(restarted, back + 8)[200] <= 60 * (back + 8 - restarted) * 1.1


def test_a_quota_of_a_day_is_kept_over_a_restart_of_the_controller(lab: Lab) -> None:
    with limited(lab, "{requests: 200, interval: 24h, scope: Global, fairness: {by: ServiceAccount}}"):
        flood = Calls(lab, "frontend", 80, 30)
        time.sleep(13)
        lab.controller_stop()
        lab.controller_start()
        end = time.monotonic() + 30
        total = flood.wait().between(0, end)
        print("quota", total)
        assert 150 <= total[200] <= 205
        answer = shop.get(lab, "frontend", f"{URL}/")
        if answer["status"] == 429:
            assert answer["headers"]["x-meshagent-reason"] == ["rate-limit"]


def test_an_agent_speaks_for_no_other_node(lab: Lab) -> None:
    def lie(node: str, caller: str) -> str:
        files = [str(paths.PKI / name) for name in ("ca.crt", "node-1.key", "node-1.crt")]
        argv = lab.command(
            "node-1", [sys.executable, "-c", LIAR, *files, f"{CONTROLLER_ADDRESSES[0]}:{mesh.CONTROLLER_PORT}", node, caller]
        )
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60).stdout

    with limited(lab, "{requests: 60, scope: Global}"):
        assert "refused caller" in (said := lie("node-1", "default/modest")), said
        assert "does not live on node node-1" in said
        assert lie("node-2", "default/modest") == "PERMISSION_DENIED\n"
