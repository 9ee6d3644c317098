"""`meshagent`: the group, and how failures become one line and an exit code: 0 good, 1 negative answer, 2 misuse.

Other packages add subcommands through the entry point group "meshagent.commands"; so `lab` is there without the agent importing it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from collections.abc import Iterator

import click
import grpc
from click.shell_completion import get_completion_class

from agent.cli import check, daemon, graph, identity, observe, policy, resources
from agent.errors import MeshError

PLUGINS = "meshagent.commands"


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """Turn failures that an operator can act on into one line of click's, "Error: …", which misuse has too, and exit code 1."""
    try:
        yield
    except MeshError as error:
        raise click.ClickException(str(error)) from error
    except grpc.RpcError as error:  # pragma: no cover  each command words the likely ones itself
        raise click.ClickException(f"{error.code().name.lower()}: {error.details()}") from error


class Group(click.Group):
    """Shows failures that an operator can act on as one line."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command."""
        with failures():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Own commands and those of other packages."""
        return sorted({*super().list_commands(ctx), *(e.name for e in importlib.metadata.entry_points(group=PLUGINS))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load another package's command when it is asked for."""
        if own := super().get_command(ctx, cmd_name):
            return own
        for entry in importlib.metadata.entry_points(group=PLUGINS, name=cmd_name):
            command = entry.load()
            if isinstance(command, click.Command):
                return command
        return None


@click.group(cls=Group, context_settings={"auto_envvar_prefix": "MESHAGENT", "help_option_names": ["-h", "--help"]})
@click.version_option(importlib.metadata.version("meshagent"))
def main() -> None:
    """A service mesh without sidecars: eBPF at connect(), one Envoy per node where L7 is needed."""


@main.command(short_help="Print a completion script for a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a shell completion script: source <(meshagent completion bash)."""
    kind = get_completion_class(shell)
    if kind is None:
        raise click.ClickException(f"no completion for {shell}")
    click.echo(kind(main, {}, "meshagent", "_MESHAGENT_COMPLETE").source())


for command in (
    *(daemon.run, daemon.uninstall, daemon.upgrade_check),
    *(check.check, observe.status, observe.trace, graph.graph, policy.policy, identity.identity),
    *resources.commands,
):
    main.add_command(command)

if __name__ == "__main__":
    sys.exit(main())
