"""`vecmill train` from start to end on a local Ray: killed and continued, evaluated, and an encoder at once."""

from __future__ import annotations

import json
import os
import re
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3fs
import yaml

from pipelines.evaluate.report import report as write_report
from pipelines.queries import Query, embed_queries, query_spec
from pipelines.scenes import key_of, scene, write_shards
from pipelines.search import Searcher
from pipelines.storage import Store
from pipelines.training.checkpoint import checkpoints
from tests.flow.command import TIMEOUT_S, Command, vecmill
from tests.flow.runs import SMALL, embedded
from tests.unit.training.runs import figures

DATA = os.environ.get("VECMILL_TEST_DATA")
pytestmark = pytest.mark.timeout(2 * TIMEOUT_S)

SCENES, EPOCHS = 120, 3
# Ten seconds are promised, and as many more given to a busy machine.
STOP_S = 20
RECIPE: dict[str, Any] = {
    "data": {"flip": False, "split": {"train": 0.8, "val": 0.2, "test": 0.0}},
    "model": {
        "image_tower": "test_efficientnet", "image_size": 32, "embed_dim": 32, "lstm_hidden": 16, "word_dim": 16,
        "max_words": 30, "dropout": 0.2,
    },
    "loss": {"cmpm": 1, "cmpc": 1, "infonce": 0.5},
    "optim": {
        "epochs": EPOCHS, "batch_size": 16, "lr": 0.002, "ema": 0.9, "frozen_epochs": 1, "schedule": "cosine",
        "warmup_epochs": 0.5,
    },
    "workers": {"threads": 1},
}  # fmt: skip


def write_recipe(path: Path, inputs: Path, output: Path, **changes: Any) -> str:
    settings = {**RECIPE, "input": str(inputs), "output": str(output)}
    path.write_text(yaml.safe_dump({**settings, **changes}))
    return str(path)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train") / "shards"
    write_shards(folder, SCENES, 3, seed=8, broken=3)
    return folder


@pytest.fixture(scope="module")
def straight(shards: Path, ray_local: str) -> Path:
    """The output of a run that nothing disturbed."""
    output = shards.parent / "straight"
    recipe = write_recipe(shards.parent / "straight.yaml", shards, output)
    planned = vecmill("train", recipe, "--dry-run", "--address", ray_local)
    assert "Nothing was changed" in planned and not output.exists()
    printed = vecmill("train", recipe, "--address", ray_local)
    assert f"{EPOCHS} epochs; the model is of epoch" in printed
    return output


def epochs(store: Store) -> list[dict[str, Any]]:
    """What an epoch gave, without the time that it took."""
    return figures(json.loads(store.read("metrics.json"))["epochs"])


def test_metrics_curves_and_evaluation_are_there(straight: Path) -> None:
    told = epochs(Store(str(straight)))
    assert [epoch["epoch"] for epoch in told] == [1, 2, 3] and told[-1]["loss"] < told[0]["loss"]
    # Broken images are neither trained nor evaluated on, and every other one is in one of the two.
    survey = json.loads((straight / "survey.json").read_text())
    assert 0 < told[0]["evaluated"]["images"] <= SCENES - survey["images"]
    for epoch in told:
        assert epoch.keys() >= {"cmpm", "cmpc", "infonce", "image_precision", "matched_similarity", "gradient_norm"}
        for direction in ("text_to_image", "image_to_text"):
            found = [epoch[direction][f"recall@{k}"] for k in (1, 5, 10)]
            assert found == sorted(found) and 0 <= found[0] <= found[2] <= 1
    assert (straight / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (straight / "model").iterdir()} == {"config.json", "model.safetensors", "vocab.txt"}


def test_a_run_in_a_bucket_that_was_killed_goes_on_to_the_same_metrics_and_weights(
    straight: Path, shards: Path, ray_local: str, s3: dict[str, Any]
) -> None:
    s3fs.S3FileSystem(**s3["s3"]).mkdir("train")
    store, more = Store("s3://train/killed", s3), {"storage": s3, "checkpoint": {"every_steps": 4}}
    recipe = write_recipe(shards.parent / "killed.yaml", shards, store.root, **more)
    run, deadline = Command(["train", recipe, "--address", ray_local]), time.monotonic() + TIMEOUT_S
    while not checkpoints(store):
        assert run.is_running and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait()[0] == -signal.SIGKILL
    assert EPOCHS not in [epoch for epoch, _ in checkpoints(store)]
    printed = vecmill("train", recipe, "--address", ray_local)
    assert re.search(r"\d+ epochs( and \d+ steps)? were done before; going on from their checkpoint", printed)
    assert epochs(store) == epochs(Store(str(straight)))
    assert store.read("model/model.safetensors") == (straight / "model" / "model.safetensors").read_bytes()
    assert store.read("curves.png").startswith(b"\x89PNG") and len(checkpoints(store)) == 2


def test_a_run_that_is_stopped_says_so_and_can_go_on(shards: Path) -> None:
    """With a Ray of its own: the signal is the terminal's, to all of its processes."""
    store = Store(str(shards.parent / "stopped"))
    more = {"checkpoint": {"every_steps": 2}, "optim": {**RECIPE["optim"], "epochs": 1000}}
    recipe = write_recipe(shards.parent / "stopped.yaml", shards, Path(store.root), **more)
    run, deadline = Command(["train", recipe], alone=True), time.monotonic() + TIMEOUT_S
    while not checkpoints(store):
        assert run.is_running and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    status, printed = run.wait(STOP_S)
    assert status == 128 + signal.SIGINT, printed
    assert "run the same command to go on" in printed and "Traceback" not in printed
    assert store.names("leases") == []


def test_what_a_worker_finds_wrong_is_told_at_once(shards: Path, ray_local: str) -> None:
    """Images of more pixels than decode.max_pixels cannot be read, so that there is nothing to train with."""
    output = shards.parent / "unread"
    recipe = write_recipe(shards.parent / "unread.yaml", shards, output, decode={"max_pixels": 1})
    printed = vecmill("train", recipe, "--address", ray_local, status=1)
    assert "Epoch 1 had no batch" in printed and "Traceback" not in printed


def test_a_part_to_evaluate_on_that_is_empty_is_refused_before_the_first_step(shards: Path, ray_local: str) -> None:
    output = shards.parent / "none"
    data = {"split": {"train": 1.0, "val": 0.0, "test": 0.0}}
    recipe = write_recipe(shards.parent / "none.yaml", shards, output, data=data)
    assert "no sample to evaluate on" in vecmill("train", recipe, "--address", ray_local, status=2)
    assert not (output / "survey.json").exists()


def test_a_finished_run_does_nothing_and_another_recipe_is_refused(
    straight: Path, shards: Path, ray_local: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.is_file()}
    recipe = str(shards.parent / "straight.yaml")
    assert "nothing is left to do" in vecmill("train", recipe, "--address", ray_local)
    refused = vecmill("train", recipe, "--set", "optim.lr=0.5", "--address", ray_local, status=2)
    assert "optim.lr: 0.002 → 0.5" in refused
    assert before == {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.is_file()}


def test_the_model_is_an_encoder_at_once(straight: Path, shards: Path, ray_local: str, tmp_path: Path) -> None:
    store, report = embedded(
        {
            **SMALL,
            "input": str(shards),
            "output": str(tmp_path / "out"),
            "encoder": f"matcher:{straight / 'model'}",
            "name": "mine",
        }
    )
    assert report["encoders"]["mine"]["items"]["image"]["embedded"] > SCENES - 4
    page = Path(write_report(store)["page"]).read_text()
    assert f"{straight}; the model is of epoch" in page and page.count('aria-label="recall, ') == 2
    image = tmp_path / "query.png"
    scene(8, 5).image.save(image)
    spec = query_spec(store, "mine")
    vectors = embed_queries(spec, [Query(image=str(image)), Query(text="a red star")])
    by_image, by_text = Searcher(store, "mine", "image", exact=True).search(vectors, 3)
    assert by_image[0].key == key_of(5) and len(by_text) == 3


# -- real photos -----------------------------------------------------------------------------------

PHOTOS = 100
PHOTO_RECIPE: dict[str, Any] = {
    "data": {"cache": True, "shuffle": 1000},
    "model": {
        "image_tower": "test_resnet", "image_size": 64, "embed_dim": 64, "lstm_hidden": 64, "word_dim": 64,
        "max_words": 30,
    },
    "optim": {"epochs": 12, "batch_size": 25, "lr": 0.002, "ema": 0.9},
    "stop": {"every": 12},
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos as CUHK-PEDES describes its own: two entries an identity, which share out a photo's captions."""
    if not DATA:
        pytest.skip("VECMILL_TEST_DATA does not name a folder with photos/photos-*.tar")
    folder, rows = tmp_path_factory.mktemp("photos"), []
    with tarfile.open(Path(DATA) / "photos" / "photos-00000.tar") as tar:
        members = {member.name: member for member in tar}
        keys = sorted(name.removesuffix(".jpg") for name in members if name.endswith(".jpg"))[:PHOTOS]
        for number, key in enumerate(keys, 1):
            captions = json.load(tar.extractfile(members[f"{key}.json"]))["captions"]
            image = tar.extractfile(members[f"{key}.jpg"]).read()
            for half, texts in enumerate((captions[:2], captions[2:])):
                (folder / f"{key}-{half}.jpg").write_bytes(image)
                rows.append({"id": number, "file_path": f"{key}-{half}.jpg", "captions": texts, "split": "train"})
    (folder / "reid_raw.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize("identity", ["own", "id"])
def test_on_photos_the_loss_falls_and_what_was_trained_on_is_found(photos: Path, ray_local: str, identity: str) -> None:
    output = photos / identity
    losses = {"cmpm": 1, "cmpc": 1, "constraint_images": 0.01 if identity == "id" else 0, "constraint_texts": 0}
    data = {**PHOTO_RECIPE["data"], "identity": identity, "train": "train", "val": "train"}
    recipe = {**PHOTO_RECIPE, "data": data, "loss": losses, "read": {"key_column": ""}, "workers": {"threads": 2}}
    path = write_recipe(photos / f"{identity}.yaml", photos / "reid_raw.json", output, **recipe)
    vecmill("train", path, "--address", ray_local)
    told = json.loads((output / "metrics.json").read_text())["epochs"]
    assert told[-1]["loss"] < 0.9 * told[0]["loss"]
    classes = json.loads((output / "survey.json").read_text())["classes"]
    assert len(classes) == (PHOTOS if identity == "id" else 2 * PHOTOS)
    # A caption by chance finds its own among 200 images in 5 of 100 times, and one of two in 10.
    assert told[-1]["text_to_image"]["recall@10"] > 0.4
    assert np.isfinite([epoch["loss"] for epoch in told]).all()
