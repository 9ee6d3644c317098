"""What a lab.yaml may say, and what is said about one that may not be built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lab import topology
from lab.cli import SHOP
from lab.errors import LabError, TopologyError
from lab.topology import Node, Pod, Topology

HERE = Path("/somewhere")


def parse(document: object) -> Topology:
    return topology.parse(document, "lab.yaml", HERE)


def two_nodes(**pod: Any) -> dict[str, Any]:
    """A topology of two nodes and one pod with the given fields."""
    fields = {"name": "web", "node": "b", "addresses": ["10.77.2.7", "fd77:0:0:2::7"]}
    return {
        "nodes": [{"name": "a"}, {"name": "b"}],
        "pods": [{**fields, **pod}],
        "outside": [{"name": "far", "addresses": ["10.77.255.201"]}],
    }


def test_the_shop_loads_and_its_programs_start_beside_it() -> None:
    shop = topology.load(SHOP / "lab.yaml")
    assert [node.name for node in shop.nodes] == ["node-1", "node-2"]
    assert shop.directory == SHOP
    assert shop.pod("cart-v1-2").node == "node-2"


def test_nodes_are_numbered_in_order_and_number_selects_the_networks() -> None:
    second = parse(two_nodes()).node("b")
    assert second.networks == ("10.77.2.0/24", "fd77:0:0:2::/64")
    assert second.wire == ("10.77.255.2", "fd77:0:0:ff::2")


def test_defaults_of_a_pod() -> None:
    pod = parse(two_nodes()).pods[0]
    assert (pod.namespace, pod.command, pod.env, pod.ports, pod.mesh, pod.service_account) == ("default", (), {}, (), True, "default")


def test_a_place_is_found_by_name_with_or_without_namespace() -> None:
    lab = parse(two_nodes(namespace="shop"))
    assert lab.place("shop/web") is lab.pods[0]
    assert lab.place("far") is lab.outside[0]
    assert lab.place("a") is lab.nodes[0]


def test_an_unknown_place_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(LabError, match="no pod is called default/wed: did you mean default/web"):
        parse(two_nodes()).place("wed")


def test_document_is_the_inverse_of_parse() -> None:
    shop = topology.load(SHOP / "lab.yaml")
    assert topology.parse(topology.document(shop), "state", SHOP) == shop


@pytest.mark.parametrize(
    ("document", "message"),
    [
        pytest.param(None, "lab.yaml: document: must be a mapping, not nothing", id="empty"),
        pytest.param({}, "lab.yaml: nodes: must be a list with at least one element", id="no nodes"),
        pytest.param({"nodes": []}, "lab.yaml: nodes: must be a list with at least one element", id="empty nodes"),
        pytest.param({"node": []}, "lab.yaml: node: unknown field: did you mean nodes?", id="unknown top field"),
        pytest.param({"nodes": ["a"]}, "lab.yaml: nodes[0]: must be a mapping, not text", id="node as text"),
        pytest.param({"nodes": [{"name": "A"}]}, "lab.yaml: nodes[0].name: 'A' is not a DNS label", id="node name"),
        pytest.param({"nodes": [{"name": "a"}] * 2}, "lab.yaml: nodes[1].name: 'a' is taken by nodes[0].name", id="node twice"),
        pytest.param({"nodes": [{"name": "wire"}]}, "lab.yaml: nodes[0].name: 'wire' is taken by the lab itself", id="reserved"),
        pytest.param(two_nodes(node="c"), "lab.yaml: pods[0].node: no node is called 'c'", id="unknown node"),
        pytest.param(two_nodes(adresses=[]), "lab.yaml: pods[0].adresses: unknown field: did you mean addresses?", id="unknown pod field"),
        pytest.param(two_nodes(addresses=[]), "lab.yaml: pods[0].addresses: must be a list with at least one element", id="no address"),
        pytest.param(two_nodes(addresses=["10.77.2.300"]), "lab.yaml: pods[0].addresses[0]: '10.77.2.300' is not an IP", id="no IP"),
        pytest.param(two_nodes(addresses=["10.77.1.7"]), "lab.yaml: pods[0].addresses[0]: 10.77.1.7 is not a host address of 10.77.2.0/24", id="net"),
        pytest.param(two_nodes(addresses=["10.77.2.1"]), "lab.yaml: pods[0].addresses[0]: 10.77.2.1 is taken by b", id="the gateway"),
        pytest.param(two_nodes(addresses=["10.77.2.7", "10.77.2.8"]), "lab.yaml: pods[0].addresses[1]: a second IPv4 address", id="two IPv4"),
        pytest.param(two_nodes(addresses=["fd77:0:0:2:0::7"]), "must be written fd77:0:0:2::7", id="not canonical"),
        pytest.param(two_nodes(name="a"), "lab.yaml: pods[0].name: 'a' is taken by nodes[0].name", id="pod like node"),
        pytest.param(two_nodes(command="sleep 1"), "lab.yaml: pods[0].command: must be a list, not text", id="command as text"),
        pytest.param(two_nodes(command=["sleep", 1]), "lab.yaml: pods[0].command[1]: must be text, not a number: put it in quotes", id="argv"),
        pytest.param(two_nodes(env={"A": 1}), "lab.yaml: pods[0].env.A: must be text, not a number: put it in quotes", id="env"),
        pytest.param(two_nodes(mesh="yes"), "lab.yaml: pods[0].mesh: must be true or false, not text", id="mesh"),
        pytest.param(two_nodes(ports=[80]), "lab.yaml: pods[0].ports: needs a command that listens on them", id="ports without command"),
        pytest.param(two_nodes(ports=[0], command=["x"]), "lab.yaml: pods[0].ports[0]: 0 is not a port", id="port 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused_with_its_field(document: object, message: str) -> None:
    with pytest.raises(TopologyError) as refused:
        parse(document)
    assert message in str(refused.value)


def test_an_address_belongs_to_one_pod() -> None:
    pods = tuple(Pod(name, "a", ("10.77.1.7",)) for name in ("one", "two"))
    with pytest.raises(TopologyError, match=r"pods\[1\].addresses\[0\]: 10.77.1.7 is taken by default/one"):
        Topology((Node("a", 1),), pods)


def test_yaml_that_does_not_parse_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "lab.yaml"
    file.write_text("nodes:\n  - name: [a\n")
    with pytest.raises(TopologyError, match=r"lab\.yaml: line 3: not valid YAML"):
        topology.load(file)


def test_a_missing_file_is_one_line() -> None:
    with pytest.raises(LabError, match=r"^/nowhere/lab.yaml: cannot be read: No such file or directory$"):
        topology.load(Path("/nowhere/lab.yaml"))
