"""The living TCP connections of a network namespace, each with the kernel's own counters and the record that the programs keep on its socket.

One question over NETLINK_SOCK_DIAG answers all of it (sock_diag(7); net/ipv4/inet_diag.c; the records: net/core/bpf_sk_storage.c, since Linux 5.7), so
that counting what lives costs the data path nothing. Closing a connection from outside goes the same way (tcp_abort in net/ipv4/tcp.c).
A namespace that is going away, or whose mount is gone, has no connections here; whoever must know that nothing was looked at asks `agent.netns`.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from agent import addresses, netlink, netns
from agent.bpf.manifest import Direction
from agent.bpf.maps import Map
from agent.errors import KernelRefused

_NETLINK_SOCK_DIAG = 4  # include/uapi/linux/netlink.h
_SOCK_DIAG_BY_FAMILY, _SOCK_DESTROY = 20, 21  # include/uapi/linux/sock_diag.h
_SK_DIAG_BPF_STORAGE_REQ_MAP_FD = 1
_SK_DIAG_BPF_STORAGE_MAP_VALUE = 3
_INET_DIAG_REQ_SK_BPF_STORAGES = 2  # include/uapi/linux/inet_diag.h
_INET_DIAG_INFO, _INET_DIAG_MARK, _INET_DIAG_SK_BPF_STORAGES, _INET_DIAG_CGROUP_ID = 2, 15, 20, 21

_REQUEST = struct.Struct("=BBBxI48s")  # struct inet_diag_req_v2: family, protocol, extensions, states, id
_ATTRIBUTE = struct.Struct("=HH")
_MARK, _CGROUP = struct.Struct("=I"), struct.Struct("=Q")
_ENDS = struct.Struct("=BB2x48s")  # of struct inet_diag_msg: family, state, timer, retransmits, id
_ID = struct.Struct("!HH16s16s")  # of struct inet_diag_sockid: ports, addresses, then interface and cookie
_COOKIE = struct.Struct("=40xII")
_MESSAGE = 72  # sizeof(struct inet_diag_msg)
# Of struct tcp_info (include/uapi/linux/tcp.h): tcpi_rtt, tcpi_total_retrans, tcpi_bytes_acked, tcpi_bytes_received.
_INFO = struct.Struct("=68xI28xI16xQQ")
_PAIR_END = 12  # offsetof(struct mesh_pair_key, end); a byte of it is enough
_MAPPED = bytes(10) + b"\xff\xff"
_GONE = frozenset({errno.ENOENT, errno.EINVAL})  # no such file; setns(2) of a file that is no namespace (any more)

T = TypeVar("T")

# include/net/tcp_states.h
ESTABLISHED, SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING = 1, 2, 4, 5, 8, 9, 10, 11
_STATES = sum(1 << s for s in (ESTABLISHED, SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING))
_FIN_RECEIVED = frozenset({CLOSE_WAIT, LAST_ACK, CLOSING})


class Record(NamedTuple):
    """What the programs know of a connection: members of struct mesh_sock, in its order."""

    start_ns: int
    established_ns: int
    source: int
    target: int
    service: int
    rule: int
    dialled_port: int
    origdst_port: int
    direction: int
    verdict: int
    redirected: int
    protocol: int
    accelerated: int
    probe: int = 0


NO_RECORD = Record._make([0] * len(Record._fields))


class LiveSocket(NamedTuple):
    """One end of a connection that is not closed yet. Bytes are payload: what SYN and FIN add is taken off, as bpf_src/mesh_sockops.c does at the end."""

    family: int
    state: int
    ident: bytes
    """struct inet_diag_sockid: names this socket to the kernel."""
    sent_bytes: int
    received_bytes: int
    retransmits: int
    rtt_us: int
    record: Record
    mark: int = 0
    """SO_MARK."""
    cgroup: int = 0
    """Inode of the cgroup in which it was made or, at the receiver, its listener was."""

    @property
    def established(self) -> bool:
        """True from the end of the handshake on."""
        return bool(self.record.established_ns)

    @property
    def cookie(self) -> int:
        """The socket's cookie: not used again before the next boot (net/core/sock_diag.c)."""
        low, high = _COOKIE.unpack(self.ident)
        return int(high << 32 | low)

    @property
    def ends(self) -> tuple[tuple[bytes, int], tuple[bytes, int]]:
        """(address as in `agent.addresses`, port) of this end and of the other."""
        local_port, remote_port, local, remote = _ID.unpack_from(self.ident)
        if self.family == socket.AF_INET:
            local, remote = _MAPPED + local[:4], _MAPPED + remote[:4]
        return (local, local_port), (remote, remote_port)

    def __str__(self) -> str:
        """LOCAL -> REMOTE or, at the receiver, LOCAL <- REMOTE."""
        local, remote = (addresses.endpoint(*end) for end in self.ends)
        return f"{local} {'<-' if self.record.direction == Direction.INBOUND else '->'} {remote}"


class Sockets:
    """Looks into namespaces. Thread-safe: keeps nothing but the maps and the shape of their records.

    Keeps no netlink socket either: one would keep its namespace alive when the pod is long gone.
    """

    def __init__(self, maps: Mapping[str, Map]) -> None:
        """Of the open maps: mesh_sock, and for accelerated connections mesh_joined and mesh_pair."""
        self._pairs = maps["mesh_pair"]
        codec, joined = maps["mesh_sock"].layout.value, maps["mesh_joined"].layout.value
        self._size, self._joined_size = codec.size, joined.size  # they tell the two apart: no two records of ours are of one size
        self._record = codec.unpacker(*Record._fields)
        self._own = joined.unpacker("key")
        self._bytes = self._pairs.layout.value.unpacker("bytes")
        wanted = b"".join(
            netlink.attribute(_SK_DIAG_BPF_STORAGE_REQ_MAP_FD, struct.pack("=I", maps[n].fd)) for n in ("mesh_sock", "mesh_joined")
        )
        self._wanted = netlink.attribute(_INET_DIAG_REQ_SK_BPF_STORAGES | netlink.NESTED, wanted)

    def dump(self, namespace: Path) -> Iterator[LiveSocket]:
        """The connections in `namespace` that have a record: those that the mesh has seen begin. Raises OSError.

        Each is described as it is at some moment while this runs. One that begins or ends meanwhile may be missing.
        """
        return (found for found in self._ask(namespace, _STATES) if found.record is not NO_RECORD)

    def older(self, namespace: Path, waypoint: int) -> Iterator[tuple[LiveSocket, bool]]:
        """The connections in `namespace` that have none: they began before it was in the mesh; True with those that came in. Raises OSError.

        `waypoint` is the inode of Envoy's cgroup: its connections, and the applications' ends of those, are left out.
        """
        found = list(self._ask(namespace, _STATES | 1 << LISTEN))
        listening = {one.ends[0][1] for one in found if one.state == LISTEN}
        own = {one.ends[::-1] for one in found if waypoint and one.cgroup == waypoint}
        for one in found:
            if one.record is NO_RECORD and one.state != LISTEN and one.cgroup != waypoint and one.ends not in own:
                yield one, one.ends[0][1] in listening

    def _ask(self, namespace: Path, states: int) -> Iterator[LiveSocket]:
        diag = _open(namespace)
        if diag is None:
            return
        with diag:
            for family in (socket.AF_INET, socket.AF_INET6):
                request = _REQUEST.pack(family, socket.IPPROTO_TCP, 1 << (_INET_DIAG_INFO - 1), states, bytes(48)) + self._wanted
                for start, end, buffer in netlink.exchange(diag, "list connections", _SOCK_DIAG_BY_FAMILY, netlink.DUMP, request):
                    yield self._parse(buffer, start, end)

    def _parse(self, buffer: memoryview, start: int, end: int) -> LiveSocket:
        info = record = joined = mark = cgroup = 0
        at = start + _MESSAGE
        while at < end:
            length, kind = _ATTRIBUTE.unpack_from(buffer, at)
            kind &= netlink.KIND
            if kind == _INET_DIAG_INFO:
                info = at + 4
            elif kind == _INET_DIAG_SK_BPF_STORAGES:
                record, joined = _values(buffer, at + 4, at + length, self._size, self._joined_size)
            elif kind == _INET_DIAG_MARK:
                (mark,) = _MARK.unpack_from(buffer, at + 4)
            elif kind == _INET_DIAG_CGROUP_ID:
                (cgroup,) = _CGROUP.unpack_from(buffer, at + 4)
            at += (length + 3) & ~3
        family, state, ident = _ENDS.unpack_from(buffer, start)
        if not record or not info:
            return LiveSocket(family, state, ident, 0, 0, 0, 0, NO_RECORD, mark, cgroup)
        rtt, retransmits, acked, received = _INFO.unpack_from(buffer, info)
        known = Record._make(self._record(buffer, record))
        sent = acked - (known.direction != Direction.INBOUND) - (state == FIN_WAIT2) if known.established_ns else 0
        received -= state in _FIN_RECEIVED
        if joined and known.accelerated:
            redirected = self._redirected(bytes(self._own(buffer, joined)[0]))
            sent, received = sent + redirected[0], received + redirected[1]
        return LiveSocket(family, state, ident, max(sent, 0), max(received, 0), retransmits, rtt, known, mark, cgroup)

    def _redirected(self, own: bytes) -> tuple[int, int]:
        """Bytes sent and received past TCP, which its own counters do not hold; `own` is a struct mesh_pair_key."""
        end = own[_PAIR_END]
        rows = self._pairs.get(own[:_PAIR_END] + bytes(len(own) - _PAIR_END))  # the pair's own key has the caller's end, which is 0
        if not rows:
            return 0, 0
        counts = self._bytes(rows[0])
        return counts[end], counts[1 - end]

    @staticmethod
    def destroy(namespace: Path, found: Collection[tuple[LiveSocket, T]]) -> Iterator[tuple[LiveSocket, T]]:
        """Close connections in `namespace`: those of `found` that were closed, each with what stands beside it, and none that has ended by itself.

        The application gets ECONNABORTED, the other end a reset. Raises OSError and, after all of them, KernelRefused if one cannot be closed.
        """
        diag = _open(namespace) if found else None
        if diag is None:
            return
        refused: KernelRefused | None = None
        with diag:
            for one in found:
                try:
                    if _destroy(diag, one[0]):
                        yield one
                except KernelRefused as error:
                    refused = error
        if refused is not None:
            raise refused


CANNOT_DESTROY = "this kernel cannot close connections from outside (CONFIG_INET_DIAG_DESTROY is not set)"


def _destroy(diag: socket.socket, found: LiveSocket) -> bool:
    """Close one connection; False if it has ended by itself. Raises KernelRefused if the kernel cannot do this."""
    request = _REQUEST.pack(found.family, socket.IPPROTO_TCP, 0, 0xFFFFFFFF, found.ident)
    try:
        for _ in netlink.exchange(diag, f"close connection {found}", _SOCK_DESTROY, netlink.ACK, request):
            pass
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        if error.errno == errno.EOPNOTSUPP:
            raise KernelRefused(CANNOT_DESTROY) from error
        raise KernelRefused(f"the kernel refuses to {error.strerror}") from error
    return True


def _open(namespace: Path) -> socket.socket | None:
    """A socket that looks into a namespace, to be closed soon: it keeps that alive. None if the namespace is going away."""

    def inside() -> socket.socket:  # a netlink socket belongs to the namespace in which it was made
        return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)

    try:
        return netns.run_in(namespace, inside)
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise


def _values(buffer: memoryview, at: int, end: int, *sizes: int) -> list[int]:
    """Where the value of each of these sizes begins among the records of a socket; 0 if it has none."""
    found = [0] * len(sizes)
    while at < end:
        length = _ATTRIBUTE.unpack_from(buffer, at)[0]
        inner, stop = at + 4, at + length  # SK_DIAG_BPF_STORAGE: map id, perhaps padding, value
        while inner < stop:
            size, kind = _ATTRIBUTE.unpack_from(buffer, inner)
            if kind & netlink.KIND == _SK_DIAG_BPF_STORAGE_MAP_VALUE and size - 4 in sizes:
                found[sizes.index(size - 4)] = inner + 4
            inner += (size + 3) & ~3
        at += (length + 3) & ~3
    return found
