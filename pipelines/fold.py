"""Near-duplicates among hits: each is folded under the best one that it repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pipelines.index.parts import Vectors

if TYPE_CHECKING:
    from pipelines.search import Hit


def fold(hits: Sequence[Hit], nearness: float) -> list[Hit]:
    """The hits that repeat no better one, in their order, each with those that repeat it in `folded`.

    Repeats: an item of the same sample, an image of the same bytes, or one whose stored vector has a cosine of
    `nearness` or more with the other's; of 1 or more, vectors are not compared. What leads stays, however many more
    hits there are; what is folded under it grows with them.
    """
    leads: list[Hit] = []
    folded: list[list[Hit]] = []
    known: dict[object, int] = {}
    directions = np.stack([_direction(hit) for hit in hits]) if hits else np.empty((0, 1), np.float32)
    places: list[int] = []
    for at, hit in enumerate(hits):
        names = [name for name in ((hit.shard, hit.row), hit.sha256) if name]
        lead = next((known[name] for name in names if name in known), None)
        if lead is None and nearness < 1:
            lead = _first_near(directions[places] @ directions[at], nearness)
        if lead is None:
            lead = len(leads)
            leads.append(hit)
            folded.append([])
            places.append(at)
        else:
            folded[lead].append(hit)
        known.update((name, known.get(name, lead)) for name in names)
    return [replace(hit, folded=tuple(under)) for hit, under in zip(leads, folded, strict=True)]


def _direction(hit: Hit) -> Vectors:
    flat = hit.vector.ravel()
    return np.asarray(flat / max(float(np.linalg.norm(flat)), 1e-12), np.float32)


def _first_near(cosines: Vectors, nearness: float) -> int | None:
    near = np.flatnonzero(cosines >= nearness)
    return int(near[0]) if len(near) else None
