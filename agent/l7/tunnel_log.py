"""Both ends of the tunnels that a trace is about: what each says of one CONNECT, and how the two are known to be the same. Pure functions.

An L4 connection has a CONNECT of its own, on which the caller's end writes who opened it, `Forwarded: for="ADDRESS:PORT"` (RFC 7239, 4), as ztunnel does: the
port is what the kernel at the caller's node knows the connection by. Requests share theirs (`agent.l7.hbone`), which has no such header. Silent unless somebody
traces; the receiver's end then also tells of a stream that begins, and, once a second, of each that is open.

Fields: https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/data/accesslog/v3/accesslog.proto.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass

from envoy.config.accesslog.v3 import accesslog_pb2
from envoy.config.core.v3 import base_pb2, grpc_service_pb2
from envoy.data.accesslog.v3 import accesslog_pb2 as record_pb2
from envoy.extensions.access_loggers.grpc.v3 import als_pb2
from envoy.service.accesslog.v3 import als_pb2 as service_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from agent.l7 import access_log, names
from agent.l7.resources import packed

_PREFIX = "tunnels/"
_FORWARDED = re.compile(r'for="([0-9A-Fa-f.:\[\]]{3,56})"')
_TLS = {"TLSv1.2", "TLSv1.3"}


@dataclass(frozen=True, slots=True)
class TunnelRecord:
    """One CONNECT as one of its ends saw it. Addresses are ADDRESS:PORT ("" = none or not known), times in nanoseconds."""

    receiver: bool
    """Which end: the receiver's, or the caller's."""
    workload: str
    """Whose listener; "" of the caller's end of requests, where `netns_path` says who calls."""
    netns_path: str
    caller: str
    """The connection that it carries, at the caller's own end; "" if it carries requests."""
    target: str
    """What was asked for: the CONNECT's authority."""
    remote: str
    """The other end of the tunnel's TCP connection."""
    peer: str
    """SPIFFE ID that the other end has proved."""
    tls: str
    code: int
    """What the receiver answered; of the caller's end always 0."""
    details: str
    flags: tuple[str, ...]
    failure: str
    """Why there is no tunnel, or no connection behind it, in Envoy's words."""
    ended: bool
    start_ns: int
    """Unix time, by the clock of the node."""
    duration_ns: int
    sent_bytes: int
    received_bytes: int
    stream: str = ""
    """At the receiver: Envoy's own end of its connection to the application."""


def of_receiver(workload: str) -> accesslog_pb2.AccessLog:
    """The log of a listener that ends tunnels."""
    tags = {"forwarded": "%REQ(FORWARDED)%", "tls": "%DOWNSTREAM_TLS_VERSION%", "peer": "%DOWNSTREAM_PEER_URI_SAN%"}
    config = als_pb2.HttpGrpcAccessLogConfig(common_config=_common(names.listener(names.HBONE, workload), tags))
    return _log("http_grpc", names.received_key(workload), config)


def of_handshakes(workload: str) -> accesslog_pb2.AccessLog:
    """The log of the connections of that listener: with TLS 1.3 it alone knows why a caller's certificate was not accepted, the caller sees a closed tunnel."""
    config = als_pb2.TcpGrpcAccessLogConfig(common_config=_common(names.listener(names.HBONE, workload), {}))
    return _log("tcp_grpc", names.received_key(workload), config, record_pb2.NotSet, record_pb2.TcpConnectionEnd)


def of_caller(workload: str) -> accesslog_pb2.AccessLog:
    """The log of the listener for a workload's L4 connections."""
    return _of_caller(names.listener(names.TUNNEL, workload), names.trace_key(workload), "%DOWNSTREAM_LOCAL_ADDRESS%")


def of_relay(target: str) -> accesslog_pb2.AccessLog:
    """The log of the internal listener for requests; `target` is the format of what it connects to."""
    return _of_caller(names.TUNNEL, names.TRACE_TUNNELS_KEY, target)


def _of_caller(log_name: str, key: str, target: str) -> accesslog_pb2.AccessLog:
    tags = {
        "target": target,
        "netns": f"%FILTER_STATE({names.NETNS_KEY}:PLAIN)%",
        "tls": "%UPSTREAM_TLS_VERSION%",
        "peer": "%UPSTREAM_PEER_URI_SAN%",
    }
    return _log("tcp_grpc", key, als_pb2.TcpGrpcAccessLogConfig(common_config=_common(log_name, tags)), record_pb2.TcpConnectionEnd)


def _log(kind: str, key: str, config: Message, *types: record_pb2.AccessLogType) -> accesslog_pb2.AccessLog:
    wanted = accesslog_pb2.AccessLogFilter()
    runtime = accesslog_pb2.RuntimeFilter(runtime_key=key, use_independent_randomness=True)
    if types:
        wanted.and_filter.filters.add(runtime_filter=runtime)
        wanted.and_filter.filters.add(log_type_filter=accesslog_pb2.LogTypeFilter(types=types))
    else:
        wanted.runtime_filter.CopyFrom(runtime)
    return accesslog_pb2.AccessLog(name=f"envoy.access_loggers.{kind}", filter=wanted, typed_config=packed(config))


def _common(listener: str, tags: dict[str, str]) -> als_pb2.CommonGrpcAccessLogConfig:
    service = grpc_service_pb2.GrpcService(
        envoy_grpc=grpc_service_pb2.GrpcService.EnvoyGrpc(cluster_name=names.XDS_CLUSTER), timeout=Duration(seconds=1)
    )
    result = als_pb2.CommonGrpcAccessLogConfig(
        log_name=_PREFIX + listener, transport_api_version="V3", grpc_service=service, buffer_flush_interval=Duration(nanos=50_000_000)
    )
    for tag, text in tags.items():
        result.custom_tags.add(tag=tag, value=text)
    return result


def forwarded() -> base_pb2.HeaderValueOption:
    """The header with which an L4 connection's CONNECT says whose it is."""
    header = base_pb2.HeaderValue(key="forwarded", value='for="%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%"')
    return base_pb2.HeaderValueOption(header=header, append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD)


def is_one(log_name: str) -> bool:
    """Is this the name of such a log?"""
    return log_name.startswith(_PREFIX)


def records(message: service_pb2.StreamAccessLogsMessage, log_name: str) -> Iterator[TunnelRecord]:
    """Decode one message of such a log."""
    side, _, workload = log_name.removeprefix(_PREFIX).partition("/")
    for entry in message.http_logs.log_entry:
        common, response = entry.common_properties, entry.response
        found = _FORWARDED.search(access_log.tag(common, "forwarded"))
        yield _record(
            common,
            receiver=True,
            workload=workload,
            caller=found[1] if found else "",
            target=entry.request.authority,
            remote=access_log.endpoint(common.downstream_direct_remote_address),
            code=response.response_code.value,
            details=response.response_code_details,
            sent=response.response_body_bytes,
            received=entry.request.request_body_bytes,
        )
    for tcp in message.tcp_logs.log_entry:
        common = tcp.common_properties
        if side == names.HBONE:
            if common.downstream_transport_failure_reason:
                yield _handshake(common, workload)
            continue
        yield _record(
            common,
            receiver=False,
            workload=workload,
            caller=access_log.endpoint(common.downstream_direct_remote_address) if workload else "",
            target=access_log.tag(common, "target"),
            remote=access_log.endpoint(common.upstream_remote_address),
            code=0,
            details=common.connection_termination_details,
            sent=tcp.connection_properties.received_bytes,
            received=tcp.connection_properties.sent_bytes,
        )


def _handshake(common: record_pb2.AccessLogCommon, workload: str) -> TunnelRecord:
    found = _record(
        common,
        receiver=True,
        workload=workload,
        caller="",
        target=access_log.endpoint(common.downstream_local_address),
        remote=access_log.endpoint(common.downstream_direct_remote_address),
        code=0,
        details="",
        sent=0,
        received=0,
    )
    return dataclasses.replace(found, peer="", failure=common.downstream_transport_failure_reason, ended=True)


def _record(  # noqa: PLR0913  what the two protocols spell differently
    common: record_pb2.AccessLogCommon,
    *,
    receiver: bool,
    workload: str,
    caller: str,
    target: str,
    remote: str,
    code: int,
    details: str,
    sent: int,
    received: int,
) -> TunnelRecord:
    tls = access_log.tag(common, "tls")
    return TunnelRecord(
        receiver=receiver,
        workload=workload,
        netns_path=access_log.tag(common, "netns"),
        caller=caller,
        target=target,
        remote=remote,
        peer=access_log.tag(common, "peer"),
        tls=tls if tls in _TLS else "",
        code=code,
        details=details,
        flags=access_log.flags(common),
        failure=common.upstream_transport_failure_reason,
        ended=common.access_log_type in {record_pb2.TcpConnectionEnd, record_pb2.DownstreamEnd},
        start_ns=common.start_time.ToNanoseconds(),
        duration_ns=access_log.nanoseconds(common.duration),
        sent_bytes=sent,
        received_bytes=received,
        stream=access_log.endpoint(common.upstream_local_address) if receiver else "",
    )
