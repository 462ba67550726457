"""Evaluation inside a run: each worker embeds its share of images and captions, and all shares are compared."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.encoders.matcher_model import Matcher
from pipelines.errors import VecmillError
from pipelines.training.batches import hashed
from pipelines.training.examples import pixels_in
from pipelines.training.feed import Feed
from pipelines.training.losses import unit
from pipelines.training.place import Place
from pipelines.training.retrieval import recalls

AT_ONCE = 128

Vectors = NDArray[np.float32]
Identities = NDArray[np.int64]
Share = tuple[Vectors, Identities, Vectors, Identities]
"""Images, their identities; captions, theirs."""


@torch.no_grad()
def validate(matcher: Matcher, size: tuple[int, int], most: int, feed: Feed, place: Place) -> dict[str, Any]:
    """Recalls of the first `most` images of the data set `val`, for the first worker; nothing for the others.

    Every worker must call it. Raises: VecmillError where there is no image.
    """
    started, training = time.monotonic(), matcher.training
    # Statistics of batch norms are each worker's own, of its own batches.
    place.make_alike(matcher.buffers())
    matcher.eval()
    shares = place.gather(_embedded(matcher, size, most, feed, place))
    matcher.train(training)
    if place.rank:
        return {}
    images, of_images, texts, of_texts = (np.concatenate(column) for column in zip(*shares, strict=True))
    if not len(images):
        raise VecmillError("There is no sample to evaluate on.", "See data.val, data.val_input or data.split.")
    counts = {"images": len(images), "captions": len(texts), "seconds": time.monotonic() - started}
    return {**recalls(images, of_images, texts, of_texts), "evaluated": counts}


def _embedded(matcher: Matcher, size: tuple[int, int], most: int, feed: Feed, place: Place) -> Share:
    dim = matcher.image_head.out_features
    images, texts = [np.empty((0, dim), np.float32)], [np.empty((0, dim), np.float32)]
    of_images, of_texts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for table in _own(most, place):
        identities = [hashed(identity) for identity in table.column("identity").to_pylist()]
        captions = table.column("captions").to_pylist()
        images.append(_vectors(matcher.image(feed.pixels(pixels_in(table, size)))))
        of_images.append(np.array(identities))
        flat = [text for each in captions for text in each]
        runs = (flat[at : at + AT_ONCE] for at in range(0, len(flat), AT_ONCE))
        texts.extend(_vectors(matcher.text(*feed.tokens(run))) for run in runs)
        of_texts.append(np.repeat(identities, [len(each) for each in captions]))
    return np.concatenate(images), np.concatenate(of_images), np.concatenate(texts), np.concatenate(of_texts)


def _own(most: int, place: Place) -> Iterator[pa.Table]:
    """Every worker reads all, in one order, and takes turns: no sample is doubled or left out. Each image is decoded
    once for each worker, unless data.cache keeps it."""
    left = most
    for number, table in enumerate(place.tables("val", AT_ONCE)):
        if left <= 0:
            return
        table, left = table.slice(0, left), left - table.num_rows
        if number % place.workers == place.rank:
            yield table


def _vectors(embeddings: Tensor) -> Vectors:
    return unit(embeddings.float()).cpu().numpy()
