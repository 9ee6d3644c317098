"""Our CustomResourceDefinitions as this version has them, and whether those that an API server serves are the same, older or newer.

What is compared is the schema without its descriptions: an API server gives it back as it got it, but for what is empty. meshapi/definitions.json, which
`make generate` makes from deploy/crds (deploy/definitions.py), has of each version a sum and the names of its fields, so that a difference can be named.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

GROUP: Final = "meshagent.io"
SAME, OLDER, NEWER, OTHER = "same", "older", "newer", "other"
Fields = dict[str, Any]
"""Names of fields, each with those below it; of a list those of its items, of a map under "*"."""


def own() -> dict[str, dict[str, Any]]:
    """By the definition's name: its versions, each with "sum" and "fields"."""
    found: dict[str, dict[str, Any]] = json.loads(importlib.resources.files("meshapi").joinpath("definitions.json").read_bytes())
    return found


def described(definition: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a CustomResourceDefinition, from a file or from an API server; only versions that are served."""
    schemas = {version["name"]: version["schema"]["openAPIV3Schema"] for version in definition["spec"]["versions"] if version["served"]}
    return {name: {"sum": _sum(schema), "fields": _fields(schema)} for name, schema in schemas.items()}


def compare(mine: Mapping[str, Any], served: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Compare one version: (SAME, OLDER, NEWER or OTHER, fields in which they differ). OTHER: each has fields that the other lacks, or other rules."""
    if mine["sum"] == served["sum"]:
        return SAME, []
    lacking, more = list(_missing(mine["fields"], served["fields"])), list(_missing(served["fields"], mine["fields"]))
    if bool(lacking) == bool(more):
        return OTHER, lacking + more
    return (OLDER, lacking) if lacking else (NEWER, more)


def _missing(wanted: Fields, found: Fields, path: str = "") -> Iterator[str]:
    for name, below in wanted.items():
        if name not in found:
            yield f"{path}{name}"
        else:
            yield from _missing(below, found[name], f"{path}{name}.")


def _sum(schema: Any) -> str:
    return hashlib.sha256(json.dumps(_plain(schema), sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {name: _plain(item) for name, item in value.items() if not (name == "description" and isinstance(item, str))}
        return {name: item for name, item in kept.items() if item not in ({}, [])}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _fields(schema: Mapping[str, Any]) -> Fields:
    found = {name: _fields(below) for name, below in schema.get("properties", {}).items()}
    if isinstance(items := schema.get("items"), Mapping):
        found |= _fields(items)
    if isinstance(more := schema.get("additionalProperties"), Mapping):
        found["*"] = _fields(more)
    return found
