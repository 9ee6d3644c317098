"""How the controller copes with a large cluster: `make bench-kubernetes` prints one JSON object.

Two processes of their own read an API server with many pods, one after the other. `source` only lists and watches: the time until all is known, memory, CPU
time while pods change. `controller` is the whole one, with a certificate authority and agents that are connected to it: the time until each agent has the
model, memory, CPU time at rest, and how long one pod's change takes to the agents. The API server's own time is in the first figures: it makes the JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx2

from controller.discovery import SERVICE
from controller.kubernetes.api import Api
from controller.kubernetes.source import KubernetesSource
from controller.objects import ROOT_NAMESPACE, ZONE_LABEL
from meshapi import discovery_pb2 as pb
from tests.kubernetes import controlplane
from tests.kubernetes.controlplane import ControlPlane

_WRITERS = 8
_AGENTS = 3
_APPS = 500
_PAUSE_S = 0.3
"""Between single changes, so that each is looked at by itself."""
_PODS = "/api/v1/namespaces/many/pods"


def _pod(number: int) -> dict[str, Any]:
    """As large as a usual one: 3 KB and more of JSON with what the server adds."""
    environment = [{"name": f"SETTING_{index}", "value": "value " * 4} for index in range(12)]
    container: dict[str, Any] = {
        "name": "app",
        "image": f"registry.example/app:{number}",
        "env": environment,
        "ports": [{"name": "web", "containerPort": 8080}],
    }
    container["readinessProbe"] = {"httpGet": {"port": "web"}}
    metadata = {"name": f"app-{number}", "labels": {"app": f"app-{number % 500}", "version": "v1", "pod-template-hash": f"{number:x}"}}
    spec = {"nodeName": f"node-{number % 500}", "serviceAccountName": f"app-{number % 500}", "containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _cluster(plane: ControlPlane) -> None:
    """All but pods: 500 services and nodes, 100 policies, STRICT everywhere."""
    ours = "meshagent.io/v1alpha1"
    plane.install_crds()
    plane.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "many", "labels": {"meshagent.io/mode": "mesh"}}},
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": ROOT_NAMESPACE}},
    )
    strict = {"metadata": {"name": "strict", "namespace": ROOT_NAMESPACE}, "spec": {"mtls": {"mode": "STRICT"}}}
    plane.apply({"apiVersion": ours, "kind": "PeerAuthentication", **strict})
    rules = [{"from": [{"source": {"namespaces": ["many"]}}]}]
    made: list[dict[str, Any]] = []
    for number in range(_APPS):
        name = {"name": f"app-{number}", "namespace": "many"}
        labels = {"app": f"app-{number}"}
        service = {"selector": labels, "ports": [{"port": 80, "targetPort": "web"}]}
        node = {"name": f"node-{number}", "labels": {ZONE_LABEL: f"zone-{number % 3}"}}
        made += [
            {"apiVersion": "v1", "kind": "Service", "metadata": name, "spec": service},
            {"apiVersion": "v1", "kind": "Node", "metadata": node},
        ]
        if number < _APPS // 5:
            policy = {"selector": {"matchLabels": labels}, "rules": rules}
            made.append({"apiVersion": ours, "kind": "AuthorizationPolicy", "metadata": name, "spec": policy})
    plane.apply(*made)


def _client(plane: ControlPlane) -> httpx2.Client:
    context = ssl.create_default_context(cafile=plane.directory / "ca.crt")
    context.load_cert_chain(plane.directory / "admin.crt", plane.directory / "admin.key")
    return httpx2.Client(base_url=plane.url, verify=context, timeout=60)


def _set_ready(client: httpx2.Client, number: int, *, ready: bool) -> None:
    """Write a pod's status, as a kubelet does."""
    address = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
    status = {"phase": "Running", "podIPs": [{"ip": address}], "conditions": [{"type": "Ready", "status": str(ready)}]}
    body = json.dumps({"status": {**status, "podIP": address}})
    headers = {"Content-Type": "application/merge-patch+json"}
    client.patch(f"{_PODS}/app-{number}/status", content=body, headers=headers).raise_for_status()


def _make(plane: ControlPlane, numbers: range) -> None:
    with _client(plane) as client:
        for number in numbers:
            client.post(_PODS, json=_pod(number)).raise_for_status()
            _set_ready(client, number, ready=True)


def _change(plane: ControlPlane, numbers: range, *, ready: bool) -> None:
    with _client(plane) as client:
        for number in numbers:
            _set_ready(client, number, ready=ready)


async def _follow(kubeconfig: Path, changes: int) -> dict[str, Any]:
    """The measured process: says on stdout when all is in force, and once more when the changes are."""
    began = time.monotonic()
    source = KubernetesSource(Api.connect(kubeconfig))
    answer: dict[str, Any] = {}
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


class _Agent:
    """One connected agent: takes every response, and says when a workload is ready or is not."""

    def __init__(self, socket: Path, node: str) -> None:
        self._node, self._target = node, f"unix:{socket}"
        self.held: dict[str, bool] = {}
        self.bytes = 0
        self.news = asyncio.Event()

    async def run(self) -> None:
        """Follow for ever."""
        backoff = [(f"grpc.{name}_reconnect_backoff_ms", 100) for name in ("initial", "min", "max")]
        async with grpc.aio.insecure_channel(self._target, options=[("grpc.max_receive_message_length", -1), *backoff]) as channel:
            stream: Any = channel.stream_stream(f"/{SERVICE}/Stream")(wait_for_ready=True)
            await stream.write(pb.DiscoveryRequest(node=self._node).SerializeToString())
            while isinstance(raw := await stream.read(), bytes):
                response = pb.DiscoveryResponse.FromString(raw)
                self.bytes += len(raw)
                for resource in response.resources:
                    if resource.name.startswith("workload/"):
                        self.held[resource.name] = pb.Entity.FromString(resource.entity).workload.ready
                await stream.write(pb.DiscoveryRequest(nonce=response.nonce).SerializeToString())
                self.news.set()

    async def until(self, names: Iterable[str], *, ready: bool) -> None:
        """Wait until it holds all of these so."""
        names = list(names)
        while any(self.held.get(name) is not ready for name in names):
            self.news.clear()
            await self.news.wait()


class _Process:
    """What the kernel says of one (https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html)."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")

    def cpu_s(self) -> float:
        """Time of processors, of all threads."""
        fields = (self._folder / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def mb(self, name: str) -> int:
        """VmRSS, or VmHWM for the most that it was."""
        line = next(line for line in (self._folder / "status").read_text().splitlines() if line.startswith(f"{name}:"))
        return int(line.split()[1]) >> 10


async def _whole(plane: ControlPlane, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure `mesh-controller run`."""
    socket = folder / "controller.sock"
    argv = [
        sys.executable,
        "-c",
        "from controller.main import main; main()",
        "run",
        "--kubernetes",
        "--kubeconfig",
        str(plane.kubeconfig()),
    ]
    argv += ["--socket", str(socket), "--ca-directory", str(folder / "ca"), "--log-level", "error"]
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(*argv)
    agents = [_Agent(socket, f"node-{number}") for number in range(_AGENTS)]
    try:
        tasks = [asyncio.create_task(agent.run()) for agent in agents]
        everything = [f"workload/many/app-{number}" for number in range(options.pods)]
        await asyncio.gather(*(agent.until(everything, ready=True) for agent in agents))
        found, seen = {"agents": _AGENTS, "ready_s": round(time.monotonic() - began, 2)}, _Process(process.pid)
        found |= {"ready_cpu_s": round(seen.cpu_s(), 2), "ready_peak_mb": seen.mb("VmHWM"), "ready_mb": seen.mb("VmRSS")}
        before = seen.cpu_s()
        await asyncio.sleep(options.idle)
        found["idle_millicores"] = round(1000 * (seen.cpu_s() - before) / options.idle, 1)
        found |= await _one_by_one(plane, agents, seen, options.single)
        numbers = range(options.changes)
        before, began = seen.cpu_s(), time.monotonic()
        await asyncio.to_thread(_change, plane, numbers, ready=False)
        found["changes_written_s"] = round(time.monotonic() - began, 2)
        await asyncio.gather(*(agent.until(everything[: options.changes], ready=False) for agent in agents))
        found["changes_s"] = round(time.monotonic() - began, 2)
        found["cpu_ms_per_change"] = round(1000 * (seen.cpu_s() - before) / options.changes, 2)
        found |= {"after_mb": seen.mb("VmRSS"), "peak_mb": seen.mb("VmHWM")}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return found
    finally:
        process.terminate()
        await process.wait()


async def _one_by_one(plane: ControlPlane, agents: list[_Agent], seen: _Process, count: int) -> dict[str, float]:
    """Change one pod, wait until every agent has it, then the next: from the API server's answer."""
    times, before = [], seen.cpu_s()
    with _client(plane) as client:
        for number in range(count):
            name = f"workload/many/app-{number}"
            for ready in (False, True):
                await asyncio.to_thread(_set_ready, client, number, ready=ready)
                began = time.monotonic()
                await asyncio.gather(*(agent.until([name], ready=ready) for agent in agents))
                times.append(time.monotonic() - began)
                await asyncio.sleep(_PAUSE_S)
    times.sort()
    quantiles = {"single_p50_s": times[len(times) // 2], "single_p99_s": times[len(times) * 99 // 100], "single_max_s": times[-1]}
    spent = 1000 * (seen.cpu_s() - before) / len(times)
    return {name: round(value, 3) for name, value in {**quantiles, "single_cpu_ms": spent}.items()}


def _measure_source(plane: ControlPlane, options: argparse.Namespace) -> dict[str, Any]:
    argv = [sys.executable, "-m", "tests.kubernetes.scale", "--follow", str(plane.kubeconfig())]
    argv += ["--changes", str(options.changes)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        if following.stdout.readline().strip() != "listed":
            raise SystemExit("the source did not become ready")
        _change(plane, range(options.changes), ready=False)
        found: dict[str, Any] = json.loads(following.stdout.readline())
    _change(plane, range(options.changes), ready=True)
    return found


def measure(plane: ControlPlane, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure both, on a control plane that has everything."""
    return {"source": _measure_source(plane, options), "controller": asyncio.run(_whole(plane, folder, options))}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, help="directory with etcd and kube-apiserver")
    parser.add_argument("--pods", type=int, default=50_000)
    parser.add_argument("--changes", type=int, default=2_000, help="one after the other, as fast as they can be written")
    parser.add_argument("--single", type=int, default=100, help="pods of which each is changed twice alone")
    parser.add_argument("--idle", type=float, default=60, help="seconds at rest")
    parser.add_argument("--follow", type=Path, help="(for itself)")
    options = parser.parse_args()
    if options.follow:
        print(json.dumps(asyncio.run(_follow(options.follow, options.changes))), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder, controlplane.running(options.assets, Path(folder)) as plane:
        _cluster(plane)
        with ThreadPoolExecutor(_WRITERS) as writers:
            list(writers.map(lambda first: _make(plane, range(first, options.pods, _WRITERS)), range(_WRITERS)))
        print(json.dumps({"pods": options.pods, **measure(plane, Path(folder), options)}))


if __name__ == "__main__":
    main()
