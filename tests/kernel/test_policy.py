"""What the tests of single rules do not show: rules that are only audited, callers by label and block, and changes that hold everywhere at once."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from agent import addresses
from agent.bpf.manifest import Direction, EventKind, Reason
from agent.bpf.maps import Map
from agent.model import Action, Operation, Policy, PolicyRule, Snapshot, Source
from tests.kernel.datanode import ADDRESSES, DataNode, snapshot, workload

SERVER = ADDRESSES["server-a"][0]
LOOP = """
import errno, signal, socket, sys
seen, ended = {}, []
signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
while not ended:
    try:
        s = socket.create_connection((sys.argv[1], 8080), timeout=2); s.sendall(b"x"); outcome = "ok" if s.recv(1) else "closed"; s.close()
    except OSError as e: outcome = errno.errorcode.get(e.errno, repr(e))
    seen[outcome] = seen.get(outcome, 0) + 1
print(seen)
"""


def model(*policies: Policy, labels: tuple[tuple[str, str], ...] = (("version", "one"),)) -> Snapshot:
    """server-a, protected by these policies, and two callers of which one has the labels."""
    names = tuple(p.name for p in policies)
    caller = replace(workload("caller"), labels=dict(labels))
    return snapshot(caller, workload("other"), workload("server-a", policies=names), policies=policies)


def test_a_rule_that_is_only_audited_counts_and_reports_and_lets_through(node: DataNode) -> None:
    audit = Policy("default/later", Action.AUDIT, (PolicyRule((Source(service_accounts=("default/other",)),)),))
    node.enforce(model(audit))
    with node.events() as events:
        assert node.connect("other", SERVER, 8080).startswith("ok")
        assert node.connect("caller", SERVER, 8080).startswith("ok")
    audited = [(e.source, e.target, e.rule, Reason(e.reason), e.direction) for e in events if e.kind is EventKind.AUDITED]
    seen = ("default/other", "default/server-a", "default/later[0]", Reason.AUDIT)
    assert audited == [(*seen, Direction.OUTBOUND), (*seen, Direction.INBOUND)]
    assert node.verdicts()["default/other", "default/server-a", "default/later[0]"] == 2


def test_an_audited_rule_beside_an_enforced_one_changes_nothing(node: DataNode) -> None:
    audit = Policy("default/later", Action.AUDIT, (PolicyRule(),))
    allow = Policy("default/callers", Action.ALLOW, (PolicyRule((Source(service_accounts=("default/caller",)),)),))
    node.enforce(model(audit, allow))
    assert node.connect("caller", SERVER, 8080).startswith("ok")
    assert node.connect("other", SERVER, 8080) == "EPERM"


def test_a_caller_is_known_by_its_labels(node: DataNode) -> None:
    allow = Policy("default/ones", Action.ALLOW, (PolicyRule((Source(labels=(("version", "one"),)),)),))
    node.enforce(model(allow))
    assert node.connect("caller", SERVER, 8080).startswith("ok")
    assert node.connect("other", SERVER, 8080) == "EPERM"
    node.enforce(model(allow, labels=(("version", "two"),)))
    assert node.connect("caller", SERVER, 8080) == "EPERM"


def test_a_stranger_is_known_by_its_block(node: DataNode) -> None:
    stranger = ADDRESSES["stranger"]
    for inside, outside in ((f"{stranger[0]}/32", "10.77.99.0/24"), (f"{stranger[1]}/64", "fd77:99::/64")):
        address = SERVER if "." in inside else ADDRESSES["server-a"][1]
        node.enforce(model(Policy("default/block", Action.ALLOW, (PolicyRule((Source(ip_blocks=(inside,)),)),))))
        assert node.connect("stranger", address, 8080).startswith("ok")
        node.enforce(model(Policy("default/block", Action.ALLOW, (PolicyRule((Source(ip_blocks=(outside,)),)),))))
        assert node.connect("stranger", address, 8080) == "ECONNREFUSED"
        node.enforce(model(Policy("default/block", Action.DENY, (PolicyRule((Source(not_ip_blocks=(outside,)),)),))))
        assert node.connect("stranger", address, 8080) == "ECONNREFUSED"


def test_policies_change_everywhere_at_once(node: DataNode) -> None:
    """Who is who and what each may do both change, hundreds of times: a mix of old and new would refuse the one caller or let the other in."""
    by_account = Policy("default/who", Action.ALLOW, (PolicyRule((Source(service_accounts=("default/caller",)),)),))
    by_label = Policy("default/who", Action.ALLOW, (PolicyRule((Source(labels=(("version", "one"),)),), (Operation(ports=(8080,)),)),))
    against = Policy(
        "default/not", Action.DENY, (PolicyRule((Source(not_service_accounts=("default/caller",), namespaces=("default",)),)),)
    )
    by_block = Policy("default/who", Action.ALLOW, (PolicyRule((Source(ip_blocks=(f"{ADDRESSES['caller'][0]}/32",)),)),))
    models = [model(by_account), model(by_label), model(against), model(by_block), model(by_label, against)]
    node.enforce(models[0])
    loops = {place: node.lab.popen(place, ["python3", "-c", LOOP, SERVER]) for place in ("caller", "other")}
    changes, end = 0, time.monotonic() + 6
    while changes <= 10 or time.monotonic() < end:
        changes += 1
        node.enforce(models[changes % len(models)])
    for loop in loops.values():
        loop.terminate()
    outcomes = {place: loop.communicate()[0].strip() for place, loop in loops.items()}
    assert outcomes["caller"].startswith("{'ok': ")
    assert outcomes["caller"].count(":") == 1, outcomes
    assert outcomes["other"].startswith("{'EPERM': ")
    assert outcomes["other"].count(":") == 1, outcomes


@pytest.mark.parametrize("action", [Action.ALLOW, Action.DENY])
def test_a_row_that_becomes_anothers_while_it_is_read_is_not_believed(node: DataNode, action: Action) -> None:
    """The kernel uses the memory of a row for another one at once. What a program would read then stands here: a row with another's words."""
    account = "default/caller" if action is Action.ALLOW else "default/other"
    node.enforce(model(Policy("default/who", action, (PolicyRule((Source(service_accounts=(account,)),)),))))
    known, enrolled = node.datapath.maps["mesh_address"], node.datapath.maps["mesh_workload"]

    def row(table: Map, key: bytes) -> dict[str, Any]:
        return table.layout.value.unpack((table.get(key) or [b""])[0])

    def cookie(place: str) -> bytes:
        return enrolled.layout.key.pack(**{"": row(known, addresses.packed(ADDRESSES[place][0]))["netns_cookie"]})

    server, unprotected = addresses.packed(SERVER), addresses.packed(ADDRESSES["other"][0])
    for table, key, other in ((enrolled, cookie("other"), cookie("caller")), (known, server, unprotected)):
        before, foreign = row(table, key), row(table, other)
        table.put(key, table.layout.value.pack(**{**before, "identity": foreign["identity"], "policy": foreign["policy"]}))
        assert node.connect("other", SERVER, 8080) == "EPERM"
        table.put(key, table.layout.value.pack(**before))
        assert node.connect("caller", SERVER, 8080).startswith("ok")
