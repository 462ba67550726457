"""`vecmill encoders` and `vecmill encoders show`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from jobs.console import out, print_plan
from jobs.embed import vectors_told
from jobs.options import AsJson
from pipelines.encoders import registry
from pipelines.encoders.base import EncoderSpec, ImageTransform

app = typer.Typer()

Name = Annotated[str, typer.Argument(help="FAMILY:MODEL, as for `vecmill embed --encoder`.", show_default=False)]
PrecisionFlag = Annotated[str, typer.Option("--precision", help="fp32, fp16 or bf16: what the rate is measured with.")]
Rate = Annotated[bool, typer.Option(help="Load the model and measure one rate on this machine.")]


@app.callback(invoke_without_command=True)
def encoders(context: typer.Context) -> None:
    """List the families of encoders, with their options and examples; `show` tells of one.

    Example: vecmill encoders show open_clip:ViT-B-32/laion2b_s34b_b79k
    """
    if context.invoked_subcommand:
        return
    for name in registry.families():
        family = registry.family(name)
        out.print(f"[bold]{name}:[/bold]  {first_line(family)}")
        for example in family.EXAMPLES:
            out.print(f"    {example}", markup=False)
        for option, told in family.OPTIONS.items():
            out.print(f"    ?{option}=  {told}", markup=False, style="dim")
    out.print("[bold]all:[/bold]  options that every family has")
    for option, told in registry.COMMON_OPTIONS.items():
        out.print(f"    ?{option}=  {told}", markup=False, style="dim")


def first_line(module: Any) -> str:
    return str(module.__doc__ or "").strip().splitlines()[0]


@app.command()
def show(name: Name, precision: PrecisionFlag = "fp32", rate: Rate = True, as_json: AsJson = False) -> None:
    """What an encoder gives and how it prepares its inputs; loads it to count and time it.

    Example: vecmill encoders show open_clip:ViT-B-32/laion2b_s34b_b79k
    """
    spec = registry.describe(name)
    measured = measure(spec, precision) if rate else {}
    if as_json:
        print(json.dumps({**spec.identity(), "name": spec.name, "fingerprint": spec.fingerprint, **measured}))
        return
    print_plan({**facts_of(spec), **measured})


def facts_of(spec: EncoderSpec) -> dict[str, str]:
    facts = {
        "encoder": spec.name,
        "weights": f"{spec.reference}, sha256 {spec.weights[:16]}",
        "vectors": ", ".join(vectors_told(modality, spec.vectors[modality]) for modality in spec.modalities),
        "spaces": ", ".join(f"{modality} {spec.vectors[modality].space}" for modality in spec.modalities),
        "unit norm": "yes" if spec.normalize else "no",
    }
    if spec.image:
        facts["images"] = preparation(spec.image)
    if spec.context_length:
        facts["captions"] = f"at most {spec.context_length} tokens"
    details = {name: value for name, value in spec.details.items() if isinstance(value, str | int | float)}
    facts["details"] = ", ".join(f"{name}={str(value)[:40]}" for name, value in details.items())
    return {**facts, "fingerprint": spec.fingerprint}


def preparation(image: ImageTransform) -> str:
    """The steps from a decoded image to the model's pixels, in order."""
    height, width = image.size
    steps = [f"{image.resize} to {height} x {width} ({image.resample})"]
    if image.max_patches:
        steps = [f"whole patches of {image.patch} pixels, at most {image.max_patches} ({image.resample})"]
    if image.crop:
        steps.append(f"centre crop {image.crop[0]} x {image.crop[1]}")
    alpha = "transparency on white" if image.alpha == "white" else "transparency dropped"
    numbers = " ".join(f"{value:.4g}" for value in (*image.mean, *image.std))
    return ", ".join([*steps, alpha, f"mean and std {numbers}"])


def measure(spec: EncoderSpec, precision: str) -> dict[str, str]:
    """Parameters, and items a second of each modality in one batch size on this machine's best device."""
    from pipelines.rate import parameters_and_rates

    parameters, rates, device = parameters_and_rates(spec, precision)
    told = ", ".join(f"{modality} {rate:,.1f}" for modality, rate in rates.items())
    return {"parameters": f"{parameters / 1e6:,.2f} million", "rate": f"{told} items a second on {device}, {precision}"}
