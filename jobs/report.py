"""`vecmill report`."""

from __future__ import annotations

import json

from jobs.collect import output_store
from jobs.console import out
from jobs.options import (
    DEFAULT_CACHE,
    DEFAULT_CACHE_SIZE,
    AsJson,
    CacheFlag,
    CacheSize,
    OutputArgument,
    cache_of,
)


def report(
    output: OutputArgument,
    cache: CacheFlag = DEFAULT_CACHE,
    cache_size: CacheSize = DEFAULT_CACHE_SIZE,
    as_json: AsJson = False,
) -> None:
    """One HTML file about an output that loads nothing from anywhere: counts, rejects, speed, recall, sample searches.

    Example: vecmill report s3://bucket/emb
    """
    from pipelines.evaluate.report import report as write_report

    document = write_report(output_store(output), cache=cache_of(cache, cache_size))
    print(json.dumps(document, indent=2)) if as_json else out.print(document["page"], markup=False)
