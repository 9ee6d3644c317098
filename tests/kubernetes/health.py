"""Runs in a pod of tests: answers gRPC health checks at PORT, whatever service they are about, with SERVING (grpc/health/v1/health.proto)."""

import sys
from concurrent import futures
from typing import Any

import grpc

_SERVING = b"\x08\x01"  # HealthCheckResponse {status: 1}

check: Any = grpc.unary_unary_rpc_method_handler(lambda _request, _context: _SERVING)
server = grpc.server(futures.ThreadPoolExecutor(2))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check}),))
server.add_insecure_port(f"[::]:{sys.argv[1]}")
server.start()
server.wait_for_termination()
