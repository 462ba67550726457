"""`vecmill stats` and `vecmill split` by the command line, on several shards of each kind of input."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.flow.command import vecmill
from tests.unit.encoders.inputs import picture

SAMPLES, IDENTITIES, SHARDS = 36, 13, 3
CAPTIONS = [[f"picture {at} of a dog"] + ["a red ball"] * (at % 3) for at in range(SAMPLES)]
KINDS = ("tar", "folder", "jsonl")


def image(at: int) -> Image.Image:
    return picture(17 + at, 40 - at // 2, at)


def identity(at: int) -> int:
    return at % IDENTITIES


def png(at: int) -> bytes:
    file = io.BytesIO()
    image(at).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The same samples thrice, of which one image is broken; a folder has one caption an image, and names labels."""
    top = tmp_path_factory.mktemp("inputs")
    images = [b"no image" if at == 5 else png(at) for at in range(SAMPLES)]
    for shard in range(SHARDS):
        with tarfile.open(top / f"{shard:05d}.tar", "w") as tar:
            for at in range(shard, SAMPLES, SHARDS):
                described = json.dumps({"captions": CAPTIONS[at], "identity": identity(at)}).encode()
                for name, data in ((f"k{at}.png", images[at]), (f"k{at}.json", described)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    rows = []
    for at in range(SAMPLES):
        path = top / "folder" / f"c{identity(at)}" / f"k{at}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images[at])
        path.with_suffix(".txt").write_text(CAPTIONS[at][0])
        rows.append(
            {
                "key": f"k{at}",
                "image": f"folder/{path.parent.name}/{path.name}",
                "captions": CAPTIONS[at],
                "identity": identity(at),
            }
        )
    (top / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    slices = ["--set", f"read.samples_per_slice={SAMPLES // SHARDS}"]
    return {
        "tar": [str(top / "*.tar")],
        "folder": [str(top / "folder"), *slices],
        "jsonl": [str(top / "rows.jsonl"), *slices],
    }


def group(kind: str, at: int) -> str:
    return f"c{identity(at)}" if kind == "folder" else str(identity(at))


def grouped_by(kind: str) -> str:
    return "label" if kind == "folder" else "identity"


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_the_decoded_pixels(
    inputs: dict[str, list[str]], ray_local: str, tmp_path: Path, kind: str
) -> None:
    output = tmp_path / "stats"
    arguments = [*inputs[kind], "--identity", grouped_by(kind), "--output", str(output)]
    planned = vecmill("stats", *arguments, "--dry-run")
    assert "Nothing was changed" in planned and not output.exists()
    assert int(planned.split("shards")[0].split()[-1]) > 1
    printed = vecmill("stats", *arguments, "--address", ray_local)
    told: dict[str, Any] = json.loads((output / "stats.json").read_text())
    pixels = np.concatenate([np.asarray(image(at)).reshape(-1, 3) for at in range(SAMPLES) if at != 5])
    np.testing.assert_allclose(told["channels"]["mean"], (pixels / 255).mean(0), rtol=1e-12)
    np.testing.assert_allclose(told["channels"]["std"], (pixels / 255).std(0), rtol=1e-9)
    for channel, found in zip(pixels.T, told["channels"]["histogram"], strict=True):
        assert found == np.bincount(channel, minlength=256).tolist()
    assert (told["samples"], told["images"], told["unreadable_images"]) == (SAMPLES, SAMPLES - 1, 1)
    assert told["pixels"] == len(pixels)
    captions = [texts[:1] if kind == "folder" else texts for texts in CAPTIONS]
    counts = Counter(map(len, captions))
    assert told["captions"]["per_sample"]["histogram"] == {str(n): counts[n] for n in sorted(counts)}
    words = Counter(len(text.split()) for texts in captions for text in texts)
    assert told["words"]["per_caption"]["histogram"] == {str(n): words[n] for n in sorted(words)}
    images = Counter(Counter(map(identity, range(SAMPLES))).values())
    assert told["identities"]["count"] == IDENTITIES
    assert told["identities"]["images_each"]["histogram"] == {str(n): images[n] for n in sorted(images)}
    assert (output / "stats.png").read_bytes().startswith(b"\x89PNG")
    assert f"{SAMPLES} samples, {SAMPLES - 1} images, 1 cannot be read" in printed


SHARES = ["--train", "0.5", "--val", "0.25", "--test", "0.25"]


@pytest.fixture(scope="module")
def splits(inputs: dict[str, list[str]], ray_local: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each kind's split holds, and what was printed of it; `again`: of the JSONL, a second time."""
    found = {}
    for name in (*KINDS, "again"):
        kind = "jsonl" if name == "again" else name
        path = tmp_path_factory.mktemp("splits") / "splits.parquet"
        arguments = [*inputs[kind], *SHARES, "--by", grouped_by(kind), "--output", str(path)]
        assert "Nothing was changed" in vecmill("split", *arguments, "--dry-run") and not path.exists()
        printed = vecmill("split", *arguments, "--address", ray_local)
        found[name] = (pq.read_table(path).to_pylist(), printed)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_tears_no_group_apart(splits: dict[str, Any], kind: str) -> None:
    rows, printed = splits[kind]
    assert len(rows) == len({(row["shard"], row["row"]) for row in rows}) == SAMPLES
    assert len({row["shard"] for row in rows}) > 1
    assert sorted(row["group"] for row in rows) == sorted(group(kind, at) for at in range(SAMPLES))
    assert len({(row["group"], row["split"]) for row in rows}) == IDENTITIES
    counts = Counter(row["split"] for row in rows)
    assert counts.keys() == {"train", "val", "test"}
    for name, count in counts.items():
        assert f"{name:<6}{count:>10,}  {count / SAMPLES:.1%}" in printed


def test_a_split_is_the_same_again_and_from_another_kind_of_input(splits: dict[str, Any]) -> None:
    assert splits["again"][0] == splits["jsonl"][0]
    of_tar, of_jsonl = ({row["key"]: row["split"] for row in splits[kind][0]} for kind in ("tar", "jsonl"))
    assert of_tar == of_jsonl and len(of_tar) == SAMPLES


def test_shares_that_are_none_are_refused(inputs: dict[str, list[str]], tmp_path: Path) -> None:
    for shares, told in ((["--train", "0.9"], "add up to 1.1"), (["--val", "1.5"], "--val")):
        assert told in vecmill("split", *inputs["tar"], *shares, "--output", str(tmp_path / "x"), status=2)
    assert not list(tmp_path.iterdir())
