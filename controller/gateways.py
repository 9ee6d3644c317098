"""Ingress: which listeners of Gateways are served, where, with which certificates, and which routes hold for them. Called by `controller.compile`. Pure.

https://gateway-api.sigs.k8s.io/reference/spec/#gateway says what listeners, conflicts and conditions are. A Gateway runs where an enrolled workload of its
namespace carries LABEL with its name (GEP-1762, https://gateway-api.sigs.k8s.io/geps/gep-1762/): that workload lends it addresses, namespace and identity.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

from controller import secrets
from controller.gatewaychecks import GROUP, kind_of
from controller.objects import Key, Object
from meshapi import discovery_pb2 as pb

CLASS: Final = "meshagent"
CONTROLLER: Final = "meshagent.io/controller"
LABEL: Final = "gateway.networking.k8s.io/gateway-name"
NAMESPACE_LABEL: Final = "kubernetes.io/metadata.name"
"""That every Namespace has (https://kubernetes.io/docs/reference/labels-annotations-taints/#kubernetes-io-metadata-name)."""
MESH_PORTS: Final = frozenset({15001, 15002, 15003, 15006, 15008, 15053})
"""Of the waypoint and the names in every workload's namespace."""
MOST_RULES: Final = 10_000
"""Matches of all routes of one listener together."""
_KINDS: Final = ("HTTPRoute", "GRPCRoute")
_OWN_KINDS: Final = {"Telemetry": "meshagent.io", "ExternalService": "meshagent.io"}
"""The groups of kinds that ReferenceGrants may name and that are not Gateway API's, or as targets core's."""
_PROTOCOLS: Final = ("HTTP", "HTTPS")
_NAMES_SHOWN: Final = 10


ConditionType = Literal[
    "Accepted",
    "BalancedAsWished",
    "Conflicted",
    "EndpointsUsed",
    "Enforced",
    "HostnamesApplied",
    "KeysCurrent",
    "ListenersValid",
    "ParentsResolved",
    "Programmed",
    "ResolvedRefs",
    "SelectedInItsNamespace",
    "TargetsResolved",
    "Uncontested",
]
"""All that the mesh says of objects. Conditions of other types are others' (`controller.kubernetes.status`)."""


class Said(NamedTuple):
    """A condition: `controller.compile.Condition`, before it is one."""

    type: ConditionType
    status: bool
    reason: str
    message: str

    def json(self) -> dict[str, str]:
        """Return it as it stands in a status."""
        return {"type": self.type, "status": "True" if self.status else "False", "reason": self.reason, "message": self.message}


Wrong = tuple[str, str]
"""Reason and message."""


@dataclass(slots=True)
class Listener:
    """One listener of a gateway of ours. `refused` and `unresolved` are why it is not served; "" if it is."""

    spec: Mapping[str, Any]
    refused: Wrong | None = None
    conflict: Wrong | None = None
    unresolved: Wrong | None = None
    uncertified: bool = False
    """Is one of its certificates not fit?"""
    kinds: tuple[str, ...] = _KINDS
    certificates: dict[str, secrets.Pair] = field(default_factory=dict)
    routes: set[Key] = field(default_factory=set)
    matches: int = 0

    @property
    def hostname(self) -> str:
        """ "" = every host."""
        return str(self.spec.get("hostname", ""))

    @property
    def accepted(self) -> bool:
        """May routes be attached?"""
        return self.refused is None and self.conflict is None

    @property
    def served(self) -> bool:
        """Is it, where its gateway has a workload? Not with a half of its certificates, or none."""
        return self.accepted and (self.spec["protocol"] != "HTTPS" or (bool(self.certificates) and not self.uncertified))


@dataclass(slots=True)
class Attachment:
    """What of a route holds for gateways: `parents` for the model, `wrong` for people, `status` by parentRef."""

    parents: list[pb.Parent] = field(default_factory=list)
    wrong: list[Wrong] = field(default_factory=list)
    status: list[tuple[Mapping[str, Any], Said]] = field(default_factory=list)


class Grants:
    """ReferenceGrants: who of another namespace may refer to what."""

    def __init__(self, grants: Iterable[Object]) -> None:
        self._allowed: set[tuple[str, str, str, str, str]] = set()
        for grant in grants:
            for source in grant.spec["from"]:
                for target in grant.spec["to"]:
                    own = _OWN_KINDS.get(target["kind"])
                    if source["group"] == _OWN_KINDS.get(source["kind"], GROUP) and target["group"] in ({own} if own else {"", "core"}):
                        name = target.get("name", "*")
                        self._allowed.add((source["kind"], source["namespace"], target["kind"], grant.key.namespace, name))

    def allow(self, source: Key, kind: str, namespace: str, name: str) -> bool:
        """May `source` refer to this? Always within its own namespace."""
        who = (source.kind, source.namespace, kind, namespace)
        return namespace == source.namespace or (*who, "*") in self._allowed or (*who, name) in self._allowed


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of Secrets beside what they hold: `refused`, why the newest version of one is not what is looked at; `served`, what was served last."""

    refused: Mapping[Key, str] = field(default_factory=dict)
    served: Mapping[str, secrets.Pair] = field(default_factory=dict, repr=False)


def named_secret(reference: Mapping[str, Any], namespace: str) -> Key | None:
    """Return the Secret that a certificateRef of a Gateway of `namespace` means; None if it means something else."""
    if reference.get("kind", "Secret") != "Secret" or reference.get("group", "") not in {"", "core"}:
        return None
    return Key("Secret", reference.get("namespace", namespace), reference["name"])


def wanted_secrets(gateway: Object, grants: Grants) -> frozenset[Key]:
    """Return the Secrets that a Gateway of ours names and may use."""
    if gateway.spec["gatewayClassName"] != CLASS:
        return frozenset()
    references = (one for listener in gateway.spec["listeners"] for one in listener.get("tls", {}).get("certificateRefs", ()))
    keys = (named_secret(reference, gateway.key.namespace) for reference in references)
    return frozenset(key for key in keys if key is not None and grants.allow(gateway.key, *key))


class Ingress:
    """All Gateways of class CLASS. Made once for each compilation; `attach` routes in the order in which they win."""

    def __init__(self, objects: Mapping[Key, Object], workloads: Iterable[Object], now: dt.datetime, known: Known | None = None) -> None:
        """`workloads`: those that are enrolled."""
        self._objects = objects
        self._known = known or Known()
        self.awaited: list[float] = []
        """When certificates begin to hold that do not yet, Unix seconds."""
        self._others: set[str] = set()
        """Gateways of other classes."""
        self._gateways: dict[str, tuple[Object, dict[str, Listener]]] = {}
        self._workloads: dict[str, list[Object]] = defaultdict(list)
        self.grants = Grants(item for key, item in sorted(objects.items()) if key.kind == "ReferenceGrant")
        for key, item in sorted((key, item) for key, item in objects.items() if key.kind == "Gateway"):
            if item.spec["gatewayClassName"] == CLASS:
                self._gateways[key.qualified] = (item, self._listeners(item, now))
            else:
                self._others.add(key.qualified)
        for workload in workloads:
            if (name := f"{workload.key.namespace}/{workload.labels.get(LABEL, '')}") in self._gateways:
                self._workloads[name].append(workload)

    def _listeners(self, gateway: Object, now: dt.datetime) -> dict[str, Listener]:
        found = {spec["name"]: Listener(spec) for spec in gateway.spec["listeners"]}
        for one in found.values():
            self._kinds(one)
            self._check(gateway, one, now)
        usable = [one for one in found.values() if one.refused is None]
        for one in usable:
            one.conflict = _conflict(one, [other for other in usable if other is not one])
        return found

    @staticmethod
    def _kinds(one: Listener) -> None:
        wanted = one.spec.get("allowedRoutes", {}).get("kinds")
        if not wanted:
            return
        one.kinds = tuple(kind for kind in _KINDS if any(w["kind"] == kind and w.get("group", GROUP) == GROUP for w in wanted))
        others = [w["kind"] for w in wanted if w["kind"] not in one.kinds]
        if others:
            one.unresolved = (
                "InvalidRouteKinds",
                f"routes of kind {', '.join(others[:_NAMES_SHOWN])} are not served here; {' and '.join(_KINDS)} are",
            )

    def _check(self, gateway: Object, one: Listener, now: dt.datetime) -> None:
        protocol, port = one.spec["protocol"], one.spec["port"]
        if protocol not in _PROTOCOLS:
            one.refused = ("UnsupportedProtocol", f"protocol {protocol[:80]} is not supported; supported: {', '.join(_PROTOCOLS)}")
            return
        if port in MESH_PORTS:
            one.refused = ("PortUnavailable", f"port {port} belongs to the mesh in every workload's network namespace")
            return
        for reference in one.spec.get("tls", {}).get("certificateRefs", ()):
            key = named_secret(reference, gateway.key.namespace)
            found, wrong = self._certificate(gateway, reference, key, now)
            if found is not None and key is not None:
                one.certificates[key.qualified] = found
            if wrong is not None and (found is None or one.unresolved is None) and not one.uncertified:
                one.unresolved, one.uncertified = wrong, found is None

    def _certificate(
        self, gateway: Object, reference: Mapping[str, Any], key: Key | None, now: dt.datetime
    ) -> tuple[secrets.Pair | None, Wrong | None]:
        """Return what is served for a certificateRef, and what is wrong with what it names: then it is what was served before."""
        if key is None:
            kind = "/".join(text for text in (reference.get("group", ""), reference["kind"]) if text)
            return None, ("InvalidCertificateRef", f"a certificate of kind {kind} is not supported: it has to be a Secret")
        name = key.qualified
        if not self.grants.allow(gateway.key, *key):
            words = f"no ReferenceGrant of namespace {key.namespace} lets Gateways of {gateway.key.namespace} use Secret {name}"
            return None, ("RefNotPermitted", words)
        refused, secret = self._known.refused.get(key, ""), self._objects.get(key)
        if secret is None:
            return None, ("InvalidCertificateRef", f"Secret {name}: {refused}" if refused else f"there is no Secret {name}")
        found: secrets.Pair | None
        try:
            found = secrets.pair(secret, now)
        except secrets.Unfit as error:
            if error.until is not None:
                self.awaited.append(error.until.timestamp())
            refused, found = str(error), self._known.served.get(name)
            if found is None or not found.begins <= now <= found.ends:
                return None, ("InvalidCertificateRef", f"Secret {name}: {refused}")
        if refused:
            return found, ("InvalidCertificateRef", f"Secret {name}: {refused}; the certificate before it goes on being served")
        return found, None

    def attach(self, route: Object) -> Attachment:
        """Say which listeners a route holds for."""
        result = Attachment()
        for reference in route.spec["parentRefs"]:
            name = f"{reference.get('namespace', route.key.namespace)}/{reference['name']}"
            if kind_of(reference) != "Gateway" or name in self._others:
                continue
            wrong = self._attach(route, name, reference, result)
            said = Said("Accepted", False, *wrong) if wrong else Said("Accepted", True, "Accepted", f"in force at Gateway {name}")
            result.status.append((reference, said))
            if wrong:
                result.wrong.append(wrong)
        return result

    def _attach(self, route: Object, name: str, reference: Mapping[str, Any], result: Attachment) -> Wrong | None:  # noqa: PLR0911 - one for each reason
        """Attach to every listener that is meant and that allows it; return why there is none."""
        if name not in self._gateways:
            return "NoMatchingParent", f"there is no Gateway {name}"
        gateway, listeners = self._gateways[name]
        section, port = reference.get("sectionName", ""), reference.get("port", 0)
        meant = [one for one in listeners.values() if section in {"", one.spec["name"]} and port in {0, one.spec["port"]}]
        if not meant:
            what = " ".join(([f"called {section}"] if section else []) + ([f"on port {port}"] if port else []))
            return "NoMatchingParent", f"Gateway {name} has no listener {what}"
        meant = [one for one in meant if one.accepted]
        if not meant:
            return "NoMatchingParent", f"no listener of Gateway {name} that is meant is accepted: see its status"
        open_ones = [one for one in meant if route.key.kind in one.kinds and self._allows(gateway, one, route.key.namespace)]
        if not open_ones:
            return (
                "NotAllowedByListeners",
                f"allowedRoutes of Gateway {name} lets no {route.key.kind} of namespace {route.key.namespace} in",
            )
        wanted = [text.lower() for text in route.spec.get("hostnames", ())]
        fitting = [(one, common) for one in open_ones if (common := intersection(wanted, one.hostname)) is not None]
        if not fitting:
            return "NoMatchingListenerHostname", f"spec.hostnames has nothing in common with the listeners of Gateway {name}"
        count = sum(max(1, len(rule.get("matches", ()))) for rule in route.spec.get("rules", [{}]))
        full = [one.spec["name"] for one, _ in fitting if one.matches + count > MOST_RULES]
        if full:
            return "UnsupportedValue", f"listener {full[0]} of Gateway {name} would have more than {MOST_RULES} matches"
        for one, common in fitting:
            if route.key not in one.routes:
                one.routes.add(route.key)
                one.matches += count
                result.parents.append(pb.Parent(gateway=name, listener=one.spec["name"], hostnames=common))
        return None

    def _allows(self, gateway: Object, one: Listener, namespace: str) -> bool:
        namespaces = one.spec.get("allowedRoutes", {}).get("namespaces", {})
        which = namespaces.get("from", "Same")
        if which != "Selector":
            return which == "All" or namespace == gateway.key.namespace
        item = self._objects.get(Key("Namespace", "", namespace))
        return selects(namespaces["selector"], {**(item.labels if item else {}), NAMESPACE_LABEL: namespace})

    def denied(self, route: Object) -> list[str]:
        """Return the backends of a route that no ReferenceGrant lets gateways send requests to: across namespaces one is needed."""
        found = set()
        for rule in route.spec.get("rules", ()):
            mirrors = (item["requestMirror"]["backendRef"] for item in rule.get("filters", ()) if item["type"] == "RequestMirror")
            for reference in (*rule.get("backendRefs", ()), *mirrors):
                namespace = reference.get("namespace", route.key.namespace)
                if not self.grants.allow(route.key, "Service", namespace, reference["name"]):
                    found.add(f"{namespace}/{reference['name']}")
        return sorted(found)

    def lends(self, workload: Object) -> bool:
        """Does it ask to be the place of one of these Gateways?"""
        return f"{workload.key.namespace}/{workload.labels.get(LABEL, '')}" in self._gateways

    def ports(self, workload: Object) -> set[int]:
        """Return the ports on which a gateway listens in a workload's place: strangers are who it is for, so they are not STRICT."""
        found = self._gateways.get(f"{workload.key.namespace}/{workload.labels.get(LABEL, '')}")
        return {one.spec["port"] for one in found[1].values() if one.served} if found else set()

    def results(self, addresses: Callable[[Object], list[str]]) -> Iterable[tuple[Object, pb.Gateway, list[Said], dict[str, Any]]]:
        """Give for each Gateway what goes into the model, its conditions and the rest of its status. `addresses` are those of a workload."""
        for name, (gateway, listeners) in self._gateways.items():
            workloads = self._workloads[name]
            entity = pb.Gateway(
                namespace=gateway.key.namespace,
                name=gateway.key.name,
                listeners=[
                    pb.GatewayListener(
                        name=one.spec["name"], port=one.spec["port"], hostname=one.hostname, certificates=sorted(one.certificates)
                    )
                    for one in listeners.values()
                    if one.served
                ],
            )
            status = {
                "addresses": [{"type": "IPAddress", "value": text} for workload in workloads for text in addresses(workload)],
                "listeners": [_status(one, bool(workloads)) for one in listeners.values()],
            }
            yield gateway, entity, _conditions(gateway, listeners, workloads), status

    def certificates(self) -> dict[str, dict[str, secrets.Pair]]:
        """Return the certificates that each node serves, by the name of the Secret."""
        found: dict[str, dict[str, secrets.Pair]] = {}
        for name, (_, listeners) in self._gateways.items():
            held = {name: pair for one in listeners.values() if one.served for name, pair in one.certificates.items()}
            for workload in self._workloads[name]:
                if held:
                    found.setdefault(workload.spec["node"], {}).update(held)
        return found

    def pairs(self) -> dict[str, secrets.Pair]:
        """Return the certificates of all listeners that are served, wherever that is, by the name of the Secret."""
        listeners = (one for _, several in self._gateways.values() for one in several.values() if one.served)
        return {name: pair for one in listeners for name, pair in one.certificates.items()}


def _conflict(one: Listener, others: Iterable[Listener]) -> Wrong | None:
    """https://gateway-api.sigs.k8s.io/reference/spec/#gatewayspec, "distinct": none of those that conflict is accepted."""
    for other in others:
        if other.spec["port"] == one.spec["port"]:
            if other.spec["protocol"] != one.spec["protocol"]:
                return "ProtocolConflict", f"listener {other.spec['name']} has protocol {other.spec['protocol']} on port {one.spec['port']}"
            if other.hostname == one.hostname:
                return "HostnameConflict", f"listener {other.spec['name']} has the same port and hostname"
    return None


def _status(one: Listener, runs: bool) -> dict[str, Any]:
    refused, conflict, unresolved = one.refused, one.conflict, one.unresolved
    if one.served:
        programmed = (
            (True, "Programmed", "sent to its nodes")
            if runs
            else (False, "Pending", "the Gateway has no workload: see its condition Programmed")
        )
    else:
        programmed = (False, "Invalid", "not served: see the other conditions")
    said = [
        Said("Accepted", False, *(refused or conflict)) if refused or conflict else Said("Accepted", True, "Accepted", "valid"),  # type: ignore[misc]
        Said("Conflicted", True, *conflict) if conflict else Said("Conflicted", False, "NoConflicts", "none"),
        Said("ResolvedRefs", False, *unresolved)
        if unresolved
        else Said("ResolvedRefs", True, "ResolvedRefs", "every reference is resolved"),
        Said("Programmed", *programmed),
    ]
    return {
        "name": one.spec["name"],
        "supportedKinds": [{"group": GROUP, "kind": kind} for kind in one.kinds] if one.spec["protocol"] in _PROTOCOLS else [],
        "attachedRoutes": len(one.routes),
        "conditions": [item.json() for item in said],
    }


def _conditions(gateway: Object, listeners: Mapping[str, Listener], workloads: list[Object]) -> list[Said]:
    bad = {name: wrong for name, one in listeners.items() if (wrong := one.refused or one.conflict or one.unresolved)}
    served = [one for one in listeners.values() if one.served]
    message = "; ".join(f"listener {name}: {wrong[1]}" for name, wrong in list(bad.items())[:_NAMES_SHOWN])
    if not any(one.accepted for one in listeners.values()):
        said = [Said("Accepted", False, "ListenersNotValid", message)]
    else:
        said = [
            Said(
                "Accepted", True, "ListenersNotValid" if bad else "Accepted", "in force, as far as its listeners are" if bad else "in force"
            )
        ]
        if bad:
            said.append(Said("ListenersValid", False, next(iter(bad.values()))[0], message))
    if not workloads:
        where = f"no enrolled workload of namespace {gateway.key.namespace} has the label {LABEL}: {gateway.key.name}; there it would run"
        said.append(Said("Programmed", False, "NoResources", where))
    elif not served:
        said.append(Said("Programmed", False, "Invalid", "no listener can be served"))
    else:
        nodes = sorted({workload.spec["node"] for workload in workloads})
        said.append(Said("Programmed", True, "Programmed", f"sent to {', '.join(nodes[:_NAMES_SHOWN])}"))
    return said


def intersection(hostnames: list[str], listener: str) -> list[str] | None:
    """Return what a route's hostnames and a listener's have in common: [] = every host, None = nothing.

    https://gateway-api.sigs.k8s.io/reference/spec/#httproutespec, "hostnames": "*." stands for one or more labels.
    """
    if not hostnames or not listener:
        return hostnames or ([listener] if listener else [])
    found = [one for text in hostnames if (one := _common(text, listener))]
    return list(dict.fromkeys(found)) or None


def _common(one: str, other: str) -> str:
    """The narrower of two hostnames, if it lies within the other."""
    for narrow, wide in ((one, other), (other, one)):
        if narrow == wide or (wide.startswith("*.") and narrow.endswith(wide[1:]) and narrow != wide[1:]):
            return narrow
    return ""


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#label-selectors."""
    if any(labels.get(name) != value for name, value in selector.get("matchLabels", {}).items()):
        return False
    for expression in selector.get("matchExpressions", ()):
        key, operator, values = expression["key"], expression["operator"], expression.get("values", ())
        holds = {
            "In": labels.get(key) in values,
            "NotIn": labels.get(key) not in values,
            "Exists": key in labels,
            "DoesNotExist": key not in labels,
        }
        if not holds[operator]:
            return False
    return True
