"""`vecmill evaluate` over many images and as many captions: what it holds of memory, at a tenth of them and at all.

    python -m tests.bench.evaluate [--rows 1000000]

Unit vectors of 512 dimensions in 1,000 clusters (two of a cluster: cosine 0.5); a caption's is its image's with noise.
The default sample of queries is ranked exactly among all, both ways, by a process of its own, whose memory is what
counts: `own` is what it holds beyond what it held before it began. Exits with 1 where that is over --memory, or grows
with the rows, which fewer than 655,360 do not tell: a tenth of them fills no tile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.evaluate.protocols import Asked
from pipelines.evaluate.ranking import Room
from pipelines.evaluate.retrieval import measured
from pipelines.index.parts import unit
from pipelines.storage import Store
from tests.bench.duplicates import CLUSTERS, DIM, around
from tests.bench.memory import PeakAnonymous, status_mib
from tests.bench.rows import Row, conclude
from tests.indexed import ENCODER, write_images, write_run

PARTS, NOISE = 20, 4.0
GROWTH = 1.5
"""Most of what is held at ten times the rows, over what is held at a tenth."""


def write_set(root: Path, rows: int) -> None:
    centres = unit(np.random.default_rng(2).normal(size=(CLUSTERS, DIM)))
    for at in range(PARTS):
        random = np.random.default_rng([3, at])
        images = around(centres, random, rows // PARTS)
        captions = unit(images + NOISE * unit(random.normal(size=images.shape)))
        write_images(root, at, images, captions=captions)
    write_run(Store(str(root)), ENCODER, DIM, "float16")


def ranked(root: str, memory_mib: int) -> dict[str, Any]:
    """What `vecmill evaluate --protocol captions` does, in this process."""
    watched, before, started = PeakAnonymous(), status_mib("RssAnon"), time.perf_counter()
    asked = Asked(protocols=("captions",), room=Room(memory_mib))
    results = list(measured(Store(root), ENCODER, asked, lambda line: print(line, file=sys.stderr)))
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "own_mib": round(watched.stop() - before, 1),
        "before_mib": round(before, 1),
        **{
            f"{each.asks}→{each.finds}": {"queries": each.queries, "gallery": each.gallery}
            | {name: round(each.figures[name], 4) for name in ("recall@1", "recall@10", "median_rank")}
            for each in results
        },
    }


def ranked_apart(rows: int, memory_mib: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder), rows)
        command = [sys.executable, "-m", "tests.bench.evaluate", "--rank", folder, "--memory", str(memory_mib)]
        return {"rows": rows, **json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)}


def rows_of(told: dict[str, Any]) -> list[Row]:
    over, grown = told["own_over_memory"], told["own_at_ten_times"]
    return [
        Row("own memory, over --memory", over, "at most 1", over <= 1),
        Row("own memory at ten times the rows", grown, f"at most {GROWTH}", grown <= GROWTH),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--memory", type=int, default=1024, help="MiB, as `vecmill evaluate --memory`")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank:
        print(json.dumps(ranked(asked.rank, asked.memory)))
        return
    few, all_of_them = (ranked_apart(rows, asked.memory) for rows in (asked.rows // 10, asked.rows))
    told = {
        "a_tenth": few,
        "all": all_of_them,
        "own_over_memory": round(all_of_them["own_mib"] / asked.memory, 3),
        "own_at_ten_times": round(all_of_them["own_mib"] / few["own_mib"], 3),
    }
    print(json.dumps(told, indent=2, ensure_ascii=False))
    conclude(rows_of(told))


if __name__ == "__main__":
    main()
