"""A kind's CustomResourceDefinition: is it there, and is it the one by which objects were read? Asked by `controller.kubernetes.reflector`.

Whoever deletes a definition deletes all objects of its kind, one by one, as if each was meant. The definition is marked (deletionTimestamp) before the first of
them goes (https://kubernetes.io/docs/concepts/overview/working-with-objects/finalizers/), so to look at it when an object has gone tells the two apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from controller.errors import Problem
from controller.kubernetes.api import Api, ApiError
from controller.kubernetes.shapes import ORIGIN, Kind

PATH: Final = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
GOING: Final = ""
"""In place of a UID: there is no definition, or it is being deleted."""


class _Meta(msgspec.Struct):
    uid: str
    deleted: str | None = msgspec.field(name="deletionTimestamp", default=None)


class _Definition(msgspec.Struct):
    metadata: _Meta


_decoder = msgspec.json.Decoder(_Definition)


class Definition:
    """See the module. `used` is the UID of the one by which everything that is known was read; "" before there was one."""

    def __init__(self, api: Api, kind: Kind, changed: Callable[[], None]) -> None:
        """`changed` is called after every change of `problem`."""
        self._api, self._kind, self._changed = api, kind, changed
        self.used = ""
        self.problem: Problem | None = None
        """Why nobody would notice that it is deleted."""

    async def uid(self) -> str | None:
        """Return its UID now, or GOING; None if the kind has none, or nobody says. Raises what a request raises."""
        if not self._kind.definition:
            return None
        try:
            found = _decoder.decode(await self._api.get(f"{PATH}/{self._kind.definition}", {})).metadata
        except ApiError as error:
            if error.code == 404:
                self._tell("")
                return GOING
            if error.code != 403:
                raise
            self._tell(
                f"the controller may not look at its CustomResourceDefinition ({error}): if that is deleted, all of it that is in force goes out of force; "
                f"let it get {self._kind.definition}, as the chart's ClusterRole does"
            )
            return None
        self._tell("")
        return GOING if found.deleted is not None else found.uid

    def differs(self, uid: str | None) -> bool:
        """Is this another one than the one that is used, or none?"""
        return uid == GOING or (uid is not None and self.used not in {"", uid})

    def _tell(self, message: str) -> None:
        problem = Problem(ORIGIN, 0, message, self._kind.kind, self._kind.name) if message else None
        if problem != self.problem:
            self.problem = problem
            self._changed()
