from __future__ import annotations

import gzip
import io
import shutil
import tarfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from pipelines.errors import ConfigError
from pipelines.evaluate.charts import figure
from pipelines.evaluate.similarity import Pairs, Side, _binned, similarity, title_of
from pipelines.evaluate.thumbnails import thumbnail
from pipelines.index.parts import unit
from pipelines.record import read_record
from pipelines.storage import Store
from tests.indexed import ENCODER, everything, part_name, write_output
from tests.unit.evaluate.outputs import describe, label_of, replace_column, replace_vectors


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("similar")
    write_output(root, parts=3)
    describe(root)
    return root


def side(root: Path, modality: Any) -> Side:
    return Side(Store(str(root)), ENCODER, modality)


def test_matched_pairs_are_of_one_sample_and_auc_is_counted_pair_by_pair(root: Path) -> None:
    figures = similarity(side(root, "text"), side(root, "image"), sample=60)
    matrix = np.load(Path(figures["folder"]) / "matrix.npy")
    assert matrix.shape == (60, 60) and figures["items"] == 60
    items, vectors = everything(root, "text")
    pictured, pictures = everything(root, "image")
    vectors, pictures = unit(vectors), unit(pictures)
    images = dict(zip([(item.shard, item.row) for item in pictured], pictures, strict=True))
    own = {tuple(vector): (item.shard, item.row) for item, vector in zip(items, vectors, strict=True)}
    assert set(np.diag(matrix).round(4)) <= {np.float32(np.dot(vector, images[own[vector]])).round(4) for vector in own}
    matched, unmatched = figures["matched"]["pairs"], figures["unmatched"]["pairs"]
    assert matched >= 60 and matched + unmatched == 3_600
    assert figures["auc"] > 0.9 and figures["matched"]["mean"] > figures["unmatched"]["mean"]


def test_a_set_with_itself_is_matched_by_label_without_the_diagonal(root: Path) -> None:
    figures = similarity(side(root, "image"), side(root, "image"), sample=10**4)
    items, vectors = everything(root, "image")
    scores = unit(vectors) @ unit(vectors).T
    labels = [label_of(item.row) for item in items]
    same = np.array([[a == b and a is not None for b in labels] for a in labels])
    np.fill_diagonal(same, False)
    off = ~np.eye(len(items), dtype=bool)
    assert figures["matched"]["pairs"] == same.sum() and figures["matched"]["mean"] == pytest.approx(
        scores[same].mean(), abs=1e-4
    )
    assert figures["unmatched"]["mean"] == pytest.approx(scores[off & ~same].mean(), abs=1e-4)
    greater = (scores[same][:, None] > scores[off & ~same][None, ::97]).mean()
    assert figures["auc"] == pytest.approx(greater, abs=0.02)

    names = sorted({label for label in labels if label})
    assert figures["labels"]["names"] == names
    block = np.array([label == names[0] for label in labels])
    assert figures["labels"]["means"][0][1] == pytest.approx(
        scores[np.ix_(block, [label == names[1] for label in labels])].mean(), abs=1e-4
    )
    assert figures["modality_gap"] == 0


def test_figures_of_pairs_are_those_of_the_sorted_scores() -> None:
    random = np.random.default_rng(0)
    scores = random.uniform(-1, 1, (700, 600)).astype(np.float32)
    scores[:, :9] = 1.0  # Ties, and the end of the scale.
    matched = random.random(scores.shape) < 0.1
    figures = Pairs(scores, matched, ~matched).figures()
    assert figures["auc"] == pytest.approx(roc_auc_score(matched.ravel(), scores.ravel()), abs=1e-5)
    for name, which in (("matched", matched), ("unmatched", ~matched)):
        of = np.quantile(scores[which], [0.05, 0.5, 0.95])
        assert [figures[name][each] for each in ("p5", "median", "p95")] == pytest.approx(of.tolist(), abs=1e-4)
        assert figures[name]["mean"] == pytest.approx(float(scores[which].mean()), abs=1e-5)
        assert figures[name]["pairs"] == which.sum()


def test_scores_are_cosines_whatever_the_length(tmp_path: Path) -> None:
    write_output(tmp_path, parts=1, normalize=False)

    def measured() -> dict[str, Any]:
        return similarity(side(tmp_path, "image"), side(tmp_path, "text"), sample=50)

    before = measured()
    replace_vectors(tmp_path / "embeddings" / ENCODER / "image", lambda vectors: 10 * vectors)
    after = measured()
    for name in ("matched", "unmatched"):
        assert after[name] == pytest.approx(before[name], abs=1e-3)
    assert after["modality_gap"] == pytest.approx(before["modality_gap"], abs=1e-3)


def test_two_outputs_meet_by_key(root: Path, tmp_path: Path) -> None:
    write_output(tmp_path, parts=5)
    figures = similarity(side(root, "image"), side(tmp_path, "text"), sample=50)
    assert figures["items"] > 20 and figures["auc"] > 0.9
    other = tmp_path / "other"
    write_output(other, parts=1, first=9)
    with pytest.raises(ConfigError, match="no sample in common"):
        similarity(side(root, "image"), side(other, "image"))


def test_samples_meet_though_shards_have_not_all_modalities(tmp_path: Path) -> None:
    """A shard without captions has no part of them that would hold one."""
    write_output(tmp_path, parts=4)
    (tmp_path / "embeddings" / ENCODER / "text" / part_name(0)).unlink()
    assert similarity(side(tmp_path, "image"), side(tmp_path, "text"), sample=100)["auc"] > 0.9


def test_what_cannot_be_compared_is_refused_with_the_reason(root: Path, tmp_path: Path) -> None:
    write_output(tmp_path, parts=1, dim=8)
    with pytest.raises(ConfigError, match=r"different encoders(.|\n)*dim: 16 → 8"):
        similarity(side(root, "image"), side(tmp_path, "image"))
    with pytest.raises(ConfigError, match="no multimodal vectors"):
        similarity(side(root, "image"), side(root, "multimodal"))
    record = read_record(Store(str(tmp_path)))
    record.encoders[ENCODER].spec["vectors"]["text"]["space"] = "text"
    (tmp_path / "run.json").write_text(record.model_dump_json())
    with pytest.raises(ConfigError, match="image vectors are of the space joint"):
        similarity(side(tmp_path, "image"), side(tmp_path, "text"))


def test_multimodal_vectors_are_compared_too(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=1)
    folder = tmp_path / "embeddings" / ENCODER
    shutil.copytree(folder / "image", folder / "multimodal")
    record = read_record(store)
    known = record.encoders[ENCODER]
    known.spec["vectors"]["multimodal"] = known.spec["vectors"]["image"]
    (tmp_path / "run.json").write_text(
        record.model_copy(
            update={"encoders": {ENCODER: known.model_copy(update={"modalities": [*known.modalities, "multimodal"]})}}
        ).model_dump_json()
    )
    figures = similarity(side(tmp_path, "image"), side(tmp_path, "multimodal"), sample=50)
    assert figures["items"] == 50 and figures["auc"] == 1.0 and figures["modality_gap"] == 0
    assert figures["matched"]["mean"] == pytest.approx(1, abs=1e-3)


PURPLE = np.array([255, 0, 255])


def purple(root: Path, sample: int) -> tuple[int, int]:
    """Items in the picture, and pixels of that colour, which no chart has; other colours there must be."""
    figures = similarity(side(root, "image"), side(root, "text"), sample=sample)
    with Image.open(Path(figures["folder"]) / "similarity.png") as picture:
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 50
    return figures["items"], int((np.abs(colours.astype(int) - PURPLE).max(axis=1) < 16).sum())


def test_a_few_items_are_shown_by_their_pictures(tmp_path: Path) -> None:
    write_output(tmp_path, parts=1)
    file = tmp_path / "purple.png"
    Image.new("RGB", (200, 200), tuple(PURPLE.tolist())).save(file)
    place = {"uri": str(file), "offset": None, "length": None, "sha256": sha256(file.read_bytes()).hexdigest()}
    for name, value in place.items():
        replace_column(
            tmp_path / "samples", name, lambda column, value=value: pa.array([value] * len(column), column.type)
        )
    (few, drawn), (more, all_drawn) = purple(tmp_path, 4), purple(tmp_path, 12)
    assert more > few and drawn > 1_000 * few
    assert all_drawn / more == pytest.approx(drawn / few, rel=0.1)
    assert purple(tmp_path, 40)[1] == 0


def test_many_items_without_labels_are_shown_by_the_means_of_bins(tmp_path: Path) -> None:
    write_output(tmp_path, parts=1)
    assert similarity(side(tmp_path, "image"), side(tmp_path, "text"), sample=100)["labels"] is None
    scores = np.random.default_rng(0).random((150, 150)).astype(np.float32)
    with figure(4, 4) as page:
        axes = page.subplots()
        _binned(axes, scores)
        shown = axes.images[0].get_array()
    starts = np.linspace(0, 150, 64, endpoint=False).astype(int)
    assert shown.shape == (64, 64)
    assert shown[3, 5] == pytest.approx(scores[starts[3] : starts[4], starts[5] : starts[6]].mean(), abs=1e-6)
    assert shown[63, 0] == pytest.approx(scores[starts[63] :, : starts[1]].mean(), abs=1e-6)


# -- thumbnails ----------------------------------------------------------------------------------


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (300, 200), colour).save(file, "PNG")
    return file.getvalue()


def sample_of(uri: Path, data: bytes, **place: Any) -> dict[str, Any]:
    found = {"uri": str(uri), "offset": None, "length": None, "row_group": None, "sha256": sha256(data).hexdigest()}
    return {**found, **place}


def colour_of(found: Any) -> tuple[int, ...]:
    assert found.jpeg, found.reason
    image = found.image()
    assert max(image.size) == 128
    return tuple(round(value / 255) for value in image.getpixel((5, 5)))


def test_thumbnails_come_from_wherever_images_lie(tmp_path: Path) -> None:
    red, blue = picture("red"), picture("blue")
    for suffix, mode in ((".tar", "w"), (".tar.gz", "w:gz")):
        with tarfile.open(tmp_path / f"a{suffix}", mode) as tar:  # type: ignore[call-overload]
            for name, data in (("1.png", red), ("2.png", blue)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (tmp_path / "b.png").write_bytes(blue)
    rows = [{"bytes": data, "path": None} for data in (red, red, blue)]
    pq.write_table(pa.table({"image": rows, "text": ["a", "b", "c"]}), tmp_path / "c.parquet", row_group_size=2)
    with tarfile.open(tmp_path / "a.tar") as tar:
        offset = tar.getmember("2.png").offset_data
    place = {"offset": offset, "length": len(blue)}
    for found in (
        sample_of(tmp_path / "a.tar", blue, **place),
        sample_of(tmp_path / "a.tar.gz", blue, **place),
        sample_of(tmp_path / "b.png", blue, offset=0, length=len(blue)),
        sample_of(tmp_path / "c.parquet", blue, row_group=1),
    ):
        assert colour_of(thumbnail(Store(), found)) == (0, 0, 1)


def test_what_cannot_be_shown_has_a_reason(tmp_path: Path) -> None:
    data = picture("red")
    gone = tmp_path / "gone.tar"
    (tmp_path / "other.png").write_bytes(picture("blue"))
    (tmp_path / "bad.png").write_bytes(b"no image")
    packed = gzip.compress(np.random.default_rng(0).bytes(20_000))
    (tmp_path / "cut.tar.gz").write_bytes(packed[:5_000])
    (tmp_path / "spoilt.tar.gz").write_bytes(packed[:10] + b"\xff" * 5_000)
    inside = {"offset": 9_000, "length": 100}
    cases = {
        "EOFError": sample_of(tmp_path / "cut.tar.gz", data, **inside),
        "invalid block type": sample_of(tmp_path / "spoilt.tar.gz", data, **inside),
        "gone": sample_of(gone, data, offset=512, length=10),
        "not_found": sample_of(tmp_path / "gone.png", data),
        "changed": sample_of(tmp_path / "other.png", data),
        "no_image": {**sample_of(gone, data), "sha256": None},
        "UnidentifiedImageError": sample_of(tmp_path / "bad.png", b"no image"),
    }
    for reason, sample in cases.items():
        found = thumbnail(Store(), sample)
        assert found.jpeg is None and found.data_uri is None and reason in found.reason, (reason, found.reason)
        assert found.image().size == (128, 128)


def test_a_title_fits_the_picture_however_long_the_names_are() -> None:
    name = "open_clip-local-dir-somewhere-in-a-folder-of-a-folder-7a3ac5a9"
    figures = {"a": f"{name} image", "b": f"{name} text", "auc": 0.5, "items": 1_000, "modality_gap": 1.272}
    lines = title_of({**figures, "spread_a": 0.4, "spread_b": 0.653}).splitlines()
    with figure(12.5, 6.2) as page:
        drawn = page.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=11).get_window_extent()
        assert drawn.x1 < page.bbox.x1
    assert lines[-1] == "1,000 items, AUC 0.500, modality gap 1.272 (spread 0.400, 0.653)"
