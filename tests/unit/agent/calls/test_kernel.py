"""Connections that the kernel has counted, as they are remembered."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from agent.bpf.manifest import Direction, Reason, Verdict
from agent.calls.kernel import Grown, Kernel
from agent.calls.ring import Outcome, Seen
from agent.ids import Ids
from tests.unit.agent import tables

TCP = 6


@pytest.mark.parametrize(
    ("source", "direction", "seen"),
    [
        pytest.param(
            "shop/web", Direction.OUTBOUND, Seen(False, "shop/web", "shop/cart", "", 8080, "TCP", Outcome.SERVED), id="a-workload"
        ),
        pytest.param("shop/web", Direction.INBOUND, None, id="its-caller-tells-of-it"),
        pytest.param("", Direction.INBOUND, Seen(True, "", "shop/cart", "", 8080, "TCP", Outcome.SERVED), id="a-stranger"),
        pytest.param("(kubelet)/here", Direction.OUTBOUND, None, id="a-probe"),
        pytest.param("(kubelet)/here", Direction.INBOUND, None, id="a-probe-at-the-receiver"),
    ],
)
def test_a_connection_is_told_once_and_a_probe_never(tmp_path: Path, source: str, direction: Direction, seen: Seen | None) -> None:
    ids = Ids(tmp_path / "ids")
    maps = {"mesh_stats": tables.stats(), "mesh_verdicts": tables.verdicts(), **tables.of_sockets()}
    kernel = Kernel(cast("Any", maps), ids, lambda name: name.startswith("shop/"))
    assert kernel.look(()) == {}
    who = {"source": ids.number("workload", source) if source else 0, "target": ids.number("workload", "shop/cart")}
    maps["mesh_stats"].add({**who, "port": 8080, "direction": direction, "protocol": TCP}, opened=23)
    assert kernel.look(()) == ({} if seen is None else {seen: Grown(23, 0)})


def test_the_agents_own_probe_is_no_call(tmp_path: Path) -> None:
    ids = Ids(tmp_path / "ids")
    maps = {"mesh_stats": tables.stats(), "mesh_verdicts": tables.verdicts(), **tables.of_sockets()}
    kernel = Kernel(cast("Any", maps), ids, lambda name: name.startswith("shop/"))
    kernel.look(())
    key = {"direction": Direction.INBOUND, "verdict": Verdict.DENY, "reason": Reason.POLICY, "protocol": TCP}
    for source, target in (("meshagent/probe", "meshagent/probe"), ("meshagent/probe", "shop/cart"), ("other/web", "shop/cart")):
        maps["mesh_verdicts"].add({**key, "source": ids.number("workload", source), "target": ids.number("workload", target)}, **{"": 23})
    assert kernel.look(()) == {Seen(True, "", "shop/cart", "", 0, "TCP", Outcome.DENIED): Grown(23, 0)}
