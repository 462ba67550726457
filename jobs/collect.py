"""`vecmill collect` and `vecmill verify`: what is left in an output, and whether it is whole."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from jobs.console import err, out, size
from jobs.options import AsJson, OutputArgument, named_output
from pipelines.errors import InputError, LedgerError
from pipelines.ledger import COMMITS
from pipelines.record import FILE
from pipelines.storage import Store

Apply = Annotated[bool, typer.Option("--apply", help="Delete it; without, it is only shown.")]
Deep = Annotated[bool, typer.Option("--deep", help="Read every part and compare its checksum too.")]

MEANING = {
    "orphan": "files under samples, embeddings and rejects that no commit names",
    "staging": "work that a run began; what of it is committed is put in its place first",
    "index": "files of index versions that were never finished",
    "retired": "commits of parts that are gone",
    "upload": "objects that were begun to be sent in pieces and never ended",
}


def collect(output: OutputArgument, apply: Apply = False, as_json: AsJson = False) -> None:
    """Show, and with --apply delete, what runs that died have left in an output. Its data is never touched.

    Example: vecmill collect s3://bucket/emb --apply
    """
    from pipelines.collect import collect as collect_all
    from pipelines.collect import leftovers, totals

    store = output_store(output)
    found = collect_all(store, lambda line: err.print(line, markup=False)) if apply else leftovers(store)
    if as_json:
        print(json.dumps({"applied": apply, "objects": [vars(leftover) for leftover in found]}, indent=2))
        return
    for kind, (objects, bytes_) in totals(found).items():
        out.print(f"  {kind:<8}{objects:>9,} objects {size(bytes_):>11}  {MEANING[kind]}", markup=False)
    if not found:
        out.print("Nothing to collect.")
    elif apply:
        out.print(f"All {len(found):,} objects are dealt with.", markup=False)
    else:
        out.print("Nothing was changed. --apply deletes these, if no run is at work on the output.")


def verify(output: OutputArgument, deep: Deep = False) -> None:
    """Check an output against its ledger: every part in place and whole, counts that add up, nothing left over.

    Example: vecmill verify s3://bucket/emb --deep
    """
    from pipelines.verify import problems

    store = output_store(output)
    found = 0
    for problem in problems(store, deep):
        found += 1
        out.print(f"  {problem}", markup=False)
    if found:
        raise LedgerError(f"{found:,} things in {store.root} are not as its ledger says", "See the lines above.")
    commits = len(store.names(COMMITS))
    out.print(f"{commits:,} commits: every part is in place{', with its checksum' if deep else ''}.", markup=False)


def output_store(output: str) -> Store:
    """Raises: InputError where it is not an output: these verbs would find nothing amiss in any other folder."""
    store = named_output(output).store
    if not store.exists(FILE):
        raise InputError(f"{store.root} is not the output of an embed run: it has no {FILE}", "Check the path.")
    return store
