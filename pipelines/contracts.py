"""The words of the project as types: shards, samples, rejects, and the Arrow schemas between stages.

`(shard, row)` names a sample for ever, `(shard, row, caption_index)` a caption. An *item* is what
one vector stands for: a row (image; multimodal, which is its image with its first caption) or a caption of
a row (text).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from pipelines.secrets import masked

Modality = Literal["image", "text", "multimodal"]
MODALITIES: tuple[Modality, ...] = ("image", "text", "multimodal")
Format = Literal["tar", "parquet", "folder", "manifest"]

SAMPLES_FAMILY = "samples"
FINDINGS = ("evaluations", "duplicates", "similarity", "compare", "classifications", "map", "report")
"""Folders of an output with what was found out about its samples: made again at will, and full of keys and pictures."""

MASKED_CHARS, DETAIL_CHARS = 2**16, 1_000
"""Of a reject's detail: how much is looked through for credentials, and how much of it is kept."""


@dataclass(frozen=True)
class Entry:
    """One object in storage: where it is, how big, and a token that changes when it does."""

    uri: str
    bytes: int
    etag: str


@dataclass(frozen=True)
class Shard:
    """The unit of planning, retry and resume: one input object, or a piece of one.

    id: `<slug of the name>-<12 hex of the uri's hash>[-<piece>]`, free of dots and slashes; the same
        object has the same id in every run, whatever else is in the input.
    version: digest of what the shard holds (size and etag, or its slice's members), 12 hex digits.
    bytes: size of the object as listed; for a slice, the sum over its members.
    row_groups: half-open bounds of the row groups of a Parquet file, where it is cut.
    slice: (k, n): the members whose key hash is k modulo n, for folders and manifests.
    """

    id: str
    uri: str
    format: Format
    version: str
    bytes: int
    row_groups: tuple[int, int] | None = None
    slice: tuple[int, int] | None = None


@dataclass(frozen=True)
class Reject:
    """An item that could not be embedded.

    reason: a short constant such as `truncated_image`; detail: one line for a person, credentials masked, cut where it
    is long.
    caption_index: None for an image, or for it with its caption.
    """

    modality: Modality
    stage: str
    reason: str
    detail: str = ""
    caption_index: int | None = None

    def __post_init__(self) -> None:
        # Cut short last: half an address may hide what the mask goes by.
        object.__setattr__(self, "detail", masked(self.detail[:MASKED_CHARS])[:DETAIL_CHARS])


@dataclass
class Sample:
    """One image and/or its captions as a source yields it, before it has a row number.

    image: the encoded bytes (JPEG, PNG, …), None where the sample has none or it was rejected.
    has_image: the sample came with an image, readable or not; then it is embedded or rejected.
    captions: in order; None where one was rejected, so that positions stay.
    uri, offset, length: where the image's bytes lie (byte range of a tar member, as unpacked where the
        tar is gzipped; the whole file in a folder); row_group in place of the byte range for Parquet.
    """

    key: str
    image: bytes | None = None
    has_image: bool = False
    captions: list[str | None] = field(default_factory=list)
    label: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    uri: str = ""
    offset: int | None = None
    length: int | None = None
    row_group: int | None = None
    rejects: list[Reject] = field(default_factory=list)


REJECT_ITEM = pa.struct(
    [
        ("modality", pa.string()),
        ("caption_index", pa.int32()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)

# Carried by every row through every operator. The last row of a shard is its end mark: `end` is
# true and `row` is the number of rows, so that a shard that is empty or all rejects completes too.
# From decoding on, each encoder of the run has rows of its own, named by its folder, and `families` are those
# that this row is written to. A row without a key, but for the end mark, is a sample that was taken down: it is
# counted, and nothing of it is kept.
_PLACE = [
    pa.field("shard", pa.string()),
    pa.field("shard_uri", pa.string()),
    pa.field("version", pa.string()),
    pa.field("families", pa.list_(pa.string())),
    pa.field("encoder", pa.string()),
    pa.field("row", pa.int64()),
    pa.field("end", pa.bool_()),
]
_DESCRIPTION = [
    pa.field("key", pa.string()),
    pa.field("captions", pa.list_(pa.string())),
    pa.field("translations", pa.list_(pa.string())),
    pa.field("has_image", pa.bool_()),
    pa.field("uri", pa.string()),
    pa.field("offset", pa.int64()),
    pa.field("length", pa.int64()),
    pa.field("row_group", pa.int32()),
    pa.field("label", pa.string()),
    pa.field("metadata", pa.string()),
    pa.field("rejects", pa.list_(REJECT_ITEM)),
]
_MEASURED = [
    pa.field("sha256", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
]

SAMPLE = pa.schema([*_PLACE, *_DESCRIPTION, pa.field("image", pa.large_binary())])
"""read → decode. image: encoded bytes. metadata: a JSON object."""

PIXELS = pa.schema(
    [
        *_PLACE,
        *_DESCRIPTION,
        *_MEASURED,
        pa.field("pixels", pa.large_binary()),
        pa.field("pixels_shape", pa.list_(pa.int32())),
        pa.field("tokens", pa.list_(pa.list_(pa.int32()))),
    ]
)
"""decode → encode. pixels: uint8, row-major, of pixels_shape (height, width, 3), null where there is
none. tokens: one list a caption, null where that caption has none."""


@dataclass(frozen=True)
class VectorSpec:
    """What an encoder's vectors of one modality are.

    dim: length of one. count: how many an item has; several are compared by max-similarity. space: vectors of an
    encoder can be compared where they are of the same space.
    """

    dim: int
    space: str = "joint"
    count: int = 1


def number_type(dtype: str) -> pa.DataType:
    return pa.float16() if dtype == "float16" else pa.float32()


def vector_type(vectors: VectorSpec, dtype: str) -> pa.DataType:
    """Arrow type of one embedding: fixed_size_list<half|float>[dim], or count of these."""
    one = pa.list_(number_type(dtype), vectors.dim)
    return one if vectors.count == 1 else pa.list_(one, vectors.count)


def encoded_schema(dtype: str) -> pa.Schema:
    """encode → write: what `samples/` needs, the rejects, and the vectors, of whatever length an encoder's have."""
    vector = pa.list_(number_type(dtype))
    return pa.schema(
        [
            *_PLACE,
            *_DESCRIPTION,
            *_MEASURED,
            pa.field("image_vector", vector),
            pa.field("text_vectors", pa.list_(pa.struct([("caption_index", pa.int32()), ("vector", vector)]))),
            pa.field("multimodal_vector", vector),
        ]
    )


def passing_schema(dtype: str) -> pa.Schema:
    """Between two encode operators: of rows that one has encoded, and of those that it left to the other."""
    encoded = encoded_schema(dtype)
    return pa.schema([*PIXELS, *(field for field in encoded if field.name not in PIXELS.names)])


SAMPLES_PART = pa.schema(
    [
        pa.field("shard", pa.string()),
        pa.field("row", pa.int64()),
        pa.field("key", pa.string()),
        pa.field("captions", pa.list_(pa.string())),
        pa.field("uri", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("row_group", pa.int32()),
        pa.field("sha256", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("label", pa.string()),
        pa.field("metadata", pa.string()),
    ]
)

TRANSLATIONS_PART = pa.schema(
    [
        pa.field("shard", pa.string()),
        pa.field("row", pa.int64()),
        pa.field("caption_index", pa.int32()),
        pa.field("key", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("translation", pa.string()),
    ]
)
"""What an encoder embedded in place of captions."""

REJECTS_PART = pa.schema(
    [
        pa.field("shard", pa.string()),
        pa.field("row", pa.int64()),
        pa.field("caption_index", pa.int32()),
        pa.field("key", pa.string()),
        pa.field("modality", pa.string()),
        pa.field("stage", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)


def embedding_part(modality: Modality, vectors: VectorSpec, dtype: str) -> pa.Schema:
    """Columns of a part under `embeddings/<encoder>/<modality>/`. No nulls; no column called `id`."""
    fields = [pa.field("shard", pa.string(), nullable=False), pa.field("row", pa.int64(), nullable=False)]
    if modality == "text":
        fields.append(pa.field("caption_index", pa.int32(), nullable=False))
    fields.append(pa.field("key", pa.string()))
    fields.append(pa.field("embedding", vector_type(vectors, dtype), nullable=False))
    return pa.schema(fields)
