"""What TrafficPolicies say about requests to a service port, as Envoy's HTTP filters: faults, rate limits, bandwidth. Pure, called by `agent.l7.snapshot`.

It is configuration for the whole RouteConfiguration of the service port (`guarded`), one object for all callers of the node: counts are shared by them and
begin anew when the service's routes change. The filters stand in every chain (`http_filters`), disabled and not even made until such a configuration wakes
them (https://www.envoyproxy.io/docs/envoy/v1.40.0/intro/arch_overview/http/http_filters#route-based-filter-chain).

Who calls is read from filter state, which the accepting listener has set (`agent.l7.listeners`), never from a header.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from envoy.config.core.v3 import base_pb2, extension_pb2
from envoy.config.route.v3 import route_pb2
from envoy.extensions.common.matching.v3 import extension_matcher_pb2
from envoy.extensions.common.ratelimit.v3 import ratelimit_pb2
from envoy.extensions.filters.common.fault.v3 import fault_pb2 as common_fault_pb2
from envoy.extensions.filters.common.matcher.action.v3 import skip_action_pb2
from envoy.extensions.filters.http.composite.v3 import composite_pb2
from envoy.extensions.filters.http.fault.v3 import fault_pb2
from envoy.extensions.filters.http.local_ratelimit.v3 import local_rate_limit_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from envoy.extensions.rate_limit_descriptors.expr.v3 import expr_pb2
from envoy.type.matcher.v3 import http_inputs_pb2
from envoy.type.v3 import percent_pb2
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct
from xds.core.v3 import extension_pb2 as xds_extension_pb2
from xds.type.matcher.v3 import cel_pb2, matcher_pb2, regex_pb2
from xds.type.matcher.v3 import http_inputs_pb2 as cel_inputs_pb2
from xds.type.matcher.v3 import string_pb2 as xds_string_pb2
from xds.type.v3 import typed_struct_pb2

from agent.l7 import cel, names, quota
from agent.l7.resources import packed
from agent.traffic import Fault, Per, RateLimit, TrafficPolicy

FAULT_FILTER = "meshagent.fault"
RATE_FILTER = "meshagent.rate"
BANDWIDTH_FILTER = "meshagent.bandwidth"
MOST_CALLERS = 10_000
"""Counts that one rate limit keeps; beyond that the callers that were quiet the longest begin anew."""
PPM = 1_000_000
_NO_LIMIT = 1_000_000_000
_CALLER_KEYS = {Per.WORKLOAD: names.WORKLOAD_KEY, Per.SERVICE_ACCOUNT: names.SERVICE_ACCOUNT_KEY, Per.NAMESPACE: names.NAMESPACE_KEY}
_BANDWIDTH_TYPE = "type.googleapis.com/envoy.extensions.filters.http.bandwidth_share.v3.BandwidthShare"


def milliseconds(value: int) -> Duration:
    """A length of time as Envoy spells it."""
    return Duration(seconds=value // 1000, nanos=value % 1000 * 1_000_000)


def guarded(policy: TrafficPolicy | None, make: Callable[..., route_pb2.RouteConfiguration], *inputs: Any) -> route_pb2.RouteConfiguration:
    """What `make` builds for a service port, with what its policy wants of requests to it."""
    result = make(*inputs)
    if policy is None:
        return result
    deadline = policy.limits.grpc_deadline_ms
    if deadline is not None:
        for route in (route for host in result.virtual_hosts for route in host.routes if route.HasField("route")):
            route.route.max_stream_duration.grpc_timeout_header_max.CopyFrom(milliseconds(deadline))
    filters = result.typed_per_filter_config
    if policy.faults:
        filters[FAULT_FILTER].CopyFrom(packed(extension_matcher_pb2.ExtensionWithMatcherPerRoute(xds_matcher=_faults(policy.faults))))
    if policy.rate_limits:
        filters[RATE_FILTER].CopyFrom(packed(_rate_limits(policy.rate_limits)))
        quota.configure(filters, result.name, policy.rate_limits)
    if policy.request_kib or policy.response_kib:
        filters[BANDWIDTH_FILTER].CopyFrom(_bandwidth(result.name, policy.request_kib, policy.response_kib))
    return result


def http_filters() -> list[hcm_pb2.HttpFilter]:
    """What TrafficPolicies need in a chain, after authorization: rate limits, faults, bandwidth."""
    nothing = matcher_pb2.Matcher()
    never = nothing.matcher_list.matchers.add()
    never.predicate.single_predicate.input.CopyFrom(_extension("header", http_inputs_pb2.HttpRequestHeaderMatchInput(header_name=":none")))
    never.predicate.single_predicate.value_match.exact = "never"
    never.on_match.action.CopyFrom(_extension("skip", skip_action_pb2.SkipFilter()))
    faults = extension_matcher_pb2.ExtensionWithMatcher(
        extension_config=extension_pb2.TypedExtensionConfig(name="composite", typed_config=packed(composite_pb2.Composite())),
        xds_matcher=nothing,
    )
    rate = local_rate_limit_pb2.LocalRateLimit(stat_prefix=RATE_FILTER)
    return [
        *quota.http_filters(),
        hcm_pb2.HttpFilter(name=RATE_FILTER, typed_config=packed(rate), disabled=True),
        hcm_pb2.HttpFilter(name=FAULT_FILTER, typed_config=packed(faults), disabled=True),
        hcm_pb2.HttpFilter(name=BANDWIDTH_FILTER, typed_config=_bandwidth("", 0, 0), disabled=True),
    ]


def _extension(name: str, message: Any) -> xds_extension_pb2.TypedExtensionConfig:
    return xds_extension_pb2.TypedExtensionConfig(name=name, typed_config=packed(message))


def _faults(faults: Iterable[Fault]) -> matcher_pb2.Matcher:
    """The first that fits, as an Envoy fault filter that is made for the request (`envoy.filters.http.composite`): one alone cannot ask who calls."""
    result = matcher_pb2.Matcher()
    for fault in faults:
        predicates = [_header(*header) for header in fault.headers]
        if fault.callers:
            predicates.append(_caller(fault))
        action = composite_pb2.ExecuteFilterAction()
        action.typed_config.name = "fault"
        action.typed_config.typed_config.CopyFrom(packed(_fault(fault)))
        on_match = matcher_pb2.Matcher.OnMatch(action=_extension("composite-action", action))
        if not predicates:
            result.on_no_match.CopyFrom(on_match)
            break  # nothing after it can fit first
        entry = result.matcher_list.matchers.add(on_match=on_match)
        if len(predicates) == 1:
            entry.predicate.CopyFrom(predicates[0])
        else:
            entry.predicate.and_matcher.predicate.extend(predicates)
    return result


def _fault(fault: Fault) -> fault_pb2.HTTPFault:
    result = fault_pb2.HTTPFault(disable_downstream_cluster_stats=True)
    if fault.delay_ms:
        delay = common_fault_pb2.FaultDelay(fixed_delay=milliseconds(fault.delay_ms), percentage=_share(fault.delay_ppm))
        result.delay.CopyFrom(delay)
    if fault.http_status:
        result.abort.http_status = fault.http_status
    elif fault.grpc_status is not None:
        result.abort.grpc_status = fault.grpc_status
    if result.HasField("abort"):
        result.abort.percentage.CopyFrom(_share(fault.abort_ppm))
    return result


def _share(ppm: int) -> percent_pb2.FractionalPercent:
    return percent_pb2.FractionalPercent(numerator=ppm, denominator=percent_pb2.FractionalPercent.MILLION)


Predicate = matcher_pb2.Matcher.MatcherList.Predicate


def _header(name: str, value: str, regex: bool) -> matcher_pb2.Matcher.MatcherList.Predicate:
    result = Predicate()
    result.single_predicate.input.CopyFrom(_extension("header", http_inputs_pb2.HttpRequestHeaderMatchInput(header_name=name)))
    if regex:
        expression = regex_pb2.RegexMatcher(regex=value, google_re2={})
        result.single_predicate.value_match.CopyFrom(xds_string_pb2.StringMatcher(safe_regex=expression))
    else:
        result.single_predicate.value_match.exact = value
    return result


def _caller(fault: Fault) -> matcher_pb2.Matcher.MatcherList.Predicate:
    """Who calls, in CEL: of the inputs of HTTP matchers only CEL knows filter state, and knows it as bytes (Envoy 1.40)."""
    any_of = []
    for caller in fault.callers:
        both = [
            cel.join("_||_", [cel.equals(cel.entry(cel.attribute("filter_state"), key), value.encode()) for value in values])
            for key, values in ((names.NAMESPACE_KEY, caller.namespaces), (names.SERVICE_ACCOUNT_KEY, caller.service_accounts))
            if values
        ]
        any_of.append(cel.join("_&&_", both))
    result = Predicate()
    result.single_predicate.input.CopyFrom(_extension("cel", cel_inputs_pb2.HttpAttributesCelMatchInput()))
    result.single_predicate.custom_match.CopyFrom(_extension("cel", cel_pb2.CelMatcher(expr_match=cel.parsed(cel.join("_||_", any_of)))))
    return result


def _rate_limits(limits: Sequence[RateLimit]) -> local_rate_limit_pb2.LocalRateLimit:
    """Token buckets by descriptor; one whose value is left open stands for each value that comes (https://www.envoyproxy.io/docs/envoy/v1.40.0/configuration/
    http/http_filters/local_rate_limit_filter).

    Retry-After (RFC 9110, 10.2.3) is the time in which the slowest of the buckets gets a token: Envoy knows no header that says the true rest in whole seconds.
    """
    always = base_pb2.RuntimeFractionalPercent(default_value=_share(PPM))
    wait = max(math.ceil(limit.interval_ms / limit.requests / 1000) for limit in limits)
    result = local_rate_limit_pb2.LocalRateLimit(
        stat_prefix=RATE_FILTER,
        filter_enabled=always,
        filter_enforced=always,
        enable_x_ratelimit_headers=1,  # DRAFT_VERSION_03
        max_dynamic_descriptors={"value": MOST_CALLERS},
        # Asked for by Envoy; what no descriptor counts is not limited.
        token_bucket={"max_tokens": _NO_LIMIT, "tokens_per_fill": {"value": _NO_LIMIT}, "fill_interval": Duration(seconds=1)},
        always_consume_default_token_bucket={"value": False},
        response_headers_to_add=[base_pb2.HeaderValueOption(header=base_pb2.HeaderValue(key="retry-after", value=str(max(1, wait))))],
    )
    for index, limit in enumerate(limits):
        key = f"limit-{index}"
        action = result.rate_limits.add().actions.add()
        entry = ratelimit_pb2.RateLimitDescriptor.Entry(key=key)
        if limit.per is Per.SERVICE or limit.is_global:  # of a global one no node ever lets more than the whole pass
            action.generic_key.descriptor_key, action.generic_key.descriptor_value = key, "all"
            entry.value = "all"
        else:
            expression = expr_pb2.Descriptor(descriptor_key=key, text=f"filter_state['{_CALLER_KEYS[limit.per]}']")
            action.extension.name = "envoy.rate_limit_descriptors.expr"
            action.extension.typed_config.CopyFrom(packed(expression))
        descriptor = result.descriptors.add(entries=[entry])
        descriptor.token_bucket.max_tokens = max(limit.burst, limit.requests) if limit.is_global else limit.burst
        descriptor.token_bucket.tokens_per_fill.value = limit.requests
        descriptor.token_bucket.fill_interval.CopyFrom(milliseconds(limit.interval_ms))
    return result


def _bandwidth(name: str, request_kib: int, response_kib: int) -> AnyMessage:
    """https://www.envoyproxy.io/docs/envoy/v1.40.0/configuration/http/http_filters/bandwidth_share_filter: each calling workload is a tenant.

    A bucket's rate never changes (Envoy refuses that), so the rate is part of its name.
    """
    config: dict[str, Any] = {}
    for direction, limit in (("request", request_kib), ("response", response_kib)):
        if limit:
            rate = {"default_value": limit, "runtime_key": "meshagent.unused"}
            config[f"{direction}_limit"] = {"bucket_id": f"{name} {direction} {limit}", "kbps": rate}
    if config:
        tenant = {
            "@type": "type.googleapis.com/envoy.config.core.v3.SubstitutionFormatString",
            "text_format_source": {"inline_string": f"%FILTER_STATE({names.WORKLOAD_KEY}:PLAIN)%"},
        }
        config["tenant_name_selector"] = {"on_no_match": {"action": {"name": "tenant", "typed_config": tenant}}}
    value = Struct()
    value.update(config)
    return packed(typed_struct_pb2.TypedStruct(type_url=_BANDWIDTH_TYPE, value=value))  # no Python package has its message yet
