"""Retrieval through the index, beside exact search over the same vectors, by what the release's own metric says."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.contracts import Modality
from pipelines.errors import ConfigError
from pipelines.evaluate.groups import OUTSIDE, Groups
from pipelines.evaluate.items import Items, StoredItems, Tile, codes_of, collect, draw, require_one_vector
from pipelines.evaluate.metrics import DEPTHS, Ranks, at_depths, ranks_in_order
from pipelines.evaluate.protocols import Asked, Say
from pipelines.evaluate.ranking import Room, count_relevant
from pipelines.index.current import current_version
from pipelines.index.manifest import index_folder
from pipelines.index.parts import Ids, Vectors
from pipelines.index.recall import Top, without
from pipelines.index.versions import finished
from pipelines.record import read_record
from pipelines.search import Searcher
from pipelines.storage import Store

ROUNDING = 1e-6
"""Of a score in float32, relative where it is above 1: that of equal vectors differs by it with their places in a
batch."""
CANDIDATE_BYTES = 128 * 2**10
"""Of what two index shards answer to one query, and of what is made of it."""


def through_index(
    store: Store, encoder: str, modality: Modality, groups: Groups, queries: Tile, same: bool, asked: Asked, say: Say
) -> dict[str, Any] | None:
    """The figures of the first max(DEPTHS), among all that the release holds, of whatever split."""
    version = _release_of(store, encoder, modality, asked, say) if asked.index else None
    if version is None:
        return None
    searchers = {
        "exact": Searcher(store, encoder, modality, version, exact=True),
        "found": Searcher(store, encoder, modality, version, resident=False, cache=asked.cache),
    }
    parts = searchers["found"].parts
    require_one_vector(parts)
    gallery = StoredItems(store, parts, groups, searchers["found"].findable())
    if same:
        # A release may have other parts, or have them in another order, than there are now.
        queries = collect(gallery, draw(gallery, len(queries), asked.seed)[0], asked.room.tile_rows(0, gallery.dim))
    own = queries.ids if same else np.full(len(queries), -1)
    relevant, _ = count_relevant(queries, gallery)
    relevant -= int(same)
    kept = relevant > 0
    if not kept.any():
        return None
    queries, relevant, own = queries.of(kept), relevant[kept], own[kept]
    figures = {
        name: at_depths(_found(searcher, gallery, queries, own, relevant, asked.room))
        for name, searcher in searchers.items()
    }
    loss = {name: figures["exact"][name] - value for name, value in figures["found"].items()}
    return {"release": version, "queries": len(queries), "gallery": parts.rows, **figures, "loss": loss}


def _release_of(store: Store, encoder: str, modality: Modality, asked: Asked, say: Say) -> str | None:
    """The one that was asked for, current or not; none of vectors whose index has no such release."""
    folder = index_folder(encoder, modality)
    if not asked.release:
        return current_version(store, folder)
    if asked.release in finished(store, folder):
        return asked.release
    say(f"the index of {modality} vectors is left out: it has no release {asked.release}")
    return None


def require_release(store: Store, encoder: str, asked: Asked) -> None:
    """Raises: ConfigError for a release that was asked for and that no index of the encoder has."""
    modalities = read_record(store).encoders[encoder].modalities
    known = {version for each in modalities for version in finished(store, index_folder(encoder, each))}
    if asked.release and asked.index and asked.release not in known:
        raise ConfigError(
            f"No index of embeddings/{encoder} has the release {asked.release}",
            f"There are: {', '.join(sorted(known)) or 'none'}.",
        )


def _found(searcher: Searcher, gallery: Items, queries: Tile, own: Ids, relevant: Ids, room: Room) -> Ranks:
    top = without(_nearest(searcher, queries.vectors, max(DEPTHS) + 1, room), own)
    codes = codes_of(gallery, top.ids)
    hits = (codes == queries.codes[:, None]) & (codes != OUTSIDE)
    return ranks_in_order(wrong_first(hits, top)[:, : max(DEPTHS)], relevant)


def _nearest(searcher: Searcher, queries: Vectors, k: int, room: Room) -> Top:
    """`Searcher.nearest` of so many queries at once as leave room for their candidates."""
    step = max(1, room.bytes // 4 // CANDIDATE_BYTES)
    tops = [searcher.nearest(queries[at : at + step], k) for at in range(0, len(queries), step)]
    return Top(np.concatenate([top.ids for top in tops]), np.concatenate([top.scores for top in tops]))


def wrong_first(hits: NDArray[np.bool_], top: Top) -> NDArray[np.bool_]:
    """Hits [n, k], best first, of which those of equal scores (but for rounding) are ordered as exact ranking does.

    Places where nothing was found, whose scores are infinite, are equal to no other.
    """
    there = top.ids >= 0
    scores = np.where(there, top.scores, 0)
    apart = np.abs(np.diff(scores, axis=1, prepend=scores[:, :1])) > ROUNDING * np.maximum(1, np.abs(scores))
    apart |= np.diff(there, axis=1, prepend=there[:, :1])
    runs = np.cumsum(apart, axis=1)
    return np.take_along_axis(hits, np.lexsort((hits, runs), axis=1), axis=1)
