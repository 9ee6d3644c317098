"""Pods of Kubernetes, found by their UIDs: real cgroups named as the kubelet names them, real processes in network namespaces, no kubelet."""

from __future__ import annotations

import gc
import os
import select
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent import netns
from agent.model import Action, Policy, PolicyRule, Snapshot, Source, Workload
from agent.supervisor import EAGER_POLL_S, NAMESPACE_POLL_S
from lab import cgroup
from lab import netns as lab_netns
from tests.kernel import datanode
from tests.kernel.datanode import ALLOW_CALLER, DataNode, address_of, snapshot, workload
from tests.kernel.kubelet import LAYOUTS, Kubelet, pod, running, uid
from tests.kernel.test_enrolment import belongings, owners

PODS = 250


@pytest.fixture
def kubelet(node: DataNode) -> Iterator[Kubelet]:
    """And a node with nothing on it."""
    with running(node) as found:
        yield found


def watches() -> int:
    """How many files and directories this process watches (proc(5), /proc/PID/fdinfo/FD)."""
    return sum(info.read_text().count("inotify wd:") for info in Path("/proc/self/fdinfo").iterdir() if info.exists())


def follow(node: DataNode, model: Snapshot, until: str = "", timeout: float = 10.0) -> tuple[str, ...]:
    """What the supervisor does with news of namespaces, until the workload `until` is enrolled, or none is; returns who is."""
    watch = node.enrolment.watch
    deadline = time.monotonic() + timeout
    found: tuple[str, ...] = ()
    while time.monotonic() < deadline:
        select.select([watch.fileno()], [], [], EAGER_POLL_S if watch.eager else NAMESPACE_POLL_S)
        if node.enrolment.namespaces_changed(model):
            found = tuple(local.workload.name for local in node.enrolment.enforce(model, frozenset()).local)
            if (until in found) if until else not found:
                return found
    raise TimeoutError(f"{until or 'nobody'} is not enrolled, but {found}")


def reason(node: DataNode, model: Snapshot) -> str:
    """Why the one workload of a model is not enrolled."""
    enrolled = node.enrolment.enforce(model, frozenset())
    assert enrolled.local == ()
    ((_, found),) = enrolled.missing
    return found


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_pod_is_enrolled_in_every_layout_of_the_kubelet(node: DataNode, kubelet: Kubelet, layout: str) -> None:
    place, space = kubelet.start(1, layout), kubelet.namespace("one", "10.79.0.1")
    kubelet.process(1, space, place)
    node.enforce(snapshot(pod(1, ("10.79.0.1",))))
    assert owners(node)["10.79.0.1"] == ("default/pod-1", netns.cookie(lab_netns.path(space)))


def test_a_pod_is_enrolled_within_200_ms_of_its_first_process(node: DataNode, kubelet: Kubelet) -> None:
    """From before the process is forked, through the moment in which it is in the node's namespace, to the rows in the kernel."""
    gc.collect()
    gc.freeze()  # other tests of this process have left much that an agent does not have, and looking through it takes 0.1 s
    took = []
    for number in range(11):
        model = snapshot(pod(number))
        assert node.enrolment.enforce(model, frozenset()).local == ()
        space = kubelet.namespace(f"soon-{number}", f"10.79.1.{number}")
        started: list[float] = []

        def run(number: int = number, space: str = space, started: list[float] = started) -> None:
            place = kubelet.start(number)
            time.sleep(0.5)  # longer than `eager` lasts: the kubelet mounts volumes and makes the network
            started.append(time.perf_counter())
            kubelet.spawn(number, ["nsenter", f"--net={lab_netns.path(space)}", "sleep", "1000"], place)

        runtime = threading.Thread(target=run)
        runtime.start()
        follow(node, model, f"default/pod-{number}")
        took.append(time.perf_counter() - started[0])
        runtime.join()
        assert owners(node)[f"10.79.1.{number}"][0] == f"default/pod-{number}"
        kubelet.remove(number)
    print(f"enrolled after {statistics.median(took) * 1e3:.1f} ms (median of {len(took)}), at most {max(took) * 1e3:.1f} ms")
    gc.unfreeze()
    assert statistics.median(took) < 0.2


def test_the_oldest_process_of_a_pod_decides(node: DataNode, kubelet: Kubelet) -> None:
    """A privileged container may make namespaces of its own; what CRI-O's conmon is in is the node's."""
    model, sandbox = snapshot(pod(1)), kubelet.namespace("sandbox", "10.79.0.1")
    kubelet.process(1, "", kubelet.start(1, container="crio-conmon-1.scope"))
    time.sleep(0.02)
    kubelet.process(1, sandbox, kubelet.start(1, container="crio-z.scope"))
    time.sleep(0.02)
    kubelet.process(1, kubelet.namespace("nested", "10.79.0.2"), kubelet.start(1, container="crio-a.scope"))
    node.enforce(model)
    assert owners(node) == {"10.79.0.1": ("default/pod-1", netns.cookie(lab_netns.path(sandbox)))}


def test_a_process_of_the_pod_cannot_take_it_elsewhere_when_its_sandbox_ends(node: DataNode, kubelet: Kubelet) -> None:
    model, space = snapshot(pod(1)), kubelet.namespace("sandbox", "10.79.0.1")
    sandbox = kubelet.process(1, space, kubelet.start(1))
    time.sleep(0.02)
    kubelet.process(1, kubelet.namespace("elsewhere", "10.79.0.2"), kubelet.start(1, container="a.scope"))
    time.sleep(0.02)
    kubelet.process(1, space, kubelet.start(1, container="b.scope"))
    node.enforce(model)
    before = owners(node)
    sandbox.kill()
    sandbox.wait()
    assert node.enrolment.namespaces_changed(model)
    node.enforce(model)
    assert owners(node) == before
    assert list(before) == ["10.79.0.1"]


def test_a_pod_of_the_nodes_own_network_is_never_enrolled(node: DataNode, kubelet: Kubelet) -> None:
    model = snapshot(pod(1))
    place = kubelet.start(1)
    running = kubelet.process(1, "", place)
    time.sleep(0.02)
    kubelet.process(1, kubelet.namespace("nested", "10.79.0.1"), place)  # an agent of a network plugin does that
    found = reason(node, model)
    assert f"is in the node's own network namespace (process {running.pid} in {place.parent})" in found
    assert "spec.hostNetwork" in found
    assert not node.enrolment.namespaces_changed(model)
    assert (belongings(node)["mounts"], belongings(node)["links"]) == ([], [])


def test_every_moment_before_a_sandbox_has_its_own_reason(node: DataNode, kubelet: Kubelet) -> None:
    model = snapshot(pod(1))
    assert f"there is no kubepods cgroup below {node.config.cgroup}" in reason(node, model)
    cgroup.create(kubelet.directory(1).parent)
    assert node.enrolment.namespaces_changed(model)
    assert f"there is no cgroup of pod {uid(1)} below {node.config.cgroup / 'kubepods.slice'}" in reason(node, model)
    place = kubelet.start(1)
    assert node.enrolment.namespaces_changed(model)
    assert f"there is no process in {place.parent}" in reason(node, model)


def test_a_sandbox_that_was_replaced_is_found_again(node: DataNode, kubelet: Kubelet) -> None:
    model = snapshot(pod(1))
    cookies = []
    for number, address in enumerate(("10.79.0.1", "10.79.0.2")):
        space, place = kubelet.namespace(f"life-{number}", address), kubelet.start(1, container=f"cri-containerd-{number}.scope")
        kubelet.process(1, space, place)
        node.enforce(model)
        cookies.append(netns.cookie(lab_netns.path(space)))
        assert owners(node) == {address: ("default/pod-1", cookies[-1])}
        assert belongings(node)["mounts"] == [str(cookies[-1])]
        kubelet.stop(1)
        kubelet.forget(space)
        assert node.enrolment.namespaces_changed(model)
    assert len(set(cookies)) == 2


def test_a_pod_whose_cgroup_is_gone_is_released(node: DataNode, kubelet: Kubelet) -> None:
    before = belongings(node)
    model, space = snapshot(pod(1)), kubelet.namespace("gone", "10.79.0.1")
    kubelet.process(1, space, kubelet.start(1))
    node.enforce(model)
    inode = lab_netns.path(space).stat().st_ino
    kubelet.remove(1)
    kubelet.forget(space)
    follow(node, model)
    assert belongings(node) == before
    assert f"net:[{inode}]" not in Path("/proc/self/mountinfo").read_text()


def test_a_pod_that_was_removed_and_made_again_is_told_of(node: DataNode, kubelet: Kubelet) -> None:
    """A cgroup that is removed takes no watch with it (fs/kernfs): the next one of its name has to be watched anew."""
    model = snapshot(pod(1))
    for life in range(5):
        space = kubelet.namespace(f"again-{life}", f"10.79.0.{life}")
        kubelet.start(1)
        node.enrolment.namespaces_changed(model)
        node.enrolment.enforce(model, frozenset())
        watch = node.enrolment.watch
        watch.drain()
        watch.take_named()
        running = kubelet.process(1, space, kubelet.start(1))
        assert select.select([watch.fileno()], [], [], 1)[0], f"nobody is told of process {running.pid}"
        follow(node, model, "default/pod-1")
        kubelet.remove(1)
        follow(node, model)


def test_a_class_of_service_that_was_removed_and_made_again_is_watched(node: DataNode, kubelet: Kubelet) -> None:
    model, parent = snapshot(pod(1)), cgroup.create(kubelet.directory(1).parent)
    node.enrolment.enforce(model, frozenset())
    for _ in range(3):
        assert not node.enrolment.namespaces_changed(model)
        cgroup.remove(parent)
        cgroup.create(parent)
    node.enrolment.namespaces_changed(model)
    watch = node.enrolment.watch
    watch.drain()
    watch.take_named()
    kubelet.start(1)
    assert select.select([watch.fileno()], [], [], 1)[0]
    watch.drain()
    assert watch.take_named()


def test_two_hundred_pods_in_a_row_leave_nothing_behind(node: DataNode, kubelet: Kubelet) -> None:
    layouts = [layout for name, layout in LAYOUTS.items() if name != "kind"]
    for layout in layouts:
        cgroup.create(kubelet.directory(0, layout).parent)
    before, watched = belongings(node), watches()
    alive: list[tuple[Workload, int, str]] = []
    for i in range(200):
        layout = layouts[i % len(layouts)]
        space = kubelet.namespace(f"churn-{i}", f"10.79.2.{i + 1}")
        kubelet.process(i, space, kubelet.start(i, layout))
        alive.append((pod(i, (f"10.79.2.{i + 1}",) if i % 3 else ()), i, space))
        node.enforce(snapshot(*(one for one, _, _ in alive)))
        assert owners(node)[f"10.79.2.{i + 1}"][0] == f"default/pod-{i}"
        if len(alive) > 3:  # one goes with its cgroup first, the next one with its resource first
            old, number, space = alive.pop(0)
            if i % 2:
                kubelet.remove(number, layouts[number % len(layouts)])
                enrolled = node.enrolment.enforce(snapshot(old, *(one for one, _, _ in alive)), frozenset())
                assert [name for name, _ in enrolled.missing] == [old.name]
            node.enforce(snapshot(*(one for one, _, _ in alive)))
            kubelet.remove(number, layouts[number % len(layouts)])
            kubelet.forget(space)
    assert belongings(node) != before
    node.enforce(snapshot())
    assert belongings(node) == before
    for _, number, _ in alive:
        kubelet.remove(number, layouts[number % len(layouts)])
    node.enrolment.namespaces_changed(snapshot())
    assert watches() <= watched


def test_a_change_that_concerns_no_pod_walks_no_cgroup_tree(node: DataNode, kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(PODS):
        kubelet.process(number, kubelet.namespace(str(number)), kubelet.start(number))
    model = snapshot(*map(pod, range(PODS)))
    node.enforce(model)
    monkeypatch.setattr(node.enrolment.tables, "sync", lambda *_, **__: 0)
    monkeypatch.setattr(os, "scandir", lambda *_: pytest.fail("a directory was listed"))
    monkeypatch.setattr(os, "listdir", lambda *_: pytest.fail("a directory was listed"))
    change, poll = [], []
    for i in range(20):
        other = replace(model, version=f"v{i}")
        started = time.perf_counter()
        node.enrolment.enforce(other, frozenset())
        change.append(time.perf_counter() - started)
        started = time.perf_counter()
        assert not node.enrolment.namespaces_changed(other)
        poll.append(time.perf_counter() - started)
    print(f"{PODS} pods: a change costs {min(change) * 1e3:.2f} ms besides the tables, a look that finds nothing {min(poll) * 1e3:.2f} ms")
    monkeypatch.undo()
    node.enrolment._pods._searched_at = 0.0
    started = time.perf_counter()
    node.enrolment._pods.search()
    print(f"a search for kubepods costs {(time.perf_counter() - started) * 1e3:.2f} ms")
    assert min(change) < 0.01
    assert min(poll) < 0.01


def unaddressed(name: str, **other: object) -> Workload:
    """A pod of the lab as it is before the kubelet has reported its addresses."""
    number = sorted(datanode.ADDRESSES).index(name)
    found = replace(workload(name), network_namespace="", addresses=(), pod_uid=uid(number))
    return replace(found, **other)  # type: ignore[arg-type]


@pytest.fixture
def sandboxes(kubelet: Kubelet) -> None:
    """Sandboxes in the namespaces of the lab's pods."""
    for number, name in enumerate(sorted(datanode.ADDRESSES)):
        if name != "remote":
            kubelet.process(number, workload(name).network_namespace, kubelet.start(number))


@pytest.mark.usefixtures("sandboxes")
@pytest.mark.parametrize("family", datanode.FAMILIES)
def test_a_pod_without_addresses_is_reached_at_its_own_and_protected_there(node: DataNode, family: object) -> None:
    server = address_of("server-a", family)  # type: ignore[arg-type]
    node.enforce(snapshot(unaddressed("server-a"), unaddressed("caller"), unaddressed("other")))
    assert node.connect("caller", server, 8080).startswith("ok")
    assert node.connect("stranger", server, 8080).startswith("ok")
    protected = unaddressed("server-a", policies=("default/p",))
    node.enforce(snapshot(protected, unaddressed("caller"), unaddressed("other"), policies=(ALLOW_CALLER,)))
    assert node.in_force()
    assert node.connect("stranger", server, 8080) != "ok"


@pytest.mark.parametrize("later", [pytest.param(False, id="sandbox-first"), pytest.param(True, id="sandbox-later")])
def test_a_pod_without_addresses_is_known_to_policies_by_those_of_its_namespace(node: DataNode, kubelet: Kubelet, *, later: bool) -> None:
    """Otherwise a pod could do what its block may not, from its start until the kubelet has reported."""
    block, account = Source(ip_blocks=(f"{address_of('caller')}/32",)), Source(service_accounts=("default/caller",))
    policies = (Policy("default/p", Action.DENY, (PolicyRule((block,)),)), Policy("default/seen", Action.AUDIT, (PolicyRule((account,)),)))
    server = workload("server-a", policies=("default/p", "default/seen"))
    caller = unaddressed("caller", pod_uid=uid(1))
    model = snapshot(server, workload("other"), caller, policies=policies)
    if later:
        assert [name for name, _ in node.enrolment.enforce(model, frozenset()).missing] == [caller.name]
    kubelet.process(1, workload("caller").network_namespace, kubelet.start(1))
    node.enforce(model)
    assert node.connect("caller", address_of("server-a"), 8080) == "EPERM"
    assert node.connect("other", address_of("server-a"), 8080).startswith("ok")


@pytest.mark.usefixtures("sandboxes")
def test_what_a_pod_gave_itself_never_takes_anothers_declared_address(node: DataNode) -> None:
    """Then nobody has it: the pod is closed there until its own are declared."""
    server = address_of("server-a")
    claimed = replace(workload("remote"), addresses=(server,))
    node.enforce(snapshot(unaddressed("server-a"), workload("caller"), claimed))
    assert server not in owners(node)
    node.enforce(snapshot(unaddressed("server-a", addresses=workload("server-a").addresses), workload("caller"), claimed))
    assert owners(node)[server][0] == "default/server-a"
