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


Lines = dict[str, list[tuple[int, float]]]
"""Legend to (epoch, figure)."""


def draw_curves(epochs: list[dict[str, Any]]) -> bytes:
    """A PNG with a panel for each kind of figure that the epochs have."""
    present = panels(epochs)
    figure = Figure(figsize=(4.5 * max(1, len(present)), 3.4), layout="constrained")
    for at, (title, lines) in enumerate(present.items(), 1):
        draw_panel(figure.add_subplot(1, len(present), at), title, lines)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def panels(epochs: list[dict[str, Any]]) -> dict[str, Lines]:
    """By title those of PANELS that the epochs have figures for."""
    flat = [flattened(told) for told in epochs]
    found = {
        title: {
            label: points
            for name, label in names.items()
            if (points := [(told["epoch"], told[name]) for told in flat if name in told])
        }
        for title, names in PANELS.items()
    }
    return {title: lines for title, lines in found.items() if lines}


def draw_panel(axes: Any, title: str, lines: Lines) -> None:
    for label, points in lines.items():
        axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 10 else None, markersize=3)
    axes.set(title=title, xlabel="epoch", **({} if title == "loss" else {"ylim": (min(0, axes.get_ylim()[0]), 1)}))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def flattened(told: dict[str, Any]) -> dict[str, Any]:
    """An epoch's figures, those of a group as `group name`."""
    groups = ((name, value) for name, value in told.items() if isinstance(value, dict))
    plain = {name: value for name, value in told.items() if not isinstance(value, dict)}
    return {**plain, **{f"{name} {key}": each for name, group in groups for key, each in group.items()}}
