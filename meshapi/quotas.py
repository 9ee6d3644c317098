"""What controller and agents must agree on about global rate limits, beside quota.proto."""

from __future__ import annotations

from typing import Final

MOST_GLOBAL_LIMITS: Final = 2
"""Of one TrafficPolicy: each needs a filter of its own in every chain of the waypoint."""
MOST_USAGES: Final = 10_000
"""In one report."""
COUNTED_MS: Final = 60_000
"""Limits of a longer interval than this are counted through the interval; shorter ones are rates."""


def name(service: str, port: int, number: int) -> str:
    """Name of a limit: the `number`-th, from 0, of the rateLimits of the policy that decides for a service port."""
    return f"service/{service}/{port}#{number}"
