"""Where the page is served, and to whom: what `mesh-controller run --page-…` says, checked."""

from __future__ import annotations

import ipaddress
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from cryptography import x509

from controller.errors import ControllerError

SHORTEST_TOKEN: Final = 32
"""Characters; 32 hexadecimal digits are 128 bits."""
_PATH: Final = click.Path(path_type=Path)
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*", re.ASCII)  # RFC 6750, section 2.1
_OPTIONS: Final = (
    click.option(
        "--page-listen",
        metavar="HOST:PORT|unix:PATH",
        default="",
        help="Where the page with the graph of the mesh is served. Default: nowhere.",
    ),
    click.option(
        "--page-token-file",
        type=_PATH,
        help="Who shows this token may see the page's data; needed where --page-listen is not this machine.",
    ),
    click.option("--page-tls-cert", type=_PATH, help="Certificate of the page, PEM; needed where --page-listen is not this machine."),
    click.option("--page-tls-key", type=_PATH, help="Its key, PEM."),
)
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class PageSettings:
    """The options, as they were given. `listen` is HOST:PORT or unix:PATH."""

    page_listen: str
    page_token_file: Path | None = None
    page_tls_cert: Path | None = None
    page_tls_key: Path | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where to listen: `socket`, or `host` and `port`. `names`: hosts by which browsers may call it."""

    socket: Path | None
    host: str
    port: int
    names: frozenset[str]
    token: bytes = field(repr=False)
    """b"": none is asked for."""
    tls: ssl.SSLContext | None


def page_options(command: F) -> F:
    """Add the options to a command, which gets them as one parameter `page`: PageSettings, or None without --page-listen."""

    def gathered(**values: Any) -> Any:
        given = PageSettings(**{item.name: values.pop(item.name) for item in fields(PageSettings)})
        return command(page=_complete(given), **values)

    gathered.__name__, gathered.__doc__ = command.__name__, command.__doc__
    gathered.__click_params__ = list(getattr(command, "__click_params__", ()))  # type: ignore[attr-defined]
    for option in reversed(_OPTIONS):
        option(gathered)
    return gathered  # type: ignore[return-value]


def _complete(given: PageSettings) -> PageSettings | None:
    if given.page_listen:
        return given
    if lonely := [f"--{item.name.replace('_', '-')}" for item in fields(given) if getattr(given, item.name)]:
        raise click.UsageError(f"{', '.join(lonely)} without --page-listen: there is no page")
    return None


def place(settings: PageSettings) -> Place:
    """Read the files and decide. Raises ControllerError for what must not be, or cannot be, served."""
    listen, local = settings.page_listen, {"localhost", "127.0.0.1", "::1"}
    if (settings.page_tls_cert is None) != (settings.page_tls_key is None):
        raise ControllerError("--page-tls-cert and --page-tls-key belong together: give both or neither")
    token = _token(settings.page_token_file) if settings.page_token_file else b""
    if listen.startswith("unix:"):
        if settings.page_tls_cert:
            raise ControllerError(f"--page-listen {listen} is a unix socket: it has no TLS; leave out --page-tls-cert and --page-tls-key")
        return Place(Path(listen.removeprefix("unix:")), "", 0, frozenset(local), token, None)
    host, _, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        address, number = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host), int(port)
    except ValueError as error:
        raise ControllerError(f"--page-listen {listen!r} is neither ADDRESS:PORT nor unix:PATH: give, say, 127.0.0.1:15012") from error
    tls, names = _tls(settings) if settings.page_tls_cert and settings.page_tls_key else (None, set())
    if address.is_loopback:
        return Place(None, str(address), number, frozenset(local | names | {str(address)}), token, tls)
    missing = [name for name, given in (("--page-token-file", token), ("--page-tls-cert", tls), ("--page-tls-key", tls)) if not given]
    if missing:
        raise ControllerError(
            f"--page-listen {listen} can be reached from other machines, and {', '.join(missing)} is not given: who may see the mesh, and how do they"
            " know that it is this one? Give all of --page-token-file, --page-tls-cert and --page-tls-key, or listen on 127.0.0.1 and use ssh -L"
        )
    return Place(None, str(address), number, frozenset(names), token, tls)


def _token(path: Path) -> bytes:
    try:
        readable = path.stat().st_mode & 0o007
        text = path.read_text("utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise ControllerError(f"cannot read --page-token-file {path}: {error}") from error
    if readable:
        raise ControllerError(f"--page-token-file {path} can be opened by everybody on this machine: chmod o= {path}, and make a new token")
    if len(text) < SHORTEST_TOKEN or not _TOKEN.fullmatch(text):
        raise ControllerError(
            f"--page-token-file {path} holds no token of {SHORTEST_TOKEN} or more letters and digits: make one with `openssl rand -hex 32`"
        )
    return text.encode()


def _tls(settings: PageSettings) -> tuple[ssl.SSLContext, set[str]]:
    """The context, and the names in the certificate: by them, and by no other, is the page called."""
    certificate, key = settings.page_tls_cert, settings.page_tls_key
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(str(certificate), key and str(key), password=lambda: "")
        found = x509.load_pem_x509_certificate(certificate.read_bytes() if certificate else b"")
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ControllerError(
            f"--page-tls-cert {certificate} and --page-tls-key {key} are no PEM certificate and its unencrypted key: {error}"
        ) from error
    except x509.ExtensionNotFound as error:
        raise ControllerError(f"--page-tls-cert {certificate} names no host (subjectAltName): browsers would refuse it") from error
    dns = {name.lower() for name in names.get_values_for_type(x509.DNSName)}
    return context, dns | {str(address) for address in names.get_values_for_type(x509.IPAddress)}
