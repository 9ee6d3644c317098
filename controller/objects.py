"""A validated resource and its key. Made by `controller.schema`, read by everything behind it; immutable by agreement (never edit `data`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from controller.documents import Path, nearest_line, path_text
from controller.errors import Problem

T = TypeVar("T")
MODE_LABEL = "meshagent.io/mode"
WAYPOINT_ANNOTATION = "meshagent.io/waypoint"
BALANCING_ANNOTATION = "meshagent.io/load-balancing"
FAIL_MODE_ANNOTATION = "meshagent.io/fail-mode"
EGRESS_ANNOTATION = "meshagent.io/egress"
ACCELERATION_LABEL = "meshagent.io/acceleration"
DEFAULT_POLICY_LABEL = "meshagent.io/default-policy"
CALLER_MATCH_GROUP = "meshagent.io"
DRY_RUN_ANNOTATION = "meshagent.io/dry-run"
ZONE_LABEL = "topology.kubernetes.io/zone"
ROOT_NAMESPACE = "meshagent-system"
"""A PeerAuthentication for the whole of this namespace is one for the whole mesh."""
WORKLOADS = frozenset({"Workload", "Pod"})
"""Kinds whose objects send and receive traffic: `spec` of a Pod has the shape of a Workload's (`controller.kubernetes.shapes`)."""
HTTP_FIELDS = frozenset({"methods", "notMethods", "paths", "notPaths", "hosts", "notHosts"})
"""Fields of an AuthorizationPolicy's operation that only a request can answer."""
HTTP_SOURCE_FIELDS = frozenset({"requestPrincipals", "notRequestPrincipals"})
"""The same of its source."""


class Key(NamedTuple):
    """What identifies an object; `namespace` is empty for kinds that have none."""

    kind: str
    namespace: str
    name: str

    @property
    def qualified(self) -> str:
        """NAMESPACE/NAME, as the workload model spells it."""
        return f"{self.namespace}/{self.name}" if self.namespace else self.name

    def __str__(self) -> str:
        return f"{self.kind} {self.qualified}"


@dataclass(frozen=True, slots=True)
class Object:
    """One resource that obeys its schema. `lines` keeps only the paths that checks between objects report."""

    key: Key
    data: Mapping[str, Any]
    file: str
    line: int
    lines: Mapping[Path, int] = field(default_factory=dict)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The `metadata` mapping."""
        found: Mapping[str, Any] = self.data["metadata"]
        return found

    @property
    def spec(self) -> Mapping[str, Any]:
        """The `spec` mapping, empty if there is none."""
        return self.data.get("spec") or {}

    @property
    def labels(self) -> Mapping[str, str]:
        """The object's labels."""
        return self.metadata.get("labels") or {}

    @property
    def annotations(self) -> Mapping[str, str]:
        """The object's annotations."""
        return self.metadata.get("annotations") or {}

    def problem(self, path: Path, message: str) -> Problem:
        """Make the report of something wrong at `path` of this object."""
        return Problem(self.file, nearest_line(self.lines, path, self.line), message, self.key.kind, self.key.name, path_text(path))


def differing(before: Mapping[Key, T], after: Mapping[Key, T]) -> list[Key]:
    """Return the keys of what is not the same in memory."""
    return [*(key for key, item in after.items() if before.get(key) is not item), *(key for key in before if key not in after)]


def is_namespace_wide(spec: Mapping[str, Any]) -> bool:
    """True if neither targetRefs nor a label chooses among the workloads of the namespace."""
    return "targetRefs" not in spec and not spec.get("selector", {}).get("matchLabels")
