"""Zero-shot labels: each image's probabilities over labels that are given as words (Radford et al., ICML 2021)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.errors import ConfigError
from pipelines.evaluate.groups import read_samples
from pipelines.evaluate.items import require_one_vector
from pipelines.evaluate.retrieval import require_comparable
from pipelines.index.parts import PartRange, Parts, Vectors, embeddings_folder, list_parts, open_part, vectors
from pipelines.record import read_record
from pipelines.storage import Store, scratch_folder

DEFAULT_SCALE = 100.0
"""Where CLIP's ends, of encoders that keep none."""
BATCH_ROWS, THREADS = 8_192, 4
SUMMARY = "summary.json"
Say = Callable[[str], None]
Embed = Callable[[Sequence[str]], Vectors]

SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string()),
        pa.field("row", pa.int64()),
        pa.field("key", pa.string()),
        pa.field("label", pa.string()),
        pa.field("probability", pa.float32()),
        pa.field("top", pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float32())]))),
        pa.field("known", pa.string()),
    ]
)
"""label: the likeliest; top: the likeliest few, best first; known: the sample's own label, if it is one of these."""


@dataclass(frozen=True)
class Labels:
    """Prompts by label, whose vectors are averaged. scale: what cosines are multiplied by before the softmax."""

    prompts: Mapping[str, Sequence[str]]
    scale: float

    def digest(self, fingerprint: str, top: int) -> str:
        told = json.dumps([fingerprint, self.scale, top, {name: list(said) for name, said in self.prompts.items()}])
        return sha256(told.encode()).hexdigest()[:8]


def prompts_of(labels: Sequence[str], templates: Sequence[str]) -> dict[str, list[str]]:
    """Each label in each template, in place of its {}. Raises: ConfigError."""
    if wrong := [template for template in templates if template.count("{}") != 1]:
        raise ConfigError(f"--template {wrong[0]!r} has not one {{}}", 'As in "a photo of a {}".')
    return {label: [template.replace("{}", label) for template in templates] for label in labels}


def label_vectors(prompts: Mapping[str, Sequence[str]], embed: Embed) -> Vectors:
    """float32 [labels, dim] of unit length: the mean of each label's prompts, each of unit length before."""
    asked = list(dict.fromkeys(text for said in prompts.values() for text in said))
    found = dict(zip(asked, _unit(embed(asked)), strict=True))
    return _unit(np.stack([np.mean([found[text] for text in said], axis=0) for said in prompts.values()]))


def _unit(rows: Vectors) -> Vectors:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def probabilities(images: Vectors, labels: Vectors, scale: float) -> Vectors:
    """float32 [images, labels], rows of sum 1: softmax of scale · cosine."""
    logits = scale * (_unit(images) @ labels.T)
    grown = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(grown / grown.sum(axis=1, keepdims=True), np.float32)


def classify(
    store: Store, encoder: str, labels: Labels, embed: Embed, top: int = 5, say: Say = lambda line: None
) -> dict[str, Any]:
    """A Parquet part of SCHEMA for each part of images, under `classifications/<encoder>/<digest>/`; its summary.

    The digest is of labels, prompts, scale and encoder: the same again does only what is missing. Memory: a batch of
    vectors and a part of labels for each of 4 threads. Raises: ConfigError.
    """
    if len(labels.prompts) < 2:
        raise ConfigError(f"There are {len(labels.prompts)} labels to choose from", "Give two at least.")
    require_comparable(store, encoder, "image", "text")
    parts = list_parts(store, embeddings_folder(encoder, "image"))
    require_one_vector(parts)
    folder = f"classifications/{encoder}/{labels.digest(read_record(store).encoders[encoder].fingerprint, top)}"
    done = set(store.names(folder))
    missing = [part for part in parts.ranges if part.name not in done]
    say(f"{len(missing):,} of {len(parts.ranges):,} parts to do, {len(labels.prompts):,} labels")
    if missing:
        found = label_vectors(labels.prompts, embed)
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda part: _one_part(store, parts, part, folder, labels, found, top), missing))
    summary = {
        "encoder": encoder,
        "labels": {name: list(said) for name, said in labels.prompts.items()},
        "scale": labels.scale,
        "images": parts.rows,
        **accuracy(store, [f"{folder}/{part.name}" for part in parts.ranges]),
        "folder": store.uri(folder),
    }
    store.put_atomic(f"{folder}/{SUMMARY}", json.dumps(summary, indent=2, ensure_ascii=False).encode())
    return summary


def _one_part(
    store: Store, parts: Parts, part: PartRange, folder: str, labels: Labels, found: Vectors, top: int
) -> None:
    names = np.array(list(labels.prompts), object)
    samples = read_samples(store, part.name, ["row", "label"]).sort_by("row")
    rows, known = samples["row"].to_numpy(), np.array(samples["label"].to_pylist(), object)
    known[~np.isin(known.astype(str), names.astype(str))] = None
    with scratch_folder() as scratch:
        local = Path(scratch) / part.name
        with (
            open_part(store, parts.path(part)) as stream,
            pq.ParquetFile(stream, pre_buffer=False) as file,
            pq.ParquetWriter(local, SCHEMA) as writer,
        ):
            for batch in file.iter_batches(BATCH_ROWS, use_threads=False):
                chances = probabilities(vectors(batch["embedding"], parts.dim), found, labels.scale)
                own = known[np.searchsorted(rows, batch["row"].to_numpy())]
                writer.write_table(_table(batch, chances, names, own, top))
        store.put_atomic(f"{folder}/{part.name}", local)


def _table(batch: pa.RecordBatch, chances: Vectors, names: Any, known: Any, top: int) -> pa.Table:
    order = np.argsort(-chances, axis=1, kind="stable")[:, :top]
    best = np.take_along_axis(chances, order, axis=1)
    pairs = pa.StructArray.from_arrays(
        [pa.array(names[order.ravel()], pa.string()), pa.array(best.ravel())], ["label", "probability"]
    )
    offsets = pa.array(np.arange(0, order.size + 1, order.shape[1]), pa.int32())
    columns = {
        **{name: batch[name] for name in ("shard", "row", "key")},
        "label": pa.array(names[order[:, 0]], pa.string()),
        "probability": pa.array(best[:, 0]),
        "top": pa.ListArray.from_arrays(offsets, pairs),
        "known": pa.array(known, pa.string()),
    }
    return pa.table({name: columns[name] for name in SCHEMA.names}).cast(SCHEMA)


def accuracy(store: Store, paths: Sequence[str]) -> dict[str, Any]:
    """Of the samples whose label is known, overall and by label; and how many got each label."""
    given: dict[str, int] = {}
    of: dict[str, list[int]] = {}
    for path in paths:
        with open_part(store, path) as stream:
            table = pq.read_table(stream, columns=["label", "known"], use_threads=False)
        for entry in pc.value_counts(table["label"].combine_chunks()).to_pylist():
            given[entry["values"]] = given.get(entry["values"], 0) + entry["counts"]
        told = table.filter(pc.is_valid(table["known"]))
        told = told.append_column("right", pc.equal(told["label"], told["known"]))
        for entry in told.group_by("known").aggregate([("right", "sum"), ("right", "count")]).to_pylist():
            counts = of.setdefault(entry["known"], [0, 0])
            counts[0], counts[1] = counts[0] + entry["right_sum"], counts[1] + entry["right_count"]
    total = sum(count for _, count in of.values())
    return {
        "given": dict(sorted(given.items(), key=lambda item: (-item[1], item[0]))),
        "known": total,
        "accuracy": sum(right for right, _ in of.values()) / total if total else None,
        "accuracy_by_label": {name: right / count for name, (right, count) in sorted(of.items())},
    }
