"""`vecmill search`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import TypeAdapter, ValidationError

from jobs.console import err, out
from jobs.options import AsJson, EncoderFolder, ModalityFlag, OutputArgument, named_output
from pipelines.errors import ConfigError, InputError

if TYPE_CHECKING:
    from pipelines.queries import Query
    from pipelines.search import Hit

GZIPPED = (".gz", ".tgz")

Text = Annotated[str | None, typer.Option(help="Words to look for.")]
ImageFlag = Annotated[str | None, typer.Option("--image", help="Image file (path or URI) to look for.")]
QueriesFile = Annotated[
    Path | None,
    typer.Option(
        "--queries", help='Several: a JSONL file of {"text": …, "image": …}, or a text file of a query a line.'
    ),
]
Exact = Annotated[bool, typer.Option("--exact", help="Compare with every vector; needs no index.")]
Metric = Annotated[
    str | None, typer.Option(help="Of --exact: ip, l2, cosine or l1; that of the index, or else ip, if left out.")
]
Rerank = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Score so many candidates for each hit again with their stored vectors, 0 for none; as the index was "
        "measured with if left out.",
    ),
]
Count = Annotated[int, typer.Option("-k", min=1, help="Hits for each query.")]
Weight = Annotated[float, typer.Option(min=0, max=1, help="Share of the text where a query has both.")]
Version = Annotated[str | None, typer.Option(help="Release to search; the current one if left out.")]


def search(
    output: OutputArgument,
    text: Text = None,
    image: ImageFlag = None,
    queries: QueriesFile = None,
    modality: ModalityFlag = "image",
    encoder: EncoderFolder = None,
    exact: Exact = False,
    metric: Metric = None,
    rerank: Rerank = None,
    k: Count = 10,
    text_weight: Weight = 0.5,
    release: Version = None,
    as_json: AsJson = False,
) -> None:
    """Find what is nearest to words, an image, or both.

    Example: vecmill search s3://bucket/emb --text "a dog on a beach" -k 5
    """
    from pipelines.queries import embed_queries, query_spec
    from pipelines.search import Searcher

    asked = asked_queries(text, image, queries)
    named = named_output(output)
    folder = encoder or named.encoder
    searcher = Searcher(named.store, folder, modality, release, exact, metric, resident=False, rerank=rerank)
    vectors = embed_queries(query_spec(named.store, searcher.encoder), asked, text_weight, searched=modality)
    found = searcher.search(vectors, k, lambda line: err.print(line, markup=False))
    for query, hits in zip(asked, found, strict=True):
        print_hits(query, hits, as_json)


def asked_queries(text: str | None, image: str | None, file: Path | None) -> list[Query]:
    from pipelines.queries import Query

    asked = [Query(text, image)] if text or image else []
    if file:
        asked += [_query(line, file, number) for number, line in enumerate(_lines(file), 1) if line.strip()]
    if not asked:
        raise ConfigError("There is nothing to search for", "Give --text, --image or --queries.")
    return asked


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}", "Check the path.") from None


def _query(line: str, file: Path, number: int) -> Query:
    from pipelines.queries import Query

    if file.suffix not in (".jsonl", ".json"):
        return Query(text=line.strip())
    try:
        return TypeAdapter(Query).validate_json(line)
    except ValidationError:
        raise InputError(f'{file}, line {number}: {{"text": …, "image": …}} is expected, not {line[:80]}') from None


def print_hits(query: Query, hits: list[Hit], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"query": asdict(query), "hits": [facts_of(hit) for hit in hits]}, ensure_ascii=False))
        return
    out.print(" + ".join(filter(None, [query.text and f"“{query.text}”", query.image])), markup=False)
    for rank, hit in enumerate(hits, 1):
        caption = hit.caption or next(iter(hit.captions), None) or ""
        out.print(f"  {rank:>3}  {hit.score:.4f}  {hit.key}  {caption[:80]}", markup=False)
        out.print(f"       {place_of(hit)}", markup=False, style="dim")


def facts_of(hit: Hit) -> dict[str, Any]:
    """All but the vector."""
    return {name: value for name, value in vars(hit).items() if name != "vector"} | {"caption": hit.caption}


def place_of(hit: Hit) -> str:
    """Where the sample lies: its URI, and the byte range (of a gzipped tar, as unpacked) or row group there."""
    if hit.row_group is not None:
        return f"{hit.uri} row group {hit.row_group}"
    if hit.offset and hit.length:
        bytes_of = "unpacked bytes" if hit.uri.lower().endswith(GZIPPED) else "bytes"
        return f"{hit.uri} {bytes_of} {hit.offset}-{hit.offset + hit.length - 1}"
    return hit.uri
