"""Bytes to uint8 pixels at the encoder's size, captions to tokens; what cannot be is a reject."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipelines.config import BLOCK_BYTES, BYTES_PER_PIXEL, DecodeConfig
from pipelines.contracts import PIXELS, REJECT_ITEM, Modality, Reject
from pipelines.encoders import registry
from pipelines.encoders.base import EncoderSpec, Tokenizer
from pipelines.encoders.pixels import to_pixels, upright_size
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


@dataclass
class Decoded:
    """What became of one sample's image: pixels [height, width, 3] or why not."""

    pixels: NDArray[np.uint8] | None = None
    size: tuple[int, int] | None = None
    reject: Reject | None = None


class Decode:
    """`decode_batch` as a callable that pickles small; the tokenizer is built once in a process."""

    def __init__(
        self, spec: EncoderSpec, settings: DecodeConfig, modalities: Sequence[str], observe: Observe = nowhere
    ) -> None:
        self.spec, self.settings, self.modalities, self.observe = spec, settings, tuple(modalities), observe

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """A block of large images or of many small ones: a few rows' pixels at a time."""
        if "text" in self.modalities:
            _tokenizer(self.spec)  # once a process, and no part of the stage's rate
        for start in range(0, block.num_rows, self.settings.rows_per_block):
            yield self._decoded(block.slice(start, self.settings.rows_per_block))

    def _decoded(self, batch: pa.Table) -> pa.Table:
        clock = Clock()
        with clock.running():
            decoded = decode_batch(batch, self.spec, self.settings, self.modalities)
        rows = batch.num_rows - pc.sum(batch["end"], min_count=0).as_py()
        self.observe(stage="decode", rows=rows, seconds=clock.seconds, peak_mib=peak_memory_mib())
        return decoded


def decode_batch(batch: pa.Table, spec: EncoderSpec, settings: DecodeConfig, modalities: Sequence[str]) -> pa.Table:
    """Rows of schema SAMPLE to rows of schema PIXELS, one for one and in order; end marks pass.

    Pixels and tokens of a modality that is not asked for are null, and its rejects are dropped. Width
    and height (EXIF orientation applied) are null where the image has no readable header.
    """
    rejects = [
        [reject for reject in row or [] if reject["modality"] in modalities]
        for row in batch.column("rejects").to_pylist()
    ]
    columns = _Columns()
    for image, has_image, end, refused in zip(
        batch.column("image"), batch.column("has_image"), batch.column("end"), rejects, strict=True
    ):
        data = image.as_py()
        wanted = "image" in modalities and has_image.as_py() and not end.as_py() and not _refused_image(refused)
        decoded = _decode(data or b"", spec, settings) if wanted else _measured(data, settings)
        if decoded.reject:
            refused.append(asdict(decoded.reject))
        columns.add(data, decoded)
    tokens = _tokens(batch.column("captions"), spec, rejects) if "text" in modalities else pa.nulls(len(batch))
    return _pixels_table(
        batch, {**columns.arrays(), "tokens": tokens, "rejects": pa.array(rejects, pa.list_(REJECT_ITEM))}
    )


def _refused_image(rejects: list[dict[str, Any]]) -> bool:
    return any(reject["modality"] == "image" for reject in rejects)


@dataclass
class _Columns:
    """The image's columns, a row at a time."""

    sha256: list[str | None] = field(default_factory=list)
    width: list[int | None] = field(default_factory=list)
    height: list[int | None] = field(default_factory=list)
    pixels: list[bytes | None] = field(default_factory=list)
    pixels_shape: list[tuple[int, ...] | None] = field(default_factory=list)

    def add(self, data: bytes | None, decoded: Decoded) -> None:
        width, height = decoded.size or (None, None)
        self.sha256.append(None if data is None else hashlib.sha256(data).hexdigest())
        self.width.append(width)
        self.height.append(height)
        self.pixels.append(None if decoded.pixels is None else decoded.pixels.tobytes())
        self.pixels_shape.append(None if decoded.pixels is None else decoded.pixels.shape)

    def arrays(self) -> dict[str, pa.Array]:
        return {name: pa.array(values, PIXELS.field(name).type) for name, values in vars(self).items()}


def _pixels_table(batch: pa.Table, new: dict[str, pa.Array]) -> pa.Table:
    """Ray may have widened a column of nulls or of strings: cast to the schema."""
    arrays = [new[name] if name in new else batch.column(name) for name in PIXELS.names]
    cast = [array.cast(field.type) for array, field in zip(arrays, PIXELS, strict=True)]
    return pa.Table.from_arrays(cast, schema=PIXELS)


# -- images --------------------------------------------------------------------------------------


def _decode(data: bytes, spec: EncoderSpec, settings: DecodeConfig) -> Decoded:
    assert spec.image is not None
    opened = open_image(data, settings.max_pixels)
    if isinstance(opened, Reject):
        return Decoded(reject=opened)
    size, handed_over = upright_size(opened), [opened]
    del opened
    try:
        # No name here keeps the image: it is freed as soon as it has been turned, cropped or converted.
        return Decoded(to_pixels(handed_over.pop(), spec.image, spec.max_aspect), size)
    except MemoryError:
        raise
    except Exception as error:
        return Decoded(size=size, reject=_reject("decode_failed", error))


def _measured(data: bytes | None, settings: DecodeConfig) -> Decoded:
    """The size by the header alone: samples tell it whether or not the run embeds images."""
    with suppress(Exception), _pixel_limit(settings.max_pixels):
        return Decoded(size=upright_size(Image.open(io.BytesIO(data or b""), formats=FORMATS)))
    return Decoded()


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


@lru_cache(maxsize=4)
def _tokenizer(spec: EncoderSpec) -> Tokenizer:
    return registry.tokenizer(spec)


def _tokens(captions: pa.ChunkedArray, spec: EncoderSpec, rejects: list[list[dict[str, Any]]]) -> pa.Array:
    """list<list<int32>> as PIXELS has it; appends what becomes of captions that fail to `rejects`."""
    rows: list[list[str | None] | None] = captions.to_pylist()
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
