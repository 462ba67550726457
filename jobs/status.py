"""`vecmill status`."""

from __future__ import annotations

import json
from typing import Any

from jobs.console import err, out
from jobs.options import AsJson, OutputArgument, named_output
from pipelines.config import RunConfig, validate
from pipelines.contracts import SAMPLES_FAMILY
from pipelines.errors import InputError, StorageError
from pipelines.ledger import Plan, make_plan, tally
from pipelines.record import RunRecord, read_record
from pipelines.secrets import MASK
from pipelines.sources import plan_shards
from pipelines.storage import Store
from pipelines.takedowns import read_takedowns


def status(output: OutputArgument, as_json: AsJson = False) -> None:
    """How much of an output is done, rejected (top reasons) and pending.

    Example: vecmill status s3://bucket/emb
    """
    store, recipe = named_output(output)
    record = read_record(store)
    if not record.encoders:
        raise InputError(f"{store.root} is not the output of an embed run: it has no run.json", "Check the path.")
    facts = {folder: _facts(store, record, folder, recipe) for folder in record.encoders}
    known = read_takedowns(store)
    taken_down = {"samples": known.samples(), "in_files": known.samples(waiting=True)}
    facts = {folder: {**fact, "taken_down": taken_down} for folder, fact in facts.items()}
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for folder, fact in facts.items():
        out.print(folder, markup=False)
        pending = "unknown" if fact["pending"] is None else f"{fact['pending']:,}"
        out.print(f"  shards  {fact['done']:,} done, {pending} pending", markup=False)
        for modality, count in fact["items"].items():
            out.print(
                f"  {modality:<10}  {count['embedded']:,} embedded, {count['rejected']:,} rejected, "
                f"{count['removed']:,} removed, {count['absent']:,} absent",
                markup=False,
            )
        for reason, count in list(fact["rejects"].items())[:5]:
            out.print(f"  reject  {reason}: {count:,}", markup=False)
    if taken_down["samples"]:
        out.print(
            f"{taken_down['samples']:,} samples were taken down; {taken_down['in_files']:,} wait for `vecmill remove "
            f"--compact`",
            markup=False,
        )


def _plan(store: Store, record: RunRecord, folder: str, recipe: RunConfig | None) -> Plan | None:
    """None where the input cannot be listed any more, which an output outlives. recipe: has the credentials of the
    input's addresses, which are not recorded."""
    config = validate(RunConfig, record.settings)
    if any(MASK in given for given in config.input):
        if recipe is None:
            err.print("What is pending is unknown: credentials of the input are not recorded; give the run's recipe.")
            return None
        config = config.model_copy(update={"input": recipe.input})
    try:
        shards, _ = plan_shards(config.input, config.format, config.read, Store(options=store.options), record.slices)
    except (InputError, StorageError) as error:
        err.print(f"What is pending is unknown: {error}", markup=False)
        return None
    return make_plan(store, shards, [SAMPLES_FAMILY, folder])


def _facts(store: Store, record: RunRecord, folder: str, recipe: RunConfig | None) -> dict[str, Any]:
    counts, reasons, committed = tally(store, [folder])
    plan = _plan(store, record, folder, recipe)
    return {
        "done": plan.done if plan else committed,
        "pending": len(plan.pending) if plan else None,
        "items": {modality: count.model_dump() for modality, count in counts.items()},
        "rejects": dict(sorted(reasons.items(), key=lambda item: -item[1])),
    }
