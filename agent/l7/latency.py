"""Balancing by latency: endpoints have shares of the requests inverse to the time in which they answered last. Pure, called by `agent.l7`'s builders.

Stock Envoy has no policy that measures, but one that takes what endpoints say of their load (ORCA,
https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/extensions/load_balancing_policies/client_side_weighted_round_robin/v3/client_side_weighted_round_robin.proto).
So the waypoint says it for them: a filter of the cluster's own writes the time until the answer began into the response, where the router reads it before
routes take it away again. The last answer of each interval counts; Envoy keeps no average.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.common.mutation_rules.v3 import mutation_rules_pb2
from envoy.config.core.v3 import base_pb2, extension_pb2
from envoy.config.route.v3 import route_pb2
from envoy.extensions.filters.http.header_mutation.v3 import header_mutation_pb2
from envoy.extensions.filters.http.upstream_codec.v3 import upstream_codec_pb2
from envoy.extensions.load_balancing_policies.client_side_weighted_round_robin.v3 import client_side_weighted_round_robin_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2

from agent.l7.resources import packed

UPDATE_S = 1
EXPIRE_S = 10
"""Who was not asked for so long has a share as most have."""
_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_HEADER = "endpoint-load-metrics"
_REPORT = "TEXT application_utilization=%COMMON_DURATION(US_TX_BEG:US_RX_BEG:us)%,rps_fractional=1000000"
"""A weight is the rate divided by the utilization: the rate is the same for all. Microseconds."""


def balance(cluster: cluster_pb2.Cluster) -> None:
    """Have a cluster balanced by latency."""
    policy = client_side_weighted_round_robin_pb2.ClientSideWeightedRoundRobin()
    policy.blackout_period.seconds = policy.weight_update_period.seconds = UPDATE_S
    policy.weight_expiration_period.seconds = EXPIRE_S
    cluster.ClearField("lb_policy")
    cluster.load_balancing_policy.policies.add(
        typed_extension_config=extension_pb2.TypedExtensionConfig(
            name="envoy.load_balancing_policies.client_side_weighted_round_robin", typed_config=packed(policy)
        )
    )
    options = http_protocol_options_pb2.HttpProtocolOptions()
    cluster.typed_extension_protocol_options[_OPTIONS].Unpack(options)
    header = base_pb2.HeaderValueOption(
        header=base_pb2.HeaderValue(key=_HEADER, value=_REPORT), append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
    )
    report = header_mutation_pb2.HeaderMutation()
    report.mutations.response_mutations.append(mutation_rules_pb2.HeaderMutation(append=header))
    # An application's own report, which would go first (source/common/orca/orca_parser.cc).
    report.mutations.response_mutations.append(mutation_rules_pb2.HeaderMutation(remove=f"{_HEADER}-bin"))
    options.http_filters.add(name="envoy.filters.http.header_mutation", typed_config=packed(report))
    options.http_filters.add(name="envoy.filters.http.upstream_codec", typed_config=packed(upstream_codec_pb2.UpstreamCodec()))
    cluster.typed_extension_protocol_options[_OPTIONS].CopyFrom(packed(options))


def routes(measured: frozenset[str], make: Callable[..., route_pb2.RouteConfiguration], *inputs: Any) -> route_pb2.RouteConfiguration:
    """What `make` builds, with the report taken away where a route leads to one of these clusters."""
    result = make(*inputs)
    for route in (route for host in result.virtual_hosts for route in host.routes if measured and route.HasField("route")):
        if not measured.isdisjoint([route.route.cluster, *(one.name for one in route.route.weighted_clusters.clusters)]):
            route.response_headers_to_remove.append(_HEADER)
    return result
