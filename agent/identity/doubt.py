"""Is the peer of an open tunnel still to be believed? Asked of the identities by `agent.distrust`; pure.

A certificate that has only run out is believed: peers renew theirs long before, and a connection that lives longer than a certificate is no reason to close
it. Nor is a root that is gone after everything that it signed has run out, which is how a root is replaced (`mesh-controller ca rotate`).
"""

from __future__ import annotations

from collections.abc import Iterable

from cryptography import x509

from agent.identity.certificates import issued
from agent.identity.trust import Trust


def doubt(pem: bytes, trust: Trust, between: Iterable[x509.Certificate], now: float, *, ended: bool) -> str:
    """Why the holder of a certificate is not believed any more; "" if it is. `now`: Unix seconds.

    `between` are intermediates that this node knows: who was signed by another one cannot be told from a stranger and is one. `ended`: somebody was
    revoked since the last look. Nobody lists what has run out, so it might be theirs, and is not believed either.
    """
    try:
        leaf = x509.load_pem_x509_certificate(pem)
    except ValueError:
        return "its certificate cannot be read"
    if leaf.serial_number in trust.revoked:
        return "its certificate is revoked"
    if leaf.not_valid_after_utc.timestamp() <= now:
        return "its certificate has run out, and may be one of somebody who was revoked" if ended else ""
    roots = [root for root in trust.certificates if root.not_valid_after_utc.timestamp() > now]
    above = [*roots, *(one for one in between if any(issued(one, root) for root in roots))]
    return "" if any(issued(leaf, one) for one in above) else "no trusted root has signed its certificate"
