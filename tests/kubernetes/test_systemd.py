"""Pods whose cgroups systemd makes, as on most nodes: kubelet and runc ask it for slices and scopes, and nothing of the mesh or of its tests names them."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.kubernetes.conftest import whole_mesh
from tests.kubernetes.mesh import Cluster, takes
from tests.kubernetes.podshop import ASK, SERVE, SPACE, WEB, admits, answers, at, open_shop

_SOME = {"cpu": "10m", "memory": "64Mi"}
CLASSES = {"Guaranteed": {"requests": _SOME, "limits": _SOME}, "Burstable": {"requests": _SOME}, "BestEffort": {}}
"""What makes a container's pod one of each class of service."""
PLACES = {
    "Guaranteed": "/kubepods.slice/kubepods-pod{0}.slice",
    "Burstable": "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{0}.slice",
    "BestEffort": "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{0}.slice",
}
ACCOUNTS = ("friend", "stranger")


@pytest.fixture(scope="module")
def shop() -> Iterator[Cluster]:
    """With the shop in it, and of each class a pod of the friend's account and one of the stranger's, which ask the server before all else."""
    with whole_mesh(systemd=True) as found:
        open_shop(found)
        for each in CLASSES:
            for account in ACCOUNTS:
                start(found, each, account)
        takes(lambda: {f"{SPACE}/{name(each, account)}" for each in CLASSES for account in ACCOUNTS} <= found.redirected())
        yield found


def name(of: str, account: str, suffix: str = "") -> str:
    """Of the pod of a class that has this account."""
    return f"{account}-{of.lower()}{suffix}"


def start(found: Cluster, of: str, account: str, suffix: str = "") -> None:
    """One that admits the friend alone, and the kubelet's probes."""
    called = name(of, account, suffix)
    found.plane.apply(admits(called, "friend"))
    command = f"{ASK}; {SERVE.format(called)}; sleep 10000"
    probe = {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1, "failureThreshold": 1}
    found.run(SPACE, called, "/bin/sh", "-c", command, account=account, resources=CLASSES[of], readinessProbe=probe)


def held(found: Cluster, of: str, suffix: str = "") -> bool:
    """Do both pods of a class answer the friend, the kubelet and not the stranger, and were they taken for what they are when they asked first?"""
    names = [name(of, account, suffix) for account in ACCOUNTS]
    takes(lambda: all(answers(found, at(found.addresses(SPACE, one)[0])) for one in names))
    ready = "jsonpath={.items[*].status.containerStatuses[0].ready}"
    takes(lambda: found.plane.kubectl("get", "pods", *names, "-n", SPACE, "-o", ready) == "true true")
    return [found.exec(SPACE, one, "cat", "/dev/termination-log") for one in names] == ["web\n0\n", "7\n"]


def containers(found: Cluster) -> str:
    """The ids of all containers in the shop."""
    return found.plane.kubectl("get", "pods", "-n", SPACE, "-o", "jsonpath={.items[*].status.containerStatuses[0].containerID}")


@pytest.mark.parametrize("of", CLASSES)
def test_systemd_has_the_containers_of_each_class_where_the_mesh_looks_for_them(shop: Cluster, of: str) -> None:
    pod = json.loads(shop.plane.kubectl("get", "pod", name(of, "friend"), "-n", SPACE, "-o", "json"))
    assert pod["status"]["qosClass"] == of
    container = pod["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")
    place = PLACES[of].format(pod["metadata"]["uid"].replace("-", "_"))
    scope = f"cri-containerd-{container}.scope"
    assert shop.machine.systemctl("show", scope, "-p", "ControlGroup", "--value").stdout.strip() == f"{place}/{scope}"


@pytest.mark.parametrize("of", CLASSES)
def test_pods_of_each_class_are_under_policy_from_their_first_action(shop: Cluster, of: str) -> None:
    assert held(shop, of)
    assert shop.status()["problems"] == []


def test_it_goes_on_when_the_kubelet_has_restarted(shop: Cluster) -> None:
    before = containers(shop)
    shop.machine.restart_kubelet()
    takes(lambda: answers(shop, WEB))
    assert containers(shop) == before
    for each in CLASSES:
        assert held(shop, each)
        for account in ACCOUNTS:
            start(shop, each, account, "-2")
    for each in CLASSES:
        takes(lambda each=each: {f"{SPACE}/{name(each, one, '-2')}" for one in ACCOUNTS} <= shop.redirected())  # type: ignore[misc]
        assert held(shop, each, "-2")
    assert shop.status()["problems"] == []
