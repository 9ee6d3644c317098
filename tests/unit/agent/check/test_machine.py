"""What `meshagent check` says of a kernel and a machine, from what these really write."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agent.bpf import probes, source
from agent.bpf.probes import Lack
from agent.check import machine, places
from agent.check.finding import Finding, Severity
from agent.config import Config

OK, WARNING, ERROR = Severity.OK, Severity.WARNING, Severity.ERROR
ROOT = "Name:\tmeshagent\nCapInh:\t0000000000000000\nCapPrm:\t{0}\nCapEff:\t{0}\nCapBnd:\t{0}\n"


def config(tmp_path: Path) -> Config:
    return Config(node="", controller="", cgroup=tmp_path, pin_dir=tmp_path / "pins", run_dir=tmp_path / "run", state_dir=tmp_path)


def severity(finding: Finding) -> Severity:
    assert finding.next_step or finding.severity is OK
    return finding.severity


@pytest.mark.parametrize(
    ("release", "expected"), [("5.14.0-362.el9", ERROR), ("5.15.0", OK), ("6.1.0-44-amd64", OK), ("10.0.0", OK), ("5.4.0", ERROR)]
)
def test_a_kernel_that_is_too_old_is_an_error(release: str, expected: Severity) -> None:
    assert severity(machine.kernel(release)) is expected


@pytest.mark.parametrize(
    ("held", "expected", "said"),
    [
        pytest.param("000001ffffffffff", OK, "", id="root"),
        pytest.param("0000000000000000", ERROR, "BPF, DAC_OVERRIDE, NET_ADMIN, SYS_ADMIN, SYS_CHROOT and 1 more", id="nobody"),
        pytest.param("000001fffffffbff", WARNING, "NET_BIND_SERVICE", id="no-low-ports"),
        pytest.param("0000017fffffffff", OK, "", id="sys-admin-stands-for-bpf"),
        pytest.param("000001fffff7ffff", ERROR, "SYS_PTRACE", id="no-ptrace"),
    ],
)
def test_capabilities_that_are_missing_are_named(held: str, expected: Severity, said: str) -> None:
    (finding,) = machine.rights(ROOT.format(held))
    assert severity(finding) is expected
    assert said in finding.what


def test_the_capabilities_are_those_of_the_agents_container() -> None:
    chart = Path(__file__).parents[4] / "deploy" / "helm" / "meshagent" / "templates" / "agent.yaml"
    added = set(re.findall(r"^                - ([A-Z_]+) #", chart.read_text(), re.MULTILINE))
    assert added == set(machine.CAPABILITIES)


@pytest.mark.parametrize(("files", "expected"), [(1024, WARNING), (65_535, WARNING), (65_536, OK), (-1, OK)])
def test_few_files_are_a_warning(files: int, expected: Severity) -> None:
    assert severity(machine.limits(files)) is expected


@pytest.mark.parametrize(("status", "expected"), [(0x40, WARNING), (0x2041, WARNING), (0x2001, OK), (0, OK)])
def test_a_clock_that_nobody_keeps_is_a_warning(status: int, expected: Severity) -> None:
    assert severity(machine.clock_of(23_000, status)) is expected


def test_a_directory_that_is_no_cgroup_and_no_bpffs_is_an_error_with_what_to_mount(tmp_path: Path) -> None:
    (cgroup,) = machine.cgroup(config(tmp_path))
    bpffs = machine.bpffs(config(tmp_path))
    assert (severity(cgroup), severity(bpffs)) == (ERROR, ERROR)
    assert "cgroup" in cgroup.next_step
    assert "mount -t bpf bpf /sys/fs/bpf" in bpffs.next_step


def test_a_feature_that_is_missing_is_an_error_unless_it_can_be_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = [
        Lack("helper", "cgroup_sock_addr", "set_retval", "unknown func bpf_set_retval#187"),
        Lack("helper", "sock_ops", "get_netns_cookie", "unknown func bpf_get_netns_cookie#122"),
        Lack("map", "", "ringbuf", "Invalid argument"),
        Lack("program", "sk_lookup", "sk_lookup", "Invalid argument"),
    ]
    monkeypatch.setattr(probes, "lacking", lambda: lacks)
    found = list(machine.pieces())
    assert [severity(finding) for finding in found] == [WARNING, ERROR, ERROR, ERROR]
    assert "EPERM" in found[0].next_step
    assert "helper bpf_get_netns_cookie in sock_ops programs" in found[1].what
    assert "map ringbuf" in found[2].what
    monkeypatch.setattr(probes, "lacking", list)
    assert [severity(finding) for finding in machine.pieces()] == [OK]


def test_every_helper_and_map_of_the_programs_is_tried() -> None:
    text = "\n".join(path.read_text() for path in source.BPF_SRC.glob("*.[ch]"))
    byte_order = {"htonl", "htons", "ntohl", "ntohs"}
    called = set(re.findall(r"\bbpf_([a-z0-9_]+)\(", text)) - byte_order
    called |= set(
        re.findall(r"\.(sk_storage_get|sk_storage_delete|sock_hash_update|msg_redirect_hash|ringbuf_reserve|ringbuf_submit)\(", text)
    )
    assert {name for helpers in probes.HELPERS.values() for name in helpers} == called
    kinds = {kind for kind, _, _ in source.read().records.values()} | set(re.findall(r'section\("maps/(\w+):', text))
    assert set(probes.MAPS) == kinds


def test_an_envoy_says_its_version() -> None:
    said = "\n/usr/bin/envoy  version: a1b2c3d4/1.40.0/Clean/RELEASE/BoringSSL\n\n"
    assert machine.envoy_version(said) == "1.40.0"
    with pytest.raises(ValueError, match="usage: something"):
        machine.envoy_version("usage: something else")


@pytest.mark.parametrize(
    ("script", "expected", "said"),
    [
        pytest.param("echo 'envoy  version: a1b2/1.31.2/Clean/RELEASE/BoringSSL'", WARNING, "Envoy 1.31.2 is older than", id="old"),
        pytest.param("echo 'envoy  version: a1b2/9.0.0/Clean/RELEASE/BoringSSL'", OK, "Envoy 9.0.0", id="newer"),
        pytest.param("exit 1", ERROR, "does not say its version", id="broken"),
        pytest.param("echo hello", ERROR, "does not say its version", id="something-else"),
    ],
)
def test_the_envoy_binary_is_asked_for_its_version(tmp_path: Path, script: str, expected: Severity, said: str) -> None:
    binary = tmp_path / "envoy"
    binary.write_text(f"#!/bin/sh\n{script}\n")
    binary.chmod(0o755)
    finding = machine.waypoint(Config(node="", controller="", envoy=str(binary)))
    assert severity(finding) is expected
    assert said in finding.what


def test_no_envoy_is_an_error(tmp_path: Path) -> None:
    assert severity(machine.waypoint(Config(node="", controller="", envoy=str(tmp_path / "none")))) is ERROR


TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:3AAC 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 528 1 0000000064b3f6b3 100 0 0 10 0
   1: 0100007F:3AAC 0100007F:B4D7 06 00000000:00000000 03:00000D87 00000000     0        0 0 3 000000001f3f21c2
   2: 0100007F:07E8 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 529 1 0000000064b3f6b4 100 0 0 10 0
   3: 0100007F:3A99 0100007F:DE4A 01 00000000:00000000 00:00000000 00000000     0        0 530 1 0000000064b3f6b5 100 0 0 10 0
"""
UDP6 = (
    "  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid"
    "  timeout inode ref pointer drops\n"
    "  101: 00000000000000000000000000000000:CA9F 00000000000000000000000000000000:0000 07 00000000:00000000 00:00000000 00000000     0"
    "        0 0 2 0000000000000000 0\n"
)


def test_listeners_are_read_as_the_kernel_writes_them() -> None:
    assert list(places.taken(TCP, frozenset({15020, 15001}))) == [(15020, 528)]  # neither TIME_WAIT nor ESTABLISHED listens
    assert list(places.taken(UDP6, frozenset({51871}))) == [(51871, 0)]
    assert list(places.taken(TCP, frozenset({51871}))) == []


def test_who_listens_on_a_port_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken = [places.Listener("tcp", 15020, 23, "nginx"), places.Listener("udp", 51871)]
    monkeypatch.setattr(places, "listeners", lambda net, *_: taken if net == Path("/proc/self/net") else [])
    monkeypatch.setattr(places, "namespaces", lambda _: [])
    found = list(machine.ports(config(tmp_path), agent=None))
    assert [(severity(one), one.where) for one in found] == [
        (ERROR, "process 23 (nginx)"),
        (WARNING, "the kernel, or a process that cannot be seen from here"),
    ]
    assert [severity(one) for one in machine.ports(config(tmp_path), agent=23)] == [OK]  # the agent's own


def test_a_proxy_of_somebody_else_in_a_pod_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = config(tmp_path)
    pod = places.Namespace(42, "app", tmp_path / "pod")
    foreign, own = (
        places.Listener("tcp", 15001, 43, "envoy", tmp_path / "pod"),
        places.Listener("tcp", 15006, 44, "envoy", made.waypoint_cgroup),
    )
    monkeypatch.setattr(places, "namespaces", lambda _: [pod])
    monkeypatch.setattr(places, "listeners", lambda net, *_: [foreign, own] if net == Path("/proc/42/net") else [])
    (found,) = machine.ports(made, agent=None)
    assert (severity(found), found.where) == (WARNING, "process 43 (envoy) in the network namespace of process 42 (app)")
    assert found.what.startswith("envoy has port 15001, which")


def test_a_proxy_that_is_in_every_pod_is_one_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    proxy = [places.Listener("tcp", port, 43, "ztunnel", tmp_path) for port in (15008, 15001)]
    application = places.Listener("tcp", 15006, 44, "app", tmp_path)
    monkeypatch.setattr(places, "namespaces", lambda _: [places.Namespace(pid, "app", tmp_path) for pid in range(100, 123)])
    monkeypatch.setattr(
        places,
        "listeners",
        lambda net, *_: [] if net == Path("/proc/self/net") else [*proxy, application] if net == Path("/proc/107/net") else proxy,
    )
    found = list(machine.ports(config(tmp_path), agent=None))
    assert [one.what.partition(", which")[0] for one in found] == [
        "ztunnel has port 15001, 15008",
        "app has port 15006",
    ]
    assert found[0].where.startswith("process 43 (ztunnel) in the network namespace of process 100 (app), ")
    assert found[0].where.endswith(" more")
    assert found[1].where == "process 44 (app) in the network namespace of process 107 (app)"
