"""Bytes to uint8 pixels at the encoder's size, captions to tokens; what cannot be is a reject."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipelines.config import BLOCK_BYTES, BYTES_PER_PIXEL, DecodeConfig
from pipelines.contracts import PIXELS, REJECT_ITEM, Modality, Reject
from pipelines.encoders import registry
from pipelines.encoders.base import EncoderSpec, ImageTransform, Target, Tokenizer
from pipelines.encoders.pixels import pixels_of, prepared, upright_size
from pipelines.observe import Clock, Observe, nowhere, peak_memory_mib

STAGE = "decode"
# In messages of Pillow; it would make rejects of two runs differ.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")

# What is left out runs other programs (EPS), or takes any bytes for an image (TGA, PCX).
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM", "ICO", "PSD", "QOI")
Image.init()
FORMATS = tuple(name for name in _FORMATS if name in Image.OPEN)  # as this build of Pillow has them
# Measured at the peak, with what comes after decoding. A pixel takes 4, and as many again while it is turned or
# converted; progressive JPEGs are held as coefficients, and the other libraries keep planes and frames of their own.
_BYTES_PER_PIXEL = {"GIF": 12, "PSD": 12, "TIFF": 12, "WEBP": 20, "AVIF": 20, "JPEG2000": 28}
_CUT_SHORT = ("truncated", "broken data stream", "end of file", "unexpected eof")


class Decode:
    """`decode_for` as a callable that pickles small; tokenizers are built once in a process."""

    def __init__(self, targets: Sequence[Target], settings: DecodeConfig, observe: Observe = nowhere) -> None:
        self.targets, self.settings, self.observe = tuple(targets), settings, observe

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """A block of large images or of many small ones: a few rows' pixels at a time."""
        for target in self.targets:
            if _wants_text(target):
                _tokenizer(target.spec)  # once a process, and no part of the stage's rate
        at_once = rows_at_once(self.targets, self.settings)
        for start in range(0, block.num_rows, at_once):
            yield from self._decoded(block.slice(start, at_once))

    def _decoded(self, batch: pa.Table) -> list[pa.Table]:
        clock = Clock()
        with clock.running():
            decoded = decode_for(batch, self.targets, self.settings)
        rows = batch.num_rows - pc.sum(batch["end"], min_count=0).as_py()
        self.observe(stage="decode", rows=rows, seconds=clock.seconds, peak_mib=peak_memory_mib())
        return decoded


def rows_at_once(targets: Sequence[Target], settings: DecodeConfig) -> int:
    """As many as settings say, and fewer where the pixels of all encoders would be more than a block's bytes."""
    images = [target.spec.image for target in targets if _wants_pixels(target)]
    row_bytes = sum(prod(image.crop or image.size) * image.channels for image in images if image)
    return max(1, min(settings.rows_per_block, BLOCK_BYTES // max(1, row_bytes)))


def decode_for(batch: pa.Table, targets: Sequence[Target], settings: DecodeConfig) -> list[pa.Table]:
    """Rows of schema SAMPLE, in tables of schema PIXELS: those of each encoder for which their shard is pending.

    An image is decoded once, and brought to each encoder's size. Families of no encoder (the samples) go with a
    row's first table; of rows that are for these alone, with one of no encoder.
    """
    families: list[list[str]] = batch.column("families").to_pylist()
    folders = [target.folder for target in targets]
    mine = [[name for name in folders if name in row] or [NO_ENCODER] for row in families]
    images = _decoded_images(batch, targets, mine, settings)
    tables = []
    for folder in [*folders, NO_ENCODER]:
        rows = [at for at, names in enumerate(mine) if folder in names]
        if rows:
            written = [_written(families[at], mine[at], folders, folder) for at in rows]
            part = batch.take(rows).set_column(
                batch.schema.get_field_index("families"), "families", pa.array(written, pa.list_(pa.string()))
            )
            target = next((target for target in targets if target.folder == folder), None)
            tables.append(_table(part, [images[at] for at in rows], target))
    return tables


NO_ENCODER = ""


def _written(families: list[str], mine: list[str], folders: list[str], folder: str) -> list[str]:
    """Families that a row is written to as this encoder's."""
    others = [name for name in families if name not in folders] if folder == mine[0] else []
    return [*others, *(name for name in families if name == folder)]


def decode_batch(
    batch: pa.Table, spec: EncoderSpec, settings: DecodeConfig, modalities: Sequence[Modality]
) -> pa.Table:
    """`decode_for` one encoder, whatever families the rows are for: rows one for one and in order; end marks pass.

    Pixels and tokens of a modality that is not asked for are null, and its rejects are dropped. Width
    and height (EXIF orientation applied) are null where the image has no readable header.
    """
    target = Target("", spec, tuple(modalities))
    images = _decoded_images(batch, [target], [[""]] * batch.num_rows, settings)
    return _table(batch, images, target)


def _table(batch: pa.Table, images: list[Decoded], target: Target | None) -> pa.Table:
    rejects = batch.column("rejects").to_pylist()
    modalities = target.modalities if target else ()
    outcomes = [_rejected(before or [], image, target) for before, image in zip(rejects, images, strict=True)]
    captions = embedded_captions(batch, outcomes)
    wants_text = target and _wants_text(target)
    tokens = _tokens(captions, target.spec, outcomes) if target and wants_text else pa.nulls(batch.num_rows)
    for has_image, texts, found in zip(batch.column("has_image").to_pylist(), captions, outcomes, strict=True):
        found.extend(_of_pair(found) if has_image and texts else [])
    kept = [[reject for reject in found if reject["modality"] in modalities] for found in outcomes]
    new = {
        **_image_columns(images, target),
        "encoder": pa.array([target.folder if target else NO_ENCODER] * batch.num_rows, pa.string()),
        "tokens": tokens,
        "rejects": pa.array(kept, pa.list_(REJECT_ITEM)),
    }
    return _pixels_table(batch, new)


def _wants_text(target: Target) -> bool:
    return not {"text", "multimodal"}.isdisjoint(target.modalities)


def _wants_pixels(target: Target) -> bool:
    return not {"image", "multimodal"}.isdisjoint(target.modalities)


def _rejected(before: list[dict[str, Any]], image: Decoded, target: Target | None) -> list[dict[str, Any]]:
    found = image.rejects.get(_transform(target)) if target and _wants_pixels(target) else None
    return [*before, asdict(found)] if found else list(before)


def _of_pair(rejects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Why an image with its first caption is rejected: the first of their own rejects, if there is one."""
    own = [reject for reject in rejects if reject["modality"] == "image" or reject["caption_index"] == 0]
    return [{**own[0], "modality": "multimodal", "caption_index": None}] if own else []


def _pixels_table(batch: pa.Table, new: dict[str, pa.Array]) -> pa.Table:
    """Ray may have widened a column of nulls or of strings: cast to the schema."""
    arrays = [new[name] if name in new else batch.column(name) for name in PIXELS.names]
    cast = [array.cast(field.type) for array, field in zip(arrays, PIXELS, strict=True)]
    return pa.Table.from_arrays(cast, schema=PIXELS)


# -- images --------------------------------------------------------------------------------------


@dataclass
class Decoded:
    """What became of one sample's image: for each transform pixels [height, width, 3], or why not.

    size: (width, height), EXIF orientation applied; None where there is no readable header.
    """

    sha256: str | None = None
    size: tuple[int, int] | None = None
    pixels: dict[ImageTransform, NDArray[np.uint8]] = field(default_factory=dict)
    rejects: dict[ImageTransform, Reject] = field(default_factory=dict)


def _transform(target: Target) -> ImageTransform:
    assert target.spec.image is not None
    return target.spec.image


def _decoded_images(
    batch: pa.Table, targets: Sequence[Target], mine: list[list[str]], settings: DecodeConfig
) -> list[Decoded]:
    """Of each row. mine: folders of the encoders that a row is for."""
    by_folder = {target.folder: target for target in targets if _wants_pixels(target)}
    columns = (batch.column(name) for name in ("image", "has_image", "end", "rejects"))
    decoded = []
    for folders, image, has_image, end, rejects in zip(mine, *columns, strict=True):
        data = image.as_py()
        wanted = {_transform(by_folder[name]): by_folder[name].spec for name in folders if name in by_folder}
        if has_image.as_py() and not end.as_py() and not _refused_image(rejects.as_py() or []) and wanted:
            found = _decode(data or b"", wanted, settings)
        else:
            found = _measured(data, settings)
        found.sha256 = None if data is None else hashlib.sha256(data).hexdigest()
        decoded.append(found)
    return decoded


def _refused_image(rejects: list[dict[str, Any]]) -> bool:
    return any(reject["modality"] == "image" for reject in rejects)


def _decode(data: bytes, wanted: dict[ImageTransform, EncoderSpec], settings: DecodeConfig) -> Decoded:
    opened = open_image(data, settings.max_pixels)
    if isinstance(opened, Reject):
        return replace(_measured(data, settings), rejects=dict.fromkeys(wanted, opened))
    decoded, handed_over = Decoded(size=upright_size(opened)), [opened]
    del opened
    try:
        # No name here keeps the image as it was opened: it is freed as soon as it has been turned or cropped.
        image = prepared(handed_over.pop(), max(spec.max_aspect for spec in wanted.values()))
        for transform in wanted:
            decoded.pixels[transform] = pixels_of(image, transform)
    except MemoryError:
        raise
    except Exception as error:
        failed = _reject("decode_failed", error)
        decoded.rejects = {transform: failed for transform in wanted if transform not in decoded.pixels}
    return decoded


def _measured(data: bytes | None, settings: DecodeConfig) -> Decoded:
    """The size by the header alone: samples tell it whether or not the run embeds images."""
    with suppress(Exception), _pixel_limit(settings.max_pixels):
        return Decoded(size=upright_size(Image.open(io.BytesIO(data or b""), formats=FORMATS)))
    return Decoded()


def _image_columns(images: list[Decoded], target: Target | None) -> dict[str, pa.Array]:
    own = [image.pixels.get(_transform(target)) if target and _wants_pixels(target) else None for image in images]
    sizes = [image.size or (None, None) for image in images]
    columns: dict[str, list[Any]] = {
        "sha256": [image.sha256 for image in images],
        "width": [width for width, _ in sizes],
        "height": [height for _, height in sizes],
        "pixels": [None if pixels is None else pixels.tobytes() for pixels in own],
        "pixels_shape": [None if pixels is None else pixels.shape for pixels in own],
    }
    return {name: pa.array(values, PIXELS.field(name).type) for name, values in columns.items()}


def open_image(data: bytes, max_pixels: int) -> Image.Image | Reject:
    """The first frame of an encoded image, loaded; a Reject where it cannot be.

    Nothing is allocated for an image of more than `max_pixels`, or of so many that its decoder takes more memory
    than `max_pixels` are meant to: its header is enough to refuse it.
    """
    if not data:
        return _reject("empty_image", "0 bytes")
    try:
        with _pixel_limit(max_pixels):
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > max_pixels:
                return _reject("too_many_pixels", f"{image.width} x {image.height}, more than {max_pixels}")
            needed, allowed = _needed_bytes(image, len(data)), max_pixels * BYTES_PER_PIXEL + BLOCK_BYTES
            if needed > allowed:
                size = f"{image.width} x {image.height} of {image.format}"
                return _reject("too_many_pixels", f"{size} take {needed >> 20} MiB, more than {allowed >> 20}")
            image.load()
            return image
    except MemoryError:
        raise
    except Exception as error:
        return _refusal(data, error)


def _needed_bytes(image: Image.Image, file_bytes: int) -> int:
    """Memory at the peak of decoding. The file is there twice: in its block, and on its own."""
    # GIF and others read the second frame to tell, and fail where it is broken and the first is not.
    heavy = "progressive" in image.info or (image.format == "PNG" and getattr(image, "is_animated", False))
    per_pixel = _BYTES_PER_PIXEL.get(str(image.format), BYTES_PER_PIXEL if heavy else 8)
    return image.width * image.height * per_pixel + 2 * file_bytes


@contextmanager
def _pixel_limit(max_pixels: int) -> Iterator[None]:
    """Pillow's own guard at our limit, for the images within images (ICO) that it opens itself.

    It refuses from twice its setting on, and warns before.
    """
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max(1, max_pixels // 2)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _refusal(data: bytes, error: Exception) -> Reject:
    """What a decoder says of a file does not tell one that is cut from one that never was an image."""
    if isinstance(error, Image.DecompressionBombError):
        return _reject("too_many_pixels", error)
    kind = next((name for name, start in _STARTS.items() if start.match(data)), None)
    is_cut = kind is not None and _is_cut(kind, data)
    if isinstance(error, UnidentifiedImageError):
        if is_cut:
            return _reject("truncated_image", f"starts as {kind}, and ends after {len(data)} bytes, in the header")
        if kind:
            return _reject("decode_failed", f"starts as {kind}, with a header that makes no sense")
        return _reject("unidentified_image", f"no image format that is read here starts with {data[:24]!r}")
    says_so = isinstance(error, EOFError) or any(sign in str(error).lower() for sign in _CUT_SHORT)
    return _reject("truncated_image" if says_so or is_cut else "decode_failed", error)


_STARTS = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "GIF": re.compile(rb"GIF8[79]a"),
    "WEBP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "TIFF": re.compile(rb"II\*\0|MM\0\*"),
    "AVIF": re.compile(rb"....ftypavi[fs]", re.DOTALL),
    "BMP": re.compile(rb"BM.{8}", re.DOTALL),
    "ICO": re.compile(rb"\x00\x00\x01\x00"),
}


def _is_cut(kind: str, data: bytes) -> bool:
    """Whether a file that cannot be read ends before it says that it does."""
    if kind == "JPEG":
        return b"\xff\xd9" not in data
    if kind == "PNG":
        return b"IEND" not in data
    if kind == "WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if kind == "TIFF":
        return len(data) < int.from_bytes(data[4:8], "little" if data[:2] == b"II" else "big")
    return kind == "AVIF" and _ends_in_a_box(data)


def _ends_in_a_box(data: bytes) -> bool:
    """ISO base media (ISO/IEC 14496-12): boxes one after the other, each of which says how long it is."""
    at = 0
    while 0 <= at < len(data):
        size = int.from_bytes(data[at : at + 4])
        if size < 8:  # to the end of the file, or a size of 64 bits
            return False
        at += size
    return at > len(data)


def _reject(reason: str, detail: str | Exception, caption_index: int | None = None) -> Reject:
    if isinstance(detail, Exception):
        detail = _ADDRESS.sub("", f"{type(detail).__name__}: {detail}")
    modality: Modality = "image" if caption_index is None else "text"
    return Reject(modality, STAGE, reason, " ".join(detail.split())[:300], caption_index)


# -- captions ------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _tokenizer(spec: EncoderSpec) -> Tokenizer:
    return registry.tokenizer(spec)


def embedded_captions(batch: pa.Table, rejects: list[list[dict[str, Any]]]) -> list[list[str | None] | None]:
    """Of each row: translations where there are some, else what it came with; None where that was rejected."""
    captions, translations = batch.column("captions").to_pylist(), batch.column("translations").to_pylist()
    rows = []
    for texts, translated, refused in zip(captions, translations, rejects, strict=True):
        gone = {reject["caption_index"] for reject in refused if reject["modality"] == "text"}
        found = translated or [None] * len(texts or [])
        embedded = [own if found[at] is None else found[at] for at, own in enumerate(texts or [])]
        rows.append([None if at in gone else text for at, text in enumerate(embedded)] if texts is not None else None)
    return rows


def _tokens(rows: list[list[str | None] | None], spec: EncoderSpec, rejects: list[list[dict[str, Any]]]) -> pa.Array:
    """list<list<int32>> as PIXELS has it; appends what becomes of captions that fail to `rejects`."""
    cells: list[list[NDArray[np.int32] | None] | None] = [None if row is None else [None] * len(row) for row in rows]
    present = [
        (row, index, text)
        for row, texts in enumerate(rows)
        for index, text in enumerate(texts or [])
        if text is not None
    ]
    if present:
        found = _tokenize([text for _, _, text in present], _tokenizer(spec))
        for (row, index, _), result in zip(present, found, strict=True):
            if isinstance(result, Exception):
                rejects[row].append(asdict(_reject("tokenizer_failed", result, index)))
            else:
                cells[row][index] = result  # type: ignore[index]
    return pa.array(cells, PIXELS.field("tokens").type)


def _tokenize(texts: list[str], tokenizer: Tokenizer) -> list[NDArray[np.int32] | Exception]:
    """All at once; one by one where that fails, to know which."""
    try:
        return list(tokenizer(texts))
    except Exception as error:
        if len(texts) == 1:
            return [error]
        return [result for text in texts for result in _tokenize([text], tokenizer)]
