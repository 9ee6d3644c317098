"""Requests for the agent's memory of what was called lately: at most `RATE` records a second from the whole of Envoy. Pure functions.

Called by `agent.l7.listeners`; what they say is decoded here for `agent.calls`. The bound is Envoy's own (a token bucket of the process), so what it costs does
not grow with the requests: above it a sample is recorded. A runtime key switches all of it off. The query of a path never leaves this module.

https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/extensions/access_loggers/filters/process_ratelimit/v3/process_ratelimit.proto
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from envoy.config.accesslog.v3 import accesslog_pb2
from envoy.data.accesslog.v3 import accesslog_pb2 as data_pb2
from envoy.extensions.access_loggers.filters.process_ratelimit.v3 import process_ratelimit_pb2
from envoy.extensions.access_loggers.grpc.v3 import als_pb2
from envoy.service.accesslog.v3 import als_pb2 as service_pb2
from envoy.type.v3 import token_bucket_pb2
from google.protobuf.duration_pb2 import Duration

from agent.l7 import metrics, names
from agent.l7.clusters import ads
from agent.l7.resources import packed

RATE, BURST = 50, 500
"""Records a second, and at once."""
FLUSH_MS = 200
"""How long Envoy keeps records: a message costs the agent as much as several of them."""
_SIDES = (names.OUTBOUND, names.INBOUND, names.GATEWAY)
_DIALLED, _CALLER, _TARGET, _METHOD, _GRPC = "dialled", "caller", "target", "method", "grpc"
_WORD = re.compile("[A-Z]{1,32}")
MOST_PATH = 2048
"""Characters of a path that are looked at."""


class Asked(NamedTuple):
    """One request. Addresses are "IP:PORT" as Envoy prints them; "" where something is not known."""

    side: str
    owner: str
    """Workload whose listener it is: the caller, of an inbound one the receiver."""
    caller_address: str
    dialled: str
    cluster: str
    """Names of clusters are in `agent.l7.names`."""
    target: str
    """Workload that was chosen."""
    method: str
    path: str
    """As it went on: of what a route has changed policies are decided by the receiver, who saw this."""
    code: int
    grpc: str
    """Number of the gRPC status; "-" or "": none."""
    details: str
    """%RESPONSE_CODE_DETAILS%: "via_upstream" if the receiver answered."""


def bucket() -> token_bucket_pb2.TokenBucket:
    """The resource `names.CALLS_BUCKET`."""
    return token_bucket_pb2.TokenBucket(max_tokens=BURST, tokens_per_fill={"value": RATE}, fill_interval=Duration(seconds=1))


def access_logs(log_name: str, to_agent: als_pb2.HttpGrpcAccessLogConfig) -> list[accesslog_pb2.AccessLog]:
    """The log of a listener; none for requests whose caller's listener tells of them. `to_agent` is filled."""
    if log_name.partition("/")[0] not in _SIDES:
        return []
    common = to_agent.common_config
    common.log_name = f"{names.CALLS}/{log_name}"
    common.buffer_flush_interval.CopyFrom(Duration(nanos=FLUSH_MS * 1_000_000))
    del common.filter_state_objects_to_log[:]
    for tag, text in (
        (_DIALLED, "%DOWNSTREAM_LOCAL_ADDRESS%"),
        (_CALLER, "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT%"),
        (_TARGET, metrics.ENDPOINT),
        (_METHOD, "%REQ(:METHOD):32%"),
        (_GRPC, "%GRPC_STATUS_NUMBER%"),
    ):
        common.custom_tags.add(tag=tag, value=text)
    wanted = accesslog_pb2.AccessLogFilter()
    wanted.and_filter.filters.add(runtime_filter=accesslog_pb2.RuntimeFilter(runtime_key=names.CALLS_KEY, use_independent_randomness=True))
    limit = process_ratelimit_pb2.ProcessRateLimitFilter()
    limit.dynamic_config.resource_name = names.CALLS_BUCKET
    limit.dynamic_config.config_source.CopyFrom(ads())
    wanted.and_filter.filters.add(
        extension_filter=accesslog_pb2.ExtensionFilter(
            name="envoy.access_loggers.extension_filters.process_ratelimit", typed_config=packed(limit)
        )
    )
    return [accesslog_pb2.AccessLog(name="envoy.access_loggers.http_grpc", filter=wanted, typed_config=packed(to_agent))]


def asked(message: service_pb2.StreamAccessLogsMessage, log_name: str) -> Iterator[Asked]:
    """Decode one message; `log_name` is the one that the stream's first message carried."""
    side, _, owner = log_name.removeprefix(f"{names.CALLS}/").partition("/")
    for entry in message.http_logs.log_entry:
        yield _asked(entry, side, owner)


def _asked(entry: data_pb2.HTTPAccessLogEntry, side: str, owner: str) -> Asked:
    common, request = entry.common_properties, entry.request
    tags = common.custom_tags
    target = tags.get(_TARGET, "").partition(" ")[0]
    return Asked(
        side=side,
        owner=owner,
        caller_address=tags.get(_CALLER, ""),
        dialled=tags.get(_DIALLED, ""),
        cluster=common.upstream_cluster,
        target="" if target == "-" else target,
        method=method if _WORD.fullmatch(method := tags.get(_METHOD, "")) else "",
        path=request.path[:MOST_PATH].partition("?")[0],
        code=entry.response.response_code.value,
        grpc=tags.get(_GRPC, ""),
        details=entry.response.response_code_details,
    )
