"""`vecmill demo`: the whole job on scenes of our own, from nothing, on one machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cluster import connected
from jobs.console import err, out
from jobs.embed import run_embed
from jobs.index import print_release
from jobs.options import output_store_root
from pipelines.config import IndexConfig, RunConfig, validate
from pipelines.prepare import prepare, require_resources
from pipelines.scenes import altered, key_of, scene, write_shards
from pipelines.storage import Store

if TYPE_CHECKING:
    from pipelines.queries import Query
    from pipelines.search import Hit

SAMPLES, SHARDS, BROKEN, SEED = 1_000, 8, 6, 0
SOUGHT = (17, 404, 808)
# Of scenes that there are, in other words than their captions'.
TYPED = ("a green star above a pink heart", "a red hexagon inside a blue ring", "a black ring right of a red arrow")

Folder = Annotated[Path, typer.Option(help="Where everything goes; run again to see it resume.")]


def demo(folder: Folder = Path("demo")) -> None:
    """Write demo shards, embed and index them, and search: no bucket, model hub or GPU needed.

    Example: vecmill demo --folder /tmp/demo
    """
    folder = folder.resolve()
    say("1. Shards", f"{SAMPLES:,} captioned scenes in {SHARDS} tar shards, {BROKEN} samples broken on purpose")
    once(folder / "shards", lambda fresh: write_shards(fresh, SAMPLES, SHARDS, SEED, BROKEN))
    say("2. Encoder", "the package's own, `demo`: trained on other scenes than these")
    with connected(None) as cluster:
        say("3. Embed", "read → decode → encode → write")
        run = prepare(settings(folder), cluster)
        require_resources(run, cluster)
        run_embed(run)
        say("4. Index", "autofaiss chooses, recall is measured")
        build(run.store, run.folders[0])
    say("5. Search", "by words")
    search_by_words(run.store)
    say("6. Search", "with altered copies (cropped, brighter, JPEG quality 60) of three scenes")
    search_by_images(run.store, folder)
    say("7. Recall", "each caption sought among all of these scenes, none of which the encoder has seen")
    tell_recall(run.store)
    next_steps(folder)


def once(folder: Path, write: Callable[[Path], object]) -> None:
    """Written beside its place and moved there whole, so that a demo that was stopped can go on."""
    if not folder.exists():
        fresh = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.parent.mkdir(parents=True, exist_ok=True)
        write(fresh)
        fresh.rename(folder)


def say(title: str, text: str) -> None:
    out.print(f"[bold]{title}[/bold]  {text}")


def settings(folder: Path) -> RunConfig:
    return validate(
        RunConfig,
        {
            "input": [str(folder / "shards")],
            "output": output_store_root(str(folder / "output")),
            "encoder": "demo",
            "name": "demo",
        },
    )


def build(store: Store, encoder: str) -> None:
    from pipelines.index.build import build_index
    from pipelines.latency import latencies

    def say(line: str) -> None:
        err.print(f"   {line}", markup=False)

    release = build_index(store, encoder, "image", IndexConfig(), say, timed=latencies)
    print_release(store, release)


def search_by_words(store: Store) -> None:
    from pipelines.queries import Query

    for text, hits in zip(TYPED, found(store, [Query(text=text) for text in TYPED]), strict=True):
        out.print(f'  "{text}":', markup=False)
        print_hits(hits)


def search_by_images(store: Store, folder: Path) -> None:
    from pipelines.queries import Query

    paths = [altered_copy(index, folder) for index in SOUGHT]
    for index, path, hits in zip(SOUGHT, paths, found(store, [Query(image=str(path)) for path in paths]), strict=True):
        outcome = "found its original" if hits[0].key == key_of(index) else "did not find its original"
        out.print(f"  {path.name} {outcome}:", markup=False)
        print_hits(hits)


def found(store: Store, queries: list[Query]) -> list[list[Hit]]:
    from pipelines.queries import embed_queries, query_spec
    from pipelines.search import Searcher

    return Searcher(store, "demo", "image").search(embed_queries(query_spec(store, "demo"), queries), 3)


def print_hits(hits: list[Hit]) -> None:
    for rank, hit in enumerate(hits, 1):
        out.print(f"    {rank}  {hit.score:.4f}  {hit.key}  {(hit.captions or [''])[0]}", markup=False)


def tell_recall(store: Store) -> None:
    from pipelines.evaluate.protocols import Asked
    from pipelines.evaluate.retrieval import measured

    for found in measured(store, "demo", Asked(protocols=("captions",), index=False)):
        told = ", ".join(f"R@{k} {found.figures[f'recall@{k}']:.1%}" for k in (1, 5, 10))
        out.print(f"  {found.asks} → {found.finds}: {told}, of {found.queries:,} among {found.gallery:,}", markup=False)


def altered_copy(index: int, folder: Path) -> Path:
    path = folder / "queries" / f"altered-{key_of(index)}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    altered(scene(SEED, index).image, SEED).save(path, quality=60)
    return path


def next_steps(folder: Path) -> None:
    output = folder / "output"
    say("Files", "")
    for path, what in {
        "samples": "a row a sample: key, captions, URI, byte range",
        "embeddings/demo/image": "float16 vectors in Parquet",
        "rejects/demo": "those that could not be embedded, with reasons",
        "index/demo/image": "FAISS index shards and manifest",
        "reports": "what this run did, as JSON",
    }.items():
        out.print(f"  {output / path}  {what}", markup=False)
    say("Next", "on your own data:")
    out.print(
        "  vecmill embed 's3://bucket/{00000..00099}.tar' --encoder open_clip:ViT-B-32/laion2b_s34b_b79k \\",
        markup=False,
    )
    out.print("      --output s3://bucket/emb", markup=False)
    out.print("  vecmill index s3://bucket/emb", markup=False)
    out.print('  vecmill search s3://bucket/emb --text "a dog on a beach"', markup=False)
