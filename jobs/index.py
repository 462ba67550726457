"""`vecmill index`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.cluster import connected
from jobs.console import err, out, size
from jobs.options import (
    Address,
    EncoderFolder,
    ModalityFlag,
    NamedOutput,
    OutputArgument,
    Set,
    assignments_of,
    named_output,
)
from pipelines.config import RENAMED, IndexConfig, index_settings_of, validate
from pipelines.contracts import Modality
from pipelines.errors import ConfigError
from pipelines.observe import duration
from pipelines.record import FILE, read_record
from pipelines.storage import Store

if TYPE_CHECKING:
    from pipelines.index.manifest import Release, Variant

IndexKey = Annotated[
    str | None, typer.Option(help="FAISS factory string, as in OPQ64_256,IVF4096,PQ64x8; chosen if left out.")
]
Metric = Annotated[str | None, typer.Option(help="ip (inner product) or l2.")]
Shards = Annotated[
    int | None,
    typer.Option(help="Index shards, each filled by one task; one per 10 million vectors if left out."),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--shard-memory",
        help="Most that an index shard may take, as in 4G: a key that fits is chosen; for an --index-key there are as "
        "many index shards as it takes, in place of --shards.",
    ),
]
Latency = Annotated[float | None, typer.Option("--max-query-ms", help="Latency target of one query.")]
Target = Annotated[
    float | None, typer.Option("--target-recall", help="recall@10, re-ranked, in place of a latency target.")
]
Rerank = Annotated[
    str | None,
    typer.Option(
        help="Vectors stored to re-score with: float16, int8 or none; float16 for indexes of codes if left out."
    ),
]
Floor = Annotated[
    float | None, typer.Option(help="recall@10, re-ranked, below which a release is not published; 0.9 if left out.")
]
Seed = Annotated[int | None, typer.Option(help="Of the training sample and the queries.")]
Compare = Annotated[
    bool,
    typer.Option("--variants", help="Compare keys of Flat, PCA, SQ, PQ and IVF on a sample, in report.md."),
]
Update = Annotated[
    bool,
    typer.Option(
        "--update", help="Add only the parts that the current release lacks, with its training and search parameters."
    ),
]
Merge = Annotated[
    bool,
    typer.Option("--merge", help="Then put merged.faiss beside the index shards, one file for stock faiss.read_index."),
]
Force = Annotated[bool, typer.Option("--force", help="Build again although nothing has changed.")]


def index(
    output: OutputArgument,
    encoder: EncoderFolder = None,
    modality: ModalityFlag = "image",
    index_key: IndexKey = None,
    metric: Metric = None,
    shards: Shards = None,
    shard_memory: Memory = None,
    max_query_ms: Latency = None,
    target_recall: Target = None,
    rerank: Rerank = None,
    floor: Floor = None,
    seed: Seed = None,
    variants: Compare = False,
    set: Set = None,
    address: Address = None,
    update: Update = False,
    merge: Merge = False,
    force: Force = False,
) -> None:
    """Train and fill a sharded FAISS index over an output's embeddings, measure its recall, and publish it.

    The exit code is 5 where the release is built but not published: its recall is below the floor, more items were
    rejected than the ceiling allows, or counts do not agree.

    Example: vecmill index s3://bucket/emb --shards 8

    Example: vecmill index s3://bucket/emb --update

    Example: vecmill index s3://bucket/emb --index-key OPQ64_256,IVF65536_HNSW32,PQ64x8 --shard-memory 4G
    """
    from pipelines.index.join import join
    from pipelines.search import choose_encoder

    refuse_contradictions(shards, shard_memory, update, force)
    named = named_output(output)
    folder = choose_encoder(named.store, encoder or named.encoder)
    flags = {
        "index_key": index_key,
        "metric": metric,
        "shards": "auto" if shard_memory else shards,
        "shard_memory": shard_memory,
        "max_query_ms": max_query_ms,
        "target_recall": target_recall,
        "rerank": rerank,
        "floor": floor,
        "seed": seed,
        "variants": "auto" if variants else None,
    }
    build = wanted_build(named, folder, modality, given_settings(flags, set), update, force)
    with connected(address or named.address):
        release = printed(named.store, build)
        if merge:
            join(named.store, release, tell)


def refuse_contradictions(shards: int | None, shard_memory: str | None, update: bool, force: bool) -> None:
    if shards and shard_memory:
        raise ConfigError("--shards and --shard-memory both say how many index shards there are", "Give one of them.")
    if update and force:
        raise ConfigError("--update keeps the training, --force does it again", "Give one of them.")


def wanted_build(
    named: NamedOutput, folder: str, modality: Modality, given: dict[str, Any], update: bool, force: bool
) -> Callable[[], Release]:
    """A whole build, or an update, with its settings; mistakes in these are told before a cluster is connected."""
    from pipelines.index.build import build_index
    from pipelines.index.grow import update_index
    from pipelines.latency import latencies

    settings = index_settings(named, given)
    if update:
        return partial(update_index, named.store, folder, modality, update_settings(named, given), tell, latencies)
    return partial(build_index, named.store, folder, modality, settings, tell, force, latencies)


def printed(store: Store, build: Callable[[], Release]) -> Release:
    """The release with its figures printed, whether it is published or not."""
    from pipelines.index.publish import NotPublishedError

    try:
        release = build()
    except NotPublishedError as barred:
        print_release(store, barred.release)
        raise
    print_release(store, release)
    return release


def recalls_of(row: Variant) -> str:
    best = {kind: found["recall@10"] for kind, found in row.reranked.items()}
    shown = (f"{kind} {found['recall@10']:.3f}, re-ranked {best[kind]:.3f}" for kind, found in row.recall.items())
    return f"recall@10 {'; '.join(shown)}"


def tell(line: str) -> None:
    err.print(line, markup=False)


def index_settings(named: NamedOutput, given: dict[str, Any]) -> IndexConfig:
    """The recipe's index section, else the one that the embed run recorded, with flags on top."""
    section = named.recipe.index.model_dump() if named.recipe else recorded_settings(named.store)
    return validate(IndexConfig, {**section, **given})


def recorded_settings(store: Store) -> dict[str, Any]:
    """The embed run's; of those that are none any more one line is said, and nothing else comes of them."""
    recorded = read_record(store).settings.get("index", {})
    known = index_settings_of(recorded)
    if gone := sorted(set(recorded) - set(known) - set(RENAMED)):
        tell(f"{store.uri(FILE)} has index.{', index.'.join(gone)}, which this version has no more: left out")
    return known


def update_settings(named: NamedOutput, given: dict[str, Any]) -> dict[str, Any]:
    """What takes the place of the release's own settings: what the recipe names but for the count of index shards,
    which is that of a whole build, and flags."""
    section = named.recipe.index.model_dump(exclude_unset=True, exclude={"shards"}) if named.recipe else {}
    return {**section, **given}


def given_settings(flags: dict[str, Any], assignments: list[str] | None) -> dict[str, Any]:
    given = {key.removeprefix("index."): value for key, value in assignments_of(assignments).items()}
    return {key: value for key, value in {**flags, **given}.items() if value is not None}


def print_release(store: Store, release: Release) -> None:
    from pipelines.index.report import drift_line, rows_of

    held = size(sum(file.bytes for file in release.files))
    vectors = f"{release.parts.standing:,} vectors"
    out.print(f"{release.folder}: {vectors} in {len(release.shards)} index shards, {held}", markup=False)
    if release.drift:
        out.print(f"  drift   {drift_line(release.drift)}", markup=False)
    out.print(f"  key     {release.index_key}  {release.search_params}  ({release.metric})", markup=False)
    for kind, count in release.recall.queries.items():
        for how, figures, ms, each in rows_of(release, kind):
            shown = "  ".join(f"{name} {value:.3f}" for name, value in figures.items() if name.startswith("recall"))
            out.print(
                f"  recall  {kind} queries ({count:,}), {how}: {shown}  {ms:.2f} ms  {each:,.0f} bytes a vector",
                markup=False,
            )
    compared = release.variants if release.variants and release.variants.version == release.version else None
    for row in compared.rows if compared else ():
        out.print(f"  variant {row.key}: {recalls_of(row)}  {row.bytes_per_vector:,.0f} bytes a vector", markup=False)
    for way, took in release.latency.items():
        shown = f"p50 {took.p50_ms:.2f} ms, p95 {took.p95_ms:.2f} ms a query; {took.batch_ms:.2f} ms of 32 at once"
        out.print(f"  search  {way}: {shown}", markup=False)
    stages = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in release.seconds.items())
    out.print(f"  time    {stages}", markup=False)
    out.print(f"  ids     {release.round_trips} sampled ids led back to their row, key and vector", markup=False)
    out.print(f"  files   {store.uri(release.folder)}, figures and curve in report.md", markup=False)
