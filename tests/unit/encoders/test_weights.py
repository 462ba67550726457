"""Weights in object storage, in files and in the hub's cache: fetched once, digested, never half there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import huggingface_hub
import open_clip
import pytest
import torch
from open_clip.pretrained import _PRETRAINED, _pcfg

from pipelines.encoders import registry, weights
from pipelines.encoders.digest import file_digest
from pipelines.errors import EncoderError
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
