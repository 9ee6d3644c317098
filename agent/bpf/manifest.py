"""What the loader says about the programs and records it pinned, and the codecs built from it.

C is the only definition of every layout. The Python enums below are for readers and type checkers; `Manifest.read` compares them with the source that
was compiled and refuses to go on if they differ.
"""

from __future__ import annotations

import enum
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.errors import LayoutMismatch


class Verdict(enum.IntEnum):
    """enum mesh_verdict."""

    NONE = 0
    ALLOW = 1
    DENY = 2
    WAYPOINT = 3


class Reason(enum.IntEnum):
    """enum mesh_reason."""

    NONE = 0
    POLICY = 1
    NO_ENTRY = 2
    NO_BACKEND = 3
    SPOOFED = 4
    NO_LISTENER = 5
    WAYPOINT_PORT = 6
    UNKNOWN_ADDRESS = 7
    NO_PORT = 8
    AUDIT = 9
    PLAINTEXT = 10
    NO_TUNNEL = 11
    FAIL_OPEN = 12
    EGRESS = 13
    PROBE = 14


class Direction(enum.IntEnum):
    """enum mesh_direction, without the prefix MESH_ only."""

    OUTBOUND = 0
    INBOUND = 1
    FROM_WAYPOINT = 2


class Redirect(enum.IntEnum):
    """enum mesh_redirect."""

    NONE = 0
    WAYPOINT = 1
    TUNNEL = 2


class EventKind(enum.IntEnum):
    """enum mesh_event_kind."""

    DENIED = 0
    CONNECT = 1
    ESTABLISHED = 2
    CLOSED = 3
    AUDITED = 4
    HELD = 5


class Close(enum.IntEnum):
    """enum mesh_close."""

    NORMAL = 0
    RESET = 1
    FAILED = 2
    REFUSED = 3
    TIMED_OUT = 4
    MAX = 5


class Counter(enum.IntEnum):
    """enum mesh_counter."""

    EVENT_DROPPED = 0
    EVENT_SUPPRESSED = 1
    STATS_FOLDED = 2
    STORAGE_FAILED = 3
    FLOW_FAILED = 4
    ORIGDST_FAILED = 5
    LISTENER_FAILED = 6
    VERDICT_FOLDED = 7
    REVERSE_FAILED = 8
    LOAD_FAILED = 9
    KERNEL_SOCKET = 10
    FAIL_OPEN = 11
    EVENT_UNLOGGED = 12
    SOCKET_HELD = 13
    SANDBOX_REFUSED = 14
    MAX = 15


_ENUMS: dict[str, tuple[str, type[enum.IntEnum]]] = {
    "mesh_verdict": ("MESH_VERDICT_", Verdict),
    "mesh_reason": ("MESH_REASON_", Reason),
    "mesh_direction": ("MESH_", Direction),
    "mesh_redirect": ("MESH_REDIRECT_", Redirect),
    "mesh_event_kind": ("MESH_EVENT_", EventKind),
    "mesh_close": ("MESH_CLOSE_", Close),
    "mesh_counter": ("MESH_COUNT_", Counter),
}

STATS_TUNNELLED = 128  # MESH_STATS_TUNNELLED
WORKLOAD_ENFORCE_INBOUND = 1  # MESH_WORKLOAD_ENFORCE_INBOUND
WORKLOAD_ACCELERATE = 2  # MESH_WORKLOAD_ACCELERATE
WORKLOAD_TUNNEL = 4  # MESH_WORKLOAD_TUNNEL
WORKLOAD_STRICT = 8  # MESH_WORKLOAD_STRICT
WORKLOAD_MTLS_PORTS = 16  # MESH_WORKLOAD_MTLS_PORTS
WORKLOAD_EGRESS_DENY = 32  # MESH_WORKLOAD_EGRESS_DENY
WORKLOAD_LOGGED = 64  # MESH_WORKLOAD_LOGGED
WORKLOAD_PROBED = 128  # MESH_WORKLOAD_PROBED
KUBELET_ANY = 0xFFFFFFFF  # MESH_KUBELET_ANY
SERVICE_WAYPOINT = 1  # MESH_SERVICE_WAYPOINT
SERVICE_LEAST = 2  # MESH_SERVICE_LEAST
SERVICE_STICKY = 4  # MESH_SERVICE_STICKY
SERVICE_FAIL_OPEN = 8  # MESH_SERVICE_FAIL_OPEN
SERVICE_STREAM = 16  # MESH_SERVICE_STREAM
RESOLVER_ALLOWED = 1 << 63  # MESH_RESOLVER_ALLOWED
IDENTITY_UNKNOWN = 0  # MESH_IDENTITY_UNKNOWN
IDENTITY_ANY = 0xFFFFFFFF  # MESH_IDENTITY_ANY
IDENTITY_NOBODY = 0xFFFFFFFE  # MESH_IDENTITY_NOBODY
POLICY_CLOSED = 0xFFFFFFFF  # MESH_POLICY_CLOSED
BUCKETS = 16  # MESH_BUCKETS
BUCKET_SHIFT = 14  # MESH_BUCKET_SHIFT


@dataclass(frozen=True, slots=True)
class Program:
    """One program: `kind` and `type_number` as in enum bpf_prog_type, `where` says what it is attached to."""

    name: str
    kind: str
    type_number: int
    attach_type: str
    where: str


PROGRAMS = (
    Program("mesh_connect4", "cgroup_sock_addr", 18, "cgroup_inet4_connect", "node"),
    Program("mesh_connect6", "cgroup_sock_addr", 18, "cgroup_inet6_connect", "node"),
    Program("mesh_sendmsg4", "cgroup_sock_addr", 18, "cgroup_udp4_sendmsg", "node"),
    Program("mesh_sendmsg6", "cgroup_sock_addr", 18, "cgroup_udp6_sendmsg", "node"),
    Program("mesh_recvmsg4", "cgroup_sock_addr", 18, "cgroup_udp4_recvmsg", "node"),
    Program("mesh_recvmsg6", "cgroup_sock_addr", 18, "cgroup_udp6_recvmsg", "node"),
    Program("mesh_getpeername4", "cgroup_sock_addr", 18, "cgroup_inet4_getpeername", "node"),
    Program("mesh_getpeername6", "cgroup_sock_addr", 18, "cgroup_inet6_getpeername", "node"),
    Program("mesh_sockops", "sock_ops", 13, "cgroup_sock_ops", "node"),
    Program("mesh_sysctl", "cgroup_sysctl", 23, "cgroup_sysctl", "node"),
    Program("mesh_socket", "cgroup_sock", 9, "cgroup_inet_sock_create", "node"),
    Program("mesh_listen", "sock_ops", 13, "cgroup_sock_ops", "waypoint"),
    Program("mesh_getsockopt", "cgroup_sockopt", 25, "cgroup_getsockopt", "waypoint"),
    Program("mesh_sk_msg", "sk_msg", 16, "sk_msg_verdict", "peers"),
    Program("mesh_setsockopt", "cgroup_sockopt", 25, "cgroup_setsockopt", "accelerated"),
    Program("mesh_selftest", "sock_ops", 13, "cgroup_sock_ops", "selftest"),
    Program("mesh_sk_lookup", "sk_lookup", 30, "sk_lookup", "namespace"),
)

HOOKED = tuple(p for p in PROGRAMS if p.where in {"node", "waypoint", "namespace"})
"""Those that must be in force on every node; the others belong to acceleration."""

Value = int | bytes | tuple[int, ...]


class Codec:
    """Packs and unpacks one record. Integers are host order, addresses are 16 bytes in network order."""

    def __init__(self, fields: list[list[Any]], size: int) -> None:
        """`fields` are [name, offset in bytes, struct format]; padding is zero."""
        self.size = size
        self.fields: tuple[tuple[str, int, str], ...] = tuple((str(name), int(offset), str(form)) for name, offset, form in fields)
        self._fields = [(str(name), int(offset), struct.Struct("=" + form)) for name, offset, form in fields]

    def pack(self, **values: int | bytes | tuple[int, ...]) -> bytes:
        """Bytes of a record; members that are not named are zero, unknown names are a KeyError."""
        record = bytearray(self.size)
        for name, offset, form in self._fields:
            value = values.pop(name, None)
            if value is None:
                continue
            form.pack_into(record, offset, *(value if isinstance(value, tuple) else (value,)))
        if values:
            raise KeyError(f"no such member: {', '.join(values)}")
        return bytes(record)

    def packer(self, *names: str) -> Callable[..., bytes]:
        """A quicker `pack` for the members named, given by position; they must stand in the order of their offsets, arrays item by item."""
        return self._struct(names).pack

    def unpacker(self, *names: str) -> Callable[..., tuple[Any, ...]]:
        """A quicker `unpack` for the members named, in the order of their offsets, arrays item by item: called with a buffer and the record's place in it."""
        return self._struct(names).unpack_from

    def _struct(self, names: tuple[str, ...]) -> struct.Struct:
        form, end = "=", 0
        chosen = [field for field in self._fields if field[0] in names]
        if tuple(field[0] for field in chosen) != names:
            raise LayoutMismatch(
                f"members {', '.join(names)} are not laid out in this order: {', '.join(field[0] for field in self._fields)}"
            )
        for _, offset, member in chosen:
            form += f"{offset - end}x{member.format[1:]}"
            end = offset + member.size
        return struct.Struct(f"{form}{self.size - end}x")

    def unpack(self, record: bytes) -> dict[str, Any]:
        """Members by name; arrays are tuples. A wrong size is a LayoutMismatch."""
        if len(record) != self.size:
            raise LayoutMismatch(f"a record has {len(record)} bytes where the programs say {self.size}: agent and pinned programs differ")
        found: dict[str, Any] = {}
        for name, offset, form in self._fields:
            value = form.unpack_from(record, offset)
            found[name] = value[0] if len(value) == 1 else value
        return found


@dataclass(frozen=True, slots=True)
class MapLayout:
    """Codecs of a map's key and of its value on one CPU."""

    key: Codec
    value: Codec


FORMAT = 1
"""Of what an agent leaves in pins for the next one. To be raised when an older agent must not take over: programs that it does not know, and would take away,
enforce something, or a map that both know means something else. What is only laid out in another way is carried over, there and back (agent.bpf.migrate)."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """`layout` and `programs` name the pin directories."""

    layout: str
    programs: str
    maps: Mapping[str, MapLayout]
    documents: Mapping[str, Any]
    """What the loader wrote of each map: more than its layout, for those who compare two (agent.bpf.migrate)."""

    @staticmethod
    def read(path: Path, *, own: bool = True) -> Manifest:
        """Read what the loader wrote. Raises LayoutMismatch if its format is newer than FORMAT, or if the enums of this agent are not those that were compiled,
        unless it is not its `own`; OSError, ValueError, KeyError or TypeError if it is no manifest."""
        document = json.loads(path.read_text())
        if not isinstance(document, dict):
            raise TypeError("no JSON object")
        if (form := document.get("format", 0)) > FORMAT:  # the loaders of the first versions wrote none
            raise LayoutMismatch(f"format {form} is newer than {FORMAT}, the newest that this version knows")
        for name, (prefix, kind) in _ENUMS.items() if own else ():
            compiled = {k.removeprefix(prefix): v for k, v in document["enums"][name].items()}
            expected = {member.name: member.value for member in kind}
            if compiled != expected:
                raise LayoutMismatch(f"enum {name}: the programs say {compiled}, this agent {expected}: install matching bpf_src and agent")
        maps = {name: MapLayout(Codec(m["key"], m["key_size"]), Codec(m["value"], m["value_size"])) for name, m in document["maps"].items()}
        return Manifest(document["layout"], document["programs"], maps, document["maps"])
