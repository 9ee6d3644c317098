"""One request as Envoy saw it, decoded from its gRPC access log. Used by `agent.l7.xds`; read by `trace`. Nothing is kept here.

Envoy streams records only for workloads that are being traced (see `agent.l7.listeners`), so this code costs nothing otherwise. Fields:
https://www.envoyproxy.io/docs/envoy/v1.37.0/api-v3/data/accesslog/v3/accesslog.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from envoy.config.core.v3 import address_pb2, base_pb2
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2
from google.protobuf.duration_pb2 import Duration

from agent.l7 import names

TAGS = {"peer": f"%FILTER_STATE({names.PEER_KEY}:PLAIN)%", "peer-address": f"%FILTER_STATE({names.PEER_ADDRESS_KEY}.pool:PLAIN)%"}
"""What such a log is to tell of each request besides: format strings of Envoy's (`agent.l7.listeners`)."""
_PROTOCOLS = {1: "HTTP/1.0", 2: "HTTP/1.1", 3: "HTTP/2", 4: "HTTP/3"}


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request through one listener. Addresses are "IP:PORT" ("" = none), times in nanoseconds (0 = did not happen)."""

    side: str
    """"outbound" (accepted for the caller) or "inbound" (accepted for the receiver)."""
    workload: str
    """Owner of the listener: the caller for outbound, the receiver for inbound."""
    method: str
    path: str
    authority: str
    protocol: str
    response_code: int
    """0 if the caller went away before there was one."""
    response_flags: tuple[str, ...]
    """What Envoy noticed, in words ("no healthy upstream"); empty for a plain success."""
    response_code_details: str
    """Why this code; names the policy that refused: rbac_access_denied_matched_policy[NS/NAME[rule]], or [none] if no ALLOW matched."""
    audited: str
    """Name of the AUDIT policy rule that matched, or ""."""
    route_name: str
    upstream_cluster: str
    upstream_address: str
    tunnelled: bool
    """Through a tunnel to another node."""
    upstream_local_address: str
    downstream_remote_address: str
    """The caller's own end: its port is how kernel events of the same connection are found."""
    original_destination: str
    attempts: int
    start_ns: int
    """Unix time."""
    duration_ns: int
    upstream_connected_ns: int
    """From the start until the first byte was sent upstream."""
    first_upstream_byte_ns: int
    """From the start until the first byte of the response came from upstream."""
    bytes_received: int
    """Of the request: headers and body."""
    bytes_sent: int
    """Of the response: headers and body."""
    request_id: str = ""
    """X-Request-Id, if the application sent one."""
    failure: str = ""
    """Why no connection upstream came about, in Envoy's words."""
    peer: str = ""
    """SPIFFE ID that the caller has proved; of what came out of a tunnel only."""
    peer_address: str = ""
    """Where that tunnel came from, without a port."""


def records(message: als_pb2.StreamAccessLogsMessage, log_name: str) -> Iterator[RequestRecord]:
    """Decode the HTTP entries of one message; `log_name` is the one that the stream's first message carried (names.listener)."""
    side, _, workload = log_name.partition("/")
    for entry in message.http_logs.log_entry:
        yield _record(entry, side, workload)


def _record(entry: accesslog_pb2.HTTPAccessLogEntry, side: str, workload: str) -> RequestRecord:
    common, request, response = entry.common_properties, entry.request, entry.response
    return RequestRecord(
        side=side,
        workload=workload,
        method=base_pb2.RequestMethod.Name(request.request_method) if request.request_method else "",
        path=request.original_path or request.path,
        authority=request.authority,
        protocol=_PROTOCOLS.get(entry.protocol_version, ""),
        response_code=response.response_code.value,
        response_flags=flags(common),
        response_code_details=response.response_code_details,
        audited=_audited(common),
        route_name=common.route_name,
        upstream_cluster=common.upstream_cluster,
        upstream_address=endpoint(common.upstream_remote_address),
        tunnelled=common.upstream_remote_address.HasField("envoy_internal_address"),
        upstream_local_address=endpoint(common.upstream_local_address),
        downstream_remote_address=endpoint(common.downstream_direct_remote_address),
        original_destination=endpoint(common.downstream_local_address),
        attempts=common.upstream_request_attempt_count,
        start_ns=common.start_time.ToNanoseconds(),
        duration_ns=nanoseconds(common.duration) or nanoseconds(common.time_to_last_downstream_tx_byte),
        upstream_connected_ns=nanoseconds(common.time_to_first_upstream_tx_byte),
        first_upstream_byte_ns=nanoseconds(common.time_to_first_upstream_rx_byte),
        bytes_received=request.request_headers_bytes + request.request_body_bytes,
        bytes_sent=response.response_headers_bytes + response.response_body_bytes,
        request_id=request.request_id,
        failure=common.upstream_transport_failure_reason,
        peer=tag(common, "peer"),
        peer_address=tag(common, "peer-address"),
    )


def flags(common: accesslog_pb2.AccessLogCommon) -> tuple[str, ...]:
    """What Envoy noticed, in words."""
    found = [field.name.replace("_", " ") for field, value in common.response_flags.ListFields() if value is True]
    return (*found, "unauthorized") if common.response_flags.HasField("unauthorized_details") else tuple(found)


def tag(common: accesslog_pb2.AccessLogCommon, name: str) -> str:
    """One of the values that a log's configuration asks for besides the protocol's own; "" where Envoy has none, which it writes as -."""
    value: str = common.custom_tags.get(name, "")
    return "" if value == "-" else value


def _audited(common: accesslog_pb2.AccessLogCommon) -> str:
    for metadata in common.metadata.filter_metadata.values():
        for key, value in metadata.fields.items():
            if key.endswith("shadow_effective_policy_id"):
                return str(value.string_value)
    return ""


def endpoint(address: address_pb2.Address) -> str:
    """Of an internal listener it is what the listener connects to (`agent.l7.clusters`)."""
    if address.HasField("envoy_internal_address"):
        return str(address.envoy_internal_address.endpoint_id)
    socket = address.socket_address
    return names.destination(socket.address, socket.port_value) if socket.address else ""


def nanoseconds(duration: Duration) -> int:
    """A protobuf duration as a number."""
    return duration.seconds * 1_000_000_000 + duration.nanos
