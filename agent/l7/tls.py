"""mTLS between nodes as Envoy's transport sockets: TLS 1.3, HTTP/2, a SPIFFE certificate at either end. Pure; used by `agent.l7.hbone`.

What an end shows and whom it believes comes over SDS (`agent.l7.secrets`). Fields:
https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/extensions/transport_sockets/tls/v3/tls.proto and common.proto.
"""

from __future__ import annotations

import re
from typing import Any

from envoy.config.core.v3 import base_pb2, config_source_pb2, extension_pb2
from envoy.extensions.transport_sockets.tls.v3 import common_pb2, tls_pb2
from envoy.type.matcher.v3 import regex_pb2, string_pb2
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from agent.l7.clusters import ads
from agent.l7.resources import packed
from agent.l7.secrets import reference

_TLS = "envoy.transport_sockets.tls"
_PACKAGE = "envoy.extensions.transport_sockets.tls"


def downstream(spiffe_id: str, trust_domain: str) -> base_pb2.TransportSocket:
    """Show the certificate of `spiffe_id`, and demand one of any workload of the trust domain."""
    workload = re.escape(f"spiffe://{trust_domain}") + "/ns/[^/,]+/sa/[^/,]+"  # of a comma Envoy makes two names
    context = tls_pb2.DownstreamTlsContext(require_client_certificate={"value": True})
    common = context.common_tls_context
    common.tls_certificate_sds_secret_configs.append(reference(spiffe_id))
    _common(common, trust_domain, string_pb2.StringMatcher(safe_regex=regex_pb2.RegexMatcher(regex=workload)))
    return base_pb2.TransportSocket(name=_TLS, typed_config=packed(context))


def upstream(spiffe_id: str, trust_domain: str) -> base_pb2.TransportSocket:
    """Demand the certificate of `spiffe_id`, and show the one that the connection's filter state names (`names.CERTIFICATE_KEY`).

    Without such a name there is no certificate and no connection: the default is no SPIFFE ID.
    """
    context = tls_pb2.UpstreamTlsContext()
    common = context.common_tls_context
    mapper = _OverrideByFilterState(default_value="none")
    selector = _OnDemandSecret(
        config_source=ads(),
        certificate_mapper=extension_pb2.TypedExtensionConfig(
            name="envoy.tls.upstream_certificate_mappers.filter_state_override", typed_config=packed(mapper)
        ),
    )
    common.custom_tls_certificate_selector.name = "envoy.tls.upstream_certificate_selectors.on_demand_secret"
    common.custom_tls_certificate_selector.typed_config.CopyFrom(packed(selector))
    _common(common, trust_domain, string_pb2.StringMatcher(exact=spiffe_id))
    return base_pb2.TransportSocket(name=_TLS, typed_config=packed(context))


def _common(common: tls_pb2.CommonTlsContext, trust_domain: str, peer: string_pb2.StringMatcher) -> None:
    common.alpn_protocols.append("h2")
    common.tls_params.tls_minimum_protocol_version = common_pb2.TlsParameters.TLSv1_3
    common.tls_params.tls_maximum_protocol_version = common_pb2.TlsParameters.TLSv1_3  # as a client Envoy stops at 1.2 by itself
    matcher = common_pb2.SubjectAltNameMatcher(san_type=common_pb2.SubjectAltNameMatcher.URI, matcher=peer)
    common.combined_validation_context.default_validation_context.match_typed_subject_alt_names.append(matcher)
    common.combined_validation_context.validation_context_sds_secret_config.CopyFrom(reference(f"spiffe://{trust_domain}"))


def _message(package: str, name: str, fields: list[tuple[str, str]], dependencies: list[str]) -> Any:
    """A message that Envoy knows and xds-protos 1.85 does not. Fields are numbered from 1; a type that begins with a dot is a message, "" is text."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name=f"{package.replace('.', '/')}/config.proto", package=package, syntax="proto3", dependency=dependencies
    )
    message = file.message_type.add(name=name)
    for number, (field, kind) in enumerate(fields, 1):
        one = message.field.add(name=field, number=number, label=kinds.LABEL_OPTIONAL)
        one.type = kinds.TYPE_MESSAGE if kind else kinds.TYPE_STRING
        if kind:
            one.type_name = kind
    pool = descriptor_pool.Default()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))


# https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/extensions/transport_sockets/tls/cert_selectors/on_demand_secret/v3/config.proto
_OnDemandSecret = _message(
    f"{_PACKAGE}.cert_selectors.on_demand_secret.v3",
    "Config",
    [("config_source", ".envoy.config.core.v3.ConfigSource"), ("certificate_mapper", ".envoy.config.core.v3.TypedExtensionConfig")],
    [config_source_pb2.DESCRIPTOR.name, extension_pb2.DESCRIPTOR.name],
)
# https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/extensions/transport_sockets/tls/cert_mappers/filter_state_override/v3/config.proto
_OverrideByFilterState = _message(f"{_PACKAGE}.cert_mappers.filter_state_override.v3", "Config", [("default_value", "")], [])
