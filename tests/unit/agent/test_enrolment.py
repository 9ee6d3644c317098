"""The order in which a node is brought to a snapshot, with stand-ins for kernel and namespaces; the real ones are in tests/kernel."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agent import enrolment, netns, pods
from agent.bpf.tables import Namespace
from agent.config import Config
from agent.enrolment import Enrolment
from agent.errors import KernelRefused
from agent.model import NO_DIRECT, Delta, Direct, Snapshot, Workload
from agent.pods import NOT_FOUND, Pod


class World:
    """Namespaces are files in `directory` that hold their cookie; everything that is done to the kernel is noted in `log`, looks in `looks`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log: list[tuple[object, ...]] = []
        self.refuse_link: set[int] = set()
        self.refuse_rows = False
        self.fits = False
        """Are rows refused only when some of them are written already?"""
        self.refusal: Exception = KernelRefused("the table is full")
        self.mounts: set[Path] = set()
        self.looks: list[str] = []
        self.watch: Watch
        self.fail_look = False
        self.loopback = True
        self.pods: dict[str, tuple[Pod, int]] = {}
        """Where a pod is by its UID, and the cookie of its namespace."""
        self.effective: dict[str, tuple[str, ...]] = {}
        """Addresses of the workloads in the tables."""

    def namespace(self, name: str, cookie: int) -> Path:
        path = self.directory / name
        path.unlink(missing_ok=True)
        path.write_text(str(cookie))
        return path

    # The data path and the tables.
    in_force = True
    maps: dict[str, object] = {}  # noqa: RUF012 - nothing looks into it

    def attach_namespace(self, cookie: int, path: Path) -> None:
        self.log.append(("link", cookie, path.name))
        if cookie in self.refuse_link:
            raise KernelRefused("no link today")

    def detach_namespace(self, cookie: int) -> None:
        self.log.append(("unlink", cookie))

    def detach_namespaces(self, keep: set[int]) -> None:
        self.log.append(("unlink all but", *sorted(keep)))

    def sync(
        self,
        _: Snapshot,
        local: list[Namespace],
        inbound: frozenset[str],
        accelerated: frozenset[str],
        tunnels: Mapping[str, int],
        direct: Direct,
        switching: Callable[[], None],
    ) -> int:
        assert not accelerated
        assert not tunnels
        assert direct == NO_DIRECT
        self.effective = {n.local.workload.name: n.local.workload.addresses for n in local}
        if self.fits or not self.refuse_rows:
            switching()
        self.log.append(("rows", *(n.local.workload.name for n in local), *inbound))
        if self.refuse_rows:
            raise self.refusal
        return len(local)

    # agent.netns
    def mark(self, path: str) -> tuple[int, int]:
        found = Path(path)
        return (1, found.stat().st_ino) if found.exists() and found.read_text() else netns.GONE

    def look(self, source: Path) -> netns.Seen:
        self.looks.append(source.name)
        if self.fail_look:
            raise OSError(24, "too many open files")
        cookies = {pod.path: cookie for pod, cookie in self.pods.values()}
        number = cookies[str(source)] if str(source) in cookies else int(source.read_text())
        return netns.Seen(number, ("10.0.0.1",), self.loopback, os.open("/dev/null", os.O_RDONLY))

    def hold(self, _: Path, cookie: int, directory: Path) -> Path:
        target = directory / str(cookie)
        self.mounts.add(target)
        return target

    def release(self, target: Path) -> None:
        self.mounts.remove(target)

    # agent.pods
    kubepods = ("/kubepods",)

    def find(self, uid: str, _: Pod = NOT_FOUND) -> Pod:
        return self.pods[uid][0] if uid in self.pods else Pod(reason=f"no pod {uid}")

    def names(self, uid: str) -> tuple[str, ...]:
        return (f"/kubepods/pod{uid}",)

    def check(self) -> None:
        self.log.append(("check",))


class NobodyHeld:
    """Pods are not held back here."""

    def __init__(self, *_: object) -> None: ...

    def held(self) -> dict[int, int]:
        return {}

    def expect(self) -> None: ...


class Watch:
    """A watch to which nobody tells anything but the test, through `doubt`."""

    complete, news, named = True, False, False

    def __init__(self, world: World) -> None:
        self.world = world
        self.changed: set[int] = set()
        self.paths: set[str] = set()
        self.contents: set[str] = set()
        world.watch = self

    def follow(self, paths: Iterable[str], contents: Iterable[str] = ()) -> None:
        self.paths, self.contents = set(paths), set(contents)

    def add(self, _: int, notices: int, process: int | None = None) -> None:
        os.close(notices)
        if process is not None:
            os.close(process)

    def keep(self, cookies: set[int]) -> None:
        self.changed &= cookies

    def doubt(self, cookies: Iterable[int]) -> None:
        self.changed |= set(cookies)

    def take_changed(self) -> set[int]:
        changed, self.changed = self.changed, set()
        return changed

    def take_named(self) -> bool:
        named, self.named = self.named, False
        return named

    def drain(self) -> None:
        self.news = bool(self.changed)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    monkeypatch.setattr(enrolment, "Tables", lambda *_: made)
    monkeypatch.setattr(enrolment, "Watch", lambda: Watch(made))
    monkeypatch.setattr(enrolment, "Holding", NobodyHeld)
    monkeypatch.setattr(enrolment, "Pods", lambda _: made)
    monkeypatch.setattr(netns, "mark", made.mark)
    monkeypatch.setattr(netns, "look", made.look)
    monkeypatch.setattr(netns, "hold", made.hold)
    monkeypatch.setattr(netns, "release", made.release)
    monkeypatch.setattr(netns, "held", lambda _: sorted(made.mounts))
    return made


@pytest.fixture
def node(world: World, tmp_path: Path) -> Enrolment:
    return Enrolment(Config(node="node-1", controller="unix:x", run_dir=tmp_path / "run"), cast("Any", world), cast("Any", None))


def workload(name: str, namespace: object, *, node: str = "node-1", enrolled: bool = True) -> Workload:
    return Workload(f"default/{name}", name, node, {}, ("10.0.0.1",), str(namespace), enrolled=enrolled, ready=True)


UID = "0f6f7d2a-3b1c-4e5d-8a9b-c0d1e2f30415"


def pod(uid: str = UID, addresses: tuple[str, ...] = ("10.0.0.1",)) -> Workload:
    return replace(workload("a", ""), pod_uid=uid, addresses=addresses)


def sandbox(mark: int, process: int = 0) -> Pod:
    """A pod whose sandbox is this process, the tests' own if none is given."""
    pid = process or os.getpid()
    started = pods.birth(pid)
    assert started is not None
    return Pod("/kubepods/pod", pid, started, (4, mark))


def snapshot(*workloads: Workload) -> Snapshot:
    return Snapshot("1", {w.name: w for w in workloads})


def test_the_rows_are_there_before_a_namespace_is_linked(world: World, node: Enrolment) -> None:
    model = snapshot(*(workload(name, world.namespace(name, cookie)) for name, cookie in (("a", 7), ("b", 11))))
    enrolled = node.enforce(model, frozenset({"default/b"}))
    assert world.log == [("rows", "default/a", "default/b", "default/b"), ("link", 7, "7"), ("link", 11, "11"), ("unlink all but", 7, 11)]
    assert [(local.workload.name, local.netns_cookie) for local in enrolled.local] == [("default/a", 7), ("default/b", 11)]
    assert enrolled.missing == ()


def test_a_workload_without_its_namespace_is_missing_and_the_others_are_enrolled(world: World, node: Enrolment) -> None:
    enrolled = node.enforce(snapshot(workload("a", world.directory / "absent"), workload("b", world.namespace("b", 11))), frozenset())
    assert [local.workload.name for local in enrolled.local] == ["default/b"]
    ((name, reason),) = enrolled.missing
    assert name == "default/a"
    assert "absent" in reason


def test_a_namespace_belongs_to_one_workload(world: World, node: Enrolment) -> None:
    path = world.namespace("shared", 7)
    enrolled = node.enforce(snapshot(workload("a", path), workload("b", path)), frozenset())
    assert [local.workload.name for local in enrolled.local] == ["default/a"]
    ((name, reason),) = enrolled.missing
    assert (name, "already belongs to workload default/a" in reason) == ("default/b", True)


def test_a_link_that_is_refused_makes_its_workload_missing_only(world: World, node: Enrolment) -> None:
    world.refuse_link = {7}
    enrolled = node.enforce(snapshot(workload("a", world.namespace("a", 7)), workload("b", world.namespace("b", 11))), frozenset())
    assert enrolled.missing == (("default/a", "no link today"),)
    assert ("link", 11, "11") in world.log


def test_who_leaves_has_its_link_removed_before_its_rows(world: World, node: Enrolment) -> None:
    a, b = (workload(name, world.namespace(name, cookie)) for name, cookie in (("a", 7), ("b", 11)))
    node.enforce(snapshot(a, b), frozenset())
    world.log.clear()
    node.enforce(snapshot(replace(a, enrolled=False), b), frozenset())
    assert world.log == [("unlink", 7), ("rows", "default/b"), ("unlink all but", 11)]


def test_the_mount_of_who_leaves_and_lives_on_stays_for_requests_that_envoy_still_has(
    world: World, node: Enrolment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "LINGER_S", 0.0)
    a, b, c = (workload(name, world.namespace(name, cookie)) for name, cookie in (("a", 7), ("b", 11), ("c", 13)))
    node.enforce(snapshot(a, b, c), frozenset())
    node.enforce(snapshot(replace(a, enrolled=False), b), frozenset())
    assert {mount.name for mount in world.mounts} == {"7", "11"}, "c is no more, nobody asks from there"
    node.release_left()
    assert {mount.name for mount in world.mounts} == {"11"}


def test_who_comes_back_keeps_its_mount_as_long_as_it_is_there(world: World, node: Enrolment) -> None:
    a = workload("a", world.namespace("a", 7))
    node.enforce(snapshot(a), frozenset())
    node.enforce(snapshot(replace(a, enrolled=False)), frozenset())
    node.enforce(snapshot(a), frozenset())
    node.release_left()
    assert {mount.name for mount in world.mounts} == {"7"}
    node.enforce(snapshot(), frozenset())
    assert world.mounts == set()


@pytest.mark.parametrize("doubted", [{7}, set()], ids=["doubted", "not-doubted"])
@pytest.mark.parametrize("looked", [True, False], ids=["looked-at-before", "not-looked-at-before"])
def test_who_leaves_has_its_link_removed_before_its_rows_also_if_it_is_doubted(
    world: World, node: Enrolment, doubted: set[int], looked: bool
) -> None:
    a, b = (workload(name, world.namespace(name, cookie)) for name, cookie in (("a", 7), ("b", 11)))
    node.enforce(snapshot(a, b), frozenset())
    node.doubt(doubted)
    if looked:
        node.find(snapshot(a, b))
    world.log.clear()
    node.enforce(snapshot(b), frozenset())
    assert world.log == [("unlink", 7), ("rows", "default/b"), ("unlink all but", 11)]


def test_a_link_that_is_doubted_is_made_again_whoever_has_looked_since(world: World, node: Enrolment) -> None:
    model = snapshot(workload("a", world.namespace("a", 7)))
    node.enforce(model, frozenset())
    node.doubt({7})
    node.find(model)
    world.log.clear()
    node.enforce(model, frozenset())
    node.enforce(model, frozenset())
    assert world.log == [("rows", "default/a"), ("link", 7, "7"), ("rows", "default/a")]


def test_who_leaves_with_rows_that_do_not_fit_is_never_without_its_link(world: World, node: Enrolment) -> None:
    node.enforce(snapshot(workload("a", world.namespace("a", 7))), frozenset())
    world.log.clear()
    world.refuse_rows = True
    with pytest.raises(KernelRefused):
        node.enforce(snapshot(workload("b", world.namespace("b", 11))), frozenset())
    assert world.log == [("rows", "default/b")]


@pytest.mark.parametrize("refusal", [KernelRefused("no memory"), ValueError("no address")])
def test_rows_that_are_refused_late_leave_links_and_mounts_as_they_were(world: World, node: Enrolment, refusal: Exception) -> None:
    world.refusal, world.fits = refusal, True
    node.enforce(snapshot(workload("a", world.namespace("a", 7))), frozenset())
    world.log.clear()
    world.refuse_rows = True
    with pytest.raises(type(refusal)):
        node.enforce(snapshot(workload("b", world.namespace("b", 11))), frozenset())
    assert world.log == [("unlink", 7), ("rows", "default/b"), ("link", 7, "7")]
    assert world.directory / "run/netns/7" in world.mounts


def test_a_link_that_cannot_be_made_again_is_made_by_the_next_attempt(world: World, node: Enrolment) -> None:
    model = snapshot(workload("a", world.namespace("a", 7)))
    node.enforce(model, frozenset())
    world.refuse_rows, world.refuse_link, world.fits = True, {7}, True
    with pytest.raises(KernelRefused):
        node.enforce(snapshot(), frozenset())
    world.refuse_rows, world.refuse_link = False, set()
    world.log.clear()
    assert node.namespaces_changed(model)
    node.enforce(model, frozenset())
    assert world.log[:2] == [("rows", "default/a"), ("link", 7, "7")]


def test_what_is_no_longer_needed_is_unlinked_and_unmounted(world: World, node: Enrolment) -> None:
    a, b = (workload(name, world.namespace(name, cookie)) for name, cookie in (("a", 7), ("b", 11)))
    node.enforce(snapshot(a, b), frozenset())
    node.enforce(snapshot(b), frozenset())
    assert world.log[-1] == ("unlink all but", 11)
    assert {mount.name for mount in world.mounts} == {"11"}


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"node": "node-2"}, id="of-another-node"),
        pytest.param({"enrolled": False}, id="not-enrolled"),
        pytest.param({"namespace": ""}, id="without-a-namespace"),
    ],
)
def test_workloads_that_are_not_this_nodes_business_are_left_alone(world: World, node: Enrolment, other: dict[str, Any]) -> None:
    arguments = {"namespace": world.namespace("a", 7), **other}
    enrolled = node.enforce(snapshot(workload("a", **arguments)), frozenset())
    assert (enrolled.local, enrolled.missing, world.mounts) == ((), (), set())


def test_a_namespace_that_comes_goes_or_is_replaced_is_noticed(world: World, node: Enrolment) -> None:
    path = world.directory / "a"
    model = snapshot(workload("a", path))

    def changed() -> bool:
        noticed = node.namespaces_changed(model)
        node.enforce(model, frozenset())
        return noticed

    node.enforce(model, frozenset())
    assert not changed()
    world.namespace("a", 7)
    assert [changed(), changed()] == [True, False]
    path.rename(world.directory / "old")
    world.namespace("a", 11)
    assert [changed(), changed()] == [True, False]
    path.unlink()
    assert [changed(), changed()] == [True, False]


def test_what_has_not_changed_is_not_looked_at_again(world: World, node: Enrolment) -> None:
    a, b = (workload(name, world.namespace(name, cookie)) for name, cookie in (("a", 7), ("b", 11)))
    node.enforce(snapshot(a, b), frozenset())
    world.looks.clear()
    world.log.clear()
    enrolled = node.enforce(snapshot(replace(a, labels={"new": "label"}), b), frozenset())
    assert world.looks == []
    assert world.log == [("rows", "default/a", "default/b")]
    assert enrolled.local[0].workload.labels == {"new": "label"}


def test_only_what_a_delta_names_is_read_from_the_model(world: World, node: Enrolment) -> None:
    a, b = (workload(name, world.namespace(name, cookie)) for name, cookie in (("a", 7), ("b", 11)))
    node.enforce(snapshot(a), frozenset())
    unread = Snapshot("2", {a.name: a, b.name: b}, delta=Delta("1"))
    assert len(node.enforce(unread, frozenset()).local) == 1
    named = Snapshot("3", {b.name: b}, delta=Delta("2", workloads=frozenset({a.name, b.name})))
    assert [local.workload.name for local in node.enforce(named, frozenset()).local] == ["default/b"]
    other_base = Snapshot("5", {a.name: a}, delta=Delta("4"))
    assert [local.workload.name for local in node.enforce(other_base, frozenset()).local] == ["default/a"]


def test_a_namespace_whose_addresses_changed_is_looked_at_and_linked_again(world: World, node: Enrolment) -> None:
    model = snapshot(*(workload(name, world.namespace(name, cookie)) for name, cookie in (("a", 7), ("b", 11))))
    node.enforce(model, frozenset())
    world.looks.clear()
    world.log.clear()
    node.doubt({11})
    assert node.namespaces_changed(model)
    node.enforce(model, frozenset())
    assert world.looks == ["b"]
    assert ("link", 11, "11") in world.log
    assert ("link", 7, "7") not in world.log


def test_a_file_that_is_no_namespace_yet_is_awaited(world: World, node: Enrolment) -> None:
    path = world.directory / "a"
    path.touch()
    model = snapshot(workload("a", path))
    ((_, reason),) = node.enforce(model, frozenset()).missing
    assert "is not a network namespace" in reason
    assert not node.namespaces_changed(model)
    path.write_text("7")
    assert node.namespaces_changed(model)


def test_a_namespace_that_cannot_be_looked_at_keeps_its_protection_and_is_tried_again(
    world: World, node: Enrolment, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = snapshot(workload("a", world.namespace("a", 7)))
    node.enforce(model, frozenset())
    world.fail_look = True
    node.doubt({7})
    enrolled = node.enforce(model, frozenset())
    assert [local.netns_cookie for local in enrolled.local] == [7]
    assert "too many open files" in enrolled.missing[0][1]
    assert not node.namespaces_changed(model)
    monkeypatch.setattr("time.monotonic", lambda: 1e9)
    assert node.namespaces_changed(model)


def test_a_newcomer_does_not_take_the_namespace_of_another_workload(world: World, node: Enrolment) -> None:
    path = world.namespace("shared", 7)
    b = workload("b", path)
    node.enforce(snapshot(b), frozenset())
    enrolled = node.enforce(snapshot(workload("a", path), b), frozenset())
    assert [local.workload.name for local in enrolled.local] == ["default/b"]
    assert [name for name, _ in enrolled.missing] == ["default/a"]


def test_a_namespace_without_loopback_is_protected_but_nothing_listens_there_yet(world: World, node: Enrolment) -> None:
    world.loopback = False
    model = snapshot(workload("a", world.namespace("a", 7)))
    enrolled = node.enforce(model, frozenset())
    assert world.log[:2] == [("rows", "default/a"), ("link", 7, "7")]
    assert enrolled.local == ()
    assert "ip link set lo up" in enrolled.missing[0][1]
    world.loopback = True
    node.doubt({7})
    enrolled = node.enforce(model, frozenset())
    assert ([local.netns_cookie for local in enrolled.local], enrolled.missing) == ([7], ())


def test_a_pod_is_bound_to_its_sandbox_as_soon_as_there_is_one(world: World, node: Enrolment) -> None:
    model = snapshot(pod())
    enrolled = node.enforce(model, frozenset())
    assert (enrolled.local, enrolled.missing) == ((), (("default/a", f"no pod {UID}"),))
    assert (world.watch.paths, world.watch.contents) == ({f"/kubepods/pod{UID}"}, set())
    assert not node.namespaces_changed(model)
    world.pods[UID] = (Pod("/kubepods/pod", reason="no process"), 0)
    assert node.namespaces_changed(model)
    assert node.enforce(model, frozenset()).missing == (("default/a", "no process"),)
    assert world.watch.contents == {"/kubepods/pod/cgroup.events"}
    world.pods[UID] = (sandbox(1), 7)
    assert node.namespaces_changed(model)
    enrolled = node.enforce(model, frozenset())
    assert ([(one.workload.name, one.netns_cookie) for one in enrolled.local], enrolled.missing) == ([("default/a", 7)], ())
    assert not node.namespaces_changed(model)


def test_a_sandbox_in_another_namespace_is_another_binding(world: World, node: Enrolment) -> None:
    model = snapshot(pod())
    world.pods[UID] = (sandbox(1), 7)
    node.enforce(model, frozenset())
    world.pods[UID] = (sandbox(2), 11)
    assert not node.namespaces_changed(model), "nobody has told that the sandbox ended"
    node.doubt({7})
    assert node.namespaces_changed(model)
    assert [one.netns_cookie for one in node.enforce(model, frozenset()).local] == [11]
    assert {mount.name for mount in world.mounts} == {"11"}


def test_a_pod_whose_sandbox_ends_while_it_is_let_go_of_ends_nothing_else(world: World, node: Enrolment) -> None:
    """`enforce` runs in a thread of its own and may find meanwhile that the pod has none any more."""
    world.pods[UID] = (sandbox(1), 7)
    node.enforce(snapshot(pod()), frozenset())
    (local,) = node._local.values()
    asked = list[str]()

    class Ends:
        """The pod as it was found, for another thread takes its binding in this moment."""

        directory, mark = "/kubepods/pod", (4, 1)

        def __getattribute__(self, name: str) -> object:
            asked.append(name)
            local.bound = None
            return object.__getattribute__(self, name)

        def lives(self) -> bool:
            return True

    let_go = list[int]()
    node.holding = cast("Any", SimpleNamespace(held=lambda: {local.number: 1}, let_go=let_go.extend))
    node.let_go()
    assert let_go == [local.number]
    let_go.clear()
    local.pod = cast("Any", Ends())
    node.let_go()
    assert (local.bound, asked[0]) == (None, "mark")
    node.let_go()
    assert let_go == [local.number]  # the one before it ended; the next one is not in the mesh


def test_a_pod_that_is_gone_is_released(world: World, node: Enrolment) -> None:
    model = snapshot(pod())
    world.pods[UID] = (sandbox(1), 7)
    node.enforce(model, frozenset())
    del world.pods[UID]
    node.doubt({7})
    assert node.namespaces_changed(model)
    enrolled = node.enforce(model, frozenset())
    assert (enrolled.local, enrolled.missing) == ((), (("default/a", f"no pod {UID}"),))
    assert (world.mounts, world.log[-1], world.watch.contents) == (set(), ("unlink all but",), set())


def test_a_pod_with_another_uid_is_another_pod(world: World, node: Enrolment) -> None:
    other = UID.replace("0f", "1f")
    world.pods = {UID: (sandbox(1), 7), other: (sandbox(2, os.getppid()), 11)}
    assert [one.netns_cookie for one in node.enforce(snapshot(pod()), frozenset()).local] == [7]
    assert [one.netns_cookie for one in node.enforce(snapshot(pod(other)), frozenset()).local] == [11]
    assert {mount.name for mount in world.mounts} == {"11"}


def test_a_number_that_belongs_to_another_process_by_now_is_not_bound(world: World, node: Enrolment) -> None:
    model = snapshot(pod())
    node.enforce(model, frozenset())
    world.pods[UID] = (replace(sandbox(1), started=1), 7)
    enrolled = node.enforce(model, frozenset())
    assert enrolled.local == ()
    assert "ended while it was being looked at" in enrolled.missing[0][1]
    assert world.mounts == set()
    world.pods[UID] = (sandbox(1), 7)
    assert node.namespaces_changed(model)
    assert len(node.enforce(model, frozenset()).local) == 1


def test_a_pod_has_the_addresses_of_its_namespace_until_others_are_known(world: World, node: Enrolment) -> None:
    world.pods[UID] = (sandbox(1), 7)
    (local,) = node.enforce(snapshot(pod(addresses=())), frozenset()).local
    assert (local.workload.addresses, world.effective) == (("10.0.0.1",), {"default/a": ("10.0.0.1",)})
    (local,) = node.enforce(snapshot(replace(pod(addresses=()), labels={"new": "label"})), frozenset()).local
    assert (local.workload.addresses, local.workload.labels) == (("10.0.0.1",), {"new": "label"})
    known = pod(addresses=("10.0.0.1", "fd00::1"))
    (local,) = node.enforce(snapshot(known), frozenset()).local
    assert local.workload is known


def test_the_tree_is_checked_only_where_there_are_pods_and_something_happened(world: World, node: Enrolment) -> None:
    without, model = snapshot(workload("b", world.namespace("b", 11))), snapshot(pod())
    node.enforce(without, frozenset())
    world.watch.named = True
    assert not node.namespaces_changed(without)
    node.enforce(model, frozenset())
    node.namespaces_changed(model)
    assert ("check",) not in world.log
    world.watch.named = True
    node.namespaces_changed(model)
    assert world.log[-1] == ("check",)


def test_a_sandbox_that_cannot_be_looked_at_leaves_the_binding_before_it_and_the_next_one_is_found(world: World, node: Enrolment) -> None:
    model = snapshot(pod())
    world.pods[UID] = (sandbox(1), 7)
    node.enforce(model, frozenset())
    world.fail_look = True
    world.pods[UID] = (sandbox(2), 11)
    node.doubt({7})
    enrolled = node.enforce(model, frozenset())
    assert [one.netns_cookie for one in enrolled.local] == [7]
    assert "too many open files" in enrolled.missing[0][1]
    assert not node.namespaces_changed(model)
    world.fail_look = False
    world.pods[UID] = (sandbox(3), 13)
    assert node.namespaces_changed(model)
    enrolled = node.enforce(model, frozenset())
    assert ([one.netns_cookie for one in enrolled.local], enrolled.missing) == ([13], ())
