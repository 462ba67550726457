"""`vecmill duplicates` through an index: what it finds of groups that were planted, in what memory, beside exact search.

    python -m tests.bench.duplicates [--rows 1000000]

Unit vectors of 512 dimensions in 1,000 clusters (two of a cluster: cosine 0.5). In every hundred are a group of two to
four near-duplicates (0.978 of each other, at random places of the set) and a pair at 0.90, which is none at the
threshold of 0.95. Found and planted groups are compared by their pairs. The search runs in a process of its own, whose
memory is what counts: `anonymous` is its own, `peak` has the pages of mapped files too, which the system takes back
when it wants them. Against exact search, which is quadratic, a set of --exact-rows is compared. Exits with 1 where
pairs are missed or made up, or memory is more than is promised.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq

from pipelines.evaluate.duplicates import Sought, find_duplicates
from pipelines.index.add import fill
from pipelines.index.choose import cut
from pipelines.index.manifest import Coding, Rerank
from pipelines.index.parts import Ids, Vectors, embeddings_folder, list_parts, pick
from pipelines.index.release import finish
from pipelines.index.train import read_picked, train
from pipelines.storage import Store
from tests.bench.memory import PeakAnonymous, status_mib
from tests.bench.rows import Row, conclude
from tests.indexed import ENCODER, write_images, write_run
from tests.unit.index.test_release import release

DIM, CLUSTERS, PARTS, SHARDS = 512, 1_000, 20, 4
SPREAD, NEAR, FAR = 1.0, 0.15, 0.333
THRESHOLD, K, FACTOR = 0.95, 10, 2
TRAINED_EACH, LEAST_TRAINED = 40, 10_000
ITEM_BYTES, LEAST_PAIRS = 40, 0.99
VERSION = "v0001"


def planted(rows: int) -> tuple[Ids, Ids]:
    """Of each row the group that it is of, rows of none being groups of one; and how far from its centre it lies:
    0 for none, 1 for a near-duplicate, 2 for what is nearly one."""
    random = np.random.default_rng(1)
    order, group, kind = random.permutation(rows), np.arange(rows), np.zeros(rows, np.int64)
    for first in range(0, rows - 9, 100):
        members = order[first : first + random.integers(2, 5)]
        group[members], kind[members] = members.min(), 1
        nearly = order[first + 5 : first + 7]
        group[nearly], kind[nearly] = nearly.min(), 2
    return group, kind


def vectors_of(group: Ids, kind: Ids, rows: range) -> Vectors:
    """float32 [n, DIM], unit: of a group around the group's own vector, which lies around a cluster's centre."""
    centres, random = (
        unit(np.random.default_rng(2).normal(size=(CLUSTERS, DIM))),
        np.random.default_rng([3, rows.start]),
    )
    found = around(centres, random, len(rows))
    for at in np.flatnonzero(kind[rows.start : rows.stop]).tolist():
        row = rows[at]
        own = around(centres, np.random.default_rng([4, int(group[row])]), 1)[0]
        away = NEAR if kind[row] == 1 else FAR
        found[at] = unit(own + away * unit(np.random.default_rng([5, row]).normal(size=DIM)))
    return found


def around(centres: Vectors, random: np.random.Generator, count: int) -> Vectors:
    noise = unit(random.normal(size=(count, DIM)))
    return np.asarray(unit(centres[random.integers(CLUSTERS, size=count)] + SPREAD * noise), np.float32)


def unit(rows: Any) -> Any:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def write_set(root: Path, rows: int) -> Store:
    """An output of PARTS parts, and a release of it that re-ranks with float16."""
    group, kind = planted(rows)
    for at, part in enumerate(np.array_split(np.arange(rows), PARTS)):
        write_images(root, at, vectors_of(group, kind, range(part[0], part[-1] + 1)))
    store = Store(str(root))
    write_run(store, ENCODER, DIM, "float16")
    parts = list_parts(store, embeddings_folder(ENCODER, "image"))
    lists = max(64, 2 ** round(np.log2(rows / 500)))
    key = f"OPQ32_128,IVF{lists},PQ32x8"
    sample = read_picked(store, parts, pick(parts, max(LEAST_TRAINED, TRAINED_EACH * lists), 0))
    faiss.write_index(train(key, "ip", sample, DIM), str(root / "trained.faiss"))
    coding, folder = Coding(dtype="float16"), f"index/{ENCODER}/image/{VERSION}"
    filled = [
        fill(store, parts.run(run.start, run.stop), "trained.faiss", f"{folder}/shard-{at:04d}.faiss", sample[:1], 0, "ip", coding)
        for at, run in enumerate(cut(parts, SHARDS))
    ]  # fmt: skip
    made = release(VERSION).model_copy(
        update={
            "encoder": ENCODER,
            "metric": "ip",
            "index_key": key,
            "search_params": "nprobe=8",
            "parts": parts,
            "shards": tuple(each.shard for each in filled),
            "rerank": Rerank(coding=coding, factor=FACTOR, query_ms=0.0),
        }
    )
    finish(store, made)
    return store


def find(root: str, exact: bool, memory_mib: int) -> dict[str, Any]:
    """What `vecmill duplicates` does, in this process."""
    watched, before, started = PeakAnonymous(), status_mib("RssAnon"), time.perf_counter()
    sought = Sought(threshold=THRESHOLD, k=K, exact=exact, memory_mib=memory_mib)
    target = f"duplicates/{'exact' if exact else 'index'}"
    summary = find_duplicates(Store(root), ENCODER, "image", sought, target, lambda line: print(line, file=sys.stderr))
    seconds = time.perf_counter() - started
    told = {"seconds": round(seconds, 1), "anonymous": watched.stop(), "before": before, "peak": status_mib("VmHWM")}
    return {**{name: round(value, 1) for name, value in told.items()}, "groups": summary["groups"], "folder": target}


def found_apart(root: Path, exact: bool, memory_mib: int) -> dict[str, Any]:
    """`find` in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.duplicates", "--find", str(root), "--memory", str(memory_mib)]
    printed = subprocess.run([*command, *(["--exact"] if exact else [])], stdout=subprocess.PIPE, check=True).stdout
    return dict(json.loads(printed))


def pairs(groups: Iterable[Iterable[int]]) -> set[tuple[int, int]]:
    return {pair for group in groups for pair in combinations(sorted(group), 2)}


def pairs_found(root: Path, folder: str) -> set[tuple[int, int]]:
    rows = pq.read_table(root / folder / "groups.parquet", columns=["group", "key"]).to_pylist()
    starts = np.cumsum(
        [0, *(part.rows for part in list_parts(Store(str(root)), embeddings_folder(ENCODER, "image")).ranges)]
    )
    groups: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        part, _, at = row["key"].partition("/")
        groups[row["group"]].append(int(starts[int(part)]) + int(at))
    return pairs(groups.values())


def pairs_planted(rows: int) -> set[tuple[int, int]]:
    group, kind = planted(rows)
    members: dict[int, list[int]] = defaultdict(list)
    for row in np.flatnonzero(kind == 1).tolist():
        members[int(group[row])].append(row)
    return pairs(members.values())


def quality(found: set[tuple[int, int]], truth: set[tuple[int, int]]) -> dict[str, float]:
    both = len(found & truth)
    return {"recall": round(both / len(truth), 5), "precision": round(both / max(1, len(found)), 5)}


def measure(rows: int, memory_mib: int, beside_exact: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        started = time.perf_counter()
        write_set(root, rows)
        made = time.perf_counter() - started
        truth = pairs_planted(rows)
        told = found_apart(root, False, memory_mib)
        found = pairs_found(root, told["folder"])
        figures = {"rows": rows, "planted_pairs": len(truth), "made_s": round(made, 1), **told, **quality(found, truth)}
        if beside_exact:
            exact = found_apart(root, True, memory_mib)
            figures["exact"] = {**exact, **quality(pairs_found(root, exact["folder"]), truth)}
            figures["seconds_over_exact"] = round(told["seconds"] / exact["seconds"], 3)
        return figures


def rows_of(figures: dict[str, Any], memory_mib: int) -> list[Row]:
    rows, own = figures["rows"], figures["anonymous"] - figures["before"]
    most = memory_mib + ITEM_BYTES * rows / 2**20
    shares = [(name, figures[name]) for name in ("recall", "precision")]
    enough = f"at least {LEAST_PAIRS}"
    return [
        Row(f"own memory at {rows:,} rows, MiB", own, f"at most {most:,.0f}", own <= most),
        *(Row(f"{name} of pairs at {rows:,} rows", share, enough, share >= LEAST_PAIRS) for name, share in shares),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--exact-rows", type=int, default=20_000, help="0 for no comparison with exact search")
    parser.add_argument("--memory", type=int, default=1024, help="MiB of index, as `vecmill duplicates --memory`")
    parser.add_argument("--find", help=argparse.SUPPRESS)
    parser.add_argument("--exact", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.find:
        print(json.dumps(find(asked.find, asked.exact, asked.memory)))
        return
    found: list[Row] = []
    for rows, beside_exact in ((asked.exact_rows, True), (asked.rows, False)):
        if rows:
            figures = measure(rows, asked.memory, beside_exact)
            print(json.dumps(figures, indent=2), flush=True)
            found += rows_of(figures, asked.memory)
    conclude(found)


if __name__ == "__main__":
    main()
