"""The kernel data path of one node: programs loaded and pinned, maps open, links in place.

Owned by the supervisor. Order of a start: `load` (nothing is attached), fill the tables, `attach`. A restart finds pins and links of the same
programs and changes nothing; one with other programs replaces them link by link, atomically. Everything stays when the agent ends.

Other programs with other maps (`agent.bpf.migrate`) take over in this order, each step complete before the next:

1. the new tables are filled; the old programs decide, by the old tables;
2. links change over to the programs that look into old and new maps (`agent.bpf.bridge`), receivers first, then who hands connections over, then
   who decides for callers: whoever reads what another hook writes is switched before that one, so each row is found by whoever looks for it;
3. nobody writes the old maps any more: what is left in them is carried over, and links change to the programs that know the new maps only.

An agent that is killed on the way, at whatever step, leaves sets of programs (`agent.bpf.sets`) from which the next one goes on, also one of the old
version or of a third. What is over and done with is removed by `forget_other_versions` only.

Below the pin directory: maps-LAYOUT/, programs-HASH/, during step 2 programs-HASH-bridge/, links/NAME and links/netns-COOKIE. A map that is the same in
two layouts is pinned in both directories.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from agent import features, files
from agent.bpf import acceleration, libbpf, migrate, sets, source
from agent.bpf.manifest import HOOKED, KUBELET_ANY, PROGRAMS, Counter, Manifest, Program
from agent.bpf.maps import Map
from agent.bpf.migrate import Fate, Migration
from agent.bpf.sets import Others, Set
from agent.config import Config
from agent.errors import EnvironmentUnfit, KernelRefused
from agent.kubelet import ANY, Kubelet

_log = logging.getLogger(__name__)

_RECEIVER = next(p for p in PROGRAMS if p.where == "namespace")
_DELETER = next(p for p in PROGRAMS if p.name == "mesh_sockops")
"""It alone deletes what hooks of one connection write for each other."""
_ACCELERATED = next(p for p in PROGRAMS if p.where == "accelerated")
_SETTLE_S = 0.2
"""A program that was running when its link changed has ended by then, and a connect() that was between two hooks is past the second: that takes
microseconds, on a machine with too much to do milliseconds."""
_LATE = ("mesh_listen", "mesh_sendmsg4", "mesh_sendmsg6", "mesh_connect4", "mesh_connect6")
"""Write what the other hooks read: attached after them."""


@dataclass(frozen=True, slots=True)
class Hook:
    """One program: attached by a link of ours, and among those that the kernel runs."""

    name: str
    attached: bool
    effective: bool


@dataclass(frozen=True, slots=True)
class Foreign:
    """Somebody else's program that the kernel runs where ours run. It is left alone."""

    id: int
    name: str
    attach_type: str
    place: str


class DataPath:
    """See the module. Not thread-safe, but `maps` may be read from any thread."""

    def __init__(self, config: Config) -> None:
        """Open nothing yet."""
        self._config = config
        self._flags = features.compile_flags()
        code = source.read(flags=self._flags, capacities=config.map_capacities)
        self.pins = Set.of(config, code.programs, code.layout)
        self._links_dir = config.pin_dir / "links"
        self._namespaces: dict[int, Path] = {}
        self._pending = False
        self._migrations: list[Migration] = []
        self._ids: dict[str, int | None] = {}
        self.maps: dict[str, Map] = {}
        self.awaits_tables = False
        """True if programs are in force that decide by other tables than those that are open here: these must be filled before `attach`."""
        self.in_force = False
        """Do these programs decide now, everywhere?"""
        self.loader_s = 0.0
        """How long the loader child took; 0 if the pins of an earlier run served."""

    @property
    def generation(self) -> str:
        """Names the kernel map that holds Envoy's listening sockets: what they are in, and no other map, an Envoy must be started with."""
        return f"listeners-{libbpf.object_id(self.maps['mesh_listener'].fd)}"

    async def load(self) -> None:
        """Have the programs pinned and the maps open. Raises EnvironmentUnfit or KernelRefused with the loader's own words."""
        others = sets.others(self._config, self.pins)
        if not self.pins.complete:
            started = time.monotonic()
            await run_loader(self._job(others), self._config.run_dir / "loader.log")
            self.loader_s = time.monotonic() - started
        manifest = Manifest.read(self.pins.manifest)
        self.maps = {name: Map(self.pins.maps / name, layout) for name, layout in manifest.maps.items()}
        self._links_dir.mkdir(parents=True, exist_ok=True)
        stats = self.maps["mesh_stats"]
        if stats.get(bytes(stats.layout.key.size)) is None:
            stats.put(bytes(stats.layout.key.size), bytes(stats.layout.value.size))
        self._take_over(others, manifest)

    def _job(self, others: Others) -> source.Job:
        # Maps that are there already are never made anew: programs may write them, and hold what no other map has.
        before = others.found[0][0] if others.in_force and not self.pins.maps.is_dir() else None
        return source.Job(
            maps=str(self.pins.maps),
            programs=str(self.pins.programs),
            bridge=str(self.pins.bridge),
            manifest=str(self.pins.manifest),
            flags=list(self._flags),
            capacities=dict(self._config.map_capacities),
            before_maps=str(before.maps) if before else "",
            before_manifest=str(before.manifest) if before else "",
        )

    def _take_over(self, others: Others, manifest: Manifest) -> None:
        """Find out what is to be done when these programs are attached."""
        same_tables = self.pins.ids()
        for other, old in others.found:
            if other.maps != self.pins.maps:
                found = migrate.fates(old.documents, manifest.documents, sets.shared(other.maps, self.pins.maps))
                self._migrations.append(Migration(other.maps, old.maps, self.maps, found))
                self._migrations[-1].prepare()
                if Fate.REFILLED in found.values():
                    continue
            same_tables |= other.ids()
        self.awaits_tables = bool(sets.linked(self._config).keys() - same_tables)
        self._pending = bool(self._migrations) or self._others_in_force()

    def _others_in_force(self) -> bool:
        return bool(sets.linked(self._config).keys() - set(sets.pinned(self.pins.programs).values()))

    def attach(self, waypoint_cgroup: Path) -> None:
        """Link every program to its cgroup, which must exist, and to every namespace; other programs of ours that are in force hand over to these."""
        if not self._pending:
            self._link_all(self.pins.programs, waypoint_cgroup)
            self.in_force = True
            return
        started = time.monotonic()
        carried = added = 0
        bridged = bool(self._migrations) and self._others_in_force() and self.pins.bridge.is_dir()
        if bridged:
            # No old program may delete a row, in the old map, of which others have made a copy in the new one (agent/bpf/bridge.py).
            self._link(self.pins.bridge, _DELETER, self._links_dir / _DELETER.name, self._config.cgroup)
            self._link_all(self.pins.bridge, waypoint_cgroup)
            carried, added = self._empty_the_others()
        else:
            for migration in self._migrations:
                migration.carry(take=False)
        self._link_all(self.pins.programs, waypoint_cgroup)
        if (self._links_dir / _ACCELERATED.name).exists():
            self.accelerate()  # even if nobody wants it any more: the old programs would keep the old maps
        late = self._empty_the_others(carry=not bridged)
        fates = {
            name: fate.value for migration in reversed(self._migrations) for name, fate in migration.fates.items() if fate is not Fate.KEPT
        }
        for migration in self._migrations:
            migration.close()
        self._migrations, self._pending, self.awaits_tables, self.in_force = [], False, False, True
        _log.info(
            "other programs have taken over",
            extra={
                "took_s": round(time.monotonic() - started, 3),
                "rows": carried + late[0],
                "counters": added + late[1],
                "maps": fates,
            },
        )

    def _empty_the_others(self, *, carry: bool = True) -> tuple[int, int]:
        """Take over what other maps hold, which no link's program reads any more; returns numbers of rows and of counters.

        Without `carry` rows are only deleted: the new maps have had them, and may have used them up.
        """
        if self._migrations:
            time.sleep(_SETTLE_S)
        rows = sum(m.carry(take=True) if carry else m.clear() for m in self._migrations)
        return rows, sum(m.add() for m in self._migrations)

    def _link_all(self, programs: Path, waypoint_cgroup: Path) -> None:
        for cookie, path in self._namespaces.items():
            try:
                self._link(programs, _RECEIVER, self._links_dir / f"netns-{cookie}", path)
            except KernelRefused as error:  # it ended a moment ago, or else the old program goes on there: closed to who is new
                _log.error("a namespace keeps the programs that it has", extra={"namespace": str(path), "reason": str(error)})
        targets = {"node": self._config.cgroup, "waypoint": waypoint_cgroup}
        # Those of the waypoint first: it must be able to answer before anything is redirected to it.
        for program in sorted(PROGRAMS, key=lambda p: (p.where != "waypoint", p.name in _LATE)):
            if program.where in targets:
                self._link(programs, program, self._links_dir / program.name, targets[program.where])

    def attach_namespace(self, cookie: int, path: Path) -> None:
        """Link the receiver's check to a network namespace. Doing it again is harmless. While other programs are in force `attach` does it."""
        self._namespaces[cookie] = path
        if not self._pending:
            self._link(self.pins.programs, _RECEIVER, self._links_dir / f"netns-{cookie}", path)

    def detach_namespace(self, cookie: int) -> None:
        """Take the receiver's check off a network namespace, before this returns if the kernel can, else a moment later."""
        self._namespaces.pop(cookie, None)
        for name in (f"netns-{cookie}", f"netns-{cookie}-new"):
            pin = self._links_dir / name
            if not pin.exists():
                continue
            try:
                with files.closing(libbpf.open_pin(pin)) as link:
                    libbpf.link_detach(link)
            except OSError as error:  # no reason to refuse a configuration
                _log.warning("a program goes off a network namespace later than it should", extra={"link": name, "reason": str(error)})
            pin.unlink()

    def detach_namespaces(self, keep: set[int]) -> None:
        """Remove the links of namespaces that are not in `keep`, also those of an earlier run."""
        kept = set(map(str, keep))
        for pin in self._links_dir.glob("netns-*"):
            if pin.name.removeprefix("netns-").removesuffix("-new") not in kept:
                pin.unlink()
        self._namespaces = {cookie: path for cookie, path in self._namespaces.items() if cookie in keep}

    @staticmethod
    def _runs(link: Path, code: int, place: int) -> bool:
        """Have an existing link run a program, if it is attached to that place."""
        with files.closing(libbpf.open_pin(link)) as fd:
            if libbpf.link_target(fd) != os.fstat(place).st_ino:
                return False
            if libbpf.link_program_id(fd) != libbpf.object_id(code):
                libbpf.link_update(fd, code)
            return True

    @staticmethod
    def _link(programs: Path, program: Program, pin: Path, target: Path) -> None:
        """Have `pin` be a link of a program to `target`; whatever it was before stays until the new one is in force."""
        try:
            with (
                files.closing(libbpf.open_pin(programs / program.name)) as code,
                files.closing(os.open(target, os.O_RDONLY | os.O_CLOEXEC)) as place,
            ):
                fresh = pin.with_name(f"{pin.name}-new")
                if not (pin.exists() and DataPath._runs(pin, code, place)):
                    if fresh.exists() and not DataPath._runs(fresh, code, place):  # else an agent was killed before it could rename it
                        fresh.unlink()
                    if not fresh.exists():
                        with files.closing(libbpf.link_create(code, place, program.attach_type)) as link:
                            libbpf.pin(link, fresh)
                    fresh.rename(pin)  # `pin` is free, or a link to something else that may be gone
                fresh.unlink(missing_ok=True)
        except OSError as error:
            raise KernelRefused(f"cannot attach {program.name} to {target}: {error}") from error

    def acceleration_checks(self) -> tuple[acceleration.Check, ...]:
        """What accelerated sockets do on this kernel. Takes a second when it was not asked before; nothing stays."""
        acceleration.attach(self.pins.programs, self.pins.maps)
        cache = self._config.run_dir / "acceleration.json"
        return acceleration.self_test(self.pins.programs, self._config.cgroup, cache, self.pins.programs.name)

    def accelerate(self) -> None:
        """Have in force what acceleration needs: mesh_sk_msg on its map, and mesh_setsockopt, which keeps kernel TLS off accelerated sockets."""
        acceleration.attach(self.pins.programs, self.pins.maps)
        self._link(self.pins.programs, _ACCELERATED, self._links_dir / _ACCELERATED.name, self._config.cgroup)

    def forget_other_versions(self) -> None:
        """Remove pins of programs and maps that nothing of ours uses any more; call it after `attach`. Only this ends a change of versions."""
        sets.sweep_checks(self._config)
        for link in self._links_dir.glob("mesh_*"):
            if link.name.partition("-")[0] not in {program.name for program in PROGRAMS}:
                link.unlink()  # of a program that is no more
        current = {self.pins.maps, self.pins.programs, self._links_dir}
        for directory in self._config.pin_dir.iterdir():
            if directory not in current and directory.name.startswith(("maps-", "programs-")):
                shutil.rmtree(directory, ignore_errors=True)
        for manifest in self._config.run_dir.glob("manifest-*.json"):
            if manifest != self.pins.manifest:
                manifest.unlink()

    def hooks(self) -> list[Hook]:
        """What is in force, asked of the kernel: the effective programs of the cgroups, not what was attached once."""
        found = []
        places = {"node": self._config.cgroup, "waypoint": self._config.waypoint_cgroup}
        for program in HOOKED:
            number = self._pinned_id(self.pins.programs / program.name, libbpf.object_id)
            if program.where == "namespace":
                linked = [
                    self._pinned_id(self._links_dir / f"netns-{c}", libbpf.link_program_id) == number for c in tuple(self._namespaces)
                ]
                found.append(Hook(program.name, all(linked), all(linked)))
                continue
            attached = number is not None and self._pinned_id(self._links_dir / program.name, libbpf.link_program_id) == number
            found.append(Hook(program.name, attached, number in _effective(places[program.where], program.attach_type)))
        return found

    def lacking(self, cgroup: Path) -> list[str]:
        """Programs that the kernel does not run for the processes of `cgroup`, although they are to run for every process below the agent's cgroup."""
        return [p.name for p in PROGRAMS if p.where == "node" and self._own_id(p.name) not in _effective(cgroup, p.attach_type)]

    def receives(self, namespace: Path) -> bool:
        """True if the kernel runs the receiver's check for what arrives in a network namespace."""
        try:
            with files.closing(os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)) as fd:
                return self._own_id(_RECEIVER.name) in libbpf.namespace_programs(fd, _RECEIVER.attach_type)
        except OSError:
            return False

    def foreign(self, cgroups: Iterable[Path]) -> list[Foreign]:
        """Other people's programs at the hooks that ours use, each once, with the first of `cgroups` in which it runs."""
        own = {self._own_id(p.name) for p in PROGRAMS}
        found: dict[tuple[int, str], Foreign] = {}
        for cgroup in cgroups:
            for attach_type in sorted({p.attach_type for p in PROGRAMS if p.where in {"node", "waypoint"}}):
                for number in _effective(cgroup, attach_type):
                    if number not in own and (number, attach_type) not in found:
                        found[number, attach_type] = Foreign(number, libbpf.program_name(number), attach_type, str(cgroup))
        return list(found.values())

    def _own_id(self, program: str) -> int | None:
        """Kernel id of a program of ours; the pins do not change while the agent runs."""
        if program not in self._ids:
            self._ids[program] = self._pinned_id(self.pins.programs / program, libbpf.object_id)
        return self._ids[program]

    @staticmethod
    def _pinned_id(pin: Path, read: Callable[[int], int]) -> int | None:
        try:
            with files.closing(libbpf.open_pin(pin)) as fd:
                return read(fd)
        except OSError:
            return None

    def counters(self) -> dict[str, int]:
        """Sums over CPUs of mesh_counter, by lower-case name."""
        table = self.maps["mesh_counter"]
        found = {}
        for counter in Counter:
            if counter is not Counter.MAX:
                values = table.get(table.layout.key.pack(**{"": counter.value})) or []
                found[counter.name.lower()] = sum(table.layout.value.unpack(v)[""] for v in values)
        return found

    def configure(self, *, waypoint_cgroup_id: int, tracing: int) -> None:
        """Write mesh_config."""
        table = self.maps["mesh_config"]
        key = table.layout.key.pack(**{"": 0})
        table.put(key, table.layout.value.pack(waypoint_cgroup=waypoint_cgroup_id, tracing=tracing))

    def recognise_kubelet(self, found: Kubelet, workload: int) -> None:
        """Have the programs take the calls of what was found for probes, counted under the number `workload`; nobody's, if it has no cgroup."""
        table = self.maps["mesh_kubelet"]
        process = KUBELET_ANY if found.process == ANY else found.process
        key = table.layout.key.pack(**{"": 0})
        row = table.layout.value.pack(process=process, workload=workload, cgroup=found.cgroup, netns_cookie=found.netns_cookie)
        if table.get(key) != [row]:
            table.put(key, bytes(table.layout.value.size))  # a program may be reading: never half of one kubelet and half of another
            table.put(key, row)


async def run_loader(job: source.Job, log: Path) -> None:
    """Have the loader child do a job; its output goes to `log` if it fails. Raises EnvironmentUnfit or KernelRefused with its last words."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agent.bpf.loader", json.dumps(asdict(job)), str(os.getpid())),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await child.communicate()
    if child.returncode:
        lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
        if any("No module named 'bcc'" in line for line in lines):
            raise EnvironmentUnfit(
                "bcc is not installed for this Python: install Debian's python3-bpfcc and use a venv with --system-site-packages"
            )
        await asyncio.to_thread(log.write_bytes, output)
        words = lines[-1] if lines else "the loader ended without a word"
        raise KernelRefused(f"{words}; all that it said is in {log}")


def _effective(cgroup: Path, attach_type: str) -> list[int]:
    try:
        with files.closing(os.open(cgroup, os.O_RDONLY | os.O_CLOEXEC)) as fd:
            return libbpf.effective_programs(fd, attach_type)
    except OSError:
        return []
