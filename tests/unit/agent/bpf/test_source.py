"""The C source and what Python says of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from agent.bpf import manifest, shim, source
from agent.errors import LayoutMismatch


def test_every_enum_in_python_is_the_one_in_c() -> None:
    enums = source.read().enums
    for name, (prefix, kind) in manifest._ENUMS.items():
        assert {m.name: m.value for m in kind} == {k.removeprefix(prefix): v for k, v in enums[name].items()}


def test_the_flattened_text_has_no_own_include_left() -> None:
    text = source.read().text
    assert '#include "mesh_' not in text
    assert '#line 1 "mesh_connect.c"' in text


def test_a_changed_layout_gets_other_pin_directories_and_a_changed_program_only_its_own(tmp_path: Path) -> None:
    before = source.read()
    shutil.copytree(source.BPF_SRC, tmp_path / "src")
    program = tmp_path / "src/mesh_connect.c"
    program.write_text(program.read_text() + "\n/* changed */\n")
    other_program = source.read(tmp_path / "src")
    assert (other_program.layout, other_program.programs != before.programs) == (before.layout, True)
    types = tmp_path / "src/mesh_types.h"
    types.write_text(types.read_text().replace("__u32 rule;", "__u64 rule;", 1))
    assert source.read(tmp_path / "src").layout != before.layout


def test_compiler_flags_change_the_programs() -> None:
    assert source.read(flags=("-DMESH_HAVE_SET_RETVAL",)).programs != source.read().programs


def test_no_program_includes_kernel_internal_headers() -> None:
    for file in source.BPF_SRC.iterdir():
        for line in file.read_text().splitlines():
            if line.startswith("#include <"):
                header = line.split("<")[1].split(">")[0]
                assert (Path("/usr/include") / header).exists(), f"{file.name}: {header} is no UAPI header"


def test_the_shim_tree_hides_the_bpf_header_that_bcc_brings(tmp_path: Path) -> None:
    shim.build(tmp_path)
    assert (tmp_path / "include/uapi/linux/bpf.h").read_text() == ""
    assert (tmp_path / "include/uapi/linux/in.h").is_symlink()


def test_a_manifest_of_other_programs_is_refused(tmp_path: Path) -> None:
    enums = source.read().enums
    enums["mesh_verdict"]["MESH_VERDICT_DENY"] = 9
    (tmp_path / "m.json").write_text(json.dumps({"layout": "a", "programs": "b", "enums": enums, "maps": {}}))
    with pytest.raises(LayoutMismatch, match="mesh_verdict"):
        manifest.Manifest.read(tmp_path / "m.json")


def test_a_codec_places_members_where_the_compiler_did() -> None:
    codec = manifest.Codec([["a", 0, "B"], ["b", 4, "I"], ["c", 8, "2Q"], ["d", 24, "4s"]], 32)
    record = codec.pack(a=1, b=2, c=(3, 4), d=b"\x0a\0\0\1")
    assert record == b"\1\0\0\0\2\0\0\0" + (3).to_bytes(8, "little") + (4).to_bytes(8, "little") + b"\x0a\0\0\1" + bytes(4)
    assert codec.unpack(record) == {"a": 1, "b": 2, "c": (3, 4), "d": b"\x0a\0\0\1"}
    with pytest.raises(KeyError):
        codec.pack(nonsense=1)
    with pytest.raises(LayoutMismatch, match="31 bytes"):
        codec.unpack(record[:31])
