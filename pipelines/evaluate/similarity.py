"""How alike the items of two sets are: the matrix, matched against unmatched pairs, and the gap between the sets."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from numpy.typing import NDArray

from pipelines.contracts import Modality
from pipelines.errors import ConfigError, PreflightError
from pipelines.evaluate.charts import HEAT, figure, histogram, png
from pipelines.evaluate.groups import OUTSIDE, Groups
from pipelines.evaluate.items import Tile, codes_of, collect, collect_any, draw, first_with, places_of, stored
from pipelines.evaluate.thumbnails import samples_at, thumbnail
from pipelines.index.parts import Ids, Vectors, unit
from pipelines.record import read_record, require_same
from pipelines.storage import Store

FEW, BINS, EDGES, LABELS, TITLE_CHARACTERS = 16, 64, 81, 40, 130
TILE_ROWS, ROWS_AT_ONCE = 16_384, 256
FINE = np.linspace(-1.0001, 1.0001, 2**17 + 1)
"""Bounds of bins of cosines, narrower than float16 tells apart; rounding may take one beyond 1."""


@dataclass(frozen=True)
class Side:
    """One axis: vectors of a modality of an encoder of an output."""

    store: Store
    encoder: str
    modality: Modality

    @property
    def name(self) -> str:
        return f"{self.encoder} {self.modality}"


@dataclass(frozen=True)
class Drawn:
    """Some items of a side, with vectors of unit length, and their samples as `samples_at` gives them."""

    tile: Tile
    samples: list[dict[str, Any]]

    @property
    def labels(self) -> list[str | None]:
        return [sample["label"] for sample in self.samples]

    def of(self, order: Ids) -> Drawn:
        return Drawn(self.tile.of(order), [self.samples[at] for at in order.tolist()])


def require_comparable(one: Side, other: Side) -> None:
    """Raises: ConfigError for vectors of different spaces, PreflightError for those of different encoders, with the
    difference."""
    records = [read_record(side.store).encoders[side.encoder] for side in (one, other)]
    specs = [record.encoder_spec(side.store.options) for record, side in zip(records, (one, other), strict=True)]
    if records[0].fingerprint != records[1].fingerprint:
        try:
            require_same(one.encoder, records[0], specs[1])
        except PreflightError as error:
            difference = error.what.partition("\n")[2]
            raise ConfigError(
                f"{one.name} and {other.name} are of different encoders: their vectors cannot be compared:\n"
                f"{difference}",
                "`vecmill compare` shows what each of them finds.",
            ) from None
    for record, side in zip(records, (one, other), strict=True):
        if side.modality not in record.modalities:
            raise ConfigError(
                f"embeddings/{side.encoder} has no {side.modality} vectors", f"It has: {', '.join(record.modalities)}."
            )
    spaces = [spec.vectors[side.modality].space for spec, side in zip(specs, (one, other), strict=True)]
    if spaces[0] != spaces[1]:
        raise ConfigError(
            f"{one.name} vectors are of the space {spaces[0]}, {other.name} vectors of {spaces[1]}: they "
            "cannot be compared",
            "Choose --a and --b of one space: `vecmill encoders show` lists them.",
        )


def similarity(one: Side, other: Side, sample: int = 1_000, seed: int = 0, folder: str | None = None) -> dict[str, Any]:
    """Figures, matrix and picture of a seeded sample, written under `folder` of the first output; returns the figures.

    Scores are cosines. Matched are items of one sample; those of one label, where a set is compared with itself.
    Memory: a matrix of the sample, its vectors, and a tile. Raises: ConfigError where the two cannot be compared.
    """
    require_comparable(one, other)
    itself = (one.store.root, one.modality) == (other.store.root, other.modality)
    rows, columns = _of_itself(one, sample, seed) if itself else _in_pairs(one, other, sample, seed)
    order = _order(rows)
    rows, columns = rows.of(order), columns.of(order)
    scores = np.asarray(rows.tile.vectors @ columns.tile.vectors.T, np.float32)
    same = (rows.tile.codes[:, None] == columns.tile.codes) & (rows.tile.codes != OUTSIDE)[:, None]
    counted = ~np.eye(len(scores), dtype=bool) if itself else np.ones(scores.shape, bool)
    pairs = Pairs(scores, same & counted, ~same & counted)
    target = folder or f"similarity/{one.encoder}/{one.modality}-{other.modality}"
    figures: dict[str, Any] = {
        "a": one.name,
        "b": other.name,
        "items": len(scores),
        "matched_by": "label" if itself else "sample",
        "seed": seed,
        **pairs.figures(),
        **set_figures(rows.tile.vectors, columns.tile.vectors),
        "labels": label_means(scores, counted, rows.labels),
        "folder": one.store.uri(target),
    }
    one.store.put_atomic(f"{target}/similarity.png", _page(one, other, rows, columns, pairs, figures))
    one.store.put_atomic(f"{target}/matrix.npy", _npy(scores))
    one.store.put_atomic(f"{target}/similarity.json", json.dumps(figures, indent=2).encode())
    return figures


def _of_itself(side: Side, sample: int, seed: int) -> tuple[Drawn, Drawn]:
    items = stored(side.store, side.encoder, side.modality, Groups(side.store))
    ids, _ = draw(items, sample, seed)
    tile = collect(items, ids, TILE_ROWS)
    codes = codes_of(replace(items, groups=Groups(side.store, "label")), ids)
    drawn = Drawn(Tile(ids, codes, unit(tile.vectors)), samples_at(side.store, places_of(items, ids)))
    return drawn, drawn


def _in_pairs(one: Side, other: Side, sample: int, seed: int) -> tuple[Drawn, Drawn]:
    """Rows, and for each a column of the same sample; of the same key, where the outputs are two."""
    # Samples of one output have the same codes only in the same Groups; keys have theirs everywhere.
    same = Groups(one.store) if one.store.root == other.store.root else None
    mine, theirs = (
        stored(side.store, side.encoder, side.modality, same or Groups(side.store, "key")) for side in (one, other)
    )
    ids, _ = draw(mine, sample, seed)
    partners = first_with(theirs, codes_of(mine, ids))
    ids, partners = ids[partners != OUTSIDE], partners[partners != OUTSIDE]
    if not len(ids):
        raise ConfigError(f"{one.name} and {other.name} have no sample in common", "Are they of the same input?")
    return (
        Drawn(collect(mine, ids, TILE_ROWS).unit(), samples_at(one.store, places_of(mine, ids))),
        Drawn(collect_any(theirs, partners, TILE_ROWS).unit(), samples_at(other.store, places_of(theirs, partners))),
    )


def _order(rows: Drawn) -> Ids:
    """By label, and within one along the direction in which the vectors differ most, so that like is beside like."""
    centred = rows.tile.vectors - rows.tile.vectors.mean(axis=0)
    direction = np.linalg.svd(centred, full_matrices=False)[2][0]
    return np.asarray(np.lexsort((centred @ direction, [label or "" for label in rows.labels])))


@dataclass(frozen=True)
class Pairs:
    """Scores, float32 [n, n], and which are of matched and of unmatched pairs."""

    scores: Vectors
    matched: NDArray[np.bool_]
    unmatched: NDArray[np.bool_]

    def figures(self) -> dict[str, Any]:
        """Separation: AUC, the share of (matched, unmatched) pairs of which the matched one scores more, ties half.

        From counts by FINE bins of scores, since a sorted copy of all pairs would take many times the matrix.
        """
        matched, unmatched = self.counted(self.matched, FINE), self.counted(self.unmatched, FINE)
        return {"matched": _spread(matched), "unmatched": _spread(unmatched), "auc": _auc(matched, unmatched)}

    def counted(self, which: NDArray[np.bool_], edges: Vectors) -> NDArray[np.int64]:
        """int64 [len(edges) - 1]: how many of these pairs score within each bin; some rows at a time."""
        blocks = np.array_split(np.arange(len(self.scores)), -(-len(self.scores) // ROWS_AT_ONCE))
        return sum(
            (np.histogram(self.scores[rows][which[rows]], edges)[0] for rows in blocks),
            np.zeros(len(edges) - 1, np.int64),
        )


def _spread(counts: NDArray[np.int64]) -> dict[str, float] | None:
    """counts: by bin of FINE."""
    pairs = int(counts.sum())
    if not pairs:
        return None
    middles = (FINE[1:] + FINE[:-1]) / 2
    low, middle, high = (float(middles[np.searchsorted(counts.cumsum(), share * pairs)]) for share in (0.05, 0.5, 0.95))
    return {"pairs": pairs, "mean": float(counts @ middles / pairs), "p5": low, "median": middle, "p95": high}


def _auc(matched: NDArray[np.int64], unmatched: NDArray[np.int64]) -> float | None:
    below = unmatched.cumsum() - unmatched / 2
    both = int(matched.sum()) * int(unmatched.sum())
    return float(matched @ below / both) if both else None


def set_figures(rows: Vectors, columns: Vectors) -> dict[str, float]:
    """modality_gap: distance of the means of the two (Liang et al., NeurIPS 2022); with each set's own spread, the
    mean distance from its mean, to compare it with."""
    means = rows.mean(axis=0), columns.mean(axis=0)
    spreads = [
        float(np.linalg.norm(each - mean, axis=1).mean()) for each, mean in zip((rows, columns), means, strict=True)
    ]
    return {"modality_gap": float(np.linalg.norm(means[0] - means[1])), "spread_a": spreads[0], "spread_b": spreads[1]}


def label_means(scores: Vectors, counted: NDArray[np.bool_], labels: Sequence[str | None]) -> dict[str, Any] | None:
    """Mean score between each two labels, None without labels or with more than can be shown."""
    known = sorted({label for label in labels if label is not None})
    if not 1 < len(known) <= LABELS:
        return None
    of = np.array([[label == name for label in labels] for name in known], np.float64)
    counts = of @ counted @ of.T
    means = (of @ np.where(counted, scores, 0) @ of.T) / np.maximum(counts, 1)
    return {"names": known, "means": [[round(value, 6) for value in row] for row in means.tolist()]}


def _npy(scores: Vectors) -> bytes:
    file = io.BytesIO()
    np.save(file, scores)
    return file.getvalue()


def _page(one: Side, other: Side, rows: Drawn, columns: Drawn, pairs: Pairs, figures: dict[str, Any]) -> bytes:
    with figure(12.5, 6.2) as page:
        axes, beside = page.subplots(1, 2, width_ratios=[1.35, 1])
        page.suptitle(title_of(figures), x=0.01, ha="left", fontsize=11)
        if len(rows.samples) <= FEW:
            _with_thumbnails(axes, one, other, rows, columns, pairs.scores)
        elif figures["labels"]:
            _by_label(axes, figures["labels"])
        else:
            _binned(axes, pairs.scores)
        axes.set_xlabel(f"{other.name} →", labelpad=44 if len(rows.samples) <= FEW else 4)
        axes.set_ylabel(f"{one.name} →", labelpad=38 if len(rows.samples) <= FEW else 4)
        _distributions(beside, pairs)
        return png(page)


def title_of(figures: dict[str, Any]) -> str:
    """What is compared, and below it how it fares, in lines that fit the picture."""
    auc = "no AUC" if figures["auc"] is None else f"AUC {figures['auc']:.3f}"
    gap = f"modality gap {figures['modality_gap']:.3f} (spread {figures['spread_a']:.3f}, {figures['spread_b']:.3f})"
    told = [f"{figures['items']:,} items", auc, *([gap] if figures["modality_gap"] else [])]
    return "\n".join([*wrap(f"{figures['a']} and {figures['b']}", TITLE_CHARACTERS), ", ".join(told)])


def _heat(axes: Any, values: NDArray[Any], title: str) -> None:
    shown = axes.imshow(values, cmap=HEAT, interpolation="nearest")
    axes.figure.colorbar(shown, ax=axes, shrink=0.75, label="cosine")
    axes.set_title(title)
    axes.spines[:].set_visible(False)


def _with_thumbnails(axes: Any, one: Side, other: Side, rows: Drawn, columns: Drawn, scores: Vectors) -> None:
    _heat(axes, scores, "every pair")
    middle = (scores.max() + scores.min()) / 2
    for (row, column), score in np.ndenumerate(scores):
        colour = "white" if score > middle else "#222222"
        axes.text(column, row, f"{score:.2f}", ha="center", va="center", fontsize=6, color=colour)
    axes.set_xticks([])
    axes.set_yticks([])
    for at, sample in enumerate(columns.samples):
        _mark(axes, other, sample, (at, len(scores) - 0.5), (0, -20))
    for at, sample in enumerate(rows.samples):
        _mark(axes, one, sample, (-0.5, at), (-20, 0))


def _mark(axes: Any, side: Side, sample: dict[str, Any], at: tuple[float, float], off: tuple[int, int]) -> None:
    """The picture of a sample beside the matrix; of a text, its first words."""
    if side.modality == "text":
        words = " ".join((sample["caption"] or sample["key"]).split()[:4])
        down = off[0] == 0
        axes.annotate(
            words,
            at,
            (0, -4) if down else (-4, 0),
            textcoords="offset points",
            fontsize=6,
            rotation=35 if down else 0,
            ha="right",
            va="top" if down else "center",
            annotation_clip=False,
        )
        return
    picture = OffsetImage(np.asarray(thumbnail(Store(options=side.store.options), sample).image()), zoom=0.2)
    axes.add_artist(AnnotationBbox(picture, at, off, boxcoords="offset points", frameon=False, annotation_clip=False))


def _by_label(axes: Any, labels: dict[str, Any]) -> None:
    _heat(axes, np.array(labels["means"]), "mean of the pairs of each two labels")
    ticks = range(len(labels["names"]))
    axes.set_xticks(ticks, labels["names"], rotation=45, ha="right", fontsize=7)
    axes.set_yticks(ticks, labels["names"], fontsize=7)


def _binned(axes: Any, scores: Vectors) -> None:
    """Means of squares of items, in the order of `_order`."""
    bins = min(BINS, len(scores))
    starts = np.linspace(0, len(scores), bins, endpoint=False).astype(int)
    sums = np.add.reduceat(np.add.reduceat(scores, starts, axis=0), starts, axis=1)
    sizes = np.diff([*starts, len(scores)])
    _heat(axes, sums / np.outer(sizes, sizes), f"means of {bins} x {bins} bins, like beside like")
    axes.set_xticks([])
    axes.set_yticks([])


def _distributions(axes: Any, pairs: Pairs) -> None:
    edges = np.linspace(float(pairs.scores.min()), float(pairs.scores.max()) + 1e-6, EDGES)
    named = [
        (name, pairs.counted(which, edges))
        for name, which in (("unmatched pairs", pairs.unmatched), ("matched pairs", pairs.matched))
        if which.any()
    ]
    histogram(axes, named, edges)
    axes.set_xlabel("cosine")
    axes.set_title("distribution of scores")
