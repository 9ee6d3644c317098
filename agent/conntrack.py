"""Has the node's connection tracking forget how it translated connections of pods that come into the mesh, and are over. Used by the supervisor.

Outside of the mesh kube-proxy turns a Service's address into an endpoint's, and Linux remembers that for two minutes after the end of a connection. In the mesh
a pod dials the endpoint itself. From the same port its connection would have the same answers as the one that is remembered, so Linux gives it another port
(net/netfilter/nf_nat_core.c, get_unique_tuple), under which the receiver's check does not know it: it is refused as `spoofed`.
Messages: include/uapi/linux/netfilter/nfnetlink_conntrack.h. Linux is asked for the connections of one caller after the other, and looks at all it has each
time; for many callers it lists all. So it does over IPv6: of an IPv6 caller it would list all that are not (ctnetlink_filter_match_tuple, as of Linux 6.18).
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Collection

from agent import netlink
from agent.netlink import NESTED, attribute, attributes

FEW = 16
"""Callers that Linux is asked about one by one."""
_NETLINK_NETFILTER = 12  # include/uapi/linux/netlink.h
_GET, _DELETE = 0x101, 0x102  # NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_*
_TUPLE, _STATUS, _PROTOINFO, _ID, _FILTER = 1, 3, 4, 12, 25  # CTA_*
_IP, _SOURCES = 1, {socket.AF_INET: 1, socket.AF_INET6: 3}  # CTA_TUPLE_IP, CTA_IP_V4_SRC, CTA_IP_V6_SRC
_OF_ORIGINAL, _BY_SOURCE = 1, 1  # CTA_FILTER_ORIG_FLAGS; CTA_FILTER_F_CTA_IP_SRC, net/netfilter/nf_conntrack_netlink.c
_TCP, _STATE = 1, 1  # CTA_PROTOINFO_*
_OVER = frozenset({7, 8})  # TCP_CONNTRACK_TIME_WAIT, TCP_CONNTRACK_CLOSE (include/uapi/linux/netfilter/nf_conntrack_tcp.h)
_DST_NAT = 1 << 5  # IPS_DST_NAT (include/uapi/linux/netfilter/nf_conntrack_common.h)
_HEADER, _NUMBER, _FLAGS = struct.Struct("=BBH"), struct.Struct("!I"), struct.Struct("=I")


def forget_translated(callers: Collection[str]) -> int:
    """Forget the connections of these addresses that are over and went to a translated one; returns how many those were.

    Of this process's network namespace. None where the kernel tracks no connections. Raises OSError.
    """
    wanted = {ipaddress.ip_address(one).packed for one in callers}
    few = len(wanted) <= FEW
    questions = {(_family(one), _of(one) if few and _family(one) == socket.AF_INET else b"") for one in wanted}
    forgotten = 0
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as asked:
        for family, only in questions:
            header = _HEADER.pack(family, 0, 0)
            try:
                found = netlink.exchange(asked, "list tracked connections", _GET, netlink.DUMP, header + only)
                over = [name for start, end, buffer in found if (name := _over(bytes(buffer[start + _HEADER.size : end]), wanted))]
            except OSError as error:
                if error.errno in {errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT}:  # without nf_conntrack_netlink
                    return forgotten
                raise
            for name in over:
                forgotten += _delete(asked, header + name)
    return forgotten


def _family(address: bytes) -> socket.AddressFamily:
    return socket.AF_INET if len(address) == 4 else socket.AF_INET6


def _of(caller: bytes) -> bytes:
    """What has Linux list the connections of one IPv4 caller only."""
    source = attribute(_IP | NESTED, attribute(_SOURCES[socket.AF_INET], caller))
    return attribute(_TUPLE | NESTED, source) + attribute(_FILTER | NESTED, attribute(_OF_ORIGINAL, _FLAGS.pack(_BY_SOURCE)))


def _over(message: bytes, wanted: Collection[bytes]) -> bytes:
    """The attributes that name a connection, if it is one of those; else b""."""
    found = attributes(message)
    if _STATUS not in found or _PROTOINFO not in found or not _NUMBER.unpack(found[_STATUS])[0] & _DST_NAT:
        return b""
    state = attributes(attributes(found[_PROTOINFO]).get(_TCP, b"")).get(_STATE, b"\0")
    addresses = attributes(attributes(found[_TUPLE]).get(_IP, b""))
    if state[0] not in _OVER or not any(addresses.get(one) in wanted for one in _SOURCES.values()):
        return b""
    return attribute(_TUPLE | NESTED, found[_TUPLE]) + attribute(_ID, found[_ID])


def _delete(asked: socket.socket, request: bytes) -> bool:
    try:
        for _ in netlink.exchange(asked, "forget a tracked connection", _DELETE, netlink.ACK, request):
            pass
    except OSError as error:
        if error.errno == errno.ENOENT:  # it was forgotten meanwhile
            return False
        raise
    return True
