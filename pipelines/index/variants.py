"""What other keys would find and cost: each trained on, and filled with, one sample, and asked the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import faiss
import numpy as np

from pipelines.config import IndexConfig
from pipelines.errors import ConfigError
from pipelines.index.among import ask
from pipelines.index.choose import IP_FORMS, clusters, empty_index
from pipelines.index.manifest import Variant, Variants
from pipelines.index.measure import CURVE_K, Found
from pipelines.index.parts import Ids, Vectors
from pipelines.index.queries import Queries
from pipelines.index.recall import Top, exact
from pipelines.index.rerank import candidates, scores_of
from pipelines.index.train import train
from pipelines.index.tune import apply, batch_query_ms, query_ms

Say = Callable[[str], None]
DEPTHS = (1, CURVE_K)
QUERIES = 200
"""Of each kind at most."""
POINTS_PER_CLUSTER = 39
"""FAISS itself warns below it."""
PROBED = 16
"""One of so many inverted lists is probed where nothing else says how many."""
MOST_CODES = 16
"""Bytes of a product quantiser's code: each takes some 2.5 s of a CPU to train, with OPQ ten times that."""
LENGTH_1 = 0.01
"""How far from 1 the lengths of vectors that were normalised and rounded may be."""
_LISTS = r"IVF\d+(_HNSW\d+)?,"


def require_variants(settings: IndexConfig, dim: int) -> None:
    """Raises: ConfigError for a key to compare that cannot be built."""
    for key in settings.variants if isinstance(settings.variants, list) else []:
        try:
            empty_index(key, dim, "l2")
        except ConfigError as error:
            raise ConfigError(error.what.replace("index.index_key", "index.variants"), error.fix) from None


def compare(
    settings: IndexConfig, own: tuple[str, str], sample: Vectors, queries: Queries, say: Say
) -> Variants | None:
    """A row a key, in order; None where the sample holds nothing.

    own: key and search parameters of the index itself. sample: float32 [n, dim], none of the queries among them.
    Memory: the sample, and twice an index of it.
    """
    if not len(sample):
        return None
    factor, normal, asked = settings.rerank_factor, _normal(sample), queries.each(QUERIES)
    held = Held(sample / np.linalg.norm(sample, axis=1, keepdims=True) if normal else sample)
    truth = exact(asked.vectors, [(0, held.vectors)], CURVE_K, settings.metric)
    keys = keys_of(own[0], held, settings, normal, say)
    rows = []
    for key in keys:
        rows.append(measured(key, own, held, asked, truth, settings.metric, factor))
        say(f"compared {key}, {len(rows)} of {len(keys)}: {rows[-1].bytes_per_vector:,.1f} bytes a vector")
    counts = {kind: len(vectors) for kind, vectors in asked.kinds.items()}
    return Variants(vectors=len(sample), queries=counts, metric=settings.metric, factor=factor, rows=tuple(rows))


@dataclass(frozen=True)
class Held:
    """A sample in memory; the position of a vector is its id."""

    vectors: Vectors

    @property
    def dim(self) -> int:
        return int(self.vectors.shape[1])

    def take(self, ids: Ids) -> Vectors:
        return self.vectors[ids]


def _normal(sample: Vectors) -> bool:
    return bool((np.abs(np.linalg.norm(sample, axis=1) - 1) < LENGTH_1).all())


def keys_of(own: str, held: Held, settings: IndexConfig, normal: bool, say: Say) -> list[str]:
    """Those of the settings, or what suits the dimension; and the index's own, without its lists if it has too many.

    Left out, which is said of those that were asked for: what the sample is too small to train, and what orders by
    another metric than vectors that are not of length 1 are compared by.
    """
    count, named = len(held.vectors), settings.variants if isinstance(settings.variants, list) else []
    asked = [*(named or usual_keys(held.dim, count)), _trainable(own, count)]
    fitting = [key for key in dict.fromkeys(asked) if _least(key) <= count and _metric(key, settings.metric, normal)]
    if left := [key for key in named if key not in fitting]:
        why = "not enough vectors" if normal else "not enough vectors, or for --metric l2 alone"
        say(f"left out of index.variants: {', '.join(left)} ({why})")
    return fitting


def usual_keys(dim: int, count: int) -> list[str]:
    """Whole vectors, fewer dimensions, fewer bits, and inverted lists, as far as `count` vectors can train them."""
    half, quarter = max(1, dim // 2), max(1, dim // 4)
    codes = next(m for m in range(min(MOST_CODES, max(1, dim // 8)), 0, -1) if dim % m == 0)
    lists = max(1, min(int(count**0.5), count // POINTS_PER_CLUSTER))
    keys = ["Flat", f"PCA{half},Flat", f"PCA{quarter},Flat", "SQ8", f"PCA{half},SQ8"]
    keys += [f"PQ{codes}", f"IVF{lists},Flat"]
    return [key for key in keys if _enough(key, count)]


def _enough(key: str, count: int) -> bool:
    return _least(key) <= count and (clusters(key) == 1 or POINTS_PER_CLUSTER * clusters(key) <= count)


def _least(key: str) -> int:
    """Vectors without which a key cannot be trained: one a cluster, and one a dimension that a projection keeps."""
    projected = re.match(r"(?:PCAW?R?|OPQ\d+_)(\d+),", key)
    return max(clusters(key), int(projected[1]) if projected else 1)


def _trainable(key: str, count: int) -> str:
    """The key, or its codes alone where it has more inverted lists than so many vectors can train."""
    return key if _enough(key, count) else re.sub(_LISTS, "", key)


def _metric(key: str, metric: str, normal: bool) -> str | None:
    """What a key is built with: l2 orders vectors of length 1 as ip does, and FAISS builds any key right for it."""
    if metric == "l2" or any(re.fullmatch(form, key) for form in IP_FORMS.values()):
        return metric
    return "l2" if normal else None


def measured(
    key: str, own: tuple[str, str], held: Held, queries: Queries, truth: Top, metric: str, factor: int
) -> Variant:
    """What one key finds of the sample, and at what cost. truth: the exact nearest by `metric`."""
    built_with = _metric(key, metric, normal=True) or metric
    started = perf_counter()
    index = train(key, built_with, held.vectors, held.dim)
    empty, took = _bytes(index), perf_counter() - started
    index.add_with_ids(held.vectors, np.arange(len(held.vectors)))
    params = own[1] if key == own[0] else _params(key)
    apply(index, params)
    top = ask(index, queries.vectors, candidates(CURVE_K, factor))
    found = Found(top, scores_of(queries.vectors, top.ids, held, metric), metric, factor, exact=True)
    return Variant(
        key=key,
        metric=built_with,
        search_params=params,
        bytes_per_vector=round((_bytes(index) - empty) / len(held.vectors), 3),
        query_ms=round(query_ms(index, queries.vectors), 3),
        batch_query_ms=round(batch_query_ms(index, queries.vectors), 3),
        train_s=round(took, 3),
        recall=dict(_at_depths(found.figures(truth, queries, DEPTHS))),
        reranked=dict(_at_depths(found.reranked(truth, queries, DEPTHS))),
    )


def _params(key: str) -> str:
    lists = re.search(r"IVF(\d+)", key)
    return f"nprobe={max(1, int(lists[1]) // PROBED)}" if lists else ""


def _bytes(index: Any) -> int:
    return int(faiss.serialize_index(index).nbytes)


def _at_depths(figures: dict[str, dict[str, float]]) -> Iterator[tuple[str, dict[str, float]]]:
    for kind, found in figures.items():
        yield kind, {f"recall@{k}": round(found[f"recall@{k}"], 4) for k in DEPTHS}
