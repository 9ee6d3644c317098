"""The kernel data path of one node: programs loaded and pinned, maps open, links in place.

Owned by the supervisor. Order of a start: `load` (nothing is attached), fill the tables, `attach`. A restart finds pins and links of the same
programs and changes nothing; one with other programs replaces them link by link, atomically. Everything stays when the agent ends.

Below the pin directory: maps-LAYOUT/, programs-HASH/, links/NAME and links/netns-COOKIE.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent import features
from agent.bpf import acceleration, libbpf, source
from agent.bpf.manifest import HOOKED, PROGRAMS, Counter, Manifest, Program
from agent.bpf.maps import Map
from agent.config import Config
from agent.errors import EnvironmentUnfit, KernelRefused

_NAMESPACE_PROGRAM = "mesh_sk_lookup"


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
        code = source.read(flags=self._flags)
        self.layout = code.layout
        """Names the maps: they are others when this is."""
        self._maps_dir = config.pin_dir / f"maps-{code.layout}"
        self._programs_dir = config.pin_dir / f"programs-{code.programs}"
        self._links_dir = config.pin_dir / "links"
        self._manifest = config.run_dir / f"manifest-{code.programs}.json"
        self._namespaces: set[int] = set()
        self._ids: dict[str, int | None] = {}
        self.maps: dict[str, Map] = {}
        self.loader_s = 0.0
        """How long the loader child took; 0 if the pins of an earlier run served."""

    async def load(self) -> None:
        """Have the programs pinned and the maps open. Raises EnvironmentUnfit or KernelRefused with the loader's own words."""
        if not self._complete():
            started = time.monotonic()
            await self._run_loader()
            self.loader_s = time.monotonic() - started
        manifest = Manifest.read(self._manifest)
        self.maps = {name: Map(self._maps_dir / name, layout) for name, layout in manifest.maps.items()}
        self._links_dir.mkdir(parents=True, exist_ok=True)
        self.maps["mesh_stats"].put(bytes(self.maps["mesh_stats"].layout.key.size), bytes(self.maps["mesh_stats"].layout.value.size))

    def _complete(self) -> bool:
        return self._manifest.exists() and all((self._programs_dir / p.name).exists() for p in PROGRAMS) and self._maps_dir.is_dir()

    async def _run_loader(self) -> None:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "agent.bpf.loader"),
            *(str(self._maps_dir), str(self._programs_dir), str(self._manifest), *self._flags),
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
            log = self._config.run_dir / "loader.log"
            log.write_bytes(output)
            words = lines[-1] if lines else "the loader ended without a word"
            raise KernelRefused(f"{words}; all of it is in {log}; does this kernel allow BPF (CONFIG_CGROUP_BPF, no lockdown)?")

    def attach(self, waypoint_cgroup: Path) -> None:
        """Link every cgroup program; `waypoint_cgroup` must exist."""
        targets = {"node": self._config.cgroup, "waypoint": waypoint_cgroup}
        # Those of the waypoint first: it must be able to answer before anything is redirected to it.
        for program in sorted(PROGRAMS, key=lambda p: p.where != "waypoint"):
            if program.where in targets:
                self._link(program, self._links_dir / program.name, targets[program.where])

    def attach_namespace(self, cookie: int, path: Path) -> None:
        """Link the receiver's check to a network namespace. Doing it again is harmless."""
        program = next(p for p in PROGRAMS if p.name == _NAMESPACE_PROGRAM)
        self._link(program, self._links_dir / f"netns-{cookie}", path)
        self._namespaces.add(cookie)

    def detach_namespaces(self, keep: set[int]) -> None:
        """Remove the links of namespaces that are not in `keep`, also those of an earlier run."""
        kept = set(map(str, keep))
        for pin in self._links_dir.glob("netns-*"):
            if pin.name.removeprefix("netns-").removesuffix("-new") not in kept:
                pin.unlink()
        self._namespaces &= keep

    def _link(self, program: Program, pin: Path, target: Path) -> None:
        """Have `pin` be a link of the current program to `target`; whatever it was before stays until the new one is in force."""
        try:
            with _fd(libbpf.open_pin(self._programs_dir / program.name)) as code, _fd(os.open(target, os.O_RDONLY | os.O_CLOEXEC)) as place:
                if pin.exists():
                    with _fd(libbpf.open_pin(pin)) as link:
                        if libbpf.link_target(link) == os.fstat(place).st_ino:
                            if libbpf.link_program_id(link) != libbpf.program_id(code):
                                libbpf.link_update(link, code)
                            return
                fresh = pin.with_name(f"{pin.name}-new")  # `pin` is free, or a link to something else that may be gone
                fresh.unlink(missing_ok=True)
                with _fd(libbpf.link_create(code, place, program.attach_type)) as link:
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
        self._link(program, self._links_dir / program.name, self._config.cgroup)

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
            number = self._pinned_id(self._programs_dir / program.name, libbpf.program_id)
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
            with _fd(os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)) as fd:
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
            self._ids[program] = self._pinned_id(self._programs_dir / program, libbpf.program_id)
        return self._ids[program]

    @staticmethod
    def _pinned_id(pin: Path, read: Callable[[int], int]) -> int | None:
        try:
            with _fd(libbpf.open_pin(pin)) as fd:
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


def _effective(cgroup: Path, attach_type: str) -> list[int]:
    try:
        with _fd(os.open(cgroup, os.O_RDONLY | os.O_CLOEXEC)) as fd:
            return libbpf.effective_programs(fd, attach_type)
    except OSError:
        return []


@contextlib.contextmanager
def _fd(number: int) -> Iterator[int]:
    try:
        yield number
    finally:
        os.close(number)
