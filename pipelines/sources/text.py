"""Text that any writer can encode: captions with their rejects, keys, and metadata that JSON can hold."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.contracts import Reject

STAGE = "read"
MAX_DEPTH = 64
MAX_BASE64_BYTES = 4 * 2**10
MAX_CAPTIONS = 1_000
"""Of a sample; all of them are tokenised at once."""


@dataclass(frozen=True)
class Fault:
    """Why something could not be read: a short constant and one line for a person."""

    reason: str
    detail: str = ""


def printable(text: str) -> str:
    """The text with what UTF-8 cannot hold written as escapes, so that different names stay different."""
    return text.encode("utf-8", "backslashreplace").decode()


def decoded(data: bytes) -> str | Fault:
    """The text of a caption file, without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Fault("not_utf8", str(error))


def captions_of(values: Iterable[Any], max_bytes: int) -> tuple[list[str | None], list[Reject]]:
    """The captions in order, None where one is rejected, and the rejects.

    A null is no caption and takes no place; a blank one keeps its place, so that positions stay the
    source's, unless there are only blank ones. NUL characters and line ends at the end are dropped,
    nothing else is. Beyond MAX_CAPTIONS one reject stands for all. values: text, bytes, numbers, `{"raw": text}`, or a
    Fault found earlier.
    """
    captions: list[str | None] = []
    rejects: list[Reject] = []
    for value in values:
        if len(captions) == MAX_CAPTIONS:
            rejects.append(Reject("text", STAGE, "too_many_captions", f"more than {MAX_CAPTIONS:,}", MAX_CAPTIONS))
            captions.append(None)
            break
        caption = _caption(value, max_bytes)
        if isinstance(caption, Fault):
            rejects.append(Reject("text", STAGE, caption.reason, caption.detail, len(captions)))
            captions.append(None)
        elif caption is not None:
            captions.append(caption)
    if not rejects and not any(caption and caption.strip() for caption in captions):
        return [], []
    return captions, rejects


def _caption(value: Any, max_bytes: int) -> str | Fault | None:
    if isinstance(value, dict) and "raw" in value:
        value = value["raw"]
    if isinstance(value, bytes):
        value = decoded(value)
    if value is None or isinstance(value, Fault):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    return _bounded(value, max_bytes) if isinstance(value, str) else Fault("not_text", f"is {type(value).__name__}")


def _bounded(text: str, max_bytes: int) -> str | Fault:
    text = text.replace("\0", "").rstrip("\r\n")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        return Fault("not_utf8", str(error))
    if size > max_bytes:
        return Fault("caption_too_large", f"{size} bytes, allowed are {max_bytes}")
    return text


def as_list(value: Any) -> list[Any]:
    """A list of captions as it is, a single caption as a list of one, null as none."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def finite(number: Any) -> float | None:
    """The number, or None for those that JSON has no word for."""
    value = float(number)
    return value if math.isfinite(value) else None


_DECODER = json.JSONDecoder(parse_constant=lambda _: None, parse_float=finite)


def parse_json(text: str) -> Any:
    """Raises ValueError, also where the text is nested too deeply to be read."""
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def metadata_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as JSON can hold them, and what became of those that it cannot.

    `_base64` names fields with bytes that are no text, `_skipped` those with more than MAX_BASE64_BYTES of
    them and those nested too deeply, of which `_error` tells.
    """
    metadata: dict[str, Any] = {}
    for name, value in ((printable(str(name)), value) for name, value in fields.items()):
        marks: set[str] = set()
        try:
            metadata[name] = plain(value, marks)
        except ValueError as error:
            marks = {"_skipped"}
            _note(metadata, "_error", f"{name}: {error}")
        for mark in sorted(marks):
            _note(metadata, mark, name)
    return metadata


def _note(metadata: dict[str, Any], mark: str, text: str) -> None:
    noted = metadata.get(mark)
    metadata[mark] = [*noted, text] if isinstance(noted, list) else [text]


def plain(value: Any, marks: set[str], depth: int = 0) -> Any:
    """Value as JSON can hold it. Bytes that are text become text, a few others base64, many None.

    marks: is added `_base64` or `_skipped` where the latter happens. Raises ValueError where the value is
    nested more than MAX_DEPTH deep: writers of JSON recurse.
    """
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        return {printable(str(key)): plain(item, marks, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, marks, depth + 1) for item in value]
    if isinstance(value, bytes):
        return _text_or_base64(value, marks)
    if isinstance(value, float):
        return finite(value)
    return value if value is None or isinstance(value, (bool, int)) else printable(str(value))


def _text_or_base64(data: bytes, marks: set[str]) -> str | None:
    text = decoded(data)
    if isinstance(text, str):
        return text
    is_small = len(data) <= MAX_BASE64_BYTES
    marks.add("_base64" if is_small else "_skipped")
    return base64.b64encode(data).decode() if is_small else None


def label_of(metadata: dict[str, Any]) -> str | None:
    """The class label a sample's metadata names."""
    label = next((metadata[name] for name in ("label", "cls") if metadata.get(name) is not None), None)
    return str(label).strip() if isinstance(label, (str, int)) else None
