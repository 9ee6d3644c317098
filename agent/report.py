"""The JSON that the command line prints: the one definition of its shape.

Filled by the supervisor and the tracer, passed as bytes through the agent's socket, printed as it is or laid out as text by `agent.cli`. Field names
become camelCase in JSON.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class HookStatus:
    """A kernel program: attached by a link of ours, and among those that the kernel really runs."""

    name: str
    attached: bool
    effective: bool


@dataclass(frozen=True, slots=True)
class WaypointStatus:
    """Envoy. `nacks` counts resources that it refused since the agent started; of `rejected` it runs on the version before.

    `last_nack`: resource and reason of the latest refusal, or "". `sent`: resources that went to it, by type. `pushes`: how often it then had everything;
    `pushed_seconds`: how long all of these took, `last_push_seconds`: the last one. `resident_bytes`: its memory, None if it does not run.
    """

    ready: bool
    version: str
    pid: int | None
    nacks: int
    rejected: int = 0
    last_nack: str = ""
    sent: dict[str, int] = field(default_factory=dict)
    pushes: int = 0
    pushed_seconds: float = 0.0
    last_push_seconds: float = 0.0
    resident_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ControllerStatus:
    """`version` is the model's in force; `lag_seconds` is from the last source change to its effect here, None before the first."""

    connected: bool
    version: str
    lag_seconds: float | None


@dataclass(frozen=True, slots=True)
class WorkloadStatus:
    """A workload of this node. `redirected`: its namespace is known to the kernel and linked, and the programs run for all of its processes; `drift`: it
    should be redirected and is not; `identity`: SPIFFE ID, "" if not enrolled.
    """

    namespace: str
    name: str
    enrolled: bool
    redirected: bool
    identity: str
    drift: bool = False


@dataclass(frozen=True, slots=True)
class ForeignProgram:
    """Somebody else's program that the kernel runs at a hook that ours use, in cgroup `place`. It is left alone."""

    id: int
    name: str
    attach_type: str
    place: str


@dataclass(frozen=True, slots=True)
class ProbeStatus:
    """The last live probe. `works`: the kernel programs refused what they have to; None: not known. `age_seconds`: None before the first."""

    works: bool | None = None
    age_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class AccelerationStatus:
    """Workloads whose connections within the node bypass TCP, and the checks that this kernel fails; both empty as long as nobody asks."""

    workloads: tuple[str, ...] = ()
    failing_checks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CertificateStatus:
    """One certificate. Times: Unix seconds, None if there is none; `serial`: hexadecimal digits; `chain`: PEM, leaf first, only where it was asked for.

    `workload` is NAMESPACE/NAME, "" for the node's own. `problem`: why there is none, or no newer one; "" if all is well. `authority`: the subject of what
    signs it, whose end it does not outlive; "" and None if that is not known.
    """

    workload: str
    spiffe_id: str
    serial: str = ""
    not_before: float | None = None
    expires_at: float | None = None
    renews_at: float | None = None
    problem: str = ""
    chain: tuple[str, ...] = ()
    authority: str = ""
    authority_begins_at: float | None = None
    authority_ends_at: float | None = None


@dataclass(frozen=True, slots=True)
class IdentityStatus:
    """Certificates of this node. `mode`: "off" (the controller has no identity service), "waiting" (it has not been reached yet), or "on".

    `kept`: where keys are kept for a restart of the agent; "" if only in its memory. `node`: None where an operator made the node's certificate.
    """

    mode: str = "off"
    connected: bool = False
    trust_domain: str = ""
    trust_sequence: int | None = None
    roots: int = 0
    revoked: int = 0
    kept: str = ""
    workload_socket: str = ""
    node: CertificateStatus | None = None
    workloads: tuple[CertificateStatus, ...] = ()
    signed: int = 0
    failures: int = 0
    callers_refused: int = 0


@dataclass(frozen=True, slots=True)
class WireGuardPeer:
    """Another node. `state`: "encrypted", "waiting" (for a handshake), or "none" (it has no WireGuard). `handshake_age_seconds`: None before the first."""

    node: str
    state: str
    handshake_age_seconds: float | None
    sent_bytes: int
    received_bytes: int


@dataclass(frozen=True, slots=True)
class WireGuardStatus:
    """`mode`: "off" (the mesh does not use it), "unavailable" (it does, but this node cannot: `reason`), or "on". `public_key` in base64."""

    mode: str = "off"
    reason: str = ""
    public_key: str = ""
    port: int = 0
    mtu: int = 0
    peers: tuple[WireGuardPeer, ...] = ()


@dataclass(frozen=True, slots=True)
class Status:
    """`meshagent status`. `problems` are sentences for people, each with the next step; `version` is the agent's own."""

    ready: bool
    node: str
    hooks: tuple[HookStatus, ...]
    waypoint: WaypointStatus
    controller: ControllerStatus
    workloads: tuple[WorkloadStatus, ...]
    problems: tuple[str, ...]
    probe: ProbeStatus = ProbeStatus()
    acceleration: AccelerationStatus = AccelerationStatus()
    foreign_programs: tuple[ForeignProgram, ...] = ()
    identity: IdentityStatus = IdentityStatus()
    wireguard: WireGuardStatus = WireGuardStatus()
    version: str = ""


@dataclass(frozen=True, slots=True)
class BackendPlan:
    """A workload that may answer, in the share that weights give it (0 to 1)."""

    workload: str
    address: str
    node: str
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """First line of `meshagent trace`: what would happen, known without traffic. `level` is "L4" or "L7".

    `audit` names the rules of AUDIT policies that would deny if they were enforced.
    """

    kind: str = "plan"
    source: str
    destination: str
    verdict: str
    rule: str | None
    level: str
    reason: str
    backends: tuple[BackendPlan, ...]
    encryption: str
    fail_mode: str
    problems: tuple[str, ...]
    audit: str | None = None


@dataclass(frozen=True, slots=True)
class Hop:
    """One step of a connection. `detail` holds what is particular to the step, by JSON name; what is not known is left out."""

    at: str
    node: str
    duration_ns: int
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """One connection or request that was seen. `outcome`: an HTTP status, or "closed", "reset", "failed", "denied", "refused", "sent" (UDP).

    `began_ns`: Unix time, by the clock of the caller's node. Hops of another node say in `afterNs` when they began; `clock_error_ns` is by how much that may
    be wrong, None if all hops are of one node.
    """

    kind: str = "connection"
    source: str
    destination: str
    hops: tuple[Hop, ...]
    outcome: str
    rule: str | None = None
    next_step: str | None = None
    began_ns: int = 0
    clock_error_ns: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """What else a trace has to say: `text` for people; `missed` events and connections so far that it could not show."""

    kind: str = "notice"
    text: str
    missed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One kind of call of which other policies say something else. `change`: "newly denied", "newly allowed" or "undecided"; `destination` as in a Plan;
    `owner` is the workload at whose end it was seen; `rule` is what decides, or of an undecided call the one that asks for what is not recorded;
    `last_seen` is Unix time.
    """

    change: str
    owner: str
    source: str
    destination: str
    method: str
    path: str
    count: int
    last_seen: float
    rule: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRow:
    """One kind of call to workloads of a namespace. `receivers`: those that may have been called, with their labels; `port`: that they listen on, 0 = not
    known; `service_account` is NAMESPACE/NAME, "" = nobody vouches for the caller; `answer` is what the policies in force say: allowed, denied or
    undecided; `outcome` what became of it: served, denied, unauthorized or unanswered.
    """

    owner: str
    source: str
    service_account: str
    receivers: dict[str, dict[str, str]]
    destination: str
    port: int
    protocol: str
    method: str
    path: str
    outcome: str
    answer: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRows:
    """A part of what a node knows."""

    kind: str = "calls"
    node: str
    calls: tuple[Change, ...] | tuple[CallRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSummary:
    """The last document of an answer. `since`: nothing before that is known, Unix time. `unchanged`: calls of which nothing else is said; `gone`: whose ends
    are in the model no more; `forgotten`: kinds of calls that found no room.
    """

    kind: str = "summary"
    node: str
    since: float
    unchanged: int
    gone: int
    forgotten: int


def camel(name: str) -> str:
    """A field as JSON documents call it."""
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


def as_json(value: object) -> Any:
    """Dataclasses to JSON values; a Hop's detail is merged into it."""
    if isinstance(value, Hop):
        return {"at": value.at, "node": value.node, "durationNs": value.duration_ns, **value.detail}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {camel(f.name): as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.name.lower()
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    return value


def encode(value: object) -> bytes:
    """One JSON document without a newline."""
    return json.dumps(as_json(value)).encode()
