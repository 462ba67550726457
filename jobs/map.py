"""`vecmill map`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from jobs.console import out
from jobs.options import AsJson, EncoderFolder, ModalityFlag, OutputArgument, named_output
from pipelines.search import choose_encoder

Sample = Annotated[int, typer.Option(min=8, max=10_000, help="Items drawn.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the draw and of the map.")]


def map(
    output: OutputArgument,
    modality: ModalityFlag = "image",
    encoder: EncoderFolder = None,
    sample: Sample = 1_000,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """A 2-D map of the embedding space to look at: one HTML file, coloured by label or cluster, hover for thumbnails.

    Example: vecmill map s3://bucket/emb --sample 2000
    """
    from pipelines.evaluate.map import draw_map

    named = named_output(output)
    document = draw_map(named.store, choose_encoder(named.store, encoder or named.encoder), modality, sample, seed)
    if as_json:
        print(json.dumps(document, indent=2))
        return
    out.print(f"{len(document['points']):,} of {document['of']:,} items by {document['by']}", markup=False)
    out.print(document["page"], markup=False)
