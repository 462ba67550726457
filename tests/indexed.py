"""Outputs to index: real parts, samples and run.json, of seeded vectors clustered by part."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.contracts import SAMPLES_PART, Modality, VectorSpec, embedding_part
from pipelines.encoders.base import EncoderSpec
from pipelines.ledger import Commit, Counts, Part
from pipelines.record import EncoderRecord, RunRecord, read_record, write_record
from pipelines.storage import Store

ENCODER = "tiny-0a1b2c3d"
VERSION = "abcdef012345"


@dataclass(frozen=True)
class Item:
    """What a vector was written for, to compare with what a trace finds."""

    shard: str
    row: int
    caption_index: int | None
    key: str


def captions_of(row: int) -> int:
    return (0, 2, 3)[row % 3]


def write_output(
    root: Path,
    parts: int = 6,
    rows: int = 200,
    dim: int = 16,
    seed: int = 0,
    dtype: str = "float16",
    encoder: str = ENCODER,
    row_group: int = 64,
    first: int = 0,
    normalize: bool = True,
) -> Store:
    """An output of `parts` shards, each around a centre of its own; every 17th row is a reject. normalize: what
    `run.json` says of the vectors, which are of unit length."""
    store = Store(str(root))
    for at in range(first, first + parts):
        write_shard(root, at, rows, dim, seed, dtype, encoder, row_group)
    write_run(store, encoder, dim, dtype, normalize)
    return store


def write_run(store: Store, encoder: str, dim: int, dtype: str, normalize: bool = True) -> None:
    spec = EncoderSpec(
        name="hf:tiny",
        family="hf",
        reference="tiny",
        vectors={"image": VectorSpec(dim), "text": VectorSpec(dim)},
        image=None,
        context_length=8,
        weights="0" * 64,
        normalize=normalize,
        dtype="float16" if dtype == "float16" else "float32",
    )
    record = EncoderRecord(
        fingerprint=spec.fingerprint,
        spec=json.loads(json.dumps(spec.identity() | {"name": spec.name, "reference": spec.reference})),
        modalities=["image", "text"],
        batch_size=8,
        versions={},
    )
    settings = {"write": {"reject_ceiling": 0.2}}
    write_record(store, RunRecord(encoders={**read_record(store).encoders, encoder: record}, settings=settings))


def shard_id(at: int) -> str:
    return f"photos-{at:05d}-0123456789ab"


def part_name(at: int, generation: int = 0) -> str:
    return f"part-{shard_id(at)}.{VERSION}.{generation}.parquet"


def write_shard(
    root: Path, at: int, rows: int, dim: int, seed: int, dtype: str, encoder: str, row_group: int, generation: int = 0
) -> None:
    random = np.random.default_rng([seed, at])
    centre = random.normal(size=dim)
    kept = [row for row in range(rows) if row % 17 != 5]
    captions = [(row, index) for row in kept for index in range(captions_of(row))]
    images = _around(random, centre, len(kept))
    texts = images[np.searchsorted(kept, [row for row, _ in captions])] + random.normal(0, 0.1, (len(captions), dim))
    name = part_name(at, generation)
    _write(
        root / "embeddings" / encoder / "image" / name,
        "image",
        at,
        [(row, None) for row in kept],
        images,
        dtype,
        row_group,
    )
    _write(root / "embeddings" / encoder / "text" / name, "text", at, captions, texts, dtype, row_group)
    write_samples(root, at, rows, captions_of, row_group, generation)
    write_commit(root, encoder, at, generation, rows, {"image": len(kept), "text": len(captions)})


def write_samples(
    root: Path, at: int, rows: int, captions: Callable[[int], int], row_group: int, generation: int = 0
) -> None:
    samples = pa.table(
        {
            "shard": [shard_id(at)] * rows,
            "row": list(range(rows)),
            "key": [key_of(at, row) for row in range(rows)],
            "captions": [[caption_of(at, row, index) for index in range(captions(row))] for row in range(rows)],
            "uri": [f"photos-{at:05d}.tar"] * rows,
            "offset": [512 + 1024 * row for row in range(rows)],
            "length": [100 + row for row in range(rows)],
            **{
                name: pa.nulls(rows, SAMPLES_PART.field(name).type)
                for name in ("row_group", "sha256", "width", "height", "label", "metadata")
            },
        },
        schema=SAMPLES_PART,
    )
    target = root / "samples" / part_name(at, generation)
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(samples, target, row_group_size=row_group)


def write_images(
    root: Path, at: int, vectors: np.ndarray, row_group: int = 16_384, captions: np.ndarray | None = None
) -> None:
    """A shard of images, whose vectors, [n, dim], are given; and of a caption each, where theirs are."""
    rows, folder = len(vectors), root / "embeddings" / ENCODER
    images = [(row, None) for row in range(rows)]
    _write(folder / "image" / part_name(at), "image", at, images, vectors, "float16", row_group)
    if captions is not None:
        texts = [(row, 0) for row in range(rows)]
        _write(folder / "text" / part_name(at), "text", at, texts, captions, "float16", row_group)
    write_samples(root, at, rows, lambda row: int(captions is not None), row_group)
    write_commit(root, ENCODER, at, 0, rows, {"image": rows} | ({} if captions is None else {"text": rows}))


def write_commit(root: Path, encoder: str, at: int, generation: int, rows: int, embedded: dict[str, int]) -> None:
    """Of the encoder and of the samples, as the ledger has them of a finished shard."""
    counts = {"image": Counts(items=rows, embedded=embedded["image"], rejected=rows - embedded["image"])}
    if "text" in embedded:
        counts["text"] = Counts(items=embedded["text"], embedded=embedded["text"])
    vectors = {f"embeddings/{encoder}/{modality}": count for modality, count in embedded.items()}
    put_commit(root, encoder, at, generation, rows, vectors, counts)
    put_commit(root, "samples", at, generation, rows, {"samples": rows}, {})


def put_commit(
    root: Path, family: str, at: int, generation: int, rows: int, parts: dict[str, int], counts: dict[str, Counts]
) -> None:
    """parts: rows by data set."""
    names = {dataset: f"{dataset}/{part_name(at, generation)}" for dataset in parts}
    commit = Commit(
        family=family,
        shard=shard_id(at),
        version=VERSION,
        generation=generation,
        uri=f"photos-{at:05d}.tar",
        fingerprint="f" * 64,
        attempt="a",
        rows=rows,
        parts=[
            Part(
                dataset=dataset,
                staged=f"staging/{final}",
                final=final,
                rows=parts[dataset],
                bytes=(root / final).stat().st_size,
                sha256="",
            )
            for dataset, final in names.items()
        ],
        counts=counts,
    )
    Store(str(root)).put_atomic(commit.ref.path, commit.model_dump_json().encode())


def key_of(at: int, row: int) -> str:
    return f"{at:05d}/{row:06d}"


def caption_of(at: int, row: int, index: int) -> str:
    return f"caption {index} of {at}/{row}"


def _around(random: np.random.Generator, centre: np.ndarray, count: int) -> np.ndarray:
    return centre + random.normal(0, 0.5, (count, len(centre)))


def _write(
    path: Path,
    modality: Modality,
    at: int,
    items: list[tuple[int, int | None]],
    vectors: np.ndarray,
    dtype: str,
    group: int,
) -> None:
    dim = vectors.shape[1]
    unit = (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)).astype(dtype)
    schema = embedding_part(modality, VectorSpec(dim), dtype)
    columns = {
        "shard": pa.array([shard_id(at)] * len(items), pa.string()),
        "row": pa.array([row for row, _ in items], pa.int64()),
        "key": pa.array([key_of(at, row) for row, _ in items], pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(
            pa.array(unit.ravel(), schema.field("embedding").type.value_type), dim
        ),
    }
    if modality == "text":
        columns["caption_index"] = pa.array([index for _, index in items], pa.int32())
    path.parent.mkdir(parents=True, exist_ok=True)
    # Vectors are written plain, as a run's are: from a dictionary they are read five times slower.
    plain = [name for name in columns if name != "embedding"]
    pq.write_table(
        pa.table(columns, schema=schema), path, row_group_size=group, use_dictionary=["shard"], write_statistics=plain
    )


def everything(root: Path, modality: str, encoder: str = ENCODER) -> tuple[list[Item], np.ndarray]:
    """Every item in id order with float32 [n, dim], read by pyarrow alone."""
    items: list[Item] = []
    found = []
    for path in sorted((root / "embeddings" / encoder / modality).glob("*.parquet")):
        table = pq.read_table(path)
        indices = table["caption_index"].to_pylist() if modality == "text" else [None] * len(table)
        columns = zip(
            table["shard"].to_pylist(), table["row"].to_pylist(), indices, table["key"].to_pylist(), strict=True
        )
        items += [Item(*values) for values in columns]
        found += table["embedding"].to_pylist()
    return items, np.array(found, np.float32)
