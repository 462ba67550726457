"""Weights in object storage, in files and in the hub's cache: fetched once, digested, never half there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
import transformers
from open_clip.pretrained import _PRETRAINED, _pcfg

from pipelines.encoders import registry, weights
from pipelines.encoders.digest import file_digest
from pipelines.errors import ConfigError, EncoderError
from tests import checkpoints
from tests.unit.encoders.conftest import Checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def bucket() -> Iterator[Callable[[str], str]]:
    """Copies a local folder into memory://; its URL."""
    memory = fsspec.filesystem("memory")

    def put(name: str) -> str:
        folder = name.rpartition(":")[2]
        memory.put(folder, "/bucket/model", recursive=True)
        return "memory://bucket/model"

    yield put
    memory.rm("/bucket", recursive=True)


def cached_files() -> list[Path]:
    return [path for path in (weights.default_cache() / "weights").rglob("*") if path.is_file()]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: None) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("kind, prefix", [("open_clip-gelu", "open_clip:local-dir:"), ("hf-siglip", "hf:")])
def test_a_folder_in_object_storage(checkpoint: Checkpoint, bucket, kind: str, prefix: str) -> None:
    local = registry.describe(checkpoint(kind))
    spec = registry.describe(prefix + bucket(checkpoint(kind)))
    assert not [path for path in cached_files() if path.suffix == ".safetensors"], "planning fetched weights"
    encoder, same = registry.load(spec, CPU), registry.load(local, CPU)
    tokens = torch.from_numpy(registry.tokenizer(spec)(["a dog", "two children"]))
    assert torch.equal(encoder.texts(tokens), same.texts(tokens))
    assert len([path for path in cached_files() if path.suffix == ".safetensors"]) == 1
    assert not [path for path in cached_files() if path.suffix == ".partial"]


def test_objects_that_changed_after_planning_are_refused(checkpoint: Checkpoint, bucket) -> None:
    url = bucket(checkpoint("hf-siglip"))
    spec = registry.describe(f"hf:{url}")
    fsspec.filesystem("memory").pipe("/bucket/model/model.safetensors", b"other")
    with pytest.raises(EncoderError, match="changed"):
        registry.load(spec, CPU)


def test_weights_are_fetched_once_and_anew_when_they_change(tmp_path: Path, bucket, monkeypatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.bin").write_bytes(b"one")
    url = bucket(str(tmp_path / "model"))
    first = weights.RemoteFolder(url).fetch(["model.bin"])
    with monkeypatch.context() as patch:
        patch.setattr(weights.Store, "open", lambda *_: pytest.fail("fetched again"))
        assert weights.RemoteFolder(url).fetch(["model.bin"]) == first
    fsspec.filesystem("memory").pipe("/bucket/model/model.bin", b"two")
    second = weights.RemoteFolder(url).fetch(["model.bin"])
    assert (first / "model.bin").read_bytes() == b"one"
    assert (second / "model.bin").read_bytes() == b"two"


def test_a_half_fetched_file_is_fetched_again(tmp_path: Path, bucket) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.bin").write_bytes(b"whole")
    folder = weights.RemoteFolder(bucket(str(tmp_path / "model")))
    target = weights.default_cache() / "weights" / folder._folder_name()
    target.mkdir(parents=True)
    (target / "model.bin.partial").write_bytes(b"who")
    assert (folder.fetch(["model.bin"]) / "model.bin").read_bytes() == b"whole"


FETCH = """
import sys
from pathlib import Path
from pipelines.encoders import weights
opened, original = Path(sys.argv[3]), weights.Store.open
def counting(store, path):
    (opened / sys.argv[4]).touch()
    return original(store, path)
weights.Store.open = counting
folder = weights.RemoteFolder(sys.argv[1], cache=Path(sys.argv[2]))
assert (folder.fetch(["model.bin"]) / "model.bin").stat().st_size == 30_000_000
"""


def test_processes_of_a_node_fetch_once(tmp_path: Path) -> None:
    """Two at once, from what is no local path to `RemoteFolder`."""
    source, opened = tmp_path / "model", tmp_path / "opened"
    source.mkdir()
    opened.mkdir()
    (source / "model.bin").write_bytes(os.urandom(30_000_000))
    command = [sys.executable, "-c", FETCH, f"file://{source}", str(tmp_path / "cache"), str(opened)]
    started = [subprocess.Popen([*command, str(n)]) for n in range(2)]
    assert [process.wait(120) for process in started] == [0] * 2
    assert len(list(opened.iterdir())) == 1


def test_a_single_file_with_its_architecture(checkpoint: Checkpoint, tmp_path: Path, bucket) -> None:
    folder = Path(checkpoint("open_clip-gelu").rpartition(":")[2])
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-for-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-for-test.json")
    plain = registry.describe(f"open_clip:tiny-for-test@{folder}/open_clip_model.safetensors")
    remote = registry.describe(f"open_clip:tiny-for-test@{bucket(str(folder))}/open_clip_model.safetensors")
    tokens = torch.from_numpy(registry.tokenizer(plain)(["a dog"]))
    assert plain.image is not None and plain.image.mean[0] == pytest.approx(0.48145466)
    assert torch.equal(registry.load(plain, CPU).texts(tokens), registry.load(remote, CPU).texts(tokens))


def test_a_training_checkpoint_and_one_of_another_size(tmp_path: Path) -> None:
    """`state_dict` with `module.` before every key loads; a position table of another size does not."""
    config = checkpoints.open_clip_config()
    (tmp_path / "tiny-of-training.json").write_text(json.dumps(config))
    larger = {**config, "vision_cfg": {**config["vision_cfg"], "image_size": 96}}
    (tmp_path / "tiny-but-larger.json").write_text(json.dumps(larger))
    for name in ("tiny-of-training", "tiny-but-larger"):
        open_clip.add_model_config(tmp_path / f"{name}.json")
    model = open_clip.create_model("tiny-of-training")
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "epoch_3.pt")
    registry.load(registry.describe(f"open_clip:tiny-of-training@{tmp_path}/epoch_3.pt"), CPU)
    with pytest.raises(EncoderError, match=r"visual\.positional_embedding \[17, 64\], not \[37, 64\]"):
        registry.load(registry.describe(f"open_clip:tiny-but-larger@{tmp_path}/epoch_3.pt"), CPU)


# -- what comes with a model and must not run ----------------------------------------------------


class Pickled:
    """A checkpoint whose loading makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def pickled(path: Path, marker: Path) -> None:
    if path.suffix == ".npz":
        np.savez(path, params=np.array([Pickled(marker)], object))
    elif path.suffix == ".npy":
        np.save(path, np.array([Pickled(marker)], object))
    elif path.suffix == ".safetensors":
        path.write_bytes(pickle.dumps(Pickled(marker)))
    else:
        torch.save({"state_dict": {"logit_scale": Pickled(marker)}}, path)


def copied(checkpoint: Checkpoint, kind: str, folder: Path) -> Path:
    """A checkpoint's folder without its weights."""
    shutil.copytree(checkpoint(kind).rpartition(":")[2], folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    return folder


def test_the_checkpoint_of_these_tests_does_run_where_it_is_unpickled(tmp_path: Path) -> None:
    pickled(tmp_path / "x.pt", tmp_path / "marker")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "marker").is_dir()


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "ckpt", "npz", "npy", "safetensors"])
def test_a_pickle_named_as_a_file_is_not_run(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "tiny-of-pickle.json").write_text(json.dumps(checkpoints.open_clip_config()))
    open_clip.add_model_config(tmp_path / "tiny-of-pickle.json")
    pickled(tmp_path / f"model.{suffix}", tmp_path / "marker")
    spec = registry.describe(f"open_clip:tiny-of-pickle@{tmp_path}/model.{suffix}")
    with pytest.raises(EncoderError):
        registry.load(spec, CPU)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.pth"])
def test_a_pickle_in_a_local_dir_is_not_run(checkpoint: Checkpoint, tmp_path: Path, bucket, name: str) -> None:
    folder = copied(checkpoint, "open_clip-gelu", tmp_path / "model")
    pickled(folder / name, tmp_path / "marker")
    for reference in (str(folder), bucket(str(folder))):
        spec = registry.describe(f"open_clip:local-dir:{reference}")
        with pytest.raises(EncoderError):
            registry.load(spec, CPU)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00001.bin"])
def test_a_pickle_in_a_folder_of_transformers_is_not_run(checkpoint: Checkpoint, tmp_path: Path, name: str) -> None:
    folder = copied(checkpoint, "hf-siglip", tmp_path / "model")
    pickled(folder / name, tmp_path / "marker")
    if "-of-" in name:
        index = {"metadata": {"total_size": 1}, "weight_map": {"logit_scale": name}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    spec = registry.describe(f"hf:{folder}")
    with pytest.raises(EncoderError):
        registry.load(spec, CPU)
    assert not (tmp_path / "marker").exists()


def test_pieces_of_a_checkpoint_lie_in_its_folder(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = copied(checkpoint, "hf-siglip", tmp_path / "model")
    pickled(tmp_path / "elsewhere.bin", tmp_path / "marker")
    index = {"metadata": {"total_size": 1}, "weight_map": {"logit_scale": "../elsewhere.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(EncoderError, match=r"lacks \.\./elsewhere\.bin"):
        registry.describe(f"hf:{folder}")


CODE = """
import os
from transformers import PretrainedConfig, PreTrainedTokenizerFast
os.mkdir({marker!r})
class Own(PretrainedConfig):
    model_type = "own"
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def with_code(folder: Path, name: str, marker: Path, **settings: Any) -> None:
    """Settings of a model that name code beside them."""
    path = folder / name
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **settings}))
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))


def test_the_code_of_these_tests_does_run_where_it_is_trusted(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = copied(checkpoint, "hf-siglip", tmp_path / "model")
    with_code(folder, "config.json", tmp_path / "marker", model_type="own", auto_map={"AutoConfig": "own.Own"})
    transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (tmp_path / "marker").is_dir()


def test_code_that_comes_with_a_model_is_not_run(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = copied(checkpoint, "hf-siglip", tmp_path / "model")
    with_code(folder, "config.json", tmp_path / "marker", model_type="own", auto_map={"AutoConfig": "own.Own"})
    with pytest.raises(EncoderError, match="needs no code of its own"):
        registry.describe(f"hf:{folder}")
    assert not (tmp_path / "marker").exists()


def test_code_beside_a_known_model_is_left_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    name = checkpoint("hf-siglip")
    folder = tmp_path / "model"
    shutil.copytree(name.rpartition(":")[2], folder)
    with_code(folder, "config.json", tmp_path / "marker", auto_map={"AutoConfig": "own.Own", "AutoModel": "own.Own"})
    spec = registry.describe(f"hf:{folder}")
    registry.load(spec, CPU)
    assert spec.weights == registry.describe(name).weights
    assert not (tmp_path / "marker").exists()


def test_code_of_a_tokenizer_is_not_run_whatever_the_model_asks_for(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = copied(checkpoint, "open_clip-gelu", tmp_path / "model")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "own", "tokenizer_kwargs": {"trust_remote_code": True}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "open_clip_model.safetensors").write_bytes(b"unread")
    own = {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}
    with_code(folder, "tokenizer_config.json", tmp_path / "marker", tokenizer_class="OwnTokenizer", auto_map=own)
    with pytest.raises(EncoderError, match="needs no code of its own"):
        registry.describe(f"open_clip:local-dir:{folder}")
    assert not (tmp_path / "marker").exists()


def test_code_of_a_text_tower_is_not_run(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = Path(checkpoint("open_clip-gelu").rpartition(":")[2])
    spec = registry.describe(checkpoint("open_clip-gelu"))
    (tmp_path / "model").mkdir()
    shutil.copy(folder / "open_clip_model.safetensors", tmp_path / "model")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_model_name"] = str(tmp_path / "model")
    (tmp_path / "model" / "open_clip_config.json").write_text(json.dumps(config))
    own = {"AutoConfig": "own.Own"}
    with_code(tmp_path / "model", "config.json", tmp_path / "marker", model_type="own", auto_map=own)
    with pytest.raises(EncoderError, match="execute custom code"):
        registry.load(dataclasses.replace(spec, reference=f"local-dir:{tmp_path / 'model'}"), CPU)
    assert not (tmp_path / "marker").exists()


def test_credentials_in_the_name_of_an_encoder_are_refused() -> None:
    with pytest.raises(ConfigError, match="credentials") as refused:
        registry.describe("open_clip:ViT-B-32@https://user:planted-7f3a@host/model.safetensors")
    assert "planted" not in str(refused.value)


# -- the hub's cache -----------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a folder into a hub cache of one's own, as a download would, and goes offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(name: str, folder: str) -> None:
        root = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = root / "snapshots" / COMMIT
        (root / "blobs").mkdir(parents=True)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(COMMIT)
        snapshot.mkdir(parents=True)
        for path in Path(folder).iterdir():
            blob = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copy(path, blob)
            (snapshot / path.name).symlink_to(blob)

    return put


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_hub_model_offline(checkpoint: Checkpoint, hub) -> None:
    local = registry.describe(checkpoint("hf-siglip"))
    hub("someone/model", checkpoint("hf-siglip").rpartition(":")[2])
    for name in ("hf:someone/model", f"hf:someone/model@{COMMIT}", "hf:someone/model@main"):
        spec = registry.describe(name)
        assert spec.reference == f"someone/model@{COMMIT}", "a revision moves; what is planned does not"
        assert spec.fingerprint == local.fingerprint
    registry.load(spec, CPU)
    assert registry.tokenizer(spec)(["a dog"]).shape == (1, 64)


def test_a_hub_model_that_is_not_in_the_cache(hub) -> None:
    with pytest.raises(EncoderError, match=r"someone/else.*\n.*download"):
        registry.describe("hf:someone/else")


def test_a_pretrained_tag_offline(checkpoint: Checkpoint, hub, tmp_path: Path, monkeypatch) -> None:
    """A tag of open_clip's table, for an architecture small enough to have here."""
    folder = Path(checkpoint("open_clip-quickgelu").rpartition(":")[2])
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    for arch in ("tiny-tagged", "tiny-tagged-quickgelu"):
        (tmp_path / f"{arch}.json").write_text(json.dumps({**config, "quick_gelu": arch.endswith("gelu")}))
        open_clip.add_model_config(tmp_path / f"{arch}.json")
        cfg = _pcfg(hf_hub="someone/tagged/", quick_gelu=True, mean=(0.1, 0.2, 0.3))
        monkeypatch.setitem(_PRETRAINED, arch, {"best_tag": cfg})
    hub("someone/tagged", str(folder))
    spec = registry.describe("open_clip:tiny-tagged-quickgelu/best_tag")
    assert spec.image is not None and spec.image.mean == (0.1, 0.2, 0.3)
    local = registry.load(registry.describe(checkpoint("open_clip-quickgelu")), CPU)
    tokens = torch.from_numpy(registry.tokenizer(spec)(["a dog"]))
    assert torch.equal(registry.load(spec, CPU).texts(tokens), local.texts(tokens))
    assert spec.weights == registry.describe(checkpoint("open_clip-quickgelu")).weights
    with pytest.raises(EncoderError, match="tiny-tagged-quickgelu"):
        registry.describe("open_clip:tiny-tagged/best_tag")


# -- digests -------------------------------------------------------------------------------------


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"one")
    assert file_digest(path, tmp_path / "cache") == hashlib.sha256(b"one").hexdigest()
    (memory,) = (tmp_path / "cache" / "digests").iterdir()
    memory.write_text("remembered")
    assert file_digest(path, tmp_path / "cache") == "remembered"
    path.write_bytes(b"two!")
    assert file_digest(path, tmp_path / "cache") == hashlib.sha256(b"two!").hexdigest()


def test_a_node_without_a_home_folder_still_digests(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"one")
    (tmp_path / "cache").write_text("a file, where the folder should be")
    with pytest.raises(NotADirectoryError):
        (tmp_path / "cache" / "digests").mkdir(parents=True)
    assert file_digest(tmp_path / "weights.bin", tmp_path / "cache") == hashlib.sha256(b"one").hexdigest()
