"""The same scenes in every format give the same vectors; and what is damaged is rejected, one by one."""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipelines.embed
from pipelines.scenes import key_of, planned_damage, scene, write_shards
from pipelines.scenes.compose import jpeg
from pipelines.storage import Store
from tests.flow.command import TIMEOUT_S, vecmill
from tests.flow.runs import embedded, rows, settings, write_recipe
from tests.unit.encoders.reference import OpenClipReference

pytestmark = pytest.mark.timeout(2 * TIMEOUT_S)

SCENES = 40
REASONS = {
    "a JPEG that is cut off in the middle": "truncated_image",
    "an image file of zero bytes": "empty_image",
    "a web page named .jpg": "unidentified_image",
    "a caption that is not UTF-8": "not_utf8",
    "a file of unknown kind and nothing else": "unknown_extension",
    "a PNG that claims 40,000 by 40,000 pixels": "too_many_pixels",
}


@dataclass(frozen=True)
class Made:
    """A scene as it is put into each format."""

    index: int
    image: bytes
    captions: list[str]

    @property
    def key(self) -> str:
        return key_of(self.index)

    @property
    def label(self) -> str:
        return "even" if self.index % 2 == 0 else "odd"

    @property
    def fields(self) -> dict[str, Any]:
        return {"captions": self.captions, "index": self.index, "label": self.label}


def made(index: int) -> Made:
    drawn = scene(0, index)
    return Made(index, jpeg(drawn.image), drawn.captions)


SAMPLES = [made(index) for index in range(SCENES)]


# -- each format's writer: a path in a folder ----------------------------------------------------


def write_tar(path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for sample in SAMPLES:
            files = {
                "jpg": sample.image,
                "txt": sample.captions[0].encode(),
                "json": json.dumps(sample.fields).encode(),
            }
            for extension, data in files.items():
                add(tar, f"{sample.key}.{extension}", data)
    return path


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_parquet(path: Path, image: Callable[[Made], Any]) -> Path:
    table = [{"key": sample.key, "image": image(sample), **sample.fields} for sample in SAMPLES]
    pq.write_table(pa.Table.from_pylist(table), path)
    return path


def write_folder(path: Path) -> Path:
    for sample in SAMPLES:
        (path / sample.label).mkdir(parents=True, exist_ok=True)
        stem = path / sample.label / sample.key
        stem.with_suffix(".jpg").write_bytes(sample.image)
        stem.with_suffix(".txt").write_text("\n".join(sample.captions))
        stem.with_suffix(".json").write_text(json.dumps({"index": sample.index}))
    return path


def image_path(sample: Made) -> str:
    return f"folder/{sample.label}/{sample.key}.jpg"


def write_jsonl(path: Path) -> Path:
    lines = ({"key": sample.key, "image": image_path(sample), **sample.fields} for sample in SAMPLES)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_csv(path: Path) -> Path:
    """A row a caption, as Flickr's lists have it."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "image", "caption", "index", "label"])
        for sample in SAMPLES:
            for caption in sample.captions:
                writer.writerow([sample.key, image_path(sample), caption, sample.index, sample.label])
    return path


FORMATS: dict[str, Callable[[Path], Path]] = {
    "tar": lambda folder: write_tar(folder / "tar.tar"),
    "gz": lambda folder: write_tar(folder / "gz.tar.gz", "w:gz"),
    "binary": lambda folder: write_parquet(folder / "binary.parquet", lambda sample: sample.image),
    "hf": lambda folder: write_parquet(folder / "hf.parquet", lambda sample: {"bytes": sample.image, "path": None}),
    "folder": lambda folder: write_folder(folder / "folder"),
    "jsonl": lambda folder: write_jsonl(folder / "jsonl.jsonl"),
    "csv": lambda folder: write_csv(folder / "csv.csv"),
}


def write_without_images(path: Path, keys: list[str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key in keys:
            add(tar, f"{key}.jpg", b"")
    return path


# -- one run over all of them --------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """A run that has ended: its output and report, and what Ray Data says it did."""

    store: Store
    report: dict[str, Any]
    stats: str

    @property
    def encoder(self) -> dict[str, Any]:
        """What the report says of it."""
        return dict(self.report["encoders"]["clip"])

    def rows(self, dataset: str, format: str) -> list[dict[str, Any]]:
        """Of the shard of a format, whose files bear its name."""
        return [row for row in rows(self.store, dataset) if row["shard"].startswith(f"{format}-")]


@pytest.fixture(scope="module")
def ended(ray_local: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("formats")
    inputs = [str(write(folder)) for write in FORMATS.values()]
    inputs += [
        str(write_without_images(folder / "empty.tar", [])),
        str(write_without_images(folder / "bad.tar", ["a"])),
    ]
    kept: list[Any] = []
    build = pipelines.embed.pipeline
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.embed, "pipeline", lambda *args: kept.append(build(*args)) or kept[-1])
        store, report = embedded(settings(inputs, folder / "out", checkpoint))
    return Ended(store, report, kept[0]._write_ds.stats())


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> OpenClipReference:
    return OpenClipReference(f"local-dir:{checkpoint}")


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def test_every_shard_is_done(ended: Ended) -> None:
    assert ended.encoder["committed"] == len(FORMATS) + 2
    assert ended.encoder["items"]["image"]["embedded"] == SCENES * len(FORMATS)
    captions = sum(len(sample.captions) for sample in SAMPLES)
    assert (
        ended.encoder["items"]["text"]["items"] == ended.encoder["items"]["text"]["embedded"] == captions * len(FORMATS)
    )
    assert ended.encoder["rejects"] == {"empty_image": 1}


@pytest.mark.parametrize("format", FORMATS)
def test_images_are_the_librarys(ended: Ended, reference: OpenClipReference, format: str) -> None:
    found = {row["key"].rpartition("/")[2]: row["embedding"] for row in ended.rows("embeddings/clip/image", format)}
    assert sorted(found) == [sample.key for sample in SAMPLES]
    for sample in SAMPLES:
        assert np.allclose(found[sample.key], unit(reference.image(sample.image)), atol=1e-3), sample.key


@pytest.mark.parametrize("format", FORMATS)
def test_captions_are_the_librarys(ended: Ended, reference: OpenClipReference, format: str) -> None:
    table = ended.rows("embeddings/clip/text", format)
    found = {(row["key"].rpartition("/")[2], row["caption_index"]): row["embedding"] for row in table}
    assert len(found) == len(table)
    given = {(sample.key, at): text for sample in SAMPLES for at, text in enumerate(sample.captions)}
    assert found.keys() == given.keys()
    for place in list(given)[:10]:
        assert np.allclose(found[place], unit(reference.text(given[place])), atol=1e-3), place


@pytest.mark.parametrize("format", FORMATS)
def test_everything_else_survives(ended: Ended, format: str) -> None:
    found = {row["key"].rpartition("/")[2]: row for row in ended.rows("samples", format)}
    for sample in SAMPLES:
        row = found[sample.key]
        assert row["captions"] == sample.captions
        assert row["label"] == sample.label
        assert str(json.loads(row["metadata"])["index"]) == str(sample.index)


def test_a_shard_of_nothing_and_one_of_rejects_have_their_parts(ended: Ended) -> None:
    assert ended.rows("samples", "empty") == ended.rows("embeddings/clip/image", "empty") == []
    assert [row["reason"] for row in ended.rows("rejects/clip", "bad")] == ["empty_image"]
    assert [row["key"] for row in ended.rows("samples", "bad")] == ["a"]


def test_four_operators_are_not_fused(ended: Ended) -> None:
    operators = re.findall(r"^Operator \d+ ([^:]+):", ended.stats, re.MULTILINE)
    assert operators == ["ReadReadShards", "MapBatches(Decode)", "MapBatches(Encode)", "Write"]


def test_each_damage_is_one_reject_and_above_the_ceiling_the_status_tells(
    ray_local: str, checkpoint: Path, tmp_path: Path
) -> None:
    write_shards(tmp_path / "in", SCENES, shards=2, broken=len(REASONS))
    recipe = settings(str(tmp_path / "in" / "*.tar"), tmp_path / "out", checkpoint)
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    printed = vecmill("embed", path, "--address", ray_local, "--reject-ceiling", "0.01", status=3)
    assert "more than the ceiling of 1.0%" in printed
    found = [(row["key"], row["modality"], row["reason"]) for row in rows(Store(str(tmp_path / "out")), "rejects/clip")]
    planned = planned_damage(SCENES, len(REASONS)).items()
    assert sorted(found) == sorted((key_of(i), d.modality, REASONS[d.what]) for i, d in planned if d.modality)
