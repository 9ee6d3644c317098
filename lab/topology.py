"""What a lab consists of: nodes, pods and hosts outside the mesh, read from lab.yaml or made in Python.

Owns the address plan and every check of a topology; called by the lab, the command line, tests and benchmarks. It only describes: it must
not touch the machine.

Address plan: node number i has the pod networks 10.77.i.0/24 and fd77:0:0:i::/64 with the node itself at host 1; the wire between the
nodes is 10.77.255.0/24 and fd77:0:0:ff::/64, where node i has host i and the controller host 254. Virtual service addresses come from
10.96.0.0/16 and fd96::/64, which no route leads to: only the mesh makes them work.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from lab.errors import LabError, TopologyError

VIP_NETWORKS = ("10.96.0.0/16", "fd96::/64")
WIRE_NETWORKS = ("10.77.255.0/24", "fd77:0:0:ff::/64")
CONTROLLER = "controller"
CONTROLLER_ADDRESSES = ("10.77.255.254", "fd77:0:0:ff::fe")
MAX_NODES = 199  # wire hosts 200 to 253 are left for hosts outside the mesh
_RESERVED = (CONTROLLER, "wire", "outside")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the mesh: a network namespace with a bridge, a cgroup subtree, an agent. `number` selects its networks."""

    name: str
    number: int

    @property
    def networks(self) -> tuple[str, str]:
        """Its pod networks, IPv4 then IPv6."""
        return f"10.77.{self.number}.0/24", f"fd77:0:0:{self.number:x}::/64"

    @property
    def gateways(self) -> tuple[str, str]:
        """Its own addresses inside the pod networks."""
        return f"10.77.{self.number}.1", f"fd77:0:0:{self.number:x}::1"

    @property
    def wire(self) -> tuple[str, str]:
        """Its addresses on the wire between the nodes."""
        return f"10.77.255.{self.number}", f"fd77:0:0:ff::{self.number:x}"


@dataclass(frozen=True, slots=True)
class Pod:
    """A network namespace on a node with addresses of its own and, if `command` is not empty, a program that runs in it."""

    name: str
    node: str
    addresses: tuple[str, ...]
    namespace: str = "default"
    command: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    ports: tuple[int, ...] = ()
    """TCP ports that `command` listens on: the lab is up when all of them answer."""
    mesh: bool = True
    """False: no Workload describes it (`lab.resources`), so it is a neighbour that the mesh does not know."""
    service_account: str = "default"
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def full_name(self) -> str:
        """NAMESPACE/NAME."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Outside:
    """A host on the wire that is no node."""

    name: str
    addresses: tuple[str, ...]


Place = Node | Pod | Outside


@dataclass(frozen=True, slots=True)
class Topology:
    """A whole lab. Making one checks it: TopologyError names the first field that is wrong."""

    nodes: tuple[Node, ...]
    pods: tuple[Pod, ...] = ()
    outside: tuple[Outside, ...] = ()
    directory: Path = Path("/")
    """Where the pods' commands start, so that `lab.yaml` can name programs beside itself."""
    identity: bool = False
    """Has the controller a certificate authority? Then pods have identities, and mTLS between nodes."""
    wireguard: bool = False
    """Encrypt between nodes with WireGuard where the kernel has it; needs `identity`."""

    def __post_init__(self) -> None:
        _check(self)

    def node(self, name: str) -> Node:
        """Return the node called `name`."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise LabError(f"no node is called {name}{_suggest(name, (n.name for n in self.nodes))}")

    def pod(self, name: str) -> Pod:
        """Return the pod called NAMESPACE/NAME, or NAME in the namespace "default"."""
        wanted = name if "/" in name else f"default/{name}"
        for pod in self.pods:
            if pod.full_name == wanted:
                return pod
        raise LabError(f"no pod is called {wanted}{_suggest(wanted, (p.full_name for p in self.pods))}")

    def place(self, name: str) -> Place:
        """Return whatever is called `name`: a pod, a host outside, or a node."""
        others: list[Outside | Node] = [*self.outside, *self.nodes]
        return next((other for other in others if other.name == name), None) or self.pod(name)

    def pods_of(self, node: str) -> list[Pod]:
        """Return the pods of one node."""
        return [pod for pod in self.pods if pod.node == node]


def load(path: Path) -> Topology:
    """Read and check a lab.yaml. Raises TopologyError ("FILE: FIELD: WHAT") or LabError if the file cannot be read."""
    try:
        document = YAML(typ="safe").load(path.read_text())
    except OSError as error:
        raise LabError(f"{path}: cannot be read: {error.strerror}") from error
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise TopologyError(str(path), f"line {line}", f"not valid YAML: {error.problem}") from error
    except YAMLError as error:
        raise TopologyError(str(path), "line 1", "not valid YAML") from error
    return parse(document, str(path), path.resolve().parent)


def parse(document: object, origin: str, directory: Path) -> Topology:
    """Turn a decoded document into a Topology; `origin` is what messages call it."""
    top = _Reader(origin, "", document, ("nodes", "pods", "outside", "identity", "wireguard"))
    nodes = tuple(
        Node(_Reader(origin, f"nodes[{i}]", item, ("name",)).text("name"), i + 1)
        for i, item in enumerate(top.items("nodes", required=True))
    )
    pods = tuple(_pod(_Reader(origin, f"pods[{i}]", item, _POD_FIELDS)) for i, item in enumerate(top.items("pods")))
    outside = tuple(
        Outside(host.text("name"), host.texts("addresses"))
        for host in (_Reader(origin, f"outside[{i}]", item, ("name", "addresses")) for i, item in enumerate(top.items("outside")))
    )
    try:
        return Topology(nodes, pods, outside, directory, top.flag("identity", default=False), top.flag("wireguard", default=False))
    except TopologyError as error:
        raise TopologyError(origin, error.field, error.what) from None


def document(topology: Topology) -> dict[str, Any]:
    """Return what `parse` would turn into this topology again (its directory and the nodes' numbers travel beside it)."""
    return {
        "nodes": [{"name": node.name} for node in topology.nodes],
        "pods": [
            {
                "name": pod.name,
                "namespace": pod.namespace,
                "node": pod.node,
                "addresses": list(pod.addresses),
                "command": list(pod.command),
                "env": dict(pod.env),
                "ports": list(pod.ports),
                "mesh": pod.mesh,
                "serviceAccount": pod.service_account,
                "labels": dict(pod.labels),
            }
            for pod in topology.pods
        ],
        "outside": [{"name": host.name, "addresses": list(host.addresses)} for host in topology.outside],
        "identity": topology.identity,
        "wireguard": topology.wireguard,
    }


_POD_FIELDS = ("name", "namespace", "node", "addresses", "command", "env", "ports", "mesh", "serviceAccount", "labels")


def _pod(fields: _Reader) -> Pod:
    return Pod(
        name=fields.text("name"),
        node=fields.text("node"),
        addresses=fields.texts("addresses"),
        namespace=fields.text("namespace", "default"),
        command=fields.texts("command", required=False),
        env=fields.mapping("env"),
        ports=fields.numbers("ports"),
        mesh=fields.flag("mesh", default=True),
        service_account=fields.text("serviceAccount", "default"),
        labels=fields.mapping("labels"),
    )


class _Reader:
    """Typed access to one mapping of the document, with the field's path in every complaint."""

    def __init__(self, origin: str, path: str, value: object, known: Iterable[str]) -> None:
        self.origin = origin
        self.path = path
        if not isinstance(value, dict):
            raise TopologyError(origin, path or "document", f"must be a mapping, not {_kind(value)}")
        self.value: dict[Any, Any] = value
        for key in value:
            if key not in known:
                raise self.error(str(key), f"unknown field{_suggest(str(key), known)}")

    def error(self, name: str, what: str) -> TopologyError:
        return TopologyError(self.origin, f"{self.path}.{name}" if self.path else name, what)

    def text(self, name: str, default: str | None = None) -> str:
        value = self.value.get(name, default)
        if value is None:
            raise self.error(name, "is required")
        if not isinstance(value, str):
            raise self.error(name, f"must be text, not {_kind(value)}")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        value = self.value.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, not {_kind(value)}")
        return value

    def items(self, name: str, *, required: bool = False) -> list[object]:
        value = self.value.get(name)
        if value is None and not required:
            return []
        if not isinstance(value, list) or (required and not value):
            raise self.error(name, "must be a list with at least one element" if required else f"must be a list, not {_kind(value)}")
        return value

    def texts(self, name: str, *, required: bool = True) -> tuple[str, ...]:
        found: list[str] = []
        for i, item in enumerate(self.items(name, required=required)):
            if not isinstance(item, str):
                raise self.error(f"{name}[{i}]", f"must be text, not {_kind(item)}: put it in quotes")
            found.append(item)
        return tuple(found)

    def numbers(self, name: str) -> tuple[int, ...]:
        found: list[int] = []
        for i, item in enumerate(self.items(name)):
            if not isinstance(item, int) or isinstance(item, bool):
                raise self.error(f"{name}[{i}]", f"must be a number, not {_kind(item)}")
            found.append(item)
        return tuple(found)

    def mapping(self, name: str) -> dict[str, str]:
        value = self.value.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.error(name, f"must be a mapping, not {_kind(value)}")
        for key, item in value.items():
            if not isinstance(key, str) or not isinstance(item, str):
                raise self.error(f"{name}.{key}", f"must be text, not {_kind(item)}: put it in quotes")
        return dict(value)


def _check(topology: Topology) -> None:
    """Raise TopologyError for the first thing that could not be built."""
    if not 1 <= len(topology.nodes) <= MAX_NODES:
        raise _error("nodes", f"must be 1 to {MAX_NODES}, not {len(topology.nodes)}")
    names: dict[str, str] = dict.fromkeys(_RESERVED, "the lab itself")
    numbers: dict[int, str] = {}
    for i, node in enumerate(topology.nodes):
        _name(f"nodes[{i}].name", node.name, names)
        if not 1 <= node.number <= MAX_NODES or node.number in numbers:
            raise _error(f"nodes[{i}].number", f"{node.number} is out of range or taken")
        numbers[node.number] = node.name
    taken = dict.fromkeys(CONTROLLER_ADDRESSES, CONTROLLER)
    taken.update({address: node.name for node in topology.nodes for address in (*node.gateways, *node.wire)})
    for i, host in enumerate(topology.outside):
        _name(f"outside[{i}].name", host.name, names)
        _addresses(f"outside[{i}].addresses", host.addresses, WIRE_NETWORKS, host.name, taken)
    nodes = {node.name: node for node in topology.nodes}
    pods: dict[str, str] = {}
    for i, pod in enumerate(topology.pods):
        _check_pod(f"pods[{i}]", pod, names, pods)
        if pod.node not in nodes:
            raise _error(f"pods[{i}].node", f"no node is called {pod.node!r}{_suggest(pod.node, nodes)}")
        _addresses(f"pods[{i}].addresses", pod.addresses, nodes[pod.node].networks, pod.full_name, taken)


def _check_pod(where: str, pod: Pod, names: Mapping[str, str], pods: dict[str, str]) -> None:
    """Check what concerns the pod alone and its name; `names` are those of nodes and hosts, `pods` those of the pods before it."""
    for leaf, text in (("name", pod.name), ("namespace", pod.namespace)):
        if not _LABEL.fullmatch(text):
            raise _error(f"{where}.{leaf}", f"{text!r} is not a DNS label (lower-case letters, digits, '-')")
    if pod.namespace == "default" and pod.name in names:
        raise _error(f"{where}.name", f"{pod.name!r} is taken by {names[pod.name]}")
    if pod.full_name in pods:
        raise _error(f"{where}.name", f"{pod.full_name} is taken by {pods[pod.full_name]}")
    pods[pod.full_name] = where
    for j, port in enumerate(pod.ports):
        if not 1 <= port <= 65535:
            raise _error(f"{where}.ports[{j}]", f"{port} is not a port")
    if pod.ports and not pod.command:
        raise _error(f"{where}.ports", "needs a command that listens on them")


def _name(where: str, name: str, taken: dict[str, str]) -> None:
    if not _LABEL.fullmatch(name):
        raise _error(where, f"{name!r} is not a DNS label (lower-case letters, digits, '-')")
    if name in taken:
        raise _error(where, f"{name!r} is taken by {taken[name]}")
    taken[name] = where


def _addresses(where: str, addresses: tuple[str, ...], networks: tuple[str, str], owner: str, taken: dict[str, str]) -> None:
    """Check that there is at most one address of each family, each free and inside the network of its family."""
    families: set[int] = set()
    if not addresses:
        raise _error(where, "must have an IPv4 address, an IPv6 address, or one of each")
    for i, text in enumerate(addresses):
        here = f"{where}[{i}]"
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            raise _error(here, f"{text!r} is not an IP address") from None
        network = ipaddress.ip_network(networks[0 if address.version == 4 else 1])
        if address not in network or address in (network.network_address, network.broadcast_address):
            raise _error(here, f"{text} is not a host address of {network}")
        if address.version in families:
            raise _error(here, f"a second IPv{address.version} address: one of each family is what a pod has")
        families.add(address.version)
        if str(address) != text:
            raise _error(here, f"{text} must be written {address}")
        if text in taken:
            raise _error(here, f"{text} is taken by {taken[text]}")
        taken[text] = owner


def _error(field_path: str, what: str) -> TopologyError:
    return TopologyError("topology", field_path, what)


def _suggest(word: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1)
    if near:
        return f": did you mean {near[0]}?"
    return f" (there are: {', '.join(names)})" if names else ""


def _kind(value: object) -> str:
    return {dict: "a mapping", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}.get(
        type(value), "nothing"
    )
