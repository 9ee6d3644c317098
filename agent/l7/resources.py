"""A packed xDS resource with its version, and the set of them that one Envoy should have.

Made by `agent.l7.snapshot`, served by `agent.l7.xds`. Versions are hashes of the content, so a restarted agent and an Envoy that kept
running agree on what is new without any stored state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message


@dataclass(frozen=True, slots=True)
class Resource:
    """One resource as it goes over the wire: `body` is the serialized message without its type."""

    version: str
    body: bytes = field(repr=False)  # a secret's holds a private key


Resources = Mapping[str, Mapping[str, Resource]]
"""Type URL -> resource name -> resource."""


def pack(message: Message) -> Resource:
    """Serialize with map keys in order, so that equal content has an equal version."""
    body = message.SerializeToString(deterministic=True)
    return Resource(hashlib.blake2b(body, digest_size=9).hexdigest(), body)


def packed(message: Message) -> AnyMessage:
    """Return `message` as an Any whose bytes depend on nothing but its content."""
    result = AnyMessage()
    result.Pack(message, deterministic=True)
    return result
