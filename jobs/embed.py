"""`vecmill plan` and `vecmill embed`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from jobs import options
from jobs.cluster import connected
from jobs.console import RunProgress, err, out, print_plan, print_report, size
from pipelines.config import RunConfig
from pipelines.contracts import VectorSpec
from pipelines.prepare import Cluster, Prepared, all_actors, needed_cpus, prepare, require_resources, translator_gpus
from pipelines.storage import whole_uri

ABOVE_CEILING = 3

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and change nothing.")]
Prune = Annotated[bool, typer.Option("--prune", help="Remove what was made of shards that are no longer in the input.")]
Ceiling = Annotated[
    float | None, typer.Option("--reject-ceiling", help="Share of rejects above which the exit code is 3.")
]


def embed(
    what: options.What,
    encoder: options.EncoderNames = None,
    output: options.Output = None,
    name: options.Names = None,
    format: options.Format = None,
    modalities: options.Modalities = None,
    translate: options.Translate = None,
    text_clean: options.TextClean = None,
    precision: options.PrecisionFlag = None,
    batch_size: options.BatchSize = None,
    dtype: options.Dtype = None,
    reject_ceiling: Ceiling = None,
    set: options.Set = None,
    address: options.Address = None,
    dry_run: DryRun = False,
    prune: Prune = False,
) -> None:
    """Embed shards of images and captions. Run it again to resume: only what is missing is done.

    Example: vecmill embed 's3://bucket/{00000..01023}.tar' --encoder open_clip:ViT-B-32/laion2b_s34b_b79k
    --output s3://bucket/emb
    """
    flags: dict[str, Any] = {
        "encoder": encoder,
        "output": output,
        "name": name,
        "format": format,
        "modalities": modalities,
        "translate.pair": translate,
        "decode.text_clean": text_clean,
        "encode.precision": precision,
        "encode.batch_size": batch_size,
        "write.dtype": dtype,
        "write.reject_ceiling": reject_ceiling,
        "cluster.address": address,
    }
    config = with_whole_output(options.settings_of(what, flags, set))
    with connected(config.cluster.address) as cluster:
        run = prepare(config, cluster)
        require_resources(run, cluster)
        if dry_run:
            show_plan(run, cluster)
        else:
            run_embed(run, prune)


def plan(
    what: options.What,
    encoder: options.EncoderNames = None,
    output: options.Output = None,
    name: options.Names = None,
    format: options.Format = None,
    modalities: options.Modalities = None,
    translate: options.Translate = None,
    text_clean: options.TextClean = None,
    precision: options.PrecisionFlag = None,
    batch_size: options.BatchSize = None,
    dtype: options.Dtype = None,
    reject_ceiling: Ceiling = None,
    set: options.Set = None,
    address: options.Address = None,
) -> None:
    """Show what `embed` would do: shards, bytes, pending and done, settings, resources. Changes nothing.

    Example: vecmill plan recipe.yaml
    """
    embed(
        what, encoder, output, name, format, modalities, translate, text_clean, precision, batch_size, dtype,
        reject_ceiling, set=set, address=address, dry_run=True,
    )  # fmt: skip


def with_whole_output(config: RunConfig) -> RunConfig:
    """Local paths as seen from any folder: the record of the run keeps them."""
    inputs = [item if "://" in item else whole_uri(item) for item in config.input]
    return config.model_copy(update={"input": inputs, "output": options.output_store_root(config.output)})


def show_plan(run: Prepared, cluster: Cluster) -> None:
    config, encode, shards = run.config, run.config.encode, run.plan.shards
    pending = [work.shard for work in run.plan.pending]
    actors = all_actors(config)
    gpus = actors * float(encode.gpus_per_actor) + (translator_gpus(config) if run.translation else 0)
    facts = {
        "input": ", ".join(config.input),
        "shards": f"{len(shards):,} ({size(sum(shard.bytes for shard in shards))})",
        "done": f"{run.plan.done:,}",
        "pending": f"{len(pending):,} ({size(sum(shard.bytes for shard in pending))})",
        "changed": f"{len(run.plan.changed):,} of the pending replace what an older version of the shard gave",
        "vanished": f"{len({ref.shard for ref in run.plan.vanished}):,} shards of the output are not in this input",
        **_encoder_facts(run),
        "actors": f"{actors} of {encode.gpus_per_actor:g} GPUs and {encode.cpus_per_actor:g} CPUs",
        "resources": f"{needed_cpus(run):g} CPUs and {gpus:g} GPUs needed, "
        f"the cluster has {cluster.cpus:g} and {cluster.gpus:g}",
    }
    facts |= section_lines(config)
    hidden = [name for name in ("changed", "vanished") if facts[name].startswith("0 ")]
    print_plan({name: fact for name, fact in facts.items() if name not in hidden})
    out.print("Nothing was changed. Run `vecmill embed` with the same arguments to start.")


def _encoder_facts(run: Prepared) -> dict[str, str]:
    """Lines of each encoder, numbered where there are several."""
    facts = {}
    for number, target in enumerate(run.targets, 1):
        spec, after = target.spec, f" {number}" if len(run.targets) > 1 else ""
        facts[f"encoder{after}"] = f"{spec.name}, {spec.precision}, batches of {target.batch_size}"
        facts[f"vectors{after}"] = ", ".join(
            vectors_told(modality, spec.vectors[modality]) for modality in target.modalities
        )
        facts[f"fingerprint{after}"] = spec.fingerprint[:16]
        facts[f"output{after}"] = f"{run.config.output}/embeddings/{target.folder}"
    return facts


def vectors_told(modality: str, vectors: VectorSpec) -> str:
    return f"{modality} {vectors.dim}" if vectors.count == 1 else f"{modality} {vectors.count} x {vectors.dim}"


def section_lines(config: RunConfig) -> dict[str, str]:
    """The resolved settings as --set takes them, a line a section; those that are unset are left out."""
    sections = config.model_dump(
        mode="json", include={"read", "translate", "decode", "encode", "write", "cluster"}, exclude_none=True
    )
    return {name: " ".join(f"{key}={value}" for key, value in values.items()) for name, values in sections.items()}


def run_embed(run: Prepared, prune: bool = False) -> None:
    """Exit code 3 where the whole output's share of rejects is above the ceiling."""
    from pipelines.embed import embed as embed_pending

    pending, done = len(run.plan.pending), run.plan.done
    err.print(
        f"{pending:,} shards to embed, {done:,} done before, into "
        + ", ".join(run.store.uri(f"embeddings/{folder}") for folder in run.folders),
        markup=False,
    )
    with progress_of(run) as progress:
        report = embed_pending(run, progress, prune=prune, say=lambda line: err.print(line, markup=False))
    print_report(report)
    show_stale(run)
    show_vanished(run, prune)
    out.print(f"  report: {run.store.uri('reports/' + report['run'] + '.json')}", markup=False)
    require_under_ceiling(run, report)


def progress_of(run: Prepared) -> RunProgress:
    """Each encoder's shards count, where there are several."""
    pending = sum(len(set(work.families) & set(run.folders)) for work in run.plan.pending)
    return RunProgress(pending, len(run.folders))


def require_under_ceiling(run: Prepared, report: dict[str, Any]) -> None:
    ceiling = report["reject_ceiling"]
    above = {name: one["reject_rate"] for name, one in report["encoders"].items() if one["reject_rate"] > ceiling}
    for folder, rate in above.items():
        err.print(
            f"{rate:.1%} of the items were rejected, more than the ceiling of {ceiling:.1%}.\n"
            f"  Look at {run.store.uri('rejects/' + folder)}; raise --reject-ceiling if this is what you expect.",
            markup=False,
        )
    if above:
        raise typer.Exit(ABOVE_CEILING)


def show_stale(run: Prepared) -> None:
    """Other encoders whose vectors of changed shards went with the samples they were made of."""
    plan = run.plan
    replaced = [*plan.superseded, *plan.recut, *(ref for refs in plan.changed.values() for ref in refs)]
    for folder in sorted({ref.family for ref in replaced} - run.families.keys()):
        shards = len({ref.shard for ref in replaced if ref.family == folder})
        out.print(
            f"  {folder}: {shards:,} shards have changed and lost their vectors; run its embed again", markup=False
        )


def show_vanished(run: Prepared, prune: bool) -> None:
    vanished = {ref.shard for ref in run.plan.vanished}
    if vanished:
        outcome = "they are removed" if prune else "they are kept; --prune removes them"
        out.print(f"  {len(vanished):,} shards of the output are not in this input: {outcome}", markup=False)
