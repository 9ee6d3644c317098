"""C for the time in which links change over to programs with other maps: programs that find in the old map what is not yet in the new one.

Two hooks cannot be switched at one moment, and a row that one hook has written into the old map is read by the other some microseconds later: mesh_sockops
says who calls, mesh_sk_lookup wants to know it. Programs of this third set, made from the same source, write both maps, delete in both, and copy what they
miss in the new one: the next hook of the same connection may run an old program or a new one. An old program that deletes does so in the old map only, so
`DataPath.attach` switches the one that does, mesh_sockops, before any that copies; and it empties the old maps when no link runs an old program.
Used by the loader child.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Any

from agent.bpf.migrate import SK_STORAGE, Fate, same_key

SUFFIX = "_before"
_KINDS = {1: "hash", 9: "lru_hash", SK_STORAGE: "sk_storage"}
_INTEGERS = {"B": ("__u8", 1), "H": ("__u16", 2), "I": ("__u32", 4), "Q": ("__u64", 8)}
_MAPS = '#line 1 "mesh_maps.h"'

_FIND_ROW = """\
static __always_inline {value} *{name}_find({key} *key)
{{
	{value} fresh, *found = {name}.lookup(key);
	struct {name}_before *before;

	if (found)
		return found;
	before = {name}_before.lookup(key);
	if (!before)
		return {name}.lookup(key); /* taken over between the two looks, or none at all */
	__builtin_memset(&fresh, 0, sizeof(fresh));
{copies}
	{name}.insert(key, &fresh);
	return {name}.lookup(key);
}}
static __always_inline int {name}_drop({key} *key)
{{
	{name}_before.delete(key);
	return {name}.delete(key);
}}
"""
_PUT = """\
static __always_inline int {name}_put({key} *key, {value} *row)
{{
	struct {name}_before before;

	__builtin_memset(&before, 0, sizeof(before));
{back}
	{name}_before.update(key, &before);
	return {name}.update(key, row);
}}
"""
_FIND_STORAGE = """\
static __always_inline {value} *{name}_find(struct bpf_sock *sk)
{{
	{value} *found = {name}.sk_storage_get(sk, 0, 0);
	struct {name}_before *before;

	if (found)
		return found;
	before = {name}_before.sk_storage_get(sk, 0, 0);
	if (!before)
		return NULL;
	found = {name}.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!found)
		return NULL;
	__builtin_memset(found, 0, sizeof(*found));
{copies}
	return found;
}}
static __always_inline void {name}_drop(struct bpf_sock *sk)
{{
	{name}_before.sk_storage_delete(sk);
	{name}.sk_storage_delete(sk);
}}
"""


def bridged(fates: Mapping[str, Fate], old: Mapping[str, Any], new: Mapping[str, Any], records: Mapping[str, Any]) -> list[str]:
    """The maps whose old rows programs can find: those of connections, as long as keys stay what they are."""
    return [
        name
        for name, fate in fates.items()
        if (fate is Fate.CARRIED or (fate is Fate.ANEW and new[name]["kind"] == SK_STORAGE and name != "mesh_joined"))
        and name in records
        and old[name]["value_size"]
        and old[name]["kind"] in _KINDS
        and old[name]["kind"] == new[name]["kind"]
        and same_key(old[name], new[name])
    ]


def weave(text: str, names: list[str], old: Mapping[str, Any], new: Mapping[str, Any], records: Mapping[str, tuple[str, str, str]]) -> str:
    """The text of the programs with functions for `names` in place of plain access. The old maps are expected as pins NAME_before."""
    start = text.index("\n#line ", text.index(_MAPS) + len(_MAPS))
    declarations, programs = text[:start], text[start:]
    added = []
    for name in names:
        _, key, value = records[name]
        storage = new[name]["kind"] == SK_STORAGE
        added += [_struct(name, old[name]), _map(name, key, old[name])]
        template, target = (_FIND_STORAGE, "found->") if storage else (_FIND_ROW, "fresh.")
        copies = _copies(old[name]["value"], new[name]["value"], target, "before->", "NULL")
        added.append(template.format(name=name, key=key, value=value, copies="\n".join(f"\t{line}" for line in copies)))
        if storage:
            programs = re.sub(rf"\b{name}\.sk_storage_get\((\w+), 0, 0\)", rf"{name}_find(\1)", programs)
            programs = programs.replace(f"{name}.sk_storage_delete(", f"{name}_drop(")
        else:
            programs, written = re.subn(rf"\b{name}\.update\(", f"{name}_put(", programs)
            if written:
                back = _copies(new[name]["value"], old[name]["value"], "before.", "row->", f"{name}.update(key, row)")
                added.append(_PUT.format(name=name, key=key, value=value, back="\n".join(f"\t{line}" for line in back)))
            programs = re.sub(rf"\b{name}\.lookup\(", f"{name}_find(", programs)
            programs = re.sub(rf"\b{name}\.delete\(", f"{name}_drop(", programs)
    return "\n".join([declarations, '#line 1 "bridge"', *added]) + programs


def _parts(form: str) -> tuple[str, int, int]:
    """C type, bytes of an item and number of items of a member; bytes are words if they can be."""
    if form.endswith("s"):
        size = struct.calcsize(f"={form}")
        return ("__u32", 4, size // 4) if size % 4 == 0 else ("__u8", 1, size)
    kind, size = _INTEGERS[form[-1]]
    return kind, size, int(form[:-1] or 1)


def _struct(name: str, document: Mapping[str, Any]) -> str:
    lines, end = [], 0
    for member, offset, form in document["value"]:
        if offset > end:
            lines.append(f"\t__u8 hole{offset}[{offset - end}];")
        kind, size, count = _parts(form)
        lines.append(f"\t{kind} {member or 'value'}{f'[{count}]' if form[:-1] else ''};")
        end = offset + size * count
    if document["value_size"] > end:
        lines.append(f"\t__u8 hole{end}[{document['value_size'] - end}];")
    body = "\n".join(lines)
    check = f'_Static_assert(sizeof(struct {name}{SUFFIX}) == {document["value_size"]}, "the old record");'
    return f"struct {name}{SUFFIX} {{\n{body}\n}};\n{check}"


def _map(name: str, key: str, document: Mapping[str, Any]) -> str:
    kind, rows, flags = _KINDS[document["kind"]], document["capacity"], document["flags"]
    return f'MESH_MAP("{kind}", {key}, struct {name}{SUFFIX}, {name}{SUFFIX}, {rows}, {flags});'


def _copies(old: list[Any], new: list[Any], target: str, origin: str, unfit: str) -> list[str]:
    """Statements that fill the record `target` from `origin`, of another layout; a number that does not fit ends it with `unfit`."""
    before = {name: form for name, _, form in old}
    lines = []
    for name, _, form in new:
        if name not in before or form.endswith("s") != before[name].endswith("s"):
            continue
        place = f"{target}{name}" if name else target.rstrip(".")
        source = f"{origin}{name or 'value'}"
        if form.endswith("s"):
            size = min(struct.calcsize(f"={form}"), struct.calcsize(f"={before[name]}"))
            lines.append(f"__builtin_memcpy(&{place}, &{source}, {size});")
            continue
        (_, size, count), (_, old_size, old_count) = _parts(form), _parts(before[name])
        for index in range(min(count, old_count)):
            to = f"{place}[{index}]" if form[:-1] else place
            value = f"{source}[{index}]" if before[name][:-1] else source
            lines.append(f"{to} = {value};")
            if size < old_size:
                lines += [f"if ({to} != {value})", f"\treturn {unfit};"]
    return lines
