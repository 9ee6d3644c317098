"""From the workload model to everything that Envoy on this node should have. Called by the supervisor on every change.

`Builder` makes all resources of the xDS server and tells the kernel side whose policies only the receiver can decide; `build` is the same, once. Must
not touch Envoy, files or the kernel. Only what a local workload can reach over L7 costs anything: an L4 service has no resources here, and
a node without enrolled workloads has none at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from envoy.config.route.v3 import route_pb2
from envoy.service.runtime.v3 import rtds_pb2
from google.protobuf.message import Message

from agent import egress
from agent.balancing import node_zone, preferred
from agent.compact import differing
from agent.external import External
from agent.l7 import (
    call_log,
    claims,
    clusters,
    externals,
    gateways,
    hbone,
    jwt,
    latency,
    limits,
    listeners,
    mirrors,
    names,
    parting,
    peer_log,
    rbac,
    routes,
    shares,
    spans,
    telling,
    traffic,
)
from agent.l7.kept import Kept
from agent.l7.peers import Peers
from agent.l7.rbac import Authorization
from agent.l7.readers import Readers, Reading
from agent.l7.resources import Resource, Resources, pack
from agent.l7.telling import Telling
from agent.l7.view import Key, View, targets
from agent.model import NO_DIRECT, Authentication, Direct, LocalWorkload, Mtls, Policy, Route, Service, ServicePort, Snapshot, Workload
from agent.observability import Marks, Observability
from agent.policy import Caller, Verdict, decide, named, protecting
from agent.traffic import Balancing, TrafficPolicy

Loopback = Callable[[str], str]
_KINDS = (names.CLUSTER, names.ENDPOINTS, names.LISTENER, names.SCOPE, names.ROUTES)


def build(snapshot: Snapshot, local: Sequence[LocalWorkload], *, trust_domain: str, traced: frozenset[str] = frozenset()) -> Resources:
    """Build all resources, by type URL and name. See `Builder.build` and `tracing`."""
    node = local[0].workload.node if local else ""
    zone = node_zone(snapshot.workloads.values(), node)
    return {**Builder(node, trust_domain).build(snapshot, local, zone), **tracing(traced)}


def tracing(
    traced: frozenset[str],
    *,
    received: frozenset[str] = frozenset(),
    peers: bool = False,
    calls: bool = False,
    logs: Mapping[str, int] = MappingProxyType({}),
) -> Resources:
    """The runtime layer. `traced` names local workloads whose requests and tunnels are streamed to the agent, `received` those of which it is what others ask
    of them; `peers`: so is what the far ends of tunnels have shown; `calls`: so are some
    requests of all, within `call_log.RATE`. `logs` are keys of `agent.l7.request_log`.
    """
    runtime = rtds_pb2.Runtime(name=names.RUNTIME_LAYER)
    keys = {names.trace_key(workload) for workload in traced} | {names.received_key(workload) for workload in received}
    keys |= ({names.TRACE_TUNNELS_KEY} if traced else set()) | ({names.PEERS_KEY} if peers else set())
    keys |= {names.CALLS_KEY} if calls else set()
    runtime.layer.update(dict.fromkeys(sorted(keys), 100) | dict(logs))
    return {names.RUNTIME: {names.RUNTIME_LAYER: pack(runtime)}, names.BUCKET: _BUCKET}


_BUCKET = {names.CALLS_BUCKET: pack(call_log.bucket())}


_Shared = tuple[frozenset[str], tuple[str, ...], Callable[..., route_pb2.RouteConfiguration], frozenset[str]]
Owner = tuple[Any, ...]
"""What a resource belongs to, and is built together with: (_SERVICE, NAME, PORT), (_ADDRESS, WORKLOAD), (_LOCAL, WORKLOAD), or one of those below. Of several
that claim a scope the smallest has it."""
_SERVICE, _ADDRESS, _LOCAL = range(3)
_TUNNELS: Owner = (3,)
_REST: Owner = (4,)
"""Is built anew each time, where its inputs differ."""
_FOLLOWED = frozenset({"version", "delta", "nodes", "workloads", "services", "routes", "policies", "traffic", "authentications"})
"""Fields of a Snapshot whose differences are traced to what depends on them (or, like the first three, that nothing here depends on)."""
_COMPARED = tuple(one.name for one in fields(Snapshot) if one.name not in _FOLLOWED)


@dataclass(slots=True)
class _Dirty:
    """What is to be built anew."""

    services: set[Key] = field(default_factory=set)
    addresses: set[str] = field(default_factory=set)
    local: set[str] = field(default_factory=set)
    tunnels: bool = False


class Builder:
    """Builds for one snapshot after the other: a change costs what depends on it. One thread at a time.

    Each resource belongs to an `Owner`. What differs between two snapshots is traced to the owners that depend on it (`_differing`); those are built anew,
    and what they had and have no more is removed. What others add to `_all` belongs to `_REST`, is built each time and need not be traced. A difference
    that is not traced (`_COMPARED`, another zone, certificates for the first time, ...) has everything built anew.
    """

    def __init__(self, node: str, trust_domain: str, request_log: str = "") -> None:
        """For the agent of `node`; `request_log` is the file of `agent.l7.request_log`, "" = there is none."""
        self._node = node
        self._log = request_log
        self._observability = Observability({})
        self._trust_domain = trust_domain
        self._view = View.of(Snapshot())
        self._kept = Kept()
        self._callers = rbac.LocalCallers({})
        self._shown: View | None = None
        """What `_result` was built from, with `_asked`."""
        self._asked: tuple[object, ...] = ()
        self._direct = NO_DIRECT
        self._result: dict[str, dict[str, Resource]] = {}
        self._copied: set[str] = set()
        """Kinds of `_result` that are this build's own; others are shared with results that were handed out."""
        self._owner = _REST
        self._owns: dict[Owner, set[tuple[str, str]]] = {}
        self._owned: dict[tuple[str, str], int] = {}
        """How many owners each resource has."""
        self._claims: dict[str, dict[Owner, str]] = {}
        """RouteConfigurations by destination and by who wants the destination for it."""
        self._claimed: dict[Owner, set[str]] = {}
        self._readers = Readers(node)
        self._partings = parting.Partings()
        self._loopback: Loopback | None = None
        self._distrusted = peer_log.Distrusted()
        self._peers: tuple[Snapshot, frozenset[str], Peers] | None = None
        """Of a snapshot and the workloads of this node that were bound, if a policy asks for labels."""
        self._tunnelled: Peers | None = None
        """Who the ends of tunnels of the last result believe."""
        self._addresses: tuple[Snapshot, frozenset[str], rbac.Callers] | None = None
        """The same by address, if a workload of this node has an inbound listener."""
        self._stamps: dict[str, int] = {}
        """What `rbac.Callers` said about the policies of each inbound listener."""
        self._verdicts: dict[tuple[tuple[str, ...], int], dict[str, bool]] = {}
        """By policies and port: the workloads of this node that are let in, or not."""
        self._identities: frozenset[str] = frozenset()
        self._roots = externals.system_roots()
        self._local: tuple[LocalWorkload, ...] = ()
        self._by_name: dict[str, LocalWorkload] = {}
        self._moved: set[str] = set()
        """Workloads of this node that differ from those of the build before."""
        self._receiving: frozenset[str] = frozenset()
        self._undecided: frozenset[str] = frozenset()
        """`View.left_to_receivers` of the present view."""
        self._policies: dict[Key, TrafficPolicy] = {}
        self._shared = _shared(frozenset(), (), frozenset())
        """Clusters that each workload of this node has one of its own of, those workloads, and what goes on with clusters that are balanced by latency."""

    def needs_inbound(self, snapshot: Snapshot) -> frozenset[str]:
        """Names of workloads whose policies the caller's side can not decide, also for flows that come through a trusted local waypoint.

        That is so where the endpoints of one L7 service port are not protected alike: the load balancer picks the endpoint after
        authorization, so only the receiver knows which policies count. Every protected workload among them is named, whether its own policies
        need the request or not.
        """
        self._view = self._view.after(snapshot)
        return self._view.left_to_receivers

    def reading(self, snapshot: Snapshot) -> frozenset[str]:
        """Of the workloads that the last result was built for: those whose requests are read where they arrive, by `snapshot`."""
        self._view = self._view.after(snapshot)
        return frozenset(self._by_name).intersection(self._view.asking.keys() | self._view.left_to_receivers)

    @property
    def shown(self) -> View | None:
        """What the last result was built from."""
        return self._shown

    def settle(self, view: View) -> bool:
        """Say that by now receivers read what `view` has them read; True if another result is due: Envoy is to let go of connections from before.

        Too early, and it makes connections that nobody reads anew, or that nobody accepts yet.
        """
        return self._readers.settle(view)

    def settle_again(self) -> bool:
        """The same once more, for nodes that begin later than they were given time for; to be said every few seconds."""
        return self._readers.settle_again(self._view)

    @property
    def parts(self) -> bool:
        """Is there anything that needs the waypoint no more, but may still be called through it?"""
        return self._view.parting != parting.NOTHING

    def look(self, called: parting.Dialled) -> bool:
        """Say what living connections through the waypoint were dialled to; True if another result is due.

        What needs the waypoint no more is let go of when nobody is connected to it, and else has its callers connect anew.
        """
        before = self._view.parting
        over = self._partings.over(before, called)
        self._view = self._view.called_as(self._view.called.either(called).without(over))
        return self._partings.look(self._view.parting, called) or self._view.parting != before

    @property
    def identities(self) -> frozenset[str]:
        """SPIFFE IDs that the last result has tunnels to."""
        return self._identities

    def build(
        self,
        snapshot: Snapshot,
        local: Sequence[LocalWorkload],
        zone: str,
        loopback: Loopback | None = None,
        distrusted: peer_log.Distrusted = peer_log.Distrusted(),  # noqa: B008  immutable
        direct: Direct = NO_DIRECT,
    ) -> Resources:
        """Build all resources but those of `tracing`, by type URL and name; the same object as before if nothing differs, also of each type.

        `local` are the enrolled workloads of this node; each one's `netns_path` must name one namespace for ever (put the cookie into it):
        Envoy keeps the sockets of a listener whose address did not change, so a reused path would leave it listening in the old namespace.
        `zone` is the node's, as its workloads say. `loopback` gives the loopback address that stands for a SPIFFE ID in the kernel; None: this node has
        no certificates, and so no tunnels. `distrusted` are those whose tunnels are to end. `direct` says who is reached without one all the same
        (`agent.wireguard`).
        """
        if (loopback is None) is not (self._view.accounts is None):
            self._view = View.of(snapshot, tunnels=loopback is not None, called=self._view.called)
        view = self._view = self._view.after(snapshot)
        self._loopback, self._distrusted, self._direct = loopback, distrusted, direct
        self._observability = Observability(snapshot.telemetry)
        limited = frozenset(
            names.service(*key)
            for policy in snapshot.traffic.values()
            if policy.limits.per_workload
            for key in policy.targets
            if key in view.used
        )
        measured = (policy for policy in snapshot.traffic.values() if policy.balancing.kind is Balancing.LATENCY)
        by_latency = frozenset(names.service(*key) for policy in measured for key in policy.targets)
        self._shared = _shared(limited, tuple(sorted(one.workload.name for one in local)) if limited else (), by_latency)
        asked = (zone, loopback is None, distrusted, direct, not local, self._shared, *(getattr(snapshot, name) for name in _COMPARED))
        before, self._shown = self._shown, None  # until it is done
        last = self._result
        whole = (
            before is None or len(asked) != len(self._asked) or any(a is not b and a != b for a, b in zip(asked, self._asked, strict=True))
        )
        self._asked = asked
        if before is None or whole:
            self._forget()
        else:
            self._result, self._copied = dict(last), set()
        dirty = self._differing(None if whole else before, view, local)
        with self._owned_by(_REST):
            self._all(dirty, zone)
        self._shown = view
        if not self._copied:
            self._result = last
        self._kept.turn_if_large()
        return self._result

    def _forget(self) -> None:
        """Begin with nothing, but remember what things were made of."""
        self._result, self._copied = {kind: {} for kind in _KINDS}, set(_KINDS)
        self._owns, self._owned, self._claims, self._claimed = {}, {}, {}, {}
        self._verdicts, self._stamps, self._by_name = {}, {}, {}
        self._addresses, self._tunnelled, self._owner = None, None, _REST
        self._kept.turn()

    def _differing(self, before: View | None, view: View, local: Sequence[LocalWorkload]) -> _Dirty:
        """What depends on anything that differs from what was shown `before`; None: everything."""
        snapshot = view.snapshot
        callers = self._take_local(local)
        undecided = self._undecided = view.left_to_receivers
        unsaid = self._partings.say(view.parting)
        unsettled = self._readers.begin(Reading(view, self._node, undecided))
        received, self._receiving = self._receiving, frozenset(n for n in self._by_name if n in view.asking or n in undecided)
        if before is None or before.snapshot.traffic is not snapshot.traffic:
            self._policies = {target: policy for policy in snapshot.traffic.values() for target in policy.targets}
        if not local:
            return _Dirty()
        if before is None:
            dirty = _Dirty(set(view.used), set(view.dialled), set(self._by_name), tunnels=True)
        else:
            protected = _Protection.between(before.snapshot, snapshot)
            dirty = _Dirty(local=self._moved | (received ^ self._receiving))
            dirty.tunnels = (before.accounts or {}).keys() != (view.accounts or {}).keys()
            if before.streams != view.streams or self._tellable(before) != self._tellable(view):
                dirty.local |= self._by_name.keys()
            # Few, and who decides about them is not traced: external services, and those whose routes ask for claims of tokens.
            dirty.services |= view.outside | {key for key in view.by_caller if self._asks_claims(key)}
            if protected:
                dirty.local |= {name for name, one in self._by_name.items() if protected.of(one.workload)}
                self._verdicts = {key: found for key, found in self._verdicts.items() if protected.policies.isdisjoint(key[0])}
            dirty.addresses |= unsettled & view.dialled.keys()
            dirty.services |= (before.former ^ view.former) | unsaid.services
            dirty.addresses |= unsaid.workloads
            dirty.services |= _backed(unsettled, view)
            self._differing_services(before, view, protected, dirty, callers=callers)
            self._differing_addresses(before, view, protected, dirty, callers=callers)
        self._differing_callers(view, dirty)
        return dirty

    def _take_local(self, local: Sequence[LocalWorkload]) -> bool:
        """Take the workloads of this node; True if they are others to policies."""
        now, before = {one.workload.name: one for one in local}, self._by_name
        self._moved = {n for n in now.keys() | before.keys() if (new := now.get(n)) is not (old := before.get(n)) and new != old}
        if not self._moved and self._callers.known.keys() == now.keys():
            return False
        self._by_name = now
        self._local = tuple(sorted(local, key=lambda one: one.workload.name))
        kept = {} if not before else {name: caller for name, caller in self._callers.known.items() if name not in self._moved}
        known = {name: kept.get(name) or Caller.of(one.workload, self._trust_domain) for name, one in now.items()}
        if known == self._callers.known:  # the same object as long as it can be: it is compared often
            return False
        self._callers = rbac.LocalCallers(known)
        for verdicts in self._verdicts.values():
            for name in self._moved:
                verdicts.pop(name, None)
        return True

    def _differing_services(self, before: View, view: View, protected: _Protection, dirty: _Dirty, *, callers: bool) -> None:
        """Service ports. `callers`: those of this node differ."""
        authorized = set(before.undecided.keys() ^ view.undecided.keys()) | (before.used ^ view.used)
        if before.endpoints is not view.endpoints:
            old, new = before.endpoints, view.endpoints
            authorized.update(key for key in old.keys() | new.keys() if old.get(key) is not new.get(key))
        if moved := before.left_to_receivers ^ self._undecided:  # whose tokens are kept, or not any more
            authorized.update(key for key, found in view.endpoints.items() if any(one.name in moved for one, _ in found))
            dirty.addresses |= moved & view.dialled.keys()
        if protected or callers:
            here = view.who_is_here if callers else frozenset()
            first = ((key, found[0][0]) for key, found in view.endpoints.items())
            authorized.update(key for key, workload in first if protected.of(workload) or not here.isdisjoint(workload.policies))
        if protected or self._moved:
            probed = (key for key, policy in self._policies.items() if policy.health_check is not None and key in view.used)
            dirty.services.update(key for key in probed if self._moved or any(protected.of(one) for one, _ in view.endpoints.get(key, ())))
        dirty.services |= authorized.union(*(view.senders.get(key, ()) for key in authorized))
        dirty.services |= _routed_otherwise(before, view)
        if callers:
            dirty.services |= view.by_caller
        for name in differing(before.snapshot.services, view.snapshot.services):
            dirty.services.update((name, port.port) for port in _ports_of(before, name) + _ports_of(view, name))
        for name in differing(before.snapshot.traffic, view.snapshot.traffic):
            policies = (before.snapshot.traffic.get(name), view.snapshot.traffic.get(name))
            dirty.services.update(target for policy in policies if policy is not None for target in policy.targets)

    @staticmethod
    def _differing_addresses(before: View, view: View, protected: _Protection, dirty: _Dirty, *, callers: bool) -> None:
        """Workloads' own addresses."""
        services = differing(before.snapshot.services, view.snapshot.services)
        if before.dialled is view.dialled and not (services or protected or callers):
            return
        here = view.who_is_here if callers else frozenset()
        for name in before.dialled.keys() | view.dialled.keys():
            old, one = before.dialled.get(name), view.dialled.get(name)
            if (
                one is None
                or one is not old
                or protected.of(one)
                or not here.isdisjoint(one.policies)
                or not services.isdisjoint(backing.service for backing in one.backing)
            ):
                dirty.addresses.add(name)

    def _differing_callers(self, view: View, dirty: _Dirty) -> None:
        """Listeners of this node, by what they know about who calls."""
        peers = self._peers_now() if self._loopback is not None else None
        if peers is not self._tunnelled:
            dirty.local |= self._by_name.keys()
        self._tunnelled = peers
        if not self._receiving:
            self._addresses, self._stamps = None, {}
            return
        callers, before = self._callers_now(view), self._stamps
        self._stamps = {name: callers.stamp(protecting(self._by_name[name].workload, view.snapshot)) for name in self._receiving}
        dirty.local |= {name for name, stamp in self._stamps.items() if before.get(name) != stamp}

    def _all(self, dirty: _Dirty, zone: str) -> None:
        """Build what is `dirty`, and the rest, which nobody else owns."""
        if dirty.tunnels:
            with self._owned_by(_TUNNELS):
                self._tunnels()
        self._services(dirty.services, zone)
        self._workload_addresses(dirty.addresses)
        for name in sorted(dirty.local):
            with self._owned_by((_LOCAL, name)):
                if name in self._by_name:
                    self._listeners([self._by_name[name]])
        if self._local:
            self._mirrors()
            self._collectors()
            self._gateways(self._local)
            if self._receiving or self._loopback is not None:
                self._add(names.CLUSTER, names.ORIGINAL_DESTINATION_CLUSTER, clusters.original_destination_cluster)
            if self._loopback is not None:
                self._add(names.CLUSTER, names.UNREAD_CLUSTER, clusters.unread_cluster)

    def _tunnels(self) -> None:
        """Clusters for every identity that workloads of other nodes may have, and the way to them for requests."""
        self._identities = frozenset()
        if self._loopback is None:
            return
        self._identities = frozenset(f"spiffe://{self._trust_domain}/ns/{ns}/sa/{account}" for ns, account in self._view.accounts or ())
        for identity in sorted(self._identities):
            address = self._loopback(identity)
            self._add(names.CLUSTER, names.tunnel(address), hbone.cluster, address, identity, self._trust_domain, self._distrusted.revision)
        self._add(names.LISTENER, names.TUNNEL, hbone.relay)

    def _target(self, workload: Workload, port: int) -> clusters.Target | None:
        """How to reach a workload from this node; None: not at all, because there is no certificate to show to one that demands it."""
        mode = workload.mtls_of(port)
        tunnel = ""
        if workload.node != self._node and self._direct.tunnels(workload, mode):
            if self._loopback is not None:
                tunnel = self._loopback(workload.identity(self._trust_domain))
            elif mode is Mtls.STRICT:
                return None
        read = self._readers.kind(workload.name, port)
        return clusters.Target(workload.addresses[0], port, workload.weight, tunnel, workload.name, read)

    def _services(self, keys: Iterable[Key], zone: str) -> None:
        view = self._view
        anew = self._partings.anew.both(view.parting)
        for key in self._each(_SERVICE, keys, view.used):
            name, port = key
            service, service_port = view.snapshot.services[name], view.port(name, port)
            assert service_port is not None  # noqa: S101 - for mypy: what is used exists
            cluster = names.service(name, port)
            if service.external is not None:
                self._external(service, service_port, service.external)
                continue
            policy = self._policies.get(key)
            if policy is None:
                self._add(names.CLUSTER, cluster, clusters.service_cluster, name, service_port, self._loopback is not None)
                near = preferred(view.endpoints.get(key, ()), service.traffic_distribution, self._node, zone)
                endpoints = tuple(found for workload, target in near if (found := self._target(workload, target)))
                self._add(names.ENDPOINTS, cluster, clusters.service_endpoints, name, port, endpoints)
            else:
                self._governed(key, policy, zone)
            if not service_port.waypoint and key not in view.former:
                continue
            attached, consumers = view.attached.get(key, ()), view.consumers.get(key, ())
            if attached or consumers:
                around = self._around(key, attached, consumers)
                inputs: tuple[Any, ...] = (policy, routes.service, cluster, attached, around)
            else:
                inputs = (policy, routes.direct, cluster, cluster, f"{name} default", self._authorization(name, port))
            marks = self._observability.marks(name, port)
            inputs = (parting.routes, key in anew.services, shares.routes, *self._shared, limits.guarded, *inputs)
            self._add(names.ROUTES, cluster, telling.routes, marks, *inputs)
            for address in service.addresses:
                self._scope(address, port, cluster)

    def _external(self, service: Service, port: ServicePort, external: External) -> None:
        """A port of a service outside the mesh."""
        name = service.name
        cluster = names.service(name, port.port)
        self._add(names.CLUSTER, cluster, externals.cluster, name, port, external, self._roots)
        found = egress.policies(service, self._view.snapshot)
        if not External.is_stream(port):
            authorization = self._kept((rbac.at_caller, cluster), rbac.at_caller, found, port.port, self._callers)
            marks = self._observability.marks(name, port.port)
            inputs = (name, port.port, external, service.addresses, authorization)
            self._add(names.ROUTES, cluster, telling.routes, marks, externals.requests, *inputs)
            for address in service.addresses:
                self._scope(address, port.port, cluster)
            return
        inner = externals.stream_name(name, port.port)
        self._add(names.LISTENER, inner, externals.stream, name, port, external, egress.callers(found, self._callers.known, port.port))
        for address in service.addresses:
            way = f"{names.EGRESS}/{names.destination(address, port.port)}"
            self._add(names.CLUSTER, way, clusters.internal_cluster, way, inner)

    def _governed(self, key: Key, policy: TrafficPolicy, zone: str) -> None:
        """Cluster and endpoints of a service port that a TrafficPolicy decides for."""
        name, port = key
        service, service_port = self._view.snapshot.services[name], self._view.port(name, port)
        assert service_port is not None  # noqa: S101 - for mypy: what is used exists
        cluster, found, distribution = names.service(name, port), self._view.endpoints.get(key, ()), service.traffic_distribution
        prober = self._prober(found) if traffic.checked(policy, service_port) else None
        inputs = (policy, name, service_port, self._loopback is not None, prober.netns_path if prober else "")
        self._add(names.CLUSTER, cluster, traffic.cluster, *inputs)
        levels = traffic.levels(found, policy, distribution, self._node, zone)
        by_level = tuple(
            tuple(
                (target, prober is not None and not target.tunnel and self._lets_in(workload, listens, prober))
                for workload, listens in level
                if (target := self._target(workload, listens))
            )
            for level in ([preferred(found, distribution, self._node, zone)] if levels is None else levels)
        )
        self._add(names.ENDPOINTS, cluster, traffic.endpoints, name, port, by_level)
        for workload in self._shared[1] if policy.limits.per_workload else ():
            own = names.share(cluster, workload)
            self._add(names.CLUSTER, own, shares.cluster, workload, traffic.cluster, *inputs)
            self._add(names.ENDPOINTS, own, shares.endpoints, workload, traffic.endpoints, name, port, by_level)

    def _prober(self, endpoints: Iterable[tuple[Workload, int]]) -> LocalWorkload | None:
        """The workload of this node in whose name endpoints are asked: the first one, by name, that most of them let in; None: there is none."""
        alike = Counter((workload.policies, target) for workload, target in endpoints)
        most, prober = 0, None
        for one in self._local:
            count = sum(times for (policies, target), times in alike.items() if self._admitted(policies, target, one))
            if count > most:
                most, prober = count, one
                if most == alike.total():
                    break
        return prober

    def _lets_in(self, workload: Workload, target: int, caller: LocalWorkload) -> bool:
        """Does policy let this workload of the node connect to an endpoint?"""
        return self._admitted(workload.policies, target, caller)

    def _admitted(self, policies: tuple[str, ...], target: int, caller: LocalWorkload) -> bool:
        """The same by the endpoint's policies and port; remembered until the policies, or the workloads of this node, are others."""
        known, name = self._verdicts.setdefault((policies, target), {}), caller.workload.name
        if name not in known:
            protection = named(policies, self._view.snapshot)
            known[name] = decide(protection, self._callers.known[name], target).verdict is not Verdict.DENY
        return known[name]

    def _mirrors(self) -> None:
        """The way of copies of requests, if a route makes any."""
        if self._view.mirrors:
            self._add(names.CLUSTER, names.MIRROR, mirrors.cluster)
            self._add(names.LISTENER, names.MIRROR, mirrors.listener, self._loopback is not None)
            self._add(names.ROUTES, names.MIRROR, mirrors.routes)

    def _around(self, key: Key, attached: tuple[Route, ...], consumers: routes.Consumers) -> routes.Around:
        every = [*attached, *(route for _, group in consumers for route in group)]
        backends = {backend: self._authorization(*backend) for backend in _backends(every) if backend in self._view.used}
        asks = any(rule.callers for route in every for rule in route.rules)
        own = Authorization() if attached else self._authorization(*key)
        tokens = self._believed_by({key, *_backends(every)}) if claims.asked(every) else ()
        return routes.Around(key[1], backends, own, consumers, self._callers if asks else None, tokens)

    def _asks_claims(self, key: Key) -> bool:
        """Does a rule of its routes ask for claims of a token?"""
        consumers = (route for _, group in self._view.consumers.get(key, ()) for route in group)
        return claims.asked([*self._view.attached.get(key, ()), *consumers])

    def _believed_by(self, keys: Iterable[Key]) -> tuple[Authentication, ...]:
        """The RequestAuthentications of the endpoints of service ports, by name."""
        workloads = [workload for key in keys for workload, _ in self._view.endpoints.get(key, ())]
        found = {one.name: one for workload in workloads for one in jwt.selecting(workload, self._view.snapshot)}
        return tuple(found[name] for name in sorted(found))

    def _authorization(self, service: str, port: int) -> Authorization:
        """What routes to a service port enforce; nothing where it is the receiver's to decide."""
        endpoints = self._view.endpoints.get((service, port))
        if not endpoints or (service, port) in self._view.undecided:
            return Authorization()
        return self._at_caller(*endpoints[0])

    def _at_caller(self, workload: Workload, target: int) -> Authorization:
        policies = protecting(workload, self._view.snapshot)
        authorization = self._kept((rbac.at_caller, workload.policies, target), rbac.at_caller, policies, target, self._callers)
        keep = workload.node != self._node or workload.name in self._undecided  # where the receiver looks once more
        return self._authenticated(workload, authorization, keep=keep)

    def _authenticated(self, workload: Workload, authorization: Authorization, *, keep: bool = False) -> Authorization:
        found = jwt.selecting(workload, self._view.snapshot)
        place = (jwt.authenticated, workload.authentications, *authorization.filters.items(), keep)
        return self._kept(place, jwt.authenticated, authorization, found, keep) if found else authorization

    def _workload_addresses(self, workloads: Iterable[str]) -> None:
        """Give every address of a workload with an L7 policy, or that had one, its own scope. Two workloads on one address and port: the first by name."""
        anew = self._partings.anew.both(self._view.parting)
        for name in self._each(_ADDRESS, workloads, self._view.dialled):
            workload, asks = self._view.dialled[name], name in anew.workloads
            for target, app_protocol in _targets(self._view, workload) if workload.addresses else ():
                cluster = names.workload(name, target)
                self._add(names.CLUSTER, cluster, clusters.workload_cluster, name, target, app_protocol, self._target(workload, target))
                inputs = (parting.routes, asks, routes.direct, cluster, cluster, f"{name} address", self._at_caller(workload, target))
                self._add(names.ROUTES, cluster, telling.routes, self._received_by(workload), *inputs)
                for address in workload.addresses:
                    self._scope(address, target, cluster)

    def _listeners(self, local: Sequence[LocalWorkload]) -> None:
        for one in local:
            name = names.listener(names.OUTBOUND, one.workload.name)
            secured, told = self._loopback is not None, self._telling(one.workload)
            self._add(names.LISTENER, name, listeners.outbound, one, self._trust_domain, secured, told)
            if self._view.streams:
                self._add(names.LISTENER, names.listener(names.EGRESS, one.workload.name), externals.listener, one, self._trust_domain)
        if self._loopback is not None:
            self._tunnel_ends(local)
        for one in local:
            name = names.listener(names.INBOUND, one.workload.name)
            authorization = Authorization()
            if one.workload.name in self._receiving:
                self._add(names.LISTENER, name, listeners.inbound, one, self._telling(one.workload))
                policies = protecting(one.workload, self._view.snapshot)
                authorization = self._kept((rbac.at_receiver, name), self._at_receiver, policies, self._stamps[one.workload.name])
                authorization = self._authenticated(one.workload, authorization)
            self._received(name, one.workload, authorization)

    def _received(self, name: str, workload: Workload, authorization: Authorization) -> None:
        """The routes of a listener that hands on what it accepted.

        They are there without the listener, too: one that is removed serves the connections that it has until it is drained, by the last routes it was told.
        """
        inputs = (name, names.ORIGINAL_DESTINATION_CLUSTER, f"{workload.name} inbound", authorization)
        self._add(names.ROUTES, name, telling.routes, self._received_by(workload), routes.direct, *inputs)

    def _received_by(self, workload: Workload) -> Marks:
        own = f"{workload.namespace}/"
        services = (backing.service for backing in workload.backing if backing.service.startswith(own))
        return self._observability.received(workload.namespace, services)

    def _telling(self, workload: Workload) -> Telling:
        """What the listeners of a workload can tell; spans only where there is a collector to tell."""
        accept = self._observability.accepts_from_outside(workload.namespace)
        collector = self._observability.collector(workload.namespace)
        if collector is None or collector not in self._view.used:
            return Telling(self._log, accept_from_outside=accept)
        external = self._view.snapshot.services[collector[0]].external is not None
        cluster = names.service(*collector) if external else names.collector(*collector)
        return Telling(self._log, cluster, f"{workload.namespace}/{workload.service_account}", accept)

    def _tellable(self, view: View) -> dict[tuple[str, int], bool]:
        """Collectors that there are, and whether they are outside."""
        return {key: view.snapshot.services[key[0]].external is not None for key in self._observability.collectors() & view.used}

    def _collectors(self) -> None:
        """The way to collectors in the mesh; those outside are reached as by anybody."""
        for key in sorted(self._observability.collectors() & self._view.used):
            if self._view.snapshot.services[key[0]].external is None:
                name = names.collector(*key)
                found = self._view.endpoints.get(key, ())
                targets = tuple(clusters.Target(one.addresses[0], port, one.weight) for one, port in found)
                self._add(names.CLUSTER, name, spans.cluster, *key)
                self._add(names.ENDPOINTS, name, spans.endpoints, *key, targets)

    def _gateways(self, local: Iterable[LocalWorkload]) -> None:
        """The listeners of gateways that run in the place of workloads of this node, and their routes, which are those of any caller."""
        for one in local:
            gateway = gateways.of(one.workload, self._view.snapshot)
            if gateway is None:
                continue
            attached = gateways.attached(gateway, self._view.snapshot)
            wanted = _backends(route for routes in attached.values() for route in routes)
            backends = {backend: self._authorization(*backend) for backend in sorted(wanted) if backend in self._view.used}
            for port, group in gateways.ports(gateway).items():
                name = names.gateway(one.workload.name, port)
                secured, told = self._loopback is not None, self._telling(one.workload)
                self._add(names.LISTENER, name, gateways.listener, one, self._trust_domain, secured, group, told)
                marks = self._observability.of_namespace(one.workload.namespace)
                for config, some in gateways.configurations(name, group):
                    routed = tuple((listener, attached[listener.name]) for listener in some)
                    inputs = (config, group, routed, backends)
                    self._add(names.ROUTES, config, telling.routes, marks, shares.routes, *self._shared, gateways.configuration, *inputs)

    def _tunnel_ends(self, local: Iterable[LocalWorkload]) -> None:
        """Both ends of tunnels in the namespaces of this node's workloads."""
        peers = self._tunnelled
        assert peers is not None  # noqa: S101 - for mypy: there are tunnels
        revoked = self._kept(peer_log.refusal, peer_log.refusal, self._distrusted.serials)
        for one in local:
            workload = one.workload
            policies = protecting(workload, self._view.snapshot)
            self._add(names.LISTENER, names.listener(names.TUNNEL, workload.name), hbone.caller, one, self._trust_domain)
            end, inner = names.listener(names.HBONE, workload.name), names.listener(names.INNER, workload.name)
            self._add(names.LISTENER, end, hbone.receiver, one, self._trust_domain)
            authorization = self._kept((rbac.at_tunnel, end), rbac.at_tunnel, policies, peers.principal, ":authority")
            inside = rbac.request_ports(policies)
            within = Authorization()
            if inside is None or inside:
                self._add(names.CLUSTER, inner, clusters.internal_cluster, inner, inner)
                self._add(names.LISTENER, inner, hbone.inner, one, self._telling(workload))
                within = self._kept((rbac.at_tunnel, inner), rbac.at_tunnel, policies, peers.principal, names.DESTINATION_HEADER)
                within = self._authenticated(workload, within)
            self._received(inner, workload, within)
            self._add(names.ROUTES, end, hbone.routes, end, workload.addresses, authorization, inside, inner, revoked)

    def _at_receiver(self, policies: tuple[Policy, ...], _stamp: int) -> Authorization:
        assert self._addresses is not None  # noqa: S101 - for mypy: somebody receives
        return rbac.at_receiver(policies, self._addresses[2])

    def _callers_now(self, view: View) -> rbac.Callers:
        """Whom an address may stand for: what `rbac.Callers` of `_standing` is, without looking at workloads that are as they were."""
        snapshot, bound = view.snapshot, frozenset(self._callers.known)
        if self._addresses is None:
            self._addresses = (snapshot, bound, rbac.Callers(self._standing(bound), self._trust_domain))
            return self._addresses[2]
        before, was_bound, callers = self._addresses
        names = differing(before.workloads, snapshot.workloads) | (was_bound ^ bound)
        if names:
            old, new = self._believed(before, was_bound), self._believed(snapshot, bound)
            self._addresses = None  # until it is done
            changes = [(old(name), new(name)) for name in names]
            callers.after((one, another) for one, another in changes if _stands(one) != _stands(another))
        self._addresses = (snapshot, bound, callers)
        return callers

    def _peers_now(self) -> Peers:
        """Whom an address may stand for in tunnels: what `Peers` of `_standing` is, without looking at workloads that are as they were."""
        if not self._view.asks_labels:
            self._peers = None
            return self._kept(Peers, Peers, (), self._trust_domain)
        snapshot, bound = self._view.snapshot, frozenset(self._callers.known)
        if self._peers is None:
            peers = Peers(self._standing(bound), self._trust_domain)
        else:
            before, was_bound, peers = self._peers
            old, new = self._believed(before, was_bound), self._believed(snapshot, bound)
            peers = peers.after([(old(name), new(name)) for name in snapshot.since(before).workloads | (was_bound ^ bound)])
        self._peers = (snapshot, bound, peers)
        return peers

    def _believed(self, snapshot: Snapshot, bound: frozenset[str]) -> Callable[[str], Workload | None]:
        """As `_standing`, of one workload."""

        def find(name: str) -> Workload | None:
            found = snapshot.workloads.get(name)
            return found if found is not None and (found.node != self._node or name in bound) else None

        return find

    def _standing(self, bound: frozenset[str]) -> list[Workload]:
        """Workloads that an address may stand for: those of other nodes, and those of this node that are `bound` to a namespace.

        Whoever uses the address of another workload of this node came after it (the kernel's table says the same: agent.bpf.tables).
        """
        workloads = sorted(self._view.snapshot.workloads.items())
        return [w for _, w in workloads if w.node != self._node or w.name in bound]

    def _scope(self, address: str, port: int, configuration: str) -> None:
        """Claim a destination. Of several that do the smallest owner has it, of one owner's the first: Envoy refuses two scopes with one key."""
        name = names.destination(address, port)
        self._claims.setdefault(name, {}).setdefault(self._owner, configuration)
        self._claimed.setdefault(self._owner, set()).add(name)

    def _add(self, kind: str, name: str, make: Callable[..., Message], *inputs: Any) -> None:
        """Have a resource, for the owner that is built now."""
        place = (kind, name)
        owns = self._owns.setdefault(self._owner, set())
        if place not in owns:
            owns.add(place)
            self._owned[place] = self._owned.get(place, 0) + 1
        self._put(kind, name, self._kept(place, _packed, make, *inputs))

    def _put(self, kind: str, name: str, resource: Resource | None) -> None:
        """Write a resource, or remove it, if that makes a difference; what was handed out stays as it is."""
        found = self._result[kind].get(name)
        if found is resource or (found is not None and resource is not None and found.version == resource.version):
            return
        if kind not in self._copied:
            self._result[kind] = dict(self._result[kind])
            self._copied.add(kind)
        if resource is None:
            del self._result[kind][name]
        else:
            self._result[kind][name] = resource

    def _each(self, kind: int, keys: Iterable[Any], existing: Container[Any]) -> Iterator[Any]:
        """Each of the keys in order, while what is added belongs to it; those that do not exist lose what they have."""
        for key in sorted(keys):
            with self._owned_by((kind, *key) if isinstance(key, tuple) else (kind, key)):
                if key in existing:
                    yield key

    @contextmanager
    def _owned_by(self, owner: Owner) -> Iterator[None]:
        """While what belongs to an owner is built. What it had before and has not been given again is removed."""
        had, claimed = self._owns.pop(owner, set()), self._claimed.pop(owner, set())
        for name in claimed:
            del self._claims[name][owner]
        outer, self._owner = self._owner, owner
        yield
        for place in had:
            self._owned[place] -= 1
            if not self._owned[place]:
                del self._owned[place]
                self._put(*place, None)
        for name in sorted(claimed | self._claimed.get(owner, set())):
            claims = self._claims[name]
            if claims:
                configuration = claims[min(claims)]
                self._put(names.SCOPE, name, self._kept((names.SCOPE, name), _packed, routes.scope, name, configuration))
            else:
                del self._claims[name]
                self._put(names.SCOPE, name, None)
        self._owner = outer


@dataclass(frozen=True, slots=True)
class _Protection:
    """Names of policies and RequestAuthentications that differ."""

    policies: frozenset[str]
    authentications: frozenset[str]

    @staticmethod
    def between(before: Snapshot, after: Snapshot) -> _Protection:
        """Those that differ between two snapshots."""
        return _Protection(
            frozenset(differing(before.policies, after.policies)), frozenset(differing(before.authentications, after.authentications))
        )

    def __bool__(self) -> bool:
        return bool(self.policies or self.authentications)

    def of(self, workload: Workload) -> bool:
        """Has a workload any of them?"""
        return not (self.policies.isdisjoint(workload.policies) and self.authentications.isdisjoint(workload.authentications))


def _routed_otherwise(before: View, after: View) -> set[Key]:
    """Service ports that have other routes."""
    if before.attached is after.attached and before.consumers is after.consumers:
        return set()
    found = {
        key
        for key in before.attached.keys() | after.attached.keys()
        if not _same(before.attached.get(key, ()), after.attached.get(key, ()))
    }
    for key in before.consumers.keys() | after.consumers.keys():
        one, other = before.consumers.get(key, ()), after.consumers.get(key, ())
        if len(one) != len(other) or any(a != b or not _same(some, others) for (a, some), (b, others) in zip(one, other, strict=True)):
            found.add(key)
    return found


def _backed(workloads: Iterable[str], view: View) -> set[Key]:
    """Service ports that need a cluster and have any of these as endpoints."""
    found = (workload for name in workloads if (workload := view.snapshot.workloads.get(name)))
    return {key for one in found for backing in one.backing for port in backing.ports if (key := (backing.service, port)) in view.used}


def _same(one: tuple[Route, ...], other: tuple[Route, ...]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _ports_of(view: View, name: str) -> tuple[ServicePort, ...]:
    service = view.snapshot.services.get(name)
    return service.ports if service else ()


def _stands(workload: Workload | None) -> tuple[object, ...]:
    """What `rbac.Callers` asks about a workload."""
    if workload is None:
        return ()
    return workload.enrolled, workload.service_account, workload.addresses, tuple(sorted(workload.labels.items()))


def _backends(attached: Iterable[Route]) -> set[Key]:
    return targets(rule for route in attached for rule in route.rules)[0]


def _shared(limited: frozenset[str], workloads: tuple[str, ...], by_latency: frozenset[str]) -> _Shared:
    """The first inputs of `shares.routes`, and what it makes routes with."""
    return limited, workloads, latency.routes, by_latency


def _packed(make: Callable[..., Message], *inputs: Any) -> Resource:
    return pack(make(*inputs))


def _targets(view: View, workload: Workload) -> Iterable[tuple[int, str]]:
    """Ports that a workload receives at, and what is spoken there: as its own namespace's services say, then as those that EndpointSlices lead to it."""
    found: dict[int, str] = {}
    own = f"{workload.namespace}/"
    for backing in sorted(workload.backing, key=lambda one: not one.service.startswith(own)):
        for port, target in backing.ports.items():
            service_port = view.port(backing.service, port)
            found[target] = found.get(target) or (service_port.app_protocol if service_port else "")
    return sorted(found.items())
