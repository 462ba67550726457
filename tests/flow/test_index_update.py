"""An index that grows: old files as they are, old ids for ever, and nothing of parts that are gone."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.config import IndexConfig
from pipelines.errors import ConfigError, IndexBuildError
from pipelines.index.asked import read_asked
from pipelines.index.build import build_index
from pipelines.index.current import current_version
from pipelines.index.grow import update_index
from pipelines.index.manifest import Release
from pipelines.index.measure import draw_samples
from pipelines.index.parts import NoVectorsError
from pipelines.index.publish import rollback
from pipelines.index.recall import exact, recall_at, without
from pipelines.index.release import read_release
from pipelines.index.tune import full_probe
from pipelines.remove import Asked, remove
from pipelines.search import Searcher
from pipelines.storage import Store
from tests.indexed import (
    ENCODER,
    VERSION,
    everything,
    key_of,
    part_name,
    shard_id,
    write_images,
    write_output,
    write_shard,
)

HOME = f"index/{ENCODER}/image"
SETTINGS = IndexConfig(
    index_key="OPQ4_16,IVF16,PQ4x4", shards=2, recall_queries=60, max_query_ms=0.2, floor=0.0, metric="l2"
)


def take_away(root: Path, at: int) -> None:
    """A shard's parts and commit, as pruning does."""
    for modality in ("image", "text"):
        (root / "embeddings" / ENCODER / modality / part_name(at)).unlink()
    (root / "commits" / ENCODER / f"{shard_id(at)}.{VERSION}.0.json").unlink()


def vectors_of(root: Path, name: str) -> np.ndarray:
    table = pq.read_table(root / "embeddings" / ENCODER / "image" / name)
    return np.array(table["embedding"].to_pylist(), np.float32)


class Unread(Store):
    """Where the parts of shards below 4 cannot be opened: their vectors are in the index already."""

    def open(self, path: str, listed: bool = False):  # type: ignore[no-untyped-def]
        assert not any(f"photos-{at:05d}" in path and "/image/" in path for at in range(4)), path
        return super().open(path, listed)


def test_an_update_adds_new_parts_and_keeps_every_old_id(ray_local: str, tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=4)
    first = build_index(store, ENCODER, "image", SETTINGS)
    said: list[str] = []
    assert update_index(store, ENCODER, "image", {}, said.append) == first and "nothing to add" in said[0]
    write_output(tmp_path, parts=2, first=4)
    take_away(tmp_path, 1)
    write_shard(tmp_path, 6, 100, 16, 0, "float16", ENCODER, 64)
    second = update_index(store, ENCODER, "image", {}, said.append)

    assert second.version == "v0002" == current_version(store, HOME) and second.grown_from == "v0001"
    assert second.id_space == first.id_space and second.shards[:2] == first.shards and len(second.shards) == 3
    assert [(part.name, part.gone) for part in second.parts.ranges] == [(part_name(at), at == 1) for at in range(7)]
    for file in (*first.files[:-1], first.trained):
        assert (
            file
            and (tmp_path / second.folder / file.file).read_bytes()
            == (tmp_path / first.folder / file.file).read_bytes()
        )
    require_found(tmp_path, store)
    require_measured(tmp_path, store, said)
    return_of_a_part(tmp_path, store)


def require_found(root: Path, store: Store) -> None:
    """Each vector that stands under the id it always had, and none that is gone."""
    release = read_release(store, ENCODER, "image")
    for params in (full_probe(release.index_key), None):
        searcher = Searcher(store, exact=params is None, params=params)
        for part in release.parts.ranges:
            if not part.gone:
                own = searcher.nearest(vectors_of(root, part.name), 3).ids[:, 0]
                assert own.tolist() == list(range(part.offset, part.offset + part.rows))
        gone = next((part for part in release.parts.ranges if part.gone), None)
        if gone is None:
            continue
        near = np.random.default_rng([0, 1]).normal(size=(1, 16)).astype(np.float32)
        top = searcher.nearest(near / np.linalg.norm(near), release.parts.standing)
        assert not ((top.ids >= gone.offset) & (top.ids < gone.offset + gone.rows)).any()
        assert len(searcher.search(near, 10)[0]) == 10


def require_measured(root: Path, store: Store, said: list[str]) -> None:
    """What the manifest says is what one finds by asking the release oneself."""
    release = read_release(store, ENCODER, "image")
    assert list(release.recall.queries) == ["image", "text", "new image", "new text"]
    assert release.recall.queries["new image"] == 60 and release.recall.queries["image"] < 60
    assert all(0 < each["recall@10"] <= 1 for each in release.recall.reranked.values())
    assert release.drift and release.drift.of == "code" and release.drift.ratio > 1.5
    assert any("retraining is due" in line for line in said)
    report = (root / release.folder / "report.md").read_text()
    assert "grown from v0001" in report and f"({release.drift.ratio:.2f}x)" in report
    assert "188 more vectors, in 1 parts that are gone" in report
    assert f"{release.recall.reranked['new image']['recall@10']:.3f}" in report


def return_of_a_part(root: Path, store: Store) -> None:
    """What has come back is new: its old ids stay dead. A part alone that is gone makes a release, too."""
    write_output(root, parts=1, first=1)
    take_away(root, 5)
    release = update_index(store, ENCODER, "image", {})
    assert [(part.name, part.gone) for part in release.parts.ranges][-1] == (part_name(1), False)
    assert [part.gone for part in release.parts.ranges] == [False, True, False, False, False, True, False, False]
    take_away(root, 4)
    last = update_index(store, ENCODER, "image", {})
    assert last.shards == release.shards and last.parts.ranges[4].gone and last.drift is None
    require_found(root, store)
    whole = build_index(store, ENCODER, "image", SETTINGS)
    assert whole.id_space == 2 and whole.parts.rows == whole.parts.standing == last.parts.standing


def test_after_a_rollback_what_comes_is_added_to_the_release_that_is_searched(ray_local: str, tmp_path: Path) -> None:
    """With it what the other had added, under the ids that it gave."""
    store = write_output(tmp_path, parts=2)
    first = build_index(store, ENCODER, "image", SETTINGS)
    write_output(tmp_path, parts=1, first=5)
    second = update_index(store, ENCODER, "image", {})
    rollback(store, ENCODER, "image")
    assert update_index(store, ENCODER, "image", {}) == second and current_version(store, HOME) == first.version
    write_output(tmp_path, parts=1, first=4)
    third = update_index(store, ENCODER, "image", {})
    assert (third.version, third.grown_from, current_version(store, HOME)) == ("v0003", "v0001", "v0003")
    assert third.parts.ranges[:3] == second.parts.ranges and third.parts.ranges[3].name == part_name(4)
    assert third.id_space == first.id_space and third.shards[:2] == first.shards
    require_found(tmp_path, store)


def test_a_shard_that_changes_is_updated_like_any_other_whatever_was_once_taken_down_of_it(
    ray_local: str, tmp_path: Path
) -> None:
    store = write_output(tmp_path, parts=3)
    build_index(store, ENCODER, "image", SETTINGS)
    remove(store, Asked([key_of(1, 3)]), "", "")
    clean = build_index(store, ENCODER, "image", SETTINGS)
    assert clean.dropped and clean.parts.rows == 3 * 188 - 1
    changed = clean.parts.ranges[1]
    for folder in (*(f"embeddings/{ENCODER}/{modality}" for modality in ("image", "text")), "samples"):
        (tmp_path / folder / changed.name).unlink()
    write_shard(tmp_path, 1, 200, 16, 7, "float16", ENCODER, 64, generation=2)
    grown = update_index(store, ENCODER, "image", {})
    assert [(part.name, part.gone) for part in grown.parts.ranges] == [
        (part_name(0), False),
        (changed.name, True),
        (part_name(2), False),
        # Written again before it is indexed: what was taken down is in it once more.
        (part_name(1, 3), False),
    ]
    assert grown.grown_from == clean.version and grown.id_space == clean.id_space
    require_found(tmp_path, store)


def test_an_update_reads_no_vector_of_old_parts(ray_local: str, tmp_path: Path) -> None:
    """But for the ids that every build draws and traces back, which are new ones here."""
    store = write_output(tmp_path, parts=4)
    build_index(store, ENCODER, "image", SETTINGS)
    write_output(tmp_path, parts=1, first=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "pipelines.index.measuring.draw_samples",
            lambda store, parts, seed: draw_samples(store, parts.run(4, 5), seed),
        )
        assert update_index(Unread(str(tmp_path)), ENCODER, "image", {}).parts.standing == 5 * 188


def test_an_update_looks_as_far_as_its_base_and_measures_no_recall_where_that_has_none(
    ray_local: str, tmp_path: Path
) -> None:
    store = write_output(tmp_path, parts=2)
    pinned = SETTINGS.model_copy(update={"search_params": "nprobe=3,ht=64", "recall_queries": 0})
    build_index(store, ENCODER, "image", pinned)
    write_output(tmp_path, parts=1, first=2)
    release = update_index(store, ENCODER, "image", {})
    assert (release.grown_from, release.search_params, len(release.shards)) == ("v0001", "nprobe=3,ht=64", 3)
    assert not release.recall.queries and not release.curve and release.query_ms > 0
    assert release.drift and release.drift.ratio > 1.5
    new = release.parts.ranges[2]
    own = Searcher(store, params=full_probe(release.index_key)).nearest(vectors_of(tmp_path, new.name), 1).ids[:, 0]
    assert own.tolist() == list(range(new.offset, new.offset + new.rows))
    require_small_updates_share_an_index_shard(tmp_path, store, release)
    with pytest.raises(ConfigError, match="another recall_queries 0 → 60"):
        update_index(store, ENCODER, "image", {"recall_queries": 60})


def require_small_updates_share_an_index_shard(root: Path, store: Store, before: Release) -> None:
    """The last index shard, while it is no larger than the largest; its ids stay."""
    said: list[str] = []
    counts = []
    for at in (3, 4, 5):
        write_shard(root, at, 80, 16, 0, "float16", ENCODER, 64)
        release = update_index(store, ENCODER, "image", {}, said.append)
        counts.append([shard.rows for shard in release.shards])
    assert counts == [[188, 188, 188, 75], [188, 188, 188, 150], [188, 188, 188, 150, 75]]
    assert sum("filling shard-0003.faiss anew" in line for line in said) == 1
    assert release.shards[:3] == before.shards and release.id_space == before.id_space
    require_found(root, store)


def test_small_updates_are_measured_like_others(ray_local: str, tmp_path: Path) -> None:
    """Exact neighbours that are kept from update to update are those that one finds by comparing with everything."""
    store = write_output(tmp_path, parts=2, rows=400)
    build_index(store, ENCODER, "image", SETTINGS)
    for at in (2, 3):
        write_shard(tmp_path, at, 90, 16, 0, "float16", ENCODER, 64)
        release = update_index(store, ENCODER, "image", {})
    assert [shard.rows for shard in release.shards] == [376, 376, 170]
    kept, (_, vectors) = read_asked(store, release), everything(tmp_path, "image")
    truth = exact(kept.queries.vectors, [(0, vectors)], kept.truth.ids.shape[1], "l2")
    assert (kept.truth.ids == truth.ids).mean() > 0.99
    own, found = kept.queries.own, Searcher(store).nearest(kept.queries.vectors, 11)
    image = slice(0, len(kept.queries.kinds["image"]))
    mine = recall_at(10, without(found, own).of(image), without(truth.between(0, 11), own).of(image), "l2", scored=True)
    assert release.recall.reranked["image"]["recall@10"] == pytest.approx(mine, abs=0.02)
    assert release.recall.reranked["new image"]["recall@10"] > 0.5


def test_a_small_update_is_published_where_its_base_is(ray_local: str, tmp_path: Path) -> None:
    """The new vectors lie as the old ones do; among themselves alone others are the nearest than a search finds."""
    store = write_output(tmp_path, parts=2, rows=1_000, seed=1)
    pinned = SETTINGS.model_copy(update={"search_params": "nprobe=2,ht=64"})
    floor = (build_index(store, ENCODER, "image", pinned).recall.lowest_at_10 or 0.0) - 0.1
    write_images(tmp_path, 2, vectors_of(tmp_path, part_name(0))[:40] + 0.01)
    release = update_index(store, ENCODER, "image", {"floor": floor})
    assert release.recall.reranked["new image"]["recall@10"] < floor < min(release.recall.judged.values())
    assert current_version(store, HOME) == release.version == "v0002"


def test_what_cannot_be_updated_says_so(ray_local: str, tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=2)
    with pytest.raises(IndexBuildError, match=r"(?s)no index .*Run `vecmill index` first"):
        update_index(store, ENCODER, "image", {})
    first = build_index(store, ENCODER, "image", SETTINGS)
    write_output(tmp_path, parts=1, first=2)
    for given, told in (
        ({"metric": "ip"}, "another metric l2 → ip"),
        ({"index_key": "Flat"}, "another index_key OPQ4_16,IVF16,PQ4x4 → Flat"),
        ({"rerank": "int8"}, "another rerank float16 → int8"),
        ({"search_params": "nprobe=5"}, "another search_params nprobe=.* → nprobe=5"),
        ({"target_recall": 0.5}, "another target_recall None → 0.5"),
        ({"recall_queries": 0}, "another recall_queries 60 → 0"),
    ):
        with pytest.raises(ConfigError, match=told):
            update_index(store, ENCODER, "image", given)
    manifest = tmp_path / first.folder / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole.replace(first.fingerprint, "0" * 64))
    with pytest.raises(ConfigError, match="another fingerprint 0000"):
        update_index(store, ENCODER, "image", {})
    manifest.write_text(whole)
    (tmp_path / first.folder / "shard-0001.faiss").rename(tmp_path / "away")
    with pytest.raises(IndexBuildError, match=r"shard-0001.faiss is gone"):
        update_index(store, ENCODER, "image", {})
    (tmp_path / "away").rename(tmp_path / first.folder / "shard-0001.faiss")
    for at in (0, 1):
        take_away(tmp_path, at)
    with pytest.raises(IndexBuildError, match=r"parts of .*v0001 are gone or replaced: there is nothing to add to"):
        update_index(store, ENCODER, "image", {})
    take_away(tmp_path, 2)
    with pytest.raises(NoVectorsError, match="holds no vectors"):
        update_index(store, ENCODER, "image", {})
    assert [path.name for path in (tmp_path / HOME).glob("v*")] == ["v0001"] and not store.names("staging")
