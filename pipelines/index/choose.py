"""Which index: the factory string, and how the parts are cut into index shards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import ceil
from typing import Any

import faiss
from autofaiss.external.metadata import IndexMetadata
from autofaiss.external.optimize import get_optimal_index_keys_v2, index_key_to_nb_cluster
from autofaiss.indices.index_factory import index_factory
from autofaiss.utils.cast import cast_memory_to_bytes

from pipelines.config import IndexConfig
from pipelines.errors import ConfigError, IndexBuildError
from pipelines.index.parts import Parts

VECTORS_PER_SHARD = 10_000_000
METRICS = {"ip": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}

# Anchored: autofaiss searches for these anywhere in the key, and so builds an HNSW of 1024 links a
# vector for "IVF1024_HNSW32,Flat" with metric ip.
IP_FORMS = {
    "OPQ<m>_<d>,IVF<n>,PQ<m>[x8]": r"OPQ\d+_\d+,IVF\d+,PQ\d+(x\d+)?",
    "OPQ<m>_<d>,IVF<n>_HNSW32,PQ<m>[x8]": r"OPQ\d+_\d+,IVF\d+_HNSW\d+,PQ\d+(x\d+)?",
    "Pad<d>,IVF<n>_HNSW32,PQ<m>[x8]": r"Pad\d+,IVF\d+_HNSW\d+,PQ\d+(x\d+)?",
    "IVF<n>,Flat": r"IVF\d+,Flat",
    "HNSW<m>": r"HNSW\d+",
    "Flat": r"Flat",
}


def parse_bytes(size: str, setting: str = "index.shard_memory") -> int:
    """Bytes of `500M`, `4G` or `1.5TB` (powers of 1024). Raises: ConfigError."""
    try:
        return int(cast_memory_to_bytes(size))
    except ValueError:
        raise ConfigError(f"{setting}: {size!r} is not a size", "Write 500M, 4G or 1.5T.") from None


def choose_key(rows: int, dim: int, shards: int, settings: IndexConfig, largest: int = 0, alone: bool = False) -> str:
    """The factory string: settings.index_key where given, else autofaiss's choice.

    Clusters are chosen for all `rows`, as every index shard shares one quantiser; the memory budget
    holds for each of the `shards`. largest: vectors of the largest, where they are not even; alone: it is one part,
    which is never cut. Raises: ConfigError, IndexBuildError where nothing fits.
    """
    budget, largest = parse_bytes(settings.shard_memory), largest or ceil(rows / shards)
    keys = [settings.index_key] if settings.index_key else _keys(rows, dim, largest, settings)
    if not keys:
        raise IndexBuildError(
            f"No index of {rows:,} vectors of {dim} dimensions fits {shards} × {settings.shard_memory}",
            "Raise index.shard_memory, or index.shards (there are no more of them than parts).",
        )
    empty_index(keys[0], dim, settings.metric)
    _require_known_kind(keys[0])
    needed = shard_bytes(keys[0], largest, dim)
    if needed > budget:
        raise IndexBuildError(
            f"An index shard of {largest:,} vectors as {keys[0]} needs about {needed:,} bytes; "
            f"index.shard_memory is {settings.shard_memory}",
            "It is one part, and a part is never cut: raise index.shard_memory, or choose a smaller index.index_key."
            if alone
            else "Raise index.shard_memory or index.shards (there are no more of them than parts), or choose a smaller "
            "index.index_key.",
        )
    return keys[0]


def _require_known_kind(key: str) -> None:
    if odd := re.search(r"RFlat|Refine|NSG|PQ\d+x4fs", key):
        raise ConfigError(
            f"index.index_key: {key!r} is of a kind ({odd[0]}) that updates, recall and --merge do not work with",
            "Use keys of Flat, HNSW<m>, SQ<bits>, PQ<m> and IVF<n> with or without OPQ or PCA before; index.rerank is "
            "what re-scores.",
        )


def empty_index(key: str, dim: int, metric: str) -> Any:
    """An untrained FAISS index that takes ids of its own. Raises: ConfigError for a key that cannot be built."""
    if metric == "ip" and not any(re.fullmatch(form, key) for form in IP_FORMS.values()):
        raise ConfigError(
            f"index.index_key: {key!r} is not allowed with metric ip, for which FAISS builds only some keys right",
            f"Use one of: {' · '.join(IP_FORMS)}; a plain IVF<n>,PQ<m> needs a leading OPQ. Or use metric l2.",
        )
    try:
        _require_even_rotation(key, dim)
        index = index_factory(dim, key, METRICS[metric])
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"index.index_key: {key!r} cannot be built for {dim} dimensions: {reason}",
            "PQ<m> must divide the dimension before it, which OPQ<m>_<d> sets to d.",
        ) from None
    return index if _takes_ids(index) else faiss.IndexIDMap2(index)


def _require_even_rotation(key: str, dim: int) -> None:
    """FAISS itself only finds this out once it trains."""
    rotation = re.match(r"OPQ(\d+)(?:_(\d+))?,", key)
    if rotation and int(rotation[2] or dim) % int(rotation[1]):
        raise RuntimeError(f"{rotation[1]} does not divide {rotation[2] or dim}")


def _takes_ids(index: Any) -> bool:
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    return isinstance(inner, (faiss.IndexIVF, faiss.IndexIDMap))


def holds_codes(key: str) -> bool:
    """Whether what the index holds is less than the vectors, so that its scores are not exact."""
    return not re.fullmatch(r"(IDMap2?,)?((IVF\d+(_HNSW\d+)?,)?Flat|HNSW\d+(,Flat)?)", key)


def clusters(key: str) -> int:
    """The most centroids that any part of the index learns: of IVF's lists, or of PQ's 2^bits."""
    lists = int(index_key_to_nb_cluster(key)) if re.search(r"IVF\d+|IMI\d+x\d+", key) else 1
    bits = [int(found or 8) for found in re.findall(r"PQ\d+(?:x(\d+))?", re.sub(r"OPQ\d+(_\d+)?", "", key))]
    return max([lists, *(1 << bit for bit in bits)])


def shard_bytes(key: str, rows: int, dim: int) -> int:
    """What an index shard takes in memory, by autofaiss's estimate; for keys it does not know, uncompressed."""
    estimate = int(IndexMetadata(key, rows, dim).estimated_index_size_in_bytes())
    return estimate if estimate > 0 else rows * (4 * dim + 8)


def shard_count(parts: Parts, settings: IndexConfig) -> int:
    """Index shards aimed at, never more than parts that hold something.

    Where they are not counted out: one per 10 million vectors, or as many more as the memory of each asks for. That
    is known of a key that was named; one that autofaiss chooses is chosen so that it fits, once any does.
    """
    most = sum(part.rows > 0 for part in parts.ranges)
    if settings.shards != "auto":
        return min(settings.shards, most)
    least = min(ceil(parts.rows / VECTORS_PER_SHARD), most)
    if settings.index_key:
        return _fitting(settings.index_key, parts, settings, least, most)
    return _choosable(parts, settings, least, most)


def _fitting(key: str, parts: Parts, settings: IndexConfig, least: int, most: int) -> int:
    """From `least` to `most`, the first count of index shards each of which is within its memory; else `most`."""
    budget = parse_bytes(settings.shard_memory)
    start = max(1, least, shard_bytes(key, parts.rows, parts.dim) // max(1, budget))
    if shard_bytes(key, max((part.rows for part in parts.ranges), default=0), parts.dim) > budget:
        return most
    fitting = (
        n for n in range(start, most) if shard_bytes(key, largest_rows(parts, cut(parts, n)), parts.dim) <= budget
    )
    return next(fitting, most)


def _choosable(parts: Parts, settings: IndexConfig, least: int, most: int) -> int:
    """`least` doubled until autofaiss has a key that fits the memory of each index shard; else `most`."""
    count = max(1, least)
    while count < most and not _fits(parts, largest_rows(parts, cut(parts, count)), settings):
        count = min(2 * count, most)
    return min(count, most)


def _fits(parts: Parts, largest: int, settings: IndexConfig) -> bool:
    """Whether autofaiss has a key, and its index shards of so many vectors are as small as it took them to be."""
    keys = _keys(parts.rows, parts.dim, largest, settings)
    return bool(keys) and shard_bytes(keys[0], largest, parts.dim) <= parse_bytes(settings.shard_memory)


def _keys(rows: int, dim: int, largest: int, settings: IndexConfig) -> list[str]:
    """autofaiss's, best first, of an index of `rows` vectors of which each index shard, the largest of `largest`, is
    within the memory for one."""
    return list(get_optimal_index_keys_v2(rows, dim, f"{parse_bytes(settings.shard_memory) * rows // largest}B"))


def largest_rows(parts: Parts, runs: Sequence[range]) -> int:
    """Vectors of the largest of the runs."""
    return max((sum(parts.ranges[at].rows for at in run) for run in runs), default=0)


def cut(parts: Parts, shards: int) -> list[range]:
    """Contiguous runs of parts (as positions among them) of about equal rows, at most `shards` of them."""
    total, runs = parts.rows, dict[int, range]()
    for at, part in enumerate(parts.ranges):
        shard = (part.offset - parts.ranges[0].offset + part.rows // 2) * shards // max(1, total)
        runs[shard] = range(runs[shard].start if shard in runs else at, at + 1)
    return [run for run in runs.values() if any(parts.ranges[at].rows for at in run)]
