"""The figures that evaluations leave in an output: a file for each protocol, split and fold, the last run's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from pipelines.storage import Store, is_whole_json

TITLES = {
    "recall@1": "Recall@1",
    "recall@5": "Recall@5",
    "recall@10": "Recall@10",
    "precision@1": "Precision@1",
    "precision@5": "Precision@5",
    "precision@10": "Precision@10",
    "ndcg@10": "nDCG@10",
    "map@10": "mAP@10",
    "map": "mAP",
    "median_rank": "median rank",
    "mean_rank": "mean rank",
}
"""Of the figures, in the order that they are told in."""


def kept_in(encoder: str) -> str:
    """The folder of an encoder's."""
    return f"evaluations/{encoder}"


def name_of(protocol: str, split: str | None, fold: int | None) -> str:
    """A split's name is percent-encoded, its dots too, so that no two of these have one name."""
    of = "" if split is None else f".split-{quote(split, safe='').replace('.', '%2E')}"
    return f"{protocol}{of}{'' if fold is None else f'.fold-{fold}'}.json"


def keep(store: Store, document: dict[str, Any]) -> None:
    """What a run has found (`retrieval.evaluate`), protocol by protocol."""
    for protocol in dict.fromkeys(result["protocol"] for result in document["results"]):
        results = [result for result in document["results"] if result["protocol"] == protocol]
        told = json.dumps({**document, "protocol": protocol, "results": results}, indent=2).encode()
        name = name_of(protocol, document["split"], document["fold"])
        store.put_atomic(f"{kept_in(document['encoder'])}/{name}", told)


def evaluations(store: Store, encoder: str) -> Iterator[dict[str, Any]]:
    """What was kept of an encoder, in the order of the names."""
    for name in sorted(store.names(kept_in(encoder))):
        if name.endswith(".json"):
            yield json.loads(store.read(f"{kept_in(encoder)}/{name}", is_whole_json))


def sentence(result: dict[str, Any]) -> str:
    """How many asked for what in a direction, in one line."""
    of = f" of {result['of']:,}" if result["queries"] < result["of"] else ""
    folds = f", mean of {result['folds']} folds" if result["folds"] > 1 else ""
    text = f"{result['queries']:,}{of} queries in {result['gallery']:,}{folds}"
    if result["unanswerable"]:
        text += f"; {result['unanswerable']:,} more have nothing to find"
    through = result["through"]
    return text + (f"; release {through['release']} holds {through['gallery']:,}" if through else "")
