"""BLIP-2: its vectors are the reference's own, in every pooling, and what is not BLIP-2 is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.contracts import VectorSpec
from pipelines.encoders import blip2_original, registry, weights
from pipelines.encoders.batch import padded
from pipelines.encoders.torch_encoder import masked
from pipelines.errors import ConfigError, EncoderError
from tests import checkpoints_blip
from tests.checkpoints import SIDE
from tests.unit.encoders.blip_reference import HfBlip2, HfBlip2Opt, LavisReference, assert_near, stacked
from tests.unit.encoders.inputs import CAPTIONS, ENTITIES, varied
from tests.unit.encoders.reference import error, our_images, our_pairs, our_pixels, our_texts

CPU = torch.device("cpu")
IMAGES, TEXTS = list(varied().values()), CAPTIONS + ENTITIES
PAIRS = [(image, TEXTS[at % len(TEXTS)]) for at, image in enumerate(IMAGES)]
KINDS = ["folder", "g", "L", "L-apart", "g-apart"]
# Options, and the reference's names for what they give of an image, a caption, and the two together.
POOLS = [
    ("", ("mean_norm", "projected", "mean_raw")),
    ("pool=mean_raw", ("mean_raw", "projected", "mean_raw")),
    ("pool=first", ("first", "projected", "mean_raw")),
    ("pool=tokens", ("tokens", "projected", "mean_raw")),
    ("space=hidden", ("hidden mean_raw", "hidden", "mean_raw")),
    ("space=hidden&pool=first", ("hidden first", "hidden", "first")),
]

Name = Callable[..., str]


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Name:
    """The name of a checkpoint by its kind, with options."""
    root = tmp_path_factory.mktemp("blip2")
    vocabulary = checkpoints_blip.save_vocabulary(root / "vocabulary")

    @cache
    def saved(kind: str) -> str:
        vit, _, apart = kind.partition("-")
        if kind == "folder":
            return f"blip2:{checkpoints_blip.save_blip2(root / kind)}"
        if kind == "opt":
            return f"blip2:{checkpoints_blip.save_blip2_opt(root / kind)}"
        vision = f"&vision={root / kind / 'vision.pth'}" if apart else ""
        return f"blip2:{checkpoints_blip.save_lavis(root / kind, vit, bool(apart))}?vocab={vocabulary}{vision}"

    def name(kind: str, options: str = "") -> str:
        text = saved(kind)
        return f"{text}{'&' if '?' in text else '?'}{options}" if options else text

    return name


@pytest.fixture(scope="module")
def theirs(named: Name) -> Callable[[str], dict[str, list[dict[str, torch.Tensor]]]]:
    @cache
    def rows(kind: str) -> dict[str, list[dict[str, torch.Tensor]]]:
        reference = _reference(named(kind), kind)
        return {
            "image": [reference.image(image) for image in IMAGES],
            "text": [reference.text(caption) for caption in TEXTS],
            "pair": [reference.pair(image, caption) for image, caption in PAIRS],
        }

    return rows


def _reference(name: str, kind: str) -> HfBlip2:
    if kind == "folder":
        return HfBlip2(name.removeprefix("blip2:"))
    return LavisReference(checkpoints_blip.lavis(kind[0]), name.partition("vocab=")[2].partition("&")[0])


def ours(name: str, precision: str = "fp32") -> dict[str, np.ndarray]:
    """The 4 vectors of an image, of pool=tokens, one behind the other."""
    spec = replace(registry.describe(name), precision=precision)
    encoder, tokenize = registry.load(spec, CPU), registry.tokenizer(spec)
    images = our_images(encoder, IMAGES)
    joint = spec.vectors["image"]
    assert images.shape[1:] == ((joint.count, joint.dim) if joint.count > 1 else (joint.dim,))
    pairs = our_pairs(encoder, IMAGES, list(tokenize([caption for _, caption in PAIRS])))
    return {
        "image": images.reshape(len(images), -1),
        "text": our_texts(encoder, list(tokenize(TEXTS))),
        "pair": pairs,
    }


# -- vectors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, keys", POOLS)
def test_vectors_are_the_references(named: Name, theirs: Any, options: str, keys: tuple[str, ...]) -> None:
    _assert_near(named, theirs, "folder", options, keys)


@pytest.mark.parametrize("options, keys", [POOLS[0], POOLS[4]])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_lavis_files(named: Name, theirs: Any, kind: str, options: str, keys: tuple[str, ...]) -> None:
    _assert_near(named, theirs, kind, options, keys)


def _assert_near(named: Name, theirs: Any, kind: str, options: str, keys: tuple[str, ...]) -> None:
    vectors = ours(named(kind, options))
    for modality, key in zip(("image", "text", "pair"), keys, strict=True):
        worst = assert_near(vectors[modality], stacked(theirs(kind)[modality], key), 1e-3)
        print(f"{kind} {options} {modality} {worst:.1e}")


@pytest.mark.parametrize("precision, bound", [("bf16", 1e-1), ("fp16", 2e-2)])
@pytest.mark.parametrize("kind", ["folder", "g", "L"])
def test_half_precision(named: Name, theirs: Any, kind: str, precision: str, bound: float) -> None:
    vectors = ours(named(kind), precision)
    for modality, key in zip(("image", "text", "pair"), POOLS[0][1], strict=True):
        worst = assert_near(vectors[modality], stacked(theirs(kind)[modality], key), bound)
        print(f"{kind} {precision} {modality} {worst:.1e}")


@pytest.mark.parametrize("kind", ["folder", "L", "opt"])
def test_the_qformer_stays_in_fp32_in_fp16(named: Name, kind: str) -> None:
    spec = replace(registry.describe(named(kind)), precision="fp16")
    model: Any = registry.load(spec, CPU).model  # type: ignore[attr-defined]
    assert {parameter.dtype for parameter in model.qformer.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.vision_model.parameters()} == {torch.float16}
    assert model.query_tokens.dtype == torch.float32


def test_the_highest_similarity_of_tokens_is_transformers_own(named: Name) -> None:
    spec = registry.describe(named("folder", "pool=tokens"))
    encoder, tokens = registry.load(spec, CPU), list(registry.tokenizer(spec)(TEXTS[:5]))
    images, texts = our_images(encoder, IMAGES[:5]), our_texts(encoder, tokens)
    images, texts = (each / np.linalg.norm(each, axis=-1, keepdims=True) for each in (images, texts))
    reference = HfBlip2(named("folder").removeprefix("blip2:"))
    for image, vectors in zip(IMAGES[:5], images, strict=True):
        for caption, text in zip(TEXTS[:5], texts, strict=True):
            inputs = reference.tokens(caption)
            inputs.pop("token_type_ids", None)
            with torch.no_grad():
                expected = reference.model(pixel_values=reference.pixels(image), **inputs).logits_per_image
            assert abs(float((vectors @ text).max()) - float(expected)) < 1e-4


@pytest.mark.parametrize("kind", ["folder", "L"])
def test_match_is_the_references_probability(named: Name, theirs: Any, kind: str) -> None:
    spec = registry.describe(named(kind))
    encoder: Any = registry.load(spec, CPU)
    tokens = padded(list(registry.tokenizer(spec)([caption for _, caption in PAIRS])), spec.context_length)
    with torch.inference_mode():
        pixels = encoder._pixels(encoder.collate(our_pixels(spec, IMAGES)))
        found = encoder.match(pixels, *masked(tokens)).numpy()
    expected = stacked(theirs(kind)["pair"], "match")[:, 0]
    assert np.ptp(expected) > 0.02
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_wrong_pool_shows(named: Name, theirs: Any) -> None:
    vectors, rows = ours(named("folder"))["image"], theirs("folder")["image"]
    for other in ("mean_raw", "first"):
        expected = stacked(rows, other)
        unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (vectors, expected)]
        assert error(*unit).max() > 1e-2


@pytest.mark.parametrize("options", ["", "pool=tokens", "space=hidden"])
def test_batch_size_and_neighbours_change_nothing(named: Name, options: str) -> None:
    spec = registry.describe(named("folder", options))
    encoder, tokens = registry.load(spec, CPU), list(registry.tokenizer(spec)(TEXTS))
    assert len({len(ids) for ids in tokens}) > 5
    assert_near(our_texts(encoder, tokens, 1), our_texts(encoder, tokens[::-1], 7)[::-1], 1e-4)
    alone, together = our_images(encoder, IMAGES[:9], 1), our_images(encoder, IMAGES[8::-1], 4)[::-1]
    assert_near(alone.reshape(9, -1), together.reshape(9, -1), 1e-4)
    pairs = our_pairs(encoder, IMAGES[8::-1], tokens[8::-1], 9)
    assert_near(our_pairs(encoder, IMAGES[:9], tokens, 1), pairs[::-1], 1e-4)


# -- the Q-Former of models that write -----------------------------------------------------------


def _opt_reference(name: str) -> np.ndarray:
    reference = HfBlip2Opt(name.removeprefix("blip2:").partition("?")[0])
    return np.stack([reference.image(each) for each in IMAGES])


@pytest.mark.parametrize("precision, bound", [("fp32", 1e-3), ("bf16", 1e-1), ("fp16", 2e-2)])
def test_a_model_that_writes_gives_images_of_its_own_space(named: Name, precision: str, bound: float) -> None:
    spec = replace(registry.describe(named("opt")), precision=precision)
    assert spec.vectors == {"image": VectorSpec(32, "qformer-opt")}
    worst = assert_near(our_images(registry.load(spec, CPU), IMAGES), _opt_reference(named("opt")), bound)
    print(f"opt {precision} {worst:.1e}")


def test_its_language_model_is_not_needed(named: Name, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(named("opt").removeprefix("blip2:"), tmp_path / "copy"))
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for key, file in where.items() if not key.startswith("language_")}
    dropped = set(where.values()) - needed
    assert dropped
    whole = registry.describe(named("opt"))
    for file in dropped:
        (folder / file).write_bytes(b"")
    spec = registry.describe(f"blip2:{folder}")
    assert spec.weights == whole.weights
    assert not any(key.startswith("language") for key in registry.load(spec, CPU).model.state_dict())  # type: ignore[attr-defined]


def test_its_language_model_is_not_fetched(named: Name) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(named("opt").removeprefix("blip2:"), "/blip2/model", recursive=True)
    try:
        spec = registry.describe("blip2:memory://blip2/model")
        registry.load(spec, CPU)
    finally:
        memory.rm("/blip2", recursive=True)
    here = {path.name for path in (weights.default_cache() / "weights").rglob("*.safetensors")}
    index = json.loads((Path(named("opt").removeprefix("blip2:")) / "model.safetensors.index.json").read_text())
    needed = {file for key, file in index["weight_map"].items() if not key.startswith("language_")}
    assert here == needed < set(index["weight_map"].values())


@pytest.mark.parametrize("change", ["missing", "unexpected", "shaped"])
def test_a_model_that_writes_of_other_weights_is_refused(named: Name, tmp_path: Path, change: str) -> None:
    folder = Path(shutil.copytree(named("opt").removeprefix("blip2:"), tmp_path / "copy"))
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    file = folder / where["query_tokens"]
    save_file(_broken(load_file(file), change, "query_tokens"), file, metadata={"format": "pt"})
    with pytest.raises(EncoderError, match="stranger" if change == "unexpected" else "query_tokens"):
        registry.load(registry.describe(f"blip2:{folder}"), CPU)


@pytest.mark.parametrize("options", ["space=projected", "pool=mean_norm", "pool=tokens"])
def test_it_has_no_projected_space(named: Name, options: str) -> None:
    with pytest.raises(ConfigError, match=options):
        registry.describe(named("opt", options))


# -- specs ---------------------------------------------------------------------------------------


def test_spaces_say_what_can_be_compared(named: Name) -> None:
    for kind, width in [("folder", 32), ("g", 128), ("L", 128)]:
        joint, hidden = VectorSpec(16, "projected"), VectorSpec(width, "hidden")
        assert registry.describe(named(kind)).vectors == {"image": joint, "text": joint, "multimodal": hidden}
        many = registry.describe(named(kind, "pool=tokens")).vectors
        assert many == {"image": VectorSpec(16, "projected", 4), "text": joint, "multimodal": hidden}
        spec = registry.describe(named(kind, "space=hidden"))
        assert spec.vectors == dict.fromkeys(("image", "text", "multimodal"), hidden)


def test_every_option_is_in_the_fingerprint(named: Name) -> None:
    options = [*(each for each, _ in POOLS), "normalize=false"]
    names = [named("folder", each) for each in options]
    names += [named(kind, each) for kind in ("g", "L-apart") for each in (*options, "image_size=32")]
    names += [named("opt", each) for each in ("", "pool=first", "normalize=false")]
    assert len({registry.describe(name).fingerprint for name in names}) == len(names)


def test_the_vision_file_is_in_the_fingerprint(named: Name, tmp_path: Path) -> None:
    name, _, vision = named("L-apart").partition("&vision=")
    state = torch.load(vision, weights_only=True)
    torch.save({key: value * 2 for key, value in state.items()}, tmp_path / "vision.pth")
    changed = registry.describe(f"{name}&vision={tmp_path / 'vision.pth'}")
    assert changed.fingerprint != registry.describe(named("L-apart")).fingerprint
    shutil.copy(vision, tmp_path / "vision.pth")
    with pytest.raises(EncoderError, match="changed"):
        registry.load(changed, CPU)


def test_captions_are_cut_at_32_tokens_and_stay_in_the_vocabulary(named: Name) -> None:
    for kind in ("folder", "g"):
        spec = registry.describe(named(kind))
        rows = list(registry.tokenizer(spec)(["", "water " * 200, "<image> [DEC]"]))
        assert [len(ids) for ids in rows[:2]] == [2, 32]
        assert max(rows[2]) == spec.details["words"] - 1  # [DEC]


# -- LAVIS's files -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["g", "L"])
def test_positions_are_interpolated_for_images_of_another_size(named: Name, kind: str) -> None:
    """Corners are aligned for ViT-L alone, as in LAVIS."""
    spec = registry.describe(named(kind, f"image_size={2 * SIDE}"))
    model: Any = registry.load(spec, CPU).model.vision_model  # type: ignore[attr-defined]
    found = model.positional_embedding if kind == "L" else model.embeddings.position_embedding[0]
    tower: Any = checkpoints_blip.lavis(kind).visual_encoder
    table = tower.positional_embedding if kind == "L" else tower.pos_embed[0]
    grid = table[1:].reshape(4, 4, -1).permute(2, 0, 1)[None]
    grid = torch.nn.functional.interpolate(grid, size=(8, 8), mode="bicubic", align_corners=kind == "L")
    torch.testing.assert_close(found[1:], grid[0].flatten(1).T)
    torch.testing.assert_close(found[0], table[0])
    assert our_images(registry.load(spec, CPU), IMAGES[:2]).shape == (2, 16)


@pytest.mark.parametrize("kind, layers", [("g-apart", "encoder.layers"), ("L-apart", "transformer.resblocks")])
def test_layers_that_lavis_leaves_out_are_left_out(
    named: Name, kind: str, layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blip2_original, "_LAYERS", {"g": 1, "L": 1})
    encoder: Any = registry.load(registry.describe(named(kind)), CPU)
    found = {key.split(".")[-3 if "ln" in key else 3] for key in encoder.model.state_dict() if f"{layers}." in key}
    assert len(encoder.model.vision_model.get_submodule(layers)) == 1, found


@pytest.mark.parametrize("kind", ["g-apart", "L-apart"])
def test_a_missing_vision_tower_is_asked_for(named: Name, kind: str) -> None:
    with pytest.raises(ConfigError, match=r"no vision tower.*\n.*vision=DIR/"):
        registry.describe(named(kind).partition("&vision=")[0])


@pytest.mark.parametrize("kind", ["g", "L"])
@pytest.mark.parametrize(
    "change, key, said",
    [
        ("missing", "Qformer.bert.encoder.layer.1.output_query.dense.bias", "layer.1.output_query"),
        ("missing", "ln_vision.bias", "vision"),
        ("shaped", "vision_proj.bias", "vision_projection"),
        ("unexpected", "", "stranger"),
    ],
)
def test_files_of_other_weights_are_refused(
    named: Name, tmp_path: Path, kind: str, change: str, key: str, said: str
) -> None:
    file, _, vocabulary = named(kind).removeprefix("blip2:").partition("?")
    state = torch.load(file, weights_only=True)["model"]
    torch.save({"model": _broken(state, change, key)}, tmp_path / "copy.pth")
    with pytest.raises(EncoderError, match=said):
        registry.load(registry.describe(f"blip2:{tmp_path / 'copy.pth'}?{vocabulary}"), CPU)


def test_strangers_in_a_vision_file_are_refused(named: Name, tmp_path: Path) -> None:
    name, _, vision = named("L-apart").partition("&vision=")
    torch.save(_broken(torch.load(vision, weights_only=True), "unexpected", ""), tmp_path / "vision.pth")
    with pytest.raises(EncoderError, match="stranger"):
        registry.load(registry.describe(f"{name}&vision={tmp_path / 'vision.pth'}"), CPU)


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        ("pool=mean", "mean_norm, mean_raw, first, tokens"),
        ("space=hidden&pool=tokens", "mean_raw, first"),
        ("space=joint", "projected, hidden"),
        ("vision=v.pth", r"for \.pth"),
        ("layer=3", "no option layer"),
    ],
)
def test_options_that_say_nothing_are_refused(named: Name, options: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        registry.describe(named("folder", options))


@pytest.mark.parametrize("change", ["missing", "unexpected", "shaped"])
def test_a_folder_of_other_weights_is_refused(named: Name, tmp_path: Path, change: str) -> None:
    folder = Path(shutil.copytree(named("folder").removeprefix("blip2:"), tmp_path / "copy"))
    path = folder / "model.safetensors"
    save_file(_broken(load_file(path), change, "text_projection.bias"), path, metadata={"format": "pt"})
    with pytest.raises(EncoderError, match="stranger" if change == "unexpected" else "text_projection"):
        registry.load(registry.describe(f"blip2:{folder}"), CPU)


def test_another_class_is_refused(named: Name, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(named("folder").removeprefix("blip2:"), tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    for cls in ("Blip2TextModelWithProjection", "CLIPModel"):
        (folder / "config.json").write_text(json.dumps({**config, "architectures": [cls]}))
        with pytest.raises(ConfigError, match=rf"{cls}.*\n.*Blip2ForImageTextRetrieval"):
            registry.describe(f"blip2:{folder}")


def _broken(state: dict[str, torch.Tensor], change: str, key: str) -> dict[str, torch.Tensor]:
    if change == "missing":
        return {each: value for each, value in state.items() if each != key}
    return {**state, **({"a.stranger": torch.zeros(2)} if change == "unexpected" else {key: torch.zeros(3)})}
