"""/metrics, /healthz and /readyz. Kernel maps are read at scrape time, in the scrape's own thread; nothing is counted in Python."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from agent.bpf.datapath import DataPath
from agent.bpf.manifest import BUCKET_SHIFT, Close, Direction, Reason, Verdict
from agent.config import Config
from agent.errors import EnvironmentUnfit
from agent.ids import Ids
from agent.report import Status

_LABELS = (
    "source_workload",
    "source_namespace",
    "destination_workload",
    "destination_namespace",
    "destination_service",
    "port",
    "security_policy",
    "direction",
)
_SECONDS = 1e-9
_BUCKETS = 16


class MeshCollector(Collector):
    """The mesh's own metrics."""

    def __init__(self, datapath: DataPath, ids: Ids, status: Callable[[], Status]) -> None:
        """`status` is called from the scrape's thread."""
        self._datapath = datapath
        self._ids = ids
        self._status = status

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry must not scrape at registration."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Read the maps."""
        yield from self._connections()
        yield self._verdicts()
        yield from self._self()

    def _connections(self) -> Iterator[Metric]:
        table = self._datapath.maps["mesh_stats"]
        opened = CounterMetricFamily("mesh_tcp_connections_opened", "TCP connections established.", labels=_LABELS)
        closed = CounterMetricFamily("mesh_tcp_connections_closed", "TCP connections ended, by reason.", labels=(*_LABELS, "reason"))
        failed = CounterMetricFamily("mesh_tcp_connections_failed", "TCP connections that were never established.", labels=_LABELS)
        sent = CounterMetricFamily("mesh_tcp_sent_bytes", "Payload acknowledged by the peer, counted at close.", labels=_LABELS)
        received = CounterMetricFamily("mesh_tcp_received_bytes", "Payload received, counted at close.", labels=_LABELS)
        retransmits = CounterMetricFamily("mesh_tcp_retransmits", "Segments sent again, counted at close.", labels=_LABELS)
        connect = HistogramMetricFamily("mesh_tcp_connect_duration_seconds", "From connect() to the end of the handshake.", labels=_LABELS)
        rtt = HistogramMetricFamily("mesh_tcp_rtt_seconds", "Smoothed round-trip time at close.", labels=_LABELS)
        for key, values in table.items():
            k = table.layout.key.unpack(key)
            parts = [table.layout.value.unpack(v) for v in values]
            s = _sum(parts)
            labels = self._labels(k) if any(key) else ["other"] * len(_LABELS)  # the zero key: what did not fit into the map
            opened.add_metric(labels, s["opened"])
            for reason in (Close.NORMAL, Close.RESET):
                closed.add_metric([*labels, reason.name.lower()], s["closed"][reason])
            failed.add_metric(labels, s["closed"][Close.FAILED])
            sent.add_metric(labels, s["sent_bytes"])
            received.add_metric(labels, s["received_bytes"])
            retransmits.add_metric(labels, s["retransmits"])
            if k["direction"] != Direction.INBOUND:
                connect.add_metric(labels, _buckets(s["connect_bucket"]), s["connect_ns"] * _SECONDS)
            rtt.add_metric(labels, _buckets(s["rtt_bucket"]), s["rtt_ns"] * _SECONDS)
        yield from (opened, closed, failed, sent, received, retransmits, connect, rtt)

    def _labels(self, key: Mapping[str, int]) -> list[str]:
        source, target = self._ids.name(key["source"]), self._ids.name(key["target"])
        return [
            source.partition("/")[2] or "unknown",
            source.partition("/")[0] or "unknown",
            target.partition("/")[2] or ("" if key["service"] else "unknown"),
            target.partition("/")[0] or self._ids.name(key["service"]).partition("/")[0] or "unknown",
            self._ids.name(key["service"]).rpartition(":")[0],
            str(key["port"]),
            "none",
            Direction(key["direction"]).name.lower(),
        ]

    def _verdicts(self) -> Metric:
        table = self._datapath.maps["mesh_verdicts"]
        labels = (
            "source_workload",
            "source_namespace",
            "destination_workload",
            "destination_namespace",
            "verdict",
            "rule",
            "reason",
            "direction",
        )
        family = CounterMetricFamily("mesh_policy_verdicts", "Connections decided by L4 policy.", labels=labels)
        for key, values in table.items():
            k = table.layout.key.unpack(key)
            source, target = self._ids.name(k["source"]), self._ids.name(k["target"])
            family.add_metric(
                [
                    source.partition("/")[2] or "unknown",
                    source.partition("/")[0] or "unknown",
                    target.partition("/")[2] or "unknown",
                    target.partition("/")[0] or "unknown",
                    Verdict(k["verdict"]).name.lower(),
                    self._ids.name(k["rule"]),
                    Reason(k["reason"]).name.lower(),
                    Direction(k["direction"]).name.lower(),
                ],
                sum(table.layout.value.unpack(v)[""] for v in values),
            )
        return family

    def _self(self) -> Iterator[Metric]:
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
        yield GaugeMetricFamily(
            "mesh_workloads_redirected", "Local workloads in the data path.", sum(w.redirected for w in status.workloads)
        )
        yield GaugeMetricFamily(
            "mesh_loader_seconds", "Time the loader child took at the last start; 0 if the pins served.", self._datapath.loader_s
        )
        counters = CounterMetricFamily(
            "mesh_datapath_events", "Rare events in the kernel programs; any but event_* needs a look.", labels=("event",)
        )
        for name, value in self._datapath.counters().items():
            counters.add_metric((name,), value)
        yield counters


def _sum(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Element-wise sum over CPUs; arrays stay tuples."""
    total = dict(parts[0])
    for part in parts[1:]:
        for name, value in part.items():
            total[name] = tuple(map(sum, zip(total[name], value, strict=True))) if isinstance(value, tuple) else total[name] + value
    return total


def _buckets(counts: tuple[int, ...]) -> list[tuple[str, float]]:
    """Cumulative Prometheus buckets of MESH_BUCKETS doublings; the last slot has no upper bound."""
    found, seen = [], 0
    for slot, count in enumerate(counts):
        seen += count
        bound = "+Inf" if slot == _BUCKETS - 1 else repr((1 << (slot + BUCKET_SHIFT)) * _SECONDS)
        found.append((bound, float(seen)))
    return found


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
        """Scrapes are not news."""


class _Server(ThreadingWSGIServer):
    address_family = socket.AF_INET


class MetricsServer:
    """The HTTP server, on threads of its own."""

    def __init__(self, config: Config, collector: MeshCollector, status: Callable[[], Status], alive: Callable[[], bool]) -> None:
        """Bind at once: a port that is taken is an EnvironmentUnfit now, not a log line later."""
        registry = CollectorRegistry()
        registry.register(collector)
        ProcessCollector(registry=registry)
        metrics = make_wsgi_app(registry)

        def application(environ, start_response):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            path = environ["PATH_INFO"]
            if path == "/metrics":
                return metrics(environ, start_response)
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
