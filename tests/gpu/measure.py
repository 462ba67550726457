"""The three checks: precision, running out of memory, rate. Each gives rows of a table; a row may fail."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers

from pipelines.config import EncodeConfig
from pipelines.contracts import PIXELS
from pipelines.encode import Encode
from pipelines.encoders import registry
from pipelines.encoders.base import EncoderSpec, Target
from tests.gpu.checkpoint import captions, pictures, spread

BOUNDS = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}
LEAST_SPREAD = 0.2


@dataclass(frozen=True)
class Row:
    """One line of the table. passed: None where nothing was judged, with the reason in `note`."""

    check: str
    value: float | None
    bound: str
    passed: bool | None
    note: str = ""


@dataclass(frozen=True)
class Bench:
    """What is measured on what. images: at least 32, so that the bounds of the precision mean something."""

    spec: EncoderSpec
    folder: str
    device: str
    batch_size: int
    images: int

    def encode(self, precision: str, modalities: Sequence[str] = ("image", "text"), **observed: Any) -> Encode:
        spec = replace(self.spec, precision=precision, dtype="float32")
        settings = EncodeConfig(threads=1)
        return Encode([Target("gpu", spec, tuple(modalities), self.batch_size)], settings, self.device, **observed)

    def table(self, rows: int, captions_too: bool = True) -> pa.Table:
        """Schema PIXELS: `rows` images, repeated after `images` different ones, with a caption each."""
        side = self.side
        distinct = [picture.tobytes() for picture in pictures(self.images, side)]
        tokens = (
            [ids.tolist() for ids in registry.tokenizer(self.spec)(captions(self.images))] if captions_too else None
        )
        place = {
            "shard": "gpu",
            "encoder": "gpu",
            "version": "1",
            "end": False,
            "rejects": [],
            "pixels_shape": [side, side, 3],
        }
        records = [
            {
                **place,
                "row": row,
                "pixels": distinct[row % self.images],
                "tokens": [tokens[row % self.images]] if tokens else [],
            }
            for row in range(rows)
        ]
        return pa.Table.from_pylist(records, schema=PIXELS)

    @property
    def side(self) -> int:
        assert self.spec.image is not None
        return (self.spec.image.crop or self.spec.image.size)[0]


def precision(bench: Bench) -> Iterator[Row]:
    """Our vectors in each precision against transformers' own in fp32, item by item, by DESIGN's P4."""
    table, reference = bench.table(bench.images), reference_vectors(bench)
    for modality, vectors in reference.items():
        wide = spread(torch.from_numpy(vectors))
        yield Row(f"spread of {modality} vectors", wide, f"> {LEAST_SPREAD}", wide > LEAST_SPREAD)
    for kind, bound in BOUNDS.items():
        for modality, ours in vectors_of(bench.encode(kind)(table)).items():
            error = p4_error(ours, reference[modality])
            yield Row(f"{kind} {modality} error", error, f"< {bound}", error < bound)


def p4_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """The worst row's distance, over the mean distance of the reference's rows from their mean."""
    distances = np.linalg.norm(ours - reference, axis=1)
    return float(distances.max() / np.linalg.norm(reference - reference.mean(axis=0), axis=1).mean())


def reference_vectors(bench: Bench) -> dict[str, np.ndarray]:
    """transformers' own, normalised, on the CPU in fp32."""
    model = transformers.CLIPModel.from_pretrained(bench.folder, dtype=torch.float32).eval()
    processor = transformers.CLIPImageProcessor.from_pretrained(bench.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bench.folder)
    images = processor(pictures(bench.images, bench.side), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        image = [model.get_image_features(one[None]).pooler_output for one in images]
        text = [
            model.get_text_features(**tokenizer(caption, return_tensors="pt")).pooler_output
            for caption in captions(bench.images)
        ]
    return {"image": _unit(torch.cat(image)), "text": _unit(torch.cat(text))}


def _unit(vectors: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(vectors, dim=1).numpy()


def vectors_of(result: pa.Table) -> dict[str, np.ndarray]:
    image = result["image_vector"].combine_chunks().flatten().to_numpy().reshape(result.num_rows, -1)
    text = [pair["vector"] for pairs in result["text_vectors"].to_pylist() for pair in pairs]
    return {"image": image, "text": np.array(text, np.float32)}


def out_of_memory(bench: Bench) -> Iterator[Row]:
    """Fills the device until no full batch fits, encodes, and gives the memory back."""
    if not bench.device.startswith("cuda"):
        yield Row("out of memory", None, "", None, "skipped: a CPU's memory cannot be filled safely")
        return
    observed: list[dict[str, Any]] = []
    table = bench.table(16 * bench.batch_size, captions_too=False)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    encode = bench.encode("fp16", ["image"], observe=lambda **numbers: observed.append(numbers))
    expected = vectors_of(encode(table))["image"]
    for_a_batch = torch.cuda.max_memory_allocated() - before
    ballast = _ballast(keep_free=for_a_batch // 3)
    cramped = vectors_of(encode(table))["image"]
    del ballast
    torch.cuda.empty_cache()
    for _ in range(4):
        encode(table)
    times = observed[1]["out_of_memory"]
    error, grown = p4_error(cramped, expected), encode.batch_size("image")
    yield Row("out of memory, times", times, "> 0", times > 0)
    yield Row("out of memory, error of vectors", error, f"< {BOUNDS['fp16']}", error < BOUNDS["fp16"])
    full = grown == bench.batch_size
    yield Row("batch size, once the memory is back", grown, f"= {bench.batch_size}", full)


def _ballast(keep_free: int) -> torch.Tensor:
    """All of the device's free memory but a little, in plain allocations."""
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return torch.empty(max(0, free - keep_free), dtype=torch.uint8, device="cuda")


def rate(bench: Bench, batches: int) -> Iterator[Row]:
    """Images a second of the encode stage, and of the bare model on pixels that are on the device already."""
    kind = "fp16" if bench.device.startswith("cuda") else "fp32"
    table = bench.table(batches * bench.batch_size, captions_too=False)
    encode, bare = bench.encode(kind, ["image"]), _bare(bench, kind, batches)
    bare(), encode(table)
    # Turn by turn, so that a machine busy with other things slows both.
    turns = [(_seconds(bare), _seconds(lambda: encode(table))) for _ in range(5)]
    bare_s, stage_s = (min(seconds) for seconds in zip(*turns, strict=True))
    yield Row("bare model, images/s", table.num_rows / bare_s, "", None, f"{kind}, batch {bench.batch_size}")
    yield Row("encode stage, images/s", table.num_rows / stage_s, "", None, f"{batches} batches a call")
    yield Row("encode stage ÷ bare model", bare_s / stage_s, "", None)


def _bare(bench: Bench, kind: str, batches: int) -> Any:
    encoder = registry.load(replace(bench.spec, precision=kind), torch.device(bench.device))
    host = encoder.collate((pictures(bench.images, bench.side) * bench.batch_size)[: bench.batch_size])
    batch = {name: tensor.to(bench.device) for name, tensor in host.items()}

    def run() -> None:
        for _ in range(batches):
            vectors = encoder.images(batch)
        vectors.cpu()

    return run


def _seconds(call: Any) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
