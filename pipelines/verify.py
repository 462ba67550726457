"""Whether an output is what its ledger says: every part in place, whole, and nothing beside them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence

from pipelines.collect import leftovers, totals
from pipelines.compact import holdings
from pipelines.contracts import SAMPLES_FAMILY
from pipelines.errors import LedgerError
from pipelines.index.manifest import Release, ReleaseFile, index_folder
from pipelines.index.release import merged_files, read_release
from pipelines.index.versions import finished, index_homes
from pipelines.ledger import COMMITS, Commit, CommitRef, list_commits, read_commits, staged
from pipelines.local_disk import COPY_BYTES
from pipelines.storage import Store


def problems(store: Store, deep: bool = False) -> Iterator[str]:
    """A line for each thing that is wrong; none where all is well. Reads only.

    deep: reads every part and compares its checksum, where otherwise listings and commits are enough.
    """
    families = sorted({name.split("/")[0] for name in store.names(COMMITS)})
    for family in families:
        refs = list(list_commits(store, family))
        yield from _doubles(family, refs)
        sizes = dict(store.sizes("samples")) if family == SAMPLES_FAMILY else dict(store.sizes(f"embeddings/{family}"))
        sizes |= dict(store.sizes(f"rejects/{family}"))
        for commit in read_commits(store, refs):
            yield from _of_counts(commit)
            yield from _of_parts(store, commit, sizes, deep)
    yield from _of_releases(store, deep)
    yield from _back(store)
    for kind, (objects, _) in totals(leftovers(store)).items():
        if kind != "retired":
            yield f"{objects:,} {kind} objects that nothing names: of a run that is at work, or for `vecmill collect`"


def _back(store: Store) -> Iterator[str]:
    try:
        for holding in holdings(store, waiting=False):
            yield f"{holding.told}: they are back after a compaction; run `vecmill remove` with --compact again"
    except LedgerError as error:
        yield f"{error.what}; {error.fix}"


def _of_releases(store: Store, deep: bool) -> Iterator[str]:
    """Index and side files of every release, published or not."""
    for encoder, modality in index_homes(store):
        for version in finished(store, index_folder(encoder, modality)):
            release = read_release(store, encoder, modality, version)
            sizes = dict(store.sizes(release.folder))
            yield from _of_files(store, release, release.files, sizes, deep, "index again with --force")
            merged, remedy = merged_files(store, release), "delete it and run `vecmill index` with --merge again"
            yield from _of_files(store, release, merged, sizes, deep, remedy)


def _of_files(
    store: Store, release: Release, files: Sequence[ReleaseFile], sizes: dict[str, int], deep: bool, remedy: str
) -> Iterator[str]:
    for file in files:
        path = f"{release.folder}/{file.file}"
        if sizes.get(path) != file.bytes:
            yield f"{path} is missing or of another size than its manifest says; {remedy}"
        elif deep and _digest(store, path) != file.sha256:
            yield f"{path} is damaged: its checksum is not that of its manifest; {remedy}"


def _doubles(family: str, refs: list[CommitRef]) -> Iterator[str]:
    standing = Counter(ref.shard for ref in refs)
    for shard, count in standing.items():
        if count > 1:
            yield f"{family}: {count} commits of shard {shard} stand; run the same embed command again"


def _of_parts(store: Store, commit: Commit, sizes: dict[str, int], deep: bool) -> Iterator[str]:
    for part in commit.parts:
        if part.final not in sizes:
            yield f"{part.final} is missing; {_remedy(store, commit)}"
        elif sizes[part.final] != part.bytes:
            yield f"{part.final} has {sizes[part.final]:,} bytes; its commit says {part.bytes:,}"
        elif deep and _digest(store, part.final) != part.sha256:
            yield f"{part.final} is damaged: its checksum is not that of its commit"


def _remedy(store: Store, commit: Commit) -> str:
    if f"{commit.shard}.{commit.version}" in staged(store, commit.family):
        return "it is in staging still: run the same embed command again"
    return f"move {commit.ref.path} away and run the same embed command again, which does the shard again"


def _of_counts(commit: Commit) -> Iterator[str]:
    for modality, count in commit.counts.items():
        if count.items != count.embedded + count.rejected + count.removed:
            yield f"{commit.ref.path}: {modality} items do not add up"
        rows = sum(part.rows for part in commit.parts if part.dataset == f"embeddings/{commit.family}/{modality}")
        if rows != count.embedded:
            yield f"{commit.ref.path}: {rows:,} {modality} vectors in its parts, {count.embedded:,} counted"
    samples = sum(part.rows for part in commit.parts if part.dataset == SAMPLES_FAMILY)
    if commit.family == SAMPLES_FAMILY and samples != commit.rows - commit.removed:
        yield f"{commit.ref.path}: {samples:,} rows in its part, {commit.rows - commit.removed:,} counted"


def _digest(store: Store, path: str) -> str:
    digest = hashlib.sha256()
    with store.open(path) as stream:
        while data := stream.read(COPY_BYTES):
            digest.update(data)
    return digest.hexdigest()
