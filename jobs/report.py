"""`vecmill report`."""

from __future__ import annotations

import json

from jobs.collect import output_store
from jobs.console import out
from jobs.options import AsJson, OutputArgument


def report(output: OutputArgument, as_json: AsJson = False) -> None:
    """One HTML file about an output that loads nothing from anywhere: counts, rejects, speed, recall, sample searches.

    Example: vecmill report s3://bucket/emb
    """
    from pipelines.evaluate.report import report as write_report

    document = write_report(output_store(output))
    print(json.dumps(document, indent=2)) if as_json else out.print(document["page"], markup=False)
