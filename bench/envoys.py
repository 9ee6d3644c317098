"""The proxies that the mesh is compared with: one bare Envoy, and two with mTLS between them. Configurations only; benchmarks start them.

Both are as cheap as Envoy gets: static, one route, no access log, no request id, no header added, no statistics filter. A sidecar of a real
mesh has filters for metrics and telemetry on top, so the comparison flatters sidecars. Between sidecars HTTP/1.1 keeps its connections, as in
Istio by default (meshConfig.h2UpgradePolicy: DO_NOT_UPGRADE), with TLS 1.3, P-256 certificates on both sides and verified SPIFFE names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID

from lab import pki

_TYPE = "type.googleapis.com/envoy.extensions."
_LIMIT = 65536
SPIFFE = "spiffe://mesh.local/ns/default/sa/"


def hop(
    listen: tuple[str, int],
    target: tuple[str, int],
    *,
    accept_tls: Mapping[str, Any] | None = None,
    open_tls: Mapping[str, Any] | None = None,
) -> str:
    """Return the configuration of one Envoy: HTTP from `listen` to `target`, both (address, port), with TLS on either side or none."""
    manager = {
        "@type": _TYPE + "filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "hop",
        "generate_request_id": False,
        "server_header_transformation": "PASS_THROUGH",
        "skip_xff_append": True,
        "route_config": {"virtual_hosts": [{"name": "*", "domains": ["*"], "routes": [_ROUTE]}]},
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": _TYPE + "filters.http.router.v3.Router", "suppress_envoy_headers": True},
            }
        ],
    }
    chain = _secured({"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}, accept_tls)
    listener = {"name": "hop", "address": _address(*listen), "filter_chains": [chain]}
    return _bootstrap([listener], [_cluster("target", target, open_tls)])


def tcp(
    hops: Sequence[tuple[tuple[str, int], tuple[str, int]]],
    *,
    accept_tls: Mapping[str, Any] | None = None,
    open_tls: Mapping[str, Any] | None = None,
) -> str:
    """Return the configuration of one Envoy that knows nothing of HTTP: bytes from each `listen` to its `target`, TLS as in `hop`."""
    listeners, clusters = [], []
    for i, (listen, target) in enumerate(hops):
        name = f"target-{i}"
        proxy = {"@type": _TYPE + "filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": name, "cluster": name}
        chain = _secured({"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": proxy}]}, accept_tls)
        listeners.append({"name": f"hop-{i}", "address": _address(*listen), "filter_chains": [chain]})
        clusters.append(_cluster(name, target, open_tls))
    return _bootstrap(listeners, clusters)


def command(binary: Path, configuration: Path, concurrency: int) -> list[str]:
    """Return the command of an Envoy, with the arguments that the agent gives the waypoint's."""
    return [
        *(str(binary), "--disable-hot-restart", "-c", str(configuration)),
        *("--concurrency", str(concurrency), "--log-level", "warning"),
    ]


def write_certificates(directory: Path) -> None:
    """Write ca.crt and, for `caller` and `server`, NAME.crt and NAME.key: P-256, with the SPIFFE names that the sidecars verify."""
    authority = pki.authority()
    _write(directory / "ca.crt", authority.certificate.public_bytes(serialization.Encoding.PEM))
    for name, purpose in (("caller", ExtendedKeyUsageOID.CLIENT_AUTH), ("server", ExtendedKeyUsageOID.SERVER_AUTH)):
        identity = pki.issue(authority, name, [x509.UniformResourceIdentifier(SPIFFE + name)], purpose)
        _write(directory / f"{name}.crt", identity.certificate.public_bytes(serialization.Encoding.PEM))
        key = identity.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        _write(directory / f"{name}.key", key)


def mutual_tls(directory: Path, me: str, peer: str) -> dict[str, Any]:
    """Return the TLS context of `caller` (who opens) or `server` (who accepts): both show a certificate and check the other's name."""
    common = {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [
            {"certificate_chain": {"filename": str(directory / f"{me}.crt")}, "private_key": {"filename": str(directory / f"{me}.key")}}
        ],
        "validation_context": {
            "trusted_ca": {"filename": str(directory / "ca.crt")},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": SPIFFE + peer}}],
        },
    }
    if me == "server":
        kind = _TYPE + "transport_sockets.tls.v3.DownstreamTlsContext"
        return {"@type": kind, "common_tls_context": common, "require_client_certificate": True}
    return {"@type": _TYPE + "transport_sockets.tls.v3.UpstreamTlsContext", "common_tls_context": common}


_ROUTE = {"match": {"prefix": "/"}, "route": {"cluster": "target", "timeout": "0s"}}


def _secured(thing: dict[str, Any], tls: Mapping[str, Any] | None) -> dict[str, Any]:
    return thing if tls is None else {**thing, "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": tls}}


def _cluster(name: str, target: tuple[str, int], tls: Mapping[str, Any] | None) -> dict[str, Any]:
    cluster = {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "2s",
        "circuit_breakers": {"thresholds": [dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), _LIMIT)]},
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(*target)}}]}],
        },
    }
    return _secured(cluster, tls)


def _bootstrap(listeners: Sequence[dict[str, Any]], clusters: Sequence[dict[str, Any]]) -> str:
    return json.dumps({"static_resources": {"listeners": listeners, "clusters": clusters}}, indent=1)


def _address(address: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": address, "port_value": port}}


def _write(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)
