"""`vecmill stats`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from jobs.cluster import connected
from jobs.console import out
from jobs.options import Address, AsJson, Format, output_store_root
from pipelines.config import ReadConfig
from pipelines.storage import Store, whole_uri

Inputs = Annotated[list[str], typer.Argument(help="Paths, brace ranges, globs or folders.", show_default=False)]
Into = Annotated[str | None, typer.Option("--output", help="Folder that gets stats.json and stats.png.")]
Identity = Annotated[str | None, typer.Option(help="label, or the metadata's field that names an identity.")]


def stats(
    inputs: Inputs,
    output: Into = None,
    identity: Identity = None,
    format: Format = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Count an input's captions, words and identities, and measure its images' channels: exact, streamed.

    Example: vecmill stats 's3://bucket/{00000..00099}.tar' --identity label --output s3://bucket/stats
    """
    with connected(address):
        from pipelines.stats import draw, measure

        whole = [item if "://" in item else whole_uri(item) for item in inputs]
        found = measure(whole, format or "auto", identity, ReadConfig(), {})
    told = found.report()
    if output:
        store = Store(output_store_root(output))
        store.put_atomic("stats.json", json.dumps(told, indent=2).encode())
        store.put_atomic("stats.png", draw(found))
    if as_json:
        out.print(json.dumps(told), markup=False)
    else:
        show(told)
        if output:
            out.print(f"  {store.uri('stats.json')}, {store.uri('stats.png')}", markup=False)


def show(told: dict[str, Any]) -> None:
    unreadable = f", {told['unreadable_images']:,} cannot be read" if told["unreadable_images"] else ""
    out.print(f"{told['samples']:,} samples, {told['images']:,} images{unreadable}", markup=False)
    for name, each in (("captions", "per_sample"), ("words", "per_caption"), ("identities", "images_each")):
        figures = told[name][each]
        if figures:
            spread = f"{figures['mean']:.2f} on average, {figures['min']} to {figures['max']}"
            out.print(f"  {told[name]['count']:,} {name}; {each.replace('_', ' ')}: {spread}", markup=False)
    for name in ("mean", "std"):
        values = ", ".join(f"{value:.4f}" for value in told["channels"][name])
        out.print(f"  {name} of the channels: {values}", markup=False)
