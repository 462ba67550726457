"""A projection to fewer dimensions, fitted to what an output holds: principal components, whitened on request.

Jégou and Chum, Negative evidences and co-occurrences in image retrieval: the benefit of PCA and whitening, ECCV 2012.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import save

from pipelines.contracts import Modality
from pipelines.errors import ConfigError
from pipelines.index.parts import Ids, Parts, Vectors, embeddings_folder, list_parts, pick, unit
from pipelines.index.removed import not_removed
from pipelines.index.train import read_picked
from pipelines.record import EncoderRecord, read_record
from pipelines.storage import Store
from pipelines.takedowns import read_takedowns

FOLDER = "projections"
SMALLEST_VARIANCE = 1e-12


@dataclass(frozen=True)
class Fitted:
    """path: of the file in the output. variance: share of it that is kept. sampled: vectors it was fitted to."""

    path: str
    variance: float
    sampled: int


def fit(
    store: Store,
    encoder: str,
    dim: int,
    whiten: bool = False,
    modalities: Sequence[Modality] | None = None,
    count: int = 100_000,
    seed: int = 0,
) -> Fitted:
    """Fits a projection to a uniform sample of an encoder's vectors, none of which was taken down, and puts it under
    `projections/` of the output.

    modalities: of one space; all that are of the first's, if left out. They have one projection, fitted to as many
    vectors of each; count: in all. Memory: the sample. Raises: ConfigError.
    """
    names = comparable(read_record(store).encoders[encoder], modalities)
    parts = [list_parts(store, embeddings_folder(encoder, modality)) for modality in names]
    share = max(1, count // len(parts))
    drawn = [standing(store, each, pick(each, share, seed)) for each in parts]
    sample = np.concatenate([read_picked(store, each, at) for each, at in zip(parts, drawn, strict=True)])
    mean, components, variance = principal(unit(sample), dim, whiten)
    data = save({"mean": mean, "components": components}, {"modalities": ",".join(names)})
    # Another fit has another name: encoders that take this one go on finding it.
    digest = hashlib.sha256(data).hexdigest()[:8]
    path = f"{FOLDER}/{encoder}-{'-'.join(names)}-{dim}{'-white' if whiten else ''}-{digest}.safetensors"
    store.put_atomic(path, data)
    return Fitted(store.uri(path), variance, len(sample))


def standing(store: Store, parts: Parts, positions: list[Ids]) -> list[Ids]:
    """Of each part the positions, without those of samples that were taken down."""
    allowed = not_removed(store, parts, read_takedowns(store))
    if allowed is None:
        return positions
    masks = [allowed.mask(part.offset, part.offset + part.rows) for part in parts.ranges]
    return [at[mask[at]] for mask, at in zip(masks, positions, strict=True)]


def comparable(record: EncoderRecord, asked: Sequence[Modality] | None) -> list[Modality]:
    """The modalities that one projection is for. Raises: ConfigError."""
    vectors = record.encoder_spec({}).vectors
    if absent := [modality for modality in asked or () if modality not in record.modalities]:
        raise ConfigError(f"There are no {absent[0]} vectors", f"There are: {', '.join(record.modalities)}.")
    first = vectors[(asked or record.modalities)[0]]
    names = list(asked or [modality for modality in record.modalities if vectors[modality].space == first.space])
    if strangers := [modality for modality in names if vectors[modality] != first]:
        raise ConfigError(
            f"{names[0]} vectors are {first.count} of {first.dim} dimensions, of the space {first.space}; those of "
            f"{strangers[0]} are others",
            "Fit to one of them with --modalities.",
        )
    if first.count > 1:
        raise ConfigError(f"{names[0]} has {first.count} vectors an item", "A projection is fitted to one of each.")
    return names


def principal(sample: Vectors, dim: int, whiten: bool) -> tuple[Vectors, Vectors, float]:
    """(mean [d], components [d, dim], share of the variance they keep) of float32 [n, d]. Raises: ConfigError."""
    n, raw = sample.shape
    if not 0 < dim <= raw or n <= dim:
        raise ConfigError(
            f"{dim} dimensions cannot be fitted to {n:,} vectors of {raw}",
            f"Choose at most {min(raw, n - 1)}, or embed more first.",
        )
    mean = sample.mean(0, dtype=np.float64)
    centred = sample - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / (n - 1))
    values, vectors = values[::-1].clip(0), vectors[:, ::-1]
    # The sign of a component is arbitrary: the same for every sample that gives the same component.
    kept = vectors[:, :dim] * np.sign(vectors[np.abs(vectors[:, :dim]).argmax(0), range(dim)])
    if whiten:
        kept = kept / np.sqrt(values[:dim] + SMALLEST_VARIANCE)
    share = float(values[:dim].sum() / max(values.sum(), SMALLEST_VARIANCE))
    return mean.astype(np.float32), np.ascontiguousarray(kept, np.float32), share
