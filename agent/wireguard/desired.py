"""What WireGuard has to be on a node, from the model alone. Pure.

The addresses that a peer may use (WireGuard's allowed IPs: what is decrypted with its key is dropped unless its source is among them) are those of the enrolled
workloads that the operator's resources put on its node. No agent has a say in that, so none can get another node's. Nor can what one announces take WireGuard
from another node: where it claims to be reached at the address of another node's workload, it is the one that is no peer.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from agent.model import Node, Snapshot, WireGuardEnd, Workload

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Peer:
    """Another node: its key, and where its agent says it is."""

    node: str
    public_key: bytes
    endpoint: tuple[str, int]


@dataclass(frozen=True, slots=True)
class Desired:
    """A node's WireGuard. Addresses are text in their usual form.

    `peers` by node. `allowed` is the node of each address that a peer may use, so no address can be two peers'. `local` are the addresses of this node's own
    enrolled workloads: only what they send goes through WireGuard. `unfit` are workloads of peers with an address that WireGuard must not carry, and why.
    `refused` are nodes that are no peers because of what their agents announce, and why.
    """

    peers: Mapping[str, Peer] = field(default_factory=lambda: MappingProxyType({}))
    allowed: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    local: frozenset[str] = frozenset()
    unfit: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    refused: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    trouble: str = ""
    """Why there are no peers although there could be."""


def desired(snapshot: Snapshot, node: str, own: Collection[str]) -> Desired:
    """What `node` needs; `own` are the addresses of the node itself, which its WireGuard packets have as their source."""
    here = snapshot.nodes.get(node)
    if here is None or here.wireguard is None:
        return Desired()
    enrolled = [w for w in snapshot.workloads.values() if w.enrolled and w.addresses]
    refused = _refused(snapshot, enrolled)
    if reason := refused.pop(node, ""):  # the others do the same: what it sent to them through WireGuard would be lost
        return Desired(trouble=f"other nodes do not talk to this one: {reason}", refused=MappingProxyType(refused))
    peers = {name: peer for name, peer in _peers(snapshot, node, here.wireguard).items() if name not in refused}
    reserved = {name: _where(found).union(own) for name, found in snapshot.nodes.items()}
    claims = Counter(text for text, _ in {(text, w.node) for w in enrolled for text in _usual(w)})
    allowed: dict[str, str] = {}
    local: set[str] = set()
    unfit: dict[str, str] = {}
    for workload in enrolled:
        if workload.node != node and workload.node not in peers:
            continue
        usual = _usual(workload)
        reasons = (_objection(text, reserved[workload.node], claims[text]) for text in usual)
        if reason := next(
            (found for found in reasons if found), "" if len(usual) == len(workload.addresses) else "one of its addresses is none"
        ):
            unfit[workload.name] = reason
            if workload.node == node:  # what it sends would not be encrypted: nobody of this node may rely on it
                trouble = f"workload {workload.name} of this node: {reason}; correct its spec.addresses"
                return Desired(trouble=trouble, refused=MappingProxyType(refused))
        elif workload.node == node:
            local.update(usual)
        else:
            allowed.update(dict.fromkeys(usual, workload.node))
    return Desired(MappingProxyType(peers), MappingProxyType(allowed), frozenset(local), MappingProxyType(unfit), MappingProxyType(refused))


def _refused(snapshot: Snapshot, enrolled: Collection[Workload]) -> dict[str, str]:
    """The nodes that announce the address of another node's workload as their own, and why that is refused.

    A workload in the host network of its node has that node's address: this is its own node's matter only (`_objection`).
    """
    announced = {text for found in snapshot.nodes.values() for text in _where(found)}
    holders = [(text, w) for w in enrolled for text in _usual(w) if text in announced]
    found: dict[str, str] = {}
    for text, holder in sorted(holders, key=lambda one: (one[0], one[1].name)):
        for name, node in snapshot.nodes.items():
            if name != holder.node and text in _where(node):
                found.setdefault(
                    name,
                    f"the agent of node {name} announces {text}, which is the address of workload {holder.name} of node {holder.node}: "
                    f"correct --wireguard-address of that agent, or spec.addresses of the workload; if node {name} is not trusted any more, revoke it",
                )
    return found


def _where(node: Node) -> frozenset[str]:
    """Where a node's agent says it is, in the usual form."""
    return frozenset(str(ipaddress.ip_address(text)) for text in node.wireguard.endpoints) if node.wireguard else frozenset()


def _peers(snapshot: Snapshot, node: str, here: WireGuardEnd) -> dict[str, Peer]:
    """The other nodes that have a key of their own: two that claim one key get nothing, for it is not known whose it is."""
    keys = Counter(found.wireguard.public_key for found in snapshot.nodes.values() if found.wireguard)
    families = {ipaddress.ip_address(text).version for text in here.endpoints}
    found = {}
    for name, other in snapshot.nodes.items():
        end = other.wireguard
        if name == node or end is None or keys[end.public_key] > 1:
            continue
        near = [text for text in end.endpoints if ipaddress.ip_address(text).version in families]
        found[name] = Peer(name, end.public_key, ((near or list(end.endpoints))[0], end.port))
    return found


def _usual(workload: Workload) -> list[str]:
    """Its addresses, those that are any, in their usual form: two spellings are one address."""
    found = []
    for text in workload.addresses:
        try:
            found.append(str(ipaddress.ip_address(text)))
        except ValueError:
            continue
    return found


def _objection(text: str, reserved: Collection[str], claimed: int) -> str:
    """Why WireGuard must not carry an address; "" if it may."""
    address: IpAddress = ipaddress.ip_address(text)
    if claimed > 1:
        return f"{text} belongs to workloads of {claimed} nodes"
    if text in reserved:
        return f"{text} is an address of a node"
    if address.is_loopback or address.is_unspecified or address.is_multicast or address.is_link_local:
        return f"{text} is no address that other nodes can reach"
    return ""
