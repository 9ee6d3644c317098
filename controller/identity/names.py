"""SPIFFE IDs, and serial numbers, of this mesh (https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md). Pure; used by everything here.

A workload is spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT, as Istio writes it; the mesh's own parts are below /meshagent, which no workload
can have, because a workload's path begins with /ns.
"""

from __future__ import annotations

import re
from typing import Final

from controller.errors import ControllerError
from controller.identity.refusals import Refused

MAX_ID_BYTES: Final = 2048  # SPIFFE-ID, 2.3
MAX_NODE: Final = 253  # as Workload.spec.node
SHOWN: Final = 80  # characters of foreign text in messages
_TRUST_DOMAIN: Final = re.compile(r"[a-z0-9._-]{1,255}", re.ASCII)  # SPIFFE-ID, 2.1
_SEGMENT: Final = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)  # SPIFFE-ID, 2.2
_NODE: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?", re.ASCII)


def shown(text: str) -> str:
    """Return foreign text as it may stand in a log: short, and without line ends or escape sequences."""
    cut = text[:SHOWN]
    return cut if cut.isprintable() else repr(cut)


def check_trust_domain(trust_domain: str) -> None:
    """Raise ControllerError if no SPIFFE ID can have this trust domain."""
    if not _TRUST_DOMAIN.fullmatch(trust_domain):
        raise ControllerError(
            f"--trust-domain {trust_domain!r} cannot be part of a SPIFFE ID: use lower-case letters, digits, dots, dashes and underscores"
        )


def root_id(trust_domain: str) -> str:
    """Return the SPIFFE ID of a signing certificate: no path (X509-SVID, 3.2)."""
    return f"spiffe://{trust_domain}"


def controller_id(trust_domain: str) -> str:
    """Return the SPIFFE ID of the controller."""
    return f"spiffe://{trust_domain}/meshagent/controller"


def serial_allowed(serial: int) -> bool:
    """True for a serial number that a certificate, and a revocation list, may have (RFC 5280, 4.1.2.2): positive, 20 bytes with the sign bit."""
    return 0 < serial < 1 << 159


def node_id(trust_domain: str, node: str) -> str:
    """Return the SPIFFE ID of a node's agent. Raises Refused if no node can have this name."""
    if len(node) > MAX_NODE or not _NODE.fullmatch(node):
        raise Refused(
            "node-name",
            f"{node[:SHOWN]!r} is no node name: letters, digits, dots, dashes and underscores, at most {MAX_NODE}; check --node",
        )
    return f"spiffe://{trust_domain}/meshagent/node/{node}"


def node_of(trust_domain: str, spiffe_id: str) -> str:
    """Return the node that a SPIFFE ID names; "" if it names anything else."""
    prefix = f"spiffe://{trust_domain}/meshagent/node/"
    node = spiffe_id.removeprefix(prefix)
    return node if spiffe_id.startswith(prefix) and _NODE.fullmatch(node) else ""


def workload_id(trust_domain: str, namespace: str, service_account: str) -> str:
    """Return the SPIFFE ID of a workload. Raises Refused if the model holds names that no SPIFFE ID can have."""
    for segment in (namespace, service_account):
        if not _SEGMENT.fullmatch(segment) or segment in {".", ".."}:
            raise Refused("identity", f"{segment[:SHOWN]!r} cannot be part of a SPIFFE ID: rename the namespace or the service account")
    found = f"spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}"
    if len(found) > MAX_ID_BYTES:
        raise Refused("identity", f"the SPIFFE ID of service account {service_account[:SHOWN]} is longer than {MAX_ID_BYTES} bytes")
    return found
