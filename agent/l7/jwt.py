"""RequestAuthentications as Envoy's jwt_authn filter, configured per route. Pure functions, called by the builders.

Semantics are Istio's (https://istio.io/latest/docs/reference/config/security/request_authentication/): a token that is not valid is answered with 401, a
request without one goes on without identity, and policies decide about it. The filter runs before authorization, which reads the payload from dynamic
metadata (`names.JWT_METADATA`, `names.JWT_PAYLOAD`; `agent.l7.tokens`), where routes can match it too.

jwt_authn takes its providers from the listener alone, and a changed listener drains its connections. So the listener has an empty composite filter
(https://www.envoyproxy.io/docs/envoy/v1.40.0/configuration/http/http_filters/composite_filter), disabled, and each route brings the whole filter in its
per-route matcher: new keys are a change of one RouteConfiguration, and keys that Envoy refuses leave only that one as it was.
"""

from __future__ import annotations

import hashlib
import json
from base64 import urlsafe_b64encode
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from envoy.config.core.v3 import extension_pb2
from envoy.extensions.common.matching.v3 import extension_matcher_pb2
from envoy.extensions.filters.common.matcher.action.v3 import skip_action_pb2
from envoy.extensions.filters.http.composite.v3 import composite_pb2
from envoy.extensions.filters.http.jwt_authn.v3 import config_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from google.protobuf import empty_pb2
from google.protobuf.message import Message
from xds.core.v3 import extension_pb2 as xds_extension_pb2
from xds.type.matcher.v3 import matcher_pb2

from agent.l7 import names
from agent.l7.rbac import Authorization
from agent.l7.resources import packed
from agent.model import Authentication, Snapshot, TokenIssuer, Workload

LISTS = ("scope", "permission")
"""Claims that hold a list as text with spaces (RFC 8693, 4.2); policies and routes see a list, as in Istio."""
CACHED_TOKENS = 500
"""Tokens that each worker remembers as well signed, per issuer and destination; their time is checked each time."""


def http_filter() -> hcm_pb2.HttpFilter:
    """The place in the chain of filters; not even made until a route carries a configuration for it."""
    composite = extension_pb2.TypedExtensionConfig(name="composite", typed_config=packed(composite_pb2.Composite()))
    config = extension_matcher_pb2.ExtensionWithMatcher(
        extension_config=composite, xds_matcher=always("skip", skip_action_pb2.SkipFilter())
    )
    return hcm_pb2.HttpFilter(name=names.JWT_FILTER, typed_config=packed(config), disabled=True)


def selecting(workload: Workload, snapshot: Snapshot) -> tuple[Authentication, ...]:
    """The RequestAuthentications of a workload, by name. One that is named but missing has no issuers: nothing gets past it."""
    return tuple(snapshot.authentications.get(name) or Authentication(name) for name in workload.authentications)


def authenticated(authorization: Authorization, authentications: Sequence[Authentication], keep: bool) -> Authorization:
    """Add the verification of tokens to what a route enforces. `keep` leaves them in the request, for the other node, which verifies once more.

    What no rule of the route reads is not written: the payload, and lists in it, cost each request some 5 % of Envoy's work.
    """
    if not authentications:
        return authorization
    rules = b"".join(authorization.filters.values())
    lists = tuple(name for name in LISTS if name.encode() in rules) if names.JWT_METADATA.encode() in rules else None
    body: bytes = packed(_per_route(authentications, keep, lists)).SerializeToString(deterministic=True)
    return Authorization(MappingProxyType({**authorization.filters, names.JWT_FILTER: body}), asks=True)


def strips(authentications: Sequence[Authentication]) -> bool:
    """Does the application see less than was sent? Then verification must be the last thing that happens to a request."""
    return any(not issuer.forward for one in authentications for issuer in one.issuers)


def _per_route(
    authentications: Sequence[Authentication], keep: bool, lists: Sequence[str] | None
) -> extension_matcher_pb2.ExtensionWithMatcherPerRoute:
    action = composite_pb2.ExecuteFilterAction(
        typed_config=extension_pb2.TypedExtensionConfig(
            name="envoy.filters.http.jwt_authn", typed_config=packed(_filter(authentications, keep, lists))
        )
    )
    return extension_matcher_pb2.ExtensionWithMatcherPerRoute(xds_matcher=always("verify", action))


def always(name: str, action: Message) -> matcher_pb2.Matcher:
    """A matcher that does one thing whatever the request."""
    config = xds_extension_pb2.TypedExtensionConfig(name=name, typed_config=packed(action))
    return matcher_pb2.Matcher(on_no_match=matcher_pb2.Matcher.OnMatch(action=config))


def _filter(authentications: Sequence[Authentication], keep: bool, lists: Sequence[str] | None) -> config_pb2.JwtAuthentication:
    result = config_pb2.JwtAuthentication()
    missing = [one.name for one in authentications if not one.issuers]
    for number, issuer in enumerate(issuer for one in authentications for issuer in one.issuers):
        result.providers[f"{number}"].CopyFrom(provider(issuer, keep, lists))
    rule = result.rules.add(match={"prefix": "/"})
    if missing:
        result.providers["missing"].CopyFrom(provider(TokenIssuer("missing"), keep, lists))
        rule.requires.provider_name = "missing"
        return result
    every = sorted(result.providers)
    optional = [config_pb2.JwtRequirement(requires_any=_either(name)) for name in every]
    if len(every) == 1:
        rule.requires.CopyFrom(optional[0])
        return result
    # One good token is enough; without one, wherever an issuer's tokens may be there must be none, or a good one.
    alternatives = rule.requires.requires_any.requirements
    for name in every:
        alternatives.add(provider_name=name)
    alternatives.add().requires_all.requirements.extend(optional)
    return result


def _either(provider: str) -> config_pb2.JwtRequirementOrList:
    """A good token or none."""
    return config_pb2.JwtRequirementOrList(
        requirements=[config_pb2.JwtRequirement(provider_name=provider), config_pb2.JwtRequirement(allow_missing=empty_pb2.Empty())]
    )


def provider(issuer: TokenIssuer, keep: bool, lists: Sequence[str] | None = LISTS) -> config_pb2.JwtProvider:
    """How tokens of an issuer are found and verified, and what becomes of them. `lists`: those of `LISTS` that are read; None: nobody reads the payload."""
    result = config_pb2.JwtProvider(
        issuer=issuer.issuer,
        audiences=issuer.audiences,
        from_headers=[config_pb2.JwtHeader(name=name, value_prefix=prefix) for name, prefix in issuer.headers],
        from_params=issuer.parameters,
        from_cookies=issuer.cookies,
        forward=issuer.forward or keep,
        forward_payload_header=issuer.payload_header,
        claim_to_headers=[config_pb2.JwtClaimToHeader(header_name=header, claim_name=claim) for header, claim in issuer.claim_headers],
        payload_in_metadata="" if lists is None else names.JWT_PAYLOAD,
        jwt_cache_config={"jwt_cache_size": CACHED_TOKENS},
    )
    if lists:
        result.normalize_payload_in_metadata.space_delimited_claims.extend(lists)
    result.local_jwks.inline_string = issuer.keys or json.dumps(_NO_KEYS)
    return result


def _nobodys_key() -> Mapping[str, Any]:
    """A JWK set without a usable key, because Envoy refuses an empty one: 32 bytes that nobody can have found from a private key."""
    point = urlsafe_b64encode(hashlib.sha256(b"meshagent: the keys of this issuer are not known").digest()).rstrip(b"=").decode()
    return MappingProxyType({"keys": [{"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "kid": "meshagent-none", "x": point}]})


_NO_KEYS = dict(_nobodys_key())
