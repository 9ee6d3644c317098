"""What a controller finds in the CA file when it starts, or makes there. Called by the certificate authority."""

from __future__ import annotations

import logging
from dataclasses import replace

from controller.errors import ControllerError
from controller.identity import keys, rotation
from controller.identity.directory import AUTHORITY, TRUST, Directory
from controller.identity.keys import Keys

_log = logging.getLogger(__name__)


def open_keys(directory: Directory, trust_domain: str, lifetime_s: int, now: float, *, self_made: bool) -> Keys:
    """Return the CA file's content, made or brought up to date if need be; call it with the directory locked.

    `self_made`: the controller's own root signs. Raises ControllerError for whatever would give the mesh another authority than it had.
    """
    path = directory.path / AUTHORITY
    found = keys.load(directory)
    if found is None:
        if others := directory.names() - {TRUST}:
            raise ControllerError(
                f"{directory.path} holds {', '.join(sorted(others))} but no {AUTHORITY}, where the CA's keys are: was it deleted, or left out "
                "of a backup? put it back; or empty the directory, then there is a new root and every node must join again"
            )
        found = rotation.first(trust_domain, now, lifetime_s, with_root=self_made)
        keys.store(directory, found)
        _log.info("certificate authority made", extra={"directory": str(directory.path), "self_made_root": self_made})
    if found.trust_domain != trust_domain:
        raise ControllerError(
            f"{path} is for trust domain {found.trust_domain}, --trust-domain is {trust_domain}: every identity would change; give the old one, or "
            "another --ca-directory"
        )
    changed = found
    if not self_made:
        changed = _retire_own(found, int(now))
    elif found.root("signing") is None:
        raise ControllerError(
            f"{path} has no root that signs, because somebody else signed for this mesh until now: give --ca-cert and --ca-key, or --ca-command, "
            "again; or begin anew with another --ca-directory"
        )
    if lifetime_s > changed.longest_s:
        changed = replace(changed, longest_s=lifetime_s)
    if changed is not found:
        keys.store(directory, changed)
    return changed


def _retire_own(found: Keys, now: int) -> Keys:
    """Somebody else signs from now on: self-made roots stay trusted until what they signed has run out."""
    signing = found.root("signing")
    if signing is None:
        return found
    found = rotation.retire(found, signing, now)
    _log.warning("self-made root retired: another signer was given", extra={"root": signing.hash})
    return replace(found, roots=tuple(root for root in found.roots if root.stage != "next"))
