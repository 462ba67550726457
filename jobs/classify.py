"""`vecmill classify`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.cluster import connected
from jobs.console import LiveProgress, err, out
from jobs.options import Address, AsJson, EncoderFolder, OutputArgument, named_output, text_in
from pipelines.errors import ConfigError, InputError
from pipelines.search import choose_encoder
from pipelines.storage import Store

if TYPE_CHECKING:
    from pipelines.encoders.base import EncoderSpec
    from pipelines.evaluate.classify import Labels, Plan

TEMPLATE = "a photo of a {}"

LabelsFile = Annotated[
    str,
    typer.Option(help='File or object: a label a line; or a .json of {"label": ["prompt", …]}.', show_default=False),
]
Templates = Annotated[
    list[str] | None,
    typer.Option(
        "--template",
        help='"a photo of a {}" if left out; or a file of them, one a line. Several are averaged: a prompt ensemble.',
    ),
]
Scale = Annotated[
    float | None, typer.Option(min=0, help="Of cosines before the softmax; the encoder's own, or else 100.")
]
Top = Annotated[int, typer.Option(min=1, help="Labels kept of each sample, likeliest first.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be labelled, and how; label nothing.")]
SHOWN = 10


def classify(
    output: OutputArgument,
    labels: LabelsFile,
    template: Templates = None,
    encoder: EncoderFolder = None,
    scale: Scale = None,
    top: Top = 5,
    address: Address = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Label every image with words it was never trained on, with probabilities; accuracy where labels are known.

    Run it again to resume: only what is missing is done.

    Example: vecmill classify s3://bucket/emb --labels labels.txt --template "a photo of a {}" --template "a {}"

    Example: vecmill classify s3://bucket/emb --labels labels.txt --template imagenet-templates.txt --dry-run
    """
    from pipelines.evaluate.classify import classify as label_output
    from pipelines.evaluate.classify import make_plan
    from pipelines.queries import Query, embed_queries, query_spec

    named = named_output(output)
    folder = choose_encoder(named.store, encoder or named.encoder)
    spec = query_spec(named.store, folder)
    asked = asked_labels(named.inputs, labels, template, spec, scale)
    plan = make_plan(named.store, folder, asked, top)
    say_plan(named.store, plan, asked)
    if dry_run:
        out.print("Nothing was changed.")
        return
    with (
        nullcontext() if plan.is_done else connected(address or named.address),
        LiveProgress("labelling", "parts", "", len(plan.items)) as progress,
    ):
        summary = label_output(
            named.store,
            plan,
            asked,
            lambda texts: embed_queries(spec, [Query(text) for text in texts]),
            top,
            lambda done: progress.show(lambda: {"parts_done": done, "parts": len(plan.items)}, completed=done),
        )
    if as_json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
        return
    print_summary(summary)


def asked_labels(
    inputs: Store, labels: str, templates: list[str] | None, spec: EncoderSpec, scale: float | None
) -> Labels:
    from pipelines.encoders.logit_scale import logit_scale
    from pipelines.evaluate.classify import DEFAULT_SCALE, Labels, prompts_of

    given = labels_in(inputs, labels)
    if isinstance(given, dict) and templates:
        raise ConfigError(f"{labels} has its own prompts", "Leave --template out.")
    said = given if isinstance(given, dict) else prompts_of(given, templates_in(inputs, templates or [TEMPLATE]))
    own = scale or logit_scale(spec)
    if own is None:
        err.print(f"{spec.name} keeps no scale of its own: {DEFAULT_SCALE:g} is taken (--scale)", markup=False)
    return Labels(said, own or DEFAULT_SCALE)


def labels_in(inputs: Store, file: str) -> list[str] | dict[str, list[str]]:
    text = text_in(inputs, file)
    if not file.endswith(".json"):
        return lines_of(text)
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is not JSON: {error}", "Check the file.") from None
    if not (isinstance(given, dict) and all(isinstance(said, list) and said for said in given.values())):
        raise InputError(f'{file}: {{"label": ["prompt", …]}} is expected')
    return {str(label): [str(prompt) for prompt in said] for label, said in given.items()}


def templates_in(inputs: Store, given: list[str]) -> list[str]:
    """Those given, and those in the files that are; a file's name has no {}."""
    found = [[each] if "{}" in each else lines_of(text_in(inputs, each)) for each in given]
    return list(dict.fromkeys(template for several in found for template in several))


def lines_of(text: str) -> list[str]:
    return list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


def say_plan(store: Store, plan: Plan, labels: Labels) -> None:
    parts, prompts = len(plan.items), sum(map(len, labels.prompts.values()))
    (name, said), *_ = labels.prompts.items()
    err.print(f"{len(plan.missing):,} of {parts:,} parts to do, into {store.uri(plan.folder)}", markup=False)
    err.print(f"{len(labels.prompts):,} labels by {prompts:,} prompts; {name}: {'; '.join(said[:3])}", markup=False)
    if plan.stale:
        err.print(f"{len(plan.stale):,} parts there are of shards that have changed: they go", markup=False)


def print_summary(summary: dict[str, Any]) -> None:
    known = f"; {summary['accuracy']:.1%} of {summary['known']:,} known labels are right" if summary["known"] else ""
    out.print(f"{summary['images']:,} images, {len(summary['labels']):,} labels, scale {summary['scale']:.4g}{known}")
    by_label = summary["accuracy_by_label"]
    for label, count in list(summary["given"].items())[:SHOWN]:
        right = f", {by_label[label]:.1%} of those that are" if label in by_label else ""
        out.print(f"  {count:>9,}  {label}{right}", markup=False)
    if len(summary["given"]) > SHOWN:
        out.print(f"  … {len(summary['given']) - SHOWN:,} more labels")
    out.print(f"{summary['folder']}/part-….parquet, summary.json", markup=False)
