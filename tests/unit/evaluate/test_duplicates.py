"""Groups of near-duplicates, against pairs compared one by one."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.remove import asked_for
from pipelines.errors import ConfigError, IndexBuildError
from pipelines.evaluate.duplicates import Groups as Joined
from pipelines.evaluate.duplicates import Sought, find_duplicates, largest_groups
from pipelines.evaluate.groups import Groups
from pipelines.evaluate.items import StoredItems, stored
from pipelines.index.cache import Cache
from pipelines.index.manifest import IndexShard
from pipelines.index.recall import unit
from pipelines.remove import Asked, remove
from pipelines.storage import Store
from tests.indexed import ENCODER, everything, key_of, write_output
from tests.unit.evaluate.outputs import replace_column, replace_vectors
from tests.unit.index.test_cache import Away
from tests.unit.index.test_rerank import KEY, Lossy
from tests.unit.test_search import build_release, write_release

THRESHOLD = 0.9


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("duplicates")
    write_release(root, parts=3)
    return root


def found_in(root: Path, **sought: Any) -> tuple[dict[str, Any], list[dict[str, Any]], list[str], list[str]]:
    """Summary, groups, and the lists of keys to keep and to remove."""
    store = Store(str(root))
    summary = find_duplicates(store, ENCODER, "image", Sought(**{"threshold": THRESHOLD, "k": 200, **sought}))
    folder = Path(summary["folder"])
    lists = [(folder / name).read_text().splitlines() for name in ("keep.txt", "remove.txt")]
    return summary, pq.read_table(folder / "groups.parquet").to_pylist(), lists[0], lists[1]


def one_by_one(vectors: np.ndarray) -> list[set[int]]:
    """Connected components of two or more, grown from each item."""
    near = vectors @ vectors.T >= THRESHOLD
    left, groups = set(range(len(vectors))), []
    while left:
        group, edge = set(), {left.pop()}
        while edge:
            group |= edge
            edge = {int(at) for item in edge for at in np.flatnonzero(near[item])} - group
        left -= group
        groups.append(group)
    return [group for group in groups if len(group) > 1]


@pytest.mark.parametrize("how", [{"exact": True}, {}, {"memory_mib": 0}], ids=["exact", "index", "a shard at a time"])
def test_groups_are_the_connected_items(root: Path, how: dict[str, Any]) -> None:
    items, vectors = everything(root, "image")
    vectors = unit(vectors) if how.get("exact") else vectors
    expected = {min(group): {items[at].key for at in group} for group in one_by_one(vectors)}
    summary, rows, keep, remove = found_in(root, **how)
    groups: dict[int, set[str]] = {}
    for row in rows:
        groups.setdefault(row["group"], set()).add(row["key"])
    assert groups == expected and len(groups) > 3
    first = {items[group].key for group in expected}
    assert {row["key"] for row in rows if row["keep"]} == first
    assert set(remove) == set().union(*expected.values()) - first
    assert sorted([*keep, *remove]) == sorted(item.key for item in items)
    assert (summary["groups"], summary["remove"]) == (len(expected), len(remove))
    scores = vectors @ vectors.T - 9 * np.eye(len(vectors))
    nearest = {items[at].key: scores[at].max() for at in range(len(items))}
    assert [row["nearest"] for row in rows] == pytest.approx([nearest[row["key"]] for row in rows], abs=1e-5)


def test_what_is_compared_is_the_cosine_whatever_the_length(tmp_path: Path) -> None:
    write_output(tmp_path, parts=1, normalize=False)
    expected = found_in(tmp_path, exact=True)[3]
    replace_vectors(tmp_path / "embeddings" / ENCODER / "image", lambda vectors: 10 * vectors)
    assert 0 < len(expected) < 170 and found_in(tmp_path, exact=True)[3] == expected


def test_an_index_of_vectors_that_are_not_unit_tells_no_cosine(tmp_path: Path) -> None:
    write_output(tmp_path, parts=1, normalize=False)
    with pytest.raises(ConfigError, match="not of unit length") as refused:
        found_in(tmp_path)
    assert "--exact" in refused.value.fix


def test_scores_of_codes_alone_are_no_cosines(tmp_path: Path) -> None:
    made = Lossy(tmp_path)
    alone = made.release.model_copy(update={"index_key": KEY, "rerank": None})
    made.store.put_atomic(f"{alone.folder}/manifest.json", alone.model_dump_json().encode())
    with pytest.raises(ConfigError, match=f"{re.escape(alone.folder)} holds codes") as refused:
        found_in(tmp_path)
    assert "--exact" in refused.value.fix and "--rerank float16" in refused.value.fix
    assert found_in(tmp_path, exact=True)[0]["groups"] > 0


@pytest.mark.parametrize("memory_mib", [0, 4096], ids=["a shard at a time", "at once"])
def test_what_is_kept_of_an_index_elsewhere_is_read_once(
    memory_mib: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.evaluate.duplicates.QUERIES_AT_ONCE", 50)
    away, opened = Away(Lossy(tmp_path / "made")), list[str]()
    real, ranges = Store.open, Store.read_ranges
    monkeypatch.setattr(Store, "open", lambda store, path, *words: opened.append(path) or real(store, path, *words))
    monkeypatch.setattr(
        Store, "read_ranges", lambda store, path, asked: opened.append(path) or ranges(store, path, asked)
    )
    sought = Sought(THRESHOLD, exact=False, memory_mib=memory_mib, cache=Cache(tmp_path / "cache", 2**30))
    assert find_duplicates(away.store, ENCODER, "image", sought)["groups"] > 0
    files = Counter(path for path in opened if path.startswith("index/") and path.endswith((".faiss", ".npy")))
    release = away.made.release
    assert files == {f"{release.folder}/{name}": 1 for each in release.shards for name in names_of(each)}


def names_of(shard: IndexShard) -> list[str]:
    return [shard.file, *([shard.side.file] if shard.side else [])]


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("how", [{"exact": True}, {}], ids=["exact", "index"])
def test_every_copy_is_found_though_float16_makes_it_shorter(how: dict[str, Any], metric: str, tmp_path: Path) -> None:
    write_output(tmp_path, parts=1, rows=100)
    folder = tmp_path / "embeddings" / ENCODER / "image"
    replace_vectors(
        folder, lambda vectors: np.where(np.arange(len(vectors))[:, None] % 2, np.roll(vectors, 1, 0), vectors)
    )
    build_release(tmp_path, metric=metric)
    summary, rows, _, _ = found_in(tmp_path, threshold=1.0, **how)
    assert (summary["groups"], summary["remove"]) == (summary["items"] // 2,) * 2
    assert max(row["nearest"] for row in rows) <= 1


def test_the_same_again_is_the_same(root: Path) -> None:
    assert found_in(root) == found_in(root)


def test_the_image_of_most_pixels_stays(tmp_path: Path) -> None:
    write_output(tmp_path, parts=1)
    path = next((tmp_path / "samples").glob("*.parquet"))
    table = pq.read_table(path)
    sizes = pa.array([row % 50 for row in table["row"].to_pylist()], pa.int32())
    for name in ("width", "height"):
        table = table.set_column(table.schema.get_field_index(name), name, sizes)
    pq.write_table(table, path)
    _, rows, _, _ = found_in(tmp_path, exact=True, keep="largest")
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    for members in groups.values():
        (stays,) = [row["row"] for row in members if row["keep"]]
        assert stays == min((row["row"] for row in members), key=lambda row: (-(row % 50), row))


def test_a_key_of_a_sample_that_stays_is_not_removed(tmp_path: Path) -> None:
    write_output(tmp_path, parts=1)
    _, rows, _, remove = found_in(tmp_path, exact=True)
    _, loner = everything(tmp_path, "image")[0][0], remove[0]
    for path in (tmp_path / "embeddings" / ENCODER / "image").glob("*.parquet"):
        table = pq.read_table(path)
        alone = next(key for key in table["key"].to_pylist() if key not in {row["key"] for row in rows})
        keys = [loner if key == alone else key for key in table["key"].to_pylist()]
        pq.write_table(table.set_column(table.schema.get_field_index("key"), "key", pa.array(keys)), path)
    summary, _, keep, again = found_in(tmp_path, exact=True)
    assert summary["keys_of_kept_samples_too"] == 1 and loner in keep and set(again) == set(remove) - {loner}


@pytest.mark.parametrize("how", [{"exact": True}, {}], ids=["exact", "index"])
def test_what_was_taken_down_is_in_no_group_and_no_list(how: dict[str, Any], tmp_path: Path) -> None:
    store = write_release(tmp_path, parts=2)
    summary, rows, keep, removed = found_in(tmp_path, **how)
    assert rows and removed
    taken = remove(store, asked_for(Store(), f"{summary['folder']}/remove.txt", None, None, ""), "", "")
    assert taken.samples == len(removed) and taken.missing == []
    after, groups, kept, left = found_in(tmp_path, **how)
    assert (after["items"], after["groups"], groups, left) == (len(keep), 0, [], [])
    assert kept == keep
    items, _ = everything(tmp_path, "image")
    held = collect_ids(stored(store, ENCODER, "image", Groups(store)))
    assert [items[id].key for id in held] == keep


def collect_ids(items: StoredItems) -> list[int]:
    return [id for tile in items.tiles(50) for id in tile.ids.tolist()]


def test_a_key_that_no_line_can_hold_is_left_out_and_counted(tmp_path: Path) -> None:
    write_output(tmp_path, parts=1)
    _, _, _, removed = found_in(tmp_path, exact=True)
    cut, whole = removed[0], removed[1:]
    for path in (tmp_path / "embeddings" / ENCODER / "image").glob("*.parquet"):
        table = pq.read_table(path)
        keys = [f"{whole[0]}\n{cut}" if key == cut else key for key in table["key"].to_pylist()]
        pq.write_table(table.set_column(table.schema.get_field_index("key"), "key", pa.array(keys)), path)
    summary, _, _, again = found_in(tmp_path, exact=True)
    assert summary["keys_that_are_no_line"] == 1 and again == whole


def test_what_has_come_since_the_release_is_counted_and_stays(tmp_path: Path) -> None:
    store = write_release(tmp_path, parts=2)
    _, _, kept, removed = found_in(tmp_path)
    write_output(tmp_path, parts=1, first=2)
    replace_column(
        tmp_path / "embeddings" / ENCODER / "image",
        "key",
        lambda keys: pa.array([removed[0] if key == key_of(2, 0) else key for key in keys.to_pylist()]),
    )
    summary, _, keep, remove_now = found_in(tmp_path)
    assert (summary["came_since"], summary["release"]) == (188, "v0001") and keep == kept
    # A takedown of that key would take the new sample too.
    assert removed[0] not in remove_now and set(remove_now) == set(removed[1:])
    remove(store, Asked([key_of(2, 1)]), "", "")
    assert found_in(tmp_path)[0]["came_since"] == 187
    assert found_in(tmp_path, exact=True)[0]["came_since"] == 0


def test_the_largest_groups_are_shown(root: Path) -> None:
    summary, rows, _, _ = found_in(root)
    shown = largest_groups(Store(str(root)), summary, 2)
    sizes = sorted(
        (sum(row["group"] == group for row in rows) for group in {row["group"] for row in rows}), reverse=True
    )
    assert [len(members) for members in shown] == sizes[:2]


def test_nothing_alike_is_no_group(tmp_path: Path) -> None:
    write_output(tmp_path, parts=1, rows=4)
    summary, rows, keep, remove = found_in(tmp_path, exact=True, threshold=1.0)
    assert (summary["groups"], rows, remove) == (0, [], [])
    assert keep == [key_of(0, row) for row in range(4)] and largest_groups(Store(str(tmp_path)), summary, 3) == []


def test_without_an_index_it_says_what_to_do(tmp_path: Path) -> None:
    write_output(tmp_path, parts=1)
    with pytest.raises(IndexBuildError, match="vecmill index"):
        found_in(tmp_path)


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), min_size=1), st.integers(1, 5), st.randoms())
def test_the_order_of_pairs_does_not_matter(pairs: list[tuple[int, int]], step: int, random: Any) -> None:
    def joined(order: list[tuple[int, int]]) -> list[int]:
        groups = Joined(20)
        for at in range(0, len(order), step):
            ones, others = np.array(order[at : at + step]).T
            groups.join(ones, others, np.ones(len(ones), np.float32))
        return groups.all_roots().tolist()

    shuffled = random.sample(pairs, len(pairs))
    assert joined(pairs) == joined(shuffled)
    parents = joined(pairs)
    assert all(parents[one] == parents[other] <= min(one, other) for one, other in pairs)
