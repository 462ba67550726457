"""Losses, precision, similarity and recall by epoch, drawn."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure

PANELS: dict[str, dict[str, str]] = {
    "loss": {
        name: name.replace("_", " ")
        for name in ("loss", "cmpm", "cmpc", "infonce", "constraint_images", "constraint_texts")
    },
    "classification precision": {"image_precision": "images", "text_precision": "captions"},
    "mean cosine": {"matched_similarity": "matched pairs", "unmatched_similarity": "unmatched pairs"},
    "recall, caption to image": {f"text_to_image recall@{k}": f"@{k}" for k in (1, 5, 10)},
    "recall, image to caption": {f"image_to_text recall@{k}": f"@{k}" for k in (1, 5, 10)},
}
"""Title to series: their names in the metrics, and in the legend."""


def draw_curves(epochs: list[dict[str, Any]]) -> bytes:
    """A PNG with a panel for each kind of figure that the epochs have."""
    flat = [_flat(told) for told in epochs]
    present = {title: known for title, names in PANELS.items() if (known := _known(names, flat))}
    figure = Figure(figsize=(4.5 * max(1, len(present)), 3.4), layout="constrained")
    for at, (title, names) in enumerate(present.items(), 1):
        axes = figure.add_subplot(1, len(present), at)
        for name, label in names.items():
            points = [(told["epoch"], told[name]) for told in flat if name in told]
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 10 else None, markersize=3)
        axes.set(title=title, xlabel="epoch", **({} if title == "loss" else {"ylim": (min(0, axes.get_ylim()[0]), 1)}))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _flat(told: dict[str, Any]) -> dict[str, float]:
    groups = ((name, value) for name, value in told.items() if isinstance(value, dict))
    return {**told, **{f"{name} {key}": each for name, group in groups for key, each in group.items()}}


def _known(names: dict[str, str], flat: list[dict[str, float]]) -> dict[str, str]:
    return {name: label for name, label in names.items() if any(name in told for told in flat)}
