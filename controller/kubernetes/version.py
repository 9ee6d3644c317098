"""How old the API server is: said once at the start, because what it does not know of our definitions shows later, and elsewhere.

Everybody may read /version (https://kubernetes.io/docs/reference/access-authn-authz/rbac/#api-discovery-roles).
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Final

import msgspec

from controller.kubernetes.api import Api, ApiError, TooLarge, Unreachable

_log = logging.getLogger(__name__)

OLDEST: Final = (1, 31)
"""The same as `meshagent check --kubernetes` asks for (`agent.check.cluster`)."""
AGAIN_S: Final = 30.0


class _Info(msgspec.Struct):
    """https://pkg.go.dev/k8s.io/apimachinery/pkg/version#Info. Some providers write a minor version as "30+"."""

    major: str
    minor: str
    git: str = msgspec.field(name="gitVersion", default="?")


_decoder = msgspec.json.Decoder(_Info)


def too_old(said: bytes) -> str:
    """Return the version that an answer to /version names if it is older than OLDEST, else "". Raises msgspec.MsgspecError."""
    found = _decoder.decode(said)
    number = tuple(int(re.sub(r"\D", "", part)[:9] or 0) for part in (found.major, found.minor))
    return found.git[:80] if number < OLDEST else ""


async def tell(api: Api) -> None:
    """Ask until there is an answer; warn if it is too old."""
    while True:
        try:
            if old := too_old(await api.get("/version", {})):
                _log.warning(
                    "the API server is older than the mesh's definitions need: rules of them (isIP, cidr in CEL) may be missing; upgrade the cluster",
                    extra={"version": old, "oldest": f"{OLDEST[0]}.{OLDEST[1]}"},
                )
        except Unreachable:
            await asyncio.sleep(AGAIN_S)
            continue
        except (ApiError, TooLarge, msgspec.MsgspecError) as error:
            _log.info("how old the API server is is not known", extra={"error": str(error)[:200] or type(error).__name__})
        return
