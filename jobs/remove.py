"""`vecmill remove`."""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.collect import output_store
from jobs.console import err, out
from jobs.options import AsJson, OutputArgument, text_in
from pipelines.errors import ConfigError, IndexBuildError, InputError
from pipelines.lease import Say
from pipelines.storage import Store

if TYPE_CHECKING:
    from pipelines.purge import Purge
    from pipelines.remove import Asked, Removal

SHOWN = 20

KeysFile = Annotated[
    str | None,
    typer.Option("--keys", help="File or object of keys, one a line, as `samples/` has them.", show_default=False),
]
Keys = Annotated[list[str] | None, typer.Option("--key", help="A key. Repeatable.", show_default=False)]
Images = Annotated[
    str | None,
    typer.Option("--where-sha256", help="File or object of SHA-256 (hex) of images, one a line, whatever their keys."),
]
Reason = Annotated[str, typer.Option(help="Why; kept for ever, so that it must not name what is removed.")]
Compact = Annotated[
    bool,
    typer.Option("--compact", help="Drop what is removed from every file, for good; alone, or after this request."),
]
DropReleases = Annotated[
    bool,
    typer.Option("--drop-releases", help="With --compact: delete current index releases that hold it too, unreplaced."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would go and change nothing.")]


def remove(
    output: OutputArgument,
    keys: KeysFile = None,
    key: Keys = None,
    where_sha256: Images = None,
    reason: Reason = "",
    compact: Compact = False,
    drop_releases: DropReleases = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Take samples down, for takedown notices and privacy requests: no search finds them any more, and no later run
    embeds them again.

    All samples that have a key go, in whatever shards. Keys that no sample has are listed, and the exit code is 2; the
    others are removed all the same. Their bytes stay in the files until --compact writes the parts again and deletes
    the index releases that hold their vectors; a current release goes when `vecmill index` has built another.

    Example: vecmill remove s3://bucket/emb --keys takedowns.txt --reason "notice 2026-114"

    Example: vecmill remove s3://bucket/emb --compact --dry-run
    """
    store = output_store(output)
    asked = asked_for(Store(options=store.options), keys, key, where_sha256, reason)
    if not (asked.keys or asked.sha256 or compact):
        raise ConfigError("There is nothing to remove", "Give --keys, --key or --where-sha256, or --compact.")
    if drop_releases and not compact:
        raise ConfigError("--drop-releases goes with --compact", "Give both.")
    console = err if as_json else out

    def say(line: str) -> None:
        console.print(line, markup=False)

    told: dict[str, Any] = {"dry_run": dry_run}
    missing: list[str] = []
    if asked.keys or asked.sha256:
        missing = take_down(store, asked, reason, dry_run, told, say)
    done = compacted(store, drop_releases, dry_run, told, say) if compact else None
    if as_json:
        print(json.dumps(told, ensure_ascii=False, indent=2))
    require_nothing_left(store, missing, None if dry_run else done)


def asked_for(inputs: Store, keys: str | None, key: list[str] | None, images: str | None, reason: str) -> Asked:
    """inputs: of whole addresses, where the files of `keys` and `images` are."""
    from pipelines.remove import Asked

    asked = Asked([*(key or []), *_lines(inputs, keys)], [line.lower() for line in _lines(inputs, images)])
    if any(_names(reason, key) for key in asked.keys):
        raise ConfigError("The reason names a key, and would keep it for ever", "Say it otherwise.")
    return asked


def _names(reason: str, key: str) -> bool:
    """As a word or words: the key 3 is not named by 2013."""
    return key in reason and re.search(rf"(?<!\w){re.escape(key)}(?!\w)", reason) is not None


def requester() -> str:
    """Of a user without an entry in passwd, as containers have them, the number."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = str(os.getuid())
    return f"{name}@{socket.gethostname()}"


def _lines(inputs: Store, file: str | None) -> list[str]:
    lines = text_in(inputs, file).split("\n") if file else []
    return [line for line in dict.fromkeys(line.removesuffix("\r") for line in lines) if line]


def take_down(store: Store, asked: Asked, reason: str, dry_run: bool, told: dict[str, Any], say: Say) -> list[str]:
    """What was asked for and is in no sample."""
    from pipelines.remove import remove as take_down_all

    removal = take_down_all(store, asked, requester(), reason, dry_run)
    rows = [
        {"shard": found.ref.shard, "row": row, "key": key}
        for found in removal.found
        for row, key in zip(found.rows["row"].to_pylist(), found.rows["key"].to_pylist(), strict=True)
    ]
    told |= {"removed": rows, "before": removal.before, "missing": removal.missing}
    told["request"] = removal.request.model_dump() if removal.request else None
    for row in rows[:SHOWN]:
        say(f"  {row['shard']} row {row['row']}  {row['key']}")
    if len(rows) > SHOWN:
        say(f"  and {len(rows) - SHOWN:,} more")
    say(_outcome(removal, dry_run))
    return removal.missing


def _outcome(removal: Removal, dry_run: bool) -> str:
    before = f" {removal.before:,} were removed before." if removal.before else ""
    if dry_run:
        return f"{removal.samples:,} samples would be removed.{before} Nothing was changed."
    if removal.request is None:
        return f"No sample is left to remove.{before}"
    return (
        f"{removal.samples:,} samples are removed, by request {removal.request.id}: no search finds them.{before} "
        "--compact drops them from the files."
    )


def require_nothing_left(store: Store, missing: list[str], done: Purge | None) -> None:
    """Raises: InputError for what was not found, IndexBuildError for releases that wait; of both the latter is said."""
    from pipelines.purge import require_no_holders

    try:
        if done:
            require_no_holders(store, done)
    except IndexBuildError as waiting:
        if not missing:
            raise
        err.print(str(waiting), markup=False)
    require_all_found(missing)


def require_all_found(missing: list[str]) -> None:
    """Raises: InputError."""
    if missing:
        shown = "\n  ".join(missing[:SHOWN]) + (
            f"\n  and {len(missing) - SHOWN:,} more" if len(missing) > SHOWN else ""
        )
        raise InputError(
            f"{len(missing):,} of what was asked for are in no sample:\n  {shown}",
            "Check their spelling in samples/; what is being embedded now can be removed when its shard is done.",
        )


def compacted(store: Store, drop: bool, dry_run: bool, told: dict[str, Any], say: Say) -> Purge:
    from pipelines.purge import plan_purge, purge

    done = plan_purge(store, drop) if dry_run else purge(store, drop, say)
    told["parts"] = [{"commit": each.commit.ref.path, "dropped": each.items} for each in done.holdings]
    told["releases"] = done.releases
    told["waiting"] = [f"{home.folder}/{home.current}" for home in done.waiting]
    told["findings"] = done.findings
    told["leftovers"] = [leftover.path for leftover in done.leftovers]
    if dry_run:
        for holding in done.holdings:
            say(f"  would write {holding.told} again")
        for release in done.releases:
            say(f"  would delete {release}, which holds vectors of what was taken down")
        for folder in done.findings:
            say(f"  would delete {folder}/, which may tell of what was taken down")
        for release in told["waiting"]:
            say(f"  {release} holds some too, and goes when `vecmill index` has built another")
    verb = "would be" if dry_run else "are"
    say(
        f"{len(done.holdings):,} commits {verb} written again, {len(done.releases):,} index releases and "
        f"{len(done.leftovers):,} leftovers of dead runs {verb} deleted."
    )
    return done
