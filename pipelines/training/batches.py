"""Batches of an epoch: pairs of an image and a caption, drawn from a buffer, the same for the same seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count, groupby, islice
from random import Random
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.training.examples import pixels_in


@dataclass(frozen=True)
class Pair:
    """pixels: uint8 [height, width, 3], which the pairs of one image share. identity, together: as EXAMPLE has them."""

    pixels: NDArray[np.uint8]
    caption: str
    identity: str
    together: str | None = None


def pairs(
    tables: Iterable[pa.Table], size: tuple[int, int], captions: Literal["each", "one"], epoch: int
) -> Iterator[Pair]:
    """Of tables of EXAMPLE, in their order. With `one`, each epoch takes the next of an image's captions."""
    for table in tables:
        columns = (table.column(name).to_pylist() for name in ("key", "identity", "together", "captions"))
        for image, key, identity, together, texts in zip(pixels_in(table, size), *columns, strict=True):
            taken = texts if captions == "each" else [texts[(_number(key) + epoch) % len(texts)]]
            # Its own: a view of one image, held for long, would hold all of its table.
            own = image.copy()
            yield from (Pair(own, text, identity, together) for text in taken)


def shuffled(stream: Iterable[Pair], buffer: int, rng: Random) -> Iterator[Pair]:
    """Drawn from the `buffer` pairs that are next in the stream, those that stay together as one, so many at most."""
    held: list[list[Pair]] = []
    size = 0
    for run in _runs(stream, buffer):
        while held and size + len(run) > buffer:
            at = rng.randrange(len(held))
            held[at], held[-1] = held[-1], held[at]
            size -= len(held[-1])
            yield from held.pop()
        held.append(run)
        size += len(run)
    rng.shuffle(held)
    yield from chain.from_iterable(held)


def _runs(stream: Iterable[Pair], most: int) -> Iterator[list[Pair]]:
    """Pairs that follow one another and stay together, at most so many; any other by itself."""
    alone = count()
    runs = groupby(stream, lambda pair: next(alone) if pair.together is None else pair.together)
    for _, run in runs:
        while some := list(islice(run, most)):
            yield some


def batches(stream: Iterable[Pair], size: int, whole_alone: bool = False) -> Iterator[list[Pair]]:
    """Of `size` pairs each; what is left over at the end only where there is nothing else.

    whole_alone: nor then, for the batches of workers must be alike.
    """
    batch: list[Pair] = []
    whole = False
    for pair in stream:
        batch.append(pair)
        if len(batch) == size:
            yield batch
            batch, whole = [], True
    if len(batch) > 1 and not whole and not whole_alone:
        yield batch


def hashed(identity: str) -> int:
    """A number that is equal where identities are, of 63 bits."""
    return _number(identity) >> 1


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
