"""The lab's wires: namespaces, bridges, veth pairs, addresses and routes of a topology. Called by `lab.lab`.

Everything lives in namespaces that the lab made; the host's own namespace is never touched, not even to make a veth pair. Speaks to the
kernel through one `ip -batch` per namespace: the network of the shop takes 0.1 s that way, less than importing pyroute2 does (0.37 s),
and each line can be pasted into a terminal when something has to be looked into.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterable
from pathlib import Path

from lab import netns, paths
from lab.errors import LabError
from lab.topology import CONTROLLER_ADDRESSES, VIP_NETWORKS, Node, Outside, Place, Pod, Topology

_COMMON = {
    "net/ipv6/conf/all/disable_ipv6": "0",
    "net/ipv6/conf/default/disable_ipv6": "0",
    "net/ipv6/conf/all/accept_dad": "0",  # addresses work at once
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/all/accept_ra": "0",
    "net/ipv6/conf/default/accept_ra": "0",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
}
_ROUTER = {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    "net/ipv4/icmp_ratelimit": "0",  # every connection to an address that no route leads to fails at once, not only the first
    "net/ipv6/icmp/ratelimit": "0",
}


def build(topology: Topology) -> None:
    """Make the wire, the nodes, the controller's and the outside hosts' namespaces; pods are added one by one (`add_pod`)."""
    _namespace(paths.WIRE_NETNS)
    _namespace(paths.CONTROLLER_NETNS)
    for node in topology.nodes:
        _namespace(paths.place_netns(node), _ROUTER)
    for host in topology.outside:
        _namespace(paths.place_netns(host))
    ends = [(paths.CONTROLLER_NETNS, "controller")]
    ends += [(paths.place_netns(node), node.name) for node in topology.nodes]
    ends += [(paths.place_netns(host), host.name) for host in topology.outside]
    lines = _bridge()
    for namespace, name in ends:
        lines += _port(port_name(name), namespace, "wire0", name)
    _ip(paths.WIRE_NETNS, lines)
    for node in topology.nodes:
        _ip(paths.place_netns(node), _node(node, topology.nodes))
    _ip(paths.CONTROLLER_NETNS, _host(CONTROLLER_ADDRESSES, topology.nodes))
    for host in topology.outside:
        _ip(paths.place_netns(host), _host(host.addresses, topology.nodes))


def add_pod(pod: Pod, node: Node) -> None:
    """Make a pod's namespace and plug it into its node's bridge."""
    namespace = paths.place_netns(pod)
    _namespace(namespace)
    _ip(paths.place_netns(node), _port(port_name(pod.full_name), namespace, "eth0", pod.full_name))
    # A pod that comes back with its address has the same MAC: the neighbour caches of the others may still know the old pod's.
    lines = [f"link set eth0 address {mac_address(pod.addresses[0])} up"]
    for address in pod.addresses:
        family = 1 if ":" in address else 0
        gateway = node.gateways[family]
        # The node would answer the same, but an IPv6 socket that is still inside connect() hears it only after its first retransmission.
        lines.append(f"route add unreachable {VIP_NETWORKS[family]}")
        lines += [f"address add {address}/{64 if ':' in address else 24} dev eth0 nodad", f"route add default via {gateway} dev eth0"]
    _ip(namespace, lines)


def remove_pod(pod: Pod, node: Node) -> None:
    """Unplug a pod and take its namespace's name away."""
    namespace = paths.place_netns(node)
    if netns.exists(namespace):
        name = port_name(pod.full_name)
        present = netns.inside(namespace, lambda: Path(f"/proc/thread-self/net/dev_snmp6/{name}").exists())
        if present:
            _ip(namespace, [f"link delete {name}"])
    netns.delete(paths.place_netns(pod))


def remove_all() -> None:
    """Take away every namespace that any lab made; links and routes go with them."""
    for name in netns.names(f"{paths.PREFIX}-"):
        netns.delete(name)
    netns.remove_directory()


def port_name(name: str) -> str:
    """Return the interface name of the bridge's end of a wire; kernel names have 15 characters, so the full name is the link's alias."""
    return f"p-{hashlib.sha256(name.encode()).hexdigest()[:10]}"


def mac_address(address: str) -> str:
    """Return the MAC address that goes with an IP address: locally administered, unicast, always the same."""
    return ":".join(["02", *(f"{byte:02x}" for byte in hashlib.sha256(address.encode()).digest()[:5])])


def place_addresses(place: Place) -> tuple[str, ...]:
    """Return the addresses by which others reach a place."""
    return place.addresses if isinstance(place, Pod | Outside) else place.wire


def _namespace(name: str, extra: dict[str, str] | None = None) -> None:
    """Make a namespace with its sysctls set, before any interface could inherit others, and the loopback up."""
    netns.create(name)

    def prepare() -> None:
        try:
            for key, value in {**_COMMON, **(extra or {})}.items():
                (Path("/proc/sys") / key).write_text(value)
        except OSError as error:
            raise LabError(f"cannot write {error.filename} in network namespace {name}: {error.strerror}") from error

    netns.inside(name, prepare)
    _ip(name, ["link set lo up"])


def _bridge() -> list[str]:
    """Return the lines that make br0: no spanning tree and no multicast snooping, so that the first frame already goes through."""
    return ["link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0", "link set br0 up"]


def _port(name: str, namespace: str, peer: str, alias: str) -> list[str]:
    """Return the lines that make a veth pair from br0 into another namespace."""
    return [
        f"link add {name} type veth peer name {peer} netns {namespace}",
        f"link set {name} alias {alias} master br0 up",
    ]


def _node(node: Node, nodes: Iterable[Node]) -> list[str]:
    # Without an address of its own a bridge takes the lowest of its ports', so a new pod could change the MAC that the others know the gateway by.
    lines = [*_bridge(), f"link set br0 address {mac_address(node.gateways[0])}", "link set wire0 up"]
    for i, (gateway, wire) in enumerate(zip(node.gateways, node.wire, strict=True)):
        length = (24, 64)[i]
        lines += [f"address add {gateway}/{length} dev br0 nodad", f"address add {wire}/{length} dev wire0 nodad"]
        lines.append(f"route add unreachable {VIP_NETWORKS[i]}")  # a connection that nobody redirected fails at once
    return lines + _routes(nodes, (0, 1), skip=node)


def _host(addresses: tuple[str, ...], nodes: Iterable[Node]) -> list[str]:
    lines = ["link set wire0 up"]
    families = sorted({1 if ":" in address else 0 for address in addresses})
    lines += [f"address add {address}/{64 if ':' in address else 24} dev wire0 nodad" for address in addresses]
    return lines + _routes(nodes, families)


def _routes(nodes: Iterable[Node], families: Iterable[int], skip: Node | None = None) -> list[str]:
    """Return routes to the pod networks of `nodes` through their addresses on the wire."""
    chosen = list(families)
    return [f"route add {node.networks[i]} via {node.wire[i]} dev wire0" for node in nodes if node is not skip for i in chosen]


def _ip(namespace: str, lines: list[str]) -> None:
    """Run iproute2 commands inside a namespace; the first that fails is named in the LabError."""
    run = netns.inside(
        namespace,
        lambda: subprocess.run(["ip", "-batch", "-"], input="\n".join(lines) + "\n", capture_output=True, text=True, check=False),
    )
    if run.returncode != 0:
        number = run.stderr.rpartition("-:")[2].strip()
        failed = lines[int(number) - 1] if number.isdigit() and int(number) <= len(lines) else lines[0]
        raise LabError(f"`ip {failed}` failed in namespace {namespace}: {run.stderr.splitlines()[0] if run.stderr else run.returncode}")
