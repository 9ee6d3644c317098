"""about.json: what controllers that share a state must agree on, and `mesh-controller ca` needs to know of them. Only where there are several."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Final

from controller.errors import ControllerError
from controller.identity import fields
from controller.identity.fields import BadState
from controller.store import Documents, Store

FILE: Final = "about.json"
_FIELDS: Final = ("trust_domain", "longest_s")


@dataclass(frozen=True, slots=True)
class About:
    """`longest_s`: the longest lifetime that certificates were ever given, by any of them."""

    trust_domain: str
    longest_s: int


def read(store: Store, documents: Documents | None = None) -> About | None:
    """Return what is agreed; None if no controller was there yet. Raises ControllerError."""
    content = (documents or store).read(FILE)
    if content is None:
        return None
    try:
        record = fields.only(fields.parse(content), _FIELDS)
        return About(fields.field(record, "trust_domain", str), fields.field(record, "longest_s", int))
    except BadState as error:
        raise fields.refuse(store.where(FILE), error, "or delete it: a controller that starts writes it anew") from error


def agree(store: Store, own: About) -> None:
    """Add what this controller is about. Raises ControllerError if it does not belong to the others."""

    def work(documents: Documents) -> None:
        held = read(store, documents)
        if held is not None and held.trust_domain != own.trust_domain:
            raise ControllerError(
                f"{store.where(FILE)} is of trust domain {held.trust_domain}, --trust-domain is {own.trust_domain}: every identity would change; give "
                "the old one, or another --namespace"
            )
        if held is None or held.longest_s < own.longest_s:
            documents.write(FILE, json.dumps(asdict(own)) + "\n")

    store.change(work)
