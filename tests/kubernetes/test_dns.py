"""The cluster's DNS as clusters have it: a Service of kube-system with a name server in a pod behind it, whom kubelet's resolv.conf names to every pod.

dnsmasq is in CoreDNS's place. Pods ask in each way that programs have: the C library's (a connected UDP socket; TCP, if resolv.conf(5) says use-vc), and
datagrams from a socket that is not connected, as musl's. Each test begins and ends with a name server that is in the mesh and open to everybody.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.test_cluster_dns import ASK
from tests.kubernetes.conftest import whole_mesh
from tests.kubernetes.mesh import Cluster, takes
from tests.kubernetes.node import APPLETS, image, libraries
from tests.kubernetes.podshop import admits

SYSTEM, SPACE, OUTSIDE = "kube-system", "shop", "plain"
NAMES = "registry.test/names:1"
VIP, VIP6, CART = "10.96.0.10", "fd96::a", "10.96.7.1"
CLIENTS = ((SPACE, "friend"), (SPACE, "stranger"), (OUTSIDE, "outsider"))
WAYS = ("connected", "sendto", "tcp")
NAME = f"cart.{SPACE}.svc.cluster.local"
SERVER = ("/usr/sbin/dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--pid-file=", "--user=", "--group=",
    "--local=/cluster.local/", f"--host-record={NAME},{CART}", "--log-queries", "--log-facility=-")  # fmt: skip
ASKING = f"""
import subprocess, sys, time
began = time.monotonic()
for count in range(1, 100000):
    for way in {WAYS!r}:
        said = subprocess.run([sys.executable, "-c", {ASK!r}, {VIP!r}, way], capture_output=True, text=True)
        print(way, said.stdout.strip() or (said.stderr.splitlines() or [str(said.returncode)])[-1], flush=True)
    time.sleep(max(0.0, began + count / 2 - time.monotonic()))
"""
"""Twice a second in each way."""


def write_image(target: Path) -> None:
    """dnsmasq, Python and what the box has."""
    python, library = Path("/usr/bin/python3.11"), Path("/usr/lib/python3.11")
    programs = [python, Path("/usr/sbin/dnsmasq"), Path(str(shutil.which("curl")))]
    files = {str(one): one for program in programs for one in (program, *libraries(program))}
    files |= {str(one): one for part in ("", "encodings", "collections", "re") for one in (library / part).glob("*.py")}
    files |= {str(one): one for one in (library / "lib-dynload").glob("*.so")}
    files |= {"/bin/busybox": Path(str(shutil.which("busybox")))}
    image(target, NAMES, files, ["/bin/sh"], {f"/bin/{name}": "busybox" for name in APPLETS} | {"/bin/curl": "/usr/bin/curl"})


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A mesh whose pods ask a Service for names; `cart` serves, two pods beside it and one outside of the mesh call."""
    with whole_mesh(dns=VIP) as found:
        write_image(found.top / "names.tar")
        found.machine.ctr("images", "import", str(found.top / "names.tar"))
        for space, labels in ((SPACE, {"meshagent.io/mode": "mesh"}), (OUTSIDE, {})):
            found.plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": space, "labels": labels}})
        for space, name in (*CLIENTS, (SPACE, "cart"), (SYSTEM, "dns")):
            found.plane.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": space}})
        found.plane.apply(name_service(), service())
        run_server(found, "dns-1")
        for space, name in CLIENTS:
            found.run(space, name, "/bin/sleep", "10000", image=NAMES)
        serve = "mkdir -p /tmp/www; echo cart > /tmp/www/index.html; exec httpd -f -p 8080 -h /tmp/www"
        found.run(SPACE, "cart", "/bin/sh", "-c", serve)
        takes(lambda: {f"{SPACE}/{name}" for name in ("friend", "stranger", "cart")} <= found.redirected())
        takes(lambda: found.addresses(OUTSIDE, "outsider"))
        takes(lambda: everybody_resolves(found))
        yield found


def name_service() -> dict[str, Any]:
    """As kubeadm makes it."""
    ports = [{"name": name, "port": 53, "protocol": protocol} for name, protocol in (("dns", "UDP"), ("dns-tcp", "TCP"))]
    spec = {"clusterIP": VIP, "clusterIPs": [VIP, VIP6], "ipFamilyPolicy": "RequireDualStack", "selector": {"app": "dns"}, "ports": ports}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "kube-dns", "namespace": SYSTEM}, "spec": spec}


def service() -> dict[str, Any]:
    spec = {"clusterIP": CART, "selector": {"app": "cart"}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "cart", "namespace": SPACE}, "spec": spec}


def run_server(found: Cluster, name: str) -> None:
    """A name server that takes questions as long as the kubelet reaches it: who refuses its probes has no names."""
    probe = {"tcpSocket": {"port": 53}, "periodSeconds": 1, "failureThreshold": 1}
    ports = [{"containerPort": 53, "protocol": protocol} for protocol in ("UDP", "TCP")]
    found.run(SYSTEM, name, *SERVER, image=NAMES, account="dns", labels={"app": "dns"}, readinessProbe=probe, ports=ports)


def enrol(found: Cluster, *, wanted: bool) -> None:
    """Take the name server into the mesh, or out of it."""
    found.plane.kubectl("label", "namespace", SYSTEM, f"meshagent.io/mode={'mesh' if wanted else 'none'}", "--overwrite")
    takes(lambda: found.enrolled(f"{SYSTEM}/dns-1") is wanted)


def mode(found: Cluster, space: str, name: str) -> None:
    """Of a namespace's mTLS."""
    own = {"apiVersion": "meshagent.io/v1alpha1", "kind": "PeerAuthentication", "metadata": {"name": "mode", "namespace": space}}
    found.plane.apply({**own, "spec": {"mtls": {"mode": name}}})


def ask(found: Cluster, client: tuple[str, str], way: str, address: str = VIP) -> str:
    """Who answered, as the program sees it, and what; else the last line of what went wrong."""
    space, name = client
    said = found.exec(space, name, "/usr/bin/python3.11", "-c", ASK, address, way).strip().splitlines()
    return next((line for line in said if line.startswith(f"{address} ")), said[0] if said else "")


def resolves(found: Cluster, client: tuple[str, str]) -> bool:
    """Is it answered in every way, at both addresses?"""
    return all(ask(found, client, way, address) == f"{address} {CART}" for way in WAYS for address in (VIP, VIP6))


def gets_nothing(found: Cluster, client: tuple[str, str]) -> bool:
    """Is it answered in no way, and by nobody else?"""
    return not any(CART in ask(found, client, way) for way in WAYS)


def everybody_resolves(found: Cluster) -> bool:
    return all(resolves(found, client) for client in CLIENTS)


def fetches(found: Cluster, client: tuple[str, str], *options: str) -> bool:
    """Does a program of it reach the cart by its name, asking as the kubelet's resolv.conf and these options say?"""
    space, name = client
    return found.exec(space, name, "/bin/sh", "-c", f"RES_OPTIONS='{' '.join(options)}' curl -s -m 8 http://cart.{SPACE}/") == "cart\n"


@pytest.mark.parametrize("inside", [False, True], ids=["outside-of-the-mesh", "in-the-mesh"])
def test_the_cluster_dns_is_a_service_and_every_pod_has_its_answers(cluster: Cluster, inside: bool) -> None:
    enrol(cluster, wanted=inside)
    for space, name in CLIENTS:
        assert f"nameserver {VIP}\n" in cluster.exec(space, name, "cat", "/etc/resolv.conf")
        assert resolves(cluster, (space, name))
        assert fetches(cluster, (space, name), "attempts:1")
        assert fetches(cluster, (space, name), "attempts:1", "use-vc")
    log = cluster.plane.kubectl("logs", "-n", SYSTEM, "dns-1")
    for space, name in CLIENTS:
        for address in cluster.addresses(space, name):
            assert f"query[A] {NAME} from {address}\n" in log, "the name server sees who asks"
    assert cluster.status()["problems"] == []


@pytest.mark.parametrize("inside", [False, True], ids=["outside-of-the-mesh", "in-the-mesh"])
def test_callers_that_are_strict_and_may_not_go_out_have_names(cluster: Cluster, inside: bool) -> None:
    plane = cluster.plane
    enrol(cluster, wanted=inside)
    mode(cluster, SPACE, "STRICT")
    assert "TimeoutError" in goes_out(cluster)
    plane.kubectl("annotate", "namespace", SPACE, "meshagent.io/egress=deny")
    try:
        takes(lambda: "PermissionError" in goes_out(cluster))
        for client in CLIENTS[:2]:
            assert resolves(cluster, client)
            assert fetches(cluster, client, "attempts:1")
        assert not fetches(cluster, CLIENTS[2], "attempts:1"), "the cart is STRICT"
    finally:
        plane.kubectl("annotate", "namespace", SPACE, "meshagent.io/egress-")
        mode(cluster, SPACE, "PERMISSIVE")
        takes(lambda: fetches(cluster, CLIENTS[2]))


def goes_out(found: Cluster) -> str:
    """What becomes of a connection of the friend's to an address that nobody declared (RFC 5737)."""
    return found.exec(
        SPACE, "friend", "/usr/bin/python3.11", "-c", "import socket; socket.create_connection(('198.51.100.1', 9), timeout=1)"
    )


def test_a_strict_name_server_is_probed_and_answers_the_mesh_alone(cluster: Cluster) -> None:
    enrol(cluster, wanted=True)
    mode(cluster, SYSTEM, "STRICT")
    try:
        takes(lambda: gets_nothing(cluster, CLIENTS[2]))
        time.sleep(3)  # of probes, one of which that failed would leave the Service without an endpoint
        for client in CLIENTS[:2]:
            assert resolves(cluster, client)
            assert fetches(cluster, client, "attempts:1")
    finally:
        mode(cluster, SYSTEM, "PERMISSIVE")
        takes(lambda: everybody_resolves(cluster))


def test_a_policy_says_who_may_ask_for_names_in_whatever_way(cluster: Cluster) -> None:
    enrol(cluster, wanted=True)
    policy = admits("dns", "friend")
    policy["metadata"]["namespace"] = SYSTEM
    cluster.plane.apply(policy)
    try:
        takes(lambda: all(gets_nothing(cluster, client) for client in CLIENTS[1:]))
        assert resolves(cluster, CLIENTS[0])
        assert fetches(cluster, CLIENTS[0], "attempts:1")
    finally:
        cluster.plane.kubectl("delete", "authorizationpolicy", "dns", "-n", SYSTEM)
        takes(lambda: everybody_resolves(cluster))


def test_names_go_on_while_the_agent_is_away_and_when_it_comes_back(cluster: Cluster) -> None:
    enrol(cluster, wanted=True)
    cluster.run(SPACE, "asking", "/usr/bin/python3.11", "-c", ASKING, account="friend", image=NAMES)
    takes(lambda: cluster.enrolled(f"{SPACE}/asking") and len(told(cluster)) > 6)
    before = len(told(cluster))
    cluster.kill_agent()
    time.sleep(7)
    away = len(told(cluster))
    assert away > before + 20, "the load went on"
    assert everybody_resolves(cluster)
    cluster.start_agent()
    takes(lambda: cluster.enrolled(f"{SPACE}/asking"))
    takes(lambda: len(told(cluster)) > away + 20)
    assert Counter(told(cluster)[before:]).keys() == {f"{way} {VIP} {CART}" for way in WAYS}
    cluster.plane.kubectl("delete", "pod", "asking", "-n", SPACE, "--force", "--grace-period=0")


def told(found: Cluster) -> list[str]:
    """What came of the questions of the pod that asks all the time."""
    return found.plane.kubectl("logs", "-n", SPACE, "asking", "--tail=-1", check=False).splitlines()


def test_another_name_server_behind_the_service_is_asked_as_soon_as_it_is_the_only_one(cluster: Cluster) -> None:
    enrol(cluster, wanted=True)
    run_server(cluster, "dns-2")
    takes(lambda: cluster.enrolled(f"{SYSTEM}/dns-2"))
    ready = json.loads(cluster.plane.kubectl("get", "pod", "dns-2", "-n", SYSTEM, "-o", "json"))["metadata"]["name"]
    cluster.plane.kubectl("wait", "--for=condition=Ready", f"pod/{ready}", "-n", SYSTEM, "--timeout=30s")
    cluster.plane.kubectl("delete", "pod", "dns-1", "-n", SYSTEM, "--wait=true")
    takes(lambda: everybody_resolves(cluster))
    assert f"query[A] {NAME} from" in cluster.plane.kubectl("logs", "-n", SYSTEM, "dns-2")
