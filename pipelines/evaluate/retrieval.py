"""Retrieval by the standard protocols, exactly and through the index. Nearness is the cosine, whatever length vectors
have."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from pipelines.contracts import Modality
from pipelines.errors import ConfigError
from pipelines.evaluate.folds import in_folds, require_foldable
from pipelines.evaluate.groups import Groups
from pipelines.evaluate.items import Items, UnitItems, collect, draw, is_unit, stored
from pipelines.evaluate.kept import keep
from pipelines.evaluate.protocols import (
    DIRECTIONS,
    WHERE_LABELS_ARE,
    Asked,
    Protocol,
    Result,
    Say,
    grouped_by,
    require_answers,
    require_comparable,
    require_items,
)
from pipelines.evaluate.ranking import exact_figures
from pipelines.evaluate.through_index import require_release, through_index
from pipelines.index.parts import NoVectorsError
from pipelines.record import read_record
from pipelines.storage import Store

PAIRS_AT_LEAST, QUERIES_AT_LEAST = 2 * 10**9, 1_000


def evaluate(store: Store, encoder: str, asked: Asked, say: Say = lambda line: None) -> dict[str, Any]:
    """The figures of every protocol asked for, or of those that the output has the data for; kept by `kept.keep`.

    Memory: `asked.room`, a number for each label, identity and shard, and with folds the vectors of the split.
    Raises: ConfigError where a protocol cannot be followed.
    """
    document = {
        "encoder": encoder,
        "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        **{name: getattr(asked, name) for name in ("split", "fold", "identity", "sample", "seed")},
        "results": [vars(result) for result in measured(store, encoder, asked, say)],
    }
    keep(store, document)
    return document


def measured(store: Store, encoder: str, asked: Asked, say: Say = lambda line: None) -> Iterator[Result]:
    """`evaluate` without keeping anything, a direction at a time. One of a protocol that nobody named is left out where
    it cannot be followed, and `say` is told why; where none is left, the first reason is raised."""
    require_release(store, encoder, asked)
    protocols = asked.protocols or fitting(store, encoder, asked, say)
    require_foldable(protocols, asked)
    directions = [(protocol, *each) for protocol in protocols for each in DIRECTIONS[protocol]]
    refused: list[ConfigError] = []
    for protocol, asks, finds in directions:
        say(f"{protocol}: {asks} → {finds}")
        try:
            result = _direction(store, encoder, protocol, asks, finds, asked, say)
        except ConfigError as error:
            if _is_named(protocol, asked):
                raise
            say(f"{protocol}: {asks} → {finds} is left out: {error.what}")
            refused.append(error)
        else:
            yield result
    if len(refused) == len(directions):
        raise refused[0]


def _is_named(protocol: Protocol, asked: Asked) -> bool:
    """By itself, or by what no other protocol takes."""
    return bool(asked.protocols or asked.fold) or protocol == "identity"


def fitting(store: Store, encoder: str, asked: Asked, say: Say) -> list[Protocol]:
    """The protocols that an output has vectors, captions and labels for; that of the identities, where these are named,
    and captions, where folds are asked for, in any case. Raises: ConfigError where there are none."""
    found: list[Protocol] = ["identity"] if asked.identity else []
    if asked.fold and not found:
        say("folds are of captions: other protocols are left out")
        return ["captions"]
    if not found and _has_items(store, encoder, "text", Groups(store)):
        try:
            require_comparable(store, encoder, "image", "text")
            found.append("captions")
        except ConfigError as error:
            say(f"captions are left out: {error.what}")
    if _has_items(store, encoder, "image", Groups(store, "label", asked.split)):
        found.append("label")
    if not found:
        of = f" of the split {asked.split}" if asked.split else ""
        raise ConfigError(
            f"{store.uri()} has neither comparable images and captions nor labels{of} of {encoder}", WHERE_LABELS_ARE
        )
    return found


def _has_items(store: Store, encoder: str, modality: Modality, groups: Groups) -> bool:
    """Any at all, that are not OUTSIDE."""
    if modality not in read_record(store).encoders[encoder].modalities:
        return False
    try:
        return any(True for _ in stored(store, encoder, modality, groups).codes())
    except NoVectorsError:
        return False


def _direction(
    store: Store, encoder: str, protocol: Protocol, asks: Modality, finds: Modality, asked: Asked, say: Say
) -> Result:
    require_comparable(store, encoder, asks, finds)
    groups = Groups(store, grouped_by(protocol, asked), asked.split)
    questions, gallery = stored(store, encoder, asks, groups), stored(store, encoder, finds, groups)
    same, are_unit = asks == finds, is_unit(store, encoder)
    among: Items = gallery if are_unit else UnitItems(gallery)
    if asked.fold:
        asking = questions if are_unit else UnitItems(questions)
        return in_folds(encoder, protocol, asks, finds, asking, among, asked, asked.fold)
    size = sum(len(ids) for ids, _ in gallery.codes())
    # Of vectors that are not unit there are two: as they are, for the index, and made unit.
    fitting = asked.room.bytes // 4 // (4 * questions.dim) // (1 if are_unit else 2)
    count = asked.sample or min(fitting, max(QUERIES_AT_LEAST, PAIRS_AT_LEAST // max(1, size)))
    ids, total = draw(questions, count, asked.seed)
    if len(ids) > fitting:
        raise ConfigError(
            f"{len(ids):,} queries of {questions.dim} dimensions are more than {asked.room.memory_mib:,} MiB hold",
            f"Lower --sample to {fitting:,}, or raise --memory.",
        )
    require_items(total, encoder, protocol, asks, asked)
    queries = collect(questions, ids, asked.room.tile_rows(0, questions.dim))
    ranked = exact_figures(queries if are_unit else queries.unit(), among, asked.room, same)
    require_answers(int(ranked.kept.sum()), protocol)
    queries = queries.of(ranked.kept)
    return Result(
        protocol,
        asks,
        finds,
        queries=len(queries),
        of=total,
        unanswerable=int((~ranked.kept).sum()),
        gallery=ranked.gallery,
        folds=1,
        figures=ranked.figures,
        through=through_index(store, encoder, finds, groups, queries, same, asked, say),
    )
