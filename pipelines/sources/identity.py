"""Names that last: the id and version of a shard, and the slice that a key falls into."""

from __future__ import annotations

import hashlib

from pipelines.contracts import Entry
from pipelines.sources.kinds import slug


def digest(*parts: str) -> str:
    """12 hex digits that change when any part does."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def shard_id(uri: str, piece: str = "") -> str:
    return f"{slug(uri)}-{digest(uri)}" + (f"-{piece}" if piece else "")


def object_version(entry: Entry, bounds: tuple[int, int] | None = None) -> str:
    """Version of an object, or of the row groups `bounds` of one: cut elsewhere, it is another shard."""
    return digest(str(entry.bytes), entry.etag, *map(str, bounds or ()))


def slice_count(samples: int, samples_per_slice: int) -> int:
    """A power of two, so that doubling it later splits each slice in two."""
    slices = -(-samples // samples_per_slice)
    return 1 << max(0, slices - 1).bit_length()


def slice_of(key: str, slices: int) -> int:
    """By the key's hash, so that a new member changes one slice and no other."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8]) % slices


def slice_piece(slice_: tuple[int, int]) -> str:
    return f"s{slice_[0]:04d}of{slice_[1]:04d}"
