"""The versions of an index: how one is claimed, which are finished, and which were begun alone."""

from __future__ import annotations

import re
from contextlib import suppress

from pydantic import BaseModel

from pipelines.index.manifest import MANIFEST
from pipelines.storage import Store, is_whole_json

CLAIM = "build.json"
ID_SPACES = "id_spaces"
VERSION_NAME = re.compile(r"v\d{4,}")


def index_homes(store: Store) -> list[tuple[str, str]]:
    """(encoder, modality) of every index that was ever begun."""
    paths = (name.split("/") for name in store.names("index"))
    return sorted({(path[0], path[1]) for path in paths if len(path) > 2})


def claim_version(store: Store, folder: str, attempt: str, plan: str = "") -> str:
    """The name of a version that no other builder gets: `v0001` or the next free. plan: digest of what it will be."""
    # A note that one was published outlives it: what was so named once never means another release.
    taken = {step.removesuffix(".json") for name in store.names(folder) for step in name.split("/")[:2]}
    number = max((int(name[1:]) for name in taken if VERSION_NAME.fullmatch(name)), default=0)
    while True:
        number += 1
        version = f"v{number:04d}"
        path, claim = f"{folder}/{version}/{CLAIM}", Claim(attempt=attempt, plan=plan).model_dump_json().encode()
        # Not put, and yet ours: the acknowledgement of an earlier try was lost.
        if store.put_if_absent(path, claim) or store.read(path) == claim:
            return version


def claim_id_space(store: Store, folder: str, least: int = 1) -> int:
    """One that no release had or will have, `least` or higher, whatever has been deleted since."""
    taken = [int(name.rpartition("/")[2]) for name in store.names(folder) if name.startswith(f"{ID_SPACES}/")]
    claimed = max([least, *(number + 1 for number in taken)])
    while not store.put_if_absent(f"{folder}/{ID_SPACES}/{claimed}", b""):
        claimed += 1
    return claimed


class Claim(BaseModel):
    """Who began a version. attempt: no other's. plan: digest of what it will be."""

    attempt: str = ""
    plan: str = ""


def claim_of(store: Store, folder: str, version: str) -> Claim | None:
    """What a version was claimed with; None where that is gone."""
    with suppress(FileNotFoundError):
        return Claim.model_validate_json(store.read(f"{folder}/{version}/{CLAIM}", is_whole_json))
    return None


def unfinished(store: Store, folder: str) -> list[str]:
    """Versions of which there is anything but a manifest: being built now, or left by a build or deletion that died."""
    names = set(store.names(folder))
    begun = {name.split("/")[0] for name in names if "/" in name and VERSION_NAME.fullmatch(name.split("/")[0])}
    return sorted((version for version in begun if f"{version}/{MANIFEST}" not in names), key=number_of)


def number_of(version: str) -> int:
    return int(version[1:])


def finished(store: Store, folder: str) -> list[str]:
    """Versions that have a manifest, oldest first: releases, whether published or not."""
    names = (name.split("/") for name in store.names(folder))
    whole = [name[0] for name in names if name[1:] == [MANIFEST] and VERSION_NAME.fullmatch(name[0])]
    return sorted(whole, key=number_of)
