"""What one workload may take of the waypoint that all share, whatever policies say. Pure functions, called by the builders of listeners and clusters.

Each workload has listeners of its own, so what is counted for a listener is counted for a workload. Two things are bounded:
- what it holds: connections (`guard`), streams and bytes in them (`turn_taking`, `windows`);
- what it gets in one turn. A worker of Envoy goes round all sockets that have something to read and does not stop halfway, so a caller waits for as long as
  the others' turns are: one connection accepted, one HTTP/2 request begun (`agent.l7.bootstrap`), `BUFFER` bytes read, each.

Upstream pools are each caller's own (`agent.l7.listeners.netns` is part of their key), but the counts of a cluster's circuit breakers are shared by all callers
of the node. Without a policy these are higher than anything that callers can reach together (`agent.l7.clusters`), and a policy can give each calling
workload counts of its own (`agent.l7.shares`).

https://www.envoyproxy.io/docs/envoy/v1.40.0/configuration/best_practices/edge is about strangers and asks for less of most of these; callers here are known.
"""

from __future__ import annotations

from envoy.config.core.v3 import protocol_pb2
from envoy.config.listener.v3 import listener_components_pb2, listener_pb2
from envoy.extensions.filters.network.connection_limit.v3 import connection_limit_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2

from agent.l7.resources import packed

MOST_CONNECTIONS = 2048
"""Of one workload, to an HTTP listener; more are closed as they come. An application with 1,000 threads and a connection for each has room."""
MOST_TUNNELLED = 8192
"""Of one workload, L4 connections to other nodes: each costs less, and databases are asked over many."""
MOST_STREAMS = 256
"""Requests at one time on one HTTP/2 connection; RFC 9113, 6.5.2 asks for 100 at least. Clients wait, or open another connection."""
STREAM_WINDOW = 256 << 10
"""Bytes of one stream that a side sends before somebody has read them."""
CONNECTION_WINDOW = 8 << 20
"""Of all streams of a connection: 32 that stall hold up the others of the same caller, and nobody else's."""
BUFFER = 256 << 10
"""Bytes read from a socket in one turn, and kept of a request that may have to be sent again before it counts as too long for that (Envoy: 1 MiB)."""


def guard(listener: listener_pb2.Listener, stat_prefix: str, most: int = MOST_CONNECTIONS) -> None:
    """Bound what the workload of a listener holds and gets in one turn. The filter comes behind the one that says who the workload is."""
    listener.per_connection_buffer_limit_bytes.value = BUFFER
    listener.max_connections_to_accept_per_socket_event.value = 1
    config = connection_limit_pb2.ConnectionLimit(stat_prefix=stat_prefix, max_connections={"value": most})
    one = listener_components_pb2.Filter(name="envoy.filters.network.connection_limit", typed_config=packed(config))
    listener.filter_chains[0].filters.insert(1, one)


def turn_taking(manager: hcm_pb2.HttpConnectionManager) -> None:
    """Bound streams and their windows."""
    manager.http2_protocol_options.max_concurrent_streams.value = MOST_STREAMS
    windows(manager.http2_protocol_options)


def windows(options: protocol_pb2.Http2ProtocolOptions) -> None:
    """Bound what may be on its way in one stream, and in one connection."""
    options.initial_stream_window_size.value = STREAM_WINDOW
    options.initial_connection_window_size.value = CONNECTION_WINDOW
