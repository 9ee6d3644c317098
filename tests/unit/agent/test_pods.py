"""Finding a pod by its UID: a tree of directories as the kubelet makes them, with the numbers of real processes in it. Real cgroups are in tests/kernel."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import netns, pods
from agent.pods import Pod, Pods, places

UID = "0f6f7d2a-3b1c-4e5d-8a9b-c0d1e2f30415"
OTHER = "11111111-2222-4333-8444-555555555555"
STATIC = "5f3c1e9d8b7a60412233445566778899"
SYSTEMD = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0f6f7d2a_3b1c_4e5d_8a9b_c0d1e2f30415.slice"
CGROUPFS = f"kubepods/burstable/pod{UID}"
LAYOUTS = [
    pytest.param(UID, SYSTEMD, "cri-containerd-4711.scope", id="systemd-burstable"),
    pytest.param(
        UID,
        "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod0f6f7d2a_3b1c_4e5d_8a9b_c0d1e2f30415.slice",
        "crio-4711.scope",
        id="systemd-best-effort",
    ),
    pytest.param(UID, "kubepods.slice/kubepods-pod0f6f7d2a_3b1c_4e5d_8a9b_c0d1e2f30415.slice", "crio-4711.scope", id="systemd-guaranteed"),
    pytest.param(UID, CGROUPFS, "4711", id="cgroupfs-burstable"),
    pytest.param(UID, f"kubepods/besteffort/pod{UID}", "4711", id="cgroupfs-best-effort"),
    pytest.param(UID, f"kubepods/pod{UID}", "4711", id="cgroupfs-guaranteed"),
    pytest.param(
        UID,
        "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/"
        "kubelet-kubepods-besteffort-pod0f6f7d2a_3b1c_4e5d_8a9b_c0d1e2f30415.slice",
        "cri-containerd-4711.scope",
        id="kind",
    ),
    pytest.param(UID, f"kubelet/kubepods/besteffort/pod{UID}", "4711", id="kind-cgroupfs"),
    pytest.param(
        UID,
        "system.slice/docker-4711.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod0f6f7d2a_3b1c_4e5d_8a9b_c0d1e2f30415.slice",
        "cri-containerd-4711.scope",
        id="kind-seen-from-its-host",
    ),
    pytest.param(
        STATIC, f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{STATIC}.slice", "crio-4711.scope", id="static-systemd"
    ),
    pytest.param(STATIC, f"kubepods/burstable/pod{STATIC}", "4711", id="static-cgroupfs"),
]


def cgroup(path: Path, *pids: object) -> Path:
    """A directory like a cgroup, with these lines in cgroup.procs; those above it have none."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))
    return path


@pytest.fixture
def process() -> Iterator[Callable[..., int]]:
    """Starts processes, each later than the one before by the kernel's clock (10 ms)."""
    running: list[subprocess.Popen[bytes]] = []

    def start(program: str = "sleep") -> int:
        time.sleep(2 / os.sysconf("SC_CLK_TCK"))
        running.append(subprocess.Popen([program, "1000"]))
        return running[-1].pid

    start.end = lambda pid: end([one for one in running if one.pid == pid])  # type: ignore[attr-defined]
    yield start
    end(running)


def end(running: list[subprocess.Popen[bytes]]) -> None:
    for one in running:
        one.kill()
        one.wait()


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The namespace that the tests' processes share is not the node's."""
    monkeypatch.setattr(pods, "_nodes_own", frozenset)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize(("uid", "path", "container"), LAYOUTS)
def test_a_pod_is_found_in_every_layout_of_the_kubelet(
    tmp_path: Path, process: Callable[..., int], uid: str, path: str, container: str
) -> None:
    directory = cgroup(tmp_path / path)
    for other in ("system.slice/cron.service", "user.slice/user-1000.slice", "init.scope"):
        cgroup(tmp_path / other)
    cgroup(directory.parent / directory.name.replace(uid.replace("-", "_"), OTHER.replace("-", "_")).replace(uid, OTHER), os.getpid())
    pid = process()
    cgroup(directory / container, pid)
    found = Pods(tmp_path).find(uid)
    assert (found.directory, found.pid, found.reason) == (str(directory), pid, "")
    assert found.path == f"/proc/{pid}/ns/net"
    assert found.mark == netns.mark("/proc/self/ns/net")
    assert found.lives()


def kubelets_name(driver: str, parents: list[str], uid: str) -> str:
    """As ToSystemd and ToCgroupfs do it: every part without "-", and each slice within those whose names it begins with."""
    parts = [*parents, f"pod{uid}"]
    if driver == "cgroupfs":
        return "/".join(parts)
    escaped = [part.replace("-", "_") for part in parts]
    return "/".join("-".join(escaped[: i + 1]) + ".slice" for i in range(len(escaped)))


WORD = st.from_regex(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", fullmatch=True)


@given(
    driver=st.sampled_from(["systemd", "cgroupfs"]),
    above=st.lists(WORD, max_size=3),
    service=st.sampled_from([[], ["burstable"], ["besteffort"]]),
    uid=st.uuids().map(str) | st.from_regex("[0-9a-f]{32}", fullmatch=True),
)
def test_the_kubelets_name_is_among_the_places_whatever_is_above_it(driver: str, above: list[str], service: list[str], uid: str) -> None:
    kubepods = [*above, "kubepods"]
    whole = kubelets_name(driver, [*kubepods, *service], uid)
    top = "/".join(whole.split("/")[: len(kubepods)])
    assert pods.KUBEPODS.fullmatch(Path(top).name)
    assert f"/{whole}" in places(f"/{top}", uid)
    assert len(set(places(f"/{top}", uid))) == 3


@given(st.uuids().map(str), st.uuids().map(str), st.sampled_from(["/x/kubepods", "/x/kubepods.slice", "/a.slice/a-kubepods.slice"]))
def test_no_two_pods_share_a_place(one: str, other: str, kubepods: str) -> None:
    assert one == other or set(places(kubepods, one)).isdisjoint(places(kubepods, other))


@pytest.mark.usefixtures("apart")
def test_the_sandbox_is_the_oldest_process_wherever_in_the_pod_it_is(tmp_path: Path, process: Callable[..., int]) -> None:
    sandbox, container, younger = process(), process(), process()
    directory = cgroup(tmp_path / SYSTEMD, younger)
    cgroup(directory / "cri-containerd-a.scope/init.scope", container, younger)
    cgroup(directory / "cri-containerd-z.scope", sandbox)
    assert Pods(tmp_path).find(UID).pid == sandbox


@pytest.mark.usefixtures("apart")
def test_the_monitor_of_a_runtime_is_not_taken_for_the_sandbox(tmp_path: Path, process: Callable[..., int]) -> None:
    monitor, sandbox = process(), process()
    directory = cgroup(tmp_path / CGROUPFS)
    cgroup(directory / "crio-conmon-4711", monitor)
    cgroup(directory / "crio-4711", sandbox)
    assert Pods(tmp_path).find(UID).pid == sandbox


@pytest.mark.usefixtures("apart")
def test_the_name_of_a_process_does_not_shift_its_start(tmp_path: Path, process: Callable[..., int]) -> None:
    named = shutil.copy(shutil.which("sleep") or "sleep", tmp_path / "a) S 1 1 1")
    sandbox, odd = process(), process(str(named))
    cgroup(tmp_path / CGROUPFS, odd, sandbox)
    found = Pods(tmp_path).find(UID)
    assert found.pid == sandbox
    cgroup(tmp_path / CGROUPFS, odd)
    assert Pods(tmp_path).find(UID).started > found.started


def test_a_pod_in_the_nodes_own_namespace_is_refused_and_the_reason_says_why(tmp_path: Path, process: Callable[..., int]) -> None:
    pid = process()
    cgroup(tmp_path / CGROUPFS / "4711", pid)
    finder = Pods(tmp_path)
    found = finder.find(UID)
    assert f"pod {UID} is in the node's own network namespace (process {pid} in {tmp_path / CGROUPFS})" in found.reason
    assert "spec.hostNetwork" in found.reason
    assert finder.find(UID, found) is found
    earlier = replace(found, pid=os.getpid())  # whose number another process of the node has now
    assert finder.find(UID, earlier) == found
    process.end(pid)  # type: ignore[attr-defined]
    assert "there is no process" in finder.find(UID, found).reason


@pytest.mark.usefixtures("apart")
def test_a_pod_without_a_process_is_awaited(tmp_path: Path, process: Callable[..., int]) -> None:
    directory = cgroup(tmp_path / SYSTEMD)
    finder = Pods(tmp_path)
    first = finder.find(UID)
    assert (first.directory, first.pid) == (str(directory), 0)
    assert f"there is no process in {directory}: the sandbox of pod {UID} has not started yet" in first.reason
    assert finder.find(UID, first) == first
    pid = process()
    cgroup(directory / "cri-containerd-4711.scope", pid)
    assert finder.find(UID, first).pid == pid


@pytest.mark.usefixtures("apart")
def test_a_sandbox_that_was_replaced_is_found_again(tmp_path: Path, process: Callable[..., int]) -> None:
    first, second = process(), process()
    directory = cgroup(tmp_path / CGROUPFS, first)
    finder = Pods(tmp_path)
    before = finder.find(UID)
    assert finder.find(UID, before) is before
    process.end(first)  # type: ignore[attr-defined]
    assert not before.lives()
    cgroup(directory, second)
    assert finder.find(UID, before).pid == second


def test_the_number_of_a_process_that_ended_is_not_the_sandbox(process: Callable[..., int]) -> None:
    pid = process()
    assert Pod(pid=pid, started=pods.birth(pid) or 0).lives()
    assert not Pod(pid=pid, started=1).lives()
    assert not Pod().lives()


def test_the_end_of_a_sandbox_can_be_waited_for(process: Callable[..., int]) -> None:
    pid = process()
    found = Pod(pid=pid, started=pods.birth(pid) or 0)
    held = found.open()
    try:
        assert not select.select([held], [], [], 0)[0]
        process.end(pid)  # type: ignore[attr-defined]
        assert select.select([held], [], [], 1)[0]
    finally:
        os.close(held)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for ended in (found, replace(found, pid=os.getpid())):
        with pytest.raises(FileNotFoundError, match=f"process {ended.pid}, the sandbox of the pod"):
            ended.open()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.usefixtures("apart")
def test_a_pod_whose_cgroup_is_gone_is_absent(tmp_path: Path, process: Callable[..., int]) -> None:
    pid = process()
    directory = cgroup(tmp_path / CGROUPFS, pid)
    finder = Pods(tmp_path)
    before = finder.find(UID)
    process.end(pid)  # type: ignore[attr-defined]
    shutil.rmtree(directory)
    found = finder.find(UID, before)
    assert (found.directory, found.pid) == ("", 0)
    assert found.reason.startswith(f"there is no cgroup of pod {UID} below {tmp_path / 'kubepods'}")


def test_a_machine_without_a_kubelet_is_named(tmp_path: Path) -> None:
    cgroup(tmp_path / "system.slice/ssh.service")
    assert f"there is no kubepods cgroup below {tmp_path}: does a kubelet run on this node" in Pods(tmp_path).find(UID).reason
    assert f"below {tmp_path / 'absent'}" in Pods(tmp_path / "absent").find(UID).reason


def test_processes_of_another_pid_namespace_are_named(tmp_path: Path) -> None:
    directory = cgroup(tmp_path / CGROUPFS, 0, 0)
    found = Pods(tmp_path).find(UID)
    assert (found.pid, found.directory) == (0, str(directory))
    assert "hostPID: true" in found.reason


def test_processes_whose_namespace_cannot_be_seen_are_named(
    tmp_path: Path, process: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cgroup(tmp_path / CGROUPFS, process())
    monkeypatch.setattr(netns, "mark", lambda _: netns.GONE)  # as without CAP_SYS_PTRACE, which root has
    assert "CAP_SYS_PTRACE" in Pods(tmp_path).find(UID).reason


GARBAGE = [b"", b"\xff\xfe\x00", b"-7", b"1e3", b"9" * 5000, b"9" * 10, "\u00b2\u0663".encode(), b"self", b"../1"]


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda text: repr(text[:12]))
def test_garbage_in_a_list_of_processes_is_passed_over(tmp_path: Path, process: Callable[..., int], garbage: bytes) -> None:
    directory, pid = cgroup(tmp_path / CGROUPFS), process()
    (directory / "cgroup.procs").write_bytes(garbage + b"\n")
    assert Pods(tmp_path).find(UID).pid == 0
    (directory / "cgroup.procs").write_bytes(garbage + f"\n{pid}\n".encode() + garbage)
    assert Pods(tmp_path).find(UID).pid == pid


@pytest.mark.usefixtures("apart")
def test_a_cgroup_that_cannot_be_read_hides_only_its_own_processes(tmp_path: Path, process: Callable[..., int]) -> None:
    """cgroup.procs of a threaded cgroup answers EOPNOTSUPP."""
    pid = process()
    directory = cgroup(tmp_path / CGROUPFS, pid)
    (directory / "threaded").mkdir()
    (directory / "threaded/cgroup.procs").symlink_to("/proc/self/mem")  # EIO
    assert Pods(tmp_path).find(UID).pid == pid


@pytest.mark.usefixtures("apart")
def test_kubepods_below_another_level_that_has_one_is_nobodys(tmp_path: Path, process: Callable[..., int]) -> None:
    """Whoever was given a part of the tree could call itself any pod there."""
    (tmp_path / "kubepods.slice").mkdir()
    cgroup(tmp_path / "user.slice/mine.slice" / CGROUPFS, process())
    assert Pods(tmp_path).find(UID).pid == 0
    cgroup(tmp_path / "kubepods.slice/kubepods-pod1.slice" / CGROUPFS, process())
    assert Pods(tmp_path).find(UID).pid == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a directory away")
@pytest.mark.usefixtures("apart")
def test_kubepods_of_another_user_is_nobodys(tmp_path: Path, process: Callable[..., int]) -> None:
    cgroup(tmp_path / CGROUPFS, process())
    os.chown(tmp_path / "kubepods", 65534, 65534)
    assert Pods(tmp_path).find(UID).pid == 0


@pytest.mark.usefixtures("apart")
def test_a_kubepods_that_appears_later_is_found_now_and_then_and_at_once_when_told(
    tmp_path: Path, process: Callable[..., int], clock: list[float]
) -> None:
    finder = Pods(tmp_path)
    last = finder.find(UID)
    pid = process()
    cgroup(tmp_path / CGROUPFS, pid)
    assert finder.find(UID, last) == last
    clock[0] += pods.SEARCH_S
    assert finder.find(UID, last).pid == pid
    shutil.rmtree(tmp_path / "kubepods")
    cgroup(tmp_path / SYSTEMD, pid)
    assert finder.find(UID).pid == 0
    finder.check()
    assert finder.find(UID).directory == str(tmp_path / SYSTEMD)


def noted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[object]:
    """What a function of `os` is called with from now on."""
    real, found = getattr(os, name), []

    def call(path: object, **how: object) -> object:
        found.append(path)
        return real(path, **how)

    monkeypatch.setattr(os, name, call)
    return found


@pytest.mark.usefixtures("apart")
def test_pods_that_are_where_they_were_cost_no_look_at_the_tree(
    tmp_path: Path, process: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = process()
    uids = [OTHER[:-3] + f"{number:03}" for number in range(251)]
    for uid in uids:
        cgroup(tmp_path / f"kubepods/burstable/pod{uid}/4711", pid)
    finder = Pods(tmp_path)
    before = {uid: finder.find(uid) for uid in uids}
    assert {pod.pid for pod in before.values()} == {pid}
    monkeypatch.setattr(os, "scandir", lambda *_: pytest.fail("a directory was listed"))
    assert all(finder.find(uid, before[uid]) is before[uid] for uid in uids)


@pytest.mark.usefixtures("apart")
def test_pods_that_are_awaited_do_not_have_kubepods_searched_for_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    (tmp_path / "kubepods").mkdir()
    finder = Pods(tmp_path)
    finder.find(UID)
    listed = noted(monkeypatch, "scandir")
    for _ in range(23):
        finder.find(UID)
    assert listed == []
    clock[0] += pods.SEARCH_S
    for _ in range(23):
        finder.find(UID)
    assert listed == [str(tmp_path)]


def test_what_may_appear_is_what_leads_to_a_pod(tmp_path: Path) -> None:
    finder = Pods(tmp_path)
    finder.search()
    assert set(finder.names(UID)) == {f"{tmp_path}/kubepods", f"{tmp_path}/kubepods.slice"}
    (tmp_path / "kubepods").mkdir()
    finder.search()
    top = f"{tmp_path}/kubepods"
    assert set(finder.names(UID)) == {top, f"{top}/burstable", f"{top}/besteffort", *places(top, UID)}
