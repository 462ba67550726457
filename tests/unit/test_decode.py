"""Promise P3 at the decode stage: each bad image or caption is a reject with a reason, and nothing else is lost."""

from __future__ import annotations

import hashlib
import pickle
import resource
import struct
import tracemalloc
import zlib
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pytest
from PIL import Image

from pipelines import decode
from pipelines.config import DecodeConfig
from pipelines.contracts import PIXELS, SAMPLE, Reject
from pipelines.decode import Decode, decode_batch, decode_for, open_image
from pipelines.encoders import registry
from pipelines.encoders.base import EncoderSpec, Target
from pipelines.scenes.damage import png_chunk
from tests import checkpoints
from tests.unit.encoders.inputs import encoded, picture, varied, with_orientation

SETTINGS = DecodeConfig()
BOTH = ("image", "text")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> EncoderSpec:
    folder = checkpoints.save_open_clip(tmp_path_factory.mktemp("decode") / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder.parent))
        return registry.describe(f"open_clip:local-dir:{folder}")


def sample(row: int, **fields: Any) -> dict[str, Any]:
    image = fields.get("image")
    empty = dict.fromkeys(SAMPLE.names)
    plain = {"shard": "s", "version": "v", "families": ["f"], "row": row, "end": False, "key": f"k{row}", "rejects": []}
    return {**empty, **plain, "captions": [], "has_image": image is not None, "metadata": "{}", **fields}


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), SAMPLE)


def decoded(spec: EncoderSpec, *rows: dict[str, Any], modalities: tuple[str, ...] = BOTH) -> list[dict[str, Any]]:
    result = decode_batch(table(*rows), spec, SETTINGS, modalities)
    assert result.schema == PIXELS
    return result.to_pylist()


# -- what is right -------------------------------------------------------------------------------


def test_pixels_tokens_and_measures(spec: EncoderSpec) -> None:
    data = with_orientation(picture(100, 60), 6)
    (row,) = decoded(spec, sample(3, image=data, captions=["a dog", None, "two dogs"], label="x"))
    assert row["pixels_shape"] == [64, 64, 3]
    assert len(row["pixels"]) == 64 * 64 * 3
    assert (row["width"], row["height"]) == (60, 100)
    assert row["sha256"] == hashlib.sha256(data).hexdigest()
    assert [tokens and len(tokens) for tokens in row["tokens"]] == [77, None, 77]
    assert row["tokens"][0][:3] == [49406, 320, 1929]
    assert (row["key"], row["label"], row["row"], row["rejects"]) == ("k3", "x", 3, [])


def test_every_kind_of_image_is_decoded(spec: EncoderSpec) -> None:
    rows = decoded(spec, *(sample(n, image=data) for n, data in enumerate(varied().values())))
    assert [row["rejects"] for row in rows] == [[]] * len(rows)
    assert {len(row["pixels"]) for row in rows} == {64 * 64 * 3}


def test_end_marks_pass_untouched(spec: EncoderSpec) -> None:
    mark = {**dict.fromkeys(SAMPLE.names), "shard": "s", "version": "v", "families": ["f"], "row": 7, "end": True}
    (row,) = decoded(spec, mark)
    assert {name: row[name] for name in SAMPLE.names if name != "image"} == {
        **{name: mark[name] for name in SAMPLE.names if name != "image"},
        "rejects": [],
        "encoder": "",
    }
    assert row["pixels"] is None and row["tokens"] is None and row["sha256"] is None


def test_a_batch_of_nothing(spec: EncoderSpec) -> None:
    assert decode_batch(SAMPLE.empty_table(), spec, SETTINGS, BOTH).num_rows == 0


def test_rows_stay_in_order_and_apart(spec: EncoderSpec) -> None:
    good, bad = encoded(picture(70, 70), "PNG"), b"<svg/>"
    rows = decoded(spec, *(sample(n, image=bad if n % 3 else good, captions=[f"{n}"] * (n % 4)) for n in range(12)))
    assert [row["row"] for row in rows] == list(range(12))
    assert [row["pixels"] is None for row in rows] == [bool(n % 3) for n in range(12)]
    assert [len(row["tokens"]) for row in rows] == [n % 4 for n in range(12)]


def test_the_size_is_told_though_no_pixels_are_asked_for(spec: EncoderSpec) -> None:
    (row,) = decoded(spec, sample(0, image=encoded(picture(80, 60), "JPEG")), modalities=("text",))
    assert (row["width"], row["height"], row["pixels"]) == (80, 60, None)


def test_a_modality_not_asked_for(spec: EncoderSpec) -> None:
    refused = [{"modality": m, "caption_index": None, "stage": "read", "reason": "x", "detail": ""} for m in BOTH]
    row = sample(0, image=b"broken", captions=["a dog"], rejects=refused)
    (text,) = decoded(spec, row, modalities=("text",))
    assert text["pixels"] is None and len(text["tokens"]) == 1
    assert [reject["modality"] for reject in text["rejects"]] == ["text"]
    (image,) = decoded(spec, row, modalities=("image",))
    assert image["tokens"] is None
    assert [(reject["modality"], reject["stage"]) for reject in image["rejects"]] == [("image", "read")]


def test_decode_pickles_small_and_yields_a_few_rows_at_a_time(spec: EncoderSpec) -> None:
    settings = SETTINGS.model_copy(update={"rows_per_block": 2})
    block = table(*(sample(row, image=encoded(picture(80, 60), "JPEG"), captions=["a dog"]) for row in range(5)))
    pickled = pickle.dumps(Decode([Target("f", spec, BOTH)], settings))
    assert len(pickled) < 20_000
    blocks = list(pickle.loads(pickled)(block))
    assert [len(part) for part in blocks] == [2, 2, 1]
    whole = decode_batch(block, spec, SETTINGS, BOTH)
    assert pa.concat_tables(blocks).drop("encoder").equals(whole.drop("encoder"))


# -- several encoders ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def squashing(tmp_path_factory: pytest.TempPathFactory) -> EncoderSpec:
    """Another size and another way there than `spec`'s."""
    folder = tmp_path_factory.mktemp("squashing") / "tiny"
    vision = {**checkpoints.open_clip_config()["vision_cfg"], "image_size": 32}
    checkpoints.save_open_clip(folder, preprocess={"resize_mode": "squash"}, vision_cfg=vision)
    return registry.describe(f"open_clip:local-dir:{folder}")


def test_each_encoder_gets_what_it_would_get_alone(spec: EncoderSpec, squashing: EncoderSpec) -> None:
    rows = [
        sample(0, image=encoded(picture(80, 60), "JPEG"), captions=["a dog", "two"], families=["samples", "a", "b"]),
        sample(1, image=b"broken", captions=["a"], families=["samples", "a", "b"]),
        sample(2, image=encoded(picture(30, 90), "PNG"), captions=["a dog"], families=["b"]),
        sample(3, end=True, families=["samples", "a", "b"]),
        sample(4, end=True, families=["b"]),
    ]
    targets = [Target("a", spec, ("image",)), Target("b", squashing, BOTH)]
    first, second = decode_for(table(*rows), targets, SETTINGS)
    assert first["row"].to_pylist() == [0, 1, 3] and second["row"].to_pylist() == [0, 1, 2, 3, 4]
    assert first["families"].to_pylist() == [["samples", "a"]] * 3, "the samples go with the first"
    assert second["families"].to_pylist() == [["b"]] * 5
    for found, target in ((first, targets[0]), (second, targets[1])):
        assert set(found["encoder"].to_pylist()) == {target.folder}
        own = table(*(row for row in rows if target.folder in row["families"]))
        alone = decode_batch(own, target.spec, SETTINGS, target.modalities)
        assert found.drop(["encoder", "families"]).equals(alone.drop(["encoder", "families"]))


def test_an_image_is_decoded_once_for_all(
    spec: EncoderSpec, squashing: EncoderSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    real = decode.open_image
    monkeypatch.setattr(decode, "open_image", lambda data, limit: opened.append(1) or real(data, limit))
    rows = [sample(0, image=encoded(picture(80, 60), "JPEG"), families=["a", "b"])]
    decode_for(table(*rows), [Target("a", spec, BOTH), Target("b", squashing, BOTH)], SETTINGS)
    assert len(opened) == 1


def test_a_pair_is_an_image_with_its_first_caption(spec: EncoderSpec) -> None:
    good = encoded(picture(80, 60), "JPEG")
    mute = {"modality": "text", "caption_index": 0, "stage": "read", "reason": "not_utf8", "detail": "x"}
    rows = [
        sample(0, image=good, captions=["a dog", "two"]),
        sample(1, image=b"broken", captions=["a dog"]),
        sample(2, image=good, captions=[None, "two"], rejects=[mute]),
        sample(3, image=good),
        sample(4, captions=["a dog"]),
    ]
    found = decoded(spec, *rows, modalities=("multimodal",))
    assert [(row["pixels"] is not None, bool(row["tokens"] and row["tokens"][0])) for row in found] == [
        (True, True), (False, True), (True, False), (True, False), (False, True),
    ]  # fmt: skip
    told = [
        [(reject["modality"], reject["reason"], reject["caption_index"]) for reject in row["rejects"]] for row in found
    ]
    assert told == [[], [("multimodal", "unidentified_image", None)], [("multimodal", "not_utf8", None)], [], []]
    both = decoded(spec, *rows, modalities=("image", "multimodal"))
    assert [reject["modality"] for reject in both[1]["rejects"]] == ["image", "multimodal"]


def test_translations_are_tokenised_in_place_of_what_they_translate(spec: EncoderSpec) -> None:
    row = sample(0, captions=["un cane", "x", None], translations=["a dog", None, None])
    (found,) = decoded(spec, row)
    tokens = registry.tokenizer(spec)(["a dog", "x"])
    assert found["tokens"] == [*tokens.tolist(), None] and found["captions"] == row["captions"]


def test_captions_are_cleaned_before_they_are_tokenised(spec: EncoderSpec) -> None:
    (found,) = decoded(replace(spec, text_clean="lavis"), sample(0, captions=['A "Dog"...  runs!']))
    assert found["tokens"] == registry.tokenizer(spec)(["a dog runs"]).tolist()


def test_columns_that_were_widened_or_emptied_on_the_way(spec: EncoderSpec) -> None:
    batch = table(sample(0, captions=["a dog"]))
    batch = batch.set_column(batch.schema.get_field_index("label"), "label", pa.nulls(1))
    batch = batch.set_column(batch.schema.get_field_index("key"), "key", pa.array(["k0"], pa.large_string()))
    assert decode_batch(batch, spec, SETTINGS, BOTH).schema == PIXELS


# -- what is wrong with an image -----------------------------------------------------------------


def png(width: int, height: int, *chunks: tuple[bytes, bytes], colour: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" * 100_000)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, data) for kind, data in parts)


@cache
def bad_images() -> dict[str, tuple[bytes, str]]:
    jpeg, whole = encoded(picture(200, 150), "JPEG"), encoded(picture(200, 150), "PNG")
    text_bomb = zlib.compress(b"\0" * 70_000_000, 1)
    return {
        "zero bytes": (b"", "empty_image"),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><rect/></svg>', "unidentified_image"),
        "html": (b"<!doctype html><html><body>404 Not Found</body></html>", "unidentified_image"),
        "noise": (bytes(range(256)) * 9, "unidentified_image"),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "unidentified_image"),
        "header only": (jpeg[:3], "truncated_image"),
        "cut jpeg": (jpeg[: len(jpeg) // 2], "truncated_image"),
        "cut png": (whole[: len(whole) // 2], "truncated_image"),
        "cut webp": (encoded(picture(200, 150), "WEBP")[:3000], "truncated_image"),
        "cut tiff": (encoded(picture(200, 150), "TIFF")[:3000], "truncated_image"),
        "cut avif": (encoded(picture(200, 150), "AVIF")[:2000], "truncated_image"),
        "bad header": (whole.replace(b"IHDR", b"IHDX"), "decode_failed"),
        "cut gif": (encoded(picture(200, 150).quantize(9), "GIF")[:3000], "truncated_image"),
        "bomb": (png(30_000, 30_000), "too_many_pixels"),
        "wide bomb": (png(2_000_000_000, 1), "too_many_pixels"),
        "text bomb": (png(9, 9, (b"zTXt", b"Comment\0\0" + text_bomb)), "decode_failed"),
    }


@pytest.mark.parametrize("name", bad_images())
def test_a_bad_image_is_a_reject(spec: EncoderSpec, name: str) -> None:
    data, reason = bad_images()[name]
    good = encoded(picture(70, 70), "PNG")
    tracemalloc.start()
    rows = decoded(spec, sample(0, image=data, captions=["still here"]), sample(1, image=good))
    assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    tracemalloc.stop()
    assert [(r["modality"], r["stage"], r["reason"], r["caption_index"]) for r in rows[0]["rejects"]] == [
        ("image", "decode", reason, None)
    ]
    assert " at 0x" not in rows[0]["rejects"][0]["detail"]
    assert rows[0]["pixels"] is None and len(rows[0]["tokens"]) == 1
    assert rows[0]["sha256"] is not None
    assert rows[1]["pixels"] is not None and rows[1]["rejects"] == []


def test_a_decompression_bomb_allocates_nothing() -> None:
    """Pillow's pixels are not Python's memory: the process itself is measured, at its peak."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in (png(30_000, 30_000), png(14_200, 14_200)):
        assert isinstance(open_image(data, 200_000_000), Reject)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


@pytest.mark.parametrize("limit, refused", [(100 * 80, False), (100 * 80 - 1, True), (100 * 80 - 2, True)])
def test_the_limit_of_pixels_is_exact_and_leaves_pillow_as_it_was(limit: int, refused: bool) -> None:
    before = Image.MAX_IMAGE_PIXELS
    result = open_image(encoded(picture(100, 80), "PNG"), limit)
    assert isinstance(result, Reject) == refused
    if isinstance(result, Reject):
        assert result.reason == "too_many_pixels"
    assert before == Image.MAX_IMAGE_PIXELS


def test_pillows_own_limit_is_ours(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert not isinstance(open_image(encoded(picture(100, 80), "PNG"), 8_000), Reject)
    assert not recwarn.list


def test_a_bomb_inside_an_icon() -> None:
    """Its own directory says 16 x 16; the limit is below Pillow's own, which would let it pass."""
    inner = png(8_000, 8_000)
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    result = open_image(struct.pack("<HHH", 0, 1, 1) + entry + inner, 10_000_000)
    assert isinstance(result, Reject)
    assert result.reason == "too_many_pixels"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_no_cut_raises(spec: EncoderSpec, kind: str) -> None:
    data = encoded(picture(60, 40), kind)
    for end in range(0, len(data), max(1, len(data) // 60)):
        (row,) = decoded(spec, sample(0, image=data[:end]))
        assert (row["pixels"] is None) == bool(row["rejects"])


def test_flipped_bytes_never_raise(spec: EncoderSpec) -> None:
    rng = np.random.default_rng(0)
    for data in varied().values():
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), 12):
            damaged[at] = int(rng.integers(0, 256))
        (row,) = decoded(spec, sample(0, image=bytes(damaged)))
        assert (row["pixels"] is None) == bool(row["rejects"])


def test_an_image_already_rejected_is_not_rejected_twice(spec: EncoderSpec) -> None:
    reject = {"modality": "image", "caption_index": None, "stage": "read", "reason": "too_large", "detail": ""}
    (row,) = decoded(spec, {**sample(0, rejects=[reject]), "has_image": True})
    assert row["rejects"] == [reject]


def test_an_image_that_is_not_there_and_not_rejected_is_rejected(spec: EncoderSpec) -> None:
    (row,) = decoded(spec, {**sample(0), "has_image": True})
    assert [reject["reason"] for reject in row["rejects"]] == ["empty_image"]


# -- what is wrong with a caption ----------------------------------------------------------------


def test_a_caption_that_fails_is_a_reject_with_its_index(spec: EncoderSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    real = registry.tokenizer(spec)

    def picky(captions: list[str]) -> np.ndarray:
        if any("poison" in caption for caption in captions):
            raise ValueError("poison")
        return real(captions)

    monkeypatch.setattr(decode, "_tokenizer", lambda _: picky)
    rows = decoded(spec, sample(0, captions=["a dog", "poison", None]), sample(1, captions=["a cat"]))
    assert [tokens is None for tokens in rows[0]["tokens"]] == [False, True, True]
    (reject,) = rows[0]["rejects"]
    assert (reject["modality"], reject["reason"], reject["caption_index"]) == ("text", "tokenizer_failed", 1)
    assert rows[1]["tokens"] == [real(["a cat"])[0].tolist()]


def test_strange_captions(spec: EncoderSpec) -> None:
    captions = ["", " ", "\0", "a" * 300_000, "x " * 200_000, "&lt;" * 9_000, "🐕" * 5_000, "\u202e\ufeff"]
    (row,) = decoded(spec, sample(0, captions=captions))
    assert [len(tokens) for tokens in row["tokens"]] == [77] * len(captions)
    assert row["rejects"] == []


def test_a_long_caption_has_the_tokens_of_the_whole(spec: EncoderSpec) -> None:
    long = "the small dog runs, " * 1_500
    (row,) = decoded(spec, sample(0, captions=[long]))
    assert row["tokens"][0] == open_clip.get_tokenizer("ViT-B-32")([long])[0].tolist()


def test_alpha_of_the_spec_is_what_happens(spec: EncoderSpec) -> None:
    clear = encoded(Image.new("RGBA", (64, 64), (0, 0, 0, 0)), "PNG")
    assert spec.image is not None
    white = replace(spec, image=replace(spec.image, alpha="white"))
    assert set(decoded(white, sample(0, image=clear))[0]["pixels"]) == {255}
    assert set(decoded(spec, sample(0, image=clear))[0]["pixels"]) == {0}
