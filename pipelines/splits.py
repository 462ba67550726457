"""A split of an input, written out: which of train, val and test each sample is in."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.data import DataContext

from pipelines.config import InputConfig
from pipelines.failures import plain_errors
from pipelines.ledger import Work
from pipelines.read import ShardSource
from pipelines.sources.split import SplitConfig, split_of
from pipelines.stats import planned
from pipelines.storage import Store, scratch_folder
from pipelines.training.examples import value_of

SPLIT = pa.schema([(name, pa.string()) for name in ("shard", "key", "group", "split")] + [pa.field("row", pa.int64())])
"""group: what keeps samples together; split: null where a sample has none."""


@dataclass(frozen=True)
class Assign:
    """SAMPLE to SPLIT, a map operator."""

    shares: SplitConfig

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = (row for row in batch.drop_columns(["image"]).to_pylist() if not row["end"])
        return pa.Table.from_pylist([self._one(row) for row in rows], SPLIT)

    def _one(self, row: dict[str, Any]) -> dict[str, Any]:
        group = value_of(self.shares.by, row, json.loads(row["metadata"] or "{}"))
        split = None if group is None else split_of(group, self.shares)
        return {"shard": row["shard"], "row": row["row"], "key": row["key"], "group": group, "split": split}


def write_split(config: InputConfig, shares: SplitConfig, store: Store, path: str) -> Counter[str | None]:
    """Puts a Parquet file of SPLIT, in the order of the input, and tells how many samples each split has.

    Ray must be connected. Memory: some blocks. Raises: InputError, StorageError, WorkerError.
    """
    DataContext.get_current().execution_options.preserve_order = True
    everywhere, shards = Store(options=config.storage), planned(config)
    pending = [Work(shard, ("split",)) for shard in shards]
    source = ShardSource(pending, config.read, everywhere)
    rows = ray.data.read_datasource(source, override_num_blocks=len(shards)).map_batches(
        Assign(shares), batch_format="pyarrow", batch_size=None
    )
    counts: Counter[str | None] = Counter()
    with scratch_folder() as folder:
        file = Path(folder) / "split.parquet"
        with plain_errors(), pq.ParquetWriter(file, SPLIT) as writer:
            for table in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
                counts.update(table.column("split").to_pylist())
                writer.write_table(table.cast(SPLIT))
        store.put_atomic(path, file)
    return counts
