"""From a FAISS id back to what it stands for, without a scan (DESIGN P6)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipelines.contracts import SAMPLES_FAMILY
from pipelines.errors import IndexBuildError, LedgerError
from pipelines.index.manifest import Release
from pipelines.index.parts import (
    PartRange,
    Parts,
    ReplacedError,
    Vectors,
    open_part,
    part_of,
    shard_of,
    take,
    vectors,
    version_of,
)
from pipelines.storage import Store

THREADS = 16
OfPart = Callable[[Store, Parts, PartRange, list[int]], "list[Origin]"]


@dataclass(frozen=True)
class Origin:
    """What an id stands for.

    part, position: where the vector lies; vector: float32 [dim], as stored there.
    uri, offset, length, row_group: where the image's bytes lie. captions: of the whole sample.
    caption_index: which of them the vector is of, None for an image.
    """

    id: int
    part: str
    position: int
    shard: str
    row: int
    caption_index: int | None
    key: str
    vector: Vectors = field(repr=False, compare=False)
    uri: str
    offset: int | None
    length: int | None
    row_group: int | None
    sha256: str | None
    captions: list[str | None]
    label: str | None
    metadata: str | None

    @property
    def caption(self) -> str | None:
        """The one the vector is of; of an image, its first."""
        return self.captions[self.caption_index or 0] if self.captions else None


def trace(store: Store, release: Release, ids: Iterable[int]) -> list[Origin]:
    """The origin of each FAISS id, in their order: one row group of a part and of `samples/` a part touched.

    Raises: IndexBuildError for an id the release does not have, ReplacedError where its part is gone.
    """
    return trace_parts(store, release.parts, list(ids))


def trace_parts(store: Store, parts: Parts, ids: Sequence[int]) -> list[Origin]:
    """`trace` for parts that need not be of a release."""
    origins = _origins(store, parts, ids, _of_part)
    return [origins[id] for id in ids]


def trace_standing(store: Store, parts: Parts, ids: Iterable[int]) -> dict[int, Origin]:
    """`trace_parts` by id, without those whose part or samples are gone."""
    return _origins(store, parts, ids, _of_standing_part)


def _origins(store: Store, parts: Parts, ids: Iterable[int], of_part: OfPart) -> dict[int, Origin]:
    wanted: dict[PartRange, list[int]] = {}
    for id in dict.fromkeys(ids):
        wanted.setdefault(_part_of(parts, id), []).append(id)
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda part: of_part(store, parts, part, sorted(wanted[part])), wanted))
    return {origin.id: origin for origins in found for origin in origins}


def _part_of(parts: Parts, id: int) -> PartRange:
    part = part_of(parts, id)
    if not part.offset <= id < part.offset + part.rows:
        raise IndexBuildError(f"There is no id {id}: ids go from 0 to {parts.rows - 1}", "Take one that a search gave.")
    return part


def _of_standing_part(store: Store, parts: Parts, part: PartRange, ids: list[int]) -> list[Origin]:
    try:
        return _of_part(store, parts, part, ids)
    except ReplacedError:
        return []


def _of_part(store: Store, parts: Parts, part: PartRange, ids: list[int]) -> list[Origin]:
    positions = np.array(ids, np.int64) - part.offset
    table = take(store, parts.path(part), positions)
    items = table.drop_columns(["embedding"]).to_pylist()
    samples = samples_of(store, part.name, {item["row"]: item["key"] for item in items})
    found = vectors(table["embedding"], parts.dim)
    if parts.count > 1:
        found = found.reshape(-1, parts.count, parts.dim)
    places = zip(ids, positions.tolist(), items, found, strict=True)
    return [
        Origin(
            id=id,
            part=part.name,
            position=position,
            shard=item["shard"],
            row=item["row"],
            caption_index=item.get("caption_index"),
            key=item["key"],
            vector=vector,
            **samples[item["row"]],
        )
        for id, position, item, vector in places
    ]


_SAMPLE = ["uri", "offset", "length", "row_group", "sha256", "captions", "label", "metadata"]


def samples_of(store: Store, name: str, keys: dict[int, str]) -> dict[int, dict[str, Any]]:
    """By row, the columns of `samples/` that an Origin shows, for rows of the shard that has part `name`.

    keys: of those rows, as the part has them. Raises: ReplacedError where the shard's samples are not there,
    LedgerError where they lack a row or have another key for it.
    """
    path = samples_path(store, name)
    with open_part(store, path) as stream:
        table = pq.read_table(
            stream,
            columns=["row", "key", *_SAMPLE],
            filters=[("row", "in", set(keys))],
            use_threads=False,
            pre_buffer=False,
        )
    found = {item.pop("row"): {**item, "captions": item["captions"] or []} for item in table.to_pylist()}
    if missing := keys.keys() - found.keys():
        raise LedgerError(f"{store.uri(path)} lacks row {min(missing)}, which has a vector", "Run `vecmill status`.")
    if strays := [row for row, item in found.items() if item.pop("key") != keys[row]]:
        raise LedgerError(
            f"{store.uri(path)} has another key for row {min(strays)} than the part of its vector",
            "Run `vecmill verify --deep`.",
        )
    return found


def samples_path(store: Store, name: str) -> str:
    """Of the same generation as the part, which is the rule; else the highest there is."""
    if store.exists(f"{SAMPLES_FAMILY}/{name}"):
        return f"{SAMPLES_FAMILY}/{name}"
    shard, version = shard_of(name), version_of(name)
    others = store.glob(f"{SAMPLES_FAMILY}/part-{shard}.{version}.*.parquet")
    if not others:
        raise ReplacedError(
            f"{store.uri(SAMPLES_FAMILY)} has no part for {name}",
            "Run the same `vecmill embed` again, then `vecmill index`.",
        )
    newest = max(others, key=lambda entry: int(entry.uri.split(".")[-2]))
    return f"{SAMPLES_FAMILY}/{newest.uri.rpartition('/')[2]}"
