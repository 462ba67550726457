"""Manifests: JSON lines, CSV, or Karpathy's JSON, of a path and captions a row.

A shard is a slice of the manifest: the rows whose key hashes to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from pipelines.config import ReadConfig
from pipelines.contracts import Sample, Shard
from pipelines.errors import ChangedInputError, InputError
from pipelines.secrets import without_credentials
from pipelines.sources.columns import columns_of, key_in, reference_in, sample_of
from pipelines.sources.fetch import PROBED_REFERENCES, fetch_image, in_order, require_allowed
from pipelines.sources.identity import shard_id, slice_count, slice_of, slice_piece
from pipelines.sources.members import rejected_row, without_repeats
from pipelines.sources.rows import Row, rows
from pipelines.sources.text import Fault, as_list, printable
from pipelines.storage import Store


def plan(uri: str, settings: ReadConfig, store: Store, slices: dict[str, int]) -> list[Shard]:
    """One shard a slice. The manifest is read through once to know what each slice holds, and once more the
    first time, to count it; the number of slices is looked up in `slices` or put there.

    Raises: InputError where it holds no row, or the first has neither an image nor a caption, or the first few name
    images that it may not name: all the others are likely to be like them.
    """
    name = without_credentials(uri)
    if name not in slices:
        slices[name] = slice_count(_count(uri, settings, store), settings.samples_per_slice)
    count = slices[name]
    digests = [hashlib.sha256() for _ in range(count)]
    sizes = [0] * count
    references: list[str] = []
    for row in rows(uri, store, settings.splits):
        if len(references) < PROBED_REFERENCES and (reference := _reference(row, settings)):
            references.append(reference)
        k = slice_of(key_of(row, settings), count)
        digests[k].update(row.digest.encode())
        sizes[k] += len(row.raw)
    require_allowed(references, uri, settings.allow)
    return [
        Shard(shard_id(uri, slice_piece((k, count))), uri, "manifest", h.hexdigest()[:12], sizes[k], slice=(k, count))
        for k, h in enumerate(digests)
    ]


def samples(shard: Shard, settings: ReadConfig, store: Store) -> Iterator[Sample]:
    """In the order of the manifest; rows of one key and image are one sample, where the first of them is.

    The rows of the slice are in memory at once. Raises: ChangedInputError where they are not what was
    planned, StorageError where storage fails.
    """

    def finish(made: tuple[Sample, str | None]) -> Sample:
        return fetch_image(made[0], made[1], shard.uri, settings, store)

    yield from without_repeats(in_order(finish, _samples(shard, settings, store)))


def key_of(row: Row, settings: ReadConfig) -> str:
    """The row's key column, else its image's path as written, else a digest of the row, all of which stay
    when rows are added above it."""
    if row.values is None:
        return f"bad-{row.digest}"
    columns = columns_of(row.values, settings)
    return key_in(row.values, columns) or printable(_reference(row, settings) or f"row-{row.digest}")


def _reference(row: Row, settings: ReadConfig) -> str | None:
    """The path or URL of the row's image."""
    columns = columns_of(row.values or {}, settings)
    return reference_in((row.values or {}).get(columns.image)) if columns.image else None


def _count(uri: str, settings: ReadConfig, store: Store) -> int:
    count, checked = 0, False
    for row in rows(uri, store, settings.splits):
        count += 1
        if not checked and row.values is not None:
            _require_columns(uri, row.values, settings)
            checked = True
    if not count:
        taken = f" of the splits {', '.join(settings.splits)}" if settings.splits else ""
        raise InputError(f"{uri} has no rows{taken}", "Check the file and the setting read.splits.")
    return count


def _require_columns(uri: str, values: dict[str, Any], settings: ReadConfig) -> None:
    columns = columns_of(values, settings)
    if columns.image is None and columns.caption is None:
        raise InputError(
            f"{uri} has no field known as an image or a caption; its first row has: {', '.join(map(str, values))}",
            "Name them with read.image_column and read.caption_column.",
        )


def _samples(shard: Shard, settings: ReadConfig, store: Store) -> Iterator[tuple[Sample, str | None]]:
    for (key, _), group in _groups(shard, settings, store).items():
        yield _sample(key, group, shard, settings)


def _groups(shard: Shard, settings: ReadConfig, store: Store) -> dict[tuple[str, str], list[Row]]:
    """The slice's rows by sample. Those of one image may be far apart, as in shuffled annotations, but share a
    key and so a slice."""
    part, slices = shard.slice or (0, 1)
    digest = hashlib.sha256()
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows(shard.uri, store, settings.splits):
        if slice_of(key_of(row, settings), slices) == part:
            digest.update(row.digest.encode())
            groups.setdefault(_identity(row, settings), []).append(row)
    if digest.hexdigest()[:12] != shard.version:
        raise ChangedInputError(f"{shard.uri} has changed since the run was planned", "Run the same command again.")
    return groups


def _identity(row: Row, settings: ReadConfig) -> tuple[str, str]:
    """What rows of one sample share: key and image. Rows without an image share nothing."""
    columns = columns_of(row.values or {}, settings)
    image = (row.values or {}).get(columns.image) if columns.image else None
    return key_of(row, settings), str(image) if image else f"row {row.number}"


def _sample(key: str, group: list[Row], shard: Shard, settings: ReadConfig) -> tuple[Sample, str | None]:
    first = group[0]
    if first.values is None:
        fault = Fault("bad_manifest_line", printable(f"row {first.number}: {first.fault}"))
        return rejected_row(key, shard.uri, fault), None
    merged = _merged([row.values or {} for row in group], settings)
    sample, reference = sample_of(merged, columns_of(first.values, settings), key, settings)
    sample.uri = sample.uri or shard.uri
    return sample, reference


def _merged(group: list[dict[str, Any]], settings: ReadConfig) -> dict[str, Any]:
    """One row with the captions of all; what the others say differently is kept under `_rows`."""
    first, *others = group
    caption = columns_of(first, settings).caption
    if not others:
        return first
    captions = [text for row in group for text in as_list(row.get(caption))] if caption else []
    differences = [{k: v for k, v in row.items() if k != caption and first.get(k) != v} for row in others]
    merged = {**first, caption: captions} if caption else dict(first)
    return merged | ({"_rows": differences} if any(differences) else {})
