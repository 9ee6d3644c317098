"""What is to be said about an object: its `status`, as `meshagent get` shows it and as an API server is given it. Pure."""

from __future__ import annotations

from typing import Any

from controller.compile import Compiled
from controller.objects import Key
from controller.source import State


def of(state: State, compiled: Compiled, key: Key) -> dict[str, Any]:
    """Return `conditions`, and what else stands in the status of its kind."""
    conditions = [condition.json() for condition in compiled.conditions.get(key, ())]
    if key in state.refused:
        reasons = "; ".join(str(problem) for problem in state.refused[key])
        conditions = [condition for condition in conditions if condition["type"] != "Accepted"]
        kept = "the last good version stays in force: " if key in state.objects else ""
        conditions.insert(0, {"type": "Accepted", "status": "False", "reason": "Invalid", "message": kept + reasons})
    return {"conditions": conditions, **compiled.status.get(key, {})}
