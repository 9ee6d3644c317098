"""Certificates and trust as Envoy's secrets. Pure; the supervisor calls it, `agent.l7.xds` serves the result.

Names are SPIFFE IDs, as with SPIRE (https://github.com/spiffe/spire/blob/main/doc/spire_agent.md, SDS configuration): a workload's for its certificate and
key (its callers' ends have a prefix: `agent.l7.names`), `spiffe://TRUST-DOMAIN` for whom to believe. A listener or cluster names them with `reference()`.
Fields: https://www.envoyproxy.io/docs/envoy/v1.37.0/api-v3/extensions/transport_sockets/tls/v3/secret.proto and common.proto.
"""

from __future__ import annotations

from envoy.config.core.v3 import config_source_pb2
from envoy.extensions.transport_sockets.tls.v3 import common_pb2, secret_pb2

from agent.l7 import names
from agent.l7.resources import Resource, pack


def trust(trust_domain: str, roots: bytes, crl: bytes) -> tuple[str, Resource]:
    """Whom to believe, with its name. PEM; `crl` may be empty.

    Only a leaf is looked up in the CRL: the one who signed an intermediate may be an operator's root, whose key nobody here has to sign a CRL with.
    """
    trusted = common_pb2.CertificateValidationContext(only_verify_leaf_cert_crl=bool(crl))
    trusted.trusted_ca.inline_bytes = roots
    if crl:
        trusted.crl.inline_bytes = crl
    name = f"spiffe://{trust_domain}"
    return name, pack(secret_pb2.Secret(name=name, validation_context=trusted))


def certificate(spiffe_id: str, chain: bytes, key: bytes) -> dict[str, Resource]:
    """A certificate with what leads to its root, and its private key, by each of its names: for where tunnels end, and for their callers. PEM."""
    held = common_pb2.TlsCertificate()
    held.certificate_chain.inline_bytes = chain
    held.private_key.inline_bytes = key
    return {name: pack(secret_pb2.Secret(name=name, tls_certificate=held)) for name in (spiffe_id, names.caller_certificate(spiffe_id))}


def reference(name: str) -> secret_pb2.SdsSecretConfig:
    """What a TLS context holds in place of the secret `name`: it comes over the stream that everything else comes over."""
    source = config_source_pb2.ConfigSource(resource_api_version=config_source_pb2.V3)
    source.ads.SetInParent()
    return secret_pb2.SdsSecretConfig(name=name, sds_config=source)
