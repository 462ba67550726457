"""The rows of a manifest one by one: JSON lines, CSV, a JSON list, and the Karpathy JSON of Flickr and COCO."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from pipelines.errors import InputError
from pipelines.sources.identity import digest
from pipelines.sources.kinds import basename
from pipelines.sources.text import parse_json, printable
from pipelines.storage import Store

MAX_ROW_BYTES = 16 * 2**20
_CHUNK_CHARS = 2**20
_SPACE = " \t\r\n"
_BETWEEN = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class Row:
    """raw: the text it was parsed from, for digests. values: None where it could not be parsed, fault then says why."""

    number: int
    raw: str
    values: dict[str, Any] | None
    fault: str = ""

    @property
    def digest(self) -> str:
        return digest(self.raw)


def rows(uri: str, store: Store, splits: list[str] | None) -> Iterator[Row]:
    """In the order of the file. A row that cannot be parsed is a Row with a fault; a file that breaks off ends so.

    splits: of a Karpathy JSON, those to take; None takes all.
    """
    number, raw = 0, ""
    with store.open(uri) as stream:
        try:
            for number, (raw, values, fault) in enumerate(_parsed(uri, _text(stream), splits), start=1):
                if raw.strip():
                    yield Row(number, raw, values, fault)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield Row(number + 1, f"{raw}\0broken", None, f"the file breaks off here: {error}")


Parsed = tuple[str, dict[str, Any] | None, str]


def _text(stream: io.BufferedReader) -> io.TextIOWrapper:
    """Bytes that are not UTF-8 come through as surrogates, so that one bad caption is not a bad file."""
    packed = stream.peek(2)[:2] == b"\x1f\x8b"
    binary = cast(BinaryIO, gzip.GzipFile(fileobj=stream) if packed else stream)
    return io.TextIOWrapper(binary, "utf-8-sig", errors="surrogateescape", newline="")


def _parsed(uri: str, text: io.TextIOWrapper, splits: list[str] | None) -> Iterator[Parsed]:
    name = basename(uri).lower().removesuffix(".gz")
    if name.endswith((".csv", ".tsv")):
        return _csv(text, "\t" if name.endswith(".tsv") else ",")
    if name.endswith(".txt"):
        return _paths(text)
    if name.endswith(".json"):
        return _json(uri, text, splits)
    return _lines(text, "")


def _paths(text: io.TextIOWrapper) -> Iterator[Parsed]:
    """A list file: one path or URI a line, `#` starts a comment."""
    for line in text:
        path = line.strip()
        if path and not path.startswith("#"):
            yield path, {"image": path}, ""


def _lines(text: io.TextIOWrapper, first: str) -> Iterator[Parsed]:
    while line := first or text.readline(MAX_ROW_BYTES):
        first = ""
        if len(line) >= MAX_ROW_BYTES and not line.endswith("\n"):
            _to_line_end(text)
            yield line, None, f"longer than {MAX_ROW_BYTES} characters"
        else:
            yield _object(line.strip())


def _to_line_end(text: io.TextIOWrapper) -> None:
    while (rest := text.readline(MAX_ROW_BYTES)) and not rest.endswith("\n"):
        pass


def _object(raw: str) -> Parsed:
    try:
        value = parse_json(raw) if raw else {}
    except ValueError as error:
        return raw, None, printable(str(error))
    return (raw, value, "") if isinstance(value, dict) else (raw, None, f"is {type(value).__name__}, not an object")


def _csv(text: io.TextIOWrapper, delimiter: str) -> Iterator[Parsed]:
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = _Lines(text)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        fields, raw = _csv_record(reader, lines, delimiter, None if header is None else len(header))
        if not raw:
            return
        if isinstance(fields, str):
            yield raw, None, fields
        elif header is None:
            header = [name.strip() for name in fields]
        elif fields:
            yield _record(header, fields)


class _Lines:
    """The lines of a text; those of the record at hand can come again."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text, self._again, self._size = text, deque[str](), 0
        self.record: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        """Ends at the end of the text, and where the record is larger than any may be."""
        line = "" if self._size >= MAX_ROW_BYTES else self._next()
        if not line:
            raise StopIteration
        self.record.append(line)
        self._size += len(line)
        return line

    def _next(self) -> str:
        if self._again:
            return self._again.popleft()
        line = self._text.readline(MAX_ROW_BYTES)
        if len(line) >= MAX_ROW_BYTES and not line.endswith("\n"):
            _to_line_end(self._text)
        return line

    def begin(self) -> None:
        self.record, self._size = [], 0

    def take_back(self) -> None:
        """All lines of the record but its first will come again."""
        self._again.extendleft(reversed(self.record[1:]))
        del self.record[1:]


def _csv_record(
    reader: Iterator[list[str]], lines: _Lines, delimiter: str, width: int | None
) -> tuple[list[str] | str, str]:
    """Fields, or what is wrong with them, and the text of the next record, empty at the end.

    A quote that is never closed takes the rows behind it for its own text, up to the next quote or the end of
    the file. So a record of several lines that has not `width` fields is a bad line, and its others are read again.
    """
    lines.begin()
    fields: list[str] | str
    try:
        fields = next(reader, [])
    except csv.Error as error:
        fields = str(error) if len(lines.record) > 1 else _loosely(lines.record[0], delimiter)
    if len(lines.record) > 1 and (isinstance(fields, str) or len(fields) != (width or len(fields))):
        lines.take_back()
        fields = "a quote is not closed on its line"
    raw = "".join(lines.record)
    return (f"longer than {MAX_ROW_BYTES} characters" if len(raw) >= MAX_ROW_BYTES else fields), raw


def _loosely(line: str, delimiter: str) -> list[str] | str:
    """Of a line with quotes where none belong, `"5" pipe"`, as spreadsheets read it."""
    reader = csv.reader([line, ""], delimiter=delimiter)
    try:
        fields = next(reader)
    except csv.Error as error:
        return str(error)
    return fields if reader.line_num == 1 else "a quote is not closed on its line"


def _record(header: list[str], fields: list[str]) -> Parsed:
    raw = json.dumps([header, fields])
    if len(fields) != len(header):
        return raw, None, f"{len(fields)} fields under a header of {len(header)}: {printable(str(fields))[:200]}"
    return raw, {name: _listed(field) for name, field in zip(header, fields, strict=True)}, ""


def _listed(field: str) -> Any:
    """A list of captions written as JSON in one field is that list; an empty field is none."""
    if field.startswith('["') and field.endswith('"]'):
        try:
            return parse_json(field)
        except ValueError:
            return field
    return field or None


def _json(uri: str, text: io.TextIOWrapper, splits: list[str] | None) -> Iterator[Parsed]:
    """A list of objects, an object with `images` (Karpathy), or JSON lines under another name."""
    buffer = text.read(_CHUNK_CHARS)
    start = buffer.lstrip(_SPACE)
    if start.startswith("["):
        yield from (_object(raw) for raw in _elements(text, start[1:]))
        return
    found = buffer.find('"images"')
    opening = buffer.find("[", found)
    if found >= 0 and opening >= 0:
        yield from _karpathy(uri, _elements(text, buffer[opening + 1 :]), splits)
        return
    first, newline, rest = buffer.partition("\n")
    if _object(first.strip())[1] is None:
        raise InputError(
            f"{uri} is no manifest", 'Give JSON lines, a JSON list of objects, or Karpathy\'s {"images": […]}.'
        )
    yield _object(first.strip())
    yield from _continued(rest if newline else "", text)


def _continued(rest: str, text: io.TextIOWrapper) -> Iterator[Parsed]:
    """JSON lines of which `rest` was read already."""
    *whole, last = rest.split("\n")
    for line in whole:
        yield _object(line.strip())
    yield from _lines(text, last + text.readline(MAX_ROW_BYTES))


def _elements(text: io.TextIOWrapper, buffer: str) -> Iterator[str]:
    """The texts of a JSON array's elements, a chunk in memory at a time."""
    decoder, at = json.JSONDecoder(), 0
    while True:
        at = _BETWEEN.match(buffer, at).end()  # type: ignore[union-attr]
        if buffer.startswith("]", at):
            return
        try:
            _, end = decoder.raw_decode(buffer, at)
        except (ValueError, RecursionError):
            chunk = text.read(_CHUNK_CHARS) if len(buffer) - at < MAX_ROW_BYTES else ""
            if not chunk:
                yield buffer[at : at + 1000] or "(nothing)"
                return
            buffer, at = buffer[at:] + chunk, 0
            continue
        yield buffer[at:end]
        at = end


def _karpathy(uri: str, elements: Iterator[str], splits: list[str] | None) -> Iterator[Parsed]:
    """cs.stanford.edu/people/karpathy/deepimagesent: filename, filepath, split, sentences of raw and tokens."""
    for number, element in enumerate(elements):
        raw, values, fault = _object(element)
        if values is None or "sentences" not in values:
            if values is not None and number == 0:
                raise _not_karpathy(uri)
            yield raw, None, fault or "has no sentences"
        elif splits is None or values.get("split") in splits:
            yield raw, _described(values), ""


def _described(values: dict[str, Any]) -> dict[str, Any]:
    image = "/".join(str(values[name]) for name in ("filepath", "filename") if values.get(name))
    sentences = values["sentences"] if isinstance(values["sentences"], list) else []
    return {**values, "image": image, "captions": sentences}


def _not_karpathy(uri: str) -> InputError:
    return InputError(
        f"{uri} lists images without sentences: COCO's own annotations, not Karpathy's JSON",
        "Use Karpathy's dataset_coco.json, or JSON lines of image and captions.",
    )
