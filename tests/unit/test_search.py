from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.encoders import registry
from pipelines.encoders.base import EncoderSpec
from pipelines.errors import ConfigError, IndexBuildError, InputError, PreflightError
from pipelines.record import RunRecord, encoder_record, read_record, write_record
from pipelines.search import Query, Searcher, choose_encoder, embed_queries, query_spec
from pipelines.storage import Store
from tests.checkpoints import save_open_clip
from tests.indexed import ENCODER, caption_of, everything, write_output


def spec(*modalities: str) -> EncoderSpec:
    return EncoderSpec("hf:tiny", "hf", "tiny", 16, modalities, None, 8, "0")  # type: ignore[arg-type]


@pytest.mark.parametrize("modality", ["image", "text"])
def test_exact_search_needs_no_index(tmp_path: Path, modality: str) -> None:
    store = write_output(tmp_path, parts=3, dtype="float32")
    items, vectors = everything(tmp_path, modality)
    hits = Searcher(store, modality=modality, exact=True).search(vectors[[4, 300]], 5)  # type: ignore[arg-type]
    for at, row in zip((4, 300), hits, strict=True):
        order = np.argsort(-(vectors @ vectors[at]))[:5]
        assert [hit.id for hit in row] == order.tolist()
        assert [(hit.shard, hit.row, hit.caption_index, hit.key) for hit in row] == [
            (items[id].shard, items[id].row, items[id].caption_index, items[id].key) for id in order
        ]
        assert [hit.score for hit in row] == sorted((hit.score for hit in row), reverse=True)
        assert row[0].id == at and row[0].score == pytest.approx(1, abs=1e-5)
        part = int(row[0].shard.split("-")[1])
        assert row[0].captions == [caption_of(part, row[0].row, index) for index in range(len(row[0].captions))]


def test_l2_puts_the_smallest_first(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=2)
    _, vectors = everything(tmp_path, "image")
    (row,) = Searcher(store, exact=True, metric="l2").search(vectors[[9]], 3)
    assert row[0].id == 9 and row[0].score == pytest.approx(0, abs=1e-5) and row[1].score <= row[2].score


def test_fewer_than_k(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=1, rows=4)
    (row,) = Searcher(store, exact=True).search(np.ones((1, 16), np.float32), 10)
    assert [hit.id for hit in row] and len(row) == 4


def test_queries_of_another_dimension(tmp_path: Path) -> None:
    searcher = Searcher(write_output(tmp_path, parts=1), exact=True)
    for shape in ((1, 8), (16,)):
        with pytest.raises(ConfigError, match="16 dimensions"):
            searcher.search(np.ones(shape, np.float32))


def test_the_encoder_is_named_or_the_only_one(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=1)
    assert choose_encoder(store, None) == ENCODER
    with pytest.raises(ConfigError, match=r"no encoder 'nope'\n  It has: " + ENCODER):
        choose_encoder(store, "nope")
    write_output(tmp_path, parts=1, encoder="other")
    with pytest.raises(ConfigError, match=rf"2 encoders: name one with --encoder\n  It has: other, {ENCODER}"):
        choose_encoder(store, None)
    with pytest.raises(InputError, match="vecmill embed"):
        choose_encoder(Store(str(tmp_path / "empty")), None)


def test_without_an_index_only_exact_search_works(tmp_path: Path) -> None:
    with pytest.raises(IndexBuildError, match="--exact"):
        Searcher(write_output(tmp_path, parts=1))


def test_queries_that_no_tower_can_take() -> None:
    with pytest.raises(ConfigError, match="embeds image, not text"):
        embed_queries(spec("image"), [Query(text="a dog")])
    for queries in ([], [Query()], [Query(text="a"), Query()]):
        with pytest.raises(ConfigError, match="neither text nor image"):
            embed_queries(spec("image", "text"), queries)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, EncoderSpec]:
    """An output's record of a real checkpoint, with its spec."""
    root = tmp_path_factory.mktemp("made")
    save_open_clip(root / "clip")
    spec = replace(registry.describe(f"open_clip:local-dir:{root / 'clip'}"), dtype="float32")
    store = Store(str(root / "out"))
    write_record(store, RunRecord(encoders={"clip": encoder_record(spec, spec.modalities, 8)}))
    return store, spec


def test_queries_are_embedded_by_the_runs_own_encoder(made: tuple[Store, EncoderSpec], tmp_path: Path) -> None:
    store, spec = made
    photo = str(tmp_path / "photo.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), np.uint8)).save(photo)
    asked = [Query("a dog"), Query(image=photo), Query("a dog", photo)]
    text, image, both = embed_queries(query_spec(store, "clip"), asked, text_weight=0.25)
    np.testing.assert_allclose([np.linalg.norm(vector) for vector in (text, image, both)], 1, atol=1e-5)
    mixed = 0.25 * text + 0.75 * image
    np.testing.assert_allclose(both, mixed / np.linalg.norm(mixed), atol=1e-5)
    assert abs(text @ image) < 0.99, "the towers tell them apart"
    for file, said in (("absent.png", "cannot be read"), (__file__, "unidentified_image")):
        with pytest.raises(InputError, match=said):
            embed_queries(spec, [Query(image=file)])


def test_an_encoder_that_changed_is_refused(made: tuple[Store, EncoderSpec]) -> None:
    store, spec = made
    record = read_record(store)
    other = encoder_record(replace(spec, weights="f" * 64), spec.modalities, 8)
    write_record(store, record.model_copy(update={"encoders": {**record.encoders, "other": other}}))
    with pytest.raises(PreflightError, match="weights: 'ffff"):
        query_spec(store, "other")
