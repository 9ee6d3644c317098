from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from controller.snapshot import MAX_CACHED_DIFFERENCES, Publication, Snapshot, encode, model_version
from meshapi import discovery_pb2 as pb

MODELS = st.dictionaries(st.sampled_from("abcdefg"), st.integers(0, 3), max_size=7)


def snapshot(model: dict[str, int], previous: Snapshot) -> Snapshot:
    return encode({name: pb.Entity(service=pb.Service(name=name, namespace=str(value))) for name, value in model.items()}, previous, 7)


@given(MODELS, MODELS)
def test_a_difference_applied_to_the_old_gives_the_new(old: dict[str, int], new: dict[str, int]) -> None:
    publication = Publication()
    before = snapshot(old, publication.current)
    publication.publish(before)
    after = snapshot(new, before)
    publication.publish(after)
    response = pb.DiscoveryResponse.FromString(publication.response(before.versions, before.version))
    held = {name: version for name, version in before.versions.items() if name not in response.removed}
    held.update((resource.name, resource.version) for resource in response.resources)
    assert held == dict(after.versions)
    assert model_version(held) == response.version == after.version
    assert {resource.name for resource in response.resources} == {name for name in new if old.get(name) != new[name]}


def test_what_did_not_change_is_not_encoded_again() -> None:
    one = snapshot({"a": 1, "b": 2}, Snapshot())
    two = snapshot({"a": 1, "b": 3}, one)
    assert two.resources["a"] is one.resources["a"]


def test_a_difference_is_encoded_once_for_all_and_the_cache_is_bounded() -> None:
    publication = Publication()
    publication.publish(snapshot({"a": 1}, publication.current))
    assert publication.response({}, "empty") is publication.response({}, "empty")
    assert publication.encodings == 1
    for number in range(53):
        publication.response({"a": str(number)}, str(number))
    assert len(publication._differences) == MAX_CACHED_DIFFERENCES


def test_who_awaits_tunnels_is_said_in_what_is_sent_and_in_no_entity() -> None:
    entities = {f"workload/{name}": pb.Entity(workload=pb.Workload(name=name)) for name in ("one", "two")}
    first = encode(entities, Snapshot(), 1, {"workload/one"})
    second = encode(entities, first, 2, {"workload/two"})

    def awaiting(found: Snapshot) -> set[str]:
        return {name for name, resource in found.resources.items() if pb.Entity.FromString(resource.entity).workload.awaits_tunnels}

    assert (awaiting(first), awaiting(second)) == ({"workload/one"}, {"workload/two"})
    assert not any(entity.workload.awaits_tunnels for entity in entities.values())
    assert encode(entities, second, 3, {"workload/two"}).version == second.version


def test_what_is_the_same_in_memory_is_not_encoded_again() -> None:
    one, other = (pb.Entity(service=pb.Service(name=name)) for name in ("one", "other"))
    first = encode({"service/one": one, "service/other": other}, Snapshot(), 1)
    changed = pb.Entity(service=pb.Service(name="other", fail_open=True))
    second = encode({"service/one": one, "service/other": changed}, first, 2)
    assert second.resources["service/one"] is first.resources["service/one"]
    assert second.versions["service/other"] != first.versions["service/other"]
    assert pb.Entity.FromString(second.resources["service/other"].entity) == changed
