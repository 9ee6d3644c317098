"""The definition of policy, in plain Python, against the real program and the real tables: any policies, any connection, the same answer."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from agent import addresses
from agent.bpf.datapath import DataPath
from agent.bpf.manifest import Reason, Verdict
from agent.bpf.maps import Map
from agent.bpf.tables import Namespace, Tables
from agent.config import Config
from agent.ids import Ids
from agent.model import Action, LocalWorkload, Policy, PolicyRule, Snapshot, Source, Workload
from agent.policy import PROTOCOLS, Caller, Decision, decide
from agent.policy import Verdict as Plain
from tests.kernel.programs import loaded, open_program, receive
from tests.unit.agent import policies as draw

EXAMPLES, CALLS = 500, 24  # 12,000 connections
NUMBERS = {"TCP": 6, "UDP": 17}
TARGET, TARGET6 = "172.31.0.1", "fc00:31::1"
LOCAL, COOKIE = "172.31.0.2", 4711


class Node:
    """A loaded data path that is attached to nothing, and its tables."""

    def __init__(self, config: Config, datapath: DataPath) -> None:
        self.datapath = datapath
        self.ids = Ids(config.run_dir / "ids")
        self.tables = Tables(self.datapath.maps, self.ids, draw.TRUST_DOMAIN, "here")
        directory = next(p for p in config.pin_dir.glob("programs-*"))
        self.program = open_program(directory, "mesh_sk_lookup")
        self.port = 1024

    def flow(self, port: int, target_port: int) -> None:
        """What the connect hook writes when the local caller opens a TCP connection."""
        table = self.datapath.maps["mesh_flow"]
        key = table.layout.key.pack(
            source=addresses.packed(LOCAL), destination=addresses.packed(TARGET), source_port=port, destination_port=target_port, protocol=6
        )
        table.put(key, table.layout.value.pack(netns_cookie=COOKIE, workload=1))

    def verdicts(self) -> Counter[tuple[str, str, str]]:
        """(rule, verdict, reason) of everything decided since the last call."""
        table = self.datapath.maps["mesh_verdicts"]
        found: Counter[tuple[str, str, str]] = Counter()
        for key, values in table.items():
            k = table.layout.key.unpack(key)
            name = (self.ids.name(k["rule"]), Verdict(k["verdict"]).name, Reason(k["reason"]).name)
            found[name] += sum(table.layout.value.unpack(v)[""] for v in values)
        table.prune(set())
        return found


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with loaded(tmp_path_factory.mktemp("oracle")) as (config, datapath):
        found = Node(config, datapath)
        yield found
        os.close(found.program)


def expected(decision: Decision, protocol: str) -> Iterator[tuple[str, str, str]]:
    """What the kernel counts for a decision. There is no waypoint here: what needs it is refused."""
    verdict, reason = decision.verdict.name, "POLICY"
    if decision.verdict is Plain.WAYPOINT:
        assert protocol == "TCP"
        verdict, reason = "DENY", "NO_LISTENER"
    if decision.verdict is not Plain.NONE:
        yield decision.rule, verdict, reason
    if decision.audit:
        yield decision.audit, verdict, "AUDIT"


def workload(name: str, caller: Caller, node: str, found: tuple[str, ...], enrolled: bool) -> Workload:
    return Workload(f"{caller.namespace or 'x'}/{name}", caller.service_account, node, dict(caller.labels), found, name, enrolled, True)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    protecting=draw.policy_sets(),
    remote=draw.enrolled,
    local=draw.enrolled,
    outsider=draw.outsiders,
    calls=st.lists(
        st.tuples(
            st.sampled_from(["remote", "local", "outsider", "stranger"]),
            draw.addresses,
            st.sampled_from((*draw.PORTS, draw.UNNAMED_PORT)),
            st.sampled_from(PROTOCOLS),
        ),
        min_size=CALLS,
        max_size=CALLS,
    ),
)
def test_the_kernel_decides_as_the_definition_says(
    node: Node, protecting: list[Policy], remote: Caller, local: Caller, outsider: Caller, calls: list[tuple[str, str, int, str]]
) -> None:
    names = tuple(sorted(p.name for p in protecting))
    target = Workload("shop/target", "target", "here", {}, (TARGET, TARGET6), "target", True, True, (), names)
    # Each address is one caller's: what two claim is nobody's.
    outsiders = tuple(a for a in outsider.addresses if a not in remote.addresses)
    known = {
        "remote": workload("remote", remote, "there", remote.addresses, True),
        "outsider": workload("outsider", Caller(), "there", outsiders, False),
        "local": workload("local", local, "here", (LOCAL,), True),
    }
    model = Snapshot("v", {w.name: w for w in (target, *known.values())}, {}, {}, {p.name: p for p in protecting})
    here = [
        Namespace(LocalWorkload(target, 1, ""), (TARGET, TARGET6)),
        Namespace(LocalWorkload(known["local"], COOKIE, ""), (LOCAL,)),
    ]
    node.tables.sync(model, here, frozenset())
    node.verdicts()
    counted: Counter[tuple[str, str, str]] = Counter()
    taken = {*remote.addresses, *outsiders}
    for who, drawn, port, protocol in calls:
        source = drawn
        if who == "local":
            source, caller, protocol = LOCAL, Caller.of(known["local"], draw.TRUST_DOMAIN), "TCP"  # noqa: PLW2901
        elif who != "stranger" and known[who].addresses:
            source, caller = known[who].addresses[0], Caller.of(known[who], draw.TRUST_DOMAIN)
        elif drawn in taken:
            continue
        else:
            caller = Caller(addresses=(drawn,))
        node.port = node.port + 1 if node.port < 60000 else 1024
        if who == "local":
            node.flow(node.port, port)
        decision = decide(protecting, caller, port, protocol)
        event(decision.verdict.name)
        let_in = receive(node.program, NUMBERS[protocol], (source, node.port), (TARGET6 if ":" in source else TARGET, port))
        assert let_in is (decision.verdict in {Plain.NONE, Plain.ALLOW}), (who, source, caller, port, protocol, decision)
        counted.update(expected(decision, protocol))
    assert node.verdicts() == counted


def test_who_comes_or_goes_when_policies_turn_is_never_let_in_between(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class is new with it: just before the turn the policies in force do not know it, just after it those to come no longer do."""
    blocks = Policy("shop/blocks", Action.DENY, (PolicyRule((Source(ip_blocks=("10.0.0.0/24",)),)),))
    labels = Policy("shop/labels", Action.DENY, (PolicyRule((Source(labels=(("app", "x"),)),)),))
    target = Workload("shop/target", "target", "here", {}, (TARGET,), "target", True, True, (), (blocks.name,))
    bystander = Workload("shop/other", "other", "there", {}, ("10.9.9.9",), "other", True, True, (), (labels.name,))
    guest = Workload("shop/guest", "guest", "there", {"app": "x"}, ("10.0.0.5",), "guest", True, True)
    models = [
        Snapshot("v", {w.name: w for w in found}, {}, {}, {p.name: p for p in (blocks, labels)})
        for found in ((target, bystander), (target, bystander, guest))
    ]
    seen = []

    def ask() -> None:
        node.port += 1
        seen.append(receive(node.program, NUMBERS["TCP"], (guest.addresses[0], node.port), (TARGET, 80)))

    turn = Map.put

    def watched(table: Map, key: bytes, value: bytes) -> None:
        ask()
        turn(table, key, value)
        ask()

    here = [Namespace(LocalWorkload(target, 1, ""), (TARGET,))]
    node.tables.sync(models[0], here, frozenset())
    monkeypatch.setattr(Map, "put", watched)
    for model in (models[1], models[0]):
        node.tables.sync(model, here, frozenset())
        ask()
    assert len(seen) == 6
    assert not any(seen)


def test_an_empty_snapshot_leaves_no_rows(node: Node) -> None:
    """The same tables were used for every example above."""
    target = Workload("shop/target", "target", "here", {}, (TARGET,), "target", True, True)
    node.tables.sync(Snapshot("v", {target.name: target}), [], frozenset())
    rows = {name: sum(1 for _ in node.datapath.maps[name].items()) for name in Tables.ORDER}
    empty = replace(Snapshot("empty"))
    node.tables.sync(empty, [], frozenset())
    node.tables.remove_retired()
    left = {name: sum(1 for _ in node.datapath.maps[name].items()) for name in Tables.ORDER}
    assert rows["mesh_address"]
    assert not any(left.values())
