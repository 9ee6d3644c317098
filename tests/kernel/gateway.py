"""Echo pods, and a Service of its own for each route that a test wants to see at work. Used by the tests of Gateway API in a running shop.

What applies at once to all tests of a module is applied once: a change of routes costs more than a request.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab import resources
from lab.lab import Lab
from lab.topology import Pod
from tests.kernel import shop

ECHO = str(Path(__file__).with_name("echo.py"))
CONSUMER = "consumer"


def _pod(name: str, node: int, host: int, version: str, namespace: str = "default") -> Pod:
    addresses = (f"10.77.{node}.{host}", f"fd77:0:0:{node}::{host}")
    labels = {"app": "echo" if namespace == "default" else "client", "version": version}
    return Pod(
        name, f"node-{node}", addresses, namespace, (sys.executable, ECHO), {"POD": name}, (8080, 7070), service_account=name, labels=labels
    )


ECHOES = (_pod("echo-v1", 1, 81, "v1"), _pod("echo-v2", 2, 82, "v2"))
CLIENTS = (_pod("client-v1", 1, 83, "v1", CONSUMER), _pod("client-v2", 2, 84, "v2", CONSUMER))
V1, V2 = (f"{CONSUMER}/{pod.name}" for pod in CLIENTS)
"""Callers in another namespace, on node 1 and node 2."""


def service(name: str, host: int, selector: str = "{app: echo}") -> str:
    """Return a Service of the echo pods at 10.96.1.HOST."""
    return f"""
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  clusterIP: 10.96.1.{host}
  selector: {selector}
  ports:
    - {{name: http, port: 80, targetPort: 8080, appProtocol: http}}
    - {{name: http-alt, port: 8080, targetPort: 8080, appProtocol: http}}
    - {{name: grpc, port: 7070, targetPort: 7070}}
---"""


def workload(pod: Pod, **labels: str) -> str:
    """Return the Workload of a pod, with other labels."""
    document = resources.workload(pod)
    document["metadata"]["labels"].update(labels)
    return "\n" + json.dumps(document) + "\n---"


def route(name: str, rules: str, parent: str = "", kind: str = "HTTPRoute", namespace: str = "default", more: str = "") -> str:
    """Return a route for a Service of its own name, or for `parent` (fields of a parentRef); `rules` in YAML's flow style."""
    return f"""
apiVersion: gateway.networking.k8s.io/v1
kind: {kind}
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  parentRefs: [{{group: "", kind: Service, {parent or f"name: {name}"}}}]
  {more}
  rules: {rules}
---"""


@contextmanager
def running(lab: Lab, routes: Mapping[str, str], *more: str) -> Iterator[dict[str, str]]:
    """The echo pods and, for each of `routes` (rules by name), a Service and its HTTPRoute; the address of each Service, and of echo, echo-v1, echo-v2."""
    documents = [
        service("echo", 10),
        service("echo-v1", 11, "{app: echo, version: v1}"),
        service("echo-v2", 12, "{app: echo, version: v2}"),
    ]
    addresses = {"echo": "10.96.1.10", "echo-v1": "10.96.1.11", "echo-v2": "10.96.1.12"}
    for host, (name, rules) in enumerate(routes.items(), start=20):
        documents.append(service(name, host))
        addresses[name] = f"10.96.1.{host}"
        if rules:
            documents.append(route(name, rules))
    pods = (*ECHOES, *CLIENTS)
    for pod in pods:
        lab.add_pod(pod)
        documents.append(workload(pod))
    with shop.applied(lab, "".join((*documents, *more)).removesuffix("---")):
        for caller in ("frontend", V1, V2):
            shop.takes(lambda caller=caller: shop.codes(lab, caller, f"http://{addresses['echo-v2']}/") == {"200": 1}, 20)  # type: ignore[misc]
        yield addresses


def pods(lab: Lab, place: str, url: str, *options: str) -> Counter[str]:
    """How often each echo pod answered; `url` has curl's ranges, and one process asks all of it."""
    text = lab.exec(place, ["curl", "-s", "--max-time", "10", "-w", "\\n", *options, url], timeout=90).stdout
    return Counter(json.loads(line)["pod"] for line in text.splitlines() if line)


def seen(lab: Lab, pod: str) -> dict[str, int]:
    """How often each path came to an echo pod; asked over its own loopback."""
    run = lab.exec(pod, ["curl", "-sS", "--max-time", "5", "http://127.0.0.1:8080/admin/seen"], check=True)
    found: dict[str, int] = json.loads(run.stdout)
    return found


def call(lab: Lab, place: str, target: str, method: str, count: int = 1, **metadata: str) -> list[dict[str, Any]]:
    """Call a gRPC method `count` times."""
    pairs = [f"{name.replace('_', '-')}={value}" for name, value in metadata.items()]
    run = lab.exec(place, [sys.executable, ECHO, "call", target, method, str(count), *pairs], timeout=60, check=True)
    found: list[dict[str, Any]] = json.loads(run.stdout)
    return found
