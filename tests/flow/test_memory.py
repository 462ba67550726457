"""Peak memory of every stage stays where it is when the input grows tenfold."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.flow.command import vecmill
from tests.flow.runs import write_recipe

IMAGES_PER_SHARD, SIDE = 24, 512
MIB_PER_SHARD = IMAGES_PER_SHARD * SIDE * SIDE * 3 / 2**20


def write_shard(path: Path, seed: int) -> None:
    """Noise stored as it is: as many bytes read as pixels decoded."""
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for index in range(IMAGES_PER_SHARD):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(buffer, "BMP")
            member = tarfile.TarInfo(f"{seed:03d}-{index:03d}.bmp")
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)


def peaks(folder: Path, shards: int, checkpoint: Path) -> dict[str, float]:
    """MiB by stage, of a run on a Ray of its own: a worker's peak is that of all it ever did."""
    inputs, output = folder / str(shards), folder / f"output-{shards}"
    inputs.mkdir()
    for seed in range(shards):
        write_shard(inputs / f"{seed:03d}.tar", seed)
    recipe = {
        "input": str(inputs),
        "output": str(output),
        "encoder": f"open_clip:local-dir:{checkpoint}",
        "modalities": "image",
        "read": {"block_mib": 4},
        "decode": {"rows_per_block": 8, "max_pixels": 2**20},
        "encode": {"batch_size": 8, "threads": 1},
        "write": {"rows_per_task": 16},
        "cluster": {"memory_per_decode_task_mib": 400},
    }
    vecmill("embed", write_recipe(folder / f"{shards}.yaml", recipe))
    (path,) = (output / "reports").iterdir()
    report = json.loads(path.read_text())
    (encoder,) = report["encoders"].values()
    assert encoder["items"]["image"]["embedded"] == shards * IMAGES_PER_SHARD
    return {stage: numbers["peak_mib"] for stage, numbers in report["stages"].items()}


def test_peak_memory_does_not_grow_with_the_number_of_shards(tmp_path: Path, checkpoint: Path) -> None:
    few, many = peaks(tmp_path, 2, checkpoint), peaks(tmp_path, 20, checkpoint)
    growth = {stage: many[stage] - few[stage] for stage in few}
    # All that was added, kept by three workers, would be twice this in each.
    assert max(growth.values()) < 3 * MIB_PER_SHARD, (few, many)
