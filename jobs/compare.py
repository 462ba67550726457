"""`vecmill compare`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from jobs.console import err, out
from jobs.options import AsJson, named_output
from pipelines.errors import VecmillError

Outputs = Annotated[list[str], typer.Argument(help="Outputs of the same samples, or one with several encoders.")]
Encoders = Annotated[list[str] | None, typer.Option("--encoder", help="Only these encoders' folders. Repeatable.")]
Keys = Annotated[list[str] | None, typer.Option("--key", help="Sample to ask with; drawn if left out. Repeatable.")]
Shown = Annotated[int, typer.Option("--show", min=1, max=100, help="Samples drawn to show.")]
Agreed = Annotated[int, typer.Option(min=1, help="Queries that agreement is measured over.")]
Count = Annotated[int, typer.Option("-k", min=1, max=50, help="Neighbours of each query.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the draw.")]
Rate = Annotated[bool, typer.Option(help="Load each model and measure its speed on this machine.")]


def compare(
    outputs: Outputs,
    encoder: Encoders = None,
    key: Keys = None,
    k: Count = 8,
    show: Shown = 6,
    agreed: Agreed = 200,
    seed: Seed = 0,
    rate: Rate = True,
    as_json: AsJson = False,
) -> None:
    """What several encoders find for the same images, side by side; how much they agree, how good and fast they are.

    Example: vecmill compare s3://bucket/emb --encoder clip --encoder dinov2
    """
    from pipelines.evaluate.compare import Wanted, contenders
    from pipelines.evaluate.compare import compare as compare_encoders

    rivals = contenders([named_output(output).store for output in outputs], encoder or ())
    wanted = Wanted(k=k, keys=key or (), shown=show, agreed=agreed, seed=seed)
    document = compare_encoders(rivals, wanted, speed if rate else lambda rival: {})
    if as_json:
        print(json.dumps(document, indent=2))
        return
    print_comparison(document)


def speed(rival: Any) -> dict[str, Any]:
    """Nothing of an encoder that cannot be loaded here."""
    from pipelines.queries import query_spec
    from pipelines.rate import parameters_and_rates

    try:
        spec = query_spec(rival.store, rival.encoder)
        parameters, rates, device = parameters_and_rates(spec, "fp32" if spec.precision == "fp16" else spec.precision)
    except VecmillError as error:
        err.print(f"{rival.name} has no speed: {error.what}", markup=False)
        return {}
    return {"images_per_second": rates["image"], "million_parameters": parameters / 1e6, "device": device}


def print_comparison(document: dict[str, Any]) -> None:
    from pipelines.evaluate.compare import table

    head, rows = table(document)
    # Turned, since a terminal is narrower than a page.
    turned = Table("", *(row[0] for row in rows), box=None)
    for at, name in enumerate(head[1:], 1):
        turned.add_row(name, *(row[at] for row in rows))
    out.print(turned)
    for pair, share in document["overlap"].items():
        out.print(f"  {pair}: {share:.1%} of the {document['k']} nearest in common", markup=False)
    out.print(document["page"], markup=False)
