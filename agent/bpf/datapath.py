"""The kernel data path of one node: programs loaded and pinned, maps open, links in place.

Owned by the supervisor. Order of a start: `load` (nothing is attached), fill the tables, `attach`. A restart finds pins and links of the same
programs and changes nothing; one with other programs replaces them link by link, atomically. Everything stays when the agent ends.

Other programs with other maps (`agent.bpf.migrate`) take over in this order, each step complete before the next:

1. the new tables are filled; the old programs decide, by the old tables;
2. links change over to the programs that look into old and new maps (`agent.bpf.bridge`), receivers first, then who hands connections over, then
   who decides for callers: whoever reads what another hook writes is switched before that one, so each row is found by whoever looks for it;
3. nobody writes the old maps any more: what is left in them is carried over, and links change to the programs that know the new maps only.

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
from collections import Counter as Tally
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from agent import features, files
from agent.bpf import acceleration, libbpf, source
from agent.bpf.manifest import HOOKED, PROGRAMS, Counter, Manifest, Program
from agent.bpf.maps import Map
from agent.bpf.migrate import Fate, Migration
from agent.config import Config
from agent.errors import EnvironmentUnfit, KernelRefused

_log = logging.getLogger(__name__)

_NAMESPACE_PROGRAM = "mesh_sk_lookup"
_SETTLE_S = 0.2
"""A program that was running when its link changed has ended by then, and a connect() that was between two hooks is past the second: that takes
microseconds, on a machine with too much to do milliseconds."""
_LATE = ("cgroup_udp4_sendmsg", "cgroup_udp6_sendmsg", "cgroup_inet4_connect", "cgroup_inet6_connect")
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


@dataclass(frozen=True, slots=True)
class Predecessor:
    """A complete set of programs and maps that an earlier agent left in force."""

    programs: str
    programs_dir: Path
    maps_dir: Path
    manifest: Path


class DataPath:
    """See the module. Not thread-safe, but `maps` may be read from any thread."""

    def __init__(self, config: Config) -> None:
        """Open nothing yet."""
        self._config = config
        self._flags = features.compile_flags()
        code = source.read(flags=self._flags, capacities=config.map_capacities)
        self.layout, self.programs = code.layout, code.programs
        """Hashes that name the directories of maps and programs."""
        self._maps_dir = config.pin_dir / f"maps-{code.layout}"
        self._programs_dir = config.pin_dir / f"programs-{code.programs}"
        self._bridge_dir = config.pin_dir / f"programs-{code.programs}-bridge"
        self._links_dir = config.pin_dir / "links"
        self._manifest = config.run_dir / f"manifest-{code.programs}.json"
        self._namespaces: dict[int, Path] = {}
        self._pending = False
        self._fates: dict[str, Fate] = {}
        self._migration: Migration | None = None
        self._ids: dict[str, int | None] = {}
        self.maps: dict[str, Map] = {}
        self.loader_s = 0.0
        """How long the loader child took; 0 if the pins of an earlier run served."""

    @property
    def generation(self) -> str:
        """Names the kernel map that holds Envoy's listening sockets: what they are in, and no other map, an Envoy must be started with."""
        return f"listeners-{libbpf.object_id(self.maps['mesh_listener'].fd)}"

    @property
    def awaits_tables(self) -> bool:
        """True if programs are in force whose tables are not the ones that are open here: these must be filled before `attach`."""
        return self._pending and Fate.REFILLED in self._fates.values()

    async def load(self) -> None:
        """Have the programs pinned and the maps open. Raises EnvironmentUnfit or KernelRefused with the loader's own words."""
        before = predecessor(self._config, self.programs)
        if not self._complete(before):
            started = time.monotonic()
            await run_loader(self._job(before), self._config.run_dir / "loader.log")
            self.loader_s = time.monotonic() - started
        manifest = Manifest.read(self._manifest)
        self.maps = {name: Map(self._maps_dir / name, layout) for name, layout in manifest.maps.items()}
        self._links_dir.mkdir(parents=True, exist_ok=True)
        stats = self.maps["mesh_stats"]
        if stats.get(bytes(stats.layout.key.size)) is None:
            stats.put(bytes(stats.layout.key.size), bytes(stats.layout.value.size))
        self._pending = self._others_in_force()
        if self._pending and before is not None and before.maps_dir != self._maps_dir:
            self._fates = {name: Fate(fate) for name, fate in manifest.fates.items()}
            old = Manifest.read(before.manifest, own=False)
            self._migration = Migration(before.maps_dir, old.maps, self.maps, self._fates)
            self._migration.prepare()

    def _complete(self, before: Predecessor | None) -> bool:
        if not (self._manifest.exists() and all((self._programs_dir / p.name).exists() for p in PROGRAMS) and self._maps_dir.is_dir()):
            return False
        return (
            before is None or before.maps_dir == self._maps_dir or json.loads(self._manifest.read_text()).get("before") == before.programs
        )

    def _job(self, before: Predecessor | None) -> source.Job:
        changed = before is not None and before.maps_dir != self._maps_dir
        return source.Job(
            maps=str(self._maps_dir),
            programs=str(self._programs_dir),
            bridge=str(self._bridge_dir),
            manifest=str(self._manifest),
            flags=list(self._flags),
            capacities=dict(self._config.map_capacities),
            before_maps=str(before.maps_dir) if before and changed else "",
            before_manifest=str(before.manifest) if before and changed else "",
        )

    def _others_in_force(self) -> bool:
        own = _ids(self._programs_dir)
        hooked = {program.name for program in HOOKED}
        links = [link for link in self._links_dir.iterdir() if link.name in hooked or link.name.startswith("netns-")]
        return any(self._pinned_id(link, libbpf.link_program_id) not in own for link in links)

    def attach(self, waypoint_cgroup: Path) -> None:
        """Link every program to its cgroup, which must exist, and to every namespace; other programs of ours that are in force hand over to these."""
        if not self._pending:
            self._link_all(self._programs_dir, waypoint_cgroup)
            return
        started = time.monotonic()
        carried = added = 0
        migration, bridged = self._migration, bool(_ids(self._bridge_dir))
        if migration and bridged:
            self._link_all(self._bridge_dir, waypoint_cgroup)
            time.sleep(_SETTLE_S)
            carried, added = migration.carry(take=True), migration.add()
        elif migration:
            migration.carry(take=False)
        self._link_all(self._programs_dir, waypoint_cgroup)
        if migration:
            time.sleep(_SETTLE_S)
            carried, added = carried + migration.carry(take=True), added + migration.add()
            migration.close()
        self._migration, self._pending = None, False
        for link in self._links_dir.glob("mesh_*"):
            if link.name.partition("-")[0] not in {program.name for program in PROGRAMS}:
                link.unlink()  # of a program that is no more
        _log.info(
            "other programs have taken over",
            extra={
                "took_s": round(time.monotonic() - started, 3),
                "rows": carried,
                "counters": added,
                "maps": {name: fate.value for name, fate in self._fates.items() if fate is not Fate.KEPT},
            },
        )

    def _link_all(self, programs: Path, waypoint_cgroup: Path) -> None:
        for cookie, path in self._namespaces.items():
            try:
                self._link(programs, self._namespace_program(), self._links_dir / f"netns-{cookie}", path)
            except KernelRefused as error:  # it ended a moment ago, or else the old program goes on there: closed to who is new
                _log.error("a namespace keeps the programs that it has", extra={"namespace": str(path), "reason": str(error)})
        targets = {"node": self._config.cgroup, "waypoint": waypoint_cgroup}
        # Those of the waypoint first: it must be able to answer before anything is redirected to it.
        for program in sorted(PROGRAMS, key=lambda p: (p.where != "waypoint", p.attach_type in _LATE)):
            if program.where in targets:
                self._link(programs, program, self._links_dir / program.name, targets[program.where])

    def attach_namespace(self, cookie: int, path: Path) -> None:
        """Link the receiver's check to a network namespace. Doing it again is harmless. While other programs are in force `attach` does it."""
        self._namespaces[cookie] = path
        if not self._pending:
            self._link(self._programs_dir, self._namespace_program(), self._links_dir / f"netns-{cookie}", path)

    @staticmethod
    def _namespace_program() -> Program:
        return next(p for p in PROGRAMS if p.name == _NAMESPACE_PROGRAM)

    def detach_namespaces(self, keep: set[int]) -> None:
        """Remove the links of namespaces that are not in `keep`, also those of an earlier run."""
        kept = set(map(str, keep))
        for pin in self._links_dir.glob("netns-*"):
            if pin.name.removeprefix("netns-").removesuffix("-new") not in kept:
                pin.unlink()
        self._namespaces = {cookie: path for cookie, path in self._namespaces.items() if cookie in keep}

    @staticmethod
    def _link(programs: Path, program: Program, pin: Path, target: Path) -> None:
        """Have `pin` be a link of a program to `target`; whatever it was before stays until the new one is in force."""
        try:
            with (
                files.closing(libbpf.open_pin(programs / program.name)) as code,
                files.closing(os.open(target, os.O_RDONLY | os.O_CLOEXEC)) as place,
            ):
                if pin.exists():
                    with files.closing(libbpf.open_pin(pin)) as link:
                        if libbpf.link_target(link) == os.fstat(place).st_ino:
                            if libbpf.link_program_id(link) != libbpf.object_id(code):
                                libbpf.link_update(link, code)
                            return
                fresh = pin.with_name(f"{pin.name}-new")  # `pin` is free, or a link to something else that may be gone
                fresh.unlink(missing_ok=True)
                with files.closing(libbpf.link_create(code, place, program.attach_type)) as link:
                    libbpf.pin(link, fresh)
                pin.unlink(missing_ok=True)
                fresh.rename(pin)
        except OSError as error:
            raise KernelRefused(f"cannot attach {program.name} to {target}: {error}") from error

    def acceleration_checks(self) -> tuple[acceleration.Check, ...]:
        """What accelerated sockets do on this kernel. Takes a second when it was not asked before; nothing stays."""
        acceleration.attach(self._programs_dir, self._maps_dir)
        cache = self._config.run_dir / "acceleration.json"
        return acceleration.self_test(self._programs_dir, self._config.cgroup, cache, self._programs_dir.name)

    def accelerate(self) -> None:
        """Have in force what acceleration needs: mesh_sk_msg on its map, and mesh_setsockopt, which keeps kernel TLS off accelerated sockets."""
        acceleration.attach(self._programs_dir, self._maps_dir)
        program = next(p for p in PROGRAMS if p.where == "accelerated")
        self._link(self._programs_dir, program, self._links_dir / program.name, self._config.cgroup)

    def forget_other_versions(self) -> None:
        """Remove pins of programs and maps that nothing of ours uses any more; call it after `attach`."""
        current = {self._maps_dir, self._programs_dir, self._links_dir}
        for directory in self._config.pin_dir.iterdir():
            if directory not in current and directory.name.startswith(("maps-", "programs-")):
                shutil.rmtree(directory, ignore_errors=True)
        for manifest in self._config.run_dir.glob("manifest-*.json"):
            if manifest != self._manifest:
                manifest.unlink()

    def hooks(self) -> list[Hook]:
        """What is in force, asked of the kernel: the effective programs of the cgroups, not what was attached once."""
        found = []
        places = {"node": self._config.cgroup, "waypoint": self._config.waypoint_cgroup}
        for program in HOOKED:
            number = self._pinned_id(self._programs_dir / program.name, libbpf.object_id)
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
        program = next(p for p in PROGRAMS if p.name == _NAMESPACE_PROGRAM)
        try:
            with files.closing(os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)) as fd:
                return self._own_id(program.name) in libbpf.namespace_programs(fd, program.attach_type)
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
            self._ids[program] = self._pinned_id(self._programs_dir / program, libbpf.object_id)
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


def predecessor(config: Config, programs: str) -> Predecessor | None:
    """The set whose programs most links run now, if it is not the one of hash `programs`; None if nothing of ours is in force, or that set already."""
    running = Tally(DataPath._pinned_id(link, libbpf.link_program_id) for link in config.pin_dir.glob("links/*"))  # noqa: SLF001
    best: Predecessor | None = None
    most = 0
    for manifest in config.run_dir.glob("manifest-*.json"):
        try:
            document = json.loads(manifest.read_text())
            found = Predecessor(
                document["programs"],
                config.pin_dir / f"programs-{document['programs']}",
                config.pin_dir / f"maps-{document['layout']}",
                manifest,
            )
        except (ValueError, KeyError, TypeError):
            continue  # half of one, from an agent that was killed
        if found.programs == programs or not found.maps_dir.is_dir():
            continue
        links = sum(running[number] for number in _ids(found.programs_dir))
        if links > most or (best is None and any(_ids(config.pin_dir / f"programs-{programs}-bridge") & running.keys())):
            best, most = found, links
    return best


async def run_loader(job: source.Job, log: Path) -> None:
    """Have the loader child do a job; its output goes to `log` if it fails. Raises EnvironmentUnfit or KernelRefused with its last words."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agent.bpf.loader", json.dumps(asdict(job))),
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
        raise KernelRefused(f"{words}; all of it is in {log}; does this kernel allow BPF (CONFIG_CGROUP_BPF, no lockdown)?")


def _ids(directory: Path) -> set[int]:
    """Kernel ids of the programs pinned in a directory; empty if there is none."""
    found = set()
    for pin in directory.glob("mesh_*"):
        with files.closing(libbpf.open_pin(pin)) as fd:
            found.add(libbpf.object_id(fd))
    return found


def _effective(cgroup: Path, attach_type: str) -> list[int]:
    try:
        with files.closing(os.open(cgroup, os.O_RDONLY | os.O_CLOEXEC)) as fd:
            return libbpf.effective_programs(fd, attach_type)
    except OSError:
        return []
