"""Which items belong together: those of one sample, of one label, or of one identity."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.index.parts import Ids, open_part, shard_of
from pipelines.index.trace import samples_path
from pipelines.storage import Store

OUTSIDE = -1
"""The code of an item that is not asked about."""
_ROW_BITS = 40


class Groups:
    """Codes of items, int64: equal where they belong together.

    by: `sample`, `key`, `label`, or a field of the metadata, as the identities of CUHK-PEDES are. Those by key are
    `code_of_key`, the same in every output. split: only samples whose metadata have it as their `split` count, all if
    None. Items without a value are OUTSIDE. Memory: a number for each label or identity and for each shard, and those
    of one part.
    """

    def __init__(self, store: Store, by: str = "sample", split: str | None = None) -> None:
        self.store, self.by, self.split = store, by, split
        self._known: dict[str, int] = {}
        self._held: tuple[str, Ids, Ids] | None = None

    def codes(self, part: str, rows: Ids) -> Ids:
        """int64 [n] of the items of a part, by the rows of their samples."""
        if self.by == "sample" and self.split is None:
            return (self._number(shard_of(part)) << _ROW_BITS) + rows
        known, codes = self._of_part(part)
        return codes[np.searchsorted(known, rows)]

    def _of_part(self, part: str) -> tuple[Ids, Ids]:
        """Rows, ascending, and their codes; those of the last part are kept, which comes in several batches."""
        if self._held is None or self._held[0] != part:
            table = read_samples(self.store, part, ["row", "key", "label", "metadata"]).sort_by("row")
            self._held = part, table["row"].to_numpy(), self._coded(part, table)
        return self._held[1:]

    def _coded(self, part: str, table: pa.Table) -> Ids:
        columns = zip(*(table[name].to_pylist() for name in ("row", "key", "label", "metadata")), strict=True)
        value = self._value(part)
        return np.fromiter((value(*each) for each in columns), np.int64, len(table))

    def _value(self, part: str) -> Callable[[int, str, str | None, str | None], int]:
        needs_metadata = self.split is not None or self.by not in ("sample", "key", "label")
        base = self._number(shard_of(part)) << _ROW_BITS if self.by == "sample" else 0

        def code(row: int, key: str, label: str | None, metadata: str | None) -> int:
            told = fields_of(metadata) if needs_metadata else {}
            if self.split is not None and told.get("split") != self.split:
                return OUTSIDE
            if self.by == "sample":
                return base + row
            if self.by == "key":
                return code_of_key(key)
            value = label if self.by == "label" else told.get(self.by)
            return OUTSIDE if value is None else self._number(str(value))

        return code

    def _number(self, name: str) -> int:
        return self._known.setdefault(name, len(self._known))


def code_of_key(key: str) -> int:
    """A number of 63 bits, of the key's BLAKE2b digest, so that none needs to be remembered.

    Two of n keys have the same with a chance of about n²/2⁶⁴: 1 in 2,000 of 100 million keys. Their samples would count
    as one.
    """
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1


def fields_of(metadata: str | None) -> dict[str, Any]:
    """A sample's metadata, which is a JSON object."""
    found = json.loads(metadata) if metadata else {}
    return found if isinstance(found, dict) else {}


def read_samples(store: Store, part: str, columns: list[str]) -> pa.Table:
    """Columns of `samples/` of the shard that has part `part`. Raises: ReplacedError where they are not there."""
    with open_part(store, samples_path(store, part)) as stream:
        return pq.read_table(stream, columns=columns, use_threads=False, pre_buffer=False)
