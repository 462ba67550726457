"""The ledger: the commits of an output. Plan, commit, place, retire: pure functions over storage.

A commit is `commits/<family>/<shard>.<version>.<generation>.json`. One listing of the commits (and
one of the input) makes a plan; no commit is opened for it. Only what a commit names is ever placed
under a final name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pydantic import BaseModel

from pipelines.contracts import SAMPLES_FAMILY, Shard
from pipelines.errors import LedgerError, StorageError
from pipelines.storage import Store, is_whole_json

COMMITS, RETIRED, STAGING = "commits", "retired", "staging"
_SLICE = re.compile(r"(.+)-s\d+(of\d+)")


class Part(BaseModel):
    """A file of a commit: where the merge put it, and the final name it is placed under."""

    dataset: str
    staged: str
    final: str
    rows: int
    bytes: int
    sha256: str


class Counts(BaseModel):
    """Items of one modality. items = embedded + rejected + removed; absent are samples without it."""

    items: int = 0
    embedded: int = 0
    rejected: int = 0
    removed: int = 0
    absent: int = 0

    def plus(self, other: Counts) -> Counts:
        return Counts(**{name: value + getattr(other, name) for name, value in self})


class Commit(BaseModel):
    """That a family of a shard's version is done.

    attempt: who made it. rows: of the shard; removed: those of them that are not in its parts because they were taken
    down. reasons: rejects by reason.
    """

    family: str
    shard: str
    version: str
    generation: int
    uri: str
    fingerprint: str
    attempt: str
    rows: int
    removed: int = 0
    parts: list[Part]
    counts: dict[str, Counts]
    reasons: dict[str, int] = {}

    @property
    def ref(self) -> CommitRef:
        return CommitRef(self.family, self.shard, self.version, self.generation)


class CommitRef(NamedTuple):
    """A commit by its name, all that a plan needs."""

    family: str
    shard: str
    version: str
    generation: int

    @property
    def path(self) -> str:
        return f"{COMMITS}/{self.family}/{self.shard}.{self.version}.{self.generation}.json"

    @property
    def stem(self) -> str:
        """Names the parts: a final name is only ever written with one set of bytes."""
        return f"{self.shard}.{self.version}.{self.generation}"

    @staticmethod
    def parse(family: str, name: str) -> CommitRef | None:
        shard, _, rest = name.removesuffix(".json").partition(".")
        version, _, generation = rest.partition(".")
        if not (name.endswith(".json") and shard and version and generation.isdigit()):
            return None
        return CommitRef(family, shard, version, int(generation))


@dataclass(frozen=True)
class Work:
    """A shard and the families that it still lacks."""

    shard: Shard
    families: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What a run has to do.

    changed: commits to retire as soon as a shard's new version commits. recut: of objects that are now cut
    into other pieces, to retire when these are all committed. superseded: commits to retire now. vanished:
    of shards that are not in the input. unplaced: commits whose staging is still there. generations: above 0
    where a version that was retired is done again, by (family, shard).
    """

    shards: list[Shard]
    pending: list[Work]
    changed: dict[str, list[CommitRef]] = field(default_factory=dict)
    recut: list[CommitRef] = field(default_factory=list)
    superseded: list[CommitRef] = field(default_factory=list)
    vanished: list[CommitRef] = field(default_factory=list)
    unplaced: list[CommitRef] = field(default_factory=list)
    generations: dict[tuple[str, str], int] = field(default_factory=dict)

    @property
    def done(self) -> int:
        return len(self.shards) - len(self.pending)


def staging_folder(family: str, shard: str, version: str, fingerprint: str) -> str:
    return f"{STAGING}/{family}/{shard}.{version}.{fingerprint[:12]}"


def list_commits(store: Store, family: str, top: str = COMMITS) -> Iterator[CommitRef]:
    """Every commit of a family, from names alone."""
    for name in store.names(f"{top}/{family}"):
        ref = CommitRef.parse(family, name)
        if ref:
            yield ref


def standing_commits(store: Store, family: str) -> list[CommitRef]:
    """The highest generation of each shard's version, but for those that are being retired."""
    retired = set(list_commits(store, family, RETIRED))
    refs = sorted(set(list_commits(store, family)) - retired, key=lambda ref: ref.generation)
    return sorted({(ref.shard, ref.version): ref for ref in refs}.values())


def read_commit(store: Store, ref: CommitRef, listed: bool = False) -> Commit:
    """listed: it is known to be there. Raises: FileNotFoundError; LedgerError where it is not a commit."""
    return _parse(store.read(ref.path, is_whole_json, listed), store.uri(ref.path))


def read_commits(store: Store, refs: Iterable[CommitRef]) -> Iterator[Commit]:
    """Those that another run retires meanwhile are left out."""
    paths = [ref.path for ref in refs]
    for path, data in zip(paths, store.read_listed(paths, is_whole_json), strict=True):
        if data is not None:
            yield _parse(data, store.uri(path))


def _parse(data: bytes, uri: str) -> Commit:
    try:
        return Commit.model_validate_json(data)
    except ValueError as error:
        raise LedgerError(f"{uri} is not a commit: {error}", "Move it away; its shard will be done again.") from None


def make_plan(store: Store, shards: list[Shard], families: Iterable[str], others: Iterable[str] = ()) -> Plan:
    """What `shards` still lack of `families`, by listing names only.

    others: families that the run does not write, but whose commits of older versions go with the samples'.
    """
    versions = {shard.id: shard.version for shard in shards}
    lacking: dict[str, list[str]] = defaultdict(list)
    plan = Plan(shards, [], defaultdict(list))
    for family in families:
        standing = _standing(store, family, versions, plan)
        for shard in shards:
            if (shard.id, shard.version) not in standing:
                lacking[shard.id].append(family)
        _sort_out(standing, standing.keys(), versions, staged(store, family), plan)
    if others:
        replaced = {(ref.shard, ref.version) for ref in list_commits(store, SAMPLES_FAMILY)}
        for family in others:
            _sort_out(_standing(store, family, {}, plan), replaced, versions, staged(store, family), plan)
    plan.pending.extend(Work(shard, tuple(lacking[shard.id])) for shard in shards if shard.id in lacking)
    return plan


def staged(store: Store, family: str) -> set[str]:
    """`shard.version` of every staging folder."""
    return {name.split("/")[0].rpartition(".")[0] for name in store.names(f"{STAGING}/{family}")}


def _standing(store: Store, family: str, versions: dict[str, str], plan: Plan) -> dict[tuple[str, str], CommitRef]:
    """The highest generation of each version; the others, and those half retired, are superseded."""
    retired = set(list_commits(store, family, RETIRED))
    for ref in retired:
        if versions.get(ref.shard) == ref.version:
            at = (family, ref.shard)
            plan.generations[at] = max(plan.generations.get(at, 0), ref.generation + 1)
    standing: dict[tuple[str, str], CommitRef] = {}
    for ref in sorted(list_commits(store, family), key=lambda ref: ref.generation):
        lower = standing.get((ref.shard, ref.version))
        if ref in retired:
            plan.superseded.append(ref)
            continue
        if lower:
            plan.superseded.append(lower)
        standing[ref.shard, ref.version] = ref
    return standing


def _sort_out(
    standing: dict[tuple[str, str], CommitRef],
    committed: Collection[tuple[str, str]],
    versions: dict[str, str],
    in_staging: set[str],
    plan: Plan,
) -> None:
    """Files each standing commit: current (perhaps unplaced), of an older version, or of a vanished shard.

    committed: the shards and versions that older ones give way to.
    """
    objects = {object_of(shard) for shard in versions}
    for (shard, version), ref in standing.items():
        current = versions.get(shard)
        if current == version:
            if f"{shard}.{version}" in in_staging:
                plan.unplaced.append(ref)
        elif current is None:
            (plan.recut if object_of(shard) in objects else plan.vanished).append(ref)
        elif (shard, current) in committed:
            plan.superseded.append(ref)
        else:
            plan.changed[shard].append(ref)


def object_of(shard: str) -> str:
    """A shard's id without its piece: two pieces of one object, cut differently, share it."""
    head, _, piece = shard.rpartition("-")
    return head if piece[:1] in ("p", "s") and piece[1:5].isdigit() else shard


def cut_of(shard: str) -> str:
    """The same of two shards where none ever holds what the other did: slices of one cut, by key, of one object.

    Pieces of a Parquet file trade rows as it changes, so that each is a cut of its own.
    """
    slice_ = _SLICE.fullmatch(shard)
    return f"{slice_[1]}-{slice_[2]}" if slice_ else shard


def commit(store: Store, candidate: Commit) -> Commit:
    """The commit that stands: ours, or another attempt's that was there first. Raises: LedgerError.

    "Already there" with our own attempt in it means that we won and the acknowledgement was lost.
    """
    if store.put_if_absent(candidate.ref.path, candidate.model_dump_json(indent=1).encode()):
        return candidate
    standing = read_commit(store, candidate.ref, listed=True)
    if standing.fingerprint != candidate.fingerprint:
        raise LedgerError(
            f"{store.uri(candidate.ref.path)} was made by another encoder (fingerprint {standing.fingerprint[:12]})",
            "Another run writes to this output under the same name; give one of them another with --name.",
        )
    return standing


def place(store: Store, standing: Commit, fingerprint: str | None = None) -> None:
    """Copies what the commit names to its final names, then drops the staging folder.

    May be done by several at once and any number of times. What lies at a final name already gives way to what is
    staged: it may be damaged, or of a commit that was moved away. Raises: LedgerError where a part is neither in
    staging nor in place.
    """
    for part in standing.parts:
        try:
            _put_in_place(store, part)
        except FileNotFoundError:
            raise LedgerError(
                f"{store.uri(part.final)} is named by a commit but is not there",
                f"Move {store.uri(standing.ref.path)} away and run again: its shard will be done again.",
            ) from None
        require_placed(store, part)
    store.delete_folder(
        staging_folder(standing.family, standing.shard, standing.version, fingerprint or standing.fingerprint)
    )


def _put_in_place(store: Store, part: Part) -> None:
    """Raises: FileNotFoundError where it is in neither place."""
    try:
        store.copy(part.staged, part.final)
    except FileNotFoundError:
        # Another has placed it and cleared the staging; or the store has yet to find what was put there.
        if not _is_placed(store, part):
            store.copy(part.staged, part.final, listed=True)


def require_placed(store: Store, part: Part) -> None:
    """Of a part that was just copied. Raises: StorageError."""
    there = store.stat(part.final, listed=True).bytes
    if there != part.bytes:
        raise StorageError(
            f"{store.uri(part.final)} has {there} bytes after it was copied, of {part.bytes}",
            "Run the same command again.",
        )


def _is_placed(store: Store, part: Part) -> bool:
    try:
        return store.stat(part.final).bytes == part.bytes
    except FileNotFoundError:
        return False


def retire(store: Store, ref: CommitRef) -> None:
    """Takes a commit's parts away and moves it to `retired/`; finished by the next plan if it dies."""
    try:
        old = read_commit(store, ref)
    except FileNotFoundError:
        return
    store.put_atomic(ref.path.replace(COMMITS, RETIRED, 1), old.model_dump_json().encode())
    store.delete(part.final for part in old.parts)
    store.delete([ref.path])


def settle(store: Store, plan: Plan) -> None:
    """Finishes what a run that died left half-way: placements, and retiring commits that others stand for."""
    for ref in [*plan.superseded, *([] if plan.pending else plan.recut)]:
        retire(store, ref)
    for standing in read_commits(store, plan.unplaced):
        place(store, standing)


def finish(store: Store) -> None:
    """As `settle`, of every family and whatever the input is. Placements lie in the staging of what is committed."""
    families = families_of(store)
    for ref in make_plan(store, [], families).superseded:
        retire(store, ref)
    for family in families:
        in_staging = staged(store, family)
        unplaced = (ref for ref in list_commits(store, family) if f"{ref.shard}.{ref.version}" in in_staging)
        for standing in read_commits(store, unplaced):
            place(store, standing)


def families_of(store: Store) -> list[str]:
    """All that have, or had, a commit."""
    names = (name for top in (COMMITS, RETIRED) for name in store.names(top))
    return sorted({name.split("/")[0] for name in names if "/" in name})


def conclude(store: Store, plan: Plan, families: Iterable[str]) -> list[Work]:
    """What is still pending at a run's end. Where nothing is, what the plan replaces is retired.

    Only what the plan itself names: since it was made, another run may have committed newer versions.
    """
    after = make_plan(store, plan.shards, families)
    for standing in read_commits(store, after.unplaced):
        place(store, standing)
    if not after.pending:
        for ref in [*plan.recut, *(ref for refs in plan.changed.values() for ref in refs)]:
            retire(store, ref)
    return after.pending


def tally(store: Store, families: Iterable[str]) -> tuple[dict[str, Counts], dict[str, int], int]:
    """Over the whole ledger of some encoders: counts by modality, rejects by reason, shards."""
    counts: dict[str, Counts] = defaultdict(Counts)
    reasons: dict[str, int] = defaultdict(int)
    shards = 0
    for family in families:
        for done in read_commits(store, list_commits(store, family)):
            shards += 1
            for modality, more in done.counts.items():
                counts[modality] = counts[modality].plus(more)
            for reason, number in done.reasons.items():
                reasons[reason] += number
    return dict(counts), dict(reasons), shards
