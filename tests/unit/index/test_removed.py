"""No search finds what was taken down, from the moment that it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import search
from pipelines.compact import compact_parts
from pipelines.config import IndexConfig
from pipelines.errors import ConfigError, IndexBuildError, InputError, StorageError
from pipelines.index.build import build_index
from pipelines.index.grow import update_index
from pipelines.index.parts import list_parts
from pipelines.index.release import read_release
from pipelines.index.removed import denied, dropped, holds_removed
from pipelines.ledger import read_commit, standing_commits
from pipelines.like import examples
from pipelines.queries import Query
from pipelines.remove import Asked, remove
from pipelines.search import Searcher
from pipelines.storage import Store
from pipelines.takedowns import note_compacted, read_takedowns, requests
from pipelines.verify import problems
from tests import indexed
from tests.indexed import ENCODER, everything, key_of
from tests.unit.test_search import build_release, replace_shard, write_release

ASKED = Asked([key_of(0, 3), key_of(2, 0), key_of(2, 1)])


def keys(store: Store, **how: Any) -> set[str]:
    """All that a search finds."""
    rows = Searcher(store, **how).search(np.ones((1, 16), np.float32), 10_000)
    return {hit.key for hit in rows[0]}


@pytest.mark.parametrize("how", [{}, {"exact": True}, {"resident": False}, {"exact": True, "modality": "text"}])
def test_nobody_finds_it_from_then_on(tmp_path: Path, how: dict[str, Any]) -> None:
    store = write_release(tmp_path)
    before = keys(store, **how)
    assert set(ASKED.keys) & before
    remove(store, ASKED, "", "")
    assert keys(store, **how) == before - set(ASKED.keys)


def test_a_search_that_is_open_finds_it_no_more_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "LOOK_EVERY_S", 0.0)
    store = write_release(tmp_path)
    searcher, query = Searcher(store), everything(tmp_path, "image")[1][[3]]
    assert searcher.search(query, 1)[0][0].key == key_of(0, 3)
    remove(store, ASKED, "", "")
    assert searcher.search(query, 1)[0][0].key != key_of(0, 3)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_nothing_is_like_it(tmp_path: Path, modality: Any) -> None:
    store, asked = write_release(tmp_path), Query(like=key_of(2, 1))
    assert examples(Searcher(store), [asked], modality)[0] is not None
    remove(store, ASKED, "", "")
    for query in (asked, Query(like_id=3)):
        with pytest.raises(InputError, match=r"no vector of the key|no id 3"):
            examples(Searcher(store), [query], modality)


def test_after_a_compaction_an_old_release_still_holds_it_and_does_not_show_it(tmp_path: Path) -> None:
    store = write_release(tmp_path)
    _, vectors = everything(tmp_path, "image")
    release = read_release(store, ENCODER, "image")
    assert not holds_removed(store, release)
    remove(store, ASKED, "", "")
    assert holds_removed(store, release)
    compact_parts(store)
    note_compacted(store, requests(store))
    assert holds_removed(store, release)
    hits = Searcher(store).search(vectors, 10_000)[0]
    assert {hit.shard.split("-")[1] for hit in hits} == {"00001", "00003"}, "parts that were written again are gone"
    assert not set(ASKED.keys) & keys(store, exact=True)


def test_a_release_that_never_held_it_is_not_suspected_when_its_parts_change(tmp_path: Path) -> None:
    """Built once everything was compacted; later a shard changes that had once held what was taken down."""
    store = write_release(tmp_path)
    remove(store, ASKED, "", "")
    compact_parts(store)
    note_compacted(store, requests(store))
    shutil.rmtree(tmp_path / "index")
    clean = read_release(build_release(tmp_path), ENCODER, "image")
    clean = clean.model_copy(update={"dropped": dropped(store, clean.parts, read_takedowns(store))})
    assert clean.dropped == tuple(requests(store))
    replace_shard(tmp_path, 2, clean.parts.ranges[2].name)
    assert not holds_removed(store, clean)
    assert holds_removed(store, clean.model_copy(update={"dropped": ()}))
    remove(store, Asked([key_of(1, 1)]), "", "")
    assert holds_removed(store, clean), "what was taken down since"


def test_parts_that_may_hold_it_are_not_taken_for_clean(tmp_path: Path) -> None:
    """Those that still hold it, and those of another version than it was taken down from; those of other shards are."""
    store = write_release(tmp_path)
    remove(store, Asked([key_of(0, 3)]), "", "")
    (first,) = requests(store)
    parts = read_release(store, ENCODER, "image").parts
    assert dropped(store, parts, read_takedowns(store)) == ()
    assert dropped(store, parts.run(1, 4), read_takedowns(store)) == (first,)
    remove(store, Asked([key_of(2, 0)]), "", "")
    (second,) = set(requests(store)) - {first}
    compact_parts(store)
    listed = list_parts(store, parts.folder)
    assert set(dropped(store, listed, read_takedowns(store))) == {first, second}
    older = listed.ranges[0].model_copy(update={"name": listed.ranges[0].name.replace(indexed.VERSION, "0" * 12)})
    stale = listed.model_copy(update={"ranges": (older, *listed.ranges[1:])})
    assert dropped(store, stale, read_takedowns(store)) == (second,)


def test_an_update_does_not_carry_it_on(tmp_path: Path) -> None:
    store = write_release(tmp_path)
    remove(store, ASKED, "", "")
    with pytest.raises(ConfigError, match=r"(?s)taken down since, and an update would keep them.*without --update"):
        update_index(store, ENCODER, "image", {})


@pytest.mark.parametrize("given", [{}, {"index_key": "IVF16,Flat"}])
def test_an_update_that_is_refused_writes_no_part_again(tmp_path: Path, given: dict[str, Any]) -> None:
    """It would hide the shards that are touched from the current release."""
    store = write_release(tmp_path)
    remove(store, ASKED, "", "")
    before = sorted(store.names("embeddings"))
    with pytest.raises(ConfigError):
        update_index(store, ENCODER, "image", given)
    assert sorted(store.names("embeddings")) == before


@pytest.mark.parametrize("key", ["IVFlat", "IVF4096,Flat", "OPQ3_16,IVF4,PQ3"])
def test_a_build_of_an_index_that_cannot_be_writes_no_part_again(tmp_path: Path, key: str) -> None:
    store = write_release(tmp_path)
    remove(store, ASKED, "", "")
    before = sorted(store.names("embeddings"))
    with pytest.raises((ConfigError, IndexBuildError)):
        build_index(store, ENCODER, "image", IndexConfig(index_key=key))
    assert sorted(store.names("embeddings")) == before


def test_a_compaction_counts_what_it_drops(tmp_path: Path) -> None:
    store = write_release(tmp_path)
    before = [read_commit(store, ref) for ref in standing_commits(store, ENCODER)]
    remove(store, ASKED, "", "")
    vectors, texts = f"embeddings/{ENCODER}/image", f"embeddings/{ENCODER}/text"
    assert [each.items for each in compact_parts(store)] == [
        {"samples": 1},
        {"samples": 2},
        {vectors: 1, texts: 0},
        {vectors: 2, texts: 2},
    ]
    after = [read_commit(store, ref) for ref in standing_commits(store, ENCODER)]
    assert [commit.generation for commit in after] == [1, 0, 1, 0]
    assert [commit.counts["image"].removed for commit in after] == [1, 0, 2, 0]
    assert [commit.counts["text"].removed for commit in after] == [0, 0, 2, 0]
    lost = [one.counts["image"].embedded - two.counts["image"].embedded for one, two in zip(before, after, strict=True)]
    assert lost == [1, 0, 2, 0]
    assert list(problems(store)) == [] == compact_parts(store)


def test_of_the_other_slices_of_a_folder_a_release_may_lose_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They never held what was taken down; a slice of another cut may have."""
    monkeypatch.setattr(indexed, "shard_id", lambda at: f"photos-0123456789ab-s{at:04d}of0004")
    store = write_release(tmp_path)
    remove(store, Asked([key_of(0, 3)]), "", "")
    compact_parts(store)
    note_compacted(store, requests(store))
    whole = read_release(store, ENCODER, "image")
    later = whole.model_copy(update={"parts": whole.parts.run(1, 4)})
    (tmp_path / later.parts.path(later.parts.ranges[0])).unlink()
    assert holds_removed(store, whole) and not holds_removed(store, later)
    suspects = read_takedowns(store).suspects()
    known = {
        name: f"photos-{name}" in suspects for name in ("0123456789ab", "0123456789ab-s0001of0008", "0123456789ac")
    }
    assert known == {"0123456789ab": True, "0123456789ab-s0001of0008": True, "0123456789ac": False}


def test_what_a_compaction_hides_until_the_next_release_is_told(tmp_path: Path) -> None:
    store = write_release(tmp_path)
    query, said = everything(tmp_path, "image")[1][[3]], list[str]()
    remove(store, ASKED, "", "")
    Searcher(store).search(query, 1, said.append)
    assert said == []
    compact_parts(store)
    note_compacted(store, requests(store))
    Searcher(store, exact=True).search(query, 1, said.append)
    assert said == []
    Searcher(store).search(query, 1, said.append)
    hidden = sum(part.rows for part in read_release(store, ENCODER, "image").parts.ranges[0:4:2])
    assert len(said) == 1 and said[0].startswith(f"{hidden:,} vectors") and "`vecmill index`" in said[0]


def test_a_part_that_goes_while_it_is_looked_at_has_nothing_to_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_release(tmp_path)
    remove(store, ASKED, "", "")
    parts, real = read_release(store, ENCODER, "image").parts, Store.open

    def gone(store: Store, path: str, *more: Any) -> Any:
        if path == parts.path(parts.ranges[2]):
            raise FileNotFoundError(path)
        return real(store, path, *more)

    monkeypatch.setattr(Store, "open", gone)
    allowed = denied(store, parts, read_takedowns(store)).allowed
    assert allowed is not None
    counts = [allowed.count(part.offset, part.offset + part.rows) for part in parts.ranges]
    assert counts == [parts.ranges[0].rows - 1, parts.ranges[1].rows, 0, parts.ranges[3].rows]


def test_whether_parts_are_there_takes_one_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_release(tmp_path)
    remove(store, ASKED, "", "")
    parts, known = read_release(store, ENCODER, "image").parts, read_takedowns(store)
    listed, real = list[str](), Store.names
    monkeypatch.setattr(Store, "names", lambda store, path: listed.append(path) or real(store, path))
    monkeypatch.setattr(Store, "exists", lambda *_: pytest.fail("asked of one part"))
    denied(store, parts, known)
    assert listed == [parts.folder]


def test_a_look_that_fails_is_taken_again_by_the_next_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "LOOK_EVERY_S", 0.0)
    store = write_release(tmp_path)
    searcher, query = Searcher(store), everything(tmp_path, "image")[1][[3]]
    remove(store, ASKED, "", "")
    monkeypatch.setattr(search, "LOOK_EVERY_S", 1e9)
    searcher._looked = -1e18
    with monkeypatch.context() as broken:
        broken.setattr(search, "denied", lambda *_: (_ for _ in ()).throw(StorageError("away")))
        with pytest.raises(StorageError):
            searcher.search(query, 1)
    assert searcher.search(query, 1)[0][0].key != key_of(0, 3)
