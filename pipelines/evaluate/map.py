"""A map of an embedding space: a sample of its vectors in two dimensions, near ones near each other."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.manifold import TSNE

from pipelines.contracts import Modality
from pipelines.errors import ConfigError
from pipelines.evaluate.charts import COLOURS
from pipelines.evaluate.groups import Groups
from pipelines.evaluate.items import collect, draw, places_of, stored
from pipelines.evaluate.pages import page, shown
from pipelines.evaluate.thumbnails import samples_at, thumbnails
from pipelines.index.parts import Vectors
from pipelines.storage import Store

By = Literal["label", "cluster"]
LEAST, PERPLEXITY, CLUSTERS, SIDE, KEPT_DIMENSIONS = 8, 30, 8, 64, 50
MOST_LABELS = 50
"""Of which so few have a colour of their own that a map by label would be all others."""


def draw_map(
    store: Store,
    encoder: str,
    modality: Modality = "image",
    sample: int = 1_000,
    seed: int = 0,
    folder: str | None = None,
    by: By | None = None,
) -> dict[str, Any]:
    """Writes `map.html`, with thumbnails and captions to hover over, and `map.json`, the points; returns the latter.

    t-SNE (van der Maaten and Hinton, JMLR 2008) of a seeded sample. by: what has a colour, labels or the clusters of
    k-means; where left out, labels if there are any and at most MOST_LABELS. Memory: the sample, its vectors and its
    thumbnails. Raises: ConfigError where there is too little, and by label where there is none.
    """
    items = stored(store, encoder, modality, Groups(store))
    ids, total = draw(items, sample, seed)
    if len(ids) < LEAST:
        raise ConfigError(f"{total} vectors are too few for a map", f"It takes {LEAST}.")
    vectors = collect(items, ids, 2**14).unit().vectors
    samples = samples_at(store, places_of(items, ids))
    labels = [each["label"] for each in samples]
    by = coloured_by(labels, by)
    groups = [label or "no label" for label in labels] if by == "label" else clusters(vectors, seed)
    target = folder or f"map/{encoder}/{modality}"
    points = [
        {"x": x, "y": y, "key": each["key"], "group": group}
        for (x, y), each, group in zip(positions(vectors, seed).tolist(), samples, groups, strict=True)
    ]
    pictures = [shown(*each) for each in zip(samples, thumbnails(store, samples, SIDE), strict=True)]
    legend, colours = coloured(Counter(groups))
    document = {"encoder": encoder, "modality": modality, "of": total, "by": by, "seed": seed, "points": points}
    html = page(
        "map.html",
        title=f"{encoder} {modality}: {len(points):,} of {total:,}",
        by=by,
        legend=legend,
        points=[
            {**point, **picture, "colour": colours[str(point["group"])]}
            for point, picture in zip(points, pictures, strict=True)
        ],
    )
    store.put_atomic(f"{target}/map.html", html)
    store.put_atomic(f"{target}/map.json", json.dumps(document).encode())
    return {**document, "page": store.uri(f"{target}/map.html")}


def coloured_by(labels: Sequence[str | None], asked: By | None) -> By:
    known = {label for label in labels if label}
    if asked == "label" and not known:
        raise ConfigError("None of the samples drawn has a label", "Colour them --by cluster.")
    return asked or ("label" if 0 < len(known) <= MOST_LABELS else "cluster")


def coloured(groups: Counter[str]) -> tuple[list[tuple[str, str, int]], dict[str, str]]:
    """The legend, of (name, colour, count), the commonest first, and the colour of each group. Groups that there are
    too few colours for share the last, as others."""
    names = sorted(groups, key=lambda name: (-groups[name], name))
    own = len(names) if len(names) <= len(COLOURS) else len(COLOURS) - 1
    legend = [(name, colour, groups[name]) for name, colour in zip(names[:own], COLOURS, strict=False)]
    if others := names[own:]:
        legend.append((f"{len(others)} others", COLOURS[-1], sum(groups[name] for name in others)))
    return legend, {**dict.fromkeys(others, COLOURS[-1]), **{name: colour for name, colour, _ in legend[:own]}}


def positions(vectors: Vectors, seed: int) -> NDArray[np.float64]:
    """[n, 2] in 0 … 1, by the cosine of unit vectors, float32 [n, dim]; noise beyond their 50 largest singular values
    is left out."""
    # Not of centred vectors, as principal components are: their cosines are others.
    kept = TruncatedSVD(min(KEPT_DIMENSIONS, *vectors.shape), random_state=seed).fit_transform(vectors)
    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    found = TSNE(2, perplexity=perplexity, metric="cosine", init="random", random_state=seed).fit_transform(kept)
    low, high = found.min(axis=0), found.max(axis=0)
    return np.asarray((found - low) / np.where(high > low, high - low, 1), np.float64)


def clusters(vectors: Vectors, seed: int) -> list[str]:
    found = KMeans(min(CLUSTERS, len(vectors)), n_init=1, random_state=seed).fit_predict(vectors)
    return [f"cluster {number + 1}" for number in found.tolist()]
