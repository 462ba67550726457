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
    from pipelines.search import Searcher

SAMPLES, SHARDS, BROKEN, SEED = 1_000, 8, 6, 0
SOUGHT = (17, 404, 808)

Folder = Annotated[Path, typer.Option(help="Where everything goes; run again to see it resume.")]


def demo(folder: Folder = Path("demo")) -> None:
    """Write demo shards, embed and index them, and search: no bucket, model hub or GPU needed.

    Example: vecmill demo --folder /tmp/demo
    """
    folder = folder.resolve()
    say("1. Shards", f"{SAMPLES:,} captioned scenes in {SHARDS} tar shards, {BROKEN} samples broken on purpose")
    once(folder / "shards", lambda fresh: write_shards(fresh, SAMPLES, SHARDS, SEED, BROKEN))
    say(
        "2. Encoder", "a small open_clip model with random weights: it has learned nothing, so words will find nothing,"
    )
    err.print("   but an altered copy of an image still lands next to its original")
    once(folder / "encoder", write_encoder)
    with connected(None) as cluster:
        say("3. Embed", "read → decode → encode → write")
        run = prepare(settings(folder), cluster)
        require_resources(run, cluster)
        run_embed(run)
        say("4. Index", "autofaiss chooses, recall is measured")
        build(run.store, run.folders[0])
    say("5. Search", "with altered copies (cropped, brighter, JPEG quality 60) of three scenes")
    search(run.store, folder)
    next_steps(folder)


def once(folder: Path, write: Callable[[Path], object]) -> None:
    """Written beside its place and moved there whole, so that a demo that was stopped can go on."""
    if not folder.exists():
        fresh = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.parent.mkdir(parents=True, exist_ok=True)
        write(fresh)
        fresh.rename(folder)


def write_encoder(folder: Path) -> None:
    from jobs.demo_encoder import write_demo_encoder

    write_demo_encoder(folder, SEED)


def say(title: str, text: str) -> None:
    out.print(f"[bold]{title}[/bold]  {text}")


def settings(folder: Path) -> RunConfig:
    return validate(
        RunConfig,
        {
            "input": [str(folder / "shards")],
            "output": output_store_root(str(folder / "output")),
            "encoder": f"open_clip:local-dir:{folder / 'encoder'}",
            "name": "demo",
        },
    )


def build(store: Store, encoder: str) -> None:
    from pipelines.index.build import build_index

    release = build_index(store, encoder, "image", IndexConfig(), lambda line: err.print(f"   {line}", markup=False))
    print_release(store, release)


def search(store: Store, folder: Path) -> None:
    from pipelines.queries import Query, embed_queries, query_spec
    from pipelines.search import Searcher

    paths = [altered_copy(index, folder) for index in SOUGHT]
    searcher: Searcher = Searcher(store, "demo")
    vectors = embed_queries(query_spec(store, "demo"), [Query(image=str(path)) for path in paths])
    for index, path, hits in zip(SOUGHT, paths, searcher.search(vectors, 3), strict=True):
        found = "found its original" if hits[0].key == key_of(index) else "did not find its original"
        out.print(f"  {path.name} {found}:", markup=False)
        for rank, hit in enumerate(hits, 1):
            out.print(f"    {rank}  {hit.score:.4f}  {hit.key}  {(hit.captions or [''])[0]}", markup=False)


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
