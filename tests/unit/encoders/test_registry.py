"""What can be named, what is refused and how, and what makes two encoders the same."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.encoders import registry
from pipelines.encoders.open_clip_source import tagged
from pipelines.errors import ConfigError, EncoderError
from tests import checkpoints
from tests.unit.encoders.conftest import Checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def copied(checkpoint: Checkpoint, tmp_path: Path):
    """A checkpoint of one's own to break: (name, folder)."""

    def copy(kind: str, name: str = "copy") -> tuple[str, Path]:
        prefix, _, folder = checkpoint(kind).rpartition(":")
        shutil.copytree(folder, tmp_path / name)
        return f"{prefix}:{tmp_path / name}", tmp_path / name

    return copy


# -- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ViT-B-32", "clip:ViT-B-32", "hf:", ":x", "openclip:ViT-B-32/openai"])
def test_an_unknown_family_names_those_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match=r"open_clip: .*ViT-B-32/laion2b.*hf: .*google/siglip2"):
        registry.describe(name)


def test_options_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="has no option pool"):
        registry.describe("open_clip:ViT-B-32/openai?pool=first")


def test_an_unknown_architecture_suggests_one() -> None:
    with pytest.raises(ConfigError, match="ViT-B-32"):
        registry.describe("open_clip:ViT-B32/openai")


def test_an_unknown_tag_lists_the_tags() -> None:
    with pytest.raises(ConfigError, match="laion2b_s34b_b79k"):
        registry.describe("open_clip:ViT-B-32/laion3b")
    with pytest.raises(ConfigError, match="laion2b_s34b_b79k"):
        registry.describe("open_clip:ViT-B-32")


def test_a_missing_folder_or_file_is_named(tmp_path: Path) -> None:
    for name in (f"hf:{tmp_path}/none", f"open_clip:local-dir:{tmp_path}/none", f"open_clip:ViT-B-32@{tmp_path}/none"):
        with pytest.raises((ConfigError, EncoderError), match="none"):
            registry.describe(name)


def test_a_folder_without_a_model_lists_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("")
    for prefix in ("hf:", "open_clip:local-dir:"):
        with pytest.raises(EncoderError, match=r"readme\.txt"):
            registry.describe(f"{prefix}{tmp_path}")


def test_another_class_is_refused(copied) -> None:
    name, folder = copied("hf-clip-eos2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["CLIPVisionModel"]}))
    with pytest.raises(ConfigError, match=r"CLIPVisionModel.*\n.*SiglipModel"):
        registry.describe(name)


# -- fingerprints --------------------------------------------------------------------------------


def test_a_spec_is_light_and_says_the_same_twice(checkpoint: Checkpoint) -> None:
    spec = registry.describe(checkpoint("hf-siglip"))
    assert len(pickle.dumps(spec)) < 20_000
    assert hash(spec) == hash(pickle.loads(pickle.dumps(spec)))
    assert registry.describe(checkpoint("hf-siglip")).fingerprint == spec.fingerprint


def test_a_copy_elsewhere_has_the_same_fingerprint(checkpoint: Checkpoint, copied) -> None:
    for kind in ("open_clip-gelu", "hf-clip-eos2"):
        name, _ = copied(kind, kind)
        assert registry.describe(name).fingerprint == registry.describe(checkpoint(kind)).fingerprint


def test_weights_activation_and_preprocessing_are_in_the_fingerprint(checkpoint: Checkpoint) -> None:
    kinds = ("open_clip-gelu", "open_clip-quickgelu", "open_clip-squash", "hf-clip-eos2", "hf-clip-eos49407")
    assert len({registry.describe(checkpoint(kind)).fingerprint for kind in kinds}) == len(kinds)


def test_a_tokenizer_is_in_the_fingerprint(checkpoint: Checkpoint, copied) -> None:
    name, folder = copied("hf-siglip")
    other = folder / "other"
    other.mkdir()
    corpus, checkpoints.CORPUS = checkpoints.CORPUS, checkpoints.CORPUS[::-1][:3]
    try:
        checkpoints.sentencepiece_tokenizer(other)
    finally:
        checkpoints.CORPUS = corpus
    (other / "spiece.model").replace(folder / "spiece.model")
    assert registry.describe(name).fingerprint != registry.describe(checkpoint("hf-siglip")).fingerprint


# -- weights -------------------------------------------------------------------------------------


def broken(folder: Path, change: str) -> None:
    path = next(folder.glob("*.safetensors"))
    state = load_file(path)
    key = next(key for key in sorted(state) if key.endswith("positional_embedding") or "layers.0.mlp.fc1.weight" in key)
    if change == "missing":
        del state[key]
    elif change == "unexpected":
        state["a.stranger"] = torch.zeros(2)
    else:
        state[key] = torch.zeros(state[key].shape[0] + 1, *state[key].shape[1:])
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, said", [("missing", "(?i)missing"), ("unexpected", "stranger"), ("shaped", "emb|fc1")]
)
@pytest.mark.parametrize("kind", ["open_clip-gelu", "hf-clip-eos2", "hf-siglip", "hf-siglip2-naflex"])
def test_weights_of_another_model_are_refused(copied, kind: str, change: str, said: str) -> None:
    name, folder = copied(kind)
    broken(folder, change)
    with pytest.raises(EncoderError, match=said):
        registry.load(registry.describe(name), CPU)


def test_derived_buffers_of_old_checkpoints_are_no_stranger(copied) -> None:
    name, folder = copied("hf-clip-eos2")
    state = load_file(folder / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert registry.load(registry.describe(name), CPU).spec.vectors["image"].dim == 24


def test_weights_that_changed_after_planning_are_refused(copied) -> None:
    for kind in ("open_clip-gelu", "hf-clip-eos2"):
        name, folder = copied(kind, kind)
        spec = registry.describe(name)
        path = next(folder.glob("*.safetensors"))
        state = {key: value * 1.5 for key, value in load_file(path).items()}
        save_file(state, path, metadata={"format": "pt"})
        with pytest.raises(EncoderError, match="changed"):
            registry.load(spec, CPU)


def test_half_precision_weights_load_in_fp32(copied) -> None:
    name, folder = copied("hf-clip-eos2")
    state = {key: value.half() for key, value in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    encoder = registry.load(registry.describe(name), CPU)
    assert {parameter.dtype for parameter in encoder._model.parameters()} == {torch.float32}


def test_padding_on_the_left_is_refused(copied) -> None:
    name, folder = copied("hf-siglip2-naflex")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "left"}))
    with pytest.raises(EncoderError, match="left"):
        registry.describe(name)


def test_weights_in_pieces(copied, checkpoint: Checkpoint) -> None:
    name, folder = copied("hf-clip-eos2")
    whole = registry.load(registry.describe(name), CPU)
    whole._model.save_pretrained(folder, max_shard_size="1MB")
    (folder / "model.safetensors").unlink()
    pieces = registry.load(registry.describe(name), CPU)
    tokens = torch.from_numpy(registry.tokenizer(whole.spec)(["a dog"]))
    torch.testing.assert_close(pieces.texts(tokens), whole.texts(tokens))


# -- activations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arch, tag", [("ViT-B-32", "openai"), ("ViT-H-14", "dfn5b"), ("ViT-B-16", "metaclip_400m")])
def test_gelu_for_quickgelu_is_refused_by_tag(arch: str, tag: str) -> None:
    with pytest.raises(EncoderError, match=f"open_clip:{arch}-quickgelu"):
        registry.describe(f"open_clip:{arch}/{tag}")


def test_every_pretrained_tag_is_described_or_has_its_other_name() -> None:
    described = 0
    for arch, tag in open_clip.list_pretrained():
        try:
            tagged(arch, tag)
            described += 1
        except EncoderError:
            tagged(f"{arch}-quickgelu", tag)
    assert described > 150


@pytest.mark.parametrize("name", ["ViT-B-32-openai", "vit_b16_dfn2b", "my-metaclip", "ViT-B-32-quickgelu"])
def test_gelu_for_quickgelu_is_refused_by_the_folders_name(copied, name: str) -> None:
    reference, _ = copied("open_clip-gelu", name)
    with pytest.raises(EncoderError, match="quick_gelu"):
        registry.describe(reference)


def test_quickgelu_for_gelu_is_refused_by_the_folders_name(copied) -> None:
    reference, _ = copied("open_clip-quickgelu", "ViT-B-32-laion2b_s34b_b79k")
    with pytest.raises(EncoderError, match="quick_gelu"):
        registry.describe(reference)


def test_a_name_that_tells_nothing_or_the_truth_is_taken(copied) -> None:
    for kind, name in [("open_clip-quickgelu", "model-openai"), ("open_clip-gelu", "laion2b_s34b_b79k")]:
        registry.describe(copied(kind, name)[0])


def test_gelu_for_quickgelu_is_refused_by_the_files_name(tmp_path: Path) -> None:
    (tmp_path / "ViT-B-32-openai.pt").write_bytes(b"")
    with pytest.raises(EncoderError, match="ViT-B-32-quickgelu"):
        registry.describe(f"open_clip:ViT-B-32@{tmp_path}/ViT-B-32-openai.pt")
