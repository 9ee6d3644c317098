"""What somebody sees who listens on the wire between the lab's nodes: every frame, at every port of its bridge."""

from __future__ import annotations

import ipaddress
import select
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from agent.config import HBONE_PORT
from lab import netns, paths

# include/uapi/linux/if_packet.h and asm-generic/socket.h
_SOL_PACKET, _PACKET_STATISTICS, _SO_RCVBUFFORCE, _ETH_P_ALL = 263, 6, 33, 3
_BUFFER = 256 << 20
_PODS = tuple(map(ipaddress.ip_network, ("10.77.0.0/16", "fd77::/48")))
_WIRE = tuple(map(ipaddress.ip_network, ("10.77.255.0/24", "fd77:0:0:ff::/64")))


class Wire:
    """What was seen so far; complete when the block of `listening` has ended."""

    def __init__(self, marker: bytes) -> None:
        self._marker = marker
        self.marked = 0
        """Frames that contain the marker."""
        self.tunnelled = 0
        """TCP segments with data to or from the tunnels' port."""
        self.plain: Counter[tuple[str, int, str, int]] = Counter()
        """Other TCP segments with data between pods, by their ends."""

    def take(self, frame: bytes) -> None:
        """Look at one."""
        self.marked += self._marker in frame
        found = segment(frame)
        if found is None:
            return
        if HBONE_PORT in found[1::2]:
            self.tunnelled += 1
        elif all(_pod(address) for address in found[::2]):
            self.plain[found] += 1


def _pod(address: object) -> bool:
    ip = ipaddress.ip_address(str(address))
    return any(ip in network for network in _PODS) and not any(ip in network for network in _WIRE)


def segment(frame: bytes) -> tuple[str, int, str, int] | None:
    """Source, its port, destination and its port of a TCP segment that carries data; None for everything else."""
    kind = frame[12:14]
    if kind == b"\x08\x00":
        start, protocol, end = 14 + 4 * (frame[14] & 15), frame[23], 14 + struct.unpack("!H", frame[16:18])[0]
        ends = frame[26:30], frame[30:34]
    elif kind == b"\x86\xdd":
        start, protocol, end = 54, frame[20], 54 + struct.unpack("!H", frame[18:20])[0]
        ends = frame[22:38], frame[38:54]
    else:
        return None
    if protocol != socket.IPPROTO_TCP or start + 4 * (frame[start + 12] >> 4) >= end:
        return None
    source, destination = (str(ipaddress.ip_address(end)) for end in ends)
    ports = struct.unpack("!HH", frame[start : start + 4])
    return source, ports[0], destination, ports[1]


@contextmanager
def listening(marker: bytes = b"no such thing") -> Iterator[Wire]:
    """Listen within the block. A frame that was lost on the way to us is a failure: it could have been the one."""

    def opened() -> socket.socket:
        found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        found.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        return found

    wire, ended = Wire(marker), threading.Event()
    with netns.inside(paths.WIRE_NETNS, opened) as tap:

        def read() -> None:
            while True:
                last = ended.is_set()
                while select.select([tap], [], [], 0.0 if last else 0.05)[0]:
                    wire.take(tap.recv(1 << 18))
                if last:
                    return

        thread = threading.Thread(target=read, name="wire")
        thread.start()
        try:
            yield wire
        finally:
            ended.set()
            thread.join()
        dropped = struct.unpack("II", tap.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))[1]
    assert not dropped, f"{dropped} frames were not looked at"
