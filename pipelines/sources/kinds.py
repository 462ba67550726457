"""What an object is, by the end of its name."""

from __future__ import annotations

import re
from typing import Literal

Kind = Literal["tar", "parquet", "image", "manifest", "list"]

# fmt: off
KNOWN_IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff",
    ".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".ppm", ".pgm",
))
# fmt: on
_SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "tar": (".tar", ".tar.gz", ".tgz"),
    "parquet": (".parquet", ".parq", ".pq"),
    "manifest": (".jsonl", ".jsonl.gz", ".ndjson", ".csv", ".csv.gz", ".tsv", ".json"),
    "list": (".txt",),
    "image": tuple(sorted(KNOWN_IMAGE_SUFFIXES)),
}


_LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
_ENDING = re.compile(f"(?:{'|'.join(re.escape(s) for group in _SUFFIXES.values() for s in group)})$", re.IGNORECASE)


def basename(uri: str) -> str:
    """The last part of a path or URI, without the query of a URL."""
    plain = uri.partition("?")[0] if "://" in uri else uri
    return plain.rstrip("/").rpartition("/")[2]


def kind_of(uri: str) -> Kind | None:
    name = basename(uri).lower()
    return next((kind for kind, suffixes in _SUFFIXES.items() if name.endswith(suffixes)), None)


def is_litter(path: str) -> bool:
    """What desktops leave beside the data."""
    name = basename(path)
    return name in _LITTER or name.startswith("._")


def stem(uri: str) -> str:
    """The name without the suffix it is recognised by: `photos-00000` of `photos-00000.tar.gz`."""
    return _ENDING.sub("", basename(uri))


def slug(uri: str) -> str:
    """The name with nothing in it but letters, digits, `_` and `-`; never empty."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem(uri)).strip("-")[:60] or "shard"
