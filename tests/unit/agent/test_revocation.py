"""Which living connections a snapshot forbids, and which changes make the agent look. Real ones are closed in tests/kernel/test_live.py."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agent import addresses
from agent import revocation as revocation_module
from agent.bpf.manifest import Direction, Redirect, Verdict
from agent.bpf.sockets import LiveSocket, Record, Sockets, T
from agent.config import UNREAD_MARK, Config
from agent.enrolment import Enrolled
from agent.errors import KernelRefused
from agent.ids import Ids
from agent.model import Action, Delta, LocalWorkload, Mtls, Operation, Policy, PolicyRule, Snapshot, Source, Workload
from agent.patience import Backoff
from agent.revocation import Forbidden, Judge, Revocation, Rules, affects

POLICY = Policy("d/p", Action.ALLOW, (PolicyRule((Source(service_accounts=("d/friend",)),), (Operation(ports=(80,)),)),))
L7 = Policy("d/l7", Action.ALLOW, (PolicyRule((), (Operation(methods=("GET",)),)),))


def workload(name: str, address: str, *, policies: tuple[str, ...] = (), node: str = "here", enrolled: bool = True) -> Workload:
    return Workload(f"d/{name}", name, node, {}, (address,), "", enrolled, ready=True, policies=policies)


FRIEND, FOE = workload("friend", "10.0.0.1"), workload("foe", "10.0.0.2")
SERVER, REQUESTS = workload("server", "10.0.0.3", policies=("d/p",)), workload("requests", "10.0.0.4", policies=("d/l7",))
FAR, PLAIN = workload("far", "10.0.1.1", node="there"), workload("plain", "10.0.1.2", node="there", enrolled=False)
POD = replace(workload("pod-of-a-deployment", "10.0.1.3", node="there"), pod_uid="u")
ALL = (FRIEND, FOE, SERVER, REQUESTS, FAR, PLAIN, POD)
APPLICATION, WAYPOINT = 7, 8
"""Cgroups."""
WATCHED = workload("watched", "10.0.0.5", policies=("d/audit",))
AUDIT = Policy("d/audit", Action.AUDIT, L7.rules)
SNAPSHOT = Snapshot("1", {w.name: w for w in (*ALL, WATCHED)}, policies={p.name: p for p in (POLICY, L7, AUDIT)})


class Node:
    def __init__(
        self, tmp_path: Path, local: tuple[Workload, ...] = (FRIEND, FOE, SERVER, REQUESTS), *, reading: frozenset[str] = frozenset()
    ) -> None:
        self.ids = Ids(tmp_path / "ids")
        self.known = {addresses.packed(a): w.name for w in ALL for a in w.addresses}
        enrolled = Enrolled(tuple(LocalWorkload(w, i, "") for i, w in enumerate(local)))
        self.judge = Judge(
            Rules(SNAPSHOT, enrolled, reading), Config("here", "unix:x"), self.ids, lambda raw: self.known.get(raw, ""), WAYPOINT
        )

    def rule(self, at: Workload, remote: str, port: int = 80, **more: Any) -> str:
        """The rule that forbids a connection of `at`, or ""; `port` is the server's."""
        found = self.forbidden(at, remote, port, **more)
        return found.rule if found else ""

    def forbidden(
        self,
        at: Workload,
        remote: str,
        port: int = 80,
        *,
        source: str = "",
        direction: int = Direction.OUTBOUND,
        redirected: int = 0,
        target: str = "",
        origdst_port: int = 0,
        verdict: int = 0,
        mark: int = 0,
        cgroup: int = APPLICATION,
        probe: int = 0,
    ) -> Forbidden | None:
        """What is wrong with it."""
        number = self.ids.number("workload", source) if source else 0
        of = self.ids.number("workload", target) if target else 0
        record = Record(1, 1, number, of, 0, 0, port, origdst_port, direction, verdict, redirected, 6, 0, probe)
        ports = (port, 50000) if direction == Direction.INBOUND else (50000, port)
        ident = struct.pack("!HH", *ports) + socket.inet_aton(at.addresses[0]).ljust(16, b"\0") + socket.inet_aton(remote).ljust(16, b"\0")
        live = LiveSocket(socket.AF_INET, 1, ident.ljust(48, b"\0"), 0, 0, 0, 0, record, mark, cgroup)
        return self.judge.forbidden(live, LocalWorkload(at, 1, ""))


NO = "d/p: no rule matches"
ASKS = "d/l7[0]: it needs the requests, and this connection goes past whoever reads them"


@pytest.mark.parametrize(
    ("at", "remote", "port", "rule"),
    [
        pytest.param(FRIEND, "10.0.0.3", 80, "", id="allowed"),
        pytest.param(FRIEND, "10.0.0.3", 81, NO, id="another-port"),
        pytest.param(FOE, "10.0.0.3", 80, NO, id="denied"),
        pytest.param(FOE, "10.0.0.1", 80, "", id="unprotected"),
        pytest.param(FOE, "192.0.2.1", 80, "", id="outside"),
        pytest.param(FOE, "10.0.0.4", 80, ASKS, id="the-request-decides"),
        pytest.param(SERVER, "10.0.0.3", 80, "", id="itself"),
    ],
)
def test_the_callers_end_is_decided_by_the_real_address_and_port(tmp_path: Path, at: Workload, remote: str, port: int, rule: str) -> None:
    assert Node(tmp_path).rule(at, remote, port) == rule


@pytest.mark.parametrize(
    ("source", "remote", "rule"),
    [
        pytest.param("d/friend", "10.0.0.1", "", id="allowed"),
        pytest.param("d/foe", "10.0.0.2", NO, id="denied"),
        pytest.param("d/far", "10.0.1.1", NO, id="of-another-node"),
        pytest.param("", "192.0.2.1", NO, id="stranger"),
        pytest.param("", "10.0.0.1", NO, id="an-address-of-this-node-that-nobody-vouched-for"),
        pytest.param("d/gone", "10.0.0.9", NO, id="workload-that-is-gone"),
    ],
)
def test_the_receivers_end_is_decided_by_who_was_seen_to_call(tmp_path: Path, source: str, remote: str, rule: str) -> None:
    assert Node(tmp_path).rule(SERVER, remote, source=source, direction=Direction.INBOUND) == rule


def test_a_caller_of_this_node_that_is_in_no_namespace_is_a_stranger(tmp_path: Path) -> None:
    node = Node(tmp_path, (SERVER,))
    assert node.rule(SERVER, "10.0.0.1", source="d/friend", direction=Direction.INBOUND) == NO


def test_what_somebody_else_decides_is_left_alone(tmp_path: Path) -> None:
    node = Node(tmp_path)
    assert node.rule(FOE, "10.0.0.3", redirected=1) == "", "the waypoint, request by request"
    assert node.rule(FOE, "10.0.0.3", direction=Direction.FROM_WAYPOINT) == "", "the waypoint has decided"
    assert node.rule(FOE, "10.0.0.3", verdict=Verdict.DENY) == "", "a kernel thread's: its end refuses nothing"


def test_what_goes_through_a_tunnel_is_decided_by_its_endpoint(tmp_path: Path) -> None:
    node = Node(tmp_path)
    for caller, port, rule in ((FOE, 80, NO), (FRIEND, 80, ""), (FRIEND, 81, NO)):
        assert node.rule(caller, "127.0.1.0", 15002, redirected=Redirect.TUNNEL, target=SERVER.name, origdst_port=port) == rule


def test_a_connection_that_goes_past_whoever_reads_requests_is_closed_at_once_at_the_callers_end(tmp_path: Path) -> None:
    node = Node(tmp_path)
    straight = node.forbidden(FOE, REQUESTS.addresses[0])
    tunnelled = node.forbidden(FOE, "127.0.1.0", 15002, redirected=Redirect.TUNNEL, target=REQUESTS.name, origdst_port=80)
    for found in (straight, tunnelled):
        assert found is not None
        assert (found.rule, found.destination, found.pooled) == (ASKS, REQUESTS.name, False)
    assert node.rule(FOE, REQUESTS.addresses[0], redirected=Redirect.WAYPOINT) == ""
    assert node.rule(FOE, REQUESTS.addresses[0], direction=Direction.FROM_WAYPOINT) == ""


@pytest.mark.parametrize(
    ("source", "remote", "reading", "pooled"),
    [
        pytest.param("d/foe", "10.0.0.2", False, None, id="this-nodes-waypoint-has-read-it"),
        pytest.param("d/foe", "10.0.0.2", True, True, id="this-nodes-waypoint-leaves-it-to-the-receiver"),
        pytest.param("d/far", "10.0.1.1", False, True, id="another-nodes-waypoint-is-not-trusted"),
        pytest.param("d/plain", "10.0.1.2", False, False, id="not-enrolled"),
        pytest.param("", "192.0.2.1", False, False, id="stranger"),
    ],
)
def test_the_receiver_closes_what_it_does_not_read_and_gives_waypoints_time(
    tmp_path: Path, source: str, remote: str, *, reading: bool, pooled: bool | None
) -> None:
    node = Node(tmp_path, reading=frozenset({REQUESTS.name}) if reading else frozenset())
    found = node.forbidden(REQUESTS, remote, source=source, direction=Direction.INBOUND)
    assert (found.pooled if found else None) is pooled
    assert node.rule(REQUESTS, remote, source=source, direction=Direction.INBOUND, cgroup=WAYPOINT) == "", (
        "steered: Envoy has it and reads it"
    )


def test_what_comes_out_of_a_tunnel_unread_gets_time_and_is_closed_where_a_policy_needs_the_request(tmp_path: Path) -> None:
    node = Node(tmp_path)
    found = node.forbidden(REQUESTS, "10.0.0.4", direction=Direction.FROM_WAYPOINT, mark=UNREAD_MARK)
    assert found is not None
    assert found.pooled
    assert found.rule.startswith("d/l7: ")
    assert node.rule(REQUESTS, "10.0.0.4", direction=Direction.FROM_WAYPOINT) == "", "the waypoint has read it"
    assert node.rule(SERVER, "10.0.0.3", direction=Direction.FROM_WAYPOINT, mark=UNREAD_MARK) == "", "no policy needs the request"
    assert node.rule(FOE, "10.0.0.3", mark=UNREAD_MARK) == NO, "an application's own mark excuses nothing"
    assert node.rule(WATCHED, "10.0.0.5", direction=Direction.FROM_WAYPOINT, mark=UNREAD_MARK) == "", "AUDIT forbids nothing"


def test_a_pod_without_addresses_is_judged_by_those_of_its_namespace(tmp_path: Path) -> None:
    blocked = Policy("d/block", Action.DENY, (PolicyRule((Source(ip_blocks=("10.0.0.1/32",)),)),))
    server = replace(SERVER, policies=("d/block",))
    model = Snapshot("1", {server.name: server, FRIEND.name: replace(FRIEND, addresses=(), pod_uid="u")}, policies={blocked.name: blocked})
    node = Node(tmp_path)
    enrolled = Enrolled((LocalWorkload(server, 1, ""), LocalWorkload(replace(FRIEND, pod_uid="u"), 2, "")))
    node.judge = Judge(Rules(model, enrolled), Config("here", "unix:x"), node.ids, lambda raw: node.known.get(raw, ""), WAYPOINT)
    assert node.rule(server, "10.0.0.1", source="d/friend", direction=Direction.INBOUND) == "d/block[0]"


def after(delta: Delta | None, *changed: Workload, policies: tuple[Policy, ...] = (POLICY, L7)) -> Snapshot:
    workloads = {**SNAPSHOT.workloads, **{w.name: w for w in changed}}
    return Snapshot("2", workloads, policies={p.name: p for p in policies}, delta=delta)


def without(gone: Workload, policies: tuple[Policy, ...] = (POLICY, L7)) -> Snapshot:
    found = after(Delta("1", workloads=frozenset({gone.name})), policies=policies)
    return replace(found, workloads={name: w for name, w in found.workloads.items() if name != gone.name})


def test_the_end_of_a_tunnel_is_left_to_the_waypoint(tmp_path: Path) -> None:
    node = Node(tmp_path)
    assert node.rule(SERVER, "10.0.1.1", 15008, source="d/far", direction=Direction.INBOUND) == ""
    assert node.rule(SERVER, "10.0.1.1", 15007, source="d/far", direction=Direction.INBOUND) == NO


def test_strict_forbids_plaintext_from_outside_the_node_alone(tmp_path: Path) -> None:
    node = Node(tmp_path)
    strict = replace(FRIEND, mtls=Mtls.STRICT, mtls_ports=((81, Mtls.PERMISSIVE),))
    for source, remote in (("d/far", "10.0.1.1"), ("", "192.0.2.1")):
        assert node.rule(strict, remote, 80, source=source, direction=Direction.INBOUND).startswith("STRICT")
        assert node.rule(strict, remote, 81, source=source, direction=Direction.INBOUND) == ""
    assert node.rule(strict, "10.0.0.2", 80, source="d/foe", direction=Direction.INBOUND) == ""
    assert node.rule(strict, "192.0.2.1", 80) == "", "what it calls itself is not its mode's concern"


@pytest.mark.parametrize(
    ("now", "looks"),
    [
        pytest.param(after(Delta("1", policies=frozenset({"d/p"}))), True, id="policy"),
        pytest.param(after(Delta("1", services=frozenset({"d/s"}), routes=frozenset({"d/r"}))), False, id="service-and-route"),
        pytest.param(after(Delta("1", workloads=frozenset({"d/foe"})), replace(FOE, labels={"a": "b"})), True, id="labels"),
        pytest.param(after(Delta("1", workloads=frozenset({"d/foe"})), replace(FOE, service_account="x")), True, id="identity"),
        pytest.param(after(Delta("1", workloads=frozenset({"d/foe"})), replace(FOE, pod_uid="x")), True, id="another-pod-of-the-name"),
        pytest.param(after(Delta("1", workloads=frozenset({"d/foe"})), replace(FOE, ready=False)), False, id="readiness"),
        pytest.param(after(Delta("1", workloads=frozenset({"d/new"})), workload("new", "10.0.0.9")), True, id="new-workload"),
        pytest.param(
            after(Delta("1", workloads=frozenset({"d/new"})), workload("new", "10.0.0.9"), policies=()), False, id="without-policies"
        ),
        pytest.param(without(FOE), True, id="machine-or-process-that-went"),
        pytest.param(without(FOE, policies=()), False, id="machine-that-went-without-policies"),
        pytest.param(without(POD), False, id="pod-that-went"),
        pytest.param(replace(SNAPSHOT, version="2"), False, id="not-said-what-changed-but-nothing-did"),
        pytest.param(
            replace(SNAPSHOT, version="2", workloads={**SNAPSHOT.workloads, FOE.name: replace(FOE, labels={"a": "b"})}),
            True,
            id="not-said-that-labels-did",
        ),
        pytest.param(replace(SNAPSHOT, version="2", policies={POLICY.name: replace(POLICY)}), True, id="not-said-that-a-policy-did"),
        pytest.param(after(Delta("0"), replace(FOE, labels={"a": "b"})), True, id="said-of-another-version"),
        pytest.param(SNAPSHOT, False, id="the-same"),
    ],
)
def test_connections_are_looked_at_only_after_changes_that_may_forbid_one(now: Snapshot, *, looks: bool) -> None:
    assert affects(SNAPSHOT, now) is looks


def test_a_pod_that_starts_has_no_connections_outside_of_its_namespace() -> None:
    """First it has no address, then those of its namespace, which its node knows, and in the end the kubelet reports these."""
    pod = replace(workload("pod", "10.0.0.9", policies=("d/p",)), pod_uid="x")
    made = replace(pod, addresses=())
    assert not affects(SNAPSHOT, after(Delta("1", workloads=frozenset({"d/pod"})), made))
    first = replace(after(None, made), version="1")
    reported = after(Delta("1", workloads=frozenset({"d/pod"})), pod)
    assert not affects(first, reported, {"d/pod": (pod, pod)})
    assert affects(first, reported, {"d/pod": (replace(pod, addresses=("10.0.0.8",)), pod)}), "it had another"
    assert affects(first, reported), "of another node: what was a stranger's is now its own"


class Looks(Revocation):
    """Notes where it would have looked."""

    def __init__(self) -> None:
        self._config = Config("here", "unix:x")
        self._wanted = asyncio.Event()
        self._rules, self._pooled, self._fresh = None, {}, {}
        self._where, self._untaken = set(), set()
        self._failed, self._again = {}, Backoff(revocation_module.AGAIN_S, revocation_module.LATER_S)
        self._all_at = time.monotonic() + revocation_module.LOOK_S
        self.seen: list[set[int] | None] = []

    def close_forbidden(self, where: set[int] | None = None) -> int:
        self.seen.append(where)
        return 0


class Failing(Looks):
    """Looks, but at namespaces that are played: no kernel that runs here refuses on demand."""

    def __init__(self) -> None:
        super().__init__()
        self._ids = cast("Ids", None)
        self.closed = 0
        self.refuse: dict[str, Exception] = {}
        """By the path of the namespace."""
        self.older: dict[str, list[tuple[LiveSocket, bool]]] = {}
        self.looked: list[str] = []
        self._sockets = cast(
            "Sockets", SimpleNamespace(dump=self.dump, older=lambda path, _: self.older.get(str(path), []), destroy=self.destroy)
        )

    def close_forbidden(self, where: set[int] | None = None) -> int:
        self.seen.append(where)
        return Revocation.close_forbidden(self, where)

    def dump(self, namespace: Path) -> list[LiveSocket]:
        self.looked.append(str(namespace))
        if error := self.refuse.get(str(namespace)):
            raise error
        return []

    def destroy(self, namespace: Path, found: Collection[tuple[LiveSocket, T]]) -> Iterator[tuple[LiveSocket, T]]:
        for one in found:
            if error := self.refuse.get(f"close {namespace}"):
                raise error
            self.older[str(namespace)] = [old for old in self.older[str(namespace)] if old[0] is not one[0]]
            yield one

    def who(self, _: bytes) -> str:
        return ""


def mounted(*local: tuple[Workload, int, str], snapshot: Snapshot = SNAPSHOT) -> Rules:
    return Rules(snapshot, Enrolled(tuple(LocalWorkload(*one) for one in local)))


NAMESPACE = "/proc/self/ns/net"
"""One that is there."""
OTHER = "/proc/thread-self/ns/net"


def test_a_look_that_failed_is_a_problem_until_one_there_has_worked(caplog: pytest.LogCaptureFixture) -> None:
    looks = Failing()
    looks.refuse[NAMESPACE] = KernelRefused("not here")
    looks.changed(mounted((FRIEND, 1, NAMESPACE), (FOE, 2, OTHER)))
    looks.close_forbidden(None)
    assert looks.problem.startswith("living connections that a policy forbids may go on at d/friend: not here: ")
    looks.looked.clear()
    looks.close_forbidden({2})
    assert looks.looked == [NAMESPACE, OTHER], "a narrow look goes there again"
    assert "d/friend" in looks.problem
    assert len([r for r in caplog.records if "may go on" in r.message]) == 1, "said once"
    looks.refuse.clear()
    looks.close_forbidden(set())
    assert looks.problem == ""
    looks.looked.clear()
    looks.close_forbidden(set())
    assert looks.looked == []


def test_a_look_that_failed_is_no_problem_without_its_namespace_or_a_policy() -> None:
    for then in (
        mounted((FOE, 2, OTHER)),
        mounted((FRIEND, 1, NAMESPACE), snapshot=Snapshot("2", {FRIEND.name: replace(FRIEND, policies=())})),
    ):
        looks = Failing()
        looks.refuse[NAMESPACE] = KernelRefused("not here")
        looks.changed(mounted((FRIEND, 1, NAMESPACE), (FOE, 2, OTHER)))
        looks.close_forbidden(None)
        assert looks.problem
        looks.changed(then)
        assert looks.problem == ""


def test_a_namespace_that_cannot_be_joined_is_a_problem_unless_it_is_going_away(tmp_path: Path) -> None:
    looks = Failing()
    going = str(tmp_path / "2")
    looks.refuse = {NAMESPACE: OSError(24, "too many open files")}
    looks.changed(mounted((FRIEND, 1, NAMESPACE), (FOE, 2, going)))
    looks.close_forbidden(None)
    assert "d/friend: [Errno 24] too many open files" in looks.problem
    assert "d/foe" not in looks.problem, "the agent has let go of it"
    looks.close_forbidden(set())
    assert "d/foe, d/friend" in looks.problem, "the agent has not: somebody else has unmounted it"


def test_where_a_look_failed_one_follows_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PAUSE_S", 0.01), ("SETTLE_S", 0.01), ("AGAIN_S", 0.05), ("LATER_S", 0.1)):
        monkeypatch.setattr(revocation_module, name, value)

    async def run() -> Failing:
        looks = Failing()
        looks.refuse[NAMESPACE] = KernelRefused("not yet")
        running = asyncio.create_task(looks.run())
        looks.changed(mounted((FRIEND, 1, NAMESPACE), (FOE, 2, OTHER)))
        await asyncio.sleep(0.5)
        assert looks.problem
        assert looks.looked.count(OTHER) == 2, "only where it failed"
        looks.refuse.clear()
        await asyncio.sleep(0.5)
        running.cancel()
        return looks

    looks = asyncio.run(run())
    assert looks.looked.count(NAMESPACE) > 3
    assert looks.problem == ""


def old(remote: str) -> tuple[LiveSocket, bool]:
    """A connection that came in before its namespace was in the mesh."""
    ident = struct.pack("!HH", 80, 50000) + socket.inet_aton("10.0.0.3").ljust(16, b"\0") + socket.inet_aton(remote).ljust(16, b"\0")
    return LiveSocket(socket.AF_INET, 1, ident.ljust(48, b"\0"), 0, 0, 0, 0, Record(*(0,) * len(Record._fields))), True


def test_what_is_older_than_the_mesh_is_closed_when_a_later_policy_forbids_it() -> None:
    """An answer to a call that nobody has recorded: allowed when the pod is enrolled, forbidden later, and not closed at the first attempt."""
    looks = Failing()
    looks.older[NAMESPACE] = [old("192.0.2.1"), old("127.0.0.1")]
    free = Snapshot("1", {SERVER.name: replace(SERVER, policies=())})
    looks.changed(mounted((free.workloads[SERVER.name], 1, NAMESPACE), snapshot=free))
    assert looks.close_forbidden(None) == 0
    looks.changed(mounted((SERVER, 1, NAMESPACE)))
    looks.refuse[f"close {NAMESPACE}"] = KernelRefused("not now")
    assert looks.close_forbidden(None) == 0
    assert looks.problem
    looks.refuse.clear()
    assert looks.close_forbidden(set()) == 1
    assert looks.problem == ""


def test_what_is_older_than_the_mesh_is_not_looked_for_where_there_is_none_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """But once more after a handshake that was under way has had its time."""
    looks = Failing()
    looks.older[NAMESPACE] = [old("127.0.0.1")]
    looks.changed(mounted((SERVER, 1, NAMESPACE)))
    looks.close_forbidden(None)
    looks.older[NAMESPACE].append(old("192.0.2.1"))
    assert looks.close_forbidden(None) == 1
    monkeypatch.setattr(revocation_module, "SETTLE_S", -1.0)
    looks.close_forbidden(None)
    looks.older[NAMESPACE].append(old("192.0.2.1"))
    assert looks.close_forbidden(None) == 0


def test_what_is_older_than_the_mesh_is_looked_for_again_where_nobody_could_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody has unmounted a namespace that lives on, and the agent mounts it again."""
    monkeypatch.setattr(revocation_module, "SETTLE_S", -1.0)
    looks, there = Failing(), tmp_path / "1"
    looks.changed(mounted((SERVER, 1, str(there))))
    assert looks.close_forbidden(None) == 0
    there.symlink_to(NAMESPACE)
    looks.older[str(there)] = [old("192.0.2.1")]
    assert looks.close_forbidden(None) == 1


def rules(*local: Workload, snapshot: Snapshot = SNAPSHOT, reading: frozenset[str] = frozenset()) -> Rules:
    return Rules(snapshot, Enrolled(tuple(LocalWorkload(w, ALL.index(w) + 1, "") for w in local)), reading)


@pytest.mark.parametrize(
    ("then", "where"),
    [
        pytest.param([rules(FRIEND, FOE)], {2}, id="a-new-namespace"),
        pytest.param([rules(FRIEND, FOE), rules(FRIEND, FOE, SERVER)], {2, 3}, id="two-after-each-other"),
        pytest.param([rules(FRIEND, reading=frozenset({FRIEND.name}))], {1}, id="one-begins-to-read-requests"),
        pytest.param(
            [rules(FRIEND, FOE), rules(FRIEND, FOE, snapshot=after(Delta("1", policies=frozenset({"d/p"}))))], None, id="a-policy"
        ),
        pytest.param([rules(FRIEND)], "nowhere", id="nothing"),
        pytest.param([rules()], None, id="a-namespace-that-is-bound-no-more"),
        pytest.param([Rules(SNAPSHOT, Enrolled((LocalWorkload(FRIEND, 9, ""),)))], None, id="another-namespace"),
        pytest.param([Rules(SNAPSHOT, Enrolled((LocalWorkload(FOE, 1, ""),)))], None, id="another-workload-in-the-namespace"),
    ],
)
def test_what_cannot_have_changed_is_not_looked_at(monkeypatch: pytest.MonkeyPatch, then: list[Rules], where: object) -> None:
    monkeypatch.setattr(revocation_module, "PAUSE_S", 0.01)
    monkeypatch.setattr(revocation_module, "SETTLE_S", 0.01)

    async def run() -> Looks:
        looks = Looks()
        running = asyncio.create_task(looks.run())
        looks.changed(rules(FRIEND))
        looks.taken()
        await asyncio.sleep(0.2)
        assert looks.seen == [None, None], "when an agent starts"
        for one in then:
            looks.changed(one)
        await asyncio.sleep(0.2)
        running.cancel()
        return looks

    assert asyncio.run(run()).seen[2:] == ([] if where == "nowhere" else [where, where])


@pytest.mark.parametrize(
    ("mtls", "where"), [pytest.param(Mtls.STRICT, None, id="strict"), pytest.param(Mtls.PERMISSIVE, set(), id="plaintext-is-taken")]
)
def test_a_caller_that_leaves_the_mesh_is_looked_for_where_plaintext_is_not_taken(mtls: Mtls, where: set[int] | None) -> None:
    """Without a policy, too."""
    server = replace(FRIEND, mtls=mtls)
    before = Snapshot("1", {server.name: server, FOE.name: FOE})
    left = Snapshot("2", {**before.workloads, FOE.name: replace(FOE, enrolled=False)}, delta=Delta("1", workloads=frozenset({FOE.name})))
    at, caller = LocalWorkload(server, 1, ""), LocalWorkload(FOE, 2, "")
    looks = Looks()
    looks.changed(Rules(before, Enrolled((at, caller))))
    looks._where = set()
    looks.changed(Rules(left, Enrolled((at,))))
    assert looks._where == where


def test_what_envoy_may_have_done_before_it_took_a_change_is_looked_at_where_that_was() -> None:
    looks, told = Looks(), list[set[int] | None]()
    looks.on_taken = lambda _, where: told.append(where)
    looks.changed(rules(FRIEND, FOE))
    looks.taken()
    looks._where, looks._wanted = set(), asyncio.Event()
    looks.taken()
    assert (looks._where, looks._wanted.is_set()) == (set(), False), "there is nothing new"
    looks.changed(rules(FRIEND, FOE, reading=frozenset({FOE.name})))
    looks._where = set()
    looks.taken()
    assert (looks._where, looks._wanted.is_set()) == ({2}, True)
    assert told == [None, {2}]


def test_a_pod_that_comes_while_everything_is_being_looked_at_does_not_end_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocation_module, "PAUSE_S", 0.01)
    monkeypatch.setattr(revocation_module, "SETTLE_S", 0.3)

    async def run() -> Looks:
        looks = Looks()
        running = asyncio.create_task(looks.run())
        looks.changed(rules(FRIEND))
        await asyncio.sleep(0.1)
        looks.changed(rules(FRIEND, FOE))
        await asyncio.sleep(0.8)
        looks.changed(rules(FRIEND, FOE, SERVER))
        await asyncio.sleep(0.1)
        running.cancel()
        return looks

    assert asyncio.run(run()).seen == [None, None, None, {3}]


def test_a_change_that_comes_during_the_last_look_is_looked_at_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocation_module, "PAUSE_S", 0.01)
    monkeypatch.setattr(revocation_module, "SETTLE_S", 0.01)

    class Slow(Looks):
        """Its second look takes until it is let go on."""

        def __init__(self) -> None:
            super().__init__()
            self.looking, self.go_on = threading.Event(), threading.Event()

        def close_forbidden(self, where: set[int] | None = None) -> int:
            super().close_forbidden(where)
            if len(self.seen) == 2:
                self.looking.set()
                assert self.go_on.wait(5)
            return 0

    async def run() -> Slow:
        looks = Slow()
        running = asyncio.create_task(looks.run())
        looks.changed(rules(FRIEND))
        assert await asyncio.to_thread(looks.looking.wait, 5)
        looks.changed(rules(FRIEND, snapshot=after(Delta("1", policies=frozenset({"d/p"})))))
        looks.go_on.set()
        await asyncio.sleep(0.3)
        running.cancel()
        return looks

    assert asyncio.run(run()).seen == [None] * 4


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("policies", [(POLICY, L7), ()])
def test_everything_is_looked_at_now_and_then_if_something_may_be_forbidden(
    monkeypatch: pytest.MonkeyPatch, policies: tuple[Policy, ...], *, keep: bool
) -> None:
    """Also while other changes come all the time."""
    monkeypatch.setattr(revocation_module, "PAUSE_S", 0.01)
    monkeypatch.setattr(revocation_module, "SETTLE_S", 0.05)
    monkeypatch.setattr(revocation_module, "LOOK_S", 0.5)

    async def run() -> Looks:
        looks = Looks()
        looks._config = replace(looks._config, keep_connections=keep)
        running = asyncio.create_task(looks.run())
        looks.changed(
            Rules(Snapshot("1", {PLAIN.name: PLAIN}, policies={p.name: p for p in policies}), Enrolled((LocalWorkload(PLAIN, 1, ""),)))
        )
        for _ in range(499):  # when an agent starts
            if looks._where == set():
                break
            await asyncio.sleep(0.01)
        looks.seen.clear()
        for _ in range(23):
            if not keep:
                looks._look({1})
            await asyncio.sleep(0.03)
        running.cancel()
        return looks

    later = asyncio.run(run()).seen
    assert (None in later) is (bool(policies) and not keep)
    assert ({1} in later) is not keep


def test_connections_are_looked_at_when_an_agent_starts() -> None:
    assert affects(None, SNAPSHOT)


def test_a_probe_of_the_kubelet_is_let_alone_and_other_calls_of_the_node_are_not(tmp_path: Path) -> None:
    node = Node(tmp_path)
    for at, port, rule in ((SERVER, 80, NO), (replace(SERVER, mtls=Mtls.STRICT), 80, "STRICT: plaintext from outside this node")):
        calls = {"source": "(kubelet)/here", "direction": Direction.INBOUND}
        assert node.rule(at, "192.0.2.1", port, probe=1, **calls) == ""
        assert node.rule(at, "192.0.2.1", port, **calls) == rule
