"""How the agent connects to controllers: the credentials of this node, read anew for each connection, and how soon a machine that vanished is noticed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import grpc.aio

if TYPE_CHECKING:
    from agent.config import Config

_OPTIONS: Final = (
    # A controller whose machine vanished is noticed within 15 s (https://grpc.io/docs/guides/keepalive/).
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Each attempt is a new channel and the pauses are ours: no shared connection may keep a pause of its own.
    ("grpc.use_local_subchannel_pool", 1),
)


async def dial(config: Config, target: str = "", name: str = "") -> grpc.aio.Channel:
    """Prepare a connection to the controller, or to `target`, one of its replicas, whose certificate is for `name`. Raises OSError."""
    tls = config.tls
    if tls is None and target:
        raise OSError("replicas of a controller are called over TLS only: this agent has neither --join nor --tls-cert")
    if tls is None:
        return grpc.aio.insecure_channel(target or config.controller, options=_OPTIONS)
    try:
        ca, key, certificate = await asyncio.to_thread(tls.read)  # at every attempt: the files may have been renewed
    except FileNotFoundError as error:
        if config.join is None:
            raise
        raise OSError("this node has not joined yet") from error
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    named = config.channel_options or ((("grpc.ssl_target_name_override", name),) if name else ())
    return grpc.aio.secure_channel(target or config.controller, credentials, options=(*_OPTIONS, *named))
