"""`vecmill fit`."""

from __future__ import annotations

from typing import Annotated, cast

import typer

from jobs.console import out
from jobs.options import EncoderFolder, Modalities, OutputArgument, named_output
from pipelines.contracts import MODALITIES, Modality
from pipelines.errors import ConfigError
from pipelines.search import choose_encoder

Dim = Annotated[int, typer.Option(min=1, help="Dimensions to keep.", show_default=False)]
Whiten = Annotated[bool, typer.Option("--whiten", help="Give every kept dimension the same variance.")]
Sample = Annotated[int, typer.Option(min=2, help="Vectors that it is fitted to.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the sample.")]


def fit(
    output: OutputArgument,
    dim: Dim,
    encoder: EncoderFolder = None,
    whiten: Whiten = False,
    modalities: Modalities = None,
    sample: Sample = 100_000,
    seed: Seed = 0,
) -> None:
    """Fit a projection to fewer dimensions to what an output holds; `vecmill embed` takes it as an encoder's last step.

    Example: vecmill fit s3://bucket/emb --encoder clip --dim 256 --whiten
    """
    from pipelines.fit import fit as fit_projection
    from pipelines.record import read_record

    named = named_output(output)
    folder = choose_encoder(named.store, encoder or named.encoder)
    name = read_record(named.store).encoders[folder].spec["name"]
    if "projection=" in name:
        raise ConfigError(f"{name} is projected already", "Fit to what it is without its projection.")
    fitted = fit_projection(named.store, folder, dim, whiten, _modalities(modalities), sample, seed)
    out.print(f"{fitted.path}: {dim} dimensions keep {fitted.variance:.1%} of the variance", markup=False)
    out.print(f"  fitted to {fitted.sampled:,} vectors of {folder}", markup=False)
    out.print(f"  vecmill embed … --encoder '{with_projection(name, fitted.path)}'", markup=False)


def with_projection(name: str, path: str) -> str:
    return f"{name}{'&' if '?' in name else '?'}projection={path}"


def _modalities(given: str | None) -> list[Modality] | None:
    names = [name for name in (given or "").split(",") if name]
    if unknown := set(names) - set(MODALITIES):
        raise ConfigError(
            f"--modalities {given}: {sorted(unknown)[0]} is not known", f"Known: {', '.join(MODALITIES)}."
        )
    return cast(list[Modality], names) or None
