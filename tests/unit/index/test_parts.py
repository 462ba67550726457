import io
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import IndexBuildError, StorageError
from pipelines.index.parts import PartRange, Parts, ReplacedError, batches, list_parts, pick, take
from pipelines.storage import Store
from tests.indexed import ENCODER, everything, part_name, write_output, write_shard

FOLDER = f"embeddings/{ENCODER}/image"


def of_rows(*rows: int) -> Parts:
    offsets = np.cumsum([0, *rows]).tolist()
    ranges = [PartRange(name=f"part-s{at}.v.0.parquet", offset=offsets[at], rows=n) for at, n in enumerate(rows)]
    return Parts(folder=FOLDER, dim=4, ranges=tuple(ranges))


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_batches_give_every_vector_under_its_id(tmp_path: Path, modality: str, dtype: str) -> None:
    store = write_output(tmp_path, parts=3, dtype=dtype)
    parts = list_parts(store, f"embeddings/{ENCODER}/{modality}")
    _, expected = everything(tmp_path, modality)
    assert (parts.rows, parts.dim) == expected.shape
    seen = np.full_like(expected, np.nan)
    for first, batch in batches(store, parts):
        assert batch.dtype == np.float32
        seen[first : first + len(batch)] = batch
    np.testing.assert_array_equal(seen, expected)


def test_batches_are_no_larger_than_their_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_output(tmp_path, parts=2)
    monkeypatch.setattr("pipelines.index.parts.BATCH_BYTES", 50 * 4 * 16)
    _, expected = everything(tmp_path, "image")
    found = list(batches(store, list_parts(store, FOLDER)))
    assert max(len(batch) for _, batch in found) == 50
    assert [first for first, _ in found] == np.cumsum([0, *(len(batch) for _, batch in found)])[:-1].tolist()
    np.testing.assert_array_equal(np.concatenate([batch for _, batch in found]), expected)


def test_new_parts_come_last_so_that_old_ids_stay(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=2, first=5)
    before = list_parts(store, FOLDER)
    write_output(tmp_path, parts=2, first=0)
    after = list_parts(store, FOLDER, [part.name for part in before.ranges])
    assert after.ranges[:2] == before.ranges
    assert [part.name for part in after.ranges[2:]] == [part_name(0), part_name(1)]


def test_a_part_that_is_gone_starts_the_order_anew(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=3)
    names = ["part-gone.v.0.parquet", part_name(2), part_name(1)]
    assert [part.name for part in list_parts(store, FOLDER, names).ranges] == [part_name(at) for at in range(3)]


def test_two_parts_of_a_shard_are_refused(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=2)
    write_shard(tmp_path, 1, 10, 16, 0, "float16", ENCODER, 64, generation=1)
    with pytest.raises(IndexBuildError, match="several parts of 1 shards"):
        list_parts(store, FOLDER)


def test_dimensions_that_differ_are_refused_by_name(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=2)
    write_shard(tmp_path, 2, 10, 8, 0, "float16", ENCODER, 64)
    with pytest.raises(IndexBuildError, match=part_name(2)):
        list_parts(store, FOLDER)


def test_no_vectors_is_an_error_with_a_fix(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=2, rows=0)
    with pytest.raises(IndexBuildError, match="holds no vectors"):
        list_parts(store, FOLDER)
    with pytest.raises(IndexBuildError, match="holds no vectors"):
        list_parts(store, "embeddings/none/image")


def test_take_reads_only_the_row_groups_it_needs_and_of_these_no_row_behind_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    store = write_output(tmp_path, parts=1)
    read: list[tuple[int, list[int]]] = []
    whole = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, rows, row_groups, **k: read.append((rows, row_groups)) or whole(self, rows, row_groups, **k),
    )
    items, _ = everything(tmp_path, "image")
    table = take(store, f"{FOLDER}/{part_name(0)}", np.array([3, 63, 64, 187]))
    assert table["row"].to_pylist() == [items[at].row for at in (3, 63, 64, 187)]
    assert read == [(64, [0]), (1, [1]), (60, [2])]
    assert take(store, f"{FOLDER}/{part_name(0)}", np.array([], np.int64)).num_rows == 0


def test_pick_draws_from_every_part_by_its_size() -> None:
    parts = of_rows(1000, 0, 3000, 1, 5999)
    picked = pick(parts, 1000, seed=7)
    counts = [len(positions) for positions in picked]
    assert sum(counts) == 1000
    assert all(abs(count - part.rows / 10) <= 1 for count, part in zip(counts, parts.ranges, strict=True))
    for positions, part in zip(picked, parts.ranges, strict=True):
        assert len(set(positions.tolist())) == len(positions)
        assert (np.diff(positions) > 0).all() and (positions < part.rows).all() and (positions >= 0).all()


def test_pick_is_seeded_and_every_vector_is_as_likely() -> None:
    parts = of_rows(7, 3, 20, 10)
    one, two = ([positions.tolist() for positions in pick(parts, 10, 3)] for _ in range(2))
    assert one == two
    drawn = np.zeros(parts.rows)
    for seed in range(2000):
        for part, positions in zip(parts.ranges, pick(parts, 10, seed), strict=True):
            drawn[part.offset + positions] += 1
    assert np.abs(drawn / 2000 - 10 / 40).max() < 0.05


@pytest.mark.parametrize("count", [0, 1, 39, 40, 41, 1000])
def test_pick_takes_as_many_as_there_are(count: int) -> None:
    parts = of_rows(7, 3, 20, 10)
    for seed in range(20):
        assert sum(map(len, pick(parts, count, seed))) == min(count, 40)


def damage(part: Path) -> None:
    """Footer whole, pages gone."""
    data = part.read_bytes()
    part.write_bytes(data[:4] + b"\x00" * (len(data) // 2) + data[4 + len(data) // 2 :])


@pytest.mark.parametrize("how", ["pages", "footer", "gone"])
def test_a_part_that_cannot_be_read_is_named(tmp_path: Path, how: str) -> None:
    store = write_output(tmp_path, parts=2)
    parts = list_parts(store, FOLDER)
    part = tmp_path / FOLDER / part_name(1)
    if how == "pages":
        damage(part)
    elif how == "footer":
        part.write_bytes(part.read_bytes()[:-8])
    else:
        part.unlink()
    told = f"{part_name(1)} is {'gone' if how == 'gone' else 'damaged'}"
    readings = [
        lambda: list(batches(store, parts)),
        lambda: take(store, f"{FOLDER}/{part_name(1)}", np.array([3])),
        lambda: list_parts(store, FOLDER),
    ]
    for read in readings[:2] if how != "footer" else readings:
        with pytest.raises(IndexBuildError, match=told) as caught:
            read()
        assert isinstance(caught.value, ReplacedError) == (how == "gone")


class Failing(Store):
    """Storage that is there for the opening alone."""

    def open(self, path: str) -> io.BufferedReader:
        class Broken(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                raise StorageError("Cannot read: 503", "Try again.")

        return Broken(super().open(path).read())  # type: ignore[return-value]


def test_storage_that_fails_is_no_damaged_part(tmp_path: Path) -> None:
    parts = list_parts(write_output(tmp_path, parts=1), FOLDER)
    with pytest.raises(StorageError, match="503"):
        list(batches(Failing(str(tmp_path)), parts))


def test_of_parts_without_a_vector_none_is_picked() -> None:
    """A shard of nothing but rejects has a part all the same."""
    assert [positions.tolist() for positions in pick(of_rows(0, 0), 10, 3)] == [[], []]
