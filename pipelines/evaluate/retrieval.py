"""Retrieval by the standard protocols, exactly and through the index.

captions: image→text and text→image, a hit is any caption of the image and the image of the caption (Karpathy and
Fei-Fei, CVPR 2015). identity: text→image, a hit is any image of the same person (CUHK-PEDES; Li et al., CVPR 2017).
label: image→image, a hit is any other image of the same label. Nearness is the cosine, whatever length vectors have;
through the index, and beside it, what the release's own metric says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.contracts import Modality
from pipelines.errors import ConfigError
from pipelines.evaluate.groups import OUTSIDE, Groups
from pipelines.evaluate.items import (
    HeldItems,
    Items,
    StoredItems,
    Tile,
    UnitItems,
    codes_of,
    collect,
    draw,
    is_unit,
    require_one_vector,
    stored,
)
from pipelines.evaluate.kept import keep
from pipelines.evaluate.metrics import DEPTHS, Ranks, at_depths, ranks_in_order
from pipelines.evaluate.ranking import Room, count_relevant, exact_figures
from pipelines.index.cache import Cache
from pipelines.index.current import current_version
from pipelines.index.manifest import index_folder
from pipelines.index.parts import Ids, NoVectorsError, Vectors
from pipelines.index.recall import Top, without
from pipelines.index.versions import finished
from pipelines.record import read_record
from pipelines.search import Searcher
from pipelines.storage import Store

Protocol = Literal["captions", "identity", "label"]
PROTOCOLS: tuple[Protocol, ...] = ("captions", "identity", "label")
DIRECTIONS: dict[Protocol, list[tuple[Modality, Modality]]] = {
    "captions": [("image", "text"), ("text", "image")],
    "identity": [("text", "image")],
    "label": [("image", "image")],
}
ROUNDING = 1e-6
"""Of a score in float32, relative where it is above 1: that of equal vectors differs by it with their places in a
batch."""
WHERE_LABELS_ARE = "Labels are the sub-folders of an input folder, or its column `label`."
CANDIDATE_BYTES = 128 * 2**10
"""Of what two index shards answer to one query, and of what is made of it."""
PAIRS_AT_LEAST, QUERIES_AT_LEAST = 2 * 10**9, 1_000
Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What to evaluate. identity: the metadata's field that says who it is. split: of the samples that ask and are
    found. sample: queries of a direction at most, as many as make 2·10⁹ comparisons (1,000 at least) if None.
    fold: samples in order are cut into folds of so many, each ranked by itself: captions alone, all that there are,
    and exactly. release: that the index figures are of, else the current one; index: whether there are any.
    cache: of its files, as `Searcher` takes it.
    """

    protocols: tuple[Protocol, ...] = ()
    identity: str | None = None
    split: str | None = None
    sample: int | None = None
    fold: int | None = None
    release: str | None = None
    index: bool = True
    seed: int = 0
    room: Room = field(default_factory=Room)
    cache: Cache | None = None


@dataclass(frozen=True)
class Result:
    """The figures of one direction of a protocol. queries: that were ranked, of so many; unanswerable: drawn, but
    nothing is relevant for them. through: what the index finds, exact search beside it, and the loss."""

    protocol: Protocol
    asks: Modality
    finds: Modality
    queries: int
    of: int
    unanswerable: int
    gallery: int
    folds: int
    figures: dict[str, float]
    through: dict[str, Any] | None = None


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


def require_foldable(protocols: Sequence[Protocol], asked: Asked) -> None:
    """Raises: ConfigError for folds of anything but images and their captions."""
    if asked.fold and set(protocols) != {"captions"}:
        others = ", ".join(name for name in protocols if name != "captions")
        raise ConfigError(
            f"Folds are of images with their captions, not of the protocol {others}",
            "Give --fold with --protocol captions alone.",
        )


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


def require_comparable(store: Store, encoder: str, one: Modality, other: Modality) -> None:
    """Raises: ConfigError where vectors of the two modalities are of different spaces, or there are none."""
    record = read_record(store).encoders[encoder]
    spaces = record.encoder_spec(store.options).vectors
    for modality in (one, other):
        if modality not in record.modalities:
            raise ConfigError(
                f"embeddings/{encoder} has no {modality} vectors", f"It has: {', '.join(record.modalities)}."
            )
    if spaces[one].space != spaces[other].space:
        raise ConfigError(
            f"embeddings/{encoder}: {one} vectors are of the space {spaces[one].space}, {other} vectors of "
            f"{spaces[other].space}: they cannot be compared",
            "Evaluate another protocol, or embed with an option that puts both in one space (`vecmill encoders`).",
        )


def _direction(
    store: Store, encoder: str, protocol: Protocol, asks: Modality, finds: Modality, asked: Asked, say: Say
) -> Result:
    require_comparable(store, encoder, asks, finds)
    groups = Groups(store, _by(protocol, asked), asked.split)
    questions, gallery = stored(store, encoder, asks, groups), stored(store, encoder, finds, groups)
    same, are_unit = asks == finds, is_unit(store, encoder)
    among: Items = gallery if are_unit else UnitItems(gallery)
    if asked.fold:
        asking = questions if are_unit else UnitItems(questions)
        return _in_folds(encoder, protocol, asks, finds, asking, among, asked, asked.fold)
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
        through=_through_index(store, encoder, finds, groups, queries, same, asked, say),
    )


def _by(protocol: Protocol, asked: Asked) -> str:
    if protocol == "identity" and not asked.identity:
        raise ConfigError("The identity protocol needs to know who is who", "Name the metadata's field: --identity id.")
    return {"captions": "sample", "label": "label"}.get(protocol) or str(asked.identity)


def require_items(total: int, encoder: str, protocol: Protocol, modality: Modality, asked: Asked) -> None:
    if total:
        return
    of = f" of the split {asked.split}" if asked.split else ""
    having, fix = {
        "captions": ("", "`vecmill status` tells what there is."),
        "identity": (f" whose metadata have the field {asked.identity}", "Check --identity."),
        "label": (" with a label", WHERE_LABELS_ARE),
    }[protocol]
    raise ConfigError(
        f"embeddings/{encoder} has no {modality} vectors{of}{having} to ask with",
        f"Check --queries. {fix}" if asked.split else fix,
    )


def require_answers(answerable: int, protocol: Protocol) -> None:
    if not answerable:
        raise ConfigError(
            f"None of the queries has anything relevant by the protocol {protocol}", "Choose another --protocol."
        )


def _through_index(
    store: Store, encoder: str, modality: Modality, groups: Groups, queries: Tile, same: bool, asked: Asked, say: Say
) -> dict[str, Any] | None:
    """The figures of the first max(DEPTHS), among all that the release holds, of whatever split."""
    version = _release_of(store, encoder, modality, asked, say) if asked.index else None
    if version is None:
        return None
    searchers = {
        "exact": Searcher(store, encoder, modality, version, exact=True),
        "found": Searcher(store, encoder, modality, version, resident=False, cache=asked.cache),
    }
    parts = searchers["found"].parts
    require_one_vector(parts)
    gallery = StoredItems(store, parts, groups, searchers["found"].findable())
    if same:
        # A release may have other parts, or have them in another order, than there are now.
        queries = collect(gallery, draw(gallery, len(queries), asked.seed)[0], asked.room.tile_rows(0, gallery.dim))
    own = queries.ids if same else np.full(len(queries), -1)
    relevant, _ = count_relevant(queries, gallery)
    relevant -= int(same)
    kept = relevant > 0
    if not kept.any():
        return None
    queries, relevant, own = queries.of(kept), relevant[kept], own[kept]
    figures = {
        name: at_depths(_found(searcher, gallery, queries, own, relevant, asked.room))
        for name, searcher in searchers.items()
    }
    loss = {name: figures["exact"][name] - value for name, value in figures["found"].items()}
    return {"release": version, "queries": len(queries), "gallery": parts.rows, **figures, "loss": loss}


def _release_of(store: Store, encoder: str, modality: Modality, asked: Asked, say: Say) -> str | None:
    """The one that was asked for, current or not; none of vectors whose index has no such release."""
    folder = index_folder(encoder, modality)
    if not asked.release:
        return current_version(store, folder)
    if asked.release in finished(store, folder):
        return asked.release
    say(f"the index of {modality} vectors is left out: it has no release {asked.release}")
    return None


def require_release(store: Store, encoder: str, asked: Asked) -> None:
    """Raises: ConfigError for a release that was asked for and that no index of the encoder has."""
    modalities = read_record(store).encoders[encoder].modalities
    known = {version for each in modalities for version in finished(store, index_folder(encoder, each))}
    if asked.release and asked.index and asked.release not in known:
        raise ConfigError(
            f"No index of embeddings/{encoder} has the release {asked.release}",
            f"There are: {', '.join(sorted(known)) or 'none'}.",
        )


def _found(searcher: Searcher, gallery: Items, queries: Tile, own: Ids, relevant: Ids, room: Room) -> Ranks:
    top = without(_nearest(searcher, queries.vectors, max(DEPTHS) + 1, room), own)
    codes = codes_of(gallery, top.ids)
    hits = (codes == queries.codes[:, None]) & (codes != OUTSIDE)
    return ranks_in_order(wrong_first(hits, top)[:, : max(DEPTHS)], relevant)


def _nearest(searcher: Searcher, queries: Vectors, k: int, room: Room) -> Top:
    """`Searcher.nearest` of so many queries at once as leave room for their candidates."""
    step = max(1, room.bytes // 4 // CANDIDATE_BYTES)
    tops = [searcher.nearest(queries[at : at + step], k) for at in range(0, len(queries), step)]
    return Top(np.concatenate([top.ids for top in tops]), np.concatenate([top.scores for top in tops]))


def wrong_first(hits: NDArray[np.bool_], top: Top) -> NDArray[np.bool_]:
    """Hits [n, k], best first, of which those of equal scores (but for rounding) are ordered as exact ranking does.

    Places where nothing was found, whose scores are infinite, are equal to no other.
    """
    there = top.ids >= 0
    scores = np.where(there, top.scores, 0)
    apart = np.abs(np.diff(scores, axis=1, prepend=scores[:, :1])) > ROUNDING * np.maximum(1, np.abs(scores))
    apart |= np.diff(there, axis=1, prepend=there[:, :1])
    runs = np.cumsum(apart, axis=1)
    return np.take_along_axis(hits, np.lexsort((hits, runs), axis=1), axis=1)


def _in_folds(
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
