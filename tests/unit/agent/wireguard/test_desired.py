"""Which peers there are, and which addresses each may use."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.model import Direct, Mtls, Node, Snapshot, WireGuardEnd, Workload
from agent.wireguard.desired import Desired, Peer, desired

KEYS = {name: bytes([i + 1]) * 32 for i, name in enumerate(("n1", "n2", "n3"))}
WHERE = {"n1": ("192.0.2.1", "2001:db8::1"), "n2": ("192.0.2.2", "2001:db8::2"), "n3": ("2001:db8::3",)}
OWN = ("192.0.2.1", "2001:db8::1", "198.51.100.1")


def node(name: str, key: bytes | None = None) -> Node:
    return Node(name, WireGuardEnd(key or KEYS[name], 51871, WHERE[name]))


NODES = {name: node(name) for name in KEYS}


def workload(name: str, on: str, *addresses: str, enrolled: bool = True) -> Workload:
    return Workload(f"default/{name}", "default", on, {}, addresses, name if enrolled else "", enrolled=enrolled, ready=True)


def model(*workloads: Workload, nodes: Mapping[str, Node] = NODES) -> Snapshot:
    return Snapshot("1", {w.name: w for w in workloads}, nodes=nodes)


HERE = workload("here", "n1", "10.0.1.2", "fd00:1::2")
THERE = workload("there", "n2", "10.0.2.2", "fd00:2::2")


def test_a_peer_may_use_the_addresses_of_the_enrolled_workloads_of_its_node_and_no_other() -> None:
    outsider = workload("outsider", "n2", "10.0.2.9", enrolled=False)
    found = desired(model(HERE, THERE, outsider), "n1", OWN)
    assert found.peers == {
        "n2": Peer("n2", KEYS["n2"], ("192.0.2.2", 51871)),
        "n3": Peer("n3", KEYS["n3"], ("2001:db8::3", 51871)),
    }
    assert found.allowed == {"10.0.2.2": "n2", "fd00:2::2": "n2"}
    assert found.local == {"10.0.1.2", "fd00:1::2"}
    assert (dict(found.unfit), found.trouble) == ({}, "")


def test_two_spellings_are_one_address() -> None:
    found = desired(model(HERE, workload("there", "n2", "FD00:2:0::2")), "n1", OWN)
    assert found.allowed == {"fd00:2::2": "n2"}


@pytest.mark.parametrize(
    "nodes",
    [
        pytest.param({}, id="not-asked-for"),
        pytest.param({**NODES, "n1": Node("n1")}, id="this-node-cannot"),
        pytest.param({name: NODES[name] for name in ("n2", "n3")}, id="this-node-is-not-known"),
    ],
)
def test_without_a_key_of_its_own_a_node_has_no_peers(nodes: Mapping[str, Node]) -> None:
    assert desired(model(HERE, THERE, nodes=nodes), "n1", OWN) == Desired()


def test_a_node_without_wireguard_is_no_peer() -> None:
    found = desired(model(HERE, THERE, nodes={**NODES, "n2": Node("n2")}), "n1", OWN)
    assert (set(found.peers), dict(found.allowed)) == ({"n3"}, {})


def test_nodes_that_claim_one_key_are_no_peers() -> None:
    found = desired(model(HERE, THERE, nodes={**NODES, "n3": node("n3", KEYS["n2"])}), "n1", OWN)
    assert (dict(found.peers), dict(found.allowed)) == ({}, {})


def test_a_node_that_claims_our_own_key_is_no_peer() -> None:
    found = desired(model(HERE, THERE, nodes={**NODES, "n2": node("n2", KEYS["n1"])}), "n1", OWN)
    assert set(found.peers) == {"n3"}


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        pytest.param("198.51.100.1", "198.51.100.1 is an address of a node", id="this-nodes-own"),
        pytest.param("192.0.2.2", "192.0.2.2 is an address of a node", id="its-own-nodes-endpoint"),
        pytest.param("2001:0db8::2", "2001:db8::2 is an address of a node", id="its-own-nodes-endpoint-spelled-otherwise"),
        pytest.param("127.0.0.1", "127.0.0.1 is no address that other nodes can reach", id="loopback"),
        pytest.param("0.0.0.0", "0.0.0.0 is no address that other nodes can reach", id="any"),
        pytest.param("224.0.0.1", "224.0.0.1 is no address that other nodes can reach", id="multicast"),
        pytest.param("fe80::1", "fe80::1 is no address that other nodes can reach", id="link-local"),
        pytest.param("10.0.1.2", "10.0.1.2 belongs to workloads of 2 nodes", id="of-two-nodes"),
        pytest.param("0.0.0.0/0", "one of its addresses is none", id="a-network"),
    ],
)
def test_an_address_that_is_not_a_workloads_own_leads_nowhere(address: str, reason: str) -> None:
    """And all of the workload is reached through its tunnel: one of its addresses would not be encrypted."""
    thief = workload("thief", "n2", "10.0.2.7", address)
    found = desired(model(workload("here", "n1", "10.0.1.3"), workload("victim", "n3", "10.0.1.2"), THERE, thief), "n1", OWN)
    assert dict(found.unfit).items() >= {("default/thief", reason)}
    assert address not in found.allowed
    assert "10.0.2.7" not in found.allowed
    assert found.allowed["10.0.2.2"] == "n2"


def test_a_local_workload_that_would_not_be_encrypted_leaves_every_tunnel_in_use() -> None:
    found = desired(model(workload("here", "n1", "192.0.2.1"), THERE), "n1", OWN)
    assert (dict(found.peers), found.local) == ({}, frozenset())
    assert found.trouble == "workload default/here of this node: 192.0.2.1 is an address of a node; correct its spec.addresses"


def test_an_endpoint_that_is_another_nodes_workload_costs_only_who_announces_it() -> None:
    """n3 announces addresses of workloads of n1 and n2: it is no peer any more, and nothing else changes, on no node."""
    for stolen, victim in (("10.0.1.2", HERE), ("FD00:2::2", THERE)):
        thief = Node("n3", WireGuardEnd(KEYS["n3"], 51871, (stolen,)))
        snapshot = model(HERE, THERE, workload("far", "n3", "10.0.3.2"), nodes={**NODES, "n3": thief})
        here, there = desired(snapshot, "n1", OWN), desired(snapshot, "n2", ("192.0.2.2",))
        assert (here.trouble, dict(here.unfit), set(here.peers), set(here.local)) == ("", {}, {"n2"}, {"10.0.1.2", "fd00:1::2"})
        assert (there.trouble, dict(there.unfit), set(there.peers), set(there.local)) == ("", {}, {"n1"}, {"10.0.2.2", "fd00:2::2"})
        assert here.allowed == {"10.0.2.2": "n2", "fd00:2::2": "n2"}
        assert there.allowed == {"10.0.1.2": "n1", "fd00:1::2": "n1"}
        for found in (here, there):
            (reason,) = found.refused.values()
            assert set(found.refused) == {"n3"}
            assert reason.startswith(
                f"the agent of node n3 announces {stolen.lower()}, which is the address of workload {victim.name} of node {victim.node}: "
            )
        own = desired(snapshot, "n3", ())
        assert own.trouble.startswith("other nodes do not talk to this one: the agent of node n3 announces")
        assert (dict(own.peers), dict(own.allowed), own.local) == ({}, {}, frozenset())


def test_an_endpoint_that_is_an_outsiders_address_is_nobodys_trouble() -> None:
    """WireGuard carries nothing of workloads that are not enrolled."""
    found = desired(model(HERE, THERE, workload("outsider", "n2", "2001:db8::3", enrolled=False)), "n1", OWN)
    assert (dict(found.refused), set(found.peers)) == ({}, {"n2", "n3"})


_ADDRESSES = st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::1", "FD00::1", "192.0.2.2", "127.0.0.1", "nonsense"])
_WORKLOADS = st.lists(
    st.builds(
        lambda number, on, addresses, enrolled: workload(f"w{number}", on, *addresses, enrolled=enrolled),
        st.integers(0, 9), st.sampled_from(["n1", "n2", "n3", "n4"]), st.lists(_ADDRESSES, max_size=3), st.booleans(),
    ),
    max_size=8,
)  # fmt: skip


@given(_WORKLOADS)
def test_whatever_the_model_says_nobody_gets_an_address_that_it_does_not_put_on_his_node(workloads: list[Workload]) -> None:
    snapshot = model(*workloads)
    found = desired(snapshot, "n1", OWN)
    for address, on in found.allowed.items():
        claiming = {w.node for w in snapshot.workloads.values() if w.enrolled and address in [a.lower() for a in w.addresses]}
        assert claiming == {on}
        assert address not in {*OWN, *(text for name in (*found.peers, "n1") for text in WHERE[name])}
    assert not found.local & found.allowed.keys()
    direct = Direct(frozenset(found.peers), frozenset(found.unfit))
    for one in snapshot.workloads.values():
        if direct(one) and one.enrolled:
            assert all(found.allowed.get(text.lower()) == one.node for text in one.addresses)


@pytest.mark.parametrize(
    ("mode", "tunnel"),
    [
        pytest.param(Mtls.STRICT, True, id="strict-wants-the-callers-certificate"),
        pytest.param(Mtls.PERMISSIVE, False, id="permissive"),
        pytest.param(Mtls.DISABLE, False, id="disable"),
    ],
)
def test_what_wireguard_encrypts_takes_a_tunnel_only_where_the_port_is_strict(mode: Mtls, tunnel: bool) -> None:
    assert Direct(frozenset({"n2"})).tunnels(THERE, mode) is tunnel
    assert Direct(frozenset({"n3"})).tunnels(THERE, mode) is (mode is not Mtls.DISABLE)
    assert Direct(frozenset({"n2"}), frozenset({THERE.name})).tunnels(THERE, mode) is (mode is not Mtls.DISABLE)
