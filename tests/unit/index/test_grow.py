"""What an update grows from: the release that is searched, whatever was built and turned down since."""

from pathlib import Path

import pytest

from pipelines.config import IndexConfig
from pipelines.index.build import recorded_fingerprint
from pipelines.index.current import current_version
from pipelines.index.grow import ids_of, is_the_same, plan_update, settings_of, update_index
from pipelines.index.manifest import MANIFEST, Release
from pipelines.index.parts import list_grown
from pipelines.index.publish import NotPublishedError, publish, rollback
from pipelines.index.release import finish, read_release
from pipelines.storage import Store
from tests.indexed import ENCODER, part_name, write_shard
from tests.unit.index.test_publish import HOME, another
from tests.unit.test_search import write_release


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An output of four parts with the release v0001, published."""
    made = write_release(tmp_path)
    told = {"settings": IndexConfig().model_dump(mode="json"), "fingerprint": recorded_fingerprint(made, ENCODER)}
    path = tmp_path / first(made).folder / MANIFEST
    path.write_text(first(made).model_copy(update=told).model_dump_json())
    return made


def first(store: Store) -> Release:
    return read_release(store, ENCODER, "image", "v0001")


def add_shards(store: Store, *numbers: int) -> None:
    for at in numbers:
        write_shard(Path(store.root), at, 50, 16, at, "float16", ENCODER, 64)


@pytest.mark.parametrize("how", ["barred", "rolled back"])
def test_what_was_turned_down_is_passed_over(store: Store, how: str) -> None:
    if how == "barred":
        another(store, "v0002", recall=0.1)
    else:
        publish(store, another(store, "v0002"), 0.9, 3)
        rollback(store, ENCODER, "image")
    said: list[str] = []
    found = update_index(store, ENCODER, "image", {}, said.append)
    assert found.version == "v0001" and "has all parts there are" in said[0]


@pytest.mark.parametrize("how", ["barred", "rolled back"])
def test_an_update_that_was_turned_down_is_not_built_again_before_something_has_come(store: Store, how: str) -> None:
    base = first(store)
    add_shards(store, 7)
    for shard in base.shards:
        store.copy(f"{base.folder}/{shard.file}", f"{HOME}/v0002/{shard.file}")
    told = {"version": "v0002", "parts": list_grown(store, base.parts), "grown_from": "v0001"}
    finish(store, base.model_copy(update=told), publish=how == "rolled back")
    said: list[str] = []
    if how == "rolled back":
        rollback(store, ENCODER, "image")
        assert update_index(store, ENCODER, "image", {}, said.append).version == "v0002"
        assert "was rolled back" in said[-1] and current_version(store, HOME) == "v0001"
    else:
        with pytest.raises(NotPublishedError, match="v0002 is built but not published"):
            update_index(store, ENCODER, "image", {})


def test_parts_keep_the_ids_that_a_release_gave_them_which_is_passed_over(store: Store) -> None:
    base = first(store)
    add_shards(store, 7)
    later = base.model_copy(update={"version": "v0002", "parts": list_grown(store, base.parts)})
    finish(store, later, publish=False)
    # Sorted by name it would come before the other.
    add_shards(store, 6)
    parts, id_space = ids_of(store, base, [later, base], list_grown(store, base.parts))
    assert id_space == base.id_space
    assert [part.name for part in parts.ranges[4:]] == [part_name(7), part_name(6)]
    assert parts.ranges[:5] == later.parts.ranges


def test_ids_that_cannot_be_kept_are_of_a_space_of_their_own(store: Store, tmp_path: Path) -> None:
    base = first(store)
    add_shards(store, 7)
    later = base.model_copy(update={"version": "v0002", "parts": list_grown(store, base.parts)})
    finish(store, later, publish=False)
    (tmp_path / base.parts.folder / part_name(7)).unlink()
    add_shards(store, 6)
    grown = list_grown(store, base.parts)
    assert ids_of(store, base, [later, base], grown) == (grown, None)


def test_ids_that_any_release_gave_are_not_given_again(store: Store, tmp_path: Path) -> None:
    """One of another id space is newer than the one that gave them."""
    base = first(store)
    add_shards(store, 7)
    second = base.model_copy(update={"version": "v0002", "parts": list_grown(store, base.parts)})
    (tmp_path / base.parts.folder / part_name(7)).unlink()
    add_shards(store, 6)
    third = base.model_copy(update={"version": "v0003", "parts": list_grown(store, base.parts), "id_space": 2})
    grown = list_grown(store, base.parts)
    assert ids_of(store, base, [third, second, base], grown) == (grown, None)
    assert ids_of(store, base, [third, base], grown) == (grown, base.id_space)


def test_an_update_that_was_turned_down_is_another_with_other_settings(store: Store) -> None:
    base = first(store)
    as_made = settings_of(store, base, {})
    told = {"version": "v0002", "grown_from": "v0001", "settings": as_made.model_dump(mode="json")}
    made = base.model_copy(update=told)
    assert is_the_same(made, base, as_made) and is_the_same(made, base, as_made.model_copy(update={"floor": 0.1}))
    assert not is_the_same(made, base, as_made.model_copy(update={"rerank_factor": 40}))
    assert not is_the_same(base, base, as_made)


def test_the_floor_that_a_release_was_accepted_with_is_that_of_its_updates(store: Store) -> None:
    made = another(store, "v0002", recall=0.8)
    assert settings_of(store, made, {}).floor == IndexConfig().floor
    publish(store, made, 0.7, 3)
    assert settings_of(store, made, {}).floor == 0.7 and settings_of(store, made, {"floor": 0.95}).floor == 0.95


def test_a_new_part_may_be_empty(store: Store) -> None:
    """A shard of nothing but rejects."""
    base = first(store)
    ranges = (*base.parts.ranges, base.parts.ranges[-1].model_copy(update={"offset": base.parts.rows, "rows": 0}))
    grown = base.parts.model_copy(update={"ranges": ranges})
    plan = plan_update(base, grown, settings_of(store, base, {}))
    assert plan.runs == () and not len(plan.draw.queries)
