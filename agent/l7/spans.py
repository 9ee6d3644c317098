"""Distributed tracing: spans of the waypoint, in W3C trace context, by OTLP over gRPC. Pure; used by `agent.l7.listeners` and `agent.l7.snapshot`.

Only listeners of workloads whose namespace has a collector have a tracer: others pay nothing. A request has a span at each waypoint that sees it as a
request (the caller's, and the receiver's where a policy needs it), and under it one for each attempt. The caller's decision about sampling is kept to
(ParentBased); where there is none the route's mark decides (`agent.l7.telling`). x-request-id has no part in it, and stays the application's.

https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/config/trace/v3/opentelemetry.proto, https://www.w3.org/TR/trace-context/.
"""

from __future__ import annotations

from collections.abc import Iterable

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.common.mutation_rules.v3 import mutation_rules_pb2
from envoy.config.core.v3 import extension_pb2, grpc_service_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.config.trace.v3 import http_tracer_pb2, opentelemetry_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from envoy.extensions.http.early_header_mutation.header_mutation.v3 import header_mutation_pb2
from envoy.extensions.request_id.uuid.v3 import uuid_pb2
from envoy.extensions.tracers.opentelemetry.samplers.v3 import cel_sampler_pb2, parent_based_sampler_pb2
from envoy.type.tracing.v3 import custom_tag_pb2
from google.protobuf.duration_pb2 import Duration

from agent.l7 import cel, clusters, names, request_log, telling
from agent.l7.resources import packed
from agent.l7.telling import Telling

CONTEXT = ("traceparent", "tracestate")
"""Headers of W3C trace context."""
_PATH = "%PATH(NQ:ORIG_OR_PATH):1024%"
"""Without the query, which may hold secrets."""
_EXPORT_S = 5


def cluster(service: str, port: int) -> cluster_pb2.Cluster:
    """Build the cluster of a collector in the mesh: in plaintext, from the node's own namespace; its endpoints come over EDS."""
    result = clusters.base(names.collector(service, port), "grpc")
    result.type = cluster_pb2.Cluster.EDS
    result.eds_cluster_config.eds_config.CopyFrom(clusters.ads())
    result.ignore_health_on_host_removal = True
    return result


def endpoints(service: str, port: int, targets: Iterable[clusters.Target]) -> endpoint_pb2.ClusterLoadAssignment:
    """Build its endpoints."""
    return clusters.assignment(names.collector(service, port), targets)


def trace(manager: hcm_pb2.HttpConnectionManager, workload: str, log_name: str, said: Telling) -> None:
    """Give the connection manager of a workload's listener a tracer."""
    side = log_name.partition("/")[0]
    outbound = side in {names.OUTBOUND, names.GATEWAY}
    result = manager.tracing
    result.spawn_upstream_span.value = True
    result.client_sampling.value = 0  # nobody forces a trace with x-client-trace-id
    result.operation = "%REQ(:METHOD):32% %ROUTE_NAME%"
    result.upstream_operation = "attempt %UPSTREAM_REQUEST_ATTEMPT_COUNT%"
    owner = workload.replace("%", "%%")
    tags = {
        "http.url": _PATH,  # in place of Envoy's, which has the query
        "mesh.direction": names.OUTBOUND if outbound else names.INBOUND,
        "mesh.source.workload": owner if outbound else "",
        "mesh.source.identity": f"%FILTER_STATE({names.PEER_KEY}:PLAIN)%" if side == names.INNER else "",
        "mesh.destination.workload": request_log.target("UPSTREAM_HOST") if outbound else owner,
        "mesh.route": "%ROUTE_NAME%",
        "mesh.attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
        "mesh.reason": "%RESPONSE_CODE_DETAILS%",
        "mesh.redirect.dialled": f"%FILTER_STATE({names.ORIGINAL_DESTINATION_KEY}:PLAIN)%"
        if side == names.INNER
        else "%DOWNSTREAM_LOCAL_ADDRESS%",
    }
    result.custom_tags.extend(custom_tag_pb2.CustomTag(tag=tag, value=value) for tag, value in tags.items() if value)
    service = result.custom_tags.add(tag="mesh.destination.service").metadata
    service.kind.route.SetInParent()
    service.metadata_key.key = telling.MARKS
    service.metadata_key.path.add(key=telling.SERVICE)
    if outbound:
        tunnel = result.custom_tags.add(tag="mesh.tunnel").metadata
        tunnel.kind.host.SetInParent()
        tunnel.metadata_key.key = names.TUNNEL_METADATA
        tunnel.metadata_key.path.add(key="target")
    config = opentelemetry_pb2.OpenTelemetryConfig(service_name=said.account, sampler=_sampler())
    config.grpc_service.CopyFrom(
        grpc_service_pb2.GrpcService(
            envoy_grpc=grpc_service_pb2.GrpcService.EnvoyGrpc(cluster_name=said.collector), timeout=Duration(seconds=_EXPORT_S)
        )
    )
    result.provider.CopyFrom(http_tracer_pb2.Tracing.Http(name="envoy.tracers.opentelemetry", typed_config=packed(config)))
    identity = uuid_pb2.UuidRequestIdConfig(pack_trace_reason={"value": False}, use_request_id_for_trace_sampling={"value": False})
    manager.request_id_extension.typed_config.CopyFrom(packed(identity))


def _sampler() -> extension_pb2.TypedExtensionConfig:
    marks = cel.entry(cel.attribute("xds.route_metadata.filter_metadata"), telling.MARKS)
    wanted = cel_sampler_pb2.CELSamplerConfig(expression=cel.parsed(cel.equals(cel.entry(marks, telling.TRACE), telling.YES)))
    by_mark = extension_pb2.TypedExtensionConfig(name="envoy.tracers.opentelemetry.samplers.cel", typed_config=packed(wanted))
    parent = parent_based_sampler_pb2.ParentBasedSamplerConfig(wrapped_sampler=by_mark)
    return extension_pb2.TypedExtensionConfig(name="envoy.tracers.opentelemetry.samplers.parent_based", typed_config=packed(parent))


def strip() -> extension_pb2.TypedExtensionConfig:
    """Remove trace context before anything looks at a request: a stranger decides neither what is sampled nor whose child it is."""
    mutation = header_mutation_pb2.HeaderMutation(mutations=[mutation_rules_pb2.HeaderMutation(remove=name) for name in CONTEXT])
    return extension_pb2.TypedExtensionConfig(name="envoy.http.early_header_mutation.header_mutation", typed_config=packed(mutation))
