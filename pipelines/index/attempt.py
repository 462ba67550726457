"""A build's version and what of it is done, so that a build that died is taken up and not begun again.

Under `staging/index/<encoder>/<modality>/<version>/<attempt>/` lies a note of each step that is through: what was
learnt, and each index shard once its files are in their place.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from pydantic import BaseModel

from pipelines.errors import HeldError
from pipelines.index.arrays import put_arrays, read_arrays
from pipelines.index.manifest import Coding, IndexShard, KeptFile
from pipelines.index.queries import Queries
from pipelines.index.recall import Top
from pipelines.index.versions import claim_of, claim_version, unfinished
from pipelines.lease import held
from pipelines.storage import Store

Progress = Callable[[str], None]


class Learnt(BaseModel):
    """What a build knows before it fills its index shards. seconds, peak_mib: of the stages that this took."""

    trained: KeptFile
    coding: Coding | None
    seconds: dict[str, float]
    peak_mib: dict[str, float]


@dataclass(frozen=True)
class Filled:
    """An index shard in its place, and what the one pass over its parts found besides.

    truth: the exact nearest of each query among these parts.
    """

    shard: IndexShard
    truth: Top
    peak_mib: float


@dataclass(frozen=True)
class Attempt:
    """A version that this build alone is at. home: `index/<encoder>/<modality>`. id: no other's, so that no other's
    notes are taken for its own. taken_up: begun by one that died."""

    store: Store
    home: str
    version: str
    id: str
    taken_up: bool = False

    @property
    def folder(self) -> str:
        return f"{self.home}/{self.version}"

    @property
    def staging(self) -> str:
        return f"staging/{self.folder}/{self.id}"

    @property
    def bytes(self) -> int:
        """What lies there of it."""
        return sum(size for _, size in self.store.sizes(self.folder))

    def note_of(self, shard: str) -> str:
        """Path of the note on an index shard, `shard-0000.faiss`."""
        return f"{self.staging}/{shard.removesuffix('.faiss')}.npz"

    def keep_learnt(self, learnt: Learnt, queries: Queries) -> None:
        arrays = {f"kind_{kind}": asked for kind, asked in queries.kinds.items()}
        put_arrays(self.store, self._learnt, learnt.model_dump(), {"ids": queries.ids, **arrays})

    def learnt(self) -> tuple[Learnt, Queries] | None:
        """None where the training is still to be done."""
        if self._learnt not in self._notes():
            return None
        facts, arrays = read_arrays(self.store, self._learnt)
        kinds = {name.removeprefix("kind_"): array for name, array in arrays.items() if name.startswith("kind_")}
        return Learnt.model_validate(facts), Queries(kinds, arrays["ids"])

    def filled(self) -> Iterator[Filled]:
        """The index shards that are through, one at a time."""
        notes, sizes = self._notes(), dict(self.store.sizes(self.folder))
        found = (filled_of(self.store, note) for note in sorted(notes - {self._learnt}))
        return (each for each in found if self._is_whole(each.shard, sizes))

    def clear(self) -> None:
        """Takes back all of it; the notes first, which stand for files that are there."""
        self.store.delete_folder(self.staging)
        self.store.delete_folder(self.folder)

    @property
    def _learnt(self) -> str:
        return f"{self.staging}/learnt.npz"

    def _notes(self) -> set[str]:
        return {f"{self.staging}/{name}" for name in self.store.names(self.staging) if name.endswith(".npz")}

    def _is_whole(self, shard: IndexShard, sizes: dict[str, int]) -> bool:
        return all(sizes.get(f"{self.folder}/{file.file}") == file.bytes for file in (shard, shard.side) if file)


@contextmanager
def attempted(store: Store, home: str, plan: str, say: Progress) -> Iterator[Attempt]:
    """A version for this build alone: one of the same plan whose builder has died, else the next.

    plan: digest of all that decides what is built.
    """
    with ExitStack() as stack:
        for version in reversed(unfinished(store, home)):
            begun = claim_of(store, home, version)
            if begun is None or begun.plan != plan:
                continue
            # Looked at again: its builder may have ended since, and not have died.
            if _is_ours(stack, store, home, version, say) and version in unfinished(store, home):
                say(f"{home}/{version} was begun by a build that died: it goes on from there")
                yield Attempt(store, home, version, begun.attempt, taken_up=True)
                return
        id = uuid.uuid4().hex
        version = claim_version(store, home, id, plan)
        while not _is_ours(stack, store, home, version, say):
            version = claim_version(store, home, id, plan)
        yield Attempt(store, home, version, id)


def _is_ours(stack: ExitStack, store: Store, home: str, version: str, say: Progress) -> bool:
    """Whether no living build holds the version, which this one does from now on."""
    name = f"index/{'.'.join([*home.split('/')[1:], version])}"
    try:
        stack.enter_context(held(store, name, "index", excludes=lambda other: False, say=say))
    except HeldError:
        return False
    return True


def keep_filled(store: Store, note: str, filled: Filled) -> None:
    facts = {"shard": filled.shard.model_dump(), "peak_mib": filled.peak_mib}
    put_arrays(store, note, facts, {"ids": filled.truth.ids, "scores": filled.truth.scores})


def filled_of(store: Store, note: str) -> Filled:
    facts, arrays = read_arrays(store, note)
    shard = IndexShard.model_validate(facts["shard"])
    return Filled(shard, Top(arrays["ids"], arrays["scores"]), facts["peak_mib"])
