"""Requests by who asks whom, as the waypoint has counted them (`agent.l7.metrics`): read from Envoy and written as metrics, when somebody asks for the page.

All of this happens in the thread of a scrape; an Envoy that does not answer costs it `SILENCE_S` and nobody else anything. What is shown of a counter never
falls while the agent lives: what Envoy says is added up as growth, so an Envoy that began anew, or has forgotten what was idle, goes on where it was.
"""

from __future__ import annotations

import http.client
import itertools
import json
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from operator import add, sub
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from agent import exposition
from agent.l7 import envoy, limits, metrics, names
from agent.l7.metrics import BOUNDS_US, DURATION, PREFIX, REQUESTS, SEPARATOR, TAG, Key
from agent.model import Service

SILENCE_S, WHOLE_S = 2.0, 6.0
"""An Envoy that says nothing for so long, or takes so long in all, is given up; Prometheus gives up a scrape after 10 s."""
MOST_SERIES = 10_000
"""So many label sets of each metric are shown by name; what comes later is counted as `other` until places become free."""
LABELS = (
    "source_workload", "source_namespace", "destination_workload", "destination_namespace", "destination_service", "port", "security_policy",
    "direction", "route",
)  # fmt: skip
ANSWER_LABELS = (*LABELS, "response_code", "grpc_status", "response_flags")
_OTHER = "other"
_MOST_GRPC = 16  # https://grpc.github.io/grpc/core/md_doc_statuscodes.html
_US = 1e-6
_BOUNDS = (*(repr(bound * _US) for bound in BOUNDS_US), "+Inf")
_HISTOGRAM = exposition.Histogram("mesh_request_duration_seconds", "From a request's first byte to its answer's last one.", _BOUNDS)
_SERVICE_LABELS = ("destination_service", "destination_namespace", "port")
_SERVICE_COUNTERS = {
    "upstream_cx_tx_bytes_total": (
        "mesh_request_bytes",
        "Bytes of requests to a service's endpoints, headers too; a retry is another request.",
    ),
    "upstream_cx_rx_bytes_total": ("mesh_response_bytes", "Bytes of their answers."),
    "upstream_rq_retry": ("mesh_request_retries", "Tries beyond the first one."),
    "upstream_rq_retry_overflow": ("mesh_request_retries_refused", "Retries that the limit or the budget of retries did not allow."),
    "upstream_rq_timeout": ("mesh_request_timeouts", "Requests that took longer than their route allows."),
    "upstream_rq_per_try_timeout": ("mesh_request_try_timeouts", "Tries that took longer than their route allows."),
    "upstream_rq_pending_overflow": ("mesh_requests_refused", "Requests beyond a service's limits."),
    "upstream_cx_connect_fail": ("mesh_backend_connect_failures", "Connections to endpoints that were never established."),
    "outlier_detection.ejections_enforced_total": ("mesh_endpoint_ejections", "Endpoints that were taken out for a while."),
}
_SERVICE_GAUGES = {
    "outlier_detection.ejections_active": ("mesh_endpoints_ejected", "Endpoints that are out for a while, as this node sees it."),
    "membership_total": ("mesh_endpoints", "Ready endpoints that this node knows."),
    "membership_healthy": ("mesh_endpoints_healthy", "Of these the ones that are neither ejected nor fail health checks."),
}
_SIDES = (names.OUTBOUND, names.INBOUND, names.HBONE, names.GATEWAY)
_SIDE_GAUGES = {
    "downstream_cx_active": ("mesh_waypoint_connections", "Connections that the waypoint has accepted and that live; hbone: tunnels."),
    "downstream_rq_active": ("mesh_waypoint_requests_active", "Requests under way; hbone: connections in tunnels."),
}
_GAUGES = {
    "server.memory_allocated": ("mesh_waypoint_memory_bytes", "Memory that the waypoint has allocated."),
    "server.uptime": ("mesh_waypoint_uptime_seconds", "Since the waypoint was started."),
    "listener_manager.total_listeners_active": ("mesh_waypoint_listeners", "Listeners of the waypoint."),
    "cluster_manager.active_clusters": ("mesh_waypoint_clusters", "Clusters of the waypoint."),
}
RATE_LIMITED = f"{limits.RATE_FILTER}.http_local_rate_limit.rate_limited"
_COUNTERS = {
    RATE_LIMITED: ("mesh_requests_rate_limited", "Requests beyond a rate limit."),
    "tcp.tunnel.downstream_cx_total": ("mesh_tunnelled_connections", "L4 connections and requests that the waypoint sent through tunnels."),
}  # fmt: skip
_CLUSTER = re.compile(r"cluster\.service/(?P<namespace>[^/]+)/(?P<name>[^/]+)/(?P<port>[0-9]+)\.(?P<stat>[a-z_.]+)")
_OWN = f"^{PREFIX}\\."
_WHOLE = "^(cluster\\.service/.*\\.({})|http\\.({})\\.({})|{})$".format(
    *("|".join(map(re.escape, some)) for some in ((*_SERVICE_COUNTERS, *_SERVICE_GAUGES), _SIDES, _SIDE_GAUGES, (*_GAUGES, *_COUNTERS)))
)

_Values = tuple[float, ...]


class Read(NamedTuple):
    """What Envoy has counted, by its keys: (count,), and for the histogram (buckets, cumulative ..., sum, count)."""

    requests: dict[str, _Values]
    durations: dict[str, _Values]


def parse(lines: Iterable[str]) -> Read:
    """Read Envoy's text format. Series of a histogram are in one piece: buckets, sum, count."""
    requests: dict[str, _Values] = {}
    durations: dict[str, _Values] = {}
    buckets: list[float] = []
    counter, bucket, start = f"envoy_{PREFIX}_{REQUESTS}", f"envoy_{PREFIX}_{DURATION}_bucket", f'{{{TAG}="'
    for line in lines:
        if line.startswith(bucket):
            buckets.append(float(line[line.rindex(" ") :]))
            continue
        name, _, rest = line.partition(start)
        key, _, value = rest.rpartition('"} ')
        if name == counter:
            requests[key] = (float(value),)
        elif name.endswith("_sum"):
            buckets.append(float(value))
        elif name.endswith("_count"):
            durations[key] = (*buckets, float(value))
            buckets = []
    return Read(requests, durations)


def read(admin: Path) -> Read:
    """What Envoy has counted until now. Raises OSError, HTTPException or ValueError if it does not answer, or not with that."""
    return parse(_lines(envoy.stream_admin(admin, f"/stats/prometheus?usedonly&filter={quote(_OWN)}", SILENCE_S, WHOLE_S)))


def full(keys: Collection[str], most: int = metrics.MOST_COUNTERS) -> int:
    """How many listeners have as many statistics as Envoy keeps for one (direction and owner are a key's first parts)."""
    if len(keys) < most:
        return 0
    listeners = Counter(tuple(key.split(SEPARATOR, 2)[:2]) for key in keys)
    return sum(number >= most for number in listeners.values())


class Sums:
    """One metric by label text; the last of a key's values tells whether Envoy began anew."""

    def __init__(self, label: Callable[[str], str], other: str, most: int) -> None:
        """`label` makes a text of a key; `other` stands for those beyond `most`."""
        self._label, self._other, self._most = label, other, most
        self._seen: dict[str, tuple[str, _Values]] = {}
        self.totals: dict[str, _Values] = {}

    @property
    def folded(self) -> int:
        """How many keys are counted as `other`."""
        return sum(text == self._other for text, _ in self._seen.values())

    def take(self, found: Mapping[str, _Values]) -> None:
        """Add what has grown since the last time; what Envoy has forgotten is shown no more."""
        seen: dict[str, tuple[str, _Values]] = {}
        totals = self.totals
        for key, values in found.items():
            before = self._seen.get(key)
            text, old = before or (self._place(key), ())
            seen[key] = (text, values)
            if values == old:
                continue
            grown = values if not old or values[-1] < old[-1] else tuple(map(sub, values, old))
            total = totals.get(text)
            totals[text] = tuple(map(add, total, grown)) if total else grown
        if self._seen.keys() - seen.keys():
            shown = {text for text, _ in seen.values()}
            self.totals = {text: total for text, total in totals.items() if text in shown or text == self._other}
        self._seen = seen

    def _place(self, key: str) -> str:
        text = self._label(key)
        return text if text in self.totals or len(self.totals) < self._most else self._other


class Dialled:
    """Which service an address and port stand for."""

    def __init__(self, services: Callable[[], Mapping[str, Service]]) -> None:
        """`services` are those of now, by name."""
        self._services = services
        self._addresses: tuple[Mapping[str, Service] | None, dict[str, str]] = (None, {})

    def service(self, address: str) -> str:
        """NAMESPACE/NAME of the service at ADDRESS:PORT; "" if there is none."""
        services = self._services()
        if self._addresses[0] is not services:
            found = {names.destination(a, p.port): s.name for s in services.values() for a in s.addresses for p in s.ports}
            self._addresses = (services, found)
        return self._addresses[1].get(address, "")


class Requests:
    """What the waypoint knows of requests, as metrics. Any thread."""

    def __init__(self, admin: Path, services: Callable[[], Mapping[str, Service]], most: int = MOST_SERIES) -> None:
        """`admin` is Envoy's admin socket; `services` are those of now, by name: they say what an address stands for."""
        self._admin = admin
        self._dialled = Dialled(services)
        self._lock = threading.Lock()
        pair, answer = (exposition.labels(labels, [_OTHER] * len(labels)) for labels in (LABELS, ANSWER_LABELS))
        self._answers = Sums(self._answer, answer, most)
        self._durations = Sums(self._pair, pair, most)
        self._rest: dict[str, int] = {}
        self._full = 0

    def text(self) -> Iterator[str]:
        """Ask Envoy, then write the page in pieces. If it does not answer, the page has what it said last."""
        with self._lock:
            started = time.monotonic()
            good = self._read()
            took = time.monotonic() - started
            answers, durations = dict(self._answers.totals), dict(self._durations.totals)
            folded, rest = self._answers.folded + self._durations.folded, self._rest
        return itertools.chain(
            exposition.counter(
                "mesh_requests",
                "Requests that were answered, refused or given up.",
                {text: int(count) for text, (count,) in answers.items()},
            ),
            _HISTOGRAM.text((text, _slots(values), values[-2] * _US) for text, values in durations.items()),
            exposition.gauge("mesh_request_series_folded", "Series of requests that are counted as other: too many.", {"": folded}),
            exposition.gauge(
                "mesh_request_series_full", "Listeners that see too many kinds of requests: new ones are not counted.", {"": self._full}
            ),
            exposition.gauge("mesh_waypoint_stats_up", "1 if the waypoint said what it has counted, at this scrape.", {"": int(good)}),
            exposition.gauge("mesh_waypoint_stats_read_seconds", "How long that took.", {"": round(took, 6)}),
            _of_services(rest),
            _of_waypoint(rest),
        )

    def _read(self) -> bool:
        try:
            own = read(self._admin)
            rest = b"".join(
                envoy.stream_admin(self._admin, f"/stats?usedonly&format=json&filter={quote(_WHOLE, safe='')}", SILENCE_S, WHOLE_S)
            )
            self._rest = {entry["name"]: entry["value"] for entry in json.loads(rest)["stats"] if isinstance(entry.get("value"), int)}
        except (OSError, http.client.HTTPException, ValueError):
            return False
        self._answers.take(own.requests)
        self._full = full(own.requests)
        self._durations.take(own.durations)
        return True

    def _answer(self, key: str) -> str:
        parts = key.split(SEPARATOR)
        code, status, flags = parts[-3:]
        grpc = status if not status or (status.isdigit() and int(status) <= _MOST_GRPC) else "unknown"
        values = [code if code.isdigit() and len(code) <= 3 else "0", "" if status == "-" else grpc, flags.strip("-")]
        return exposition.labels(ANSWER_LABELS, [*self._ends(Key._make(parts[:-3])), *values])

    def _pair(self, key: str) -> str:
        return exposition.labels(LABELS, self._ends(Key._make(key.split(SEPARATOR))))

    def _ends(self, key: Key) -> list[str]:
        """Values of LABELS; what is not known is said as in metrics of connections (`agent.telemetry`)."""
        namespace, _, workload = key.owner.partition("/")
        port = key.address.rpartition(":")[2].strip("-")
        if key.direction == names.INBOUND:
            caller = key.peer.partition("/ns/")[2].partition("/")[0]
            security = "mutual_tls" if caller else "none"
            return ["unknown", caller or "unknown", workload, namespace, "", port, security, key.direction, key.route.strip("-")]
        service = self._dialled.service(key.address)
        target, _, security = key.target.partition(" ")
        target_namespace, _, target_workload = target.partition("/")
        return [
            workload,
            namespace,
            target_workload or ("" if service else "unknown"),
            target_namespace or service.partition("/")[0] or "unknown",
            service,
            port,
            security or "none",
            key.direction,
            key.route.strip("-"),
        ]


def _lines(pieces: Iterable[bytes]) -> Iterator[str]:
    """Lines of a long text that is never in memory as a whole."""
    rest = b""
    for piece in pieces:
        whole, newline, rest = (rest + piece).rpartition(b"\n")
        if newline:
            yield from whole.decode().split("\n")


def _slots(values: _Values) -> list[int]:
    """Observations in each bucket alone."""
    counts = [int(value) for value in values[:-2]]
    return list(map(sub, counts, [0, *counts]))


def _of_services(stats: Mapping[str, int]) -> Iterator[str]:
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for name, value in stats.items():
        if match := _CLUSTER.fullmatch(name):
            labels = exposition.labels(_SERVICE_LABELS, [f"{match['namespace']}/{match['name']}", match["namespace"], match["port"]])
            found[match["stat"]][labels] = value
    for stat, (name, meaning) in _SERVICE_COUNTERS.items():
        yield from exposition.counter(name, meaning, found[stat])
    for stat, (name, meaning) in _SERVICE_GAUGES.items():
        yield from exposition.gauge(name, meaning, found[stat])


def _of_waypoint(stats: Mapping[str, int]) -> Iterator[str]:
    for stat, (name, meaning) in _SIDE_GAUGES.items():
        sides = {f'side="{side}"': stats[full] for side in _SIDES if (full := f"http.{side}.{stat}") in stats}
        yield from exposition.gauge(name, meaning, sides)
    for stat, (name, meaning) in _GAUGES.items():
        yield from exposition.gauge(name, meaning, {"": stats[stat]} if stat in stats else {})
    for stat, (name, meaning) in _COUNTERS.items():
        yield from exposition.counter(name, meaning, {"": stats.get(stat, 0)})
