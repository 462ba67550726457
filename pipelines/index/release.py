"""A release: an immutable index version with its manifest. `CURRENT` points at one that is whole."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal

import faiss
from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.errors import IndexBuildError
from pipelines.index.drift import Drift
from pipelines.index.parts import Parts
from pipelines.storage import Store, is_whole_json

FORMAT = 1
MANIFEST, CLAIM, POINTER, REPORT = "manifest.json", "build.json", "CURRENT", "report.md"
CHART = "curve.svg"
PUBLISHED = "published"
ID_SPACES = "id_spaces"
NEW = "new "
"""Begins the name of a kind of query that is of an update's new parts."""
TRAINED = "trained.faiss"
MERGED = "merged.json"
_VERSION = re.compile(r"v\d{4,}")


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
    query_ms, batch_query_ms: of a query alone, and of one of 32 asked at once, 0 where that was not measured.
    round_trips: sampled ids that led back to part, row and key, and to the very vector that was indexed.
    trained: the empty index that every index shard started from. asked: what recall was measured with.
    grown_from: the release whose index shards are in it. drift: of what was added to them.
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


def index_homes(store: Store) -> list[tuple[str, str]]:
    """(encoder, modality) of every index that was ever begun."""
    paths = (name.split("/") for name in store.names("index"))
    return sorted({(path[0], path[1]) for path in paths if len(path) > 2})


def claim_version(store: Store, folder: str, attempt: str, plan: str = "") -> str:
    """The name of a version that no other builder gets: `v0001` or the next free. plan: digest of what it will be."""
    # A note that one was published outlives it: what was so named once never means another release.
    taken = {step.removesuffix(".json") for name in store.names(folder) for step in name.split("/")[:2]}
    number = max((int(name[1:]) for name in taken if _VERSION.fullmatch(name)), default=0)
    while True:
        number += 1
        version = f"v{number:04d}"
        path, claim = f"{folder}/{version}/{CLAIM}", Claim(attempt=attempt, plan=plan).model_dump_json().encode()
        # Not put, and yet ours: the acknowledgement of an earlier try was lost.
        if store.put_if_absent(path, claim) or store.read(path) == claim:
            return version


def claim_id_space(store: Store, folder: str, least: int = 1) -> int:
    """One that no release had or will have, `least` or higher, whatever has been deleted since."""
    taken = [int(name.rpartition("/")[2]) for name in store.names(folder) if name.startswith(f"{ID_SPACES}/")]
    claimed = max([least, *(number + 1 for number in taken)])
    while not store.put_if_absent(f"{folder}/{ID_SPACES}/{claimed}", b""):
        claimed += 1
    return claimed


class Claim(BaseModel):
    """Who began a version. attempt: no other's. plan: digest of what it will be."""

    attempt: str = ""
    plan: str = ""


def claim_of(store: Store, folder: str, version: str) -> Claim | None:
    """What a version was claimed with; None where that is gone."""
    with suppress(FileNotFoundError):
        return Claim.model_validate_json(store.read(f"{folder}/{version}/{CLAIM}", is_whole_json))
    return None


def unfinished(store: Store, folder: str) -> list[str]:
    """Versions of which there is anything but a manifest: being built now, or left by a build or deletion that died."""
    names = set(store.names(folder))
    begun = {name.split("/")[0] for name in names if "/" in name and _VERSION.fullmatch(name.split("/")[0])}
    return sorted((version for version in begun if f"{version}/{MANIFEST}" not in names), key=number_of)


def finish(store: Store, release: Release, publish: bool = True) -> None:
    """Writes the manifest, after which the release never changes, and then points `CURRENT` at it."""
    manifest = release.model_dump_json(indent=1).encode()
    path = f"{release.folder}/{MANIFEST}"
    if not store.put_if_absent(path, manifest) and store.read(path) != manifest:
        raise IndexBuildError(f"{store.uri(path)} is there already", "Another build took this version; index again.")
    folder = index_folder(release.encoder, release.modality)
    current = current_version(store, folder)
    # A slower build that began earlier does not turn the pointer back.
    if publish and (current is None or number_of(current) < number_of(release.version)):
        point_at(store, folder, release.version)


def number_of(version: str) -> int:
    return int(version[1:])


class Publication(BaseModel):
    """Why a release is, was or will in a moment be the current one. before: the one that was so until then.

    withdrawn: an older one has taken its place again, so that it does not come back by itself.
    """

    before: str | None = None
    withdrawn: bool = False


def point_at(store: Store, folder: str, version: str) -> None:
    """Makes a release current, once it is noted which one was before, so that a rollback finds its way."""
    current = current_version(store, folder)
    if current != version:
        _note(store, folder, version, Publication(before=current))
        swap(store, folder, version)


def advance(store: Store, folder: str, version: str) -> None:
    """As `point_at`, but never back: of builds that end at the same moment the newest is the current one in the end.

    Each notes itself before it moves the pointer, and looks for newer notes once it has.
    """
    current = current_version(store, folder)
    if current and number_of(current) >= number_of(version):
        return
    _note(store, folder, version, Publication(before=current))
    store.put_atomic(f"{folder}/{POINTER}", version.encode())
    for newer in finished(store, folder):
        known = publication(store, folder, newer)
        if number_of(newer) > number_of(version) and known and not known.withdrawn:
            store.put_atomic(f"{folder}/{POINTER}", newer.encode())


def swap(store: Store, folder: str, version: str) -> None:
    """Points `CURRENT` at a release: readers see the one before or this one, and nothing between."""
    current = current_version(store, folder)
    if current and number_of(current) > number_of(version):
        known = publication(store, folder, current) or Publication()
        _note(store, folder, current, known.model_copy(update={"withdrawn": True}))
    store.put_atomic(f"{folder}/{POINTER}", version.encode())


def publication(store: Store, folder: str, version: str) -> Publication | None:
    """None for a release that nobody has begun to publish."""
    with suppress(FileNotFoundError):
        return Publication.model_validate_json(store.read(f"{folder}/{PUBLISHED}/{version}.json", is_whole_json))
    return None


def _note(store: Store, folder: str, version: str, publication: Publication) -> None:
    store.put_atomic(f"{folder}/{PUBLISHED}/{version}.json", publication.model_dump_json().encode())


def previous_version(store: Store, folder: str) -> str | None:
    """The one that was current before the current one was published, None where there was none."""
    current = current_version(store, folder)
    known = publication(store, folder, current) if current else None
    return known.before if known else None


def finished(store: Store, folder: str) -> list[str]:
    """Versions that have a manifest, oldest first: releases, whether published or not."""
    names = (name.split("/") for name in store.names(folder))
    whole = [name[0] for name in names if name[1:] == [MANIFEST] and _VERSION.fullmatch(name[0])]
    return sorted(whole, key=number_of)


def current_version(store: Store, folder: str) -> str | None:
    with suppress(FileNotFoundError):
        return store.read(f"{folder}/{POINTER}", _is_version).decode().strip()
    return None


def _is_version(data: bytes) -> bool:
    return bool(_VERSION.fullmatch(data.decode(errors="replace").strip()))


def read_release(store: Store, encoder: str, modality: str, version: str | None = None) -> Release:
    """The named version, or the one that `CURRENT` points at. Raises: IndexBuildError where there is none."""
    folder = index_folder(encoder, modality)
    version = version or current_version(store, folder)
    if version is None:
        if unpublished := finished(store, folder):
            raise IndexBuildError(
                f"{store.uri(folder)} has {', '.join(unpublished)}, and none is published",
                "See `vecmill releases`, then `vecmill publish`.",
            )
        raise IndexBuildError(f"{store.uri(folder)} has no index", "Run `vecmill index` first, or search with --exact.")
    path = f"{folder}/{version}/{MANIFEST}"
    try:
        return Release.model_validate_json(store.read(path, is_whole_json))
    except FileNotFoundError:
        raise IndexBuildError(
            f"{store.uri(path)} does not exist", f"See the versions in {store.uri(folder)}."
        ) from None
    except ValidationError as error:
        raise IndexBuildError(f"{store.uri(path)} is not a manifest: {error}", "Index again with --force.") from None


def latest_or_none(store: Store, encoder: str, modality: str) -> Release | None:
    """The current release, None before the first."""
    known = current_version(store, index_folder(encoder, modality))
    return read_release(store, encoder, modality, known) if known else None


def newest_or_none(store: Store, encoder: str, modality: str) -> Release | None:
    """The release that was built last, published or not, None before the first."""
    known = finished(store, index_folder(encoder, modality))
    return read_release(store, encoder, modality, known[-1]) if known else None


def merged_files(store: Store, release: Release) -> tuple[KeptFile, ...]:
    """None where the index shards were not merged, or not to the end."""
    with suppress(FileNotFoundError):
        return Merged.model_validate_json(store.read(f"{release.folder}/{MERGED}", is_whole_json)).files
    return ()


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class _Checked:
    """Reads a stream on FAISS's behalf and keeps the checksum of what went by."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.digest = stream, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.digest.update(data)
        return data


def open_shard(store: Store, folder: str, shard: IndexShard) -> Any:
    """The FAISS index of one index shard, in memory; its ids are the release's.

    Raises: IndexBuildError where the file is gone or is not what the manifest says.
    """
    path = f"{folder}/{shard.file}"
    try:
        index, sha256 = load_index(store, path)
    except FileNotFoundError:
        raise gone(store, path) from None
    if (index.ntotal, sha256) != (shard.rows, shard.sha256):
        raise IndexBuildError(f"{store.uri(path)} is not what its manifest says", "Index again with --force.")
    return index


def gone(store: Store, path: str) -> IndexBuildError:
    """What is told of a file of a release that is not there when it is opened or read."""
    return IndexBuildError(
        f"{store.uri(path)} is gone: its release was deleted meanwhile, or the file alone",
        "Search again, in the current release. If it says so of that too, index again with --force.",
    )


def load_index(store: Store, path: str) -> tuple[Any, str]:
    """Any FAISS file in the store, as an index in memory, and its sha256. Raises: FileNotFoundError."""
    with store.open(path) as stream:
        checked = _Checked(stream)
        try:
            index = faiss.read_index(faiss.PyCallbackIOReader(checked.read))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            fix = "Index again with --force."
            raise IndexBuildError(f"{store.uri(path)} is not a whole FAISS index: {reason}", fix) from None
        while checked.read(2**20):
            pass
        return index, checked.digest.hexdigest()
