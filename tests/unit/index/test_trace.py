from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.errors import IndexBuildError, LedgerError
from pipelines.index.parts import ReplacedError, list_parts
from pipelines.index.trace import trace_parts, trace_standing
from pipelines.storage import Store
from tests.indexed import ENCODER, caption_of, everything, key_of, part_name, write_output


class Counting(Store):
    """A store that notes what is opened."""

    opened: list[str]

    def open(self, path: str):  # type: ignore[no-untyped-def]
        self.opened.append(path)
        return super().open(path)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_every_id_leads_to_its_item(tmp_path: Path, modality: str) -> None:
    store = write_output(tmp_path, parts=3, rows=100)
    items, vectors = everything(tmp_path, modality)
    found = trace_parts(store, list_parts(store, f"embeddings/{ENCODER}/{modality}"), range(len(items)))
    for id, (origin, item) in enumerate(zip(found, items, strict=True)):
        assert (origin.id, origin.shard, origin.row, origin.caption_index, origin.key) == (
            id,
            item.shard,
            item.row,
            item.caption_index,
            item.key,
        )
        at = int(item.shard.split("-")[1])
        assert (origin.uri, origin.offset, origin.length) == (
            f"photos-{at:05d}.tar",
            512 + 1024 * item.row,
            100 + item.row,
        )
        assert origin.key == key_of(at, item.row)
        if modality == "text":
            assert origin.caption == caption_of(at, item.row, item.caption_index or 0)
        assert (origin.vector == vectors[id]).all()


def test_order_and_repeats_are_the_callers(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=3)
    parts = list_parts(store, f"embeddings/{ENCODER}/image")
    assert [origin.id for origin in trace_parts(store, parts, [400, 3, 400, 399])] == [400, 3, 400, 399]
    assert trace_parts(store, parts, []) == []


def test_an_id_opens_one_part_and_its_samples(tmp_path: Path) -> None:
    write_output(tmp_path, parts=9)
    store = Counting(str(tmp_path))
    object.__setattr__(store, "opened", [])
    parts = list_parts(store, f"embeddings/{ENCODER}/image")
    store.opened.clear()
    trace_parts(store, parts, [parts.ranges[7].offset + 2])
    assert store.opened == [f"embeddings/{ENCODER}/image/{part_name(7)}", f"samples/{part_name(7)}"]


@pytest.mark.parametrize("id", [-1, 10**9])
def test_an_id_that_is_not_there(tmp_path: Path, id: int) -> None:
    store = write_output(tmp_path, parts=2)
    with pytest.raises(IndexBuildError, match=f"There is no id {id}"):
        trace_parts(store, list_parts(store, f"embeddings/{ENCODER}/image"), [id])


def test_an_output_that_changed_since(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=2)
    parts = list_parts(store, f"embeddings/{ENCODER}/image")
    (tmp_path / "samples" / part_name(0)).rename(tmp_path / "samples" / part_name(0, generation=12))
    assert trace_parts(store, parts, [0])[0].key == key_of(0, 0), "samples of another generation serve as well"
    (tmp_path / "samples" / part_name(0, generation=12)).unlink()
    with pytest.raises(ReplacedError, match="has no part for"):
        trace_parts(store, parts, [0])
    (tmp_path / "embeddings" / ENCODER / "image" / part_name(1)).unlink()
    with pytest.raises(ReplacedError, match="is gone"):
        trace_parts(store, parts, [parts.rows - 1])
    assert trace_standing(store, parts, [0, parts.rows - 1]) == {}


def test_samples_that_lack_a_row_are_no_change_but_a_fault(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=1)
    parts = list_parts(store, f"embeddings/{ENCODER}/image")
    samples = tmp_path / "samples" / part_name(0)
    pq.write_table(pq.read_table(samples).slice(3), samples)
    for find in trace_parts, trace_standing:
        with pytest.raises(LedgerError, match="lacks row 2"):
            find(store, parts, [2])
