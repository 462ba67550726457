"""A Ray of its own whose object store is full, and so is the disk that it spills to: another job holds it all.

`python -m tests.fault.neighbour FOLDER`: starts it, lets it spill to FOLDER, fills it, and prints `held`, how many
bytes, and its address. Lets go of everything at the first line that comes in, says `free`, and ends with the second.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time

import numpy as np
import ray

from tests.conftest import start

STORE_BYTES, OBJECT_BYTES = 80 * 2**20, 2**20
REFUSALS = 5


def main(spill: str) -> None:
    with tempfile.TemporaryDirectory(prefix="vm", ignore_cleanup_errors=True) as folder:
        start(folder, STORE_BYTES, object_spilling_directory=spill)
        held = fill()
        print("held", len(held) * OBJECT_BYTES, ray.get_runtime_context().gcs_address, flush=True)
        sys.stdin.readline()
        held.clear()
        print("free", flush=True)
        sys.stdin.readline()
        ray.shutdown()


def fill() -> list[ray.ObjectRef[np.ndarray]]:
    """All that there is room for, once what was written twice meanwhile has gone."""
    held, refused = [], 0
    while refused < REFUSALS:
        try:
            held.append(ray.put(np.frombuffer(os.urandom(OBJECT_BYTES), np.uint8)))
            refused = 0
        except (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError):
            refused += 1
            time.sleep(1)
    return held


if __name__ == "__main__":
    main(sys.argv[1])
