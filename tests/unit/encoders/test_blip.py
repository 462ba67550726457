"""BLIP: its vectors are the reference's own, and what is not BLIP for retrieval is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
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
from pipelines.encoders import registry, weights
from pipelines.encoders.batch import padded
from pipelines.encoders.torch_encoder import masked
from pipelines.errors import ConfigError, EncoderError
from tests import checkpoints_blip
from tests.checkpoints import SIDE
from tests.unit.encoders.blip_reference import HfBlip, OriginalReference, assert_near, stacked
from tests.unit.encoders.inputs import CAPTIONS, ENTITIES, varied
from tests.unit.encoders.reference import error, our_images, our_pairs, our_pixels, our_texts

CPU = torch.device("cpu")
IMAGES, TEXTS = list(varied().values()), CAPTIONS + ENTITIES
PAIRS = [(image, TEXTS[at % len(TEXTS)]) for at, image in enumerate(IMAGES)]
KINDS = ["folder", "file"]
VARIANTS = [("", "projected"), ("space=hidden", "hidden"), ("space=hidden&pool=mean", "mean")]

Name = Callable[..., str]


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Name:
    """The name of a checkpoint by its kind, with options."""
    root = tmp_path_factory.mktemp("blip")
    folder, file = cache(checkpoints_blip.save_blip), cache(checkpoints_blip.save_blip_original)
    vocabulary = checkpoints_blip.save_vocabulary(root / "vocabulary")

    def name(kind: str, options: str = "") -> str:
        if kind == "folder":
            return f"blip:{folder(root / kind)}{'?' if options else ''}{options}"
        return f"blip:{file(root / 'blip.pth')}?vocab={vocabulary}{'&' if options else ''}{options}"

    return name


@pytest.fixture
def bucket() -> Iterator[Callable[[str], str]]:
    """Copies a local file into memory://; its URL."""
    memory = fsspec.filesystem("memory")

    def put(file: str) -> str:
        memory.put(file, f"/blip/{Path(file).name}")
        return f"memory://blip/{Path(file).name}"

    yield put
    memory.rm("/blip", recursive=True)


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


def _reference(name: str, kind: str) -> HfBlip | OriginalReference:
    if kind == "folder":
        return HfBlip(name.removeprefix("blip:"))
    return OriginalReference(checkpoints_blip.original_blip(), name.partition("vocab=")[2])


def ours(name: str, precision: str = "fp32") -> dict[str, np.ndarray]:
    spec = replace(registry.describe(name), precision=precision)
    encoder, tokenize = registry.load(spec, CPU), registry.tokenizer(spec)
    vectors = {
        "image": our_images(encoder, IMAGES),
        "text": our_texts(encoder, list(tokenize(TEXTS))),
        "pair": our_pairs(encoder, IMAGES, list(tokenize([caption for _, caption in PAIRS]))),
    }
    for modality, key in [("image", "image"), ("text", "text"), ("multimodal", "pair")]:
        assert vectors[key].shape[1:] == (spec.vectors[modality].dim,)
    return vectors


# -- vectors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, key", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_the_references(named: Name, theirs: Any, kind: str, options: str, key: str) -> None:
    for modality, vectors in ours(named(kind, options)).items():
        worst = assert_near(vectors, stacked(theirs(kind)[modality], key), 1e-3)
        print(f"{kind} {options} {modality} {worst:.1e}")


@pytest.mark.parametrize("precision, bound", [("bf16", 1e-1), ("fp16", 2e-2)])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(named: Name, theirs: Any, kind: str, precision: str, bound: float) -> None:
    for modality, vectors in ours(named(kind), precision).items():
        worst = assert_near(vectors, stacked(theirs(kind)[modality], "projected"), bound)
        print(f"{kind} {precision} {modality} {worst:.1e}")


@pytest.mark.parametrize("kind", KINDS)
def test_match_is_the_references_probability(named: Name, theirs: Any, kind: str) -> None:
    found, expected = _matches(named(kind)), stacked(theirs(kind)["pair"], "match")[:, 0]
    assert np.ptp(expected) > 0.02
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_match_is_what_transformers_itself_says_of_enc(named: Name) -> None:
    reference = HfBlip(named("folder").removeprefix("blip:"))
    expected = [float(reference.itm_score(*pair)) for pair in PAIRS]
    np.testing.assert_allclose(_matches(named("folder")), expected, atol=1e-4)


@torch.inference_mode()
def _matches(name: str, token: int | None = None) -> np.ndarray:
    spec = registry.describe(name)
    if token is not None:
        spec = replace(spec, details={**spec.details, "match_token": token})
    encoder: Any = registry.load(spec, CPU)
    tokens = padded(list(registry.tokenizer(spec)([caption for _, caption in PAIRS])), spec.context_length)
    pixels = encoder._pixels(encoder.collate(our_pixels(spec, IMAGES)))
    return encoder.match(pixels, *masked(tokens)).numpy()


def test_cls_in_place_of_enc_shows(named: Name, theirs: Any) -> None:
    expected = stacked(theirs("folder")["pair"], "match")[:, 0]
    assert np.abs(_matches(named("folder"), token=2) - expected).max() > 1e-3


def test_a_wrong_pool_shows(named: Name, theirs: Any) -> None:
    vectors, expected = ours(named("folder", "space=hidden")), theirs("folder")
    for modality in vectors:
        assert error(vectors[modality], stacked(expected[modality], "mean")).max() > 1e-2


@pytest.mark.parametrize("options, _", VARIANTS)
def test_batch_size_and_neighbours_change_nothing(named: Name, options: str, _: str) -> None:
    spec = registry.describe(named("folder", options))
    encoder, tokens = registry.load(spec, CPU), list(registry.tokenizer(spec)(TEXTS))
    assert len({len(ids) for ids in tokens}) > 5
    assert_near(our_texts(encoder, tokens, 1), our_texts(encoder, tokens[::-1], 7)[::-1], 1e-4)
    assert_near(our_images(encoder, IMAGES[:9], 1), our_images(encoder, IMAGES[8::-1], 4)[::-1], 1e-4)
    alone, together = our_pairs(encoder, IMAGES[:9], tokens, 1), our_pairs(encoder, IMAGES[8::-1], tokens[8::-1], 9)
    assert_near(alone, together[::-1], 1e-4)


def test_positions_are_interpolated_for_images_of_another_size(named: Name) -> None:
    side = 2 * SIDE
    spec = registry.describe(named("file", f"image_size={side}"))
    model = checkpoints_blip.original_blip()
    model.visual_encoder.set_input_size(img_size=side)
    table = checkpoints_blip.original_blip().visual_encoder.pos_embed.detach()
    grid = table[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(8, 8), mode="bicubic", align_corners=False)
    model.visual_encoder.pos_embed.data = torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)
    reference = OriginalReference(model, str(named("file")).partition("vocab=")[2], side=side)
    expected = stacked([reference.image(image) for image in IMAGES], "projected")
    assert_near(our_images(registry.load(spec, CPU), IMAGES), expected, 1e-3)


# -- specs ---------------------------------------------------------------------------------------


def test_spaces_say_what_can_be_compared(named: Name) -> None:
    for kind, width in [("folder", 32), ("file", 128)]:
        joint, hidden = VectorSpec(16, "projected"), VectorSpec(width, "hidden")
        assert registry.describe(named(kind)).vectors == {"image": joint, "text": joint, "multimodal": hidden}
        spec = registry.describe(named(kind, "space=hidden"))
        assert spec.vectors == dict.fromkeys(("image", "text", "multimodal"), hidden)


def test_hidden_images_of_a_large_blip_have_a_space_of_their_own(tmp_path: Path) -> None:
    spec = registry.describe(f"blip:{checkpoints_blip.save_blip(tmp_path / 'large', text_width=48)}?space=hidden")
    assert spec.vectors["image"] == VectorSpec(32, "hidden-image")
    assert spec.vectors["text"] == spec.vectors["multimodal"] == VectorSpec(48, "hidden")


def test_every_option_is_in_the_fingerprint(named: Name) -> None:
    options = ["", "space=hidden", "space=hidden&pool=mean", "normalize=false"]
    names = [named("folder", each) for each in options]
    names += [named("file", each) for each in (*options, "image_size=32")]
    assert len({registry.describe(name).fingerprint for name in names}) == len(names)


def test_a_copy_elsewhere_has_the_same_fingerprint(named: Name, tmp_path: Path) -> None:
    file, _, vocabulary = named("file").removeprefix("blip:").partition("?vocab=")
    shutil.copy(file, tmp_path / "copy.pth")
    shutil.copy(vocabulary, tmp_path / "words.txt")
    copy = registry.describe(f"blip:{tmp_path / 'copy.pth'}?vocab={tmp_path / 'words.txt'}")
    spec = registry.describe(named("file"))
    assert copy.fingerprint == spec.fingerprint
    assert copy.details["tokenizer"] == registry.describe(f"{named('file')[:-9]}vocab.txt").details["tokenizer"]
    assert len(pickle.dumps(spec)) < 20_000


def test_the_vocabulary_is_in_the_fingerprint_whether_file_or_folder(named: Name, tmp_path: Path) -> None:
    prefix, _, file = named("file").partition("vocab=")
    described = registry.describe(named("file")).fingerprint
    assert registry.describe(f"{prefix}vocab={Path(file).parent}").fingerprint == described
    words = checkpoints_blip.bert_words()
    other = checkpoints_blip.save_vocabulary(tmp_path, [*words[:5], *words[:4:-1]])
    assert registry.describe(f"{prefix}vocab={other}").fingerprint != described


# -- captions ------------------------------------------------------------------------------------


def test_captions_are_cut_at_35_tokens(named: Name) -> None:
    for kind in KINDS:
        rows = list(registry.tokenizer(registry.describe(named(kind)))(["", "water " * 200]))
        assert [len(ids) for ids in rows] == [2, 35]
        assert {ids.dtype for ids in rows} == {np.dtype(np.int32)}


# -- where files lie -----------------------------------------------------------------------------


def test_a_file_and_its_vocabulary_in_object_storage(named: Name, bucket: Callable[[str], str]) -> None:
    file, _, vocabulary = named("file").removeprefix("blip:").partition("?vocab=")
    spec = registry.describe(f"blip:{bucket(file)}?vocab={bucket(vocabulary)}")
    assert not _fetched(".pth"), "planning fetched weights"
    local = registry.describe(named("file"))
    assert spec.details == local.details
    assert list(*registry.tokenizer(spec)(["a dog"])) == list(*registry.tokenizer(local)(["a dog"]))
    vectors = our_images(registry.load(spec, CPU), IMAGES[:2])
    np.testing.assert_array_equal(vectors, our_images(registry.load(local, CPU), IMAGES[:2]))
    assert len(_fetched(".pth")) == 1


def _fetched(suffix: str) -> list[Path]:
    return [path for path in (weights.default_cache() / "weights").rglob("*") if path.suffix == suffix]


def test_decode_workers_import_no_torch() -> None:
    modules = "pipelines.encoders.blip_text, pipelines.encoders.blip2_text"
    subprocess.run([sys.executable, "-c", f"import sys, {modules}; assert 'torch' not in sys.modules"], check=True)


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        ("pool=mean", "pool=mean"),
        ("space=joint", "projected, hidden"),
        ("space=hidden&pool=max", "first, mean"),
        ("vocab=v.txt", r"for \.pth"),
        ("image_size=64", r"for \.pth"),
        ("size=base", "no option size"),
    ],
)
def test_options_that_say_nothing_are_refused(named: Name, options: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        registry.describe(named("folder", options))


@pytest.mark.parametrize("size", ["60", "0", "-64", "big"])
def test_an_image_size_that_patches_do_not_fill_is_refused(named: Name, size: str) -> None:
    with pytest.raises(ConfigError, match=size):
        registry.describe(named("file", f"image_size={size}"))


def test_captioning_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = checkpoints_blip.save_blip(tmp_path / "captions", "BlipForConditionalGeneration")
    with pytest.raises(ConfigError, match=r"captions.*no space.*\n.*BlipForImageTextRetrieval"):
        registry.describe(f"blip:{folder}")


def test_blip_model_is_refused_with_the_reason(named: Name, tmp_path: Path) -> None:
    _change(_copy(named, tmp_path) / "config.json", architectures=["BlipModel"])
    with pytest.raises(ConfigError, match=r"BlipModel.*random"):
        registry.describe(f"blip:{tmp_path / 'copy'}")


def test_an_image_processor_of_another_size_is_refused(named: Name, tmp_path: Path) -> None:
    _change(_copy(named, tmp_path) / "preprocessor_config.json", size={"height": 32, "width": 32})
    with pytest.raises(EncoderError, match="image processor"):
        registry.describe(f"blip:{tmp_path / 'copy'}")


def test_a_configuration_without_room_for_enc_is_refused(named: Name, tmp_path: Path) -> None:
    path = _copy(named, tmp_path) / "config.json"
    text = json.loads(path.read_text())["text_config"]
    _change(path, text_config={**text, "bos_token_id": text["vocab_size"] - 1})
    with pytest.raises(EncoderError, match="ENC"):
        registry.describe(f"blip:{tmp_path / 'copy'}")


def test_another_vocabulary_is_refused(named: Name, tmp_path: Path) -> None:
    words = checkpoints_blip.save_vocabulary(tmp_path, checkpoints_blip.bert_words()[:-9])
    with pytest.raises(EncoderError, match="vocabulary"):
        registry.describe(f"{named('file').partition('vocab=')[0]}vocab={words}")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"none\.pth"):
        registry.describe(f"blip:{tmp_path}/none.pth")
    with pytest.raises((ConfigError, EncoderError), match="none"):
        registry.describe(f"blip:{tmp_path}/none/")


CHANGES = [("missing", "text_proj.bias"), ("unexpected", "a.stranger"), ("shaped", "text_proj.bias")]


@pytest.mark.parametrize("change, said", CHANGES)
def test_a_folder_of_other_weights_is_refused(named: Name, tmp_path: Path, change: str, said: str) -> None:
    path = _copy(named, tmp_path) / "model.safetensors"
    save_file(broken(load_file(path), change, "text_proj.bias"), path, metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=said):
        registry.load(registry.describe(f"blip:{tmp_path / 'copy'}"), CPU)


@pytest.mark.parametrize("change, said", CHANGES)
def test_a_file_of_other_weights_is_refused(named: Name, tmp_path: Path, change: str, said: str) -> None:
    name, state = _file_copy(named, tmp_path)
    torch.save({"model": broken(state, change, "text_proj.bias")}, tmp_path / "copy.pth")
    with pytest.raises(EncoderError, match=said):
        registry.load(registry.describe(name), CPU)


def test_a_captioning_file_is_refused_with_the_reason(named: Name, tmp_path: Path) -> None:
    name, state = _file_copy(named, tmp_path)
    heads = ("vision_proj", "text_proj", "itm_head")
    torch.save(
        {"model": {key: value for key, value in state.items() if not key.startswith(heads)}}, tmp_path / "copy.pth"
    )
    with pytest.raises(EncoderError, match=r"vision_proj.*\n.*captions"):
        registry.describe(name)


def test_weights_that_changed_after_planning_are_refused(named: Name, tmp_path: Path) -> None:
    name, state = _file_copy(named, tmp_path)
    spec = registry.describe(name)
    torch.save({"model": {key: value * 2 for key, value in state.items()}}, tmp_path / "copy.pth")
    with pytest.raises(EncoderError, match="changed"):
        registry.load(spec, CPU)


class Harm:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harmed"),))


def test_a_file_that_would_run_code_is_refused(named: Name, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, state = _file_copy(named, tmp_path)
    torch.save({"model": state, "config": Harm()}, tmp_path / "copy.pth")
    with pytest.raises(EncoderError, match="save its tensors alone"):
        registry.describe(name)
    assert not Path("harmed").exists()


def broken(state: dict[str, torch.Tensor], change: str, key: str) -> dict[str, torch.Tensor]:
    if change == "missing":
        return {each: value for each, value in state.items() if each != key}
    return {**state, **({"a.stranger": torch.zeros(2)} if change == "unexpected" else {key: torch.zeros(3)})}


def _copy(named: Name, tmp_path: Path) -> Path:
    return Path(shutil.copytree(named("folder").removeprefix("blip:"), tmp_path / "copy"))


def _file_copy(named: Name, tmp_path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The name of a file of one's own, and what is in it."""
    file, _, vocabulary = named("file").removeprefix("blip:").partition("?")
    shutil.copy(file, tmp_path / "copy.pth")
    return f"blip:{tmp_path / 'copy.pth'}?{vocabulary}", torch.load(file, weights_only=False)["model"]


def _change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
