"""Envoy's bootstrap as JSON: the agent's socket, the admin socket and nothing else; all the rest comes over xDS.

Pure functions, called by `agent.l7.envoy`. A plain dictionary instead of the Bootstrap message, whose imports would cost the agent
several megabytes. Fields: https://www.envoyproxy.io/docs/envoy/v1.37.0/api-v3/config/bootstrap/v3/bootstrap.proto.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agent.l7 import names

_TYPE = "type.googleapis.com/"


def bootstrap(node: str, xds_socket: Path, admin_socket: Path, memory_limit: int | None = None) -> dict[str, Any]:
    """Build the bootstrap. `memory_limit` in bytes (of Envoy's cgroup) sizes the overload manager; None = no limit, no manager."""
    ads = {
        "api_type": "DELTA_GRPC",
        "transport_api_version": "V3",
        "set_node_on_first_message_only": True,
        "grpc_services": [{"envoy_grpc": {"cluster_name": names.XDS_CLUSTER}}],
    }
    from_ads = {"ads": {}, "resource_api_version": "V3"}
    result: dict[str, Any] = {
        "node": {"id": node, "cluster": "meshagent"},
        "admin": {"address": {"pipe": {"path": str(admin_socket), "mode": 0o600}}},
        "dynamic_resources": {"ads_config": ads, "cds_config": from_ads, "lds_config": from_ads},
        "static_resources": {"clusters": [_agent(xds_socket)]},
        "layered_runtime": {
            "layers": [{"name": names.RUNTIME_LAYER, "rtds_layer": {"name": names.RUNTIME_LAYER, "rtds_config": from_ads}}]
        },
    }
    if memory_limit is not None:
        result["overload_manager"] = _overload(memory_limit)
    return result


def _agent(socket: Path) -> dict[str, Any]:
    options = {"@type": _TYPE + "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"}
    keepalive = {"connection_keepalive": {"interval": "10s", "timeout": "5s"}}
    return {
        "name": names.XDS_CLUSTER,
        "type": "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                **options,
                "explicit_http_config": {"http2_protocol_options": keepalive},
            }
        },
        "load_assignment": {
            "cluster_name": names.XDS_CLUSTER,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"pipe": {"path": str(socket)}}}}]}],
        },
    }


def _overload(limit: int) -> dict[str, Any]:
    """Shed load before the kernel kills Envoy and with it every caller's connections."""

    def at(threshold: float) -> list[dict[str, Any]]:
        return [{"name": "envoy.resource_monitors.fixed_heap", "threshold": {"value": threshold}}]

    heap = {"@type": _TYPE + "envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig", "max_heap_size_bytes": limit}
    return {
        "refresh_interval": "0.25s",
        "resource_monitors": [{"name": "envoy.resource_monitors.fixed_heap", "typed_config": heap}],
        "actions": [
            {"name": "envoy.overload_actions.shrink_heap", "triggers": at(0.85)},
            {"name": "envoy.overload_actions.disable_http_keepalive", "triggers": at(0.9)},
            {"name": "envoy.overload_actions.stop_accepting_requests", "triggers": at(0.95)},
        ],
    }
