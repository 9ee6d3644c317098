"""Envoy's bootstrap as JSON: the agent's socket, the admin socket and nothing else; all the rest comes over xDS.

Pure functions, called by `agent.l7.envoy`. A plain dictionary instead of the Bootstrap message, whose imports would cost the agent
several megabytes. Fields: https://www.envoyproxy.io/docs/envoy/v1.37.0/api-v3/config/bootstrap/v3/bootstrap.proto.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agent.l7 import metrics, names
from agent.l7.memory import Room

_TYPE = "type.googleapis.com/"
_TURN = {"max_requests_per_io_cycle": 1}
"""HTTP/2 requests that one connection begins in one turn of a worker (`agent.l7.fairness`); Envoy's own is all that have come, up to a buffer full."""

_BACK_OFF = {"base_interval": "0.2s", "max_interval": "1s"}
"""Between attempts to reach the agent. Envoy's own grow to 30 s, also over several restarts of an agent that had nothing new to say."""


def bootstrap(node: str, xds_socket: Path, admin_socket: Path, room: Room | None = None) -> dict[str, Any]:
    """Build the bootstrap. `room` sizes the overload manager; without it there is none."""
    ads = {
        "api_type": "DELTA_GRPC",
        "transport_api_version": "V3",
        "set_node_on_first_message_only": True,
        "grpc_services": [{"envoy_grpc": {"cluster_name": names.XDS_CLUSTER, "retry_policy": {"retry_back_off": _BACK_OFF}}}],
    }
    from_ads = {"ads": {}, "resource_api_version": "V3"}
    result: dict[str, Any] = {
        "node": {"id": node, "cluster": "meshagent"},
        "admin": {"address": {"pipe": {"path": str(admin_socket), "mode": 0o600}}},
        "dynamic_resources": {"ads_config": ads, "cds_config": from_ads, "lds_config": from_ads},
        "static_resources": {"clusters": [_agent(xds_socket)]},
        "bootstrap_extensions": [  # tunnels: agent.l7.hbone
            {
                "name": "envoy.bootstrap.internal_listener",
                "typed_config": {"@type": _TYPE + "envoy.extensions.bootstrap.internal_listener.v3.InternalListener"},
            }
        ],
        # Counters of what is never used cost a third of a cluster: they are made when first counted, and are missing from /stats until then.
        "deferred_stat_options": {"enable_deferred_creation_stats": True},
        **metrics.bootstrap(),
        "layered_runtime": {
            "layers": [
                # Envoy's limit of 100 is reached by ordinary patterns of hosts, paths and names; it would refuse the policy.
                {
                    "name": "limits",
                    "static_layer": {"re2": {"max_program_size": {"error_level": 10000, "warn_level": 10000}}, "http": _TURN},
                },
                {"name": names.RUNTIME_LAYER, "rtds_layer": {"name": names.RUNTIME_LAYER, "rtds_config": from_ads}},
            ]
        },
    }
    if room is not None:
        result["overload_manager"] = _overload(room)
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


def _overload(room: Room) -> dict[str, Any]:
    """Shed load before the kernel kills Envoy and with it every caller's connections: those who hold the most first.

    Actions: https://www.envoyproxy.io/docs/envoy/v1.40.0/configuration/operations/overload_manager/overload_manager.
    """
    monitor = "envoy.resource_monitors.fixed_heap"

    def at(threshold: float) -> list[dict[str, Any]]:
        return [{"name": monitor, "threshold": {"value": threshold}}]

    def between(start: float, end: float) -> list[dict[str, Any]]:
        return [{"name": monitor, "scaled": {"scaling_threshold": start, "saturation_threshold": end}}]

    heap = {"@type": _TYPE + "envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig", "max_heap_size_bytes": room.heap}
    connections = {
        "@type": _TYPE + "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
        "max_active_downstream_connections": room.connections,
    }
    idle = {
        "@type": _TYPE + "envoy.config.overload.v3.ScaleTimersOverloadActionConfig",
        "timer_scale_factors": [{"timer": "HTTP_DOWNSTREAM_CONNECTION_IDLE", "min_timeout": "2s"}],
    }
    return {
        "refresh_interval": "0.25s",
        "buffer_factory_config": {"minimum_account_to_track_power_of_two": 17},  # streams that hold 128 KiB and more
        "resource_monitors": [
            {"name": monitor, "typed_config": heap},
            {"name": "envoy.resource_monitors.global_downstream_max_connections", "typed_config": connections},
        ],
        "actions": [
            {"name": "envoy.overload_actions.shrink_heap", "triggers": at(0.8)},
            {"name": "envoy.overload_actions.reset_high_memory_stream", "triggers": between(0.85, 0.95)},
            {"name": "envoy.overload_actions.reduce_timeouts", "triggers": between(0.85, 0.95), "typed_config": idle},
            {"name": "envoy.overload_actions.disable_http_keepalive", "triggers": at(0.9)},
            {"name": "envoy.overload_actions.stop_accepting_requests", "triggers": at(0.95)},
            {"name": "envoy.overload_actions.stop_accepting_connections", "triggers": at(0.98)},
        ],
    }
