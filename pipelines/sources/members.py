"""A sample from the files that share its key: `.jpg`, `.txt`, `.json`, `.cls`, … of a tar or a folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.config import ReadConfig
from pipelines.contracts import Reject, Sample
from pipelines.sources.kinds import KNOWN_IMAGE_SUFFIXES
from pipelines.sources.text import STAGE, Fault, as_list, captions_of, decoded, label_of, parse_json, plain, printable

CAPTION_EXTENSIONS = ("txt", "caption")
MAX_METADATA_BYTES = 16 * 2**20
MAX_FIELD_BYTES = 64 * 2**10
MAX_MEMBERS = 1_000
"""Of one key in a row; what follows is a sample of its own, as where a key comes again."""


@dataclass
class Member:
    """One file of a sample. extension: what follows the key, lower-cased, without the first dot.

    data: None where the file is faulty or was not wanted. offset, length: where the bytes lie in `uri`.
    """

    extension: str
    data: bytes | None = None
    fault: Fault | None = None
    uri: str = ""
    offset: int = 0
    length: int = 0

    @property
    def is_image(self) -> bool:
        return f".{self.extension.rpartition('.')[2]}" in KNOWN_IMAGE_SUFFIXES

    @property
    def is_plain_image(self) -> bool:
        """`jpg`, not `seg.png`: the sample's image, where it has both."""
        return self.is_image and "." not in self.extension


def limit_of(member: Member, settings: ReadConfig, beside: Iterable[Member] = ()) -> int:
    """Bytes above which a member is not read into memory. beside: those of its sample that were read before it."""
    if member.is_image:
        return settings.max_image_bytes
    if member.extension in CAPTION_EXTENSIONS:
        return settings.max_caption_bytes
    if member.extension == "json":
        return MAX_METADATA_BYTES
    taken = sum(len(other.data) for other in beside if other.data and not other.is_image)
    return max(0, min(MAX_FIELD_BYTES, MAX_METADATA_BYTES - taken))


def too_large(member: Member, limit: int) -> Fault:
    what = "image" if member.is_image else "caption" if member.extension in CAPTION_EXTENSIONS else "file"
    return Fault(f"{what}_too_large", f"{member.length} bytes, allowed are {limit}")


def assemble(key: str, members: list[Member], settings: ReadConfig) -> Sample:
    """One sample of everything its members hold; whatever is wrong with them is in its rejects."""
    image = main_image(members)
    values, metadata, bad_json = _json(members)
    texts = [m.fault or decoded(m.data or b"") for m in members if m.extension in CAPTION_EXTENSIONS]
    captions, rejects = captions_of(_caption_values(texts, values, bad_json), settings.max_caption_bytes)
    metadata |= {name: value for name, value in _fields(members, image).items() if name not in metadata}
    sample = Sample(printable(key), captions=captions, metadata=metadata, label=label_of(metadata), rejects=rejects)
    if image is not None:
        _place(sample, image)
    elif not texts and not any(member.extension == "json" for member in members):
        reject_image(sample, _why_unknown(members))
    return sample


def main_image(members: Iterable[Member]) -> Member | None:
    """The image among the members; a plain `jpg` goes before a `seg.png`."""
    images = [member for member in members if member.is_image]
    return next((member for member in images if member.is_plain_image), images[0] if images else None)


def split_images(members: list[Member]) -> list[list[Member]]:
    """The members, and those images apart that only a dot in their names put under one key.

    `a.jpg` with `a.seg.png` is one sample; `img.001.jpg` with `img.002.jpg` are two.
    """
    image = main_image(members)
    if image is None or image.is_plain_image:
        return [members]
    others = [member for member in members if member.is_image and member is not image]
    return [[member for member in members if member is image or not member.is_image], *([other] for other in others)]


def reject_image(sample: Sample, fault: Fault) -> None:
    sample.has_image, sample.image = True, None
    sample.rejects.append(Reject("image", STAGE, fault.reason, fault.detail))


def reject_all(sample: Sample, fault: Fault) -> Sample:
    """The sample with every item of it rejected that is not yet; one without items gets one."""
    if sample.image is not None or not (sample.has_image or sample.captions):
        reject_image(sample, fault)
    for index, caption in enumerate(sample.captions):
        if caption is not None:
            sample.captions[index] = None
            sample.rejects.append(Reject("text", STAGE, fault.reason, fault.detail, index))
    return sample


def rejected_row(key: str, uri: str, fault: Fault) -> Sample:
    """The row that stands for what a fault hid."""
    return reject_all(Sample(printable(key), uri=uri), fault)


def without_repeats(samples: Iterable[Sample]) -> Iterator[Sample]:
    """A key that comes again is a row of its own, rejected."""
    seen: set[str] = set()
    for sample in samples:
        if sample.key in seen and (sample.has_image or sample.captions):
            sample = reject_all(sample, Fault("duplicate_key", f"{sample.key} came before in this shard"))
        seen.add(sample.key)
        yield sample


def _place(sample: Sample, image: Member) -> None:
    sample.has_image, sample.image = True, image.data
    sample.uri, sample.offset, sample.length = image.uri, image.offset, image.length
    if image.data is None:
        reject_image(sample, image.fault or Fault("unreadable"))


def _json(members: list[Member]) -> tuple[dict[str, Any], dict[str, Any], Fault | None]:
    """The object in the `.json`: as it is, as metadata, and what is wrong with it."""
    member = next((member for member in members if member.extension == "json"), None)
    if member is None:
        return {}, {}, None
    text = decoded(member.data or b"")
    try:
        fault = member.fault
        if fault is None:
            value = parse_json(_required(text))
            value = value if isinstance(value, dict) else {"json": value}
            return value, plain(value, set()), None
    except ValueError as error:
        fault = Fault("bad_json", printable(str(error)))
    return {}, {"_error": f"json: {fault.detail}"}, fault


def _required(text: str | Fault) -> str:
    if isinstance(text, Fault):
        raise ValueError(text.detail)
    return text


def _caption_values(texts: list[str | Fault], values: dict[str, Any], bad_json: Fault | None) -> list[Any]:
    """The `.txt` first, unless the list in the metadata has it already at its own place."""
    listed = as_list(values.get("captions")) or as_list(values.get("caption"))
    known = {value.strip() for value in listed if isinstance(value, str)}
    first = [text for text in texts if isinstance(text, Fault) or text.strip() not in known]
    return [*first, *listed] if texts or bad_json is None else [bad_json]


def _fields(members: list[Member], image: Member | None) -> dict[str, Any]:
    """Every other member: its text if it is short text, else its name under `_skipped`."""
    fields: dict[str, Any] = {}
    for member in members:
        if member is image or member.extension in (*CAPTION_EXTENSIONS, "json"):
            continue
        text = None if member.data is None or member.is_image else decoded(member.data)
        if isinstance(text, str):
            fields[printable(member.extension)] = text.replace("\0", "").strip()
        else:
            fields.setdefault("_skipped", []).append(printable(member.extension))
    return fields


def _why_unknown(members: list[Member]) -> Fault:
    names = ", ".join(printable(member.extension) or "(none)" for member in members)
    unknown = Fault("unknown_extension", f"no image, caption or metadata among: {names}")
    return next((m.fault for m in members if m.fault and m.fault.reason == "not_a_file"), unknown)
