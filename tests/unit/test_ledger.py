"""The ledger under every interleaving hypothesis can think of: each item ends up exactly once.

Two runs of the shipped code share an output. Before every storage call a scheduler decides which run
goes on, and whether the call dies before it, dies after it, or loses its acknowledgement and is done
again. Runs that die start again, with other block boundaries, until one goes through.
"""

import hashlib
import random
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.config import WriteConfig
from pipelines.contracts import Shard
from pipelines.errors import LedgerError
from pipelines.ledger import (
    CommitRef,
    Counts,
    conclude,
    list_commits,
    make_plan,
    place,
    read_commit,
    retire,
    settle,
    tally,
)
from pipelines.merge import _require_balance
from pipelines.storage import Store
from pipelines.verify import problems
from pipelines.write import EmbeddingSink
from tests.encoded import ENCODER, FAMILIES, encoded_row, encoded_rows

ROWS = 23
SHARDS = [Shard(f"{name}-000000000000", f"s3://bucket/{name}.tar", "tar", "v1", 1) for name in "ab"]
CALLS = {"read", "names", "stat", "put_atomic", "put_if_absent", "copy", "delete"}


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it and go on."""


class Scheduler:
    """Lets one of several threads make one storage call at a time, drawn from `seed`.

    fault_rate: share of the calls that die or lose their acknowledgement, for the first `faulty_calls`.
    """

    def __init__(self, seed: int, fault_rate: float, faulty_calls: int = 300) -> None:
        self._random, self._fault_rate, self._faulty_calls = random.Random(seed), fault_rate, faulty_calls
        self._turn = threading.Condition()
        self._waiting: set[str] = set()
        self._alive: set[str] = set()
        self._chosen: str | None = None

    def enter(self, runner: str) -> None:
        with self._turn:
            self._alive.add(runner)

    def leave(self, runner: str) -> None:
        with self._turn:
            self._alive.discard(runner)
            self._choose()

    def fault(self, runner: str) -> int:
        """Waits for its turn. 0: go on; 1: die before; 2: die after; 3: lose the acknowledgement."""
        with self._turn:
            self._waiting.add(runner)
            self._choose()
            assert self._turn.wait_for(lambda: self._chosen == runner, timeout=60), "the other run is stuck"
            self._waiting.discard(runner)
            self._chosen = None
            self._faulty_calls -= 1
            faulty = self._faulty_calls > 0 and self._random.random() < self._fault_rate
            return self._random.randint(1, 3) if faulty else 0

    def _choose(self) -> None:
        if self._chosen is None and self._waiting and self._waiting >= self._alive:
            self._chosen = self._random.choice(sorted(self._waiting))
            self._turn.notify_all()


class FaultyStore(Store):
    """The real store, with a scheduler's decision before each call."""

    runner: str
    scheduler: Scheduler

    def read_listed(self, paths: Iterable[str], *words: Any) -> Iterator[bytes | None]:
        """One after the other: the scheduler counts on one call at a time from a run."""
        return (self._read_or_none(path, *words) for path in paths)

    def __getattribute__(self, name: str) -> Any:
        attribute = super().__getattribute__(name)
        return self._decided(attribute) if name in CALLS else attribute

    def _decided(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def decided(*args: Any, **named: Any) -> Any:
            fault = self.scheduler.fault(self.runner)
            if fault == 1:
                raise Killed
            result = call(*args, **named)
            if fault == 2:
                raise Killed
            return call(*args, **named) if fault == 3 else result

        def one_by_one(paths: Iterable[str]) -> None:
            for path in list(paths):
                decided([path])

        return one_by_one if call.__name__ == "delete" else decided


def faulty(root: str, runner: str, scheduler: Scheduler) -> FaultyStore:
    store = FaultyStore(root)
    object.__setattr__(store, "runner", runner)
    object.__setattr__(store, "scheduler", scheduler)
    return store


def run_once(store: Store, rng: random.Random, write: WriteConfig) -> None:
    """One whole run: plan, settle, write the pending shards in blocks of its own, plan and settle again."""
    plan = make_plan(store, SHARDS, FAMILIES)
    settle(store, plan)
    blocks = []
    for work in plan.pending:
        cuts = sorted(rng.sample(range(1, ROWS), 2))
        for start, stop in zip([0, *cuts], [*cuts, ROWS], strict=True):
            blocks.append(encoded_rows(range(start, stop), ROWS if stop == ROWS else None, work.shard.id))
    rng.shuffle(blocks)
    sink = EmbeddingSink(store, FAMILIES, write, plan)
    while blocks:
        taken = [blocks.pop() for _ in range(min(len(blocks), rng.randint(1, 2)))]
        sink.write(taken, None)
    assert not conclude(store, plan, FAMILIES)


def run_until_done(root: str, runner: str, scheduler: Scheduler, seed: int, failures: list[BaseException]) -> None:
    rng, write = random.Random(seed), WriteConfig(rows_per_row_group=10)
    store = faulty(root, runner, scheduler)
    scheduler.enter(runner)
    try:
        while True:
            try:
                return run_once(store, rng, write)
            except Killed:
                continue
    except BaseException as error:
        failures.append(error)
    finally:
        scheduler.leave(runner)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32),
    fault_rate=st.sampled_from([0.0, 0.03, 0.1, 0.2]),
    runs=st.integers(1, 2),
    changed=st.booleans(),
)
def test_each_item_ends_up_exactly_once(seed: int, fault_rate: float, runs: int, changed: bool) -> None:
    """changed: the output holds an older version of each shard, to be retired on the way."""
    with tempfile.TemporaryDirectory() as folder:
        if changed:
            older = [encoded_rows(range(5), 5, shard.id, "v0") for shard in SHARDS]
            EmbeddingSink(Store(folder), FAMILIES, WriteConfig()).write(older, None)
        scheduler, failures = Scheduler(seed, fault_rate), []
        for number in range(runs):
            scheduler.enter(f"run{number}")
        threads = [
            threading.Thread(target=run_until_done, args=(folder, f"run{number}", scheduler, seed + number, failures))
            for number in range(runs)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        if failures:
            raise failures[0]
        settle(Store(folder), make_plan(Store(folder), SHARDS, FAMILIES))
        assert_whole(Store(folder))


def assert_whole(store: Store) -> None:
    """Each item once; what is placed is what the commits name; nothing else is left."""
    expected = [encoded_row(row) for row in range(ROWS)]
    keys = {
        "samples": [row["row"] for row in expected],
        f"embeddings/{ENCODER.name}/image": [row["row"] for row in expected if row["image_vector"]],
        f"embeddings/{ENCODER.name}/text": [row["row"] for row in expected for _ in row["text_vectors"]],
        f"rejects/{ENCODER.name}": [row["row"] for row in expected for _ in row["rejects"]],
    }
    named = {}
    for family in FAMILIES:
        refs = list(list_commits(store, family))
        assert [ref.shard for ref in sorted(refs)] == [shard.id for shard in SHARDS]
        named |= {part.final: part.sha256 for ref in refs for part in read_commit(store, ref).parts}
    placed = {name for name in store.names("") if name.split("/")[0] in ("samples", "embeddings", "rejects")}
    assert placed == set(named)
    for name in placed:
        assert hashlib.sha256(store.read(name)).hexdigest() == named[name]
    for dataset, rows in keys.items():
        for name in store.names(dataset):
            assert pq.read_table(f"{store.root}/{dataset}/{name}")["row"].to_pylist() == rows
    assert store.names("staging") == []


def written(root: Path, *versions: str) -> Store:
    store = Store(str(root))
    for version in versions:
        rows = encoded_rows(range(5), 5, SHARDS[0].id, version)
        EmbeddingSink(store, FAMILIES, WriteConfig()).write([rows], None)
    return store


def test_a_new_version_is_pending_and_retires_the_old_when_it_commits(tmp_path: Path) -> None:
    store = written(tmp_path, "v0")
    plan = make_plan(store, SHARDS[:1], FAMILIES)
    assert [work.families for work in plan.pending] == [tuple(FAMILIES)]
    assert [ref.version for ref in plan.changed[SHARDS[0].id]] == ["v0", "v0"]

    rows = encoded_rows(range(5), 5, SHARDS[0].id, "v1")
    EmbeddingSink(store, FAMILIES, WriteConfig(), plan).write([rows], None)
    assert list(store.names("samples")) == [f"part-{SHARDS[0].id}.v1.0.parquet"]
    assert len(store.names("retired")) == 2
    assert not make_plan(store, SHARDS[:1], FAMILIES).pending


def test_a_retirement_that_died_is_finished(tmp_path: Path) -> None:
    store = written(tmp_path, "v0", "v1")
    plan = make_plan(store, SHARDS[:1], FAMILIES)
    assert {ref.version for ref in plan.superseded} == {"v0"} and not plan.pending
    settle(store, plan)
    assert {ref.version for ref in list_commits(store, "samples")} == {"v1"}


@pytest.mark.parametrize("deletes", [0, 1, 2])
def test_a_shard_that_comes_back_after_it_was_retired_is_done_again(
    tmp_path: Path, deletes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """deletes: storage calls after which retiring it died."""
    store, left = written(tmp_path, "v1"), [deletes] * len(FAMILIES)
    real = Store.delete

    def delete(self: Store, paths: Iterable[str]) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        real(self, paths)

    monkeypatch.setattr(Store, "delete", delete)
    for ref in [*list_commits(store, "samples"), *list_commits(store, ENCODER.name)]:
        left[0] = deletes
        with suppress(Killed):
            retire(store, ref)
    monkeypatch.undo()

    plan = make_plan(store, SHARDS[:1], FAMILIES)
    assert [work.families for work in plan.pending] == [tuple(FAMILIES)]
    settle(store, plan)
    assert store.names("samples") == []
    EmbeddingSink(store, FAMILIES, WriteConfig(), plan).write([encoded_rows(range(5), 5, SHARDS[0].id, "v1")], None)
    assert not conclude(store, plan, FAMILIES)
    assert store.names("samples") == [f"part-{SHARDS[0].id}.v1.1.parquet"]
    assert not make_plan(store, SHARDS[:1], FAMILIES).pending


def test_another_encoders_vectors_go_with_the_samples_they_were_made_of(tmp_path: Path) -> None:
    other = replace(ENCODER, name="other")
    families = {**FAMILIES, "other": other}
    store = Store(str(tmp_path))
    old, new = (encoded_rows(range(5), 5, SHARDS[0].id, version) for version in ("v0", "v1"))
    EmbeddingSink(store, families, WriteConfig()).write([with_families(old, families)], None)
    plan = make_plan(store, SHARDS[:1], FAMILIES, ["other"])
    EmbeddingSink(store, FAMILIES, WriteConfig(), plan).write([new], None)
    assert list(list_commits(store, "other")) == [] and store.names("embeddings/other") == []
    assert not conclude(store, plan, FAMILIES)
    assert make_plan(store, SHARDS[:1], ["other"]).pending


def with_families(rows: pa.Table, families: Iterable[str]) -> pa.Table:
    column = rows.schema.get_field_index("families")
    return rows.set_column(
        column, "families", pa.array([list(families)] * rows.num_rows, rows.schema.field(column).type)
    )


def test_pieces_of_an_object_that_is_cut_anew_stay_until_the_new_ones_are_there(tmp_path: Path) -> None:
    store, whole = Store(str(tmp_path)), SHARDS[0]
    pieces = [f"{whole.id}-p00000", f"{whole.id}-p00001"]
    for piece in pieces:
        EmbeddingSink(store, FAMILIES, WriteConfig()).write([encoded_rows(range(5), 5, piece)], None)
    plan = make_plan(store, [whole], FAMILIES)
    settle(store, plan)
    assert {ref.shard for ref in plan.recut} == set(pieces) == {ref.shard for ref in list_commits(store, "samples")}
    EmbeddingSink(store, FAMILIES, WriteConfig(), plan).write([encoded_rows(range(10), 10, whole.id)], None)
    assert not conclude(store, plan, FAMILIES)
    assert [ref.shard for ref in list_commits(store, "samples")] == [whole.id]


def test_a_run_that_died_once_the_new_pieces_were_there_leaves_no_row_twice(tmp_path: Path) -> None:
    store, whole = Store(str(tmp_path)), SHARDS[0]
    EmbeddingSink(store, FAMILIES, WriteConfig()).write([encoded_rows(range(5), 5, f"{whole.id}-p00000")], None)
    plan = make_plan(store, [whole], FAMILIES)
    EmbeddingSink(store, FAMILIES, WriteConfig(), plan).write([encoded_rows(range(5), 5, whole.id)], None)
    again = make_plan(store, [whole], FAMILIES)
    assert not again.pending and again.recut
    settle(store, again)
    assert tally(store, [ENCODER.name])[0]["image"].items == 4
    assert [ref.shard for family in FAMILIES for ref in list_commits(store, family)] == [whole.id] * 2


def test_a_run_that_ends_late_leaves_a_newer_version_alone(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    late = make_plan(store, SHARDS[:1], FAMILIES)
    written(tmp_path, "v2")
    EmbeddingSink(store, FAMILIES, WriteConfig(), late).write([encoded_rows(range(5), 5, SHARDS[0].id)], None)
    assert not conclude(store, late, FAMILIES)
    assert {ref.version for ref in list_commits(store, "samples")} == {"v1", "v2"}


@pytest.mark.parametrize(("items", "rows"), [(2, 3), (3, 2)])
def test_a_shard_whose_rows_do_not_balance_is_not_committed(items: int, rows: int) -> None:
    ref = CommitRef(ENCODER.name, SHARDS[0].id, "v1", 0)
    _require_balance(ref, {"image": Counts(items=2, embedded=2, absent=1)}, 3)
    with pytest.raises(LedgerError, match=f"of {rows} rows {items} have an image and 0 have none"):
        _require_balance(ref, {"image": Counts(items=items, embedded=items)}, rows)


def test_two_encoders_under_one_name_do_not_mix(tmp_path: Path) -> None:
    written(tmp_path, "v1")
    families = {**FAMILIES, ENCODER.name: replace(ENCODER, fingerprint="e" * 64)}
    with pytest.raises(LedgerError, match="made by another encoder"):
        EmbeddingSink(Store(str(tmp_path)), families, WriteConfig()).write(
            [encoded_rows(range(5), 5, SHARDS[0].id)], None
        )


def test_a_family_added_later_is_pending_alone(tmp_path: Path) -> None:
    store = written(tmp_path, "v1")
    (work,) = make_plan(store, SHARDS[:1], [*FAMILIES, "other"]).pending
    assert work.families == ("other",)


def test_a_vanished_shard_is_reported_and_kept(tmp_path: Path) -> None:
    store = written(tmp_path, "v1")
    plan = make_plan(store, SHARDS[1:], FAMILIES)
    assert {ref.shard for ref in plan.vanished} == {SHARDS[0].id}
    settle(store, plan)
    assert len(store.names("samples")) == 1


def test_planning_opens_nothing(tmp_path: Path) -> None:
    store = written(tmp_path, "v1")
    for name in store.names("commits"):
        store.put_atomic(f"commits/{name}", b"not read")
    assert make_plan(store, SHARDS[:1], FAMILIES).done == 1


def test_a_part_that_is_gone_is_named(tmp_path: Path) -> None:
    store = written(tmp_path, "v1")
    (ref,) = list_commits(store, "samples")
    standing = read_commit(store, ref)
    store.delete([standing.parts[0].final])
    with pytest.raises(LedgerError, match="is not there"):
        place(store, standing)


def test_a_part_that_is_damaged_gives_way_to_one_that_is_made_again(tmp_path: Path) -> None:
    """Of the same size, so that only its bytes tell; and the commit moved away, as is told where it is not to be read."""
    store = written(tmp_path, "v1")
    (ref,) = list_commits(store, "samples")
    final = read_commit(store, ref).parts[0].final
    whole = store.read(final)
    store.put_atomic(final, whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    assert any("damaged" in told for told in problems(store, deep=True))
    store.delete([ref.path])
    written(tmp_path, "v1")
    assert store.read(final) == whole and not list(problems(store, deep=True))


def test_retiring_twice_is_no_error(tmp_path: Path) -> None:
    store = written(tmp_path, "v1")
    (ref,) = list_commits(store, "samples")
    retire(store, ref)
    retire(store, ref)
    assert store.names("samples") == []


def test_tally_adds_up_the_ledger(tmp_path: Path) -> None:
    counts, reasons, shards = tally(written(tmp_path, "v1"), [ENCODER.name])
    assert shards == 1 and counts["image"].items == 4 and counts["image"].embedded == 3
    assert reasons == {"truncated_image": 1, "not_utf8": 1}


@given(st.text("abc-_", min_size=1), st.text("0123456789abcdef", min_size=12, max_size=12), st.integers(0, 99))
def test_a_commit_is_known_by_its_name(shard: str, version: str, generation: int) -> None:
    ref = CommitRef("samples", shard, version, generation)
    assert CommitRef.parse("samples", ref.path.removeprefix("commits/samples/")) == ref
