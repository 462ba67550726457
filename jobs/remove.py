"""`vecmill remove`."""

from __future__ import annotations

import getpass
import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.collect import output_store
from jobs.console import out
from jobs.options import AsJson, OutputArgument
from pipelines.errors import ConfigError, InputError

if TYPE_CHECKING:
    from pipelines.remove import Asked, Removal

SHOWN = 20

KeysFile = Annotated[
    Path | None, typer.Option("--keys", help="File of keys, one a line, as `samples/` has them.", show_default=False)
]
Keys = Annotated[list[str] | None, typer.Option("--key", help="A key. Repeatable.", show_default=False)]
Images = Annotated[
    Path | None,
    typer.Option("--where-sha256", help="File of SHA-256 (hex) of images, one a line, under whatever keys."),
]
Reason = Annotated[str, typer.Option(help="Why; kept for ever, so that it must not name what is removed.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would go and change nothing.")]


def remove(
    output: OutputArgument,
    keys: KeysFile = None,
    key: Keys = None,
    where_sha256: Images = None,
    reason: Reason = "",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Take samples down, for takedown notices and privacy requests: no search finds them any more, and no later run
    embeds them again.

    All samples that have a key go, in whatever shards. Keys that no sample has are listed, and the exit code is 2; the
    others are removed all the same.

    Example: vecmill remove s3://bucket/emb --keys takedowns.txt --reason "notice 2026-114"
    """
    from pipelines.remove import remove as take_down

    asked = asked_for(keys, key, where_sha256, reason)
    store = output_store(output)
    removal = take_down(store, asked, f"{getpass.getuser()}@{socket.gethostname()}", reason, dry_run)
    print_removal(removal, dry_run, as_json)
    if removal.missing:
        shown = "\n  ".join(removal.missing[:SHOWN])
        raise InputError(
            f"{len(removal.missing):,} of what was asked for are in no sample:\n  {shown}",
            "Check their spelling in samples/; what is being embedded now can be removed when its shard is done.",
        )


def asked_for(keys: Path | None, key: list[str] | None, images: Path | None, reason: str) -> Asked:
    from pipelines.remove import Asked

    asked = Asked([*(key or []), *_lines(keys)], [line.lower() for line in _lines(images)])
    if not (asked.keys or asked.sha256):
        raise ConfigError("There is nothing to remove", "Give --keys, --key or --where-sha256.")
    if any(each in reason for each in asked.keys):
        raise ConfigError("The reason names a key, and would keep it for ever", "Say it otherwise.")
    return asked


def _lines(file: Path | None) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n") if file else []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}", "Check the path.") from None
    return [line for line in dict.fromkeys(line.removesuffix("\r") for line in lines) if line]


def print_removal(removal: Removal, dry_run: bool, as_json: bool) -> None:
    rows = [
        {"shard": found.ref.shard, "row": row, "key": key}
        for found in removal.found
        for row, key in zip(found.rows["row"].to_pylist(), found.rows["key"].to_pylist(), strict=True)
    ]
    if as_json:
        facts = {"removed": rows, "before": removal.before, "missing": removal.missing}
        request = removal.request.model_dump() if removal.request else None
        print(json.dumps({**facts, "dry_run": dry_run, "request": request}, ensure_ascii=False, indent=2))
        return
    for row in rows[:SHOWN]:
        out.print(f"  {row['shard']} row {row['row']}  {row['key']}", markup=False)
    if len(rows) > SHOWN:
        out.print(f"  and {len(rows) - SHOWN:,} more", markup=False)
    if removal.before:
        out.print(f"{removal.before:,} samples were removed before.", markup=False)
    if dry_run:
        out.print(f"{len(rows):,} samples would be removed. Nothing was changed.", markup=False)
    elif removal.request:
        out.print(f"{len(rows):,} samples are removed, by request {removal.request.id}.", markup=False)
    else:
        out.print("There is nothing more to remove.", markup=False)
