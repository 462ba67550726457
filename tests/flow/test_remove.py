"""Takedowns from end to end on a real Ray: what was taken down does not come back, by whatever run."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipelines.config import IndexConfig
from pipelines.index.build import build_index
from pipelines.index.manifest import index_folder
from pipelines.index.release import read_release
from pipelines.index.versions import finished
from pipelines.ledger import tally
from pipelines.purge import purge, require_no_holders
from pipelines.scenes import write_shards
from pipelines.search import Searcher
from pipelines.storage import Store
from pipelines.verify import problems
from tests.flow.command import vecmill
from tests.flow.runs import embedded, rows, settings
from tests.traces import Sought, traces

SAMPLES, SHARDS, SHARD = 24, 2, 12
QUICK = {"recall_queries": 10, "max_query_ms": 0.5, "floor": 0.0}


def shifted(tar: Path) -> None:
    """The tar without its first sample, and so of another version, its rows one earlier."""
    with tarfile.open(tar) as old:
        members = [(member, old.extractfile(member).read()) for member in old.getmembers()]  # type: ignore[union-attr]
    first = members[0][0].name.split(".")[0]
    with tarfile.open(tar, "w") as new:
        for member, data in members:
            if member.name.split(".")[0] != first:
                new.addfile(member, io.BytesIO(data))


def counted(store: Store, encoder: str) -> dict[str, tuple[int, int]]:
    """Items and removed, by modality."""
    return {modality: (count.items, count.removed) for modality, count in tally(store, [encoder])[0].items()}


@pytest.mark.usefixtures("ray_local")
def test_what_was_taken_down_comes_back_by_no_run(checkpoint: Path, tmp_path: Path) -> None:
    tars = write_shards(tmp_path / "in", SAMPLES, SHARDS, broken=0)
    recipe = settings(f"{tmp_path}/in/*.tar", tmp_path / "out", checkpoint)
    store, _ = embedded(recipe)
    samples = list(rows(store, "samples"))
    gone = {(row["shard"], row["row"]): row for row in samples if tars[0].stem in row["shard"] and row["row"] in (3, 7)}
    kept = str([row for row in samples if (row["shard"], row["row"]) not in gone])
    texts = sum(len(row["captions"]) for row in samples)
    vectors = [
        row["embedding"]
        for modality in ("image", "text")
        for row in rows(store, f"embeddings/clip/{modality}")
        if (row["shard"], row["row"]) in gone
    ]
    captions = [caption for row in gone.values() for caption in row["captions"]]
    names = [row["key"] for row in gone.values()]
    what = Sought([text for text in (*names, *captions) if text not in kept], np.array(vectors, np.float32))
    assert len(what.texts) > len(names)
    keys = tmp_path / "keys.txt"
    keys.write_text("".join(f"{name}\n" for name in names))
    build_index(store, "clip", "image", IndexConfig(**QUICK))

    printed = vecmill("remove", str(store.root), "--keys", str(keys), "--reason", "a notice", "--json")
    told = json.loads(printed[printed.index("{") :])
    assert [(row["shard"], row["row"]) for row in told["removed"]] == list(gone)
    found = Searcher(store).search(np.ones((1, len(vectors[0])), np.float32), SAMPLES)[0]
    assert len(found) == SAMPLES - 2 and not {hit.key for hit in found} & set(names)

    # An encoder added later.
    embedded({**recipe, "name": "later"})
    assert counted(store, "later") == {"image": (SAMPLES, 2), "text": (texts, len(captions))}
    # The next build.
    build_index(store, "clip", "image", IndexConfig(**QUICK))
    release = read_release(store, "clip", "image")
    assert release.id_space == 2 and release.parts.rows == SAMPLES - 2
    assert finished(store, index_folder("clip", "image")) == [release.version]
    # A compaction: of what the build did not do, nothing but the leftovers is left.
    done = purge(store)
    require_no_holders(store, done)
    assert done.holdings == [] and traces(store, what) == set()
    assert counted(store, "clip") == counted(store, "later")

    # The input changes.
    shifted(tars[0])
    embedded({**recipe, "encoder": [recipe["encoder"]] * 2, "name": ["clip", "later"]})
    assert {row["key"] for row in rows(store, "samples")}.isdisjoint(names)
    for encoder in ("clip", "later"):
        assert counted(store, encoder)["image"] == (SAMPLES - 1, 2)
    assert traces(store, what) == set() and list(problems(store, deep=True)) == []
    assert "2 samples were taken down; 0 wait" in vecmill("status", str(store.root))
    again = vecmill("remove", str(store.root), "--keys", str(keys), "--key", "no such key", status=2)
    assert "2 were removed before" in again and "no such key" in again
