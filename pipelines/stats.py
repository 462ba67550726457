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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipelines import sources
from pipelines.config import DecodeConfig, InputConfig
from pipelines.contracts import Reject, Shard
from pipelines.decode import open_image
from pipelines.encoders.matcher_text import words_of
from pipelines.encoders.pixels import prepared
from pipelines.failures import plain_errors
from pipelines.ledger import Work
from pipelines.read import ShardSource
from pipelines.storage import Store
from pipelines.training.examples import value_of

COLOURS = ("red", "green", "blue")


@dataclass
class Stats:
    """Of some samples, as histograms. captions: how many samples have so many. words: how many captions have so many.
    identities: images of each. channels: of each colour, how many pixels of all images have a value, 0 to 255."""

    samples: int = 0
    images: int = 0
    unreadable: int = 0
    captions: Counter[int] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    identities: Counter[str] = field(default_factory=Counter)
    channels: list[Counter[int]] = field(default_factory=lambda: [Counter() for _ in COLOURS])

    def add(self, other: Stats) -> None:
        self.samples += other.samples
        self.images += other.images
        self.unreadable += other.unreadable
        for own, more in zip(self._histograms(), other._histograms(), strict=True):
            own.update(more)

    def _histograms(self) -> list[Counter[Any]]:
        return [self.captions, self.words, self.identities, *self.channels]

    def see(self, image: np.ndarray[Any, Any]) -> None:
        """image: uint8 [height, width, 3]."""
        self.images += 1
        for at, channel in enumerate(self.channels):
            values, counts = np.unique(image[..., at], return_counts=True)
            channel.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))

    def json(self) -> str:
        return json.dumps(vars(self))

    @staticmethod
    def parse(text: str) -> Stats:
        held = json.loads(text)
        counts = {name: _by_number(held[name]) for name in ("captions", "words")}
        identities, channels = Counter(held["identities"]), list(map(_by_number, held["channels"]))
        return Stats(**{**held, **counts, "identities": identities, "channels": channels})

    def report(self) -> dict[str, Any]:
        """What people want to know, as JSON. Means and deviations are of channels in [0, 1], over all pixels."""
        moments = [_moments(channel) for channel in self.channels]
        return {
            "samples": self.samples,
            "images": self.images,
            "unreadable_images": self.unreadable,
            "captions": {"count": _sum(self.captions), **_summary(self.captions, "per_sample")},
            "words": {"count": _sum(self.words), **_summary(self.words, "per_caption")},
            "identities": {"count": len(self.identities), **_summary(Counter(self.identities.values()), "images_each")},
            "channels": {
                "mean": [mean for mean, _ in moments],
                "std": [std for _, std in moments],
                "histogram": [[channel[value] for value in range(256)] for channel in self.channels],
            },
            "pixels": self.channels[0].total(),
        }


def _by_number(held: dict[str, int]) -> Counter[int]:
    return Counter({int(value): count for value, count in held.items()})


def _sum(histogram: Counter[int]) -> int:
    return sum(value * count for value, count in histogram.items())


def _moments(channel: Counter[int]) -> tuple[float, float]:
    """Mean and deviation in [0, 1]; in whole numbers up to the last step, for the difference of two large ones would
    lose digits."""
    n, total = max(1, channel.total()), _sum(channel)
    squares = sum(value**2 * count for value, count in channel.items())
    return total / n / 255, sqrt(n * squares - total**2) / n / 255


def _summary(histogram: Counter[int], name: str) -> dict[str, Any]:
    if not histogram:
        return {name: None}
    values = sorted(histogram)
    total = histogram.total()
    shares = np.cumsum([histogram[value] for value in values])
    return {
        name: {
            "mean": _sum(histogram) / total,
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


def measure(config: InputConfig, identity: str | None) -> Stats:
    """Of everything in the inputs. Ray must be connected. Raises: InputError, StorageError, WorkerError."""
    store, decode = Store(options=config.storage), DecodeConfig()
    shards = planned(config)
    pending = [Work(shard, ("stats",)) for shard in shards]
    source = ShardSource(pending, config.read, store)
    rows = ray.data.read_datasource(source, override_num_blocks=len(shards)).map_batches(
        Measure(decode, identity), batch_format="pyarrow", batch_size=None, memory=decode.peak_mib * 2**20
    )
    with plain_errors():
        return added(row["stats"] for row in rows.iter_rows())


def planned(config: InputConfig) -> list[Shard]:
    """The input's shards. Raises: InputError."""
    return sources.plan_shards(config.input, config.format, config.read, Store(options=config.storage), {})[0]


def added(parts: Iterable[str]) -> Stats:
    whole = Stats()
    for part in parts:
        whole.add(Stats.parse(part))
    return whole


def draw(stats: Stats) -> bytes:
    """A PNG of the histograms, of which those that are empty are left out."""
    counts = {
        "captions of an image": stats.captions,
        "words of a caption": stats.words,
        "images of an identity": Counter(stats.identities.values()),
    }
    shown = {title: histogram for title, histogram in counts.items() if histogram}
    panels = len(shown) + bool(stats.images)
    figure = Figure(figsize=(4.5 * max(1, panels), 3.2), layout="constrained")
    for at, (title, histogram) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(1, panels, at)
        axes.bar(list(histogram), list(histogram.values()))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel=title, ylabel="count", xlim=(min(histogram) - 1, max(histogram) + 1))
        axes.grid(alpha=0.3, axis="y")
    if stats.images:
        _draw_channels(figure.add_subplot(1, panels, panels), stats)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _draw_channels(axes: Axes, stats: Stats) -> None:
    """Shares of the pixels by value, and each channel's mean and deviation."""
    for colour, channel in zip(COLOURS, stats.channels, strict=True):
        mean, std = _moments(channel)
        shares = [channel[value] / channel.total() for value in range(256)]
        axes.plot(np.arange(256) / 255, shares, color=f"tab:{colour}", label=f"{colour} {mean:.3f} ± {std:.3f}")
        axes.axvline(mean, color=f"tab:{colour}", linestyle=":")
    axes.set(xlabel="value of a channel", ylabel="share of the pixels", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
