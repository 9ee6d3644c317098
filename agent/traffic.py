"""TrafficPolicy as the agent sees it: frozen dataclasses, decoded once. Part of the model (`agent.model`), read by `agent.l7`.

The field meanings are those of meshapi/discovery.proto; durations are milliseconds, shares of requests millionths. 0 is Envoy's default unless another
meaning is given.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from meshapi import discovery_pb2 as pb


class Balancing(enum.Enum):
    """How an endpoint is chosen."""

    LEAST_REQUEST = 0
    ROUND_ROBIN = 1
    RANDOM = 2
    RING_HASH = 3
    MAGLEV = 4
    LATENCY = 5


class CheckKind(enum.Enum):
    """How an endpoint is asked."""

    TCP = 0
    HTTP = 1
    GRPC = 2


class Per(enum.Enum):
    """Who has a count of its own."""

    SERVICE = 0
    WORKLOAD = 1
    SERVICE_ACCOUNT = 2
    NAMESPACE = 3


@dataclass(frozen=True, slots=True)
class HashOn:
    """`kind` is "header", "query", "cookie" or "workload" (the calling one); `cookie_ms` 0: nobody is given a cookie."""

    kind: str
    name: str = ""
    cookie_ms: int = 0


@dataclass(frozen=True, slots=True)
class LoadBalancing:
    """`prefer` is "", "PreferSameNode" or "PreferSameZone"; `panic_percent` None: Envoy's 50."""

    kind: Balancing = Balancing.LEAST_REQUEST
    choices: int = 0
    hash_on: tuple[HashOn, ...] = ()
    table_size: int = 0
    load_bound_percent: int = 0
    slow_start_ms: int = 0
    slow_start_min_percent: int = 0
    prefer: str = ""
    panic_percent: int | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """At one time, of one node. `retry_percent` None: no budget; `grpc_deadline_ms` None: grpc-timeout is the application's, 0: kept to without a bound."""

    connections: int = 0
    pending: int = 0
    requests: int = 0
    retries: int | None = None
    requests_per_connection: int = 0
    retry_percent: int | None = None
    retry_min: int | None = None
    connect_ms: int = 0
    idle_ms: int = 0
    grpc_deadline_ms: int | None = None
    per_workload: bool = False
    """Of each calling workload; otherwise of all together."""


@dataclass(frozen=True, slots=True)
class Outliers:
    """What ejects an endpoint; a count of 0 is not looked at."""

    errors: int
    gateway_errors: int
    local_errors: int
    interval_ms: int
    ejection_ms: int
    max_ejection_ms: int
    max_percent: int


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """How endpoints are asked whether they are well."""

    kind: CheckKind
    path: str
    host: str
    statuses: tuple[int, ...]
    grpc_service: str
    interval_ms: int
    timeout_ms: int
    unhealthy: int
    healthy: int


@dataclass(frozen=True, slots=True)
class FaultCaller:
    """Both lists must match if they are not empty, each by any of its values; service accounts are "NAMESPACE/NAME"."""

    namespaces: tuple[str, ...]
    service_accounts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fault:
    """Any of `callers` (none: everybody), all of `headers`: (name, value, is a regular expression)."""

    callers: tuple[FaultCaller, ...] = ()
    headers: tuple[tuple[str, str, bool], ...] = ()
    delay_ms: int = 0
    delay_ppm: int = 0
    http_status: int = 0
    grpc_status: int | None = None
    abort_ppm: int = 0


class Failure(enum.Enum):
    """What a global limit is while the controller is away."""

    SHARE = 0
    ALLOW = 1
    DENY = 2


@dataclass(frozen=True, slots=True)
class RateLimit:
    """So many requests an interval, evenly, and `burst` at once. Of a global one `per` says between whom it is shared."""

    per: Per
    requests: int
    interval_ms: int
    burst: int
    is_global: bool = False
    failure: Failure = Failure.SHARE


@dataclass(frozen=True, slots=True)
class TrafficPolicy:
    """`targets` are the (service, port) pairs that it decides for; no other policy has them."""

    name: str
    targets: tuple[tuple[str, int], ...]
    balancing: LoadBalancing = LoadBalancing()
    limits: Limits = Limits()
    outliers: Outliers | None = None
    health_check: HealthCheck | None = None
    faults: tuple[Fault, ...] = ()
    rate_limits: tuple[RateLimit, ...] = ()
    request_kib: int = 0
    """KiB a second; 0 = no limit."""
    response_kib: int = 0


def decode(m: pb.TrafficPolicy) -> TrafficPolicy:
    """Turn the message into its dataclass; ValueError for what a newer controller may say and this agent does not know."""
    return TrafficPolicy(
        name=f"{m.namespace}/{m.name}",
        targets=tuple((target.service, target.port) for target in m.targets),
        balancing=_balancing(m.load_balancing),
        limits=_limits(m.limits),
        outliers=_outliers(m.outliers) if m.HasField("outliers") else None,
        health_check=_health_check(m.health_check) if m.HasField("health_check") else None,
        faults=tuple(_fault(fault) for fault in m.faults),
        rate_limits=tuple(_rate_limit(limit) for limit in m.rate_limits),
        request_kib=m.bandwidth.request_kib,
        response_kib=m.bandwidth.response_kib,
    )


def _rate_limit(m: pb.RateLimit) -> RateLimit:
    per = Per(m.by if m.is_global else m.per)
    return RateLimit(per, m.requests, m.interval_ms, m.burst, m.is_global, Failure(m.failure))


def _balancing(m: pb.LoadBalancing) -> LoadBalancing:
    return LoadBalancing(
        Balancing(m.type),
        m.choices,
        tuple(_hash_on(part) for part in m.hash_on),
        m.table_size,
        m.load_bound_percent,
        m.slow_start_ms,
        m.slow_start_min_percent,
        m.prefer,
        m.panic_percent if m.HasField("panic_percent") else None,
    )


def _hash_on(m: pb.HashOn) -> HashOn:
    kind = m.WhichOneof("kind")
    if kind is None:
        raise ValueError("a part of a hash that this agent does not know")
    return HashOn(kind, "" if kind == "workload" else getattr(m, kind), m.cookie_ms)


def _limits(m: pb.Limits) -> Limits:
    return Limits(
        m.connections,
        m.pending,
        m.requests,
        m.retries if m.HasField("retries") else None,
        m.requests_per_connection,
        m.retry_percent if m.HasField("retry_percent") else None,
        m.retry_min if m.HasField("retry_min") else None,
        m.connect_ms,
        m.idle_ms,
        m.grpc_deadline_ms if m.HasField("grpc_deadline_ms") else None,
        m.per_workload,
    )


def _outliers(m: pb.Outliers) -> Outliers:
    return Outliers(m.errors, m.gateway_errors, m.local_errors, m.interval_ms, m.ejection_ms, m.max_ejection_ms, m.max_percent)


def _health_check(m: pb.HealthCheck) -> HealthCheck:
    return HealthCheck(
        CheckKind(m.kind), m.path, m.host, tuple(m.statuses), m.grpc_service, m.interval_ms, m.timeout_ms, m.unhealthy, m.healthy
    )


def _fault(m: pb.Fault) -> Fault:
    return Fault(
        tuple(FaultCaller(tuple(source.namespaces), tuple(source.service_accounts)) for source in m.sources),
        tuple((header.name, header.value.value, header.value.kind == pb.StringMatch.REGEX) for header in m.headers),
        m.delay_ms,
        m.delay_ppm,
        m.http_status,
        m.grpc_status if m.HasField("grpc_status") else None,
        m.abort_ppm,
    )
