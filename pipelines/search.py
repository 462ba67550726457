"""Find things in an output: vectors in, the nearest items out, each with its key, captions and place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import ceil

import numpy as np

from pipelines.contracts import Modality
from pipelines.errors import ConfigError, InputError
from pipelines.fold import fold as fold_hits
from pipelines.index.cache import Cache
from pipelines.index.manifest import IndexShard, Release
from pipelines.index.parts import Parts, Vectors, batches, embeddings_folder, list_grown, list_parts
from pipelines.index.probe import Opening, ask_shard, probe
from pipelines.index.recall import EXACT_METRICS, Top, exact, exact_of_several, merge, with_ties
from pipelines.index.release import latest_or_none, read_release
from pipelines.index.removed import denied
from pipelines.index.rerank import candidates, rerank_in_blocks, stored_vectors
from pipelines.index.selection import Selection, both, standing
from pipelines.index.trace import Origin, trace_standing
from pipelines.record import FILE, read_record
from pipelines.storage import Store
from pipelines.takedowns import read_takedowns

LOOK_EVERY_S = 5.0
MOST_TO_FOLD = 10_000
Warn = Callable[[str], None]
Probe = Callable[[Vectors, int, Selection | None], Top]


@dataclass(frozen=True)
class Hit(Origin):
    """One item found, and where it comes from.

    score: inner product, cosine, squared L2 or L1 distance. folded: hits that repeat this one, best first.
    """

    score: float
    folded: tuple[Hit, ...] = ()


class Searcher:
    """Searches one modality's vectors of one encoder of an output.

    encoder: its folder in `embeddings/`; may be left out where the output has one. release: a version, or what its
    manifest says, else the current one. exact: compares every vector there is now (with a release, every
    vector it was made of) with the query, a batch at a time, and needs no index; `metric` says how, by
    ip, l2, cosine or l1, the release's or else ip where left out. params: FAISS search parameters in place of the
    release's. resident: holds every index shard open from the start; else a search opens one after the other. Local
    ones are mapped, others read into memory, or, given a cache, fetched there and mapped.
    rerank: for each hit so many candidates are scored again with their stored vectors, 0 for none;
    where left out, as many as the release was measured with, if it has stored vectors. among: says of the parts
    that are searched which of their ids may ever be found; all, where it is left out or says None. What was taken
    down is never found.
    Raises: ConfigError for an encoder that is not there, IndexBuildError for an index that is not.
    """

    def __init__(
        self,
        store: Store,
        encoder: str | None = None,
        modality: Modality = "image",
        release: str | Release | None = None,
        exact: bool = False,
        metric: str | None = None,
        params: str | None = None,
        resident: bool = True,
        rerank: int | None = None,
        among: Callable[[Parts], Selection | None] = lambda parts: None,
        cache: Cache | None = None,
    ) -> None:
        require_fitting(exact, metric, rerank)
        self.store, self.modality, self.exact = store, modality, exact
        self.encoder = choose_encoder(store, encoder)
        self.release = self._release(release)
        self.metric = metric or (self.release.metric if self.release else "ip")
        self.parts = self.release.parts if self.release and (release or not exact) else self._parts_now()
        self.among = both(among(self.parts), standing(self.parts))
        self._takedowns = read_takedowns(store)
        self._denied, self._looked = denied(store, self.parts, self._takedowns), time.monotonic()
        searched = None if exact else self.release
        self.rerank = rerank_factor(searched, rerank)
        self._stored = stored_vectors(store, searched, cache) if searched and self.rerank else None
        self._probes: list[Probe] = []
        if searched:
            params = searched.search_params if params is None else params
            opening = Opening(store, searched.folder, searched.index_key, params, cache)
            self._probes = shard_probes(opening, searched.shards, resident)

    def _release(self, version: str | Release | None) -> Release | None:
        if isinstance(version, Release):
            return version
        if self.exact and version is None:
            return latest_or_none(self.store, self.encoder, self.modality)
        return read_release(self.store, self.encoder, self.modality, version)

    def _parts_now(self) -> Parts:
        """The release's, so that ids are the same, less those that are gone, and what has come since."""
        if self.release:
            return list_grown(self.store, self.release.parts)
        return list_parts(self.store, embeddings_folder(self.encoder, self.modality))

    def nearest(self, queries: Vectors, k: int, among: Selection | None = None, blocks: int = 1) -> Top:
        """Ids and scores of the k nearest of each query, float32 [q, dim], best first; fewer where there are fewer.

        Where items have several vectors, queries may have too, [q, several, dim]. among: what may be found, of
        that which may be at all. blocks: so many times k, in an order in which the first k are those of one block.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        self._require_shape(queries)
        k = min(k, self.parts.rows)
        allowed = both(self.findable(), among)
        ask = partial(self._found, among=allowed)
        if not self._stored:
            return with_ties(ask, queries, min(k * blocks, self.parts.rows))
        size = candidates(k, self.rerank)
        wanted = min(size * blocks, self.parts.rows)
        found = with_ties(ask, queries, wanted)
        return rerank_in_blocks(queries, found, self._stored, k, size, blocks, self.metric)

    def _require_shape(self, queries: Vectors) -> None:
        shapes = (2, 3) if self.exact or self.parts.count > 1 else (2,)
        if queries.ndim not in shapes or queries.shape[-1] != self.parts.dim:
            raise ConfigError(
                f"The queries have shape {queries.shape}; embeddings/{self.encoder} has {self.parts.dim} dimensions",
                "Embed them with the output's own encoder.",
            )
        if self.parts.count > 1 or queries.ndim == 3:
            self._require_inner_product()

    def _found(self, queries: Vectors, k: int, among: Selection | None) -> Top:
        """By brute force, or what the index shards find, in the order of their own scores."""
        if self.parts.count > 1 or queries.ndim == 3:
            return exact_of_several(queries, self._batches(among), self.parts.count, k, among)
        if self.exact:
            return exact(queries, self._batches(among), k, self.metric, among)
        return merge((probe_shard(queries, k, among) for probe_shard in self._probes), k, self.metric)

    def findable(self) -> Selection | None:
        """What may be found at all; None where that is everything. A takedown counts some seconds after it is made."""
        return both(self._not_removed(), self.among)

    def _not_removed(self) -> Selection | None:
        if time.monotonic() - self._looked > LOOK_EVERY_S:
            known = read_takedowns(self.store)
            if known is not self._takedowns:
                self._denied = denied(self.store, self.parts, known)
            # Last: what fails on the way is looked at again by the next search.
            self._takedowns, self._looked = known, time.monotonic()
        return self._denied.allowed

    def _batches(self, among: Selection | None) -> Iterator[tuple[int, Vectors]]:
        return batches(self.store, among.of(self.parts) if among else self.parts)

    def _require_inner_product(self) -> None:
        if self.metric != "ip":
            raise ConfigError(
                f"embeddings/{self.encoder}/{self.modality} has several vectors an item, which are compared by inner "
                f"product, not {self.metric}",
                "Leave --metric out.",
            )

    def search(
        self,
        queries: Vectors,
        k: int = 10,
        warn: Warn = lambda line: None,
        among: Selection | None = None,
        offset: int = 0,
        fold: float | None = None,
    ) -> list[list[Hit]]:
        """For each query, float32 [q, dim], its k nearest items (`among` them); fewer where there are fewer.

        Hits in parts that were replaced since are left out; `warn` is told how many. offset: so many hits are passed
        over first, at the cost of finding them; pages of one k neither overlap nor leave anything out, as long as the
        release is the same. fold: k hits that repeat no better one, as `pipelines.fold` says, with those that do
        under them; looks at twice as many hits until there are k, or no more, or at MOST_TO_FOLD of them.
        """
        self._warn_of_denied(warn)
        if fold is None:
            return self._hits(self._until(queries, k, among, offset + k).between(offset, offset + k), warn)
        wanted = offset + k
        most = max(wanted, MOST_TO_FOLD)
        while True:
            top, said = self._until(queries, k, among, wanted), list[str]()
            rows = [fold_hits(row, fold) for row in self._hits(top, said.append)]
            ended = top.ids.shape[1] < wanted or (top.ids[:, -1] < 0)
            enough = bool(np.all(ended | (np.array([len(row) for row in rows]) >= offset + k)))
            if not enough and wanted == most:
                said.append(f"Only the {most:,} nearest were looked at: all others of them repeat those shown.")
            if enough or wanted == most:
                for line in said:
                    warn(line)
                return [row[offset : offset + k] for row in rows]
            wanted = min(2 * wanted, most)

    def _warn_of_denied(self, warn: Warn) -> None:
        self._not_removed()
        if self._denied.written_again:
            warn(
                f"{self._denied.written_again:,} vectors cannot be found: what was taken down is of the same shards, "
                "which were written again since they were indexed. Run `vecmill index` again."
            )

    def _until(self, queries: Vectors, k: int, among: Selection | None, wanted: int) -> Top:
        return self.nearest(queries, k, among, ceil(min(wanted, self.parts.rows) / k)).between(0, wanted)

    def _hits(self, top: Top, warn: Warn) -> list[list[Hit]]:
        origins = trace_standing(self.store, self.parts, np.unique(top.ids[top.ids >= 0]).tolist())
        if left_out := int(np.isin(top.ids, [-1, *origins], invert=True).sum()):
            warn(
                f"{left_out:,} hits were left out: their shards were replaced since they were indexed. "
                "When `vecmill embed` of this encoder is through, run `vecmill index` again."
            )
        return [
            [Hit(**vars(origins[id]), score=score) for id, score in zip(*row, strict=True) if id in origins]
            for row in zip(top.ids.tolist(), top.scores.tolist(), strict=True)
        ]


def require_fitting(exact: bool, metric: str | None, rerank: int | None) -> None:
    """Raises: ConfigError for a metric that is none, or that an index was not built for, and for re-ranking what is
    exact."""
    if metric and metric not in EXACT_METRICS:
        raise ConfigError(f"--metric {metric} is not known", f"Known: {', '.join(EXACT_METRICS)}.")
    if metric and not exact:
        raise ConfigError("An index compares by the metric it was built for", "--metric goes with --exact.")
    if exact and rerank:
        raise ConfigError("Exact search has nothing to re-rank", "--rerank goes without --exact.")


def rerank_factor(release: Release | None, asked: int | None) -> int:
    """Candidates for each hit, 0 for no re-ranking. Raises: ConfigError where it is asked for and cannot be."""
    has = release.rerank if release else None
    if asked and not has:
        raise ConfigError(
            f"{release.folder if release else 'The index'} has no stored vectors to re-rank with",
            "Build it with --rerank float16 or int8, or search with --rerank 0.",
        )
    return (has.factor if has else 0) if asked is None else asked


def shard_probes(opening: Opening, shards: Iterable[IndexShard], resident: bool) -> list[Probe]:
    """What asks each index shard: one held open from now on, or one opened for the question alone."""
    if resident:
        return [partial(ask_shard, opening.open(shard), shard) for shard in shards]
    return [partial(probe, opening, shard) for shard in shards]


def choose_encoder(store: Store, encoder: str | None) -> str:
    """The encoder's folder: the named one, or the only one. Raises: ConfigError listing what there is."""
    known = sorted(read_record(store).encoders)
    if not known:
        raise InputError(
            f"{store.uri()} is not the output of an embed run: it has no {FILE}",
            "Check the path, or run `vecmill embed` first.",
        )
    listed = f"It has: {', '.join(known)}."
    if encoder is None and len(known) == 1:
        return known[0]
    if encoder is None:
        raise ConfigError(f"{store.uri()} has {len(known)} encoders: name one with --encoder", listed)
    if encoder not in known:
        raise ConfigError(f"{store.uri()} has no encoder {encoder!r}", listed)
    return encoder
