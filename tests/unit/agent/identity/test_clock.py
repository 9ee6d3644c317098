"""When a certificate is renewed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.identity.clock import JITTER, Clock, renewal

DAY = 86_400.0


def clock(wall: float, boot: float, random: float = 0.5) -> Clock:
    return Clock(lambda: wall, lambda: boot, lambda: random)


@pytest.mark.parametrize("fresh", [True, False])
def test_renewal_is_due_at_half_of_a_life(fresh: bool) -> None:
    due = renewal(1000, 1000 + DAY, clock(1000, 7), fresh=fresh)
    assert (due.wall, due.boot) == (1000 + DAY / 2, 7 + DAY / 2)
    assert not due.come(clock(1000 + DAY / 2 - 1, 7))
    assert due.come(clock(1000 + DAY / 2, 7))


def test_a_fresh_certificate_that_was_dated_back_is_not_due_at_once_and_a_stored_one_may_be() -> None:
    here = clock(1000, 7)
    assert renewal(700, 1060, here, fresh=True) == renewal(1000, 1060, here, fresh=False)
    assert renewal(700, 1060, here, fresh=False).come(here)


@given(st.booleans(), st.floats(0, 1), st.floats(-10 * DAY, 10 * DAY), st.floats(60, 400 * DAY))
def test_renewal_comes_within_half_a_life_whatever_the_wall_clock_says(fresh: bool, random: float, off: float, life: float) -> None:
    due = renewal(1e9, 1e9 + life, clock(1e9 + off, 7, random), fresh=fresh)
    assert (0.5 - JITTER) * life - 1e-3 <= due.wall - 1e9
    assert due.wall < 1e9 + life
    assert 0 <= due.boot - 7 <= (0.5 + JITTER) * life + 1e-3
    assert due.come(clock(-1e9, due.boot))
    assert due.wait_s(clock(0, 0)) >= 0
