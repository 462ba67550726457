"""`vecmill split`."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cluster import connected
from jobs.console import out
from jobs.options import Address, Format, output_store_root
from jobs.stats import DryRun, Inputs, InputSet, input_config, show_plan
from pipelines.config import validate
from pipelines.sources.split import SPLITS, SplitConfig
from pipelines.storage import Store

Share = Annotated[float, typer.Option(min=0, max=1, help="Share of the groups.")]
By = Annotated[str, typer.Option(help="What is not torn apart: key, label, or a field of the metadata as identity.")]
Into = Annotated[str, typer.Option("--output", help="The Parquet file that is written.")]
Seed = Annotated[int, typer.Option(min=0, help="Another seed, another split.")]


def split(
    inputs: Inputs,
    train: Share = 0.8,
    val: Share = 0.1,
    test: Share = 0.1,
    by: By = "key",
    output: Into = "splits.parquet",
    seed: Seed = 0,
    format: Format = None,
    set: InputSet = None,
    address: Address = None,
    dry_run: DryRun = False,
) -> None:
    """Split an input into train, val and test by the hash of a key: the same every time, with no group in two of them.

    In a training recipe the same is `data: {split: {train: .8, val: .1, test: .1, by: identity}}`.

    Example: vecmill split 's3://bucket/{00000..00099}.tar' --by identity --output s3://bucket/splits.parquet
    """
    shares = validate(SplitConfig, {"train": train, "val": val, "test": test, "by": by, "seed": seed})
    config = input_config(inputs, format, set)
    folder, _, name = output_store_root(output).rpartition("/")
    if dry_run:
        return show_plan(config, f"{folder}/{name}")
    with connected(address):
        from pipelines.splits import write_split

        counts = write_split(config, shares, Store(folder, config.storage), name)
    total = counts.total()
    for split_name in SPLITS:
        out.print(f"  {split_name:<6}{counts[split_name]:>10,}  {counts[split_name] / max(1, total):.1%}", markup=False)
    if counts[None]:
        out.print(f"  {counts[None]:,} samples have no {by}, and are in none", markup=False)
    out.print(f"  {folder}/{name}", markup=False)
