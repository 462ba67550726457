"""A build's version and its notes, with builds that die."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.index.attempt import Attempt, Learnt, attempted
from pipelines.index.manifest import KeptFile
from pipelines.index.queries import Queries
from pipelines.storage import Store

HOME = "index/e/image"
QUERIES = Queries({"image": np.ones((2, 4), np.float32)}, np.arange(2))


def begin(store: Store, plan: str) -> Attempt:
    """A build that has trained, and dies."""
    trained = KeptFile(file="trained.faiss", bytes=1, sha256=plan)
    with attempted(store, HOME, plan, print) as attempt:
        attempt.keep_learnt(Learnt(trained=trained, coding=None, seconds={}, peak_mib={}), QUERIES)
        store.put_atomic(f"{attempt.folder}/trained.faiss", b"x")
    return attempt


def test_a_build_that_died_is_taken_up_with_what_it_learnt(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    first = begin(store, "a")
    with attempted(store, HOME, "a", print) as attempt:
        assert attempt.taken_up and attempt.version == first.version and attempt.learnt()


class Dying(Store):
    """Deletes one folder, and no other."""

    deleted = 0

    def delete_folder(self, path: str) -> None:
        Dying.deleted += 1
        if Dying.deleted == 2:
            raise KeyboardInterrupt
        super().delete_folder(path)


def test_what_a_build_left_that_died_while_it_was_taken_back_is_not_the_next_ones(tmp_path: Path) -> None:
    first = begin(Dying(str(tmp_path)), "a")
    with pytest.raises(KeyboardInterrupt):
        first.clear()
    store = Store(str(tmp_path))
    store.delete_folder(first.folder)
    for plan in ("b", "a"):
        with attempted(store, HOME, plan, print) as attempt:
            assert not attempt.taken_up and attempt.learnt() is None and not list(attempt.filled())


def test_notes_that_outlive_their_version_are_nobodys(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    first = begin(store, "a")
    store.delete_folder(first.folder)
    with attempted(store, HOME, "a", print) as attempt:
        assert attempt.version == first.version and attempt.learnt() is None
