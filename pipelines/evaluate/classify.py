"""Zero-shot labels: each image's probabilities over labels that are given as words (Radford et al., ICML 2021).

A Ray task labels a part; what is labelled stays, and is only counted when the same is asked again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
from ray.data import DataContext

from pipelines.errors import ConfigError
from pipelines.evaluate.groups import read_samples
from pipelines.evaluate.items import require_one_vector
from pipelines.evaluate.protocols import require_comparable
from pipelines.failures import plain_errors
from pipelines.index.parts import (
    Parts,
    Vectors,
    embeddings_folder,
    list_parts,
    open_part,
    shard_of,
    unit,
    vectors,
    version_of,
)
from pipelines.record import read_record
from pipelines.storage import Store, scratch_folder
from pipelines.takedowns import read_takedowns

DEFAULT_SCALE = 100.0
"""Where CLIP's ends, of encoders that keep none."""
TOP = 5
BATCH_ROWS, MOST_TASKS = 8_192, 4_096
TASK_BYTES = 512 * 2**20
CELL_BYTES = 24
"""Of a batch by labels: scores, their exponentials, probabilities and order."""
SUMMARY = "summary.json"
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
    if not templates:
        raise ConfigError("There is no template", "Give --template one, or a file with a line that has {}.")
    if wrong := [template for template in templates if template.count("{}") != 1]:
        raise ConfigError(f"--template {wrong[0]!r} has not one {{}}", 'As in "a photo of a {}".')
    return {label: [template.replace("{}", label) for template in templates] for label in labels}


def label_vectors(prompts: Mapping[str, Sequence[str]], embed: Embed) -> Vectors:
    """float32 [labels, dim] of unit length: the mean of each label's prompts, each of unit length before."""
    asked = list(dict.fromkeys(text for said in prompts.values() for text in said))
    found = dict(zip(asked, unit(embed(asked)), strict=True))
    return unit(np.stack([np.mean([found[text] for text in said], axis=0) for said in prompts.values()]))


def probabilities(images: Vectors, labels: Vectors, scale: float) -> Vectors:
    """float32 [images, labels], rows of sum 1: softmax of scale · cosine."""
    logits = scale * (unit(images) @ labels.T)
    grown = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(grown / grown.sum(axis=1, keepdims=True), np.float32)


@dataclass(frozen=True)
class Plan:
    """What is there to label. folder: of these labels by this encoder. missing: names of parts that are to be made, of
    `parts`. stale: of those that are there, though what they were made of is gone."""

    encoder: str
    folder: str
    parts: Parts
    missing: list[str]
    stale: list[str]
    summed: bool

    @property
    def is_done(self) -> bool:
        return self.summed and not self.missing and not self.stale

    @property
    def items(self) -> list[dict[str, Any]]:
        """A row a part, as `Label` takes it."""
        missing = set(self.missing)
        return [{"name": part.name, "missing": part.name in missing} for part in self.parts.ranges]


def make_plan(store: Store, encoder: str, labels: Labels, top: int = TOP) -> Plan:
    """Changes nothing. Raises: ConfigError."""
    if len(labels.prompts) < 2:
        raise ConfigError(f"There are {len(labels.prompts)} labels to choose from", "Give two at least.")
    require_comparable(store, encoder, "image", "text")
    parts = list_parts(store, embeddings_folder(encoder, "image"))
    require_one_vector(parts)
    folder = f"classifications/{encoder}/{labels.digest(read_record(store).encoders[encoder].fingerprint, top)}"
    there, wanted = set(store.names(folder)), [part.name for part in parts.ranges]
    # Of these, parts that were labelled before may hold what was taken down since.
    touched = read_takedowns(store).touched(waiting=True)
    missing = [name for name in wanted if name not in there or f"{shard_of(name)}.{version_of(name)}" in touched]
    return Plan(encoder, folder, parts, missing, sorted(there - {*wanted, SUMMARY}), SUMMARY in there)


def classify(
    store: Store,
    plan: Plan,
    labels: Labels,
    embed: Embed,
    top: int = TOP,
    on_progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """A Parquet part of SCHEMA for each part of images, under `classifications/<encoder>/<digest>/`; its summary.

    The digest is of labels, prompts, scale and encoder: the same again does only what is missing. What was taken down
    has no label. A task a part, for which Ray must be connected; each has memory for TASK_BYTES and what `samples/` has
    of labels there. on_progress: told how many parts are counted.
    """
    if plan.is_done:
        return dict(json.loads(store.read(f"{plan.folder}/{SUMMARY}")))
    # One of fewer parts would be taken for whole, should this die before it has its own.
    store.delete([f"{plan.folder}/{SUMMARY}"])
    task, counts = label_task(store, plan, labels, embed, top), Counts()
    configure()
    with plain_errors():
        rows = ray.data.from_items(plan.items, override_num_blocks=min(len(plan.items), MOST_TASKS))
        for done, row in enumerate(rows.map(task, memory=TASK_BYTES).iter_rows(), 1):
            counts.add(json.loads(row["counts"]))
            on_progress(done)
    return conclude(store, plan, labels, counts)


def label_task(store: Store, plan: Plan, labels: Labels, embed: Embed, top: int) -> Label:
    dim = plan.parts.dim
    found = label_vectors(labels.prompts, embed) if plan.missing else np.empty((0, dim), np.float32)
    return Label(store, plan.parts.folder, plan.folder, tuple(labels.prompts), found, labels.scale, top)


def configure() -> None:
    """Ray Data's settings, which are sealed into a data set when it is made."""
    context = DataContext.get_current()
    context.max_errored_blocks = 0
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False


def conclude(store: Store, plan: Plan, labels: Labels, counts: Counts) -> dict[str, Any]:
    """Deletes what is stale, and puts the summary, which it returns."""
    store.delete(f"{plan.folder}/{name}" for name in plan.stale)
    summary = {
        "encoder": plan.encoder,
        "labels": {name: list(said) for name, said in labels.prompts.items()},
        "scale": labels.scale,
        **counts.report(),
        "folder": store.uri(plan.folder),
    }
    store.put_atomic(f"{plan.folder}/{SUMMARY}", json.dumps(summary, indent=2, ensure_ascii=False).encode())
    return summary


@dataclass(frozen=True, eq=False)
class Label:
    """Labels a part of `source`, where it is missing, and counts it: a map operator. found: float32 [names, dim]."""

    store: Store
    source: str
    folder: str
    names: tuple[str, ...]
    found: Vectors
    scale: float
    top: int

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        path = f"{self.folder}/{row['name']}"
        if row["missing"]:
            with scratch_folder() as scratch:
                local = Path(scratch) / row["name"]
                self._write(row["name"], local)
                self.store.put_atomic(path, local)
        return {"counts": json.dumps(counted(self.store, path))}

    def _write(self, name: str, local: Path) -> None:
        samples = read_samples(self.store, name, ["row", "label"]).sort_by("row")
        rows, known = samples["row"].to_numpy(), np.array(samples["label"].to_pylist(), object)
        known[~np.isin(known.astype(str), np.array(self.names))] = None
        removed = pa.array(read_takedowns(self.store).rows_of(shard_of(name), version_of(name)))
        batch_rows = max(1, min(BATCH_ROWS, TASK_BYTES // (4 * CELL_BYTES * len(self.names))))
        with (
            open_part(self.store, f"{self.source}/{name}") as stream,
            pq.ParquetFile(stream, pre_buffer=False) as file,
            pq.ParquetWriter(local, SCHEMA) as writer,
        ):
            for batch in file.iter_batches(batch_rows, use_threads=False):
                batch = batch.filter(pc.invert(pc.is_in(batch["row"], removed)))
                chances = probabilities(vectors(batch["embedding"], self.found.shape[1]), self.found, self.scale)
                own = known[np.searchsorted(rows, batch["row"].to_numpy())]
                writer.write_table(_table(batch, chances, np.array(self.names, object), own, self.top))


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


def counted(store: Store, path: str) -> dict[str, dict[str, int]]:
    """Of a part of SCHEMA how many have each label (given), and of those whose label is known, how many there are
    (known) and how many are right, by label."""
    with open_part(store, path) as stream:
        table = pq.read_table(stream, columns=["label", "known"], use_threads=False)
    right = table.filter(pc.equal(table["label"], table["known"]))
    columns = {"given": table["label"], "known": table["known"].drop_null(), "right": right["known"]}
    return {
        name: {each["values"]: each["counts"] for each in pc.value_counts(column).to_pylist()}
        for name, column in columns.items()
    }


@dataclass(frozen=True)
class Counts:
    """What `counted` found, of all parts."""

    given: Counter[str] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)

    def add(self, part: dict[str, dict[str, int]]) -> None:
        for name, counts in part.items():
            getattr(self, name).update(counts)

    def report(self) -> dict[str, Any]:
        known = self.known.total()
        return {
            "images": self.given.total(),
            "given": dict(sorted(self.given.items(), key=lambda item: (-item[1], item[0]))),
            "known": known,
            "accuracy": self.right.total() / known if known else None,
            "accuracy_by_label": {name: self.right[name] / count for name, count in sorted(self.known.items())},
        }
