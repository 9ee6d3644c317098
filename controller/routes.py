"""What HTTPRoute and GRPCRoute have beside matches, backends and timeouts, in the words of meshapi/discovery.proto. Called by `controller.compile`. Pure.

Which routes hold for a service port: https://gateway-api.sigs.k8s.io/geps/gep-1294/. What the filters mean:
https://gateway-api.sigs.k8s.io/reference/spec/#httproutefilter.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from controller import protocols
from controller.durations import milliseconds
from controller.gatewaychecks import kind_of
from controller.gateways import Attachment, Said
from controller.objects import CALLER_MATCH_GROUP, Key, Object
from meshapi import discovery_pb2 as pb

KINDS: Final = ("GRPCRoute", "HTTPRoute")
"""In the order in which they win a service port (GEP-1294, "Route types")."""
MOST_MATCHES: Final = 10_000
"""Of all routes for one service port together, for callers of one kind."""
MAX_AGE_S: Final = 5  # HTTPCORSFilter.maxAge left out
_METHODS: Final = "GET, HEAD, POST, PUT, DELETE, CONNECT, OPTIONS, TRACE, PATCH"
_WHOLES: Final = (100, 10_000, 1_000_000)
_NAMES_SHOWN: Final = 10


@dataclass(slots=True)
class Attached:
    """What a route holds for, and why not for more: `wrong` has (reason, message)."""

    parents: list[tuple[str, int]] = field(default_factory=list)
    wrong: list[tuple[str, str]] = field(default_factory=list)
    status: list[tuple[Mapping[str, Any], Said]] = field(default_factory=list)
    """For each parentRef that is a Service, whether it is accepted."""
    ingress: Attachment = field(default_factory=Attachment)
    """The same of gateways."""


def attach(routes: Mapping[str, Iterable[Object]], services: Mapping[str, Object], created: Callable[[Object], int]) -> dict[Key, Attached]:
    """Say for each route, by kind, which service ports it holds for.

    GRPCRoutes win a port against HTTPRoutes, for all callers and again for those of one namespace. A route for a service of another namespace holds for
    callers of its own only, and on ports only that speak HTTP whatever it says: it must not change what callers of other namespaces speak there.
    """
    found = _Attachments(services)
    for consuming in (False, True):
        for kind in KINDS:
            for route in sorted(routes.get(kind, ()), key=lambda route: (created(route), route.key.qualified)):
                found.attach(route, consuming=consuming)
    return found.result


class _Attachments:
    def __init__(self, services: Mapping[str, Object]) -> None:
        self._services = services
        self.result: dict[Key, Attached] = defaultdict(Attached)
        self._holders: dict[tuple[str, int, str], Object] = {}
        self._matches: dict[tuple[str, int, str], int] = defaultdict(int)

    def attach(self, route: Object, *, consuming: bool) -> None:
        for reference in route.spec["parentRefs"]:
            namespace = reference.get("namespace", route.key.namespace)
            if kind_of(reference) == "Service" and consuming is (namespace != route.key.namespace):
                self._to(route, f"{namespace}/{reference['name']}", reference, route.key.namespace if consuming else "")

    def _to(self, route: Object, name: str, reference: Mapping[str, Any], scope: str) -> None:
        own = self.result[route.key]
        ports = parent_ports(self._services, name, reference)
        if isinstance(ports, str):
            own.wrong.append(("NoMatchingParent", ports))
            own.status.append((reference, Said("Accepted", False, "NoMatchingParent", ports)))
            return
        open_ports, refusals = [], []
        for port in ports:
            if wrong := self._refusal(route, name, port, scope):
                refusals.append(wrong)
            else:
                open_ports.append(port["port"])
        own.wrong += refusals
        said = ("Accepted", "in force") if open_ports else (refusals[0][0], texts(refusals))
        own.status.append((reference, Said("Accepted", bool(open_ports), *said)))
        count = sum(max(1, len(rule.get("matches", ()))) for rule in route.spec.get("rules", [{}]))
        for port in open_ports:
            self._holders.setdefault((name, port, scope), route)
            self._matches[name, port, scope] += count
        whole = len(open_ports) == len(ports) and not reference.get("port") and not reference.get("sectionName")
        own.parents += [(name, 0)] if whole and open_ports else [(name, port) for port in open_ports]

    def _refusal(self, route: Object, name: str, port: Mapping[str, Any], scope: str) -> tuple[str, str] | None:
        key = (name, port["port"], scope)
        holder = self._holders.get(key)
        if holder is not None and holder.key.kind != route.key.kind:
            return "Conflicted", f"{holder.key} holds for {name}:{port['port']}: a GRPCRoute wins against an HTTPRoute (GEP-1294)"
        count = sum(max(1, len(rule.get("matches", ()))) for rule in route.spec.get("rules", [{}]))
        if self._matches[key] + count > MOST_MATCHES:
            message = f"{name}:{port['port']} has {self._matches[key]} matches of older routes; at most {MOST_MATCHES} are allowed, this has {count} more"
            return "UnsupportedValue", message
        if scope and (name, port["port"], "") not in self._holders and protocols.declared(port).lower() not in protocols.HTTP:
            message = f"{name}:{port['port']} is not declared to speak HTTP, and a route of another namespace cannot make it: its appProtocol has to say so"
            return "NoMatchingParent", message
        return None


def parent_ports(services: Mapping[str, Object], name: str, reference: Mapping[str, Any]) -> list[Mapping[str, Any]] | str:
    """Return the TCP ports of a service that a parentRef means, or why there are none."""
    service = services.get(name)
    if service is None:
        return f"there is no Service {name}"
    if "None" in {service.spec.get("clusterIP"), *service.spec.get("clusterIPs", ())}:
        return f"Service {name} is headless: without an address of its own nothing is sent to it"
    port, section = reference.get("port", 0), reference.get("sectionName", "")
    tcp = [one for one in service.spec["ports"] if one.get("protocol", "TCP") == "TCP"]
    if not tcp:
        return f"Service {name} has no TCP port"
    found = [one for one in tcp if port in {0, one["port"]}]
    if not found:
        return f"Service {name} has no TCP port {port}"
    if not section:
        return found
    found = [one for one in found if one.get("name") == section]
    return found or f"Service {name} has no TCP port {f'{port} ' if port else ''}with the name {section}"


def unreachable(services: Mapping[str, Object], name: str, port: int, *, grpc: bool = False) -> tuple[str, str] | None:
    """Return (reason, message) why a backend cannot carry HTTP, or gRPC, or nothing."""
    service = services.get(name)
    if service is None:
        return "BackendNotFound", f"there is no Service {name}"
    tcp = {one["port"]: one for one in service.spec["ports"] if one.get("protocol", "TCP") == "TCP"}
    if port not in tcp:
        return "BackendNotFound", f"Service {name} has no TCP port {port}"
    spoken = protocols.declared(tcp[port])
    if spoken and spoken.lower() not in (protocols.GRPC if grpc else protocols.HTTP):
        what = "gRPC" if grpc else "HTTP"
        return "UnsupportedProtocol", f"Service {name} port {port} speaks {spoken} (appProtocol), which is not {what}"
    return None


def spoken_grpc(routes: Iterable[Object], attached: Mapping[Key, Attached]) -> set[tuple[str, int]]:
    """Return the service ports that GRPCRoutes of their own namespace hold for (port 0: all) or send to.

    What does not say what it speaks, speaks gRPC there. Routes of other namespaces have no say in what a service speaks.
    """
    found: set[tuple[str, int]] = set()
    for route in routes:
        if attached[route.key].parents or attached[route.key].ingress.parents:
            own = f"{route.key.namespace}/"
            found.update(parent for parent in attached[route.key].parents if parent[0].startswith(own))
            for rule in route.spec.get("rules", ()):
                mirrors = [item["requestMirror"]["backendRef"] for item in rule.get("filters", ()) if item["type"] == "RequestMirror"]
                for reference in (*rule.get("backendRefs", ()), *mirrors):
                    if reference.get("namespace", route.key.namespace) == route.key.namespace:
                        found.add((own + reference["name"], reference.get("port", 0)))
    return found


def grpc_match(match: Mapping[str, Any], kinds: Mapping[str, pb.StringMatch.Kind.ValueType]) -> pb.GrpcMethod:
    """Resolve the method of a GRPCRoute's match."""
    method = match.get("method", {})
    message = pb.GrpcMethod()
    for name in ("service", "method"):
        if method.get(name):
            getattr(message, name).CopyFrom(pb.StringMatch(kind=kinds[method.get("type", "Exact")], value=method[name]))
    return message


@dataclass(frozen=True, slots=True)
class Resolver:
    """What references of a route are held against. `source` compiles a Source of a CallerMatch."""

    services: Mapping[str, Object]
    callers: Mapping[str, Object]
    spoken: Collection[tuple[str, int]]
    """Of `spoken_grpc`."""
    source: Callable[[Mapping[str, Any], str], pb.Source]

    def backend(self, route: Object, reference: Mapping[str, Any]) -> tuple[str, int, tuple[str, str] | None]:
        """Return service, port and what is wrong. Across namespaces no ReferenceGrant is asked for: routes of a mesh open nothing that is not
        open anyway, because who may call a workload is decided by its AuthorizationPolicies (GEP-1294, "Namespace boundaries")."""
        name, port = f"{reference.get('namespace', route.key.namespace)}/{reference['name']}", reference.get("port", 0)
        kind, group = reference.get("kind", "Service"), reference.get("group", "")
        if kind != "Service" or group not in {"", "core"}:
            return name, port, ("InvalidKind", f"a backend of kind {group + '/' if group else ''}{kind} is not supported")
        grpc = route.key.kind == "GRPCRoute"
        wrong = unreachable(self.services, name, port, grpc=grpc)
        if not wrong and grpc and self._is_silent(name, port):
            text = f"Service {name} port {port} does not say that it speaks gRPC (appProtocol), and a route of another namespace cannot"
            wrong = "UnsupportedProtocol", text
        return name, port, wrong

    def _is_silent(self, name: str, port: int) -> bool:
        declared = any(one["port"] == port and protocols.declared(one) for one in self.services[name].spec["ports"])
        return not declared and {(name, port), (name, 0)}.isdisjoint(self.spoken)

    def filters(self, message: pb.RouteRule, route: Object, index: int, rule: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Fill in what the filters of a rule, and its sessionPersistence, ask for; what is wrong with their references."""
        wrong: list[tuple[str, str]] = []
        for item in rule.get("filters", []):
            if item["type"] == "RequestRedirect":
                message.redirect.CopyFrom(_redirect(item["requestRedirect"]))
            elif item["type"] == "URLRewrite":
                message.rewrite.CopyFrom(_rewrite(item["urlRewrite"]))
            elif item["type"] == "CORS":
                message.cors.CopyFrom(_cors(item["cors"]))
            elif item["type"] == "RequestMirror":
                service, port, problem = self.backend(route, item["requestMirror"]["backendRef"])
                if problem:
                    wrong.append((problem[0], f"mirror: {problem[1]}: nothing is mirrored there"))
                else:
                    message.mirrors.append(_mirror(service, port, item["requestMirror"]))
            elif item["type"] == "ExtensionRef" and (problem := self._callers(message, route, item["extensionRef"])):
                wrong.append(problem)
        if "sessionPersistence" in rule:
            message.session.CopyFrom(_session(rule["sessionPersistence"], f"{route.key.qualified}/{rule.get('name', index)}"))
        return wrong

    def _callers(self, message: pb.RouteRule, route: Object, reference: Mapping[str, Any]) -> tuple[str, str] | None:
        name = f"{route.key.namespace}/{reference['name']}"
        if (reference["group"], reference["kind"]) != (CALLER_MATCH_GROUP, "CallerMatch"):
            reason, text = "InvalidKind", f"a filter of kind {reference['group']}/{reference['kind']} is not supported"
        elif name not in self.callers:
            reason, text = "BackendNotFound", f"there is no CallerMatch {name}"
        else:
            spec = self.callers[name].spec
            claims = [
                pb.ClaimCondition(path=c["path"], values=c.get("values"), not_values=c.get("notValues")) for c in spec.get("claims", [])
            ]
            sources = [self.source(entry["source"], route.key.namespace) for entry in spec.get("from", [])]
            message.callers.append(pb.Callers(sources=sources, claims=claims))
            return None
        # A filter that cannot be resolved must not be skipped: the requests get an error (spec of HTTPRouteFilter, field extensionRef).
        message.invalid = text
        return reason, f"{text}: what its rule matches answers 500"


def reason(wrong: Iterable[tuple[str, str]]) -> str:
    """Choose one of Gateway API's reasons (https://gateway-api.sigs.k8s.io/reference/spec/#routeconditionreason) for several."""
    found = {one for one, _ in wrong}
    return next(one for one in ("InvalidKind", "RefNotPermitted", "UnsupportedProtocol", "BackendNotFound") if one in found)


def texts(wrong: Iterable[tuple[str, str]]) -> str:
    """One text for people, of the first few."""
    found = list(dict.fromkeys(text for _, text in wrong))
    return "; ".join(found[:_NAMES_SHOWN]) + (f"; and {len(found) - _NAMES_SHOWN} more" if len(found) > _NAMES_SHOWN else "")


def hostname(filters: Iterable[Mapping[str, Any]]) -> str:
    """Return what the filters of a backend rewrite Host to; of URLRewrite nothing else is possible there (`controller.checks`)."""
    return next((item["urlRewrite"].get("hostname", "") for item in filters if item["type"] == "URLRewrite"), "")


def _path(message: pb.Redirect | pb.Rewrite, path: Mapping[str, Any]) -> None:
    if path.get("type") == "ReplaceFullPath":
        message.full_path = path["replaceFullPath"]
    elif path:
        message.prefix = path["replacePrefixMatch"]


def _redirect(item: Mapping[str, Any]) -> pb.Redirect:
    message = pb.Redirect(
        scheme=item.get("scheme", ""), hostname=item.get("hostname", ""), port=item.get("port", 0), status=item.get("statusCode", 302)
    )
    _path(message, item.get("path", {}))
    return message


def _rewrite(item: Mapping[str, Any]) -> pb.Rewrite:
    message = pb.Rewrite(hostname=item.get("hostname", ""))
    _path(message, item.get("path", {}))
    return message


def _mirror(service: str, port: int, item: Mapping[str, Any]) -> pb.Mirror:
    """Envoy knows parts of 100, 10,000 and 1,000,000: the first of them that is exact, else the last, rounded."""
    fraction = item.get("fraction", {"numerator": item.get("percent", 100)})
    numerator, denominator = fraction["numerator"], fraction.get("denominator", 100)
    whole = next((one for one in _WHOLES if numerator * one % denominator == 0), _WHOLES[-1])
    return pb.Mirror(service=service, port=port, parts=min(math.floor(numerator * whole / denominator + 0.5), whole), whole=whole)


def _cors(item: Mapping[str, Any]) -> pb.Cors:
    credentials = item.get("allowCredentials", False)
    methods = ", ".join(item.get("allowMethods", []))
    return pb.Cors(
        origins=[_origin(text) for text in item.get("allowOrigins", [])],
        # "*" is only a name where credentials are sent (https://fetch.spec.whatwg.org/#http-new-header-syntax)
        methods=_METHODS if methods == "*" and credentials else methods,
        headers=", ".join(item.get("allowHeaders", [])),
        expose=", ".join(item.get("exposeHeaders", [])),
        max_age_s=item.get("maxAge", MAX_AGE_S),
        credentials=credentials,
    )


def _origin(text: str) -> pb.StringMatch:
    if text == "*":
        return pb.StringMatch(kind=pb.StringMatch.REGEX, value=".*")
    scheme, _, rest = text.partition("://")
    rest = re.sub(r":80$" if scheme == "http" else r":443$", "", rest)  # browsers leave it out
    if "*" not in rest:
        return pb.StringMatch(kind=pb.StringMatch.EXACT, value=f"{scheme}://{rest}")
    return pb.StringMatch(kind=pb.StringMatch.REGEX, value=f"{scheme}://" + re.escape(rest).replace(r"\*", "[^:/]+").replace(r"\-", "-"))


def _session(item: Mapping[str, Any], place: str) -> pb.Session:
    if item.get("type", "Cookie") == "Header":
        return pb.Session(header=item["header"]["name"])
    cookie = item.get("cookie", {})
    name = cookie.get("name") or f"meshagent-{hashlib.blake2b(place.encode(), digest_size=6).hexdigest()}"
    lifetime = milliseconds(item.get("absoluteTimeout", "")) if cookie.get("lifetimeType") == "Permanent" else 0
    return pb.Session(cookie=name, path=cookie.get("path", "/"), lifetime_ms=lifetime)
