"""What was written is read by the tools people already have, unchanged: P5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipelines.config import WriteConfig
from pipelines.contracts import VectorSpec, encoded_schema
from pipelines.families import EncoderFamily, SamplesFamily
from pipelines.storage import Store
from pipelines.write import EmbeddingSink
from tests.encoded import DIM, encoded_row, encoded_rows

ROWS = 60
SHARDS = ("a-000000000000", "b-111111111111", "c-222222222222")
ENCODER = "clip"


class Written:
    """An output of three shards, and what its readers must find in it."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder, self.dtype = folder, dtype
        families = {
            "samples": SamplesFamily(),
            ENCODER: EncoderFamily(ENCODER, "f" * 64, {"image": VectorSpec(DIM), "text": VectorSpec(DIM)}, dtype),
        }
        sink = EmbeddingSink(Store(str(folder)), families, WriteConfig(dtype=dtype, rows_per_row_group=16))
        sink.write([self._rows(shard) for shard in SHARDS], None)
        items = [(shard, encoded_row(row, shard)) for shard in SHARDS for row in range(ROWS)]
        self.images = {(shard, row["row"]): row["image_vector"] for shard, row in items if row["image_vector"]}
        self.texts = {
            (shard, row["row"], text["caption_index"]): text["vector"]
            for shard, row in items
            for text in row["text_vectors"]
        }

    def _rows(self, shard: str) -> pa.Table:
        rows = encoded_rows(range(ROWS), end=ROWS, shard=shard).to_pylist()
        return pa.Table.from_pylist([{**row, "families": ["samples", ENCODER]} for row in rows], self._schema())

    def _schema(self) -> pa.Schema:
        return encoded_schema(self.dtype)

    def path(self, modality: str) -> str:
        return str(self.folder / "embeddings" / ENCODER / modality)

    def check(self, modality: str, shards: Any, rows: Any, captions: Any, vectors: Any) -> None:
        """Every item once, each with its own vector."""
        keys = [shards, rows, captions] if modality == "text" else [shards, rows]
        found = {tuple(map(_plain, key)): vector for *key, vector in zip(*keys, vectors, strict=True)}
        expected: dict[Any, Any] = self.texts if modality == "text" else self.images
        assert len(list(shards)) == len(expected) > 100
        assert found.keys() == expected.keys()
        assert all(np.array_equal(np.asarray(found[key], np.float32), expected[key]) for key in expected)


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else int(value)


@pytest.fixture(scope="module", params=["float16", "float32"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("out") / "out", request.param)


@pytest.fixture(params=["image", "text"])
def modality(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_an_embeddings_folder_holds_finished_parts_and_nothing_else(written: Written, modality: str) -> None:
    names = sorted(path.name for path in Path(written.path(modality)).rglob("*"))
    assert names == [f"part-{shard}.v1.0.parquet" for shard in SHARDS]
    parts = {path.parent.relative_to(written.folder).as_posix() for path in written.folder.rglob("*.parquet")}
    assert parts == {"samples", f"embeddings/{ENCODER}/image", f"embeddings/{ENCODER}/text", f"rejects/{ENCODER}"}


def test_columns_are_plain_named_well_and_without_nulls(written: Written, modality: str) -> None:
    table = ds.dataset(written.path(modality)).to_table()
    vector = pa.list_(pa.float16() if written.dtype == "float16" else pa.float32(), DIM)
    assert table.schema.field("embedding").type == vector
    assert not [field for field in table.schema if isinstance(field.type, pa.BaseExtensionType)]
    assert all(column.null_count == 0 for column in table.columns)
    assert table["embedding"].combine_chunks().flatten().null_count == 0
    every = {name for path in written.folder.rglob("*.parquet") for name in pq.read_schema(path).names}
    assert "id" not in every and {"shard", "row", "key", "embedding"} <= every


def test_pandas(written: Written, modality: str) -> None:
    import pandas as pd

    frame = pd.read_parquet(written.path(modality))
    captions = frame.get("caption_index")
    written.check(modality, frame["shard"], frame["row"], captions, frame["embedding"])


def test_duckdb(written: Written, modality: str) -> None:
    import duckdb

    caption = "caption_index" if modality == "text" else "0"
    rows = duckdb.sql(f"select shard, row, {caption}, embedding from '{written.path(modality)}/*.parquet'").fetchall()
    written.check(modality, *zip(*rows, strict=True))
    joined = duckdb.sql(
        f"""select count(*) from '{written.path(modality)}/*.parquet'
            join '{written.folder}/samples/*.parquet' using (shard, row, key)"""
    ).fetchall()
    assert joined == [(len(rows),)]


def test_polars(written: Written, modality: str) -> None:
    import polars as pl

    frame = pl.read_parquet(f"{written.path(modality)}/*.parquet")
    captions = frame["caption_index"] if modality == "text" else None
    written.check(modality, frame["shard"], frame["row"], captions, frame["embedding"].to_list())


def test_embedding_reader(written: Written, modality: str) -> None:
    from embedding_reader import EmbeddingReader

    columns = ["shard", "row", "key", *(["caption_index"] if modality == "text" else [])]
    reader = EmbeddingReader(
        embeddings_folder=written.path(modality),
        file_format="parquet",
        embedding_column="embedding",
        meta_columns=columns,
    )
    assert reader.dimension == DIM
    read = list(reader(batch_size=50, show_progress=False))
    assert all(vectors.dtype == np.float32 for vectors, _ in read)
    column = {name: [value for _, frame in read for value in frame[name]] for name in columns}
    vectors = np.concatenate([vectors for vectors, _ in read])
    written.check(modality, column["shard"], column["row"], column.get("caption_index"), vectors)


def test_autofaiss(written: Written, modality: str, tmp_path: Path) -> None:
    import faiss
    import pandas as pd
    from autofaiss import build_index

    columns = ["shard", "row", "key", *(["caption_index"] if modality == "text" else [])]
    index, _ = build_index(
        embeddings=written.path(modality),
        file_format="parquet",
        embedding_column_name="embedding",
        id_columns=columns,
        ids_path=str(tmp_path / "ids"),
        index_path=str(tmp_path / "knn.index"),
        index_infos_path=str(tmp_path / "infos.json"),
        index_key="Flat",
        nb_cores=1,
        verbose=30,
    )
    stored = faiss.read_index(str(tmp_path / "knn.index"))
    ids = pd.read_parquet(tmp_path / "ids").sort_values("i")
    assert index is not None and stored.ntotal == len(ids)
    vectors = stored.reconstruct_n(0, stored.ntotal)
    written.check(modality, ids["shard"], ids["row"], ids.get("caption_index"), vectors)
