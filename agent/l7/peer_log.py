"""What the far ends of open tunnels have shown: asked of Envoy, which alone knows it, when somebody is no longer to be believed. Pure functions.

TLS 1.3 encrypts certificates, and Envoy looks at one only during the handshake. So each end of a tunnel has an access log that speaks of every open stream
once a `EVERY_S`, which a runtime key keeps silent: `agent.distrust` turns it on after a revocation, and closes the sockets that the records name. Nothing is
kept meanwhile, so neither an agent that was away nor an Envoy older than the agent makes a difference. A tunnel without streams is not spoken of: at the
receiver `refusal` lets a revoked certificate open no new one, at the caller the tunnels' clusters are made anew (`Distrusted.revision`).

Fields: https://www.envoyproxy.io/docs/envoy/v1.40.0/configuration/observability/access_log/usage (periodic records: HcmAccessLogOptions, TcpAccessLogOptions).
"""

from __future__ import annotations

import hashlib
import urllib.parse
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from envoy.config.accesslog.v3 import accesslog_pb2
from envoy.config.core.v3 import grpc_service_pb2
from envoy.config.rbac.v3 import rbac_pb2
from envoy.data.accesslog.v3 import accesslog_pb2 as record_pb2
from envoy.extensions.access_loggers.grpc.v3 import als_pb2
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2 as filter_pb2
from envoy.service.accesslog.v3 import als_pb2 as service_pb2
from envoy.type.matcher.v3 import filter_state_pb2, string_pb2
from google.protobuf.duration_pb2 import Duration

from agent.l7 import names
from agent.l7.resources import packed

EVERY_S = 1
"""How often an open stream is looked at. While nobody asks that costs a timer and one look at a runtime key, about 1 us."""
LOG_NAME = "peers"
_DOWNSTREAM = {
    "local": "%DOWNSTREAM_LOCAL_ADDRESS%",
    "remote": "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%",
    "certificate": "%DOWNSTREAM_PEER_CERT%",
}
_UPSTREAM = {"local": "%UPSTREAM_LOCAL_ADDRESS%", "remote": "%UPSTREAM_REMOTE_ADDRESS%", "certificate": "%UPSTREAM_PEER_CERT%"}
_PERIODIC = (record_pb2.DownstreamPeriodic, record_pb2.TcpPeriodic)


class Shown(NamedTuple):
    """A tunnel with an open stream. `local` and `remote` are ADDRESS:PORT of its TCP connection in the namespace at `netns_path`."""

    netns_path: str
    local: str
    remote: str
    certificate: bytes
    """The peer's own, PEM."""


class Distrusted(NamedTuple):
    """Who is not believed any more. `serials` are revoked (as Envoy spells them, sorted); `revision` is another one if these or the roots are others."""

    serials: tuple[str, ...] = ()
    revision: str = ""

    @staticmethod
    def of(revoked: Iterable[int], roots: Iterable[bytes]) -> Distrusted:
        """Of serial numbers, and of roots that are trusted."""
        serials = tuple(sorted(_spelled(serial) for serial in revoked))
        digest = hashlib.blake2b(digest_size=9)
        for part in (*(serial.encode() for serial in serials), *sorted(roots)):
            digest.update(len(part).to_bytes(4, "big") + part)
        return Distrusted(serials, digest.hexdigest())


def _spelled(serial: int) -> str:
    """As %DOWNSTREAM_PEER_SERIAL% does: two digits a byte."""
    digits = f"{serial:x}"
    return digits.zfill(len(digits) + len(digits) % 2)


def of_receiver() -> accesslog_pb2.AccessLog:
    """The log of a listener that ends tunnels."""
    config = als_pb2.HttpGrpcAccessLogConfig(common_config=_common(_DOWNSTREAM))
    return accesslog_pb2.AccessLog(name="envoy.access_loggers.http_grpc", filter=_when_asked(), typed_config=packed(config))


def of_caller() -> accesslog_pb2.AccessLog:
    """The log of a TCP proxy that opens them."""
    config = als_pb2.TcpGrpcAccessLogConfig(common_config=_common(_UPSTREAM))
    return accesslog_pb2.AccessLog(name="envoy.access_loggers.tcp_grpc", filter=_when_asked(), typed_config=packed(config))


def _common(formats: dict[str, str]) -> als_pb2.CommonGrpcAccessLogConfig:
    service = grpc_service_pb2.GrpcService(
        envoy_grpc=grpc_service_pb2.GrpcService.EnvoyGrpc(cluster_name=names.XDS_CLUSTER), timeout=Duration(seconds=1)
    )
    result = als_pb2.CommonGrpcAccessLogConfig(
        log_name=LOG_NAME, transport_api_version="V3", grpc_service=service, buffer_flush_interval=Duration(nanos=50_000_000)
    )
    for tag, text in {"netns": f"%FILTER_STATE({names.NETNS_KEY}:PLAIN)%", **formats}.items():
        result.custom_tags.add(tag=tag, value=text)
    return result


def _when_asked() -> accesslog_pb2.AccessLogFilter:
    """Periodic records while the runtime key is set; without it none."""
    result = accesslog_pb2.AccessLogFilter()
    asked = accesslog_pb2.RuntimeFilter(runtime_key=names.PEERS_KEY, use_independent_randomness=True)
    result.and_filter.filters.add(runtime_filter=asked)
    result.and_filter.filters.add(log_type_filter=accesslog_pb2.LogTypeFilter(types=_PERIODIC))
    return result


def shown(message: service_pb2.StreamAccessLogsMessage) -> Iterator[Shown]:
    """Decode one message of such a log; streams whose tunnel is not open yet are left out."""
    for entry in (*message.http_logs.log_entry, *message.tcp_logs.log_entry):
        tags = entry.common_properties.custom_tags
        certificate = urllib.parse.unquote_to_bytes(tags.get("certificate", ""))
        if certificate.startswith(b"-----BEGIN"):
            yield Shown(tags["netns"], tags["local"], tags["remote"], certificate)


def refusal(serials: Iterable[str]) -> bytes:
    """Per-route configuration of `names.PEER_FILTER`, an encoded Any: who opens no stream, whatever policies say.

    Whose certificate has one of these serial numbers; and whose has several names, which is no SVID (X509-SVID, 2): Envoy believes one that has a name
    that fits among others, and joins them with commas.
    """
    rules = rbac_pb2.RBAC(action=rbac_pb2.RBAC.DENY)
    _deny(rules, "several-names", names.PEER_KEY, [string_pb2.StringMatcher(contains=",")])
    _deny(rules, "revoked", names.PEER_SERIAL_KEY, [string_pb2.StringMatcher(exact=serial) for serial in serials])
    config = filter_pb2.RBACPerRoute()
    config.rbac.rules.CopyFrom(rules)
    encoded: bytes = packed(config).SerializeToString(deterministic=True)
    return encoded


def _deny(rules: rbac_pb2.RBAC, name: str, key: str, matchers: list[string_pb2.StringMatcher]) -> None:
    if matchers:
        found = [filter_state_pb2.FilterStateMatcher(key=key, string_match=match) for match in matchers]
        rules.policies[name].principals.extend(rbac_pb2.Principal(filter_state=one) for one in found)
        rules.policies[name].permissions.add(any=True)
