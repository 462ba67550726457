"""The index shards as one file: the same hits, by stock FAISS, from wherever the files were taken."""

import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest

from pipelines.errors import IndexBuildError
from pipelines.index.join import FILE, LISTS, join, require_disks
from pipelines.index.manifest import TRAINED, KeptFile, Release
from pipelines.index.parts import Parts
from pipelines.index.probe import Opening, probe
from pipelines.index.recall import Top, merge
from pipelines.index.release import finish, merged_files
from pipelines.storage import Store
from pipelines.verify import problems
from tests.unit.index.test_add import Built
from tests.unit.index.test_release import release

KEYS = [("OPQ4_16,IVF16,PQ4x4", "ip"), ("IVF16_HNSW8,Flat", "l2"), ("Flat", "ip"), ("SQ8", "l2")]


def release_of(built: Built, root: Path, params: str, gone: int | None = None) -> Release:
    """Its files in the folder of a release; with one part gone, if it is told which."""
    made = release("v0001")
    shutil.copytree(root / "index", root / made.folder)
    shutil.copy(root / "trained.faiss", root / made.folder / TRAINED)
    ranges = [part.model_copy(update={"gone": at == gone}) for at, part in enumerate(built.parts.ranges)]
    return made.model_copy(
        update={
            "index_key": built.key,
            "metric": built.metric,
            "search_params": params,
            "parts": built.parts.model_copy(update={"ranges": tuple(ranges)}),
            "shards": tuple(each.shard for each in built.filled),
            "trained": KeptFile(file=TRAINED, bytes=1, sha256=""),
        }
    )


def opened(store: Store, made: Release, away: Path) -> faiss.Index:
    """From another folder than it was written in, as one who has downloaded it."""
    away.mkdir()
    for name in (FILE, LISTS):
        if store.exists(f"{made.folder}/{name}"):
            (away / name).write_bytes(store.read(f"{made.folder}/{name}"))
            store.delete([f"{made.folder}/{name}"])
    return faiss.read_index(str(away / FILE), faiss.IO_FLAG_ONDISK_SAME_DIR)


@pytest.mark.parametrize(("key", "metric"), KEYS)
def test_one_file_finds_what_the_index_shards_find(tmp_path: Path, key: str, metric: str) -> None:
    built = Built(tmp_path, key, metric)
    made = release_of(built, tmp_path, "nprobe=16" if "IVF" in key else "")
    said: list[str] = []
    join(built.store, made, said.append)
    assert f"{built.parts.rows:,} vectors of 4 index shards" in said[0]
    assert built.store.exists(f"{made.folder}/{LISTS}") == ("IVF" in key)
    join(built.store, made, said.append)
    assert "is there already" in said[1]
    index = opened(built.store, made, tmp_path / "away")
    same_hits(index, built, 20)


def same_hits(index: faiss.Index, built: Built, k: int) -> None:
    scores, ids = index.search(built.queries, k)
    found = built.search(k)
    np.testing.assert_allclose(scores, found.scores, rtol=1e-5, atol=1e-6)
    whole = merge([Top(ids, scores)], k, built.metric)
    apart = np.abs(np.diff(scores, axis=1, prepend=np.inf, append=np.inf)) > 1e-5
    sure = apart[:, :-1] & apart[:, 1:]
    assert sure.mean() > 0.3
    np.testing.assert_array_equal(whole.ids[sure], found.ids[sure])


def test_plain_read_index_opens_it_in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = Built(tmp_path, *KEYS[0])
    made = release_of(built, tmp_path, "nprobe=16")
    join(built.store, made)
    monkeypatch.chdir(tmp_path / made.folder)
    same_hits(faiss.read_index(FILE), built, 20)


@pytest.mark.parametrize(("key", "metric"), KEYS)
def test_what_is_gone_is_not_in_it(tmp_path: Path, key: str, metric: str) -> None:
    built = Built(tmp_path, key, metric)
    made = release_of(built, tmp_path, "", gone=4)
    join(built.store, made)
    index = opened(built.store, made, tmp_path / "away")
    gone = made.parts.ranges[4]
    assert index.ntotal == made.parts.rows - gone.rows
    if faiss.try_extract_index_ivf(index) is not None:
        faiss.extract_index_ivf(index).nprobe = 16
    _, ids = index.search(built.queries, index.ntotal)
    standing = np.setdiff1d(np.arange(made.parts.rows), np.arange(gone.offset, gone.offset + gone.rows))
    np.testing.assert_array_equal(np.unique(ids[ids >= 0]), standing)


def test_graphs_are_refused_but_for_one_alone(tmp_path: Path) -> None:
    built = Built(tmp_path, "HNSW8", "ip")
    made = release_of(built, tmp_path, "")
    with pytest.raises(IndexBuildError, match=r"(?s)HNSW8, of which FAISS cannot merge two.*IndexShards"):
        join(built.store, made)
    assert not built.store.exists(f"{made.folder}/{FILE}")
    one = made.model_copy(update={"shards": made.shards[:1], "parts": first_run(made)})
    join(built.store, one)
    assert opened(built.store, one, tmp_path / "away").ntotal == made.shards[0].rows


@pytest.mark.parametrize(("key", "metric"), [*KEYS[:2], ("IVF16,Flat", "ip")])
def test_one_index_shard_alone_is_a_whole_file(tmp_path: Path, key: str, metric: str) -> None:
    built = Built(tmp_path, key, metric)
    made = release_of(built, tmp_path, "nprobe=16")
    one = made.model_copy(update={"shards": made.shards[:1], "parts": first_run(made)})
    join(built.store, one)
    (tmp_path / one.folder / one.shards[0].file).unlink()
    index = opened(built.store, one, tmp_path / "away")
    opening = Opening(built.store, "index", key, "nprobe=16")
    scores, _ = index.search(built.queries, 20)
    np.testing.assert_allclose(scores, probe(opening, one.shards[0], built.queries, 20).scores, rtol=1e-5, atol=1e-6)


def first_run(made: Release) -> Parts:
    return made.parts.model_copy(
        update={"ranges": tuple(part for part in made.parts.ranges if part.offset < made.shards[0].rows)}
    )


def test_what_does_not_fit_or_is_damaged_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = Built(tmp_path, "Flat", "ip")
    made = release_of(built, tmp_path, "")
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.index.join.available_bytes", lambda: 1_000)
        with pytest.raises(IndexBuildError, match=r"as one Flat takes .* bytes in memory; 1,000 are free"):
            join(built.store, made)
    (tmp_path / made.folder / made.shards[2].file).write_bytes(b"other")
    with pytest.raises(IndexBuildError, match=rf"{made.shards[2].file} is gone or damaged"):
        join(built.store, made)


def test_the_files_are_verified_like_the_others_and_made_again_where_they_are_not_whole(tmp_path: Path) -> None:
    built = Built(tmp_path, *KEYS[0])
    made, said = release_of(built, tmp_path, "nprobe=16"), list[str]()
    finish(built.store, made)

    def told() -> list[str]:
        return [line for line in problems(built.store, deep=True) if "merged" in line]

    assert merged_files(built.store, made) == () and told() == []
    join(built.store, made, said.append)
    assert [file.file for file in merged_files(built.store, made)] == [LISTS, FILE] and told() == []
    lists = tmp_path / made.folder / LISTS
    whole = lists.read_bytes()
    lists.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (line,) = told()
    assert f"{LISTS} is damaged" in line and "--merge" in line
    lists.write_bytes(whole[:-1])
    (line,) = told()
    assert f"{LISTS} is missing or of another size" in line
    join(built.store, made, said.append)
    assert "is there already" not in said[-1] and told() == [] and lists.read_bytes() == whole


@pytest.mark.parametrize(("remote", "some_gone", "copies"), [(False, False, 2), (True, False, 2), (True, True, 3)])
def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool, some_gone: bool, copies: int
) -> None:
    """Of a local release on the same disk, the merged file is there twice for a moment."""
    output, free = None if remote else tmp_path / "v0001", 1_000 * copies
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": free}))
    require_disks(tmp_path, output, 1_000, some_gone)
    with pytest.raises(IndexBuildError, match=rf"needs about {free + copies:,} bytes"):
        require_disks(tmp_path, output, 1_001, some_gone)
