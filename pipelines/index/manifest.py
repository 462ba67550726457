"""What a release is: all that `manifest.json` says of an immutable index version and its files."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pipelines.index.drift import Drift
from pipelines.index.parts import Parts

FORMAT = 1
MANIFEST, REPORT, CHART = "manifest.json", "report.md", "curve.svg"
TRAINED = "trained.faiss"
MERGED = "merged.json"
NEW = "new "
"""Begins the name of a kind of query that is of an update's new parts."""


class SideFile(BaseModel):
    """A `.npy` of an index shard's vectors in id order, [rows, dim], from which search re-scores.

    header: bytes before the first vector. exact: each vector is there as its part has it.
    """

    model_config = ConfigDict(frozen=True)

    file: str
    header: int
    bytes: int
    sha256: str
    exact: bool


class IndexShard(BaseModel):
    """One FAISS file. first_id: lowest id in it; rows: vectors it holds. side: their stored form, where there is."""

    model_config = ConfigDict(frozen=True)

    file: str
    first_id: int
    rows: int
    bytes: int
    sha256: str
    side: SideFile | None = None


class KeptFile(BaseModel):
    """Another file of a release."""

    model_config = ConfigDict(frozen=True)

    file: str
    bytes: int
    sha256: str


ReleaseFile = IndexShard | SideFile | KeptFile


class Merged(BaseModel):
    """The whole of `merged.json`: the files that a release's index shards were merged into, after its manifest."""

    files: tuple[KeptFile, ...]


class Recall(BaseModel):
    """What the index's k first hold, by kind of query: `recall@k` of the exact k nearest the share (k-recall@k),
    `1-recall@k` in what share of queries the nearest.

    Queries are drawn over all parts and not trained on. An image query is itself in the index: its
    own id is taken out of both lists, so that finding itself earns nothing. reranked: of the k first of
    k × factor candidates, re-scored; empty where there is nothing to re-score with.
    """

    queries: dict[str, int]
    figures: dict[str, dict[str, float]]
    reranked: dict[str, dict[str, float]] = {}

    @property
    def judged(self) -> dict[str, float]:
        """recall@10 as search has it by default, by kind of query, of those whose nearest in the whole index are known.

        Of an update's new queries they are known in the index shards alone that it fills, where others than a search
        finds are the nearest.
        """
        figures = self.reranked or self.figures
        return {kind: found["recall@10"] for kind, found in figures.items() if not kind.startswith(NEW)}

    @property
    def lowest_at_10(self) -> float | None:
        """That of the kind that fares worst; None if it was not measured."""
        return min(self.judged.values(), default=None)


class Coding(BaseModel):
    """How vectors are stored for re-ranking: float16, or int8 as centre + step × code in each dimension."""

    model_config = ConfigDict(frozen=True)

    dtype: Literal["float16", "int8"]
    centre: tuple[float, ...] = ()
    step: tuple[float, ...] = ()


class Rerank(BaseModel):
    """factor: candidates for each hit. query_ms: what re-scoring 10 × factor candidates adds to a query."""

    model_config = ConfigDict(frozen=True)

    coding: Coding
    factor: int
    query_ms: float


class CurvePoint(BaseModel):
    """Search with other parameters: milliseconds a query, and recall@10 by kind of query."""

    model_config = ConfigDict(frozen=True)

    search_params: str
    query_ms: float
    recall: dict[str, float]
    reranked: dict[str, float] = {}


class Variant(BaseModel):
    """One key in a comparison. metric: that it was built with. bytes_per_vector: what its file grows by, id included.

    recall, reranked: by kind of query, recall@1 and recall@10 of the index alone and re-scored with whole vectors.
    """

    model_config = ConfigDict(frozen=True)

    key: str
    metric: str
    search_params: str
    bytes_per_vector: float
    query_ms: float
    batch_query_ms: float
    train_s: float
    recall: dict[str, dict[str, float]]
    reranked: dict[str, dict[str, float]]


class Variants(BaseModel):
    """Keys compared on one sample. vectors, queries: how many, these by kind. factor: candidates re-scored a hit.
    version: the release that was built when they were."""

    model_config = ConfigDict(frozen=True)

    vectors: int
    queries: dict[str, int]
    metric: str
    factor: int
    rows: tuple[Variant, ...]
    version: str = ""


class Latency(BaseModel):
    """Milliseconds of a search through the search client. p50_ms, p95_ms: of queries one at a time, of which there were
    so many. batch_ms: of one of 32 asked at once."""

    model_config = ConfigDict(frozen=True)

    queries: int
    p50_ms: float
    p95_ms: float
    batch_ms: float


class Release(BaseModel):
    """The whole of `manifest.json`.

    id_space: one higher each time that ids start anew; within one, an id means the same vector.
    search_params: as FAISS's ParameterSpace reads them. settings: the index settings it was made by.
    seconds, peak_mib: of each stage. bytes_per_vector: of the FAISS files (`index`) and the side files (`rerank`).
    query_ms, batch_query_ms: of a query alone on one thread, and of one of 32 asked at once on all, 0 where that was
    not measured.
    round_trips: sampled ids that led back to part, row and key, and to the very vector that was indexed.
    trained: the empty index that every index shard started from. asked: what recall was measured with.
    grown_from: the release whose index shards are in it. drift: of what was added to them.
    dropped: requests for takedowns that no part held anything of any more when it was built, nor therefore does it.
    variants: other keys, compared on a sample. latency: of the search client, by what it is asked for.
    """

    model_config = ConfigDict(frozen=True)

    format: int = FORMAT
    version: str
    id_space: int
    encoder: str
    modality: str
    fingerprint: str
    metric: str
    index_key: str
    search_params: str
    query_ms: float
    parts: Parts
    shards: tuple[IndexShard, ...]
    recall: Recall
    settings: dict[str, Any]
    seed: int
    seconds: dict[str, float]
    peak_mib: dict[str, float]
    versions: dict[str, str]
    made: str = ""
    bytes_per_vector: dict[str, float] = {}
    rerank: Rerank | None = None
    curve: tuple[CurvePoint, ...] = ()
    round_trips: int = 0
    trained: KeptFile | None = None
    asked: KeptFile | None = None
    grown_from: str | None = None
    dropped: tuple[str, ...] = ()
    drift: Drift | None = None
    batch_query_ms: float = 0.0
    variants: Variants | None = None
    latency: dict[str, Latency] = {}

    @property
    def folder(self) -> str:
        return f"{index_folder(self.encoder, self.modality)}/{self.version}"

    @property
    def files(self) -> list[ReleaseFile]:
        shards = [file for shard in self.shards for file in (shard, shard.side) if file]
        return [*shards, *(file for file in (self.trained, self.asked) if file)]


def index_folder(encoder: str, modality: str) -> str:
    return f"index/{encoder}/{modality}"
