"""The waypoint in several network namespaces, without eBPF: nft stands in for the connect hook and for sk_lookup."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import json
import os
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from envoy.config.listener.v3 import listener_pb2

from agent.l7 import names
from agent.l7.access_log import RequestRecord
from agent.l7.envoy import Envoy
from agent.l7.resources import Resources, pack
from agent.l7.snapshot import build
from agent.l7.xds import XdsServer
from agent.model import Action, Operation, Policy, PolicyRule, Source, Workload
from tests.unit.agent.l7 import harness

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0 and not os.environ.get("MESH_REQUIRE_KERNEL"), reason="needs root"),
]

CLIENT = 65534  # the applications' uid: nft redirects theirs and not Envoy's connections
VIP, SHOP_VIP = "10.96.0.10", "10.96.0.11"
CLONE_NEWNET = 0x40000000
PODS = {"a1": "10.9.0.1", "a2": "10.9.0.2", "b1": "10.9.0.11", "b2": "10.9.0.12"}
T = TypeVar("T")


def sh(command: str) -> None:
    subprocess.run(command, shell=True, check=True, capture_output=True)  # noqa: S602  # constants only


def inside(namespace: str, work: Callable[[], T]) -> T:
    """Run a function in a thread that has entered a namespace (setns affects one thread only)."""
    result: list[T] = []

    def run() -> None:
        with Path(f"/run/netns/{namespace}").open("rb") as handle:
            if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        result.append(work())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return result[0]


@dataclass(frozen=True)
class Lab:
    prefix: str

    def netns(self, pod: str) -> str:
        return f"/run/netns/{self.prefix}-{pod}"

    def curl(self, pod: str, *arguments: str) -> list[tuple[int, dict[str, Any]]]:
        """Run curl in a pod as an application; (status, JSON body) of each answer, status 0 for none."""
        command = ["nsenter", f"--net={self.netns(pod)}", "setpriv", f"--reuid={CLIENT}", "--clear-groups", "curl", "-s", "-m", "10"]
        done = subprocess.run([*command, "-w", "%{http_code}\n", *arguments], capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        answers: list[tuple[int, dict[str, Any]]] = []
        body: dict[str, Any] = {}
        for line in lines:
            if line.startswith("{"):
                body = json.loads(line)
            else:
                answers.append((int(line[-3:]), body))
                body = {}
        return answers


@pytest.fixture
def lab() -> Iterator[Lab]:
    prefix = f"l7t-{os.getpid()}"
    hub = f"{prefix}-hub"
    try:
        sh(f"ip netns add {hub} && ip -n {hub} link add br0 type bridge && ip -n {hub} link set br0 up")
        for index, (pod, address) in enumerate(PODS.items()):
            ns = f"{prefix}-{pod}"
            sh(f"ip netns add {ns} && ip -n {ns} link set lo up")
            sh(f"ip -n {ns} link add eth0 type veth peer name p{index} netns {hub} && ip -n {hub} link set p{index} master br0 up")
            sh(f"ip -n {ns} addr add {address}/24 dev eth0 && ip -n {ns} link set eth0 up && ip -n {ns} route add default dev eth0")
            output = f"meta skuid {CLIENT} ip daddr {{ 10.96.0.0/16, {PODS['b2']} }} meta l4proto tcp redirect to :15001"
            sh(
                f"ip netns exec {ns} nft 'add table ip t; add chain ip t o {{ type nat hook output priority -100; }}; add rule ip t o {output}'"
            )
        yield Lab(prefix)
    finally:
        for name in (*PODS, "hub"):
            subprocess.run(["ip", "netns", "del", f"{prefix}-{name}"], check=False, capture_output=True)


def b_workloads(**policies: tuple[str, ...]) -> list[Workload]:
    backing = {"default/web": {80: 8080}}
    return [harness.workload(pod, PODS[pod], backing=backing, policies=policies.get(pod, ())) for pod in ("b1", "b2")]


def callers() -> list[Workload]:
    return [harness.workload(pod, PODS[pod]) for pod in ("a1", "a2")]


@contextlib.contextmanager
def apps(lab: Lab) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for pod in ("b1", "b2"):
            # The listening socket belongs to the namespace it was made in, whichever thread accepts.
            server = harness.http_server(pod, PODS[pod], 8080)
            inside(f"{lab.prefix}-{pod}", lambda server=server: stack.enter_context(server))  # type: ignore[misc]
        yield


@contextlib.asynccontextmanager
async def running(
    directory: Path, resources: Resources, on_record: Callable[[RequestRecord], None] | None = None
) -> AsyncIterator[tuple[XdsServer, Envoy]]:
    async with harness.waypoint(harness.config(directory), on_record) as (server, envoy):
        await harness.applied(server, resources)
        yield server, envoy


def test_the_backend_sees_the_calling_pod_and_two_callers_share_no_connection(lab: Lab, tmp_path: Path) -> None:
    snapshot = harness.snapshot([*callers(), *b_workloads()], [harness.service("web", VIP, 80)])
    local = [harness.local(w, lab.netns(w.name.partition("/")[2])) for w in callers()]
    resources = build(snapshot, local, trust_domain=harness.TRUST_DOMAIN)

    async def scenario() -> list[tuple[int, dict[str, Any]]]:
        async with running(tmp_path, resources):
            answers = []
            for _ in range(7):
                for caller in ("a1", "a2"):
                    answers += await asyncio.to_thread(lab.curl, caller, *[f"http://{VIP}/"] * 3)
            return answers

    with apps(lab):
        answers = asyncio.run(scenario())
    assert [status for status, _ in answers] == [200] * 42
    assert [body["peer"] for _, body in answers] == ([PODS["a1"]] * 3 + [PODS["a2"]] * 3) * 7
    # Pooled: far fewer upstream connections than requests, and none used by both callers.
    ends = {(body["peer"], body["port"]) for _, body in answers}
    assert 2 <= len(ends) < 42
    assert {body["name"] for _, body in answers} == {"b1", "b2"}


def test_a_client_can_not_choose_the_destination_by_a_header_and_apps_never_see_it(lab: Lab, tmp_path: Path) -> None:
    shop = harness.workload("shop", PODS["b2"], backing={"default/shop": {80: 8080}})
    web = harness.workload("b1", PODS["b1"], backing={"default/web": {80: 8080}})
    services = [harness.service("web", VIP, 80), harness.service("shop", SHOP_VIP, 80)]
    snapshot = harness.snapshot([*callers(), web, shop], services)
    resources = build(snapshot, [harness.local(callers()[0], lab.netns("a1"))], trust_domain=harness.TRUST_DOMAIN)
    forged = ["-H", f"{names.DESTINATION_HEADER}: {SHOP_VIP}:80", "-H", "Host: shop"]

    async def scenario() -> list[tuple[int, dict[str, Any]]]:
        async with running(tmp_path, resources):
            return [
                *lab.curl("a1", f"http://{VIP}/"),
                *lab.curl("a1", *forged, f"http://{VIP}/"),
                *lab.curl("a1", *forged, "--http2-prior-knowledge", f"http://{VIP}/"),
                *lab.curl("a1", f"http://{SHOP_VIP}/"),
                *lab.curl("a1", f"http://{SHOP_VIP}:81/"),
            ]

    with apps(lab):
        answers = asyncio.run(scenario())
    assert [(status, body.get("name")) for status, body in answers] == [(200, "b1")] * 3 + [(200, "b2"), (404, None)]
    assert all(names.DESTINATION_HEADER not in body.get("headers", {}) for _, body in answers)


def test_inbound_authorizes_by_address_and_reaches_the_application_from_inside(lab: Lab, tmp_path: Path) -> None:
    policy = Policy(
        "default/readers",
        Action.ALLOW,
        (PolicyRule((Source(service_accounts=("default/a1",)),), (Operation(ports=(8080,), methods=("GET",), paths=("/ok*",)),)),),
    )
    protected = b_workloads(b2=(policy.name,))
    elsewhere = [dataclasses.replace(caller, node="node-2") for caller in callers()]  # known by address
    snapshot = harness.snapshot([*elsewhere, *protected], [harness.service("web", VIP, 80)], policies=[policy])
    resources = steerable(build(snapshot, [harness.local(protected[1], lab.netns("b2"))], trust_domain=harness.TRUST_DOMAIN), "default/b2")
    steer = f"ip daddr {PODS['b2']} tcp dport {{ 8080, 15006 }} iifname eth0 tproxy to :15006 meta mark set 1 accept"
    ns = f"{lab.prefix}-b2"
    sh(f"ip netns exec {ns} nft 'add chain ip t p {{ type filter hook prerouting priority mangle; }}; add rule ip t p {steer}'")
    sh(f"ip -n {ns} rule add fwmark 1 lookup 100 && ip -n {ns} route add local 0.0.0.0/0 dev lo table 100")
    for pod in ("a1", "a2"):  # plain connections: no waypoint at the caller's side
        sh(f"ip netns exec {lab.prefix}-{pod} nft flush chain ip t o")
    url = f"http://{PODS['b2']}:8080"

    async def scenario() -> list[tuple[int, dict[str, Any]]]:
        async with running(tmp_path, resources):
            return [
                *lab.curl("a1", f"{url}/ok/1"),
                *lab.curl("a1", f"{url}/other"),
                *lab.curl("a1", "-X", "DELETE", f"{url}/ok/1"),
                *lab.curl("a2", f"{url}/ok/1"),
                *lab.curl("a1", f"http://{PODS['b2']}:15006/ok/1"),
            ]

    with apps(lab):
        answers = asyncio.run(scenario())
    assert [status for status, _ in answers] == [200, 403, 403, 403, 0]
    assert answers[0][1]["name"] == "b2"
    assert answers[0][1]["peer"] == PODS["b2"], "envoy connects to the application from inside its namespace"


def test_a_trace_streams_records_of_one_workload_only_and_stops(lab: Lab, tmp_path: Path) -> None:
    snapshot = harness.snapshot([*callers(), *b_workloads()], [harness.service("web", VIP, 80)])
    local = [harness.local(w, lab.netns(w.name.partition("/")[2])) for w in callers()]
    off = build(snapshot, local, trust_domain=harness.TRUST_DOMAIN)
    on = build(snapshot, local, trust_domain=harness.TRUST_DOMAIN, traced=frozenset({"default/a2"}))
    seen: asyncio.Queue[RequestRecord] = asyncio.Queue()

    async def call(path: str) -> Sequence[object]:
        return [await asyncio.to_thread(lab.curl, pod, f"http://{VIP}{path}") for pod in ("a1", "a2")]

    async def scenario() -> tuple[RequestRecord, float, RequestRecord]:
        async with running(tmp_path, off, seen.put_nowait) as (server, envoy):
            await call("/before")
            listeners_before = await envoy.stats("listener_manager.listener_(added|modified)")
            await harness.applied(server, on)
            await call("/during")
            began = asyncio.get_running_loop().time()
            record = await asyncio.wait_for(seen.get(), 5)
            took = asyncio.get_running_loop().time() - began
            await harness.applied(server, off)
            await call("/after")
            await harness.applied(server, on)
            await call("/again")
            again = await asyncio.wait_for(seen.get(), 5)
            assert await envoy.stats("listener_manager.listener_(added|modified)") == listeners_before
            return record, took, again

    with apps(lab):
        record, took, again = asyncio.run(scenario())
    assert (record.path, again.path) == ("/during", "/again")
    assert took < 0.5
    assert (record.side, record.workload, record.response_code) == ("outbound", "default/a2", 200)
    assert record.original_destination == f"{VIP}:80"
    assert record.upstream_local_address.startswith(PODS["a2"] + ":")
    assert record.upstream_address in {f"{PODS['b1']}:8080", f"{PODS['b2']}:8080"}
    assert record.upstream_cluster == "service/default/web/80"
    assert record.attempts == 1
    assert 0 < record.first_upstream_byte_ns <= record.duration_ns < 10_000_000_000


def steerable(resources: Resources, workload: str) -> Resources:
    """Make the inbound listener transparent: nft's tproxy asks for that, sk_lookup does not."""
    name = names.listener(names.INBOUND, workload)
    listener: listener_pb2.Listener = harness.decoded(resources, names.LISTENER, name)
    listener.transparent.value = True
    return {**resources, names.LISTENER: {**resources[names.LISTENER], name: pack(listener)}}
