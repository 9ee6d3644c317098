"""The way of commands to a controller: a unix socket, or TCP with an administrator's certificate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import grpc

TLS: Final = (
    click.option(
        "--tls-ca", type=click.Path(path_type=Path, exists=True), help="Who signs the controller's certificate, PEM; for HOST:PORT."
    ),
    click.option("--tls-cert", type=click.Path(path_type=Path, exists=True), help="Administrator's certificate, PEM."),
    click.option("--tls-key", type=click.Path(path_type=Path, exists=True), help="Its key, PEM."),
)


def fail(message: str) -> NoReturn:
    """End the command with one line and status 1."""
    raise click.ClickException(message)


def with_tls(command: Any) -> Any:
    """Give a command the options of TLS."""
    for option in reversed(TLS):
        command = option(command)
    return command


def unanswered(controller: str, error: grpc.RpcError, waited_s: float | None = None) -> str:
    """What to say of a call to a controller that failed; `waited_s`: its deadline, if it had one."""
    failed: Any = error  # what a stub raises is also a grpc.Call, which its type does not say
    code, details = failed.code(), " ".join((failed.details() or "").split())
    if code is grpc.StatusCode.UNAVAILABLE:
        return f"controller {controller} is not reachable ({details}): is `mesh-controller run` up? give its address with --controller"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and waited_s is not None:
        return f"controller {controller} did not answer within {waited_s:g} s: look at its log"
    return f"controller {controller}: {details or code.name.lower().replace('_', ' ')}"


def channel(controller: str, tls: Mapping[str, Path | None]) -> grpc.Channel:
    """Return a channel. Raises click.UsageError if options are missing; ends the command if a file cannot be read."""
    options = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
    if controller.startswith("unix:"):
        return grpc.insecure_channel(controller, options=options)
    ca, certificate, key = tls["tls_ca"], tls["tls_cert"], tls["tls_key"]
    if ca is None or certificate is None or key is None:
        raise click.UsageError(f"--controller {controller} is reached over TCP: give --tls-ca, --tls-cert and --tls-key, or a unix: target")
    try:
        credentials = grpc.ssl_channel_credentials(ca.read_bytes(), key.read_bytes(), certificate.read_bytes())
    except OSError as error:
        fail(f"cannot read {error.filename}: {error.strerror}")
    return grpc.secure_channel(controller, credentials, options=options)
