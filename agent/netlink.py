"""One question over a netlink socket and its answer (netlink(7)), and attributes (struct nlattr), without pyroute2: that takes eight times as long."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

ACK, DUMP = 0x4, 0x300  # NLM_F_*, include/uapi/linux/netlink.h, as all NLM* here
_NLM_F_REQUEST = 0x1
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
NESTED, KIND = 0x8000, 0x3FFF  # NLA_F_NESTED, NLA_TYPE_MASK

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length with this, type
_BUFFER = 64 << 10  # the kernel fills at most 32 KiB at a time (net/netlink/af_netlink.c, netlink_dump)


def exchange(netlink: socket.socket, what: str, kind: int, flags: int, request: bytes) -> Iterator[tuple[int, int, memoryview]]:
    """(start, end, buffer) of the body of each message of the answer; the buffer is used again for the next ones.

    Raises OSError for a refusal, with `what` was asked for in its text.
    """
    netlink.send(_HEADER.pack(_HEADER.size + len(request), kind, _NLM_F_REQUEST | flags, 1, 0) + request)
    buffer = memoryview(bytearray(_BUFFER))
    while True:
        size = netlink.recv_into(buffer)
        at = 0
        while at < size:
            length, found, _, _, _ = _HEADER.unpack_from(buffer, at)
            if found in {_NLMSG_DONE, _NLMSG_ERROR}:
                code = -struct.unpack_from("=i", buffer, at + _HEADER.size)[0] if length >= _HEADER.size + 4 else 0
                if code:
                    raise OSError(code, f"{what}: {os.strerror(code)}")
                return
            yield at + _HEADER.size, at + length, buffer
            at += (length + 3) & ~3


def attribute(kind: int, body: bytes) -> bytes:
    """An attribute to ask with, padded to four bytes."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(body), kind) + body + bytes(-len(body) % 4)


def attributes(message: bytes, at: int = 0) -> dict[int, bytes]:
    """The attributes from `at` on, by their kind without flags; of several of one kind the last."""
    found = {}
    while at + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind & KIND] = message[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return found
