"""Several encoders over the same samples: what each finds, how much they agree, and how good and dear they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from typing import Any

import numpy as np

from pipelines.errors import ConfigError, InputError
from pipelines.evaluate.groups import OUTSIDE, Groups, code_of_key
from pipelines.evaluate.items import StoredItems, codes_of, collect_any, draw, first_with, is_unit, places_of, stored
from pipelines.evaluate.pages import page, shown
from pipelines.evaluate.protocols import Asked
from pipelines.evaluate.retrieval import measured
from pipelines.evaluate.thumbnails import samples_at, thumbnails
from pipelines.index.parts import Ids, batches
from pipelines.index.recall import Top, exact, without
from pipelines.index.release import latest_or_none
from pipelines.record import FILE, read_record
from pipelines.storage import Store

TILE_ROWS = 16_384
HEAD = {"captions text→image": "text → image", "captions image→text": "image → text", "label image→image": "same label"}
Rate = Callable[["Contender"], dict[str, Any]]


@dataclass(frozen=True)
class Contender:
    """An encoder's images in an output. name: to show, unlike any other's."""

    store: Store
    encoder: str
    name: str


@dataclass(frozen=True)
class Wanted:
    """keys: of the samples to show, `shown` drawn ones if none. agreed: queries that agreement is measured over."""

    k: int = 8
    keys: Sequence[str] = ()
    shown: int = 6
    agreed: int = 200
    seed: int = 0


def contenders(stores: Sequence[Store], only: Sequence[str] = ()) -> list[Contender]:
    """Every encoder with image vectors, or those named. Raises: InputError for what is no output, ConfigError for
    a name that none has and where there are fewer than two."""
    there = [each for store in {store.root: store for store in stores}.values() for each in _with_images(store)]
    names = [encoder for _, encoder in there]
    if unknown := [name for name in only if name not in names]:
        raise ConfigError(
            f"No output has the encoder {unknown[0]} with image vectors", f"There are: {', '.join(sorted({*names}))}."
        )
    found = [(store, encoder) for store, encoder in there if not only or encoder in only]
    if len(found) < 2:
        raise ConfigError(
            f"There is {found[0][1] if found else 'no encoder'} with image vectors, and nothing to compare it with",
            "Name several outputs, or embed with another --encoder into this one.",
        )
    return [Contender(*each, name) for each, name in zip(found, _names(found), strict=True)]


def _with_images(store: Store) -> list[tuple[Store, str]]:
    encoders = read_record(store).encoders
    if not encoders:
        raise InputError(
            f"{store.uri()} is not the output of an embed run: it has no {FILE}",
            "Check the path, or run `vecmill embed` first.",
        )
    return [(store, encoder) for encoder, record in encoders.items() if "image" in record.modalities]


def _names(found: Sequence[tuple[Store, str]]) -> list[str]:
    """Of each the shortest that no other has: the encoder's, with the end of its output's path, or with all of it."""
    ways = [
        [encoder for _, encoder in found],
        [f"{encoder} ({store.root.rstrip('/').rpartition('/')[2]})" for store, encoder in found],
        [f"{encoder} ({store.uri()})" for store, encoder in found],
    ]
    return [next(way[at] for way in ways if way.count(way[at]) == 1) for at in range(len(found))]


def compare(
    rivals: Sequence[Contender], wanted: Wanted, rate: Rate = lambda rival: {}, folder: str = "compare"
) -> dict[str, Any]:
    """Writes `compare.html` and `compare.json` under `folder` of the first output; returns what the latter holds.

    Samples of several outputs are the same where their keys are. Exact, with memory for a batch of vectors. rate:
    measures speed and size of an encoder.
    """
    everyone = [stored(rival.store, rival.encoder, "image", Groups(rival.store, "key")) for rival in rivals]
    codes = _common(everyone, wanted)
    found = [_nearest(rival, items, codes, wanted.k) for rival, items in zip(rivals, everyone, strict=True)]
    neighbours = [codes_of(items, top.ids) for items, top in zip(everyone, found, strict=True)]
    document: dict[str, Any] = {
        "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "k": wanted.k,
        "seed": wanted.seed,
        "agreed_over": len(codes),
        "encoders": [_card(rival, items, wanted) | rate(rival) for rival, items in zip(rivals, everyone, strict=True)],
        "overlap": {
            f"{rivals[one].name} · {rivals[other].name}": overlap(neighbours[one], neighbours[other])
            for one, other in combinations(range(len(rivals)), 2)
        },
    }
    count = len({*wanted.keys}) or min(wanted.shown, len(codes))
    document["queries"] = _queries(rivals, everyone, codes[:count], found, neighbours)
    store = rivals[0].store
    store.put_atomic(f"{folder}/compare.html", _page(document, rivals, neighbours, wanted))
    kept = {**document, "queries": _without_pictures(document["queries"])}
    store.put_atomic(f"{folder}/compare.json", json.dumps(kept, indent=2).encode())
    return {**kept, "page": store.uri(f"{folder}/compare.html")}


def _common(everyone: Sequence[StoredItems], wanted: Wanted) -> Ids:
    """Codes of samples that all have: those asked for first, then drawn ones. Raises: ConfigError for a key that one
    of them lacks."""
    fewest = min(everyone, key=_count)
    ids, _ = draw(fewest, wanted.agreed, wanted.seed)
    ids = np.random.default_rng(wanted.seed).permutation(ids)
    named = {code_of_key(key): key for key in wanted.keys}
    codes = np.array(list(dict.fromkeys([*named, *codes_of(fewest, ids).tolist()])), np.int64)
    there = [first_with(items, codes) != OUTSIDE for items in everyone]
    for items, has in zip(everyone, there, strict=True):
        _require_keys(items, [key for key, found in zip(named.values(), has, strict=False) if not found])
    common = np.all(there, axis=0)
    if not common.any():
        raise ConfigError("The outputs have no such samples in common", "They are matched by key.")
    return np.asarray(codes[common])


def _require_keys(items: StoredItems, missing: Sequence[str]) -> None:
    if missing:
        raise ConfigError(
            f"No sample of {items.store.uri()} with an image has the key {missing[0]}",
            "Keys are as `samples/` has them.",
        )


def _count(items: StoredItems) -> int:
    return items.findable.total if items.findable else items.parts.rows


def _nearest(rival: Contender, items: StoredItems, codes: Ids, k: int) -> Top:
    """Of each query's image the k nearest others by cosine, exactly."""
    own = first_with(items, codes)
    queries = collect_any(items, own, TILE_ROWS).vectors
    metric = "ip" if is_unit(rival.store, rival.encoder) else "cosine"
    return without(exact(queries, batches(items.store, items.parts), k + 1, metric, items.findable), own)


def overlap(one: Ids, other: Ids) -> float:
    """Mean share of each row's codes, int64 [q, k], that the other has too."""
    return float(
        np.mean([len(np.intersect1d(mine, theirs)) / len(mine) for mine, theirs in zip(one, other, strict=True)])
    )


def _card(rival: Contender, items: StoredItems, wanted: Wanted) -> dict[str, Any]:
    record = read_record(rival.store).encoders[rival.encoder]
    release = latest_or_none(rival.store, rival.encoder, "image")
    numbers = 2 if record.spec["dtype"] == "float16" else 4
    return {
        "name": rival.name,
        "model": record.spec["name"],
        "fingerprint": record.fingerprint,
        "images": _count(items),
        "dim": items.dim,
        "bytes_per_vector": numbers * items.dim,
        "index_bytes_per_vector": sum(release.bytes_per_vector.values()) if release else None,
        "index_query_ms": release.query_ms if release else None,
        "quality": _quality(rival, wanted),
    }


def _quality(rival: Contender, wanted: Wanted) -> dict[str, dict[str, float]]:
    """Figures by direction; none of an encoder that no protocol fits."""
    asked = Asked(sample=max(wanted.agreed, 500), index=False, seed=wanted.seed)
    try:
        results = list(measured(rival.store, rival.encoder, asked))
    except ConfigError:
        return {}
    return {f"{each.protocol} {each.asks}→{each.finds}": each.figures for each in results}


def _queries(
    rivals: Sequence[Contender],
    everyone: Sequence[StoredItems],
    codes: Ids,
    found: Sequence[Top],
    neighbours: Sequence[Ids],
) -> list[dict[str, Any]]:
    count = len(codes)
    asked = samples_at(rivals[0].store, places_of(everyone[0], first_with(everyone[0], codes)))
    queries = [
        {**shown(sample, small), "found": []}
        for sample, small in zip(asked, thumbnails(rivals[0].store, asked), strict=True)
    ]
    for rival, items, top, theirs in zip(rivals, everyone, found, neighbours, strict=True):
        samples = samples_at(rival.store, places_of(items, top.ids[:count].ravel()))
        small = thumbnails(rival.store, samples)
        width = top.ids.shape[1]
        for at, query in enumerate(queries):
            hits = []
            for place in range(width):
                sample, score = samples[at * width + place], float(top.scores[at, place])
                shared = all(theirs[at, place] in others[at] for others in neighbours)
                hits.append(
                    {**shown(sample, small[at * width + place], f"{score:.3f}"), "score": score, "shared": shared}
                )
            query["found"].append({"encoder": rival.name, "hits": hits})
    return queries


def _without_pictures(queries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "key": query["key"],
            "found": [
                {
                    "encoder": found["encoder"],
                    "hits": [{"key": hit["key"], "score": hit["score"]} for hit in found["hits"]],
                }
                for found in query["found"]
            ],
        }
        for query in queries
    ]


def table(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the encoders side by side, for a page or a terminal."""
    directions = list(dict.fromkeys(name for card in document["encoders"] for name in card["quality"]))
    head = ["encoder", "images", "dim", "bytes", "index bytes", "images/s", "million parameters"]
    head += [f"{HEAD.get(name, name)} {figure}" for name in directions for figure in ("R@1", "R@10", "mAP")]
    return head, [_row(card, directions) for card in document["encoders"]]


def _row(card: dict[str, Any], directions: list[str]) -> list[str]:
    quality = [
        f"{card['quality'][name][figure]:.3f}" if name in card["quality"] else "–"
        for name in directions
        for figure in ("recall@1", "recall@10", "map")
    ]
    optional = [card["index_bytes_per_vector"], card.get("images_per_second"), card.get("million_parameters")]
    told = ["–" if value is None else f"{value:,.1f}" for value in optional]
    return [card["name"], f"{card['images']:,}", f"{card['dim']:,}", f"{card['bytes_per_vector']:,}", *told, *quality]


def _page(document: dict[str, Any], rivals: Sequence[Contender], neighbours: Sequence[Ids], wanted: Wanted) -> bytes:
    head, rows = table(document)
    names = [rival.name for rival in rivals]
    agreement = [
        [name, *(f"{overlap(mine, theirs):.3f}" for theirs in neighbours)]
        for name, mine in zip(names, neighbours, strict=True)
    ]
    return page(
        "compare.html",
        title=f"{len(rivals)} encoders compared",
        **{name: document[name] for name in ("made", "k", "queries", "agreed_over")},
        sampled=max(wanted.agreed, 500),
        table_head=head,
        table_rows=rows,
        agreement_head=["", *names],
        agreement_rows=agreement,
        alike=len({card["images"] for card in document["encoders"]}) == 1,
        rate_note="Speed is of one batch size on the machine that made this page.",
    )
