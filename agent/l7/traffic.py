"""What TrafficPolicies say about the endpoints of a service port, in Envoy's words: balancing, limits, ejection, health. Pure, called by `agent.l7.snapshot`.

It is part of the service port's cluster and holds whichever route leads there; `agent.l7.limits` has what holds for requests to the service itself. What
each field means is said by the kind's schema.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from envoy.config.cluster.v3 import circuit_breaker_pb2, cluster_pb2, outlier_detection_pb2
from envoy.config.core.v3 import extension_pb2, health_check_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.config.route.v3 import route_components_pb2
from envoy.extensions.load_balancing_policies.common.v3 import common_pb2
from envoy.extensions.load_balancing_policies.maglev.v3 import maglev_pb2
from envoy.extensions.load_balancing_policies.ring_hash.v3 import ring_hash_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2

from agent.balancing import SAME_NODE, SAME_ZONE
from agent.l7 import clusters, latency, names
from agent.l7.clusters import HTTP2_PROTOCOLS, Target
from agent.l7.limits import milliseconds
from agent.l7.resources import packed
from agent.model import ServicePort, Workload
from agent.traffic import Balancing, CheckKind, HashOn, HealthCheck, Limits, LoadBalancing, Outliers, TrafficPolicy

COOKIE_PATH = "/"
MERGE_MS = 100
"""How long Envoy collects news of healthy and unhealthy endpoints before it uses them. In its own second a failing endpoint goes on getting requests."""
_LB_POLICIES = {
    Balancing.LEAST_REQUEST: cluster_pb2.Cluster.LEAST_REQUEST,
    Balancing.ROUND_ROBIN: cluster_pb2.Cluster.ROUND_ROBIN,
    Balancing.RANDOM: cluster_pb2.Cluster.RANDOM,
}
_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def levels(
    endpoints: Sequence[tuple[Workload, int]], policy: TrafficPolicy, distribution: str, node: str, zone: str
) -> list[list[tuple[Workload, int]]] | None:
    """The endpoints by priority, the first level first, none empty; None: the policy leaves that to the service's trafficDistribution.

    A trafficDistribution becomes priorities too where the waypoint knows who is unhealthy: what is near can then fail over.
    """
    prefer = policy.balancing.prefer or (distribution if policy.outliers or policy.health_check else "")
    if prefer not in {SAME_NODE, SAME_ZONE}:
        return None
    found: list[list[tuple[Workload, int]]] = [[], [], []]
    for workload, port in endpoints:
        here = prefer == SAME_NODE and workload.node == node
        found[0 if here else 1 if zone and workload.zone == zone else 2].append((workload, port))
    return [level for level in found if level]


def endpoints(name: str, port: int, by_level: Iterable[tuple[tuple[Target, bool], ...]]) -> endpoint_pb2.ClusterLoadAssignment:
    """Build the endpoints of a service port by priority, each with whether it is asked for its health; who is not asked counts as healthy.

    https://www.envoyproxy.io/docs/envoy/v1.40.0/intro/arch_overview/upstream/load_balancing/priority: the next level gets requests as soon as less than
    1/1.4 of the one before is healthy.
    """
    result = endpoint_pb2.ClusterLoadAssignment(cluster_name=names.service(name, port))
    for priority, level in enumerate(filter(None, by_level)):
        ordered = sorted(level, key=lambda one: one[0].read)
        part = clusters.service_endpoints(name, port, [target for target, _ in ordered]).endpoints
        for group in part:
            group.priority = priority
        for host, (_, asked) in zip((host for group in part for host in group.lb_endpoints), ordered, strict=True):
            host.endpoint.health_check_config.disable_active_health_check = not asked
        result.endpoints.extend(part)
    return result


def cluster(policy: TrafficPolicy, name: str, port: ServicePort, secured: bool, prober: str) -> cluster_pb2.Cluster:
    """Build the cluster of a service port that a policy decides for. `prober` is the path of the namespace that health checks leave from; "": there are none.

    A health check has no downstream connection to say whose namespace is meant. Left alone it would come from the node's own, a stranger to policies.
    So the cluster's own source address is one of a caller; requests go on to leave from the namespace of whoever sends them.
    """
    result = clusters.service_cluster(name, port, secured)
    _balance(result, policy.balancing)
    _limit(result, policy.limits)
    if policy.outliers or policy.health_check:
        result.common_lb_config.update_merge_window.CopyFrom(milliseconds(MERGE_MS))
    if policy.outliers:
        result.outlier_detection.CopyFrom(_outliers(policy.outliers))
    if prober and (check := checked(policy, port)) is not None:
        result.health_checks.append(_health_check(check, name, http2=_http2(port)))
        source = result.upstream_bind_config
        source.source_address.network_namespace_filepath = prober
        for extra in source.extra_source_addresses:
            extra.address.network_namespace_filepath = prober
    return result


def checked(policy: TrafficPolicy, port: ServicePort) -> HealthCheck | None:
    """How endpoints of the port are asked; gRPC's question needs HTTP/2, without which Envoy would refuse the whole cluster."""
    check = policy.health_check
    return None if check is None or (check.kind is CheckKind.GRPC and not _http2(port)) else check


def _http2(port: ServicePort) -> bool:
    return port.app_protocol.lower() in HTTP2_PROTOCOLS


def _balance(result: cluster_pb2.Cluster, wanted: LoadBalancing) -> None:
    if wanted.panic_percent is not None:
        result.common_lb_config.healthy_panic_threshold.value = wanted.panic_percent
    if wanted.kind in {Balancing.RING_HASH, Balancing.MAGLEV}:
        # In the cluster and not in each route: it holds whichever route leads here.
        result.ClearField("lb_policy")
        result.load_balancing_policy.policies.add(typed_extension_config=_hashing(wanted))
        return
    if wanted.kind is Balancing.LATENCY:
        latency.balance(result)
        return
    result.lb_policy = _LB_POLICIES[wanted.kind]
    slow = cluster_pb2.Cluster.SlowStartConfig(slow_start_window=milliseconds(wanted.slow_start_ms))
    if wanted.slow_start_min_percent:
        slow.min_weight_percent.value = wanted.slow_start_min_percent
    if wanted.kind is Balancing.LEAST_REQUEST:
        if wanted.choices:
            result.least_request_lb_config.choice_count.value = wanted.choices
        if wanted.slow_start_ms:
            result.least_request_lb_config.slow_start_config.CopyFrom(slow)
    elif wanted.kind is Balancing.ROUND_ROBIN and wanted.slow_start_ms:
        result.round_robin_lb_config.slow_start_config.CopyFrom(slow)


def _hashing(wanted: LoadBalancing) -> extension_pb2.TypedExtensionConfig:
    common = common_pb2.ConsistentHashingLbConfig(hash_policy=[_hash(part) for part in wanted.hash_on])
    if wanted.load_bound_percent:
        common.hash_balance_factor.value = wanted.load_bound_percent
    if wanted.kind is Balancing.MAGLEV:
        maglev = maglev_pb2.Maglev(consistent_hashing_lb_config=common)
        if wanted.table_size:
            maglev.table_size.value = wanted.table_size
        return extension_pb2.TypedExtensionConfig(name="envoy.load_balancing_policies.maglev", typed_config=packed(maglev))
    ring = ring_hash_pb2.RingHash(consistent_hashing_lb_config=common)
    if wanted.table_size:
        ring.minimum_ring_size.value = wanted.table_size
    return extension_pb2.TypedExtensionConfig(name="envoy.load_balancing_policies.ring_hash", typed_config=packed(ring))


def _hash(part: HashOn) -> route_components_pb2.RouteAction.HashPolicy:
    result = route_components_pb2.RouteAction.HashPolicy()
    if part.kind == "header":
        result.header.header_name = part.name
    elif part.kind == "query":
        result.query_parameter.name = part.name
    elif part.kind == "cookie":
        result.cookie.name = part.name
        if part.cookie_ms:
            result.cookie.ttl.CopyFrom(milliseconds(part.cookie_ms))
            result.cookie.path = COOKIE_PATH
    else:
        # The namespace of the caller is the one thing about it that Envoy can hash (Hashable), and is the calling workload.
        result.filter_state.key = names.NETNS_KEY
    return result


def _limit(result: cluster_pb2.Cluster, limits: Limits) -> None:
    threshold = result.circuit_breakers.thresholds[0]
    for field, value in (
        ("max_connections", limits.connections),
        ("max_pending_requests", limits.pending),
        ("max_requests", limits.requests),
    ):
        if value:
            getattr(threshold, field).value = value
    if limits.retries is not None:
        threshold.max_retries.value = limits.retries
    if limits.retry_percent is not None:
        threshold.ClearField("max_retries")
        budget = circuit_breaker_pb2.CircuitBreakers.Thresholds.RetryBudget(budget_percent={"value": limits.retry_percent})
        if limits.retry_min is not None:
            budget.min_retry_concurrency.value = limits.retry_min
        threshold.retry_budget.CopyFrom(budget)
    if limits.connect_ms:
        result.connect_timeout.CopyFrom(milliseconds(limits.connect_ms))
    if limits.requests_per_connection or limits.idle_ms:
        options = http_protocol_options_pb2.HttpProtocolOptions()
        result.typed_extension_protocol_options[_OPTIONS].Unpack(options)
        if limits.requests_per_connection:
            options.common_http_protocol_options.max_requests_per_connection.value = limits.requests_per_connection
        if limits.idle_ms:
            options.common_http_protocol_options.idle_timeout.CopyFrom(milliseconds(limits.idle_ms))
        result.typed_extension_protocol_options[_OPTIONS].CopyFrom(packed(options))


def _outliers(wanted: Outliers) -> outlier_detection_pb2.OutlierDetection:
    """https://www.envoyproxy.io/docs/envoy/v1.40.0/intro/arch_overview/upstream/outlier. What the policy does not name is switched off, statistics included."""
    result = outlier_detection_pb2.OutlierDetection(
        interval=milliseconds(wanted.interval_ms),
        base_ejection_time=milliseconds(wanted.ejection_ms),
        max_ejection_time=milliseconds(wanted.max_ejection_ms),
        max_ejection_percent={"value": wanted.max_percent},
        enforcing_success_rate={"value": 0},
        enforcing_local_origin_success_rate={"value": 0},
        enforcing_consecutive_5xx={"value": 100 if wanted.errors else 0},
        enforcing_consecutive_gateway_failure={"value": 100 if wanted.gateway_errors else 0},
        successful_active_health_check_uneject_host={"value": False},
    )
    if wanted.errors:
        result.consecutive_5xx.value = wanted.errors
    if wanted.gateway_errors:
        result.consecutive_gateway_failure.value = wanted.gateway_errors
    if wanted.local_errors:
        result.split_external_local_origin_errors = True
        result.consecutive_local_origin_failure.value = wanted.local_errors
        result.enforcing_consecutive_local_origin_failure.value = 100
    return result


def _health_check(wanted: HealthCheck, service: str, *, http2: bool) -> health_check_pb2.HealthCheck:
    result = health_check_pb2.HealthCheck(
        interval=milliseconds(wanted.interval_ms),
        no_traffic_interval=milliseconds(wanted.interval_ms),  # Envoy's minute would leave an endpoint that nobody uses unknown
        timeout=milliseconds(wanted.timeout_ms),
        unhealthy_threshold={"value": wanted.unhealthy},
        healthy_threshold={"value": wanted.healthy},
    )
    if wanted.kind is CheckKind.HTTP:
        namespace, _, name = service.partition("/")
        result.http_health_check.path = wanted.path
        result.http_health_check.host = wanted.host or f"{name}.{namespace}"
        result.http_health_check.codec_client_type = 1 if http2 else 0
        for status in wanted.statuses:
            result.http_health_check.expected_statuses.add(start=status, end=status + 1)
    elif wanted.kind is CheckKind.GRPC:
        result.grpc_health_check.service_name = wanted.grpc_service
    else:
        result.tcp_health_check.SetInParent()
    return result
