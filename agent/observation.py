"""What a node saw of a call whose caller is elsewhere, as it goes from node to node; and how far its clock is off.

One agent's `agent.receiving` makes observations, another one's `agent.joining` puts them into connections. They come from another machine, so `decode` believes
nothing: everything has a bound, text has no control characters, and which node speaks is known from whom was asked.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from agent.report import Hop
from meshapi.text import shown

LONGEST: Final = 16 << 10
"""Bytes of one document."""
_MOST_HOPS = 4
_KINDS = frozenset({"accept", "close", "denied", "tunnel", "handshake", "request"})
_HOPS = frozenset({"inbound", "app", "tunnel", "end"})
_DETAILS = frozenset(
    {
        "workload", "port", "verdict", "rule", "reason", "peer", "tls", "remote", "status", "flags", "details", "failure", "address", "sentBytes",
        "receivedBytes", "rttUs", "retransmits", "audited", "protocol",
    }
)  # fmt: skip
_MOST_NS = 1 << 63


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One fact. Addresses are ADDRESS:PORT ("" = none or not known); times in nanoseconds, `began_ns` in Unix time by the clock of `node`."""

    kind: str = "observation"
    of: str
    """"accept", "close" and "denied" are the kernel's of a connection; "tunnel", "handshake" and "request" the waypoint's."""
    node: str
    workload: str
    caller: str
    """The caller's own end of the connection, as its kernel knows it; "" of what came out of a tunnel of requests."""
    target: str
    """What was dialled, as the receiver knows it."""
    began_ns: int
    duration_ns: int = 0
    method: str = ""
    path: str = ""
    status: int = 0
    request_id: str = ""
    ended: bool = False
    """Of a tunnel: nothing follows."""
    outcome: str = ""
    """If it failed here: what the connection's outcome is then."""
    rule: str | None = None
    next_step: str | None = None
    hops: tuple[Hop, ...] = ()


@dataclass(frozen=True, slots=True)
class Clock:
    """How far another node's clock is ahead of this one's, and by how much that may be wrong: half of the round trip in which it was asked (as NTP)."""

    ahead_ns: int
    error_ns: int

    @staticmethod
    def of(asked_ns: int, told_ns: int, answered_ns: int) -> Clock:
        """`told_ns` is what the other clock said between two times of this one."""
        error = max(0, answered_ns - asked_ns + 1) // 2
        return Clock(told_ns - asked_ns - error, error)


def document(data: bytes) -> dict[str, Any]:
    """Decode a JSON object from another node. ValueError if it is none or too long."""
    if len(data) > LONGEST:
        raise ValueError(f"a document of {len(data)} bytes, at most {LONGEST} are read")
    try:
        found = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("not an object")  # noqa: TRY004  one error for whatever is not understood
    return found


def number(value: object) -> int:
    """A whole number of nanoseconds, bytes or the like, from another node. ValueError if it is none."""
    if not isinstance(value, int) or isinstance(value, bool) or not -_MOST_NS < value < _MOST_NS:
        raise ValueError("not a number in range")
    return value


def observed(found: dict[str, Any], node: str) -> Observation:
    """What `node` says that it saw. ValueError if it cannot be understood."""
    try:
        if found["kind"] != "observation" or found["of"] not in _KINDS or len(found["hops"]) > _MOST_HOPS:
            raise ValueError("not an observation")
        return Observation(
            of=found["of"],
            node=node,
            workload=_text(found["workload"]),
            caller=_text(found["caller"]),
            target=_text(found["target"]),
            began_ns=number(found["beganNs"]),
            duration_ns=max(0, number(found["durationNs"])),
            method=_text(found["method"]),
            path=_text(found["path"]),
            status=number(found["status"]),
            request_id=_text(found["requestId"]),
            ended=found["ended"] is True,
            outcome=_text(found["outcome"]),
            rule=_text(found["rule"]) if found["rule"] is not None else None,
            next_step=_text(found["nextStep"]) if found["nextStep"] is not None else None,
            hops=tuple(_hop(hop, node) for hop in found["hops"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("not an observation") from error


def _hop(found: dict[str, Any], node: str) -> Hop:
    if found["at"] not in _HOPS:
        raise ValueError("no such hop")
    detail = {key: _value(value) for key, value in found.items() if key in _DETAILS}
    return Hop(found["at"], node, max(0, number(found["durationNs"])), detail)


def _value(value: object) -> object:
    if isinstance(value, list):
        return [_text(item) for item in value[:16]]
    return _text(value) if isinstance(value, str) else number(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("not a text")  # noqa: TRY004
    return shown(value)
