"""`vecmill classify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.console import err, out
from jobs.options import AsJson, EncoderFolder, OutputArgument, named_output
from pipelines.errors import ConfigError, InputError
from pipelines.search import choose_encoder

LabelsFile = Annotated[
    Path, typer.Option(help='A label a line; or a .json of {"label": ["prompt", …]}.', show_default=False)
]
Templates = Annotated[
    list[str] | None,
    typer.Option("--template", help='"a photo of a {}" if left out. Several are averaged: a prompt ensemble.'),
]
Scale = Annotated[
    float | None, typer.Option(min=0, help="Of cosines before the softmax; the encoder's own, or else 100.")
]
Top = Annotated[int, typer.Option(min=1, help="Labels kept of each sample, likeliest first.")]
SHOWN = 10


def classify(
    output: OutputArgument,
    labels: LabelsFile,
    template: Templates = None,
    encoder: EncoderFolder = None,
    scale: Scale = None,
    top: Top = 5,
    as_json: AsJson = False,
) -> None:
    """Label every image with words it was never trained on, with probabilities; accuracy where labels are known.

    Example: vecmill classify s3://bucket/emb --labels labels.txt --template "a photo of a {}"
    """
    from pipelines.encoders.logit_scale import logit_scale
    from pipelines.evaluate.classify import DEFAULT_SCALE, Labels, prompts_of
    from pipelines.evaluate.classify import classify as label_output
    from pipelines.queries import Query, embed_queries, query_spec

    named = named_output(output)
    folder = choose_encoder(named.store, encoder or named.encoder)
    given = labels_in(labels)
    if isinstance(given, dict) and template:
        raise ConfigError(f"{labels} has its own prompts", "Leave --template out.")
    prompts = given if isinstance(given, dict) else prompts_of(given, template or ["a photo of a {}"])
    spec = query_spec(named.store, folder)
    own = scale or logit_scale(spec)
    if own is None:
        err.print(f"{spec.name} keeps no scale of its own: {DEFAULT_SCALE:g} is taken (--scale)", markup=False)
    summary = label_output(
        named.store,
        folder,
        Labels(prompts, own or DEFAULT_SCALE),
        lambda texts: embed_queries(spec, [Query(text) for text in texts]),
        top,
        lambda line: err.print(line, markup=False),
    )
    if as_json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
        return
    print_summary(summary)


def labels_in(file: Path) -> list[str] | dict[str, list[str]]:
    try:
        text = file.read_text(encoding="utf-8")
        given = json.loads(text) if file.suffix == ".json" else None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}", "Check the path.") from None
    if given is None:
        return list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not (isinstance(given, dict) and all(isinstance(said, list) and said for said in given.values())):
        raise InputError(f'{file}: {{"label": ["prompt", …]}} is expected')
    return {str(label): [str(prompt) for prompt in said] for label, said in given.items()}


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
