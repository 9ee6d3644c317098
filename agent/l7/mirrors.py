"""Mirrored requests: from the caller's namespace and under the caller's identity, as everything that a caller causes. Used by `agent.l7.snapshot`.

Envoy sends copies without the filter state of the request (Envoy, Router::Filter, ShadowWriterImpl), so they would leave from the node's own namespace and
without a certificate. Therefore every copy goes to one internal listener first: the mirror's header mutations, which see the original request, write down
who calls and where the copy goes, and overwrite what a client may have sent; the listener turns that into filter state again.
"""

from __future__ import annotations

from collections.abc import Iterable

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.common.mutation_rules.v3 import mutation_rules_pb2
from envoy.config.core.v3 import base_pb2
from envoy.config.listener.v3 import listener_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.extensions.filters.http.router.v3 import router_pb2
from envoy.extensions.filters.http.set_filter_state.v3 import set_filter_state_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2
from envoy.type.v3 import percent_pb2
from google.protobuf.duration_pb2 import Duration

from agent.l7 import clusters, listeners, names
from agent.l7.resources import packed
from agent.routing import Mirror

_CLUSTER, _NETNS, _CERTIFICATE = (f"x-meshagent-mirror-{name}" for name in ("cluster", "netns", "certificate"))
_WHOLE = {
    100: percent_pb2.FractionalPercent.HUNDRED,
    10_000: percent_pb2.FractionalPercent.TEN_THOUSAND,
    1_000_000: percent_pb2.FractionalPercent.MILLION,
}


def cluster() -> cluster_pb2.Cluster:
    """Build the cluster that all copies go to."""
    result = clusters.internal_cluster(names.MIRROR, names.MIRROR)
    options = http_protocol_options_pb2.HttpProtocolOptions()
    options.explicit_http_config.http2_protocol_options.SetInParent()  # carries gRPC as well
    result.typed_extension_protocol_options["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"].CopyFrom(packed(options))
    return result


def copy(action: route_components_pb2.RouteAction, wanted: Mirror) -> None:
    """Add a mirror to a route. Host stays as it is: Gateway API knows nothing of Envoy's suffix "-shadow"."""
    policy = action.request_mirror_policies.add(cluster=names.MIRROR, disable_shadow_host_suffix_append=True)
    policy.runtime_fraction.default_value.numerator = wanted.parts
    policy.runtime_fraction.default_value.denominator = _WHOLE[wanted.whole]
    for name, text in (
        (_CLUSTER, names.service(wanted.service, wanted.port)),
        (_NETNS, f"%FILTER_STATE({names.NETNS_KEY}:PLAIN)%"),
        (_CERTIFICATE, f"%FILTER_STATE({names.CERTIFICATE_KEY}:PLAIN)%"),
    ):
        header = base_pb2.HeaderValueOption(
            header=base_pb2.HeaderValue(key=name, value=text), append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
        )
        policy.request_headers_mutations.append(mutation_rules_pb2.HeaderMutation(append=header))


def listener(secured: bool) -> listener_pb2.Listener:
    """Build the node's internal listener for copies; `secured` if callers have certificates for other nodes."""
    state = [listeners.value(names.NETNS_KEY, f"%REQ({_NETNS})%", factory="envoy.hashable_string", shared=True)]
    if secured:
        state.append(listeners.value(names.CERTIFICATE_KEY, f"%REQ({_CERTIFICATE})%", factory="envoy.hashable_string", shared=True))
    who = set_filter_state_pb2.Config(on_request_headers=state)
    manager = hcm_pb2.HttpConnectionManager(
        stat_prefix=names.MIRROR,
        codec_type=hcm_pb2.HttpConnectionManager.HTTP2,
        http_filters=[
            hcm_pb2.HttpFilter(name="envoy.filters.http.set_filter_state", typed_config=packed(who)),
            hcm_pb2.HttpFilter(name="envoy.filters.http.router", typed_config=packed(router_pb2.Router(suppress_envoy_headers=True))),
        ],
        stream_idle_timeout=Duration(),
        generate_request_id={"value": False},
        skip_xff_append=True,
    )
    manager.rds.route_config_name = names.MIRROR
    manager.rds.config_source.CopyFrom(clusters.ads())
    result = listener_pb2.Listener(name=names.MIRROR, stat_prefix=names.MIRROR, traffic_direction=base_pb2.OUTBOUND)
    result.internal_listener.SetInParent()
    result.filter_chains.add(name="mirror", filters=[listeners.http(manager)])
    return result


def routes() -> route_pb2.RouteConfiguration:
    """Build the routes of the listener: where the copy says."""
    route = route_components_pb2.Route(name="mirror", match=route_components_pb2.RouteMatch(prefix="/"))
    route.route.cluster_header = _CLUSTER
    route.route.timeout.CopyFrom(Duration())  # the copy has that of the request
    host = route_components_pb2.VirtualHost(name="*", domains=["*"], routes=[route])
    return route_pb2.RouteConfiguration(name=names.MIRROR, virtual_hosts=[host], request_headers_to_remove=_headers())


def _headers() -> Iterable[str]:
    return (_CLUSTER, _NETNS, _CERTIFICATE, names.DESTINATION_HEADER)
