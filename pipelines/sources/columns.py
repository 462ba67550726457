"""Rows of a table or manifest: which column is the image, the captions and the key, and the sample they make."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pipelines.config import ReadConfig
from pipelines.contracts import Sample
from pipelines.sources.members import reject_image
from pipelines.sources.text import Fault, as_list, captions_of, label_of, metadata_of, printable

# fmt: off
IMAGE_NAMES = (
    "image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "img_bytes", "picture", "photo",
    "image_path", "img_path", "filepath", "file_path", "image_file", "filename", "file_name", "image_name",
    "path", "file", "image_url", "img_url", "url", "uri", "image_uri",
)
CAPTION_NAMES = (
    "captions", "caption", "sentences", "sentence", "text", "txt", "raw", "alt_text", "alt", "title", "description",
)
KEY_NAMES = ("key", "__key__", "sample_id", "id", "image_id", "img_id", "uid", "uuid", "_id")
# fmt: on


@dataclass(frozen=True)
class Columns:
    """Names of the columns that mean something; None where there is none."""

    image: str | None
    caption: str | None
    key: str | None

    def __contains__(self, name: str) -> bool:
        return name in (self.image, self.caption, self.key)


def columns_of(names: Iterable[str], settings: ReadConfig) -> Columns:
    """The columns that the settings name, else the first known names, in whatever case."""
    return _columns(tuple(names), settings.image_column, settings.caption_column, settings.key_column)


@lru_cache(maxsize=256)
def _columns(names: tuple[str, ...], image: str | None, caption: str | None, key: str | None) -> Columns:
    return Columns(
        _chosen(names, image, IMAGE_NAMES), _chosen(names, caption, CAPTION_NAMES), _chosen(names, key, KEY_NAMES)
    )


def _chosen(names: tuple[str, ...], wanted: str | None, known: tuple[str, ...]) -> str | None:
    """wanted, where it is there; an empty name means that there is none."""
    if wanted is not None:
        return wanted if wanted in names else None
    lowered = {name.lower(): name for name in reversed(names)}
    return next((lowered[name] for name in known if name in lowered), None)


def key_in(row: dict[str, Any], columns: Columns) -> str | None:
    """The row's own key, None where it has none."""
    value = row.get(columns.key) if columns.key else None
    value = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value
    return printable(str(value)) if isinstance(value, (str, int, float)) and value != "" else None


def reference_in(value: Any) -> str | None:
    """The path or URL in an image column, Hugging Face's `{"bytes": null, "path": …}` included."""
    if isinstance(value, dict):
        value = value.get("path")
    return value if isinstance(value, str) and value.strip() else None


def sample_of(row: dict[str, Any], columns: Columns, key: str, settings: ReadConfig) -> tuple[Sample, str | None]:
    """The sample of a row, and the path or URL of its image where the row has no bytes of it."""
    values = as_list(row.get(columns.caption)) if columns.caption else []
    captions, rejects = captions_of(values, settings.max_caption_bytes)
    metadata = metadata_of({name: value for name, value in row.items() if name not in columns})
    sample = Sample(key, captions=captions, rejects=rejects, metadata=metadata, label=label_of(metadata))
    image = row.get(columns.image) if columns.image else None
    data = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(data, (bytes, bytearray)):
        _put_image(sample, bytes(data), settings.max_image_bytes)
        return sample, None
    reference = reference_in(image)
    if image is not None and reference is None and not _is_null(image):
        reject_image(sample, Fault("not_an_image", f"the image column holds {type(image).__name__}"))
    return sample, reference


def _put_image(sample: Sample, data: bytes, max_bytes: int) -> None:
    if len(data) > max_bytes:
        reject_image(sample, Fault("image_too_large", f"{len(data)} bytes, allowed are {max_bytes}"))
    else:
        sample.has_image, sample.image, sample.length = True, data, len(data)


def _is_null(image: Any) -> bool:
    """Hugging Face writes a missing image as a struct of nulls."""
    return not any(image.values()) if isinstance(image, dict) else isinstance(image, str) and not image.strip()
