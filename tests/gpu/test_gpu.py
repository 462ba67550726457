"""The GPU's command at reduced size on the CPU, so that it is ready whenever there is a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.gpu.measure import BOUNDS, p4_error

ROOT = Path(__file__).parents[2]


def test_the_command_runs_on_a_cpu_at_reduced_size() -> None:
    command = [sys.executable, "-m", "tests.gpu", "--device", "cpu", "--small"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, report = done.stdout.strip().splitlines()
    rows = {row["check"]: row for row in json.loads(report)["rows"]}
    assert len(lines) >= len(rows)
    for precision, bound in BOUNDS.items():
        for modality in ("image", "text"):
            assert rows[f"{precision} {modality} error"]["value"] < bound
    assert rows["fp16 image error"]["value"] > 1e-6
    assert "skipped" in rows["out of memory"]["note"]
    assert rows["encode stage ÷ bare model"]["value"] > 0


def test_the_measure_of_errors_sees_one_wrong_row() -> None:
    reference = np.eye(64, dtype=np.float32)
    ours = reference.copy()
    ours[17, 17] = 0.9
    assert p4_error(reference, reference) == 0
    assert BOUNDS["bf16"] < p4_error(ours, reference) < 0.11
