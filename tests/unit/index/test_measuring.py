"""A build's own measuring, as far as it takes no task."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.config import IndexConfig
from pipelines.index import files
from pipelines.index.measuring import Measuring
from pipelines.index.plan import make_plan
from pipelines.index.queries import Queries
from pipelines.index.release import read_release
from pipelines.storage import Store
from tests.indexed import ENCODER
from tests.unit.test_search import write_release


@pytest.mark.parametrize("remote", [False, True])
def test_tuning_reads_no_index_shard_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool) -> None:
    store, settings = write_release(tmp_path), IndexConfig(index_key="Flat")
    if remote:
        store = Store(f"memory://{tmp_path.name}")
        for path in filter(Path.is_file, tmp_path.rglob("*")):
            store.put_atomic(str(path.relative_to(tmp_path)), path)
    made = read_release(store, ENCODER, "image")
    plan = make_plan(made.parts, settings)
    measuring = Measuring(store, made.folder, list(made.shards), plan, settings, None, lambda shard, answers: answers)
    monkeypatch.setattr(files, "load_index", lambda *_: pytest.fail("it was read whole"))
    tuned = measuring.tune(Queries({"image": np.ones((8, 16), np.float32)}, np.arange(8)), "")
    assert tuned.query_ms > 0 and tuned.batch_query_ms > 0
