"""Requests as Envoy counts them: an access log that writes no line, but adds to counters and to a histogram. Pure functions.

Called by `agent.l7.listeners` and `agent.l7.bootstrap`; `agent.requests` reads what was counted. Nothing of a request reaches Python.

Each statistic has one tag, `TAG`, whose value says who talks to whom: parts between `SEPARATOR`, in the order of `Key`, and of the requests' counter also code,
gRPC status and flags. One tag instead of twelve, and two statistics, because each costs a request 1 to 2 us: bytes, retries and ejections are read from what
Envoy counts for clusters anyway. Parts that only the agent can turn into names (the address that was dialled) become names when somebody asks. What callers and
applications choose freely (paths, hosts, headers) is in no tag; status codes of applications are, so each listener's scope is bounded, and statistics that have
not changed for an hour or two are removed.

https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/extensions/access_loggers/stats/v3/stats.proto,
https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/type/v3/scope.proto.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from envoy.config.accesslog.v3 import accesslog_pb2
from envoy.config.core.v3 import base_pb2
from envoy.extensions.access_loggers.stats.v3 import stats_pb2
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.wrappers_pb2 import UInt32Value

from agent.l7 import names
from agent.l7.resources import packed

PREFIX = "mesh"
TAG = "k"
SEPARATOR = "|"
REQUESTS, DURATION = "requests", "duration"
BOUNDS_US = (500, 1000, 2500, 5000, 10000, 25000, 50000, 100000, 250000, 500000, 1000000, 2500000, 5000000, 10000000)
"""Upper bounds of the histogram, microseconds; +Inf comes after them."""
MOST_COUNTERS = 5000
MOST_HISTOGRAMS = 2000
"""So many Envoy keeps for one listener, so that no workload takes the room of others; what finds none is not counted."""
IDLE_S = 3600
"""Envoy looks so often; what did not change between two looks is removed."""
_SCOPE_FIELD = 6  # Config.stats_scope; xds-protos 1.85 does not know it
TARGET, NAME = "mesh.target", "name"
"""Metadata of an endpoint: which workload it is."""
ENDPOINT = f"%UPSTREAM_METADATA({TARGET}:{NAME})%"
"""The same as a format: NAMESPACE/NAME of the endpoint's workload, then ` mutual_tls` if through a tunnel."""


class Key(NamedTuple):
    """Who talks to whom, as Envoy knows it. "" where it does not."""

    direction: str
    """"outbound": accepted for the caller; "inbound": accepted for the receiver."""
    owner: str
    """NAMESPACE/NAME of the workload whose listener it is."""
    peer: str
    """SPIFFE ID of the caller, if it came through a tunnel."""
    address: str
    """ADDRESS:PORT that was dialled."""
    target: str
    """NAMESPACE/NAME of the endpoint's workload, then ` mutual_tls` if through a tunnel."""
    route: str


def endpoint(metadata: base_pb2.Metadata, workload: str, *, tunnelled: bool) -> None:
    """Note on an endpoint which workload it is, and whether requests get there through a tunnel.

    filter_metadata[TARGET].fields[NAME].string_value, encoded by hand: there can be 100,000 endpoints, and messages within maps take 20 us each to make.
    """
    text = (f"{workload} mutual_tls" if tunnelled else workload).encode()
    value = _entry(NAME, _length_delimited(3, text))
    metadata.MergeFromString(_entry(TARGET, value))


def bootstrap() -> dict[str, Any]:
    """What Envoy's bootstrap has to say: the histogram's bounds, and when idle statistics go."""
    settings = {"match": {"prefix": f"{PREFIX}."}, "buckets": list(BOUNDS_US)}
    return {"stats_config": {"histogram_bucket_settings": [settings]}, "stats_eviction_interval": f"{IDLE_S}s"}


def access_logs(workload: str, log_name: str) -> list[accesslog_pb2.AccessLog]:
    """Build the logs of a workload's listener; `log_name` is the listener's name (`names.listener`).

    The histogram is of requests that were answered: of others Envoy has no time from first to last byte, and writes an error to its own log each time.
    """
    key = _key(workload, log_name.partition("/")[0])
    answer = SEPARATOR.join((key, "%RESPONSE_CODE%", "%GRPC_STATUS_NUMBER%", "%RESPONSE_FLAGS%"))
    counted = stats_pb2.Config(counters=[stats_pb2.Config.Counter(stat=_stat(REQUESTS, answer), value_fixed={"value": 1})])
    duration = "%COMMON_DURATION(DS_RX_BEG:DS_TX_END:us)%"
    timed = stats_pb2.Config(
        histograms=[
            stats_pb2.Config.Histogram(stat=_stat(DURATION, key), unit=stats_pb2.Config.Histogram.Microseconds, value_format=duration)
        ]
    )
    answered = accesslog_pb2.AccessLogFilter()
    comparison = answered.status_code_filter.comparison
    comparison.op = accesslog_pb2.ComparisonFilter.GE
    comparison.value.default_value, comparison.value.runtime_key = 1, "meshagent.unused"
    return [_log(counted), _log(timed, answered)]


def _key(workload: str, side: str) -> str:
    outbound = side in {names.OUTBOUND, names.GATEWAY}
    address = f"%FILTER_STATE({names.ORIGINAL_DESTINATION_KEY}:PLAIN)%" if side == names.INNER else "%DOWNSTREAM_LOCAL_ADDRESS%"
    return SEPARATOR.join(
        Key(
            names.OUTBOUND if outbound else names.INBOUND,
            workload.replace("%", "%%"),
            f"%FILTER_STATE({names.PEER_KEY}:PLAIN)%" if side == names.INNER else "",
            address,
            ENDPOINT if outbound else "",
            "%ROUTE_NAME%",
        )
    )


def _stat(name: str, key: str) -> stats_pb2.Config.Stat:
    return stats_pb2.Config.Stat(name=name, tags=[stats_pb2.Config.Tag(name=TAG, value_format=key)])


def _log(config: stats_pb2.Config, wanted: accesslog_pb2.AccessLogFilter | None = None) -> accesslog_pb2.AccessLog:
    encoded = packed(config)
    encoded.value += _SCOPE
    return accesslog_pb2.AccessLog(
        name="envoy.access_loggers.stats", typed_config=AnyMessage(type_url=encoded.type_url, value=encoded.value), filter=wanted
    )


def _length_delimited(number: int, content: bytes) -> bytes:
    """A field of a protobuf message, shorter than 16 KiB (https://protobuf.dev/programming-guides/encoding/#length-types)."""
    length = len(content)
    return bytes((number << 3 | 2, length) if length < 128 else (number << 3 | 2, length & 127 | 128, length >> 7)) + content


def _entry(key: str, value: bytes) -> bytes:
    """An entry of a map that is a message's first field."""
    return _length_delimited(1, _length_delimited(1, key.encode()) + _length_delimited(2, value))


def _limit(number: int, most: int) -> bytes:
    return _length_delimited(number, UInt32Value(value=most).SerializeToString())


_EVICT = bytes((4 << 3, 1))
# envoy.type.v3.Scope: max_counters, max_histograms, enable_eviction, prefix. No sharing_name: with one Envoy 1.40 crashes when it ends.
_SCOPE = _length_delimited(
    _SCOPE_FIELD, _limit(1, MOST_COUNTERS) + _limit(3, MOST_HISTOGRAMS) + _EVICT + _length_delimited(5, PREFIX.encode())
)
