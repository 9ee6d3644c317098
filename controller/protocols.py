"""What the ports of services speak. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

HTTP: Final = frozenset({"http", "http2", "h2c", "grpc", "grpc-web", "kubernetes.io/h2c", "kubernetes.io/ws"})
GRPC: Final = frozenset({"grpc", "h2c", "http2", "kubernetes.io/h2c"})
"""Of these a gRPC server speaks one: HTTP/2 without TLS."""
_NAMED: Final = ("grpc-web", "grpc", "http2", "https", "http", "h2c", "tls", "tcp", "mongo", "mysql", "redis")
"""Beginnings of a port's name that say what it speaks; a longer one before a shorter one that it begins with."""


def spoken(port: Mapping[str, Any]) -> str:
    """What a backend has to be spoken to in; "" if that is its caller's choice: the name `http` says nothing of HTTP's version."""
    protocol = declared(port)
    return "" if protocol == "http" and not port.get("appProtocol") else protocol


def declared(port: Mapping[str, Any]) -> str:
    """What a Service's port says: appProtocol, or else the first part of its name, as in Istio; "" if neither says anything.

    https://istio.io/latest/docs/ops/configuration/traffic-management/protocol-selection/
    """
    protocol: str = port.get("appProtocol", "")
    name: str = port.get("name", "")
    return protocol or next((known for known in _NAMED if name == known or name.startswith(f"{known}-")), "")
