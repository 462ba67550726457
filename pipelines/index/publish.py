"""Which release is the current one: what may be published, the way back, and how many old ones are kept.

A search that holds a release in memory, or has its side files mapped, goes on with it whatever happens. Of a
release that was deleted, files that are opened later are gone, and the error says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pipelines.config import WriteConfig
from pipelines.errors import IndexBuildError, VecmillError
from pipelines.index.current import (
    POINTER,
    current_version,
    note_floor,
    point_at,
    previous_version,
    publication,
    swap,
)
from pipelines.index.manifest import MANIFEST, Release, index_folder
from pipelines.index.release import read_release
from pipelines.index.removed import holds_removed
from pipelines.index.versions import finished, number_of, unfinished
from pipelines.ledger import Commit, read_commits, standing_commits
from pipelines.record import read_record
from pipelines.storage import Store

Say = Callable[[str], None]
Move = Callable[[Store, str, str], None]


@dataclass(frozen=True)
class Obstacle:
    """Why a release may not be published, and what to do about it."""

    what: str
    fix: str


class NotPublishedError(VecmillError):
    """A release that is whole and stays, but may not be the current one. release: that one."""

    exit_code = 5

    def __init__(self, release: Release, obstacles: list[Obstacle]) -> None:
        self.release = release
        what = "; ".join(each.what for each in obstacles)
        super().__init__(
            f"{release.folder} is built but not published: {what}", "\n  ".join(each.fix for each in obstacles)
        )


def publish(store: Store, release: Release, floor: float, keep: int, say: Say = lambda line: None) -> None:
    """Makes a release the current one, if nothing bars it, and deletes all older ones but `keep`, and of these too
    what holds vectors of samples that were taken down.

    floor: for recall@10, re-ranked, noted for what grows from it. Raises: NotPublishedError, and IndexBuildError where
    files of it are missing.
    """
    require_publishable(store, release, floor)
    make_current(store, release, keep, say)
    note_floor(store, index_folder(release.encoder, release.modality), release.version, floor)


def require_publishable(store: Store, release: Release, floor: float) -> None:
    """Raises: as `publish`. Reads every commit of the encoder."""
    require_files(store, release)
    if barred := list(obstacles(store, release, floor)):
        raise NotPublishedError(release, barred)


def make_current(
    store: Store, release: Release, keep: int, say: Say = lambda line: None, move: Move = point_at
) -> None:
    """The second half of `publish`, for a release that nothing bars."""
    home = index_folder(release.encoder, release.modality)
    move(store, home, release.version)
    say(f"{home}/{current_version(store, home)} is the current release")
    delete_superseded(store, release, keep, say)


def delete_superseded(store: Store, release: Release, keep: int, say: Say = lambda line: None) -> None:
    """What has no place beside this release, which is the current one."""
    for version in too_old(store, index_folder(release.encoder, release.modality), keep):
        say(f"deleting {version}, which is older than the {keep} that are kept (index.keep)")
        delete_release(store, index_folder(release.encoder, release.modality), version)
    for version in holding_removed(store, release.encoder, release.modality):
        if version != release.version:
            say(f"deleting {version}, which holds vectors of what was taken down")
            delete_release(store, index_folder(release.encoder, release.modality), version)


def holding_removed(store: Store, encoder: str, modality: str) -> list[str]:
    """Releases with vectors of what was taken down, the way back among them, oldest first."""
    versions = finished(store, index_folder(encoder, modality))
    return [version for version in versions if holds_removed(store, read_release(store, encoder, modality, version))]


def rollback(store: Store, encoder: str, modality: str) -> Release:
    """Makes the release current again that was so before the present one. Nothing but missing files bars it.

    Raises: IndexBuildError where there is none.
    """
    folder = index_folder(encoder, modality)
    before = previous_version(store, folder)
    if before is None or before not in finished(store, folder):
        raise IndexBuildError(
            f"{store.uri(folder)} has no release before {current_version(store, folder) or 'a first one'}",
            "See `vecmill releases`; `vecmill publish --release` takes any of them.",
        )
    release = read_release(store, encoder, modality, before)
    require_files(store, release)
    swap(store, folder, before)
    return release


def require_files(store: Store, release: Release) -> None:
    """Raises: IndexBuildError where a file of the release is gone or not of its size."""
    sizes = dict(store.sizes(release.folder))
    for file in release.files:
        if (there := sizes.get(f"{release.folder}/{file.file}")) != file.bytes:
            found = "gone" if there is None else f"of {there:,} bytes, not {file.bytes:,}"
            raise IndexBuildError(f"{store.uri(release.folder)}/{file.file} is {found}", "Index again with --force.")


def obstacles(store: Store, release: Release, floor: float) -> Iterator[Obstacle]:
    """What bars a release from being published: too low a recall, too many rejects, counts that do not agree."""
    yield from _of_recall(release, floor)
    committed = Committed.of(read_commits(store, standing_commits(store, release.encoder)))
    yield from _of_rejects(store, committed)
    yield from _of_counts(store, release, committed)


@dataclass
class Committed:
    """What commits say together. rows: of each part, by its final name."""

    rows: dict[str, int]
    items: int = 0
    rejected: int = 0

    @classmethod
    def of(cls, commits: Iterable[Commit]) -> Committed:
        """One commit is held at a time."""
        found = cls({})
        for commit in commits:
            found.rows.update((part.final, part.rows) for part in commit.parts)
            found.items += sum(count.items for count in commit.counts.values())
            found.rejected += sum(count.rejected for count in commit.counts.values())
        return found


def _of_recall(release: Release, floor: float) -> Iterator[Obstacle]:
    lowest = release.recall.lowest_at_10
    if lowest is None and floor:
        yield Obstacle(
            f"its recall was not measured (index.recall_queries 0), and the floor is {floor:g}",
            f"Index again with index.recall_queries above 0, or accept it: "
            f"`vecmill publish … --release {release.version} --floor 0`.",
        )
    elif lowest is not None and lowest < floor:
        kind = min(release.recall.judged, key=release.recall.judged.__getitem__)
        how = " after re-ranking" if release.recall.reranked else ""
        yield Obstacle(
            f"recall@10 of {kind} queries is {lowest:.3f}{how}, below the floor of {floor:g}",
            f"Raise index.max_query_ms or index.rerank_factor, choose a larger index.index_key, or accept it: "
            f"`vecmill publish … --release {release.version} --floor {int(lowest * 100) / 100:g}`.",
        )


def _of_rejects(store: Store, committed: Committed) -> Iterator[Obstacle]:
    written = read_record(store).settings.get("write") or {}
    ceiling = float(written.get("reject_ceiling", WriteConfig().reject_ceiling))
    share = committed.rejected / max(1, committed.items)
    if share > ceiling:
        yield Obstacle(
            f"{share:.1%} of the items were rejected, more than the ceiling of {ceiling:.1%}",
            "Look at rejects/; if this is what you expect, run `vecmill embed` again with a higher --reject-ceiling.",
        )


def _of_counts(store: Store, release: Release, committed: Committed) -> Iterator[Obstacle]:
    """Every part indexed is one that a commit names, with as many rows, and none that a commit names is missing."""
    held = sum(shard.rows for shard in release.shards)
    if held != release.parts.rows:
        yield Obstacle(
            f"its index shards hold {held:,} vectors, its parts {release.parts.rows:,}", "Index again with --force."
        )
    indexed = {release.parts.path(part): part.rows for part in release.parts.ranges if not part.gone}
    if strays := [path for path, rows in indexed.items() if committed.rows.get(path) != rows]:
        yield Obstacle(
            f"{len(strays):,} of its {len(indexed):,} parts are not what the commits name now ({strays[0]})",
            "Run `vecmill verify`, then `vecmill index` again.",
        )
    ours = [path for path in committed.rows if path.startswith(f"{release.parts.folder}/") and path not in indexed]
    # What was embedded while the index was built, or since, is in its place, or will be in a moment.
    if lost := [path for path in ours if not store.exists(path)]:
        yield Obstacle(
            f"{len(lost):,} parts that commits name are not in place ({lost[0]})",
            "Run the same `vecmill embed` again, then `vecmill index`.",
        )


def too_old(store: Store, folder: str, keep: int) -> list[str]:
    """Releases to delete: older than the current one and than the `keep` before it; never the way back, and what was
    never published before what was."""
    current, before = current_version(store, folder), previous_version(store, folder)
    if current is None:
        return []
    older = [version for version in finished(store, folder) if number_of(version) < number_of(current)]
    spare = [version for version in older if version != before]
    spare.sort(key=lambda version: publication(store, folder, version) is not None)
    kept = keep - (before in older)
    return spare[: len(spare) - kept] if kept > 0 else spare


def delete_release(store: Store, folder: str, version: str) -> None:
    """Its manifest first: from then on it is no release, and should this die, `vecmill collect` clears the rest."""
    store.delete([f"{folder}/{version}/{MANIFEST}"])
    store.delete_folder(f"{folder}/{version}")


def withdraw(store: Store, folder: str) -> None:
    """Leaves an index without a current release."""
    store.delete([f"{folder}/{POINTER}"])


@dataclass(frozen=True)
class Listed:
    """A version of an index. state: current, previous, published, withdrawn, built (not published) or unfinished."""

    version: str
    state: str
    release: Release | None


def list_releases(store: Store, encoder: str, modality: str) -> list[Listed]:
    """Every version there is, oldest first."""
    folder = index_folder(encoder, modality)
    current, before = current_version(store, folder), previous_version(store, folder)

    def state(version: str) -> str:
        if version in (current, before):
            return "current" if version == current else "previous"
        known = publication(store, folder, version)
        if known is None:
            return "built"
        return "withdrawn" if known.withdrawn else "published"

    whole = [
        Listed(version, state(version), read_release(store, encoder, modality, version))
        for version in finished(store, folder)
    ]
    begun = [Listed(version, "unfinished", None) for version in unfinished(store, folder)]
    return sorted([*whole, *begun], key=lambda listed: number_of(listed.version))
