"""Where in an output a sample's key, captions or vectors are left: in the bytes of every file, and in what they say."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.index.files import load_index
from pipelines.index.manifest import Coding, Release
from pipelines.index.rerank import encode
from pipelines.storage import Store


@dataclass(frozen=True)
class Sought:
    """texts: keys and captions, none of which is part of another's that stays. vectors: float32 [n, dim]."""

    texts: list[str]
    vectors: np.ndarray


def traces(store: Store, sought: Sought) -> set[str]:
    """Paths of the files that hold any of it."""
    return {name for name in store.names("") if _is_in(store, name, store.read(name), sought)}


def _is_in(store: Store, name: str, data: bytes, sought: Sought) -> bool:
    raw = [text.encode() for text in sought.texts]
    raw += [vector.astype(dtype).tobytes() for vector in sought.vectors for dtype in ("float32", "float16")]
    if any(each in data for each in raw):
        return True
    if data[:4] == b"PAR1":
        return _in_table(pq.read_table(pa.py_buffer(data)), sought)
    if name.endswith(".arrow"):
        return _in_table(pa.ipc.open_file(pa.py_buffer(data)).read_all(), sought)
    if name.endswith(".json"):
        return any(text in json.dumps(json.loads(data), ensure_ascii=False) for text in sought.texts)
    if name.endswith(".npy"):
        return _in_codes(np.load(io.BytesIO(data)), _coding(store, name), sought.vectors)
    return name.endswith(".faiss") and _in_index(load_index(store, name)[0], sought.vectors)


def _in_table(table: pa.Table, sought: Sought) -> bool:
    cells = json.dumps(table.drop_columns([n for n in table.column_names if not _is_text(table[n].type)]).to_pylist())
    if any(json.dumps(text)[1:-1] in cells for text in sought.texts):
        return True
    found = [
        np.concatenate([*_numbers(table[name]), []]) for name in table.column_names if not _is_text(table[name].type)
    ]
    dim = sought.vectors.shape[1]
    return any(_has_rows(each.reshape(-1, dim), sought.vectors) for each in found if len(each) and len(each) % dim == 0)


def _is_text(kind: pa.DataType) -> bool:
    return "string" in str(kind)


def _numbers(column: pa.ChunkedArray) -> Iterator[np.ndarray]:
    for chunk in column.chunks:
        while pa.types.is_nested(chunk.type):
            chunk = chunk.flatten() if not pa.types.is_struct(chunk.type) else chunk.field(chunk.type.num_fields - 1)
        if pa.types.is_floating(chunk.type):
            yield chunk.drop_null().to_numpy().astype(np.float32)


def _has_rows(rows: np.ndarray, vectors: np.ndarray) -> bool:
    halves = vectors.astype(np.float16).astype(np.float32)
    return any((rows == each).all(axis=1).any() for each in (*vectors, *halves))


def _coding(store: Store, name: str) -> Coding:
    release = Release.model_validate_json(store.read(f"{name.rpartition('/')[0]}/manifest.json"))
    assert release.rerank
    return release.rerank.coding


def _in_codes(stored: np.ndarray, coding: Coding, vectors: np.ndarray) -> bool:
    return any((stored == code).all(axis=1).any() for code in encode(coding, vectors))


def _in_index(index: faiss.Index, vectors: np.ndarray) -> bool:
    """Exact of indexes that keep whole vectors."""
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        ivf.set_direct_map_type(faiss.DirectMap.Hashtable)
        return _has_rows(np.stack([index.reconstruct(id) for id in _ids(ivf)]), vectors)
    inner = faiss.downcast_index(index.index)
    return _has_rows(inner.reconstruct_n(0, inner.ntotal), vectors)


def _ids(ivf: faiss.IndexIVF) -> list[int]:
    found: list[int] = []
    for number in range(ivf.nlist):
        size = ivf.invlists.list_size(number)
        found += faiss.rev_swig_ptr(ivf.invlists.get_ids(number), size).tolist() if size else []
    return found
