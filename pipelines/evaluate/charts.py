"""One style for every chart: light or dark by the page it is on, colours that colour-blind readers can tell apart."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8f6bb3", "#b08900", "#56b4e9", "#7f7f7f")
"""Okabe and Ito's, darkened where too light for white."""
INK, GRID = "#010203", "#040506"
"""Stand in for the page's own colours, which an SVG takes from it."""
HEAT = LinearSegmentedColormap.from_list("heat", ["#f7f7f4", "#b8d0e0", "#5b9bc0", "#1c5f8f", "#0b2942"])
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",
    # Else every run has ids of its own.
    "svg.hashsalt": "vecmill",
}


@contextmanager
def figure(width: float, height: float, for_page: bool = False) -> Iterator[Figure]:
    """A figure of so many inches, in the style. for_page: its ink is the page's (`svg`)."""
    ink, grid = (INK, GRID) if for_page else ("#222222", "#dddddd")
    coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    inks: dict[Any, Any] = dict.fromkeys(coloured, ink)
    with mpl.rc_context({**STYLE, **inks, "grid.color": grid, "axes.prop_cycle": cycler(color=COLOURS)}):
        made = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(made)
        yield made


def png(made: Figure, dpi: int = 130) -> bytes:
    file = io.BytesIO()
    made.savefig(file, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def svg(made: Figure, title: str) -> str:
    """An element for a page: text as text, the ink `currentColor`, lines var(--grid), no background."""
    file = io.StringIO()
    made.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(GRID, "var(--grid)")
    # Matplotlib leaves black text without a colour, and names fonts that a page has its own of.
    text = re.sub(r"font:[^;\"]*'DejaVu Sans'[^;\"]*", lambda found: found[0].replace("'DejaVu Sans'", "inherit"), text)
    text = re.sub(r'<svg ([^>]*?)height="([\d.]+)pt"', r"<svg \1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)width="([\d.]+)pt"', r'\1style="max-width:\2pt"', text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def histogram(axes: Any, named: Sequence[tuple[str, np.ndarray[Any, Any]]], edges: np.ndarray[Any, Any]) -> None:
    """Shares of each by bin, as filled steps. named: (name, counts by bin)."""
    for at, (name, counts) in enumerate(named):
        share = counts / max(1, counts.sum())
        axes.stairs(share, edges, fill=True, alpha=0.35, color=COLOURS[at])
        axes.stairs(share, edges, color=COLOURS[at], label=name)
    axes.set_ylabel("share of pairs")
    axes.legend()
