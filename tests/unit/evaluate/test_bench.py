"""The benchmarks of this folder's verbs say no where a promise is missed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.bench import duplicates, evaluate
from tests.bench.rows import conclude

FOUND = {"rows": 2**20, "anonymous": 1_150.0, "before": 100.0, "recall": 0.995, "precision": 1.0}
"""1,050 MiB of its own, where 1,024 and 40 bytes of each item, 40 MiB, are promised."""


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, []),
        ({"anonymous": 1_165.0}, ["own memory at 1,048,576 rows, MiB"]),
        ({"recall": 0.98}, ["recall of pairs at 1,048,576 rows"]),
        ({"precision": 0.98}, ["precision of pairs at 1,048,576 rows"]),
    ],
)
def test_duplicates_that_are_missed_or_take_too_much_are_told(changed: dict[str, Any], missed: list[str]) -> None:
    rows = duplicates.rows_of({**FOUND, **changed}, memory_mib=1024)
    assert [row.what for row in rows if not row.met] == missed


@pytest.mark.parametrize(("over", "grown", "missed"), [(1.0, 1.5, 0), (1.1, 1.0, 1), (0.5, 1.6, 1), (1.1, 1.6, 2)])
def test_memory_that_is_too_much_or_grows_is_told(
    over: float, grown: float, missed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = evaluate.rows_of({"own_over_memory": over, "own_at_ten_times": grown})
    if missed:
        with pytest.raises(SystemExit, match="1"):
            conclude(rows)
    else:
        conclude(rows)
    assert capsys.readouterr().out.count("NOT MET") == missed
