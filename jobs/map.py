"""`vecmill map`."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from jobs.console import out
from jobs.options import AsJson, EncoderFolder, ModalityFlag, OutputArgument, named_output
from pipelines.search import choose_encoder

Sample = Annotated[int, typer.Option(min=8, max=10_000, help="Items drawn.")]
By = Annotated[
    Literal["label", "cluster"] | None,
    typer.Option(help="What has a colour: label if there are any, and not more than 50, else cluster, if left out."),
]
Seed = Annotated[int, typer.Option(min=0, help="Of the draw and of the map.")]


def map(
    output: OutputArgument,
    modality: ModalityFlag = "image",
    encoder: EncoderFolder = None,
    sample: Sample = 1_000,
    by: By = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """A 2-D map of the embedding space to look at: one HTML file, coloured by label or cluster, hover for thumbnails.

    Example: vecmill map s3://bucket/emb --sample 2000
    """
    from pipelines.evaluate.map import draw_map

    named = named_output(output)
    folder = choose_encoder(named.store, encoder or named.encoder)
    document = draw_map(named.store, folder, modality, sample, seed, by=by)
    if as_json:
        print(json.dumps(document, indent=2))
        return
    out.print(f"{len(document['points']):,} of {document['of']:,} items by {document['by']}", markup=False)
    out.print(document["page"], markup=False)
