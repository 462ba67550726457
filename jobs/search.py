"""`vecmill search`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.console import out
from jobs.options import AsJson, OutputArgument, output_store
from pipelines.errors import ConfigError, InputError

if TYPE_CHECKING:
    from pipelines.search import Hit, Query

Text = Annotated[str | None, typer.Option(help="Words to look for.")]
ImageFlag = Annotated[str | None, typer.Option("--image", help="Image file (path or URI) to look for.")]
QueriesFile = Annotated[
    Path | None,
    typer.Option(
        "--queries", help='Several: a JSONL file of {"text": …, "image": …}, or a text file of a query a line.'
    ),
]
ModalityFlag = Annotated[str, typer.Option(help="image or text: what is searched.")]
Folder = Annotated[
    str | None, typer.Option("--encoder", help="The encoder's folder; needed where the output has several.")
]
Exact = Annotated[bool, typer.Option("--exact", help="Compare with every vector; needs no index.")]
Count = Annotated[int, typer.Option("-k", min=1, help="Hits for each query.")]
Weight = Annotated[float, typer.Option(min=0, max=1, help="Share of the text where a query has both.")]
Version = Annotated[str | None, typer.Option(help="Release to search; the current one if left out.")]


def search(
    output: OutputArgument,
    text: Text = None,
    image: ImageFlag = None,
    queries: QueriesFile = None,
    modality: ModalityFlag = "image",
    encoder: Folder = None,
    exact: Exact = False,
    k: Count = 10,
    text_weight: Weight = 0.5,
    release: Version = None,
    as_json: AsJson = False,
) -> None:
    """Find what is nearest to words, an image, or both.

    Example: vecmill search s3://bucket/emb --text "a dog on a beach" -k 5
    """
    from pipelines.search import Searcher, embed_queries, query_spec

    if modality not in ("image", "text"):
        raise ConfigError(f"--modality {modality}: image or text is expected")
    asked = asked_queries(text, image, queries)
    store = output_store(output)
    searcher = Searcher(store, encoder, "image" if modality == "image" else "text", release, exact)
    vectors = embed_queries(query_spec(store, searcher.encoder), asked, text_weight)
    for query, hits in zip(asked, searcher.search(vectors, k), strict=True):
        print_hits(query, hits, as_json)


def asked_queries(text: str | None, image: str | None, file: Path | None) -> list[Query]:
    from pipelines.search import Query

    asked = [Query(text, image)] if text or image else []
    if file:
        asked += [_query(line, file, number) for number, line in enumerate(_lines(file), 1)]
    if not asked:
        raise ConfigError("There is nothing to search for", "Give --text, --image or --queries.")
    return asked


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}", "Check the path.") from None


def _query(line: str, file: Path, number: int) -> Query:
    from pipelines.search import Query

    if file.suffix not in (".jsonl", ".json"):
        return Query(text=line)
    try:
        return Query(**json.loads(line))
    except (TypeError, ValueError):
        raise InputError(f'{file}, line {number}: {{"text": …, "image": …}} is expected, not {line[:80]}') from None


def print_hits(query: Query, hits: list[Hit], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"query": asdict(query), "hits": [asdict(hit) for hit in hits]}, ensure_ascii=False))
        return
    out.print(" + ".join(filter(None, [query.text and f"“{query.text}”", query.image])), markup=False)
    for rank, hit in enumerate(hits, 1):
        caption = hit.caption or next(iter(hit.captions), None) or ""
        out.print(f"  {rank:>3}  {hit.score:.4f}  {hit.key}  {caption[:80]}", markup=False)
        out.print(f"       {place_of(hit)}", markup=False, style="dim")


def place_of(hit: Hit) -> str:
    """Where the sample lies: its URI, and the byte range or row group there."""
    if hit.row_group is not None:
        return f"{hit.uri} row group {hit.row_group}"
    if hit.offset and hit.length:
        return f"{hit.uri} bytes {hit.offset}-{hit.offset + hit.length - 1}"
    return hit.uri
