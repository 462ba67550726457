"""A few seconds of random damage a path; `python -m tests.fault.fuzz --seconds 600` looks longer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fault.fuzz import PATHS, in_child

SECONDS = float(os.environ.get("VECMILL_FUZZ_SECONDS", "3"))
SEED = int(os.environ.get("VECMILL_FUZZ_SEED", "0"))


@pytest.mark.parametrize("path", PATHS)
def test_random_damage_gives_rows_in_balance(path: str, tmp_path: Path) -> None:
    fine, told = in_child(path, SEED, SECONDS, tmp_path / "case")
    assert fine, f"python -m tests.fault.fuzz {told}"
