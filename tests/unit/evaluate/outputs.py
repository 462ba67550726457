"""Outputs to evaluate: those of tests.indexed, with labels and metadata, in which a caption is near its image."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

LABELS = 7
Describe = Callable[[int], tuple[str | None, dict[str, Any]]]


def label_of(row: int) -> str | None:
    return None if row % 10 == 9 else f"label {row % LABELS}"


def described(row: int) -> tuple[str | None, dict[str, Any]]:
    return label_of(row), {"split": "test" if row % 2 else "train", "id": row // 3}


def describe(root: Path, of: Describe = described) -> None:
    """Gives every sample a label and metadata, by its row."""
    for path in sorted((root / "samples").glob("*.parquet")):
        table = pq.read_table(path)
        told = [of(row) for row in table["row"].to_pylist()]
        columns = {
            "label": pa.array([label for label, _ in told], pa.string()),
            "metadata": pa.array([json.dumps(metadata) for _, metadata in told], pa.string()),
        }
        for name, column in columns.items():
            table = table.set_column(table.schema.get_field_index(name), name, column)
        pq.write_table(table, path)


def replace_column(folder: Path, name: str, change: Callable[[pa.ChunkedArray], pa.Array]) -> None:
    """Writes a column of every part under `folder` anew."""
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path)
        at = table.schema.get_field_index(name)
        pq.write_table(table.set_column(at, table.schema.field(name), change(table[name])), path)


def replace_vectors(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """change: of a part's float32 [n, dim], its others."""

    def changed(column: pa.ChunkedArray) -> pa.Array:
        kind = column.type
        found = change(np.array(column.to_pylist(), np.float32)).ravel()
        return pa.FixedSizeListArray.from_arrays(
            pa.array(found.astype(kind.value_type.to_pandas_dtype()), kind.value_type), kind.list_size
        )

    replace_column(folder, "embedding", changed)
