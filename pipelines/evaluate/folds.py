"""Retrieval in folds, as Karpathy's 1K test has it: samples in order, so many at a time, each fold ranked by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pipelines.contracts import Modality
from pipelines.errors import ConfigError
from pipelines.evaluate.items import HeldItems, Items, Tile, collect, draw
from pipelines.evaluate.protocols import Asked, Protocol, Result, require_answers, require_items
from pipelines.evaluate.ranking import Room, exact_figures


def require_foldable(protocols: Sequence[Protocol], asked: Asked) -> None:
    """Raises: ConfigError for folds of anything but images and their captions."""
    if asked.fold and set(protocols) != {"captions"}:
        others = ", ".join(name for name in protocols if name != "captions")
        raise ConfigError(
            f"Folds are of images with their captions, not of the protocol {others}",
            "Give --fold with --protocol captions alone.",
        )


def in_folds(
    encoder: str,
    protocol: Protocol,
    asks: Modality,
    finds: Modality,
    questions: Items,
    gallery: Items,
    asked: Asked,
    fold: int,
) -> Result:
    """Means over the folds. What is left over at the end belongs to none."""
    asking, found = _held(questions, asked.room), _held(gallery, asked.room)
    require_items(len(asking), encoder, protocol, asks, asked)
    folds = list(_folds(asking, found, fold))
    if not folds:
        raise ConfigError(f"There are fewer than {fold:,} samples to make a fold of", "Lower --fold.")
    ranked = [exact_figures(mine, HeldItems(theirs), asked.room, asks == finds) for mine, theirs in folds]
    ranked = [each for each in ranked if each.figures]
    require_answers(len(ranked), protocol)
    return Result(
        protocol,
        asks,
        finds,
        queries=sum(int(each.kept.sum()) for each in ranked),
        of=len(asking),
        unanswerable=sum(int((~each.kept).sum()) for each in ranked),
        gallery=ranked[0].gallery,
        folds=len(folds),
        figures={name: float(np.mean([each.figures[name] for each in ranked])) for name in ranked[0].figures},
    )


def _held(items: Items, room: Room) -> Tile:
    """Everything, in memory. Raises: ConfigError where it does not fit."""
    rows = sum(len(ids) for ids, _ in items.codes())
    if rows * items.dim * 4 > room.bytes // 4:
        raise ConfigError(
            f"Folds are cut from all {rows:,} vectors, more than {room.memory_mib:,} MiB hold",
            "Choose a split with --queries, or raise --memory.",
        )
    return collect(items, draw(items, None, 0)[0], 2**14)


def _folds(asking: Tile, found: Tile, fold: int) -> Iterator[tuple[Tile, Tile]]:
    """By the order of the samples that are in both."""
    _, first = np.unique(asking.codes, return_index=True)
    order = asking.codes[np.sort(first)]
    order = order[np.isin(order, found.codes)]
    for start in range(0, len(order) - fold + 1, fold):
        members = order[start : start + fold]
        yield asking.of(np.isin(asking.codes, members)), found.of(np.isin(found.codes, members))
