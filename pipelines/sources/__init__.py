"""Sources: what a shard is, and its samples one by one.

    tar.py       WebDataset tars          parquet.py   Parquet of bytes, paths or URLs
    files.py     folders of images        manifest.py  JSON lines, CSV, Karpathy's JSON

A new format is one file with `plan` and `samples`, and a line in `plan_shards` and `_SAMPLES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pipelines.config import ReadConfig
from pipelines.contracts import Format, Sample, Shard
from pipelines.errors import ChangedInputError, InputError
from pipelines.sources import files, manifest, parquet, tar
from pipelines.sources.identity import object_version
from pipelines.sources.inputs import Found, find
from pipelines.sources.kinds import KNOWN_IMAGE_SUFFIXES
from pipelines.storage import Store

__all__ = ["KNOWN_IMAGE_SUFFIXES", "plan_shards", "samples"]

_SAMPLES: dict[Format, Callable[[Shard, ReadConfig, Store], Iterator[Sample]]] = {
    "tar": tar.samples,
    "parquet": parquet.samples,
    "folder": files.samples,
    "manifest": manifest.samples,
}


def plan_shards(
    inputs: list[str], format: str, settings: ReadConfig, store: Store, slices: dict[str, int]
) -> tuple[list[Shard], dict[str, int]]:
    """The shards that the inputs name, sorted and unique by id, and the numbers of slices to record.

    inputs: paths, brace ranges, globs, folders and list files, on any protocol fsspec opens. format: `auto`
    or a Format. store: `Store("", options)`, for whole URIs. slices: slices of each folder and manifest (by
    uri) as recorded by an earlier run.
    Raises: InputError where an input is missing, empty, mixed or of no known format.
    """
    recorded = dict(slices)
    try:
        shards = _plan(find(inputs, format, store, settings.allow), settings, store, recorded)
    except PermissionError as error:
        raise InputError(f"The input may not be read: {error}", "Check your access to it.") from error
    except FileNotFoundError as error:
        raise InputError(f"The input is gone since it was listed: {error}", "Run the same command again.") from error
    unique = {shard.id: shard for shard in shards}
    return [unique[id_] for id_ in sorted(unique)], recorded


def _plan(found: Found, settings: ReadConfig, store: Store, recorded: dict[str, int]) -> list[Shard]:
    """recorded: numbers of slices, added to."""
    shards = tar.plan(list(found.tars.values()))
    if found.parquets:
        shards += parquet.plan(list(found.parquets.values()), settings, store)
    for uri in found.folders:
        shards += files.plan(uri, settings, store, recorded)
    for uri in found.manifests:
        shards += manifest.plan(uri, settings, store, recorded)
    return shards


def samples(shard: Shard, settings: ReadConfig, store: Store) -> Iterator[Sample]:
    """The samples of a shard, streamed, in an order that is the same every time: a sample's position is its row.

    Whatever is wrong with the data is in the samples' rejects. Raises: ChangedInputError where the object is
    not what was planned, StorageError where storage fails.
    """
    try:
        _require_unchanged(shard, store)
        yield from _SAMPLES[shard.format](shard, settings, store)
        _require_unchanged(shard, store)
    except FileNotFoundError as error:
        raise ChangedInputError(
            f"{shard.uri} is gone since the run was planned", "Run the same command again."
        ) from error


def _require_unchanged(shard: Shard, store: Store) -> None:
    """Objects by their size and etag; slices are checked against their members where these are read."""
    if shard.slice is None and object_version(store.stat(shard.uri, listed=True), shard.row_groups) != shard.version:
        raise ChangedInputError(f"{shard.uri} has changed since the run was planned", "Run the same command again.")
