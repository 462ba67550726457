"""Searches among images that show what an encoder finds, with vectors that are stored: nothing is embedded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.contracts import Modality
from pipelines.errors import VecmillError
from pipelines.evaluate.groups import Groups
from pipelines.evaluate.items import ItemPlace, collect, draw, stored
from pipelines.evaluate.protocols import require_comparable
from pipelines.evaluate.thumbnails import samples_at
from pipelines.index.cache import Cache
from pipelines.index.release import latest_or_none
from pipelines.index.trace import Origin, trace_parts
from pipelines.search import Hit, Searcher
from pipelines.storage import Store

SEARCHES, HITS = 4, 6


@dataclass(frozen=True)
class Answer:
    """hits: best first, of an image without itself. samples: of the asking item and of each hit, by `samples_at`."""

    asked: Origin
    hits: list[Hit]
    samples: list[dict[str, Any]]

    def told(self) -> dict[str, Any]:
        hits = [{"key": hit.key, "score": hit.score} for hit in self.hits]
        return {"key": self.asked.key, "caption_index": self.asked.caption_index, "hits": hits}


@dataclass(frozen=True)
class SampleSearch:
    """asks: whose vectors find images. release: that was searched, None where all vectors were compared."""

    asks: Modality
    release: str | None
    answers: list[Answer]

    def told(self) -> dict[str, Any]:
        """As JSON."""
        queries = [answer.told() for answer in self.answers]
        return {"asks": self.asks, "finds": "image", "release": self.release, "queries": queries}


def sample_searches(
    store: Store, encoder: str, modalities: Sequence[Modality], seed: int, cache: Cache | None
) -> Iterator[SampleSearch]:
    """One of each modality that can find images."""
    for asks in modalities if "image" in modalities else ():
        try:
            require_comparable(store, encoder, asks, "image")
            yield _search(store, encoder, asks, seed, cache)
        except VecmillError:
            # An output without vectors, of several vectors an item, or of another space has no such search.
            continue


def _search(store: Store, encoder: str, asks: Modality, seed: int, cache: Cache | None) -> SampleSearch:
    asking = stored(store, encoder, asks, Groups(store))
    ids, _ = draw(asking, SEARCHES, seed)
    queries = collect(asking, ids, 2**14)
    release = latest_or_none(store, encoder, "image")
    searcher = Searcher(store, encoder, "image", exact=release is None, resident=False, cache=cache)
    found = zip(trace_parts(store, asking.parts, ids.tolist()), searcher.search(queries.vectors, HITS + 1), strict=True)
    answers = [_answer(store, asks, asked, hits) for asked, hits in found]
    return SampleSearch(asks, release.version if release else None, answers)


def _answer(store: Store, asks: Modality, asked: Origin, hits: list[Hit]) -> Answer:
    kept = [hit for hit in hits if asks == "text" or not of_one_sample(hit, asked)][:HITS]
    return Answer(asked, kept, samples_at(store, [ItemPlace(each.part, each.row) for each in (asked, *kept)]))


def of_one_sample(one: Origin, other: Origin) -> bool:
    return (one.shard, one.row) == (other.shard, other.row)
