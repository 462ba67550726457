"""Drift: how much worse an index's quantiser, trained on older vectors, serves the newer ones."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
from pydantic import BaseModel, ConfigDict

from pipelines.index.among import transformed
from pipelines.index.parts import Vectors

_NOTHING = 1e-12


class Drift(BaseModel):
    """Mean squared error of vectors through the quantiser, over the variance of the old ones.

    of: what errs, the `code` of a vector, or where it is kept whole the `centroid` of its inverted list.
    """

    model_config = ConfigDict(frozen=True)

    of: str
    old: float
    new: float

    @property
    def ratio(self) -> float:
        """1 where the new vectors are like the old."""
        return self.new / max(self.old, _NOTHING)


def drift(index: Any, old: Vectors, new: Vectors) -> Drift | None:
    """Of float32 [n, dim] samples, none of which was trained on; None for an index that learns nothing of them, or
    that cannot encode them without adding them.

    index: the trained one, empty or not.
    """
    codec, old, new = _codec(index, old, new)
    ivf = faiss.try_extract_index_ivf(codec)
    whole = isinstance(codec, faiss.IndexFlat)
    if whole or not (len(old) and len(new)):
        return None
    by_list = ivf is not None and isinstance(faiss.downcast_index(ivf), faiss.IndexIVFFlat)
    if by_list:
        old, new = transformed(codec, old), transformed(codec, new)
    spread = max(float(((old - old.mean(axis=0)) ** 2).sum(axis=1).mean()), _NOTHING)
    try:
        errors = [(_to_centroid(ivf, each) if by_list else _of_code(codec, each)) / spread for each in (old, new)]
    except RuntimeError:
        return None
    found = Drift(of="centroid" if by_list else "code", old=errors[0], new=errors[1])
    return found if np.isfinite(errors).all() else None


def _codec(index: Any, old: Vectors, new: Vectors) -> tuple[Any, Vectors, Vectors]:
    """What encodes, out of what gives ids, and out of a graph; and the samples as it gets them."""
    index = faiss.downcast_index(index)
    if isinstance(index, (faiss.IndexIDMap, faiss.IndexIDMap2)):
        return _codec(index.index, old, new)
    if isinstance(index, faiss.IndexHNSW):
        return _codec(index.storage, old, new)
    if isinstance(index, faiss.IndexPreTransform) and isinstance(faiss.downcast_index(index.index), faiss.IndexHNSW):
        return _codec(index.index, transformed(index, old), transformed(index, new))
    return index, old, new


def _of_code(codec: Any, sample: Vectors) -> float:
    decoded = codec.sa_decode(codec.sa_encode(sample))
    return float(((decoded - sample) ** 2).sum(axis=1).mean())


def _to_centroid(ivf: Any, sample: Vectors) -> float:
    centroids = ivf.quantizer.reconstruct_n(0, ivf.nlist)
    _, nearest = ivf.quantizer.search(sample, 1)
    return float(((centroids[nearest[:, 0]] - sample) ** 2).sum(axis=1).mean())


def warning(found: Drift | None, limit: float) -> str | None:
    """What to tell where retraining is due."""
    if found is None or found.ratio <= limit:
        return None
    return (
        f"The new vectors are quantised {found.ratio:.2f} times as badly as the old (index.drift_warning is "
        f"{limit:g}): retraining is due, `vecmill index --force`"
    )
