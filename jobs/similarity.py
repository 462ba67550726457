"""`vecmill similarity`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from jobs.console import out
from jobs.options import AsJson, EncoderFolder, OutputArgument, named_output
from pipelines.contracts import Modality
from pipelines.search import choose_encoder

Rows = Annotated[Modality, typer.Option("--a", help="Whose vectors are the rows.")]
Columns = Annotated[Modality, typer.Option("--b", help="Whose vectors are the columns.")]
Other = Annotated[
    str | None, typer.Option("--with", metavar="OUTPUT", help="Another output of the same encoder for the columns.")
]
OtherEncoder = Annotated[str | None, typer.Option(help="The encoder's folder there, if it has another name.")]
Sample = Annotated[int, typer.Option(min=2, max=10_000, help="Items drawn; up to 16 are shown one by one.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the draw.")]


def similarity(
    output: OutputArgument,
    a: Rows = "image",
    b: Columns = "text",
    other: Other = None,
    encoder: EncoderFolder = None,
    with_encoder: OtherEncoder = None,
    sample: Sample = 1_000,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """How alike two sets of vectors are: a heatmap, matched against unmatched pairs, separation, modality gap.

    Example: vecmill similarity s3://bucket/emb --a image --b text
    """
    from pipelines.evaluate.similarity import Side
    from pipelines.evaluate.similarity import similarity as measure

    named = named_output(output)
    folder = choose_encoder(named.store, encoder or named.encoder)
    there = named_output(other).store if other else named.store
    beside = choose_encoder(there, with_encoder or (encoder if other else folder))
    figures = measure(Side(named.store, folder, a), Side(there, beside, b), sample, seed)
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    print_figures(figures)


def print_figures(figures: dict[str, Any]) -> None:
    out.print(f"{figures['items']:,} items of {figures['a']} and {figures['b']}", markup=False)
    for name in ("matched", "unmatched"):
        told = figures[name]
        if told:
            spread = f"mean {told['mean']:.4f}, 5 % below {told['p5']:.4f}, 5 % above {told['p95']:.4f}"
            out.print(f"  {name:<10}{told['pairs']:>11,} pairs: {spread}", markup=False)
        else:
            out.print(f"  {name:<10}{0:>11} pairs: no two items have one {figures['matched_by']}", markup=False)
    if figures["auc"] is not None:
        out.print(
            f"  separation: a matched pair scores more than an unmatched one {figures['auc']:.1%} of the time (AUC)"
        )
    spreads = f"{figures['spread_a']:.4f} and {figures['spread_b']:.4f}"
    out.print(f"  modality gap {figures['modality_gap']:.4f}, beside spreads of {spreads}", markup=False)
    out.print(f"{figures['folder']}/similarity.png, similarity.json, matrix.npy", markup=False)
