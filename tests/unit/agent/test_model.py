"""`decode` takes bytes from the controller: whatever comes, it is an entity or a ValueError."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.compact import Table
from agent.model import Action, Delta, MatchKind, Mtls, Node, Policy, Route, Service, Snapshot, Source, Workload, decode, port_name
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
        rule = part.rules.add()
        rule.operations.add(ports=draw(st.lists(NUMBER, max_size=3)), protocols=draw(st.lists(TEXT, max_size=1)))
        blocks = st.lists(st.one_of(TEXT, st.sampled_from(["10.0.0.0/8", "fd00::1"])), max_size=2)
        rule.sources.add(ip_blocks=draw(blocks), not_ip_blocks=draw(blocks), labels=draw(st.dictionaries(TEXT, TEXT, max_size=2)))
    if kind == "workload":
        part.zone, part.weight, part.acceleration = draw(TEXT), draw(NUMBER), draw(TEXT)
        part.mtls = draw(st.integers(0, 9))
        part.mtls_ports.add(port=draw(NUMBER), mode=draw(st.integers(0, 9)))
        part.probe_ports.extend(draw(st.lists(NUMBER, max_size=3)))
        part.backing.add(service=draw(TEXT)).ports.add(service_port=draw(NUMBER), target_port=draw(NUMBER), protocol=draw(TEXT))
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


def decoded_workload(message: pb.Workload) -> Workload:
    found = decode(pb.Entity(workload=message).SerializeToString())
    assert isinstance(found, Workload)
    return found


def test_one_service_port_may_have_a_target_for_each_protocol() -> None:
    message = pb.Workload(namespace="n", name="dns", ready=True)
    backing = message.backing.add(service="n/dns")
    backing.ports.add(service_port=53, target_port=5353, protocol="TCP")
    backing.ports.add(service_port=53, target_port=5300, protocol="UDP")
    backing.ports.add(service_port=80, target_port=8080)  # as a controller writes it that knows TCP only
    dns = decoded_workload(message)
    assert (dict(dns.backing[0].targets("TCP")), dict(dns.backing[0].targets("UDP"))) == ({53: 5353, 80: 8080}, {53: 5300})
    snapshot = Snapshot("1", {dns.name: dns})
    assert snapshot.endpoints("n/dns", 53) == [(dns, 5353)]
    assert snapshot.endpoints("n/dns", 53, "UDP") == [(dns, 5300)]
    assert snapshot.endpoints("n/dns", 80, "UDP") == []


def test_a_workload_has_weight_one_and_no_zone_unless_it_says_so() -> None:
    plain = decoded_workload(pb.Workload(namespace="n", name="a"))
    assert (plain.weight, plain.zone, plain.acceleration) == (1, "", "")
    full = decoded_workload(pb.Workload(namespace="n", name="a", weight=5, zone="z1", acceleration="force"))
    assert (full.weight, full.zone, full.acceleration) == (5, "z1", "force")


def test_a_workload_has_no_mutual_tls_unless_it_says_so_and_ports_of_their_own_win() -> None:
    plain = decoded_workload(pb.Workload(namespace="n", name="a"))
    assert (plain.mtls, plain.mtls_ports, plain.mtls_of(80)) == (Mtls.DISABLE, (), Mtls.DISABLE)
    ports = [pb.PortMtls(port=80), pb.PortMtls(port=8080, mode=pb.Workload.PERMISSIVE)]
    strict = decoded_workload(pb.Workload(namespace="n", name="a", mtls=pb.Workload.STRICT, mtls_ports=ports))
    assert strict.mtls_ports == ((80, Mtls.DISABLE), (8080, Mtls.PERMISSIVE))
    assert [strict.mtls_of(port) for port in (80, 443, 8080)] == [Mtls.DISABLE, Mtls.STRICT, Mtls.PERMISSIVE]


@given(st.uuids().map(str) | st.from_regex("[0-9a-f]{32}", fullmatch=True))
def test_the_uid_of_a_pod_is_kept_for_its_own_node(uid: str) -> None:
    message = pb.Workload(namespace="n", name="a", node="n1", pod_uid=uid)
    assert decoded_workload(message).pod_uid == uid
    for node, expected in (("n1", uid), ("n2", "")):
        found = decode(pb.Entity(workload=message).SerializeToString(), node)
        assert isinstance(found, Workload)
        assert found.pod_uid == expected


@pytest.mark.parametrize(
    "uid",
    [
        "..",
        "0f6f7d2a-3b1c-4e5d-8a9b-c0d1e2f30415/../x",
        "0F6F7D2A-3B1C-4E5D-8A9B-C0D1E2F30415",
        "0f6f7d2a_3b1c_4e5d_8a9b_c0d1e2f30415",
        "0f6f7d2a-3b1c-4e5d-8a9b-c0d1e2f3041",
        "{0f6f7d2a-3b1c-4e5d-8a9b-c0d1e2f30415}",
        "0f6f7d2a-3b1c-4e5d-8a9b-c0d1e2f30415\n",
        "5f3c1e9d8b7a6041223344556677889",
        "5f3c1e9d8b7a604122334455667788990",
        " ",
    ],
)
def test_a_uid_that_is_none_is_refused(uid: str) -> None:
    for node in (None, "n1", "n2"):
        entity = pb.Entity(workload=pb.Workload(namespace="n", name="a", node="n1", pod_uid=uid))
        with pytest.raises(ValueError, match="workload n/a has a pod UID"):
            decode(entity.SerializeToString(), node)


def test_the_ports_that_a_kubelet_calls_are_kept_for_its_own_node() -> None:
    message = pb.Workload(namespace="n", name="a", node="n1", probe_ports=[9090, 8080, 9090])
    for node, expected in ((None, (8080, 9090)), ("n1", (8080, 9090)), ("n2", ())):
        found = decode(pb.Entity(workload=message).SerializeToString(), node)
        assert isinstance(found, Workload)
        assert found.probe_ports == expected


@pytest.mark.parametrize("port", [0, 65536, 65536 + 8080])
def test_a_probe_port_that_is_none_is_refused_and_not_taken_for_another(port: int) -> None:
    entity = pb.Entity(workload=pb.Workload(namespace="n", name="a", node="n1", probe_ports=[8080, port]))
    with pytest.raises(ValueError, match=f"workload n/a has a probe port {port} that is none"):
        decode(entity.SerializeToString(), "n1")


def test_every_mode_has_the_same_name_and_number_on_both_sides() -> None:
    assert {mode.name: mode.value for mode in Mtls} == dict(pb.Workload.MtlsMode.items())


def test_a_mode_of_a_newer_controller_is_refused_and_not_taken_for_another() -> None:
    whole, port = pb.Workload(namespace="n", name="a"), pb.Workload(namespace="n", name="a")
    whole.mtls = 99  # type: ignore[assignment,unused-ignore]
    port.mtls_ports.add(port=80).mode = 99  # type: ignore[assignment,unused-ignore]
    for message in (whole, port, port):
        with pytest.raises(ValueError, match="99 is not a valid Mtls"):
            decoded_workload(message)


def test_a_service_says_how_it_is_balanced() -> None:
    message = pb.Service(
        namespace="n", name="a", traffic_distribution="PreferSameNode", affinity_s=10800, load_balancing="least-connections"
    )
    found = decode(pb.Entity(service=message).SerializeToString())
    assert isinstance(found, Service)
    assert (found.traffic_distribution, found.affinity_s, found.load_balancing) == ("PreferSameNode", 10800, "least-connections")


def policy_with(**source: object) -> pb.Entity:
    entity = pb.Entity(policy=pb.Policy(namespace="a", name="b"))
    rule = entity.policy.rules.add()
    rule.sources.add(**source)  # type: ignore[arg-type,unused-ignore]
    rule.operations.add(protocols=["UDP"])
    return entity


def test_sources_and_operations_are_decoded_whole_and_labels_in_one_order() -> None:
    entity = policy_with(ip_blocks=["10.0.0.0/8"], not_ip_blocks=["10.1.2.3/32"], labels={"tier": "front", "app": "web"})
    found = decode(entity.SerializeToString())
    assert isinstance(found, Policy)
    source = Source(ip_blocks=("10.0.0.0/8",), not_ip_blocks=("10.1.2.3/32",), labels=(("app", "web"), ("tier", "front")))
    assert found.rules[0].sources == (source,)
    assert found.rules[0].operations[0].protocols == ("UDP",)


@pytest.mark.parametrize("field", ["ip_blocks", "not_ip_blocks"])
def test_a_block_that_cannot_be_compared_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=r"10\.0\.0\.0/33"):
        decode(policy_with(**{field: ["10.0.0.0/33"]}).SerializeToString())


def test_a_port_without_a_protocol_is_tcp() -> None:
    assert (port_name(53, "TCP"), port_name(53, "UDP")) == ("53", "53/udp")


def _pod(name: str, labels: dict[str, str]) -> Workload:
    workload = pb.Workload(namespace="n", name=name, node="node-1", labels=labels, policies=["n/p"], service_account="s", zone="z")
    workload.mtls_ports.add(port=80, mode=pb.Workload.STRICT)
    workload.backing.add(service="n/s").ports.extend(
        [pb.PortMapping(service_port=80, target_port=8080), pb.PortMapping(service_port=53, target_port=5353, protocol="UDP")]
    )
    found = decode(pb.Entity(workload=workload).SerializeToString())
    assert isinstance(found, Workload)
    return found


def test_what_workloads_have_in_common_is_one_object() -> None:
    one, two = _pod("a", {"app": "x", "tier": "y"}), _pod("b", {"tier": "y", "app": "x"})
    for part in ("node", "service_account", "zone", "labels", "policies", "backing", "mtls_ports"):
        assert getattr(one, part) is getattr(two, part), part
    assert one.backing[0].ports == {80: 8080}
    assert one.backing[0].udp == {53: 5353}
    assert one.labels == {"app": "x", "tier": "y"}


@given(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=4))
def test_labels_of_any_text_are_decoded_as_they_are(labels: dict[str, str]) -> None:
    assert _pod("a", labels).labels == labels
    assert _pod("a", {**labels, "x": "a\0b", "y": ""}).labels == {**labels, "x": "a\0b", "y": ""}


def test_what_differs_is_found_if_nobody_has_said_it() -> None:
    kept, gone, old, new = (Node(name, None) for name in ("kept", "gone", "other", "other"))
    nodes = Table[Node]().changed({"kept": kept, "gone": gone, "other": old})
    before, after = (
        Snapshot("1", nodes=nodes),
        Snapshot("3", nodes=nodes.changed({"gone": None, "other": new, "come": kept}), delta=Delta("2")),
    )
    assert after.since(before) == Delta("1", nodes=frozenset({"gone", "other", "come"}))
    assert after.since(replace(before, nodes=dict(before.nodes))) == after.since(before)
    assert after.since(after) == Delta("3")
    assert replace(after, delta=Delta("1")).since(before) == Delta("1"), "as it was said"
