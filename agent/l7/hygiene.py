"""What a caller may not tell the waypoint: request headers that Envoy or the mesh itself would take for its own. Pure, used by `agent.l7.listeners`.

Envoy honours x-envoy-* request headers (retries, timeouts, the name of an operation, https://www.envoyproxy.io/docs/envoy/v1.40.0/configuration/http/
http_filters/router_filter#http-headers-consumed) of any caller that it takes for an internal one, and its own sanitizing for others changes x-forwarded-for
and x-forwarded-proto, which belong to the application. So they are taken away by pattern before anything looks at the request. x-forwarded-client-cert is
taken away by the connection manager (`forward_client_cert_details`, SANITIZE is its default); what tells who calls is never a header.
"""

from __future__ import annotations

from collections.abc import Iterable

from envoy.config.common.mutation_rules.v3 import mutation_rules_pb2
from envoy.config.core.v3 import extension_pb2
from envoy.extensions.http.early_header_mutation.header_mutation.v3 import header_mutation_pb2

from agent.l7.resources import packed

RESERVED = ("x-envoy-", "x-meshagent-")
"""What names of headers begin with that no caller may send on."""
HEADERS_S = 30
"""A request whose headers are not complete by then is answered with 408: Envoy's default is to wait for ever, and connections are shared out to all callers."""


def clean() -> extension_pb2.TypedExtensionConfig:
    """Remove every reserved header of a request, before routing and before Envoy's own look at it."""
    return without(RESERVED)


def without(prefixes: Iterable[str]) -> extension_pb2.TypedExtensionConfig:
    """Remove a request's headers whose names begin so, just as early."""
    mutation = header_mutation_pb2.HeaderMutation()
    for prefix in prefixes:
        match = mutation_rules_pb2.HeaderMutation.RemoveOnMatch()
        match.key_matcher.prefix = prefix
        mutation.mutations.append(mutation_rules_pb2.HeaderMutation(remove_on_match=match))
    return extension_pb2.TypedExtensionConfig(name="envoy.http.early_header_mutation.header_mutation", typed_config=packed(mutation))
