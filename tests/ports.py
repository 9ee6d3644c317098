"""Ports for servers that tests start."""

from __future__ import annotations

import itertools
import random
import socket

_ports = itertools.cycle(random.sample(range(20_000, 30_000), 10_000))
"""Below those that connections get by themselves (net.ipv4.ip_local_port_range) and those that Kubernetes gives to Services (--service-node-port-range): nobody
takes one between this choice and the server's bind()."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at any address, each of them another one than those given before, as long as there are such."""
    found: list[int] = []
    while len(found) < count:
        port = next(_ports)
        with socket.socket() as one:
            try:
                one.bind(("", port))
            except OSError:
                continue
        found.append(port)
    return found
