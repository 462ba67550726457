"""Releases as a whole: how one is finished, and how one is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from pydantic import ValidationError

from pipelines.errors import IndexBuildError
from pipelines.index.current import current_version, point_at
from pipelines.index.manifest import MANIFEST, MERGED, KeptFile, Merged, Release, index_folder
from pipelines.index.versions import finished, number_of
from pipelines.storage import Store, is_whole_json


def finish(store: Store, release: Release, publish: bool = True) -> None:
    """Writes the manifest, after which the release never changes, and then points `CURRENT` at it."""
    manifest = release.model_dump_json(indent=1).encode()
    path = f"{release.folder}/{MANIFEST}"
    if not store.put_if_absent(path, manifest) and store.read(path) != manifest:
        raise IndexBuildError(f"{store.uri(path)} is there already", "Another build took this version; index again.")
    folder = index_folder(release.encoder, release.modality)
    current = current_version(store, folder)
    # A slower build that began earlier does not turn the pointer back.
    if publish and (current is None or number_of(current) < number_of(release.version)):
        point_at(store, folder, release.version)


def read_release(store: Store, encoder: str, modality: str, version: str | None = None) -> Release:
    """The named version, or the one that `CURRENT` points at. Raises: IndexBuildError where there is none."""
    folder = index_folder(encoder, modality)
    version = version or current_version(store, folder)
    if version is None:
        if unpublished := finished(store, folder):
            raise IndexBuildError(
                f"{store.uri(folder)} has {', '.join(unpublished)}, and none is published",
                "See `vecmill releases`, then `vecmill publish`.",
            )
        raise IndexBuildError(f"{store.uri(folder)} has no index", "Run `vecmill index` first, or search with --exact.")
    path = f"{folder}/{version}/{MANIFEST}"
    try:
        return Release.model_validate_json(store.read(path, is_whole_json))
    except FileNotFoundError:
        raise IndexBuildError(
            f"{store.uri(path)} does not exist", f"See the versions in {store.uri(folder)}."
        ) from None
    except ValidationError as error:
        raise IndexBuildError(f"{store.uri(path)} is not a manifest: {error}", "Index again with --force.") from None


def latest_or_none(store: Store, encoder: str, modality: str) -> Release | None:
    """The current release, None before the first."""
    known = current_version(store, index_folder(encoder, modality))
    return read_release(store, encoder, modality, known) if known else None


def newest_or_none(store: Store, encoder: str, modality: str) -> Release | None:
    """The release that was built last, published or not, None before the first."""
    return next(releases(store, encoder, modality), None)


def releases(store: Store, encoder: str, modality: str) -> Iterator[Release]:
    """All there are, published or not, the newest first."""
    for version in reversed(finished(store, index_folder(encoder, modality))):
        yield read_release(store, encoder, modality, version)


def merged_files(store: Store, release: Release) -> tuple[KeptFile, ...]:
    """None where the index shards were not merged, or not to the end."""
    with suppress(FileNotFoundError):
        return Merged.model_validate_json(store.read(f"{release.folder}/{MERGED}", is_whole_json)).files
    return ()
