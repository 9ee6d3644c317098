"""A kubelet with a cgroup of its own, as a service manager gives it one: what of it may probe STRICT pods. test_node.py has one that shares its cgroup."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import cgroup
from tests.kubernetes import mesh, node
from tests.kubernetes.controlplane import ControlPlane, Failed
from tests.kubernetes.mesh import Cluster, takes

SPACE = "strict"
KNOCK = 'echo 0 > "$0/cgroup.procs" && exec curl -s -m 5 -o /dev/null -w "%{http_code}" "$1"'


@pytest.fixture(scope="module")
def service(plane: ControlPlane) -> Iterator[Cluster]:
    """The mesh on a node whose kubelet has its cgroup to itself, and a namespace that admits nobody."""
    top = Path(tempfile.mkdtemp(prefix="mesh-", dir="/dev/shm"))
    own = cgroup.create(cgroup.mount_point() / "kubelet.service")
    machine = node.Node(plane, "node-1", top / "node", cgroup.mount_point(), kubelet_cgroup=own)
    try:
        machine.start()
        with mesh.running(plane, machine, top / "mesh") as found:
            plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE, "labels": {"meshagent.io/mode": "mesh"}}})
            for kind, spec in (("PeerAuthentication", {"mtls": {"mode": "STRICT"}}), ("AuthorizationPolicy", {})):
                metadata = {"name": "all", "namespace": SPACE}
                plane.apply({"apiVersion": "meshagent.io/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec})
            plane.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "web", "namespace": SPACE}})
            found.run(
                *(SPACE, "web", "/bin/httpd", "-f", "-p", "8080", "-h", "/etc"),
                readinessProbe={"httpGet": {"path": "/hostname", "port": 8080}, "periodSeconds": 1, "failureThreshold": 1},
                livenessProbe={"tcpSocket": {"port": 8080}, "periodSeconds": 1, "failureThreshold": 3},
            )
            yield found
    except Failed as error:
        pytest.fail(str(error))
    finally:
        machine.stop()
        own.rmdir()
        shutil.rmtree(top, ignore_errors=True)


def ready(found: Cluster) -> bool:
    """Does the kubelet say so of the pod, and has it not killed it?"""
    said = "jsonpath={.status.containerStatuses[0].ready} {.status.containerStatuses[0].restartCount}"
    return found.plane.kubectl("get", "pod", "web", "-n", SPACE, "-o", said) == "true 0"


def knock(found: Cluster, place: Path) -> str:
    """The status that another process of the node gets which is in this cgroup."""
    url = f"http://{found.addresses(SPACE, 'web')[0]}:8080/hostname"
    return subprocess.run(["sh", "-c", KNOCK, str(place), url], capture_output=True, text=True, check=False).stdout


def test_it_alone_may_probe_a_pod_that_admits_nobody(service: Cluster) -> None:
    takes(lambda: service.enrolled(f"{SPACE}/web") and ready(service))
    place = service.machine.kubelet_cgroup
    assert place is not None
    assert cgroup.pids(place), "it is there"
    assert [knock(service, one) for one in (place, service.machine.cgroup2)] == ["000", "000"]
    time.sleep(3)  # of probes, one of which that failed would show
    assert ready(service)
    assert service.status()["problems"] == []


def test_all_of_its_cgroup_may_if_the_operator_names_that(service: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    place = service.machine.kubelet_cgroup
    assert place is not None
    monkeypatch.setenv("MESHAGENT_RUN_KUBELET_CGROUP", str(place))
    service.kill_agent()
    service.start_agent()
    takes(lambda: knock(service, place) == "200")
    assert knock(service, service.machine.cgroup2) == "000"
    service.machine.restart_kubelet()
    time.sleep(3)
    assert ready(service)
    assert service.status()["problems"] == []
