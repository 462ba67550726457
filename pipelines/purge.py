"""The whole of a compaction: what was taken down leaves the parts, the index releases and what dead runs have left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.collect import Leftover, clear, leftovers
from pipelines.compact import Holding, compact_parts, holdings
from pipelines.contracts import FINDINGS
from pipelines.errors import IndexBuildError
from pipelines.index.current import current_version
from pipelines.index.manifest import index_folder
from pipelines.index.parts import NoVectorsError, embeddings_folder, list_parts
from pipelines.index.publish import delete_release, holding_removed, withdraw
from pipelines.index.versions import index_homes
from pipelines.lease import COLLECT, Say, held
from pipelines.storage import Store
from pipelines.takedowns import note_compacted, requests


@dataclass(frozen=True)
class Home:
    """An index with releases that hold removed vectors. current: the one of them that searches use, if it is one.

    replaceable: there are vectors left that a new release can be built of.
    """

    encoder: str
    modality: str
    holders: list[str]
    current: str | None
    replaceable: bool

    @property
    def folder(self) -> str:
        return index_folder(self.encoder, self.modality)

    def doomed(self, drop: bool) -> list[str]:
        """Releases to delete: all, but for one that is in use and waits for another to take its place."""
        return [version for version in self.holders if drop or not self.replaceable or version != self.current]


@dataclass(frozen=True)
class Purge:
    """What a compaction does, or would do. drop: the current releases go too where nothing takes their place yet."""

    holdings: list[Holding]
    homes: list[Home]
    leftovers: list[Leftover]
    findings: list[str]
    drop: bool

    @property
    def releases(self) -> list[str]:
        return [f"{home.folder}/{version}" for home in self.homes for version in home.doomed(self.drop)]

    @property
    def waiting(self) -> list[Home]:
        """Whose current release holds removed vectors, and stays until another is built."""
        return [home for home in self.homes if home.current and home.current not in home.doomed(self.drop)]


def plan_purge(store: Store, drop: bool = False) -> Purge:
    """What `purge` would do. Changes nothing."""
    return Purge(list(holdings(store)), list(_homes(store)), leftovers(store), _findings(store, waiting(store)), drop)


def purge(store: Store, drop: bool = False, say: Say = lambda line: None) -> Purge:
    """Drops what was taken down from every file. Dies at any moment, and is run again, without harm.

    drop: current index releases go too. Raises: HeldError while a run is at work on the output: what it holds in
    staging would come after.
    """
    with held(store, COLLECT, "remove", excludes=lambda other: True, say=say):
        left = leftovers(store)
        asked = waiting(store)
        written = compact_parts(store, lambda holding: say(f"wrote {holding.told} again"))
        done = Purge(written, list(_homes(store)), left, _findings(store, asked), drop)
        for home in done.homes:
            _drop(store, home, drop, say)
        for folder in done.findings:
            say(f"deleting {folder}/, which may tell of what was taken down")
            store.delete_folder(folder)
        clear(store)
        note_compacted(store, asked)
    return done


def require_no_holders(store: Store, done: Purge) -> None:
    """Raises: IndexBuildError naming what is to be done about releases that searches still use."""
    if done.waiting:
        names = ", ".join(f"{home.folder}/{home.current}" for home in done.waiting)
        commands = "\n  ".join(
            f"`vecmill index {store.root} --encoder {home.encoder} --modality {home.modality}`" for home in done.waiting
        )
        raise IndexBuildError(
            f"{names}: vectors of what was taken down are in the current release, though no search shows them",
            "Build another, at whose publication it goes:\n  "
            f"{commands}\n  or delete it without another: `vecmill remove {store.root} --compact --drop-releases`.",
        )


def _homes(store: Store) -> Iterator[Home]:
    for encoder, modality in index_homes(store):
        folder = index_folder(encoder, modality)
        if holders := holding_removed(store, encoder, modality):
            current = current_version(store, folder)
            in_use = current if current in holders else None
            yield Home(encoder, modality, holders, in_use, _has_vectors(store, encoder, modality))


def _has_vectors(store: Store, encoder: str, modality: str) -> bool:
    try:
        return list_parts(store, embeddings_folder(encoder, modality)).rows > 0
    except NoVectorsError:
        return False


def _drop(store: Store, home: Home, drop: bool, say: Say) -> None:
    for version in home.doomed(drop):
        if version == home.current:
            withdraw(store, home.folder)
        say(f"deleting {home.folder}/{version}, which holds vectors of what was taken down")
        delete_release(store, home.folder, version)


def _findings(store: Store, asked: list[str]) -> list[str]:
    """They name and show samples, and nothing tells which: all go, where something is asked for."""
    return [folder for folder in FINDINGS if asked and store.names(folder)]


def waiting(store: Store) -> list[str]:
    """Requests that no compaction has met yet."""
    return [id for id, compacted in requests(store).items() if not compacted]
