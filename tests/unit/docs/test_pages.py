"""README, ARCHITECTURE and docs name commands, options, files, functions and metrics that exist. What the commands do other tests show."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from ruamel.yaml import YAML

from agent.cli import kubectl
from agent.cli.main import main as meshagent
from controller.main import main as mesh_controller
from lab import demo

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {"meshagent": meshagent, "mesh-controller": mesh_controller}
OTHERS_OPTIONS = {"--network=host", "--register-with-taints=meshagent.io/not-ready:NoSchedule"}
"""Written alone, of gVisor and of the kubelet."""

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`]+)`")
_OF_OURS = re.compile(r"(?:^|[\s$(;]|\.venv/bin/)((?:kubectl )?(?:meshagent|mesh-controller)(?: [^`;#)\n]+)?)")
_ENDINGS = (".py", ".c", ".h", ".sock", ".log", ".json", ".crt", ".tar", ".events")
"""Of files."""
_PLACES = ("agent/", "bench/", "bpf_src/", "controller/", "deploy/", "docs/", "lab/", "meshapi/", "scripts/", "tests/")


class Written(NamedTuple):
    """A piece of code of a page."""

    page: str
    text: str


def code() -> Iterator[Written]:
    """Lines of blocks that are no YAML and no output, and code in running text."""
    for page in PAGES:
        text = page.read_text()
        for language, block in _BLOCK.findall(text):
            lines = block.splitlines()
            typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
            for line in [] if language else typed or lines:
                yield Written(page.name, line)
        for found in _INLINE.findall(_BLOCK.sub("", text)):
            yield Written(page.name, " ".join(found.split()))


CODE = list(code())


def commands() -> Iterator[Written]:
    """Every command of ours, with what follows it."""
    for page, text in CODE:
        if text.startswith("helm "):
            continue  # meshagent is a release there
        for found in _OF_OURS.findall(text):
            yield Written(page, found.strip())


def options(command: click.Command) -> set[str]:
    """How its options are spelt."""
    return {"-h", "--help", *(name for one in command.params for name in (*one.opts, *one.secondary_opts))}


def wrong(line: str) -> str:
    """What a command line names that is not there; "" if all is."""
    words = re.sub(r"[\[\]]", "", line).split()
    through = words[0] == "kubectl"
    command: click.Command = PROGRAMS[words[through]]
    rest = words[through + 1 :]
    if through and rest and rest[0] not in {*kubectl.IN_AGENTS, "check", "…"}:
        return f"kubectl meshagent has no {rest[0]}"
    known = set(kubectl._FLAGS) if through else set()
    while isinstance(command, click.Group) and rest and not rest[0].startswith(("-", "…")):
        name = rest.pop(0)
        found = command.get_command(click.Context(command), name)
        if found is None:
            return f"{command.name} has no {name}"
        command = found
        if rest[:1] == ["|"]:  # two commands in one
            del rest[0]
            return wrong(" ".join([*words[: len(words) - len(rest) - 2], *rest]))
    if isinstance(command, click.Group) and rest and not rest[0].startswith(("-", "…")):
        return f"{command.name} has no {rest[0]}"
    rest = rest[: rest.index("--")] if "--" in rest else rest
    known |= options(command)
    missing = [word for word in rest if word.startswith("-") and word != "-" and word.partition("=")[0] not in known]
    return f"{command.name} has no {', '.join(missing)}" if missing else ""


@pytest.mark.parametrize("written", sorted(set(commands())), ids=lambda one: f"{one.page}: {one.text[:60]}")
def test_a_command_that_a_page_names_is_there_with_its_options(written: Written) -> None:
    assert wrong(written.text) == ""


@pytest.mark.parametrize(
    "line",
    [
        "meshagent trase a b",
        "meshagent trace a b --probing",
        "meshagent identity shew x",
        "meshagent identity list | shew x",
        "kubectl meshagent uninstall",
        "kubectl meshagent check --nod x",
        "mesh-controller token created",
    ],
)
def test_a_command_that_is_not_there_is_found(line: str) -> None:
    assert wrong(line)


def test_an_option_that_a_page_names_alone_is_there() -> None:
    known = OTHERS_OPTIONS | set(kubectl._FLAGS)
    pending: list[click.Command] = [*PROGRAMS.values()]
    while pending:
        command = pending.pop()
        known |= options(command)
        if isinstance(command, click.Group):
            names = command.list_commands(click.Context(command))
            pending += [found for name in names if (found := command.get_command(click.Context(command), name))]
    alone = {(page, text.split()[0]) for page, text in CODE if text.startswith("--")}
    assert len(alone) > 11
    assert {(page, name) for page, name in alone if name not in known and name.partition("=")[0] not in known} == set()


def test_a_variable_that_a_page_names_is_an_option() -> None:
    known = set()
    for prefix, program in (("MESHAGENT", meshagent), ("MESH_CONTROLLER", mesh_controller)):
        for name, command in program.commands.items():
            known |= {f"{prefix}_{name}_{one.name}".replace("-", "_").upper() for one in command.params}
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"\b(?:MESHAGENT|MESH_CONTROLLER)_RUN_\w+", text))
    assert named
    assert named - known == set()


def test_targets_of_make_that_pages_name_are_there() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {(page, name) for page, text in CODE for name in re.findall(r"\bmake ([a-z0-9-]+)", text)}
    assert len(named) > 11
    assert {(page, name) for page, name in named if name not in targets} == set()


def anchors(page: Path) -> set[str]:
    """Those that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", _BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        file = page.parent / target if target else page
        assert target.startswith("https://") or file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def files(texts: Iterable[Written]) -> Iterator[Written]:
    """What looks like a file of the repository."""
    for page, text in texts:
        for word in re.findall(r"[\w./-]+", re.sub(r" exec deploy/\S+", "", text)):
            if word.startswith(_PLACES):
                yield Written(page, word.rstrip("."))


def test_files_that_pages_name_are_there() -> None:
    named = sorted(set(files(CODE)))
    assert len(named) > 40
    assert [one for one in named if not (ROOT / one.text).exists()] == []


def source() -> str:
    """All code of agent, controller, lab and kernel programs."""
    found = (path for top in ("agent", "controller", "meshapi", "lab", "bpf_src") for path in sorted((ROOT / top).rglob("*.*")))
    return "\n".join(path.read_text() for path in found if path.suffix in {".py", ".c", ".h"})


SOURCE = source()


def test_programs_maps_and_metrics_that_pages_name_are_there() -> None:
    named = {(page, name) for page, text in CODE for name in re.findall(r"\bmesh_[a-z0-9_]+\b", text)}
    assert len(named) > 40
    missing = set()
    for page, name in named:
        # A histogram's and a counter's endings are made by the metrics' library, the families of a program by its macro.
        stem = re.sub(r"_(total|bucket|count|sum)$|(?<=[a-z])[46]$", "", name)
        if not re.search(rf"\b{stem}[46]?\b", SOURCE):
            missing.add((page, name))
    assert missing == set()


def test_functions_and_classes_that_the_architecture_names_are_there() -> None:
    named = {text for page, text in CODE if page == "ARCHITECTURE.md" and re.fullmatch(r"[A-Z]\w+\.[a-z_]+|[a-z]\w+\._?[a-z_]+", text)}
    named = {one for one in named if not one.endswith(_ENDINGS)}
    assert len(named) > 5
    missing = []
    for one in named:
        owner, _, name = one.partition(".")
        if owner[0].isupper():
            found = re.search(rf"^class {owner}\b(?:.|\n)*?^    (?:(?:async )?def {name}\b|{name}: )", SOURCE, re.MULTILINE)
        else:
            module = [path for top in ("agent", "controller") for path in (ROOT / top).rglob(f"{owner}.py")]
            found = next((hit for path in module if (hit := re.search(rf"^(?:async )?def {name}\b", path.read_text(), re.MULTILINE))), None)
        if not found:
            missing.append(one)
    assert missing == []


def test_values_of_the_chart_that_pages_name_are_there() -> None:
    values = YAML(typ="safe").load((ROOT / "deploy/helm/meshagent/values.yaml").read_text())
    named = {
        (page, found)
        for page, text in CODE
        for found in re.findall(r"(?<![\w./-])((?:" + "|".join(values) + r")\.[a-zA-Z]+(?:\.[a-zA-Z]+)*)", text)
        if not found.endswith(_ENDINGS)
    }
    assert len(named) > 7

    def there(path: str) -> bool:
        found = values
        for name in path.split("."):
            if not isinstance(found, dict) or name not in found:
                return False
            found = found[name]
        return True

    assert {(page, path) for page, path in named if not there(path)} == set()


def test_labels_and_annotations_that_the_mesh_reads_are_told_of() -> None:
    read = set(re.findall(r'"(meshagent\.io/[a-z-]+)"', SOURCE)) - {"meshagent.io/controller"}
    assert len(read) > 7
    told = "\n".join(page.read_text() for page in PAGES)
    assert [name for name in sorted(read) if name not in told] == []


def test_the_table_of_the_demo_is_what_the_demo_says() -> None:
    rows = re.findall(r"^ok  (.+?)  ", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert rows == [one.text for one in demo.EXPECTATIONS]


def test_the_architecture_names_every_package() -> None:
    tops = ("agent", "bench", "controller", "deploy", "lab", "meshapi")
    packages = {str(one.parent.relative_to(ROOT)) for top in tops for one in (ROOT / top).rglob("__init__.py")}
    assert len(packages) > 17
    section = (ROOT / "ARCHITECTURE.md").read_text().partition("## Where what is")[2].partition("\n## ")[0]
    assert packages - set(_INLINE.findall(section)) == set()
