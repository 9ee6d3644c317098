"""What a CNI plugin makes of NetworkPolicies, for the node of tests, whose plugin makes nothing of them: rules of nftables for Ingress to selected pods.

Of the kinds of peers it knows those that the manifest has, ipBlock without `except` and namespaceSelector with matchLabels. What the node itself sends to its
pods is let through, as everywhere (https://kubernetes.io/docs/concepts/services-networking/network-policies/).
"""

from __future__ import annotations

import ipaddress
import json
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.kubernetes.controlplane import ControlPlane

_TABLE = "inet policing"


@contextmanager
def enforced(plane: ControlPlane, namespace: str) -> Iterator[None]:
    """The policies of a namespace are in force as they and the pods are now, in the network of this thread."""
    pods = _items(plane, "pods")
    lines = [f"table {_TABLE} {{", "chain forward {", "type filter hook forward priority 10;", "ct state established,related accept"]
    for policy in _items(plane, "networkpolicies", "-n", namespace):
        selector = policy["spec"]["podSelector"]["matchLabels"]
        chosen = [one for one in pods if one["metadata"]["namespace"] == namespace and _fits(selector, one)]
        for pod in chosen:
            for address in _addresses([pod]):
                lines += [f"{_side(address, 'daddr')} {rule} accept" for rule in _rules(plane, policy, pod, pods, address)]
                lines.append(f"{_side(address, 'daddr')} drop")
    subprocess.run(["nft", "-f", "-"], input="\n".join([*lines, "}", "}", ""]), text=True, check=True)
    try:
        yield
    finally:
        subprocess.run(["nft", "delete", "table", *_TABLE.split()], check=True)


def _rules(plane: ControlPlane, policy: Any, pod: Any, pods: list[Any], address: str) -> Iterator[str]:
    """What is let in to a pod at one of its addresses."""
    named = {one["name"]: one["containerPort"] for container in pod["spec"]["containers"] for one in container.get("ports", ())}
    for rule in policy["spec"]["ingress"]:
        ports = ", ".join(str(named.get(one["port"], one["port"])) for one in rule["ports"])
        if "from" not in rule:
            yield f"tcp dport {{ {ports} }}"
        for peer in rule.get("from", ()):
            for source in _sources(plane, peer, pods):
                if ipaddress.ip_network(source).version == ipaddress.ip_address(address).version:
                    yield f"{_side(source, 'saddr')} tcp dport {{ {ports} }}"


def _sources(plane: ControlPlane, peer: Any, pods: list[Any]) -> list[str]:
    if "ipBlock" in peer:
        return [peer["ipBlock"]["cidr"]]
    spaces = {one["metadata"]["name"] for one in _items(plane, "namespaces") if _fits(peer["namespaceSelector"]["matchLabels"], one)}
    return _addresses(one for one in pods if one["metadata"]["namespace"] in spaces)


def _fits(labels: dict[str, str], one: Any) -> bool:
    return bool(labels.items() <= one["metadata"].get("labels", {}).items())


def _addresses(pods: Iterable[Any]) -> list[str]:
    return [each["ip"] for one in pods for each in one["status"].get("podIPs", ())]


def _side(address: str, side: str) -> str:
    return f"{'ip6' if ':' in address else 'ip'} {side} {address}"


def _items(plane: ControlPlane, kind: str, *where: str) -> list[Any]:
    found: list[Any] = json.loads(plane.kubectl("get", kind, *(where or ("-A",)), "-o", "json"))["items"]
    return found
