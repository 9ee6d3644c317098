"""Pods of every sort on a real kubelet, made by Kubernetes' own controllers: Jobs that end, StatefulSets, both families, the node's network, and a reboot."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.kubernetes.mesh import Cluster, pod, takes
from tests.kubernetes.podshop import ASK, KEPT, SERVE, SPACE, WEB, admits, answers, at, open_shop, seen, service
from tests.ports import free_ports

WAIT = "while [ ! -e /run/end ]; do sleep 0.1; done"


@pytest.fixture(scope="module")
def shop(whole: Cluster) -> Cluster:
    """With the shop in it."""
    open_shop(whole)
    return whole


def pods(found: Cluster, app: str) -> list[dict[str, Any]]:
    """Those with this label, by name."""
    listed = json.loads(found.plane.kubectl("get", "pods", "-n", SPACE, "-l", f"app={app}", "-o", "json"))["items"]
    return sorted(listed, key=lambda one: str(one["metadata"]["name"]))


def ips(one: dict[str, Any]) -> list[str]:
    """Of a pod, as it stands in its status."""
    return [each["ip"] for each in one["status"].get("podIPs", ())]


def job(name: str, account: str) -> dict[str, Any]:
    """One that asks the server before all else, keeps what came of it, then serves itself until it is told to end."""
    command = f"{ASK}; {SERVE.format(name)}; {WAIT}"
    template = {"metadata": {"labels": {"app": name}}, "spec": {**pod(account, "/bin/sh", "-c", command), "restartPolicy": "Never"}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name, "namespace": SPACE}, "spec": {"template": template}}


def traces(found: Cluster) -> tuple[set[str], set[str]]:
    """What the mesh has of pods on the node: mounts of their namespaces, and links of the receiver's check."""
    links = {one.name.removeprefix("netns-") for one in (found.top / "bpf" / "m" / "links").glob("netns-*")}
    return {one.name for one in (found.top / "run" / "netns").iterdir() if one.name.isdigit()}, links


@pytest.fixture(scope="module")
def ended(shop: Cluster) -> dict[str, list[str]]:
    """Two Jobs have completed. The addresses that their pods had, by name; the pods stand in the API server with them."""
    plane = shop.plane
    before = traces(shop)
    assert before[0] == before[1]
    plane.apply(job("friendly", "friend"), job("strange", "stranger"), service("friendly", "10.96.7.2"))
    names = ("friendly", "strange")
    takes(lambda: all(shop.enrolled(f"{SPACE}/{one['metadata']['name']}") for name in names for one in pods(shop, name)))
    takes(lambda: seen(shop, "http://10.96.7.2/") == ("200", "200"))
    had = {name: ips(pods(shop, name)[0]) for name in names}
    began = time.monotonic()
    for name in names:
        shop.exec(SPACE, pods(shop, name)[0]["metadata"]["name"], "touch", "/run/end")
    for name in names:
        plane.kubectl("wait", "--for=condition=Complete", f"job/{name}", "-n", SPACE, "--timeout=60s")
    print(f"Jobs are complete {time.monotonic() - began:.1f} s after their programs were told to end")
    takes(lambda: traces(shop) == before)
    return had


def test_a_job_is_under_policy_from_its_first_action_and_completes(shop: Cluster, ended: dict[str, list[str]]) -> None:
    (friendly,), (strange,) = pods(shop, "friendly"), pods(shop, "strange")
    said = [one["status"]["containerStatuses"][0]["state"]["terminated"] for one in (friendly, strange)]
    assert [one["message"] for one in said] == ["web\n0\n", "7\n"]
    assert [one["exitCode"] for one in said] == [0, 0]
    assert [one["status"]["phase"] for one in (friendly, strange)] == ["Succeeded", "Succeeded"]
    assert [ips(friendly), ips(strange)] == [ended["friendly"], ended["strange"]]


def test_of_a_job_that_has_completed_nothing_is_left_in_the_mesh(shop: Cluster, ended: dict[str, list[str]]) -> None:
    assert ended
    assert {one["name"] for one in shop.status()["workloads"] if one["namespace"] == SPACE} == {"web", "friend", "stranger"}
    assert shop.status()["problems"] == []
    assert shop.exec(SPACE, "friend", "curl", "-s", "-m", "5", "-w", "%{exitcode}", "http://10.96.7.2/").startswith("7"), "refused at once"


def test_who_gets_the_address_of_a_pod_that_has_ended_has_its_own_identity_and_policy(shop: Cluster, ended: dict[str, list[str]]) -> None:
    plane = shop.plane
    plane.apply(admits("guarded", "friend"))
    serve = f"{ASK}; {SERVE.format('heir')}; sleep 10000"
    for number, (account, labels, first, expected) in enumerate(
        (
            ("stranger", {"app": "guarded"}, "7\n", ("200", "000")),
            ("friend", {"app": "open"}, "web\n0\n", ("200", "200")),
            ("stranger", {"app": "guarded"}, "7\n", ("200", "000")),
        )
    ):
        name = f"heir-{number}"
        shop.machine.next_address(*ended["friendly"])
        shop.run(SPACE, name, "/bin/sh", "-c", serve, account=account, labels=labels)
        takes(lambda name=name: shop.enrolled(f"{SPACE}/{name}") and len(shop.addresses(SPACE, name)) == 2)  # type: ignore[misc]
        assert shop.addresses(SPACE, name) == ended["friendly"]
        urls = [at(one) for one in ended["friendly"]]
        takes(lambda urls=urls: shop.get(SPACE, "friend", urls[0]) == "200")  # type: ignore[misc]
        assert [seen(shop, url) for url in urls] == [expected, expected]
        assert shop.exec(SPACE, name, "cat", "/dev/termination-log") == first
        identity = {one["name"]: one["identity"] for one in shop.status()["workloads"]}[name]
        assert identity == f"spiffe://mesh.local/ns/{SPACE}/sa/{account}"
        plane.kubectl("delete", "pod", name, "-n", SPACE, "--wait=true")
    takes(lambda: len(shop.status()["workloads"]) == 3)


def test_pods_of_a_stateful_set_keep_their_policy_under_their_names_and_addresses(shop: Cluster) -> None:
    plane = shop.plane
    template = {"metadata": {"labels": {"app": "db"}}, "spec": pod("db", "/bin/sh", "-c", f"{SERVE.format('db')}; sleep 10000")}
    spec = {"replicas": 2, "serviceName": "db", "selector": {"matchLabels": {"app": "db"}}, "template": template}
    stateful = {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "db", "namespace": SPACE}, "spec": spec}
    plane.apply(service("db", headless=True), admits("db", "friend"), stateful)
    takes(lambda: {f"{SPACE}/db-0", f"{SPACE}/db-1"} <= shop.redirected())

    def named() -> bool:
        shop.machine.name_services()
        return all(shop.get(SPACE, "friend", f"http://{one}.db.{SPACE}.svc.cluster.local:8080/") == "200" for one in ("db-0", "db-1"))

    takes(named)
    for one in pods(shop, "db"):
        name = one["metadata"]["name"]
        for url in (*map(at, ips(one)), f"http://{name}.db.{SPACE}.svc.cluster.local:8080/", f"http://{name}.db:8080/"):
            assert answers(shop, url), url
    (before, _) = pods(shop, "db")
    plane.kubectl("delete", "pod", "db-0", "-n", SPACE, "--wait=true")
    takes(lambda: shop.enrolled(f"{SPACE}/db-0") and len(ips(pods(shop, "db")[0])) == 2)
    (after, _) = pods(shop, "db")
    assert after["metadata"]["name"] == before["metadata"]["name"]
    assert after["metadata"]["uid"] != before["metadata"]["uid"]
    assert not set(ips(after)) & set(ips(before))
    takes(named)
    for url in (*map(at, ips(after)), f"http://db-0.db.{SPACE}.svc.cluster.local:8080/"):
        assert answers(shop, url), url
    assert [shop.get(SPACE, "friend", at(one)) for one in ips(before)] == ["000", "000"]
    plane.kubectl("delete", "statefulset", "db", "-n", SPACE, "--wait=true")


def test_both_families_are_under_policy_at_services_and_at_pods(shop: Cluster) -> None:
    plane = shop.plane
    plane.apply({**service("web", "10.96.7.1", "fd96::71")})
    urls = [WEB, "http://[fd96::71]/", *map(at, shop.addresses(SPACE, "web"))]
    assert len(urls) == 4
    takes(lambda: answers(shop, urls[1]))
    assert [seen(shop, url) for url in urls] == [("200", "000")] * 4
    plane.apply(admits("web", "friend", paths=["/index.html"]))
    takes(lambda: shop.get(SPACE, "friend", urls[0]) == "403")
    assert [shop.get(SPACE, "friend", url) for url in urls] == ["403"] * 4
    assert [shop.get(SPACE, "friend", f"{url}index.html") for url in urls] == ["200"] * 4
    assert {shop.get(SPACE, "stranger", f"{url}index.html") for url in urls} <= {"000", "403"}
    plane.apply(admits("web", "friend"))
    takes(lambda: answers(shop, WEB))


def test_a_pod_in_the_nodes_network_runs_outside_of_the_mesh_and_no_policy_takes_it_for_its_account(shop: Cluster) -> None:
    plane = shop.plane
    (port,) = free_ports(1)
    command = f"{ASK}; mkdir -p /tmp/www; echo host > /tmp/www/index.html; httpd -p {port} -h /tmp/www; sleep 10000"
    spec = pod("friend", "/bin/sh", "-c", command) | {"nodeName": shop.machine.name, "hostNetwork": True}
    metadata = {"name": "host", "namespace": SPACE, "labels": {"app": "host"}}
    exposed = service("host", "10.96.7.3")
    exposed["spec"]["ports"][0]["targetPort"] = port
    plane.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}, exposed, admits("host", "friend"))
    takes(lambda: seen(shop, "http://10.96.7.3/") == ("200", "200"))
    plane.apply(admits("web", "stranger"))  # after the other one, so that it is known, too, when this one is
    takes(lambda: seen(shop, WEB) == ("000", "200"))
    assert seen(shop, "http://10.96.7.3/") == ("200", "200"), "no policy protects it"
    plane.apply(admits("web", "friend"))
    takes(lambda: answers(shop, WEB))
    assert shop.exec(SPACE, "host", "cat", "/dev/termination-log") == "7\n", "its account is the friend's, and it is not let in"
    made = json.loads(plane.kubectl("get", "pod", "host", "-n", SPACE, "-o", "json"))
    assert "sysctls" not in made["spec"].get("securityContext", {}), "it is not marked"
    assert f"{SPACE}/host" not in {f"{one['namespace']}/{one['name']}" for one in shop.status()["workloads"] if one["redirected"]}
    assert shop.status()["problems"] == []
    plane.kubectl("delete", "pod", "host", "-n", SPACE, "--wait=true")
    takes(lambda: seen(shop, "http://10.96.7.3/") == ("000", "000"))


def test_after_a_reboot_pods_are_in_the_mesh_again_and_what_they_did_before_it_is_ended(shop: Cluster) -> None:
    """The kubelet is faster than the agent: its pods start while no program of the mesh is in the kernel."""
    shop.lose()
    shop.machine.reboot()
    shop.machine.start_kubelet()
    plane = shop.plane
    names = ("web", "friend", "stranger")

    def again() -> bool:
        phases = (
            plane.kubectl("get", "pod", one, "-n", SPACE, "-o", "jsonpath={.status.containerStatuses[0].restartCount}") for one in names
        )
        return all(phase not in {"", "0"} for phase in phases)

    takes(again)
    address = shop.addresses(SPACE, "web")[0]
    takes(lambda: shop.get(SPACE, "stranger", at(address)) == "200")
    keep = f"curl -s http://{address}:{KEPT}/; echo ended > /run/kept"
    for name in ("friend", "stranger"):
        shop.exec(SPACE, name, "sh", "-c", f"echo open > /run/kept; ({keep}) > /dev/null 2>&1 &")
    time.sleep(1)
    assert kept(shop) == ["open", "open"]
    shop.mount()
    shop.start_agent()
    takes(lambda: {f"{SPACE}/{name}" for name in names} <= shop.redirected())
    takes(lambda: answers(shop, WEB))
    assert answers(shop, at(address))
    takes(lambda: kept(shop)[1] == "ended")
    assert kept(shop) == ["open", "ended"], "the friend's connection is one that policy allows"
    assert shop.status()["problems"] == []


def kept(found: Cluster) -> list[str]:
    """Of the connections that friend and stranger have."""
    return [found.exec(SPACE, name, "cat", "/run/kept").strip() for name in ("friend", "stranger")]
