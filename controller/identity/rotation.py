"""The steps in which a self-made root is replaced so that no connection is dropped. Pure: from one CA file to the next.

    begin    a new root is made; everybody trusts it, nobody's certificate is signed by it
    switch   it signs; the old one is still trusted. Not before every node trusts the new root, and no join token is left that knows only the old one
    finish   the old root is forgotten. Not before everything that it signed has run out

Each step is one replacement of the CA file, so that a crash is before or after it. The running controller takes `switch` and `finish` by itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from controller.errors import ControllerError
from controller.identity.certificates import BACKDATE_S, new_key, new_root
from controller.identity.keys import JwtKey, Keys, Root, Stage

WAIT_S: Final = 600  # from `begin` to `switch`, for agents to hand the new root on to Envoy and workloads
MARGIN_S: Final = BACKDATE_S + 60  # for clocks of peers that are behind, and for what was being signed at the switch
JWT_PERIOD_S: Final = 86_400  # how long a JWT key signs; the next one is published as long before


def first(trust_domain: str, now: float, longest_s: int, *, with_root: bool) -> Keys:
    """Make a new CA file; without a root if somebody else signs."""
    roots = (_root(trust_domain, "signing", now),) if with_root else ()
    return Keys(trust_domain, longest_s, roots, _jwt_keys(now))


def begin(keys: Keys, now: float, wait_s: int) -> Keys:
    """Add the next root. Raises ControllerError if a rotation is under way."""
    if keys.root("next") or keys.root("retired"):
        raise ControllerError("a rotation is under way: see `mesh-controller ca show`")
    return replace(keys, roots=(*keys.roots, replace(_root(keys.trust_domain, "next", now), wait_s=wait_s)))


def cancel(keys: Keys) -> Keys:
    """Forget the next root, which has signed nothing. Raises ControllerError if it has."""
    if keys.root("next") is None:
        raise ControllerError("there is no rotation that can be cancelled: the new root signs already, or none was made")
    return replace(keys, roots=tuple(root for root in keys.roots if root.stage != "next"))


def switch(keys: Keys, now: float) -> Keys:
    """Let the next root sign and retire the old one until everything that it signed has run out."""
    upcoming, current = keys.root("next"), keys.root("signing")
    if upcoming is None or current is None:
        raise ControllerError("there is no next root to switch to: begin with `mesh-controller ca rotate`")
    keys = retire(keys, current, int(now))
    return keys.with_root(upcoming, stage="signing", since=int(now), wait_s=0)


def finish(keys: Keys) -> Keys:
    """Forget the retired root and its key."""
    return replace(keys, roots=tuple(root for root in keys.roots if root.stage != "retired"))


def turn_jwt(keys: Keys, now: float, tokens_live_s: int) -> Keys:
    """Let the next JWT key sign, make one after it, keep the old one until its tokens have run out, and forget those whose tokens have."""
    retired = []
    for key in keys.jwt:
        if key.stage == "signing":
            retired.append(replace(key, stage="retired", since=int(now), until=int(now) + tokens_live_s + MARGIN_S))
        elif key.stage == "retired":
            retired.append(key)
    upcoming = keys.jwt_key("next") or JwtKey(new_key(), "next", int(now))
    return replace(keys, jwt=(*retired, replace(upcoming, stage="signing", since=int(now)), JwtKey(new_key(), "next", int(now))))


def hurry(keys: Keys, now: float) -> Keys:
    """Take the next step of a root, if there is one that signs, whatever it should wait for; and forget all JWT keys.

    What those signed is refused by everybody who has the new bundle.
    """
    if keys.root("next"):
        keys = switch(keys, now)
    elif keys.root("signing"):
        keys = finish(keys) if keys.root("retired") else begin(keys, now, 0)
    return new_jwt(keys, now)


def new_jwt(keys: Keys, now: float) -> Keys:
    """Forget all JWT keys, and make others."""
    return replace(keys, jwt=_jwt_keys(now))


def retire(keys: Keys, root: Root, now: int) -> Keys:
    """Let a root sign no more; it stays trusted until everything that it signed has run out."""
    return keys.with_root(root, stage="retired", since=now, until=now + keys.longest_s + MARGIN_S)


def _jwt_keys(now: float) -> tuple[JwtKey, ...]:
    return JwtKey(new_key(), "signing", int(now)), JwtKey(new_key(), "next", int(now))


def _root(trust_domain: str, stage: Stage, now: float) -> Root:
    certificate, key = new_root(trust_domain, now)
    return Root(certificate, key, stage, int(now))
