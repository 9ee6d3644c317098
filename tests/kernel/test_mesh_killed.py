"""Envoy is killed again and again under load: what is at layer 4 does not notice, layer 7 is back within two seconds, nobody gets by."""

from __future__ import annotations

import os
import signal
import time
from functools import partial

import pytest

from lab.lab import Lab
from tests.kernel import shop

pytestmark = pytest.mark.kernel

KILLS = 5
BACK_S = 2.0
SLOW_S = 0.9
"""A SYN that got no answer is sent again after a second."""
L4 = ("frontend", "redis://redis:6379")
L7 = ("frontend", "http://cart/items")
DENIED = (("other", "http://cart/items"), ("frontend", "http://cart/admin/counters"))
BROKEN = {"ECONNREFUSED", "ECONNRESET", "EPIPE", "RemoteDisconnected", "BadStatusLine", "IncompleteRead"}
"""What a caller sees that asks while nobody is there, or whose connection Envoy had."""


def another(pid: int) -> bool:
    """Is there an Envoy, ready, that is not this one?"""
    found = shop.status("node-1")["waypoint"]
    return bool(found["ready"]) and found["pid"] != pid


def test_after_each_of_five_kills_layer_7_is_back_layer_4_was_not_touched_and_nobody_got_by(lab: Lab) -> None:
    shop.takes(lambda: shop.codes(lab, "frontend", "http://cart/items") == {"200": 1})
    served = {pod: shop.answered(lab, pod) for pod in ("cart-v1-1", "cart-v1-2", "cart-v2-1")}
    quick = shop.Load(lab, *L4, rate=100)
    retrying = shop.Load(lab, *L7, rate=50)
    denied = [shop.Load(lab, *target, rate=50) for target in DENIED]
    kills = []
    for _ in range(KILLS):
        time.sleep(1)
        before = shop.status("node-1")["waypoint"]["pid"]
        kills.append(time.monotonic())
        os.kill(before, signal.SIGKILL)
        shop.takes(partial(another, before), 3 * BACK_S)
        time.sleep(1)
    untouched, again, *refused = (load.stop() for load in (quick, retrying, *denied))

    assert shop.outcomes(untouched).keys() == {"PONG"}, shop.outcomes(untouched)
    assert len(untouched) > 100 * KILLS
    late = [
        (round(min(call.started - kill for kill in kills if call.started + call.seconds > kill), 2), call.seconds)
        for call in untouched
        if call.seconds > SLOW_S and call.started > kills[0] - 1
    ]
    assert late == [], "nobody waited for a retransmission (seconds since the kill, seconds that it took)"
    back = [min(call.started + call.seconds for call in again if call.started >= kill and call.outcome == "200") - kill for kill in kills]
    assert max(back) < BACK_S, back
    assert shop.outcomes(again).keys() <= {"200"} | BROKEN, shop.outcomes(again)
    assert again[-1].outcome == "200"
    for calls in refused:
        assert shop.outcomes(calls).keys() <= {"403"} | BROKEN, shop.outcomes(calls)
        assert calls[-1].outcome == "403"
    for pod, before_ in served.items():
        now = shop.answered(lab, pod)
        asked = {what: count - before_[what] for what, count in now.items() if count != before_[what]}
        assert asked.keys() <= {"GET /items 200", "GET /admin/counters 200"}, asked
        assert asked["GET /admin/counters 200"] <= 2, "the test's own, over the pod's loopback"
    assert shop.status("node-1")["problems"] == []
