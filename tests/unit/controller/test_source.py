from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.conflicts import resolve
from controller.errors import ControllerError
from controller.files import write_atomically
from controller.objects import Key, Object
from controller.source import Source, State


def service(name: str, address: str, extra: str = "") -> str:
    return f"apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {address}, {extra}ports: [{{port: 80}}]}}\n"


def policy(action: str) -> str:
    return (
        f"apiVersion: meshagent.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: p}}\nspec: {{action: {action}, rules: [{{}}]}}\n"
    )


def names(state: State) -> list[str]:
    return sorted(key.name for key in state.objects)


def said(state: State, directory: Path) -> list[str]:
    return [str(problem).replace(f"{directory}/", "") for problem in state.problems]


POLICY = Key("AuthorizationPolicy", "default", "p")


def test_the_good_files_apply_beside_broken_ones(directory: Path) -> None:
    (directory / "a.yaml").write_text("a: [\n")
    (directory / "b.yaml").write_text(service("one", "10.0.0.1") + "---\n" + service("two", "10.0.0.2", "typo: 1, "))
    (directory / ".hidden.yaml").write_text(service("hidden", "10.0.0.3"))
    (directory / "c.yaml~").write_text(service("backup", "10.0.0.4"))
    (directory / "sub").mkdir()
    (directory / "sub" / "d.yml").write_text(service("three", "10.0.0.5"))
    state = Source(directory).start()
    assert names(state) == ["one", "three"]
    problems = said(state, directory)
    assert problems[0].startswith("a.yaml:2: not YAML")
    assert problems[1] == 'b.yaml:9 Service/two spec.typo: unknown field; did you mean "type"?'
    assert len(problems) == 2


def test_an_invalid_object_keeps_its_last_good_version_and_its_neighbours_change(directory: Path) -> None:
    file = directory / "a.yaml"
    file.write_text(policy("DENY") + "---\n" + service("one", "10.0.0.1"))
    source = Source(directory)
    source.start()
    file.write_text(policy("DENNY") + "---\n" + service("one", "10.0.0.7"))
    state = source.load()
    assert state.objects[POLICY].spec["action"] == "DENY"
    assert state.objects[Key("Service", "default", "one")].spec["clusterIP"] == "10.0.0.7"
    assert said(state, directory) == [
        'a.yaml:4 AuthorizationPolicy/p spec.action: must be "ALLOW" or "DENY" or "AUDIT", not "DENNY"; did you mean "DENY"?'
    ]
    assert POLICY in state.refused


def test_an_unreadable_file_keeps_all_its_objects_until_it_is_gone(directory: Path) -> None:
    file = directory / "a.yaml"
    file.write_text(policy("DENY") + "---\n" + service("one", "10.0.0.1"))
    source = Source(directory)
    source.start()
    file.write_text(policy("DENY") + "---\n{{{")
    assert names(source.load()) == ["one", "p"]
    file.unlink()
    assert names(source.load()) == []


def test_a_document_that_lost_its_name_keeps_the_object_that_it_was(directory: Path) -> None:
    file = directory / "a.yaml"
    file.write_text(policy("DENY"))
    source = Source(directory)
    source.start()
    file.write_text(policy("DENY").replace("kind: AuthorizationPolicy", "kind: AuthorisationPolicy"))
    assert names(source.load()) == ["p"]


def test_the_last_good_version_survives_a_restart(directory: Path) -> None:
    file = directory / "a.yaml"
    file.write_text(policy("DENY"))
    source = Source(directory)
    source.start()
    file.write_text(policy("DENY") + "  bad: indent: here\n")
    source.load()
    again = Source(directory)
    assert again.start().objects[POLICY].spec["action"] == "DENY"
    file.write_text(policy("ALLOW"))
    assert again.load().objects[POLICY].spec["action"] == "ALLOW"
    assert names(Source(directory).start()) == ["p"]
    assert [path.name for path in directory.iterdir()] == ["a.yaml"]


def test_of_two_files_with_one_object_the_first_counts(directory: Path) -> None:
    (directory / "b.yaml").write_text(service("one", "10.0.0.2"))
    (directory / "a.yaml").write_text(service("one", "10.0.0.1"))
    state = Source(directory).start()
    assert state.objects[Key("Service", "default", "one")].spec["clusterIP"] == "10.0.0.1"
    (line,) = said(state, directory)
    assert line == "b.yaml:1 Service/one metadata.name: is already there in a.yaml, which counts; remove one of the two"


def test_of_two_services_with_one_address_the_later_is_refused_with_the_others_name(directory: Path) -> None:
    (directory / "a.yaml").write_text(service("one", "10.0.0.1"))
    (directory / "b.yaml").write_text(service("two", "10.0.0.1"))
    state = Source(directory).start()
    assert names(state) == ["one"]
    assert said(state, directory) == ["b.yaml:4 Service/two spec.clusterIP: 10.0.0.1 port 80 already belongs to Service default/one"]


def test_nobody_takes_an_address_that_is_in_force_by_sorting_first(directory: Path) -> None:
    (directory / "b.yaml").write_text(service("one", "10.0.0.1"))
    source = Source(directory)
    source.start()
    (directory / "a.yaml").write_text(service("thief", "10.0.0.1"))
    assert names(source.load()) == ["one"]


def test_a_service_that_moves_to_a_taken_address_stays_where_it_was(directory: Path) -> None:
    (directory / "a.yaml").write_text(service("one", "10.0.0.1"))
    (directory / "b.yaml").write_text(service("two", "10.0.0.2"))
    source = Source(directory)
    source.start()
    (directory / "a.yaml").write_text(service("one", "10.0.0.2"))
    state = source.load()
    assert {key.name: item.spec["clusterIP"] for key, item in state.objects.items()} == {"one": "10.0.0.1", "two": "10.0.0.2"}


def test_two_services_may_swap_their_addresses(directory: Path) -> None:
    (directory / "a.yaml").write_text(service("one", "10.0.0.1") + "---\n" + service("two", "10.0.0.2"))
    source = Source(directory)
    source.start()
    (directory / "a.yaml").write_text(service("one", "10.0.0.2") + "---\n" + service("two", "10.0.0.1"))
    state = source.load()
    assert state.problems == ()
    assert {key.name: item.spec["clusterIP"] for key, item in state.objects.items()} == {"one": "10.0.0.2", "two": "10.0.0.1"}


def test_two_workloads_cannot_have_one_address(directory: Path) -> None:
    text = "apiVersion: meshagent.io/v1alpha1\nkind: Workload\nmetadata: {name: %s}\nspec: {node: n, addresses: [%s]}\n"
    (directory / "a.yaml").write_text(text % ("one", "10.0.0.1") + "---\n" + text % ("two", "10.0.0.2, 10.0.0.1"))
    state = Source(directory).start()
    assert names(state) == ["one"]
    assert said(state, directory) == ["a.yaml:9 Workload/two spec.addresses[1]: 10.0.0.1 already belongs to Workload default/one"]


def test_staging_changes_nothing(directory: Path) -> None:
    (directory / "a.yaml").write_text(service("one", "10.0.0.1"))
    source = Source(directory)
    source.start()
    staged = source.stage({directory / "b.yaml": service("two", "10.0.0.2"), directory / "a.yaml": None})
    assert names(staged) == ["two"]
    assert names(source.load()) == ["one"]


def test_a_missing_directory_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ControllerError, match=r"cannot read the directory .*gone: No such file or directory; check --directory"):
        Source(tmp_path / "gone").start()


def age(file: Path) -> None:
    """Make a file look as if nobody had written to it for a while."""
    past = time.time() - 5
    os.utime(file, (past, past))


def workload(name: str, address: str) -> str:
    return f"apiVersion: meshagent.io/v1alpha1\nkind: Workload\nmetadata: {{name: {name}}}\nspec: {{node: n, addresses: ['{address}']}}\n"


def test_spellings_of_one_ipv6_address_collide(directory: Path) -> None:
    (directory / "a.yaml").write_text(workload("one", "fd77::1:0:10") + "---\n" + workload("two", "FD77:0:0:0:0:1:0000:0010"))
    state = Source(directory).start()
    assert names(state) == ["one"]
    assert said(state, directory) == ["a.yaml:9 Workload/two spec.addresses[0]: fd77::1:0:10 already belongs to Workload default/one"]


def test_an_ipv4_mapped_spelling_takes_no_address(directory: Path) -> None:
    (directory / "a.yaml").write_text(workload("redis", "10.77.1.40") + "---\n" + workload("zed", "::ffff:10.77.1.40"))
    state = Source(directory).start()
    assert names(state) == ["redis"]
    assert len(state.problems) == 1


def test_a_mapped_address_that_got_past_the_checks_still_collides() -> None:
    checked = [
        Object(Key("Workload", "default", n), {"spec": {"addresses": [a]}}, "f", 1) for n, a in (("a", "10.0.0.1"), ("b", "::ffff:a00:1"))
    ]
    objects, problems = resolve(checked, {})
    assert [key.name for key in objects] == ["a"]
    assert [key.name for key in problems] == ["b"]


@pytest.fixture
def closed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """While this list holds an error number, `sub` cannot be listed (root may list everything, so permissions would not do)."""
    numbers: list[int] = []
    real = os.scandir

    def scandir(path: str) -> object:
        if numbers and Path(path) == directory / "sub":
            raise OSError(numbers[0], os.strerror(numbers[0]), path)
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        yield numbers


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_read_keeps_what_its_files_said_even_after_a_restart(
    directory: Path, closed: list[int], number: int
) -> None:
    deep = directory / "sub" / "deep"
    deep.mkdir(parents=True)
    (deep / "p.yaml").write_text(policy("DENY"))
    (directory / "sub" / "one.yaml").write_text(service("one", "10.0.0.1"))
    (directory / "two.yaml").write_text(service("two", "10.0.0.2"))
    source = Source(directory)
    assert source.start().problems == ()
    closed.append(number)
    (directory / "two.yaml").write_text(service("three", "10.0.0.3"))
    for state in (source.load(), source.load(), Source(directory).start()):
        assert names(state) == ["one", "p", "three"]
        assert said(state, directory) == [f"sub:1: this folder cannot be read: {os.strerror(number)}; what its files said stays in force"]
    closed.clear()
    (deep / "p.yaml").unlink()
    state = source.load()
    assert names(state) == ["one", "three"]
    assert state.problems == ()


def test_a_folder_that_vanishes_while_it_is_read_is_gone(directory: Path, closed: list[int]) -> None:
    (directory / "sub").mkdir()
    (directory / "sub" / "one.yaml").write_text(service("one", "10.0.0.1"))
    source = Source(directory)
    source.start()
    closed.append(errno.ENOENT)
    state = source.load()
    assert (names(state), state.problems) == ([], ())


@pytest.mark.parametrize("rest", ["", "# soon\n", policy("DENY")])
def test_objects_vanish_from_within_a_file_only_when_it_is_settled(directory: Path, rest: str) -> None:
    file = directory / "a.yaml"
    file.write_text(policy("DENY") + "---\n" + service("one", "10.0.0.1"))
    source = Source(directory)
    source.start()
    file.write_text(rest)
    assert names(source.load()) == ["one", "p"]
    assert source.unsettled
    assert names(source.load()) == ["one", "p"]
    age(file)
    state = source.load()
    assert names(state) == (["p"] if rest.startswith("api") else [])
    assert (source.unsettled, state.problems) == (False, ())


def test_a_file_that_was_broken_before_it_was_emptied_keeps_its_objects_too(directory: Path) -> None:
    file = directory / "a.yaml"
    file.write_text(policy("DENY"))
    source = Source(directory)
    source.start()
    file.write_text("{{{")
    source.load()
    file.write_text("")
    assert names(source.load()) == ["p"]
    assert names(Source(directory).start()) == ["p"]


def test_a_time_in_the_future_delays_nothing(directory: Path) -> None:
    file = directory / "a.yaml"
    file.write_text(policy("DENY"))
    source = Source(directory)
    source.start()
    file.write_text("")
    os.utime(file, (time.time() + 3600, time.time() + 3600))
    assert names(source.load()) == []


def test_a_renamed_or_deleted_file_counts_at_once(directory: Path) -> None:
    file, other = directory / "a.yaml", directory / "b.yaml"
    file.write_text(policy("DENY") + "---\n" + service("one", "10.0.0.1"))
    other.write_text(service("two", "10.0.0.2"))
    source = Source(directory)
    source.start()
    write_atomically(file, service("one", "10.0.0.1"))
    other.unlink()
    assert names(source.load()) == ["one"]
    assert not source.unsettled


def test_a_memory_that_cannot_be_written_is_said(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, _text: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("controller.source.write_atomically", refuse)
    file = directory / "a.yaml"
    file.write_text(policy("DENY"))
    source = Source(directory)
    assert source.start().problems == ()
    file.write_text(policy("DENNY"))
    expected = (
        ".meshagent-last-good.yaml:1: cannot be written: Read-only file system; a restart would lose the last good version of "
        "AuthorizationPolicy default/p: make the directory writable or repair the files"
    )
    first, second = source.load(), source.load()
    assert said(first, directory)[0] == expected
    assert second.problems == first.problems
    assert len(first.problems) == 2
    file.write_text(policy("ALLOW"))
    assert source.load().problems == ()


def test_a_duplicate_is_not_a_last_good_version(directory: Path) -> None:
    (directory / "a.yaml").write_text(service("one", "10.0.0.1"))
    (directory / "b.yaml").write_text(service("one", "10.0.0.2"))
    Source(directory).start()
    assert sorted(path.name for path in directory.iterdir()) == ["a.yaml", "b.yaml"]
