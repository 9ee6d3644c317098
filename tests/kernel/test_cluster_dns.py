"""A cluster's own DNS: pods ask it as they would without the mesh, STRICT or not, and whoever has nothing to do with the mesh answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from agent.model import Backing, Mtls, Service, ServicePort, Snapshot
from agent.names.service import Names, Rows
from tests import tasks
from tests.kernel.datanode import ADDRESSES, ALLOW_CALLER, DataNode, snapshot, until, workload
from tests.kernel.test_names import RESOLVER, UPSTREAM

pytestmark = pytest.mark.kernel

VIPS = ("10.96.0.53", "fd96::53")
LOCAL = "169.254.20.10"
"""Where a cache on each node answers (NodeLocal DNSCache): no Service has this address."""
DNS = "kube-system/kube-dns"
ASK = """
import socket, struct, sys
address, way = sys.argv[1], sys.argv[2]
query = struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 0) + b"\\x04cart\\x04shop\\x03svc\\x07cluster\\x05local\\0" + struct.pack("!HH", 1, 1)
family = socket.AF_INET6 if ":" in address else socket.AF_INET
if way == "tcp":
    with socket.create_connection((address, 53), timeout=3) as s:
        s.sendall(struct.pack("!H", len(query)) + query)
        size, = struct.unpack("!H", s.recv(2, socket.MSG_WAITALL))
        answer, source = s.recv(size, socket.MSG_WAITALL), s.getpeername()[0]
else:
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.settimeout(3)
        if way == "connected":
            s.connect((address, 53)); s.send(query)
        else:
            s.sendto(query, (address, 53))
        answer, (source, *_) = s.recvfrom(4096)
print(source, socket.inet_ntoa(answer[-4:]))
"""


def cluster(*, strict: bool, egress_deny: bool = False) -> Snapshot:
    """`stranger` is kube-dns, not in the mesh, behind a Service without the waypoint; both callers are protected, STRICT or not."""
    mode = Mtls.STRICT if strict else Mtls.PERMISSIVE
    found = snapshot(
        replace(workload("caller", policies=("default/p",)), mtls=mode, egress_deny=egress_deny),
        replace(workload("server-a", policies=("default/p",)), mtls=mode, egress_deny=egress_deny),
        replace(workload("stranger", enrolled=False), backing=(Backing(DNS, {53: 53}, {53: 53}),)),
        policies=(ALLOW_CALLER,),
    )
    ports = tuple(ServicePort(53, "dns", protocol, "", False, "no L7 feature is used") for protocol in ("UDP", "TCP"))
    return replace(found, services={**found.services, DNS: Service(DNS, VIPS, ports)})


def ask(node: DataNode, place: str, address: str, way: str) -> str:
    """Who answered, as the program sees it, and what."""
    run = node.lab.exec(place, ["python3", "-c", ASK, address, way])
    return run.stdout.strip() or run.stderr.strip().splitlines()[-1]


@contextmanager
def answering(node: DataNode, place: str, log: Path, *at: str) -> Iterator[Path]:
    """A name server in a pod; `log` has a line for each question."""
    log.touch()
    with node.program(place, ["python3", "-c", RESOLVER, str(log), *at]):
        yield log


@pytest.mark.parametrize("way", ["sendto", "connected", "tcp"])
@pytest.mark.parametrize("address", VIPS)
@pytest.mark.parametrize("strict", [False, True], ids=["permissive", "strict"])
def test_the_cluster_dns_answers_pods_of_the_mesh(node: DataNode, tmp_path: Path, strict: bool, address: str, way: str) -> None:
    node.enforce(cluster(strict=strict))
    with answering(node, "stranger", tmp_path / "asked", *ADDRESSES["stranger"]) as log:
        for place in ("caller", "server-a"):
            assert ask(node, place, address, way) == f"{address} {UPSTREAM}"
        assert until(lambda: log.read_text().count("svc") == 2), "the name server of the cluster itself was asked"


@pytest.mark.parametrize("way", ["sendto", "connected", "tcp"])
def test_a_name_server_that_is_no_service_of_the_mesh_answers_too(node: DataNode, tmp_path: Path, way: str) -> None:
    """A cache on the node, or a service address that only kube-proxy translates: it is left as it was dialled."""
    node.enforce(cluster(strict=True))
    node.lab.exec("node-1", ["ip", "address", "add", f"{LOCAL}/32", "dev", "lo"], check=True)
    try:
        with answering(node, "node-1", tmp_path / "asked", LOCAL):
            assert ask(node, "server-a", LOCAL, way) == f"{LOCAL} {UPSTREAM}"
    finally:
        node.lab.exec("node-1", ["ip", "address", "del", f"{LOCAL}/32", "dev", "lo"], check=True)


def test_without_names_the_agent_answers_nothing_itself_and_leaves_every_resolv_conf_as_it_is(node: DataNode) -> None:
    """As on a Kubernetes node: what it reads there only says which resolvers a workload that may not go out can ask."""
    model = cluster(strict=True, egress_deny=True)
    node.enforce(model)
    files = [*Path("/etc/netns").glob("*/resolv.conf"), Path("/etc/resolv.conf")]
    before = [(path.stat().st_mtime_ns, path.read_bytes()) for path in files if path.exists()]
    led: list[Rows] = []
    allowed: list[Rows] = []
    names = Names(replace(node.config, names=False), led.append, allow=allowed.append)
    names.update(model, node.enrolled.local)
    tasks.run_beside(names.run(), lambda: tasks.until(lambda: allowed))
    assert set(led) == {frozenset()}
    assert {cookie for cookie, _ in allowed[-1]} == {one.netns_cookie for one in node.enrolled.local}
    assert [(path.stat().st_mtime_ns, path.read_bytes()) for path in files if path.exists()] == before
    assert not list(node.config.names_dir.glob("*"))
