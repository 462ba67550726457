"""The nearest among some of an index's ids, as many as there are, however few may be found.

A filter that lets one id in a hundred through leaves a hundredth of what a query looks at. So that it looks at as
many allowed vectors as it does at all without one, an IVF probes more lists and a graph searches wider, by the
inverse of the allowed share; what is denied costs the test of a bit. Where that would cost more than comparing
with all that is allowed, or fewer than k come of it though there are k, all that is allowed is compared:
every list, or the graph's own vectors one after the other.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import faiss
import numpy as np

from pipelines.index.parts import Vectors
from pipelines.index.recall import Top, empty_top
from pipelines.index.selection import Selection


def ask(index: Any, queries: Vectors, k: int) -> Top:
    scores, ids = index.search(queries, k)
    return Top(ids, scores)


def ask_among(index: Any, queries: Vectors, k: int, among: Selection, first: int) -> Top:
    """The k nearest, or as many as there are, of the ids that may be found; those of `index` start at `first`.

    Search parameters that are set on the index hold, but for how far it looks. Safe on an index that others search.
    """
    allowed = among.count(first, first + index.ntotal)
    if allowed == 0:
        return empty_top(len(queries))
    if allowed == index.ntotal:
        return ask(index, queries, k)
    k = min(k, allowed)
    selector = among.selector()
    try:
        top = _ask_wider(index, queries, k, selector, allowed / index.ntotal)
        return _completed(top, queries, lambda short: _ask_all(index, short, k, selector))
    except RuntimeError:
        return _ask_for_more(index, queries, k, among)


def _completed(top: Top, queries: Vectors, ask_all: Any) -> Top:
    """With more for the queries that got fewer than they asked for, after what they got."""
    short = (top.ids < 0).any(axis=1)
    if not short.any():
        return top
    late = np.zeros(top.ids.shape, bool)
    top.ids[short], top.scores[short], late[short] = _appended(top, short, ask_all(queries[short]))
    return Top(top.ids, top.scores, late)


def _appended(top: Top, short: Any, rest: Top) -> tuple[Any, Any, Any]:
    """Ids, scores and lateness of the short ones, and of what `rest` has beside them."""
    k = top.ids.shape[1]
    known = [np.isin(more, mine) for more, mine in zip(rest.ids, top.ids[short], strict=True)]
    ids = np.concatenate([top.ids[short], np.where(known, -1, rest.ids)], axis=1)
    scores = np.concatenate([top.scores[short], rest.scores], axis=1)
    order = np.argsort(ids < 0, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1), order >= k


def _ask_wider(index: Any, queries: Vectors, k: int, selector: Any, share: float) -> Top:
    ivf, graph = faiss.try_extract_index_ivf(index), _graph_of(index)
    if ivf is not None:
        return _with(index, queries, k, _probing(ivf, ceil(ivf.nprobe / share), selector))
    if graph is None:
        return _with(index, queries, k, faiss.SearchParameters(sel=selector))
    looked = ceil(graph.hnsw.efSearch / share)
    if looked * graph.hnsw.nb_neighbors(0) > share * index.ntotal:
        return _ask_all(index, queries, k, selector)
    return _with(index, queries, k, faiss.SearchParametersHNSW(efSearch=looked, sel=selector))


def _ask_all(index: Any, queries: Vectors, k: int, selector: Any) -> Top:
    """Compared with all that is allowed."""
    ivf, graph = faiss.try_extract_index_ivf(index), _graph_of(index)
    if ivf is not None:
        return _with(index, queries, k, _probing(ivf, ivf.nlist, selector))
    if graph is None:
        return _with(index, queries, k, faiss.SearchParameters(sel=selector))
    local = faiss.IDSelectorTranslated(index.id_map, selector)
    storage = faiss.downcast_index(graph.storage)
    params = faiss.SearchParameters(sel=local)
    scores, at = storage.search(transformed(faiss.downcast_index(index.index), queries), k, params=params)
    ids = faiss.rev_swig_ptr(index.id_map.data(), index.ntotal)
    return Top(np.where(at < 0, -1, ids[at]), scores)


def _with(index: Any, queries: Vectors, k: int, params: Any) -> Top:
    scores, ids = index.search(queries, k, params=params)
    return Top(ids, scores)


def _probing(ivf: Any, lists: int, selector: Any) -> Any:
    """nprobe given here replaces the index's own; so does all else that parameters may hold, if it is in them."""
    lists = min(lists, ivf.nlist)
    coarse = None
    if isinstance(faiss.downcast_index(ivf.quantizer), faiss.IndexHNSW):
        coarse = faiss.SearchParametersHNSW(efSearch=2 * lists)
    return faiss.SearchParametersIVF(sel=selector, nprobe=lists, max_codes=0, quantizer_params=coarse)


def _graph_of(index: Any) -> Any:
    """The HNSW in an index that is one, None in any other."""
    while hasattr(index, "index") and not isinstance(index, faiss.IndexIVF):
        index = faiss.downcast_index(index.index)
    return index if isinstance(index, faiss.IndexHNSW) else None


def transformed(index: Any, vectors: Vectors) -> Vectors:
    """float32 [n, d] as the index inside has them, after what is done to them first."""
    if isinstance(index, faiss.IndexPreTransform):
        for at in range(index.chain.size()):
            vectors = faiss.downcast_VectorTransform(index.chain.at(at)).apply(vectors)
    return vectors


def _ask_for_more(index: Any, queries: Vectors, k: int, among: Selection) -> Top:
    """Of an index that knows no selectors: ever more, and what is denied left out.

    PQ alone, LSH and NSG give all they hold; RFlat and PQR over an IVF no more than is in the lists they probe.
    """
    asked = min(2 * k, index.ntotal)
    while True:
        top = ask(index, queries, asked)
        allowed = _allowed_first(top, among)
        if asked == index.ntotal or (allowed.ids[:, k - 1] >= 0).all():
            return Top(allowed.ids[:, :k], allowed.scores[:, :k])
        asked = min(4 * asked, index.ntotal)


def _allowed_first(top: Top, among: Selection) -> Top:
    """In the same order, those that may not be found gone and -1 at the end for each."""
    known = np.maximum(top.ids, 0)
    allowed = (top.ids >= 0) & ((among.bits[known >> 3] >> (known & 7)) & 1).astype(bool)
    order = np.argsort(~allowed, axis=1, kind="stable")
    ids = np.where(allowed, top.ids, -1)
    return Top(np.take_along_axis(ids, order, axis=1), np.take_along_axis(top.scores, order, axis=1))
