"""What would happen if an agent of this version were started on a node where another one is in force. Attaches nothing, and leaves nothing behind.

Called by `meshagent upgrade-check`. The loader child compiles and loads everything as for a start, below a directory of its own next to the pins in
force, so that the kernel's verifier and its memory limits have been asked.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import features, files
from agent.bpf import libbpf, source
from agent.bpf.datapath import Predecessor, predecessor, run_loader
from agent.bpf.manifest import Codec, MapLayout
from agent.bpf.maps import Map
from agent.bpf.migrate import SK_STORAGE, Fate, differences, same_key
from agent.config import Config
from agent.errors import MeshError

SAFE, IMPOSSIBLE, LOSSY = 0, 1, 2
_SCRATCH = "check-"
_WORDS = {
    Fate.KEPT: "is used again",
    Fate.REFILLED: "is made anew and filled from the last good configuration before anything changes over",
    Fate.CARRIED: "is made anew; its rows are carried over",
    Fate.ADDED: "is made anew; its counters go on",
    Fate.ANEW: "starts empty",
    Fate.NEW: "did not exist",
}
_LOSSES = {
    "mesh_sock": "live connections go on uncounted: what they have sent is not added when they close, and their peers are shown as dialled no more",
    "mesh_listener": "Envoy will be replaced: open L7 connections end, and new ones are refused until it is ready, about a second",
    "mesh_joined": "accelerated connections go on as they are, uncounted",
}
_UNKEYED = {
    "mesh_flow": "connections whose handshake is under way at that moment can be refused once by a protected receiver on this node",
    "mesh_origdst": "L7 connections whose handshake is under way at that moment can fail once",
}


@dataclass(frozen=True, slots=True)
class MapChange:
    """What becomes of one map, and why."""

    name: str
    fate: str
    words: str
    why: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """The answer. `kernel` is "" if the kernel accepts everything, else what it or the compiler says."""

    code: int
    in_force: bool
    kernel: str
    programs: Mapping[str, str]
    """By name: same, changed, new, gone."""
    maps: tuple[MapChange, ...]
    losses: tuple[str, ...]
    notes: tuple[str, ...]


def check(config: Config) -> Report:
    """Try it. Raises EnvironmentUnfit if this machine could not run an agent at all."""
    features.check(config)
    config.pin_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    config.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    _sweep(config.pin_dir)
    flags = features.compile_flags()
    code = source.read(flags=flags, capacities=config.map_capacities)
    before = predecessor(config, code.programs)
    if before is None:
        running = any((config.pin_dir / "links").glob("mesh_*"))
        word = "these very programs are in force: nothing changes" if running else "nothing is in force: a start loads everything anew"
        if running:
            return Report(SAFE, running, "", {}, (), (), (word,))
    scratch = config.pin_dir / f"{_SCRATCH}{os.getpid()}"
    scratch.mkdir()
    with tempfile.TemporaryDirectory(prefix="meshagent-check-") as directory:
        manifest = Path(directory) / "manifest.json"
        try:
            job = source.Job(
                maps=str(scratch / "maps"),
                programs=str(scratch / "programs"),
                bridge=str(scratch / "programs-bridge"),
                manifest=str(manifest),
                flags=list(flags),
                capacities=dict(config.map_capacities),
                before_maps=str(before.maps_dir) if before else "",
                before_manifest=str(before.manifest) if before else "",
            )
            asyncio.run(run_loader(job, config.run_dir / "loader.log"))
        except MeshError as error:
            return Report(IMPOSSIBLE, before is not None, str(error), {}, (), (), ())
        else:
            if before is None:
                return Report(SAFE, False, "", {}, (), (), (word,))
            return _compare(config, before, scratch / "programs", json.loads(manifest.read_text()))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _sweep(pin_dir: Path) -> None:
    """Remove what checks left that were killed."""
    for left in pin_dir.glob(f"{_SCRATCH}*"):
        if not Path(f"/proc/{left.name.removeprefix(_SCRATCH)}").exists():
            shutil.rmtree(left, ignore_errors=True)


def _compare(config: Config, before: Predecessor, programs: Path, new: Mapping[str, Any]) -> Report:
    old = json.loads(before.manifest.read_text())
    fates = {name: Fate(fate) for name, fate in new["fates"].items()}
    changes, losses, notes = [], [], []
    for name, fate in sorted(fates.items()):
        why = tuple(differences(old["maps"][name], new["maps"][name])) if name in old["maps"] else ()
        changes.append(MapChange(name, fate.value, _WORDS[fate], why))
        if fate is Fate.ANEW and name in _LOSSES:
            losses.append(_LOSSES[name])
        if fate is Fate.CARRIED and name in _UNKEYED and not same_key(old["maps"][name], new["maps"][name]):
            losses.append(_UNKEYED[name])
        if fate in {Fate.CARRIED, Fate.ADDED} and (lost := _overflow(before.maps_dir / name, old["maps"][name], new["maps"][name])):
            losses.append(f"{lost} rows of {name} do not fit its new capacity of {new['maps'][name]['capacity']}")
        if fate is Fate.ANEW and new["maps"][name]["kind"] == SK_STORAGE and name not in _LOSSES:
            losses.append(f"what programs keep on sockets in {name} is forgotten")
    if Fate.REFILLED in fates.values() and not any(config.state_dir.glob("snapshot*")):
        notes.append("there is no last good configuration: the programs in force stay until the controller has sent one")
    if fates.get("mesh_events") is Fate.ANEW:
        notes.append("events that nobody has read yet are dropped")
    return Report(
        LOSSY if losses else SAFE, True, "", _programs(before.programs_dir, programs), tuple(changes), tuple(losses), tuple(notes)
    )


def _overflow(pin: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> int:
    """How many rows there are too many for the new map."""
    table = Map(pin, MapLayout(Codec(old["key"], old["key_size"]), Codec(old["value"], old["value_size"])))
    try:
        return max(0, table.count() - int(new["capacity"])) if table.counted else 0
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
