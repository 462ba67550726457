"""`vecmill evaluate`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.console import err, out
from jobs.options import (
    DEFAULT_CACHE,
    DEFAULT_CACHE_SIZE,
    AsJson,
    CacheFlag,
    CacheSize,
    EncoderFolder,
    OutputArgument,
    cache_of,
    named_output,
)
from pipelines.errors import ConfigError
from pipelines.evaluate.kept import TITLES, kept_in, sentence
from pipelines.search import choose_encoder

if TYPE_CHECKING:
    from pipelines.evaluate.protocols import Protocol

Release = Annotated[str | None, typer.Option(help="Release of the index figures; the current one if left out.")]
Split = Annotated[
    str | None,
    typer.Option("--queries", metavar="SPLIT", help="Only samples whose metadata have this `split` ask and are found."),
]
Protocols = Annotated[
    list[str] | None,
    typer.Option("--protocol", help="captions, identity or label; all that the output has data for if left out."),
]
Identity = Annotated[
    str | None, typer.Option(metavar="FIELD", help="Metadata field of who it is, for the identity protocol.")
]
Fold = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Cut the samples into folds of so many, as Karpathy's 1K test; means of all. Of captions alone: all of "
        "them ask, and without the index.",
    ),
]
Sample = Annotated[
    int | None,
    typer.Option(min=1, help="Queries of a direction at most; as many as make 2·10⁹ comparisons if left out."),
]
Memory = Annotated[int, typer.Option(min=64, help="MiB for queries and scores.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the sample of queries.")]
Exactly = Annotated[bool, typer.Option("--no-index", help="Leave the index out.")]


def evaluate(
    output: OutputArgument,
    release: Release = None,
    queries: Split = None,
    protocol: Protocols = None,
    identity: Identity = None,
    fold: Fold = None,
    sample: Sample = None,
    encoder: EncoderFolder = None,
    no_index: Exactly = False,
    memory: Memory = 1024,
    seed: Seed = 0,
    cache: CacheFlag = DEFAULT_CACHE,
    cache_size: CacheSize = DEFAULT_CACHE_SIZE,
    as_json: AsJson = False,
) -> None:
    """How well images find their captions, captions their images, and images others of their label.

    Exactly, and through the index where there is one. Of equal scores what is wrong comes first.

    Example: vecmill evaluate s3://bucket/emb --queries test
    """
    from pipelines.evaluate.protocols import Asked
    from pipelines.evaluate.ranking import Room
    from pipelines.evaluate.retrieval import evaluate as evaluate_output

    named = named_output(output)
    folder = choose_encoder(named.store, encoder or named.encoder)
    asked = Asked(
        protocols=known(protocol),
        identity=identity,
        split=queries,
        sample=sample,
        fold=fold,
        release=release,
        index=not no_index,
        seed=seed,
        room=Room(memory),
        cache=cache_of(cache, cache_size),
    )
    document = evaluate_output(named.store, folder, asked, lambda line: err.print(line, markup=False))
    if as_json:
        print(json.dumps(document, indent=2))
        return
    for result in document["results"]:
        print_result(result)
    out.print(f"As JSON in {named.store.uri(kept_in(folder))}/", markup=False, style="dim")


def known(given: list[str] | None) -> tuple[Protocol, ...]:
    from pipelines.evaluate.protocols import PROTOCOLS

    if unknown := [name for name in given or [] if name not in PROTOCOLS]:
        raise ConfigError(f"--protocol {unknown[0]} is not known", f"Known: {', '.join(PROTOCOLS)}.")
    return tuple(name for name in PROTOCOLS if name in (given or []))


def print_result(result: dict[str, Any]) -> None:
    """A table of one direction; beside the figures, those of the index with exact search over the same vectors."""
    out.print(f"[bold]{result['protocol']}: {result['asks']} → {result['finds']}[/bold]  {sentence(result)}")
    through = result["through"]
    columns = "".join(f"{name:>12}" for name in ("exact", *(("in index", "exact there", "loss") if through else ())))
    out.print(f"  {'':<14}{columns}", style="dim")
    for name, title in TITLES.items():
        cells = cell(name, result["figures"][name])
        if through and name in through["found"]:
            cells += "".join(cell(name, through[column][name]) for column in ("found", "exact", "loss"))
        out.print(f"  {title:<14}{cells}", markup=False)


def cell(name: str, value: float) -> str:
    return f"{value:>12,.1f}" if name.endswith("rank") else f"{value:>12.4f}"
