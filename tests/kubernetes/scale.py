"""How the source copes with a large cluster: `make bench-kubernetes` prints one JSON object.

A process of its own lists and watches an API server with many pods, as the controller does; measured are the time until all of it is in force, the memory of
that process, and its CPU time while pods change. The API server's own time is in the first figure: it makes the JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import ssl
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2

from controller.kubernetes.api import Api
from controller.kubernetes.source import KubernetesSource
from tests.kubernetes import controlplane
from tests.kubernetes.controlplane import ControlPlane

_WRITERS = 8


def _pod(number: int) -> dict[str, Any]:
    """As large as a usual one: 3 KB and more of JSON with what the server adds."""
    environment = [{"name": f"SETTING_{index}", "value": "value " * 4} for index in range(12)]
    container = {
        "name": "app",
        "image": f"registry.example/app:{number}",
        "env": environment,
        "ports": [{"name": "web", "containerPort": 8080}],
    }
    metadata = {"name": f"app-{number}", "labels": {"app": f"app-{number % 500}", "version": "v1", "pod-template-hash": f"{number:x}"}}
    spec = {"nodeName": f"node-{number % 500}", "serviceAccountName": f"app-{number % 500}", "containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _write(plane: ControlPlane, numbers: range, change: bool) -> None:
    context = ssl.create_default_context(cafile=plane.directory / "ca.crt")
    context.load_cert_chain(plane.directory / "admin.crt", plane.directory / "admin.key")
    with httpx2.Client(base_url=plane.url, verify=context, timeout=60) as client:
        for number in numbers:
            path = "/api/v1/namespaces/many/pods"
            if not change:
                client.post(path, json=_pod(number)).raise_for_status()
            address = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
            status = {"phase": "Running", "podIPs": [{"ip": address}], "conditions": [{"type": "Ready", "status": str(not change)}]}
            body = json.dumps({"status": {**status, "podIP": address}})
            headers = {"Content-Type": "application/merge-patch+json"}
            client.patch(f"{path}/app-{number}/status", content=body, headers=headers).raise_for_status()


async def _follow(kubeconfig: Path, pods: int, changes: int) -> dict[str, Any]:
    """The measured process: says on stdout when all is in force, and once more when the changes are."""
    began = time.monotonic()
    source = KubernetesSource(Api.connect(kubeconfig))
    answer: dict[str, Any] = {"pods": pods}
    events, cpu = 0, 0.0
    async for _ in source.follow():
        reflector = source.reflectors["Pod"]
        state = await asyncio.to_thread(source.load)
        if "list_s" not in answer:
            if not source.ready:
                continue
            answer["objects"] = len(state.objects)
            answer["list_s"] = round(time.monotonic() - began, 2)
            answer["rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            print("listed", flush=True)
            events, cpu, began = reflector.events, time.process_time(), time.monotonic()
        if reflector.events - events >= changes:
            answer["changes"] = reflector.events - events
            answer["changes_s"] = round(time.monotonic() - began, 2)
            answer["cpu_ms_per_change"] = round((time.process_time() - cpu) * 1000 / (reflector.events - events), 3)
            answer["rss_after_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            return answer
    raise AssertionError


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, help="directory with etcd and kube-apiserver")
    parser.add_argument("--pods", type=int, default=50_000)
    parser.add_argument("--changes", type=int, default=2_000)
    parser.add_argument("--follow", type=Path, help="(for itself)")
    options = parser.parse_args()
    if options.follow:
        print(json.dumps(asyncio.run(_follow(options.follow, options.pods, options.changes))), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder, controlplane.running(options.assets, Path(folder)) as plane:
        plane.install_crds()
        plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "many", "labels": {"meshagent.io/mode": "mesh"}}})
        kubeconfig = plane.kubeconfig()
        with ThreadPoolExecutor(_WRITERS) as writers:
            list(writers.map(lambda first: _write(plane, range(first, options.pods, _WRITERS), change=False), range(_WRITERS)))
        argv = [sys.executable, "-m", "tests.kubernetes.scale", "--follow", str(kubeconfig)]
        argv += ["--pods", str(options.pods), "--changes", str(options.changes)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as following:
            assert following.stdout is not None
            if following.stdout.readline().strip() != "listed":
                raise SystemExit("the source did not become ready")
            _write(plane, range(options.changes), change=True)
            print(following.stdout.readline().strip())


if __name__ == "__main__":
    main()
