"""The encode actor on a real, tiny open_clip model: its vectors are those of the encoder used item by item."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.config import EncodeConfig
from pipelines.contracts import PIXELS, REJECT_ITEM, VectorSpec, encoded_schema
from pipelines.encode import Encode
from pipelines.encoders import registry
from pipelines.encoders.base import Encoder, EncoderSpec, Target, Tokenizer
from pipelines.encoders.device import OnCpu
from pipelines.encoders.items import stored
from pipelines.errors import EncoderError
from tests.checkpoints import SIDE, save_open_clip

DIM = 24
BOTH: Any = ("image", "text")
SETTINGS = EncodeConfig(threads=1)
VECTORS = ["image_vector", "text_vectors", "multimodal_vector"]
FLOAT16_MAX, FLOAT32_MAX = 65504.0, float(np.finfo(np.float32).max)
WORDS = ("a", "red", "dog", "runs", "over", "the", "green", "field", "towards", "two", "small", "boats")


def checkpoint(folder: Path, image: float = 1.0, text: float = 1.0) -> EncoderSpec:
    """An open_clip folder of random weights. image, text: what its vectors are multiplied by."""
    file = save_open_clip(folder) / "open_clip_model.safetensors"
    weights = load_file(file)
    weights["visual.proj"] *= image
    weights["text_projection"] *= text
    save_file(weights, file)
    return replace(registry.describe(f"open_clip:local-dir:{folder}"), dtype="float32")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> EncoderSpec:
    return checkpoint(tmp_path_factory.mktemp("open_clip") / "tiny")


@pytest.fixture(scope="module")
def encoder(spec: EncoderSpec) -> Encoder:
    return registry.load(spec, torch.device("cpu"))


def encode(spec: EncoderSpec, batch_size: int = 4, observe: Any = None, modalities: Any = ("image", "text")) -> Encode:
    return Encode([Target("enc", spec, tuple(modalities), batch_size)], SETTINGS, "cpu", observe)


def images(count: int) -> list[np.ndarray]:
    """Smooth gradients between two colours, each row's its own."""
    random = np.random.default_rng(1)
    slopes = np.linspace(0, 1, SIDE)[None, :, None] * np.linspace(0.5, 1, SIDE)[:, None, None]
    ends = random.integers(0, 256, (count, 2, 1, 1, 3))
    return [(first + (second - first) * slopes).astype(np.uint8) for first, second in ends]


def captions(row: int) -> list[str]:
    """None to five, of one to many words."""
    return [f"{row} {index} {' '.join(WORDS[: (row * 3 + index * 5) % 12])}" for index in range(row % 6)]


def has_image(row: int) -> bool:
    return row % 5 != 3


def mute(row: int, caption: int) -> bool:
    return (row + caption) % 7 == 4


def table(spec: EncoderSpec, rows: int = 20, shards: int = 3, chunks: int = 1) -> pa.Table:
    """Rows of several shards mixed, rejects among them, each shard with its end mark."""
    tokenizer, pictures = tokenizer_of(spec), images(rows)
    records = [record(row, f"shard-{row % shards}", pictures[row], tokenizer) for row in range(rows)]
    for shard in range(shards):
        place = {
            "shard": f"shard-{shard}",
            "version": "v",
            "families": ["enc"],
            "encoder": "enc",
            "row": rows,
            "end": True,
        }
        records.insert(shard * 5, {**dict.fromkeys(PIXELS.names), **place, "rejects": []})
    cuts = np.array_split(np.arange(len(records)), chunks)
    return pa.concat_tables([pa.Table.from_pylist([records[at] for at in cut], schema=PIXELS) for cut in cuts])


def record(row: int, shard: str, picture: np.ndarray, tokenizer: Any) -> dict[str, Any]:
    texts = captions(row)
    tokens = [None if mute(row, at) else ids.tolist() for at, ids in enumerate(tokenizer(texts) if texts else [])]
    gone = [reject("text", at) for at, ids in enumerate(tokens) if ids is None]
    return {
        **dict.fromkeys(PIXELS.names),
        **{
            "shard": shard,
            "version": "v",
            "families": ["enc"],
            "encoder": "enc",
            "row": row,
            "end": False,
            "key": f"k{row}",
        },
        **{"captions": texts, "has_image": True, "metadata": "{}", "width": 640, "tokens": tokens},
        "rejects": gone if has_image(row) else [reject("image", None), *gone],
        "pixels": picture.tobytes() if has_image(row) else None,
        "pixels_shape": picture.shape if has_image(row) else None,
    }


def reject(modality: str, caption: int | None, stage: str = "decode") -> dict[str, Any]:
    return {"modality": modality, "caption_index": caption, "stage": stage, "reason": "broken", "detail": ""}


@cache
def tokenizer_of(spec: EncoderSpec) -> Tokenizer:
    return registry.tokenizer(spec)


@cache
def naive(spec: EncoderSpec, encoder: Encoder, row: int) -> tuple[np.ndarray | None, dict[int, np.ndarray]]:
    """A row's vectors, each item by itself."""
    tokens = tokenizer_of(spec)(captions(row)) if captions(row) else []
    picture = encoder.images(encoder.collate([images(20)[row]])) if has_image(row) else None
    texts = {at: unit(encoder.texts(torch.from_numpy(ids[None]))) for at, ids in enumerate(tokens) if not mute(row, at)}
    return (None if picture is None else unit(picture)), texts


def unit(vectors: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(vectors, dim=1)[0].numpy()


def assert_as_naive(result: pa.Table, spec: EncoderSpec, encoder: Encoder, atol: float = 1e-5) -> None:
    for row in result.to_pylist():
        if row["end"]:
            assert row["image_vector"] is None
            assert row["text_vectors"] == []
            continue
        image, texts = naive(spec, encoder, row["row"])
        assert (row["image_vector"] is None) == (image is None)
        if image is not None:
            np.testing.assert_allclose(np.array(row["image_vector"], np.float32), image, atol=atol)
        assert [pair["caption_index"] for pair in row["text_vectors"]] == list(texts)
        for pair in row["text_vectors"]:
            vector = np.array(pair["vector"], np.float32)
            np.testing.assert_allclose(vector, texts[pair["caption_index"]], atol=atol)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8, 64])
def test_vectors_are_those_of_single_items_at_every_batch_size(
    spec: EncoderSpec, encoder: Encoder, batch_size: int
) -> None:
    before = table(spec)
    result = encode(spec, batch_size)(before)
    assert result.schema.equals(encoded_schema("float32"))
    result.validate(full=True)
    passed_on = [name for name in result.column_names if name in PIXELS.names]
    assert result.select(passed_on).equals(before.select(passed_on))
    assert_as_naive(result, spec, encoder)


def test_items_differ_so_that_a_swap_would_be_seen(spec: EncoderSpec, encoder: Encoder) -> None:
    rows = [naive(spec, encoder, row) for row in range(20)]
    pictures = np.array([image for image, _ in rows if image is not None])
    texts = np.array([text for _, texts in rows for text in texts.values()])
    for vectors in (pictures, texts):
        distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
        assert np.sort(distances, axis=1)[:, 1].min() > 1e-3


@pytest.mark.parametrize("chunks", [2, 7])
def test_a_table_of_several_chunks_and_a_slice_of_one_are_read_right(
    spec: EncoderSpec, encoder: Encoder, chunks: int
) -> None:
    actor = encode(spec)
    assert_as_naive(actor(table(spec, chunks=chunks)), spec, encoder)
    assert_as_naive(actor(table(spec, chunks=chunks).slice(5, 11)), spec, encoder)


def test_half_precision_in_storage_is_the_rounded_vector(spec: EncoderSpec, encoder: Encoder) -> None:
    result = encode(replace(spec, dtype="float16"))(table(spec))
    assert result.schema.equals(encoded_schema("float16"))
    assert_as_naive(result, spec, encoder, atol=5e-4)


@pytest.mark.parametrize(("modality", "other"), [("image", "text"), ("text", "image")])
def test_only_the_modalities_asked_for_are_encoded(spec: EncoderSpec, modality: str, other: str) -> None:
    observed: dict[str, Any] = {}
    both = encode(spec)(table(spec))
    one = encode(spec, observe=observed.update, modalities=[modality])(table(spec))
    column = {"image": "image_vector", "text": "text_vectors"}
    assert one[column[modality]].equals(both[column[modality]])
    assert not any(one[column[other]].to_pylist())
    assert one["rejects"].equals(both["rejects"])


@pytest.mark.parametrize("rows", [0, 3])
def test_tables_of_end_marks_alone_or_of_nothing(spec: EncoderSpec, rows: int) -> None:
    marks = table(spec).filter(pa.compute.field("end")).slice(0, rows)
    result = encode(spec)(marks)
    assert result.schema.equals(encoded_schema("float32"))
    assert result.num_rows == rows
    assert result["image_vector"].null_count == rows
    assert result["text_vectors"].to_pylist() == [[]] * rows


def test_what_was_done_is_observed(spec: EncoderSpec) -> None:
    observed: list[dict[str, Any]] = []
    result = encode(spec, observe=lambda **numbers: observed.append(numbers))(table(spec))
    vectors = sum(map(len, result["text_vectors"].to_pylist())) + 20 - sum(not has_image(row) for row in range(20))
    [numbers] = observed
    assert numbers.pop("seconds") > 0 and numbers.pop("peak_mib") > 0
    assert numbers == {"stage": "encode", "rows": 20, "items": vectors, "out_of_memory": 0, "recomputed": 0}


def test_two_calls_at_once_give_what_they_give_one_by_one(spec: EncoderSpec) -> None:
    actor, inputs = encode(spec, batch_size=3), [table(spec), table(spec, rows=13, shards=1)]
    expected = [actor(each) for each in inputs]
    results: dict[int, pa.Table] = {}
    threads = [threading.Thread(target=lambda at=at: results.update({at: actor(inputs[at])})) for at in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[at].equals(expected[at]) for at in (0, 1)] == [True, True]


# -- vectors that are not finite -----------------------------------------------------------------


def one_over(raw: np.ndarray, limit: float) -> tuple[list[int], float]:
    """Which items to keep, and the factor with which only the first of them passes the limit."""
    largest = np.abs(raw).max(axis=1)
    order = np.argsort(-largest)
    kept = [order[0], *(at for at in order if largest[at] < 0.9 * largest[order[0]])]
    return [int(at) for at in kept], float(1.04 * limit / largest[order[0]])


def raw_images(spec: EncoderSpec, count: int) -> np.ndarray:
    encoder = registry.load(replace(spec, precision="fp32"), torch.device("cpu"))
    return encoder.images(encoder.collate(images(count))).numpy()


def pictures_table(pictures: list[np.ndarray]) -> pa.Table:
    records = [record(row * 6, "shard", picture, None) for row, picture in enumerate(pictures)]
    for row, picture in zip(records, pictures, strict=True):
        row.update(pixels=picture.tobytes(), pixels_shape=picture.shape, rejects=[])
    return pa.Table.from_pylist(records, schema=PIXELS)


def too_large_for(spec: EncoderSpec, folder: Path, limit: float) -> tuple[EncoderSpec, pa.Table]:
    """A checkpoint, and images of which the first alone gives a value above the limit."""
    kept, factor = one_over(raw_images(spec, 40), limit)
    large = checkpoint(folder, image=factor)
    # Near the limit of float32 a sum can pass it on the way to a smaller one.
    finite = np.isfinite(raw_images(large, 40)).all(axis=1)
    kept = kept[:1] + [at for at in kept[1:] if finite[at]]
    assert len(kept) > 3
    return large, pictures_table([images(40)[at] for at in kept])


def test_a_row_that_overflows_in_half_precision_is_computed_again(spec: EncoderSpec, tmp_path: Path) -> None:
    large, pixels = too_large_for(spec, tmp_path / "large", FLOAT16_MAX)
    half, observed = replace(large, precision="fp16"), {}
    encoder = registry.load(half, torch.device("cpu"))
    inputs = [np.frombuffer(row, np.uint8).reshape(SIDE, SIDE, 3) for row in pixels["pixels"].to_pylist()]
    finite = encoder.images(encoder.collate(inputs)).isfinite().all(dim=1)
    assert finite.tolist() == [False] + [True] * (len(finite) - 1)

    result = encode(half, observe=observed.update)(pixels)
    exact = encode(large)(pixels)
    assert observed["recomputed"] == 1
    assert not any(result["rejects"].to_pylist())
    got, wanted = (np.array(each["image_vector"].to_pylist()) for each in (result, exact))
    np.testing.assert_allclose(got[0], wanted[0], atol=1e-5)
    np.testing.assert_allclose(got[1:], wanted[1:], atol=2e-2)
    assert np.abs(got[1:] - wanted[1:]).max() > 1e-5


@pytest.mark.parametrize(
    ("limit", "changes"),
    [(FLOAT32_MAX, {}), (FLOAT16_MAX, {"normalize": False, "dtype": "float16"})],
    ids=["the model overflows", "the storage overflows"],
)
def test_a_vector_without_a_finite_form_is_rejected(
    spec: EncoderSpec, tmp_path: Path, limit: float, changes: dict[str, Any]
) -> None:
    large, pixels = too_large_for(spec, tmp_path / "large", limit)
    result = encode(replace(large, **changes))(pixels)
    rejects = result["rejects"].to_pylist()
    assert [len(row) for row in rejects] == [1] + [0] * (len(rejects) - 1)
    told = rejects[0][0].pop("detail")
    assert "row 0 of shard shard" in told
    assert rejects[0][0] == {"modality": "image", "caption_index": None, "stage": "encode", "reason": "not_finite"}
    assert [vector is None for vector in result["image_vector"].to_pylist()] == [True] + [False] * (len(rejects) - 1)
    assert np.isfinite(np.array(result["image_vector"].to_pylist()[1:])).all()


def test_a_rejected_caption_keeps_the_others_in_place(spec: EncoderSpec, encoder: Encoder, tmp_path: Path) -> None:
    before = table(spec)
    tokens = [ids for row in before["tokens"].to_pylist() for ids in row or [] if ids]
    largest = np.abs(encoder.texts(torch.tensor(tokens, dtype=torch.int32)).numpy()).max()
    large = checkpoint(tmp_path / "large", text=float(1.0001 * FLOAT32_MAX / largest))
    result, reference = encode(large)(before), encode(spec)(before)
    lost = [
        (row, reject["caption_index"])
        for row, rejects in enumerate(result["rejects"].to_pylist())
        for reject in rejects
        if reject["stage"] == "encode"
    ]
    assert 0 < len(lost) < 5
    pairs = zip(result["text_vectors"].to_pylist(), reference["text_vectors"].to_pylist(), strict=True)
    for row, (got, wanted) in enumerate(pairs):
        kept = [pair for pair in wanted if (row, pair["caption_index"]) not in lost]
        assert [pair["caption_index"] for pair in got] == [pair["caption_index"] for pair in kept]
        for one, other in zip(got, kept, strict=True):
            np.testing.assert_allclose(one["vector"], other["vector"], atol=1e-4)
    decode_rejects = [[each for each in row if each["stage"] == "decode"] for row in result["rejects"].to_pylist()]
    assert decode_rejects == before["rejects"].to_pylist()
    assert result["rejects"].type == pa.list_(REJECT_ITEM)


def test_large_finite_values_are_normalised_and_zeros_are_not_finite(spec: EncoderSpec) -> None:
    raw = np.array([[3e38, 3e38], [1e-30, 0], [0, 0], [3, 4]], np.float32)
    got = stored(raw, spec, VectorSpec(2))
    np.testing.assert_allclose(got[[0, 1, 3]], [[2**-0.5, 2**-0.5], [1, 0], [0.6, 0.8]], rtol=1e-6)
    assert not np.isfinite(got[2]).any()
    assert stored(raw, replace(spec, normalize=False), VectorSpec(2)).tolist() == raw.tolist()


# -- several encoders ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> EncoderSpec:
    folder = save_open_clip(tmp_path_factory.mktemp("wider") / "tiny", embed_dim=32)
    return replace(registry.describe(f"open_clip:local-dir:{folder}"), dtype="float32")


def named(table: pa.Table, folder: str) -> pa.Table:
    at = table.schema.get_field_index("encoder")
    return table.set_column(at, "encoder", pa.array([folder] * table.num_rows, pa.string()))


def test_one_actor_serves_rows_of_several_encoders(spec: EncoderSpec, wider: EncoderSpec) -> None:
    targets = [Target("a", spec, BOTH), Target("b", wider, BOTH)]
    mixed = pa.concat_tables([named(table(spec, 8), "a"), named(table(wider, 8), "b"), named(table(spec, 4), "a")])
    found = Encode(targets, SETTINGS, "cpu")(mixed)
    assert found.schema.equals(encoded_schema("float32"))
    for folder, one, rows in (("a", spec, [8, 4]), ("b", wider, [8])):
        own = found.filter(pc.equal(found["encoder"], folder))
        alone = pa.concat_tables(
            [Encode([Target(folder, one, BOTH)], SETTINGS, "cpu")(named(table(one, n), folder)) for n in rows]
        )
        assert own.drop(VECTORS).equals(alone.drop(VECTORS))
        np.testing.assert_allclose(
            own["image_vector"].combine_chunks().flatten(), alone["image_vector"].combine_chunks().flatten(), atol=1e-5
        )


def test_rows_of_encoders_in_other_actors_pass_through(spec: EncoderSpec, wider: EncoderSpec) -> None:
    mixed = pa.concat_tables([named(table(spec, 6), "a"), named(table(wider, 6), "b")])
    first = Encode([Target("a", spec, BOTH)], SETTINGS, "cpu", others=True)
    second = Encode([Target("b", wider, BOTH)], SETTINGS, "cpu", others=True)
    between = first(mixed)
    waiting = between.filter(pc.equal(between["encoder"], "b"))
    assert waiting.select(PIXELS.names).equals(named(table(wider, 6), "b"))
    together = Encode([Target("a", spec, BOTH), Target("b", wider, BOTH)], SETTINGS, "cpu")(mixed)
    found = second(between).select(together.column_names).sort_by([("encoder", "ascending"), ("row", "ascending")])
    assert found.equals(together.sort_by([("encoder", "ascending"), ("row", "ascending")]))


# -- a model that is not what its spec says ------------------------------------------------------


def test_a_model_that_gives_nothing_finite_is_refused(tmp_path: Path) -> None:
    broken = checkpoint(tmp_path / "broken", image=float("nan"))
    actor = encode(broken)
    with pytest.raises(EncoderError, match="image vectors is finite"):
        actor(pictures_table(images(3)))


def test_vectors_of_another_length_are_refused(spec: EncoderSpec) -> None:
    with pytest.raises(EncoderError, match=r"shape \(1, 24\), not \(1, 25\)"):
        encode(replace(spec, vectors={**spec.vectors, "image": VectorSpec(DIM + 1)}))


# -- out of memory -------------------------------------------------------------------------------


def test_out_of_memory_is_survived_and_counted(
    spec: EncoderSpec, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is real; the allocator's refusal of a batch above three is not."""
    forward = OnCpu.forward

    def cramped(self: OnCpu, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(next(iter(tensors.values()))) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, tensors)

    monkeypatch.setattr(OnCpu, "forward", cramped)
    observed: dict[str, Any] = {}
    result = encode(spec, batch_size=8, observe=observed.update)(table(spec))
    assert_as_naive(result, spec, encoder)
    assert observed["out_of_memory"] >= 4


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (KeyError("out of memory"), False),
    ],
)
def test_what_is_taken_for_running_out_of_memory(encoder: Encoder, error: Exception, is_memory: bool) -> None:
    assert OnCpu(encoder, "image", threading.Lock()).is_out_of_memory(error) is is_memory
