"""Input made for the tests of sources: tars with anything in them, objects in memory, and the check of a sample."""

import io
import tarfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.config import ReadConfig
from pipelines.contracts import Sample, Shard
from pipelines.sources import plan_shards, samples
from pipelines.storage import Store

STORE = Store()


def jpeg(seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (seed % 256, 40, 90)).save(file, "JPEG")
    return file.getvalue()


def tar_of(members: Iterable[tuple[str, bytes]], format_: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format_) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def gnu_sparse(name: str, size: int, blocks_of_map: int) -> bytes:
    """The header of a sparse member in GNU's old format, which tarfile cannot write, and the rest of its map."""
    info = tarfile.TarInfo(name)
    info.type, info.size = tarfile.GNUTYPE_SPARSE, size
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    head[482] = bool(blocks_of_map)
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + 8 * 32 + sum(head[156:512]))
    return bytes(head) + b"".join(bytes(504) + bytes([k + 1 < blocks_of_map]) + bytes(7) for k in range(blocks_of_map))


def put(name: str, data: bytes, folder: str = "") -> str:
    """The URI of an object in memory, in a folder of its own."""
    uri = f"memory:///{folder or uuid.uuid4().hex}/{name}"
    STORE.put_atomic(uri, data)
    return uri


def plan(*inputs: str | Path, format_: str = "auto", **settings: Any) -> list[Shard]:
    return plan_shards([str(given) for given in inputs], format_, ReadConfig(**settings), STORE, {})[0]


def read(*inputs: str | Path, format_: str = "auto", **settings: Any) -> list[Sample]:
    """Every sample of the inputs, in the order of the shards, each checked."""
    shards = plan(*inputs, format_=format_, **settings)
    found = [sample for shard in shards for sample in samples(shard, ReadConfig(**settings), STORE)]
    for sample in found:
        check(sample)
    return found


def read_tar(data: bytes, name: str = "a.tar", **settings: Any) -> list[Sample]:
    return read(put(name, data), **settings)


def check(sample: Sample) -> None:
    """What holds for every sample, whatever it was made of."""
    image_rejects = [reject for reject in sample.rejects if reject.modality == "image"]
    assert len(image_rejects) == (1 if sample.has_image and sample.image is None else 0)
    assert sample.image is None or sample.has_image
    text_rejects = [reject.caption_index for reject in sample.rejects if reject.modality == "text"]
    assert sorted(text_rejects, key=str) == sorted((i for i, c in enumerate(sample.captions) if c is None), key=str)
    assert len(sample.rejects) == len(image_rejects) + len(text_rejects)
    for text in [sample.key, sample.label or "", *filter(None, sample.captions), *(r.detail for r in sample.rejects)]:
        text.encode()


def reasons(sample: Sample) -> list[str]:
    return [reject.reason for reject in sample.rejects]
