"""What an agent without identities does not have to carry: seen in processes of their own, since this one has imported everything."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from agent.config import Config
from agent.errors import NotFound
from agent.identity.part import identities
from tests.unit.agent.identity.signer import NODE, local

_IMPORTED = """
import sys
from pathlib import Path
from agent import supervisor
from agent.cli import main
from agent.config import Config, TlsFiles
from agent.identity.part import identities
tls = TlsFiles(*[Path("/nowhere")] * 3) if sys.argv[1] == "tls" else None
identities(Config(node="n1", controller="127.0.0.1:1" if tls else "unix:///nowhere", tls=tls))
print("grpc" in sys.modules, "cryptography" in sys.modules)
"""


@pytest.mark.parametrize(("controller", "imported"), [("unix", "True False"), ("tls", "True True")])
def test_cryptography_is_imported_where_there_can_be_identities_and_nowhere_else(controller: str, imported: str) -> None:
    done = subprocess.run([sys.executable, "-c", _IMPORTED, controller], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == imported


def test_over_a_unix_socket_there_are_no_identities_and_nothing_is_done(run_dir: Path) -> None:
    identity, serve = identities(Config(NODE, "unix:///nowhere", run_dir=run_dir))
    identity.subscribe(lambda: pytest.fail("nothing changes"))
    identity.load()
    identity.update([local("cart", 1)])
    assert (identity.status().mode, identity.problems(), identity.trust, dict(identity.svids())) == ("off", [], None, {})
    with pytest.raises(NotFound, match="no workload default/cart"):
        identity.show("default/cart")

    async def check() -> None:
        for part in (identity.run(), serve()):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(part, 0.05)

    asyncio.run(check())
    assert not run_dir.exists()
