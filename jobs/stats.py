"""`vecmill stats`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from jobs.cluster import connected
from jobs.console import out, print_plan, size
from jobs.options import Address, AsJson, Format, assignments_of, output_store_root
from pipelines.config import InputConfig, load_settings
from pipelines.storage import Store, whole_uri

Inputs = Annotated[list[str], typer.Argument(help="Paths, brace ranges, globs or folders.", show_default=False)]
Into = Annotated[str | None, typer.Option("--output", help="Folder that gets stats.json and stats.png.")]
Identity = Annotated[str | None, typer.Option(help="label, or the metadata's field that names an identity.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be read and written, and do neither.")]
InputSet = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of read or storage, as --set read.key_column=name."),
]


def stats(
    inputs: Inputs,
    output: Into = None,
    identity: Identity = None,
    format: Format = None,
    set: InputSet = None,
    address: Address = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Count an input's captions, words and identities, and measure its images' channels: exact, streamed.

    Example: vecmill stats 's3://bucket/{00000..00099}.tar' --identity label --output s3://bucket/stats
    """
    config = input_config(inputs, format, set)
    store = Store(output_store_root(output), config.storage) if output else None
    written = f"{store.uri('stats.json')}, {store.uri('stats.png')}" if store else "nothing"
    if dry_run:
        return show_plan(config, written)
    with connected(address):
        from pipelines.stats import draw, measure

        found = measure(config, identity)
    told = found.report()
    if store:
        store.put_atomic("stats.json", json.dumps(told, indent=2).encode())
        store.put_atomic("stats.png", draw(found))
    if as_json:
        return out.print(json.dumps(told), markup=False)
    show(told)
    if store:
        out.print(f"  {written}", markup=False)


def input_config(inputs: list[str], format: str | None, assignments: list[str] | None) -> InputConfig:
    """Raises: ConfigError."""
    whole = [item if "://" in item else whole_uri(item) for item in inputs]
    return load_settings(InputConfig, None, {"input": whole, "format": format, **assignments_of(assignments)})


def show_plan(config: InputConfig, written: str) -> None:
    from pipelines.stats import planned

    shards = planned(config)
    read = f"{len(shards):,} shards ({size(sum(shard.bytes for shard in shards))})"
    print_plan({"reads": read, "writes": written})
    out.print("Nothing was changed.")


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
