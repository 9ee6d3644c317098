"""Access logs: one line of JSON for each request that is marked for it (`agent.l7.telling`), written by Envoy itself. Pure; used by `agent.l7.listeners`.

Every listener has the log, silent until runtime keys say otherwise: turning logs on or off drains no connection. Fields have the names of the connection log
(`agent.connection_log`); what callers choose is bounded, and queries of paths, which may hold secrets, are cut off. Headers are not logged.
https://www.envoyproxy.io/docs/envoy/v1.40.0/configuration/observability/access_log/usage.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from envoy.config.accesslog.v3 import accesslog_pb2
from envoy.config.core.v3 import substitution_format_string_pb2
from envoy.extensions.access_loggers.file.v3 import file_pb2
from envoy.extensions.access_loggers.filters.cel.v3 import cel_pb2

from agent.l7 import metrics, names, telling
from agent.l7.resources import packed
from agent.model import LocalWorkload, Snapshot
from agent.observability import Observability

LOG_KEY = "meshagent.requests"
"""Runtime key (percent): does anybody on this node want lines? Marks are looked at only then."""
_UNROUTED = ("NR", "DPE")
"""Response flags of requests that no route took, and so no mark tells about: no route, or not HTTP."""
_LOG = f"xds.route_metadata.filter_metadata['{telling.MARKS}'].{telling.LOG}"
_FAILED = "(response.code == 0 || response.code >= 500 || (response.code >= 400 && response.code_details != 'via_upstream'))"
_WANTED = f"{_LOG} == '{telling.EACH}' || ({_LOG} == '{telling.ERRORS}' && {_FAILED})"


def target(*others: str) -> str:
    """A format: the first that there is of the workload that answers, as its endpoint says, and of others."""
    operators = [
        {"command": "UPSTREAM_METADATA", "param": f"{names.TUNNEL_METADATA}:workload"},
        {"command": "UPSTREAM_METADATA", "param": f"{metrics.TARGET}:{metrics.NAME}"},
        *({"command": one} for one in others),
    ]
    return f"%COALESCE({json.dumps({'operators': operators})})%"


def unrouted_key(workload: str) -> str:
    """Runtime key (percent): lines about requests of a workload's listeners that no route took."""
    return f"{LOG_KEY}." + workload.replace("/", ".", 1)


def runtime(snapshot: Snapshot, local: Iterable[LocalWorkload]) -> dict[str, int]:
    """The keys that are not 0."""
    observability = Observability(snapshot.telemetry)
    if not observability.logs_requests:
        return {}
    workloads = (one.workload for one in local)
    wanting = sorted(one.name for one in workloads if observability.of_namespace(one.namespace).errors)
    return {LOG_KEY: 100, **{unrouted_key(name): 100 for name in wanting}}


def access_log(workload: str, log_name: str, path: str) -> accesslog_pb2.AccessLog:
    """Build the log of a workload's listener; `log_name` is the listener's name (`names.listener`), `path` the file."""
    layout = substitution_format_string_pb2.SubstitutionFormatString(omit_empty_values=True)
    layout.json_format.update(_fields(workload, log_name.partition("/")[0]))
    config = file_pb2.FileAccessLog(path=path, log_format=layout)
    return accesslog_pb2.AccessLog(name="envoy.access_loggers.file", filter=_filter(workload), typed_config=packed(config))


def _filter(workload: str) -> accesslog_pb2.AccessLogFilter:
    marked, unrouted = accesslog_pb2.AccessLogFilter(), accesslog_pb2.AccessLogFilter()
    marked.and_filter.filters.add(runtime_filter=_runtime(LOG_KEY))
    expression = cel_pb2.ExpressionFilter(expression=_WANTED)
    marked.and_filter.filters.add(
        extension_filter=accesslog_pb2.ExtensionFilter(name="envoy.access_loggers.extension_filters.cel", typed_config=packed(expression))
    )
    unrouted.and_filter.filters.add(runtime_filter=_runtime(unrouted_key(workload)))
    unrouted.and_filter.filters.add(response_flag_filter=accesslog_pb2.ResponseFlagFilter(flags=_UNROUTED))
    return accesslog_pb2.AccessLogFilter(or_filter=accesslog_pb2.OrFilter(filters=[marked, unrouted]))


def _runtime(key: str) -> accesslog_pb2.RuntimeFilter:
    return accesslog_pb2.RuntimeFilter(runtime_key=key, use_independent_randomness=True)


def _fields(workload: str, side: str) -> dict[str, str]:
    """Bytes are those that the application of this side sends and receives."""
    owner, outbound = workload.replace("%", "%%"), side in {names.OUTBOUND, names.GATEWAY}
    inner = side == names.INNER
    return {
        "time": "%START_TIME(%Y-%m-%dT%H:%M:%S.%3fZ)%",
        "kind": "request",
        "direction": names.OUTBOUND if outbound else names.INBOUND,
        "source": owner if outbound else f"%FILTER_STATE({names.PEER_KEY}:PLAIN)%" if inner else "",
        "sourceAddress": f"%FILTER_STATE({names.PEER_ADDRESS_KEY}:PLAIN)%" if inner else "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%",
        "dialled": f"%FILTER_STATE({names.ORIGINAL_DESTINATION_KEY}:PLAIN)%" if inner else "%DOWNSTREAM_LOCAL_ADDRESS%",
        "service": f"%METADATA(ROUTE:{telling.MARKS}:{telling.SERVICE})%",
        "destination": target() if outbound else owner,
        "destinationAddress": "%UPSTREAM_HOST%",
        "tunnel": f"%UPSTREAM_METADATA({names.TUNNEL_METADATA}:target)%" if outbound else "",
        "protocol": "%PROTOCOL%",
        "method": "%REQ(:METHOD):32%",
        "authority": "%REQ(:AUTHORITY):256%",
        "path": "%PATH(NQ:ORIG_OR_PATH):1024%",
        "route": "%ROUTE_NAME%",
        "status": "%RESPONSE_CODE%",
        "grpcStatus": "%GRPC_STATUS_NUMBER%",
        "reason": "%RESPONSE_CODE_DETAILS%",
        "flags": "%RESPONSE_FLAGS%",
        "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
        "durationMs": "%DURATION%",
        "sentBytes": "%BYTES_RECEIVED%" if outbound else "%BYTES_SENT%",
        "receivedBytes": "%BYTES_SENT%" if outbound else "%BYTES_RECEIVED%",
        "traceId": "%TRACE_ID%",
    }
