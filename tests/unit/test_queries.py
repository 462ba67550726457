from dataclasses import replace
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from pipelines.contracts import VectorSpec
from pipelines.encoders import registry
from pipelines.encoders.base import EncoderSpec
from pipelines.errors import ConfigError, InputError, PreflightError
from pipelines.queries import Query, _combined, _Weights, embed_queries, query_spec
from pipelines.record import RunRecord, encoder_record, read_record, write_record
from pipelines.storage import Store
from tests.checkpoints import save_open_clip


def spec(*modalities: str) -> EncoderSpec:
    return EncoderSpec("hf:tiny", "hf", "tiny", {name: VectorSpec(16) for name in modalities}, None, 8, "0")  # type: ignore[misc]


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
    store, _ = made
    photo = str(tmp_path / "photo.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), np.uint8)).save(photo)
    asked = [Query("a dog"), Query(image=photo), Query("a dog", photo)]
    text, image, both = embed_queries(query_spec(store, "clip"), asked, text_weight=0.25)
    np.testing.assert_allclose([np.linalg.norm(vector) for vector in (text, image, both)], 1, atol=1e-5)
    mixed = 0.25 * text + 0.75 * image
    np.testing.assert_allclose(both, mixed / np.linalg.norm(mixed), atol=1e-5)
    assert abs(text @ image) < 0.99, "the towers tell them apart"


def test_texts_images_examples_and_what_is_not_sought_are_mixed(made: tuple[Store, EncoderSpec]) -> None:
    spec_ = query_spec(made[0], "clip")
    dim = spec_.vectors["image"].dim
    example = np.random.default_rng(1).normal(size=dim).astype(np.float32)
    asked = [
        Query("a dog"),
        Query("a cat"),
        Query(like="k"),
        Query("a dog", like="k"),
        Query("a dog", not_text="a cat"),
        Query("a dog", not_text="a cat", like="k", text_weight=0.2, not_weight=2.0),
    ]
    examples = [None, None, example, example, None, example]
    dog, cat, alike, *mixed = embed_queries(spec_, asked, 0.25, examples=examples, not_weight=0.4)
    np.testing.assert_array_equal(alike, example)
    unit = example / np.linalg.norm(example)
    wanted = [0.25 * dog + 0.75 * unit, dog - 0.4 * cat, 0.2 * dog + 0.8 * unit - 2 * cat]
    np.testing.assert_allclose(mixed, [each / np.linalg.norm(each) for each in wanted], atol=1e-5)
    np.testing.assert_array_equal(embed_queries(None, [asked[2]], examples=[example]), [example])
    with pytest.raises(InputError, match="cancel out"):
        embed_queries(spec_, [Query("a dog", not_text="a dog", not_weight=1.0)])


@pytest.mark.parametrize(
    ("query", "told"),
    [
        (Query(image="absent.png"), "absent.png cannot be read"),
        (Query(image=str(Path(__file__).parent)), "cannot be read"),
        (Query(image="foo://x.png"), "foo://x.png cannot be read"),
        (Query(image=__file__), "unidentified_image"),
        (Query("a caf\udce9"), "is not Unicode"),
    ],
)
def test_a_query_that_cannot_be_read_is_told(made: tuple[Store, EncoderSpec], query: Query, told: str) -> None:
    with pytest.raises(InputError, match=told):
        embed_queries(made[1], [Query("a dog"), query])


def test_an_encoder_that_changed_is_refused(made: tuple[Store, EncoderSpec]) -> None:
    store, spec = made
    record = read_record(store)
    other = encoder_record(replace(spec, weights="f" * 64), spec.modalities, 8)
    write_record(store, record.model_copy(update={"encoders": {**record.encoders, "other": other}}))
    with pytest.raises(PreflightError, match="weights: 'ffff"):
        query_spec(store, "other")


@pytest.mark.parametrize("weights", [(nan, 0.5), (1.5, 0.5), (0.5, nan), (0.5, inf), (0.5, -1.0)])
def test_weights_that_are_none_are_refused(weights: tuple[float, float]) -> None:
    text, away = weights
    example = np.array([1, 0], np.float32)
    with pytest.raises(ConfigError, match="weighs its text"):
        embed_queries(None, [Query(like="a")], text, examples=[example], not_weight=away)
    with pytest.raises(ValidationError):
        TypeAdapter(Query).validate_json(f'{{"text": "a", "text_weight": {_json(text)}, "not_weight": {_json(away)}}}')


def _json(number: float) -> str:
    return {"nan": "NaN", "inf": "Infinity"}.get(str(number), str(number))


@pytest.mark.parametrize("example", [[0, 0], [nan, 1], [1, 0]])
def test_a_mixture_that_comes_to_nothing_is_told(example: list[float]) -> None:
    away = np.array([1, 0], np.float32)
    with pytest.raises(InputError, match="cancel out"):
        _combined(
            Query(like="a"),
            {},
            np.array(example, np.float32),
            0 * away if not any(example) else away,
            _Weights(0.5, 1.0),
        )
