"""Arrays and plain facts together in one small object, a `.npz` as NumPy reads it."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.index.manifest import KeptFile
from pipelines.storage import Store

Arrays = dict[str, NDArray[Any]]


def put_arrays(store: Store, path: str, facts: dict[str, Any], arrays: Arrays) -> KeptFile:
    """facts: what JSON can hold."""
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, facts=np.array(json.dumps(facts)), **arrays)
    data = stream.getvalue()
    store.put_atomic(path, data)
    return KeptFile(file=path.rpartition("/")[2], bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def read_arrays(store: Store, path: str) -> tuple[dict[str, Any], Arrays]:
    """Raises: FileNotFoundError."""
    with np.load(io.BytesIO(store.read(path, _is_whole)), allow_pickle=False) as kept:
        arrays = {name: kept[name] for name in kept.files}
    facts: dict[str, Any] = json.loads(str(arrays.pop("facts")))
    return facts, arrays


def _is_whole(data: bytes) -> bool:
    """A zip's directory is at its end."""
    return data[:2] == b"PK" and b"PK\x05\x06" in data[-64 * 1024 :]
