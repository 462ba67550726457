"""What an output is, in one document and one page: what went in and came out, how fast, how good, what it finds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pyarrow.parquet as pq

from pipelines.errors import VecmillError
from pipelines.evaluate.kept import evaluations
from pipelines.evaluate.report_page import card, written
from pipelines.evaluate.searches import sample_searches
from pipelines.evaluate.statistics import statistics
from pipelines.index.cache import Cache
from pipelines.index.manifest import Release
from pipelines.index.parts import open_part
from pipelines.index.release import latest_or_none
from pipelines.ledger import tally
from pipelines.record import EncoderRecord, RunRecord, read_record
from pipelines.storage import Store, is_whole_json

EXAMPLES, RUNS, LABELS = 3, 20, 20
OF_A_RUN = ("run", "seconds", "shards", "stages", "bottleneck", "pace")
OF_A_RELEASE: dict[str, Any] = {
    **dict.fromkeys(("made", "metric", "index_key", "search_params", "bytes_per_vector", "recall", "curve"), True),
    **dict.fromkeys(("query_ms", "batch_query_ms", "latency"), True),
    "rerank": {"factor": True, "query_ms": True},
}
PAGE, DATA = "report.html", "report.json"
METRICS = "metrics.json"
"""That a training job writes."""


def report(store: Store, folder: str = "report", seed: int = 0, cache: Cache | None = None) -> dict[str, Any]:
    """Writes `report.html`, which loads nothing from anywhere, and `report.json`; returns what the latter holds.

    Memory: a part of samples or rejects, a batch of vectors, and an index shard. Nothing is embedded. cache: of files
    of the index, as `Searcher` takes it.
    """
    record, runs = read_record(store), list(_runs(store))
    releases = {encoder: _releases(store, encoder, each) for encoder, each in record.encoders.items()}
    searches = {
        encoder: list(sample_searches(store, encoder, each.modalities, seed, cache))
        for encoder, each in record.encoders.items()
    }
    document = {
        "output": store.uri(),
        "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        **_of_data(store, record),
        "runs": [{name: run.get(name) for name in OF_A_RUN} for run in runs],
        **_of_encoders(store, record),
        "indexes": {f"{name}/{each.modality}": _told_of(each) for name, found in releases.items() for each in found},
        "searches": {encoder: [search.told() for search in found] for encoder, found in searches.items()},
    }
    cards = [card(store, encoder, document, releases[encoder], searches[encoder]) for encoder in record.encoders]
    store.put_atomic(f"{folder}/{PAGE}", written(document, runs, cards))
    store.put_atomic(f"{folder}/{DATA}", json.dumps(document, indent=2).encode())
    return {**document, "page": store.uri(f"{folder}/{PAGE}")}


def _of_data(store: Store, record: RunRecord) -> dict[str, Any]:
    """What went in and came out."""
    told = statistics(store)
    counts = {encoder: tally(store, [encoder]) for encoder in record.encoders}
    rejects = {encoder: reasons for encoder, (_, reasons, _) in counts.items()}
    return {
        "samples": told.samples,
        "images": told.images,
        "items": {name: {m: c.model_dump() for m, c in items.items()} for name, (items, _, _) in counts.items()},
        "rejects": rejects,
        "reject_examples": {encoder: _reject_examples(store, encoder, reasons) for encoder, reasons in rejects.items()},
        "statistics": told.histograms(),
        "labels": dict(told.labels.most_common(LABELS)),
    }


def _of_encoders(store: Store, record: RunRecord) -> dict[str, Any]:
    """What each is, and how well it does."""
    histories = {encoder: _history(store, each) for encoder, each in record.encoders.items()}
    return {
        "encoders": {encoder: _facts(each) for encoder, each in record.encoders.items()},
        "evaluations": {encoder: list(evaluations(store, encoder)) for encoder in record.encoders},
        "training": {encoder: history for encoder, history in histories.items() if history},
    }


def _json(store: Store, path: str) -> dict[str, Any] | None:
    try:
        found = json.loads(store.read(path, is_whole_json))
    except FileNotFoundError:
        return None
    return found if isinstance(found, dict) else None


def _runs(store: Store) -> Iterator[dict[str, Any]]:
    """What the last runs reported, the newest first."""
    names = sorted((name for name in store.names("reports") if name.endswith(".json")), reverse=True)
    for name in names[:RUNS]:
        if found := _json(store, f"reports/{name}"):
            yield found


def _releases(store: Store, encoder: str, record: EncoderRecord) -> list[Release]:
    found = [latest_or_none(store, encoder, modality) for modality in record.modalities]
    return [release for release in found if release]


def _reject_examples(store: Store, encoder: str, reasons: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """A few of each reason; parts are read until there are enough."""
    examples: dict[str, list[dict[str, Any]]] = {reason: [] for reason in reasons}
    for name in sorted(store.names(f"rejects/{encoder}")):
        if all(len(examples[reason]) >= min(EXAMPLES, count) for reason, count in reasons.items()):
            break
        with open_part(store, f"rejects/{encoder}/{name}") as stream:
            for each in pq.read_table(stream, columns=["key", "modality", "reason", "detail"]).to_pylist():
                if len(examples.setdefault(each["reason"], [])) < EXAMPLES:
                    examples[each["reason"]].append(each)
    return examples


def _facts(record: EncoderRecord) -> dict[str, str]:
    spec = record.spec
    vectors = [f"{name}: {told['dim']} ({told['space']})" for name, told in spec["vectors"].items()]
    image = spec.get("image") or {}
    size = " x ".join(str(side) for side in image.get("size") or [])
    facts = {
        "model": spec["name"],
        "vectors": ", ".join(vectors),
        "precision": f"{spec.get('precision')}, written as {spec.get('dtype')}",
        "unit norm": "yes" if spec.get("normalize") else "no",
        "images": f"{image.get('resize')} to {size}, {image.get('resample')}" if image else "",
        "captions": f"at most {spec['context_length']} tokens" if spec.get("context_length") else "",
        "batch size": str(record.batch_size),
        "weights": spec["weights"][:16],
        "fingerprint": record.fingerprint,
        "versions": ", ".join(f"{name} {number}" for name, number in record.versions.items()),
    }
    return {name: value for name, value in facts.items() if value}


def _history(store: Store, record: EncoderRecord) -> dict[str, Any] | None:
    """What the job that made the model has left beside the model's folder: its address, and every epoch's figures."""
    _, _, folder = str(record.spec["reference"]).rpartition("local-dir:")
    home = Store(folder.rstrip("/").rpartition("/")[0], store.options)
    try:
        told = _json(home, METRICS) if home.root else None
    except VecmillError:
        # The model is of a place that this report cannot look into.
        return None
    return {"folder": home.uri(), **told} if told and told.get("epochs") else None


def _told_of(release: Release) -> dict[str, Any]:
    """What the manifest says of it, but for its files and how it was built."""
    held = {"release": release.version, "vectors": release.parts.rows, "dim": release.parts.dim}
    return held | release.model_dump(mode="json", include=OF_A_RELEASE)
