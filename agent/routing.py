"""What a rule of a route does with a request beside forwarding it: the filters of Gateway API, as the agent sees them. Part of `agent.model`.

The field meanings are those of meshapi/discovery.proto; https://gateway-api.sigs.k8s.io/reference/spec/#httproutefilter.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshapi import discovery_pb2 as pb


@dataclass(frozen=True, slots=True)
class Redirect:
    """An answer that sends the client elsewhere; what is empty, 0 or None is as in the request."""

    scheme: str = ""
    hostname: str = ""
    port: int = 0
    full_path: str | None = None
    prefix: str | None = None
    """Instead of the prefix that the rule's one match has."""
    status: int = 302

    @staticmethod
    def of(m: pb.Redirect) -> Redirect:
        """Decode."""
        return Redirect(m.scheme, m.hostname, m.port, *_paths(m), m.status)


@dataclass(frozen=True, slots=True)
class Rewrite:
    """Another Host or path for the backend; what is empty or None stays."""

    hostname: str = ""
    full_path: str | None = None
    prefix: str | None = None
    """Instead of the prefix that the rule's one match has."""

    @staticmethod
    def of(m: pb.Rewrite) -> Rewrite:
        """Decode."""
        return Rewrite(m.hostname, *_paths(m))


@dataclass(frozen=True, slots=True)
class Mirror:
    """Copies of `parts` in `whole` (100, 10,000 or 1,000,000) requests go to a service port."""

    service: str
    port: int
    parts: int
    whole: int


@dataclass(frozen=True, slots=True)
class Cors:
    """Cross-origin resource sharing; `origins` are (is a regular expression, text), the other texts stand so in the headers."""

    origins: tuple[tuple[bool, str], ...]
    methods: str
    headers: str
    expose: str
    max_age_s: int
    credentials: bool


@dataclass(frozen=True, slots=True)
class Session:
    """Session persistence, by a cookie (with a path, and a lifetime in milliseconds or 0) or by a header."""

    cookie: str
    path: str
    lifetime_ms: int
    header: str


def _paths(m: pb.Redirect | pb.Rewrite) -> tuple[str | None, str | None]:
    return m.full_path if m.HasField("full_path") else None, m.prefix if m.HasField("prefix") else None
