"""Queries by example: the stored vectors of samples by key, or of items by id."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq

from pipelines.contracts import Modality
from pipelines.errors import ConfigError, InputError
from pipelines.index.parts import (
    PartRange,
    Parts,
    ReplacedError,
    Vectors,
    embeddings_folder,
    list_parts,
    open_part,
    take,
    vectors,
)
from pipelines.index.removed import not_removed
from pipelines.index.selection import Selection, end_of
from pipelines.index.trace import trace_parts
from pipelines.queries import Query
from pipelines.record import read_record
from pipelines.search import Searcher
from pipelines.takedowns import read_takedowns

THREADS = 8


def examples(searcher: Searcher, queries: Sequence[Query], modality: Modality | None = None) -> list[Vectors | None]:
    """Of each query the vector that it is `like`, float32 [dim], or [several, dim]; None where it is like none.

    modality: whose vectors of the sample, those searched if left out; of several captions, the first. A key is looked
    for in the key column of one part after the other, 8 at a time, until all are found; an id is read at its place.
    Raises: InputError for a key that has no vector, ConfigError for vectors that those searched cannot be compared
    with.
    """
    found: dict[str, Vectors] = {}
    if keys := {query.like for query in queries if query.like is not None}:
        found = _by_key(searcher, keys, modality or searcher.modality)
    return [_example(searcher, query, found) for query in queries]


def _example(searcher: Searcher, query: Query, by_key: dict[str, Vectors]) -> Vectors | None:
    if query.like is not None:
        return by_key[query.like]
    if query.like_id is None:
        return None
    allowed = searcher.findable() or Selection.every(end_of(searcher.parts))
    if query.like_id < 0 or not allowed.mask(query.like_id, query.like_id + 1)[0]:
        raise InputError(f"There is no id {query.like_id} to be like", "Take one that a search gave.")
    return trace_parts(searcher.store, searcher.parts, [query.like_id])[0].vector


def _by_key(searcher: Searcher, keys: set[str], modality: Modality) -> dict[str, Vectors]:
    store, parts, among = searcher.store, searcher.parts, searcher.findable()
    folder = embeddings_folder(searcher.encoder, modality)
    if modality != searcher.modality:
        _require_comparable(searcher, modality)
        parts = list_parts(store, folder)
        among = not_removed(store, parts, read_takedowns(store))
    found: dict[str, Vectors] = {}
    for part, places in _places(searcher, parts, keys, among):
        for key, position in places.items():
            if key not in found:
                found[key] = _vector(searcher, parts, part, position)
        if len(found) == len(keys):
            return found
    missing = sorted(keys - found.keys())
    raise InputError(
        f"{store.uri(folder)} has no vector of the key {missing[0]!r}",
        "Keys are those that a search prints, and of the column `key` of samples/.",
    )


def _places(
    searcher: Searcher, parts: Parts, keys: set[str], among: Selection | None
) -> Iterator[tuple[PartRange, dict[str, int]]]:
    ranges = (among.of(parts) if among else parts).ranges
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(ranges), THREADS):
            some = ranges[start : start + THREADS]
            yield from zip(some, pool.map(lambda part: _in_part(searcher, parts, part, keys, among), some), strict=True)


def _in_part(
    searcher: Searcher, parts: Parts, part: PartRange, keys: set[str], among: Selection | None
) -> dict[str, int]:
    """Position by key, of each the first that may be found; nothing of a part that was replaced since."""
    try:
        with open_part(searcher.store, parts.path(part)) as stream:
            listed = pq.read_table(stream, columns=["key"], use_threads=False, pre_buffer=False)["key"].to_pylist()
    except ReplacedError:
        return {}
    allowed = among.mask(part.offset, part.offset + part.rows) if among else np.ones(part.rows, bool)
    places: dict[str, int] = {}
    for position, key in enumerate(listed):
        if key in keys and allowed[position]:
            places.setdefault(key, position)
    return places


def _vector(searcher: Searcher, parts: Parts, part: PartRange, position: int) -> Vectors:
    table = take(searcher.store, parts.path(part), np.array([position], np.int64), ["embedding"])
    found = vectors(table["embedding"], parts.dim)
    return found[0] if parts.count == 1 else found


def _require_comparable(searcher: Searcher, modality: Modality) -> None:
    spec = read_record(searcher.store).encoders[searcher.encoder].encoder_spec(searcher.store.options)
    if modality not in spec.modalities:
        raise ConfigError(f"{searcher.encoder} has no {modality} vectors", f"It has: {', '.join(spec.modalities)}.")
    one, other = spec.vectors[modality].space, spec.vectors[searcher.modality].space
    if one != other:
        raise ConfigError(
            f"{searcher.encoder}: {modality} vectors are of the space {one}, {searcher.modality} vectors of {other}: "
            "they cannot be compared",
            "Leave --like-modality out.",
        )
