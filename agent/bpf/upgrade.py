"""What would happen if an agent of this version were started on a node where another one is in force. Attaches nothing, and changes no pin.

Called by `meshagent upgrade-check`. The loader child compiles and loads everything as for a start, below a directory of its own next to the pins in
force, so that the kernel's verifier and its memory limits have been asked. What stays of that: the two directories of the agent, if there were none, and
loader.log if something was refused.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agent import features, files
from agent.bpf import libbpf, migrate, sets, source
from agent.bpf.datapath import run_loader
from agent.bpf.manifest import Manifest, MapLayout
from agent.bpf.maps import Map
from agent.bpf.migrate import SK_STORAGE, Fate, differences, same_key
from agent.bpf.sets import Set
from agent.config import Config
from agent.errors import EnvironmentUnfit, MeshError

SAFE, IMPOSSIBLE, LOSSY = 0, 1, 2
_WORDS = {
    Fate.KEPT: "is used again",
    Fate.REFILLED: "is made anew and filled from the last good configuration before anything changes over",
    Fate.CARRIED: "is made anew; its rows are carried over",
    Fate.ADDED: "is made anew; its counters go on",
    Fate.ANEW: "starts empty",
    Fate.NEW: "did not exist",
}
_LOSSES = {
    "mesh_sock": "live connections go on uncounted: what they have sent is not added when they close, their peers are shown as dialled no more, and a policy"
    " that forbids them later does not close them",
    "mesh_listener": "Envoy will be replaced: open L7 connections end, and new ones are refused until it is ready, about a second",
    "mesh_joined": "accelerated connections go on as they are, uncounted",
}
_UNKEYED = {
    "mesh_flow": "connections whose handshake is under way at that moment can be refused once by a protected receiver on this node",
    "mesh_origdst": "L7 connections whose handshake is under way at that moment can fail once",
}
_ASKED_ONCE = frozenset({"mesh_accepted"})
"""What programs keep on sockets for a moment, and find in another place too (bpf_src/mesh_sockopt.c)."""

_UNKNOWN = (
    "programs are in force whose manifest is missing in {}: counters start at 0, live connections go on uncounted, and connections that are being made can"
    " fail once; is this the --run-dir of the agent that runs?"
)


@dataclass(frozen=True, slots=True)
class MapChange:
    """What becomes of one map, and why."""

    name: str
    fate: str
    words: str
    why: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """The answer. `refusal` is "" if it can be started, else what the compiler, the kernel or a map that is too small has against it."""

    code: int
    in_force: bool
    refusal: str = ""
    programs: Mapping[str, str] = field(default_factory=dict)
    """By name: same, changed, new, gone."""
    maps: tuple[MapChange, ...] = ()
    losses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def check(config: Config) -> Report:
    """Try it. Raises EnvironmentUnfit if this machine could not run an agent at all."""
    features.check(config)
    for place in (config.pin_dir, config.run_dir):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    sets.sweep_checks(config)
    flags = features.compile_flags()
    code = source.read(flags=flags, capacities=config.map_capacities)
    own = Set.of(config, code.programs, code.layout)
    running = sets.linked(config).keys()
    if running and running <= set(sets.pinned(own.programs).values()):
        return Report(SAFE, in_force=True, notes=("these very programs are in force: nothing changes",))
    try:
        others = sets.others(config, own)
    except EnvironmentUnfit as error:
        return Report(IMPOSSIBLE, in_force=True, refusal=str(error))
    before = others.found[0] if others.in_force else None
    scratch = config.pin_dir / f"{sets.SCRATCH}{os.getpid()}"
    scratch.mkdir()
    with tempfile.TemporaryDirectory(prefix="meshagent-check-") as directory:
        tried = Set(scratch / "programs", scratch / "programs-bridge", scratch / "maps", Path(directory) / "manifest.json")
        job = source.Job(
            maps=str(tried.maps),
            programs=str(tried.programs),
            bridge=str(tried.bridge),
            manifest=str(tried.manifest),
            flags=list(flags),
            capacities=dict(config.map_capacities),
            before_maps=str(before[0].maps) if before else "",
            before_manifest=str(before[0].manifest) if before else "",
        )
        try:
            asyncio.run(run_loader(job, config.run_dir / "loader.log"))
            report = _compare(config, before, own, tried) if before else Report(SAFE, in_force=bool(running))
        except MeshError as error:
            return Report(IMPOSSIBLE, bool(running), str(error))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    if others.unknown and report.code != IMPOSSIBLE:
        return replace(report, code=LOSSY, losses=(*report.losses, _UNKNOWN.format(config.run_dir)))
    return report if running else replace(report, notes=("nothing is in force: a start loads everything anew",))


def _compare(config: Config, before: tuple[Set, Manifest], own: Set, tried: Set) -> Report:
    (other, manifest), new = before, Manifest.read(tried.manifest).documents
    old = manifest.documents
    fates = migrate.fates(old, new, sets.shared(other.maps, own.maps) if own.maps.is_dir() else None)
    changes, losses, notes = [], [], []
    for name, fate in sorted(fates.items()):
        why = tuple(differences(old[name], new[name])) if name in old else ()
        changes.append(MapChange(name, fate.value, _WORDS[fate], why))
        if fate in {Fate.CARRIED, Fate.ADDED, Fate.REFILLED}:
            rows, room = _count(other.maps / name, manifest.maps[name]), int(new[name]["capacity"])
            if rows > room and fate is Fate.REFILLED:
                words = f"map {name} would hold at most {room} rows, {rows} are in force: raise it with --map-capacity {name}=N"
                return Report(IMPOSSIBLE, in_force=True, refusal=words)
            if rows > room:
                losses.append(f"{rows - room} rows of {name} do not fit its new capacity of {room}")
        losses += _lost(name, fate, old.get(name), new[name])
    if Fate.REFILLED in fates.values() and not any(config.state_dir.glob("snapshot*")):
        notes.append("there is no last good configuration: the programs in force stay until the controller has sent one")
    if fates.get("mesh_events") is Fate.ANEW:
        notes.append("events that nobody has read yet are dropped")
    programs = _programs(other.programs, tried.programs)
    return Report(
        LOSSY if losses else SAFE, in_force=True, programs=programs, maps=tuple(changes), losses=tuple(losses), notes=tuple(notes)
    )


def _lost(name: str, fate: Fate, old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> list[str]:
    if fate is Fate.ANEW and name in _LOSSES:
        return [_LOSSES[name]]
    if fate is Fate.ANEW and new["kind"] == SK_STORAGE and name not in _ASKED_ONCE:
        return [f"what programs keep on sockets in {name} is forgotten"]
    if fate is Fate.CARRIED and name in _UNKEYED and old is not None and not same_key(old, new):
        return [_UNKEYED[name]]
    return []


def _count(pin: Path, layout: MapLayout) -> int:
    """How many rows a map has that can have more or fewer."""
    table = Map(pin, layout)
    try:
        return table.count() if table.counted else 0
    finally:
        table.close()


def _programs(old: Path, new: Path) -> dict[str, str]:
    before, after = _tags(old), _tags(new)
    found = {name: "new" if name not in before else "same" if before[name] == tag else "changed" for name, tag in after.items()}
    return dict(sorted((found | dict.fromkeys(before.keys() - after.keys(), "gone")).items()))


def _tags(directory: Path) -> dict[str, bytes]:
    found = {}
    for pin in directory.glob("mesh_*"):
        with files.closing(libbpf.open_pin(pin)) as descriptor:
            found[pin.name] = libbpf.program_tag(descriptor)
    return found
