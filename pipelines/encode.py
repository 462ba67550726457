"""The encode actor: pixels and tokens in, vectors out. Loads its model once and keeps the device busy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from pipelines.config import EncodeConfig
from pipelines.contracts import Modality, encoded_schema, passing_schema
from pipelines.encoders.base import Encoder, EncoderSpec, Target
from pipelines.encoders.device import stages
from pipelines.encoders.items import Input, Vectors, items_of, stored, with_vectors
from pipelines.encoders.registry import load, tokenizer
from pipelines.errors import EncoderError
from pipelines.observe import Observe, SharedClock, nowhere, peak_memory_mib
from pipelines.overlap import BatchSize, overlapped

NORM_TOLERANCE = 1e-2


class Encode:
    """PIXELS tables to `encoded_schema` tables, on one device.

    targets: the encoders of this actor, in turn on its device. others: whether there are encoders in other actors;
    their rows pass through, and the result has the columns of both schemas. Vectors are
    L2-normalised in fp32 (where spec.normalize) and cast to spec.dtype. One that is not finite in half precision is
    computed again in fp32; still not finite, it becomes a Reject. End marks pass through. Two calls may run at
    once: they compute in turns, and one copies and collects while the other computes.

    settings: resolved, without "auto". device: as torch names it, `cuda:0` or `cpu`.
    Raises: EncoderError where a model cannot be loaded, gives vectors of the wrong shape or
    nothing finite, or has not enough memory for one item.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        settings: EncodeConfig,
        device: str,
        observe: Observe | None = None,
        others: bool = False,
    ) -> None:
        if device == "cpu":
            torch.set_num_threads(int(settings.threads))
        # fp32 is fp32: with TF32, cuDNN's default, a patch embedding has the mantissa of fp16.
        torch.backends.cudnn.allow_tf32 = False
        self._observe = observe or nowhere
        dtype = targets[0].spec.dtype
        self._schema = passing_schema(dtype) if others else encoded_schema(dtype)
        turn = threading.Lock()
        self._encoders = {target.folder: _Towers(target, torch.device(device), turn) for target in targets}
        self._counting, self._clock = threading.Lock(), SharedClock()
        self._counted = {"out_of_memory": 0, "recomputed": 0}

    def __call__(self, table: pa.Table) -> pa.Table:
        with self._clock.running():
            by_encoder = [
                (folder, table.filter(pc.equal(table["encoder"], folder)))
                for folder in pc.unique(table["encoder"]).to_pylist()
            ]
            own = [self._encoders[folder](rows) for folder, rows in by_encoder if folder in self._encoders]
            passing = [rows for folder, rows in by_encoder if folder not in self._encoders]
            tables = [conforming(rows, self._schema) for rows in (*(rows for rows, _ in own), *passing)]
            result = pa.concat_tables([self._schema.empty_table(), *tables])
        self._observe(
            stage="encode",
            rows=sum(rows.num_rows - pc.sum(rows["end"], min_count=0).as_py() for rows, _ in own),
            items=sum(items for _, items in own),
            seconds=self._clock.take(),
            peak_mib=peak_memory_mib(),
            **self._new_counts(),
        )
        return result

    def batch_size(self, modality: Modality) -> int:
        """Items in a batch of the first encoder now: fewer than was set, after memory ran out."""
        return next(iter(self._encoders.values())).towers[modality].size.now

    def _new_counts(self) -> dict[str, int]:
        """What was counted since it was last asked for, the warm-up included."""
        with self._counting:
            towers = [tower for encoder in self._encoders.values() for tower in encoder.towers.values()]
            now = {
                "out_of_memory": sum(tower.out_of_memory for tower in towers),
                "recomputed": sum(tower.recomputed for tower in towers),
            }
            new = {name: now[name] - self._counted[name] for name in now}
            self._counted = now
        return new


class _Towers:
    """One encoder of an actor, loaded and warm."""

    def __init__(self, target: Target, device: torch.device, turn: threading.Lock) -> None:
        self._spec = target.spec
        encoder = load(target.spec, device)
        self.towers = {modality: Tower(encoder, modality, target.batch_size, turn) for modality in target.modalities}
        self._checked: set[Modality] = set()
        for tower in self.towers.values():
            tower.warm_up()

    def __call__(self, table: pa.Table) -> tuple[pa.Table, int]:
        """The table with its vectors, and how many items there were."""
        encoded = {modality: self._encoded(table, modality) for modality in self.towers}
        return with_vectors(table, encoded, self._spec), sum(len(vectors.values) for vectors in encoded.values())

    def _encoded(self, table: pa.Table, modality: Modality) -> Vectors:
        items = items_of(table, modality)
        raw = self.towers[modality](items.inputs, items.name)
        vectors = Vectors(items, stored(raw, self._spec, self._spec.vectors[modality]))
        if modality not in self._checked and items.inputs:
            self._check(modality, vectors)
            self._checked.add(modality)
        return vectors

    def _check(self, modality: Modality, first: Vectors) -> None:
        finite = first.values[first.finite].astype(np.float32)
        if not len(finite):
            raise EncoderError(
                f"{self._spec.name}: none of the first {len(first.values)} {modality} vectors is finite",
                "Check the checkpoint, or store float32 (write.dtype).",
            )
        each = finite.reshape(-1, self._spec.vectors[modality].dim)
        if self._spec.normalize and np.abs(np.linalg.norm(each, axis=1) - 1).max() > NORM_TOLERANCE:
            raise EncoderError(f"{self._spec.name}: the first {modality} vectors are not of unit norm")


def conforming(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """With the schema's columns, null where the table has none."""
    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


class Tower:
    """One tower of a loaded encoder, fed in overlapped batches.

    turn: who may compute. size: of a batch. recomputed: items computed again in fp32 so far.
    """

    def __init__(self, encoder: Encoder, modality: Modality, limit: int, turn: threading.Lock) -> None:
        self._encoder, self._modality, self._turn = encoder, modality, turn
        self.size, self._stages = BatchSize(limit), stages(encoder, modality, turn)
        self._in_fp32: Tower | None = None
        self._loading = threading.Lock()
        self.recomputed = 0

    def __call__(self, inputs: Sequence[Input], name: Callable[[int], str]) -> NDArray[np.float32]:
        """Raw float32 [n, count * dim] of the modality's inputs."""
        raw = self._once(inputs, name)
        overflowed = np.flatnonzero(~np.isfinite(raw).all(axis=1))
        if len(overflowed) and self._encoder.spec.precision != "fp32":
            again = [inputs[i] for i in overflowed]
            raw[overflowed] = self._exact()._once(again, lambda i: name(int(overflowed[i])))
            self.recomputed += len(overflowed)
        return raw

    def _once(self, inputs: Sequence[Input], name: Callable[[int], str]) -> NDArray[np.float32]:
        vectors = self._encoder.spec.vectors[self._modality]
        raw = np.empty((len(inputs), vectors.count * vectors.dim), np.float32)
        if inputs:
            order = np.arange(len(inputs)) if self._modality == "image" else longest_first(inputs)
            in_order = [inputs[i] for i in order]
            raw[order] = overlapped(in_order, self.size, self._stages, lambda i: name(int(order[i])))
        return raw

    def warm_up(self) -> None:
        """One full batch of large items: allocates what it needs, and finds out whether it fits. On a CPU, which
        has nothing to prepare, one item."""
        sample = largest(self._encoder.spec, self._modality)
        count = self.size.limit if self._encoder.device.type == "cuda" else 1
        overlapped([sample] * count, self.size, self._stages)

    @property
    def out_of_memory(self) -> int:
        return self.size.out_of_memory + (self._in_fp32.out_of_memory if self._in_fp32 else 0)

    def _exact(self) -> Tower:
        with self._loading:
            if self._in_fp32 is None:
                self._in_fp32 = Tower(self._in_full(), self._modality, self.size.limit, self._turn)
            return self._in_fp32

    def _in_full(self) -> Encoder:
        return load(replace(self._encoder.spec, precision="fp32"), self._encoder.device)


def longest_first(inputs: Sequence[Input]) -> NDArray[np.intp]:
    """Positions by falling length of the caption, for encoders that trim a batch's padding to its longest.

    A caption's padding is taken to be whatever its last token is; being wrong costs time, not exactness.
    """
    captions = (item[1] if isinstance(item, tuple) else item for item in inputs)
    return np.argsort([-int((tokens != tokens[-1:]).sum()) for tokens in captions], kind="stable")


def largest(spec: EncoderSpec, modality: Modality) -> Input:
    if modality == "image":
        return noise(spec)
    return longest_caption(spec) if modality == "text" else (noise(spec), longest_caption(spec))


def noise(spec: EncoderSpec) -> Input:
    """An image of the encoder's size."""
    assert spec.image is not None
    shape = (*(spec.image.crop or spec.image.size), spec.image.channels)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


LONG_CAPTION = 512
"""Words: a model that reads books is not warmed with them."""


def longest_caption(spec: EncoderSpec) -> Input:
    """Tokens of a caption that is cut to the context length, or of a long one."""
    return next(iter(tokenizer(spec)(["word " * min(spec.context_length, LONG_CAPTION)])))
