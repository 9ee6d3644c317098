"""What is held compactly behaves as what it stands for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.compact import Labels, Shared, Table, differing

NAMES = st.text(max_size=3)


@given(st.lists(st.dictionaries(NAMES, st.none() | st.integers(), max_size=6), max_size=8))
def test_a_table_is_the_dict_with_the_same_history_and_earlier_ones_stay(history: list[dict[str, int | None]]) -> None:
    expected: dict[str, int] = {}
    tables: list[tuple[Table[int], dict[str, int]]] = [(Table(), {})]
    for changes in history:
        for name, value in changes.items():
            expected.pop(name, None)
            if value is not None:
                expected[name] = value
        tables.append((tables[-1][0].changed(changes), dict(expected)))
    for table, content in tables:
        assert table == content
        assert len(table) == len(content)
        assert sorted(table) == sorted(table.keys()) == sorted(content)
        assert sorted(table.items()) == sorted(content.items())
        assert sorted(table.values()) == sorted(content.values())
        assert all(name in table and table[name] == value and (name, value) in table.items() for name, value in content.items())
        assert repr(table).startswith("{")


@given(st.dictionaries(NAMES, st.integers()), st.dictionaries(NAMES, st.none() | st.integers()))
def test_what_differs_between_tables_is_what_differs_between_mappings(content: dict[str, int], changes: dict[str, int | None]) -> None:
    before = Table[int]().changed(content)
    after = before.changed(changes)
    expected = {name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)}
    assert differing(before, after) == differing(dict(before.items()), dict(after.items())) == expected
    assert differing(before, before) == set()


def test_a_table_cannot_be_written_to_and_misses_as_a_dict_does() -> None:
    table: Table[int] = Table[int]().changed({"a": 1})
    with pytest.raises(TypeError):
        table["a"] = 2  # type: ignore[index]
    with pytest.raises(KeyError):
        table["b"]
    assert table.get("b") is None
    assert table.changed({}) is table


def test_the_key_of_a_replaced_entry_is_the_new_string() -> None:
    old, new = str(12345), str(12345)
    table = Table[int]().changed({old: 1}).changed({new: 2})
    assert next(iter(table)) is new


@given(st.dictionaries(NAMES, st.text(st.characters(exclude_characters="\0"), max_size=5), max_size=5))
def test_labels_are_the_mapping_they_were_made_of(content: dict[str, str]) -> None:
    pairs = sorted(content.items())
    labels = Labels(tuple(name for name, _ in pairs), "\0".join(value for _, value in pairs))
    assert labels == content
    assert content == labels
    assert dict(labels) == content
    assert list(labels.items()) == pairs
    assert list(labels.values()) == [value for _, value in pairs]
    assert (list(labels), len(labels), repr(labels)) == ([name for name, _ in pairs], len(content), repr(dict(pairs)))
    assert all(name in labels and labels[name] == value and labels.get(name) == value for name, value in content.items())
    assert labels.get("not there") is None
    with pytest.raises(KeyError):
        labels["not there"]


def test_equal_keys_share_a_value_and_only_so_many_are_kept() -> None:
    shared: Shared[int, list[int]] = Shared(lambda key: [key], limit=10)
    first = shared(1)
    for number in range(2, 1000):
        assert shared(number) == [number]
        assert shared(1) is first, "what is used stays"
    assert len(shared._young) + len(shared._old) <= 20
    assert shared(500) is shared(500)
