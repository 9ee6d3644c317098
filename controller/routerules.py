"""Rules of routes into the workload model: matches, filters, backends. Pure: called by `controller.compile`, with what `controller.routes` resolves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from controller import routes
from controller.durations import milliseconds
from controller.objects import Object
from meshapi import discovery_pb2 as pb

DEFAULT_RETRIES: Final = 1  # HTTPRouteRetry.attempts left out: "implementation-specific"


def message(resolver: routes.Resolver, route: Object, index: int, rule: Mapping[str, Any], wrong: list[tuple[str, str]]) -> pb.RouteRule:
    """Resolve one rule; what cannot be resolved is added to `wrong`, as (reason, message)."""
    timeouts = rule.get("timeouts", {})
    request, response = _filters(rule.get("filters", []))
    message = pb.RouteRule(
        name=rule.get("name", ""),
        matches=[_match(match, grpc=route.key.kind == "GRPCRoute") for match in rule.get("matches", [])],
        backends=[_backend(resolver, route, reference, wrong) for reference in rule.get("backendRefs", [])],
        request_timeout_ms=milliseconds(timeouts.get("request", "")),
        backend_request_timeout_ms=milliseconds(timeouts.get("backendRequest", "")),
        request_headers=request,
        response_headers=response,
    )
    wrong += resolver.filters(message, route, index, rule)
    if "retry" in rule:
        retry = rule["retry"]
        message.retry.CopyFrom(
            pb.Retry(
                attempts=retry.get("attempts", DEFAULT_RETRIES),
                codes=retry.get("codes", []),
                backoff_ms=milliseconds(retry.get("backoff", "")),
            )
        )
    return message


_PATHS: Final = {"Exact": pb.StringMatch.EXACT, "PathPrefix": pb.StringMatch.PREFIX, "RegularExpression": pb.StringMatch.REGEX}


def _match(match: Mapping[str, Any], *, grpc: bool) -> pb.RouteMatch:
    def named(items: list[Mapping[str, Any]]) -> list[pb.NamedMatch]:
        return [
            pb.NamedMatch(name=item["name"], value=pb.StringMatch(kind=_PATHS[item.get("type", "Exact")], value=item["value"]))
            for item in items
        ]

    message = pb.RouteMatch(headers=named(match.get("headers", [])), query=named(match.get("queryParams", [])))
    if grpc:
        message.grpc.CopyFrom(routes.grpc_match(match, _PATHS))
        return message
    message.method = match.get("method", "")
    if "path" in match:
        path = match["path"]
        message.path.CopyFrom(pb.StringMatch(kind=_PATHS[path.get("type", "PathPrefix")], value=path.get("value", "/")))
    return message


def _backend(resolver: routes.Resolver, route: Object, reference: Mapping[str, Any], wrong: list[tuple[str, str]]) -> pb.Backend:
    service, port, problem = resolver.backend(route, reference)
    if problem:
        wrong.append(
            (problem[0], f"{problem[1]}: its share of requests answers {'UNAVAILABLE' if route.key.kind == 'GRPCRoute' else '500'}")
        )
    filters = reference.get("filters", [])
    request, response = _filters(filters)
    return pb.Backend(
        service=service,
        port=port,
        weight=reference.get("weight", 1),
        invalid=problem[1] if problem else "",
        request_headers=request,
        response_headers=response,
        hostname=routes.hostname(filters),
    )


def _filters(filters: list[Mapping[str, Any]]) -> tuple[pb.HeaderEdit | None, pb.HeaderEdit | None]:
    edits: dict[str, pb.HeaderEdit] = {}
    for item in filters:
        if item["type"] not in {"RequestHeaderModifier", "ResponseHeaderModifier"}:
            continue
        edit = item["requestHeaderModifier" if item["type"] == "RequestHeaderModifier" else "responseHeaderModifier"]
        edits[item["type"]] = pb.HeaderEdit(
            set={header["name"]: header["value"] for header in edit.get("set", [])},
            add={header["name"]: header["value"] for header in edit.get("add", [])},
            remove=edit.get("remove", []),
        )
    return edits.get("RequestHeaderModifier"), edits.get("ResponseHeaderModifier")
