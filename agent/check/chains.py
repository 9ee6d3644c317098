"""Names of the packet filter's chains in the calling thread's network namespace: nf_tables over netlink, the older xtables where they are in use.

Without the programs nft and iptables, which the agent's image does not have. iptables-nft writes the former, iptables-legacy the latter.
"""

from __future__ import annotations

import ctypes as ct
import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from agent import netlink

_NETLINK_NETFILTER: Final = 12  # include/uapi/linux/netlink.h
_GETCHAIN: Final = 10 << 8 | 4  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETCHAIN: include/uapi/linux/netfilter/nfnetlink.h, nf_tables.h
_TABLE, _NAME = 1, 3  # NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME
_NO_NF_TABLES: Final = {errno.EINVAL, errno.EPROTONOSUPPORT, errno.EOPNOTSUPP}
_ANSWER_S: Final = 5.0
_GET_INFO, _GET_ENTRIES = 64, 65  # IPT_SO_* and IP6T_SO_*: include/uapi/linux/netfilter_ipv4/ip_tables.h, netfilter_ipv6/ip6_tables.h
_INFO: Final = struct.Struct("=32sI5I5III")  # struct ipt_getinfo, ip6t_getinfo; the last is the size of the entries
_ENTRIES: Final = struct.Struct("=32sI4x")  # struct ipt_get_entries, ip6t_get_entries
_MOST_BYTES: Final = 64 << 20


class _Family(NamedTuple):
    names: str
    family: int
    level: int
    offset: int
    """Of target_offset and next_offset in struct ipt_entry or ip6t_entry."""


IPV4: Final = _Family("ip_tables_names", socket.AF_INET, socket.IPPROTO_IP, 88)
IPV6: Final = _Family("ip6_tables_names", socket.AF_INET6, socket.IPPROTO_IPV6, 140)
Chain = tuple[str, str]
"""(table, chain)."""


def here() -> set[Chain]:
    """Every chain that somebody named. Raises OSError if the kernel does not let this process ask."""
    return {*_nf_tables(), *_xtables()}


def _nf_tables() -> Iterator[Chain]:
    request = struct.pack("=BBH", socket.AF_UNSPEC, 0, 0)  # struct nfgenmsg
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as asked:
            asked.settimeout(_ANSWER_S)
            asked.bind((0, 0))
            for start, end, buffer in netlink.exchange(asked, "list the chains of nf_tables", _GETCHAIN, netlink.DUMP, request):
                yield _chain(bytes(buffer[start + len(request) : end]))
    except OSError as error:
        if error.errno not in _NO_NF_TABLES:  # else this kernel has none
            raise


def _chain(attributes: bytes) -> Chain:
    found = netlink.attributes(attributes)
    return _text(found.get(_TABLE, b"")), _text(found.get(_NAME, b""))


def _xtables() -> Iterator[Chain]:
    for family in (IPV4, IPV6):
        try:
            tables = Path("/proc/thread-self/net", family.names).read_text().split()
        except OSError:
            continue  # this kernel has none
        for table in tables:  # one that is asked for and not there would be made
            for chain in names_of(_entries(family, table), family.offset):
                yield table, chain


def _entries(family: _Family, table: str) -> bytes:
    with socket.socket(family.family, socket.SOCK_DGRAM) as asked:  # any will do; a raw one, as iptables has it, needs CAP_NET_RAW
        info = _option(asked, family.level, _GET_INFO, table.encode().ljust(_INFO.size, b"\0"))
        size = _INFO.unpack(info)[-1]
        if size > _MOST_BYTES:
            raise OSError(errno.EFBIG, f"read table {table}: it has {size} bytes")
        head = _ENTRIES.pack(table.encode(), size)
        return _option(asked, family.level, _GET_ENTRIES, head + bytes(size))[len(head) :]


def _option(asked: socket.socket, level: int, option: int, request: bytes) -> bytes:
    """getsockopt(2) with more than the 1024 bytes that Python's takes, and with what is asked for in the buffer."""
    buffer = ct.create_string_buffer(request, len(request))
    length = ct.c_uint32(len(request))
    if ct.CDLL(None, use_errno=True).getsockopt(asked.fileno(), level, option, buffer, ct.byref(length)):
        code = ct.get_errno()
        raise OSError(code, f"read a table of the packet filter: {os.strerror(code)}")
    return buffer.raw[: length.value]


def names_of(entries: bytes, offset: int) -> Iterator[str]:
    """Chains in the rules of a table: each begins with a rule whose target is "ERROR", with the chain's name (struct xt_error_target)."""
    at = 0
    while at + offset + 4 <= len(entries):
        target, following = struct.unpack_from("=HH", entries, at + offset)
        begin = at + target
        if begin + 62 > len(entries):
            return
        if _text(entries[begin + 2 : begin + 31]) == "ERROR":
            name = _text(entries[begin + 32 : begin + 62])
            if name != "ERROR":  # which ends the table
                yield name
        if following < offset:
            return
        at += following


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode(errors="replace")
