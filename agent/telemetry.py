"""/metrics, /healthz and /readyz. Kernel maps are read at scrape time, in the scrape's own thread; nothing is counted in Python."""

from __future__ import annotations

import itertools
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from agent import exposition, features, flows
from agent.bpf.datapath import DataPath
from agent.bpf.manifest import BUCKET_SHIFT, BUCKETS, Close, Direction, Reason, Verdict
from agent.bpf.sockets import Sockets
from agent.config import Config
from agent.enrolment import Enrolled
from agent.errors import EnvironmentUnfit
from agent.flows import Flow, Flows
from agent.ids import Ids
from agent.report import IdentityStatus, Status, WaypointStatus, WireGuardStatus

_ENDS = ("source_workload", "source_namespace", "destination_workload", "destination_namespace")
_LABELS = (*_ENDS, "destination_service", "port", "security_policy", "direction")
_VERDICT_LABELS = (*_ENDS, "destination_service", "verdict", "rule", "reason", "direction", "protocol")
_AUDIT_LABELS = (*_ENDS, "rule", "direction", "protocol")
_OTHER = "other"
"""Who stands for the pairs that found no room in mesh_stats."""
_DIRECTIONS = {direction.value: direction.name.lower() for direction in Direction}
_VERDICTS = {verdict.value: verdict.name.lower() for verdict in Verdict}
_REASONS = {reason.value: reason.name.lower() for reason in Reason}
_PROTOCOLS = {int(socket.IPPROTO_TCP): "tcp", int(socket.IPPROTO_UDP): "udp"}
_OPENED = flows.counter(flows.OPENED)
_ENDINGS = {"normal": flows.counter(flows.CLOSED + Close.NORMAL), "reset": flows.counter(flows.CLOSED + Close.RESET)}
_FAILURES = {
    "ECONNREFUSED": flows.counter(flows.CLOSED + Close.REFUSED),
    "ETIMEDOUT": flows.counter(flows.CLOSED + Close.TIMED_OUT),
    "ECANCELED": flows.counter(flows.CLOSED + Close.FAILED),
}
_SECONDS = 1e-9
_BOUNDS = (*(repr((1 << (slot + BUCKET_SHIFT)) * _SECONDS) for slot in range(BUCKETS - 1)), "+Inf")
_CONNECT = exposition.Histogram("mesh_tcp_connect_duration_seconds", "From connect() to the end of the handshake.", _BOUNDS)
_RTT = exposition.Histogram("mesh_tcp_rtt_seconds", "Smoothed round-trip time of connections that ended.", _BOUNDS)
_FILL_S = 15.0
"""How long a count of a map's elements serves."""


class FlowMetrics:
    """What is counted of connections, by who talks to whom: many thousand series."""

    def __init__(self, datapath: DataPath, ids: Ids, enrolled: Callable[[], Enrolled]) -> None:
        """`enrolled` says which namespaces to look into; it is called from the scrape's thread."""
        maps = datapath.maps
        self._verdict_table = maps["mesh_verdicts"]
        self._ids = ids
        self._enrolled = enrolled
        self._flows = Flows(maps["mesh_stats"], Sockets(maps))
        self._labels: dict[bytes, tuple[str, int]] = {}
        """(label text, protocol) of the pairs of the last scrape: a number never comes to mean another name."""
        # bpf_src/mesh_connect.c, mesh_refused
        self._refused = "ECONNREFUSED" if features.kernel_version() >= features.SET_RETVAL_KERNEL else "EPERM"

    def text(self) -> Iterator[str]:
        """The page in pieces. All that may fail happens before the first one."""
        tcp: dict[str, Flow] = {}
        udp: Counter[str] = Counter()
        failed: Counter[str] = Counter()
        found = self._flows.read(Path(local.netns_path) for local in self._enrolled().local)
        self._labels = {key: self._labels.get(key) or self._label(key) for key in found}
        for (text, protocol), flow in zip(self._labels.values(), found.values(), strict=True):
            if protocol == socket.IPPROTO_UDP:
                udp[text] += _OPENED(flow.counts)
                continue
            before = tcp.get(text)  # two workloads that are gone have the same name: none
            tcp[text] = Flow(flows.added(before.counts, flow.counts), before.active + flow.active) if before else flow
            for name, count in _FAILURES.items():
                if number := count(flow.counts):
                    failed[f'{text},errno="{name}"'] += number
        verdicts, audited = self._verdicts(failed)
        return itertools.chain(
            _connections(tcp),
            exposition.counter("mesh_tcp_connections_failed", "TCP connections that were never established, by errno.", failed),
            exposition.counter("mesh_udp_flows_opened", "UDP flows: a socket and whom it talks to.", udp),
            exposition.counter("mesh_policy_verdicts", "Connections and UDP flows decided by L4 policy.", verdicts),
            exposition.counter(
                "mesh_policy_audit_would_deny", "Connections and UDP flows that enforcing an AUDIT policy would deny.", audited
            ),
        )

    def _label(self, key: bytes) -> tuple[str, int]:
        pair = self._flows.pair(key)
        return exposition.labels(_LABELS, pair_labels(self._ids, pair)), pair.protocol

    def _verdicts(self, failed: Counter[str]) -> tuple[Counter[str], Counter[str]]:
        """Decisions by label text, and what AUDIT policies would deny. Calls that the mesh itself refused are added to `failed`."""
        table, ids = self._verdict_table, self._ids
        members = table.layout.key.unpacker("source", "target", "service", "rule", "verdict", "direction", "reason", "protocol")
        number = table.layout.value.unpacker("")
        found: Counter[str] = Counter()
        audited: Counter[str] = Counter()
        for key, values in table.items():
            source, target, service, rule, verdict, direction, reason, protocol = members(key)
            count = sum(number(value)[0] for value in values)
            dialled, _, port = ids.name(service).rpartition(":")
            ends = _ends(ids, source, target, dialled)
            way = [_DIRECTIONS[direction], _PROTOCOLS.get(protocol, str(protocol))]
            if reason == Reason.AUDIT:
                audited[exposition.labels(_AUDIT_LABELS, [*ends, ids.name(rule), *way])] += count
                continue
            labels = [*ends, dialled, _VERDICTS[verdict], ids.name(rule), _REASONS[reason], *way]
            found[exposition.labels(_VERDICT_LABELS, labels)] += count
            if verdict == Verdict.DENY and direction == Direction.OUTBOUND and protocol == socket.IPPROTO_TCP:
                name = "EPERM" if reason in {Reason.POLICY, Reason.NO_ENTRY, Reason.EGRESS} else self._refused
                # No port is counted here: that of a service is known by its name, that of a workload's own address is not.
                labels = pair_labels(ids, flows.Pair(source, target, service, 0, direction, protocol), port.partition("/")[0])
                failed[f'{exposition.labels(_LABELS, labels)},errno="{name}"'] += count
        return found, audited


def pair_labels(ids: Ids, pair: flows.Pair, port: str | None = None) -> list[str]:
    """The values of the labels of a pair; `port` is said in place of the pair's own."""
    if not any(pair):
        return [_OTHER] * len(_LABELS)
    service = ids.name(pair.service).rpartition(":")[0]
    ends = _ends(ids, pair.source, pair.target, service)
    security = "mutual_tls" if pair.mutual_tls else "none"  # Istio's words, https://istio.io/latest/docs/reference/config/metrics/#labels
    return [*ends, service, str(pair.port) if port is None else port, security, _DIRECTIONS[pair.direction]]


def _ends(ids: Ids, source: int, target: int, service: str) -> list[str]:
    """Name and namespace of both ends. Who is known as a service only has no name yet."""
    callers, _, caller = ids.name(source).partition("/")
    namespace, _, name = ids.name(target).partition("/")
    return [
        caller or "unknown",
        callers or "unknown",
        name or ("" if service else "unknown"),
        namespace or service.partition("/")[0] or "unknown",
    ]


def _connections(tcp: Mapping[str, Flow]) -> Iterator[str]:
    def counts(place: int) -> dict[str, int]:
        count = flows.counter(place)
        return {text: count(flow.counts) for text, flow in tcp.items()}

    def histogram(place: int, total: int) -> Iterator[tuple[str, tuple[int, ...], float]]:
        slots, sum_ns = flows.buckets(place), flows.counter(total)
        return ((text, slots(flow.counts), sum_ns(flow.counts) * _SECONDS) for text, flow in tcp.items())

    closed = {f'{t},reason="{name}"': count(flow.counts) for t, flow in tcp.items() for name, count in _ENDINGS.items()}
    yield from exposition.counter("mesh_tcp_connections_opened", "TCP connections established.", counts(flows.OPENED))
    yield from exposition.counter("mesh_tcp_connections_closed", "TCP connections ended, by reason.", closed)
    yield from exposition.gauge("mesh_tcp_connections_active", "TCP connections that live.", {t: f.active for t, f in tcp.items()})
    yield from exposition.counter("mesh_tcp_sent_bytes", "Payload acknowledged by the peer.", counts(flows.SENT))
    yield from exposition.counter("mesh_tcp_received_bytes", "Payload received.", counts(flows.RECEIVED))
    yield from exposition.counter("mesh_tcp_retransmits", "Segments sent again.", counts(flows.RETRANSMITS))
    yield from _CONNECT.text(histogram(flows.CONNECT_BUCKET, flows.CONNECT_NS))  # a receiver knows no connect time
    yield from _RTT.text(histogram(flows.RTT_BUCKET, flows.RTT_NS))


class MeshCollector(Collector):
    """The mesh's own metrics. Those of connections, which are many, are in `flows`, those of requests (`agent.requests`) in `requests`."""

    def __init__(  # noqa: PLR0913  one for each part that is asked
        self,
        datapath: DataPath,
        ids: Ids,
        status: Callable[[], Status],
        *,
        enrolled: Callable[[], Enrolled] = Enrolled,
        rows: Callable[[], Mapping[str, int]] = dict,
        closed_by_policy: Callable[[], int] = int,
        audited: Callable[[], Mapping[tuple[str, str], int]] = dict,
        requests: Callable[[], Iterator[str]] = lambda: iter(()),
        unlogged: Callable[[], int] = int,
    ) -> None:
        """All of these are called from the scrape's thread. `rows` are the numbers of rows that the agent keeps in maps: those need not be counted."""
        self._datapath = datapath
        self._status = status
        self._rows = rows
        self._closed_by_policy = closed_by_policy
        self._audited = audited
        self._unlogged = unlogged
        self._fill: dict[str, int] = {}
        self._filled_at = 0.0
        self.flows = FlowMetrics(datapath, ids, enrolled)
        self.requests = requests

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry must not scrape at registration."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Ask the agent's parts."""
        status = self._status()
        hooks = GaugeMetricFamily("mesh_hook_effective", "1 if the kernel runs the program, asked of the kernel.", labels=("hook",))
        for hook in status.hooks:
            hooks.add_metric((hook.name,), float(hook.effective))
        yield hooks
        yield GaugeMetricFamily("mesh_ready", "1 if the node is ready.", float(status.ready))
        yield GaugeMetricFamily("mesh_controller_connected", "1 if the discovery stream is up.", float(status.controller.connected))
        if status.controller.lag_seconds is not None:
            yield GaugeMetricFamily(
                "mesh_config_lag_seconds", "From the last source change to its effect on this node.", status.controller.lag_seconds
            )
        yield GaugeMetricFamily("mesh_waypoint_ready", "1 if Envoy answers and has its listeners.", float(status.waypoint.ready))
        yield CounterMetricFamily("mesh_xds_nacks", "Configurations that Envoy refused.", status.waypoint.nacks)
        yield from _pushes(status.waypoint)
        yield GaugeMetricFamily(
            "mesh_workloads_redirected", "Local workloads in the data path.", sum(w.redirected for w in status.workloads)
        )
        yield from _truth(status)
        yield from _identity(status.identity)
        yield from _wireguard(status.wireguard)
        yield GaugeMetricFamily(
            "mesh_loader_seconds", "Time the loader child took at the last start; 0 if the pins served.", self._datapath.loader_s
        )
        yield CounterMetricFamily(
            "mesh_connections_closed_by_policy",
            "Living connections that were closed because a changed policy forbids them.",
            self._closed_by_policy(),
        )
        yield CounterMetricFamily(
            "mesh_connection_log_dropped",
            "Connections without a line in the connection log: more came than could be written. See also mesh_datapath_events, event_unlogged.",
            self._unlogged(),
        )
        counters = CounterMetricFamily(
            "mesh_datapath_events", "Rare events in the kernel programs; any but event_* needs a look.", labels=("event",)
        )
        for name, value in self._datapath.counters().items():
            counters.add_metric((name,), value)
        yield counters
        requests = CounterMetricFamily(
            "mesh_policy_audit_requests",
            "Requests that enforcing an AUDIT policy would deny, as the waypoint saw them.",
            labels=("rule", "side"),
        )
        for (side, rule), count in sorted(self._audited().items()):
            requests.add_metric((rule, side), count)
        yield requests
        yield from self._map_fill()

    def _map_fill(self) -> Iterator[Metric]:
        entries = GaugeMetricFamily("mesh_map_entries", "Elements in a kernel table.", labels=("map",))
        capacity = GaugeMetricFamily("mesh_map_capacity", "Elements that a kernel table can hold.", labels=("map",))
        tables = {name: table for name, table in self._datapath.maps.items() if table.counted}
        known = self._rows()
        if not self._fill or time.monotonic() - self._filled_at >= _FILL_S:
            self._fill = {name: table.count() for name, table in tables.items() if name not in known}
            self._filled_at = time.monotonic()
        for name, number in (self._fill | dict(known)).items():
            entries.add_metric((name,), number)
            capacity.add_metric((name,), tables[name].capacity)
        yield entries
        yield capacity


def _pushes(waypoint: WaypointStatus) -> Iterator[Metric]:
    """What Envoy's configuration costs."""
    yield GaugeMetricFamily("mesh_xds_rejected", "Resources of which Envoy runs on the version before.", waypoint.rejected)
    sent = CounterMetricFamily("mesh_xds_resources_sent", "Resources that went to Envoy.", labels=("type",))
    for kind, count in sorted(waypoint.sent.items()):
        sent.add_metric((kind,), count)
    yield sent
    yield SummaryMetricFamily(
        "mesh_xds_push_seconds",
        "From a change of Envoy's configuration until it has acknowledged, or refused, all of it.",
        waypoint.pushes,
        waypoint.pushed_seconds,
    )
    if waypoint.resident_bytes is not None:
        yield GaugeMetricFamily("mesh_waypoint_resident_memory_bytes", "Envoy's resident memory.", waypoint.resident_bytes)


def _truth(status: Status) -> Iterator[Metric]:
    """What was found when the kernel was asked, and tried."""
    drift = GaugeMetricFamily(
        "mesh_redirect_drift", "1 if a workload's connections should be redirected and are not.", labels=("workload", "namespace")
    )
    for w in status.workloads:
        if w.enrolled:
            drift.add_metric((w.name, w.namespace), float(w.drift))
    yield drift
    if status.probe.works is not None:
        yield GaugeMetricFamily(
            "mesh_probe_success",
            "1 if the last live probe was refused by the kernel programs, as it has to be.",
            float(status.probe.works),
        )
    foreign = GaugeMetricFamily("mesh_foreign_programs", "Other people's programs at the hooks that the mesh uses.", labels=("hook",))
    for place, number in Counter(f.attach_type for f in status.foreign_programs).items():
        foreign.add_metric((place,), number)
    yield foreign


def _identity(status: IdentityStatus) -> Iterator[Metric]:
    """Certificates: when they end, and whether there is trouble to get new ones. Nothing where the controller has no identity service."""
    if status.mode == "off":
        return
    yield GaugeMetricFamily("mesh_identity_connected", "1 if the controller's identity service is reached.", float(status.connected))
    yield GaugeMetricFamily("mesh_trust_roots", "Roots that are trusted.", status.roots)
    yield GaugeMetricFamily("mesh_trust_revoked", "Certificates that are revoked.", status.revoked)
    expiry = GaugeMetricFamily(
        "mesh_identity_expiry_timestamp_seconds",
        "When a workload's certificate ends, Unix time; 0 if it has none.",
        labels=("workload", "namespace"),
    )
    failing = GaugeMetricFamily(
        "mesh_identity_renewal_failing", "1 if a workload's certificate cannot be got or renewed.", labels=("workload", "namespace")
    )
    for one in status.workloads:
        namespace, _, name = one.workload.partition("/")
        expiry.add_metric((name, namespace), one.expires_at or 0.0)
        failing.add_metric((name, namespace), float(bool(one.problem)))
    yield expiry
    yield failing
    if (node := status.node) is not None:
        yield GaugeMetricFamily(
            "mesh_node_certificate_expiry_timestamp_seconds",
            "When the node's own certificate ends, Unix time; 0 if it has none.",
            node.expires_at or 0.0,
        )
        yield GaugeMetricFamily(
            "mesh_node_certificate_renewal_failing", "1 if the node cannot join or renew its certificate.", float(bool(node.problem))
        )
    yield CounterMetricFamily("mesh_identity_signed", "Certificates that workloads of this node got.", status.signed)
    yield CounterMetricFamily("mesh_identity_sign_failures", "Requests for a workload's certificate that failed.", status.failures)
    yield CounterMetricFamily(
        "mesh_workload_api_refused", "Calls and connections that the workload socket refused.", status.callers_refused
    )


MAX_NODES = 500
"""So many other nodes have series of their own."""


def _wireguard(status: WireGuardStatus) -> Iterator[Metric]:
    """How WireGuard is doing; nothing where the mesh does not use it. Of more than MAX_NODES nodes the first by name."""
    if status.mode == "off":
        return
    yield GaugeMetricFamily("mesh_wireguard_available", "1 if this node can use WireGuard, as its mesh does.", float(status.mode == "on"))
    peers = GaugeMetricFamily("mesh_wireguard_peers", "Other nodes, by whether WireGuard encrypts the way to them.", labels=("state",))
    for state in ("encrypted", "waiting", "none"):
        peers.add_metric((state,), sum(peer.state == state for peer in status.peers))
    yield peers
    age = GaugeMetricFamily("mesh_wireguard_handshake_age_seconds", "Since the last handshake with a node.", labels=("node",))
    sent = CounterMetricFamily("mesh_wireguard_sent_bytes", "Encrypted bytes to a node.", labels=("node",))
    received = CounterMetricFamily("mesh_wireguard_received_bytes", "Encrypted bytes from a node.", labels=("node",))
    for peer in status.peers[:MAX_NODES]:
        if peer.handshake_age_seconds is not None:
            age.add_metric((peer.node,), peer.handshake_age_seconds)
            sent.add_metric((peer.node,), peer.sent_bytes)
            received.add_metric((peer.node,), peer.received_bytes)
    yield age
    yield sent
    yield received


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
        """Scrapes are not news."""


class _Server(ThreadingWSGIServer):
    address_family = socket.AF_INET


def _compressed(page: Iterable[bytes]) -> Iterator[bytes]:
    """As gzip, piece by piece, at the quickest level: labels repeat so much that the others gain little."""
    packer = zlib.compressobj(level=1, wbits=zlib.MAX_WBITS | 16)  # a gzip header and trailer: zlib.h, deflateInit2
    for piece in page:
        if packed := packer.compress(piece):
            yield packed
    yield packer.flush()


class MetricsServer:
    """The HTTP server, on threads of its own."""

    def __init__(self, config: Config, collector: MeshCollector, status: Callable[[], Status], alive: Callable[[], bool]) -> None:
        """Bind at once: a port that is taken is an EnvironmentUnfit now, not a log line later."""
        registry = CollectorRegistry()
        registry.register(collector)
        ProcessCollector(registry=registry)

        def application(environ, start_response):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            path = environ["PATH_INFO"]
            if path == "/metrics":
                page: Iterable[bytes] = itertools.chain(
                    (generate_latest(registry),), map(str.encode, collector.flows.text()), map(str.encode, collector.requests())
                )
                headers = [("Content-Type", exposition.CONTENT_TYPE)]
                if "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
                    headers.append(("Content-Encoding", "gzip"))
                    page = _compressed(page)
                start_response("200 OK", headers)
                return page
            if path == "/healthz":
                good, body = alive(), "the event loop answers\n" if alive() else "the event loop has not answered for 10 s\n"
            elif path == "/readyz":
                now = status()
                good, body = now.ready, "ready\n" if now.ready else "\n".join(now.problems) + "\n"
            else:
                start_response("404 Not Found", [("Content-Type", "text/plain")])
                return [b"/metrics, /healthz and /readyz\n"]
            start_response("200 OK" if good else "503 Service Unavailable", [("Content-Type", "text/plain; charset=utf-8")])
            return [body.encode()]

        try:
            self._server = make_server(config.metrics_address, config.metrics_port, application, _Server, handler_class=_Quiet)
        except OSError as error:
            raise EnvironmentUnfit(
                f"cannot listen on {config.metrics_address}:{config.metrics_port}: {error.strerror}; choose another --metrics-port or --metrics-address"
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)

    def start(self) -> None:
        """Serve."""
        self._thread.start()

    def stop(self) -> None:
        """Stop serving and close the port."""
        self._server.shutdown()
        self._server.server_close()
