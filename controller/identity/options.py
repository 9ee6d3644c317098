"""Options about identity on the command line, for `mesh-controller run`. Turns them into IdentitySettings; used by `controller.main`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from controller.identity.ca import CaSettings
from controller.identity.certificates import BACKDATE_S
from controller.identity.kubernetes import ApiServer
from controller.identity.operator import Intermediate
from controller.identity.plane import IdentitySettings

_PATH: Final = click.Path(path_type=Path)
_MOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
F = TypeVar("F", bound=Callable[..., Any])


class Span(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A length of time such as 90s, 15m, 24h or 7d; seconds."""

    name = "duration"

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest, self._longest = shortest, longest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return seconds; click shows what is wrong."""
        found = re.fullmatch(r"([0-9]{1,9})([smhd])", str(value))
        if found is None:
            self.fail(f"{value!r} is not a number with a unit: 90s, 15m, 24h or 7d", param, ctx)
        seconds = int(found[1]) * _UNITS[found[2]]
        if not self._shortest <= seconds <= self._longest:
            self.fail(f"{value!r} is not between {self._shortest} s and {self._longest} s", param, ctx)
        return seconds


_OPTIONS: Final = (
    click.option(
        "--ca-directory", type=_PATH, help="State of the certificate authority; its self-made root too. Without it there is none."
    ),
    click.option("--ca-cert", type=_PATH, help="An operator's intermediate signs instead of the self-made root, PEM."),
    click.option("--ca-key", type=_PATH, help="Its key, PEM."),
    click.option("--ca-command", default="", help="A command signs: CSR on stdin, chain on stdout, PEM; names in MESHAGENT_SPIFFE_ID."),
    click.option("--ca-root", type=_PATH, help="Roots that are trusted besides the self-made one, PEM; what the two above lead to."),
    click.option("--svid-lifetime", type=Span(BACKDATE_S, 90 * 86_400), default="24h", help="Of certificates; renewed at half of it."),
    click.option(
        "--join-listen", metavar="HOST:PORT", default="", help="TCP address where nodes join, with a token; port 15011 by custom."
    ),
    click.option("--server-name", multiple=True, metavar="NAME|ADDRESS", help="In the controller's own certificate; may be repeated."),
    click.option("--kubernetes-api", metavar="URL", default="", help="API server that checks service-account tokens of nodes that join."),
    click.option("--kubernetes-ca", type=_PATH, default=_MOUNT / "ca.crt", help="Who signed its certificate, PEM."),
    click.option("--kubernetes-token", type=_PATH, default=_MOUNT / "token", help="The controller's own token for it."),
    click.option("--kubernetes-agent", metavar="NAMESPACE/NAME", default="meshagent/agent", help="Service account of the agents."),
)


@dataclass(frozen=True, slots=True)
class Given:
    """The options above, as click gives them."""

    ca_directory: Path | None
    ca_cert: Path | None
    ca_key: Path | None
    ca_command: str
    ca_root: Path | None
    svid_lifetime: int
    join_listen: str
    server_name: tuple[str, ...]
    kubernetes_api: str
    kubernetes_ca: Path
    kubernetes_token: Path
    kubernetes_agent: str


def identity_options(command: F) -> F:
    """Add the options to a command, which gets them as one parameter `identity`."""

    def gathered(**values: Any) -> Any:
        given = Given(**{field.name: values.pop(field.name) for field in fields(Given)})
        return command(identity=given, **values)

    gathered.__name__, gathered.__doc__ = command.__name__, command.__doc__
    gathered.__click_params__ = list(getattr(command, "__click_params__", ()))  # type: ignore[attr-defined]
    for option in reversed(_OPTIONS):
        option(gathered)
    return gathered  # type: ignore[return-value]


def identity_settings(given: Given) -> IdentitySettings | None:
    """Return the settings, None without --ca-directory. Raises click.UsageError for options that do not go together."""
    if given.ca_directory is None:
        names = {
            "--ca-cert": given.ca_cert,
            "--ca-key": given.ca_key,
            "--ca-command": given.ca_command,
            "--ca-root": given.ca_root,
            "--join-listen": given.join_listen,
            "--kubernetes-api": given.kubernetes_api,
        }
        if lonely := [name for name, value in names.items() if value]:
            raise click.UsageError(f"{', '.join(lonely)} without --ca-directory: the certificate authority keeps its state there")
        return None
    if (given.ca_cert is None) != (given.ca_key is None):
        raise click.UsageError("--ca-cert and --ca-key belong together: give both or neither")
    if given.ca_cert and given.ca_command:
        raise click.UsageError("--ca-cert and --ca-command exclude each other: one of them signs")
    if (given.ca_cert or given.ca_command) and given.ca_root is None:
        raise click.UsageError("--ca-cert and --ca-command need --ca-root: what agents are to trust")
    if given.kubernetes_api and not given.join_listen:
        raise click.UsageError("--kubernetes-api without --join-listen: nobody could join")
    if given.join_listen and not given.join_listen.rpartition(":")[2].isdigit():
        raise click.UsageError(f"--join-listen {given.join_listen!r} is not HOST:PORT")
    intermediate = Intermediate(given.ca_cert, given.ca_key) if given.ca_cert and given.ca_key else None
    ca = CaSettings(given.ca_directory, intermediate, given.ca_command, given.ca_root, given.svid_lifetime)
    kubernetes = None
    if given.kubernetes_api:
        kubernetes = ApiServer(given.kubernetes_api, given.kubernetes_ca, given.kubernetes_token, given.kubernetes_agent)
    return IdentitySettings(ca, given.join_listen, given.server_name, kubernetes)
