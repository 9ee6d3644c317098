"""A collector of spans: OTLP over gRPC, each span as a line of JSON. `python -m tests.otlp PORT FILE` runs one, in a pod of the lab for instance.

The messages are those of xds-protos, which knows an older OTLP: field 2 of ResourceSpans has its former name there, on the wire it is the same
(https://github.com/open-telemetry/opentelemetry-proto/blob/main/opentelemetry/proto/trace/v1/trace.proto).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"


def _spans(request: Any) -> Iterator[dict[str, Any]]:
    for found in request.resource_spans:
        resource = _attributes(found.resource.attributes)
        for scope in found.instrumentation_library_spans:
            for span in scope.spans:
                yield {
                    "service": resource["service.name"],
                    "name": span.name,
                    "trace": span.trace_id.hex(),
                    "span": span.span_id.hex(),
                    "parent": span.parent_span_id.hex(),
                    "state": span.trace_state,
                    "attributes": _attributes(span.attributes),
                }


def _attributes(pairs: Any) -> dict[str, str]:
    return {pair.key: pair.value.string_value for pair in pairs}


@contextmanager
def collector(address: str, on_span: Callable[[dict[str, Any]], None]) -> Iterator[int]:
    """A collector at HOST:PORT while the block runs; gives its port."""

    def export(request: Any, _context: Any) -> Any:
        for span in _spans(request):
            on_span(span)
        return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(2))
    method = grpc.unary_unary_rpc_method_handler(
        export, trace_service_pb2.ExportTraceServiceRequest.FromString, trace_service_pb2.ExportTraceServiceResponse.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Export": method}),))
    port = server.add_insecure_port(address)
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


def main() -> None:
    """Write to a file until killed."""
    path = Path(sys.argv[2])
    with path.open("a", buffering=1) as out, collector(f"[::]:{sys.argv[1]}", lambda span: print(json.dumps(span), file=out)):
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
