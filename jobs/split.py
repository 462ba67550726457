"""`vecmill split`."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cluster import connected
from jobs.console import out
from jobs.options import Address, Format, output_store_root
from jobs.stats import Inputs
from pipelines.config import ReadConfig, validate
from pipelines.sources.split import SPLITS, SplitConfig
from pipelines.storage import Store, whole_uri

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
    address: Address = None,
) -> None:
    """Split an input into train, val and test by the hash of a key: the same every time, with no group in two of them.

    In a training recipe the same is `data: {split: {train: .8, val: .1, test: .1, by: identity}}`.

    Example: vecmill split 's3://bucket/{00000..00099}.tar' --by identity --output s3://bucket/splits.parquet
    """
    shares = validate(SplitConfig, {"train": train, "val": val, "test": test, "by": by, "seed": seed})
    folder, _, name = output_store_root(output).rpartition("/")
    with connected(address):
        from pipelines.splits import write_split

        whole = [item if "://" in item else whole_uri(item) for item in inputs]
        counts = write_split(whole, format or "auto", shares, ReadConfig(), Store(folder), name)
    total = counts.total()
    for split_name in SPLITS:
        out.print(f"  {split_name:<6}{counts[split_name]:>10,}  {counts[split_name] / max(1, total):.1%}", markup=False)
    if counts[None]:
        out.print(f"  {counts[None]:,} samples have no {by}, and are in none", markup=False)
    out.print(f"  {folder}/{name}", markup=False)
