"""`decode` takes bytes from the controller: whatever comes, it is an entity or a ValueError."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.model import Action, MatchKind, Policy, Route, Service, Snapshot, Workload, decode
from meshapi import discovery_pb2 as pb

ENTITIES = (Workload, Service, Route, Policy)
TEXT = st.text(max_size=5)
NUMBER = st.integers(0, 2**32 - 1)


@given(st.binary(max_size=307))
def test_arbitrary_bytes_are_an_entity_or_a_value_error(content: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(decode(content), ENTITIES)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A whole entity of any kind with some of its bytes changed or cut off."""
    entity = pb.Entity()
    kind = draw(st.sampled_from(["workload", "service", "route", "policy"]))
    part = getattr(entity, kind)
    part.namespace, part.name = draw(TEXT), draw(TEXT)
    if kind == "route":
        match = part.rules.add(request_timeout_ms=draw(NUMBER)).matches.add()
        match.path.kind, match.path.value = draw(st.integers(0, 9)), draw(TEXT)
    if kind == "policy":
        part.action = draw(st.integers(0, 9))
        part.rules.add().operations.add(ports=draw(st.lists(NUMBER, max_size=3)))
    if kind == "workload":
        part.backing.add(service=draw(TEXT)).ports.add(service_port=draw(NUMBER), target_port=draw(NUMBER))
    content = bytearray(entity.SerializeToString())
    for position, value in draw(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=3)):
        if position < len(content):
            content[position] = value
    return bytes(content[: draw(st.integers(0, len(content)))]) if draw(st.booleans()) else bytes(content)


@given(damaged())
def test_damaged_entities_are_an_entity_or_a_value_error(content: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(decode(content), ENTITIES)


@pytest.mark.parametrize("action", [action.value for action in Action])
def test_every_known_action_is_decoded(action: int) -> None:
    found = decode(pb.Entity(policy=pb.Policy(namespace="a", name="b", action=action)).SerializeToString())  # type: ignore[arg-type,unused-ignore]
    assert isinstance(found, Policy)
    assert (found.name, found.action.value) == ("a/b", action)


def test_an_action_of_a_newer_controller_is_refused_and_not_taken_for_another() -> None:
    entity = pb.Entity(policy=pb.Policy(namespace="a", name="b"))
    entity.policy.action = 99  # type: ignore[assignment,unused-ignore]
    with pytest.raises(ValueError, match="99"):
        decode(entity.SerializeToString())


def test_a_way_to_compare_of_a_newer_controller_is_refused() -> None:
    entity = pb.Entity(route=pb.Route(namespace="a", name="b"))
    path = entity.route.rules.add().matches.add().path
    path.kind = max(kind.value for kind in MatchKind) + 1  # type: ignore[assignment,unused-ignore]
    with pytest.raises(ValueError, match="MatchKind"):
        decode(entity.SerializeToString())


def test_an_entity_of_a_kind_that_is_not_known_is_refused() -> None:
    unknown_kind = b"\xfa\x01\x00"  # field 31, length 0
    with pytest.raises(ValueError, match="upgrade the agent"):
        decode(unknown_kind)
    with pytest.raises(ValueError, match="upgrade the agent"):
        decode(b"")


def test_endpoints_are_the_ready_workloads_with_their_own_ports() -> None:
    entities = []
    for name, ready, port in (("b", True, 8081), ("a", True, 8080), ("c", False, 8080)):
        workload = pb.Workload(namespace="n", name=name, ready=ready)
        workload.backing.add(service="n/s").ports.add(service_port=80, target_port=port)
        entities.append(decode(pb.Entity(workload=workload).SerializeToString()))
    snapshot = Snapshot("1", {w.name: w for w in entities if isinstance(w, Workload)})
    assert [(w.name, port) for w, port in snapshot.endpoints("n/s", 80)] == [("n/a", 8080), ("n/b", 8081)]
    assert snapshot.endpoints("n/s", 81) == []
