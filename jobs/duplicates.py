"""`vecmill duplicates`."""

from __future__ import annotations

import json
import shlex
from typing import Annotated, cast

import typer

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
)
from pipelines.errors import ConfigError
from pipelines.search import choose_encoder

Threshold = Annotated[
    float,
    typer.Option(
        min=-1,
        max=1,
        help="Cosine from which two are near-duplicates; it depends on the encoder. An index, of float16, is asked for "
        "0.999 at most.",
    ),
]
Neighbours = Annotated[int, typer.Option("-k", min=1, help="Neighbours looked at for each item.")]
KeepWhich = Annotated[str, typer.Option("--keep", help="first, or largest: the image of most pixels of a group.")]
Exact = Annotated[bool, typer.Option("--exact", help="Compare everything with everything; needs no index.")]
Release = Annotated[str | None, typer.Option(help="Release to look in; the current one if left out.")]
Memory = Annotated[int, typer.Option(min=64, help="MiB of index that may be held at once.")]

SHOWN, MEMBERS = 5, 4
NOT_REMOVED = {
    "keys_of_kept_samples_too": "are of samples that stay too",
    "keys_that_are_no_line": "are empty or hold a line break",
}


def duplicates(
    output: OutputArgument,
    threshold: Threshold = 0.95,
    k: Neighbours = 20,
    keep: KeepWhich = "first",
    exact: Exact = False,
    modality: ModalityFlag = "image",
    encoder: EncoderFolder = None,
    release: Release = None,
    memory: Memory = 4096,
    cache: CacheFlag = DEFAULT_CACHE,
    cache_size: CacheSize = DEFAULT_CACHE_SIZE,
    as_json: AsJson = False,
) -> None:
    """Find groups of near-duplicates in the whole set, through the index; nothing is removed.

    Example: vecmill duplicates s3://bucket/emb --threshold 0.97
    """
    from pipelines.evaluate.duplicates import Keep, Sought, find_duplicates

    if keep not in ("first", "largest"):
        raise ConfigError(f"--keep {keep} is not known", "Known: first, largest.")
    named = named_output(output)
    folder = choose_encoder(named.store, encoder or named.encoder)
    sought = Sought(threshold, k, cast(Keep, keep), exact, release, memory, cache_of(cache, cache_size))
    summary = find_duplicates(
        named.store, folder, modality, sought, say=lambda line: err.print(line, markup=False, style="dim")
    )
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    out.print(
        f"{summary['in_groups']:,} of {summary['items']:,} {modality} items are in {summary['groups']:,} groups of "
        f"cosine {threshold} or more; the largest has {summary['largest']:,}",
        markup=False,
    )
    show_groups(output, summary)
    if summary["came_since"]:
        out.print(
            f"{summary['came_since']:,} items have come since release {summary['release']} and were not looked at; run "
            "`vecmill index --update` first",
            markup=False,
        )
    for name, why in NOT_REMOVED.items():
        if summary[name]:
            out.print(f"{summary[name]:,} keys {why}: they are not in remove.txt")
    out.print(f"{summary['folder']}/groups.parquet, keep.txt, remove.txt, summary.json", markup=False)
    listed = f"{summary['folder']}/remove.txt"
    if summary["remove"] and modality == "image":
        out.print(f"  {shlex.join(['vecmill', 'remove', output, '--keys', listed])}", markup=False)


def show_groups(output: str, summary: dict[str, object]) -> None:
    from pipelines.evaluate.duplicates import largest_groups

    for members in largest_groups(named_output(output).store, summary, SHOWN):
        told = [f"{each['key']}{' (stays)' if each['keep'] else ''} {each['nearest']:.4f}" for each in members]
        more = f" … {len(members) - MEMBERS:,} more" if len(members) > MEMBERS else ""
        out.print(f"  {', '.join(told[:MEMBERS])}{more}", markup=False)
