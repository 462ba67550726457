"""What is in an input: captions and their lengths, identities, and the mean and deviation of the images' channels.

Streamed over shards on Ray, and exact: what tasks send back are whole numbers, and the driver adds them up. Memory: the
distinct identities.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from matplotlib.figure import Figure

from pipelines import sources
from pipelines.config import DecodeConfig, ReadConfig
from pipelines.contracts import Reject
from pipelines.decode import open_image
from pipelines.encoders.matcher_text import words_of
from pipelines.encoders.pixels import prepared
from pipelines.ledger import Work
from pipelines.read import ShardSource
from pipelines.storage import Store
from pipelines.training.examples import value_of

CHANNELS = 3


@dataclass
class Stats:
    """Of some samples. captions, words: how many samples have so many captions, how many captions so many words.
    identities: images of each. pixels: of all images; sums, squares: of the channels' values, 0 to 255."""

    samples: int = 0
    images: int = 0
    unreadable: int = 0
    captions: Counter[int] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    identities: Counter[str] = field(default_factory=Counter)
    pixels: int = 0
    sums: list[int] = field(default_factory=lambda: [0] * CHANNELS)
    squares: list[int] = field(default_factory=lambda: [0] * CHANNELS)

    def add(self, other: Stats) -> None:
        for name, value in vars(other).items():
            own = getattr(self, name)
            if isinstance(own, Counter):
                own.update(value)
            else:
                setattr(
                    self,
                    name,
                    [a + b for a, b in zip(own, value, strict=True)] if isinstance(own, list) else own + value,
                )

    def see(self, image: np.ndarray[Any, Any]) -> None:
        """image: uint8 [height, width, 3]."""
        values = image.reshape(-1, CHANNELS).astype(np.int64)
        self.images += 1
        self.pixels += len(values)
        self.sums = [a + int(b) for a, b in zip(self.sums, values.sum(0), strict=True)]
        self.squares = [a + int(b) for a, b in zip(self.squares, (values**2).sum(0), strict=True)]

    def json(self) -> str:
        return json.dumps(vars(self))

    @staticmethod
    def parse(text: str) -> Stats:
        held = json.loads(text)
        counts = {name: Counter({int(key): n for key, n in held[name].items()}) for name in ("captions", "words")}
        return Stats(**{**held, **counts, "identities": Counter(held["identities"])})

    def report(self) -> dict[str, Any]:
        """What people want to know, as JSON. Means and deviations are of channels in [0, 1], over all pixels."""
        n = max(1, self.pixels)
        means = [total / n for total in self.sums]
        # In whole numbers up to the last step: the difference of two large ones would lose digits.
        spread = [sqrt(n * square - total**2) / n for square, total in zip(self.squares, self.sums, strict=True)]
        return {
            "samples": self.samples,
            "images": self.images,
            "unreadable_images": self.unreadable,
            "captions": {
                "count": sum(k * v for k, v in self.captions.items()),
                **_summary(self.captions, "per_sample"),
            },
            "words": {"count": sum(k * v for k, v in self.words.items()), **_summary(self.words, "per_caption")},
            "identities": {"count": len(self.identities), **_summary(Counter(self.identities.values()), "images_each")},
            "channels": {"mean": [mean / 255 for mean in means], "std": [each / 255 for each in spread]},
            "pixels": self.pixels,
        }


def _sum(one: Any, other: Any) -> Any:
    return [a + b for a, b in zip(one, other, strict=True)] if isinstance(one, list) else one + other


def _summary(histogram: Counter[int], name: str) -> dict[str, Any]:
    if not histogram:
        return {name: None}
    values = sorted(histogram)
    total = histogram.total()
    shares = np.cumsum([histogram[value] for value in values])
    return {
        name: {
            "mean": sum(k * v for k, v in histogram.items()) / total,
            "median": values[int(np.searchsorted(shares, total / 2))],
            "min": values[0],
            "max": values[-1],
            "histogram": {str(value): histogram[value] for value in values},
        }
    }


@dataclass(frozen=True)
class Measure:
    """SAMPLE to one row of Stats, a map operator. identity: `label`, or a field of the metadata; None counts none."""

    decode: DecodeConfig
    identity: str | None

    def __call__(self, batch: pa.Table) -> pa.Table:
        stats = Stats()
        images = batch.column("image")
        for at, row in enumerate(batch.drop_columns(["image"]).to_pylist()):
            if not row["end"]:
                self._one(stats, row, images[at].as_py())
        return pa.table({"stats": [stats.json()]})

    def _one(self, stats: Stats, row: dict[str, Any], image: bytes | None) -> None:
        captions = [caption for caption in row["captions"] or [] if caption]
        stats.samples += 1
        stats.captions[len(captions)] += 1
        stats.words.update(len(words_of(caption)) for caption in captions)
        if self.identity:
            value = value_of(self.identity, row, json.loads(row["metadata"] or "{}"))
            stats.identities.update([value] if value is not None and row["has_image"] else [])
        if row["has_image"]:
            opened = open_image(image or b"", self.decode.max_pixels)
            if isinstance(opened, Reject):
                stats.unreadable += 1
            else:
                stats.see(np.asarray(prepared(opened, self.decode.max_aspect).convert("RGB")))


def measure(
    inputs: list[str], format: str, identity: str | None, read: ReadConfig, storage: dict[str, dict[str, Any]]
) -> Stats:
    """Of everything in the inputs. Ray must be connected. Raises: InputError."""
    store, decode = Store(options=storage), DecodeConfig()
    shards, _ = sources.plan_shards(inputs, format, read, store, {})
    source = ShardSource([Work(shard, ("stats",)) for shard in shards], read, store)
    rows = ray.data.read_datasource(source, override_num_blocks=len(shards)).map_batches(
        Measure(decode, identity), batch_format="pyarrow", batch_size=None, memory=decode.peak_mib * 2**20
    )
    return added(row["stats"] for row in rows.iter_rows())


def added(parts: Iterable[str]) -> Stats:
    whole = Stats()
    for part in parts:
        whole.add(Stats.parse(part))
    return whole


def draw(stats: Stats) -> bytes:
    """A PNG of the three histograms."""
    panels = {
        "captions of an image": stats.captions,
        "words of a caption": stats.words,
        "images of an identity": Counter(stats.identities.values()),
    }
    shown = {title: histogram for title, histogram in panels.items() if histogram}
    figure = Figure(figsize=(4.5 * max(1, len(shown)), 3.2), layout="constrained")
    for at, (title, histogram) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(1, len(shown), at)
        axes.bar(list(histogram), list(histogram.values()))
        axes.set(xlabel=title, ylabel="count")
        axes.grid(alpha=0.3, axis="y")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
