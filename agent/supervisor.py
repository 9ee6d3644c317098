"""The agent's daemon: owns every part, starts them in the right order, and holds the node's state together.

Order of a start: check the machine, take the lock, load the programs, bring the tables to the last good snapshot, attach, then serve. When the agent
ends, for whatever reason, programs, tables and Envoy stay as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Container, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent import cgroups, conntrack, drift, features, kubelet, lock, memory, netns, parting, probe
from agent.api import Api
from agent.balancing import node_zone
from agent.bpf.acceleration import failing
from agent.bpf.datapath import DataPath
from agent.bpf.events import Event, Events
from agent.bpf.manifest import HOOKED, EventKind
from agent.bpf.sockets import Sockets
from agent.calls.part import Calls
from agent.compact import changed
from agent.config import INBOUND_PORT, OUTBOUND_PORT, Config
from agent.connection_log import ConnectionLog
from agent.discovery import Discovery
from agent.distrust import Distrust, Waypoint
from agent.enrolment import Enrolled, Enrolment
from agent.errors import EnvironmentUnfit, KernelRefused, MeshError
from agent.gateways import GatewayCertificates
from agent.graph import Observer
from agent.identity.part import identities
from agent.ids import Ids
from agent.l7 import audit, envoy, externals, gateways, names, request_log, secrets
from agent.l7.parting import Dialled
from agent.l7.rbac import needs_request
from agent.l7.resources import Resource, Resources
from agent.l7.snapshot import Builder, tracing
from agent.l7.tunnel_log import TunnelRecord
from agent.l7.xds import XdsServer
from agent.logfiles import LogFile, keep_bounded
from agent.model import Direct, LocalWorkload, Policy, Service, Snapshot, Workload
from agent.names.service import Names
from agent.observability import Observability
from agent.patience import within
from agent.quota import Quotas
from agent.relay import Relay
from agent.replicas import Replicas
from agent.report import (
    AccelerationStatus,
    CertificateStatus,
    ControllerStatus,
    ForeignProgram,
    HookStatus,
    IdentityStatus,
    ProbeStatus,
    Status,
    WaypointStatus,
    WorkloadStatus,
)
from agent.requests import Requests
from agent.revocation import Revocation, Rules
from agent.streams import Streams
from agent.sweep import Sweep
from agent.telemetry import MeshCollector, MetricsServer
from agent.trace import Pair, Tracer
from agent.tunnels import Tunnels
from agent.wireguard.part import WireGuard
from meshapi.notify import BEAT_S, Notifier

if TYPE_CHECKING:
    from agent.identity.store import Svid  # and not at run time: see agent/identity/part.py
    from meshapi.graph.answer import Answer

_log = logging.getLogger(__name__)
_VERSION = importlib.metadata.version("meshagent")

NAMESPACE_POLL_S = 0.25
EAGER_POLL_S = 0.01
DEAD_AFTER_S = 10.0
STATUS_TIMEOUT_S = 5.0
RETRY_S = 5.0
RETIRE_S = 2.0
WELCOME_S = 2.0
"""How long Envoy has to listen in the namespaces of pods that come into the mesh, before the kernel leads connections to it there in any case."""
FIRST_S = 0.5
"""The same, where only the first policy that asks for requests has come: what goes past it is to end at once, also if Envoy does nothing."""
READERS_S = 2.0
"""What nodes have to begin to read requests, before others make their connections to them anew."""
READERS_AGAIN_S = 5.0
"""How long after that they do so again, some times: less than the receiver's node leaves them (`agent.revocation.LET_GO_S`), whenever it begins."""
PARTING_S = 3.0
"""How often connections are looked at while something needs the waypoint no more, but may be called through it; less often, as long as nothing changes."""
PARTING_MOST_S = 15.0
ENDING_S = 5.0
"""How long connections of a pod that comes into the mesh are expected to end that it had outside."""
TUNNEL_ENDS_S = 0.2
SWEEP_S = 60.0


class Supervisor:
    """One agent. `run` returns after SIGTERM or SIGINT, or raises what made a part fail."""

    def __init__(self, config: Config) -> None:
        """Touch nothing yet."""
        self._config = config
        self._snapshot: Snapshot | None = None
        self._residents: Mapping[str, Workload] = {}
        """The workloads of this node, enrolled or not."""
        self._enrolled = Enrolled()
        """What the kernel was brought to last."""
        self._joined: dict[str, float] = {}
        """Addresses of pods that have come into the mesh just now: until when connections of theirs from before may be ending (time.monotonic)."""
        self._known: tuple[LocalWorkload, ...] = ()
        """Of that, what Revocation and Envoy know: less if the kernel alone was brought to something, or the rest failed."""
        self._request_log = LogFile(config.log_dir / "requests.log")
        self._builder = Builder(config.node, config.trust_domain, str(self._request_log.path))
        self._connection_log = ConnectionLog(LogFile(config.log_dir / "connections.log"), self._logs_connections)
        self._built: Resources = {}
        self._observability = Observability({})
        self._told: Mapping[str, int] = {}
        """Runtime keys of the log of requests."""
        self._enforcing = asyncio.Lock()
        self._configured = asyncio.Event()
        self._relaxable = asyncio.Event()
        self._releasable = asyncio.Event()
        self._unsettled = asyncio.Event()
        self._namespace_news = asyncio.Event()
        """Something may have become of a namespace, or of who is held until it is in the mesh."""
        self._looked = False
        """Have connections through the waypoint been looked at that the agent before this one may have left?"""
        self._given = False
        """Was Envoy given what WireGuard was last prepared for?"""
        self._enforced_inbound: frozenset[str] = frozenset()
        self._held_back = False
        self._beat = time.monotonic()
        self._tracer = Tracer(config.node, self._trace_changed)
        self._probe = probe.Probe(config)
        self._probed = probe.Result()
        self._probed_at: float | None = None
        self._drift = drift.Drift()
        self._packed: dict[str, tuple[Svid, Mapping[str, Resource]]] = {}
        """Envoy's secrets by SPIFFE ID, and what each was made of."""
        self._asks_for_peers = False
        self._asks_for_streams: frozenset[str] = frozenset()
        """Workloads whose open streams Envoy is to speak of."""
        self._kubelet = kubelet.Follower(kubelet.Finder(config.cgroup, config.kubelet_cgroup), self._recognise)
        self._gateways = GatewayCertificates(config, self._secrets_changed)
        self._notifier = Notifier()

    async def run(self) -> None:
        """Start everything and keep it running."""
        config = self._config
        features.check(config)
        memory.one_heap()
        envoy.find(config.envoy)
        for directory in (config.run_dir, config.state_dir, config.netns_dir):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._request_log.prepare()  # Envoy refuses listeners whose log it cannot open
        held = lock.acquire(config.run_dir / "agent.lock")
        try:
            cgroups.note_served(config.run_dir, config.cgroup)
            await self._start()
            await self._serve()
        finally:
            self._notifier.stopping()
            await asyncio.get_running_loop().shutdown_default_executor()  # what is still being enforced is under the lock
            os.close(held)

    async def _start(self) -> None:
        config = self._config
        started = time.monotonic()
        self._loop = asyncio.get_running_loop()
        config.pin_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            config.waypoint_cgroup.mkdir(exist_ok=True)
        except OSError as error:
            raise EnvironmentUnfit(
                f"cannot make cgroup {config.waypoint_cgroup}: {error.strerror}; is {config.cgroup} writable?"
            ) from error
        self.datapath = DataPath(config)
        await self.datapath.load()
        self.ids = Ids(config.run_dir / "ids")
        self._enrolment = Enrolment(config, self.datapath, self.ids)
        self._revocation = Revocation(config, self.datapath, self.ids)
        self._tunnels = Tunnels(config)
        self._wireguard = WireGuard(config, self._wireguard_changed, self._say_anew)
        await self._wireguard.start()
        self._sweep = Sweep(self.datapath.maps, self.ids, kept=frozenset({kubelet.caller(config.node)}))
        self._observer = Observer(
            config.node,
            self.datapath.maps,
            self.ids,
            config.envoy_admin_socket,
            lambda: self.snapshot.services,
            lambda: self.enrolled,
        )
        self._roots = externals.system_roots()
        self._names = Names(config, self._enrolment.tables.set_resolvers, allow=self._enrolment.tables.allow_resolvers)
        try:
            self._probe.prepare()
        except OSError as error:  # the probe then says that its namespace is missing; pods do not depend on it
            _log.error("the live probe has no network namespace", extra={"reason": str(error)})
        self._waypoint = envoy.Envoy(config, self.datapath.generation)
        self._xds = XdsServer(config.xds_socket, self._tracer.on_record, audit.Reporter().on_record)
        self._identity, self._serve_workloads = identities(config)
        self._distrust = Distrust(
            config,
            Sockets(self.datapath.maps),
            Waypoint(self._ask_for_peers, lambda: self._xds.has(names.RUNTIME, names.RUNTIME_LAYER), self._configure_tunnels),
            self._identity.doubt,
            lambda: [one.netns_path for one in self.enrolled.local],
        )
        self._xds.on_shown = self._distrust.shown
        self._follow_streams()
        self._calls = Calls(
            self.datapath.maps,
            self.ids,
            lambda: [Path(one.netns_path) for one in self.enrolled.local],
            lambda: self.snapshot,
            on=config.record_flows,
        )
        self._xds.on_asked = self._calls.on_asked
        self._gateways.load()
        self._identity.subscribe(self._secrets_changed)
        self._identity.load()
        self._secrets_changed()
        self._relay = Relay(config)
        self._quotas = Quotas(config.node)
        self._discovery = Discovery(config, self.apply, self._wireguard.announcement, (self._relay.run, self._quotas.follow))
        self._xds.services.append(self._quotas.serve)
        # Before anything is attached: a port that is taken must not leave a half-started agent behind.
        self._metrics = MetricsServer(
            config, self._collector(), self._status_from_thread, lambda: time.monotonic() - self._beat < DEAD_AFTER_S
        )
        self._set_tracing(frozenset())
        last_good = self._discovery.load_last_good()
        if last_good is not None:
            await self.apply(last_good)
        self._held_back = last_good is None and self.datapath.awaits_tables
        if self._held_back:
            _log.warning(
                "the previous programs stay in force until the controller has sent a configuration: these would start with empty tables"
            )
            return
        self._attach()
        _log.info(
            "data path in force",
            extra={"node": config.node, "took_s": round(time.monotonic() - started, 3), "loader_s": self.datapath.loader_s},
        )

    def _collector(self) -> MeshCollector:
        config = self._config
        return MeshCollector(
            self.datapath,
            self.ids,
            self._status_from_thread,
            enrolled=lambda: self._enrolled,
            rows=lambda: {name: mirror.count for name, mirror in self._enrolment.tables.mirrors.items()},
            closed_by_policy=lambda: self._revocation.closed + self._streams.closed,
            unlogged=lambda: self._connection_log.dropped,
            audited=lambda: audit.counts(config.envoy_admin_socket) if audit.wanted(self.snapshot) else {},
            requests=Requests(config.envoy_admin_socket, lambda: self.snapshot.services).text,
        )

    def _attach(self) -> None:
        self._kubelet.look()  # first: the programs refuse probes of a kubelet that they do not know
        self.datapath.attach(self._config.waypoint_cgroup)
        self.datapath.forget_other_versions()
        self._held_back = False
        self._enrolment.let_go()

    async def _serve(self) -> None:
        events = Events(self.datapath.maps["mesh_events"], self.ids, self._on_event, expected=probe.NAME)
        api = Api(self._config, self, self._relay)
        self._metrics.start()
        try:
            await run_forever(
                {
                    "xds": self._serve_waypoint(),
                    "envoy": self._waypoint.run(),
                    "discovery": self._discovery.run(),
                    "replicas": Replicas(self._config, self._relay.offer).run(),
                    "events": events.run(),
                    "namespaces": self._watch_namespaces(),
                    "truth": self._seek_truth(),
                    "names": self._names.run(),
                    "relax": self._relax(),
                    "release": self._release(),
                    "settle": self._settle(),
                    "settle-again": self._settle_again(),
                    "parting": self._let_part(),
                    "forget": self._forget(),
                    "revocation": self._revocation.run(),
                    "sweep": self._sweep_up(),
                    "retire": self._retire(),
                    "heartbeat": self._heartbeat(),
                    "held-pods": self._look_after_held(),
                    "api": api.run(),
                    "identity": self._identity.run(),
                    "tunnels": self._begin_tunnels(),
                    "distrust": self._distrust.run(),
                    "streams": self._streams.run(),
                    "tunnel-ends": report_tunnel_ends(self._tunnel_ends, self._discovery.report_tunnels),
                    "workload-api": self._serve_workloads(),
                    "wireguard": self._wireguard.run(),
                    "quotas": self._quotas.run(),
                    "gateways": self._gateways.run(),
                    "connection-log": self._connection_log.run(),
                    "request-log": keep_bounded(self._request_log, lambda: envoy.reopen_logs(self._config.envoy_admin_socket)),
                    "calls": self._calls.run(),
                    "kubelet": self._kubelet.run(),
                }
            )
        finally:
            self._metrics.stop()
            self._probe.close()
            await self._loop.shutdown_default_executor()
            self._enrolment.holding.end()

    async def apply(self, snapshot: Snapshot) -> None:
        """Bring a new `snapshot` into force; on failure the previous one stays. Called by the discovery client."""
        async with self._enforcing:
            await self._bring_into_force(snapshot)
            if self._held_back:
                await asyncio.to_thread(self._attach)

    async def _bring_into_force(self, snapshot: Snapshot) -> None:
        self._given = False
        await self._wireguard.prepare(snapshot)
        await self._welcome(snapshot)
        # What receivers have enforced so far they go on to enforce until Envoy has the rules that make that needless (`_relax`); which of them did so under the
        # agent before this one, is not known.
        needed = await self._left_to_receivers(snapshot)
        before = self._enforced_inbound if self._configured.is_set() else _protected(self._config.node, snapshot)
        await self._forget_translated(address for one in self._joining(snapshot).values() for address in one.addresses)
        await self._enforce(snapshot, needed | before)
        self._residents = residents(self._config.node, snapshot, self.snapshot, self._residents)
        self._snapshot = snapshot
        self._observability = Observability(snapshot.telemetry)
        enrolled = self._enrolled.local
        if enrolled and not self._looked and (called := await self._called()) and await self._part(called):  # of the agent before this one
            needed = await self._left_to_receivers(snapshot)
        self._revocation.changed(Rules(snapshot, self.enrolled, needed))
        self._quotas.update(snapshot)
        self._gateways.want(any(gateways.of(one, snapshot) for one in self._residents.values()))
        await self._configure_waypoint(needed)
        await self._wireguard.finish(dialled=True)
        self._given, self._known = True, enrolled
        self._releasable.set()
        self._configured.set()
        self._tunnels.keep(self._builder.identities)
        if self._enforced_inbound != needed or self._builder.identities != self._tunnels.ready:
            self._relaxable.set()

    async def _welcome(self, snapshot: Snapshot) -> None:
        """Have Envoy listen before the kernel leads requests to it: else some would be refused.

        That is for pods that have run outside of the mesh until now, and for those whose first policy that asks for requests has come. It is told what is in
        force, who comes, and which Services have a waypoint with them. Those that start are not waited for: they are protected at once.
        """
        joining = self._joining(snapshot)
        coming = joining | await self._reading_first(snapshot)
        if not coming or not self._configured.is_set() or not self._waypoint.state.ready:
            return
        present = _with(self.snapshot, snapshot, coming)
        await self._have_receivers_decide(await self._left_to_receivers(present))
        try:
            await within(_until_listening(await self._show_coming(present, coming.keys())), WELCOME_S if joining else FIRST_S)
        except (asyncio.TimeoutError, OSError, RuntimeError) as error:
            _log.warning(
                "Envoy does not listen yet for pods that come into the mesh, or have their first policy for requests: some may be refused",
                extra={"pods": sorted(coming), "reason": str(error)},
            )

    def _joining(self, snapshot: Snapshot) -> dict[str, Workload]:
        """The workloads of this node that have run outside of the mesh until now."""
        found = ((name, snapshot.workloads.get(name)) for name, was in self._residents.items() if not was.enrolled)
        return {name: one for name, one in found if one is not None and one.enrolled and one.node == self._config.node}

    async def _reading_first(self, snapshot: Snapshot) -> dict[str, Workload]:
        """The workloads of this node whose first policy that asks for requests has come: Envoy does not listen for these yet."""
        listening = self._built.get(names.LISTENER, {})
        reading = await asyncio.to_thread(self._builder.reading, snapshot)
        first = (name for name in reading if names.listener(names.INBOUND, name) not in listening)
        return {name: one for name in first if (one := snapshot.workloads.get(name)) and one.enrolled and one.node == self._config.node}

    async def _forget_translated(self, joined: Iterable[str] = ()) -> None:
        """Have ports of connections that pods had before they `joined` serve connections in the mesh; to be said again while more of them may end."""
        now = time.monotonic()
        self._joined = {one: until for one, until in self._joined.items() if until > now} | dict.fromkeys(joined, now + ENDING_S)
        if self._joined:
            try:
                await asyncio.to_thread(conntrack.forget_translated, self._joined.keys())
            except OSError as error:
                _log.warning(
                    "what the node remembers of connections to Services stays for two minutes: some of pods that came into the mesh may be refused (spoofed)",
                    extra={"addresses": sorted(self._joined), "reason": str(error)},
                )

    async def _show_coming(self, present: Snapshot, coming: Container[str]) -> dict[str, set[int]]:
        """Show Envoy who comes; return the ports where it is to listen for them, by network namespace."""
        found = await asyncio.to_thread(self._enrolment.find, self._probe.extend(present))
        local = tuple(one for one in found if one.workload.name != probe.NAME)
        await self._show_waypoint(present, local)
        offered = self._built.get(names.LISTENER, {})
        sides = {names.OUTBOUND: OUTBOUND_PORT, names.INBOUND: INBOUND_PORT}
        return {
            one.netns_path: {port for side, port in sides.items() if names.listener(side, one.workload.name) in offered}
            for one in local
            if one.workload.name in coming
        }

    async def _enforce(self, snapshot: Snapshot, enforce_inbound: frozenset[str]) -> None:
        try:
            tunnels = self._tunnels.usable() if self._secured else {}
            self._enrolled = await asyncio.to_thread(
                lambda: self._enrolment.enforce(self._probe.extend(snapshot), enforce_inbound, tunnels, self._wireguard.direct)
            )
        except (OSError, RuntimeError) as error:
            raise KernelRefused(f"cannot bring version {snapshot.version} into force: {error}") from error
        enrolled = self.enrolled
        self._names.update(snapshot, enrolled.local)
        self._identity.update(enrolled.local, (snapshot.workloads[name] for name, _ in enrolled.missing if name in snapshot.workloads))
        self._enforced_inbound = enforce_inbound

    def _secrets_changed(self) -> None:
        """Envoy gets certificates as they change; listeners name them (`agent.l7.secrets`)."""
        trust, of_gateways = self._identity.trust, gateways.secrets(self._gateways.held)
        if trust is None:
            self._xds.set_secrets(of_gateways)
            return
        self._distrust.trusted(trust.revoked, trust.roots)
        svids = self._identity.svids()
        before = self._packed
        self._packed = {
            name: before[name]
            if name in before and before[name][0] is svid
            else (svid, secrets.certificate(name, svid.chain.pem, svid.key.pem()))
            for name, svid in svids.items()
        }
        name, roots = secrets.trust(trust.trust_domain, trust.pem, trust.crl)
        own = {n: resource for _, packed in self._packed.values() for n, resource in packed.items()}
        self._xds.set_secrets({name: roots} | own | of_gateways)

    async def _relax(self) -> None:
        """Let the waypoint's own authorization suffice, and use its tunnels, once Envoy has taken them."""
        while True:
            await self._relaxable.wait()
            self._relaxable.clear()
            taken = await self._xds.wait_acked(RETRY_S) and not self._xds.state.rejected
            async with self._enforcing:
                if self._relaxable.is_set():
                    continue
                try:
                    await self._make_use(taken)
                except (MeshError, OSError) as error:
                    _log.error(
                        "what Envoy has taken is not made use of: the receiver goes on to enforce, new tunnels are not used; trying again",
                        extra={"reason": str(error)},
                    )
                    taken = False
            if not taken:
                await asyncio.sleep(RETRY_S)
                self._relaxable.set()

    async def _release(self) -> None:
        """Have WireGuard let go of what is not dialled any more, once Envoy has taken everything: until then it may dial what is to take a tunnel now.

        An Envoy that is away may still run on what it had, and one that refuses something goes on to: then nothing is let go of.
        """
        while True:
            await self._releasable.wait()
            self._releasable.clear()
            acked = await self._xds.wait_acked(RETRY_S)
            if acked and self._given and not self._releasable.is_set():  # what is refused does not lead past anything either
                self._revocation.taken()
            taken = acked and await self._xds.wait_acked(RETRY_S, lingering=True) and not self._xds.state.rejected
            async with self._enforcing:
                if self._releasable.is_set():
                    continue  # Envoy was given something else meanwhile
                if taken and self._given:
                    await self._wireguard.finish()
            if not taken:
                await asyncio.sleep(RETRY_S)
                self._releasable.set()

    async def _settle(self) -> None:
        """Have Envoy let go of connections that nobody reads, when those who should, here and on other nodes, have had time to begin."""
        while True:
            await self._unsettled.wait()
            self._unsettled.clear()
            shown = self._builder.shown
            await asyncio.sleep(READERS_S)
            async with self._enforcing:
                due = shown is not None and await asyncio.to_thread(self._builder.settle, shown)
                if due and not await self._configure_waypoint_again():
                    self._unsettled.set()

    async def _settle_again(self) -> None:
        """The same some times more, for nodes that have begun later."""
        while True:
            await asyncio.sleep(READERS_AGAIN_S)
            async with self._enforcing:
                if await asyncio.to_thread(self._builder.settle_again):
                    await self._configure_waypoint_again()

    async def _forget(self) -> None:
        """Forget what has ended since pods have come into the mesh. Needs nothing that is enforced."""
        while True:
            await asyncio.sleep(NAMESPACE_POLL_S)
            await self._forget_translated()

    async def _let_part(self) -> None:
        """Have what needs the waypoint no more answered there as long as somebody calls it through a connection from before."""
        pause = PARTING_S
        while True:
            await asyncio.sleep(pause)
            looks = self._builder.parts or not self._looked
            pause = min(2 * pause, PARTING_MOST_S) if looks else PARTING_S  # connections may be silent for hours
            called = await self._called() if looks else None
            async with self._enforcing:
                if called is not None and await self._part(called) and await self._configure_waypoint_again():
                    self._relaxable.set()
                    pause = PARTING_S

    async def _called(self) -> Dialled | None:
        """What connections through the waypoint were dialled to; None if that cannot be known."""
        try:
            return await asyncio.to_thread(parting.called, Sockets(self.datapath.maps), self.ids, self.enrolled.local)
        except OSError as error:
            _log.warning("nobody knows who is connected through the waypoint: nothing is let go of there", extra={"reason": str(error)})
            return None

    async def _part(self, called: Dialled) -> bool:
        """Tell the builder of these connections; True if Envoy is to have something else."""
        self._looked = self._looked or bool(self.enrolled.local)
        return await asyncio.to_thread(self._builder.look, called)

    async def _make_use(self, taken: bool) -> None:
        """Of tunnels that Envoy has, whatever else it has refused; of its authorization if it has `taken` everything."""
        has = {i for i in self._builder.identities if self._xds.has(names.CLUSTER, names.tunnel(self._tunnels.address(i)))}
        news = self._tunnels.mark_ready(has)
        taken = taken and self._given  # else what it has taken may not be what is in force
        needed = await self._left_to_receivers(self.snapshot) if taken else self._enforced_inbound
        if news or needed != self._enforced_inbound:
            await self._enforce(self.snapshot, needed)
            self._namespace_news.set()  # a namespace that came meanwhile may be in force in the kernel now, and nowhere else

    async def _configure_waypoint(self, needed: frozenset[str] | None = None) -> None:
        """Show Envoy what is in force; `needed` is what that leaves to receivers, if it has been asked."""
        await self._have_receivers_decide(await self._left_to_receivers(self.snapshot) if needed is None else needed)
        await self._show_waypoint(self.snapshot, self.enrolled.local)

    async def _configure_waypoint_again(self) -> bool:
        """The same where nobody is to hear of a failure; False if there was one: Envoy keeps what it has."""
        try:
            await self._configure_waypoint()
        except (MeshError, OSError) as error:
            _log.error("Envoy keeps the configuration that it has; trying again", extra={"reason": str(error)})
            return False
        return True

    async def _left_to_receivers(self, snapshot: Snapshot) -> frozenset[str]:
        return await asyncio.to_thread(self._builder.needs_inbound, snapshot)

    async def _have_receivers_decide(self, needed: frozenset[str]) -> None:
        """Have receivers on this node make the decisions that Envoy is about to leave to them."""
        if not needed <= self._enforced_inbound:
            await self._enforce(self.snapshot, self._enforced_inbound | needed)

    async def _show_waypoint(self, snapshot: Snapshot, local: tuple[LocalWorkload, ...]) -> None:
        """Build Envoy's configuration in a thread: with many workloads it takes longer than the event loop may stand still."""
        zone = node_zone(self._residents.values(), self._config.node)
        loopback = self._tunnels.address if self._secured else None
        trust = self._distrust.distrusted
        built = await asyncio.to_thread(self._builder.build, snapshot, local, zone, loopback, trust, self._wireguard.direct)
        told = request_log.runtime(snapshot, local)
        if built is not self._built or told != self._told:
            self._built, self._told = built, told
            self._unsettled.set()
            self._serve_to_waypoint(self._tracer.pairs)

    def _serve_to_waypoint(self, pairs: frozenset[Pair]) -> None:
        traced = frozenset(pair.source for pair in pairs if not pair.receiving)
        received = frozenset(target for pair in pairs if pair.receiving for target in pair.targets)
        self._xds.set(
            {
                **self._built,
                **tracing(
                    traced,
                    received=received | self._asks_for_streams,
                    peers=self._asks_for_peers,
                    calls=self._config.record_flows,
                    logs=self._told,
                ),
            }
        )

    def _ask_for_peers(self, asked: bool) -> None:
        self._asks_for_peers = asked
        if self._built:
            self._serve_to_waypoint(self._tracer.pairs)

    def _follow_streams(self) -> None:
        self._streams = Streams(
            Sockets(self.datapath.maps),
            self._revocation.who,
            lambda: self._revocation.rules,
            self._ask_for_streams,
            lambda: self._xds.has(names.RUNTIME, names.RUNTIME_LAYER),
        )
        self._revocation.on_taken = self._streams.changed
        self._xds.on_tunnel = self._on_tunnel

    def _ask_for_streams(self, workloads: frozenset[str]) -> None:
        self._asks_for_streams = workloads
        if self._built:
            self._serve_to_waypoint(self._tracer.pairs)

    def _on_tunnel(self, record: TunnelRecord) -> None:
        self._tracer.on_tunnel(record)
        self._streams.on_tunnel(record)

    async def _configure_tunnels(self) -> None:
        async with self._enforcing:
            if self._snapshot is not None:
                await self._configure_waypoint()

    async def _begin_tunnels(self) -> None:
        """Tunnel to other nodes as soon as there are certificates."""
        await self._identity.active.wait()
        while True:
            try:
                async with self._enforcing:
                    if self._snapshot is not None:
                        await self._bring_into_force(self._snapshot)
                break
            except MeshError as error:
                _log.error("there are certificates, but no tunnels yet; trying again", extra={"reason": str(error)})
                await asyncio.sleep(RETRY_S)
        await asyncio.Event().wait()

    def _tunnel_ends(self) -> frozenset[str]:
        """Workloads of which nobody knows yet that tunnels end there, and they do: certificate, listener and routes are in Envoy."""
        awaiting = [one.workload for one in self.enrolled.local if one.workload.awaits_tunnels]
        return frozenset(
            workload.name
            for workload in awaiting
            if all(self._xds.has(kind, names.listener(names.HBONE, workload.name)) for kind in (names.LISTENER, names.ROUTES))
            and self._xds.has(names.SECRET, workload.identity(self._config.trust_domain))
        )

    async def _wireguard_changed(self) -> None:
        """What WireGuard encrypts is not what it was."""
        async with self._enforcing:
            if self._snapshot is not None:
                await self._bring_into_force(self._snapshot)

    def _say_anew(self) -> None:
        self._discovery.reconnect()

    @property
    def direct(self) -> Direct:
        """Which workloads are reached without a tunnel, because WireGuard encrypts the way to them."""
        return self._wireguard.direct

    async def _serve_waypoint(self) -> None:
        """Serve Envoy once there is something to say: an adopted Envoy must not be told that nothing exists."""
        await self._configured.wait()
        await self._xds.run()

    async def _watch_namespaces(self) -> None:
        """Follow namespaces that come, go, or change their addresses: at once by what the kernel tells, and by looking now and then."""
        news, watch = self._namespace_news, self._enrolment.watch

        def wake() -> None:
            watch.drain()
            news.set()

        self._loop.add_reader(watch.fileno(), wake)
        try:
            while True:
                with contextlib.suppress(asyncio.TimeoutError):
                    await within(news.wait(), EAGER_POLL_S if watch.eager else NAMESPACE_POLL_S)
                news.clear()
                try:
                    async with self._enforcing:
                        if self._snapshot is not None and self._behind(self._snapshot):
                            await self._bring_into_force(self._snapshot)
                        self._enrolment.let_go()
                except (MeshError, OSError) as error:
                    _log.error(
                        "a changed namespace could not be brought into force; the previous state stays", extra={"reason": str(error)}
                    )
                    await asyncio.sleep(RETRY_S)
        finally:
            self._loop.remove_reader(watch.fileno())

    def _behind(self, snapshot: Snapshot) -> bool:
        """Is there a namespace that the kernel, Revocation or Envoy does not know as it is? `_make_use` brings the kernel alone to what it finds."""
        return (
            not self._given  # Envoy may have been shown what did not come into force after all
            or self._enrolled.local != self._known
            or self._enrolment.namespaces_changed(self._probe.extend(snapshot))
        )

    async def _seek_truth(self) -> None:
        """Ask the kernel, and try, whether what is believed is so."""
        await self._configured.wait()
        while True:
            try:
                await self._check_truth()
            except (OSError, MeshError) as error:
                _log.error("cannot check whether pods are redirected; what was found last stays", extra={"reason": str(error)})
            await asyncio.sleep(probe.INTERVAL_S)

    async def _check_truth(self) -> None:
        local = self._enrolled.local
        found = await asyncio.to_thread(drift.scan, self._config, self.datapath, local)
        now = {(item.workload.name, item.netns_cookie) for item in self._enrolled.local}
        still = {item.workload.name for item in local if (item.workload.name, item.netns_cookie) in now}  # others ended meanwhile
        before, self._drift = self._drift, replace(found, reasons={name: why for name, why in found.reasons.items() if name in still})
        for name, reason in self._drift.reasons.items():
            if name not in before.reasons:
                _log.error("a workload is not redirected", extra={"workload": name, "reason": reason})
        self._enrolment.doubt(found.unlinked)
        outcome = await asyncio.to_thread(self._probe.run, local)
        if outcome.problem and outcome.problem != self._probed.problem:
            _log.error("the live probe failed", extra={"reason": outcome.problem})
        self._probed, self._probed_at = outcome, time.monotonic()

    async def _retire(self) -> None:
        """Remove rows that nothing in the kernel can be on its way to any more, and let go of namespaces that Envoy uses no more."""
        while True:
            await asyncio.sleep(RETIRE_S)
            async with self._enforcing:
                self._enrolment.tables.remove_retired(now=False)
                try:
                    await asyncio.to_thread(self._enrolment.release_left)
                except OSError as error:
                    _log.warning("the mount of a namespace that left the mesh stays", extra={"reason": str(error)})

    async def _sweep_up(self) -> None:
        """Now and then remove counters of what is gone."""
        while True:
            await asyncio.sleep(SWEEP_S)
            async with self._enforcing:  # a name that comes back meanwhile must not be forgotten
                if self._snapshot is not None:
                    await asyncio.to_thread(self._sweep.run, self._probe.extend(self._snapshot))

    async def _heartbeat(self) -> None:
        """Say that the agent lives, to systemd and to the programs that hold pods back: nothing here waits for a thread."""
        while True:
            self._beat = time.monotonic()
            self._say_here()
            self._notifier.beat(self._summary())
            await asyncio.sleep(BEAT_S)

    def _say_here(self) -> None:
        try:
            self._enrolment.holding.beat(served=self._discovery.state.connected)
        except (MeshError, OSError) as error:
            _log.error("the kernel cannot be told that there is an agent; new pods wait", extra={"reason": str(error)})

    async def _look_after_held(self) -> None:
        """Look after pods that are held back, in a thread of its own: the others may all be taken by what waits for pods."""
        with ThreadPoolExecutor(1, "held-pods") as thread:
            while True:
                await self._loop.run_in_executor(thread, self._hold)
                self._say_here()  # where pods are may be known only now, or no longer
                await asyncio.sleep(BEAT_S)

    def _summary(self) -> str:
        """One line for `systemctl status`."""
        if self._held_back:
            return "the programs of the agent before this one stay in force until the controller has sent a configuration"
        if self._snapshot is None:
            return f"in force, but no configuration yet: controller {self._config.controller} has not answered"
        words = [f"in force: {len(self.enrolled.local)} workloads"]
        words += [] if self._discovery.state.connected else [f"controller {self._config.controller} is away"]
        words += [] if self._waypoint.state.ready else ["the waypoint is not ready"]
        return "; ".join(words)

    def _hold(self) -> None:
        pods = [one for one in self._residents.values() if one.pod_uid]
        try:
            self._enrolment.holding.look_after([one.pod_uid for one in pods if not one.enrolled], pods=bool(pods))
            self._enrolment.let_go()
        except (MeshError, OSError, RuntimeError) as error:
            _log.error("pods that are held back cannot be looked after; new ones wait", extra={"reason": str(error)})

    @property
    def _secured(self) -> bool:
        """Are there tunnels? Also those of the agent before this one: Envoy still has its certificates when they were kept nowhere else."""
        return self._identity.active.is_set() or bool(self._tunnels.ready)

    @property
    def snapshot(self) -> Snapshot:
        """What is in force; empty before the first."""
        return self._snapshot or Snapshot()

    @property
    def enrolled(self) -> Enrolled:
        """The workloads in the data path, without the agent's own probe."""
        local = tuple(item for item in self._enrolled.local if item.workload.name != probe.NAME)
        return replace(self._enrolled, local=local, missing=tuple(m for m in self._enrolled.missing if m[0] != probe.NAME))

    @property
    def tracer(self) -> Tracer:
        """The running traces."""
        return self._tracer

    @property
    def calls(self) -> Calls:
        """What was called lately."""
        return self._calls

    def certified(self, workload: str) -> bool:
        """Does a workload of this node have a certificate that is valid?"""
        found = self.snapshot.workloads.get(workload)
        return found is not None and found.identity(self._config.trust_domain) in self._identity.svids()

    async def tracing_armed(self) -> bool:
        """Wait until Envoy reports what the tracer asked for; False if it does not within two seconds."""
        return await self._xds.wait_acked(2.0)

    def lost_events(self) -> int:
        """How many kernel events found no room since the programs were loaded."""
        return self.datapath.counters()["event_dropped"]

    def _trace_changed(self, pairs: frozenset[Pair]) -> None:
        self._set_tracing(pairs)
        self._serve_to_waypoint(pairs)

    def _set_tracing(self, pairs: frozenset[Pair]) -> None:
        """Write the kernel's filter: rows first, then the count that makes the programs look."""
        table = self.datapath.maps["mesh_trace"]
        wanted = set()
        for pair in pairs:
            source = self.ids.number("workload", pair.source)
            if pair.service:
                wanted.add(table.layout.key.pack(source=source, service=self.ids.number("service", pair.service)))
            wanted |= {table.layout.key.pack(source=source, target=self.ids.number("workload", target)) for target in pair.targets}
        self.ids.save()
        for key in wanted:
            table.put(key, table.layout.value.pack(**{"": 1}))
        self.datapath.configure(waypoint_cgroup_id=self._config.waypoint_cgroup.stat().st_ino, tracing=len(wanted))
        table.prune(wanted)

    def _recognise(self, found: kubelet.Kubelet) -> None:
        """Have the kernel take the calls of what was found for the kubelet's."""
        number = self.ids.number("workload", kubelet.caller(self._config.node))
        self.ids.save()
        self.datapath.recognise_kubelet(found, number)

    def _on_event(self, event: Event) -> None:
        if event.kind is EventKind.HELD:
            self._namespace_news.set()
            return
        self._tracer.on_event(event)
        self._connection_log.on_event(event)

    def _logs_connections(self, workload: str) -> bool:
        """Are this workload's connections logged? Not those of the live probe, nor of who is not known."""
        return bool(workload) and workload != probe.NAME and self._observability.logs_connections(workload.partition("/")[0])

    def _status_from_thread(self) -> Status:
        """The state of the node, asked on the event loop, where it belongs."""

        async def ask() -> Status:
            return self.status()

        return asyncio.run_coroutine_threadsafe(ask(), self._loop).result(STATUS_TIMEOUT_S)

    async def graph(self, window_s: float) -> Answer:
        """Who talks to whom, over at least so many seconds."""
        return await self._observer.answer(window_s)

    def identity(self, workload: str) -> IdentityStatus | CertificateStatus:
        """The certificates of this node, or one workload's. Called on the event loop."""
        return self._identity.show(workload) if workload else self._identity.status()

    def status(self) -> Status:
        """The state of the node now. Called on the event loop."""
        config = self._config
        hooks = tuple(HookStatus(h.name, h.attached, h.effective) for h in self.datapath.hooks())
        waypoint, xds, discovery = self._waypoint.state, self._xds.state, self._discovery.state
        enrolled, snapshot = self.enrolled, self.snapshot
        missing = {**self._drift.reasons, **dict(enrolled.missing)}
        missing = {name: reason for name, reason in missing.items() if name in snapshot.workloads}
        redirected = {local.workload.name for local in enrolled.local} - missing.keys()
        problems = [f"{h.name} does not run: another program may have replaced it; restart the agent" for h in hooks if not h.effective]
        if not waypoint.ready:
            problems.append(f"the waypoint is not ready: see {config.run_dir / 'envoy.log'}")
        if xds.rejected:
            problems.append(f"Envoy refused a configuration: {xds.last_nack}")
        if self._snapshot is None:
            problems.append(
                f"no configuration yet: controller {config.controller} has not answered{': ' + discovery.last_error if discovery.last_error else ''}"
            )
        elif not discovery.connected:
            problems.append(f"controller {config.controller} is away: the last good configuration {snapshot.version} is in force")
        problems += [f"workload {name} is not redirected: {reason}" for name, reason in sorted(missing.items())]
        if self._probed.problem:
            problems.append(self._probed.problem)
        problems += self._enrolment.holding.problems(self._residents.values())
        problems += self._kubelet.problems(self._residents.values())
        problems += self._names.problems()
        problems += externals.problems(snapshot, self._roots)
        problems += self._identity.problems()
        problems += self._wireguard.problems()
        problems += self._quotas.problems()
        problems += self._gateways.problems()
        problems += self._enrolment.acceleration.problems()
        problems += filter(None, (self._revocation.problem, self._streams.problem, self._distrust.problem))
        counters = self.datapath.counters()
        problems += [
            f"{counters[c]} times {c} in the kernel programs: see mesh_datapath_events in /metrics" for c in _TROUBLE if counters[c]
        ]
        if snapshot.workloads and not self._residents:
            problems.append(f"no Workload names node {config.node}: is --node spelled as the resources spell it?")
        workloads = tuple(
            WorkloadStatus(
                w.namespace,
                w.name.partition("/")[2],
                w.enrolled,
                w.name in redirected,
                w.identity(config.trust_domain) if w.enrolled else "",
                w.name in missing,
            )
            for _, w in sorted(self._residents.items())
        )
        return Status(
            ready=(
                len(hooks) == len(HOOKED)
                and all(h.effective for h in hooks)
                and waypoint.ready
                and self._snapshot is not None
                and self._probed.works is not False
            ),
            node=config.node,
            hooks=hooks,
            waypoint=WaypointStatus(
                waypoint.ready,
                waypoint.version,
                waypoint.pid,
                xds.nacks,
                xds.rejected,
                xds.last_nack,
                dict(xds.sent),
                xds.pushes,
                xds.pushed_s,
                xds.last_push_s,
                waypoint.resident_bytes(),
            ),
            controller=ControllerStatus(discovery.connected, snapshot.version, discovery.lag_s),
            workloads=workloads,
            problems=tuple(problems),
            probe=ProbeStatus(self._probed.works, None if self._probed_at is None else time.monotonic() - self._probed_at),
            acceleration=AccelerationStatus(
                tuple(sorted(self._enrolment.acceleration.chosen)), failing(self._enrolment.acceleration.checks)
            ),
            foreign_programs=tuple(ForeignProgram(f.id, f.name, f.attach_type, f.place) for f in self._drift.foreign),
            identity=self._identity.status(),
            wireguard=self._wireguard.status(),
            version=_VERSION,
        )


async def report_tunnel_ends(up: Callable[[], frozenset[str]], report: Callable[[frozenset[str]], Awaitable[str]]) -> None:
    """For ever have the controller told which workloads are `up`, until it does not ask any more."""
    told: frozenset[str] = frozenset()
    again, problem = 0.0, ""
    while True:
        await asyncio.sleep(TUNNEL_ENDS_S)
        found = up()
        if not found or (found <= told and time.monotonic() < again):
            told &= found
            continue
        before, problem = problem, await report(found)
        told, again = (found, time.monotonic() + RETRY_S) if not problem else (frozenset(), 0.0)
        if problem:
            if problem != before:
                _log.warning(
                    "the controller is not told where tunnels end; trying again", extra={"workloads": len(found), "reason": problem}
                )
            await asyncio.sleep(RETRY_S)


def residents(node: str, snapshot: Snapshot, before: Snapshot, known: Mapping[str, Workload]) -> Mapping[str, Workload]:
    """The workloads of a node by name. `known` are those of `before`: only what differs is looked at."""
    news = {name: snapshot.workloads.get(name) for name in snapshot.since(before).workloads}
    kept = {name: workload for name, workload in known.items() if name not in news}
    return kept | {name: workload for name, workload in news.items() if workload is not None and workload.node == node}


def _with(before: Snapshot, after: Snapshot, joining: Mapping[str, Workload]) -> Snapshot:
    """What is in force `before`, and with it those who come, what they name that nobody had yet, or that asks for requests since then, and the Services that
    have a waypoint only since then.
    """
    policies = {name for one in joining.values() for name in one.policies}
    policies = {name for name in policies & after.policies.keys() if _is_news(before.policies.get(name), after.policies[name])}
    authentications = {name for one in joining.values() for name in one.authentications} - before.authentications.keys()
    services = {name: one for name in after.since(before).services if (one := after.services.get(name)) is not None and _has_waypoint(one)}
    waypoints = {name: one for name, one in services.items() if not _has_waypoint(before.services.get(name))}
    return replace(
        before,
        version=f"{before.version}+",
        workloads=changed(before.workloads, joining),
        services=changed(before.services, waypoints),
        policies=changed(before.policies, {name: after.policies[name] for name in policies}),
        authentications=changed(
            before.authentications, {name: after.authentications[name] for name in authentications & after.authentications.keys()}
        ),
        delta=None,
    )


def _protected(node: str, snapshot: Snapshot) -> frozenset[str]:
    """Names of the workloads of a node that have policies."""
    return frozenset(name for name, one in snapshot.workloads.items() if one.node == node and one.policies)


def _is_news(before: Policy | None, after: Policy) -> bool:
    return before is None or (needs_request(after) and not needs_request(before))


def _has_waypoint(service: Service | None) -> bool:
    return service is not None and any(port.waypoint for port in service.ports)


async def _until_listening(wanted: Mapping[str, set[int]]) -> None:
    """Return when somebody listens on all these ports, by network namespace; one that is gone is not waited for."""
    for path, ports in wanted.items():
        with contextlib.suppress(OSError):
            while True:
                if ports <= await asyncio.to_thread(netns.listening, Path(path)):
                    break
                await asyncio.sleep(EAGER_POLL_S)


_TROUBLE = ("storage_failed", "flow_failed", "origdst_failed", "listener_failed", "stats_folded", "verdict_folded")


async def run_forever(parts: dict[str, Coroutine[Any, Any, None]]) -> None:
    """Run named parts until SIGTERM or SIGINT. A part that fails, or returns although it should run for ever, ends all of them."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    asked: asyncio.Task[Any] = asyncio.create_task(stop.wait(), name="signal")
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(part, name=name) for name, part in parts.items()]
    try:
        await asyncio.wait([asked, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
                raise RuntimeError(f"part {task.get_name()} ended, but should run for ever")
    finally:
        for task in (asked, *tasks):
            task.cancel()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(asyncio.gather(asked, *tasks, return_exceptions=True), 5)
