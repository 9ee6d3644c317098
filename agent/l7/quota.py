"""Global rate limits as Envoy has them: the rate limit quota filter and the words of its service, RLQS. Pure, called by `agent.l7.limits` and `agent.quota`.

Envoy counts the requests of each caller of each global limit in a bucket of its own, says every 5 s what they used, and is told a token bucket for each
(https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/service/rate_limit_quota/v3/rlqs.proto). The filter knows no configuration by route, so it is made by a
composite filter; its buckets belong to the process and outlive routes (source/extensions/filters/http/rate_limit_quota/filter_persistence.cc). Seen with 1.40:

- `reporting_interval` is not looked at, it is always 5 s; but a new bucket is reported with its first request;
- a token bucket as `no_assignment_behavior` ends Envoy with SIGSEGV, so until the agent has answered everything is allowed, and the local bucket of the same
  limit, which comes after it (`agent.l7.limits`), is the bound;
- token buckets are compared without the seconds of their interval, so that is always the same, and each one that differs begins full.

Who calls is read from filter state, which the accepting listener has set, never from a header.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, TypeAlias

from envoy.config.core.v3 import base_pb2, extension_pb2
from envoy.extensions.common.matching.v3 import extension_matcher_pb2
from envoy.extensions.filters.common.matcher.action.v3 import skip_action_pb2
from envoy.extensions.filters.http.composite.v3 import composite_pb2
from envoy.extensions.filters.http.rate_limit_quota.v3 import rate_limit_quota_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from envoy.extensions.matching.common_inputs.network.v3 import network_inputs_pb2
from envoy.service.rate_limit_quota.v3 import rlqs_pb2
from envoy.type.matcher.v3 import http_inputs_pb2
from envoy.type.v3 import ratelimit_strategy_pb2
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from xds.core.v3 import extension_pb2 as xds_extension_pb2
from xds.type.matcher.v3 import matcher_pb2

from agent.l7 import names
from agent.l7.resources import packed
from agent.traffic import Failure, Per, RateLimit
from meshapi import quotas

FILTERS: Final = tuple(f"meshagent.quota-{number}" for number in range(1, quotas.MOST_GLOBAL_LIMITS + 1))
DOMAIN: Final = "meshagent"
LIMIT, CALLER = "limit", "caller"
"""Keys of a bucket."""
FILL_S: Final = 1000
"""Envoy fills token buckets with whole tokens an interval of whole seconds; so a rate is thousandths of a request a second."""
KEPT_S: Final = 24 * 3600
"""How long Envoy keeps a share while the agent is away."""
REPORTS_S: Final = 5
_KEYS: Final = {Per.WORKLOAD: names.WORKLOAD_KEY, Per.SERVICE_ACCOUNT: names.SERVICE_ACCOUNT_KEY, Per.NAMESPACE: names.NAMESPACE_KEY}
Strategy: TypeAlias = ratelimit_strategy_pb2.RateLimitStrategy


def http_filters() -> list[hcm_pb2.HttpFilter]:
    """One filter for each global limit that a policy may have, disabled; before the local limits: those count what these let pass."""
    header = xds_extension_pb2.TypedExtensionConfig(
        name="header", typed_config=packed(http_inputs_pb2.HttpRequestHeaderMatchInput(header_name=":none"))
    )
    nothing = matcher_pb2.Matcher()
    never = nothing.matcher_list.matchers.add()
    never.predicate.single_predicate.input.CopyFrom(header)
    never.predicate.single_predicate.value_match.exact = "never"
    never.on_match.action.CopyFrom(_xds("skip", skip_action_pb2.SkipFilter()))
    composite = extension_matcher_pb2.ExtensionWithMatcher(
        extension_config=extension_pb2.TypedExtensionConfig(name="composite", typed_config=packed(composite_pb2.Composite())),
        xds_matcher=nothing,
    )
    return [hcm_pb2.HttpFilter(name=name, typed_config=packed(composite), disabled=True) for name in FILTERS]


def configure(filters: Mapping[str, AnyMessage], routes: str, limits: Iterable[RateLimit]) -> None:
    """Wake a filter for each global limit. `routes` is the name of the service port's routes, and `limits` all that its policy has."""
    found = [(f"{routes}#{number}", limit) for number, limit in enumerate(limits) if limit.is_global]
    for name, (bucket, limit) in zip(FILTERS, found, strict=False):
        action = composite_pb2.ExecuteFilterAction(
            typed_config=extension_pb2.TypedExtensionConfig(
                name="envoy.filters.http.rate_limit_quota", typed_config=packed(_filter(bucket, limit))
            )
        )
        matcher = matcher_pb2.Matcher(on_no_match=matcher_pb2.Matcher.OnMatch(action=_xds("quota", action)))
        filters[name].CopyFrom(packed(extension_matcher_pb2.ExtensionWithMatcherPerRoute(xds_matcher=matcher)))


def _filter(bucket: str, limit: RateLimit) -> rate_limit_quota_pb2.RateLimitQuotaFilterConfig:
    settings = rate_limit_quota_pb2.RateLimitQuotaBucketSettings(reporting_interval=Duration(seconds=REPORTS_S))
    parts = settings.bucket_id_builder.bucket_id_builder
    parts[LIMIT].string_value = bucket
    state = network_inputs_pb2.FilterStateInput(key=_KEYS[limit.per])
    parts[CALLER].custom_value.CopyFrom(
        extension_pb2.TypedExtensionConfig(name="envoy.matching.inputs.filter_state", typed_config=packed(state))
    )
    settings.no_assignment_behavior.fallback_rate_limit.blanket_rule = Strategy.ALLOW_ALL
    settings.deny_response_settings.http_status.code = 429  # type: ignore[assignment,unused-ignore]
    settings.deny_response_settings.response_headers_to_add.append(
        base_pb2.HeaderValueOption(header=base_pb2.HeaderValue(key="retry-after", value=str(_retry_after_s(limit))))
    )
    result = rate_limit_quota_pb2.RateLimitQuotaFilterConfig(domain=DOMAIN)
    result.rlqs_server.envoy_grpc.cluster_name = names.XDS_CLUSTER
    result.bucket_matchers.on_no_match.action.CopyFrom(_xds("bucket", settings))
    return result


def _retry_after_s(limit: RateLimit) -> int:
    return max(1, -(-limit.interval_ms // max(1, limit.requests) // 1000)) if limit.interval_ms <= quotas.COUNTED_MS else 60


def keeps_buckets(before: RateLimit, after: RateLimit | None) -> bool:
    """Is a limit after a change the same filter to Envoy? Another one begins without buckets, and those of the old one are not heard of again."""
    return after is not None and (before.per, _retry_after_s(before)) == (after.per, _retry_after_s(after))


def _xds(name: str, message: Message) -> xds_extension_pb2.TypedExtensionConfig:
    return xds_extension_pb2.TypedExtensionConfig(name=name, typed_config=packed(message))


def bucket_id(limit: str, caller: str) -> rlqs_pb2.BucketId:
    """The id of a bucket."""
    return rlqs_pb2.BucketId(bucket={LIMIT: limit, CALLER: caller})


def share(limit: str, caller: str, millis: int, burst: int) -> rlqs_pb2.RateLimitQuotaResponse.BucketAction:
    """Give a caller a rate in thousandths of a request a second; 0: nothing."""
    strategy = Strategy()
    if millis:
        strategy.token_bucket.max_tokens = burst
        strategy.token_bucket.tokens_per_fill.value = min(millis, (1 << 32) - 1)
        strategy.token_bucket.fill_interval.seconds = FILL_S
    else:
        strategy.blanket_rule = Strategy.DENY_ALL
    return _assigned(limit, caller, strategy)


def blanket(limit: str, caller: str, failure: Failure) -> rlqs_pb2.RateLimitQuotaResponse.BucketAction:
    """Allow everything, up to the local bucket, or deny it."""
    return _assigned(limit, caller, Strategy(blanket_rule=Strategy.DENY_ALL if failure is Failure.DENY else Strategy.ALLOW_ALL))


def _assigned(limit: str, caller: str, strategy: Strategy) -> rlqs_pb2.RateLimitQuotaResponse.BucketAction:
    action = rlqs_pb2.RateLimitQuotaResponse.BucketAction(bucket_id=bucket_id(limit, caller))
    action.quota_assignment_action.assignment_time_to_live.seconds = KEPT_S
    action.quota_assignment_action.rate_limit_strategy.CopyFrom(strategy)
    return action


def abandon(bucket: rlqs_pb2.BucketId) -> rlqs_pb2.RateLimitQuotaResponse.BucketAction:
    """Have Envoy forget a bucket: the next request of its caller makes it anew and reports it at once."""
    action = rlqs_pb2.RateLimitQuotaResponse.BucketAction(bucket_id=bucket)
    action.abandon_action.SetInParent()
    return action
