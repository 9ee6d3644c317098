"""TrafficPolicy: what its schema cannot say, which service ports it decides for, and its message. Pure.

`check` is called by `controller.checks`; `attach` and `message` by `controller.compile`, which turns what they find into conditions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from controller import conditions, globallimits, protocols
from controller.documents import Path
from controller.durations import milliseconds
from controller.objects import Object
from meshapi import discovery_pb2 as pb

Found = tuple[Path, str]
Port = tuple[str, int]
"""A service ("NAMESPACE/NAME") and one of its ports."""

SAYS: Final = (
    "loadBalancing",
    "limits",
    "retryBudget",
    "timeouts",
    "outlierEjection",
    "healthCheck",
    "faults",
    "rateLimits",
    "bandwidth",
)
HASHING: Final = frozenset({"RingHash", "Maglev"})
_DURATIONS: Final = {
    "loadBalancing": ("slowStart.window",),
    "timeouts": ("connect", "idle"),
    "outlierEjection": ("interval", "baseEjectionTime", "maxEjectionTime"),
    "healthCheck": ("interval", "timeout"),
}
"""Those that 0 makes no sense for."""
_LONGEST_MS: Final = 30 * 24 * 3_600_000
_FASTEST_CHECK_MS: Final = 100
_SHORTEST_INTERVAL_MS: Final = 50  # Envoy, envoy.extensions.filters.http.local_ratelimit.v3: a bucket is not filled more often
_MOST_PER_SECOND: Final = 1_000_000
_EJECTION_MS: Final = 30_000
_MAX_EJECTION_MS: Final = 300_000


def check(spec: Mapping[str, Any], regex: Callable[[Path, str], Iterator[Found]]) -> Iterator[Found]:
    """Yield what is wrong with a spec that obeys the schema; `regex` says what is wrong with a regular expression."""
    if not any(name in spec for name in SAYS):
        yield ("spec",), f"says nothing: give at least one of {', '.join(SAYS)}"
    yield from _targets(spec["targetRefs"])
    for part, names in _DURATIONS.items():
        for name in names:
            yield from _duration(("spec", part, *name.split(".")), _dig(spec.get(part, {}), name))
    if "maxGrpcDeadline" in spec.get("timeouts", {}) and _ms(spec["timeouts"]["maxGrpcDeadline"]) > _LONGEST_MS:
        yield ("spec", "timeouts", "maxGrpcDeadline"), "must not be longer than 30 days"
    yield from _balancing(spec.get("loadBalancing", {}))
    if set(spec.get("limits", {})) == {"per"}:
        yield ("spec", "limits"), "limits nothing: give a number of connections, requests or retries"
    if "retryBudget" in spec and "maxRetries" in spec.get("limits", {}):
        yield ("spec", "retryBudget"), "takes the place of spec.limits.maxRetries: choose one"
    yield from _ejection(spec.get("outlierEjection", {}))
    yield from _health(spec.get("healthCheck"))
    for index, fault in enumerate(spec.get("faults", [])):
        yield from _fault(("spec", "faults", index), fault, regex)
    for index, limit in enumerate(spec.get("rateLimits", [])):
        yield from _rate(("spec", "rateLimits", index), limit)
    yield from globallimits.check(spec.get("rateLimits", []))


def _dig(value: Mapping[str, Any], path: str) -> str:
    found: Any = value
    for part in path.split("."):
        found = found.get(part, {})
    return found if isinstance(found, str) else ""


def _ms(text: str) -> int:
    return milliseconds(text)


def _duration(path: Path, text: str) -> Iterator[Found]:
    if text and not 0 < _ms(text) <= _LONGEST_MS:
        yield path, "must be longer than 0 and not longer than 30 days"


def _targets(references: list[Mapping[str, Any]]) -> Iterator[Found]:
    seen: set[tuple[str, str, int]] = set()
    for index, reference in enumerate(references):
        path: Path = ("spec", "targetRefs", index)
        if "sectionName" in reference and "port" in reference:
            yield (*path, "port"), "cannot be combined with sectionName: choose one"
        slot = (reference["name"], reference.get("sectionName", ""), reference.get("port", 0))
        if slot in seen:
            yield path, f"Service {reference['name']} is listed twice with the same port"
        seen.add(slot)


def _balancing(spec: Mapping[str, Any]) -> Iterator[Found]:
    path: Path = ("spec", "loadBalancing")
    kind = spec.get("type", "LeastRequest")
    belongs = {
        "choices": {"LeastRequest"},
        "hashOn": HASHING,
        "tableSize": HASHING,
        "loadBoundPercent": HASHING,
        "slowStart": {"LeastRequest", "RoundRobin"},
    }
    for name, kinds in belongs.items():
        if name in spec and kind not in kinds:
            yield (*path, name), f'does not belong to type "{kind}", only to {" and ".join(sorted(kinds))}'
    if kind in HASHING and "hashOn" not in spec:
        yield (*path, "hashOn"), f'is required for type "{kind}"'
    for index, part in enumerate(spec.get("hashOn", [])):
        if len(part) > 1:
            yield (*path, "hashOn", index), f"has {' and '.join(sorted(part))}: write each as an item of its own"
        yield from conditions.never_arrives((*path, "hashOn", index, "header"), _dig(part, "header"))
        yield from _duration((*path, "hashOn", index, "cookie", "lifetime"), _dig(part, "cookie.lifetime"))
    size = spec.get("tableSize", 0)
    if kind == "Maglev" and size and not _prime(size):
        yield (*path, "tableSize"), f"must be a prime for Maglev; the next one is {next(n for n in range(size, 2 * size) if _prime(n))}"


def _prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _ejection(spec: Mapping[str, Any]) -> Iterator[Found]:
    path: Path = ("spec", "outlierEjection")
    causes = ("consecutive5xx", "consecutiveGatewayErrors", "consecutiveLocalErrors")
    if spec and not any(name in spec for name in causes):
        yield path, f"ejects nothing: give at least one of {', '.join(causes)}"
    base, most = spec.get("baseEjectionTime", ""), spec.get("maxEjectionTime", "")
    if (_ms(base) or _EJECTION_MS) > (_ms(most) or max(_MAX_EJECTION_MS, _ms(base))):
        yield (*path, "maxEjectionTime"), f"must not be shorter than baseEjectionTime ({base or '30s'})"


def _health(spec: Mapping[str, Any] | None) -> Iterator[Found]:
    if spec is None:
        return
    path: Path = ("spec", "healthCheck")
    ways = [name for name in ("http", "grpc", "tcp") if name in spec]
    if len(ways) != 1:
        yield path, f"needs one of http, grpc and tcp, not {' and '.join(ways) or 'none of them'}"
    if spec.get("interval") and _ms(spec["interval"]) < _FASTEST_CHECK_MS:
        yield (*path, "interval"), "must be at least 100ms: each node asks each endpoint"


def _fault(path: Path, fault: Mapping[str, Any], regex: Callable[[Path, str], Iterator[Found]]) -> Iterator[Found]:
    if "delay" not in fault and "abort" not in fault:
        yield path, "does nothing: give delay or abort, or both"
    yield from _duration((*path, "delay", "duration"), _dig(fault, "delay.duration"))
    abort = fault.get("abort")
    if abort is not None and ("httpStatus" in abort) == ("grpcStatus" in abort):
        yield (*path, "abort"), "needs one of httpStatus and grpcStatus"
    for index, header in enumerate(fault.get("headers", [])):
        yield from conditions.never_arrives((*path, "headers", index, "name"), header["name"])
        if header.get("type", "Exact") == "RegularExpression":
            yield from regex((*path, "headers", index, "value"), header["value"])
    for number, source in enumerate(fault.get("from", [])):
        for name, values in source.items():
            for index, text in enumerate(values):
                if "*" in text:
                    yield (*path, "from", number, name, index), f'"{text[:80]}": wildcards are not allowed here'


def _rate(path: Path, limit: Mapping[str, Any]) -> Iterator[Found]:
    interval = _ms(limit.get("interval", "1s"))
    if not _SHORTEST_INTERVAL_MS <= interval <= _LONGEST_MS:
        yield (*path, "interval"), "must be from 50ms to 30 days"
    elif limit["requests"] * 1000 > _MOST_PER_SECOND * interval:
        yield (*path, "requests"), f"is more than {_MOST_PER_SECOND} a second: no limit at all"


@dataclass(slots=True)
class Attached:
    """What became of one policy's targets."""

    ports: list[Port] = field(default_factory=list)
    """Those that it decides for, sorted."""
    missing: list[str] = field(default_factory=list)
    """Targets that are not there, in words."""
    lost: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """The policy that decides instead, and for which ports."""


def attach(policies: Iterable[Object], services: Mapping[str, Object]) -> dict[str, Attached]:
    """Find the one policy that decides for each port. `policies` come oldest first; the result is by their qualified names.

    Whoever names a port goes before whoever names the service (GEP-2648, direct policies with sectionName), and then the older before the younger (GEP-713). A
    service as a whole means its TCP ports that are declared to speak HTTP (`controller.protocols`) or nothing.
    """
    found: dict[str, Attached] = {}
    claims: list[tuple[bool, str, Port]] = []
    for policy in policies:
        name = policy.key.qualified
        mine = found[name] = Attached()
        for reference in policy.spec["targetRefs"]:
            service = f"{policy.key.namespace}/{reference['name']}"
            specific = "sectionName" in reference or "port" in reference
            ports = _resolved(services.get(service), reference)
            if isinstance(ports, str):
                mine.missing.append(ports.format(service=service))
            else:
                claims += [(not specific, name, (service, port)) for port in ports]
    holders: dict[Port, str] = {}
    for _, name, port in sorted(claims, key=lambda claim: claim[0]):  # stable: the older stays before the younger
        if (holder := holders.setdefault(port, name)) != name:
            found[name].lost[holder].append(f"{port[0]}:{port[1]}")
        elif port not in found[name].ports:
            found[name].ports.append(port)
    for mine in found.values():
        mine.ports.sort()
    return found


def _resolved(service: Object | None, reference: Mapping[str, Any]) -> list[int] | str:
    """The ports that a reference means, or what is wrong with it (with `{service}` in it)."""
    if service is None:
        return "there is no Service {service}"
    tcp = [port for port in service.spec["ports"] if port.get("protocol", "TCP") == "TCP"]
    if (section := reference.get("sectionName")) is not None:
        ports = [port["port"] for port in tcp if port.get("name") == section]
        return ports or f'Service {{service}} has no TCP port named "{section.replace("{", "").replace("}", "")}"'
    if (number := reference.get("port")) is not None:
        return [number] if any(port["port"] == number for port in tcp) else f"Service {{service}} has no TCP port {number}"
    ports = [port["port"] for port in tcp if (protocols.declared(port).lower() or "http") in protocols.HTTP]
    return ports or "Service {service} has no port that may speak HTTP: name the port if it does"


_TYPES: Final = {
    "LeastRequest": pb.LoadBalancing.LEAST_REQUEST,
    "RoundRobin": pb.LoadBalancing.ROUND_ROBIN,
    "Random": pb.LoadBalancing.RANDOM,
    "RingHash": pb.LoadBalancing.RING_HASH,
    "Maglev": pb.LoadBalancing.MAGLEV,
    "Latency": pb.LoadBalancing.LATENCY,
}
_PER: Final = {
    "Service": pb.RateLimit.SERVICE,
    "Workload": pb.RateLimit.WORKLOAD,
    "ServiceAccount": pb.RateLimit.SERVICE_ACCOUNT,
    "Namespace": pb.RateLimit.NAMESPACE,
}
_MATCHES: Final = {"Exact": pb.StringMatch.EXACT, "RegularExpression": pb.StringMatch.REGEX}


def message(policy: Object, ports: Iterable[Port]) -> pb.TrafficPolicy:
    """Return the model's form of a policy that decides for these ports."""
    spec = policy.spec
    result = pb.TrafficPolicy(
        namespace=policy.key.namespace,
        name=policy.key.name,
        targets=[pb.Parent(service=service, port=port) for service, port in ports],
        faults=[_fault_message(policy.key.namespace, fault) for fault in spec.get("faults", [])],
        rate_limits=[_rate_message(policy.key.namespace, limit) for limit in spec.get("rateLimits", [])],
    )
    if "loadBalancing" in spec:
        result.load_balancing.CopyFrom(_balancing_message(spec["loadBalancing"]))
    if any(name in spec for name in ("limits", "retryBudget", "timeouts")):
        result.limits.CopyFrom(_limits_message(spec.get("limits", {}), spec.get("retryBudget", {}), spec.get("timeouts", {})))
    if "outlierEjection" in spec:
        result.outliers.CopyFrom(_outliers_message(spec["outlierEjection"]))
    if "healthCheck" in spec:
        result.health_check.CopyFrom(_health_message(spec["healthCheck"]))
    if "bandwidth" in spec:
        limits = spec["bandwidth"]
        result.bandwidth.CopyFrom(pb.Bandwidth(request_kib=limits.get("requestKiB", 0), response_kib=limits.get("responseKiB", 0)))
    return result


def _balancing_message(spec: Mapping[str, Any]) -> pb.LoadBalancing:
    slow = spec.get("slowStart", {})
    return pb.LoadBalancing(
        type=_TYPES[spec.get("type", "LeastRequest")],
        choices=spec.get("choices", 0),
        hash_on=[_hash_message(part) for part in spec.get("hashOn", [])],
        table_size=spec.get("tableSize", 0),
        load_bound_percent=spec.get("loadBoundPercent", 0),
        slow_start_ms=_ms(slow.get("window", "")),
        slow_start_min_percent=slow.get("minPercent", 0),
        prefer=f"Prefer{spec['prefer']}" if "prefer" in spec else "",
        panic_percent=spec.get("panicPercent"),
    )


def _hash_message(part: Mapping[str, Any]) -> pb.HashOn:
    if "cookie" in part:
        return pb.HashOn(cookie=part["cookie"]["name"], cookie_ms=_ms(part["cookie"].get("lifetime", "")))
    if "header" in part:
        return pb.HashOn(header=part["header"])
    return pb.HashOn(query=part["queryParam"]) if "queryParam" in part else pb.HashOn(workload=True)


def _limits_message(limits: Mapping[str, Any], budget: Mapping[str, Any], timeouts: Mapping[str, Any]) -> pb.Limits:
    return pb.Limits(
        connections=limits.get("maxConnections", 0),
        pending=limits.get("maxPendingRequests", 0),
        requests=limits.get("maxRequests", 0),
        retries=limits.get("maxRetries"),
        requests_per_connection=limits.get("maxRequestsPerConnection", 0),
        retry_percent=budget.get("percent"),
        retry_min=budget.get("minConcurrent"),
        connect_ms=_ms(timeouts.get("connect", "")),
        idle_ms=_ms(timeouts.get("idle", "")),
        grpc_deadline_ms=_ms(timeouts["maxGrpcDeadline"]) if "maxGrpcDeadline" in timeouts else None,
        per_workload=limits.get("per") == "Workload",
    )


def _outliers_message(spec: Mapping[str, Any]) -> pb.Outliers:
    base = _ms(spec.get("baseEjectionTime", "")) or _EJECTION_MS
    return pb.Outliers(
        errors=spec.get("consecutive5xx", 0),
        gateway_errors=spec.get("consecutiveGatewayErrors", 0),
        local_errors=spec.get("consecutiveLocalErrors", 0),
        interval_ms=_ms(spec.get("interval", "10s")),
        ejection_ms=base,
        max_ejection_ms=_ms(spec.get("maxEjectionTime", "")) or max(base, _MAX_EJECTION_MS),
        max_percent=spec.get("maxEjectionPercent", 50),
    )


def _health_message(spec: Mapping[str, Any]) -> pb.HealthCheck:
    result = pb.HealthCheck(
        interval_ms=_ms(spec.get("interval", "10s")),
        timeout_ms=_ms(spec.get("timeout", "1s")),
        unhealthy=spec.get("unhealthyThreshold", 3),
        healthy=spec.get("healthyThreshold", 2),
    )
    if "http" in spec:
        http = spec["http"]
        result.kind, result.path, result.host = pb.HealthCheck.HTTP, http["path"], http.get("host", "")
        result.statuses.extend(sorted(set(http.get("statuses", [200]))))
    elif "grpc" in spec:
        result.kind, result.grpc_service = pb.HealthCheck.GRPC, spec["grpc"].get("service", "")
    return result


def _fault_message(namespace: str, fault: Mapping[str, Any]) -> pb.Fault:
    delay, abort = fault.get("delay", {}), fault.get("abort", {})
    return pb.Fault(
        sources=[
            pb.Source(
                namespaces=source.get("namespaces", []),
                service_accounts=[text if "/" in text else f"{namespace}/{text}" for text in source.get("serviceAccounts", [])],
            )
            for source in fault.get("from", [])
        ],
        headers=[
            pb.NamedMatch(
                name=header["name"].lower(),
                value=pb.StringMatch(kind=_MATCHES[header.get("type", "Exact")], value=header["value"]),
            )
            for header in fault.get("headers", [])
        ],
        delay_ms=_ms(delay.get("duration", "")),
        delay_ppm=_millionths(delay),
        http_status=abort.get("httpStatus", 0),
        grpc_status=abort.get("grpcStatus"),
        abort_ppm=_millionths(abort),
    )


def _millionths(part: Mapping[str, Any]) -> int:
    return round(float(part.get("percent", 100)) * 10_000) if part else 0


def _rate_message(namespace: str, limit: Mapping[str, Any]) -> pb.RateLimit:
    if globallimits.is_global(limit):
        return globallimits.message(namespace, limit)
    return pb.RateLimit(
        per=_PER[limit.get("per", "Service")],
        requests=limit["requests"],
        interval_ms=_ms(limit.get("interval", "1s")),
        burst=limit.get("burst", limit["requests"]),
    )
