"""Blocks in any order, cut and repeated anyhow, become one set of parts."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import WriteConfig
from pipelines.errors import LedgerError
from pipelines.ledger import list_commits, read_commit
from pipelines.storage import Store
from pipelines.write import EmbeddingSink
from tests.encoded import DIM, ENCODER, FAMILIES, encoded_row, encoded_rows

WRITE = WriteConfig(rows_per_row_group=16)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "out"))


def sink(store: Store) -> EmbeddingSink:
    return EmbeddingSink(store, FAMILIES, WRITE)


def read(store: Store, dataset: str) -> list[dict]:
    return [
        row
        for name in sorted(store.names(dataset))
        for row in pq.read_table(f"{store.root}/{dataset}/{name}").to_pylist()
    ]


def test_a_shard_is_committed_once_its_end_and_every_row_are_there(store: Store) -> None:
    sink(store).write([encoded_rows(range(20, 40), end=40)], None)
    sink(store).write([encoded_rows(range(0, 7))], None)
    assert not list(list_commits(store, ENCODER.name))
    sink(store).write([encoded_rows(range(5, 25))], None)

    expected = [encoded_row(row) for row in range(40)]
    samples = read(store, "samples")
    assert [sample["row"] for sample in samples] == list(range(40))
    assert [sample["captions"] for sample in samples] == [row["captions"] for row in expected]

    images = read(store, f"embeddings/{ENCODER.name}/image")
    assert [image["row"] for image in images] == [row["row"] for row in expected if row["image_vector"]]
    assert all(np.allclose(image["embedding"], [image["row"], 1, 2, 3]) for image in images)

    texts = read(store, f"embeddings/{ENCODER.name}/text")
    wanted = [(row["row"], text["caption_index"]) for row in expected for text in row["text_vectors"]]
    assert [(text["row"], text["caption_index"]) for text in texts] == wanted
    assert all(np.allclose(text["embedding"], [text["row"], 1, 2, text["caption_index"]]) for text in texts)

    rejects = read(store, f"rejects/{ENCODER.name}")
    wanted_rejects = [(row["row"], item["modality"], item["reason"]) for row in expected for item in row["rejects"]]
    assert [(reject["row"], reject["modality"], reject["reason"]) for reject in rejects] == wanted_rejects

    (ref,) = list_commits(store, ENCODER.name)
    counts = read_commit(store, ref).counts
    assert counts["image"].items == sum(row["has_image"] for row in expected)
    assert counts["image"].absent == sum(not row["has_image"] for row in expected)
    assert counts["text"].items == sum(len(row["captions"]) for row in expected)
    assert counts["text"].embedded == len(texts)
    assert store.names("staging") == []


def test_several_shards_in_one_block_are_kept_apart(store: Store) -> None:
    blocks = [encoded_rows(range(10), 10, shard) for shard in ("a-000000000000", "b-000000000000")]
    sink(store).write(blocks, None)
    assert len(store.names("samples")) == 2
    assert {row["shard"] for row in read(store, "samples")} == {"a-000000000000", "b-000000000000"}


def test_an_empty_shard_completes(store: Store) -> None:
    sink(store).write([encoded_rows(range(0), end=0)], None)
    (name,) = store.names(f"embeddings/{ENCODER.name}/image")
    assert pq.read_table(f"{store.root}/embeddings/{ENCODER.name}/image/{name}").num_rows == 0


def test_a_shard_of_rejects_only_completes(store: Store) -> None:
    sink(store).write([encoded_rows(range(1, 2)), encoded_rows(range(0, 1), end=2)], None)
    assert len(read(store, f"rejects/{ENCODER.name}")) == 1
    assert len(list(list_commits(store, ENCODER.name))) == 1


def test_writing_the_same_again_changes_nothing(store: Store) -> None:
    sink(store).write([encoded_rows(range(30), end=30)], None)
    before = {name: store.read(name) for name in store.names("")}
    sink(store).write([encoded_rows(range(30), end=30)], None)
    after = {name: store.read(name) for name in store.names("")}
    assert {name: data for name, data in after.items() if not name.startswith("staging/")} == before


def test_items_that_vanish_between_stages_are_noticed(store: Store) -> None:
    rows = encoded_rows(range(10), end=10)
    lost = rows.set_column(
        rows.schema.get_field_index("image_vector"), "image_vector", rows["image_vector"].take([0] * 11)
    )
    with pytest.raises(LedgerError, match="image items came in"):
        sink(store).write([lost], None)
    assert not list(list_commits(store, ENCODER.name))


def test_parts_are_plain_parquet(store: Store) -> None:
    sink(store).write([encoded_rows(range(30), end=30)], None)
    (name,) = store.names(f"embeddings/{ENCODER.name}/image")
    schema = pq.read_schema(f"{store.root}/embeddings/{ENCODER.name}/image/{name}")
    assert schema.field("embedding").type.equals(pa.list_(pa.field("element", pa.float16()), DIM))
    assert not any(b"ray" in key for key in schema.metadata or {})
