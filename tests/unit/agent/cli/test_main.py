"""The command's group: plugins, exit codes, one line for a failure."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from agent.cli.main import Group, main
from agent.errors import EnvironmentUnfit, NotFound
from controller.main import main as controller


@pytest.fixture
def group() -> Group:
    @click.group(cls=Group)
    def made() -> None:
        """A group."""

    @made.command()
    @click.argument("what")
    def fail(what: str) -> None:
        """Fail."""
        raise {"unfit": EnvironmentUnfit("no root: use sudo"), "absent": NotFound("no such name"), "bug": ValueError("a bug")}[what]

    assert isinstance(made, Group)
    return made


@pytest.mark.parametrize(("what", "said"), [("unfit", "Error: no root: use sudo\n"), ("absent", "Error: no such name\n")])
def test_a_failure_that_people_can_act_on_is_one_line_and_exit_code_1(group: Group, what: str, said: str) -> None:
    result = CliRunner().invoke(group, ["fail", what])
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", said)


@pytest.mark.parametrize(
    ("command", "arguments", "code"),
    [
        (main, ["get", "services", "--controller", "unix:/nowhere/c.sock"], 1),
        (main, ["status", "--run-dir", "/nowhere"], 1),
        (main, ["get"], 2),
        (controller, ["run", "--directory", "/nowhere"], 1),
        (controller, ["ca", "show", "--ca-directory", "/nowhere"], 1),
        (controller, ["ca", "show"], 2),
    ],
    ids=["no-controller", "no-agent", "misuse", "no-source", "no-authority", "misuse-of-the-controller"],
)
def test_whatever_fails_begins_its_last_line_with_error(command: click.Command, arguments: list[str], code: int) -> None:
    result = CliRunner().invoke(command, arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.splitlines()[-1].startswith("Error: ")


def test_a_bug_is_not_hidden(group: Group) -> None:
    assert isinstance(CliRunner().invoke(group, ["fail", "bug"]).exception, ValueError)


def test_the_lab_is_there_without_being_imported_by_the_agent() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for command in ("apply", "completion", "delete", "get", "lab", "run", "status", "trace", "uninstall"):
        assert f"\n  {command} " in result.stdout
    assert "exec" in CliRunner().invoke(main, ["lab", "--help"]).stdout


@pytest.mark.parametrize(
    ("command", "group"),
    [
        (main, []),
        (main, ["identity"]),
        (main, ["policy"]),
        (main, ["lab"]),
        (controller, []),
        (controller, ["ca"]),
        (controller, ["token"]),
    ],
    ids=["meshagent", "identity", "policy", "lab", "mesh-controller", "ca", "token"],
)
def test_every_command_is_told_of_in_a_line_that_is_not_cut_off(command: click.Command, group: list[str]) -> None:
    listed = CliRunner().invoke(command, [*group, "--help"], terminal_width=80).stdout.partition("Commands:\n")[2].splitlines()
    assert listed
    assert [line for line in listed if not line.startswith("  ") or line.endswith("...")] == []


def test_the_version_is_printed() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert (result.exit_code, result.stdout.split()[-1].count(".")) == (0, 2)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert "_MESHAGENT_COMPLETE" in result.stdout


@pytest.mark.parametrize("arguments", [["no-such"], ["completion"], ["completion", "tcsh"], ["--no-such"], ["lab", "no-such"]])
def test_misuse_is_exit_code_2(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ")
