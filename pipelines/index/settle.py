"""What becomes of a release that is whole: the current one, unless something bars it."""

from __future__ import annotations

from pipelines.config import IndexConfig
from pipelines.index.attempt import Progress
from pipelines.index.current import advance, current_version, publication
from pipelines.index.manifest import Release, index_folder
from pipelines.index.publish import delete_superseded, make_current, require_publishable
from pipelines.index.versions import number_of
from pipelines.storage import Store


def settle(store: Store, release: Release, settings: IndexConfig, progress: Progress) -> Release:
    """Publishes the newest release, unless it was so before: what was rolled back does not come again by itself."""
    if not _had_its_turn(store, release, progress):
        require_publishable(store, release, settings.floor)
        # Looked at again: that took a while, in which another build may have been published.
        if not _had_its_turn(store, release, progress):
            make_current(store, release, settings.keep, progress, advance)
    elif current_version(store, index_folder(release.encoder, release.modality)) == release.version:
        # Whoever made it so may have died before this was through.
        delete_superseded(store, release, settings.keep, progress)
    return release


def _had_its_turn(store: Store, release: Release, progress: Progress) -> bool:
    """Whether it is the current release, was and was rolled back, or a later build is."""
    home = index_folder(release.encoder, release.modality)
    current, known = current_version(store, home), publication(store, home, release.version)
    if current and number_of(current) > number_of(release.version):
        progress(f"{current}, which another build began later, is the current release")
        return True
    if current != release.version and known and known.withdrawn:
        progress(f"{current} is the current release: {release.version} was, and was rolled back")
        return True
    return current == release.version
