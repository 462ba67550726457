"""Which ids a new release has: those of the one before while they stay valid, else a new space of its own."""

from __future__ import annotations

from pipelines.errors import IndexBuildError
from pipelines.index.attempt import Attempt, Progress
from pipelines.index.manifest import Release, index_folder
from pipelines.index.parts import Parts
from pipelines.index.release import newest_or_none, read_release
from pipelines.index.versions import claim_id_space, finished
from pipelines.storage import Store


def kept_id_space(latest: Release | None, parts: Parts, progress: Progress) -> int | None:
    """The latest's while its ids stay valid."""
    if latest is None:
        return None
    known = latest.parts.ranges
    if parts.ranges[: len(known)] == known:
        return latest.id_space
    progress("Parts of the latest release are gone or replaced: ids start anew")
    return None


def fresh_id_space(attempt: Attempt, encoder: str, modality: str) -> int:
    newest = newest_or_none(attempt.store, encoder, modality)
    return claim_id_space(attempt.store, attempt.home, newest.id_space + 1 if newest else 1)


def require_own_ids(store: Store, release: Release) -> None:
    """Raises: IndexBuildError where another build, that ran at the same time, gave these ids to other vectors."""
    ours = release.parts.ranges
    for each in finished(store, index_folder(release.encoder, release.modality)):
        other = read_release(store, release.encoder, release.modality, each)
        pairs = zip(ours, other.parts.ranges, strict=False)
        if other.id_space == release.id_space and any(
            (one.name, one.rows) != (two.name, two.rows) for one, two in pairs
        ):
            raise IndexBuildError(
                f"{other.folder}, which was built at the same time, has other vectors under the ids of this one",
                "Run the same command again: it goes on from there.",
            )
