"""What an output holds, read with pyarrow alone, for comparing two of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipelines.storage import Store


def datasets(store: Store) -> dict[str, list[str]]:
    """Part names, sorted, by data set."""
    found: dict[str, list[str]] = {}
    for top in ("samples", "embeddings", "translations", "rejects"):
        for name in store.names(top):
            folder, _, part = f"{top}/{name}".rpartition("/")
            found.setdefault(folder, []).append(part)
    return {dataset: sorted(parts) for dataset, parts in found.items()}


def read_part(store: Store, path: str) -> Any:
    with store.open(path) as file:
        return pq.read_table(file)


def assert_same(store: Store, reference: Store, tolerance: float = 2e-3) -> None:
    """Bit for bit in parts, rows and all columns; within `tolerance` in vectors."""
    there, expected = datasets(store), datasets(reference)
    assert there == expected, {name: [there.get(name), expected.get(name)] for name in there.keys() | expected.keys()}
    for dataset, parts in there.items():
        for part in parts:
            ours, theirs = (read_part(one, f"{dataset}/{part}") for one in (store, reference))
            exact = [name for name in ours.column_names if name != "embedding"]
            assert ours.select(exact).equals(theirs.select(exact)), f"{dataset}/{part}"
            if "embedding" in ours.column_names:
                assert np.allclose(vectors(ours), vectors(theirs), atol=tolerance), f"{dataset}/{part}"


def vectors(table: Any) -> np.ndarray:
    """float32 [rows, dim]."""
    column = table["embedding"].combine_chunks()
    return column.flatten().to_numpy().astype(np.float32).reshape(len(column), column.type.list_size)
