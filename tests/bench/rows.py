"""What a benchmark has found beside what is asked of it; one that misses anything exits with 1."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    what: str
    found: float
    asked: str
    met: bool


def conclude(rows: Sequence[Row]) -> None:
    """Prints a line for each. Raises: SystemExit where one is not met."""
    for row in rows:
        print(f"{row.what:46} {row.found:8.3f}   {row.asked:28} {'met' if row.met else 'NOT MET'}")
    if not all(row.met for row in rows):
        sys.exit(1)
