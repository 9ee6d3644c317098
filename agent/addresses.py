"""Addresses as the kernel tables hold them: 16 bytes in network order, IPv4 mapped to ::ffff:a.b.c.d (RFC 4291, 2.5.5.2)."""

from __future__ import annotations

import ipaddress
import socket

_MAPPED = bytes(10) + b"\xff\xff"


def packed(address: str) -> bytes:
    """16 bytes of a textual IPv4 or IPv6 address; ValueError if it is neither."""
    try:
        return socket.inet_pton(socket.AF_INET6, address) if ":" in address else _MAPPED + socket.inet_pton(socket.AF_INET, address)
    except OSError as error:
        raise ValueError(f"{address!r} is no IPv4 or IPv6 address") from error


def text(raw: bytes) -> str:
    """The textual form; "" for the all-zero address, which stands for "not known"."""
    if not any(raw):
        return ""
    if raw.startswith(_MAPPED):
        return str(ipaddress.IPv4Address(raw[12:]))
    return str(ipaddress.IPv6Address(raw))


def is_ipv4(raw: bytes) -> bool:
    """True for a mapped IPv4 address."""
    return raw.startswith(_MAPPED)


def endpoint(raw: bytes, port: int) -> str:
    """ADDRESS:PORT, with brackets for IPv6 (RFC 3986, 3.2.2); "" if the address is not known."""
    address = text(raw)
    if not address:
        return ""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
