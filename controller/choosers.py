"""Which objects choose a workload by its labels: Services and policies with a selector, found from the workload's side. Used by `controller.compile`; pure.

A workload is looked at by itself, so one that is new is not compared with every selector, and a policy that is new not with every workload.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from controller.objects import Object

_Slot = tuple[str, str, str]
"""Namespace, name and value of a label; two empty strings: any labels."""


class Choice(NamedTuple):
    """`chooser` wants all of `labels`, in `namespace`; "": in all of them."""

    chooser: Object
    namespace: str
    labels: Mapping[str, str]


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Are these among the labels?"""
    return all(labels.get(name) == value for name, value in selector.items())


class Choosers:
    """See the module."""

    def __init__(self, choices: Iterable[Choice]) -> None:
        """Each choice stands under the label of its own that the fewest others want: what all of a namespace want finds nobody."""
        choices = list(choices)
        wanted = Counter((one.namespace, *label) for one in choices for label in one.labels.items())
        self._at: dict[_Slot, list[Choice]] = defaultdict(list)
        for one in choices:
            slots: list[_Slot] = [(one.namespace, *label) for label in one.labels.items()]
            self._at[min(slots, key=lambda slot: wanted[slot], default=(one.namespace, "", ""))].append(one)

    def of(self, workload: Object) -> Iterator[Object]:
        """Yield what chooses a workload."""
        labels, namespace = workload.labels, workload.key.namespace
        for slot in (("", "", ""), (namespace, "", ""), *((namespace, *label) for label in labels.items())):
            for one in self._at.get(slot, ()):
                if selects(one.labels, labels):
                    yield one.chooser
