from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.errors import IndexBuildError
from pipelines.index.current import current_version
from pipelines.index.manifest import Recall, Release
from pipelines.index.release import finish, latest_or_none, read_release
from pipelines.index.versions import claim_id_space, claim_version, unfinished
from pipelines.storage import Store
from tests.unit.index.test_parts import of_rows

HOME = "index/e/image"


def release(version: str) -> Release:
    return Release(
        version=version,
        id_space=1,
        encoder="e",
        modality="image",
        fingerprint="f",
        metric="ip",
        index_key="Flat",
        search_params="",
        query_ms=1.0,
        parts=of_rows(3, 4),
        shards=(),
        recall=Recall(queries={}, figures={}),
        settings={},
        seed=0,
        seconds={},
        peak_mib={},
        versions={},
    )


def test_two_builders_never_get_one_version(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda at: claim_version(store, HOME, f"attempt {at}"), range(24)))
    assert sorted(claimed) == [f"v{number:04d}" for number in range(1, 25)]


def test_versions_go_on_past_unfinished_ones_and_9999(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.put_atomic(f"{HOME}/v9999/shard-0000.faiss", b"")
    assert claim_version(store, HOME, "a") == "v10000"
    assert unfinished(store, HOME) == ["v9999", "v10000"]


def test_numbers_of_releases_and_id_spaces_never_come_again(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    finish(store, release("v0001"))
    assert claim_id_space(store, HOME) == 1
    finish(store, release("v0002"))
    for version in ("v0001", "v0002"):
        store.delete_folder(f"{HOME}/{version}")
    store.delete([f"{HOME}/CURRENT"])
    assert claim_version(store, HOME, "a") == "v0003" and claim_id_space(store, HOME) == 2
    assert claim_id_space(store, HOME, 7) == 7


class LostAnswer(Store):
    """A store whose put arrives while its acknowledgement does not, so that the retry finds it there."""

    def put_if_absent(self, path: str, data: bytes) -> bool:
        super().put_if_absent(path, data)
        return False


def test_a_claim_whose_acknowledgement_was_lost_is_ours(tmp_path: Path) -> None:
    assert claim_version(LostAnswer(str(tmp_path)), HOME, "a") == "v0001"
    finish(LostAnswer(str(tmp_path)), release("v0001"))
    assert current_version(Store(str(tmp_path)), HOME) == "v0001"


def test_a_release_is_read_as_it_was_written_and_never_again_written(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert latest_or_none(store, "e", "image") is None
    finish(store, release("v0001"))
    assert read_release(store, "e", "image") == release("v0001") == latest_or_none(store, "e", "image")
    with pytest.raises(IndexBuildError, match="is there already"):
        finish(store, release("v0001").model_copy(update={"seed": 1}))


def test_a_slower_older_build_does_not_turn_the_pointer_back(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    finish(store, release("v0010"))
    finish(store, release("v0009"))
    assert current_version(store, HOME) == "v0010"
    assert read_release(store, "e", "image", "v0009").version == "v0009"


def test_what_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(IndexBuildError, match="vecmill index"):
        read_release(store, "e", "image")
    with pytest.raises(IndexBuildError, match="v0003"):
        read_release(store, "e", "image", "v0003")
    store.put_atomic(f"{HOME}/v0003/manifest.json", b"{}")
    with pytest.raises(IndexBuildError, match="is not a manifest"):
        read_release(store, "e", "image", "v0003")
