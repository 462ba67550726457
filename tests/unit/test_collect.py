"""What died runs leave is found by kind and goes; what a commit or a release names never does. And `verify` sees it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipelines.collect import Leftover, collect, leftovers, totals
from pipelines.config import WriteConfig
from pipelines.contracts import Shard
from pipelines.errors import HeldError, LedgerError
from pipelines.index.manifest import IndexShard
from pipelines.lease import held
from pipelines.ledger import RETIRED, list_commits, make_plan, retire, settle
from pipelines.storage import Store
from pipelines.uploads import Upload
from pipelines.verify import problems
from pipelines.write import EmbeddingSink
from tests.encoded import ENCODER, FAMILIES, encoded_rows
from tests.unit.index.test_release import release

ROWS = 20
SHARD = Shard("a-000000000000", "s3://bucket/a.tar", "tar", "v1", 1)


class Killed(BaseException):
    pass


class Dying(Store):
    """The real store, up to the first copy to a final name."""

    def copy(self, source: str, target: str, listed: bool = False) -> None:
        raise Killed


def write(store: Store, rows: range = range(ROWS), end: int | None = ROWS, version: str = "v1") -> None:
    EmbeddingSink(store, FAMILIES, WriteConfig()).write([encoded_rows(rows, end, version=version)], None)


@pytest.fixture
def output(tmp_path: Path) -> Store:
    """With one shard done, and an index release that is current."""
    store = Store(str(tmp_path))
    write(store)
    shard = IndexShard(file="shard-0000.faiss", first_id=0, rows=1, bytes=2, sha256=hashlib.sha256(b"{}").hexdigest())
    made = release("v0001").model_copy(update={"encoder": ENCODER.name, "shards": (shard,)})
    for name in ("build.json", "shard-0000.faiss"):
        store.put_atomic(f"index/{ENCODER.name}/image/v0001/{name}", b"{}")
    store.put_atomic(f"index/{ENCODER.name}/image/v0001/manifest.json", made.model_dump_json().encode())
    store.put_atomic(f"index/{ENCODER.name}/image/CURRENT", b"v0001")
    return store


def orphan_part(store: Store) -> None:
    store.put_atomic(f"embeddings/{ENCODER.name}/image/part-b-000000000000.v1.0.parquet", b"x")


def torn_put(store: Store) -> None:
    store.put_atomic("samples/.part-a.parquet.0123456789ab.tmp", b"x")


def torn_puts_elsewhere(store: Store) -> None:
    for path in (".run.json", "leases/embed/clip/.1.json", "projections/.a.safetensors"):
        store.put_atomic(f"{path}.0123456789ab.tmp", b"x")


def fragments(store: Store) -> None:
    write(store, range(5), None, version="v2")


def probe(store: Store) -> None:
    store.put_atomic("staging/probe-0", b"")


def index_staging(store: Store) -> None:
    store.put_atomic("staging/index/clip/image/0/trained.faiss", b"x")


def unfinished_index(store: Store) -> None:
    store.put_atomic(f"index/{ENCODER.name}/image/v0002/build.json", b"{}")
    store.put_atomic(f"index/{ENCODER.name}/image/v0002/shard-0000.faiss", b"x")


def retired(store: Store) -> None:
    write(store, version="v0")
    for family in FAMILIES:
        retire(store, next(ref for ref in list_commits(store, family) if ref.version == "v0"))


KINDS: list[tuple[Callable[[Store], None], str, int]] = [
    (orphan_part, "orphan", 1),
    (torn_put, "orphan", 1),
    (torn_puts_elsewhere, "orphan", 3),
    (fragments, "staging", 2),
    (probe, "staging", 1),
    (index_staging, "staging", 1),
    (unfinished_index, "index", 2),
    (retired, "retired", 2),
]


@pytest.mark.parametrize(("leave", "kind", "objects"), KINDS, ids=[leave.__name__ for leave, _, _ in KINDS])
def test_each_kind_is_found_and_goes(output: Store, leave: Callable[[Store], None], kind: str, objects: int) -> None:
    whole = {*output.names("")}
    assert leftovers(output) == [] == list(problems(output, deep=True))
    leave(output)
    assert {kind: count for kind, (count, _) in totals(leftovers(output)).items()} == {kind: objects}
    assert kind == "retired" or [kind in told for told in problems(output)] == [True]
    assert len(collect(output)) == objects
    assert {*output.names("")} == whole
    assert leftovers(output) == [] == list(problems(output, deep=True))


def test_damage_to_an_index_is_seen(output: Store) -> None:
    path = f"index/{ENCODER.name}/image/v0001/shard-0000.faiss"
    output.put_atomic(path, b"[]")
    assert list(problems(output)) == []
    assert list(problems(output, deep=True)) == [
        f"{path} is damaged: its checksum is not that of its manifest; index again with --force"
    ]
    output.delete([path])
    assert [path in told for told in problems(output)] == [True]


def test_looking_changes_nothing(output: Store) -> None:
    for leave, _, _ in KINDS:
        leave(output)
    before = output.names("")
    assert set(totals(leftovers(output))) == {"orphan", "staging", "index", "retired"}
    assert output.names("") == before


def test_what_was_committed_and_not_placed_is_placed(tmp_path: Path) -> None:
    whole, store = Store(str(tmp_path / "whole")), Store(str(tmp_path / "out"))
    write(whole)
    with pytest.raises(Killed):
        write(Dying(store.root))
    assert any("is missing" in told for told in problems(store))
    collect(store)
    with pytest.raises(Killed):
        write(Dying(store.root))
    write(store)
    collect(store)
    assert {*store.names("")} == {*whole.names("")} and list(problems(store, deep=True)) == []


def test_a_retirement_that_died_is_finished(output: Store) -> None:
    """Its commit stands under both names: in the way of a reader no more, but not gone."""
    for ref in list_commits(output, ENCODER.name):
        output.put_atomic(ref.path.replace("commits", RETIRED, 1), output.read(ref.path))
    collect(output)
    assert list(list_commits(output, ENCODER.name)) == [] and output.names(RETIRED) == []
    assert output.names(f"embeddings/{ENCODER.name}") == [] and len(output.names("samples")) == 1


def test_nothing_goes_while_a_run_is_at_work(output: Store) -> None:
    fragments(output)
    before = output.names("staging")
    with held(output, "embed/clip", "embed"), pytest.raises(HeldError):
        collect(output)
    assert output.names("staging") == before
    collect(output)
    assert output.names("staging") == []


def test_a_shard_whose_staging_was_collected_is_done_again(output: Store) -> None:
    fragments(output)
    collect(output)
    plan = make_plan(output, [Shard(**{**vars(SHARD), "version": "v2"})], FAMILIES)
    settle(output, plan)
    assert [work.shard.version for work in plan.pending] == ["v2"]
    write(output, version="v2")
    assert {ref.version for ref in list_commits(output, ENCODER.name)} == {"v1", "v2"}
    assert [told for told in problems(output) if "2 commits of shard" in told]


class Slow(Store):
    """The real store, in which a task of a dead run commits and places while the leftovers are deleted."""

    def delete(self, paths: Iterable[str]) -> None:
        paths = list(paths)
        if any(path.startswith("staging/") for path in paths) and not Slow.late:
            Slow.late = True
            write(Store(self.root), version="v3")
        super().delete(paths)

    late = False


def test_what_a_late_task_commits_meanwhile_stays(output: Store) -> None:
    probe(output)
    Slow.late = False
    collect(Slow(output.root))
    assert Slow.late and {ref.version for ref in list_commits(output, ENCODER.name)} == {"v1", "v3"}
    assert not [told for told in problems(output, deep=True) if "2 commits" not in told]


class Collected(Store):
    """The real store, in which staging is collected between a commit and its placing."""

    def copy(self, source: str, target: str, listed: bool = False) -> None:
        self.delete_folder("staging")
        super().copy(source, target, listed)


def test_a_commit_whose_parts_were_collected_is_taken_back(tmp_path: Path) -> None:
    """Else the shard would count as done, and its data be nowhere."""
    store = Store(str(tmp_path))
    with pytest.raises(LedgerError, match="is named by a commit but is not there"):
        write(Collected(store.root))
    assert store.names("commits") == []
    write(store)
    assert list(problems(store, deep=True)) == []


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda data: data[:-1], "bytes; its commit says"),
    "flipped": (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is damaged: its checksum"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_part_that_is_not_what_was_committed_is_named(output: Store, damage: str) -> None:
    change, told = DAMAGE[damage]
    (name,) = output.names("samples")
    output.put_atomic(f"samples/{name}", change(output.read(f"samples/{name}")))
    (found,) = problems(output, deep=True)
    assert name in found and told in found


def test_a_part_that_is_gone_is_named(output: Store) -> None:
    (name,) = output.names("samples")
    output.delete([f"samples/{name}"])
    (found,) = problems(output)
    assert found.startswith(f"samples/{name} is missing")


def test_what_was_begun_in_pieces_and_never_ended_goes_and_only_this_outputs(s3_options: dict[str, Any]) -> None:
    store, other = (Store(f"s3://bucket/{name}", {"s3": s3_options}) for name in ("out", "outer"))
    store.put_atomic("samples/whole", b"whole")
    s3 = fsspec.filesystem("s3", **s3_options)
    for key in ("out/index/shard-0000.faiss", "outer/index/b", "out/other/c"):
        begun = s3.call_s3("create_multipart_upload", Bucket="bucket", Key=key)
        s3.call_s3("upload_part", Bucket="bucket", Key=key, UploadId=begun["UploadId"], PartNumber=1, Body=b"piece")
    assert leftovers(store) == [Leftover("upload", "index/shard-0000.faiss", 5)]
    assert ["upload" in told for told in problems(store)] == [True]
    assert len(collect(store)) == 1
    assert leftovers(store) == [] and store.read("samples/whole") == b"whole"
    assert [upload.path for upload in other.uploads(["index"])] == ["index/b"]
    # What lies elsewhere under the output, as another verb's work may, is left alone.
    assert [upload.path for upload in store.uploads(["other"])] == ["other/c"]
    store.abort([Upload("b", 5, "gone")])
    other.abort(other.uploads(["index"]))
