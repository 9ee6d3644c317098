"""Global rate limits on this node: what Envoy's buckets used goes to the controller, what the controller gives goes to Envoy. A task of the supervisor.

Nothing here happens for a request: Envoy reports every 5 s, and at once a caller that was not there (`agent.l7.quota`). While the controller is away the last
shares hold for `PATIENCE_S`, then what the limit's `failure` says. An agent that is away changes nothing: Envoy keeps its shares.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import grpc.aio
from envoy.service.rate_limit_quota.v3 import rlqs_pb2, rlqs_pb2_grpc

from agent.l7 import quota
from agent.model import Snapshot
from agent.patience import until_one_ends
from agent.traffic import Failure, RateLimit
from meshapi import quota_pb2, quotas

_log = logging.getLogger(__name__)

PATIENCE_S: Final = 15.0
"""How long shares hold without the controller."""
RETRY_S: Final = 1.0
SETTLE_S: Final = 0.02
QUIET: Final = 2
"""After so many reports without a request Envoy and the controller are told to forget a caller: when it comes again, that is known at once."""
MOST_BUCKETS: Final = 20_000
LOST_S: Final = 4 * quota.REPORTS_S
"""A caller of whom Envoy has not said anything for so long has no bucket there any more."""
ANEW_S: Final = 4 * quota.REPORTS_S
"""What Envoy needs at most to replace a filter, whose callers are then to be told their shares again."""
REFRESH_S: Final = quota.KEPT_S / 24
_SHARE: Final = "/meshagent.v1.Quotas/Share"
Key = tuple[str, str]
"""A limit and a caller."""


@dataclass(slots=True)
class _Bucket:
    """One of Envoy's: what it used and the controller has not been told, and what it was given."""

    reported_at: float
    told_at: float
    allowed: int = 0
    denied: int = 0
    quiet: int = 0
    fresh: bool = True
    wanted: tuple[int, int] = (0, 0)
    """Requests, allowed or not, and milliseconds of the last report."""
    last: rlqs_pb2.RateLimitQuotaResponse.BucketAction | None = None
    """What Envoy was last told."""
    told_envoy_at: float = 0.0


@dataclass(frozen=True, slots=True)
class _Limits:
    """The limits in force by name, and among how many nodes they are shared."""

    limits: Mapping[str, RateLimit] = field(default_factory=dict)
    nodes: int = 1


class Quotas(rlqs_pb2_grpc.RateLimitQuotaServiceServicer):  # type: ignore[misc,unused-ignore]
    """See the module. Belongs to the event loop."""

    def __init__(self, node: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`run` and `follow` bring it to life."""
        self._node = node
        self._clock = clock
        self._limits = _Limits()
        self._buckets: dict[Key, _Bucket] = {}
        self._anew_at: dict[str, float] = {}
        """When Envoy was given another filter for a limit."""
        self._gone: dict[Key, tuple[int, int]] = {}
        self._news = asyncio.Event()
        self._streams: set[asyncio.Queue[rlqs_pb2.RateLimitQuotaResponse]] = set()
        self._following = False
        self._connected = False
        self._left_at = clock()
        self._alone = False

    def serve(self, server: grpc.aio.Server) -> None:
        """Add RLQS to the server that Envoy has its configuration from (a unix socket, mode 0600)."""
        rlqs_pb2_grpc.add_RateLimitQuotaServiceServicer_to_server(self, server)

    def update(self, snapshot: Snapshot) -> None:
        """Take the limits of a snapshot."""
        limits = {
            quotas.name(service, port, number): limit
            for policy in snapshot.traffic.values()
            for service, port in policy.targets
            for number, limit in enumerate(policy.rate_limits)
            if limit.is_global
        }
        for key in [key for key in self._buckets if not quota.keeps_buckets(self._limits.limits[key[0]], limits.get(key[0]))]:
            bucket = self._buckets.pop(key)
            self._anew_at[key[0]] = self._clock()
            if key[0] in limits:
                self._gone[key] = (bucket.allowed, bucket.denied)
                self._news.set()
        self._anew_at = {limit: at for limit, at in self._anew_at.items() if self._clock() - at < ANEW_S}
        nodes = len({one.node for one in snapshot.workloads.values() if one.enrolled}) if limits else 1
        self._limits = _Limits(limits, max(1, nodes))

    def problems(self) -> list[str]:
        """What an operator should know."""
        if self._alone and self._buckets:
            return [f"global rate limits: the controller is away, each limit does what its `failure` says on node {self._node} by itself"]
        return []

    # What Envoy says

    async def StreamRateLimitQuotas(self, requests: Any, context: Any) -> None:  # noqa: ARG002, N802
        """Serve one Envoy."""
        out: asyncio.Queue[rlqs_pb2.RateLimitQuotaResponse] = asyncio.Queue()
        self._streams.add(out)
        self._buckets.clear()  # another Envoy has none, and whichever ones this one has it reports
        writer = asyncio.ensure_future(self._write(out, context))
        try:
            while isinstance(report := await context.read(), rlqs_pb2.RateLimitQuotaUsageReports):
                if actions := self.heard(report):
                    out.put_nowait(rlqs_pb2.RateLimitQuotaResponse(bucket_action=actions))
        finally:
            self._streams.discard(out)
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    @staticmethod
    async def _write(out: asyncio.Queue[rlqs_pb2.RateLimitQuotaResponse], context: Any) -> None:
        while True:
            await context.write(await out.get())

    def heard(self, report: rlqs_pb2.RateLimitQuotaUsageReports) -> list[rlqs_pb2.RateLimitQuotaResponse.BucketAction]:
        """Note what Envoy used; return what it is to do at once."""
        actions = []
        for usage in report.bucket_quota_usages:
            key = (usage.bucket_id.bucket.get(quota.LIMIT, ""), usage.bucket_id.bucket.get(quota.CALLER, ""))
            used = usage.num_requests_allowed or usage.num_requests_denied
            if key[0] not in self._limits.limits or (key not in self._buckets and len(self._buckets) >= MOST_BUCKETS):
                self._buckets.pop(key, None)
                # Forgotten while it is in use, it would be made anew, and reported, by each request.
                actions.append(quota.blanket(*key, Failure.ALLOW) if used else quota.abandon(usage.bucket_id))
                continue
            bucket = self._buckets.get(key)
            if bucket is None:
                now = self._clock()
                bucket = self._buckets[key] = _Bucket(now, now)
                self._gone.pop(key, None)
                # Without the controller the others' shares are smaller now, too.
                actions += [self._alone_or_first(one) for one in self._buckets if one == key or (self._alone and one[0] == key[0])]
            elif bucket.last is not None and (self._clock() - bucket.told_envoy_at > REFRESH_S or self._begins_anew(key[0])):
                actions.append(bucket.last)  # Envoy goes on with the tokens it has
            self._count(bucket, usage)
            if bucket.quiet >= QUIET:
                actions.append(quota.abandon(usage.bucket_id))
                self._gone[key] = (bucket.allowed, bucket.denied)
                del self._buckets[key]
        self._news.set()
        return self._noted(actions)

    def _begins_anew(self, limit: str) -> bool:
        """Did a limit become another filter a moment ago? Until Envoy has it the old one reports, too, and whose a report is nothing says."""
        return self._clock() - self._anew_at.get(limit, -math.inf) < ANEW_S

    def _count(self, bucket: _Bucket, usage: rlqs_pb2.RateLimitQuotaUsageReports.BucketQuotaUsage) -> None:
        bucket.allowed += usage.num_requests_allowed
        bucket.denied += usage.num_requests_denied
        bucket.reported_at = self._clock()
        bucket.quiet = 0 if usage.num_requests_allowed or usage.num_requests_denied else bucket.quiet + 1

    def _alone_or_first(self, key: Key) -> rlqs_pb2.RateLimitQuotaResponse.BucketAction:
        """What a caller gets without the controller: for the moment until it has answered, and while it is away."""
        limit = self._limits.limits[key[0]]
        if self._alone and limit.failure is not Failure.SHARE:
            return quota.blanket(*key, limit.failure)
        here = max(1, sum(other[0] == key[0] for other in self._buckets))
        parts = self._limits.nodes * here
        rate = limit.requests * 1_000_000 // limit.interval_ms // parts
        return quota.share(*key, max(1, rate), max(1, limit.burst // parts))

    # What the controller says

    async def run(self) -> None:
        """Notice, for ever, when the controller has been away for too long."""
        while True:
            if not self._following:
                self._notice()
            await asyncio.sleep(RETRY_S)

    async def follow(self, channel: grpc.aio.Channel) -> None:
        """Follow the controller over a channel. To be cancelled before that is closed: a call that is made meanwhile would wait for ever to be sent."""
        self._following = True
        try:
            while True:
                try:
                    await until_one_ends(self._follow(channel))
                except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError, OSError) as error:
                    if self._connected:
                        _log.warning("global rate limits are not shared out by the controller now", extra={"error": _reason(error)})
                finally:
                    if self._connected:
                        self._connected, self._left_at = False, self._clock()
                self._notice()
                await asyncio.sleep(RETRY_S)
        finally:
            self._following = False

    def _notice(self) -> None:
        if self._alone or self._clock() - self._left_at < PATIENCE_S:
            return
        self._alone = True
        if self._buckets:
            _log.warning("global rate limits: without the controller for too long, each does what its `failure` says")
        self._give(self._alone_or_first(key) for key in self._buckets)

    async def _follow(self, channel: grpc.aio.Channel) -> None:
        call: Any = channel.stream_stream(_SHARE, quota_pb2.QuotaReport.SerializeToString, quota_pb2.QuotaAssignment.FromString)()
        reports: asyncio.Future[None] | None = None
        try:
            await call.write(quota_pb2.QuotaReport(node=self._node))
            self._anew()
            reports = asyncio.ensure_future(self._report(call))
            while isinstance(assignment := await call.read(), quota_pb2.QuotaAssignment):
                self._connected, self._alone = True, False
                self.given(assignment)
        finally:
            call.cancel()
            if reports is not None:
                reports.cancel()
                await asyncio.gather(reports, return_exceptions=True)

    def _anew(self) -> None:
        """A new stream: the controller may know nothing."""
        for bucket in self._buckets.values():
            bucket.fresh = True
        self._news.set()

    @staticmethod
    def _usage(key: Key, bucket: _Bucket) -> quota_pb2.QuotaUsage:
        usage = quota_pb2.QuotaUsage(limit=key[0], caller=key[1], allowed=bucket.allowed, denied=bucket.denied)
        usage.elapsed_ms = int(max(0.0, bucket.reported_at - bucket.told_at) * 1000)
        if usage.elapsed_ms:
            bucket.wanted = (bucket.allowed + bucket.denied, usage.elapsed_ms)
        elif bucket.wanted[1]:  # a controller that may not know it; what was allowed has been counted
            usage.denied, usage.elapsed_ms = bucket.wanted
        return usage

    async def _report(self, call: Any) -> None:
        while True:
            await self._news.wait()
            await asyncio.sleep(SETTLE_S)
            self._news.clear()
            usages = self.usages()
            for begin in range(0, len(usages), quotas.MOST_USAGES):
                await call.write(quota_pb2.QuotaReport(node=self._node, usages=usages[begin : begin + quotas.MOST_USAGES]))

    def usages(self) -> list[quota_pb2.QuotaUsage]:
        """What the controller has not been told."""
        found = []
        for key in [key for key, bucket in self._buckets.items() if self._clock() - bucket.reported_at > LOST_S]:
            bucket = self._buckets.pop(key)  # Envoy has it no more: it reports even those that nobody uses
            self._gone[key] = (bucket.allowed, bucket.denied)
        for key, bucket in self._buckets.items():
            if not bucket.fresh and bucket.reported_at <= bucket.told_at:
                continue
            found.append(self._usage(key, bucket))
            bucket.told_at, bucket.allowed, bucket.denied, bucket.fresh = bucket.reported_at, 0, 0, False
        for (limit, caller), (allowed, denied) in self._gone.items():
            found.append(quota_pb2.QuotaUsage(limit=limit, caller=caller, allowed=allowed, denied=denied, gone=True))
        self._gone.clear()
        return found

    def given(self, assignment: quota_pb2.QuotaAssignment) -> None:
        """Hand the controller's shares on to Envoy."""
        for reason in assignment.refused:
            _log.warning("the controller does not count a part of the last quota report", extra={"reason": reason})
        actions = []
        for one in assignment.shares:
            bucket = self._buckets.get((one.limit, one.caller))
            if bucket is not None:
                actions.append(quota.share(one.limit, one.caller, one.millis, one.burst))
        self._give(actions)

    def _give(self, actions: Iterable[rlqs_pb2.RateLimitQuotaResponse.BucketAction]) -> None:
        message = rlqs_pb2.RateLimitQuotaResponse(bucket_action=self._noted(list(actions)))
        if message.bucket_action:
            for out in self._streams:
                out.put_nowait(message)

    def _noted(self, actions: list[rlqs_pb2.RateLimitQuotaResponse.BucketAction]) -> list[rlqs_pb2.RateLimitQuotaResponse.BucketAction]:
        for action in actions:
            bucket = self._buckets.get((action.bucket_id.bucket[quota.LIMIT], action.bucket_id.bucket[quota.CALLER]))
            if bucket is not None and action.HasField("quota_assignment_action"):
                bucket.last, bucket.told_envoy_at = action, self._clock()
        return actions


def _reason(error: Exception) -> str:
    with contextlib.suppress(AttributeError):
        return f"{error.code().name.lower()}: {error.details()}"  # type: ignore[attr-defined]
    return str(error) or type(error).__name__
