"""What is current, what may become so, and which releases are kept."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipelines.collect import leftovers
from pipelines.config import IndexConfig
from pipelines.errors import IndexBuildError
from pipelines.index.current import advance, current_version, point_at
from pipelines.index.id_space import require_own_ids
from pipelines.index.manifest import Recall, Release
from pipelines.index.publish import (
    NotPublishedError,
    delete_release,
    list_releases,
    obstacles,
    publish,
    require_files,
    rollback,
)
from pipelines.index.release import finish, newest_or_none, read_release
from pipelines.index.settle import settle
from pipelines.ledger import Commit
from pipelines.record import RunRecord, read_record, write_record
from pipelines.search import Searcher
from pipelines.storage import Store
from tests.indexed import ENCODER, part_name, write_shard
from tests.unit.test_search import replace_shard, write_release

HOME = f"index/{ENCODER}/image"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An output with the release v0001, published."""
    return write_release(tmp_path)


def another(store: Store, version: str, recall: float = 1.0, reranked: float | None = None) -> Release:
    """The same index under another version, not published."""
    first = newest_or_none(store, ENCODER, "image")
    assert first
    for shard in first.shards:
        store.copy(f"{first.folder}/{shard.file}", f"{HOME}/{version}/{shard.file}")
    store.put_atomic(f"{HOME}/{version}/build.json", b"{}")
    figures = {"image": {"recall@10": recall}, "text": {"recall@10": recall - 0.05}}
    better = {} if reranked is None else {kind: {"recall@10": reranked} for kind in figures}
    made = first.model_copy(
        update={"version": version, "recall": Recall(queries={"image": 9}, figures=figures, reranked=better)}
    )
    finish(store, made, publish=False)
    return made


def states(store: Store) -> dict[str, str]:
    return {listed.version: listed.state for listed in list_releases(store, ENCODER, "image")}


class Overtaken(Store):
    """Where v0003 becomes the current one just before v0002 moves the pointer."""

    def put_atomic(self, path: str, data: bytes | Path) -> None:
        if data == b"v0002":
            advance(Store(self.root), HOME, "v0003")
        super().put_atomic(path, data)


def test_of_two_builds_that_end_at_once_the_newer_is_current(store: Store) -> None:
    for version in ("v0002", "v0003"):
        another(store, version)
    advance(Overtaken(store.root), HOME, "v0002")
    assert current_version(store, HOME) == "v0003"
    advance(store, HOME, "v0002")
    assert current_version(store, HOME) == "v0003"
    point_at(store, HOME, "v0002")
    assert current_version(store, HOME) == "v0002"


def test_a_release_is_published_and_rolled_back_step_by_step(store: Store) -> None:
    for version in ("v0002", "v0003"):
        publish(store, another(store, version), 0.9, 3)
        assert current_version(store, HOME) == version
    assert states(store) == {"v0001": "published", "v0002": "previous", "v0003": "current"}
    assert rollback(store, ENCODER, "image").version == "v0002"
    assert states(store) == {"v0001": "previous", "v0002": "current", "v0003": "withdrawn"}
    assert rollback(store, ENCODER, "image").version == "v0001"
    with pytest.raises(IndexBuildError, match="no release before v0001"):
        rollback(store, ENCODER, "image")
    publish(store, read_release(store, ENCODER, "image", "v0003"), 0.9, 3)
    assert rollback(store, ENCODER, "image").version == "v0001", "which was current before"


def test_the_floor_is_for_the_worst_kind_of_query_re_ranked_where_it_is(store: Store) -> None:
    poor, good = another(store, "v0002", recall=0.93), another(store, "v0003", recall=0.4, reranked=0.95)
    with pytest.raises(NotPublishedError) as barred:
        publish(store, poor, 0.9, 3)
    assert barred.value.exit_code == 5 and barred.value.release == poor
    assert "recall@10 of text queries is 0.880, below the floor of 0.9" in str(barred.value)
    assert "--release v0002 --floor 0.88" in str(barred.value)
    assert current_version(store, HOME) == "v0001" and states(store)["v0002"] == "built"
    publish(store, poor, 0.88, 3)
    publish(store, good, 0.9, 3)
    assert states(store) == {"v0001": "published", "v0002": "previous", "v0003": "current"}


def test_the_floor_is_not_for_new_queries_whose_nearest_in_old_index_shards_nobody_knows(store: Store) -> None:
    grown = another(store, "v0002", reranked=0.95)
    new = {f"new {kind}": {"recall@10": 0.7} for kind in ("image", "text")}
    recall = grown.recall.model_copy(update={"reranked": {**grown.recall.reranked, **new}})
    grown = grown.model_copy(update={"recall": recall})
    with pytest.raises(NotPublishedError, match=r"recall@10 of (image|text) queries is 0.950"):
        publish(store, grown, 0.96, 3)
    publish(store, grown, 0.9, 3)
    assert current_version(store, HOME) == "v0002"


def test_too_many_rejects_bar_publishing(store: Store) -> None:
    made = another(store, "v0002")
    record = read_record(store)
    write_record(store, RunRecord(encoders=record.encoders, settings={"write": {"reject_ceiling": 0.01}}))
    with pytest.raises(NotPublishedError, match=r"\d\.\d% of the items were rejected, more than the ceiling of 1.0%"):
        publish(store, made, 0.9, 3)


def test_recall_that_was_not_measured_is_above_no_floor(store: Store) -> None:
    made = another(store, "v0002").model_copy(update={"recall": Recall(queries={}, figures={})})
    with pytest.raises(NotPublishedError, match=r"its recall was not measured .*, and the floor is 0.9"):
        publish(store, made, 0.9, 3)
    publish(store, made, 0, 3)
    assert current_version(store, HOME) == "v0002"


def test_counts_that_differ_from_the_commits_bar_publishing(store: Store, tmp_path: Path) -> None:
    made = another(store, "v0002")
    assert list(obstacles(store, made, 0.9)) == []
    path = next((tmp_path / "commits" / ENCODER).glob("photos-00001*"))
    commit = Commit.model_validate_json(path.read_bytes())
    fewer = [part.model_copy(update={"rows": part.rows - 1}) for part in commit.parts]
    path.write_text(commit.model_copy(update={"parts": fewer}).model_dump_json())
    with pytest.raises(NotPublishedError, match=rf"1 of its 4 parts are not what the commits name.*{part_name(1)}"):
        publish(store, made, 0.9, 3)
    short = made.model_copy(update={"shards": made.shards[:1]})
    assert any("its index shards hold" in each.what for each in obstacles(store, short, 0.9))


def test_a_part_that_is_committed_and_gone_bars_publishing(store: Store, tmp_path: Path) -> None:
    made = another(store, "v0002")
    write_shard(tmp_path, 9, 50, 16, 0, "float16", ENCODER, 64)
    assert list(obstacles(store, made, 0.9)) == [], "embedded since, and in its place"
    (tmp_path / "embeddings" / ENCODER / "image" / part_name(9)).unlink()
    with pytest.raises(NotPublishedError, match="1 parts that commits name are not in place"):
        publish(store, made, 0.9, 3)


def test_replaced_parts_bar_publishing_and_not_going_back(store: Store, tmp_path: Path) -> None:
    publish(store, another(store, "v0002"), 0.9, 3)
    replace_shard(tmp_path, 1)
    with pytest.raises(NotPublishedError, match="1 of its 4 parts are not what the commits name now"):
        publish(store, read_release(store, ENCODER, "image", "v0001"), 0.9, 3)
    assert rollback(store, ENCODER, "image").version == "v0001"


def test_missing_files_bar_publishing_and_going_back(store: Store, tmp_path: Path) -> None:
    made, later = another(store, "v0002"), another(store, "v0003")
    file = tmp_path / made.folder / made.shards[0].file
    file.write_bytes(b"x")
    with pytest.raises(IndexBuildError, match=rf"{made.shards[0].file} is of 1 bytes, not"):
        publish(store, made, 0.9, 3)
    publish(store, later, 0.9, 3)
    (tmp_path / HOME / "v0001" / made.shards[1].file).unlink()
    with pytest.raises(IndexBuildError, match=rf"v0001/{made.shards[1].file} is gone"):
        rollback(store, ENCODER, "image")
    assert current_version(store, HOME) == "v0003"


@pytest.mark.parametrize(("keep", "left"), [(1, [4, 5, 6]), (2, [1, 4, 5, 6]), (9, [1, 2, 3, 4, 5, 6])])
def test_old_releases_go_and_never_the_current_or_the_one_before(store: Store, keep: int, left: list[int]) -> None:
    for number in range(2, 7):
        another(store, f"v{number:04d}")
    publish(store, read_release(store, ENCODER, "image", "v0004"), 0.9, 9)
    publish(store, read_release(store, ENCODER, "image", "v0005"), 0.9, keep)
    assert list(states(store)) == [f"v{number:04d}" for number in left], "v0006 is newer, and waits to be published"
    names = {name.split("/")[0] for name in store.names(HOME) if "/" in name}
    assert names == {*states(store), "published"}
    assert not [leftover for leftover in leftovers(store) if leftover.kind == "index"]


def test_what_was_barred_goes_before_what_was_published(store: Store) -> None:
    publish(store, another(store, "v0002"), 0.9, 9)
    for number in range(3, 6):
        another(store, f"v{number:04d}", recall=0.1)
    publish(store, another(store, "v0006"), 0.9, 2)
    assert states(store) == {"v0001": "published", "v0002": "previous", "v0006": "current"}


def test_going_back_far_keeps_the_way_forth(store: Store) -> None:
    for number in range(2, 5):
        publish(store, another(store, f"v{number:04d}"), 0.9, 9)
    publish(store, read_release(store, ENCODER, "image", "v0002"), 0.9, 1)
    assert states(store) == {"v0001": "published", "v0002": "current", "v0003": "published", "v0004": "previous"}
    assert rollback(store, ENCODER, "image").version == "v0004"


def test_a_deletion_that_dies_leaves_no_release_and_collect_clears_it(store: Store) -> None:
    another(store, "v0002")

    class Dying(Store):
        def delete_folder(self, path: str) -> None:
            self.delete([f"{path}/build.json"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        delete_release(Dying(store.root), HOME, "v0002")
    assert states(store) == {"v0001": "current", "v0002": "unfinished"}
    assert {leftover.path.split("/")[3] for leftover in leftovers(store) if leftover.kind == "index"} == {"v0002"}


def test_old_releases_go_though_the_one_who_published_died(store: Store) -> None:
    for version in ("v0002", "v0003"):
        publish(store, another(store, version), 0.9, 9)
    last = another(store, "v0004")
    point_at(store, HOME, "v0004")
    settle(store, last, IndexConfig(keep=1), print)
    assert states(store) == {"v0003": "previous", "v0004": "current"}


def test_ids_that_another_build_gave_meanwhile_are_not_given_again(store: Store) -> None:
    first = read_release(store, ENCODER, "image", "v0001")
    ranges = first.parts.ranges
    last = ranges[-1].model_copy(update={"name": "part-other.0.0.parquet"})
    other = first.model_copy(update={"parts": first.parts.model_copy(update={"ranges": (*ranges[:-1], last)})})
    require_own_ids(store, first.model_copy(update={"parts": first.parts.run(0, 2)}))
    require_own_ids(store, other.model_copy(update={"id_space": first.id_space + 1}))
    with pytest.raises(IndexBuildError, match=r"(?s)v0001, which was built at the same time.*again"):
        require_own_ids(store, other)


def test_a_search_goes_on_while_the_pointer_moves(store: Store) -> None:
    searcher = Searcher(store)
    for number in range(2, 7):
        publish(store, another(store, f"v{number:04d}"), 0.9, 1)
    assert "v0001" not in states(store)
    assert len(searcher.search(np.ones((1, 16), np.float32), 5)[0]) == 5


def test_releases_none_of_which_is_published_are_named(store: Store) -> None:
    store.delete([f"{HOME}/CURRENT"])
    with pytest.raises(IndexBuildError, match="has v0001, and none is published"):
        Searcher(store)
    newest = newest_or_none(store, ENCODER, "image")
    assert newest and newest.version == "v0001"
    require_files(store, newest)


def test_the_pointer_says_one_version_and_nothing_else(store: Store, tmp_path: Path) -> None:
    publish(store, another(store, "v0002"), 0.9, 3)
    assert (tmp_path / HOME / "CURRENT").read_text() == "v0002"
    assert json.loads((tmp_path / HOME / "published" / "v0002.json").read_text())["before"] == "v0001"


class DiesAtThePointer(Store):
    def put_atomic(self, path: str, data: bytes | Path) -> None:
        if path.endswith("CURRENT"):
            raise KeyboardInterrupt
        super().put_atomic(path, data)


def test_a_publication_that_dies_is_done_by_the_next_build_and_a_rollback_is_not_undone(store: Store) -> None:
    made, settings = another(store, "v0002"), IndexConfig()
    with pytest.raises(KeyboardInterrupt):
        settle(DiesAtThePointer(store.root), made, settings, print)
    assert current_version(store, HOME) == "v0001"
    settle(store, made, settings, print)
    assert current_version(store, HOME) == "v0002"
    with pytest.raises(KeyboardInterrupt):
        rollback(DiesAtThePointer(store.root), ENCODER, "image")
    assert current_version(store, HOME) == "v0002" and rollback(store, ENCODER, "image").version == "v0001"
    said: list[str] = []
    settle(store, made, settings, said.append)
    assert current_version(store, HOME) == "v0001" and "was rolled back" in said[0]
