"""`CURRENT`: which release is the one to search, how that changes, and what it was before."""

from __future__ import annotations

from contextlib import suppress

from pydantic import BaseModel

from pipelines.index.versions import VERSION_NAME, finished, number_of
from pipelines.storage import Store, is_whole_json

POINTER, PUBLISHED = "CURRENT", "published"


class Publication(BaseModel):
    """Why a release is, was or will in a moment be the current one. before: the one that was so until then.

    withdrawn: an older one has taken its place again, so that it does not come back by itself. floor: of recall@10,
    that it was accepted with, where it was published by hand.
    """

    before: str | None = None
    withdrawn: bool = False
    floor: float | None = None


def point_at(store: Store, folder: str, version: str) -> None:
    """Makes a release current, once it is noted which one was before, so that a rollback finds its way."""
    current = current_version(store, folder)
    if current != version:
        _note(store, folder, version, Publication(before=current))
        swap(store, folder, version)


def advance(store: Store, folder: str, version: str) -> None:
    """As `point_at`, but never back: of builds that end at the same moment the newest is the current one in the end.

    Each notes itself before it moves the pointer, and looks for newer notes once it has.
    """
    current = current_version(store, folder)
    if current and number_of(current) >= number_of(version):
        return
    _note(store, folder, version, Publication(before=current))
    store.put_atomic(f"{folder}/{POINTER}", version.encode())
    for newer in finished(store, folder):
        known = publication(store, folder, newer)
        if number_of(newer) > number_of(version) and known and not known.withdrawn:
            store.put_atomic(f"{folder}/{POINTER}", newer.encode())


def swap(store: Store, folder: str, version: str) -> None:
    """Points `CURRENT` at a release: readers see the one before or this one, and nothing between."""
    current = current_version(store, folder)
    if current and number_of(current) > number_of(version):
        known = publication(store, folder, current) or Publication()
        _note(store, folder, current, known.model_copy(update={"withdrawn": True}))
    store.put_atomic(f"{folder}/{POINTER}", version.encode())


def note_floor(store: Store, folder: str, version: str, floor: float) -> None:
    """That a release was accepted with this floor, which what grows from it is held to as well."""
    known = publication(store, folder, version) or Publication()
    _note(store, folder, version, known.model_copy(update={"floor": floor}))


def publication(store: Store, folder: str, version: str) -> Publication | None:
    """None for a release that nobody has begun to publish."""
    with suppress(FileNotFoundError):
        return Publication.model_validate_json(store.read(f"{folder}/{PUBLISHED}/{version}.json", is_whole_json))
    return None


def _note(store: Store, folder: str, version: str, publication: Publication) -> None:
    store.put_atomic(f"{folder}/{PUBLISHED}/{version}.json", publication.model_dump_json().encode())


def previous_version(store: Store, folder: str) -> str | None:
    """The one that was current before the current one was published, None where there was none."""
    current = current_version(store, folder)
    known = publication(store, folder, current) if current else None
    return known.before if known else None


def current_version(store: Store, folder: str) -> str | None:
    with suppress(FileNotFoundError):
        return store.read(f"{folder}/{POINTER}", _is_version).decode().strip()
    return None


def _is_version(data: bytes) -> bool:
    return bool(VERSION_NAME.fullmatch(data.decode(errors="replace").strip()))
