"""After a compaction nothing of what was taken down is left in any file, whenever it dies on the way."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import WriteConfig
from pipelines.contracts import Shard
from pipelines.errors import HeldError, IndexBuildError, LedgerError
from pipelines.index.build import drop_removed
from pipelines.index.current import POINTER, current_version
from pipelines.index.manifest import index_folder
from pipelines.index.parts import embeddings_folder, list_parts
from pipelines.index.publish import holding_removed
from pipelines.index.versions import finished
from pipelines.lease import held
from pipelines.ledger import RETIRED, make_plan, read_commit, standing_commits
from pipelines.merge import put_fragments
from pipelines.purge import plan_purge, purge, require_no_holders
from pipelines.remove import Asked, remove
from pipelines.storage import Store
from pipelines.takedowns import note_compacted, read_takedowns, requests
from pipelines.verify import problems
from pipelines.write import EmbeddingSink
from tests import encoded
from tests.indexed import ENCODER, VERSION, caption_of, everything, key_of, part_name, shard_id
from tests.traces import Sought, traces
from tests.unit.test_search import write_release

GONE = [(0, 199), (2, 196), (2, 199)]
KEYS = [key_of(*place) for place in GONE]
HOME = index_folder(ENCODER, "image")


def sought(root: Path) -> Sought:
    texts = [caption_of(*place, index) for place in GONE for index in range(2)]
    vectors = [
        vector
        for modality in ("image", "text")
        for item, vector in zip(*everything(root, modality), strict=True)
        if item.key in KEYS
    ]
    assert len(vectors) == 3 * (1 + 2)
    return Sought([*KEYS, *texts], np.stack(vectors))


@pytest.fixture
def output(tmp_path: Path) -> tuple[Store, Sought]:
    """Two samples of one shard and one of another are removed; a run that died has left fragments of one,
    and one of them has been found to be a duplicate."""
    store = write_release(tmp_path)
    rows = pa.table({"row": [199], "key": [KEYS[0]], "captions": [[caption_of(*GONE[0], 0)]]})
    put_fragments(store, f"staging/{ENCODER}/{shard_id(0)}.{VERSION}x.ffffffffffff", rows, None)
    store.put_atomic(f"duplicates/{ENCODER}/image/remove.txt", KEYS[0].encode())
    what = sought(tmp_path)
    remove(store, Asked(KEYS), "", "")
    return store, what


def test_nothing_is_left_in_any_file(output: tuple[Store, Sought]) -> None:
    store, what = output
    before = traces(store, what)
    assert {path.split("/")[0] for path in before} == {"samples", "embeddings", "index", "staging", "duplicates"}
    assert sum(path.endswith(".faiss") for path in before) == 2
    assert purge(store, drop=True).releases == [f"{HOME}/v0001"]
    assert traces(store, what) == set() == set(store.names("staging")) == set(store.names(RETIRED))
    assert read_takedowns(store).samples() == 3 and read_takedowns(store).samples(waiting=True) == 0
    assert list(problems(store)) == []


def test_what_stays_stays_as_it_was(output: tuple[Store, Sought]) -> None:
    store, _ = output
    root = Path(store.root)
    before = {modality: everything(root, modality) for modality in ("image", "text")}
    formats = pq.read_schema(next((root / "samples").glob("*.parquet")))
    purge(store)
    for modality, (items, vectors) in before.items():
        kept = [at for at, item in enumerate(items) if item.key not in KEYS]
        after, same = everything(root, modality)
        assert after == [items[at] for at in kept] and (same == vectors[kept]).all()
    assert all(
        pq.read_schema(path).equals(formats, check_metadata=True) for path in (root / "samples").glob("*.parquet")
    )
    shards = [Shard(shard_id(at), "", "tar", VERSION, 1) for at in range(4)]
    assert not make_plan(store, shards, ["samples", ENCODER]).pending, "nothing is embedded again"


def test_a_current_release_stays_until_another_is_there(output: tuple[Store, Sought]) -> None:
    store, what = output
    done = purge(store)
    assert done.releases == [] and current_version(store, HOME) == "v0001"
    assert {path.split("/")[0] for path in traces(store, what)} == {"index"}
    with pytest.raises(
        IndexBuildError, match=rf"(?s){HOME}/v0001.*vecmill index .* --encoder {ENCODER} --modality image"
    ):
        require_no_holders(store, done)
    assert holding_removed(store, ENCODER, "image") == ["v0001"]


def test_releases_that_are_not_in_use_go_at_once(output: tuple[Store, Sought]) -> None:
    store, _ = output
    store.delete([f"{HOME}/{POINTER}"])
    assert purge(store).releases == [f"{HOME}/v0001"] and not finished(store, HOME)


def test_a_dry_run_tells_it_all_and_changes_nothing(output: tuple[Store, Sought]) -> None:
    store, _ = output
    before = {name: store.read(name) for name in store.names("")}
    planned = plan_purge(store, drop=True)
    assert {name: store.read(name) for name in store.names("")} == before
    done = purge(store, drop=True)
    assert [holding.items for holding in planned.holdings] == [holding.items for holding in done.holdings]
    assert planned.releases == done.releases and planned.leftovers == done.leftovers != []


def test_it_waits_for_nobody_and_holds_nothing_that_is_in_use(output: tuple[Store, Sought]) -> None:
    store, _ = output
    with held(store, "embed/clip", "embed"), pytest.raises(HeldError, match="embed"):
        purge(store)


def test_what_is_asked_for_while_a_run_is_at_work_holds(output: tuple[Store, Sought]) -> None:
    store, _ = output
    with held(store, "embed/clip", "embed"):
        assert remove(store, Asked([key_of(1, 0)]), "", "").samples == 1


def test_what_comes_back_after_a_compaction_is_told(output: tuple[Store, Sought]) -> None:
    store, _ = output
    note_compacted(store, requests(store))
    assert [line.split(" (")[0] for line in problems(store) if "are back" in line] == 2 * [
        f"shard {shard_id(0)}",
        f"shard {shard_id(2)}",
    ]
    purge(store)
    assert not [line for line in problems(store) if "are back" in line]


def test_two_at_once_remove_the_same_samples_once(tmp_path: Path) -> None:
    store = write_release(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: remove(store, Asked(KEYS), "", ""), range(2)))
    assert {removal.samples + removal.before for removal in both} == {3} and read_takedowns(store).samples() == 3


def test_without_a_vector_left_the_index_goes_too(tmp_path: Path) -> None:
    store = write_release(tmp_path, parts=1, shards=1)
    remove(store, Asked([key_of(0, row) for row in range(200)]), "", "")
    done = purge(store)
    assert done.releases == [f"{HOME}/v0001"] and done.waiting == [] and current_version(store, HOME) is None
    require_no_holders(store, done)
    assert everything(tmp_path, "image")[0] == [] and list(problems(store)) == []


def test_rejects_go_and_are_counted(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    EmbeddingSink(store, encoded.FAMILIES, WriteConfig(rows_per_row_group=5)).write(
        [encoded.encoded_rows(range(23), 23)], None
    )
    store.put_atomic("run.json", b"{}")
    before = read_commit(store, standing_commits(store, encoded.ENCODER.name)[0])
    # 8: its image is a reject; 2: a caption is; 15: its image is absent.
    remove(store, Asked(["00008", "00002", "00015"]), "", "")
    purge(store)
    after = read_commit(store, standing_commits(store, encoded.ENCODER.name)[0])
    assert after.counts["image"].removed == 2 and after.counts["text"].removed == 2 + 2
    assert after.counts["image"].rejected == before.counts["image"].rejected - 1
    assert after.reasons == {name: count - 1 for name, count in before.reasons.items()}
    assert list(problems(store, deep=True)) == [] == plan_purge(store).holdings
    assert read_commit(store, standing_commits(store, "samples")[0]).removed == 3
    assert (
        traces(store, Sought(["00008", "00002", "00015", "caption 8.", "caption 2."], np.full((1, 4), 6e4, "f4")))
        == set()
    )


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it and go on."""


class Mortal(Store):
    """The real store; dies at the `left`-th change, and does nothing from then on. Leases of the dead do not matter."""

    left: list[int]

    def _step(self, path: str) -> None:
        if not path.startswith("leases/"):
            self.left[0] -= 1
            if self.left[0] < 0:
                raise Killed

    def put_atomic(self, path: str, data: Any) -> None:
        self._step(path)
        super().put_atomic(path, data)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        self._step(path)
        return super().put_if_absent(path, data)

    def copy(self, source: str, target: str, listed: bool = False) -> None:
        self._step(target)
        super().copy(source, target, listed)

    def delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            self._step(path)
            super().delete([path])


def mortal(root: str, steps: int) -> Mortal:
    store = Mortal(root)
    object.__setattr__(store, "left", [steps])
    return store


def test_it_may_die_at_any_change_and_be_run_again(output: tuple[Store, Sought]) -> None:
    """One life after the other is one change longer, until one goes through: each begins where the last one died."""
    store, what = output
    kept = {modality: len(everything(Path(store.root), modality)[0]) for modality in ("image", "text")}
    deaths = 0
    for steps in range(1, 200):
        try:
            purge(mortal(store.root, steps), drop=True)
            break
        except Killed:
            deaths += 1
            require_no_loss(store)
    assert deaths >= 8
    assert traces(store, what) == set() == set(store.names("staging"))
    assert list(problems(store)) == []
    for modality, lost in (("image", 3), ("text", 6)):
        assert len(everything(Path(store.root), modality)[0]) == kept[modality] - lost


def test_parts_that_an_index_writes_again_are_whole_wherever_it_dies(output: tuple[Store, Sought]) -> None:
    """As above; what it indexes in the end has one part a shard, without what was taken down."""
    store, _ = output
    rows = list_parts(store, embeddings_folder(ENCODER, "image")).rows
    deaths = 0
    for steps in range(1, 200):
        try:
            drop_removed(mortal(store.root, steps), lambda line: None)
            break
        except Killed:
            deaths += 1
            require_no_loss(store)
    assert deaths
    assert list_parts(store, embeddings_folder(ENCODER, "image")).rows == rows - 3
    assert len(list_parts(store, embeddings_folder(ENCODER, "text")).ranges) == 4


def require_no_loss(store: Store) -> None:
    """Each standing commit's parts are in place, or in staging."""
    for family in ("samples", ENCODER):
        refs = standing_commits(store, family)
        assert len(refs) == 4
        for ref in refs:
            for part in read_commit(store, ref).parts:
                assert store.exists(part.final) or store.exists(part.staged)


def test_nothing_is_called_compacted_while_a_part_cannot_be_looked_at(tmp_path: Path) -> None:
    store = write_release(tmp_path)
    remove(store, Asked([KEYS[1]]), "", "")
    (tmp_path / "embeddings" / ENCODER / "text" / part_name(2)).unlink()
    with pytest.raises(LedgerError, match="names a part that is gone"):
        plan_purge(store)
    with pytest.raises(LedgerError):
        purge(store)
    assert list(requests(store).values()) == [False]
    note_compacted(store, requests(store))
    assert any("names a part that is gone" in line for line in problems(store))
