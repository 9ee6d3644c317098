"""One workload does its worst at the waypoint that all share, and another is served. How fast exactly is what bench/fairness.py says."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import paths, resources
from lab.lab import Lab
from lab.topology import Pod
from tests.kernel import echo, openloop, shop

pytestmark = pytest.mark.kernel

URL, OWN = "http://10.96.0.97", "http://10.96.0.98"
RATE, SECONDS = 100, 5
LATE_S = 0.5
"""What nearly every request has to be answered in, on two CPUs that a flood's own programs use up."""
PODS = tuple(
    Pod(name, "node-1", (f"10.77.1.{host}", f"fd77:0:0:1::{host}"), command=(sys.executable, str(Path(echo.__file__))), ports=(8080,),
        labels={"app": name})
    for name, host in (("flooded", 97), ("calm", 98))
)  # fmt: skip
SERVICE = """
apiVersion: v1
kind: Service
metadata: {{name: {name}, annotations: {{meshagent.io/waypoint: "true"}}}}
spec: {{clusterIP: 10.96.0.{host}, selector: {{app: {name}}}, ports: [{{name: http, port: 80, targetPort: 8080, appProtocol: http}}]}}
"""
LIMITS = """
apiVersion: meshagent.io/v1alpha1
kind: TrafficPolicy
metadata: {{name: flooded}}
spec: {{targetRefs: [{{kind: Service, name: flooded}}], limits: {{per: {per}, {limits}}}}}
"""


@pytest.fixture(scope="module", autouse=True)
def services(lab: Lab) -> Iterator[None]:
    """One that is flooded, and one that the quiet caller asks."""
    documents = [SERVICE.format(name=name, host=host) for name, host in (("flooded", 97), ("calm", 98))]
    for pod in PODS:
        lab.add_pod(pod)
        documents.append(json.dumps(resources.workload(pod)))
    with shop.applied(lab, "\n---\n".join(documents)):
        for url in (URL, OWN):
            shop.takes(lambda url=url: shop.codes(lab, "frontend", f"{url}/") == {"200": 1})  # type: ignore[misc]
        yield


@contextlib.contextmanager
def flood(lab: Lab, argv: list[str]) -> Iterator[None]:
    """A load generator of another workload that runs within the block."""
    command = lab.command("other", argv)
    with subprocess.Popen(
        command, env=lab.environment(lab.topology.place("other")), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as running:
        try:
            yield
            assert running.poll() is None, "it was there all the time"
        finally:
            running.kill()


def body() -> str:
    """A file of 4 MiB, gone with the lab."""
    path = paths.RUN / "body"
    path.write_bytes(bytes(4 << 20))
    return str(path)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("connections", id="256-connections"),
        pytest.param("streams", id="400-streams"),
        pytest.param("churn", id="connections-that-come-and-go"),
        pytest.param("bodies", id="large-bodies"),
    ],
)
def test_a_quiet_caller_is_answered_beside_a_flood(lab: Lab, kind: str) -> None:
    argv = {
        "connections": ["wrk", "-t", "1", "-c", "256", "-d", "60s", f"{URL}/"],
        "streams": ["h2load", "-p", "h2c", "-c", "4", "-m", "100", "-D", "60", f"{URL}/"],
        "churn": ["wrk", "-t", "1", "-c", "64", "-d", "60s", "-H", "connection: close", f"{URL}/"],
        "bodies": ["h2load", "--h1", "-c", "16", "-D", "60", "-d", body(), f"{URL}/"],
    }[kind]
    with (
        shop.applied(lab, LIMITS.format(per="Workload", limits="maxConnections: 8")),
        flood(lab, argv),
        openloop.asking(lab, "frontend", f"{OWN}/", rate=RATE, seconds=SECONDS, connections=4) as seen,
    ):
        pass
    assert seen.statuses.keys() == {200}, seen.statuses
    assert seen.percentile(0.95) < LATE_S, [seen.percentile(share) for share in (0.5, 0.95, 0.99, 1)]


@pytest.mark.parametrize(("per", "expected"), [("Service", "503"), ("Workload", "200")])
def test_slow_requests_of_one_workload_use_up_its_own_share(lab: Lab, per: str, expected: str) -> None:
    slow = ["curl", "-s", "-Z", "--parallel-immediate", "--parallel-max", "20", "-o", "/dev/null", f"{URL}/slow?[1-500]"]
    with shop.applied(lab, LIMITS.format(per=per, limits="maxRequests: 5")):
        shop.takes(lambda: shop.codes(lab, "frontend", f"{URL}/") == {"200": 1})
        with flood(lab, ["sh", "-c", f"while :; do {' '.join(slow)}; done"]):
            shop.takes(lambda: shop.codes(lab, "other", f"{URL}/").get("503", 0) == 1)
            answers = sum((shop.codes(lab, "frontend", f"{URL}/") for _ in range(7)), start=Counter[str]())
    assert answers[expected] >= (7 if expected == "200" else 1), answers
