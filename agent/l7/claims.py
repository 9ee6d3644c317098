"""Routing by what a verified token says (a CallerMatch with `claims`). Pure functions, called by `agent.l7.routes` and `agent.l7.listeners`.

A route is chosen before any filter runs, and a token is verified by a filter. So a request to such a service port is routed twice: first as if there were no
token; then a filter of its own, the first of all, verifies it, writes the payload into dynamic metadata under a key that no policy reads, and has the route
chosen again, which can match it now (RouteMatch.dynamic_metadata, JwtProvider.clear_route_cache). It denies nothing: a token that is not good is none, and
whether that is a 401 is decided as ever, by what the final route carries (`agent.l7.jwt`).

What makes that safe: which filters a request passes is fixed by its *first* route (a filter that this one has no configuration for is not even made), what
they do by its *last* (Envoy 1.40; tests/unit/agent/l7/test_claims.py shows both). So the RouteConfiguration itself has a configuration that does nothing for
every filter that a route might have one for: all are made for every request, and the last route's configuration counts. And every virtual host ends with
a route, because a request without a first route would pass no filter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.extensions.common.matching.v3 import extension_matcher_pb2
from envoy.extensions.filters.common.matcher.action.v3 import skip_action_pb2
from envoy.extensions.filters.http.composite.v3 import composite_pb2
from envoy.extensions.filters.http.cors.v3 import cors_pb2
from envoy.extensions.filters.http.jwt_authn.v3 import config_pb2
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from envoy.type.matcher.v3 import metadata_pb2, value_pb2

from agent.l7 import jwt, names, sessions, tokens
from agent.l7.resources import packed
from agent.model import Authentication, ClaimCondition, Route

FILTER = "meshagent.claims"
PAYLOAD = "routing"
"""Key in `names.JWT_METADATA`: the payload, for routes. Policies read `names.JWT_PAYLOAD`, which the final route's filter writes."""


def http_filter() -> hcm_pb2.HttpFilter:
    """The place in the chain of filters: the first."""
    result = jwt.http_filter()
    result.name = FILTER
    return result


def asked(routes: Iterable[Route]) -> bool:
    """Does any rule match on claims?"""
    return any(rule.claims for route in routes for rule in route.rules)


def narrow(match: route_components_pb2.RouteMatch, conditions: Sequence[ClaimCondition]) -> None:
    """Narrow a match to requests whose token says all of this. What is not there has no value, as in policies."""
    for condition in conditions:
        if condition.values:
            match.dynamic_metadata.append(_any(condition.path, condition.values))
        for value in condition.not_values:
            unwanted = _any(condition.path, (value,))
            unwanted.invert = True
            match.dynamic_metadata.append(unwanted)


def _any(path: Sequence[str], values: Sequence[str]) -> metadata_pb2.MetadataMatcher:
    found = [tokens.claim(path, value) for value in values]
    result = found[0]
    result.path[0].key = PAYLOAD
    if len(found) > 1:
        result.value.CopyFrom(value_pb2.ValueMatcher(or_match=value_pb2.OrMatcher(value_matchers=[one.value for one in found])))
    return result


def verify_first(configuration: route_pb2.RouteConfiguration, authentications: Sequence[Authentication]) -> None:
    """Have tokens of these verified before the route is final, and every filter made whatever the first route is."""
    filters = configuration.typed_per_filter_config
    nothing = extension_matcher_pb2.ExtensionWithMatcherPerRoute(xds_matcher=jwt.always("skip", skip_action_pb2.SkipFilter()))
    filters[names.JWT_FILTER].CopyFrom(packed(nothing))
    for name in (names.DENY_FILTER, names.ALLOW_FILTER):
        filters[name].CopyFrom(packed(rbac_pb2.RBACPerRoute(rbac=rbac_pb2.RBAC())))
    filters[names.CORS_FILTER].CopyFrom(packed(cors_pb2.CorsPolicy()))
    sessions.nothing(filters)
    reader = _reader(authentications)
    if reader.providers:
        action = composite_pb2.ExecuteFilterAction()
        action.typed_config.name = "envoy.filters.http.jwt_authn"
        action.typed_config.typed_config.CopyFrom(packed(reader))
        filters[FILTER].CopyFrom(packed(extension_matcher_pb2.ExtensionWithMatcherPerRoute(xds_matcher=jwt.always("verify", action))))


def _reader(authentications: Sequence[Authentication]) -> config_pb2.JwtAuthentication:
    result = config_pb2.JwtAuthentication()
    rule = result.rules.add(match={"prefix": "/"})
    for number, issuer in enumerate(issuer for one in authentications for issuer in one.issuers):
        provider = jwt.provider(issuer, True)
        provider.payload_in_metadata = PAYLOAD
        provider.clear_route_cache = True
        provider.ClearField("forward_payload_header")
        provider.ClearField("claim_to_headers")
        result.providers[f"{number}"].CopyFrom(provider)
        rule.requires.requires_any.requirements.add(provider_name=f"{number}")
    rule.requires.requires_any.requirements.add().allow_missing_or_failed.SetInParent()
    return result
