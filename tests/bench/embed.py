"""How much of the machine the embed pipeline keeps: its steady rate against the bare model and decode.

    python -m tests.bench.embed [--images 2000] [--precision fp32]

One run on one machine: the bare model on preloaded tensors, decode alone, the pipeline, the bare model again.
efficiency = pipeline rate × (1 ÷ bare rate + decode seconds an image), with the same weights, batch, precision
and threads. 1.0 is a loop that decodes and encodes in turn without any overhead. Absolute rates are of a noisy
machine; the ratio is the result.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from jobs.cluster import connected
from pipelines.config import DecodeConfig, ReadConfig, RunConfig, validate
from pipelines.contracts import Shard
from pipelines.decode import decode_batch
from pipelines.embed import embed
from pipelines.encoders import registry
from pipelines.encoders.base import EncoderSpec
from pipelines.ledger import Work
from pipelines.observe import Stages
from pipelines.prepare import prepare
from pipelines.read import read_shard
from pipelines.scenes import scene
from pipelines.scenes.compose import jpeg
from pipelines.sources import plan_shards
from pipelines.storage import Store
from tests.checkpoints import save_open_clip

BATCH, SHARDS = 64, 8
VIT_B_32 = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}


def enlarged_scenes(images: int) -> list[bytes]:
    """JPEGs of 256 to 384 pixels: scenes, enlarged."""
    drawn = (scene(0, index).image for index in range(images))
    sides = np.random.default_rng(0).integers(256, 385, size=(images, 2))
    return [jpeg(image.resize((int(w), int(h)))) for image, (w, h) in zip(drawn, sides, strict=True)]


def write_tars(folder: Path, images: list[bytes]) -> None:
    for number, chunk in enumerate(np.array_split(np.arange(len(images)), SHARDS)):
        with tarfile.open(folder / f"bench-{number:05d}.tar", "w") as tar:
            for index in chunk:
                member = tarfile.TarInfo(f"{index:06d}.jpg")
                member.size = len(images[index])
                tar.addfile(member, io.BytesIO(images[index]))


def samples(folder: Path) -> pa.Table:
    """One shard, read."""
    shards, _ = plan_shards([str(folder)], "auto", ReadConfig(), Store(), {})
    first: Shard = shards[0]
    return pa.concat_tables(read_shard(Work(first, ("samples",)), ReadConfig(), Store())).slice(0, 256)


def decode_seconds(table: pa.Table, spec: EncoderSpec) -> float:
    decode_batch(table.slice(0, 16), spec, DecodeConfig(), ("image",))
    started = time.perf_counter()
    decode_batch(table, spec, DecodeConfig(), ("image",))
    return (time.perf_counter() - started) / table.num_rows


def bare_rate(spec: EncoderSpec, batches: int = 6) -> float:
    """Images a second of the model alone on tensors that are already there."""
    encoder = registry.load(spec, torch.device("cpu"))
    assert spec.image is not None
    pixels = [np.random.default_rng(0).integers(0, 256, (*spec.image.size, 3), np.uint8) for _ in range(BATCH)]
    batch = encoder.collate(pixels)
    encoder.images(batch)
    started = time.perf_counter()
    for _ in range(batches):
        encoder.images(batch)
    return batches * BATCH / (time.perf_counter() - started)


class Steady:
    """The encode stage's rate once it runs: the slope of its rows over time, since calls end in bursts."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def __call__(self, stages: Stages) -> None:
        rows = stages.get("encode", {}).get("rows", 0.0)
        if rows and (not self.seen or rows > self.seen[-1][1]):
            self.seen.append((time.perf_counter(), rows))

    @property
    def rate(self) -> float:
        seconds, rows = np.array(self.seen).T
        return float(np.polyfit(seconds, rows, 1)[0])


def pipeline_rate(folder: Path, checkpoint: Path, precision: str, threads: int) -> tuple[float, dict[str, Any]]:
    settings = {
        "input": str(folder),
        "output": str(folder.parent / "output"),
        "encoder": f"open_clip:local-dir:{checkpoint}",
        "modalities": "image",
        "encode": {"precision": precision, "batch_size": BATCH, "threads": threads},
    }
    steady = Steady()
    with connected(None) as cluster:
        report = embed(prepare(validate(RunConfig, settings), cluster), steady, progress_interval_s=0.1)
    return steady.rate, report


def measure(images: int, precision: str, vision: dict[str, Any]) -> dict[str, Any]:
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "shards"
        folder.mkdir()
        write_tars(folder, enlarged_scenes(images))
        checkpoint = save_open_clip(Path(name) / "checkpoint", vision_cfg=vision, embed_dim=512)
        spec = registry.describe(f"open_clip:local-dir:{checkpoint}")
        spec = replace(spec, precision=precision)
        decode = decode_seconds(samples(folder), spec)
        before = bare_rate(spec)
        rate, report = pipeline_rate(folder, checkpoint, precision, threads)
        after = bare_rate(spec)
    bare = (before + after) / 2
    return {
        "images": images,
        "precision": precision,
        "threads": threads,
        "bare_rate": [round(before, 1), round(after, 1)],
        "decode_ms": round(decode * 1000, 2),
        "pipeline_rate": round(rate, 1),
        "whole_job_rate": round(images / report["seconds"], 1),
        "efficiency": round(rate * (1 / bare + decode), 3),
        "efficiency_range": [round(rate * (1 / one + decode), 3) for one in sorted((before, after), reverse=True)],
        "peak_mib": {stage: numbers.get("peak_mib") for stage, numbers in report["stages"].items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--floor", type=float, default=0.85, help="efficiency below which it fails")
    arguments = parser.parse_args()
    figures = measure(arguments.images, arguments.precision, VIT_B_32)
    print(json.dumps(figures, indent=2))
    if figures["efficiency"] < arguments.floor:
        sys.exit(f"efficiency {figures['efficiency']} is below {arguments.floor}")


if __name__ == "__main__":
    main()
