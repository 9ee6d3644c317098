"""Whom labels stand for in tunnels, from one snapshot to the next."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.l7 import names
from agent.l7.peers import Peers
from agent.l7.snapshot import Builder
from agent.model import Action, Delta, LocalWorkload, Mtls, Policy, PolicyRule, Snapshot, Source, Workload

ASKED = [
    (Source(labels=pairs), action)
    for pairs in ((("app", "a"),), (("app", "b"),), (("app", "a"), ("team", "x")))
    for action in (Action.ALLOW, Action.DENY)
]
POLICIES = {
    f"default/p{number}": Policy(f"default/p{number}", action, (PolicyRule((source,)),)) for number, (source, action) in enumerate(ASKED)
}
WORKLOADS = st.dictionaries(
    st.sampled_from([f"default/w{number}" for number in range(5)]),
    st.tuples(
        st.dictionaries(st.sampled_from(["app", "team"]), st.sampled_from(["a", "b", "x"])),
        st.lists(st.sampled_from([f"10.0.0.{number}" for number in range(1, 5)]), max_size=2, unique=True),
        st.sampled_from(["node-1", "node-2"]),
    ),
    max_size=5,
)
Drawn = dict[str, tuple[dict[str, str], list[str], str]]


def made(drawn: Drawn) -> dict[str, Workload]:
    return {
        name: Workload(
            name,
            "account",
            node,
            labels,
            tuple(addresses),
            "",
            enrolled=True,
            ready=True,
            mtls=Mtls.PERMISSIVE,
            policies=tuple(sorted(POLICIES)),
        )
        for name, (labels, addresses, node) in drawn.items()
    }


def test_what_nobody_asked_for_changes_nothing() -> None:
    one = made({"default/w1": ({"app": "a"}, ["10.0.0.1"], "node-2")})["default/w1"]
    peers = Peers([one], "mesh.test")
    asked = peers.principal(*ASKED[0])
    other = dataclasses.replace(one, labels={"app": "a", "version": "2"})
    assert peers.after([(one, other)]) is peers
    assert peers.principal(*ASKED[0]) == asked
    assert peers.after([(other, dataclasses.replace(one, labels={}))]) is not peers


@settings(max_examples=100, deadline=None)
@given(st.lists(WORKLOADS, min_size=2, max_size=5))
def test_one_that_was_brought_along_says_what_a_new_one_does(scenes: list[Drawn]) -> None:
    before = made(scenes[0])
    peers = Peers(before.values(), "mesh.test")
    for number, drawn in enumerate(scenes[1:]):
        for source, action in ASKED[: 2 * number + 2]:  # some are asked for later
            peers.principal(source, action)
        now = made(drawn)
        peers = peers.after([(before.get(name), now.get(name)) for name in before.keys() | now.keys()])
        new = Peers(now.values(), "mesh.test")
        assert [peers.principal(*one) for one in ASKED] == [new.principal(*one) for one in ASKED]
        before = now


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WORKLOADS, st.booleans(), st.booleans()), min_size=2, max_size=5))
def test_what_is_built_after_a_change_is_what_is_built_anew(scenes: list[tuple[Drawn, bool, bool]]) -> None:
    """Whether or not it is known what differs, and whoever of this node is bound to a namespace."""

    def loopback(_: str) -> str:
        return "127.0.1.1"

    builder, before = Builder("node-1", "mesh.test"), Snapshot()
    for number, (drawn, told, bound) in enumerate(scenes):
        workloads = made(drawn)
        differ = {name for name in before.workloads.keys() | workloads.keys() if before.workloads.get(name) != workloads.get(name)}
        workloads = {name: before.workloads[name] if name not in differ else one for name, one in workloads.items()}
        same = {"policies": before.policies if number else POLICIES, "services": before.services, "routes": before.routes}
        delta = Delta(str(number - 1), workloads=frozenset(differ)) if told and number else None
        snapshot = Snapshot(str(number), workloads, delta=delta, **same)  # type: ignore[arg-type]
        local = [LocalWorkload(one, 1, f"/ns/{one.name}") for one in workloads.values() if one.node == "node-1" and bound]
        found = builder.build(snapshot, local, "", loopback)
        new = Builder("node-1", "mesh.test").build(snapshot, local, "", loopback)
        assert found[names.ROUTES] == new[names.ROUTES]
        before = snapshot
