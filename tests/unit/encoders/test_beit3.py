"""BEiT-3 against its recipe written out naively, against timm's vision tower, and against torchscale where it is."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import timm
import torch

from pipelines.encoders import registry
from pipelines.encoders.base import Encoder, EncoderSpec
from pipelines.encoders.multiway import Retrieval, Shape
from pipelines.errors import ConfigError, EncoderError
from tests.checkpoints import SIDE, some_images
from tests.checkpoints_beit3 import HEADS, SHAPE, save_beit3, save_state, save_vocabulary
from tests.unit.encoders.beit3_reference import State, naive_ids, naive_image, naive_text, preprocess, state_of
from tests.unit.encoders.inputs import CAPTIONS, ENTITIES, varied
from tests.unit.encoders.reference import error, our_images, our_texts, spread
from tests.unit.encoders.test_weights import Pickled

CPU = torch.device("cpu")
TEXTS = [*CAPTIONS, *ENTITIES, "a dog </s> and <pad> more <s> <unk>"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_beit3(tmp_path_factory.mktemp("beit3") / "model")


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(checkpoint.parent, tmp_path / "copy")
    return tmp_path / "copy" / "beit3.pth"


def named(path: Path | str, *options: str) -> str:
    return f"beit3:base@{path}?{'&'.join((f'heads={HEADS}', *options))}"


def described(path: Path | str, *options: str) -> EncoderSpec:
    return registry.describe(named(path, *options))


def loaded(path: Path, *options: str) -> Encoder:
    return registry.load(described(path, *options), CPU)


def assert_near(ours: np.ndarray, theirs: np.ndarray, bound: float) -> float:
    assert np.isfinite(ours).all()
    assert spread(theirs) >= 0.2 * np.linalg.norm(theirs, axis=1).mean(), "a checkpoint that tells nothing apart"
    worst = float(error(ours, theirs).max())
    assert worst <= bound, f"{worst:.2e}"
    return worst


# -- right vectors ---------------------------------------------------------------------------------


# A CPU takes its time over fp16. In fp32, GELU by tanh would pass at 1e-3.
@pytest.mark.parametrize("precision, bound, every", [("fp32", 2e-5, 1), ("bf16", 1e-1, 1), ("fp16", 2e-2, 6)])
def test_vectors_are_those_of_the_recipe(checkpoint: Path, precision: Any, bound: float, every: int) -> None:
    images, texts, spm = list(varied().values())[::every], TEXTS[::every], checkpoint.with_name("beit3.spm")
    assert len(varied()) >= 32
    spec, state = replace(described(checkpoint), precision=precision), state_of(checkpoint)
    encoder = registry.load(spec, CPU)
    theirs = np.stack([naive_image(data, state) for data in images])
    of_images = assert_near(our_images(encoder, images), theirs, bound)
    theirs = np.stack([naive_text(text, state, spm) for text in texts])
    of_texts = assert_near(our_texts(encoder, list(registry.tokenizer(spec)(texts))), theirs, bound)
    print(f"beit3 {precision}: images {of_images:.1e}, texts {of_texts:.1e}")


def test_each_part_of_the_recipe_shows(checkpoint: Path) -> None:
    """Without it, the reference of these tests is further from ours than their bound."""
    images, state = list(varied().values())[:8], state_of(checkpoint)
    ours = our_images(loaded(checkpoint), images)
    table = "beit3.encoder.embed_positions.A.weight"
    norms = [key for key in state if "inner_attn_ln.A.weight" in key or "ffn_layernorm.weight" in key]
    swapped = {key: state[key.replace(".A.", ".B.")] for key in state if ".A." in key and "positions" not in key}
    for broken in (
        {table: torch.cat((state[table][1:], state[table][:1]))},
        {key: torch.ones_like(state[key]) for key in norms},
        {"vision_head.weight": state["language_head.weight"]},
        swapped,
    ):
        theirs = np.stack([naive_image(data, {**state, **broken}) for data in images])
        assert error(ours, theirs).max() > 1e-2


def test_ids_are_those_of_the_recipe(checkpoint: Path) -> None:
    spec, spm = described(checkpoint), checkpoint.with_name("beit3.spm")
    found = list(registry.tokenizer(spec)(TEXTS))
    assert [ids.tolist() for ids in found] == [naive_ids(text, spm) for text in TEXTS]
    assert {ids.dtype for ids in found} == {np.dtype(np.int32)}
    assert found[TEXTS.index("")].tolist() == found[TEXTS.index("   ")].tolist() == [0, 2]
    assert max(map(len, found)) == spec.context_length == 64
    assert any(3 in ids for ids in found), "no unknown piece was tried"


def test_batch_size_and_neighbours_change_nothing(checkpoint: Path) -> None:
    images, encoder = list(varied().values()), loaded(checkpoint)
    whole = our_images(encoder, images, len(images))
    assert_near(our_images(encoder, images, 1), whole, 1e-4)
    assert_near(our_images(encoder, images[::-1], 5)[::-1], whole, 1e-4)
    tokens = list(registry.tokenizer(encoder.spec)(TEXTS))
    alone = our_texts(encoder, tokens, 1)
    assert_near(our_texts(encoder, tokens, len(tokens)), alone, 1e-4)
    assert_near(our_texts(encoder, tokens[::-1], 3)[::-1], alone, 1e-4)


def test_other_resolutions_interpolate_positions(checkpoint: Path) -> None:
    """As `F.interpolate` of the grid behind the three rows that come before it."""
    images, state = list(varied().values()), state_of(checkpoint)
    key = "beit3.encoder.embed_positions.A.weight"
    for side in (48, 96):
        grid, wanted = SIDE // 16, side // 16
        table = state[key][3:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
        table = torch.nn.functional.interpolate(table, (wanted, wanted), mode="bicubic", align_corners=False)
        resized = torch.cat((state[key][:3], table.permute(0, 2, 3, 1).reshape(wanted**2, -1)))
        theirs = np.stack([naive_image(data, {**state, key: resized}, side) for data in images])
        encoder = loaded(checkpoint, f"size={side}")
        assert encoder.spec.image is not None and encoder.spec.image.size == (side, side)
        assert_near(our_images(encoder, images), theirs, 1e-3)


def timm_state(state: State) -> State:
    renamed = timm.models.vision_transformer._convert_beit3(dict(state), None)
    of_tower = {key.replace("layer_norm.", "norm."): value for key, value in renamed.items()}
    return {key: value for key, value in of_tower.items() if "head" not in key and key != "logit_scale"}


def test_images_are_those_of_timms_tower(checkpoint: Path) -> None:
    """timm has the vision branch, without the head."""
    tower = timm.create_model(
        "beit3_base_patch16_224", img_size=SIDE, embed_dim=SHAPE.dim, num_heads=HEADS, depth=SHAPE.layers,
        mlp_ratio=SHAPE.hidden / SHAPE.dim, global_pool="token", num_classes=0,
    )  # fmt: skip
    state = state_of(checkpoint)
    tower.eval().load_state_dict(timm_state(state))
    images = list(varied().values())
    with torch.inference_mode():
        theirs = [state["vision_head.weight"] @ tower(preprocess(data, SIDE)[None])[0] for data in images]
    assert_near(our_images(loaded(checkpoint), images), torch.stack(theirs).numpy(), 1e-3)


def test_both_towers_are_those_of_torchscale(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("torchscale") is None:
        pytest.skip("torchscale is not installed")
    stub: Any = types.ModuleType("fairscale.nn")
    stub.checkpoint_wrapper = stub.wrap = lambda module, **_: module
    monkeypatch.setitem(sys.modules, "fairscale", types.ModuleType("fairscale"))
    monkeypatch.setitem(sys.modules, "fairscale.nn", stub)
    from torchscale.architecture.config import EncoderConfig
    from torchscale.model.BEiT3 import BEiT3

    config = EncoderConfig(
        img_size=SIDE, patch_size=SHAPE.patch, vocab_size=SHAPE.vocabulary, multiway=True, layernorm_embedding=False,
        normalize_output=True, no_output_layer=True, drop_path_rate=0, encoder_embed_dim=SHAPE.dim,
        encoder_attention_heads=HEADS, encoder_ffn_embed_dim=SHAPE.hidden, encoder_layers=SHAPE.layers,
        max_source_positions=SHAPE.positions, subln=True, encoder_normalize_before=True,
    )  # fmt: skip
    model, state = BEiT3(config).eval(), state_of(checkpoint)
    model.load_state_dict({key.removeprefix("beit3."): value for key, value in state.items() if "beit3" in key})
    encoder, images = loaded(checkpoint), list(varied().values())
    tokens = list(registry.tokenizer(encoder.spec)(TEXTS))
    with torch.inference_mode():
        seen = [model(visual_tokens=preprocess(data, SIDE)[None])["encoder_out"][0, 0] for data in images]
        read = [model(textual_tokens=torch.tensor(ids)[None].long())["encoder_out"][0, 0] for ids in tokens]
    assert_near(our_images(encoder, images), (torch.stack(seen) @ state["vision_head.weight"].T).numpy(), 1e-3)
    assert_near(our_texts(encoder, tokens), (torch.stack(read) @ state["language_head.weight"].T).numpy(), 1e-3)


@pytest.mark.parametrize(
    "shape, millions",
    [
        (Shape(768, 12, 12, 3072, 64010, 1024, 16, 384), 222.46),
        (Shape(1024, 16, 24, 4096, 64010, 1024, 16, 384), 675.19),
    ],
)
def test_the_released_sizes_have_as_many_weights(shape: Shape, millions: float) -> None:
    with torch.device("meta"):
        found = sum(parameter.numel() for parameter in Retrieval(shape).parameters())
    assert round(found / 1e6, 2) == millions


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("under", ["module", None])
def test_weights_lie_under_either_key_or_bare(checkpoint: Path, copied: Path, under: str | None) -> None:
    save_state(copied, state_of(checkpoint), under)
    images = list(varied().values())[:3]
    assert np.array_equal(our_images(loaded(copied), images), our_images(loaded(checkpoint), images))


def test_a_file_of_the_old_format_loads(checkpoint: Path, copied: Path) -> None:
    torch.save({"model": state_of(checkpoint)}, copied, _use_new_zipfile_serialization=False)
    images = list(varied().values())[:3]
    assert np.array_equal(our_images(loaded(copied), images), our_images(loaded(checkpoint), images))


def test_a_checkpoint_in_object_storage(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    memory = fsspec.filesystem("memory")
    memory.put(str(checkpoint.parent), "/beit3/model", recursive=True)
    url = "memory://beit3/model/beit3.pth"
    with pytest.raises(ConfigError, match="size=384"):
        described(url)
    spec = described(url, f"size={SIDE}")
    assert (spec.vectors["image"].dim, spec.image.size) == (768, (SIDE, SIDE)), "known by the size's name alone"
    assert not list((tmp_path / "home").rglob("*.pth")), "planning fetched weights"
    with pytest.raises(EncoderError, match="32 dimensions, not 768"):
        registry.load(spec, CPU)
    local = described(checkpoint)
    assert spec.details == local.details, "the vocabulary's digest is of what is in it"
    encoder = registry.load(replace(spec, vectors=local.vectors), CPU)
    tokens = list(registry.tokenizer(spec)(TEXTS))
    assert np.array_equal(our_texts(encoder, tokens), our_texts(loaded(checkpoint), tokens))
    memory.rm("/beit3", recursive=True)


def test_a_vocabulary_elsewhere(checkpoint: Path, copied: Path) -> None:
    spm = copied.with_name("beit3.spm").rename(copied.with_name("other.spm"))
    with pytest.raises(EncoderError, match=r"beit3\.spm does not exist"):
        described(copied)
    spec = described(copied, f"spm={spm}")
    assert spec.fingerprint == described(checkpoint).fingerprint
    assert len(list(registry.tokenizer(spec)(TEXTS))) == len(TEXTS)
    with pytest.raises(ConfigError, match="credentials") as refused:
        described(copied, "spm=https://user:planted-7f3a@host/beit3.spm")
    assert "planted" not in str(refused.value)


def test_a_file_that_is_no_vocabulary_is_named(copied: Path) -> None:
    copied.with_name("beit3.spm").write_bytes(b"no model")
    with pytest.raises(EncoderError, match=r"beit3\.spm is no sentencepiece model"):
        registry.tokenizer(described(copied))


def changed(state: State, change: str) -> State:
    key = "beit3.encoder.layers.1.ffn.B.fc2.weight"
    if change == "missing":
        return {name: value for name, value in state.items() if name != key}
    if change == "shaped":
        return {**state, key: torch.zeros(len(state[key]) + 1, state[key].shape[1])}
    return {**state, "a.stranger": torch.zeros(2)}


@pytest.mark.parametrize("change, said", [("missing", "Missing.*fc2"), ("unexpected", "stranger"), ("shaped", "fc2")])
def test_weights_of_another_model_are_refused(checkpoint: Path, copied: Path, change: str, said: str) -> None:
    save_state(copied, changed(state_of(checkpoint), change))
    with pytest.raises(EncoderError, match=f"(?s){said}"):
        loaded(copied)


def test_what_belongs_to_the_file_is_missed_too(checkpoint: Path, copied: Path) -> None:
    for key in ("beit3.vision_embed.mask_token", "logit_scale"):
        save_state(copied, {name: value for name, value in state_of(checkpoint).items() if name != key})
        with pytest.raises(EncoderError, match=key):
            loaded(copied)


def test_a_checkpoint_of_pre_training_is_refused_with_the_reason(checkpoint: Path, copied: Path) -> None:
    state = {key: value for key, value in state_of(checkpoint).items() if key.startswith("beit3.")}
    save_state(copied, {**state, "mlm_head.weight": torch.zeros(2, 2), "mim_head.weight": torch.zeros(2, 2)})
    with pytest.raises(EncoderError, match=r"no vision_head(?s:.*)mim_head, mlm_head(?s:.*)retrieval\.pth"):
        described(copied)


def test_weights_that_changed_after_planning_are_refused(checkpoint: Path, copied: Path) -> None:
    spec = described(copied)
    save_state(copied, {key: value * 1.5 for key, value in state_of(checkpoint).items()})
    with pytest.raises(EncoderError, match="changed"):
        registry.load(spec, CPU)


def test_a_pickle_is_not_run(copied: Path, tmp_path: Path) -> None:
    torch.save({"model": {"logit_scale": Pickled(tmp_path / "marker")}}, copied)
    with pytest.raises(EncoderError, match="cannot be read"):
        described(copied)
    assert not (tmp_path / "marker").exists()


# -- names and fingerprints ------------------------------------------------------------------------


def test_what_cannot_be_named_is_refused(checkpoint: Path, copied: Path) -> None:
    for name, said in [
        ("beit3:base", "a size and a file"),
        (f"beit3:giant@{checkpoint}", "giant is no size.*\n.*base, large"),
        (f"{named(checkpoint)}&size=70", "no multiple of 16"),
        (f"{named(checkpoint)}&size=big", "no whole number"),
        (f"{named(checkpoint)}&size=-16", "not positive"),
        (f"{named(checkpoint)}&pool=mean", "no option pool"),
    ]:
        with pytest.raises(ConfigError, match=said):
            registry.describe(name)
    for name, said in [
        (f"beit3:base@{checkpoint.parent}/none.pth", r"none\.pth does not exist"),
        (f"beit3:base@{checkpoint}?heads=4096", "not divided by 4096"),
    ]:
        with pytest.raises(EncoderError, match=said):
            registry.describe(name)


def test_a_size_that_is_not_the_files_is_refused(checkpoint: Path) -> None:
    with pytest.raises(EncoderError, match="32 dimensions; large has 1024"):
        registry.describe(f"beit3:large@{checkpoint}")


def test_all_that_decides_a_vector_is_in_the_fingerprint(checkpoint: Path, copied: Path) -> None:
    prints = [described(checkpoint).fingerprint, described(checkpoint, "size=96").fingerprint]
    prints.append(registry.describe(f"beit3:base@{checkpoint}?heads=8").fingerprint)
    prints.append(described(checkpoint, "normalize=false").fingerprint)
    assert described(copied).fingerprint == prints[0], "a copy elsewhere is the same"
    save_vocabulary(copied.with_name("beit3.spm"), ("a dog runs", "un cane marrone corre"))
    prints.append(described(copied).fingerprint)
    save_state(copied, {key: value * 1.5 for key, value in state_of(checkpoint).items()})
    prints.append(described(copied).fingerprint)
    assert len(set(prints)) == len(prints)


def test_heads_are_no_more_than_a_guess_where_the_file_says_nothing(checkpoint: Path) -> None:
    """Another number of heads loads, and gives other vectors: it is in the name and in the fingerprint."""
    images = list(varied().values())[:4]
    eight = registry.load(registry.describe(f"beit3:base@{checkpoint}?heads=8"), CPU)
    assert error(our_images(eight, images), our_images(loaded(checkpoint), images)).max() > 1e-2


def test_vectors_are_raw(checkpoint: Path) -> None:
    with torch.inference_mode():
        raw = loaded(checkpoint).model.images(some_images(4))
    assert not torch.allclose(raw.norm(dim=1), torch.ones(4), atol=0.1)
