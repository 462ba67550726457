"""`vecmill search`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import TypeAdapter, ValidationError

from jobs.console import err, out
from jobs.options import (
    DEFAULT_CACHE,
    DEFAULT_CACHE_SIZE,
    AsJson,
    CacheFlag,
    CacheSize,
    EncoderFolder,
    ModalityFlag,
    OutputArgument,
    cache_of,
    named_output,
    text_in,
)
from pipelines.contracts import Modality
from pipelines.errors import ConfigError, InputError
from pipelines.storage import Store

if TYPE_CHECKING:
    from pipelines.index.parts import Vectors
    from pipelines.index.selection import Selection
    from pipelines.index.where import Where
    from pipelines.queries import Query
    from pipelines.search import Hit, Searcher

GZIPPED = (".gz", ".tgz")

Text = Annotated[str | None, typer.Option(help="Words to look for.")]
ImageFlag = Annotated[str | None, typer.Option("--image", help="Image file (path or URI) to look for.")]
NotText = Annotated[str | None, typer.Option("--not-text", help="Words to look away from, beside any of the others.")]
Like = Annotated[
    str | None, typer.Option("--like", metavar="KEY", help="A sample to look for more of; takes no encoder.")
]
LikeId = Annotated[int | None, typer.Option("--like-id", metavar="ID", help="The same by the id that --json prints.")]
LikeModality = Annotated[
    Modality | None, typer.Option("--like-modality", help="Which of the sample's vectors; as searched if left out.")
]
QueriesFile = Annotated[
    Path | None,
    typer.Option(
        "--queries",
        help='Several: a JSONL file of {"text": …, "image": …, "not_text": …, "like": …, "like_id": …, '
        '"text_weight": …, "not_weight": …}, any of them, or a text file of a query a line.',
    ),
]
WhereFlag = Annotated[
    str | None,
    typer.Option(
        "--where",
        metavar="EXPR",
        help="Only among samples of which this is true, as in \"label = 'cat' and width > 256\".",
    ),
]
Offset = Annotated[int, typer.Option(min=0, help="Hits to pass over; they cost as much as those that are shown.")]
Page = Annotated[int | None, typer.Option(min=1, help="Which k hits, from 1, in place of --offset.")]
Fold = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Fold hits under a better one of the same sample or bytes, or whose vector has this cosine to its own.",
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
Weight = Annotated[float, typer.Option(min=0, max=1, help="Share of the text beside an image or example.")]
NotWeight = Annotated[float, typer.Option(min=0, help="Weight of --not-text, beside 1 for what is looked for.")]
Version = Annotated[str | None, typer.Option(help="Release to search; the current one if left out.")]


def search(
    output: OutputArgument,
    text: Text = None,
    image: ImageFlag = None,
    not_text: NotText = None,
    like: Like = None,
    like_id: LikeId = None,
    like_modality: LikeModality = None,
    queries: QueriesFile = None,
    modality: ModalityFlag = "image",
    encoder: EncoderFolder = None,
    where: WhereFlag = None,
    k: Count = 10,
    offset: Offset = 0,
    page: Page = None,
    fold: Fold = None,
    exact: Exact = False,
    metric: Metric = None,
    rerank: Rerank = None,
    text_weight: Weight = 0.5,
    not_weight: NotWeight = 0.5,
    release: Version = None,
    cache: CacheFlag = DEFAULT_CACHE,
    cache_size: CacheSize = DEFAULT_CACHE_SIZE,
    as_json: AsJson = False,
) -> None:
    """Find what is nearest to words, an image, a sample, or a mixture of them.

    Example: vecmill search s3://bucket/emb --text "a dog on a beach" -k 5

    Example: vecmill search emb --image dog.jpg --text "in snow" --not-text "a person"

    Example: vecmill search emb --like 00017/000042 --fold 0.97 --page 2

    Example: vecmill search emb --text boats --where "width >= 512 and metadata.license = 'CC0'"

    --where takes =, !=, <, <=, >, >=, in (…), like, contains, starts with, ends with, is null, and, or, not and
    parentheses over the columns of samples/; `captions` is how many there are, `caption` the one that was found (of an
    image, its first), metadata.KEY what the metadata has there. It reads these columns of the whole output first.
    """
    from pipelines.index.where import parse
    from pipelines.queries import Query
    from pipelines.search import Searcher

    one = Query(text, image, not_text, like, like_id)
    asked, condition = asked_queries(one, queries), parse(where) if where is not None else None
    first, kept = page_offset(offset, page, k), cache_of(cache, cache_size)
    named = named_output(output)
    how: dict[str, Any] = {"resident": False, "rerank": rerank, "cache": kept}
    searcher = Searcher(named.store, encoder or named.encoder, modality, release, exact, metric, **how)
    vectors = vectors_of(searcher, asked, like_modality, text_weight, not_weight)
    among = selected(searcher, condition, as_json)
    found = searcher.search(vectors, k, tell, among, first, fold)
    for query, hits in zip(asked, found, strict=True):
        print_hits(query, hits, first, as_json)


def tell(line: str) -> None:
    err.print(line, markup=False)


def vectors_of(
    searcher: Searcher, asked: list[Query], like_modality: Modality | None, text_weight: float, not_weight: float
) -> Vectors:
    """float32 [q, dim]. The encoder is opened only where a query needs it."""
    from pipelines.like import examples
    from pipelines.queries import embed_queries, query_spec

    spec = query_spec(searcher.store, searcher.encoder) if any(query.needs_encoder for query in asked) else None
    alike = examples(searcher, asked, like_modality)
    return embed_queries(spec, asked, text_weight, searched=searcher.modality, examples=alike, not_weight=not_weight)


def selected(searcher: Searcher, condition: Where | None, as_json: bool) -> Selection | None:
    """What --where lets through; says of how many that is."""
    from pipelines.index.filter import select

    if condition is None:
        return None
    among = select(searcher.store, searcher.parts, condition, searcher.findable())
    if not as_json:
        out.print(f"Among {among.total:,} of {searcher.parts.standing:,} vectors.", markup=False)
    return among


def page_offset(offset: int, page: int | None, k: int) -> int:
    if page is None:
        return offset
    if offset:
        raise ConfigError("--page and --offset say the same", "Give one of them.")
    return (page - 1) * k


def asked_queries(one: Query, file: Path | None) -> list[Query]:
    """Raises: ConfigError where there is none, or one that looks for nothing."""
    given = (one.text or None, one.image or None, one.not_text or None, one.like, one.like_id)
    asked = [one] if any(each is not None for each in given) else []
    if file:
        lines = text_in(Store(), str(file)).split("\n")
        asked += [_query(line, file, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not asked:
        raise ConfigError("There is nothing to search for", "Give --text, --image, --like or --queries.")
    return asked


def _query(line: str, file: Path, number: int) -> Query:
    from pipelines.queries import Query

    if file.suffix not in (".jsonl", ".json"):
        return Query(text=line.strip())
    try:
        return TypeAdapter(Query).validate_json(line)
    except ValidationError:
        raise InputError(
            f'{file}, line {number}: {{"text": …, "image": …}} is expected, not {line[:80]}',
            f"Fields: {', '.join(field.name for field in fields(Query))}.",
        ) from None


def print_hits(query: Query, hits: list[Hit], offset: int, as_json: bool) -> None:
    if as_json:
        always = ("text", "image")
        given = {name: value for name, value in asdict(query).items() if value is not None or name in always}
        print(
            json.dumps({"query": given, "offset": offset, "hits": [facts_of(hit) for hit in hits]}, ensure_ascii=False)
        )
        return
    out.print(words_of(query), markup=False)
    for rank, hit in enumerate(hits, offset + 1):
        caption = hit.caption or next(iter(hit.captions), None) or ""
        out.print(f"  {rank:>3}  {hit.score:.4f}  {hit.key}  {caption[:80]}", markup=False)
        out.print(f"       {place_of(hit)}", markup=False, style="dim")
        if hit.folded:
            out.print(f"       and {len(hit.folded):,} like it: {listed(hit.folded)}", markup=False, style="dim")
    if not hits:
        out.print("  nothing" + (" more" if offset else ""), markup=False)


def words_of(query: Query) -> str:
    sought = [query.text and f"“{query.text}”", query.image, query.like and f"like {query.like}"]
    sought.append(None if query.like_id is None else f"like id {query.like_id}")
    return " + ".join(filter(None, sought)) + (f" − “{query.not_text}”" if query.not_text else "")


def listed(hits: Sequence[Hit], shown: int = 3) -> str:
    more = ", …" if len(hits) > shown else ""
    return ", ".join(dict.fromkeys(hit.key for hit in hits[:shown])) + more


def facts_of(hit: Hit) -> dict[str, Any]:
    """All but the vector; of what is folded under it, enough to find it again."""
    facts = {name: value for name, value in vars(hit).items() if name not in ("vector", "folded")}
    folded = [{name: getattr(each, name) for name in ("id", "key", "caption_index", "score")} for each in hit.folded]
    return {**facts, "caption": hit.caption, "folded": folded}


def place_of(hit: Hit) -> str:
    """Where the sample lies: its URI, and the byte range (of a gzipped tar, as unpacked) or row group there."""
    if hit.row_group is not None:
        return f"{hit.uri} row group {hit.row_group}"
    if hit.offset and hit.length:
        bytes_of = "unpacked bytes" if hit.uri.lower().endswith(GZIPPED) else "bytes"
        return f"{hit.uri} {bytes_of} {hit.offset}-{hit.offset + hit.length - 1}"
    return hit.uri
